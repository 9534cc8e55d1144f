//! TLS of the gRPC port: TLS 1.3, client certificates required, files loaded again when they change.
//!
//! - A reload that fails keeps the last valid configuration, and is logged once per change.
//! - Every configuration has its own session tickets, so a client whose authority was removed cannot resume an old
//!   session.
//! - [`Loaded::verify`] checks a certificate against the *current* authorities: long streams are checked again after
//!   each reload and periodically (expiry).

use super::{
    handshakes::{Handshakes, Place, Stage},
    pki,
};
use crate::quota::Counted;
use rustix::net::RecvFlags;
use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject},
    server::{WebPkiClientVerifier, danger::ClientCertVerifier},
};
use std::{
    io,
    net::SocketAddr,
    path::PathBuf,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
    task::JoinSet,
};
use tokio_rustls::{LazyConfigAcceptor, server::TlsStream};
use tokio_util::sync::CancellationToken;
use tonic::{
    Status,
    transport::server::{Connected, TcpConnectInfo, TlsConnectInfo},
};

/// How often the files are checked. Kubernetes and cert-manager swap symlinks, which file notifications miss, and
/// reading three small files is cheap.
const RELOAD_INTERVAL: Duration = Duration::from_secs(2);
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// A client that was connected sends its first byte at once, and the network delivers it within this time.
const LAST_CHANCE: Duration = Duration::from_secs(1);
/// How long a refused client may take to hang up.
const PARTING_TIMEOUT: Duration = Duration::from_secs(1);

/// The paths of the certificates.
#[derive(Debug, Clone, serde::Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// The server's certificate chain, PEM.
    pub cert: PathBuf,
    /// Its private key, PEM.
    pub key: PathBuf,
    /// The authorities whose client certificates are accepted, PEM.
    pub client_ca: PathBuf,
}

/// A file that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("load {path}: {detail}; hint: klio-server init writes a working set")]
pub struct TlsError {
    path: String,
    detail: String,
}

/// One consistent reading of the files.
pub struct Loaded {
    config: Arc<ServerConfig>,
    verifier: Arc<dyn ClientCertVerifier>,
    /// Accepts only the authority that `klio-server init` created, if that is among the accepted ones.
    own: Option<Arc<dyn ClientCertVerifier>>,
    fingerprint: Vec<u8>,
    /// When the server's own certificate expires, in Unix seconds.
    pub expires_unix: i64,
}

