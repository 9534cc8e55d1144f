//! A CLIENT span for each program that a drill runs: its name, how it ended; never its arguments or output.

use std::process::{ExitStatus, Output};
use tracing::{Span, field::Empty};

/// The variable that hands a trace on to a program, as programs of OpenTelemetry read it; so does klio itself, which
/// PostgreSQL runs as restore_command.
pub const TRACEPARENT: &str = "TRACEPARENT";

/// For a program that is about to run.
pub fn span(program: &str) -> Span {
    tracing::info_span!(
        "program",
        otel.name = program,
        otel.kind = "client",
        otel.status_code = Empty,
        error.type = Empty,
        process.executable.name = program,
        process.exit.code = Empty,
    )
}

/// The context to hand on; `None` when nothing is traced.
pub fn traceparent() -> Option<String> {
    let mut found = None;
    klio_telemetry::propagate::inject(&mut |key, value| {
        if key == "traceparent" {
            found = Some(value);
        }
    });
    found
}

/// How a program ended.
pub fn ended(span: &Span, status: Option<ExitStatus>) {
    if let Some(code) = status.and_then(|status| status.code()) {
        span.record("process.exit.code", code);
    }
    if !status.is_some_and(|status| status.success()) {
        span.record("otel.status_code", "ERROR");
        span.record(
            "error.type",
            if status.is_some() { "program_failed" } else { "program_missing" },
        );
    }
}

/// Runs a program to its end.
pub fn run(
    program: &str,
    work: impl FnOnce() -> std::io::Result<Output>,
) -> std::io::Result<Output> {
    let span = span(program);
    let output = span.in_scope(work);
    ended(&span, output.as_ref().ok().map(|output| output.status));
    output
}
