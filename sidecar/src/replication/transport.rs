//! The byte stream under the protocol: TCP, unix socket, or TLS over TCP.
//!
//! TLS reads through a large buffer, because rustls reads 4 KiB at a time, each of which would be a system call.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, BufReader, ReadBuf},
    net::{TcpStream, UnixStream},
};
use tokio_rustls::client::TlsStream;

/// Capacity in bytes of the buffer between the socket and rustls.
pub(super) const TLS_READ_BYTES: usize = 256 * 1024;

pub(super) enum Transport {
    Unix(UnixStream),
    Tcp(TcpStream),
    Tls(Box<TlsStream<BufReader<TcpStream>>>),
}

impl Transport {
    /// Whether nobody on the network can read what is sent, such as a password.
    pub(super) const fn is_private(&self) -> bool {
        !matches!(self, Transport::Tcp(_))
    }
}

macro_rules! delegate {
    ($self:ident, $stream:ident => $call:expr) => {
        match $self.get_mut() {
            Transport::Unix(s) => {
                let $stream = Pin::new(s);
                $call
            }
            Transport::Tcp(s) => {
                let $stream = Pin::new(s);
                $call
            }
            Transport::Tls(s) => {
                let $stream = Pin::new(s.as_mut());
                $call
            }
        }
    };
}

impl AsyncRead for Transport {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        delegate!(self, s => s.poll_read(cx, buf))
    }
}

impl AsyncWrite for Transport {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        delegate!(self, s => s.poll_write(cx, buf))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(self, s => s.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(self, s => s.poll_shutdown(cx))
    }
}
