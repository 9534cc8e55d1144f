//! `klio-server run`: configuration, telemetry, the server, a signal, the way out.

use super::RunArgs;
use crate::{app, config::Config};
use anyhow::Context;
use klio_telemetry::{LogFormat, Options};
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

/// Telemetry may delay the exit by this much (P9).
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);

/// Runs until a signal or a fatal error.
pub async fn run(args: &RunArgs, debug: bool) -> anyhow::Result<()> {
    let config = Config::load(&args.config)?;
    let telemetry = klio_telemetry::start(Options {
        service: "klio-server",
        version: env!("CARGO_PKG_VERSION"),
        debug,
        log_format: config.telemetry.log_format.as_deref().map(|format| match format {
            "json" => LogFormat::Json,
            _ => LogFormat::Text,
        }),
        log_filter: config.telemetry.log_level.clone(),
        overrides: config.telemetry.overrides(),
    })?;
    let outcome = serve(config, &telemetry).await;
    if let Err(error) = &outcome {
        tracing::error!(error = format!("{error:#}"), "klio-server ends");
    }
    telemetry.shutdown(FLUSH_TIMEOUT).await;
    outcome
}

async fn serve(config: Config, telemetry: &klio_telemetry::Telemetry) -> anyhow::Result<()> {
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
