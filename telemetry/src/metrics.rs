//! The meter provider: one provider, a reader per exporter, so that an instrument is recorded once.

use crate::{
    env::{MetricSettings, Problem, Signal},
    otlp,
    prometheus::Prometheus,
    watch::{Health, Watched},
};
use opentelemetry_sdk::{
    Resource,
    metrics::{PeriodicReader, SdkMeterProvider},
};
use std::sync::Arc;

/// What [`build`] makes.
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
    let mut builder = SdkMeterProvider::builder().with_resource(resource);
    let mut health = None;
    let mut prometheus = None;
    if let Some(otlp) = &settings.otlp {
        match otlp::metrics(otlp, settings.temporality) {
            Ok(exporter) => {
                let watch = Health::new(Signal::Metrics, &otlp.endpoint);
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
