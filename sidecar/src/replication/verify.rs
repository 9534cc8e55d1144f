//! Verification of the server's certificate, to libpq's rules where they differ from the web's:
//!
//! - a server certificate that is itself in the root file is trusted, also when it is marked as an
//!   authority: PostgreSQL's manual makes such ones (`openssl req -x509`);
//! - without any subjectAltName the common name counts, `*` for its first label;
//! - below `verify-full` no name counts, and without roots nothing but the handshake's signature.

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

/// Who is trusted, and whether the name matters.
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
    /// Trusts `roots`, if any. Those that do not parse are passed over, but not all of them.
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

/// Whether a certificate without subjectAltName has a common name for `name`.
fn common_name_fits(cert: &CertificateDer<'_>, name: &ServerName<'_>) -> bool {
    let (ServerName::DnsName(name), Ok((_, cert))) = (name, X509Certificate::from_der(cert)) else {
        return false;
    };
    if !matches!(cert.subject_alternative_name(), Ok(None)) {
        return false;
    }
    let mut names = cert.subject().iter_common_name();
    // Several common names are ambiguous: none counts.
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
