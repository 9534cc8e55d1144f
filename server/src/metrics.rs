//! The server's own instruments and the facts behind them.
//!
//! All instruments except latencies are observed: at each scrape one reading of the registry, the store, the archive
//! and the counts serves all of them. So no value is stale, and a removed cluster disappears. The only attributes are
//! `cluster_name` and closed sets, never an LSN, a file or an address.

mod attempt;
mod catalogue;
mod snapshot;
mod tallies;

pub use attempt::{Attempt, Observer};
pub use catalogue::{CATALOGUE, attributes};
pub use snapshot::{Snapshots, Table};
pub use tallies::Tallies;

pub(crate) use catalogue::ZEROS;
use catalogue::{ZEROS_WITH_TIER2, row};

use klio_proto::Code;
use klio_storage::layout::ClusterName;
use klio_telemetry::{BARE, Polls, catalogue::Kind};
use opentelemetry::{
    KeyValue,
    metrics::{Histogram, Meter},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// Bucket boundaries around the duration of an fsync, with room for a stalled disk; in seconds.
const FLUSH_BOUNDARIES: [f64; 11] =
    [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0];

/// Counts and last times that no other part stores.
pub struct Metrics {
    flush_duration: Histogram<f64>,
    tallies: Tallies,
    latest_written: Mutex<BTreeMap<ClusterName, f64>>,
    /// The time up to which all of PostgreSQL's WAL was known to be durable at start.
    held_at_start: Mutex<BTreeMap<ClusterName, f64>>,
    polls: Polls,
}

fn now_unix() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

impl Metrics {
    /// Creates the instruments on this meter.
    pub fn new(meter: &Meter) -> Self {
        let name = "klio.wal.flush_duration";
        let flush_duration = meter
            .f64_histogram(name)
            .with_unit("s")
            .with_description(row(name).map_or("", |row| row.meaning))
            .with_boundaries(FLUSH_BOUNDARIES.to_vec())
            .build();
        Self {
            flush_duration,
            tallies: Tallies::default(),
            latest_written: Mutex::default(),
            held_at_start: Mutex::default(),
            polls: Polls::default(),
        }
    }

    /// Also times the polls of sessions.
    #[must_use]
    pub fn timing(mut self, polls: Polls) -> Self {
        self.polls = polls;
        self
    }

    /// The timer for polls of long tasks.
    pub fn polls(&self) -> &Polls {
        &self.polls
    }

    /// Counts raw WAL that was received.
    pub fn received(&self, cluster: &ClusterName, bytes: u64) {
        if !BARE {
            self.tallies.add(cluster, "klio.wal.received_size", "", bytes);
        }
    }

    /// Records the duration of a successful write and fsync.
    pub fn flushed(&self, took: Duration) {
        if !BARE {
            self.flush_duration.record(took.as_secs_f64(), &[]);
        }
    }

    /// Counts a WAL file that was written to tier 1, and its size in bytes.
    pub fn written(&self, cluster: &ClusterName, bytes: u64) {
        self.tallies.add(cluster, "klio.wal.written_size", "", bytes);
        self.tallies.add(cluster, "klio.wal.written", "", 1);
        self.seen_written(cluster, now_unix());
    }

    /// Takes the age of a WAL file on tier 1, so that the last time is right after a restart.
    pub fn seen_written(&self, cluster: &ClusterName, unix: f64) {
        let mut latest = self.latest_written.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = latest.entry(cluster.clone()).or_insert(unix);
        *entry = entry.max(unix);
    }

    /// Unix time of the newest WAL file on tier 1; `None` when there never was one.
    pub fn latest_written(&self, cluster: &ClusterName) -> Option<f64> {
        self.latest_written.lock().unwrap_or_else(PoisonError::into_inner).get(cluster).copied()
    }

    /// Stores, at start, the time up to which all of PostgreSQL's WAL was known to be durable.
    pub fn seen_held(&self, cluster: &ClusterName, unix: f64) {
        let mut held = self.held_at_start.lock().unwrap_or_else(PoisonError::into_inner);
        held.insert(cluster.clone(), unix);
    }

    /// The time from [`Metrics::seen_held`].
    pub fn held_at_start(&self, cluster: &ClusterName) -> Option<f64> {
        self.held_at_start.lock().unwrap_or_else(PoisonError::into_inner).get(cluster).copied()
    }

    /// Counts a failed seal.
    pub fn seal_failed(&self, cluster: &ClusterName) {
        self.tallies.add(cluster, "klio.wal.seal_failures", "", 1);
    }

    /// Counts a stream that was refused or ended with an error.
    pub fn session_failed(&self, cluster: &ClusterName, code: Code) {
        self.tallies.add(cluster, "klio.wal.session_failures", code.name(), 1);
    }

    /// The counts of these clusters.
    pub fn read(&self, clusters: &BTreeSet<ClusterName>, tier2: bool, out: &mut Vec<Reading>) {
        let more = if tier2 { ZEROS_WITH_TIER2 } else { &[] };
        let wal = ZEROS.iter().filter(|(name, _)| name.starts_with("klio.wal."));
        let zeros: Vec<_> = wal.chain(more).copied().collect();
        self.tallies.read(clusters, &zeros, out);
    }
}

impl Observer for Metrics {
    fn attempted(&self, cluster: &ClusterName, attempt: Attempt, bytes: u64) {
        if attempt == Attempt::Stored {
            self.tallies.add(cluster, "klio.consumer.written_size", "", bytes);
            self.tallies.add(cluster, "klio.consumer.written", "", 1);
        }
        self.tallies.add(cluster, "klio.consumer.offloads", attempt.as_str(), 1);
    }

    fn attempted_base(&self, cluster: &ClusterName, attempt: Attempt, bytes: u64) {
        if bytes > 0 {
            self.tallies.add(cluster, "klio.base.archived_size", "", bytes);
        }
        self.tallies.add(cluster, "klio.base.offloads", attempt.as_str(), 1);
    }
}

/// One observed value.
#[derive(Debug, Clone, PartialEq)]
pub struct Reading {
    /// An instrument of [`CATALOGUE`].
    pub name: &'static str,
    /// The cluster, if any.
    pub cluster: Option<ClusterName>,
    /// The value of the instrument's other attribute; empty if it has none.
    pub word: &'static str,
    /// The current value.
    pub value: f64,
}

impl Reading {
    /// A value of a cluster.
    pub fn of(name: &'static str, cluster: &ClusterName, value: f64) -> Self {
        Self { name, cluster: Some(cluster.clone()), word: "", value }
    }

    /// A value of the server as a whole.
    pub const fn plain(name: &'static str, value: f64) -> Self {
        Self { name, cluster: None, word: "", value }
    }

    fn attributes(&self) -> Vec<KeyValue> {
        let cluster = self.cluster.as_ref();
        let name = cluster.map(|name| KeyValue::new("cluster_name", name.as_str().to_owned()));
        let other = row(self.name).and_then(|row| row.attributes.get(1));
        let word = other.filter(|_| !self.word.is_empty());
        name.into_iter().chain(word.map(|key| KeyValue::new(*key, self.word))).collect()
    }
}

/// Registers every observed instrument of the metric table. `read` is called once for each at every scrape, and should
/// give all of them the same reading ([`Snapshots`]).
pub fn observe(
    meter: &Meter,
    read: impl Fn(&'static str) -> Table + Clone + Send + Sync + 'static,
) {
    for row in CATALOGUE {
        let (name, read) = (row.name, read.clone());
        match row.kind {
            Kind::Histogram => {}
            Kind::Counter => {
                meter
                    .u64_observable_counter(name)
                    .with_unit(row.unit)
                    .with_description(row.meaning)
                    .with_callback(move |observer| {
                        for reading in read(name).get(name).into_iter().flatten() {
                            observer.observe(reading.value as u64, &reading.attributes());
                        }
                    })
                    .build();
            }
            Kind::Gauge | Kind::UpDownCounter => {
                meter
                    .f64_observable_gauge(name)
                    .with_unit(row.unit)
                    .with_description(row.meaning)
                    .with_callback(move |observer| {
                        for reading in read(name).get(name).into_iter().flatten() {
                            observer.observe(reading.value, &reading.attributes());
                        }
                    })
                    .build();
            }
        }
    }
}
