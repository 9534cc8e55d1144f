//! How far the packs of a cluster were opened (`catalog::coverage`), for whoever admits and verifies.
//!
//! One that cannot be read counts as nothing known: then more is opened than must be.

use super::{BaseStore, run};
use klio_storage::{
    catalog::coverage::{self, Coverage},
    layout::ClusterName,
};
use tonic::Status;

impl BaseStore {
    /// What is known. Blocking.
    pub fn coverage_on_disk(&self, cluster: &ClusterName) -> Coverage {
        coverage::load(self.disk().as_ref(), self.root(), cluster).unwrap_or_else(|error| {
            tracing::warn!(%cluster, %error, "how far the packs were read is not known; reading begins anew");
            Coverage::default()
        })
    }

    /// The same.
    ///
    /// # Errors
    /// `INTERNAL` when a thread ends.
    pub async fn coverage(&self, cluster: &ClusterName) -> Result<Coverage, Status> {
        let (this, cluster) = (self.clone(), cluster.clone());
        run(move || Ok(this.coverage_on_disk(&cluster))).await
    }

    /// Replaces it, durably.
    ///
    /// # Errors
    /// As the disk fails.
    pub async fn keep_coverage(
        &self,
        cluster: &ClusterName,
        known: Coverage,
    ) -> Result<(), Status> {
        let (this, cluster) = (self.clone(), cluster.clone());
        run(move || coverage::store(this.disk().as_ref(), this.root(), &cluster, &known)).await
    }
}
