//! Hands the `[telemetry]` section to the telemetry crate, and opens a command's root span.

use super::{args::Cli, say};
use crate::{config::Config, error::Error};
use klio_telemetry::{Delivery, LogFormat, Options, redact::redact_arguments};
use std::{collections::BTreeMap, ffi::OsString};
use tracing::Span;
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

/// `cli.<command>`, with the arguments as typed but for secrets. They are an attribute of the trace only:
/// in front of each log line they would hide the line.
pub(super) fn root_span(command: &str, arguments: &[OsString]) -> Span {
    macro_rules! span {
        ($name:literal) => {
            tracing::info_span!(
                $name,
                otel.status_code = tracing::field::Empty,
                error.r#type = tracing::field::Empty,
            )
        };
    }
    let span = match command {
        "stream" => span!("cli.stream"),
        "backup" => span!("cli.backup"),
        "check" => span!("cli.check"),
        "status" => span!("cli.status"),
        "list" => span!("cli.list"),
        "restore" => span!("cli.restore"),
        "drill" => span!("cli.drill"),
        "wal-fetch" => span!("cli.wal-fetch"),
        "wal-agent" => span!("cli.wal-agent"),
        "slot" => span!("cli.slot"),
        _ => span!("cli.other"),
    };
    let words = arguments.iter().skip(1).map(|a| a.to_string_lossy().into_owned());
    span.set_attribute("cli.arguments", redact_arguments(words).join(" "));
    span
}

/// Marks the root span when the command failed.
pub(super) fn record(span: &Span, result: &Result<u8, Error>) {
    if let Err(error) = result {
        span.record("otel.status_code", "ERROR");
        span.record("error.type", error.failure.name());
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
