//! Instruments of `klio stream`, and the state that they and /readyz show.
//!
//! Gauges observe [`State`], so that they never show a value of an earlier process. Nothing here is used for
//! decisions (P9).

use super::disk::Space;
use crate::error::Failure;
use klio_pg::Lsn;
use klio_telemetry::{
    BARE,
    catalogue::{
        Kind::{Counter, Gauge, Histogram},
        Row, of_cluster,
    },
};
use opentelemetry::{KeyValue, metrics};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

/// Positions and connection state of the stream; shared with the admin port.
#[derive(Debug, Default)]
pub struct State {
    connected: AtomicBool,
    received: AtomicU64,
    flushed: AtomicU64,
    wal_end: AtomicU64,
    /// Bytes; -1 while unknown.
    slot_retained: AtomicI64,
    /// Bytes; 0 while unknown, because no real disk has size 0.
    postgres_disk: AtomicU64,
    postgres_free: AtomicU64,
    client_expires: AtomicI64,
    server_expires: AtomicI64,
}

impl State {
    /// Whether WAL flows: both ends are connected and the stream is open.
    pub fn is_connected(&self) -> bool {
        self.connected.load(Relaxed)
    }
    /// Durable on the server, as last acknowledged.
    pub fn flushed(&self) -> Lsn {
        Lsn::new(self.flushed.load(Relaxed))
    }
    /// End of WAL on PostgreSQL.
    pub fn wal_end(&self) -> Lsn {
        Lsn::new(self.wal_end.load(Relaxed))
    }
    pub(super) fn set_connected(&self, connected: bool) {
        self.connected.store(connected, Relaxed);
    }
    pub(super) fn set_positions(&self, received: Lsn, flushed: Lsn) {
        self.received.store(received.as_u64(), Relaxed);
        self.flushed.store(flushed.as_u64(), Relaxed);
    }
    pub(super) fn set_wal_end(&self, lsn: Lsn) {
        self.wal_end.store(lsn.as_u64(), Relaxed);
    }
    pub(super) fn set_expiry(&self, expiry: Option<crate::server_link::Expiry>) {
        let Some(expiry) = expiry else { return };
        self.client_expires.store(expiry.client.unwrap_or(0), Relaxed);
        self.server_expires.store(expiry.server.unwrap_or(0), Relaxed);
    }
    /// Bytes of WAL that the slot retains on PostgreSQL's disk; `None` when unknown.
    pub fn set_slot_retained(&self, bytes: Option<u64>) {
        let bytes = bytes.map_or(-1, |b| i64::try_from(b).unwrap_or(i64::MAX));
        self.slot_retained.store(bytes, Relaxed);
    }
    /// Space of the disk with PostgreSQL's WAL; `None` when it cannot be seen from here.
    pub fn set_postgres_disk(&self, space: Option<Space>) {
        let Space { free, total } = space.unwrap_or(Space { free: 0, total: 0 });
        self.postgres_free.store(free, Relaxed);
        self.postgres_disk.store(total, Relaxed);
    }
}

/// Every instrument of `klio stream`; docs/metrics.md is generated from it.
pub const CATALOGUE: &[Row] = &[
    of_cluster("klio.stream.connected", Gauge, "", "1 while WAL flows to the server, else 0"),
    of_cluster(
        "klio.stream.received_lsn",
        Gauge,
        "",
        "position up to which the server has received WAL, in bytes",
    ),
    of_cluster(
        "klio.stream.flushed_lsn",
        Gauge,
        "",
        "position up to which WAL is durable on the server, in bytes",
    ),
    of_cluster(
        "klio.stream.postgres_lsn",
        Gauge,
        "",
        "end of WAL on PostgreSQL, as a position in bytes",
    ),
    of_cluster(
        "klio.stream.slot_retained_size",
        Gauge,
        "By",
        "WAL that the slot retains on PostgreSQL's disk",
    ),
    of_cluster(
        "klio.stream.postgres_free_size",
        Gauge,
        "By",
        "free space of the disk with PostgreSQL's WAL; absent where klio cannot see that disk",
    ),
    of_cluster(
        "klio.stream.postgres_disk_size",
        Gauge,
        "By",
        "size of the disk with PostgreSQL's WAL; absent where klio cannot see that disk",
    ),
    of_cluster(
        "klio.stream.client_certificate_expiry_time",
        Gauge,
        "s",
        "Unix time at which the client certificate expires",
    ),
    of_cluster(
        "klio.stream.server_certificate_expiry_time",
        Gauge,
        "s",
        "Unix time at which the server's certificate expires",
    ),
    of_cluster("klio.stream.sent_size", Counter, "By", "WAL sent to the server"),
    of_cluster(
        "klio.stream.ack_latency",
        Histogram,
        "s",
        "time from sending WAL to its acknowledgement as durable",
    ),
    of_cluster(
        "klio.stream.reconnects",
        Counter,
        "",
        "sessions that ended with an error, by error.type",
    )
    .with(&["cluster_name", "error.type"]),
    of_cluster("klio.stream.gaps", Counter, "", "gaps declared to the server"),
    of_cluster("klio.stream.gap_size", Counter, "By", "WAL lost in gaps"),
];

type Read = fn(&State) -> Option<u64>;

