//! Opens an object store by its URL.
//!
//! Static credentials shut the ambient ones out, so that a stray AWS_* variable cannot join them.
//! Plain HTTP is possible only for an endpoint that is written as `http://`. Every store has connect
//! and request timeouts and bounded retries; `file://` fsyncs files and folders.

use super::{
    config::{Encryption, Provider, Tier2Config},
    date::Dates,
    http::TracedConnector,
};
use crate::{Error, Kind, Op};
use object_store::{
    BackoffConfig, Certificate, ClientOptions, ObjectStore, RetryConfig,
    aws::{AmazonS3Builder, AmazonS3ConfigKey, Checksum},
    azure::MicrosoftAzureBuilder,
    gcp::GoogleCloudStorageBuilder,
    local::LocalFileSystem,
    path::Path,
    prefix::PrefixStore,
};
use std::{path::PathBuf, sync::Arc, time::Duration};
use url::Url;

/// An opened store, and its folder where it is a local one.
pub(super) struct Opened {
    pub(super) store: Arc<dyn ObjectStore>,
    pub(super) folder: Option<PathBuf>,
    /// What its answers say of the time.
    pub(super) dates: Dates,
}

/// Opens without talking to the store.
pub(super) fn open(config: &Tier2Config) -> Result<Opened, Error> {
    let problems = config.validate();
    if !problems.is_empty() {
        return Err(Error::new(Kind::Invalid, Op::Configure, "tier 2", problems.join("; ")));
    }
    let (url, provider) = config.parsed().map_err(|problem| invalid(config, problem))?;
    if provider == Provider::File {
        return open_folder(config, &url);
    }
    let bucket = url.host_str().unwrap_or_default().to_owned();
    let dates = Dates::default();
    let store: Arc<dyn ObjectStore> = match provider {
        Provider::S3 => Arc::new(s3(config, &bucket, &dates)?),
        Provider::Google => Arc::new(google(config, &bucket, &dates)?),
        Provider::Azure | Provider::File => Arc::new(azure(config, &bucket, &dates)?),
    };
    let prefix = Path::from_url_path(url.path()).map_err(|error| invalid(config, error))?;
    let store = if prefix.as_ref().is_empty() {
        store
    } else {
        Arc::new(PrefixStore::new(store, prefix)) as Arc<dyn ObjectStore>
    };
    Ok(Opened { store, folder: None, dates })
}

fn invalid(config: &Tier2Config, problem: impl std::fmt::Display) -> Error {
    Error::new(Kind::Invalid, Op::Configure, format!("tier 2 {}", config.url), problem)
}

fn open_folder(config: &Tier2Config, url: &Url) -> Result<Opened, Error> {
    let folder = url
        .to_file_path()
        .map_err(|()| invalid(config, "expected an absolute folder, as in file:///srv/tier2"))?;
    if !folder.is_dir() {
        // Created by us, an unmounted disk would look like an empty archive.
        return Err(invalid(config, "no such folder")
            .hint("create it, or mount what should be there; klio does not create it"));
    }
    let store = LocalFileSystem::new_with_prefix(&folder)
        .map_err(|error| invalid(config, error))?
        .with_fsync(true);
    Ok(Opened { store: Arc::new(store), folder: Some(folder), dates: Dates::default() })
}

fn s3(
    config: &Tier2Config,
    bucket: &str,
    dates: &Dates,
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
    builder
        .with_bucket_name(bucket)
        .with_virtual_hosted_style_request(!path_style)
        // The store compares this with what arrived, so a damaged upload is refused, not kept (P5).
        .with_checksum_algorithm(Checksum::SHA256)
        .with_retry(retries(config))
        .with_client_options(client_options(config)?)
        .with_http_connector(TracedConnector { bucket: bucket.to_owned(), dates: dates.clone() })
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
    bucket: &str,
    dates: &Dates,
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
        .with_bucket_name(bucket)
        .with_retry(retries(config))
        .with_client_options(client_options(config)?)
        .with_http_connector(TracedConnector { bucket: bucket.to_owned(), dates: dates.clone() })
        .build()
        .map_err(|error| invalid(config, error))
}

fn azure(
    config: &Tier2Config,
    container: &str,
    dates: &Dates,
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
        .with_container_name(container)
        .with_retry(retries(config))
        .with_client_options(client_options(config)?)
        .with_http_connector(TracedConnector { bucket: container.to_owned(), dates: dates.clone() })
        .build()
        .map_err(|error| invalid(config, error))
}

/// Retries inside one attempt. Short: the queue brings the job back with a longer backoff, and an
/// upload slot must not be held by a store that is down.
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

/// `with_client_options` replaces what was set on a builder before, so everything is set here.
fn client_options(config: &Tier2Config) -> Result<ClientOptions, Error> {
    let plain = config.endpoint.as_deref().is_some_and(|e| e.starts_with("http://"));
    let mut options = ClientOptions::new()
        .with_allow_http(plain)
        .with_connect_timeout(config.connect_timeout())
        .with_timeout(config.request_timeout())
        .with_pool_idle_timeout(Duration::from_secs(30));
    if let Some(file) = &config.ca_file {
        let pem = std::fs::read(file).map_err(|error| {
            Error::io(Op::Read, file, error).hint("tier2.ca_file must be a readable PEM file")
        })?;
        let certificates = Certificate::from_pem_bundle(&pem)
            .map_err(|error| invalid(config, format!("tier2.ca_file: {error}")))?;
        if certificates.is_empty() {
            return Err(invalid(
                config,
                format!("tier2.ca_file: no certificate in {}", file.display()),
            ));
        }
        options = certificates
            .into_iter()
            .fold(options, |options, certificate| options.with_root_certificate(certificate));
    }
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_folder_is_not_created() {
        let folder = tempfile::tempdir().unwrap();
        let gone = folder.path().join("not-mounted");
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
        let allowed = |c: &Tier2Config| client_options(c).unwrap().get_config_value(&AllowHttp);
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
