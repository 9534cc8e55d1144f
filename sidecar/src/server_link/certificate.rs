//! Reads the three files of a client bundle, and explains failed handshakes.
//!
//! Nothing is cached: each connection uses the files as they are now. Keys never appear in a message.

use crate::{
    config,
    error::{Error, Failure},
};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    version::TLS13,
};
use std::{io, path::Path, sync::Arc};

/// Expiry times of a connection's certificates, in Unix seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expiry {
    /// Of the client certificate; `None` if it cannot be read.
    pub client: Option<i64>,
    /// Of the server's certificate; `None` if it cannot be read.
    pub server: Option<i64>,
}

/// Builds the TLS configuration from the files; also returns the expiry time of the client certificate.
pub(super) fn client_config(
    settings: &config::Server,
) -> Result<(ClientConfig, Option<i64>), Error> {
    let mut roots = RootCertStore::empty();
    for authority in certificates("server.ca", &settings.ca)? {
        roots.add(authority).map_err(|error| bad("server.ca", &settings.ca, &error))?;
    }
    let chain = certificates("server.cert", &settings.cert)?;
    let expires = chain.first().and_then(not_after);
    let key = PrivateKeyDer::from_pem_file(&settings.key)
        .map_err(|error| bad("server.key", &settings.key, &error))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .map_err(|error| bad("server.cert", &settings.cert, &error))?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)
        .map_err(|error| {
            bad("server.cert", &settings.cert, &error).hint("certificate and key must be a pair")
        })?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok((config, expires))
}

fn certificates(name: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let all: Vec<_> = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|error| bad(name, path, &error))?;
    if all.is_empty() {
        return Err(bad(name, path, &"expected a PEM certificate, found none"));
    }
    Ok(all)
}

fn bad(name: &str, path: &Path, error: &dyn std::fmt::Display) -> Error {
    Error::new(Failure::Link, format!("read {name} {}: {error}", path.display())).hint(
        "issue a bundle with klio-server client NAME@CLUSTER, or correct the path in klio.toml",
    )
}

/// The end of a certificate's validity in Unix seconds; `None` if it cannot be read.
pub(super) fn not_after(certificate: &CertificateDer<'_>) -> Option<i64> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    Some(parsed.validity().not_after.timestamp())
}

/// Explains which side's certificate made a handshake fail.
pub(super) fn explain(error: &io::Error, place: &str, settings: &config::Server) -> Error {
    use rustls::{AlertDescription as Alert, CertificateError as Bad, Error as Tls};
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<Tls>());
    let mut failure = Failure::Link;
    let hint = match inner {
        // BadSignature comes from an authority that has the same name as ours but another key.
        Some(Tls::InvalidCertificate(Bad::UnknownIssuer | Bad::BadSignature)) => format!(
            "the server's certificate is not from the authority in {}",
            settings.ca.display()
        ),
        Some(Tls::InvalidCertificate(
            Bad::NotValidForName | Bad::NotValidForNameContext { .. },
        )) => "the server's certificate is for another host name; use the name it was issued for"
            .into(),
        Some(Tls::InvalidCertificate(Bad::Expired | Bad::ExpiredContext { .. })) => {
            "the server's certificate has expired: renew it, or check the clocks of both machines"
                .into()
        }
        Some(Tls::AlertReceived(
            Alert::CertificateExpired
            | Alert::UnknownCA
            | Alert::BadCertificate
            | Alert::CertificateRevoked
            | Alert::CertificateUnknown
            | Alert::CertificateRequired
            | Alert::AccessDenied
            | Alert::DecryptError,
        )) => {
            failure = Failure::Certificate;
            let path = settings.cert.display();
            let expired = matches!(inner, Some(Tls::AlertReceived(Alert::CertificateExpired)));
            let advice = advice(&settings.cert, expired);
            format!("the server refuses the client certificate in {path}{advice}")
        }
        Some(Tls::InvalidMessage(_)) => "is this the TLS port of klio-server?".into(),
        _ => "is this klio-server, and does it accept this client certificate?".into(),
    };
    Error::new(failure, format!("TLS with {place}: {error}")).hint(hint)
}

/// What the dates of our certificate say about the refusal, and what to do. `expired`: the server says that the certificate is out of
/// date, which servers say even before its first day. Either clock may be the wrong one.
fn advice(path: &Path, expired: bool) -> String {
    const ISSUE: &str = "issue a new bundle";
    let chain = certificates("server.cert", path).unwrap_or_default();
    let Some((_, leaf)) =
        chain.first().and_then(|leaf| x509_parser::parse_x509_certificate(leaf).ok())
    else {
        return format!(": {ISSUE}");
    };
    let (validity, now) = (leaf.validity(), x509_parser::time::ASN1Time::now());
    match () {
        () if validity.not_after < now => format!(", which ended {}: {ISSUE}", validity.not_after),
        () if validity.not_before > now => {
            format!(", which begins {}: compare the clocks, or {ISSUE}", validity.not_before)
        }
        () if expired => format!(
            " as out of date, and by this machine's clock it is valid until {}: compare the clocks, or {ISSUE}",
            validity.not_after
        ),
        () => format!(": {ISSUE}"),
    }
}
