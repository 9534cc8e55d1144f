//! Certificates for tests: authorities, servers, clients, expired ones. Nothing here is shared with the server's own pki.

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, date_time_ymd,
};
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

/// A certificate authority.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// A certificate with its key, as PEM.
#[derive(Debug, Clone)]
pub struct Pair {
    /// The certificate.
    pub cert: String,
    /// The private key (PKCS #8).
    pub key: String,
}

/// When a certificate is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Validity {
    /// From 2020 to 2120.
    Now,
    /// It ended in 2021.
    Expired,
    /// It begins in 2119.
    NotYet,
}

impl Validity {
    fn apply(self, params: &mut CertificateParams) {
        let (from, to) = match self {
            Self::Now => (2020, 2120),
            Self::Expired => (2020, 2021),
            Self::NotYet => (2119, 2120),
        };
        params.not_before = date_time_ymd(from, 1, 1);
        params.not_after = date_time_ymd(to, 1, 1);
    }
}

impl Authority {
    /// A new self-signed authority.
    ///
    /// # Panics
    /// When the system has no randomness.
    #[must_use]
    pub fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        Validity::Now.apply(&mut params);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().expect("generate a key");
        let issuer = CertifiedIssuer::self_signed(params, key).expect("sign an authority");
        Self { issuer }
    }

    /// Its certificate.
    #[must_use]
    pub fn cert(&self) -> String {
        self.issuer.pem()
    }

    /// Its certificate and key, for programs that issue certificates themselves.
    #[must_use]
    pub fn pair(&self) -> Pair {
        Pair { cert: self.cert(), key: self.issuer.key().serialize_pem() }
    }

    /// A server certificate for these host names and addresses.
    ///
    /// # Panics
    /// For a name that is none.
    #[must_use]
    pub fn server(&self, names: &[&str], validity: Validity) -> Pair {
        let names: Vec<String> = names.iter().map(|&n| n.to_owned()).collect();
        let mut params = CertificateParams::new(names).expect("host names and addresses");
        params.distinguished_name.push(DnType::CommonName, "server");
        self.issue(params, validity, ExtendedKeyUsagePurpose::ServerAuth)
    }

    /// A client certificate with this common name and, if given, organisational unit.
    ///
    /// # Panics
    /// When the system has no randomness.
    #[must_use]
    pub fn client(&self, common_name: &str, unit: Option<&str>, validity: Validity) -> Pair {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, common_name);
        if let Some(unit) = unit {
            params.distinguished_name.push(DnType::OrganizationalUnitName, unit);
        }
        self.issue(params, validity, ExtendedKeyUsagePurpose::ClientAuth)
    }

    fn issue(
        &self,
        mut params: CertificateParams,
        validity: Validity,
        usage: ExtendedKeyUsagePurpose,
    ) -> Pair {
        validity.apply(&mut params);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate().expect("generate a key");
        let cert = params.signed_by(&key, &self.issuer).expect("sign a certificate");
        Pair { cert: cert.pem(), key: key.serialize_pem() }
    }
}

impl Pair {
    /// Writes `NAME.crt` and `NAME.key` (owner only) into `dir` and returns the two paths.
    ///
    /// # Panics
    /// When they cannot be written.
    #[must_use]
    pub fn write(&self, dir: &Path, name: &str) -> (PathBuf, PathBuf) {
        let (cert, key) = (dir.join(format!("{name}.crt")), dir.join(format!("{name}.key")));
        fs::write(&cert, &self.cert).expect("write a certificate");
        fs::write(&key, &self.key).expect("write a key");
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).expect("protect a key");
        (cert, key)
    }
}
