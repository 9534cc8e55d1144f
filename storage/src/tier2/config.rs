//! The user's configuration of tier 2.
//!
//! Unknown keys are refused; secrets are printed as `[redacted]`; `validate` reports every problem at once and needs
//! neither network nor bucket.

use crate::{Error, Kind, Op};
use klio_pg::ByteSize;
use std::{fmt, path::PathBuf, time::Duration};
use url::Url;

/// The `[tier2]` section.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tier2Config {
    /// `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix` or `file:///directory`.
    #[serde(default)]
    pub url: String,
    /// The address of the store, for S3-compatible stores, emulators and proxies: `https://host:port`. `http://` is
    /// accepted here and nowhere else.
    #[serde(default)]
    pub endpoint: Option<String>,
    /// S3 region; if absent, the ambient one or `us-east-1`.
    #[serde(default)]
    pub region: Option<String>,
    /// Whether the S3 bucket is in the path instead of the host name; default: yes with an endpoint, otherwise no.
    #[serde(default)]
    pub path_style: Option<bool>,
    /// PEM file with certificate authorities to trust in addition to the system's.
    #[serde(default)]
    pub ca_file: Option<PathBuf>,
    /// S3 access key; if absent, the ambient credentials are used (environment, web identity, instance metadata).
    #[serde(default)]
    pub access_key_id: Option<String>,
    /// S3 secret of the access key.
    #[serde(default)]
    pub secret_access_key: Option<Secret>,
    /// S3 session token of temporary credentials.
    #[serde(default)]
    pub session_token: Option<Secret>,
    /// Google Cloud service account file; if absent, ambient credentials are used.
    #[serde(default)]
    pub service_account_file: Option<PathBuf>,
    /// Azure storage account; if absent, the ambient one.
    #[serde(default)]
    pub account: Option<String>,
    /// Access key of the Azure account.
    #[serde(default)]
    pub account_key: Option<Secret>,
    /// Storage class of new objects, for example `STANDARD_IA` (S3, Google Cloud).
    #[serde(default)]
    pub storage_class: Option<String>,
    /// Server-side encryption (S3).
    #[serde(default)]
    pub encryption: Option<Encryption>,
    /// Key for `encryption = "kms"`; if absent, the account's default key.
    #[serde(default)]
    pub kms_key_id: Option<String>,
    /// How an upload is verified (S3): by a checksum that the store compares on arrival, or, for stores that refuse the
    /// checksum header, by reading the object again.
    #[serde(default)]
    pub checksum: Checksums,
    /// Limit for the memory of all uploads together; at least 8 MiB.
    #[serde(default = "default_upload_memory")]
    pub upload_memory: ByteSize,
    /// Seconds until a connection must be established.
    #[serde(default = "default_connect_timeout")]
    pub connect_timeout_seconds: u32,
    /// Seconds without any progress in either direction after which a request fails. A request that makes progress may
    /// take any time.
    #[serde(default = "default_request_timeout")]
    pub request_timeout_seconds: u32,
    /// Seconds during which one attempt retries a failing request. The caller tries again later anyway.
    #[serde(default = "default_retry_timeout")]
    pub retry_timeout_seconds: u32,
}

const fn default_upload_memory() -> ByteSize {
    ByteSize::mib(64)
}
const fn default_connect_timeout() -> u32 {
    5
}
const fn default_request_timeout() -> u32 {
    60
}
const fn default_retry_timeout() -> u32 {
    30
}

/// How S3 encrypts objects at rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Encryption {
    /// SSE-S3: keys managed by the store.
    #[serde(rename = "AES256")]
    Aes256,
    /// SSE-KMS.
    #[serde(rename = "kms")]
    Kms,
}

/// A value that is never printed.
#[derive(Clone, PartialEq, Eq, serde::Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
    /// The secret itself: for the library that needs it, never for a message.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

impl serde::Serialize for Secret {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str("[redacted]")
    }
}

