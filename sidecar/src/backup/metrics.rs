//! Instruments of a backup's life cycle (`klio.backup.*`).
//!
//! Gauges observe [`State`]. It is filled at start with what the server knows of earlier backups, so that the gauges
//! are right after a restart. Nothing here is used for decisions (P9).

use super::Done;
use crate::error::{Error, Failure};
use klio_proto::Code;
use klio_storage::catalog::BackupRecord;
use klio_telemetry::catalogue::{
    Kind::{Counter, Gauge},
    Row, of_cluster,
};
use opentelemetry::{KeyValue, metrics};
use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
};

/// Every instrument; docs/metrics.md is generated from it.
pub const CATALOGUE: &[Row] = &[
    of_cluster("klio.backup.running", Gauge, "", "1 while a backup runs, else 0"),
    of_cluster(
        "klio.backup.latest_start_time",
        Gauge,
        "s",
        "Unix time at which the newest backup began",
    ),
    of_cluster("klio.backup.latest_completion_time", Gauge, "s", "Unix time of the newest success"),
    of_cluster("klio.backup.latest_failure_time", Gauge, "s", "Unix time of the newest failure"),
    of_cluster("klio.backup.latest_duration_seconds", Gauge, "s", "duration of the newest success"),
    of_cluster(
        "klio.backup.latest_size",
        Gauge,
        "By",
        "size of the newest success, before deduplication",
    ),
    of_cluster(
        "klio.backup.latest_stored_size",
        Gauge,
        "By",
        "bytes that the newest success added to the repository",
    ),
    of_cluster(
        "klio.backup.latest_bad_pages",
        Gauge,
        "",
        "pages of the newest success with wrong checksums",
    ),
    of_cluster(
        "klio.backup.next_time",
        Gauge,
        "s",
        "Unix time at which the next scheduled backup is due; absent without a schedule",
    ),
    of_cluster("klio.backup.successes", Counter, "", "backups taken"),
    of_cluster("klio.backup.failures", Counter, "", "backups that failed, by error.type")
        .with(&["cluster_name", "error.type"]),
    of_cluster("klio.backup.verifications", Counter, "", "verifications after a backup"),
    of_cluster(
        "klio.backup.verification_failures",
        Counter,
        "",
        "verifications after a backup that failed or found damage that could not be repaired",
    ),
    of_cluster(
        "klio.backup.maintenance_failures",
        Counter,
        "",
        "failed maintenance runs after a backup",
    ),
];

/// What the gauges show, as the bits of an f64. For times and the size, 0 means unknown.
#[derive(Debug, Default)]
pub struct State {
    running: AtomicBool,
    start: AtomicU64,
    completion: AtomicU64,
    failure: AtomicU64,
    duration: AtomicU64,
    size: AtomicU64,
    stored: AtomicU64,
    bad_pages: AtomicU64,
    next: AtomicU64,
}

type Read = fn(&State) -> Option<f64>;

const GAUGES: &[(&str, Read)] = &[
    ("klio.backup.running", |s| Some(f64::from(u8::from(s.running.load(Relaxed))))),
    ("klio.backup.latest_start_time", |s| known(&s.start)),
    ("klio.backup.latest_completion_time", |s| known(&s.completion)),
    ("klio.backup.latest_failure_time", |s| known(&s.failure)),
    ("klio.backup.latest_duration_seconds", |s| known(&s.duration)),
    ("klio.backup.latest_size", |s| known(&s.size)),
    ("klio.backup.latest_stored_size", |s| known(&s.completion).and(Some(value(&s.stored)))),
    ("klio.backup.latest_bad_pages", |s| known(&s.completion).and(Some(value(&s.bad_pages)))),
    ("klio.backup.next_time", |s| known(&s.next)),
];

fn value(bits: &AtomicU64) -> f64 {
    f64::from_bits(bits.load(Relaxed))
}

fn known(bits: &AtomicU64) -> Option<f64> {
    Some(value(bits)).filter(|v| *v > 0.0)
}

fn set(bits: &AtomicU64, value: f64) {
    bits.store(value.to_bits(), Relaxed);
}

/// Unit and meaning from the metric table; a test checks that every gauge has a row.
fn describe(name: &str) -> (&'static str, &'static str) {
    CATALOGUE.iter().find(|row| row.name == name).map_or(("", ""), |row| (row.unit, row.meaning))
}

