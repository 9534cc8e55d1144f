//! The server's own instruments (telemetry.md section 1) and the facts behind them.
//!
//! Counters move where the work is done. Gauges are observed: a callback reads the registry, the store
//! and the archive when somebody looks, so nothing can go stale and a cluster that is gone disappears.
//! `cluster_name` is the only attribute; never an LSN, a file or an address.

use crate::consumer::{Attempt, Observer};
use klio_storage::layout::ClusterName;
use klio_telemetry::BARE;
use opentelemetry::{
    KeyValue,
    metrics::{Counter, Histogram, Meter},
};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// Names and meanings of every instrument here; docs/metrics.md is generated from it.
pub const CATALOGUE: &[(&str, &str, &str, &str)] = &[
    ("klio.wal.written_size", "counter", "By", "bytes of WAL files written to disk"),
    ("klio.wal.written", "counter", "", "WAL files written"),
    (
        "klio.wal.latest_written_time",
        "gauge",
        "s",
        "Unix time of the newest WAL file written to disk (tier 1)",
    ),
    ("klio.wal.received_size", "counter", "By", "bytes of WAL received and checked"),
    ("klio.wal.flush_duration", "histogram", "s", "time of one write and fsync of received WAL"),
    ("klio.wal.seal_failures", "counter", "", "seals that failed and will be tried again"),
    ("klio.wal.connected", "gauge", "", "1 while a sidecar streams this cluster, else 0"),
    ("klio.wal.received_lsn", "gauge", "", "end of WAL received, as a number"),
    ("klio.wal.flushed_lsn", "gauge", "", "end of WAL durable on tier 1, as a number"),
    ("klio.wal.sealed_lsn", "gauge", "", "end of WAL in sealed segments, as a number"),
    ("klio.wal.archived_lsn", "gauge", "", "end of contiguous WAL in tier 2, as a number"),
    ("klio.wal.flush_lag_size", "gauge", "By", "WAL that PostgreSQL has and tier 1 has not"),
    ("klio.wal.flush_lag_time", "gauge", "s", "how long tier 1 has been behind PostgreSQL"),
    ("klio.wal.archive_lag_size", "gauge", "By", "finished WAL that tier 2 has not"),
    (
        "klio.wal.archive_lag_time",
        "gauge",
        "s",
        "age of the oldest finished WAL file not in tier 2",
    ),
    ("klio.wal.gaps", "gauge", "", "recorded gaps in the cluster's WAL"),
    ("klio.consumer.written_size", "counter", "By", "bytes written to tier 2 for WAL files"),
    ("klio.consumer.written", "counter", "", "WAL files written to tier 2"),
    (
        "klio.consumer.latest_written_time",
        "gauge",
        "s",
        "Unix time of the newest WAL file written to tier 2",
    ),
    ("klio.consumer.offloads", "counter", "", "attempts to move a file to tier 2, by outcome"),
    ("klio.base.snapshots", "gauge", "", "snapshots kept"),
    (
        "klio.base.latest_snapshot_size",
        "gauge",
        "By",
        "size of the newest, before compression and deduplication",
    ),
    ("klio.base.latest_snapshot_files", "gauge", "", "files in it"),
    ("klio.base.latest_snapshot_dirs", "gauge", "", "directories in it"),
    ("klio.base.latest_snapshot_age", "gauge", "s", "its age now"),
    ("klio.base.oldest_snapshot_age", "gauge", "s", "age of the oldest"),
    ("klio.base.unarchived_files", "gauge", "", "objects of base backups not in tier 2"),
    (
        "klio.base.archive_lag_time",
        "gauge",
        "s",
        "age of the oldest object of base backups not in tier 2",
    ),
    ("klio.base.offloads", "counter", "", "attempts to move an object to tier 2, by outcome"),
    ("klio.base.archived_size", "counter", "By", "bytes written to tier 2 for base backups"),
    (
        "klio.consumer.backup_verification_success",
        "counter",
        "",
        "backup verifications that passed",
    ),
    (
        "klio.consumer.backup_verification_failure",
        "counter",
        "",
        "backup verifications that found corruption",
    ),
    ("klio.maintenance.runs", "counter", "", "maintenance runs, by outcome"),
    ("klio.maintenance.freed_size", "counter", "By", "bytes freed, by tier"),
    ("klio.maintenance.wal_removed", "counter", "", "WAL files removed, by tier"),
    ("klio.maintenance.expired", "counter", "", "backups that retention let go"),
    ("klio.maintenance.alarm", "gauge", "", "1 while something is in doubt and nothing is removed"),
    ("klio.maintenance.latest_time", "gauge", "s", "Unix time of the last maintenance"),
    ("klio.verify.latest_age", "gauge", "s", "age of the last verification"),
    ("klio.verify.damaged", "gauge", "", "what the last verification found and could not repair"),
    ("klio.drill.latest_age", "gauge", "s", "age of the last restore drill"),
    ("klio.drill.latest_success", "gauge", "", "1 when the last restore drill passed, else 0"),
    (
        "klio.drill.restore_duration",
        "gauge",
        "s",
        "time of the last drill until all files were there",
    ),
    (
        "klio.drill.recovery_duration",
        "gauge",
        "s",
        "time of the last drill until PostgreSQL was at its end",
    ),
    ("klio.queue.messages", "gauge", "", "messages stored in the JetStream queue"),
    ("klio.queue.bytes", "gauge", "By", "bytes stored in the JetStream queue"),
    ("klio.queue.connected", "gauge", "", "1 while the queue can be used, else 0"),
    (
        "klio.tls.certificate_expiry_time",
        "gauge",
        "s",
        "Unix time at which the server's certificate ends",
    ),
];

