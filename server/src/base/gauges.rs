//! The numbers of the `klio.base.*` metrics, kept in memory so that a scrape reads no disk.
//!
//! Filled from the records on tier 1 at start, from every listing, and from each commit. Ages are measured from the
//! commit, on the server's own clock. The recovery window follows from the same records (`window.rs`).

use super::{
    BaseStore, lock,
    window::{Known, window},
};
use crate::metrics::Reading;
use klio_pg::{Lsn, TimelineId};
use klio_storage::{
    catalog::{BackupRecord, Frontier},
    layout::{BackupName, ClusterName},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Mutex,
};

/// By cluster and backup name.
pub(super) type Summaries = Mutex<BTreeMap<ClusterName, BTreeMap<BackupName, Summary>>>;

/// The parts of a record that the gauges need.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Summary {
    committed_unix: f64,
    size_bytes: u64,
    files: u64,
    directories: u64,
    pub start: (TimelineId, Lsn),
    pub stop: (TimelineId, Lsn),
    /// By PostgreSQL's clock.
    pub stopped_unix: f64,
}

impl Summary {
    /// A summary of which only the WAL positions matter.
    #[cfg(test)]
    pub(super) fn of_wal(
        start: (TimelineId, Lsn),
        stop: (TimelineId, Lsn),
        stopped_unix: f64,
    ) -> Self {
        let (committed_unix, size_bytes, files, directories) = (stopped_unix, 0, 0, 0);
        Self { committed_unix, size_bytes, files, directories, start, stop, stopped_unix }
    }
}

impl From<&BackupRecord> for Summary {
    fn from(record: &BackupRecord) -> Self {
        Self {
            committed_unix: record.committed_unix,
            size_bytes: record.size_bytes,
            files: record.files,
            directories: record.directories,
            start: (record.start_timeline, record.start_lsn),
            stop: (record.stop_timeline, record.stop_lsn),
            stopped_unix: record.stopped_postgres_unix,
        }
    }
}

impl BaseStore {
    /// Reads the records on tier 1. Those that cannot be read are skipped here; listings report them. Blocking.
    pub(super) fn remember(&self, cluster: &ClusterName) {
        for (name, _) in self.records_on_disk(cluster).unwrap_or_default() {
            if let Ok(Some(record)) = self.record_on_disk(cluster, &name) {
                self.remember_record(cluster, &record);
            }
        }
    }

    pub(super) fn remember_record(&self, cluster: &ClusterName, record: &BackupRecord) {
        let mut all = lock(&self.0.gauges);
        all.entry(cluster.clone()).or_default().insert(record.name.clone(), record.into());
    }

    /// Replaces the summaries of a cluster.
    pub(super) fn remember_all<'a>(
        &self,
        cluster: &ClusterName,
        records: impl Iterator<Item = &'a BackupRecord>,
    ) {
        let summaries: BTreeMap<_, _> =
            records.map(|record| (record.name.clone(), Summary::from(record))).collect();
        let mut all = lock(&self.0.gauges);
        if summaries.is_empty() && !all.contains_key(cluster) {
            return;
        }
        all.insert(cluster.clone(), summaries);
    }

    /// All gauges of base backups of these clusters.
    pub fn read(&self, clusters: &BTreeSet<ClusterName>, out: &mut Vec<Reading>) {
        let now = self.now_unix();
        let (all, none) = (lock(&self.0.gauges), BTreeMap::new());
        for cluster in clusters {
            let backups = all.get(cluster).unwrap_or(&none);
            let mut put = |name, value| out.push(Reading::of(name, cluster, value));
            if let Some(snapshots) = self.snapshots(cluster, backups.len()) {
                put("klio.base.snapshots", snapshots as f64);
            }
            let by_age = |a: &&Summary, b: &&Summary| a.committed_unix.total_cmp(&b.committed_unix);
            if let (Some(newest), Some(oldest)) =
                (backups.values().max_by(by_age), backups.values().min_by(by_age))
            {
                put("klio.base.latest_snapshot_size", newest.size_bytes as f64);
                put("klio.base.latest_snapshot_files", newest.files as f64);
                put("klio.base.latest_snapshot_dirs", newest.directories as f64);
                put("klio.base.latest_snapshot_age", (now - newest.committed_unix).max(0.0));
                put("klio.base.oldest_snapshot_age", (now - oldest.committed_unix).max(0.0));
            }
            let archive = self.archives().state(cluster);
            // Before the first listing it is unknown what the bucket lacks, so 0 would be wrong while the bucket is
            // down.
            let listed = self.archives().records(cluster).is_some();
            if self.tier2().is_some() && (listed || archive.unarchived_files > 0) {
                let lag =
                    archive.oldest_unarchived_unix.map_or(0.0, |since| (now - since).max(0.0));
                put("klio.base.unarchived_files", archive.unarchived_files as f64);
                put("klio.base.archive_lag_time", lag);
            }
        }
    }

    /// The number of backups. A cluster without a backup reports 0, because an alert depends on it; before tier 2 was
    /// listed the number is unknown.
    fn snapshots(&self, cluster: &ClusterName, known: usize) -> Option<usize> {
        if known > 0 || self.tier2().is_none() {
            return Some(known);
        }
        self.archives().records(cluster).map(|records| records.len())
    }

    /// The two gauges of the recovery window. `as_of` is a time up to which all of PostgreSQL's WAL is durable.
    pub fn read_window(
        &self,
        cluster: &ClusterName,
        frontiers: &[Frontier],
        as_of: Option<f64>,
        out: &mut Vec<Reading>,
    ) {
        let Some(pinned) = self.wal().pinned(cluster) else { return };
        let positions = self.wal().positions(cluster);
        let lines = positions.iter().filter(|position| position.has_history);
        let histories = lines.filter_map(|p| self.wal().history(cluster, p.timeline).ok());
        let known = Known {
            histories: histories.collect(),
            positions: positions.clone(),
            frontiers: frontiers.to_vec(),
            gaps: self.wal().gaps(cluster),
            levels: self.wal().levels(cluster),
            segment_size: pinned.segment_size,
            timelines: self.wal().timelines(cluster),
        };
        let all = lock(&self.0.gauges);
        let Some(backups) = all.get(cluster) else { return };
        if let Some(found) = window(&known, backups.values(), as_of) {
            out.push(Reading::of("klio.recovery.earliest_time", cluster, found.earliest));
            out.push(Reading::of("klio.recovery.latest_time", cluster, found.latest));
        }
    }
}
