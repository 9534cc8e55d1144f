//! The metrics that Klio promises, with a real Prometheus: every metric, its type, its unit in the name, its labels; what gauges show
//! after a restart; a thousand clusters.
//!
//! The names are written out here as the contract fixes them, not taken from the code: a name that changes fails.

use klio_tests::{
    env, http, install_crypto,
    otlp::{Answer, Message, Protocol, Receiver, Signal},
    ports,
    postgres::{Postgres, install},
    process::Running,
    prometheus::{Meaning, Prometheus},
    s3::S3,
    scratch::Scratch,
    site::{PATIENCE, Site},
    wait::eventually,
};
use opentelemetry_proto::tonic::metrics::v1::{
    NumberDataPoint, metric::Data, number_data_point::Value,
};
use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// Prometheus name, type, labels beside those of Prometheus.
type Expected = (&'static str, &'static str, &'static [&'static str]);

const OF: &[&str] = &["cluster_name"];

/// Metrics of a cluster have `cluster_name`; those of the queue are of the server as a whole.
const CONTRACT: &[Expected] = &[
    ("klio_wal_written_size_bytes_total", "counter", OF),
    ("klio_wal_written_total", "counter", OF),
    ("klio_wal_latest_written_time_seconds", "gauge", OF),
    ("klio_consumer_written_size_bytes_total", "counter", OF),
    ("klio_consumer_written_total", "counter", OF),
    ("klio_consumer_latest_written_time_seconds", "gauge", OF),
    ("klio_consumer_backup_verification_success_total", "counter", OF),
    ("klio_consumer_backup_verification_failure_total", "counter", OF),
    ("klio_base_snapshots", "gauge", OF),
    ("klio_base_latest_snapshot_size_bytes", "gauge", OF),
    ("klio_base_latest_snapshot_files", "gauge", OF),
    ("klio_base_latest_snapshot_dirs", "gauge", OF),
    ("klio_base_latest_snapshot_age_seconds", "gauge", OF),
    ("klio_base_oldest_snapshot_age_seconds", "gauge", OF),
    ("klio_backup_running", "gauge", OF),
    ("klio_backup_latest_start_time_seconds", "gauge", OF),
    ("klio_backup_latest_completion_time_seconds", "gauge", OF),
    ("klio_backup_latest_failure_time_seconds", "gauge", OF),
    ("klio_backup_latest_duration_seconds", "gauge", OF),
    ("klio_backup_successes_total", "counter", OF),
    ("klio_backup_failures_total", "counter", &["cluster_name", "error_type"]),
    ("klio_backup_verifications_total", "counter", OF),
    ("klio_backup_verification_failures_total", "counter", OF),
    ("klio_queue_messages", "gauge", &[]),
    ("klio_queue_bytes", "gauge", &[]),
];

const CALL: &[&str] = &["rpc_system_name", "rpc_method", "rpc_response_status_code", "error_type"];

