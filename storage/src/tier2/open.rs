//! Opens an object store by its URL.
//!
//! Static credentials exclude ambient ones, so that a stray AWS_* variable cannot be mixed in. Plain
//! HTTP is only possible for an endpoint that is configured with `http://`. Every store has connect and
//! request timeouts (dial.rs, link.rs) and bounded retries; `file://` fsyncs files and directories.

use super::{
    config::{Checksums, Encryption, Provider, Tier2Config},
    date::Dates,
    dial::Dialer,
    http::{Replacing, TracedConnector},
};
use crate::{Error, Kind, Op};
use object_store::{
    BackoffConfig, ClientOptions, ObjectStore, RetryConfig,
    aws::{AmazonS3Builder, AmazonS3ConfigKey, Checksum},
    azure::MicrosoftAzureBuilder,
    gcp::GoogleCloudStorageBuilder,
    local::LocalFileSystem,
    multipart::MultipartStore,
    path::Path,
    prefix::PrefixStore,
};
use std::{path::PathBuf, sync::Arc, time::Duration};
use url::Url;

/// An opened store, with its directory if it is a local one.
pub(super) struct Opened {
    pub(super) store: Arc<dyn ObjectStore>,
    /// The same store for multipart uploads, if it supports them.
    pub(super) parts: Option<Arc<dyn MultipartStore>>,
    pub(super) directory: Option<PathBuf>,
    /// The times in its answers.
    pub(super) dates: Dates,
    /// What its uploads may overwrite.
    pub(super) replacing: Replacing,
}

/// Opens the store without contacting it.
pub(super) fn open(config: &Tier2Config) -> Result<Opened, Error> {
    let problems = config.validate();
    if !problems.is_empty() {
        return Err(Error::new(Kind::Invalid, Op::Configure, "tier 2", problems.join("; ")));
    }
    let (url, provider) = config.parsed().map_err(|problem| invalid(config, problem))?;
    if provider == Provider::File {
        return open_directory(config, &url);
    }
    let bucket = url.host_str().unwrap_or_default().to_owned();
    let prefix = Path::from_url_path(url.path()).map_err(|error| invalid(config, error))?;
    let (dialer, dates) = (Dialer::new(config)?, Dates::default());
    let replacing = Replacing::default();
    let connector =
        TracedConnector { bucket, dialer, dates: dates.clone(), replacing: replacing.clone() };
    let (store, parts) = match provider {
        Provider::S3 => below(prefix, s3(config, connector)?),
        Provider::Google => below(prefix, google(config, connector)?),
        Provider::Azure | Provider::File => below(prefix, azure(config, connector)?),
    };
    Ok(Opened { store, parts: Some(parts), directory: None, dates, replacing })
}

type Both = (Arc<dyn ObjectStore>, Arc<dyn MultipartStore>);

/// The store below a prefix, as both of its traits.
fn below<S: ObjectStore + MultipartStore + Clone>(prefix: Path, store: S) -> Both {
    if prefix.as_ref().is_empty() {
        return (Arc::new(store.clone()), Arc::new(store));
    }
    let store = PrefixStore::new(store, prefix);
    (Arc::new(store.clone()), Arc::new(store))
}

fn invalid(config: &Tier2Config, problem: impl std::fmt::Display) -> Error {
    config.invalid(problem)
}

fn open_directory(config: &Tier2Config, url: &Url) -> Result<Opened, Error> {
    let directory = url
        .to_file_path()
        .map_err(|()| invalid(config, "expected an absolute directory, as in file:///srv/tier2"))?;
    if !directory.is_dir() {
        // If we created it, an unmounted disk would look like an empty archive.
        return Err(invalid(config, "no such directory")
            .hint("create the directory or mount it; klio does not create it"));
    }
    let store = LocalFileSystem::new_with_prefix(&directory)
        .map_err(|error| invalid(config, error))?
        .with_fsync(true);
    let (dates, replacing) = (Dates::default(), Replacing::default());
    Ok(Opened { store: Arc::new(store), parts: None, directory: Some(directory), dates, replacing })
}

fn s3(
    config: &Tier2Config,
    connector: TracedConnector,
) -> Result<object_store::aws::AmazonS3, Error> {
    let mut builder = match (&config.access_key_id, &config.secret_access_key) {
        (Some(id), Some(secret)) => {
            AmazonS3Builder::new().with_access_key_id(id).with_secret_access_key(secret.expose())
        }
        _ => AmazonS3Builder::from_env(),
    };
    if let Some(token) = &config.session_token {
        builder = builder.with_token(token.expose());
    }
    if let Some(region) = &config.region {
        builder = builder.with_region(region);
    }
    if let Some(endpoint) = &config.endpoint {
        builder = builder.with_endpoint(endpoint);
    }
    let path_style = config.path_style.unwrap_or(config.endpoint.is_some());
    builder = match (config.encryption, &config.kms_key_id) {
        (None, _) => builder,
        (Some(Encryption::Aes256), _) => sse(builder, "AES256"),
        (Some(Encryption::Kms), Some(key)) => builder.with_sse_kms_encryption(key),
        (Some(Encryption::Kms), None) => sse(builder, "aws:kms"),
    };
    if config.checksum == Checksums::Sha256 {
        // The store compares this with the received bytes, so a damaged upload is refused instead of
        // stored (P5).
        builder = builder.with_checksum_algorithm(Checksum::SHA256);
    }
    builder
        .with_bucket_name(&connector.bucket)
        .with_virtual_hosted_style_request(!path_style)
        .with_retry(retries(config))
        .with_client_options(client_options(&connector.dialer))
        .with_http_connector(connector)
        .build()
        .map_err(|error| invalid(config, error))
}