/// How uploads are verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Checksums {
    /// S3's checksum header with SHA-256.
    #[default]
    Sha256,
    /// No checksum header: each upload is read again and compared.
    None,
}

/// The kind of store that a URL names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Provider {
    S3,
    Google,
    Azure,
    File,
}

impl Tier2Config {
    /// Defaults for everything but the URL.
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            endpoint: None,
            region: None,
            path_style: None,
            ca_file: None,
            access_key_id: None,
            secret_access_key: None,
            session_token: None,
            service_account_file: None,
            account: None,
            account_key: None,
            storage_class: None,
            encryption: None,
            kms_key_id: None,
            checksum: Checksums::default(),
            upload_memory: default_upload_memory(),
            connect_timeout_seconds: default_connect_timeout(),
            request_timeout_seconds: default_request_timeout(),
            retry_timeout_seconds: default_retry_timeout(),
        }
    }

    /// Every problem that can be found without opening anything; empty if there is none.
    pub fn validate(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let provider = match self.parsed() {
            Ok((_, provider)) => provider,
            Err(problem) => {
                problems.push(problem);
                return problems;
            }
        };
        self.check_endpoint(provider, &mut problems);
        self.check_credentials(provider, &mut problems);
        let mut only = |given: bool, key: &str, providers: &[Provider]| {
            if given && !providers.contains(&provider) {
                problems.push(format!("tier2.{key} does not apply to {}", self.url));
            }
        };
        only(self.region.is_some(), "region", &[Provider::S3]);
        only(self.path_style.is_some(), "path_style", &[Provider::S3]);
        only(self.encryption.is_some(), "encryption", &[Provider::S3]);
        only(self.checksum != Checksums::default(), "checksum", &[Provider::S3]);
        only(self.storage_class.is_some(), "storage_class", &[Provider::S3, Provider::Google]);
        only(self.service_account_file.is_some(), "service_account_file", &[Provider::Google]);
        only(self.account.is_some(), "account", &[Provider::Azure]);
        if self.kms_key_id.is_some() && self.encryption != Some(Encryption::Kms) {
            problems.push("tier2.kms_key_id needs tier2.encryption = \"kms\"".into());
        }
        if self.upload_memory < ByteSize::mib(8) {
            problems.push(format!(
                "tier2.upload_memory: expected at least 8 MiB, found {}",
                self.upload_memory
            ));
        }
        for (key, value) in [
            ("connect_timeout_seconds", self.connect_timeout_seconds),
            ("request_timeout_seconds", self.request_timeout_seconds),
            ("retry_timeout_seconds", self.retry_timeout_seconds),
        ] {
            if !(1..=3600).contains(&value) {
                problems.push(format!("tier2.{key}: expected 1 to 3600, found {value}"));
            }
        }
        problems
    }

    fn check_endpoint(&self, provider: Provider, problems: &mut Vec<String>) {
        let Some(endpoint) = &self.endpoint else { return };
        let good = Url::parse(endpoint)
            .is_ok_and(|u| matches!(u.scheme(), "http" | "https") && u.host_str().is_some());
        if !good {
            problems.push(format!(
                "tier2.endpoint: expected http://host or https://host, found {endpoint:?}"
            ));
        }
        if provider == Provider::File {
            problems.push("tier2.endpoint does not apply to a file:// URL".into());
        }
    }

    fn check_credentials(&self, provider: Provider, problems: &mut Vec<String>) {
        if self.access_key_id.is_some() != self.secret_access_key.is_some() {
            problems.push(
                "tier2.access_key_id and tier2.secret_access_key: expected both or neither".into(),
            );
        }
        if self.session_token.is_some() && self.access_key_id.is_none() {
            problems.push("tier2.session_token needs tier2.access_key_id".into());
        }
        if self.access_key_id.is_some() && provider != Provider::S3 {
            problems.push("tier2.access_key_id applies to s3:// only".into());
        }
        if self.account_key.is_some() && self.account.is_none() {
            problems.push("tier2.account_key needs tier2.account".into());
        }
    }

    /// The parsed URL and its kind of store, or the problem with it (never with the URL's user part, which may contain
    /// a secret).
    pub(super) fn parsed(&self) -> Result<(Url, Provider), String> {
        let url = Url::parse(&self.url).map_err(|error| {
            format!("tier2.url: expected s3://, gs://, az:// or file:///, found no URL: {error}")
        })?;
        if !url.username().is_empty() || url.password().is_some() {
            return Err("tier2.url: expected no credentials inside the URL; use \
                        tier2.access_key_id or ambient ones"
                .into());
        }
        let bucket = url.host_str().is_some_and(|host| !host.is_empty());
        let provider = match url.scheme() {
            "s3" => Provider::S3,
            "gs" => Provider::Google,
            "az" => Provider::Azure,
            "file" => Provider::File,
            other => {
                return Err(format!(
                    "tier2.url: expected s3://, gs://, az:// or file:///, found {other}://"
                ));
            }
        };
        match (provider, bucket) {
            (Provider::File, true) => {
                Err("tier2.url: expected file:/// with three slashes and an absolute directory"
                    .into())
            }
            (Provider::File, false) => Ok((url, provider)),
            (_, true) => Ok((url, provider)),
            (_, false) => Err(format!("tier2.url: expected a bucket after {}://", url.scheme())),
        }
    }

    pub(super) fn invalid(&self, problem: impl fmt::Display) -> Error {
        Error::new(Kind::Invalid, Op::Configure, format!("tier 2 {}", self.url), problem)
    }

    pub(super) fn connect_timeout(&self) -> Duration {
        Duration::from_secs(self.connect_timeout_seconds.into())
    }
    pub(super) fn request_timeout(&self) -> Duration {
        Duration::from_secs(self.request_timeout_seconds.into())
    }
    pub(super) fn retry_timeout(&self) -> Duration {
        Duration::from_secs(self.retry_timeout_seconds.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_never_print() {
        let mut config = Tier2Config::new("s3://b");
        config.access_key_id = Some("AK".into());
        config.secret_access_key = Some(Secret::new("hush-hush"));
        config.session_token = Some(Secret::new("hush-token"));
        let json = serde_json::to_string(&config).unwrap();
        for text in [format!("{config:?}"), format!("{config:#?}"), json] {
            assert!(!text.contains("hush"), "{text}");
            assert!(text.contains("[redacted]"), "{text}");
        }
    }

    #[test]
    fn an_unknown_key_is_refused() {
        let error = serde_json::from_str::<Tier2Config>(r#"{"url":"s3://b","buket":"x"}"#);
        assert!(error.unwrap_err().to_string().contains("buket"));
    }

    #[test]
    fn every_problem_is_named_at_once() {
        let mut config = Tier2Config::new("gs://bucket");
        config.endpoint = Some("localhost:9000".into());
        config.access_key_id = Some("AK".into());
        config.region = Some("eu".into());
        config.kms_key_id = Some("k".into());
        config.upload_memory = ByteSize::mib(1);
        config.request_timeout_seconds = 0;
        let text = config.validate().join("\n");
        for key in ["endpoint", "access_key_id", "region", "kms_key_id", "upload_memory", "request"]
        {
            assert!(text.contains(key), "{key} in {text}");
        }
    }

    #[test]
    fn urls_that_name_no_store_are_refused() {
        for bad in ["", "bucket", "s3://", "ftp://b", "https://b", "s3://key:hush@b", "file://x/y"]
        {
            let problems = Tier2Config::new(bad).validate();
            assert_eq!(problems.len(), 1, "{bad}: {problems:?}");
            assert!(!problems[0].contains("hush"));
        }
        for good in ["s3://b", "s3://b/p/q", "gs://b", "az://c/p", "file:///srv/tier2"] {
            assert_eq!(Tier2Config::new(good).validate(), Vec::<String>::new(), "{good}");
        }
    }
}