/// "Also on both" and "Beyond".
const ALSO: &[Expected] = &[
    ("rpc_server_call_duration_seconds", "histogram", CALL),
    ("rpc_client_call_duration_seconds", "histogram", CALL),
    ("system_cpu_time_seconds_total", "counter", &["cpu_mode"]),
    ("system_cpu_utilization_ratio", "gauge", &[]),
    ("system_memory_usage_bytes", "gauge", &["system_memory_state"]),
    ("system_memory_limit_bytes", "gauge", &[]),
    (
        "system_network_io_bytes_total",
        "counter",
        &["network_interface_name", "network_io_direction"],
    ),
    ("process_cpu_time_seconds_total", "counter", &["cpu_mode"]),
    ("process_memory_usage_bytes", "gauge", &[]),
    ("process_threads", "gauge", &[]),
    ("process_unix_file_descriptors", "gauge", &[]),
    ("process_disk_io_bytes_total", "counter", &["disk_io_direction"]),
    ("klio_runtime_workers", "gauge", &[]),
    ("klio_runtime_tasks", "gauge", &[]),
    ("klio_runtime_queue_depth", "gauge", &[]),
    ("klio_runtime_polls_total", "counter", &[]),
    ("klio_runtime_poll_time_seconds_total", "counter", &[]),
    ("klio_runtime_busy_time_seconds_total", "counter", &["worker"]),
    ("klio_wal_received_lsn", "gauge", OF),
    ("klio_wal_flushed_lsn", "gauge", OF),
    ("klio_wal_sealed_lsn", "gauge", OF),
    ("klio_wal_archived_lsn", "gauge", OF),
    ("klio_wal_receive_lag_size_bytes", "gauge", OF),
    ("klio_wal_receive_lag_time_seconds", "gauge", OF),
    ("klio_wal_flush_lag_size_bytes", "gauge", OF),
    ("klio_wal_flush_lag_time_seconds", "gauge", OF),
    ("klio_wal_seal_lag_size_bytes", "gauge", OF),
    ("klio_wal_seal_lag_time_seconds", "gauge", OF),
    ("klio_wal_archive_lag_size_bytes", "gauge", OF),
    ("klio_wal_archive_lag_time_seconds", "gauge", OF),
    ("klio_wal_connected", "gauge", OF),
    ("klio_stream_connected", "gauge", OF),
    ("klio_stream_ack_latency_seconds", "histogram", OF),
    ("klio_wal_flush_duration_seconds", "histogram", &[]),
    ("klio_consumer_offloads_total", "counter", &["cluster_name", "outcome"]),
    ("klio_base_offloads_total", "counter", &["cluster_name", "outcome"]),
    ("klio_wal_gaps", "gauge", OF),
    ("klio_cluster_undecided_generations", "gauge", OF),
    ("klio_queue_oldest_age_seconds", "gauge", &[]),
    ("klio_recovery_earliest_time_seconds", "gauge", OF),
    ("klio_recovery_latest_time_seconds", "gauge", OF),
    ("klio_stream_slot_retained_size_bytes", "gauge", OF),
    ("klio_stream_postgres_free_size_bytes", "gauge", OF),
    ("klio_tier1_free_size_bytes", "gauge", &[]),
    ("klio_tls_certificate_expiry_time_seconds", "gauge", &[]),
    ("klio_stream_client_certificate_expiry_time_seconds", "gauge", OF),
    ("klio_verify_latest_age_seconds", "gauge", OF),
    ("klio_drill_latest_age_seconds", "gauge", OF),
    ("klio_wal_session_failures_total", "counter", &["cluster_name", "error_type"]),
    ("klio_stream_reconnects_total", "counter", &["cluster_name", "error_type"]),
];

/// Lags, which are 0 on an idle cluster.
const LAGS: &[&str] = &[
    "klio_wal_receive_lag_size_bytes",
    "klio_wal_receive_lag_time_seconds",
    "klio_wal_flush_lag_size_bytes",
    "klio_wal_flush_lag_time_seconds",
    "klio_wal_seal_lag_size_bytes",
    "klio_wal_seal_lag_time_seconds",
    "klio_wal_archive_lag_size_bytes",
    "klio_wal_archive_lag_time_seconds",
];

fn now_unix() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs_f64()
}

/// A whole site at work: WAL shipped and archived, a first backup that fails and one that is taken, verified, drilled.
struct Work {
    site: Site,
    s3: S3,
    pg: Postgres,
    stream: Running,
    stream_metrics: u16,
    scratch: Scratch,
}