fn sse(builder: AmazonS3Builder, value: &str) -> AmazonS3Builder {
    match "aws_server_side_encryption".parse::<AmazonS3ConfigKey>() {
        Ok(key) => builder.with_config(key, value),
        Err(_) => builder,
    }
}

fn google(
    config: &Tier2Config,
    connector: TracedConnector,
) -> Result<object_store::gcp::GoogleCloudStorage, Error> {
    let mut builder = match &config.service_account_file {
        Some(file) => GoogleCloudStorageBuilder::new()
            .with_service_account_path(file.to_string_lossy().into_owned()),
        None => GoogleCloudStorageBuilder::from_env(),
    };
    if let Some(endpoint) = &config.endpoint {
        builder = builder.with_base_url(endpoint);
    }
    builder
        .with_bucket_name(&connector.bucket)
        .with_retry(retries(config))
        .with_client_options(client_options(&connector.dialer))
        .with_http_connector(connector)
        .build()
        .map_err(|error| invalid(config, error))
}

fn azure(
    config: &Tier2Config,
    connector: TracedConnector,
) -> Result<object_store::azure::MicrosoftAzure, Error> {
    let mut builder = match &config.account_key {
        Some(key) => MicrosoftAzureBuilder::new().with_access_key(key.expose()),
        None => MicrosoftAzureBuilder::from_env(),
    };
    if let Some(account) = &config.account {
        builder = builder.with_account(account);
    }
    if let Some(endpoint) = &config.endpoint {
        builder = builder.with_endpoint(endpoint.clone());
    }
    builder
        .with_container_name(&connector.bucket)
        .with_retry(retries(config))
        .with_client_options(client_options(&connector.dialer))
        .with_http_connector(connector)
        .build()
        .map_err(|error| invalid(config, error))
}

/// Retries inside one attempt. They are short: the queue brings the job back with a longer backoff, and
/// a store that is down must not occupy an upload slot.
fn retries(config: &Tier2Config) -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig {
            init_backoff: Duration::from_millis(100),
            max_backoff: Duration::from_secs(5),
            base: 2.0,
        },
        max_retries: 8,
        retry_timeout: config.retry_timeout(),
    }
}

/// `with_client_options` replaces options that were set on the builder before. `dial` sets the others.
fn client_options(dialer: &Dialer) -> ClientOptions {
    ClientOptions::new().with_allow_http(dialer.is_plain())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_directory_is_not_created() {
        let directory = tempfile::tempdir().unwrap();
        let gone = directory.path().join("not-mounted");
        let config = Tier2Config::new(Url::from_file_path(&gone).unwrap());
        let error = open(&config).err().unwrap();
        assert!(error.to_string().contains("hint:"), "{error}");
        assert!(!gone.exists());
    }

    #[test]
    fn a_ca_file_without_a_certificate_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut config = Tier2Config::new("s3://b");
        config.ca_file = Some(file.path().to_owned());
        let error = open(&config).err().unwrap();
        assert!(error.to_string().contains("no certificate"), "{error}");
        config.ca_file = Some("/nonexistent/ca.pem".into());
        let error = open(&config).err().unwrap();
        assert!(error.to_string().contains("ca_file"), "{error}");
    }

    #[test]
    fn plain_http_needs_an_http_endpoint() {
        use object_store::ClientConfigKey::AllowHttp;
        let mut config = Tier2Config::new("s3://b");
        let allowed =
            |c: &Tier2Config| client_options(&Dialer::new(c).unwrap()).get_config_value(&AllowHttp);
        assert_eq!(allowed(&config).as_deref(), Some("false"));
        config.endpoint = Some("https://localhost:1".into());
        assert_eq!(allowed(&config).as_deref(), Some("false"));
        config.endpoint = Some("http://localhost:1".into());
        assert_eq!(allowed(&config).as_deref(), Some("true"));
    }

    #[test]
    fn every_provider_opens_without_a_network() {
        rustls::crypto::ring::default_provider().install_default().ok();
        let mut s3 = Tier2Config::new("s3://b/prefix");
        s3.access_key_id = Some("AK".into());
        s3.secret_access_key = Some(super::super::Secret::new("x"));
        s3.encryption = Some(Encryption::Aes256);
        assert!(open(&s3).is_ok());
        let mut azure = Tier2Config::new("az://c/p");
        azure.account = Some("acc".into());
        azure.account_key = Some(super::super::Secret::new("QUJD"));
        assert!(open(&azure).is_ok());
        assert!(open(&Tier2Config::new("gs://b")).is_ok());
    }
}
