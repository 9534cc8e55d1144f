//! The metric table: name, type, unit, attributes and meaning of every instrument of klio-server. docs/metrics.md is
//! generated from it.
//!
//! Metrics of a cluster have the attribute `cluster_name`; those of the server as a whole have none.

use super::attempt::Attempt;
use klio_proto::Code;
use klio_telemetry::catalogue::{
    Kind::{Counter, Gauge, Histogram},
    Row, of_cluster, plain,
};

const BY_OUTCOME: &[&str] = &["cluster_name", "outcome"];
const BY_TIER: &[&str] = &["cluster_name", "tier"];
const BY_ERROR: &[&str] = &["cluster_name", "error.type"];

/// Every instrument.
pub const CATALOGUE: &[Row] = &[
    of_cluster("klio.wal.written_size", Counter, "By", "bytes of WAL files written to disk"),
    of_cluster("klio.wal.written", Counter, "", "WAL files written"),
    of_cluster(
        "klio.wal.latest_written_time",
        Gauge,
        "s",
        "Unix time of the newest WAL file written to disk (tier 1)",
    ),
    of_cluster("klio.wal.received_size", Counter, "By", "bytes of WAL received and checked"),
    plain(
        "klio.wal.flush_duration",
        Histogram,
        "s",
        "time of one write and fsync of received WAL, of any cluster",
    ),
    of_cluster("klio.wal.seal_failures", Counter, "", "seals that failed and will be tried again"),
    of_cluster(
        "klio.wal.session_failures",
        Counter,
        "",
        "streams of WAL that were refused or ended with an error, by error.type",
    )
    .with(BY_ERROR),
    of_cluster("klio.wal.connected", Gauge, "", "1 while a sidecar streams this cluster, else 0"),
    of_cluster("klio.wal.received_lsn", Gauge, "", "end of WAL received, as a number"),
    of_cluster("klio.wal.flushed_lsn", Gauge, "", "end of WAL durable on tier 1, as a number"),
    of_cluster("klio.wal.sealed_lsn", Gauge, "", "end of WAL in sealed segments, as a number"),
    of_cluster("klio.wal.archived_lsn", Gauge, "", "end of contiguous WAL in tier 2, as a number"),
    of_cluster(
        "klio.wal.receive_lag_size",
        Gauge,
        "By",
        "WAL that PostgreSQL has and the server has not received",
    ),
    of_cluster(
        "klio.wal.receive_lag_time",
        Gauge,
        "s",
        "how long ago PostgreSQL had WAL that the server has not received",
    ),
    of_cluster(
        "klio.wal.flush_lag_size",
        Gauge,
        "By",
        "WAL that PostgreSQL has and tier 1 has not",
    ),
    of_cluster(
        "klio.wal.flush_lag_time",
        Gauge,
        "s",
        "how long ago PostgreSQL had WAL that tier 1 has not",
    ),
    of_cluster(
        "klio.wal.seal_lag_size",
        Gauge,
        "By",
        "finished WAL on tier 1 that is not sealed yet",
    ),
    of_cluster(
        "klio.wal.seal_lag_time",
        Gauge,
        "s",
        "age of the oldest finished WAL file that is not sealed yet",
    ),
    of_cluster("klio.wal.archive_lag_size", Gauge, "By", "finished WAL that tier 2 has not"),
    of_cluster(
        "klio.wal.archive_lag_time",
        Gauge,
        "s",
        "age of the oldest finished WAL file not in tier 2",
    ),
    of_cluster(
        "klio.quota.used_ratio",
        Gauge,
        "1",
        "stored bytes of a cluster as a share of its quota (quota.stored_bytes), 0 without a quota; above 1 base backups are refused",
    ),
    of_cluster("klio.wal.gaps", Gauge, "", "recorded gaps in the cluster's WAL"),
    of_cluster(
        "klio.cluster.undecided_generations",
        Gauge,
        "",
        "other histories of the cluster that wait for a person's decision",
    ),
    of_cluster(
        "klio.wal.damaged_journals",
        Gauge,
        "",
        "stretches of acknowledged WAL that are damaged on tier 1 and not yet restored",
    ),
    of_cluster(
        "klio.cluster.undecided_timelines",
        Gauge,
        "",
        "timelines that are received and wait for a person's decision",
    ),
    of_cluster(
        "klio.consumer.written_size",
        Counter,
        "By",
        "bytes written to tier 2 for WAL files",
    ),
    of_cluster("klio.consumer.written", Counter, "", "WAL files written to tier 2"),
    of_cluster(
        "klio.consumer.latest_written_time",
        Gauge,
        "s",
        "Unix time of the newest WAL file written to tier 2",
    ),
    of_cluster(
        "klio.consumer.stalled_time",
        Gauge,
        "s",
        "how long finished WAL files have waited with none of them archived; 0 when none waits, and while an upload advances",
    ),
    of_cluster(
        "klio.consumer.offloads",
        Counter,
        "",
        "attempts to move a file to tier 2, by outcome",
    )
    .with(BY_OUTCOME),
    of_cluster(
        "klio.consumer.backup_verification_success",
        Counter,
        "",
        "backup verifications that passed",
    ),
    of_cluster(
        "klio.consumer.backup_verification_failure",
        Counter,
        "",
        "backup verifications that found corruption",
    ),
    of_cluster("klio.base.snapshots", Gauge, "", "stored snapshots"),
    of_cluster(
        "klio.base.latest_snapshot_size",
        Gauge,
        "By",
        "size of the newest snapshot, before compression and deduplication",
    ),
    of_cluster("klio.base.latest_snapshot_files", Gauge, "", "files in the newest snapshot"),
    of_cluster("klio.base.latest_snapshot_dirs", Gauge, "", "directories in the newest snapshot"),
    of_cluster("klio.base.latest_snapshot_age", Gauge, "s", "age of the newest snapshot"),
    of_cluster("klio.base.oldest_snapshot_age", Gauge, "s", "age of the oldest snapshot"),
    of_cluster("klio.base.unarchived_files", Gauge, "", "objects of base backups not in tier 2"),
    of_cluster(
        "klio.base.archive_lag_time",
        Gauge,
        "s",
        "age of the oldest object of base backups not in tier 2",
    ),
    of_cluster(
        "klio.base.offloads",
        Counter,
        "",
        "attempts to move an object to tier 2, by outcome",
    )
    .with(BY_OUTCOME),
    of_cluster(
        "klio.base.archived_size",
        Counter,
        "By",
        "bytes written to tier 2 for base backups",
    ),
    of_cluster(
        "klio.recovery.earliest_time",
        Gauge,
        "s",
        "Unix time of the earliest moment to recover to; every later one up to the latest can be recovered, too",
    ),
    of_cluster(
        "klio.recovery.latest_time",
        Gauge,
        "s",
        "Unix time of the latest moment to recover to; the current time while all of PostgreSQL's WAL is durable",
    ),
    of_cluster("klio.maintenance.runs", Counter, "", "maintenance runs, by outcome")
        .with(BY_OUTCOME),
    of_cluster("klio.maintenance.freed_size", Counter, "By", "bytes freed, by tier").with(BY_TIER),
    of_cluster("klio.maintenance.wal_removed", Counter, "", "WAL files removed, by tier")
        .with(BY_TIER),
    of_cluster("klio.maintenance.expired", Counter, "", "backups that retention expired"),
    of_cluster(
        "klio.maintenance.alarm",
        Gauge,
        "",
        "1 while something is in doubt and nothing is removed",
    ),
    of_cluster(
        "klio.maintenance.clock_doubt",
        Gauge,
        "",
        "1 while the server's clock disagrees with other clocks, so that nothing is removed by age",
    ),
    of_cluster("klio.maintenance.latest_time", Gauge, "s", "Unix time of the last maintenance"),
    of_cluster("klio.verify.latest_age", Gauge, "s", "age of the last verification"),
    of_cluster(
        "klio.verify.coverage_age",
        Gauge,
        "s",
        "time within which all data was read: age of the beginning of the last pass over all packs",
    ),
    of_cluster(
        "klio.verify.damaged",
        Gauge,
        "",
        "damaged files that could not be repaired, by the newest verification of each backup",
    ),
    of_cluster("klio.drill.latest_age", Gauge, "s", "age of the last restore drill"),
    of_cluster(
        "klio.drill.latest_success",
        Gauge,
        "",
        "1 when the last restore drill passed, else 0",
    ),
    of_cluster(
        "klio.drill.restore_duration",
        Gauge,
        "s",
        "time that the last drill needed to restore all files",
    ),
    of_cluster(
        "klio.drill.recovery_duration",
        Gauge,
        "s",
        "time that PostgreSQL needed for recovery in the last drill",
    ),
    plain("klio.queue.messages", Gauge, "", "messages stored in the JetStream queue"),
    plain("klio.queue.bytes", Gauge, "By", "bytes stored in the JetStream queue"),
    plain(
        "klio.queue.oldest_age",
        Gauge,
        "s",
        "age of the oldest message in the JetStream queue, 0 when it is empty",
    ),
    plain("klio.queue.connected", Gauge, "", "1 while the queue can be used, else 0"),
    plain("klio.tier1.free_size", Gauge, "By", "free space of tier 1's file system"),
    plain("klio.tier1.total_size", Gauge, "By", "size of tier 1's file system"),
    plain(
        "klio.tls.certificate_expiry_time",
        Gauge,
        "s",
        "Unix time at which the server's certificate ends",
    ),
];

