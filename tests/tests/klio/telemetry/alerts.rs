//! The shipped alert rules and dashboards: valid, tested, explained, and speaking of metrics that exist.

use klio_tests::env;
use regex::Regex;
use std::{collections::BTreeSet, fs, process::Command};

fn read(path: &str) -> String {
    let path = env::repository().join(path);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("read {}: {e}", path.display()))
}

fn promtool(arguments: &[&str]) {
    let output = Command::new(env::tool("promtool"))
        .args(arguments)
        .current_dir(env::repository().join("deploy/prometheus"))
        .output()
        .expect("start promtool");
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&said));
}

fn alerts() -> BTreeSet<String> {
    let rule = Regex::new(r"(?m)^ +- alert: (\w+)$").expect("a pattern");
    let rules = read("deploy/prometheus/klio.rules.yml");
    rule.captures_iter(&rules).map(|found| found[1].to_owned()).collect()
}

/// The names on a metrics page, from the generated reference.
fn exported_names() -> BTreeSet<String> {
    let row =
        Regex::new(r"(?m)^\| [a-z0-9_.]+ \| (\w+) \| ?[^|]* ?\| (\w+) \|").expect("a pattern");
    let mut names = BTreeSet::new();
    for found in row.captures_iter(&read("docs/metrics.md")) {
        let name = &found[2];
        match &found[1] {
            "histogram" => {
                names.extend(["bucket", "sum", "count"].map(|part| format!("{name}_{part}")))
            }
            "counter" | "gauge" | "updowncounter" => names.extend([name.to_owned()]),
            other => panic!("{name}: expected a counter, gauge or histogram, found {other:?}"),
        }
    }
    assert!(names.len() > 90, "docs/metrics.md: expected a table of metrics, found {names:?}");
    names
}

#[test]
fn rules_are_valid() {
    promtool(&["check", "rules", "klio.rules.yml"]);
}

#[test]
fn every_alert_fires_when_it_should_and_a_day_of_idle_raises_none() {
    promtool(&["test", "rules", "klio.rules.test.yml"]);
}

#[test]
fn every_alert_is_tested_firing_and_silent() {
    let tests = read("deploy/prometheus/klio.rules.test.yml");
    for alert in alerts() {
        let firing =
            Regex::new(&format!(r"- alertname: {alert}\n +eval_time: \w+\n +exp_alerts:\n"));
        assert!(firing.expect("a pattern").is_match(&tests), "{alert} is never seen firing");
        let silent = format!("{{ alertname: {alert}, ");
        assert!(tests.contains(&silent), "{alert} is never seen silent");
    }
}

#[test]
fn every_alert_has_a_runbook_that_says_what_why_and_what_to_do() {
    let rules = read("deploy/prometheus/klio.rules.yml");
    for alert in alerts() {
        let page = format!("docs/runbooks/{alert}.md");
        assert!(rules.contains(&format!("runbook_url: {page}")), "{alert} does not link {page}");
        let text = read(&page);
        for heading in ["## What it means", "## How to see why", "## What to do"] {
            assert!(text.contains(heading), "{page}: no {heading:?}");
        }
    }
    let directory = env::repository().join("docs/runbooks");
    for entry in fs::read_dir(directory).expect("docs/runbooks") {
        let file = entry.expect("entry").file_name().into_string().expect("UTF-8");
        let alert = file.trim_end_matches(".md");
        assert!(alerts().contains(alert), "docs/runbooks/{file} belongs to no alert");
    }
}

/// Drift between code and dashboards or rules fails here.
#[test]
fn rules_dashboards_and_runbooks_name_only_metrics_that_exist() {
    let exported = exported_names();
    let name = Regex::new(r"\bklio_[a-z0-9_]+").expect("a pattern");
    let mut texts = vec![
        ("klio.rules.yml".to_owned(), read("deploy/prometheus/klio.rules.yml")),
        ("klio.rules.test.yml".to_owned(), read("deploy/prometheus/klio.rules.test.yml")),
    ];
    for directory in ["deploy/grafana", "docs/runbooks"] {
        for entry in fs::read_dir(env::repository().join(directory)).expect(directory) {
            let path = entry.expect("entry").path();
            texts.push((path.display().to_string(), fs::read_to_string(&path).expect("text")));
        }
    }
    assert!(texts.iter().any(|(file, _)| file.ends_with(".json")), "no dashboard found");
    for (file, text) in &texts {
        for found in name.find_iter(text) {
            assert!(exported.contains(found.as_str()), "{file} names {}", found.as_str());
        }
    }
}

/// Issue 4: what a user sees on the shipped dashboard.
#[test]
fn the_dashboard_shows_all_that_tells_whether_a_cluster_is_protected() {
    let dashboard = read("deploy/grafana/klio.json");
    for name in [
        "klio_wal_connected",
        "klio_wal_flush_lag_size_bytes",
        "klio_wal_flush_lag_time_seconds",
        "klio_wal_archive_lag_size_bytes",
        "klio_wal_archive_lag_time_seconds",
        "klio_wal_latest_written_time_seconds",
        "klio_consumer_latest_written_time_seconds",
        "klio_queue_messages",
        "klio_queue_oldest_age_seconds",
        "klio_base_latest_snapshot_age_seconds",
        "klio_backup_latest_duration_seconds",
        "klio_base_latest_snapshot_size_bytes",
        "klio_backup_failures_total",
        "klio_verify_latest_age_seconds",
        "klio_drill_latest_age_seconds",
        "klio_recovery_earliest_time_seconds",
        "klio_recovery_latest_time_seconds",
        "klio_wal_gaps",
        "klio_stream_slot_retained_size_bytes",
        "klio_stream_postgres_free_size_bytes",
        "klio_tier1_free_size_bytes",
        "klio_tls_certificate_expiry_time_seconds",
        "klio_stream_client_certificate_expiry_time_seconds",
    ] {
        assert!(dashboard.contains(name), "no panel with {name}");
    }
}
