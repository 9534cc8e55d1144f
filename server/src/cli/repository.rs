//! `klio-server repository`: the child process of maintenance. It reads the configuration and continues the server's trace.

use super::{Command, chain, telemetry};
use crate::{
    config::Config,
    maintenance::{
        protocol::{Job, Line},
        worker::{self, Given, Output},
    },
};
use anyhow::Context;
use std::{path::Path, time::Duration};
use tokio::runtime::Runtime;

/// How long a result may wait for a telemetry collector that does not answer.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// Runs a job to its end. The result, or a failure, goes to standard output.
///
/// # Errors
/// Only errors from before the job was read.
pub fn run(command: &Command, config: &Path, debug: bool, runtime: &Runtime) -> anyhow::Result<()> {
    worker::serve(|job, out| {
        traced(command, config, debug, job, runtime, out)
            .unwrap_or_else(|error| Line::Failed { error: chain(&error) })
    })
}

/// Runs the job below its root span, which continues the server's trace. Spans are sent before the result, because the
/// server ends the child when it has the result.
fn traced(
    command: &Command,
    path: &Path,
    debug: bool,
    job: Job,
    runtime: &Runtime,
    out: &Output,
) -> anyhow::Result<Line> {
    let config = Config::load(path)?;
    let inside = runtime.enter();
    let telemetry = klio_telemetry::start(telemetry::quiet_options(&config.telemetry, debug))?;
    let span = telemetry::root_span(command);
    if !job.traceparent.is_empty() {
        klio_telemetry::propagate::adopt(&span, &|key| {
            (key == "traceparent").then(|| job.traceparent.clone())
        });
    }
    let result = span.in_scope(|| worker::work(given(path, config)?, job, runtime, out));
    if result.is_err() {
        span.record("otel.status_code", "ERROR");
        span.record("error.type", "FAILED");
    }
    drop((span, inside));
    runtime.block_on(telemetry.shutdown(FLUSH_TIMEOUT));
    result
}

fn given(file: &Path, config: Config) -> anyhow::Result<Given> {
    let at_rest = config.encryption.at_rest().context("read the encryption keys")?;
    let Config { data_dir, tier2, .. } = config;
    Ok(Given { file: file.to_owned(), data_dir, tier2, at_rest })
}
