//! One receiver: a port, a protocol, TLS or not, and a way to answer. Keeps everything it is sent.

use super::{Arrival, LogRecord, Message, Signal, Span, decoded, grpc, http, raw};
use crate::pki::{Authority, Pair, Validity};
use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{net::TcpListener, task::JoinSet};
use tokio_rustls::TlsAcceptor;

/// What is spoken on the port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    /// OTLP over HTTP/1.1 with protobuf.
    Http,
    /// OTLP over gRPC.
    Grpc,
}

/// How the receiver behaves.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Answer {
    /// Takes everything.
    Accept,
    /// Takes everything, after a while.
    Slow(Duration),
    /// Answers so: an HTTP status, or a gRPC code.
    Status(u16),
    /// Takes the request and says that it threw away this many of what was in it.
    Reject(i64),
    /// A good status with something else than OTLP in it (HTTP only).
    Page,
    /// Takes the connection and never says a word.
    Hang,
    /// Says something that is neither HTTP nor gRPC.
    Garbage,
    /// Hangs up in the middle of the request.
    Die,
}

/// Certificates of a receiver.
#[derive(Clone)]
pub struct Tls {
    /// Who signed them.
    pub authority: String,
    /// What a client may show.
    pub client: Pair,
    acceptor: [TlsAcceptor; 2],
    clients: bool,
}

impl Tls {
    /// A new authority, a certificate for localhost; `clients`: clients must show one of the same authority.
    ///
    /// # Panics
    /// When the system has no randomness.
    #[must_use]
    pub fn new(clients: bool) -> Self {
        let authority = Authority::new("collectors");
        let server = authority.server(&["localhost", "127.0.0.1"], Validity::Now);
        let acceptor =
            |alpn: &[u8]| TlsAcceptor::from(Arc::new(config(&authority, &server, clients, alpn)));
        Self {
            authority: authority.cert(),
            client: authority.client("klio", None, Validity::Now),
            acceptor: [acceptor(b"http/1.1"), acceptor(b"h2")],
            clients,
        }
    }

    /// Whether clients must show a certificate.
    #[must_use]
    pub fn asks_clients(&self) -> bool {
        self.clients
    }

    fn acceptor(&self, protocol: Protocol) -> TlsAcceptor {
        match protocol {
            Protocol::Http => self.acceptor[0].clone(),
            Protocol::Grpc => self.acceptor[1].clone(),
        }
    }
}

fn config(authority: &Authority, server: &Pair, clients: bool, alpn: &[u8]) -> ServerConfig {
    let der = |pem: &str| CertificateDer::from_pem_slice(pem.as_bytes()).expect("a certificate");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = RootCertStore::empty();
    roots.add(der(&authority.cert())).expect("an authority");
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .expect("ring knows TLS 1.3");
    let builder = if clients {
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
        builder.with_client_cert_verifier(verifier.build().expect("a verifier"))
    } else {
        builder.with_no_client_auth()
    };
    let key = PrivateKeyDer::from_pem_slice(server.key.as_bytes()).expect("a key");
    let mut config =
        builder.with_single_cert(vec![der(&server.cert)], key).expect("a certificate with its key");
    config.alpn_protocols = vec![alpn.to_vec()];
    config
}

/// What came in, shared with the tasks that take it.
pub(super) type Arrivals = Arc<Mutex<Vec<Arrival>>>;

/// The receiver; it stops when dropped.
pub struct Receiver {
    port: u16,
    secure: bool,
    arrivals: Arrivals,
    _tasks: JoinSet<()>,
}

impl Receiver {
    /// Starts one on a port of the system's choice.
    ///
    /// # Panics
    /// When it cannot listen.
    pub async fn new(protocol: Protocol, tls: Option<&Tls>, answer: Answer) -> Self {
        Self::on(0, protocol, tls, answer).await
    }

    /// Starts one on this port.
    ///
    /// # Panics
    /// When it cannot listen there.
    pub async fn on(port: u16, protocol: Protocol, tls: Option<&Tls>, answer: Answer) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", port)).await.expect("listen on loopback");
        let port = listener.local_addr().expect("an address").port();
        let arrivals = Arrivals::default();
        let mut tasks = JoinSet::new();
        let acceptor = tls.map(|tls| tls.acceptor(protocol));
        let keep = Arc::clone(&arrivals);
        match (answer, protocol) {
            (Answer::Hang | Answer::Garbage | Answer::Die, _) => {
                tasks.spawn(raw::serve(listener, answer));
            }
            (_, Protocol::Http) => {
                tasks.spawn(http::serve(listener, acceptor, answer, keep));
            }
            (_, Protocol::Grpc) => {
                tasks.spawn(grpc::serve(listener, acceptor, answer, keep));
            }
        }
        Self { port, secure: tls.is_some(), arrivals, _tasks: tasks }
    }

    /// Its port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// For `OTEL_EXPORTER_OTLP_ENDPOINT`.
    #[must_use]
    pub fn endpoint(&self) -> String {
        let scheme = if self.secure { "https" } else { "http" };
        // By name: certificates are for that.
        format!("{scheme}://localhost:{}", self.port)
    }

    /// Every request so far, in the order of arrival.
    #[must_use]
    pub fn arrivals(&self) -> Vec<Arrival> {
        self.arrivals.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Every request with this signal.
    #[must_use]
    pub fn of(&self, signal: Signal) -> Vec<Arrival> {
        self.arrivals().into_iter().filter(|a| a.signal == Some(signal)).collect()
    }

    /// Every span so far.
    #[must_use]
    pub fn spans(&self) -> Vec<Span> {
        let traces = self.arrivals().into_iter().filter_map(|a| match a.message {
            Message::Traces(message) => Some(decoded::spans(&message)),
            _ => None,
        });
        traces.flatten().collect()
    }

    /// Every log record so far.
    #[must_use]
    pub fn logs(&self) -> Vec<LogRecord> {
        let logs = self.arrivals().into_iter().filter_map(|a| match a.message {
            Message::Logs(message) => Some(decoded::logs(&message)),
            _ => None,
        });
        logs.flatten().collect()
    }
}

pub(super) fn keep(arrivals: &Arrivals, arrival: Arrival) {
    arrivals.lock().unwrap_or_else(PoisonError::into_inner).push(arrival);
}
