//! Which clusters need a comparison of the tiers, because a job could not be queued (P4).
//!
//! It is a set, not a list, so that the number of clusters bounds it whatever is lost.

use klio_storage::layout::ClusterName;
use std::{
    collections::BTreeSet,
    sync::{Mutex, PoisonError},
};
use tokio::sync::Notify;

/// What to compare.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Wanted {
    /// All clusters.
    pub all: bool,
    /// Only these clusters.
    pub clusters: BTreeSet<ClusterName>,
}

/// Collects requests for one receiver.
#[derive(Debug, Default)]
pub(super) struct WantedSet {
    wanted: Mutex<Wanted>,
    notify: Notify,
}

impl WantedSet {
    pub(super) fn cluster(&self, cluster: &ClusterName) {
        let mut wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        if !wanted.clusters.contains(cluster) {
            wanted.clusters.insert(cluster.clone());
        }
        drop(wanted);
        self.notify.notify_one();
    }

    pub(super) fn all(&self) {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner).all = true;
        self.notify.notify_one();
    }

    /// Waits for a request and takes all there are. Cancel-safe: nothing is taken before it returns.
    pub(super) async fn take(&self) -> Wanted {
        loop {
            let taken =
                std::mem::take(&mut *self.wanted.lock().unwrap_or_else(PoisonError::into_inner));
            if taken != Wanted::default() {
                return taken;
            }
            self.notify.notified().await;
        }
    }
}
