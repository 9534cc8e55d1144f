//! HTTP for probes and scrapers: /livez (and /healthz), /readyz, /metrics. It shows no secrets and changes nothing.

use axum::{Router, http::StatusCode, response::IntoResponse, routing::get};
use klio_telemetry::{Prometheus, Telemetry, visible};
use std::{future::Future, net::SocketAddr, pin::Pin, sync::Arc};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// Returns why the server is not ready; empty when it is.
pub type Readiness =
    Arc<dyn Fn() -> Pin<Box<dyn Future<Output = Vec<String>> + Send>> + Send + Sync>;

/// A port that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("listen on {address} for {purpose}: {cause}; hint: is another program using the port?")]
pub struct ListenError {
    address: String,
    purpose: &'static str,
    // Part of the text, and not a source, which would be printed a second time.
    cause: std::io::Error,
}

/// Binds a port.
///
/// # Errors
/// The error names address and purpose.
pub async fn bind(
    address: impl Into<String>,
    purpose: &'static str,
) -> Result<TcpListener, ListenError> {
    let address = address.into();
    match TcpListener::bind(&address).await {
        Ok(listener) => Ok(listener),
        Err(cause) => Err(ListenError { address, purpose, cause }),
    }
}

/// Binds the address of OTEL_EXPORTER_PROMETHEUS_HOST and _PORT. P9: a port that is in use does not stop WAL.
///
/// # Errors
/// Only with KLIO_OTEL_STRICT.
pub async fn scrape_port(
    page: &Prometheus,
    telemetry: &Telemetry,
) -> Result<Option<TcpListener>, klio_telemetry::Error> {
    match TcpListener::bind((page.host.as_str(), page.port)).await {
        Ok(listener) => Ok(Some(listener)),
        Err(error) => telemetry.misconfigured(page.unusable(&error)).map(|()| None),
    }
}

/// Probes, and the metrics page when there is one.
pub fn router(readiness: Readiness, prometheus: Option<Prometheus>) -> Router {
    let live = || async { "ok\n" };
    let router = Router::new().route("/livez", get(live)).route("/healthz", get(live)).route(
        "/readyz",
        get(move || {
            let readiness = readiness.clone();
            async move {
                let problems = readiness().await;
                if problems.is_empty() {
                    return (StatusCode::OK, "ok\n".to_owned());
                }
                let lines = problems.iter().map(|text| visible::line(text) + "\n");
                (StatusCode::SERVICE_UNAVAILABLE, lines.collect())
            }
        }),
    );
    match prometheus {
        Some(page) => router.merge(metrics_router(page)),
        None => router,
    }
}

/// Only the metrics page, for the port of OTEL_EXPORTER_PROMETHEUS_PORT.
pub fn metrics_router(page: Prometheus) -> Router {
    Router::new().route(
        "/metrics",
        get(move || {
            let page = page.clone();
            async move {
                // Gauges read the disk, which must not block the runtime's workers.
                let text = tokio::task::spawn_blocking(move || page.render()).await;
                let kind = [("content-type", "text/plain; version=0.0.4; charset=utf-8")];
                (kind, text.unwrap_or_default()).into_response()
            }
        }),
    )
}

/// Serves until cancelled.
pub async fn serve(listener: TcpListener, router: Router, cancel: CancellationToken) {
    let address = listener.local_addr().unwrap_or(SocketAddr::from(([0, 0, 0, 0], 0)));
    let served = axum::serve(listener, router)
        .with_graceful_shutdown(async move { cancel.cancelled().await })
        .await;
    if let Err(error) = served {
        tracing::error!(%address, %error, "the HTTP server failed");
    }
}
