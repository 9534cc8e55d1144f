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

/// The names on a metrics page, from the generated reference: dots, unit and `_total` by the
/// OpenTelemetry-to-Prometheus rules.
fn exported_names() -> BTreeSet<String> {
    let row = Regex::new(r"(?m)^\| (klio\.[a-z0-9_.]+) \| (\w+) \| ?(\w*) ?\|").expect("a pattern");
    let mut names = BTreeSet::new();
    for found in row.captures_iter(&read("docs/metrics.md")) {
        let mut name = found[1].replace('.', "_");
        let unit = match &found[3] {
            "By" => "_bytes",
            "s" => "_seconds",
            "" => "",
            other => panic!("{}: expected unit By, s or none, found {other:?}", &found[1]),
        };
        if !name.ends_with(unit) {
            name.push_str(unit);
        }
        match &found[2] {
            "counter" => names.extend([format!("{name}_total")]),
            "histogram" => {
                names.extend(["bucket", "sum", "count"].map(|part| format!("{name}_{part}")))
            }
            _ => names.extend([name]),
        }
    }
    assert!(names.len() > 20, "docs/metrics.md: expected a table of metrics, found {names:?}");
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
    let folder = env::repository().join("docs/runbooks");
    for entry in fs::read_dir(folder).expect("docs/runbooks") {
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
    for folder in ["deploy/grafana", "docs/runbooks"] {
        for entry in fs::read_dir(env::repository().join(folder)).expect(folder) {
            let path = entry.expect("entry").path();
            texts.push((path.display().to_string(), fs::read_to_string(&path).expect("text")));
        }
    }
    assert!(texts.iter().any(|(file, _)| file.ends_with(".json")), "no dashboard found");
    for (file, text) in texts {
        for found in name.find_iter(&text) {
            assert!(exported.contains(found.as_str()), "{file} names {}", found.as_str());
        }
    }
}
