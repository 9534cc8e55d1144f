//! The ports of the server. They are bound before anything else, because a taken port must not leave half a server.

use crate::{
    admin::{self, bind},
    config::Config,
};
use klio_telemetry::{Prometheus, Telemetry};
use tokio::net::TcpListener;

/// Bound ports.
pub(super) struct Ports {
    pub grpc: TcpListener,
    /// For health, and for metrics if there is a page.
    pub admin: Option<TcpListener>,
    /// The page of metrics, if OTEL_METRICS_EXPORTER asks for it.
    pub page: Option<Prometheus>,
    /// The port that the page has for itself.
    pub scrape: Option<TcpListener>,
}

impl Ports {
    /// # Errors
    /// A port cannot be bound.
    pub async fn bind(config: &Config, telemetry: &Telemetry) -> anyhow::Result<Self> {
        let grpc = bind(config.listen.to_string(), "gRPC").await?;
        let admin = match config.admin.listen {
            Some(address) => Some(bind(address.to_string(), "health and metrics").await?),
            None => None,
        };
        let page = telemetry.prometheus().cloned();
        let scrape = match &page {
            Some(page) => admin::scrape_port(page, telemetry).await?,
            None => None,
        };
        Ok(Self { grpc, admin, page, scrape })
    }
}
