//! `klio-server run`: configuration, telemetry, the server, a signal, the way out.

use super::{Command, RunArgs, telemetry};
use crate::{app, config::Config};
use anyhow::Context;
use klio_telemetry::Telemetry;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tracing::Instrument;

/// Telemetry may delay the exit by this much (P9).
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);

/// Runs until a signal or a fatal error.
pub async fn run(command: &Command, args: &RunArgs, debug: bool) -> anyhow::Result<()> {
    let config = Config::load(&args.config);
    // A start that fails because of its configuration is a trace as well.
    let settings = config.as_ref().map(|config| config.telemetry.clone()).unwrap_or_default();
    let telemetry = klio_telemetry::start(telemetry::options(&settings, debug))?;
    let span = telemetry::root_span(command);
    let trace = span.in_scope(klio_telemetry::current_trace_id);
    let outcome = match config {
        Ok(config) => telemetry::caught(serve(config, &telemetry)).instrument(span.clone()).await,
        Err(error) => Err(error.into()),
    };
    if let Err(error) = &outcome {
        tracing::error!(parent: &span, error = super::chain(error), "klio-server ends");
    }
    telemetry::record(&span, &outcome);
    drop(span);
    telemetry::epilogue(trace, telemetry.shutdown(FLUSH_TIMEOUT).await);
    outcome
}

async fn serve(config: Config, telemetry: &Telemetry) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let mut running = app::start(config, telemetry).await?;
    let outcome = tokio::select! {
        _ = terminate.recv() => { tracing::info!("SIGTERM: stopping"); Ok(()) }
        _ = interrupt.recv() => { tracing::info!("SIGINT: stopping"); Ok(()) }
        // Half a server would look alive to its supervisor: end, so that it is started again.
        name = running.broken() => Err(anyhow::anyhow!("task {name} ended by itself")),
    };
    running.stop().await;
    outcome
}
