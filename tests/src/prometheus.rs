//! A real Prometheus server (Debian's package) that scrapes metrics pages on loopback, and questions to it.

use crate::{env, http, ports, process::Running, scratch::Scratch, wait::eventually};
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    process::Command,
    time::Duration,
};

/// Starting takes a second alone.
const DEADLINE: Duration = Duration::from_secs(60);

/// Labels of a series but its name.
pub type Labels = BTreeMap<String, String>;

/// The server; it stops when dropped.
pub struct Prometheus {
    port: u16,
    _running: Running,
    _scratch: Scratch,
}

/// What Prometheus says a metric is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meaning {
    /// `counter`, `gauge`, `histogram`.
    pub kind: String,
    /// The help text.
    pub help: String,
}

impl Prometheus {
    /// Starts one that scrapes these ports of 127.0.0.1 every second, each a job of its own.
    ///
    /// # Panics
    /// When it does not start.
    pub async fn scraping(jobs: &[(&str, u16)]) -> Self {
        let scratch = Scratch::new("prometheus");
        let mut config =
            "global: { scrape_interval: 1s, scrape_timeout: 1s }\nscrape_configs:\n".to_owned();
        for (job, port) in jobs {
            config += &format!(
                "  - {{ job_name: {job}, static_configs: [ {{ targets: [\"127.0.0.1:{port}\"] }} ] }}\n"
            );
        }
        let file = scratch.join("prometheus.yml");
        std::fs::write(&file, config).expect("write to the scratch directory");
        let port = ports::free();
        let mut command = Command::new(env::tool("prometheus"));
        command.args(["--log.level=warn", "--storage.tsdb.retention.time=1h"]);
        command.arg(format!("--config.file={}", file.display()));
        command.arg(format!("--storage.tsdb.path={}", scratch.join("data").display()));
        command.arg(format!("--web.listen-address=127.0.0.1:{port}"));
        let running = Running::spawn("prometheus", command, &scratch.join("prometheus.log"));
        let this = Self { port, _running: running, _scratch: scratch };
        eventually("Prometheus to be ready", DEADLINE, || async {
            http::get(port, "/-/ready").await.is_ok_and(|(status, _)| status == 200)
        })
        .await;
        this
    }

    async fn ask(&self, path: &str) -> Value {
        let (status, body) = http::get(self.port, path).await.expect("ask Prometheus");
        let answer: Value = serde_json::from_str(&body).expect("an answer in JSON");
        assert!(status == 200 && answer["status"] == "success", "{path}: {body}");
        answer["data"].clone()
    }

    /// `/api/v1/metadata`: every metric there is, by name.
    ///
    /// # Panics
    /// When Prometheus does not answer, or two programs tell different things of a metric.
    pub async fn metadata(&self) -> BTreeMap<String, Meaning> {
        let data = self.ask("/api/v1/metadata").await;
        let meaning = |(name, entries): (&String, &Value)| {
            let entries = entries.as_array().expect("a list");
            assert_eq!(entries.len(), 1, "{name} means different things: {entries:?}");
            let text = |key: &str| entries[0][key].as_str().unwrap_or_default().to_owned();
            (name.clone(), Meaning { kind: text("type"), help: text("help") })
        };
        data.as_object().expect("metrics by name").iter().map(meaning).collect()
    }

    /// `/api/v1/query`: the series that an expression gives now, with their values.
    ///
    /// # Panics
    /// When Prometheus does not answer.
    pub async fn query(&self, expression: &str) -> Vec<(Labels, f64)> {
        let encoded: String = url::form_urlencoded::byte_serialize(expression.as_bytes()).collect();
        let data = self.ask(&format!("/api/v1/query?query={encoded}")).await;
        let series = data["result"].as_array().expect("a vector").iter();
        let series = series.map(|series| {
            let labels = series["metric"].as_object().expect("labels").iter();
            let labels = labels.map(|(k, v)| (k.clone(), v.as_str().unwrap_or_default().into()));
            let value = series["value"][1].as_str().and_then(|v| v.parse().ok());
            (labels.collect(), value.expect("a number"))
        });
        series.collect()
    }

    /// The names of a series' labels but those that Prometheus itself adds.
    #[must_use]
    pub fn label_names(labels: &Labels) -> BTreeSet<&str> {
        let own = ["__name__", "job", "instance"];
        labels.keys().map(String::as_str).filter(|name| !own.contains(name)).collect()
    }
}
