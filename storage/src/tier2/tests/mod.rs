//! Tier 2 with a real S3 endpoint over HTTP that checks signatures, with a directory, and with scripted faults.

mod encrypted;
mod faults;
mod promises;
pub(crate) mod s3;
mod slow;
mod tls;
mod uplink;

use super::{Secret, Source, Tier2, Tier2Config, Wrapping};
use s3::{BUCKET, S3};
use std::path::{Path, PathBuf};

/// The store for tests: only a fault that the test sets makes a request fail, however slow the machine is.
pub(crate) fn config(s3: &S3) -> Tier2Config {
    let mut config = Tier2Config::new(format!("s3://{BUCKET}/prefix"));
    let (id, secret) = s3.credentials();
    config.endpoint = Some(s3.endpoint.clone());
    config.access_key_id = Some(id.into());
    config.secret_access_key = Some(Secret::new(secret));
    config.request_timeout_seconds = 120;
    config.retry_timeout_seconds = 120;
    config
}

/// The same with short timeouts, which expire while a test watches.
pub(super) fn hurried(s3: &S3) -> Tier2Config {
    Tier2Config { request_timeout_seconds: 2, retry_timeout_seconds: 5, ..config(s3) }
}

pub(crate) fn open(s3: &S3) -> Tier2 {
    Tier2::open(&config(s3)).unwrap()
}

pub(super) const KEY: &str = "pg-1/wal/00000001/000000010000000000000001.zst";

/// Bytes that do not compress, the same for the same seed.
pub(super) fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    use rand::{RngCore, SeedableRng};
    let mut block = vec![0; bytes];
    rand::rngs::StdRng::seed_from_u64(seed).fill_bytes(&mut block);
    block
}

/// A sealed file: `plain` as zstd with a content checksum, as on tier 1.
pub(super) fn sealed(directory: &Path, name: &str, plain: &[u8], level: i32) -> Source {
    let path = directory.join(name);
    let mut encoder = zstd::Encoder::new(Vec::new(), level).unwrap();
    encoder.include_checksum(true).unwrap();
    std::io::Write::write_all(&mut encoder, plain).unwrap();
    std::fs::write(&path, encoder.finish().unwrap()).unwrap();
    source(path)
}

pub(super) fn source(path: PathBuf) -> Source {
    Source {
        path,
        sha256: None,
        zstd: true,
        plaintext_bytes: None,
        grows: false,
        wrapping: Wrapping::default(),
    }
}
