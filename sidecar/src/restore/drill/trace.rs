//! A CLIENT span for each program that a drill runs: its name and how it ended, never its arguments or output.

use std::process::{ExitStatus, Output};
use tracing::{Span, field::Empty};

/// The environment variable that passes a trace on to a program, by OpenTelemetry's convention. klio itself reads it,
/// when PostgreSQL runs it as restore_command.
pub const TRACEPARENT: &str = "TRACEPARENT";

/// A span for a program that is about to run.
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

/// The trace context to pass on; `None` if nothing is traced.
pub fn traceparent() -> Option<String> {
    let mut found = None;
    klio_telemetry::propagate::inject(&mut |key, value| {
        if key == "traceparent" {
            found = Some(value);
        }
    });
    found
}

/// Records how a program ended.
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

pub fn run(
    program: &str,
    work: impl FnOnce() -> std::io::Result<Output>,
) -> std::io::Result<Output> {
    let span = span(program);
    let output = span.in_scope(work);
    ended(&span, output.as_ref().ok().map(|output| output.status));
    output
}
