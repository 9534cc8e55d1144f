//! Handshakes with a server that checks client certificates, good and bad.

use super::*;
use crate::fake_server::FakeServer;
use klio_proto::v1::PositionRequest;
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use std::path::Path;
use tonic::transport::{Certificate, Identity, ServerTlsConfig};

struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { pem, issuer: Issuer::new(params, key) }
    }

    fn issue(&self, names: &[&str], usage: ExtendedKeyUsagePurpose) -> (String, String) {
        let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.extended_key_usages = vec![usage];
        params.not_after = rcgen::date_time_ymd(2100, 1, 1);
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }

    /// Writes a client bundle that trusts `server`.
    fn bundle(&self, directory: &Path, server: &Authority) {
        let (cert, key) = self.issue(&[], ExtendedKeyUsagePurpose::ClientAuth);
        std::fs::write(directory.join("ca.crt"), &server.pem).unwrap();
        std::fs::write(directory.join("client.crt"), cert).unwrap();
        std::fs::write(directory.join("client.key"), key).unwrap();
    }
}

async fn server(authority: &Authority, names: &[&str]) -> FakeServer {
    let (cert, key) = authority.issue(names, ExtendedKeyUsagePurpose::ServerAuth);
    let tls = ServerTlsConfig::new()
        .identity(Identity::from_pem(cert, key))
        .client_ca_root(Certificate::from_pem(&authority.pem));
    FakeServer::start_tls(tls).await
}

fn link(server: &FakeServer, directory: &Path) -> ServerLink {
    let file = |name: &str| directory.join(name);
    ServerLink::new(&config::Server {
        address: server.address.clone(),
        ca: file("ca.crt"),
        cert: file("client.crt"),
        key: file("client.key"),
        ..config::Server::default()
    })
    .unwrap()
}

/// TLS 1.3 clients learn that their certificate was refused only with the first answer.
async fn ask(link: &ServerLink) -> Result<Option<Expiry>, Error> {
    let connection = link.connect().await?;
    let answer = connection.wal().position(PositionRequest::default()).await;
    answer.map_err(|status| Error::from_status("ask", &status))?;
    Ok(connection.expiry)
}

#[tokio::test]
async fn a_good_bundle_connects_and_knows_when_it_expires() {
    let (authority, directory) = (Authority::new(), tempfile::tempdir().unwrap());
    authority.bundle(directory.path(), &authority);
    let server = server(&authority, &["127.0.0.1"]).await;
    let expiry = ask(&link(&server, directory.path())).await.unwrap().unwrap();
    assert_eq!(expiry.client, Some(4_102_444_800));
    assert_eq!(expiry.server, expiry.client);
}

/// Earlier, certificates were read only once, so that each renewal needed a restart.
#[tokio::test]
async fn renewed_certificates_are_used_without_a_restart() {
    let (old, new) = (Authority::new(), Authority::new());
    let directory = tempfile::tempdir().unwrap();
    old.bundle(directory.path(), &old);
    let server = server(&new, &["127.0.0.1"]).await;
    let link = link(&server, directory.path());
    let error = ask(&link).await.unwrap_err();
    assert!(error.retryable() && error.hint.contains("authority"), "{error}");
    new.bundle(directory.path(), &new);
    ask(&link).await.unwrap();
}

#[tokio::test]
async fn a_client_certificate_of_another_authority_is_refused() {
    let (authority, other) = (Authority::new(), Authority::new());
    let directory = tempfile::tempdir().unwrap();
    other.bundle(directory.path(), &authority);
    let server = server(&authority, &["127.0.0.1"]).await;
    let error = ask(&link(&server, directory.path())).await.unwrap_err();
    assert!(error.retryable() && error.hint.contains("client.crt"), "{error}");
    assert_eq!(error.failure, Failure::Certificate);
    assert_eq!(server.script().positions_asked, 0);
}

#[tokio::test]
async fn failures_name_the_file_or_the_name_that_is_wrong() {
    let (authority, directory) = (Authority::new(), tempfile::tempdir().unwrap());
    authority.bundle(directory.path(), &authority);
    let elsewhere = server(&authority, &["db.example"]).await;
    let error = ask(&link(&elsewhere, directory.path())).await.unwrap_err();
    assert!(error.hint.contains("host name"), "{error}");
    std::fs::remove_file(directory.path().join("client.key")).unwrap();
    let error = ask(&link(&elsewhere, directory.path())).await.unwrap_err();
    assert!(error.message.contains("client.key"), "{error}");
    std::fs::write(directory.path().join("ca.crt"), "nonsense").unwrap();
    let error = ask(&link(&elsewhere, directory.path())).await.unwrap_err();
    assert!(error.message.contains("ca.crt"), "{error}");
}

#[tokio::test]
async fn tls_to_a_plaintext_port_says_so() {
    let (authority, directory) = (Authority::new(), tempfile::tempdir().unwrap());
    authority.bundle(directory.path(), &authority);
    let mut server = FakeServer::start().await;
    server.address = server.address.replace("http:", "https:");
    let error = ask(&link(&server, directory.path())).await.unwrap_err();
    assert!(error.hint.contains("TLS port"), "{error}");
}
