//! The metrics page has the documented names and passes promtool.

use super::*;
use opentelemetry::KeyValue;
use std::{io::Write, process::Command, process::Stdio};

/// The page of a telemetry with instruments of every documented kind.
fn page() -> String {
    let (telemetry, _, _) = built(false, &[("OTEL_METRICS_EXPORTER", "prometheus")]);
    let meter = telemetry.meter();
    let cluster = [KeyValue::new("cluster_name", "pg-1")];
    meter
        .u64_counter("klio.wal.written_size")
        .with_unit("By")
        .with_description("bytes of WAL files written to disk")
        .build()
        .add(16_777_216, &cluster);
    meter.u64_counter("klio.wal.written").build().add(1, &cluster);
    for (name, unit) in [
        ("klio.wal.latest_written_time", "s"),
        ("klio.backup.latest_duration_seconds", "s"),
        ("klio.base.latest_snapshot_size", "By"),
        ("klio.base.snapshots", ""),
        ("klio.queue.bytes", "By"),
        ("klio.queue.messages", ""),
    ] {
        meter
            .f64_gauge(name)
            .with_unit(unit)
            .with_description("text")
            .build()
            .record(5.0, &cluster);
    }
    meter
        .f64_histogram("klio.wal.ack_latency")
        .with_unit("s")
        .with_description("time from receiving to acknowledging")
        .build()
        .record(0.25, &cluster);
    telemetry.prometheus().unwrap().render()
}

#[tokio::test]
async fn names_are_the_contracts_with_each_suffix_once() {
    let page = page();
    for line in [
        "klio_wal_written_size_bytes_total{cluster_name=\"pg-1\"} 16777216",
        "klio_wal_written_total{cluster_name=\"pg-1\"} 1",
        "klio_wal_latest_written_time_seconds{cluster_name=\"pg-1\"} 5",
        "klio_backup_latest_duration_seconds{cluster_name=\"pg-1\"} 5",
        "klio_base_latest_snapshot_size_bytes{cluster_name=\"pg-1\"} 5",
        "klio_base_snapshots{cluster_name=\"pg-1\"} 5",
        "klio_queue_bytes{cluster_name=\"pg-1\"} 5",
        "klio_queue_messages{cluster_name=\"pg-1\"} 5",
        "klio_wal_ack_latency_seconds_count{cluster_name=\"pg-1\"} 1",
        "# HELP klio_wal_written_size_bytes_total bytes of WAL files written to disk",
        "# TYPE klio_wal_written_size_bytes_total counter",
    ] {
        assert!(page.lines().any(|l| l == line), "{line} is not in\n{page}");
    }
    for name in [
        "target_info{",
        "process_cpu_time_seconds_total{cpu_mode=\"user\"}",
        "process_memory_usage_bytes ",
        "process_threads ",
        "process_unix_file_descriptors ",
        "system_cpu_utilization_ratio ",
        "system_memory_limit_bytes ",
        "system_network_io_bytes_total{",
        "klio_runtime_workers ",
        "klio_runtime_busy_time_seconds_total{",
    ] {
        assert!(page.lines().any(|l| l.starts_with(name)), "{name} is not in\n{page}");
    }
}

#[tokio::test]
async fn promtool_finds_nothing_to_complain_about() {
    let page = page();
    let tools = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../.tools/bin");
    let mut promtool = Command::new(tools.join("promtool"))
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool must be in .tools/bin; hint: run `make test-tools`");
    promtool.stdin.take().unwrap().write_all(page.as_bytes()).unwrap();
    let output = promtool.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr) + String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.is_empty(), "promtool says:\n{said}\nof\n{page}");
}

#[test]
fn without_metrics_there_is_no_page_and_instruments_do_nothing() {
    let (telemetry, _, _) = built(false, &[]);
    assert!(telemetry.prometheus().is_none() && telemetry.metrics.is_none());
    telemetry.meter().u64_counter("klio.wal.written").build().add(1, &[]);
}

#[tokio::test]
async fn a_series_its_callback_no_longer_reports_is_gone() {
    let (telemetry, _, _) = built(false, &[("OTEL_METRICS_EXPORTER", "prometheus")]);
    let clusters = Arc::new(Mutex::new(vec!["a", "b"]));
    let known = Arc::clone(&clusters);
    telemetry
        .meter()
        .u64_observable_gauge("klio.base.snapshots")
        .with_callback(move |observer| {
            for cluster in known.lock().unwrap().iter() {
                observer.observe(1, &[KeyValue::new("cluster_name", *cluster)]);
            }
        })
        .build();
    let page = telemetry.prometheus().unwrap();
    assert!(page.render().contains("klio_base_snapshots{cluster_name=\"b\"} 1"));
    clusters.lock().unwrap().pop();
    let later = page.render();
    assert!(
        later.contains("cluster_name=\"a\"") && !later.contains("cluster_name=\"b\""),
        "{later}"
    );
}

/// docs/metrics.md is generated from the table, so a family that is only in one of the two is an error.
#[tokio::test]
async fn the_standard_metrics_are_those_of_the_table_with_its_types_and_meanings() {
    use crate::catalogue::{Kind, Row, STANDARD};
    let page = page();
    let types: std::collections::BTreeSet<&str> = page
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE "))
        .filter(|line| ["process_", "system_", "klio_runtime_"].iter().any(|p| line.starts_with(p)))
        .collect();
    let expected = |row: &Row| {
        let kind = match row.kind {
            Kind::UpDownCounter => "gauge",
            other => other.name(),
        };
        format!("{} {kind}", row.prometheus_name())
    };
    let table: std::collections::BTreeSet<String> = STANDARD.iter().map(expected).collect();
    let table: std::collections::BTreeSet<&str> = table.iter().map(String::as_str).collect();
    assert_eq!(types, table);
    for row in STANDARD {
        let help = format!("# HELP {} {}", row.prometheus_name(), row.meaning);
        assert!(page.lines().any(|line| line == help), "{help} is not in\n{page}");
        let sample = page.lines().find(|line| {
            line.strip_prefix(&row.prometheus_name()).is_some_and(|l| l.starts_with([' ', '{']))
        });
        let sample = sample.unwrap_or_else(|| panic!("{} has no series", row.name));
        for attribute in row.attributes {
            let label = format!("{}=", attribute.replace('.', "_"));
            assert!(sample.contains(&label), "{label} is not in {sample}");
        }
        assert_eq!(sample.matches('=').count(), row.attributes.len(), "{sample}");
    }
}

/// Nothing is merged into `otel_metric_overflow` with a thousand clusters of nine outcomes each.
#[tokio::test]
async fn a_thousand_clusters_overflow_no_instrument() {
    let (telemetry, _, _) = built(false, &[("OTEL_METRICS_EXPORTER", "prometheus")]);
    telemetry
        .meter()
        .u64_observable_counter("klio.consumer.offloads")
        .with_callback(|observer| {
            for cluster in 0..1000 {
                for outcome in 0..9 {
                    let name = KeyValue::new("cluster_name", format!("pg-{cluster}"));
                    observer.observe(1, &[name, KeyValue::new("outcome", outcome)]);
                }
            }
        })
        .build();
    let page = telemetry.prometheus().unwrap().render();
    let series = page.lines().filter(|l| l.starts_with("klio_consumer_offloads_total{")).count();
    assert_eq!(series, 9000);
    assert!(!page.contains("otel_metric_overflow"));
}