/// How to read each gauge; `None` while its value is unknown.
const GAUGES: &[(&str, Read)] = &[
    ("klio.stream.connected", |s| Some(s.is_connected().into())),
    ("klio.stream.received_lsn", |s| known(s.received.load(Relaxed))),
    ("klio.stream.flushed_lsn", |s| known(s.flushed.load(Relaxed))),
    ("klio.stream.postgres_lsn", |s| known(s.wal_end.load(Relaxed))),
    ("klio.stream.slot_retained_size", |s| u64::try_from(s.slot_retained.load(Relaxed)).ok()),
    // A full disk has 0 bytes free, which is a known value.
    ("klio.stream.postgres_free_size", |s| {
        known(s.postgres_disk.load(Relaxed)).map(|_| s.postgres_free.load(Relaxed))
    }),
    ("klio.stream.postgres_disk_size", |s| known(s.postgres_disk.load(Relaxed))),
    ("klio.stream.client_certificate_expiry_time", |s| time(&s.client_expires)),
    ("klio.stream.server_certificate_expiry_time", |s| time(&s.server_expires)),
];

/// A position, size or time is never 0.
fn known(position: u64) -> Option<u64> {
    Some(position).filter(|p| *p > 0)
}

fn time(unix: &AtomicI64) -> Option<u64> {
    u64::try_from(unix.load(Relaxed)).ok().and_then(known)
}

/// Unit and meaning from the metric table; a test checks that every gauge has a row.
fn describe(name: &str) -> (&'static str, &'static str) {
    CATALOGUE.iter().find(|row| row.name == name).map_or(("", ""), |row| (row.unit, row.meaning))
}

#[derive(Debug)]
pub struct Metrics {
    /// What the gauges show.
    pub state: Arc<State>,
    attributes: [KeyValue; 1],
    sent: metrics::Counter<u64>,
    ack_latency: metrics::Histogram<f64>,
    reconnects: metrics::Counter<u64>,
    gaps: metrics::Counter<u64>,
    gap_size: metrics::Counter<u64>,
}

impl Metrics {
    pub fn new(meter: &metrics::Meter, cluster: &str) -> Self {
        let state = Arc::new(State::default());
        state.set_slot_retained(None);
        let attributes = [KeyValue::new("cluster_name", cluster.to_owned())];
        for (name, read) in GAUGES {
            let (unit, meaning) = describe(name);
            let (state, attributes) = (Arc::clone(&state), attributes.clone());
            let _ = meter
                .u64_observable_gauge(*name)
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
        let (unit, meaning) = describe("klio.stream.ack_latency");
        let ack_latency = meter
            .f64_histogram("klio.stream.ack_latency")
            .with_unit(unit)
            .with_description(meaning)
            .with_boundaries(LATENCY_BOUNDS.to_vec())
            .build();
        let reconnects = counter("klio.stream.reconnects");
        let (gaps, gap_size) = (counter("klio.stream.gaps"), counter("klio.stream.gap_size"));
        // Export a 0 first: without it `increase()` misses the first event.
        for cause in Failure::all().map(Failure::name) {
            reconnects.add(0, &[attributes[0].clone(), KeyValue::new("error.type", cause)]);
        }
        for zero in [&gaps, &gap_size] {
            zero.add(0, &attributes);
        }
        Self {
            state,
            attributes,
            sent: counter("klio.stream.sent_size"),
            ack_latency,
            reconnects,
            gaps,
            gap_size,
        }
    }

    pub(super) fn on_sent(&self, bytes: u64) {
        if !BARE {
            self.sent.add(bytes, &self.attributes);
        }
    }
    pub(super) fn on_ack_latency(&self, latency: Duration) {
        if !BARE {
            self.ack_latency.record(latency.as_secs_f64(), &self.attributes);
        }
    }
    pub(super) fn on_reconnect(&self, cause: &'static str) {
        let cause = KeyValue::new("error.type", cause);
        self.reconnects.add(1, &[self.attributes[0].clone(), cause]);
    }
    pub(super) fn on_gap(&self, bytes: u64) {
        self.gaps.add(1, &self.attributes);
        self.gap_size.add(bytes, &self.attributes);
    }
}

/// In seconds, around the time of an fsync (0.2 to 30 ms), with room for a stalled disk.
const LATENCY_BOUNDS: &[f64] =
    &[0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0];

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
        state.set_slot_retained(None);
        let shown: Vec<_> = GAUGES
            .iter()
            .filter(|(_, read)| read(&state).is_some())
            .map(|(name, _)| *name)
            .collect();
        assert_eq!(shown, ["klio.stream.connected"]);
    }

    #[test]
    fn a_full_disk_is_shown_and_one_that_cannot_be_seen_is_not() {
        let state = State::default();
        let read = |name| GAUGES.iter().find(|gauge| gauge.0 == name).unwrap().1(&state);
        state.set_postgres_disk(Some(Space { free: 0, total: 100 }));
        assert_eq!(read("klio.stream.postgres_free_size"), Some(0));
        assert_eq!(read("klio.stream.postgres_disk_size"), Some(100));
        state.set_postgres_disk(None);
        assert_eq!(read("klio.stream.postgres_free_size"), None);
    }
}
