//! How many of a cluster's packs were opened and checked (`catalog::coverage`), for admitting files and for
//! verification.
//!
//! If the record cannot be read, no pack counts as checked, so that more packs are opened than necessary.

use super::{BaseStore, run};
use klio_storage::{
    catalog::coverage::{self, Coverage},
    layout::ClusterName,
};
use tonic::Status;

impl BaseStore {
    /// What is recorded on tier 1. Blocking.
    pub fn coverage_on_disk(&self, cluster: &ClusterName) -> Coverage {
        coverage::load(self.disk().as_ref(), self.root(), cluster).unwrap_or_else(|error| {
            tracing::warn!(%cluster, %error, "cannot read which packs were checked; checking starts again");
            Coverage::default()
        })
    }

    /// The same as [`BaseStore::coverage_on_disk`], on a blocking thread.
    ///
    /// # Errors
    /// `INTERNAL` when the thread panics.
    pub async fn coverage(&self, cluster: &ClusterName) -> Result<Coverage, Status> {
        let (this, cluster) = (self.clone(), cluster.clone());
        run(move || Ok(this.coverage_on_disk(&cluster))).await
    }

    /// Replaces the record, durably.
    ///
    /// # Errors
    /// An I/O error of the disk.
    pub async fn keep_coverage(
        &self,
        cluster: &ClusterName,
        known: Coverage,
    ) -> Result<(), Status> {
        let (this, cluster) = (self.clone(), cluster.clone());
        run(move || coverage::store(this.disk().as_ref(), this.root(), &cluster, &known)).await
    }
}
