//! How far an upload has come, so that a slow one can be told from one that stands still.
//!
//! The connection counts each piece that it takes (`link.rs`), whatever the size of the request, and each piece of an
//! answer. What is sent again counts again: many bytes do not mean that the upload will succeed.

use std::{
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

tokio::task_local! {
    static UNDER_WAY: Progress;
}

/// The bytes that an upload has moved. Clones share the count.
#[derive(Debug, Clone, Default)]
pub struct Progress(Arc<Mutex<Moved>>);

/// A count of bytes, and when the last one moved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Moved {
    pub bytes: u64,
    pub last: Option<Instant>,
}

impl Progress {
    /// Counts what `upload` moves.
    pub async fn watch<T>(&self, upload: impl Future<Output = T>) -> T {
        UNDER_WAY.scope(self.clone(), upload).await
    }

    /// What has moved so far.
    pub fn moved(&self) -> Moved {
        *self.lock()
    }

    /// Counts bytes that moved at that moment.
    pub fn add(&self, bytes: u64, at: Instant) {
        let mut moved = self.lock();
        moved.bytes += bytes;
        moved.last = Some(at);
    }

    /// Whether both count the same upload.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// The count of the upload that the current task belongs to.
    pub(super) fn current() -> Option<Self> {
        UNDER_WAY.try_with(Self::clone).ok()
    }

    /// The same work for a task of its own, which belongs to the same upload.
    pub(super) fn carried<T>(work: impl Future<Output = T>) -> impl Future<Output = T> {
        let current = Self::current();
        async move {
            match current {
                Some(progress) => progress.watch(work).await,
                None => work.await,
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Moved> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
