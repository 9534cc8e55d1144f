//! Hands the `[telemetry]` section to the telemetry crate, and opens a command's root span.

use super::{
    args::{Cli, Command},
    say,
};
use crate::{
    config::{Config, environment},
    error::Error,
};
use klio_telemetry::{Delivery, LogFormat, Options, propagate, redact::redact_arguments};
use std::{collections::BTreeMap, ffi::OsString};
use tracing::{Span, field::Empty};
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// What the configuration says; the telemetry crate reads the `OTEL_*` variables itself.
pub(super) fn options(cli: &Cli, config: &Config) -> Options {
    let telemetry = &config.telemetry;
    let mut overrides = BTreeMap::new();
    let mut set = |name: &str, value: &str| {
        if !value.is_empty() {
            overrides.insert(name.to_owned(), value.to_owned());
        }
    };
    set("OTEL_SERVICE_NAME", &telemetry.service_name);
    set("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", &telemetry.trace_endpoint);
    set("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", &telemetry.logs_endpoint);
    if !telemetry.trace_endpoint.is_empty() {
        set("OTEL_TRACES_EXPORTER", "otlp");
    }
    if telemetry.export_logs {
        set("OTEL_LOGS_EXPORTER", "otlp");
    }
    if !telemetry.enabled {
        set("OTEL_SDK_DISABLED", "true");
    }
    Options {
        service: "klio",
        version: env!("CARGO_PKG_VERSION"),
        debug: cli.global.debug,
        log_format: match telemetry.log_format.as_str() {
            "json" => Some(LogFormat::Json),
            "text" => Some(LogFormat::Text),
            _ => None,
        },
        log_filter: Some(telemetry.log_level.clone()).filter(|level| !level.is_empty()),
        overrides,
    }
}

/// `cli.<command>`, with the arguments as typed but for secrets; below the caller's span where `TRACEPARENT` names one.
/// The arguments are an attribute of the trace only: in front of each log line they would hide the line.
pub(super) fn root_span(command: &Command, arguments: &[OsString]) -> Span {
    macro_rules! span {
        ($name:literal) => {
            tracing::info_span!($name, otel.status_code = Empty, error.r#type = Empty)
        };
    }
    // A new verb does not compile without a span.
    let span = match command {
        Command::Stream(_) => span!("cli.stream"),
        Command::Backup(_) => span!("cli.backup"),
        Command::Check(_) => span!("cli.check"),
        Command::Status(_) => span!("cli.status"),
        Command::List(_) => span!("cli.list"),
        Command::Restore(_) => span!("cli.restore"),
        Command::Drill(_) => span!("cli.drill"),
        Command::Verify(_) => span!("cli.verify"),
        Command::Retention(_) => span!("cli.retention"),
        Command::WalFetch(_) => span!("cli.wal-fetch"),
        Command::WalAgent(_) => span!("cli.wal-agent"),
        Command::Slot(_) => span!("cli.slot"),
        Command::Reference { .. } => span!("cli.reference"),
        Command::Help { .. } => span!("cli.help"),
    };
    // An agent outlives who started it, and its work belongs to whoever asks.
    if !matches!(command, Command::WalAgent(_)) {
        propagate::adopt(&span, &|key| environment(&key.to_ascii_uppercase()));
    }
    let words = arguments.iter().skip(1).map(|a| a.to_string_lossy().into_owned());
    span.set_attribute("cli.arguments", redact_arguments(words).join(" "));
    span
}

/// Marks the root span when the command failed.
pub(super) fn record(span: &Span, result: &Result<u8, Error>) {
    match result {
        Ok(status) => span.set_attribute("process.exit.code", i64::from(*status)),
        Err(error) => {
            span.record("otel.status_code", "ERROR");
            span.record("error.type", error.failure.name());
        }
    }
}

/// The last line of a command whose spans go somewhere.
pub(super) fn epilogue(trace: Option<String>, delivery: Delivery) {
    let Some(trace) = trace else { return };
    match delivery {
        Delivery::Nothing => {}
        Delivery::Delivered => say(&format!("trace {trace}: delivered")),
        Delivery::Pending => say(&format!("trace {trace}: not all delivered in time")),
    }
}
