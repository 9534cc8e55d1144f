//! Whose turn it is (MAINT1): one piece of work for each cluster, and a limited number over all of them.
//!
//! Work that waits for its own cluster's turn holds none of the shared places, so a cluster that requests much delays
//! only itself (P13). Both queues are fair. A turn ends when its guard is dropped.

use klio_storage::layout::ClusterName;
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};
use tokio::sync::{OwnedMutexGuard, OwnedSemaphorePermit, Semaphore};

/// The number of shared places. Each is a child process that holds the index of a repository in memory.
const AT_ONCE: usize = 2;

/// All turns.
pub(super) struct Turns {
    clusters: Mutex<BTreeMap<ClusterName, Arc<tokio::sync::Mutex<()>>>>,
    places: Arc<Semaphore>,
}

/// A turn; dropping it ends it.
pub(super) struct Turn {
    _own: OwnedMutexGuard<()>,
    /// `None` when the semaphore is closed, which never happens.
    _place: Option<OwnedSemaphorePermit>,
}

impl Default for Turns {
    fn default() -> Self {
        Self { clusters: Mutex::default(), places: Arc::new(Semaphore::new(AT_ONCE)) }
    }
}

impl Turns {
    /// Waits for a cluster's turn. Cancel-safe.
    pub(super) async fn take(&self, cluster: &ClusterName) -> Turn {
        let own = {
            let mut clusters = self.clusters.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(clusters.entry(cluster.clone()).or_default())
        };
        let own = own.lock_owned().await;
        let place = Arc::clone(&self.places).acquire_owned().await.ok();
        Turn { _own: own, _place: place }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    fn name(text: &str) -> ClusterName {
        text.parse().unwrap()
    }

    /// Regression test: one stream that nobody read held up verification and retention of all clusters.
    #[tokio::test]
    async fn a_cluster_that_waits_for_itself_holds_no_other_up() {
        let turns = Turns::default();
        let [a, b, c] = ["a", "b", "c"].map(name);
        let first = turns.take(&a).await;
        let mut waiting: Vec<_> = (0..50).map(|_| Box::pin(turns.take(&a))).collect();
        for wait in &mut waiting {
            assert!(wait.as_mut().now_or_never().is_none(), "one at a time for each cluster");
        }
        let other = turns.take(&b).now_or_never().expect("b does not wait for a");
        // The places are used up, so everybody waits, and the first that asked is the next.
        let mut third = Box::pin(turns.take(&c));
        assert!(third.as_mut().now_or_never().is_none());
        drop(other);
        assert!(third.as_mut().now_or_never().is_some());
        drop(first);
        assert!(waiting[0].as_mut().now_or_never().is_some());
    }
}
