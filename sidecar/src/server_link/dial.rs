//! Opens the socket and the TLS session below gRPC.
//!
//! A TLS 1.3 client finishes its handshake before the server has checked the client's certificate. Whether the server
//! accepts it is known only with the server's first bytes; [`Dialed::greeting`] reports them.
//!
//! Only TLS 1.3 is used, because both ends are Klio's. Nagle's algorithm is off, because a single commit may wait for
//! a small message.

use super::certificate::{self, Expiry};
use crate::{
    config,
    error::{Error, Failure},
};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::oneshot,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

/// Host and port of the server.
#[derive(Debug, Clone)]
pub(super) struct Target {
    pub authority: String,
    host: String,
    port: u16,
}

/// The port of klio-server if the address contains none.
const DEFAULT_PORT: u16 = 7423;

impl Target {
    pub fn parse(address: &str) -> Result<Self, Error> {
        let wrong = || {
            Error::new(
                Failure::Config,
                format!("server.address: expected https://host:port, found {address:?}"),
            )
        };
        let url = url::Url::parse(address).map_err(|_| wrong())?;
        let host = url.host().ok_or_else(wrong)?;
        let port = url.port().unwrap_or(DEFAULT_PORT);
        let authority = format!("{host}:{port}");
        // An IPv6 address has brackets in a URL, but none in a certificate or when connecting.
        let host = host.to_string().trim_matches(['[', ']']).to_owned();
        Ok(Self { authority, host, port })
    }
}

enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

pub(super) struct Dialed {
    pub stream: TokioIo<Heard>,
    /// `None` without TLS.
    pub expiry: Option<Expiry>,
    /// The result of the first read.
    pub greeting: oneshot::Receiver<io::Result<()>>,
}

impl Dialed {
    fn new(stream: Stream, expiry: Option<Expiry>) -> Self {
        let (first, greeting) = oneshot::channel();
        let stream = TokioIo::new(Heard { stream, first: Some(first) });
        Self { stream, expiry, greeting }
    }
}

/// A stream that reports the result of its first read.
pub(super) struct Heard {
    stream: Stream,
    first: Option<oneshot::Sender<io::Result<()>>>,
}

pub(super) async fn dial(target: &Target, settings: &config::Server) -> Result<Dialed, Error> {
    let place = &target.authority;
    let tcp = TcpStream::connect((target.host.as_str(), target.port)).await.map_err(|error| {
        Error::new(Failure::Link, format!("connect to {place}: {error}"))
            .hint("is klio-server running, and is server.address right?")
    })?;
    tcp.set_nodelay(true).map_err(|error| {
        Error::new(Failure::Link, format!("set TCP_NODELAY on {place}: {error}"))
    })?;
    if settings.unsafe_plaintext {
        return Ok(Dialed::new(Stream::Plain(tcp), None));
    }
    let (config, client_expires) = certificate::client_config(settings)?;
    let name = ServerName::try_from(target.host.clone()).map_err(|_| {
        Error::new(
            Failure::Config,
            format!("server.address: expected a host name or address, found {:?}", target.host),
        )
    })?;
    let connector = TlsConnector::from(Arc::new(config));
    let tls = connector
        .connect(name, tcp)
        .await
        .map_err(|error| certificate::explain(&error, place, settings))?;
    let (_, session) = tls.get_ref();
    if session.alpn_protocol() != Some(b"h2") {
        return Err(Error::new(
            Failure::Link,
            format!("connect to {place}: expected HTTP/2 behind TLS, found another protocol"),
        )
        .hint("is this the gRPC port of klio-server?"));
    }
    let server_expires = session
        .peer_certificates()
        .and_then(|chain| chain.first())
        .and_then(|leaf| certificate::not_after(leaf));
    let expiry = Expiry { client: client_expires, server: server_expires };
    Ok(Dialed::new(Stream::Tls(Box::new(tls)), Some(expiry)))
}

/// Copies an error. A rustls error is kept as such, because [`certificate::explain`] examines it.
fn copy(error: &io::Error) -> io::Error {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(tls) => io::Error::new(error.kind(), tls.clone()),
        None => io::Error::new(error.kind(), error.to_string()),
    }
}

macro_rules! each {
    ($self:expr, $inner:ident => $call:expr) => {
        match &mut $self.stream {
            Stream::Plain(inner) => {
                let $inner = Pin::new(inner);
                $call
            }
            Stream::Tls(inner) => {
                let $inner = Pin::new(inner.as_mut());
                $call
            }
        }
    };
}

impl AsyncRead for Heard {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let (this, before) = (self.get_mut(), buf.filled().len());
        let result = ready!(each!(this, s => s.poll_read(cx, buf)));
        if let Some(first) = this.first.take() {
            let _ = first.send(match &result {
                Ok(()) if buf.filled().len() > before => Ok(()),
                Ok(()) => Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
                Err(error) => Err(copy(error)),
            });
        }
        Poll::Ready(result)
    }
}

impl AsyncWrite for Heard {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        each!(self.get_mut(), s => s.poll_write(cx, buf))
    }
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        each!(self.get_mut(), s => s.poll_write_vectored(cx, bufs))
    }
    fn is_write_vectored(&self) -> bool {
        match &self.stream {
            Stream::Plain(inner) => inner.is_write_vectored(),
            Stream::Tls(inner) => inner.is_write_vectored(),
        }
    }
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self.get_mut(), s => s.poll_flush(cx))
    }
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self.get_mut(), s => s.poll_shutdown(cx))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_without_a_port_means_klio_s() {
        assert_eq!(Target::parse("https://db.example").unwrap().authority, "db.example:7423");
        let six = Target::parse("https://[::1]:9").unwrap();
        assert_eq!((six.authority.as_str(), six.host.as_str()), ("[::1]:9", "::1"));
        assert!(Target::parse("db.example:7423").is_err());
    }
}
