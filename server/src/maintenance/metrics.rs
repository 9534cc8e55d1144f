//! Instruments of verification, drills and maintenance.

use crate::metrics::{Reading, Tallies, ZEROS};
use klio_storage::{
    catalog::{DrillOutcome, MaintenanceOutcome, VerifyOutcome},
    layout::ClusterName,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, MutexGuard, PoisonError},
};

/// What is remembered of a cluster.
#[derive(Debug, Clone, Default)]
struct Last {
    verified: Option<(f64, usize)>,
    drilled: Option<DrillOutcome>,
    maintained: Option<f64>,
    /// `None` while nobody knows.
    alarm: Option<bool>,
}

/// Counts, and last results.
#[derive(Default)]
pub struct MaintenanceMetrics {
    tallies: Tallies,
    last: Mutex<BTreeMap<ClusterName, Last>>,
}

impl MaintenanceMetrics {
    fn last(&self) -> MutexGuard<'_, BTreeMap<ClusterName, Last>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A verification ended. Damage counts as found even where it was repaired.
    pub(super) fn verified(&self, cluster: &ClusterName, outcome: &VerifyOutcome) {
        let name = match outcome.damaged.is_empty() && outcome.repaired.is_empty() {
            true => "klio.consumer.backup_verification_success",
            false => "klio.consumer.backup_verification_failure",
        };
        self.tallies.add(cluster, name, "", 1);
        self.seen_verified(cluster, outcome);
    }

    /// One of an earlier run of the server.
    pub(super) fn seen_verified(&self, cluster: &ClusterName, outcome: &VerifyOutcome) {
        let mut last = self.last();
        let entry = last.entry(cluster.clone()).or_default();
        if entry.verified.is_none_or(|(time, _)| time <= outcome.finished_unix) {
            entry.verified = Some((outcome.finished_unix, outcome.damaged.len()));
        }
    }

    /// A drill was reported, now or earlier.
    pub(super) fn drilled(&self, cluster: &ClusterName, outcome: &DrillOutcome) {
        let mut last = self.last();
        let entry = last.entry(cluster.clone()).or_default();
        if entry.drilled.as_ref().is_none_or(|known| known.finished_unix <= outcome.finished_unix) {
            entry.drilled = Some(outcome.clone());
        }
    }

    /// Maintenance ended.
    pub(super) fn maintained(&self, cluster: &ClusterName, ok: bool, outcome: &MaintenanceOutcome) {
        let word = match (ok, outcome.held_back.is_empty()) {
            (false, _) => "failed",
            (true, true) => "done",
            (true, false) => "held_back",
        };
        let add = |name, word, n| self.tallies.add(cluster, name, word, n);
        add("klio.maintenance.runs", word, 1);
        add("klio.maintenance.expired", "", outcome.expired.len() as u64);
        let tiers = [
            ("tier1", outcome.freed_tier1_bytes, outcome.wal_removed_tier1),
            ("tier2", outcome.freed_tier2_bytes, outcome.wal_removed_tier2),
        ];
        for (tier, bytes, files) in tiers {
            add("klio.maintenance.freed_size", tier, bytes);
            add("klio.maintenance.wal_removed", tier, files);
        }
        if ok {
            let mut last = self.last();
            last.entry(cluster.clone()).or_default().maintained = Some(outcome.finished_unix);
        }
    }

    /// One of an earlier run of the server.
    pub(super) fn seen_maintained(&self, cluster: &ClusterName, outcome: &MaintenanceOutcome) {
        let mut last = self.last();
        let entry = last.entry(cluster.clone()).or_default();
        entry.maintained = Some(outcome.finished_unix);
        entry.alarm = Some(outcome.alarm);
    }

    /// Unix time of the last run; `None` when there was none.
    pub(super) fn latest_maintenance(&self, cluster: &ClusterName) -> Option<f64> {
        self.last().get(cluster)?.maintained
    }

    /// Whether the last plan had to be empty, as far as is known.
    pub(super) fn is_alarmed(&self, cluster: &ClusterName) -> bool {
        self.last().get(cluster).and_then(|last| last.alarm).unwrap_or(false)
    }

    /// Whether a plan had to be empty.
    pub(super) fn alarmed(&self, cluster: &ClusterName, alarm: bool) {
        self.last().entry(cluster.clone()).or_default().alarm = Some(alarm);
    }

    /// All that there is of these clusters.
    pub fn read(&self, clusters: &BTreeSet<ClusterName>, now_unix: f64, out: &mut Vec<Reading>) {
        let zeros = ZEROS.iter().filter(|(name, _)| !name.starts_with("klio.wal."));
        self.tallies.read(clusters, &zeros.copied().collect::<Vec<_>>(), out);
        for (cluster, last) in self.last().iter().filter(|(name, _)| clusters.contains(name)) {
            let mut put = |name, value| out.push(Reading::of(name, cluster, value));
            if let Some(alarm) = last.alarm {
                put("klio.maintenance.alarm", f64::from(u8::from(alarm)));
            }
            if let Some(time) = last.maintained {
                put("klio.maintenance.latest_time", time);
            }
            if let Some((time, damaged)) = last.verified {
                put("klio.verify.latest_age", (now_unix - time).max(0.0));
                put("klio.verify.damaged", damaged as f64);
            }
            if let Some(drill) = &last.drilled {
                put("klio.drill.latest_age", (now_unix - drill.finished_unix).max(0.0));
                put("klio.drill.latest_success", f64::from(u8::from(drill.ok)));
                put("klio.drill.restore_duration", drill.restore_seconds);
                put("klio.drill.recovery_duration", drill.recovery_seconds);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alarm(outcome: &MaintenanceOutcome) -> bool {
        let (metrics, cluster) = (MaintenanceMetrics::default(), "pg".parse().unwrap());
        metrics.seen_maintained(&cluster, outcome);
        metrics.is_alarmed(&cluster)
    }

    #[test]
    fn after_a_restart_only_an_alarm_is_an_alarm() {
        let held_back = vec!["backup b1 is running; nothing was removed beside it".to_owned()];
        let mut outcome = MaintenanceOutcome { held_back, ..MaintenanceOutcome::default() };
        assert!(!alarm(&outcome));
        outcome.alarm = true;
        assert!(alarm(&outcome));
    }

    #[test]
    fn an_outcome_of_an_older_klio_is_read_and_is_no_alarm() {
        let mut json = serde_json::to_value(MaintenanceOutcome::default()).unwrap();
        json.as_object_mut().unwrap().remove("alarm").unwrap();
        assert!(!alarm(&serde_json::from_value(json).unwrap()));
    }
}
