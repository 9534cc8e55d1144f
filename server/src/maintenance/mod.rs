//! Removes what retention expires, and verifies what stays. This is the only part of Klio that removes data (P8).
//!
//! MAINT1  one piece of work runs at a time for a cluster, never during a backup of that cluster, and only a few run
//!     over all clusters; work that waits holds nothing that another cluster needs;
//! MAINT2  a plan is made from what both tiers say now, and any doubt empties it (P6);
//! MAINT3  nothing leaves tier 1 before it is proven in tier 2, at that moment, by reading it there (P5);
//! MAINT4  a crash may come after any step: every backup that has a record can be restored;
//! MAINT5  work on a repository is done in a child process (`worker`), which ends with the server.

mod apply;
mod child;
mod config;
mod facts;
pub mod metrics;
pub mod protocol;
mod schedule;
mod turns;
mod verify;
mod wal;
pub mod worker;

pub use config::{ClusterRetention, MaintenanceConfig, RetentionConfig, Settings, VerifyConfig};
pub use metrics::MaintenanceMetrics;
pub use protocol::Step;
pub use verify::Request;

use crate::{base::BaseStore, consumer::Archives, errors};
use klio_proto::Code;
use klio_storage::{
    catalog::{DrillOutcome, MaintenanceOutcome, RetentionPlan, VerifyOutcome, outcomes},
    layout::ClusterName,
    record,
};
use std::{path::PathBuf, sync::Arc};
use tonic::Status;

/// What [`Maintenance`] is made of.
pub struct Parts {
    /// Backups and both tiers.
    pub base: BaseStore,
    /// How far WAL is archived; `None` without a bucket.
    pub archives: Option<Archives>,
    /// What is retained, and when that is checked.
    pub settings: Settings,
    /// The directory that contains tier 1 and the queue.
    pub data_dir: PathBuf,
    /// The configuration file, for the child process.
    pub config_path: PathBuf,
    /// The path of klio-server itself.
    pub program: PathBuf,
    pub metrics: Arc<MaintenanceMetrics>,
}

/// Runs maintenance and verification; cheap to clone.
#[derive(Clone)]
pub struct Maintenance(Arc<Inner>);

struct Inner {
    base: BaseStore,
    archives: Option<Archives>,
    settings: Settings,
    data_dir: PathBuf,
    config_path: PathBuf,
    program: PathBuf,
    metrics: Arc<MaintenanceMetrics>,
    /// Whose turn it is (MAINT1).
    turns: turns::Turns,
}

/// A difference between clocks that is normal without special hardware, and no reason for a warning.
const SKEW_SECONDS: f64 = 5.0;

/// The file with the result of a cluster's last maintenance: `<cluster>/maintenance.json`, in the format of `record`.
/// Losing it loses only this information.
fn last_run_path(base: &BaseStore, cluster: &ClusterName) -> PathBuf {
    base.root().join(cluster.as_str()).join("maintenance.json")
}

fn last_run(base: &BaseStore, cluster: &ClusterName) -> Option<MaintenanceOutcome> {
    let read = record::load(base.disk().as_ref(), &last_run_path(base, cluster));
    read.unwrap_or_else(|error| {
        tracing::warn!(%cluster, %error, "cannot read the result of the last maintenance");
        None
    })
}

impl Maintenance {
    /// Reads the last results of earlier runs, so that gauges show their true ages; blocking.
    pub fn new(parts: Parts) -> Self {
        let Parts { base, archives, settings, data_dir, config_path, program, metrics } = parts;
        for cluster in base.wal().clusters() {
            if let Some(outcome) = last_run(&base, &cluster) {
                metrics.seen_maintained(&cluster, &outcome);
            }
            match base.known_damage(&cluster) {
                Ok(known) => metrics.known(&cluster, &known),
                Err(error) => {
                    tracing::error!(%cluster, %error, "cannot read damaged.json; pruning is paused")
                }
            }
            metrics.covered(&cluster, &base.coverage_on_disk(&cluster));
            let (disk, root, now) = (base.disk().as_ref(), base.root(), base.now_unix());
            // Includes outcomes of backups that only tier 2 has. Expiring a backup removes its outcomes.
            for name in outcomes::names(disk, root, &cluster).unwrap_or_default() {
                if let Ok(Some(outcome)) = outcomes::load_verified(disk, root, &cluster, &name) {
                    metrics.seen_verified(&cluster, &outcome, now);
                }
                if let Ok(Some(outcome)) = outcomes::load_drilled(disk, root, &cluster, &name) {
                    metrics.seen_drilled(&cluster, &outcome, now);
                }
            }
        }
        Self(Arc::new(Inner {
            base,
            archives,
            settings,
            data_dir,
            config_path,
            program,
            metrics,
            turns: turns::Turns::default(),
        }))
    }

    /// What maintenance would do now.
    ///
    /// # Errors
    /// An error of a tier that cannot be asked.
    pub async fn plan(&self, cluster: &ClusterName) -> Result<RetentionPlan, Status> {
        self.0.plan(cluster).await
    }

    /// Applies the plan. Dropping the future stops it; the next run continues.
    ///
    /// # Errors
    /// The first error; what was done before it stays done.
    pub async fn apply(
        &self,
        cluster: &ClusterName,
        tell: &(dyn Fn(Step) + Send + Sync),
    ) -> Result<MaintenanceOutcome, Status> {
        self.0.apply(cluster, tell).await
    }

    /// Verifies what is stored. Dropping the future stops it.
    ///
    /// # Errors
    /// An error that says nothing about the stored data, such as a tier that does not answer.
    pub async fn verify(
        &self,
        cluster: &ClusterName,
        request: &Request,
        tell: &(dyn Fn(Step) + Send + Sync),
    ) -> Result<VerifyOutcome, Status> {
        self.0.verify(cluster, request, tell).await
    }

    /// Stores the result of a drill.
    ///
    /// # Errors
    /// `INVALID` for a document that cannot be read, `NOT_FOUND` for a backup that does not exist.
    pub async fn record_drill(&self, cluster: &ClusterName, document: &[u8]) -> Result<(), Status> {
        let mut outcome: DrillOutcome = serde_json::from_slice(document)
            .map_err(|e| Code::Invalid.status(format!("record a drill of {cluster}: {e}")))?;
        let now = self.0.base.now_unix();
        if outcome.finished_unix > now {
            let ahead_seconds = outcome.finished_unix - now;
            if ahead_seconds > SKEW_SECONDS {
                tracing::warn!(%cluster, backup = %outcome.backup, ahead_seconds, "drill result is dated in the future; recording the current time (check the clock of the drill's host)");
            }
            outcome.finished_unix = now;
        }
        self.0.base.backup(cluster, &outcome.backup).await?;
        let (base, name, kept) = (self.0.base.clone(), cluster.clone(), outcome.clone());
        let stored = tokio::task::spawn_blocking(move || {
            outcomes::store_drilled(base.disk().as_ref(), base.root(), &name, &kept)
        });
        let stored =
            stored.await.map_err(|e| Code::Internal.status(format!("record a drill: {e}")))?;
        stored.map_err(|e| errors::status(&e))?;
        self.0.metrics.drilled(cluster, &outcome);
        Ok(())
    }
}
