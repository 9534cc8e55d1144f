//! TLS by libpq's rules: which servers are trusted, the client certificate, and channel binding.
//!
//! TLS 1.2 and newer, only with ring. Files are read for every connection, so that renewed certificates take effect.
//! As in libpq, a root certificate that exists is used in every mode. `verify.rs` does the verification.

use super::{
    error::{Error, ErrorKind},
    verify::Verifier,
};
use crate::conninfo::{ClientFile, RootCert, SslMode, TlsSettings};
use rustls::{
    ClientConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use sha2::Digest;
use std::{fs, os::unix::fs::MetadataExt, path::Path, sync::Arc};
use x509_parser::{
    prelude::{FromDer, X509Certificate},
    signature_algorithm::SignatureAlgorithm,
};

const OP: &str = "prepare TLS";
/// PG_ALPN_PROTOCOL in src/include/libpq/pqcomm.h.
const ALPN: &[u8] = b"postgresql";

/// Reads the certificate files and builds the configuration. Blocks.
pub(super) fn client_config(settings: &TlsSettings) -> Result<ClientConfig, Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let versions: &[&rustls::SupportedProtocolVersion] = match settings {
        s if s.tls13_only => &[&rustls::version::TLS13],
        s if s.tls12_only => &[&rustls::version::TLS12],
        _ => &[&rustls::version::TLS13, &rustls::version::TLS12],
    };
    let verifier =
        Verifier::new(roots(settings)?, settings.mode == SslMode::VerifyFull, provider.clone())
            .map_err(trouble)?;
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .map_err(trouble)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match identity(settings)? {
        Some((chain, key)) => builder.with_client_auth_cert(chain, key).map_err(trouble)?,
        None => builder.with_no_client_auth(),
    };
    config.enable_sni = settings.sni;
    // PostgreSQL requires ALPN on connections that start with TLS directly.
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(config)
}

fn trouble(e: rustls::Error) -> Error {
    Error::caused(ErrorKind::Tls, OP, e)
}

fn wrong(message: String) -> Error {
    Error::new(ErrorKind::Tls, OP, message)
}

fn roots(settings: &TlsSettings) -> Result<Option<Vec<CertificateDer<'static>>>, Error> {
    let path = match &settings.root {
        RootCert::System => return system_roots().map(Some),
        RootCert::File(path) => path,
        RootCert::DefaultFile(path) if path.exists() => path,
        RootCert::DefaultFile(_) | RootCert::None => {
            return match settings.mode {
                SslMode::VerifyCa | SslMode::VerifyFull => Err(wrong(format!(
                    "sslmode={}: expected a root certificate, found none\n\
                     hint: set sslrootcert=FILE or sslrootcert=system",
                    settings.mode
                ))),
                _ => Ok(None),
            };
        }
    };
    certificates("sslrootcert", path).map(Some)
}

fn system_roots() -> Result<Vec<CertificateDer<'static>>, Error> {
    let loaded = rustls_native_certs::load_native_certs();
    if loaded.certs.is_empty() {
        let why = loaded.errors.first().map_or("none installed".to_owned(), ToString::to_string);
        return Err(wrong(format!("sslrootcert=system: expected authorities, found none: {why}")));
    }
    Ok(loaded.certs)
}

fn certificates(keyword: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let read = |why: String| wrong(format!("{keyword}: read {}: {why}", path.display()));
    let content = fs::read(path).map_err(|e| read(e.to_string()))?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&content).collect();
    let found = found.map_err(|e| read(e.to_string()))?;
    if found.is_empty() {
        return Err(read("expected PEM certificates, found none".into()));
    }
    Ok(found)
}

type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// The client certificate and its key, if configured or present.
fn identity(settings: &TlsSettings) -> Result<Option<Identity>, Error> {
    let present = |f: &&ClientFile| f.explicit || f.path.exists();
    let Some(cert) = settings.cert.as_ref().filter(present) else { return Ok(None) };
    let chain = certificates("sslcert", &cert.path)?;
    let Some(key) = settings.key.as_ref() else {
        return Err(wrong(format!("expected sslkey beside sslcert={}", cert.path.display())));
    };
    Ok(Some((chain, private_key(&key.path)?)))
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, Error> {
    let read = |why: String| wrong(format!("sslkey: read {}: {why}", path.display()));
    let meta = fs::metadata(path).map_err(|e| read(e.to_string()))?;
    // As in libpq: a group may read a key that belongs to root; any other key must be private.
    let forbidden = if meta.uid() == 0 { 0o037 } else { 0o077 };
    if meta.mode() & forbidden != 0 {
        return Err(read(format!(
            "expected mode 0600 (or 0640 owned by root), found {:04o}",
            meta.mode() & 0o7777
        )));
    }
    let content = fs::read(path).map_err(|e| read(e.to_string()))?;
    if String::from_utf8_lossy(&content).contains("ENCRYPTED") {
        return Err(read("expected an unencrypted key, found an encrypted one".into()));
    }
    PrivateKeyDer::from_pem_slice(&content).map_err(|e| read(e.to_string()))
}

/// RFC 5929 `tls-server-end-point`: the certificate, hashed with its signature's hash function, but at least with
/// SHA-256. `None` if the signature has no such function (Ed25519).
pub(super) fn end_point(cert: &CertificateDer<'_>) -> Option<Vec<u8>> {
    let (_, parsed) = X509Certificate::from_der(cert).ok()?;
    let oid = match SignatureAlgorithm::try_from(&parsed.signature_algorithm).ok()? {
        SignatureAlgorithm::RSASSA_PSS(params) => params.hash_algorithm_oid().to_id_string(),
        _ => parsed.signature_algorithm.algorithm.to_id_string(),
    };
    match oid.as_str() {
        // MD5 and SHA-1, with RSA, ECDSA or as the hash of RSASSA-PSS, are replaced by SHA-256.
        "1.2.840.113549.1.1.4"
        | "1.2.840.113549.1.1.5"
        | "1.2.840.10045.4.1"
        | "1.3.14.3.2.26"
        | "1.2.840.113549.1.1.11"
        | "1.2.840.10045.4.3.2"
        | "2.16.840.1.101.3.4.2.1" => Some(sha2::Sha256::digest(cert).to_vec()),
        "1.2.840.113549.1.1.12" | "1.2.840.10045.4.3.3" | "2.16.840.1.101.3.4.2.2" => {
            Some(sha2::Sha384::digest(cert).to_vec())
        }
        "1.2.840.113549.1.1.13" | "1.2.840.10045.4.3.4" | "2.16.840.1.101.3.4.2.3" => {
            Some(sha2::Sha512::digest(cert).to_vec())
        }
        _ => None,
    }
}
