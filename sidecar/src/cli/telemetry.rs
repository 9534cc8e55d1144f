//! Passes the `[telemetry]` section to the telemetry crate, and opens the root span of a command.

use super::{
    args::{Cli, Command},
    say, stream,
};
use crate::{
    config::{Config, environment},
    error::{Error, Failure},
};
use futures::FutureExt;
use klio_proto::Code;
use klio_telemetry::{Delivery, Options, propagate, redact::redact_arguments};
use std::{collections::BTreeMap, ffi::OsString, panic::AssertUnwindSafe};
use tracing::{Span, field::Empty};
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// The options from the configuration; the telemetry crate itself reads the `OTEL_*` variables.
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
    // Passed as variables, so that a wrong value causes a warning like any other (P9).
    set("KLIO_LOG_FORMAT", &telemetry.log_format);
    set("RUST_LOG", &telemetry.log_level);
    Options {
        service: "klio",
        version: env!("CARGO_PKG_VERSION"),
        debug: cli.global.debug,
        log_format: None,
        log_filter: None,
        overrides,
    }
}

/// The span `cli.<command>`, with the arguments as typed except for secrets. It is a child of the caller's span if
/// `TRACEPARENT` names one. The arguments are an attribute of the trace only, because in front of each log line they
/// would hide its text.
pub(super) fn root_span(command: &Command, arguments: &[OsString]) -> Span {
    macro_rules! span {
        ($name:literal) => {
            tracing::info_span!($name, otel.status_code = Empty, error.r#type = Empty)
        };
    }
    // A new command does not compile without a span here.
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
        Command::Generation(_) => span!("cli.generation"),
        Command::Timeline(_) => span!("cli.timeline"),
        Command::WalFetch(_) => span!("cli.wal-fetch"),
        Command::WalAgent(_) => span!("cli.wal-agent"),
        Command::Slot(_) => span!("cli.slot"),
        Command::Reference { .. } => span!("cli.reference"),
        Command::Help { .. } => span!("cli.help"),
    };
    // An agent outlives the process that started it, and works for whoever asks, so it gets no parent.
    if !matches!(command, Command::WalAgent(_)) {
        propagate::adopt(&span, &|key| environment(&key.to_ascii_uppercase()));
    }
    let words = arguments.iter().skip(1).map(|a| a.to_string_lossy().into_owned());
    span.set_attribute("cli.arguments", redact_arguments(words).join(" "));
    span
}

/// Runs the command to its end. A panic becomes an error, so that telemetry is flushed after it, and so does a
/// signal, for commands that do not handle signals themselves.
pub(super) async fn to_its_end(
    command: &Command,
    work: impl Future<Output = Result<u8, Error>>,
) -> Result<u8, Error> {
    let work = AssertUnwindSafe(work).catch_unwind();
    let ended = if listens(command) {
        work.await
    } else {
        let mut signals = stream::signals()?;
        tokio::select! {
            ended = work => ended,
            () = stream::signalled(&mut signals) => {
                return Err(Error::new(Failure::Stopped, "stopped by a signal"));
            }
        }
    };
    // The panic's message and location were already printed on standard error.
    ended.unwrap_or_else(|_| Err(Error::new(Failure::Code(Code::Internal), "panicked")))
}

/// Whether the command handles signals itself. PostgreSQL stops `wal-fetch` with SIGTERM and must see that the signal
/// ended it (RestoreArchivedFile() in src/backend/access/transam/xlogarchive.c), so its signals are not caught here.
const fn listens(command: &Command) -> bool {
    !matches!(command, Command::Status(_) | Command::Check(_) | Command::List(_) | Command::Slot(_))
}

/// Records how the command ended in the root span.
pub(super) fn record(span: &Span, result: &Result<u8, Error>) {
    match result {
        Ok(status) => span.set_attribute("process.exit.code", i64::from(*status)),
        Err(error) => {
            span.record("otel.status_code", "ERROR");
            span.record("error.type", error.failure.name());
        }
    }
}

/// Prints the last line of a command whose spans were exported.
pub(super) fn epilogue(trace: Option<String>, delivery: Delivery) {
    if let Some(line) = delivery.closing_line(trace) {
        say(&line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    async fn ended(words: &[&str], work: impl Future<Output = Result<u8, Error>>) -> Error {
        let cli = Cli::try_parse_from(words).unwrap();
        to_its_end(&cli.command, work).await.unwrap_err()
    }

    #[tokio::test]
    async fn a_panic_is_a_failure_so_that_what_is_queued_is_flushed_after_it() {
        for words in [["klio", "status"], ["klio", "backup"]] {
            let error = ended(&words, async { panic!("on purpose") }).await;
            assert_eq!(error.failure, Failure::Code(Code::Internal));
        }
    }

    #[tokio::test]
    async fn what_a_command_gives_is_what_is_given_on() {
        let error =
            ended(&["klio", "status"], async { Err(Error::new(Failure::Local, "x")) }).await;
        assert_eq!(error.failure, Failure::Local);
    }
}
