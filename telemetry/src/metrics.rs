//! The meter provider: one provider with one reader per exporter, so that an instrument is recorded once.
//!
//! The SDK merges series of an instrument beyond 2000 into one. A thousand clusters with several outcomes each are
//! more, so observed instruments may have [`SERIES_MAX`]; their series disappear with their cluster. Recording
//! instruments (calls, latencies) keep the SDK's limit, because their attributes do not grow with the number of
//! clusters.

use crate::{
    env::{MetricSettings, Problem},
    otlp,
    prometheus::Prometheus,
    watch::{Health, Watched},
};
use opentelemetry_sdk::{
    Resource,
    metrics::{Instrument, InstrumentKind, PeriodicReader, SdkMeterProvider, Stream},
};
use std::sync::Arc;

/// The most series of one observed instrument: a thousand clusters with twenty outcomes.
const SERIES_MAX: usize = 20_000;

/// Raises the limit for observed instruments.
fn roomy(instrument: &Instrument) -> Option<Stream> {
    let observed = matches!(
        instrument.kind(),
        InstrumentKind::ObservableCounter | InstrumentKind::ObservableGauge
    );
    observed.then(|| Stream::builder().with_cardinality_limit(SERIES_MAX).build().ok()).flatten()
}

/// The result of [`build`].
pub(crate) struct Built {
    pub provider: SdkMeterProvider,
    pub prometheus: Option<Prometheus>,
    pub health: Option<Arc<Health>>,
}

pub(crate) fn build(
    settings: &MetricSettings,
    resource: Resource,
    problems: &mut Vec<Problem>,
) -> Built {
    let mut builder = SdkMeterProvider::builder().with_resource(resource).with_view(roomy);
    let mut health = None;
    let mut prometheus = None;
    if let Some(otlp) = &settings.otlp {
        match otlp::metrics(otlp, settings.temporality) {
            Ok((exporter, cause)) => {
                let watch = Health::new(otlp, cause);
                let exporter = Watched::new(exporter, Arc::clone(&watch));
                builder = builder.with_reader(
                    PeriodicReader::builder(exporter).with_interval(settings.interval).build(),
                );
                health = Some(watch);
            }
            Err(problem) => problems.push(problem),
        }
    }
    if settings.console {
        let exporter = opentelemetry_stdout::MetricExporter::builder()
            .with_temporality(settings.temporality)
            .build();
        builder = builder.with_reader(
            PeriodicReader::builder(exporter).with_interval(settings.interval).build(),
        );
    }
    if let Some(listen) = &settings.prometheus {
        match Prometheus::new(&listen.host, listen.port) {
            Ok((page, reader)) => {
                builder = builder.with_reader(reader);
                prometheus = Some(page);
            }
            Err(error) => problems.push(Problem {
                variable: "OTEL_METRICS_EXPORTER".into(),
                value: "prometheus".into(),
                expected: format!("a registry that can be built ({error})"),
            }),
        }
    }
    Built { provider: builder.build(), prometheus, health }
}