impl Loaded {
    /// Whether a client's certificate chain would be accepted now.
    pub fn verify(&self, chain: &[CertificateDer<'_>]) -> Result<(), rustls::Error> {
        let (leaf, rest) = chain.split_first().ok_or(rustls::Error::NoCertificatesPresented)?;
        self.verifier.verify_client_cert(leaf, rest, UnixTime::now()).map(|_| ())
    }

    /// Whether the chain was issued by the authority that `klio-server init` created.
    pub fn is_of_own_authority(&self, chain: &[CertificateDer<'_>]) -> bool {
        let (Some(own), Some((leaf, rest))) = (&self.own, chain.split_first()) else {
            return false;
        };
        own.verify_client_cert(leaf, rest, UnixTime::now()).is_ok()
    }
}

impl TlsFiles {
    fn read(&self) -> Result<[Vec<u8>; 3], TlsError> {
        let read = |path: &PathBuf| {
            std::fs::read(path)
                .map_err(|e| TlsError { path: path.display().to_string(), detail: e.to_string() })
        };
        Ok([read(&self.cert)?, read(&self.key)?, read(&self.client_ca)?])
    }

    /// Reads and checks the files.
    ///
    /// # Errors
    /// Names the first file that is missing, is not PEM, or does not match the others.
    pub fn load(&self) -> Result<Loaded, TlsError> {
        let [cert, key, ca] = self.read()?;
        let fail =
            |path: &PathBuf, detail: String| TlsError { path: path.display().to_string(), detail };
        let certs = |path: &PathBuf, pem: &[u8]| {
            let found: Vec<_> = CertificateDer::pem_slice_iter(pem)
                .collect::<Result<_, _>>()
                .map_err(|e| fail(path, format!("expected PEM certificates: {e}")))?;
            if found.is_empty() {
                return Err(fail(path, "expected at least one PEM certificate, found none".into()));
            }
            Ok(found)
        };
        let chain = certs(&self.cert, &cert)?;
        let private = PrivateKeyDer::from_pem_slice(&key)
            .map_err(|e| fail(&self.key, format!("expected a PEM private key: {e}")))?;
        let authorities = certs(&self.client_ca, &ca)?;
        for problem in authorities.iter().filter_map(|a| out_of_time(a, now_unix())) {
            tracing::warn!("{}: {problem}", self.client_ca.display());
        }
        let verifier = |authorities: &[CertificateDer<'static>]| {
            client_verifier(authorities).map_err(|detail| fail(&self.client_ca, detail))
        };
        // The first one of that name; a second one was added by hand, from another server.
        let own = authorities.iter().position(is_own_authority);
        let own = own.map(|at| verifier(&authorities[at..=at])).transpose()?;
        let verifier = verifier(&authorities)?;
        let expires_unix = x509_parser::parse_x509_certificate(&chain[0])
            .map(|(_, c)| c.validity().not_after.timestamp())
            .map_err(|e| fail(&self.cert, e.to_string()))?;
        let mut config = ServerConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
            .with_client_cert_verifier(verifier.clone())
            .with_single_cert(chain, private)
            .map_err(|e| fail(&self.key, e.to_string()))?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        let fingerprint = [cert, key, ca].concat();
        Ok(Loaded { config: Arc::new(config), verifier, own, fingerprint, expires_unix })
    }
}

fn now_unix() -> i64 {
    i64::try_from(UnixTime::now().as_secs()).unwrap_or(i64::MAX)
}

/// A warning for an authority whose own certificate is not valid now. Certificates that it issued are still accepted:
/// a root is trusted because it was configured, as in every TLS library.
fn out_of_time(certificate: &CertificateDer<'static>, now_unix: i64) -> Option<String> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let (from, to) = (parsed.validity().not_before, parsed.validity().not_after);
    let subject = parsed.subject();
    if now_unix > to.timestamp() {
        return Some(format!(
            "the CA certificate {subject} expired at {to}, but clients with certificates from it are still accepted; hint: renew it, or remove it from the file of tls.client_ca"
        ));
    }
    (now_unix < from.timestamp()).then(|| {
        format!("the authority {subject} is valid from {from} on only; hint: check the clock")
    })
}

fn client_verifier(
    authorities: &[CertificateDer<'static>],
) -> Result<Arc<dyn ClientCertVerifier>, String> {
    let mut roots = RootCertStore::empty();
    for authority in authorities {
        roots.add(authority.clone()).map_err(|e| e.to_string())?;
    }
    WebPkiClientVerifier::builder(Arc::new(roots)).build().map_err(|e| e.to_string())
}

/// Whether this certificate is an authority that `klio-server init` created.
fn is_own_authority(certificate: &CertificateDer<'static>) -> bool {
    let Ok((_, parsed)) = x509_parser::parse_x509_certificate(certificate) else { return false };
    let mut names = parsed.subject().iter_common_name().filter_map(|name| name.as_str().ok());
    names.next() == Some(pki::AUTHORITY_NAME) && parsed.subject() == parsed.issuer()
}

/// Keeps the newest valid reading of the files in `current` until cancelled.
pub async fn reload(
    files: TlsFiles,
    current: watch::Sender<Arc<Loaded>>,
    cancel: CancellationToken,
) {
    let mut refused: Option<Vec<u8>> = None;
    loop {
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(RELOAD_INTERVAL) => {}
        }
        let Ok(bytes) = files.read().map(|parts| parts.concat()) else {
            continue; // In the middle of being replaced, or gone: the last good one serves on.
        };
        if bytes == current.borrow().fingerprint || refused.as_ref() == Some(&bytes) {
            continue;
        }
        match files.load() {
            Ok(loaded) => {
                tracing::info!("using the changed certificates");
                refused = None;
                current.send_replace(Arc::new(loaded));
            }
            Err(error) => {
                tracing::warn!(%error, "cannot load the new certificates; keeping the ones in use");
                refused = Some(bytes);
            }
        }
    }
}

/// Decides whether a client with this chain may have one more connection. The returned value is held as long as the
/// connection lasts.
pub type Admit = Arc<
    dyn Fn(Option<Arc<Vec<CertificateDer<'static>>>>) -> Result<Option<Counted>, Status>
        + Send
        + Sync,
>;

/// A connection that counts for a quota until it is dropped.
pub struct Connection {
    stream: TlsStream<TcpStream>,
    _place: Option<Counted>,
}

impl Connected for Connection {
    type ConnectInfo = TlsConnectInfo<TcpConnectInfo>;
    fn connect_info(&self) -> Self::ConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        to: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, to)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        from: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, from)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        from: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, from)
    }
    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

