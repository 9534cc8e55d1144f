//! Moves finished WAL files from tier 1 to tier 2.
//!
//! Delivery is at least once, so every job is idempotent: same job, same object key, same plaintext.
//! A job is acknowledged after the archive's state records the upload, never before. Order between
//! jobs is not promised. A job is never given up: it comes again with a longer pause, for ever (P5).
//! One cluster cannot hold up another: each has its own durable consumer, a bound of its own below the
//! global one, and only one upload at a time while it fails.
//! Does not delete anything; that is `retention`.

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
mod tests;

pub use archives::Archives;
pub use files::{StoredFile, Tier1Files};
use worker::Worker;

use crate::{base::BaseStore, queue::Queue};
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

/// How often tier 1 is asked for new clusters.
const CLUSTERS_INTERVAL: Duration = Duration::from_secs(2);

/// The `[consumer]` section.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ConsumerConfig {
    /// Uploads at once, of all clusters together.
    pub uploads: usize,
    /// Uploads at once of one cluster.
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
    /// Every problem.
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

/// What is known of a cluster's archive.
#[derive(Debug, Clone, PartialEq)]
pub struct ArchiveState {
    /// Everything up to here is in tier 2, of `timeline` and of those it came from, with no hole but
    /// recorded gaps; the first byte held when nothing is, 0/0 when nothing is known.
    pub archived_lsn: Lsn,
    /// The newest timeline held, even if nothing of it is sealed yet.
    pub timeline: Option<TimelineId>,
    /// Unix time at which the newest object was written.
    pub latest_archived_unix: Option<f64>,
    /// Since when the oldest finished file waits for tier 2; `None` when none does.
    pub oldest_unarchived_unix: Option<f64>,
    /// How many wait.
    pub unarchived_files: u64,
    /// How long files have waited now with none of them archived; 0 when none waits, and for a while of a slow upload.
    pub stalled_seconds: f64,
    /// WAL files in tier 2.
    pub totals: Totals,
    /// What keeps files from tier 2, in words.
    pub problems: Vec<String>,
    /// Of every timeline, ascending.
    pub frontiers: Vec<Frontier>,
}

/// How an attempt to move a file ended: a closed set, for a metric's attribute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Attempt {
    /// Written by this attempt.
    Stored,
    /// Was in tier 2 already, with the same content.
    AlreadyThere,
    /// In neither tier.
    Missing,
    /// The tier-1 file is damaged.
    Corrupt,
    /// What it needs is not in tier 2 yet.
    Waiting,
    /// Other content is in tier 2.
    Conflict,
    /// Credentials.
    Denied,
    /// Configuration, such as a missing bucket.
    Invalid,
    /// Network, throttling, a store that is down or full.
    Transient,
}

impl Attempt {
    /// Every one.
    pub const ALL: [Attempt; 9] = [
        Attempt::Stored,
        Attempt::AlreadyThere,
        Attempt::Missing,
        Attempt::Corrupt,
        Attempt::Waiting,
        Attempt::Conflict,
        Attempt::Denied,
        Attempt::Invalid,
        Attempt::Transient,
    ];

    /// The attribute's value.
    pub const fn as_str(self) -> &'static str {
        match self {
            Attempt::Stored => "stored",
            Attempt::AlreadyThere => "already_there",
            Attempt::Missing => "missing",
            Attempt::Corrupt => "corrupt",
            Attempt::Waiting => "waiting",
            Attempt::Conflict => "conflict",
            Attempt::Denied => "denied",
            Attempt::Invalid => "invalid",
            Attempt::Transient => "transient",
        }
    }
}

/// Told of every attempt: for counters.
pub trait Observer: Send + Sync + 'static {
    /// An attempt ended. `bytes` were written to tier 2: 0 unless `Stored`.
    fn attempted(&self, cluster: &ClusterName, attempt: Attempt, bytes: u64);

    /// The same for an object of base backups.
    fn attempted_base(&self, _cluster: &ClusterName, _attempt: Attempt, _bytes: u64) {}
}

/// Counts nothing.
impl Observer for () {
    fn attempted(&self, _: &ClusterName, _: Attempt, _: u64) {}
}

/// What the consumer works with.
#[derive(Clone)]
pub struct Parts {
    /// The queue.
    pub queue: Queue,
    /// Where to.
    pub tier2: Tier2,
    /// Where from.
    pub files: Arc<dyn Tier1Files>,
    /// The state it moves.
    pub archives: Archives,
    /// Base backups, where they are served.
    pub base: Option<BaseStore>,
    /// Counts.
    pub observer: Arc<dyn Observer>,
}

/// Starts the consumer. The caller owns the tasks; they end soon after `cancel`, and uploads under way
/// are dropped: their objects are whole or absent, their jobs come again.
pub fn start(config: &ConsumerConfig, parts: Parts, cancel: CancellationToken) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    let every = Duration::from_secs(config.reconcile_interval_seconds.into());
    tasks.spawn(keep_reconciling(parts.clone(), every, cancel.clone()));
    let slots = Arc::new(Semaphore::new(config.uploads));
    // Of their own: a base backup of many packs must not keep WAL from the bucket.
    let base_slots = Arc::new(Semaphore::new(config.uploads));
    let slots = Slots { wal: slots, base: base_slots, per_cluster: config.uploads_per_cluster };
    tasks.spawn(follow_clusters(parts, slots, cancel));
    tasks
}

/// Starts the reconciler again should it end by a bug: nothing else finds what was lost (P4).
async fn keep_reconciling(parts: Parts, every: Duration, cancel: CancellationToken) {
    while !cancel.is_cancelled() {
        let mut task = JoinSet::new();
        task.spawn(reconcile::run(parts.clone(), every, cancel.clone()));
        if let Some(Err(error)) = task.join_next().await {
            tracing::error!(%error, "the reconciler ended; it is started again");
            tokio::time::sleep(CLUSTERS_INTERVAL).await;
        }
    }
}

/// Uploads at once.
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

/// One worker of each kind for each cluster, as clusters appear.
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
                // A worker ends only by `cancel` or by a bug; offloading must go on (P5).
                let id = ended.map_or_else(|error| error.id(), |(id, ())| id);
                if let Some((cluster, work)) = names.remove(&id) {
                    tracing::error!(%cluster, ?work, "an offload worker ended; it is started again");
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

/// Tier 1's clusters; none while the disk fails, which others report.
async fn clusters(parts: &Parts) -> Vec<ClusterName> {
    let files = Arc::clone(&parts.files);
    match tokio::task::spawn_blocking(move || files.clusters()).await {
        Ok(Ok(clusters)) => clusters,
        Ok(Err(error)) => {
            tracing::warn!(%error, "tier 1 cannot be listed");
            Vec::new()
        }
        Err(_) => Vec::new(),
    }
}

fn now_unix() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
