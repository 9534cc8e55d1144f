//! The connection to `klio-server`: gRPC over TLS 1.3 with a client certificate.
//!
//! Certificates are read again for every connection, so that a renewal needs no restart. This module opens the socket
//! instead of tonic, so that an error can name the step that failed and give advice. A [`Connection`] never
//! reconnects by itself: its owner has to ask the server again where to continue.

mod base;
mod certificate;
mod dial;
mod files;
mod generations;
#[cfg(test)]
mod tests;

pub use base::BaseLink;
pub use certificate::Expiry;
pub use files::GrpcFiles;
pub use generations::{Which, elsewhere, numbered, settle, which};

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

/// Flow-control window for data from the server. Only `Fetch` receives much; 4 MiB saturates a 1 Gbit/s link with 30
/// ms latency.
const WINDOW_BYTES: u32 = 4 << 20;
/// The largest accepted message; the server sends at most 1 MiB at a time.
const MESSAGE_BYTES_MAX: usize = 8 << 20;
/// A dead network is noticed within twice this time.
const KEEPALIVE: Duration = Duration::from_secs(10);

/// A channel whose calls carry the trace context and are measured.
pub type Traced = InterceptedService<Metered<Channel>, Propagate>;

/// The server's address and the settings to authenticate with. Cheap to clone; opens no connection by itself.
#[derive(Debug, Clone)]
pub struct ServerLink {
    settings: Arc<config::Server>,
    target: dial::Target,
    /// `None` if calls are not measured.
    rpc: Option<RpcMeter>,
}

/// An open connection.
#[derive(Debug, Clone)]
pub struct Connection {
    channel: Channel,
    rpc: Option<RpcMeter>,
    /// Expiry of the certificates of both ends; `None` without TLS.
    pub expiry: Option<Expiry>,
}

impl ServerLink {
    /// # Errors
    /// `Config` for an address that cannot be parsed.
    pub fn new(settings: &config::Server) -> Result<Self, Error> {
        let target = dial::Target::parse(&settings.address)?;
        Ok(Self { settings: Arc::new(settings.clone()), target, rpc: None })
    }

    /// The same link with its calls measured.
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
            // tonic asks for a new stream when the connection is lost; the caller has to call `connect` again
            // instead.
            let stream = once.take().ok_or_else(|| std::io::Error::other("connection lost"));
            std::future::ready(stream)
        });
        let opened = self.endpoint()?.connect_with_connector(connector).await;
        // An HTTP/2 server sends its settings first; a server that refuses our certificate sends that error first.
        match greeting.await {
            Ok(Err(error)) if expiry.is_some() => {
                return Err(certificate::explain(&error, &self.target.authority, &self.settings));
            }
            Ok(Err(error)) => return Err(self.failed("open HTTP/2", &error)),
            // Nothing was read at all; `opened` has the reason.
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
        // tonic refuses https endpoints unless it does TLS itself; requests carry the origin instead.
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

    pub fn wal(&self) -> WalClient<Traced> {
        WalClient::with_interceptor(self.measured(), Propagate)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
    }

    pub fn base(&self) -> BaseClient<Traced> {
        BaseClient::with_interceptor(self.measured(), Propagate)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
    }

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
            // P9: telemetry never breaks a call, so a value that is no valid header is omitted.
            if let (Ok(key), Ok(value)) =
                (MetadataKey::<Ascii>::from_bytes(key.as_bytes()), value.parse())
            {
                metadata.insert(key, value);
            }
        });
        Ok(request)
    }
}
