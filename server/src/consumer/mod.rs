//! Uploads finished WAL files from tier 1 to tier 2.
//!
//! Delivery is at least once, so every job is idempotent: same job, same object key, same plaintext. A job is
//! acknowledged after the archive's state records the upload, never before. The order of jobs is not guaranteed. A job
//! is never given up: it is delivered again after a longer pause, for ever (P5). One cluster cannot hold up another:
//! each has its own durable consumer and its own limit below the global one, and uploads one file at a time while
//! uploads fail. The consumer deletes nothing; `maintenance` does.

mod archives;
mod base;
mod files;
mod heal;
mod reconcile;
mod wal;
mod worker;

#[cfg(test)]
mod directory;
#[cfg(test)]
pub(crate) mod tests;

pub use archives::Archives;
pub use files::{StoredFile, Tier1Files};
use worker::Worker;

use crate::{
    base::BaseStore,
    metrics::{Attempt, Observer},
    queue::Queue,
};
use klio_pg::{Lsn, TimelineId};
use klio_storage::{
    catalog::{Frontier, Totals},
    layout::ClusterName,
    tier2::Tier2,
};
use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::{sync::Semaphore, task::JoinSet};
use tokio_util::sync::CancellationToken;

/// How often tier 1 is checked for new clusters.
const CLUSTERS_INTERVAL: Duration = Duration::from_secs(2);

/// The `[consumer]` section.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ConsumerConfig {
    /// The number of concurrent uploads over all clusters.
    pub uploads: usize,
    /// The number of concurrent uploads of one cluster.
    pub uploads_per_cluster: usize,
    /// Seconds between two comparisons of the tiers.
    pub reconcile_interval_seconds: u32,
}

impl Default for ConsumerConfig {
    fn default() -> Self {
        Self { uploads: 4, uploads_per_cluster: 3, reconcile_interval_seconds: 600 }
    }
}

impl ConsumerConfig {
    pub fn validate(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if !(1..=256).contains(&self.uploads) {
            problems.push(format!("consumer.uploads: expected 1 to 256, found {}", self.uploads));
        }
        if !(1..=self.uploads.max(1)).contains(&self.uploads_per_cluster) {
            problems.push(format!(
                "consumer.uploads_per_cluster: expected 1 to consumer.uploads, found {}",
                self.uploads_per_cluster
            ));
        }
        if !(1..=86_400).contains(&self.reconcile_interval_seconds) {
            problems.push(format!(
                "consumer.reconcile_interval_seconds: expected 1 to 86400, found {}",
                self.reconcile_interval_seconds
            ));
        }
        problems
    }
}

/// What is known about a cluster's archive.
#[derive(Debug, Clone, PartialEq)]
pub struct ArchiveState {
    /// Everything up to here is in tier 2, of `timeline` and of those it descends from, with no holes except recorded
    /// gaps. If nothing is archived, this is the first stored byte; 0/0 when nothing is known.
    pub archived_lsn: Lsn,
    /// The newest timeline, even if nothing of it is sealed yet.
    pub timeline: Option<TimelineId>,
    /// Unix time at which the newest object was written.
    pub latest_archived_unix: Option<f64>,
    /// Since when the oldest finished file waits for upload; `None` when none does.
    pub oldest_unarchived_unix: Option<f64>,
    /// The number of files that wait.
    pub unarchived_files: u64,
    /// For how many seconds files have waited without any of them being archived; 0 when none waits, and during the
    /// first minutes of a slow upload.
    pub stalled_seconds: f64,
    /// WAL files in tier 2.
    pub totals: Totals,
    /// Why files cannot be archived, as texts.
    pub problems: Vec<String>,
    /// The frontiers of all timelines, ascending.
    pub frontiers: Vec<Frontier>,
}

/// What the consumer works with.
#[derive(Clone)]
pub struct Parts {
    pub queue: Queue,
    /// The destination.
    pub tier2: Tier2,
    /// The source.
    pub files: Arc<dyn Tier1Files>,
    /// The state that uploads update.
    pub archives: Archives,
    /// Base backups, where they are served.
    pub base: Option<BaseStore>,
    pub observer: Arc<dyn Observer>,
}

