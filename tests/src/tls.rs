//! A bare TLS client that asks for HTTP/2: for what tonic would never try.

use crate::pki::Pair;
use rustls::{
    ClientConfig, RootCertStore, SupportedProtocolVersion,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
};
use std::{io, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// No handshake takes this long.
const TIMEOUT: Duration = Duration::from_secs(20);
/// What an HTTP/2 client says first: the preface and empty settings.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// Connects to 127.0.0.1 with one TLS version and waits for the server's first word.
///
/// With TLS 1.3 a client's own handshake ends before the server has looked at its certificate, so only that word tells.
///
/// # Errors
/// How the server refused.
///
/// # Panics
/// When the certificates given are none.
pub async fn greet(
    port: u16,
    authority: &str,
    version: &'static SupportedProtocolVersion,
    client: Option<&Pair>,
) -> io::Result<()> {
    let mut roots = RootCertStore::empty();
    let authority = CertificateDer::from_pem_slice(authority.as_bytes()).expect("a certificate");
    roots.add(authority).expect("an authority");
    let builder =
        ClientConfig::builder_with_protocol_versions(&[version]).with_root_certificates(roots);
    let mut config = match client {
        None => builder.with_no_client_auth(),
        Some(pair) => {
            let cert = CertificateDer::from_pem_slice(pair.cert.as_bytes()).expect("a certificate");
            let key = PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).expect("a key");
            builder.with_client_auth_cert(vec![cert], key).expect("a certificate with its key")
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    let talk = async {
        let tcp = TcpStream::connect(("127.0.0.1", port)).await?;
        let name = ServerName::try_from("localhost").expect("a host name");
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let mut tls = connector.connect(name, tcp).await?;
        // A server that has refused already cannot be written to, but may still be heard.
        let _ = tls.write_all(PREFACE).await;
        match tls.read(&mut [0; 9]).await? {
            0 => Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
            _ => Ok(()),
        }
    };
    tokio::time::timeout(TIMEOUT, talk).await.map_err(|_| io::ErrorKind::TimedOut)?
}