impl Work {
    async fn new() -> Self {
        install_crypto();
        let s3 = S3::new();
        let pg = Postgres::builder().segment_mib(1).initdb("-k").start().await;
        let mut site = Site::new().await.tier2(&s3);
        site.start().await;
        let scratch = Scratch::new("metrics");
        install::give(scratch.path());
        // A session that ends with an error.
        let mut doomed = site.stream(&pg);
        let lsn = pg.write_wal(1 << 20).await;
        site.wait_flushed(lsn).await;
        doomed.kill9();
        drop(doomed);
        // The first backup does not find it, so that one has failed.
        let data = scratch.join("data");
        let stream_metrics = ports::free();
        let mut command = site.klio_command(Some(&pg), &["stream"]);
        command
            .env("KLIO_BACKUP__SCHEDULE", "0 3 1 1 *")
            .env("KLIO_BACKUP__RETRY_MIN", "1s")
            .env("KLIO_BACKUP__RETRY_MAX", "2s")
            .env("KLIO_POSTGRES__DATA_DIRECTORY", &data)
            .env("OTEL_METRICS_EXPORTER", "prometheus")
            .env("OTEL_EXPORTER_PROMETHEUS_HOST", "127.0.0.1")
            .env("OTEL_EXPORTER_PROMETHEUS_PORT", stream_metrics.to_string());
        let mut stream = Running::spawn("klio stream", command, &site.scratch("scraped.log"));
        stream.wait_log("scheduled backup failed", PATIENCE).await;
        std::os::unix::fs::symlink(pg.data_dir(), &data).expect("link");
        stream.wait_log("scheduled backup taken", PATIENCE).await;
        Self { site, s3, pg, stream, stream_metrics, scratch }
    }

    /// Some segments, all of them archived; PostgreSQL is idle afterwards.
    async fn write(&self) {
        let size = self.pg.segment_size().await;
        self.pg.write_wal(3 << 20).await;
        let end = self.pg.switch_wal().await;
        self.pg.write_wal(1).await;
        self.site.wait_archived(end.segment_start(size)).await;
    }

    async fn drill(&self) {
        let place = self.scratch.join("drills");
        fs::create_dir(&place).expect("make");
        install::give(&place);
        let place = place.display().to_string();
        let outcome = self.site.klio(None, &["drill", "--in", &place]).await;
        assert_eq!(outcome.code, Some(0), "{}{}", outcome.stdout, outcome.stderr);
    }

    /// Everything is read: the share that follows a backup is all data only when the backup has a single pack, and how many packs
    /// it has depends on how fast the machine is.
    async fn verify(&self) {
        let outcome = self.site.klio(None, &["verify", "--read-data", "all"]).await;
        assert_eq!(outcome.code, Some(0), "{}{}", outcome.stdout, outcome.stderr);
    }
}

/// What is wrong with a metric, if anything is.
async fn fault(prometheus: &Prometheus, expected: &Expected) -> Option<String> {
    let (name, kind, labels) = expected;
    let metadata = prometheus.metadata().await;
    match metadata.get(*name) {
        None => return Some(format!("{name}: not there")),
        Some(found) if found.kind != *kind => return Some(format!("{name}: {found:?}")),
        Some(found) if found.help.len() < 5 => return Some(format!("{name}: no help")),
        Some(_) => {}
    }
    let names = match *kind {
        "histogram" => ["bucket", "sum", "count"].map(|part| format!("{name}_{part}")).to_vec(),
        _ => vec![(*name).to_owned()],
    };
    for name in names {
        let series = prometheus.query(&name).await;
        if series.is_empty() {
            return Some(format!("{name}: no series"));
        }
        for (found, _) in series {
            let mut found = Prometheus::label_names(&found);
            found.remove("le");
            // A call that went well has no error.type.
            let rpc = name.starts_with("rpc_");
            let fits = labels.iter().all(|l| found.contains(l) || (rpc && *l == "error_type"));
            if !fits || !found.iter().all(|l| labels.contains(l)) {
                return Some(format!("{name}: labels {found:?}, expected {labels:?}"));
            }
        }
    }
    None
}

