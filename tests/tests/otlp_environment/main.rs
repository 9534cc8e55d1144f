//! The environment table of the telemetry contract (section 3) as one test: variables, and what real receivers saw.
//!
//! Every row of [`rows::ROWS`] starts this program again as a small process that does a little traced work, so that the
//! variables are a process's real ones: the OpenTelemetry libraries read some of them themselves, behind our back. Each row has
//! receivers of its own; a row that says nothing about warnings expects none.

#![allow(
    clippy::unwrap_used,
    reason = "a test program; clippy's own exception covers test functions only"
)]

mod child;
mod rows;
mod see;

use klio_tests::{
    install_crypto,
    otlp::{Answer, Protocol, Receiver, Tls},
    ports,
};
use see::{See, Seen};
use std::{
    collections::BTreeMap,
    process::{Command, Stdio},
    sync::Arc,
};
use tokio::{sync::Semaphore, task::JoinSet};

/// Rows at a time: a little more than there are cores, as they mostly wait for each other.
const PARALLEL: usize = 3;

/// One line of the table.
struct Row {
    what: &'static str,
    /// `{http}` and the like stand for addresses, see [`Places`].
    variables: &'static [(&'static str, &'static str)],
    sees: &'static [See],
}

/// The receivers of a row, made when a variable names them, and files with certificates.
struct Places {
    tls: [Tls; 2],
    directory: tempfile::TempDir,
    /// A port that is taken.
    taken: std::net::TcpListener,
}

impl Places {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let tls = [Tls::new(false), Tls::new(true)];
        for (name, text) in [
            ("ca.pem", &tls[0].authority),
            ("mutual-ca.pem", &tls[1].authority),
            ("client.pem", &tls[1].client.cert),
            ("client.key", &tls[1].client.key),
            ("other.key", &tls[0].client.key),
            ("junk.pem", &"no certificate\n".to_owned()),
            (
                "broken.pem",
                &"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n".to_owned(),
            ),
        ] {
            std::fs::write(directory.path().join(name), text).unwrap();
        }
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        Self { tls, directory, taken }
    }

    /// `{name}` in a value becomes what it stands for.
    async fn fill(&self, value: &str, receivers: &mut BTreeMap<String, Receiver>) -> String {
        let mut filled = String::new();
        let mut rest = value;
        while let Some((before, after)) = rest.split_once('{') {
            let (name, after) = after.split_once('}').expect("a closing brace");
            filled += before;
            filled += &self.place(name, receivers).await;
            rest = after;
        }
        filled + rest
    }

    async fn place(&self, name: &str, receivers: &mut BTreeMap<String, Receiver>) -> String {
        if name.contains(".pem") || name.contains(".key") {
            return self.directory.path().join(name).display().to_string();
        }
        match name {
            "free" => return ports::free().to_string(),
            "taken" => return self.taken.local_addr().unwrap().port().to_string(),
            _ => {}
        }
        // `grpc@host` without a scheme; `grpc!` and a temper.
        let (name, bare) = name.split_once('@').map_or((name, false), |(name, _)| (name, true));
        if !receivers.contains_key(name) {
            let (kind, temper) = name.split_once('!').unwrap_or((name, ""));
            let protocol = if kind.starts_with("grpc") { Protocol::Grpc } else { Protocol::Http };
            let tls = match kind {
                "https" | "grpcs" => Some(&self.tls[0]),
                "https-mutual" | "grpcs-mutual" => Some(&self.tls[1]),
                _ => None,
            };
            let receiver = Receiver::new(protocol, tls, answer(temper)).await;
            receivers.insert(name.to_owned(), receiver);
        }
        let endpoint = receivers[name].endpoint();
        match endpoint.split_once("://") {
            Some((_, host)) if bare => host.to_owned(),
            _ => endpoint,
        }
    }
}

