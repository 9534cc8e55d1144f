//! An S3 endpoint on loopback over HTTP or HTTPS, with signatures checked (s3s-fs), and faults to switch on.
//!
//! Objects lie as files below [`S3::bucket_dir`]. It can be stopped and started again on the same port with the same objects.

use crate::{pki::Pair, ports, scratch::Scratch, site::PATIENCE, wait::eventually_now};
use object_store::aws::{AmazonS3, AmazonS3Builder};
use s3s::{auth::SimpleAuth, service::S3ServiceBuilder};
use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

mod fault;
mod serve;

pub use fault::{Fault, Faults, Rule, Seen};

/// Access key of every test endpoint.
pub const ACCESS_KEY: &str = "klio-test-access";
/// Secret key of every test endpoint.
pub const SECRET_KEY: &str = "klio-test-secret";
/// Region of every test endpoint.
pub const REGION: &str = "us-east-1";
/// Bucket of every test endpoint.
pub const BUCKET: &str = "klio";

/// What identifies an endpoint.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Directory of buckets.
    pub root: PathBuf,
    /// Bucket, created when absent.
    pub bucket: String,
    /// Port on 127.0.0.1.
    pub port: u16,
    /// Access key.
    pub access_key: String,
    /// Secret key.
    pub secret_key: String,
}

/// An S3 endpoint.
pub struct S3 {
    settings: Settings,
    shop: serve::Shop,
    server: Option<serve::Server>,
    // Declared last: the files go after the server.
    _scratch: Option<Scratch>,
}

impl S3 {
    /// A new one over HTTP with an empty bucket, started.
    ///
    /// # Panics
    /// When it cannot listen or write.
    #[must_use]
    pub fn new() -> Self {
        Self::scratch(None)
    }

    /// The same over HTTPS with this certificate.
    ///
    /// # Panics
    /// As [`S3::new`].
    #[must_use]
    pub fn with_tls(certificate: &Pair) -> Self {
        Self::scratch(Some(certificate))
    }

    fn scratch(certificate: Option<&Pair>) -> Self {
        let scratch = Scratch::new("s3");
        let settings = Settings {
            root: scratch.join("root"),
            bucket: BUCKET.to_owned(),
            port: ports::free(),
            access_key: ACCESS_KEY.to_owned(),
            secret_key: SECRET_KEY.to_owned(),
        };
        let mut s3 = Self::open(settings, certificate);
        s3._scratch = Some(scratch);
        s3
    }

    /// One with everything given; nothing is deleted when it is dropped.
    ///
    /// # Panics
    /// As [`S3::new`].
    #[must_use]
    pub fn open(settings: Settings, certificate: Option<&Pair>) -> Self {
        fs::create_dir_all(settings.root.join(&settings.bucket)).expect("make the bucket");
        let files = s3s_fs::FileSystem::new(&settings.root)
            .unwrap_or_else(|e| panic!("open the S3 root {}: {e:?}", settings.root.display()));
        let mut service = S3ServiceBuilder::new(files);
        service.set_auth(SimpleAuth::from_single(
            settings.access_key.clone(),
            settings.secret_key.clone(),
        ));
        let shop = serve::Shop {
            service: service.build(),
            faults: Arc::new(Faults::default()),
            certificate: Arc::new(Mutex::new(certificate.map(serve::acceptor))),
        };
        let mut s3 = Self { settings, shop, server: None, _scratch: None };
        s3.start();
        s3
    }

    /// Starts it again, on the same port. Nothing happens when it runs.
    ///
    /// # Panics
    /// When it cannot listen.
    pub fn start(&mut self) {
        let port = self.settings.port;
        self.server.get_or_insert_with(|| serve::Server::start(self.shop.clone(), port));
    }

    /// Stops it: connections are cut, new ones refused.
    pub fn stop(&mut self) {
        self.server = None;
    }

    /// Faults, and the record of requests.
    #[must_use]
    pub fn faults(&self) -> &Faults {
        &self.shop.faults
    }

    /// Serves another certificate to connections from now on.
    ///
    /// # Panics
    /// When it was not started with TLS: a scheme does not change on the way.
    pub fn set_certificate(&self, certificate: &Pair) {
        let mut current =
            self.shop.certificate.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        assert!(current.is_some(), "set the certificate of an S3 server without TLS");
        *current = Some(serve::acceptor(certificate));
    }

    /// URL of the endpoint, without the bucket; path-style addressing.
    #[must_use]
    pub fn endpoint(&self) -> String {
        let current =
            self.shop.certificate.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let scheme = if current.is_some() { "https" } else { "http" };
        format!("{scheme}://127.0.0.1:{}", self.settings.port)
    }

    /// Port, keys, bucket.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Where the objects lie as files: `bucket_dir().join(key)`. Names that begin with a dot are s3s-fs's own.
    #[must_use]
    pub fn bucket_dir(&self) -> PathBuf {
        self.settings.root.join(&self.settings.bucket)
    }

    /// Waits until a backup of this cluster is in the bucket: its record is the last thing to get there.
    ///
    /// # Panics
    /// When none comes.
    pub async fn wait_backup(&self, cluster: &str) {
        let records = format!("klio/{cluster}/backups");
        eventually_now("a backup in the bucket", PATIENCE, || {
            self.keys(&records).iter().any(|key| key.ends_with(".json"))
        })
        .await;
    }

    /// Keys of all objects below `prefix` (a path, `""` for all), sorted.
    ///
    /// # Panics
    /// When the bucket cannot be read.
    #[must_use]
    pub fn keys(&self, prefix: &str) -> Vec<String> {
        let bucket = self.bucket_dir();
        let mut keys = Vec::new();
        collect(&bucket.join(prefix), &bucket, &mut keys);
        keys.sort();
        keys
    }

    /// A client of this endpoint as it comes, but for `secret_key` (a wrong one must be refused).
    ///
    /// # Panics
    /// When the settings are not accepted.
    #[must_use]
    pub fn client(&self, secret_key: &str) -> AmazonS3 {
        crate::install_crypto();
        AmazonS3Builder::new()
            .with_endpoint(self.endpoint())
            .with_region(REGION)
            .with_bucket_name(&self.settings.bucket)
            .with_access_key_id(&self.settings.access_key)
            .with_secret_access_key(secret_key)
            .with_virtual_hosted_style_request(false)
            .with_allow_http(true)
            .with_retry(object_store::RetryConfig { max_retries: 0, ..Default::default() })
            .build()
            .expect("an S3 client for the test endpoint")
    }
}

impl Default for S3 {
    fn default() -> Self {
        Self::new()
    }
}

fn collect(dir: &Path, bucket: &Path, keys: &mut Vec<String>) {
    // A directory may vanish with its last object while we look.
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_name().to_string_lossy().starts_with('.') {
            continue;
        }
        if path.is_dir() {
            collect(&path, bucket, keys);
        } else if let Ok(key) = path.strip_prefix(bucket) {
            keys.push(key.to_string_lossy().into_owned());
        }
    }
}
