//! Maintenance and verification by themselves: after backups, and from time to time.
//!
//! What a backup brought is read back from tier 2 once its record is there; then retention is applied. A
//! failure is logged and tried again at the next look that finds it due, with a growing pause.

use super::{Inner, Maintenance, verify::Request};
use klio_storage::layout::{BackupName, ClusterName};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// How often it is asked whether something is due. Reads what is known in memory.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// A cluster that was never looked after, after a start.
const FIRST_AFTER: Duration = Duration::from_secs(300);
const RETRY_MIN: Duration = Duration::from_secs(30);
const RETRY_MAX: Duration = Duration::from_secs(3600);

/// What is known of a cluster.
struct Known {
    /// Backups in tier 2 that were looked after.
    seen: BTreeSet<BackupName>,
    next: Instant,
    pause: Duration,
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
        let mut known: BTreeMap<ClusterName, Known> = BTreeMap::new();
        let mut tick = tokio::time::interval(LOOK_EVERY);
        loop {
            tick.tick().await;
            for cluster in self.base.wal().clusters() {
                let Some(there) = self.in_tier2(&cluster) else { continue };
                let entry = known.entry(cluster.clone()).or_insert_with(|| Known {
                    // What an earlier run of the server brought there was looked after then.
                    seen: there.clone(),
                    next: Instant::now() + self.due_in(&cluster),
                    pause: RETRY_MIN,
                });
                let new: Vec<BackupName> = there.difference(&entry.seen).cloned().collect();
                entry.seen.retain(|name| there.contains(name));
                if !new.is_empty() || Instant::now() >= entry.next {
                    self.look_after(&cluster, new, entry).await;
                }
            }
        }
    }

    /// The backups whose records are proven there; tier 1's without a bucket.
    /// `None` before the bucket was listed.
    fn in_tier2(&self, cluster: &ClusterName) -> Option<BTreeSet<BackupName>> {
        if self.base.tier2().is_some() {
            return self.base.archives().records(cluster);
        }
        let records = self.base.records_on_disk(cluster).unwrap_or_default();
        Some(records.into_iter().map(|(name, _)| name).collect())
    }

    /// Until the first run after a start: what is left of the interval.
    fn due_in(&self, cluster: &ClusterName) -> Duration {
        let interval = self.settings.maintenance.interval();
        let Some(last) = self.metrics.latest_maintenance(cluster) else {
            return FIRST_AFTER.min(interval);
        };
        // A clock that went back is no reason to wait longer than an interval.
        let since = Duration::try_from_secs_f64(self.base.now_unix() - last).unwrap_or_default();
        interval.saturating_sub(since)
    }

    async fn look_after(&self, cluster: &ClusterName, new: Vec<BackupName>, entry: &mut Known) {
        let quiet = |_| {};
        for name in new {
            entry.seen.insert(name.clone());
            if !self.settings.verify.after_backup {
                continue;
            }
            let read_percent = self.settings.verify.read_percent;
            let request = Request { backup: Some(name.clone()), read_percent, wal: false };
            match self.verify(cluster, &request, &quiet).await {
                Ok(outcome) => {
                    tracing::info!(%cluster, backup = %name, ok = outcome.ok, files = outcome.files, "read back");
                }
                Err(error) => {
                    tracing::warn!(%cluster, backup = %name, error = error.message(), "could not be read back");
                }
            }
        }
        entry.next = Instant::now() + self.settings.maintenance.interval();
        if !self.settings.maintenance.enabled {
            return;
        }
        match self.apply(cluster, &quiet).await {
            Ok(_) => entry.pause = RETRY_MIN,
            Err(error) => {
                tracing::error!(%cluster, error = error.message(), "maintenance failed; tried again");
                entry.next = Instant::now() + entry.pause.min(self.settings.maintenance.interval());
                entry.pause = (entry.pause * 2).min(RETRY_MAX);
            }
        }
    }
}
