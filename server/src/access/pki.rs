//! The small certificate authority that `klio-server init` creates, for users who have none.
//!
//! Certificates are X.509 v3, ECDSA P-256. A client's subject says who it is and what it may access (P8): common name
//! `NAME@CLUSTER`, or common name `NAME` with an organisational unit that names a role. Keys leave this module only
//! into files that only their owner can read.

use super::roles::RoleName;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose,
};
use std::{fs, io::Write, os::unix::fs::OpenOptionsExt, path::Path};
use time::{Duration, OffsetDateTime};

/// The common name of an authority that `klio-server init` created. Roles count in certificates of this one.
pub const AUTHORITY_NAME: &str = "Klio local authority";

/// The file with the authority's certificate, in the configuration directory.
pub const CA_CERT: &str = "ca.crt";
/// The authority's private key, which stays on the server and signs further bundles.
pub const CA_KEY: &str = "ca.key";

const CA_DAYS: i64 = 3650;
const LEAF_DAYS: i64 = 825;

/// Why a certificate could not be created.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read or written.
    #[error("{verb} {path}: {source}")]
    File { verb: &'static str, path: String, source: std::io::Error },
    /// The authority's files exist but cannot be used.
    #[error("make certificate: {0}; hint: are ca.crt and ca.key those of klio-server init?")]
    Certificate(#[from] rcgen::Error),
}

/// A certificate with its key, both as PEM.
pub struct Pair {
    pub cert: String,
    pub key: String,
}

/// The subject of a client certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Subject {
    /// `NAME@CLUSTER`: the sidecar of one cluster.
    Client(String),
    /// A person with a role and without a cluster.
    Person(String, RoleName),
}

fn params(days: i64) -> CertificateParams {
    let mut params = CertificateParams::default();
    // Lets a machine whose clock is a little behind accept a new certificate.
    params.not_before = OffsetDateTime::now_utc() - Duration::hours(1);
    params.not_after = OffsetDateTime::now_utc() + Duration::days(days);
    params
}

///
/// # Errors
/// Only when the system has no randomness.
pub fn new_authority() -> Result<Pair, Error> {
    authority_named(AUTHORITY_NAME)
}

/// A new authority of this name.
///
/// # Errors
/// Only when the system has no randomness.
pub(crate) fn authority_named(name: &str) -> Result<Pair, Error> {
    let mut params = params(CA_DAYS);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.distinguished_name.push(DnType::CommonName, name);
    let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
    Ok(Pair { cert: issuer.pem(), key: issuer.key().serialize_pem() })
}

/// A server certificate for these host names and addresses.
///
/// # Errors
/// An authority that cannot be read, or an invalid name.
pub fn issue_server(authority: &Pair, names: &[String]) -> Result<Pair, Error> {
    let mut params = CertificateParams::new(names.to_vec())?;
    let dates = self::params(LEAF_DAYS);
    (params.not_before, params.not_after) = (dates.not_before, dates.not_after);
    params.distinguished_name.push(DnType::CommonName, "klio-server");
    issue(authority, params, ExtendedKeyUsagePurpose::ServerAuth)
}

/// A client certificate.
///
/// # Errors
/// An authority that cannot be read.
pub fn issue_client(authority: &Pair, subject: &Subject) -> Result<Pair, Error> {
    let mut params = params(LEAF_DAYS);
    match subject {
        Subject::Client(name) => params.distinguished_name.push(DnType::CommonName, name.as_str()),
        Subject::Person(name, role) => {
            params.distinguished_name.push(DnType::CommonName, name.as_str());
            if let Some(unit) = role.unit() {
                params.distinguished_name.push(DnType::OrganizationalUnitName, unit);
            }
        }
    }
    issue(authority, params, ExtendedKeyUsagePurpose::ClientAuth)
}

fn issue(
    authority: &Pair,
    mut params: CertificateParams,
    usage: ExtendedKeyUsagePurpose,
) -> Result<Pair, Error> {
    let issuer = Issuer::from_ca_cert_pem(&authority.cert, KeyPair::from_pem(&authority.key)?)?;
    params.extended_key_usages = vec![usage];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    let key = KeyPair::generate()?;
    Ok(Pair { cert: params.signed_by(&key, &issuer)?.pem(), key: key.serialize_pem() })
}

/// Reads the authority of a configuration directory.
///
/// # Errors
/// A file that is missing or not readable.
pub fn read_authority(dir: &Path) -> Result<Pair, Error> {
    let read = |name: &str| {
        let path = dir.join(name);
        fs::read_to_string(&path).map_err(|source| Error::File {
            verb: "read",
            path: path.display().to_string(),
            source,
        })
    };
    Ok(Pair { cert: read(CA_CERT)?, key: read(CA_KEY)? })
}

/// Writes a new file; never over an existing one. `secret` files can be read by their owner only.
///
/// # Errors
/// The file exists, or its directory cannot be written.
pub fn write_new(path: &Path, content: &str, secret: bool) -> Result<(), Error> {
    let fail = |source| Error::File { verb: "write", path: path.display().to_string(), source };
    let mode = if secret { 0o600 } else { 0o644 };
    let mut file =
        fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path).map_err(fail)?;
    file.write_all(content.as_bytes()).and_then(|()| file.sync_all()).map_err(fail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_file_can_be_read_by_its_owner_only_and_is_never_overwritten() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("k");
        write_new(&path, "one", true).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(write_new(&path, "two", true).is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "one");
    }
}
