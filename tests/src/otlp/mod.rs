//! Collectors on loopback, written against OpenTelemetry's own protobuf definitions.
//!
//! [`Receiver`] takes every signal over HTTP or gRPC, with TLS or without, and behaves as badly as it is told.
//! [`Collector`] is a good one over HTTP that shows spans and log records in an easy form.

mod decoded;
mod grpc;
mod http;
mod raw;
mod receiver;

pub use decoded::{Arrival, LogRecord, Message, Signal, Span};
pub use receiver::{Answer, Protocol, Receiver, Tls};

/// A good collector over HTTP; it stops when dropped.
pub struct Collector {
    receiver: Receiver,
}

impl Collector {
    /// Starts one on a port of the system's choice.
    ///
    /// # Panics
    /// When it cannot listen.
    pub async fn new() -> Self {
        Self { receiver: Receiver::new(Protocol::Http, None, Answer::Accept).await }
    }

    /// For `OTEL_EXPORTER_OTLP_ENDPOINT`.
    #[must_use]
    pub fn endpoint(&self) -> String {
        self.receiver.endpoint()
    }

    /// Every span so far, in the order of arrival.
    #[must_use]
    pub fn spans(&self) -> Vec<Span> {
        self.receiver.spans()
    }

    /// Every log record so far, in the order of arrival.
    #[must_use]
    pub fn logs(&self) -> Vec<LogRecord> {
        self.receiver.logs()
    }
}
