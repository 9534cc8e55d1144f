//! A wrapper around every exporter that remembers the result of the last export.
//!
//! It logs once that a collector cannot be reached or refuses a part, and once that it can be reached again. In
//! between it is silent, because a dead collector must not fill the log (P9). The message names the variable, its
//! value and what was expected. It does not change what is exported or when, except that [`scrub`] removes secrets.

use crate::{
    env::{Otlp, Signal},
    finish::End,
    redact::redact,
    rejected::{self, Said},
    scrub,
};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    logs::{LogBatch, LogExporter},
    metrics::{Temporality, data::ResourceMetrics, exporter::PushMetricExporter},
    trace::{SpanData, SpanExporter},
};
use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
    time::Duration,
};

const NEVER: u8 = 0;
const DELIVERED: u8 = 1;
const FAILED: u8 = 2;

/// The result of the last export of one signal. Shared by the exporter and [`crate::Telemetry`].
#[derive(Debug)]
pub(crate) struct Health {
    signal: Signal,
    variable: String,
    place: String,
    protocol: &'static str,
    last: AtomicU8,
    rejected: AtomicBool,
    cause: Arc<Cause>,
}

/// Why the transport failed last, because the exporter itself reports only "network error".
#[derive(Debug, Default)]
pub(crate) struct Cause(Mutex<Option<String>>);

impl Cause {
    pub(crate) fn set(&self, cause: Option<String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = cause;
    }

    fn take(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// The result of the last export of a signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Last {
    Never,
    Delivered,
    Failed,
}

impl Health {
    /// Redacts the collector's address.
    pub(crate) fn new(otlp: &Otlp, cause: Arc<Cause>) -> Arc<Self> {
        Arc::new(Self {
            signal: otlp.signal,
            variable: otlp.endpoint_variable.clone(),
            place: redact(&otlp.endpoint).into_owned(),
            protocol: otlp.protocol.name(),
            last: AtomicU8::new(NEVER),
            rejected: AtomicBool::new(false),
            cause,
        })
    }

    pub(crate) fn last(&self) -> Last {
        match self.last.load(Ordering::Acquire) {
            DELIVERED => Last::Delivered,
            FAILED => Last::Failed,
            _ => Last::Never,
        }
    }

    /// Records the result of the export that has just ended on this thread.
    fn note(&self, result: &OTelSdkResult) {
        let said = rejected::taken();
        let cause = self.cause.take().map(|cause| format!(": {cause}")).unwrap_or_default();
        let failure = match (result, said) {
            (Err(error), _) => Some(format!("{error}{cause}")),
            (Ok(()), Some(Said::Nonsense)) => Some("its answer is not OTLP".to_owned()),
            (Ok(()), _) => None,
        };
        let now = if failure.is_none() { DELIVERED } else { FAILED };
        let before = self.last.swap(now, Ordering::AcqRel);
        match failure {
            Some(error) if before != FAILED => self.undeliverable(&error),
            None if before == FAILED => {
                let signal = self.signal.name();
                tracing::info!(signal, value = %self.place, "telemetry is delivered again");
            }
            _ => {}
        }
        if let Some(Said::Rejected(count)) = said
            && !self.rejected.swap(true, Ordering::AcqRel)
        {
            self.partly_refused(count);
        }
    }

    fn partly_refused(&self, count: i64) {
        tracing::warn!(
            signal = self.signal.name(),
            variable = self.variable,
            value = %self.place,
            expected = "a collector that accepts all of it",
            rejected = count,
            "the collector refuses part of the telemetry (further refusals are not logged)"
        );
    }

    /// Called when the time to flush is up. Logs that, unless a failure of this collector was logged before.
    pub(crate) fn ended(&self, end: End) {
        if end != End::Flushed && self.last.swap(FAILED, Ordering::AcqRel) != FAILED {
            self.undeliverable("no answer within the time for the flush");
        }
    }

    fn undeliverable(&self, error: &str) {
        tracing::warn!(
            signal = self.signal.name(),
            variable = self.variable,
            value = %self.place,
            expected = %format_args!("a collector that accepts OTLP over {} there", self.protocol),
            error = %redact(error),
            "cannot deliver telemetry; going on without it (further failures are not logged)"
        );
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
    async fn export(&self, mut batch: Vec<SpanData>) -> OTelSdkResult {
        batch.iter_mut().for_each(scrub::span);
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

/// An exporter to the console that removes secrets, too.
#[derive(Debug)]
pub(crate) struct Clean<E>(pub E);

#[deny(clippy::missing_trait_methods)]
impl<E: SpanExporter> SpanExporter for Clean<E> {
    async fn export(&self, mut batch: Vec<SpanData>) -> OTelSdkResult {
        batch.iter_mut().for_each(scrub::span);
        self.0.export(batch).await
    }
    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.0.shutdown_with_timeout(timeout)
    }
    fn shutdown(&self) -> OTelSdkResult {
        self.0.shutdown()
    }
    fn force_flush(&self) -> OTelSdkResult {
        self.0.force_flush()
    }
    fn set_resource(&mut self, resource: &Resource) {
        self.0.set_resource(resource);
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
