//! docs/telemetry.md does what it says: its configurations are taken from the page, word for word, and run.
//!
//! Only addresses are replaced, each exactly as often as it is printed, because a test has no fixed ports. The Collector's part is in
//! `collector.rs`.

use klio_tests::{
    env, http, install_crypto, ports,
    postgres::Postgres,
    process::Running,
    scratch::Scratch,
    site::{PATIENCE, Site},
    wait::eventually,
};
use regex::Regex;
use serde_json::Value;
use std::{fs, path::Path, process::Command};

fn page() -> String {
    let path = env::repository().join("docs/telemetry.md");
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("read {}: {e}", path.display()))
}

/// The block of the page with this language and name after its opening fence.
fn block(fence: &str) -> String {
    let page = page();
    let begin = format!("\n```{fence}\n");
    let (_, rest) = page.split_once(&begin).unwrap_or_else(|| panic!("no block {fence:?}"));
    let (text, _) = rest.split_once("\n```").expect("the block ends");
    format!("{text}\n")
}

/// Replaces what is printed on the page `times` times by what a test can use.
fn replaced(text: &str, printed: &str, times: usize, by: &str) -> String {
    assert_eq!(text.matches(printed).count(), times, "{printed} in\n{text}");
    text.replace(printed, by)
}

/// A configuration of Prometheus in a directory of its own, beside the shipped rules, as the page says.
fn prometheus_directory(config: &str) -> Scratch {
    let scratch = Scratch::new("page");
    let rules = env::repository().join("deploy/prometheus/klio.rules.yml");
    fs::copy(rules, scratch.join("klio.rules.yml")).expect("copy the rules");
    fs::write(scratch.join("prometheus.yml"), config).expect("write the configuration");
    scratch
}

#[test]
fn the_printed_prometheus_configurations_are_valid() {
    for fence in ["yaml prometheus.yml", "yaml prometheus-collector.yml"] {
        let directory = prometheus_directory(&block(fence));
        let output = Command::new(env::tool("promtool"))
            .args(["check", "config", "prometheus.yml"])
            .current_dir(directory.path())
            .output()
            .expect("start promtool");
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(output.status.success() && said.contains("1 rule files found"), "{fence}: {said}");
    }
}

/// The first value of a query's answer, as Prometheus writes it.
async fn query(port: u16, query: &str) -> Option<String> {
    let path = format!("/api/v1/query?query={query}");
    let (_, body) = http::get(port, &path).await.ok()?;
    let answer: Value = serde_json::from_str(&body).ok()?;
    answer["data"]["result"][0]["value"][1].as_str().map(str::to_owned)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_prometheus_with_the_printed_configuration_sees_both_programs_and_has_the_rules() {
    install_crypto();
    let [server, sidecar, port] = std::array::from_fn(|_| ports::free());
    let mut config = block("yaml prometheus.yml");
    for (printed, page) in [("localhost:9464", server), ("localhost:9465", sidecar)] {
        config = replaced(&config, printed, 1, &format!("127.0.0.1:{page}"));
    }
    // A test need not wait that long for the next scrape.
    let directory = prometheus_directory(&replaced(&config, "15s", 2, "1s"));
    let page = |port: u16| {
        [
            ("OTEL_METRICS_EXPORTER", "prometheus".to_owned()),
            ("OTEL_EXPORTER_PROMETHEUS_HOST", "127.0.0.1".to_owned()),
            ("OTEL_EXPORTER_PROMETHEUS_PORT", port.to_string()),
        ]
    };
    let pg = Postgres::builder().segment_mib(1).start().await;
    let mut site = Site::new().await;
    for (name, value) in page(server) {
        site.set(name, &value);
    }
    site.start().await;
    let mut command = site.klio_command(Some(&pg), &["stream"]);
    command.envs(page(sidecar));
    let _stream = Running::spawn("klio stream", command, &site.scratch("page-stream.log"));
    let mut command = Command::new(env::tool("prometheus"));
    command
        .args(["--config.file=prometheus.yml", "--storage.tsdb.path=data"])
        .arg(format!("--web.listen-address=127.0.0.1:{port}"))
        .current_dir(directory.path());
    let mut prometheus = Running::spawn("prometheus", command, &directory.join("prometheus.log"));
    for of in ["klio_wal_connected{job=%22klio-server%22}", "klio_stream_connected{job=%22klio%22}"]
    {
        eventually(of, PATIENCE, || {
            assert!(prometheus.is_running(), "{}", prometheus.log());
            async move {
                match query(port, of).await {
                    Some(value) if value == "1" => Ok(()),
                    other => Err(other),
                }
            }
        })
        .await;
    }
    let (_, rules) = http::get(port, "/api/v1/rules").await.expect("ask for the rules");
    assert!(rules.contains("KlioStreamDown"), "{rules:.500}");
}

/// Drift between the page and the programs' own list of settings fails here.
#[test]
fn the_printed_section_of_the_file_names_settings_that_both_programs_have() {
    let settings = fs::read_to_string(env::repository().join("docs/configuration.md"));
    let settings = settings.expect("read docs/configuration.md");
    let text = block("toml telemetry section");
    let names: Vec<&str> =
        text.lines().filter_map(|l| l.split_once(" = ").map(|(n, _)| n)).collect();
    assert!(names.len() > 5, "{names:?}");
    for name in names {
        let row = format!("| `telemetry.{name}` |");
        assert_eq!(settings.matches(&row).count(), 2, "{row} of klio-server and of klio");
    }
}

/// All of the telemetry crate's sources but its tests.
fn sources(directory: &Path, text: &mut String) {
    for entry in fs::read_dir(directory).expect("read the sources").flatten() {
        let path = entry.path();
        let is_tests = path.file_stem().is_some_and(|stem| stem == "tests");
        if path.is_dir() && !is_tests {
            sources(&path, text);
        } else if path.is_file() && !is_tests {
            text.push_str(&fs::read_to_string(&path).expect("read a source"));
        }
    }
}

#[test]
fn the_warnings_of_the_troubleshooting_table_are_those_of_the_code() {
    let mut code = String::new();
    sources(&env::repository().join("telemetry/src"), &mut code);
    let page = page();
    let (_, table) = page.split_once("\n## Troubleshooting\n").expect("the table");
    let (table, _) = table.split_once("\n## ").expect("something after it");
    // Whole messages, and what was expected.
    let texts = Regex::new(
        r#"`(telemetry [a-z][^`=]*?|the collector [a-z][^`=]*?)(?: variable=[^`]*)?`|expected="([^"`]+)""#,
    );
    let texts = texts.expect("a pattern");
    let found = texts.captures_iter(table).filter_map(|found| found.get(1).or(found.get(2)));
    let found: Vec<&str> = found.map(|text| text.as_str()).filter(|t| *t != "...").collect();
    assert!(found.len() >= 6, "{found:?}");
    for text in found {
        // The name of a variable is put in where the message is made.
        let fixed = text.trim_start_matches("OTEL_EXPORTER_OTLP_CLIENT_KEY").trim();
        assert!(code.contains(fixed), "no {fixed:?} in telemetry/src");
    }
}
