//! HTTP for probes and metrics: /livez (also /healthz), /readyz, /metrics.
//!
//! Ready means that WAL is being streamed to the server. There is no authentication, so bind it to a private address.
//! This module owns no task; its caller decides when serving ends.

use crate::{
    error::{Error, Failure},
    streamer::State,
};
use axum::{
    Router,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use klio_telemetry::Prometheus;
use std::sync::Arc;
use tokio::net::{TcpListener, ToSocketAddrs};
use tokio_util::sync::CancellationToken;

/// Opens the port, so that a port in use is an error before anything starts.
///
/// # Errors
/// The address cannot be used.
pub async fn listen(
    address: impl ToSocketAddrs + std::fmt::Debug + Send,
) -> Result<TcpListener, Error> {
    let place = format!("{address:?}");
    TcpListener::bind(address).await.map_err(|error| {
        Error::new(Failure::Local, format!("listen on {place}: {error}"))
            .hint("choose another admin.listen or OTEL_EXPORTER_PROMETHEUS_PORT")
    })
}

pub fn pages(state: Arc<State>, prometheus: Option<Prometheus>) -> Router {
    let router = Router::new()
        .route("/livez", get(async || "ok\n"))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(async move || ready(&state)));
    match prometheus {
        None => router,
        Some(page) => router.route("/metrics", get(async move || metrics(page).await)),
    }
}

/// Serves until `stop`.
pub async fn serve(listener: TcpListener, pages: Router, stop: CancellationToken) {
    let served = axum::serve(listener, pages).with_graceful_shutdown(stop.cancelled_owned()).await;
    if let Err(error) = served {
        tracing::warn!(%error, "the admin port stopped serving");
    }
}

fn ready(state: &State) -> Response {
    if state.is_connected() {
        return "ready\n".into_response();
    }
    (StatusCode::SERVICE_UNAVAILABLE, "not streaming: see the log\n").into_response()
}

async fn metrics(page: Prometheus) -> Response {
    // Rendering reads /proc, which blocks.
    match tokio::task::spawn_blocking(move || page.render()).await {
        Ok(text) => ([(header::CONTENT_TYPE, Prometheus::CONTENT_TYPE)], text).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}