/// Prometheus name, type and meaning of every row of docs/metrics.md.
fn documented() -> Vec<(String, Meaning)> {
    let text = fs::read_to_string(env::repository().join("docs/metrics.md")).expect("read");
    let rows = text.lines().filter_map(|line| {
        let cells: Vec<&str> = line.strip_prefix("| ")?.split('|').map(str::trim).collect();
        let [_, kind, _, prometheus, _, meaning, ..] = cells.as_slice() else { return None };
        let kind = match *kind {
            "counter" | "gauge" | "histogram" => (*kind).to_owned(),
            "updowncounter" => "gauge".to_owned(),
            _ => return None,
        };
        Some(((*prometheus).to_owned(), Meaning { kind, help: (*meaning).to_owned() }))
    });
    let rows: Vec<_> = rows.collect();
    assert!(rows.len() > 90, "docs/metrics.md: {} rows", rows.len());
    rows
}

#[tokio::test(flavor = "multi_thread")]
async fn prometheus_has_every_metric_with_its_type_unit_and_labels() {
    let work = Work::new().await;
    let jobs = [("klio-server", work.site.prometheus_port()), ("klio", work.stream_metrics)];
    let prometheus = Prometheus::scraping(&jobs).await;
    work.write().await;
    work.drill().await;
    work.verify().await;
    for expected in CONTRACT.iter().chain(ALSO) {
        eventually(&format!("{} as the contract has it", expected.0), PATIENCE, || async {
            fault(&prometheus, expected).await.map_or(Ok(()), Err)
        })
        .await;
    }
    for (name, meaning) in documented() {
        eventually(&format!("{name} as docs/metrics.md has it"), PATIENCE, || async {
            let found = prometheus.metadata().await.get(&name).cloned();
            if found.as_ref() == Some(&meaning) { Ok(()) } else { Err(found) }
        })
        .await;
    }
    // And nothing that is not documented.
    let known: BTreeSet<String> = documented().into_iter().map(|(name, _)| name).collect();
    let found = prometheus.metadata().await;
    let ours = found.keys().filter(|name| name.as_str() != "target_info");
    let unknown: Vec<_> = ours.filter(|name| !known.contains(*name)).collect();
    assert!(unknown.is_empty(), "not in docs/metrics.md: {unknown:?}");
    // What Prometheus has is what happened.
    for (expression, expected) in [
        ("klio_wal_connected", 1.0),
        ("klio_stream_connected", 1.0),
        ("klio_base_snapshots", 1.0),
        ("klio_backup_successes_total", 1.0),
        ("klio_drill_latest_success", 1.0),
        ("klio_wal_gaps", 0.0),
        ("sum(klio_backup_failures_total) >= bool 1", 1.0),
        ("sum(klio_wal_session_failures_total) >= bool 1", 1.0),
        ("klio_wal_written_total >= bool 3", 1.0),
        ("klio_consumer_written_total >= bool 3", 1.0),
        ("klio_stream_postgres_disk_size_bytes > bool klio_stream_postgres_free_size_bytes", 1.0),
        ("count({cluster_name!=\"\", cluster_name!=\"main\"}) or vector(0)", 0.0),
        // Everything until now, but for the time between two signs of life and two scrapes.
        ("time() - klio_recovery_latest_time_seconds < bool 60", 1.0),
        ("klio_recovery_earliest_time_seconds < bool klio_recovery_latest_time_seconds", 1.0),
    ] {
        eventually(&format!("{expression} to be {expected}"), PATIENCE, || async {
            let found = prometheus.query(expression).await;
            let right = matches!(found.as_slice(), [(_, value)] if *value == expected);
            if right { Ok(()) } else { Err(found) }
        })
        .await;
    }
    for lag in LAGS {
        eventually(&format!("{lag} of an idle cluster to be 0"), PATIENCE, || async {
            let found = prometheus.query(lag).await;
            if found.iter().all(|(_, v)| *v == 0.0) && !found.is_empty() {
                Ok(())
            } else {
                Err(found)
            }
        })
        .await;
    }
    drop(work.s3);
}

