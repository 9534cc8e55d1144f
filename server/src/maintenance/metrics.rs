//! Instruments of verification, drills and maintenance.

use crate::metrics::{CATALOGUE, Gauge, of};
use klio_storage::{
    catalog::{DrillOutcome, MaintenanceOutcome, VerifyOutcome},
    layout::ClusterName,
};
use opentelemetry::{
    KeyValue,
    metrics::{Counter, Meter},
};
use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// What is remembered of a cluster.
#[derive(Debug, Clone, Default)]
struct Last {
    verified: Option<(f64, usize)>,
    drilled: Option<DrillOutcome>,
    maintained: Option<f64>,
    alarm: bool,
}

/// Counters, and last results.
pub struct MaintenanceMetrics {
    success: Counter<u64>,
    failure: Counter<u64>,
    runs: Counter<u64>,
    freed: Counter<u64>,
    wal_removed: Counter<u64>,
    expired: Counter<u64>,
    last: Mutex<BTreeMap<ClusterName, Last>>,
}

impl MaintenanceMetrics {
    /// Instruments on this meter.
    pub fn new(meter: &Meter) -> Self {
        let counter = |name: &'static str| {
            let row = CATALOGUE.iter().find(|row| row.0 == name);
            let (unit, meaning) = row.map_or(("", ""), |row| (row.2, row.3));
            meter.u64_counter(name).with_unit(unit).with_description(meaning).build()
        };
        Self {
            success: counter("klio.consumer.backup_verification_success"),
            failure: counter("klio.consumer.backup_verification_failure"),
            runs: counter("klio.maintenance.runs"),
            freed: counter("klio.maintenance.freed_size"),
            wal_removed: counter("klio.maintenance.wal_removed"),
            expired: counter("klio.maintenance.expired"),
            last: Mutex::default(),
        }
    }

    fn last(&self) -> MutexGuard<'_, BTreeMap<ClusterName, Last>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A verification ended. Damage counts as found even where it was repaired.
    pub(super) fn verified(&self, cluster: &ClusterName, outcome: &VerifyOutcome) {
        match outcome.damaged.is_empty() && outcome.repaired.is_empty() {
            true => self.success.add(1, &of(cluster)),
            false => self.failure.add(1, &of(cluster)),
        }
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
        let [name] = of(cluster);
        let word = match (ok, outcome.held_back.is_empty()) {
            (false, _) => "failed",
            (true, true) => "done",
            (true, false) => "held_back",
        };
        self.runs.add(1, &[name.clone(), KeyValue::new("outcome", word)]);
        self.expired.add(outcome.expired.len() as u64, std::slice::from_ref(&name));
        let tiers = [
            ("tier1", outcome.freed_tier1_bytes, outcome.wal_removed_tier1),
            ("tier2", outcome.freed_tier2_bytes, outcome.wal_removed_tier2),
        ];
        for (tier, bytes, files) in tiers {
            let attributes = [name.clone(), KeyValue::new("tier", tier)];
            self.freed.add(bytes, &attributes);
            self.wal_removed.add(files, &attributes);
        }
        if ok {
            let mut last = self.last();
            last.entry(cluster.clone()).or_default().maintained = Some(outcome.finished_unix);
        }
    }

    /// One of an earlier run of the server.
    pub(super) fn seen_maintained(&self, cluster: &ClusterName, unix: f64) {
        self.last().entry(cluster.clone()).or_default().maintained = Some(unix);
    }

    /// Unix time of the last run; `None` when there was none.
    pub(super) fn latest_maintenance(&self, cluster: &ClusterName) -> Option<f64> {
        self.last().get(cluster)?.maintained
    }

    /// Whether a plan had to be empty.
    pub(super) fn alarmed(&self, cluster: &ClusterName, alarm: bool) {
        self.last().entry(cluster.clone()).or_default().alarm = alarm;
    }

    /// All gauges.
    pub fn gauges(&self, now_unix: f64) -> Vec<Gauge> {
        let mut gauges = Vec::new();
        for (cluster, last) in self.last().iter() {
            let mut put = |name, value| {
                gauges.push(Gauge { name, cluster: Some(cluster.clone()), value });
            };
            put("klio.maintenance.alarm", f64::from(u8::from(last.alarm)));
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
        gauges
    }
}
