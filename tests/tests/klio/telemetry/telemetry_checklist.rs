//! The checklist at the end of docs/telemetry.md cannot rot: every test that it names is there, and every line of the contract has one.

use klio_tests::env;
use regex::Regex;
use std::{collections::BTreeSet, fs};

/// Metrics whose names are fixed: dashboards and alerts of users depend on them. Never remove a line.
const METRICS: [&str; 31] = [
    "klio.wal.written_size",
    "klio.wal.written",
    "klio.wal.latest_written_time",
    "klio.consumer.written_size",
    "klio.consumer.written",
    "klio.consumer.latest_written_time",
    "klio.consumer.backup_verification_success",
    "klio.consumer.backup_verification_failure",
    "klio.base.snapshots",
    "klio.base.latest_snapshot_size",
    "klio.base.latest_snapshot_files",
    "klio.base.latest_snapshot_dirs",
    "klio.base.latest_snapshot_age",
    "klio.base.oldest_snapshot_age",
    "klio.backup.running",
    "klio.backup.latest_start_time",
    "klio.backup.latest_completion_time",
    "klio.backup.latest_failure_time",
    "klio.backup.latest_duration_seconds",
    "klio.backup.successes",
    "klio.backup.failures",
    "klio.backup.verifications",
    "klio.backup.verification_failures",
    "klio.queue.messages",
    "klio.queue.bytes",
    "rpc.server.call.duration",
    "rpc.client.call.duration",
    "system.cpu",
    "system.memory",
    "system.network",
    "process.",
];

/// Variables of section 3, each of which must be in a row of its own or with its kin.
const VARIABLES: [&str; 27] = [
    "OTEL_SDK_DISABLED",
    "OTEL_SERVICE_NAME",
    "OTEL_RESOURCE_ATTRIBUTES",
    "OTEL_RESOURCE_DETECTORS",
    "OTEL_TRACES_EXPORTER",
    "OTEL_METRICS_EXPORTER",
    "OTEL_LOGS_EXPORTER",
    "ENDPOINT",
    "PROTOCOL",
    "HEADERS",
    "COMPRESSION",
    "TIMEOUT",
    "INSECURE",
    "CLIENT_CERTIFICATE",
    "CLIENT_KEY",
    "OTEL_METRIC_EXPORT_INTERVAL",
    "OTEL_METRIC_EXPORT_TIMEOUT",
    "OTEL_BSP_",
    "OTEL_BLRP_",
    "OTEL_TRACES_SAMPLER",
    "OTEL_PROPAGATORS",
    "TEMPORALITY_PREFERENCE",
    "OTEL_EXPORTER_PROMETHEUS_HOST",
    "CONTAINER_NAME",
    "KLIO_OTEL_STRICT",
    "KLIO_LOG_FORMAT",
    "KLIO_TELEMETRY__",
];

struct Row {
    line: String,
    tests: Vec<(String, String)>,
}

/// The rows of the checklist: what the contract says, and `file.rs::test`.
fn checklist() -> Vec<Row> {
    let path = env::repository().join("docs/telemetry.md");
    let page = fs::read_to_string(&path).expect("read docs/telemetry.md");
    let heading = "\n## The contract, line by line\n";
    let (_, list) = page.split_once(heading).expect("the page ends with the checklist");
    let test = Regex::new(r"`([\w/]+\.rs)::(\w+)`").expect("a pattern");
    let rows = list.lines().filter(|l| l.starts_with("| ") && !l.starts_with("| contract"));
    rows.map(|row| {
        // A bar inside a cell is written \|.
        let cells: Vec<&str> = row.trim_matches('|').rsplitn(2, " | ").collect();
        let [tests, line] = cells.as_slice() else { panic!("two columns: {row}") };
        let named = |found: regex::Captures<'_>| (found[1].to_owned(), found[2].to_owned());
        Row {
            line: (*line).trim().to_owned(),
            tests: test.captures_iter(tests).map(named).collect(),
        }
    })
    .collect()
}

#[test]
fn every_line_of_the_contract_names_a_test_and_every_test_is_there() {
    let rows = checklist();
    assert!(rows.len() > 40, "the checklist has {} rows only", rows.len());
    for Row { line, tests } in rows {
        assert!(!tests.is_empty(), "{line}: expected `file.rs::test`, found none");
        for (file, name) in tests {
            let text = fs::read_to_string(env::repository().join(&file));
            let text = text.unwrap_or_else(|e| panic!("{line}: read {file}: {e}"));
            let function =
                format!(r"#\[(tokio::)?test[^\]]*\]\s+(#\[[^\]]*\]\s+)*(async )?fn {name}\(");
            let function = Regex::new(&function);
            // Property tests stand in a macro and have the attribute, too.
            assert!(
                function.expect("a pattern").is_match(&text),
                "{line}: no test {name} in {file}"
            );
        }
    }
}

#[test]
fn every_metric_of_the_contract_is_in_the_checklist_and_klio_s_own_in_the_reference() {
    let lines: Vec<String> = checklist().into_iter().map(|row| row.line).collect();
    let reference = fs::read_to_string(env::repository().join("docs/metrics.md"));
    let reference = reference.expect("read docs/metrics.md");
    for metric in METRICS {
        assert!(lines.iter().any(|line| line.contains(metric)), "{metric} is in no row");
        let own = metric.starts_with("klio.");
        let row = format!("| {metric} |");
        assert!(!own || reference.contains(&row), "{metric} is not in docs/metrics.md");
    }
}

#[test]
fn every_variable_of_the_contract_is_in_the_checklist_and_explained_on_the_page() {
    let lines: Vec<String> = checklist().into_iter().map(|row| row.line).collect();
    let page = fs::read_to_string(env::repository().join("docs/telemetry.md")).expect("read");
    let (how_to, _) = page.split_once("\n## The contract").expect("the checklist is last");
    for variable in VARIABLES {
        assert!(lines.iter().any(|line| line.contains(variable)), "{variable} is in no row");
        assert!(how_to.contains(variable), "{variable} is not explained");
    }
}

/// Two names alike in one row would hide that one of them is missing.
#[test]
fn no_row_names_a_test_twice() {
    for Row { line, tests } in checklist() {
        let each: BTreeSet<_> = tests.iter().collect();
        assert_eq!(each.len(), tests.len(), "{line}");
    }
}
