//! Verification of the server's certificate by libpq's rules where they differ from those of the web:
//!
//! - A server certificate that is itself in the root file is trusted, even if it is marked as an authority:
//!   PostgreSQL's manual creates such certificates (`openssl req -x509`).
//! - Without any subjectAltName the common name is used; its first label may be `*`.
//! - Below `verify-full` no name is checked; without roots only the handshake's signature is checked.

use rustls::{
    CertificateError, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor, verify_server_name,
    },
    crypto::CryptoProvider,
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::ParsedCertificate,
};
use std::{sync::Arc, time::Duration};
use x509_parser::prelude::{FromDer, X509Certificate};

/// The trusted certificates, and whether the name is checked.
#[derive(Debug)]
pub(super) struct Verifier {
    trust: Option<Trust>,
    full: bool,
    provider: Arc<CryptoProvider>,
}

#[derive(Debug)]
struct Trust {
    certs: Vec<CertificateDer<'static>>,
    store: RootCertStore,
}

impl Verifier {
    /// Trusts `roots`, if any. Certificates that cannot be parsed are ignored unless none remains.
    pub(super) fn new(
        roots: Option<Vec<CertificateDer<'static>>>,
        full: bool,
        provider: Arc<CryptoProvider>,
    ) -> Result<Verifier, Error> {
        let trust = roots.map(|certs| {
            let mut store = RootCertStore::empty();
            match store.add_parsable_certificates(certs.iter().cloned()) {
                (0, _) => Err(Error::InvalidCertificate(CertificateError::BadEncoding)),
                _ => Ok(Trust { certs, store }),
            }
        });
        Ok(Verifier { trust: trust.transpose()?, full, provider })
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let Some(trust) = &self.trust else { return Ok(ServerCertVerified::assertion()) };
        let parsed = ParsedCertificate::try_from(end_entity)?;
        if trust.certs.iter().any(|root| root == end_entity) {
            within_validity(end_entity, now)?;
        } else {
            verify_server_cert_signed_by_trust_anchor(
                &parsed,
                &trust.store,
                intermediates,
                now,
                self.provider.signature_verification_algorithms.all,
            )?;
        }
        if self.full {
            verify_server_name(&parsed, name)
                .or_else(|e| common_name_fits(end_entity, name).then_some(()).ok_or(e))?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

fn within_validity(cert: &CertificateDer<'_>, now: UnixTime) -> Result<(), Error> {
    let (_, parsed) = X509Certificate::from_der(cert)
        .map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))?;
    let unix = |seconds: i64| {
        UnixTime::since_unix_epoch(Duration::from_secs(u64::try_from(seconds).unwrap_or(0)))
    };
    let not_before = unix(parsed.validity().not_before.timestamp());
    let not_after = unix(parsed.validity().not_after.timestamp());
    let problem = if now < not_before {
        CertificateError::NotValidYetContext { time: now, not_before }
    } else if now > not_after {
        CertificateError::ExpiredContext { time: now, not_after }
    } else {
        return Ok(());
    };
    Err(Error::InvalidCertificate(problem))
}

/// Whether a certificate without subjectAltName has a common name that fits `name`.
fn common_name_fits(cert: &CertificateDer<'_>, name: &ServerName<'_>) -> bool {
    let (ServerName::DnsName(name), Ok((_, cert))) = (name, X509Certificate::from_der(cert)) else {
        return false;
    };
    if !matches!(cert.subject_alternative_name(), Ok(None)) {
        return false;
    }
    let mut names = cert.subject().iter_common_name();
    // Several common names are ambiguous, so none is used.
    match (names.next().map(|n| n.as_str()), names.next()) {
        (Some(Ok(pattern)), None) => name_matches(pattern, name.as_ref()),
        _ => false,
    }
}

fn name_matches(pattern: &str, name: &str) -> bool {
    let wild = pattern.strip_prefix("*.").filter(|rest| rest.contains('.'));
    match (wild, name.split_once('.')) {
        (Some(rest), Some((label, domain))) => {
            !label.is_empty() && domain.eq_ignore_ascii_case(rest)
        }
        _ => pattern.eq_ignore_ascii_case(name),
    }
}

#[cfg(test)]
mod tests {
    use super::name_matches;

    #[test]
    fn a_star_stands_for_one_label() {
        for (pattern, name, fits) in [
            ("db.example.org", "DB.example.org", true),
            ("*.example.org", "db.example.org", true),
            ("*.example.org", "a.db.example.org", false),
            ("*.example.org", "example.org", false),
            ("*.org", "example.org", false),
            ("*", "db", false),
            ("db", "db2", false),
        ] {
            assert_eq!(name_matches(pattern, name), fits, "{pattern} {name}");
        }
    }
}
