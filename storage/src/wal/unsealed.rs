//! A journal on disk that is not sealed yet, as all parts of the store see it.

use super::{
    frame::{FIRST_FRAME, JournalHeader},
    kept::Harm,
};
use klio_pg::{Lsn, SegmentName, SegmentSize, TimelineId};
use std::{
    path::PathBuf,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

/// Ignores poisoning: every change under these locks is complete or not begun, so a panic elsewhere leaves the data
/// consistent.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A journal on disk that is not sealed yet. Readers hold a clone of the `Arc`; a file that has readers is not
/// recycled.
#[derive(Debug)]
pub(super) struct Unsealed {
    pub(super) timeline: TimelineId,
    pub(super) start: Lsn,
    /// One past the segment's last byte.
    pub(super) end: Lsn,
    pub(super) path: PathBuf,
    durable: AtomicU64,
    /// For a journal that is not proven: the bytes below this are known to be on the medium, because a later frame says
    /// so.
    known: AtomicU64,
    /// One past the last byte of the file that was ever written. Nothing is written below it again (`cipher.rs`).
    used: AtomicU64,
    /// Damage that recovery found behind the good frames, until the file is set aside.
    harm: Mutex<Option<Harm>>,
    /// The journal is being rebuilt (`refill.rs`).
    pub(super) refilled: AtomicBool,
    /// The bytes below `durable` are on the medium, not only in the page cache. A journal that is not proven is copied
    /// before anything is appended to it (P3).
    proven: AtomicBool,
    /// There is no file: this entry is a placeholder for a sealed file that rotted and was set aside (`rotten.rs`).
    missing: AtomicBool,
    /// Held while the file is sealed or replaced.
    pub(super) work: Mutex<()>,
}

impl Unsealed {
    pub(super) fn new(header: &JournalHeader, path: PathBuf, durable: Lsn, proven: bool) -> Self {
        Self {
            timeline: header.timeline,
            start: header.start,
            end: header.end(),
            path,
            durable: AtomicU64::new(durable.as_u64()),
            known: AtomicU64::new(durable.as_u64()),
            used: AtomicU64::new(FIRST_FRAME),
            harm: Mutex::new(None),
            refilled: AtomicBool::new(false),
            proven: AtomicBool::new(proven),
            missing: AtomicBool::new(false),
            work: Mutex::new(()),
        }
    }
    pub(super) fn durable(&self) -> Lsn {
        Lsn::new(self.durable.load(Ordering::Acquire))
    }
    /// Advances the durable position. Only a writer's flush may do so.
    pub(super) fn set_durable(&self, lsn: Lsn) {
        self.durable.store(lsn.as_u64(), Ordering::Release);
        self.known.store(lsn.as_u64(), Ordering::Release);
    }
    /// Sets how far the journal is known to be on the medium, out of the bytes that recovery read.
    pub(super) fn set_known(&self, lsn: Lsn) {
        self.known.store(lsn.as_u64(), Ordering::Release);
    }
    /// One past the last byte that may be reported to a client.
    pub(super) fn known(&self) -> Lsn {
        if self.is_proven() { self.durable() } else { Lsn::new(self.known.load(Ordering::Acquire)) }
    }
    pub(super) fn used(&self) -> u64 {
        self.used.load(Ordering::Acquire)
    }
    pub(super) fn set_used(&self, offset: u64) {
        self.used.store(offset, Ordering::Release);
    }
    pub(super) fn harm(&self) -> Option<Harm> {
        *lock(&self.harm)
    }
    pub(super) fn set_harm(&self, harm: Option<Harm>) {
        *lock(&self.harm) = harm;
    }
    pub(super) fn is_proven(&self) -> bool {
        self.proven.load(Ordering::Acquire)
    }
    pub(super) fn set_proven(&self, proven: bool) {
        self.proven.store(proven, Ordering::Release);
    }
    pub(super) fn set_missing(&self) {
        self.missing.store(true, Ordering::Release);
    }
    pub(super) fn is_missing(&self) -> bool {
        self.missing.load(Ordering::Acquire)
    }
    pub(super) fn is_empty(&self) -> bool {
        self.durable() == self.start
    }
    pub(super) fn is_full(&self) -> bool {
        self.durable() == self.end
    }
    pub(super) fn segment(&self, size: SegmentSize) -> SegmentName {
        SegmentName::containing(self.timeline, self.start, size)
    }
}
