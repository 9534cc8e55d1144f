//! Serving the store over HTTP or HTTPS on a thread and runtime of its own.
//!
//! Its own runtime, so that it answers also while the test's thread blocks, and so that stopping it cuts every connection.

use super::fault::{Fault, Faults};
use crate::pki::Pair;
use hyper::{Method, Request, Response, StatusCode, body::Body as _, body::Incoming};
use hyper_util::rt::TokioIo;
use s3s::{Body, service::S3Service};
use std::{
    io,
    net::TcpListener,
    pin::Pin,
    sync::{Arc, Mutex},
    thread::JoinHandle,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::oneshot,
    task::JoinSet,
};
use tokio_rustls::TlsAcceptor;

/// The certificate to serve; `None` is plain HTTP. It can be changed while the server runs.
pub(super) type Certificate = Arc<Mutex<Option<TlsAcceptor>>>;

/// What a connection needs.
#[derive(Clone)]
pub(super) struct Shop {
    pub service: S3Service,
    pub faults: Arc<Faults>,
    pub certificate: Certificate,
}

/// No program takes longer from its fork to its exec.
const FORKED: Duration = Duration::from_secs(5);

/// The serving thread; it ends when dropped.
#[derive(Debug)]
pub(super) struct Server {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub(super) fn start(shop: Shop, port: u16) -> Self {
        let listener = listen(port).unwrap_or_else(|e| panic!("listen on 127.0.0.1:{port}: {e}"));
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(1)
                .enable_all()
                .build()
                .expect("start the runtime of the S3 server");
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).expect("use a listener");
                tokio::select! {
                    () = accept(&shop, &listener) => {}
                    _ = stopped => {}
                }
            });
            runtime.shutdown_background();
        });
        Self { stop: Some(stop), thread: Some(thread) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The standard library sets `SO_REUSEADDR`, so that the port can be taken again after a stop. A program that another test starts
/// just now has a copy of every open socket between its fork and its exec, also of the one that tried the port: that passes.
fn listen(port: u16) -> io::Result<TcpListener> {
    let begun = Instant::now();
    let listener = loop {
        match TcpListener::bind(("127.0.0.1", port)) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && begun.elapsed() < FORKED => {
                std::thread::yield_now();
            }
            bound => break bound?,
        }
    };
    listener.set_nonblocking(true)?;
    Ok(listener)
}

async fn accept(shop: &Shop, listener: &tokio::net::TcpListener) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(connection(shop.clone(), stream));
                }
                // Out of file descriptors, for example: the next accept may work.
                Err(_) => tokio::task::yield_now().await,
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn connection(shop: Shop, stream: TcpStream) -> io::Result<()> {
    // Nagle's algorithm and delayed acknowledgements together would add 40 ms to a request.
    stream.set_nodelay(true)?;
    let stream = stream.into_std()?;
    let twin = Arc::new(stream.try_clone()?);
    let stream = TcpStream::from_std(stream)?;
    let certificate =
        shop.certificate.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
    match certificate {
        None => requests(shop, stream, twin).await,
        Some(acceptor) => requests(shop, acceptor.accept(stream).await?, twin).await,
    }
}

async fn requests<S>(shop: Shop, stream: S, twin: Arc<std::net::TcpStream>) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = hyper::service::service_fn(move |request| {
        let (shop, twin) = (shop.clone(), twin.clone());
        async move { answer(&shop, request, &twin).await }
    });
    hyper::server::conn::http1::Builder::new()
        .serve_connection(TokioIo::new(stream), service)
        .await
        .map_err(io::Error::other)
}

async fn answer(
    shop: &Shop,
    request: Request<Incoming>,
    twin: &std::net::TcpStream,
) -> io::Result<Response<Body>> {
    let (method, uri) = (request.method().clone(), request.uri().clone());
    let path = uri.path_and_query().map_or("/", |p| p.as_str());
    let (number, fault) = shop.faults.meet(&method, path);
    let response = match fault {
        None => carry_out(shop, request).await,
        Some(Fault::Delay(time)) => {
            tokio::time::sleep(time).await;
            carry_out(shop, request).await
        }
        Some(Fault::InternalError) => refuse(request, &method, 500, "InternalError").await,
        Some(Fault::SlowDown) => refuse(request, &method, 503, "SlowDown").await,
        Some(Fault::Status(status)) => refuse(request, &method, status, "Injected").await,
        Some(Fault::Lie) => lie(request).await,
        Some(Fault::Hang) => {
            shop.faults.until_healed().await;
            return Err(reset(twin));
        }
        Some(Fault::Reset) => return Err(reset(twin)),
    };
    shop.faults.answered(number, response.status());
    Ok(response)
}

async fn carry_out(shop: &Shop, request: Request<Incoming>) -> Response<Body> {
    match shop.service.call(request.map(Body::from)).await {
        Ok(response) => response,
        Err(error) => {
            let mut response = Response::new(Body::from(format!("{error:?}")));
            *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
            response
        }
    }
}

/// The body is read first, as a real store's front does; else the client would see a broken connection instead.
async fn drain(request: Request<Incoming>) {
    let mut body = request.into_body();
    while let Some(Ok(_)) = std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {}
}

async fn refuse(
    request: Request<Incoming>,
    method: &Method,
    status: u16,
    code: &str,
) -> Response<Body> {
    drain(request).await;
    let text = format!(
        "<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>injected</Message></Error>"
    );
    let body = if method == Method::HEAD { Body::empty() } else { Body::from(text) };
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(status).expect("a valid HTTP status");
    response
}

async fn lie(request: Request<Incoming>) -> Response<Body> {
    drain(request).await;
    let mut response = Response::new(Body::empty());
    let etag = hyper::header::HeaderValue::from_static("\"00000000000000000000000000000000\"");
    response.headers_mut().insert(hyper::header::ETAG, etag);
    response
}

/// Makes the closing of the connection, which this error brings about, a TCP reset.
fn reset(twin: &std::net::TcpStream) -> io::Error {
    let _ = rustix::net::sockopt::set_socket_linger(twin, Some(std::time::Duration::ZERO));
    io::Error::from(io::ErrorKind::ConnectionReset)
}

/// An acceptor for this certificate.
pub(super) fn acceptor(pair: &Pair) -> TlsAcceptor {
    use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
    crate::install_crypto();
    let cert = CertificateDer::from_pem_slice(pair.cert.as_bytes()).expect("a PEM certificate");
    let key = PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).expect("a PEM key");
    let config = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![cert], key)
        .expect("a certificate with its key");
    TlsAcceptor::from(Arc::new(config))
}