/// Starts the consumer. The caller owns the tasks. They end soon after `cancel`, and uploads under way are dropped:
/// their objects are whole or absent, and their jobs are delivered again.
pub fn start(config: &ConsumerConfig, parts: Parts, cancel: CancellationToken) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    let every = Duration::from_secs(config.reconcile_interval_seconds.into());
    tasks.spawn(keep_reconciling(parts.clone(), every, cancel.clone()));
    let slots = Arc::new(Semaphore::new(config.uploads));
    // Base backups have slots of their own, so that many packs cannot keep WAL from being uploaded.
    let base_slots = Arc::new(Semaphore::new(config.uploads));
    let slots = Slots { wal: slots, base: base_slots, per_cluster: config.uploads_per_cluster };
    tasks.spawn(follow_clusters(parts, slots, cancel));
    tasks
}

/// Restarts the reconciler if a bug ends it, because nothing else finds what was lost (P4).
async fn keep_reconciling(parts: Parts, every: Duration, cancel: CancellationToken) {
    while !cancel.is_cancelled() {
        let mut task = JoinSet::new();
        task.spawn(reconcile::run(parts.clone(), every, cancel.clone()));
        if let Some(Err(error)) = task.join_next().await {
            tracing::error!(%error, "the reconciler ended unexpectedly; restarting it");
            tokio::time::sleep(CLUSTERS_INTERVAL).await;
        }
    }
}

/// The limits of concurrent uploads.
struct Slots {
    wal: Arc<Semaphore>,
    base: Arc<Semaphore>,
    per_cluster: usize,
}

/// The kinds of workers of a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Work {
    Wal,
    Base,
}

impl Slots {
    fn worker(&self, parts: &Parts, cluster: &ClusterName, work: Work) -> Option<Worker> {
        let (parts, cluster) = (parts.clone(), cluster.clone());
        let process: Arc<dyn worker::Process> = match work {
            Work::Wal => Arc::new(wal::WalWork::new(parts, cluster, Arc::clone(&self.wal))),
            Work::Base => Arc::new(base::BaseWork::new(parts, cluster, Arc::clone(&self.base))?),
        };
        Some(Worker::new(process, self.per_cluster))
    }
}

/// Runs one worker of each kind for each cluster, as clusters appear.
async fn follow_clusters(parts: Parts, slots: Slots, cancel: CancellationToken) {
    let mut workers = JoinSet::new();
    let mut names = HashMap::new();
    let mut known = BTreeSet::new();
    let mut tick = tokio::time::interval(CLUSTERS_INTERVAL);
    loop {
        tokio::select! {
            () = cancel.cancelled() => break,
            _ = tick.tick() => {}
            () = parts.archives.appeared() => {}
            Some(ended) = workers.join_next_with_id() => {
                // A worker ends only by `cancel` or by a bug; uploads must go on (P5).
                let id = ended.map_or_else(|error| error.id(), |(id, ())| id);
                if let Some((cluster, work)) = names.remove(&id) {
                    tracing::error!(%cluster, ?work, "an upload worker ended unexpectedly; restarting it");
                    known.remove(&(cluster, work));
                }
                continue;
            }
        }
        for cluster in clusters(&parts).await {
            for work in [Work::Wal, Work::Base] {
                if !known.insert((cluster.clone(), work)) {
                    continue;
                }
                if work == Work::Wal {
                    load(&parts, &cluster).await;
                }
                let Some(worker) = slots.worker(&parts, &cluster, work) else { continue };
                let id = workers.spawn(worker.run(cancel.clone())).id();
                names.insert(id, (cluster.clone(), work));
            }
        }
    }
    while workers.join_next().await.is_some() {}
}

async fn load(parts: &Parts, cluster: &ClusterName) {
    let (archives, cluster) = (parts.archives.clone(), cluster.clone());
    let _ = tokio::task::spawn_blocking(move || archives.load(&cluster)).await;
}

/// Tier 1's clusters; none while the disk fails, which other code reports.
async fn clusters(parts: &Parts) -> Vec<ClusterName> {
    let files = Arc::clone(&parts.files);
    match tokio::task::spawn_blocking(move || files.clusters()).await {
        Ok(Ok(clusters)) => clusters,
        Ok(Err(error)) => {
            tracing::warn!(%error, "cannot list the clusters on tier 1");
            Vec::new()
        }
        Err(_) => Vec::new(),
    }
}

fn now_unix() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
