//! Creates the HTTP clients for a store and for the services that provide its credentials.
//!
//! Plain HTTP is used only where object_store asks for it: an endpoint that is configured with `http://`, or the
//! machine's own metadata service. There is no total timeout; `link` limits how long a request may take. The kernel
//! gets the same timeout for bytes that it has taken and the peer does not acknowledge, which ends a dead connection
//! that is otherwise silent. (reqwest's default of 30 seconds ended links that were merely slow.)

use super::config::Tier2Config;
use crate::{Error, Op};
use object_store::client::HttpClient;
use rand::seq::SliceRandom;
use reqwest::{
    Certificate,
    dns::{Addrs, Name, Resolve, Resolving},
};
use std::{net::SocketAddr, sync::Arc, time::Duration};

const USER_AGENT: &str = concat!("klio/", env!("CARGO_PKG_VERSION"));
/// A metadata service is one hop away, or does not exist.
const METADATA_CONNECT: Duration = Duration::from_secs(1);
const IDLE: Duration = Duration::from_secs(30);

/// How to connect.
#[derive(Debug, Clone)]
pub(super) struct Dialer {
    certificates: Vec<Certificate>,
    /// Whether the endpoint's own URL begins with `http://`; a proxy's URL may differ.
    plain: bool,
    connect: Duration,
    /// How long a request may go without progress.
    pub(super) patience: Duration,
}

impl Dialer {
    /// # Errors
    /// `Io`, `Denied`, `Invalid` for the CA file.
    pub(super) fn new(config: &Tier2Config) -> Result<Self, Error> {
        Ok(Self {
            certificates: certificates(config)?,
            plain: config.endpoint.as_deref().is_some_and(|e| e.starts_with("http://")),
            connect: config.connect_timeout(),
            patience: config.request_timeout(),
        })
    }

    pub(super) const fn is_plain(&self) -> bool {
        self.plain
    }

    pub(super) fn client(&self, allow_http: bool) -> object_store::Result<HttpClient> {
        let metadata = allow_http && !self.plain;
        let client = reqwest::Client::builder()
            .user_agent(USER_AGENT)
            .tls_certs_merge(self.certificates.iter().cloned())
            .https_only(!allow_http)
            // HTTP/2 would put all requests on one connection, which is slower, and a lost packet would hold up all of
            // them.
            .http1_only()
            // A decoded answer would differ in length from the object.
            .no_gzip()
            .no_brotli()
            .no_zstd()
            .no_deflate()
            .connect_timeout(if metadata { METADATA_CONNECT } else { self.connect })
            .tcp_user_timeout(self.patience)
            .pool_idle_timeout(IDLE)
            .dns_resolver(Arc::new(Shuffled))
            .build();
        let fail = |error| object_store::Error::Generic { store: "HTTP", source: Box::new(error) };
        client.map(HttpClient::new).map_err(fail)
    }
}

fn certificates(config: &Tier2Config) -> Result<Vec<Certificate>, Error> {
    let Some(file) = &config.ca_file else { return Ok(Vec::new()) };
    let pem = std::fs::read(file).map_err(|error| {
        Error::io(Op::Read, file, error).hint("tier2.ca_file must be a readable PEM file")
    })?;
    let invalid = |problem: String| config.invalid(format!("tier2.ca_file: {problem}"));
    let found = Certificate::from_pem_bundle(&pem).map_err(|error| invalid(error.to_string()))?;
    if found.is_empty() {
        return Err(invalid(format!("no certificate in {}", file.display())));
    }
    Ok(found)
}

/// Resolves to a store's addresses in random order, to spread the load over its machines.
#[derive(Debug)]
struct Shuffled;

impl Resolve for Shuffled {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let mut addresses: Vec<SocketAddr> = found.collect();
            addresses.shuffle(&mut rand::rng());
            Ok(Box::new(addresses.into_iter()) as Addrs)
        })
    }
}