/// Counts a connection whose handshake succeeded; closes it if the quota is used up.
fn count(admit: &Admit, stream: TlsStream<TcpStream>, peer: SocketAddr) -> Option<Connection> {
    let chain = stream.connect_info().peer_certs();
    match admit(chain) {
        Ok(place) => Some(Connection { stream, _place: place }),
        Err(status) => {
            tracing::warn!(%peer, reason = status.message(), "closing a connection over the quota");
            None
        }
    }
}

/// Accepts connections, and passes on those whose handshake succeeds.
pub async fn accept(
    listener: TcpListener,
    current: watch::Receiver<Arc<Loaded>>,
    admit: Admit,
    ready: mpsc::Sender<io::Result<Connection>>,
    cancel: CancellationToken,
) {
    let all = Handshakes::default();
    let mut handshakes = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = cancel.cancelled() => return,
            Some(_) = handshakes.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        let (tcp, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Usually out of file descriptors, so wait until some are closed.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let place = all.enter(peer.ip());
        for (address, count) in all.to_tell(Instant::now()) {
            tracing::warn!(%address, count, "closed unfinished handshakes, because there were too many; hint: check who connects from this address");
        }
        let config = current.borrow().config.clone();
        let (ready, admit) = (ready.clone(), Arc::clone(&admit));
        handshakes.spawn(async move {
            match tokio::time::timeout(HANDSHAKE_TIMEOUT, greet(config, tcp, peer, place)).await {
                Ok(Some(stream)) => {
                    if let Some(connection) = count(&admit, stream, peer) {
                        drop(ready.send(Ok(connection)).await);
                    }
                }
                Ok(None) => {}
                Err(_) => tracing::debug!(%peer, "TLS handshake timed out"),
            }
        });
    }
}

/// Runs the handshake; `None` when it was refused, or when its place was needed. The place is freed at the end.
async fn greet(
    config: Arc<ServerConfig>,
    tcp: TcpStream,
    peer: SocketAddr,
    mut place: Place,
) -> Option<TlsStream<TcpStream>> {
    let _ = tcp.set_nodelay(true);
    // A client sends first. A connection that is closed at once, as probes do, is not logged.
    if !speaks(&tcp, &place).await {
        return None;
    }
    place.reached(Stage::Speaks);
    let mut greeting = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), tcp);
    let greeted = tokio::select! {
        biased;
        greeted = &mut greeting => greeted,
        () = place.needed() => return None,
    };
    let refused = match greeted {
        Ok(greeted) => {
            place.reached(Stage::Greeted);
            let finished = tokio::select! {
                biased;
                finished = greeted.into_stream(config).into_fallible() => finished,
                () = place.needed() => return None,
            };
            match finished {
                Ok(stream) => return Some(stream),
                Err((error, tcp)) => (error, Some(tcp)),
            }
        }
        Err(error) => (error, greeting.take_io()),
    };
    let (error, tcp) = refused;
    tracing::warn!(%peer, %error, "TLS handshake refused");
    if let Some(tcp) = tcp {
        part(tcp).await;
    }
    None
}

/// Waits for the first byte. If the place is needed before that, the connection has a last chance, unless too many
/// have one: the byte may be on its way, or it may have arrived while this task was not scheduled.
async fn speaks(tcp: &TcpStream, place: &Place) -> bool {
    let mut first = [0u8];
    tokio::select! {
        biased;
        heard = tcp.peek(&mut first) => return matches!(heard, Ok(1)),
        () = place.needed() => {}
    }
    let Some(_leaving) = place.leave() else {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let heard = rustix::net::recv(tcp, &mut first[..], flags);
        return heard.is_ok_and(|(_, heard)| heard > 0);
    };
    matches!(tokio::time::timeout(LAST_CHANCE, tcp.peek(&mut first)).await, Ok(Ok(1)))
}