/// Gauges that say the same before and after a restart, to the second.
const KEPT: &[&str] = &[
    "klio_wal_latest_written_time_seconds",
    "klio_consumer_latest_written_time_seconds",
    "klio_wal_received_lsn",
    "klio_wal_flushed_lsn",
    "klio_wal_sealed_lsn",
    "klio_wal_archived_lsn",
    "klio_wal_gaps",
    "klio_base_snapshots",
    "klio_base_latest_snapshot_size_bytes",
    "klio_base_latest_snapshot_files",
    "klio_base_latest_snapshot_dirs",
    "klio_recovery_earliest_time_seconds",
    "klio_maintenance_latest_time_seconds",
    "klio_tls_certificate_expiry_time_seconds",
];

/// Those that grow: what stays the same is when it was.
const AGES: &[&str] = &[
    "klio_base_latest_snapshot_age_seconds",
    "klio_base_oldest_snapshot_age_seconds",
    "klio_verify_latest_age_seconds",
];

/// Every gauge of the two lists at one moment, ages as the time since which they grow.
async fn facts(site: &Site) -> Option<Vec<(&'static str, f64)>> {
    let (metrics, now) = (site.metrics().await, now_unix());
    let value = |name: &'static str| {
        let plain = name.starts_with("klio_tls") || name.starts_with("klio_queue");
        let labels: &[(&str, &str)] = if plain { &[] } else { &[("cluster_name", "main")] };
        Some((name, metrics.value(name, labels)?))
    };
    let kept = KEPT.iter().map(|name| value(name));
    let ages = AGES.iter().map(|name| value(name).map(|(name, age)| (name, now - age)));
    kept.chain(ages).collect()
}