fn answer(temper: &str) -> Answer {
    match temper {
        "" | "b" => Answer::Accept,
        "hang" => Answer::Hang,
        "garbage" => Answer::Garbage,
        "die" => Answer::Die,
        "page" => Answer::Page,
        "slow" => Answer::Slow(std::time::Duration::from_millis(300)),
        "reject" => Answer::Reject(3),
        code => Answer::Status(code.parse().expect("a status")),
    }
}

async fn run(row: &'static Row, places: &Places) -> Vec<String> {
    let mut receivers = BTreeMap::new();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["child::child", "--exact", "--nocapture", "--test-threads=1"]);
    command.env_clear().env(child::SWITCH, "1").stdin(Stdio::null());
    for (name, value) in row.variables {
        command.env(name, places.fill(value, &mut receivers).await);
    }
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let seen = Seen {
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        receivers,
        directory: places.directory.path().display().to_string(),
    };
    let faults = see::faults(row.sees, &seen);
    let told = |fault| format!("{}: {fault}\n--- its stderr:\n{}", row.what, seen.stderr);
    faults.into_iter().map(told).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_variable_does_what_the_contract_says() {
    install_crypto();
    let places = Arc::new(Places::new());
    let room = Arc::new(Semaphore::new(PARALLEL));
    let mut tasks = JoinSet::new();
    for row in rows::ROWS {
        let (places, room) = (Arc::clone(&places), Arc::clone(&room));
        tasks.spawn(async move {
            let _turn = room.acquire().await.unwrap();
            run(row, &places).await
        });
    }
    let faults: Vec<String> = tasks.join_all().await.into_iter().flatten().collect();
    assert!(
        faults.is_empty(),
        "{} faults in {} rows:\n{}",
        faults.len(),
        rows::ROWS.len(),
        faults.join("\n")
    );
}

/// The contract's own table: no variable of it may be without a row.
#[test]
fn every_variable_of_the_contract_has_a_row() {
    let signals = ["", "TRACES_", "METRICS_", "LOGS_"];
    let otlp = [
        "ENDPOINT",
        "PROTOCOL",
        "HEADERS",
        "COMPRESSION",
        "TIMEOUT",
        "INSECURE",
        "CERTIFICATE",
        "CLIENT_CERTIFICATE",
        "CLIENT_KEY",
    ];
    let mut all: Vec<String> = otlp
        .iter()
        .flat_map(|suffix| signals.map(|signal| format!("OTEL_EXPORTER_OTLP_{signal}{suffix}")))
        .collect();
    let batch = ["SCHEDULE_DELAY", "MAX_QUEUE_SIZE", "MAX_EXPORT_BATCH_SIZE", "EXPORT_TIMEOUT"];
    all.extend(batch.iter().flat_map(|s| ["BSP", "BLRP"].map(|p| format!("OTEL_{p}_{s}"))));
    all.extend(
        [
            "OTEL_SDK_DISABLED",
            "OTEL_SERVICE_NAME",
            "OTEL_RESOURCE_ATTRIBUTES",
            "OTEL_RESOURCE_DETECTORS",
            "OTEL_TRACES_EXPORTER",
            "OTEL_METRICS_EXPORTER",
            "OTEL_LOGS_EXPORTER",
            "OTEL_METRIC_EXPORT_INTERVAL",
            "OTEL_METRIC_EXPORT_TIMEOUT",
            "OTEL_TRACES_SAMPLER",
            "OTEL_TRACES_SAMPLER_ARG",
            "OTEL_PROPAGATORS",
            "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE",
            "OTEL_EXPORTER_PROMETHEUS_HOST",
            "OTEL_EXPORTER_PROMETHEUS_PORT",
            "CONTAINER_NAME",
            "POD_NAME",
            "NAMESPACE_NAME",
            "KLIO_OTEL_STRICT",
            "KLIO_LOG_FORMAT",
            "RUST_LOG",
        ]
        .map(str::to_owned),
    );
    let used =
        |name: &String| rows::ROWS.iter().any(|r| r.variables.iter().any(|(n, _)| n == name));
    let missing: Vec<_> = all.iter().filter(|name| !used(name)).collect();
    assert!(missing.is_empty(), "{missing:?}");
}