/// Counters and last times that no other part keeps.
pub struct Metrics {
    written_size: Counter<u64>,
    written: Counter<u64>,
    received_size: Counter<u64>,
    flush_duration: Histogram<f64>,
    seal_failures: Counter<u64>,
    archived_size: Counter<u64>,
    archived: Counter<u64>,
    offloads: Counter<u64>,
    base_offloads: Counter<u64>,
    base_archived_size: Counter<u64>,
    latest_written: Mutex<BTreeMap<ClusterName, f64>>,
}

/// The attribute of a cluster.
pub fn of(cluster: &ClusterName) -> [KeyValue; 1] {
    [KeyValue::new("cluster_name", cluster.as_str().to_owned())]
}

fn description(name: &str) -> &'static str {
    CATALOGUE.iter().find(|row| row.0 == name).map_or("", |row| row.3)
}

fn now_unix() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

impl Metrics {
    /// Instruments on this meter.
    pub fn new(meter: &Meter) -> Self {
        let counter = |name: &'static str, unit: &'static str| {
            meter.u64_counter(name).with_unit(unit).with_description(description(name)).build()
        };
        Self {
            written_size: counter("klio.wal.written_size", "By"),
            written: counter("klio.wal.written", ""),
            received_size: counter("klio.wal.received_size", "By"),
            seal_failures: counter("klio.wal.seal_failures", ""),
            archived_size: counter("klio.consumer.written_size", "By"),
            archived: counter("klio.consumer.written", ""),
            offloads: counter("klio.consumer.offloads", ""),
            base_offloads: counter("klio.base.offloads", ""),
            base_archived_size: counter("klio.base.archived_size", "By"),
            flush_duration: meter
                .f64_histogram("klio.wal.flush_duration")
                .with_unit("s")
                .with_description(description("klio.wal.flush_duration"))
                .with_boundaries(vec![
                    0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0,
                ])
                .build(),
            latest_written: Mutex::default(),
        }
    }

    /// Raw WAL came in.
    pub fn received(&self, cluster: &ClusterName, bytes: u64) {
        if !BARE {
            self.received_size.add(bytes, &of(cluster));
        }
    }

    /// A write and fsync ended well.
    pub fn flushed(&self, cluster: &ClusterName, took: Duration) {
        if !BARE {
            self.flush_duration.record(took.as_secs_f64(), &of(cluster));
        }
    }

    /// A WAL file of this many bytes was written to tier 1.
    pub fn written(&self, cluster: &ClusterName, bytes: u64) {
        self.written_size.add(bytes, &of(cluster));
        self.written.add(1, &of(cluster));
        self.seen_written(cluster, now_unix());
    }

    /// A WAL file of that age is on tier 1: after a restart the true last time is known again.
    pub fn seen_written(&self, cluster: &ClusterName, unix: f64) {
        let mut latest = self.latest_written.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = latest.entry(cluster.clone()).or_insert(unix);
        *entry = entry.max(unix);
    }

    /// Unix time of the newest WAL file on tier 1; `None` when there never was one.
    pub fn latest_written(&self, cluster: &ClusterName) -> Option<f64> {
        self.latest_written.lock().unwrap_or_else(PoisonError::into_inner).get(cluster).copied()
    }

    /// A seal failed.
    pub fn seal_failed(&self, cluster: &ClusterName) {
        self.seal_failures.add(1, &of(cluster));
    }
}

impl Observer for Metrics {
    fn attempted(&self, cluster: &ClusterName, attempt: Attempt, bytes: u64) {
        let [name] = of(cluster);
        if attempt == Attempt::Stored {
            self.archived_size.add(bytes, std::slice::from_ref(&name));
            self.archived.add(1, std::slice::from_ref(&name));
        }
        self.offloads.add(1, &[name, KeyValue::new("outcome", attempt.as_str())]);
    }

    fn attempted_base(&self, cluster: &ClusterName, attempt: Attempt, bytes: u64) {
        let [name] = of(cluster);
        if bytes > 0 {
            self.base_archived_size.add(bytes, std::slice::from_ref(&name));
        }
        self.base_offloads.add(1, &[name, KeyValue::new("outcome", attempt.as_str())]);
    }
}

/// One observed value, for the gauges.
pub struct Gauge {
    /// An instrument of [`CATALOGUE`].
    pub name: &'static str,
    /// Of which cluster, if any.
    pub cluster: Option<ClusterName>,
    /// Now.
    pub value: f64,
}

/// Values by instrument.
pub type GaugeTable = Arc<BTreeMap<&'static str, Vec<Gauge>>>;

/// Sorts a reading by instrument.
pub fn table(gauges: Vec<Gauge>) -> GaugeTable {
    let mut table: BTreeMap<&'static str, Vec<Gauge>> = BTreeMap::new();
    for gauge in gauges {
        table.entry(gauge.name).or_default().push(gauge);
    }
    Arc::new(table)
}

/// Registers every gauge of the catalogue; `read` gives all values when somebody looks, once for each
/// instrument: it should remember them for a moment.
pub fn observe(meter: &Meter, read: impl Fn() -> GaugeTable + Clone + Send + Sync + 'static) {
    for (name, kind, unit, meaning) in CATALOGUE {
        if *kind != "gauge" {
            continue;
        }
        let read = read.clone();
        meter
            .f64_observable_gauge(*name)
            .with_unit(*unit)
            .with_description(*meaning)
            .with_callback(move |observer| {
                for gauge in read().get(name).into_iter().flatten() {
                    let attributes: Vec<_> = gauge.cluster.iter().flat_map(of).collect();
                    observer.observe(gauge.value, &attributes);
                }
            })
            .build();
    }
}