async fn latest(site: &Site) -> f64 {
    let name = "klio_recovery_latest_time_seconds";
    site.metrics().await.value(name, &[("cluster_name", "main")]).expect("a recovery window")
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_restart_gauges_show_what_the_store_says_and_not_zero_or_now() {
    let Work { mut site, s3, pg, mut stream, .. } = {
        let work = Work::new().await;
        work.write().await;
        work
    };
    let end = pg.write_wal(100).await;
    site.wait_flushed(end).await;
    assert!(stream.terminate(PATIENCE).await.success());
    let shipped = now_unix();
    eventually("the bucket to have all", PATIENCE, || async {
        let metrics = site.metrics().await;
        let of = |name| metrics.value(name, &[("cluster_name", "main")]);
        of("klio_base_unarchived_files") == Some(0.0)
            && of("klio_wal_archive_lag_size_bytes") == Some(0.0)
    })
    .await;
    // What is read back and tidied up by itself is over when nothing has happened for longer than the server looks;
    // and "now" must be told from what is true.
    let before = eventually("nothing to happen any more", PATIENCE, || async {
        let facts = facts(&site).await?;
        let old = |(name, unix): &(&str, f64)| {
            let when = AGES.contains(name) || name.ends_with("latest_time_seconds");
            !when || now_unix() - unix > 10.0
        };
        facts.iter().all(old).then_some(facts)
    })
    .await;
    let recoverable = latest(&site).await;
    assert!(recoverable <= shipped + 1.0, "{recoverable}: nobody has streamed since {shipped}");
    // The second one finds what the first has recovered and copied.
    for restart in 1..=2 {
        site.stop().await;
        site.start().await;
        let after = eventually("the same gauges", PATIENCE, || facts(&site)).await;
        for ((name, was), (_, is)) in before.iter().zip(&after) {
            assert!((was - is).abs() < 3.0, "restart {restart}: {name} was {was}, is {is}");
        }
        let after = latest(&site).await;
        let told = (recoverable - 20.0)..=(shipped + 1.0);
        assert!(told.contains(&after), "restart {restart}: {after}, expected within {told:?}");
    }
    drop(s3);
}

/// Copies a directory with what a cluster has on tier 1 but for journals and repository data: large, and no gauge reads them.
fn copy_cluster(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("make");
    for entry in fs::read_dir(from).expect("list") {
        let entry = entry.expect("entry");
        let (name, path) = (entry.file_name(), entry.path());
        let skipped = name.to_str().is_none_or(|n| n.ends_with(".open") || n == "base");
        match entry.file_type().expect("type").is_dir() {
            _ if skipped => {}
            true => copy_cluster(&path, &to.join(name)),
            false => drop(fs::copy(&path, to.join(name)).expect("copy")),
        }
    }
}

/// The page, how long it took, and how many series of clusters it has.
async fn scrape(site: &Site) -> (String, Duration, usize) {
    let begun = Instant::now();
    let page = site.metrics_page().await;
    let took = begun.elapsed();
    let series = page.lines().filter(|line| line.contains("cluster_name=")).count();
    (page, took, series)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_clusters_make_a_page_that_grows_with_them_and_no_faster() {
    install_crypto();
    let pg = Postgres::builder().segment_mib(1).start().await;
    let mut site = Site::unencrypted().await;
    site.start().await;
    let mut stream = site.stream(&pg);
    let lsn = pg.write_wal(2 << 20).await;
    site.wait_flushed(lsn).await;
    let backup = site.klio(Some(&pg), &["backup"]).await;
    assert_eq!(backup.code, Some(0), "{}", backup.stderr);
    assert!(stream.terminate(PATIENCE).await.success());
    drop(pg);
    let mut measured = Vec::new();
    for clusters in [10, 1000] {
        site.stop().await;
        let main = site.tier1().join("main");
        for number in 0..clusters {
            let copy = site.tier1().join(format!("c{number:04}"));
            if !copy.exists() {
                copy_cluster(&main, &copy);
            }
        }
        site.start().await;
        // The first one of a process also builds what the others use.
        scrape(&site).await;
        measured.push(scrape(&site).await);
    }
    let [(_, quick, _), (page, slow, many)] = measured.as_slice() else { panic!("two pages") };
    // Both pages have `main` too, which has counted more than a copy that nobody streams.
    let of = |name: &str| {
        let label = format!("cluster_name=\"{name}\"");
        page.lines().filter(|line| line.contains(&label)).count()
    };
    let each = of("c0000");
    assert!((30..200).contains(&each), "{each} series of one cluster");
    assert_eq!((of("c0999"), *many), (each, of("main") + 1000 * each));
    assert!(!page.contains("otel_metric_overflow"), "series were folded into one");
    // A hundred times the clusters: quadratic work would take ten thousand times as long.
    let bound = (*quick).max(Duration::from_millis(20)) * 500;
    assert!(*slow < bound, "{slow:?} for 1000 clusters, {quick:?} for 10");
    // A cluster that is gone.
    fs::remove_dir_all(site.tier1().join("c0500")).expect("remove");
    let left = eventually("its series to disappear", PATIENCE, || async {
        let (page, _, series) = scrape(&site).await;
        if page.contains("cluster_name=\"c0500\"") { Err(series) } else { Ok(series) }
    })
    .await;
    assert_eq!(left, many - each, "and of no other cluster");
}

/// The first four tables and the queue in OpenTelemetry's terms: name, type, unit.
const OTEL: &[(&str, &str, &str)] = &[
    ("klio.wal.written_size", "counter", "By"),
    ("klio.wal.written", "counter", ""),
    ("klio.wal.latest_written_time", "gauge", "s"),
    ("klio.consumer.written_size", "counter", "By"),
    ("klio.consumer.written", "counter", ""),
    ("klio.consumer.latest_written_time", "gauge", "s"),
    ("klio.consumer.backup_verification_success", "counter", ""),
    ("klio.consumer.backup_verification_failure", "counter", ""),
    ("klio.base.snapshots", "gauge", ""),
    ("klio.base.latest_snapshot_size", "gauge", "By"),
    ("klio.base.latest_snapshot_files", "gauge", ""),
    ("klio.base.latest_snapshot_dirs", "gauge", ""),
    ("klio.base.latest_snapshot_age", "gauge", "s"),
    ("klio.base.oldest_snapshot_age", "gauge", "s"),
    ("klio.backup.running", "gauge", ""),
    ("klio.backup.latest_start_time", "gauge", "s"),
    ("klio.backup.latest_completion_time", "gauge", "s"),
    ("klio.backup.latest_failure_time", "gauge", "s"),
    ("klio.backup.latest_duration_seconds", "gauge", "s"),
    ("klio.backup.successes", "counter", ""),
    ("klio.backup.failures", "counter", ""),
    ("klio.backup.verifications", "counter", ""),
    ("klio.backup.verification_failures", "counter", ""),
    ("klio.queue.messages", "gauge", ""),
    ("klio.queue.bytes", "gauge", "By"),
];

/// Name, type and unit of every metric that was pushed, and the sum of its points where it is a counter.
fn pushed(receiver: &Receiver) -> Vec<(String, &'static str, String, i64)> {
    let mut found = Vec::new();
    for arrival in receiver.of(Signal::Metrics) {
        let Message::Metrics(request) = arrival.message else { continue };
        let scopes = request.resource_metrics.into_iter().flat_map(|r| r.scope_metrics);
        for metric in scopes.flat_map(|scope| scope.metrics) {
            let (kind, total) = match &metric.data {
                Some(Data::Sum(sum)) if sum.is_monotonic => {
                    let value = |p: &NumberDataPoint| match p.value {
                        Some(Value::AsInt(n)) => n,
                        _ => 0,
                    };
                    ("counter", sum.data_points.iter().map(value).sum())
                }
                Some(Data::Gauge(_)) => ("gauge", 0),
                _ => ("other", 0),
            };
            found.push((metric.name, kind, metric.unit, total));
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_push_their_metrics_and_serve_nothing() {
    install_crypto();
    let (pg, s3) = (Postgres::builder().segment_mib(1).start().await, S3::new());
    let receiver = Receiver::new(Protocol::Http, None, Answer::Accept).await;
    let mut site = Site::new().await.tier2(&s3);
    site.set("OTEL_METRICS_EXPORTER", "prometheus,otlp");
    site.set("OTEL_METRIC_EXPORT_INTERVAL", "500");
    site.set("OTEL_EXPORTER_OTLP_ENDPOINT", &receiver.endpoint());
    site.start().await;
    let _stream = site.stream(&pg);
    pg.write_wal(2 << 20).await;
    let end = pg.switch_wal().await;
    pg.write_wal(1).await;
    site.wait_archived(end.segment_start(pg.segment_size().await)).await;
    let port = ports::free();
    let backup = |data_directory: &Path| {
        let mut command = site.klio_command(Some(&pg), &["backup"]);
        command
            .env("OTEL_METRICS_EXPORTER", "otlp,prometheus")
            .env("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint())
            .env("OTEL_EXPORTER_PROMETHEUS_PORT", port.to_string())
            .env("KLIO_POSTGRES__DATA_DIRECTORY", data_directory);
        Running::spawn("klio backup", command, &site.scratch("backup.log"))
    };
    let mut failing = backup(Path::new("/nonexistent"));
    assert!(!failing.wait_exit(PATIENCE).await.success(), "{}", failing.log());
    let mut taken = backup(&pg.data_dir());
    let served = async {
        while taken.is_running() {
            assert!(http::get(port, "/metrics").await.is_err(), "klio backup serves metrics");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, served).await.expect("klio backup to end");
    assert!(taken.wait_exit(PATIENCE).await.success(), "{}", taken.log());
    for (name, kind, unit) in OTEL {
        eventually(&format!("{name} to be pushed"), PATIENCE, || async {
            let found = pushed(&receiver);
            let of: Vec<_> = found.iter().filter(|metric| metric.0 == *name).collect();
            let right = of.iter().all(|m| m.1 == *kind && m.2 == *unit);
            if right && !of.is_empty() { Ok(()) } else { Err(format!("{of:?}")) }
        })
        .await;
    }
    let found = pushed(&receiver);
    for name in ["klio.backup.successes", "klio.backup.failures"] {
        assert!(found.iter().any(|metric| metric.0 == name && metric.3 == 1), "{name} is not 1");
    }
}