/// The instrument of this name.
pub fn row(name: &str) -> Option<&'static Row> {
    CATALOGUE.iter().find(|row| row.name == name)
}

/// Each attribute and its values; closed sets are taken from the code.
pub fn attributes() -> Vec<(&'static str, String)> {
    let words = |words: &[&str]| words.join(", ");
    let offloads: Vec<_> = Attempt::ALL.iter().map(|attempt| attempt.as_str()).collect();
    let codes: Vec<_> = Code::ALL.iter().map(|code| code.name()).collect();
    vec![
        ("cluster_name", "the PostgreSQL cluster".into()),
        ("outcome of klio.consumer.offloads and klio.base.offloads", words(&offloads)),
        ("outcome of klio.maintenance.runs", words(MAINTENANCE_OUTCOMES)),
        ("tier", words(TIERS)),
        ("error.type of klio.wal.session_failures", words(&codes)),
        (
            "error.type of rpc.*",
            "the names of gRPC's status codes except OK; absent when the call succeeded".into(),
        ),
    ]
}

/// The outcomes of maintenance.
pub const MAINTENANCE_OUTCOMES: &[&str] = &["done", "held_back", "failed"];
pub const TIERS: &[&str] = &["tier1", "tier2"];

/// Counters that start at 0 as soon as a cluster exists, because `increase()` counts the first event only then. Of the
/// outcomes of offloads only those that an alert uses are listed; each other outcome appears with its first event.
pub const ZEROS: &[(&str, &[&str])] = &[
    ("klio.wal.written_size", &[""]),
    ("klio.wal.written", &[""]),
    ("klio.wal.received_size", &[""]),
    ("klio.wal.seal_failures", &[""]),
    ("klio.consumer.backup_verification_success", &[""]),
    ("klio.consumer.backup_verification_failure", &[""]),
    ("klio.maintenance.runs", MAINTENANCE_OUTCOMES),
    ("klio.maintenance.freed_size", TIERS),
    ("klio.maintenance.wal_removed", TIERS),
    ("klio.maintenance.expired", &[""]),
];