#[derive(Debug, Clone)]
pub struct Metrics {
    state: Arc<State>,
    attributes: [KeyValue; 1],
    successes: metrics::Counter<u64>,
    failures: metrics::Counter<u64>,
    verifications: metrics::Counter<u64>,
    verification_failures: metrics::Counter<u64>,
    maintenance_failures: metrics::Counter<u64>,
}

impl Metrics {
    pub fn new(meter: &metrics::Meter, cluster: &str) -> Self {
        let state = Arc::new(State::default());
        let attributes = [KeyValue::new("cluster_name", cluster.to_owned())];
        for (name, read) in GAUGES {
            let (unit, meaning) = describe(name);
            let (state, attributes) = (Arc::clone(&state), attributes.clone());
            let _ = meter
                .f64_observable_gauge(*name)
                .with_unit(unit)
                .with_description(meaning)
                .with_callback(move |observer| {
                    if let Some(value) = read(&state) {
                        observer.observe(value, &attributes);
                    }
                })
                .build();
        }
        let counter = |name: &'static str| {
            let (unit, meaning) = describe(name);
            meter.u64_counter(name).with_unit(unit).with_description(meaning).build()
        };
        let this = Self {
            state,
            attributes,
            successes: counter("klio.backup.successes"),
            failures: counter("klio.backup.failures"),
            verifications: counter("klio.backup.verifications"),
            verification_failures: counter("klio.backup.verification_failures"),
            maintenance_failures: counter("klio.backup.maintenance_failures"),
        };
        this.begin_with_zero();
        this
    }

    /// Export a 0 first: without it `increase()` misses the first event.
    fn begin_with_zero(&self) {
        for cause in Failure::all().map(Failure::name) {
            self.failures.add(0, &[self.attributes[0].clone(), KeyValue::new("error.type", cause)]);
        }
        for counter in [
            &self.successes,
            &self.verifications,
            &self.verification_failures,
            &self.maintenance_failures,
        ] {
            counter.add(0, &self.attributes);
        }
    }

    /// Records the newest backup that the server has.
    pub fn known(&self, record: &BackupRecord) {
        let state = &self.state;
        if record.begun_unix > value(&state.start) {
            set(&state.start, record.begun_unix);
        }
        set(&state.completion, record.committed_unix);
        set(&state.duration, record.duration_seconds);
        set(&state.size, record.size_bytes as f64);
        set(&state.stored, record.stored_bytes as f64);
        set(&state.bad_pages, record.pages.bad as f64);
    }

    /// Records when the next backup is due; `None` if never.
    pub fn next(&self, unix: Option<f64>) {
        set(&self.state.next, unix.unwrap_or(0.0));
    }

    pub(super) fn begins(&self, now_unix: f64) {
        set(&self.state.start, now_unix);
        self.state.running.store(true, Relaxed);
    }

    pub(super) fn ends(&self, now_unix: f64, result: &Result<Done, Error>) {
        self.state.running.store(false, Relaxed);
        match result {
            Ok(done) => {
                self.known(&done.record);
                set(&self.state.completion, now_unix);
                self.successes.add(1, &self.attributes);
                if !done.verified.is_off() {
                    self.verifications.add(1, &self.attributes);
                }
                if done.verified.failed() {
                    self.verification_failures.add(1, &self.attributes);
                }
                if done.maintained.failed() {
                    self.maintenance_failures.add(1, &self.attributes);
                }
            }
            // Refused because another backup runs; that one is counted, not this.
            Err(error) if error.failure == Failure::Code(Code::Busy) => {}
            Err(error) => {
                set(&self.state.failure, now_unix);
                let cause = KeyValue::new("error.type", error.failure.name());
                self.failures.add(1, &[self.attributes[0].clone(), cause]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_gauge_is_described() {
        let described: Vec<_> =
            CATALOGUE.iter().filter(|row| row.kind == Gauge).map(|row| row.name).collect();
        assert_eq!(GAUGES.iter().map(|(name, _)| *name).collect::<Vec<_>>(), described);
    }

    #[test]
    fn what_is_not_known_is_not_shown() {
        let state = State::default();
        let shown: Vec<_> = GAUGES.iter().filter(|(_, read)| read(&state).is_some()).collect();
        assert_eq!(shown.len(), 1, "{shown:?}");
        set(&state.completion, 5.0);
        let zero = GAUGES.iter().find(|(name, _)| *name == "klio.backup.latest_bad_pages").unwrap();
        assert_eq!(zero.1(&state), Some(0.0));
    }
}
