//! The Collector's configuration in docs/telemetry.md does what the page says, word for word, with a real OpenTelemetry Collector.
//!
//! `make collector`, by hand: the registries that `make tools` may use have no Collector, so `make test` leaves this out
//! (`test = false` in Cargo.toml) instead of passing without it. Only addresses are replaced, each exactly as often as it is
//! printed. In Tempo's place is a receiver of OTLP over gRPC that decodes by the official definitions.

use klio_tests::{
    env,
    http::Metrics,
    install_crypto,
    otlp::{Answer, Protocol, Receiver},
    ports,
    postgres::Postgres,
    process::Running,
    scratch::Scratch,
    site::{PATIENCE, Site},
    wait::{eventually, eventually_now},
};
use std::{collections::BTreeSet, fs, path::Path, process::Command};

/// The printed configuration.
fn printed() -> String {
    let path = env::repository().join("docs/telemetry.md");
    let page = fs::read_to_string(&path).unwrap_or_else(|e| panic!("read {}: {e}", path.display()));
    let (_, rest) = page.split_once("\n```yaml otelcol.yaml\n").expect("the block begins");
    let (text, _) = rest.split_once("\n```").expect("the block ends");
    format!("{text}\n")
}

/// Replaces what is printed on the page once by what a test can use.
fn replaced(text: &str, printed: &str, by: &str) -> String {
    assert_eq!(text.matches(printed).count(), 1, "{printed} in\n{text}");
    text.replace(printed, by)
}

fn variables(endpoint: &str, page: Option<u16>) -> Vec<(&'static str, String)> {
    let metrics = if page.is_some() { "otlp,prometheus" } else { "otlp" };
    let mut all = vec![
        ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.to_owned()),
        ("OTEL_TRACES_EXPORTER", "otlp".into()),
        ("OTEL_METRICS_EXPORTER", metrics.into()),
        ("OTEL_LOGS_EXPORTER", "otlp".into()),
        // So that a test need not wait for the defaults.
        ("OTEL_BSP_SCHEDULE_DELAY", "100".into()),
        ("OTEL_METRIC_EXPORT_INTERVAL", "500".into()),
    ];
    if let Some(port) = page {
        all.push(("OTEL_EXPORTER_PROMETHEUS_HOST", "127.0.0.1".into()));
        all.push(("OTEL_EXPORTER_PROMETHEUS_PORT", port.to_string()));
    }
    all
}

/// A running OpenTelemetry Collector with the printed configuration.
struct Otelcol {
    running: Running,
    endpoint: String,
    metrics: u16,
    _scratch: Scratch,
}

impl Otelcol {
    async fn start(program: &Path, traces: &str) -> Self {
        let [grpc, http, metrics] = std::array::from_fn(|_| ports::free());
        let mut config = printed();
        for (printed, port) in
            [("localhost:4317", grpc), ("localhost:4318", http), ("localhost:8889", metrics)]
        {
            config = replaced(&config, printed, &format!("127.0.0.1:{port}"));
        }
        config = replaced(&config, "tempo:4317", traces);
        let scratch = Scratch::new("otelcol");
        let (file, quiet) = (scratch.join("otelcol.yaml"), scratch.join("quiet.yaml"));
        fs::write(&file, config).expect("write the configuration");
        // Its metrics of its own would want the fixed port 8888.
        fs::write(&quiet, "service: {telemetry: {metrics: {level: none}}}\n").expect("write");
        let mut command = Command::new(program);
        command.arg("--config").arg(&file).arg("--config").arg(&quiet);
        let mut running = Running::spawn("otelcol", command, &scratch.join("otelcol.log"));
        running.wait_log("Everything is ready", PATIENCE).await;
        let endpoint = format!("http://127.0.0.1:{http}");
        Self { running, endpoint, metrics, _scratch: scratch }
    }
}

/// Klio's own families on a metrics page.
fn families(page: &Metrics) -> BTreeSet<String> {
    page.names().into_iter().filter(|name| name.starts_with("klio_")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_printed_collector_takes_traces_metrics_and_logs_to_where_the_page_says() {
    install_crypto();
    let program = env::tool("otelcol");
    let tempo = Receiver::new(Protocol::Grpc, None, Answer::Accept).await;
    let tempo_address = tempo.endpoint().trim_start_matches("http://").to_owned();
    let mut otelcol = Otelcol::start(&program, &tempo_address).await;
    let pg = Postgres::builder().segment_mib(1).start().await;
    let mut site = Site::new().await;
    let own_page = ports::free();
    for (name, value) in variables(&otelcol.endpoint, Some(own_page)) {
        site.set(name, &value);
    }
    site.start().await;
    let mut command = site.klio_command(Some(&pg), &["stream"]);
    command.envs(variables(&otelcol.endpoint, None));
    let _stream = Running::spawn("klio stream", command, &site.scratch("page-stream.log"));
    pg.write_wal(2 << 20).await;
    let end = pg.switch_wal().await;
    pg.write_wal(1).await;
    site.wait_flushed(end).await;

    // Traces: one id of both programs arrives in Tempo's place.
    eventually_now("a trace of both programs behind the collector", PATIENCE, || {
        let spans = tempo.spans();
        let sent = spans.iter().filter(|s| s.name == "wal.send" && s.service == "klio");
        let both = sent.filter(|sent| {
            let server =
                |s: &&klio_tests::otlp::Span| s.service == "klio-server" && s.trace == sent.trace;
            spans.iter().filter(server).any(|s| s.name == "wal.receive")
        });
        (both.count() > 0).then_some(()).ok_or(spans.len())
    })
    .await;

    // Metrics: what Prometheus finds behind the collector has the names that alerts and dashboards ask for.
    let metrics = otelcol.metrics;
    eventually(
        "the server's metrics under the same names behind the collector",
        PATIENCE,
        || async move {
            let behind =
                Metrics::scrape(metrics).await.map(|page| families(&page)).unwrap_or_default();
            let direct =
                Metrics::scrape(own_page).await.map(|page| families(&page)).unwrap_or_default();
            let missing: Vec<String> = direct.difference(&behind).cloned().collect();
            let complete = missing.is_empty() && !direct.is_empty();
            (complete && behind.contains("klio_stream_flushed_lsn")).then_some(()).ok_or(missing)
        },
    )
    .await;

    // Logs: the stand-in for a log store got records.
    otelcol.running.wait_log("log records", PATIENCE).await;
}
