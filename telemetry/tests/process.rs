//! Tests of `start` in separate processes: what is global to a process, and what its stderr shows.
//!
//! Each test runs this program again with only the test `child` selected and the variables under test; without them
//! `child` does nothing.

#![allow(
    clippy::unwrap_used,
    reason = "a test program; clippy's own exception covers test functions only"
)]

use klio_telemetry::{Delivery, Options};
use std::{
    collections::BTreeMap,
    process::{Command, Output},
    time::{Duration, Instant},
};

const CHILD: &str = "KLIO_TELEMETRY_TEST_CHILD";
/// Milliseconds that the child gives its flush; ten seconds if unset.
const FLUSH: &str = "KLIO_TELEMETRY_TEST_FLUSH";

fn run(variables: &[(&str, &str)]) -> Output {
    Command::new(std::env::current_exe().unwrap())
        .args(["child", "--exact", "--nocapture", "--test-threads=1"])
        .env_clear()
        .env(CHILD, "1")
        .envs(variables.iter().copied())
        .output()
        .unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

#[test]
fn child() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let before = threads();
        let overrides = BTreeMap::from([("OTEL_SERVICE_NAME".to_owned(), "file".to_owned())]);
        let telemetry = match klio_telemetry::start(Options {
            service: "klio",
            version: "1",
            debug: std::env::args().any(|a| a == "--debug"),
            log_format: None,
            log_filter: None,
            overrides,
        }) {
            Ok(telemetry) => telemetry,
            Err(error) => {
                eprintln!("refused: {error}");
                return;
            }
        };
        eprintln!("threads started: {}", threads() - before);
        {
            let span = tracing::info_span!(target: "klio_test", "work").entered();
            tracing::info!(target: "klio_test", "in the span");
            drop(span);
        }
        let flush =
            std::env::var_os(FLUSH).map_or(10_000, |ms| ms.to_str().unwrap().parse().unwrap());
        let delivery = telemetry.close(Duration::from_millis(flush)).await.overall();
        eprintln!("delivery: {delivery:?}");
        assert_ne!(delivery, Delivery::Delivered, "nobody is there to deliver to");
    });
}

#[test]
fn nothing_configured_starts_no_thread_and_still_logs_with_ids() {
    let output = run(&[]);
    let text = stderr(&output);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("threads started: 0"), "{text}");
    assert!(text.contains("delivery: Nothing"), "{text}");
    let line = text.lines().find(|l| l.contains("in the span")).unwrap();
    assert!(line.contains(" trace_id=") && !line.contains('\x1b'), "{line}");
}

#[test]
fn every_bad_variable_is_one_warning_and_the_program_goes_on() {
    let output = run(&[
        ("OTEL_TRACES_EXPORTER", "jaeger"),
        ("KLIO_LOG_FORMAT", "xml"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon"),
    ]);
    let text = stderr(&output);
    assert!(output.status.success(), "{text}");
    assert_eq!(text.matches(" WARN ").count(), 3, "{text}");
    for part in ["OTEL_TRACES_EXPORTER", "jaeger", "otlp, console, none", "KLIO_LOG_FORMAT", "xml"]
    {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(text.contains("in the span"), "{text}");
}

#[test]
fn strict_refuses_to_start() {
    let output = run(&[("OTEL_TRACES_EXPORTER", "jaeger"), ("KLIO_OTEL_STRICT", "true")]);
    let text = stderr(&output);
    assert!(text.contains("refused: telemetry is misconfigured: OTEL_TRACES_EXPORTER"), "{text}");
    assert!(!text.contains("in the span"), "{text}");
}

#[test]
fn a_dead_collector_is_one_warning_a_signal_and_changes_no_exit_status() {
    // Port 9 on loopback is the discard service, which nobody runs.
    let output = run(&[
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://user:hunter2@127.0.0.1:9"),
        ("OTEL_BSP_SCHEDULE_DELAY", "5"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "5"),
    ]);
    let text = stderr(&output);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("delivery: Pending"), "{text}");
    assert!(!text.contains("hunter2"), "{text}");
    let warnings: Vec<_> = text.lines().filter(|l| l.contains(" WARN ")).collect();
    for signal in ["traces", "metrics"] {
        let name = format!("signal=\"{signal}\"");
        let count = warnings.iter().filter(|l| l.contains(&name)).count();
        assert_eq!(count, 1, "{signal}: {text}");
    }
    assert_eq!(warnings.len(), 2, "{text}");
}

#[test]
fn a_hanging_collector_delays_the_exit_by_no_more_than_the_flush() {
    // Never accepted: the kernel accepts the connection and nobody answers.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    for protocol in ["http/protobuf", "grpc"] {
        let begin = Instant::now();
        let output = run(&[
            (FLUSH, "300"),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", protocol),
            ("OTEL_LOGS_EXPORTER", "otlp"),
        ]);
        let took = begin.elapsed();
        assert!(output.status.success() && stderr(&output).contains("delivery: Pending"));
        // Room for starting a process on a busy machine; the exporters themselves wait for ten seconds.
        assert!(took < Duration::from_secs(4), "{protocol}: {took:?}");
    }
}

#[test]
fn the_console_exporter_prints_spans_under_the_overriding_name() {
    let output = run(&[("OTEL_TRACES_EXPORTER", "console"), ("OTEL_SERVICE_NAME", "environment")]);
    let printed = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(printed.contains("work") && printed.contains("file"), "{printed}");
    assert!(!printed.contains("environment"), "{printed}");
}
