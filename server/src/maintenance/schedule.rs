//! Runs maintenance and verification automatically: after backups, and periodically.
//!
//! A new backup is verified in tier 2 once its record is there; then retention is applied. A failure is logged, and
//! the work is tried again after a pause that grows. Clusters are handled concurrently: one whose turn is taken, for
//! example by a client that requests verification without end, delays no other (P13).

use super::{Inner, Maintenance, verify::Request};
use futures::{StreamExt, stream::FuturesUnordered};
use klio_storage::{
    layout::{BackupName, ClusterName},
    record,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    time::Duration,
};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tracing::Instrument;

/// How many clusters are handled concurrently; most of them wait for their turn.
const CLUSTERS_AT_ONCE: usize = 64;
/// How often it is checked whether something is due. The check reads memory only.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// The delay after a start for a cluster that has never been maintained.
const FIRST_AFTER: Duration = Duration::from_secs(300);
const RETRY_MIN: Duration = Duration::from_secs(30);
const RETRY_MAX: Duration = Duration::from_secs(3600);

/// What is in memory about a cluster.
struct Known {
    /// Backups in tier 2 that were handled already; stored across restarts.
    seen: BTreeSet<BackupName>,
    /// The time of the next periodic run.
    next: Instant,
    /// The earliest time of the next attempt after a failure.
    not_before: Instant,
    pause: Duration,
}

impl Known {
    fn failed(&mut self) {
        self.not_before = Instant::now() + self.pause;
        self.pause = (self.pause * 2).min(RETRY_MAX);
    }
}

impl Maintenance {
    /// Runs until cancelled.
    pub async fn run(self, cancel: CancellationToken) {
        if !self.0.settings.maintenance.enabled && !self.0.settings.verify.after_backup {
            cancel.cancelled().await;
            return;
        }
        tokio::select! {
            () = cancel.cancelled() => {}
            () = self.0.look() => {}
        }
    }
}

impl Inner {
    async fn look(&self) {
        // Only clusters that are not being handled now; entries of the others are in their task.
        let mut known: BTreeMap<ClusterName, Known> = BTreeMap::new();
        let mut busy: BTreeSet<ClusterName> = BTreeSet::new();
        let mut running = FuturesUnordered::new();
        let mut tick = tokio::time::interval(LOOK_EVERY);
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                Some((cluster, entry)) = running.next() => {
                    busy.remove(&cluster);
                    known.insert(cluster, entry);
                    continue;
                }
            }
            for cluster in self.base.wal().clusters() {
                self.watch_clock(&cluster);
                if busy.contains(&cluster) || busy.len() >= CLUSTERS_AT_ONCE {
                    continue;
                }
                let Some(there) = self.in_tier2(&cluster) else { continue };
                let entry = known.entry(cluster.clone()).or_insert_with(|| Known {
                    seen: self.load_seen(&cluster),
                    next: Instant::now() + self.due_in(&cluster),
                    not_before: Instant::now(),
                    pause: RETRY_MIN,
                });
                entry.seen.retain(|name| there.contains(name));
                let new: Vec<BackupName> = there.difference(&entry.seen).cloned().collect();
                let now = Instant::now();
                if now >= entry.not_before && (!new.is_empty() || now >= entry.next) {
                    let Some(mut entry) = known.remove(&cluster) else { continue };
                    let span = tracing::info_span!(parent: None, "maintenance", %cluster);
                    busy.insert(cluster.clone());
                    let work = async move {
                        self.look_after(&cluster, new, &mut entry).await;
                        (cluster, entry)
                    };
                    running.push(work.instrument(span));
                }
            }
        }
    }

    /// Keeps the alarm about the clock up to date for as long as there is a doubt, not only when a plan is made.
    fn watch_clock(&self, cluster: &ClusterName) {
        let doubts = self.clock_doubts(cluster);
        if self.metrics.doubted(cluster, !doubts.is_empty()) {
            let doubts = doubts.join("; ");
            tracing::error!(%cluster, doubts, "the clock cannot be believed; nothing is removed meanwhile");
        }
    }

    /// The backups whose records are proven in tier 2, or without a bucket those of tier 1. `None` before the bucket
    /// was listed.
    fn in_tier2(&self, cluster: &ClusterName) -> Option<BTreeSet<BackupName>> {
        if self.base.tier2().is_some() {
            return self.base.archives().records(cluster);
        }
        let records = self.base.records_on_disk(cluster).unwrap_or_default();
        Some(records.into_iter().map(|(name, _)| name).collect())
    }

    /// `<cluster>/read-back.json`: names of backups, in the format of `record`. If it is lost, the backups are
    /// verified once more.
    fn seen_path(&self, cluster: &ClusterName) -> PathBuf {
        self.base.root().join(cluster.as_str()).join("read-back.json")
    }

    fn load_seen(&self, cluster: &ClusterName) -> BTreeSet<BackupName> {
        let read = record::load(self.base.disk().as_ref(), &self.seen_path(cluster));
        read.ok().flatten().unwrap_or_default()
    }

    fn keep_seen(&self, cluster: &ClusterName, seen: &BTreeSet<BackupName>) {
        let path = self.seen_path(cluster);
        if let Err(error) = record::store(self.base.disk().as_ref(), &path, seen) {
            tracing::warn!(%cluster, %error, "cannot record which backups were verified");
        }
    }

    /// The time until the first run after a start: what is left of the interval.
    fn due_in(&self, cluster: &ClusterName) -> Duration {
        let interval = self.settings.maintenance.interval();
        let Some(last) = self.metrics.latest_maintenance(cluster) else {
            return FIRST_AFTER.min(interval);
        };
        // A clock that went back does not make the wait longer than one interval.
        let since = Duration::try_from_secs_f64(self.base.now_unix() - last).unwrap_or_default();
        interval.saturating_sub(since)
    }

    async fn look_after(&self, cluster: &ClusterName, new: Vec<BackupName>, entry: &mut Known) {
        let quiet = |_| {};
        for name in new {
            if self.settings.verify.after_backup
                && let Err(error) = self.read_one_back(cluster, &name).await
            {
                tracing::warn!(%cluster, backup = %name, error = error.message(), "cannot verify a backup; trying again later");
                return entry.failed();
            }
            entry.seen.insert(name);
            self.keep_seen(cluster, &entry.seen);
        }
        if self.settings.maintenance.enabled
            && let Err(error) = self.apply(cluster, &quiet).await
        {
            tracing::error!(%cluster, error = error.message(), "maintenance failed; trying again later");
            entry.next = Instant::now();
            return entry.failed();
        }
        entry.next = Instant::now() + self.settings.maintenance.interval();
        entry.pause = RETRY_MIN;
    }

    async fn read_one_back(&self, cluster: &ClusterName, name: &BackupName) -> Result<(), Status> {
        let read_percent = self.settings.verify.read_percent;
        let request = Request { backup: Some(name.clone()), read_percent, wal: false };
        let outcome = self.verify(cluster, &request, &|_| {}).await?;
        tracing::info!(%cluster, backup = %name, ok = outcome.ok, files = outcome.files, "backup verified");
        Ok(())
    }
}
