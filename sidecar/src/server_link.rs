//! The connection to `klio-server`: gRPC over TLS 1.3 with a client certificate.
//!
//! Certificates are read anew for every connection, so renewal needs no restart. The socket is opened
//! here, not by tonic, so that a failure can say at which step it happened and what to do. A
//! [`Connection`] never reconnects by itself: whoever holds it asks the server again where to go on.

mod base;
mod certificate;
mod dial;
mod files;
#[cfg(test)]
mod tests;

pub use base::BaseLink;
pub use certificate::Expiry;
pub use files::GrpcFiles;

use crate::{
    config,
    error::{Error, Failure},
};
use klio_proto::v1::{
    base_client::BaseClient, catalog_client::CatalogClient, wal_client::WalClient,
};
use klio_telemetry::rpc::{Metered, RpcMeter, Side};
use opentelemetry::metrics::Meter;
use std::{sync::Arc, time::Duration};
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataKey},
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Channel, Endpoint},
};

/// Window for what the server sends us: only `Fetch` sends much, and 4 MiB keeps a 1 Gbit/s link of
/// 30 ms full.
const WINDOW_BYTES: u32 = 4 << 20;
/// Largest message accepted; the server sends at most 1 MiB at once.
const MESSAGE_BYTES_MAX: usize = 8 << 20;
/// A dead network is noticed within two of these.
const KEEPALIVE: Duration = Duration::from_secs(10);

/// A channel whose calls carry the trace context and are measured.
pub type Traced = InterceptedService<Metered<Channel>, Propagate>;

/// Where the server is and how to prove who we are. Cheap to clone; opens nothing by itself.
#[derive(Debug, Clone)]
pub struct ServerLink {
    settings: Arc<config::Server>,
    target: dial::Target,
    /// `None`: calls are not measured.
    rpc: Option<RpcMeter>,
}

/// An open connection.
#[derive(Debug, Clone)]
pub struct Connection {
    channel: Channel,
    rpc: Option<RpcMeter>,
    /// When the certificates of both ends expire; `None` without TLS.
    pub expiry: Option<Expiry>,
}

impl ServerLink {
    /// From the settings.
    ///
    /// # Errors
    /// An address that is none.
    pub fn new(settings: &config::Server) -> Result<Self, Error> {
        let target = dial::Target::parse(&settings.address)?;
        Ok(Self { settings: Arc::new(settings.clone()), target, rpc: None })
    }

    /// The same, with its calls measured.
    pub fn metered(self, meter: &Meter) -> Self {
        let rpc = RpcMeter::new(meter, Side::Client, &klio_proto::SERVICES);
        Self { rpc: Some(rpc), ..self }
    }

    /// The address as configured.
    pub fn address(&self) -> &str {
        &self.settings.address
    }

    /// Opens a connection.
    ///
    /// # Errors
    /// [`Failure::Link`], with the step that failed.
    pub async fn connect(&self) -> Result<Connection, Error> {
        let patience = self.settings.connect_timeout;
        match tokio::time::timeout(patience, self.open()).await {
            Ok(result) => result,
            Err(_) => Err(Error::new(
                Failure::Link,
                format!("connect to {}: no answer within {patience:?}", self.address()),
            )
            .hint("is klio-server running, and do firewalls let this address and port through?")),
        }
        .map_err(|error| error.during("reach klio-server"))
    }

    async fn open(&self) -> Result<Connection, Error> {
        let dial::Dialed { stream, expiry, greeting } =
            dial::dial(&self.target, &self.settings).await?;
        let mut once = Some(stream);
        let connector = tower::service_fn(move |_: http::Uri| {
            // tonic asks again when the connection is lost; then the caller has to begin anew.
            let stream = once.take().ok_or_else(|| std::io::Error::other("connection lost"));
            std::future::ready(stream)
        });
        let opened = self.endpoint()?.connect_with_connector(connector).await;
        // HTTP/2 servers begin with their settings; a server that refuses our certificate, with that.
        match greeting.await {
            Ok(Err(error)) if expiry.is_some() => {
                return Err(certificate::explain(&error, &self.target.authority, &self.settings));
            }
            Ok(Err(error)) => return Err(self.failed("open HTTP/2", &error)),
            // Not even read from: why is in `opened`.
            Ok(Ok(())) | Err(_) => {}
        }
        let channel = opened.map_err(|error| self.failed("open HTTP/2", &error))?;
        Ok(Connection { channel, rpc: self.rpc.clone(), expiry })
    }

    fn endpoint(&self) -> Result<Endpoint, Error> {
        let scheme = if self.settings.unsafe_plaintext { "http" } else { "https" };
        let authority = &self.target.authority;
        let origin = format!("{scheme}://{authority}")
            .parse()
            .map_err(|error| self.failed("read address", &error))?;
        // tonic refuses an https endpoint when TLS is not its own; the origin is what requests carry.
        Ok(Endpoint::from_shared(format!("http://{authority}"))
            .map_err(|error| self.failed("read address", &error))?
            .origin(origin)
            .user_agent(concat!("klio/", env!("CARGO_PKG_VERSION")))
            .map_err(|error| self.failed("name user agent", &error))?
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES * 2)
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE)
            .keep_alive_while_idle(true))
    }

    fn failed(&self, doing: &str, error: &dyn std::error::Error) -> Error {
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(inner) = cause {
            text = format!("{text}: {inner}");
            cause = inner.source();
        }
        Error::new(Failure::Link, format!("{doing} with {}: {text}", self.address()))
    }
}

impl Connection {
    fn measured(&self) -> Metered<Channel> {
        Metered::new(self.channel.clone(), self.rpc.clone())
    }

    /// The WAL service.
    pub fn wal(&self) -> WalClient<Traced> {
        WalClient::with_interceptor(self.measured(), Propagate)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// The base-backup service.
    pub fn base(&self) -> BaseClient<Traced> {
        BaseClient::with_interceptor(self.measured(), Propagate)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// The catalogue service.
    pub fn catalog(&self) -> CatalogClient<Traced> {
        CatalogClient::with_interceptor(self.measured(), Propagate)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
    }
}

/// Puts the current span's trace context into the metadata of each call.
#[derive(Debug, Clone, Copy)]
pub struct Propagate;

impl Interceptor for Propagate {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let metadata = request.metadata_mut();
        klio_telemetry::propagate::inject(&mut |key, value| {
            // Telemetry never breaks a call: what is no valid header is left out (P9).
            if let (Ok(key), Ok(value)) =
                (MetadataKey::<Ascii>::from_bytes(key.as_bytes()), value.parse())
            {
                metadata.insert(key, value);
            }
        });
        Ok(request)
    }
}
