//! Progress of a backup: counters that the engine updates and displays read.
//!
//! Nothing is decided by them.

use klio_storage::repository;
use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicU64, Ordering::Relaxed},
};

/// Shared between the backup and its display.
#[derive(Debug, Default)]
pub struct Progress {
    phase: Mutex<&'static str>,
    bytes: AtomicU64,
    files: AtomicU64,
    stored: AtomicU64,
    total_bytes: AtomicU64,
    total_files: AtomicU64,
}

/// A snapshot of the counters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seen {
    /// The current phase, in words.
    pub phase: &'static str,
    /// Bytes of files read or found unchanged so far.
    pub bytes: u64,
    /// Files finished so far.
    pub files: u64,
    /// Bytes added to the repository so far.
    pub stored: u64,
    /// Total bytes, as measured beforehand; 0 while unknown.
    pub total_bytes: u64,
    /// Total number of files; 0 while unknown.
    pub total_files: u64,
}

impl Progress {
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    pub fn seen(&self) -> Seen {
        Seen {
            phase: *self.phase.lock().unwrap_or_else(PoisonError::into_inner),
            bytes: self.bytes.load(Relaxed),
            files: self.files.load(Relaxed),
            stored: self.stored.load(Relaxed),
            total_bytes: self.total_bytes.load(Relaxed),
            total_files: self.total_files.load(Relaxed),
        }
    }

    pub(super) fn enter(&self, phase: &'static str) {
        *self.phase.lock().unwrap_or_else(PoisonError::into_inner) = phase;
        tracing::debug!(phase, "backup phase started");
    }

    pub(super) fn expect(&self, files: u64, bytes: u64) {
        self.total_files.store(files, Relaxed);
        self.total_bytes.store(bytes, Relaxed);
    }
}

/// Passes the engine's progress on to the counters.
#[derive(Debug)]
pub(super) struct Feed(pub Arc<Progress>);

impl repository::Progress for Feed {
    fn bytes(&self, n: u64) {
        self.0.bytes.fetch_add(n, Relaxed);
    }
    fn file_done(&self) {
        self.0.files.fetch_add(1, Relaxed);
    }
    fn stored(&self, n: u64) {
        self.0.stored.fetch_add(n, Relaxed);
    }
}
