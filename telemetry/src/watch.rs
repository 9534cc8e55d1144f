//! A wrapper around every exporter that remembers how the last export went.
//!
//! Says once that a collector cannot be reached and once that it can again; in between it stays silent, as
//! a dead collector must not fill the log (P9). Changes nothing about what is exported or when.

use crate::{env::Signal, redact::redact};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    logs::{LogBatch, LogExporter},
    metrics::{Temporality, data::ResourceMetrics, exporter::PushMetricExporter},
    trace::{SpanData, SpanExporter},
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    time::Duration,
};

const NEVER: u8 = 0;
const DELIVERED: u8 = 1;
const FAILED: u8 = 2;

/// How the last export of one signal went. Shared by the exporter and [`crate::Telemetry`].
#[derive(Debug)]
pub(crate) struct Health {
    signal: Signal,
    place: String,
    last: AtomicU8,
}

/// What the last export of a signal said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Last {
    Never,
    Delivered,
    Failed,
}

impl Health {
    /// `place` is the collector's address; it is redacted here.
    pub(crate) fn new(signal: Signal, place: &str) -> Arc<Self> {
        Arc::new(Self { signal, place: redact(place).into_owned(), last: AtomicU8::new(NEVER) })
    }

    pub(crate) fn last(&self) -> Last {
        match self.last.load(Ordering::Acquire) {
            DELIVERED => Last::Delivered,
            FAILED => Last::Failed,
            _ => Last::Never,
        }
    }

    fn note(&self, result: &OTelSdkResult) {
        let now = if result.is_ok() { DELIVERED } else { FAILED };
        let before = self.last.swap(now, Ordering::AcqRel);
        let (signal, place) = (self.signal.name(), &self.place);
        match result {
            Err(error) if before != FAILED => {
                let text = error.to_string();
                tracing::warn!(
                    signal,
                    collector = %place,
                    error = %redact(&text),
                    "telemetry cannot be delivered; going on without (further failures are not logged)"
                );
            }
            Ok(()) if before == FAILED => {
                tracing::info!(signal, collector = %place, "telemetry is delivered again");
            }
            _ => {}
        }
    }
}

/// An exporter with its [`Health`].
#[derive(Debug)]
pub(crate) struct Watched<E> {
    inner: E,
    health: Arc<Health>,
}

impl<E> Watched<E> {
    pub(crate) fn new(inner: E, health: Arc<Health>) -> Self {
        Self { inner, health }
    }
}

#[deny(clippy::missing_trait_methods)]
impl<E: SpanExporter> SpanExporter for Watched<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let result = self.inner.export(batch).await;
        self.health.note(&result);
        result
    }
    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }
    fn shutdown(&self) -> OTelSdkResult {
        self.inner.shutdown()
    }
    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }
    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

#[deny(clippy::missing_trait_methods)]
impl<E: LogExporter> LogExporter for Watched<E> {
    async fn export(&self, batch: LogBatch<'_>) -> OTelSdkResult {
        let result = self.inner.export(batch).await;
        self.health.note(&result);
        result
    }
    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }
    fn shutdown(&self) -> OTelSdkResult {
        self.inner.shutdown()
    }
    fn event_enabled(
        &self,
        level: opentelemetry::logs::Severity,
        target: &str,
        name: Option<&str>,
    ) -> bool {
        self.inner.event_enabled(level, target, name)
    }
    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

#[deny(clippy::missing_trait_methods)]
impl<E: PushMetricExporter> PushMetricExporter for Watched<E> {
    async fn export(&self, metrics: &ResourceMetrics) -> OTelSdkResult {
        let result = self.inner.export(metrics).await;
        self.health.note(&result);
        result
    }
    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }
    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }
    fn shutdown(&self) -> OTelSdkResult {
        self.inner.shutdown()
    }
    fn temporality(&self) -> Temporality {
        self.inner.temporality()
    }
}
