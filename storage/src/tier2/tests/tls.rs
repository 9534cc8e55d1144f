//! HTTPS with a private certificate authority, and with one that is not trusted.

use super::{KEY, S3, config, noise, sealed};
use crate::{
    Kind,
    tier2::{Outcome, Tier2},
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use std::sync::Arc;
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_rustls::{TlsAcceptor, rustls};

struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        Self { pem, issuer: Issuer::new(params, key) }
    }

    fn server(&self) -> TlsAcceptor {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec!["localhost".into()]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let key = rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let config = rustls::ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)
            .unwrap();
        TlsAcceptor::from(Arc::new(config))
    }
}

/// Terminates TLS in front of an endpoint; returns its port.
async fn in_front_of(s3: &S3, acceptor: TlsAcceptor) -> (u16, JoinSet<()>) {
    let behind = s3.endpoint.trim_start_matches("http://").to_owned();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((socket, _)) = listener.accept().await {
            let (acceptor, behind) = (acceptor.clone(), behind.clone());
            connections.spawn(async move {
                let Ok(mut tls) = acceptor.accept(socket).await else { return };
                let mut plain = TcpStream::connect(behind).await.unwrap();
                copy_bidirectional(&mut tls, &mut plain).await.ok();
            });
        }
    });
    (port, tasks)
}

#[tokio::test]
async fn a_private_authority_is_trusted_by_its_file_and_no_other_is() {
    let s3 = S3::start().await;
    let (authority, stranger) = (Authority::new(), Authority::new());
    let (port, _tasks) = in_front_of(&s3, authority.server()).await;
    let directory = tempfile::tempdir().unwrap();
    let source = sealed(directory.path(), "a", &noise(1, 9 << 20), 1);
    let mut config = config(&s3);
    config.endpoint = Some(format!("https://localhost:{port}"));
    config.retry_timeout_seconds = 1;
    config.request_timeout_seconds = 20;
    let ca_file = directory.path().join("ca.pem");
    for untrusted in [None, Some(&stranger.pem)] {
        config.ca_file = untrusted.map(|pem| {
            std::fs::write(&ca_file, pem).unwrap();
            ca_file.clone()
        });
        let error = Tier2::open(&config).unwrap().upload(&source, KEY).await.unwrap_err();
        assert_eq!(error.kind, Kind::Transient, "{error}");
        assert!(error.to_string().contains("ca_file"), "{error}");
        assert!(error.to_string().contains("certificate"), "{error}");
    }
    assert_eq!(s3.requests(), Vec::<String>::new(), "nothing was sent to a stranger");
    std::fs::write(&ca_file, &authority.pem).unwrap();
    config.ca_file = Some(ca_file);
    let uploaded = Tier2::open(&config).unwrap().upload(&source, KEY).await.unwrap();
    assert_eq!(uploaded.outcome, Outcome::Stored);
}
