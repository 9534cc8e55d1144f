//! Telemetry of one command: its options, the root span `cli.<command>`, and the closing line.
//!
//! - Every verb runs below its root span ([`root_span`], a match over [`Command`]: a new verb without one does not
//!   compile).
//! - Telemetry never changes the output of a command. The console exporter writes to standard output, so it is off
//!   where standard output is a file's content or a protocol.

use super::Command;
use crate::{
    config::{Config, ConfigError, TelemetryConfig, environment},
    encryption::KeyProblem,
};
use anyhow::Context;
use futures::FutureExt;
use klio_telemetry::{Delivery, Options, propagate, redact::redact_arguments};
use std::{collections::BTreeMap, io::Write, panic::AssertUnwindSafe, path::Path, time::Duration};
use tokio::signal::unix::{SignalKind, signal};
use tracing::{Instrument, Span, field::Empty};
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// Telemetry may delay the exit by this much (P9).
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);

/// The exporters that can be `console`.
const EXPORTERS: [&str; 3] =
    ["OTEL_TRACES_EXPORTER", "OTEL_METRICS_EXPORTER", "OTEL_LOGS_EXPORTER"];

/// The options from `[telemetry]`.
pub fn options(telemetry: &TelemetryConfig, debug: bool) -> Options {
    Options {
        service: "klio-server",
        version: env!("CARGO_PKG_VERSION"),
        debug,
        log_format: None,
        log_filter: None,
        overrides: telemetry.overrides(),
    }
}

/// Options for a command whose standard output is not for people, and which ends before anybody reads a metric.
pub fn quiet_options(telemetry: &TelemetryConfig, debug: bool) -> Options {
    let mut options = options(telemetry, debug);
    without_console(&mut options.overrides, &|name| environment(name));
    options.overrides.insert("OTEL_METRICS_EXPORTER".into(), "none".into());
    options
}

fn without_console(overrides: &mut BTreeMap<String, String>, get: &dyn Fn(&str) -> Option<String>) {
    for name in EXPORTERS {
        let Some(list) = overrides.get(name).cloned().or_else(|| get(name)) else { continue };
        let others: Vec<&str> =
            list.split(',').map(str::trim).filter(|e| !e.eq_ignore_ascii_case("console")).collect();
        let others = if others.is_empty() { "none".to_owned() } else { others.join(",") };
        overrides.insert(name.to_owned(), others);
    }
}

/// The span `cli.<command>`, with the arguments as typed except secrets; below the caller's span if `TRACEPARENT`
/// names one.
pub fn root_span(command: &Command) -> Span {
    macro_rules! span {
        ($name:literal) => {
            tracing::info_span!($name, otel.status_code = Empty, error.r#type = Empty)
        };
    }
    let span = match command {
        Command::Init(_) => span!("cli.init"),
        Command::Keygen(_) => span!("cli.keygen"),
        Command::Key(_) => span!("cli.key"),
        Command::Backup(_) => span!("cli.backup"),
        Command::Run(_) => span!("cli.run"),
        Command::Client(_) => span!("cli.client"),
        Command::Repository(_) => span!("cli.repository"),
        Command::Reference(_) => span!("cli.reference"),
    };
    propagate::adopt(&span, &|key| environment(&key.to_ascii_uppercase()));
    let words = std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned());
    span.set_attribute("cli.arguments", redact_arguments(words).join(" "));
    span
}

/// Marks the root span when the command failed.
pub fn record(span: &Span, result: &anyhow::Result<()>) {
    let Err(error) = result else { return };
    span.record("otel.status_code", "ERROR");
    span.record("error.type", error_type(error));
}

/// The kind of an error, from a closed set.
fn error_type(error: &anyhow::Error) -> &'static str {
    if error.downcast_ref::<KeyProblem>().is_some() {
        "KEY"
    } else if error.downcast_ref::<ConfigError>().is_some() {
        "CONFIG"
    } else {
        "FAILED"
    }
}

/// Prints the last line of a command whose spans are exported.
pub fn epilogue(trace: Option<String>, delivery: Delivery) {
    if let Some(line) = delivery.closing_line(trace) {
        // A closed standard error must not become a panic.
        let _ = writeln!(std::io::stderr(), "{line}");
    }
}

/// Turns a panic into an error, so that queued spans are flushed after it as well. Its message and place are on
/// standard error already.
pub async fn caught(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let ended = AssertUnwindSafe(work).catch_unwind().await;
    ended.unwrap_or_else(|_| Err(anyhow::anyhow!("panicked")))
}

/// Turns a signal into an error, for subcommands that do not handle signals themselves.
async fn interruptible(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    tokio::select! {
        result = work => result,
        _ = terminate.recv() => Err(anyhow::anyhow!("stopped by SIGTERM")),
        _ = interrupt.recv() => Err(anyhow::anyhow!("stopped by SIGINT")),
    }
}

/// Runs a short verb below its root span. `config` is the file with its `[telemetry]`, if it has one.
pub async fn traced(
    command: &Command,
    debug: bool,
    config: Option<&Path>,
    work: impl Future<Output = anyhow::Result<()>>,
) -> anyhow::Result<()> {
    // The verb itself reports what is wrong with the file.
    let settings = config.and_then(|path| Config::load(path).ok()).map(|config| config.telemetry);
    let settings = settings.unwrap_or_default();
    let telemetry = klio_telemetry::start(quiet_options(&settings, debug))?;
    let span = root_span(command);
    let trace = span.in_scope(klio_telemetry::current_trace_id);
    let result = interruptible(caught(work)).instrument(span.clone()).await;
    record(&span, &result);
    drop(span);
    epilogue(trace, telemetry.shutdown(FLUSH_TIMEOUT).await);
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_is_a_failure_so_that_what_is_queued_is_flushed_after_it() {
        let error = caught(async { panic!("on purpose") }).await.unwrap_err();
        assert_eq!(error.to_string(), "panicked");
        assert!(interruptible(async { Ok(()) }).await.is_ok());
    }

    #[test]
    fn the_console_exporter_never_writes_into_a_file_s_content() {
        let mut set = BTreeMap::from([("OTEL_LOGS_EXPORTER".to_owned(), "console".to_owned())]);
        let get = |name: &str| (name == "OTEL_TRACES_EXPORTER").then(|| "otlp, Console".to_owned());
        without_console(&mut set, &get);
        assert_eq!(set["OTEL_LOGS_EXPORTER"], "none");
        assert_eq!(set["OTEL_TRACES_EXPORTER"], "otlp");
        assert!(!set.contains_key("OTEL_METRICS_EXPORTER"));
    }
}