/// Closes in a way that lets the client read the reason. Closing with its first request unread would send a reset,
/// which may overtake the alert.
async fn part(mut tcp: TcpStream) {
    let rest = async {
        tcp.shutdown().await?;
        tokio::io::copy(&mut tcp, &mut tokio::io::sink()).await
    };
    let _ = tokio::time::timeout(PARTING_TIMEOUT, rest).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write_set(dir: &std::path::Path, authority: &pki::Pair) -> TlsFiles {
        let pair = pki::issue_server(authority, &["localhost".into()]).unwrap();
        let files = TlsFiles {
            cert: dir.join("s.crt"),
            key: dir.join("s.key"),
            client_ca: dir.join("ca.crt"),
        };
        std::fs::write(&files.cert, pair.cert).unwrap();
        std::fs::write(&files.key, pair.key).unwrap();
        std::fs::write(&files.client_ca, &authority.cert).unwrap();
        files
    }

    #[test]
    fn a_certificate_of_a_removed_authority_no_longer_verifies() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let dir = tempfile::tempdir().unwrap();
        let (old, new) = (pki::new_authority().unwrap(), pki::new_authority().unwrap());
        let subject = pki::Subject::Client("a@pg".into());
        let client = pki::issue_client(&old, &subject).unwrap();
        let chain = [CertificateDer::from_pem_slice(client.cert.as_bytes()).unwrap()];
        assert!(write_set(dir.path(), &old).load().unwrap().verify(&chain).is_ok());
        assert!(write_set(dir.path(), &new).load().unwrap().verify(&chain).is_err());
    }

    /// Tests a good client while strangers at its own address connect as fast as they can, and send nothing or one
    /// byte.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_client_behind_the_address_of_strangers_gets_through() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let dir = tempfile::tempdir().unwrap();
        let authority = pki::new_authority().unwrap();
        let files = write_set(dir.path(), &authority);
        let (current, certificates) = watch::channel(Arc::new(files.load().unwrap()));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (ready, mut accepted) = mpsc::channel(4);
        let admit: Admit = Arc::new(|_| Ok(None));
        let cancel = CancellationToken::new();
        let mut running = JoinSet::new();
        running.spawn(accept(listener, certificates, admit, ready, cancel.clone()));
        for number in 0..300 {
            running.spawn(async move {
                loop {
                    let Ok(mut stranger) = TcpStream::connect(address).await else { continue };
                    if number % 3 == 0 {
                        let _ = stranger.write_all(&[0x16]).await;
                    }
                    let _ = tokio::io::copy(&mut stranger, &mut tokio::io::sink()).await;
                }
            });
        }
        let subject = pki::Subject::Client("a@pg".into());
        let client = pki::issue_client(&authority, &subject).unwrap();
        let chain = CertificateDer::from_pem_slice(client.cert.as_bytes()).unwrap();
        let key = PrivateKeyDer::from_pem_slice(client.key.as_bytes()).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(authority.cert.as_bytes()).unwrap()).unwrap();
        let config = rustls::ClientConfig::builder()
            .with_root_certificates(roots)
            .with_client_auth_cert(vec![chain], key)
            .unwrap();
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        for turn in 0..40 {
            let name = rustls::pki_types::ServerName::try_from("localhost").unwrap();
            let tcp = TcpStream::connect(address).await.unwrap();
            let stream = connector.connect(name, tcp).await;
            assert!(stream.is_ok(), "turn {turn}: {:?}", stream.err());
            let through = tokio::time::timeout(HANDSHAKE_TIMEOUT, accepted.recv()).await;
            assert!(matches!(through, Ok(Some(Ok(_)))), "turn {turn} was shut out");
        }
        drop(current);
    }

    #[test]
    fn an_authority_that_ended_is_told_of() {
        let authority = pki::new_authority().unwrap();
        let der = CertificateDer::from_pem_slice(authority.cert.as_bytes()).unwrap();
        let (now, year) = (now_unix(), 366 * 86_400);
        assert_eq!(out_of_time(&der, now), None);
        let ended = out_of_time(&der, now + 11 * year).unwrap();
        assert!(ended.contains("Klio local authority") && ended.contains("expired"), "{ended}");
        assert!(out_of_time(&der, now - year).unwrap().contains("clock"));
    }

    #[test]
    fn a_broken_file_is_named() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let dir = tempfile::tempdir().unwrap();
        let files = write_set(dir.path(), &pki::new_authority().unwrap());
        std::fs::write(&files.key, "nonsense").unwrap();
        let text = files.load().err().unwrap().to_string();
        assert!(text.contains("s.key") && text.contains("private key"), "{text}");
        std::fs::remove_file(&files.cert).unwrap();
        assert!(files.load().err().unwrap().to_string().contains("s.crt"));
    }
}
