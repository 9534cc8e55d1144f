//! The process whose variables are under test: starts telemetry, does some work, flushes, tells what became of it.

use klio_telemetry::{Options, Problem, Telemetry, propagate};
use opentelemetry::KeyValue;
use std::{collections::BTreeMap, time::Duration};

/// Without it [`child`] does nothing, as it is a test of its own to the harness.
pub const SWITCH: &str = "KLIO_TEST_CHILD";

fn variable(name: &str) -> Option<String> {
    std::env::var_os(name).map(|value| value.to_string_lossy().into_owned())
}

fn number(name: &str, default: u64) -> u64 {
    variable(name).map_or(default, |text| text.parse().unwrap())
}

#[test]
fn child() {
    if variable(SWITCH).is_none() {
        return;
    }
    let runtime = if variable("TEST_ONE_THREAD").is_some() {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
    } else {
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
    };
    runtime.block_on(work());
}

/// `TEST_FILE`: what the configuration file would say, `name=value` joined by `;`.
fn overrides() -> BTreeMap<String, String> {
    let text = variable("TEST_FILE").unwrap_or_default();
    let pairs = text.split(';').filter_map(|pair| pair.split_once('='));
    pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

async fn work() {
    let before = threads();
    let started = klio_telemetry::start(Options {
        service: "klio",
        version: "1.2.3",
        debug: variable("TEST_DEBUG").is_some(),
        log_format: None,
        log_filter: None,
        overrides: overrides(),
    });
    let telemetry = match started {
        Ok(telemetry) => telemetry,
        Err(error) => {
            eprintln!("child: refused: {error}");
            return;
        }
    };
    eprintln!("child: threads={}", threads() - before);
    if let Err(error) = page(&telemetry) {
        eprintln!("child: refused: {error}");
        return;
    }
    measured(&telemetry);
    traced();
    many().await;
    if variable("TEST_PANIC").is_some() {
        panics().await;
    }
    tokio::time::sleep(Duration::from_millis(number("TEST_WAIT", 0))).await;
    let flush = Duration::from_millis(number("TEST_FLUSH", 10_000));
    let begin = std::time::Instant::now();
    let end = telemetry.close(flush).await;
    let took = begin.elapsed();
    eprintln!("child: late={} quick={}", took > flush + Duration::from_secs(2), took < flush / 2);
    eprintln!("child: traces={:?} metrics={:?} logs={:?}", end.traces, end.metrics, end.logs);
}

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

/// Shows the metrics page, as the programs do, and where it is to be served.
fn page(telemetry: &Telemetry) -> Result<(), klio_telemetry::Error> {
    let Some(page) = telemetry.prometheus() else { return Ok(()) };
    eprintln!("child: page={}:{}", page.host, page.port);
    if variable("TEST_NO_BIND").is_some() {
        return Ok(());
    }
    if let Err(error) = std::net::TcpListener::bind((page.host.as_str(), page.port)) {
        telemetry.misconfigured(Problem {
            variable: "OTEL_EXPORTER_PROMETHEUS_PORT".into(),
            value: page.port.to_string(),
            expected: format!("a port that is free ({error})"),
        })?;
    }
    Ok(())
}

fn measured(telemetry: &Telemetry) {
    let meter = telemetry.meter();
    meter.u64_counter("klio.test.things").build().add(3, &[KeyValue::new("cluster_name", "pg-1")]);
    meter.u64_histogram("klio.test.sizes").build().record(5, &[]);
    meter.i64_up_down_counter("klio.test.level").build().add(1, &[]);
    if let Some(page) = telemetry.prometheus() {
        for line in page.render().lines().filter(|line| line.starts_with("klio_test_things")) {
            eprintln!("child: {line}");
        }
    }
}

/// A span with a child, in the trace of `TEST_PARENT` if that is set.
fn traced() {
    let span = tracing::info_span!(target: "klio_test", "work", bytes = 7);
    let carrier = [("traceparent", "TEST_PARENT"), ("baggage", "TEST_BAGGAGE")];
    propagate::adopt(&span, &|key| {
        carrier.iter().find(|(name, _)| *name == key).and_then(|(_, from)| variable(from))
    });
    span.in_scope(|| {
        tracing::info!(target: "klio_test", "inside");
        tracing::info_span!(target: "klio_test", "inner").in_scope(|| {});
        propagate::inject(&mut |key, value| eprintln!("child: carrier {key}={value}"));
    });
    tracing::info!(target: "klio_test", "outside");
    tracing::debug!(target: "klio_test", "deep");
}

/// Something goes wrong for good, below a span.
async fn panics() {
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(async {
        let _span = tracing::info_span!(target: "klio_test", "doomed").entered();
        panic!("on purpose");
    });
    while tasks.join_next().await.is_some() {}
}

/// `TEST_SPANS` spans and lines more, `TEST_PACE` milliseconds between them.
async fn many() {
    let pace = Duration::from_millis(number("TEST_PACE", 0));
    for _ in 0..number("TEST_SPANS", 0) {
        tracing::info_span!(target: "klio_test", "many").in_scope(|| {});
        tracing::info!(target: "klio_test", "one of many");
        if !pace.is_zero() {
            tokio::time::sleep(pace).await;
        }
    }
}