/// The same for a server with a bucket.
pub const ZEROS_WITH_TIER2: &[(&str, &[&str])] = &[
    ("klio.consumer.written_size", &[""]),
    ("klio.consumer.written", &[""]),
    ("klio.consumer.offloads", &["stored", "transient"]),
    ("klio.base.offloads", &["stored", "transient"]),
    ("klio.base.archived_size", &[""]),
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn no_instrument_is_listed_twice_and_every_zero_is_a_counter_of_the_table() {
        let names: BTreeSet<_> = CATALOGUE.iter().map(|row| row.name).collect();
        assert_eq!(names.len(), CATALOGUE.len());
        for (name, words) in ZEROS.iter().chain(ZEROS_WITH_TIER2) {
            let row = row(name).unwrap_or_else(|| panic!("{name}"));
            assert_eq!((row.kind, row.attributes.len() > 1), (Counter, *words != [""]), "{name}");
        }
    }

    /// An LSN, a file name, a path or an address as an attribute would make a new series for each value.
    #[test]
    fn attributes_are_the_cluster_and_closed_sets() {
        let allowed = ["cluster_name", "outcome", "tier", "error.type"];
        let used: BTreeSet<_> = CATALOGUE.iter().flat_map(|row| row.attributes).collect();
        assert!(used.iter().all(|attribute| allowed.contains(attribute)), "{used:?}");
        for (attribute, values) in attributes() {
            assert!(!values.is_empty(), "{attribute}");
        }
    }
}
