//! The files of the CERTIFICATE, CLIENT_CERTIFICATE and CLIENT_KEY variables.
//!
//! They are read and checked at start, so that a wrong file is reported with its variable, and does not look like a
//! collector that cannot be reached.

use crate::env::{Otlp, Problem};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use std::{path::PathBuf, sync::Arc};

/// The variable and the file it names.
type File = (String, PathBuf);

fn problem(file: &File, expected: &str) -> Problem {
    Problem {
        variable: file.0.clone(),
        value: file.1.display().to_string(),
        expected: expected.to_owned(),
    }
}

pub(crate) fn no_authorities(file: &File) -> Problem {
    problem(file, "certificates of authorities in PEM")
}

fn read(file: &File) -> Result<Vec<u8>, Problem> {
    std::fs::read(&file.1).map_err(|error| problem(file, &format!("a readable file ({error})")))
}

fn certificates(pem: &[u8]) -> Option<Vec<CertificateDer<'static>>> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    all.ok().filter(|all| !all.is_empty())
}

/// The content of the file, which has at least one certificate and no broken one.
pub(crate) fn authorities(file: &File) -> Result<Vec<u8>, Problem> {
    let pem = read(file)?;
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&pem).ok_or_else(|| no_authorities(file))? {
        roots.add(certificate).map_err(|_| no_authorities(file))?;
    }
    Ok(pem)
}

/// Whether every configured file can be used.
pub(crate) fn check(otlp: &Otlp) -> Result<(), Problem> {
    otlp.certificate.as_ref().map(authorities).transpose()?;
    identity(otlp).map(drop)
}

/// A client certificate and its key, in PEM.
pub(crate) struct ClientIdentity {
    pub certificate: Vec<u8>,
    pub key: Vec<u8>,
    /// The problem to report if another library refuses them.
    pub problem: Problem,
}

/// Certificate and key: both or none, which the settings ensure.
pub(crate) fn identity(otlp: &Otlp) -> Result<Option<ClientIdentity>, Problem> {
    let (Some(certificate_file), Some(key_file)) = (&otlp.client_certificate, &otlp.client_key)
    else {
        return Ok(None);
    };
    let (certificate, key) = (read(certificate_file)?, read(key_file)?);
    let chain = certificates(&certificate)
        .ok_or_else(|| problem(certificate_file, "a certificate in PEM"))?;
    let parsed = PrivateKeyDer::from_pem_slice(&key)
        .map_err(|_| problem(key_file, "a private key in PEM"))?;
    let unfit = format!("the private key of {}", certificate_file.1.display());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let fits = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map(|c| c.with_root_certificates(RootCertStore::empty()))
        .and_then(|c| c.with_client_auth_cert(chain, parsed));
    let problem = problem(key_file, &unfit);
    match fits {
        Ok(_) => Ok(Some(ClientIdentity { certificate, key, problem })),
        Err(_) => Err(problem),
    }
}
