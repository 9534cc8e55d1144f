//! How far a backup is: counters that the engine moves and displays read.
//!
//! Observation only: nothing is decided by them.

use klio_storage::repository;
use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicU64, Ordering::Relaxed},
};

/// Shared between the work and who shows it.
#[derive(Debug, Default)]
pub struct Progress {
    phase: Mutex<&'static str>,
    bytes: AtomicU64,
    files: AtomicU64,
    stored: AtomicU64,
    total_bytes: AtomicU64,
    total_files: AtomicU64,
}

/// A look at it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seen {
    /// What is being done, in words.
    pub phase: &'static str,
    /// Bytes of files dealt with.
    pub bytes: u64,
    /// Files dealt with.
    pub files: u64,
    /// Bytes added to the repository so far.
    pub stored: u64,
    /// All bytes, as measured before; 0 while that is not known.
    pub total_bytes: u64,
    /// All files.
    pub total_files: u64,
}

impl Progress {
    /// Nothing done yet.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// A look at it.
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
        tracing::debug!(phase, "backup");
    }

    pub(super) fn expect(&self, files: u64, bytes: u64) {
        self.total_files.store(files, Relaxed);
        self.total_bytes.store(bytes, Relaxed);
    }
}

/// For the engine.
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
