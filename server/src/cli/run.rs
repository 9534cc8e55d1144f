//! `klio-server run`: loads the configuration, starts telemetry and the server, waits for a signal, and stops.

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
    // Telemetry starts even with a bad configuration, so that this failure is in a trace as well.
    let settings = config.as_ref().map(|config| config.telemetry.clone()).unwrap_or_default();
    let telemetry = klio_telemetry::start(telemetry::options(&settings, debug))?;
    let span = telemetry::root_span(command);
    let trace = span.in_scope(klio_telemetry::current_trace_id);
    let outcome = match config {
        Ok(config) => telemetry::caught(serve(config, &telemetry)).instrument(span.clone()).await,
        Err(error) => Err(error.into()),
    };
    if let Err(error) = &outcome {
        tracing::error!(parent: &span, error = super::chain(error), "klio-server stops because of an error");
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
        // A server with a missing part would look alive to its supervisor, so it ends, to be restarted.
        name = running.broken() => Err(anyhow::anyhow!("required task {name} ended unexpectedly")),
    };
    running.stop().await;
    outcome
}
