//! The tracing subscriber: prints log lines on stderr, and passes spans to the tracer and events to the log exporter.
//!
//! Every layer has its own filter, so that RUST_LOG affects only what is printed. Spans of Klio's own crates always
//! reach the printer; otherwise a line of level error would lose its ids with RUST_LOG=error. Spans and events of
//! other crates never reach the exporters, because exporting itself creates some.

mod format;

pub(crate) use format::Line;

use crate::{
    LogFormat,
    env::{LogSettings, Problem, Settings},
    ids, otlp,
    rejected::{self, Ear},
    scrub::CleanLogs,
    traces::Router,
    watch::{Health, Watched},
};
use opentelemetry_appender_tracing::layer::OpenTelemetryTracingBridge;
use opentelemetry_sdk::{
    Resource,
    logs::{BatchConfigBuilder, BatchLogProcessor, SdkLoggerProvider},
};
use std::sync::Arc;
use tracing::{Dispatch, Level, Metadata};
use tracing_subscriber::{
    EnvFilter, Layer, Registry,
    filter::{FilterExt, filter_fn},
    fmt::{MakeWriter, format::DefaultFields, format::JsonFields},
    layer::SubscriberExt,
};

/// The provider for exported events, if there is an exporter, and the exporter's health.
pub(crate) fn build(
    settings: &LogSettings,
    resource: Resource,
    problems: &mut Vec<Problem>,
) -> (Option<SdkLoggerProvider>, Option<Arc<Health>>) {
    let mut health = None;
    let mut builder = SdkLoggerProvider::builder().with_resource(resource);
    if let Some(otlp) = &settings.otlp {
        match otlp::logs(otlp) {
            Ok((exporter, cause)) => {
                let watch = Health::new(otlp, cause);
                let exporter = Watched::new(exporter, Arc::clone(&watch));
                builder = builder.with_log_processor(
                    BatchLogProcessor::builder(exporter).with_batch_config(batch(settings)).build(),
                );
                health = Some(watch);
            }
            Err(problem) => problems.push(problem),
        }
    }
    if settings.console {
        builder = builder.with_simple_exporter(opentelemetry_stdout::LogExporter::default());
    }
    let any = health.is_some() || settings.console;
    (any.then(|| builder.build()), health)
}

fn batch(settings: &LogSettings) -> opentelemetry_sdk::logs::BatchConfig {
    let mut builder = BatchConfigBuilder::default();
    if let Some(queue) = settings.batch.queue {
        builder = builder.with_max_queue_size(queue);
    }
    if let Some(size) = settings.batch.size {
        builder = builder.with_max_export_batch_size(size);
    }
    if let Some(delay) = settings.batch.delay {
        builder = builder.with_scheduled_delay(delay);
    }
    builder.build()
}

/// The destination of log lines, and whether they are coloured.
pub(crate) struct Printer<W> {
    pub writer: W,
    pub colour: bool,
}

/// Combines all layers.
pub(crate) fn subscriber<W>(
    settings: &Settings,
    debug: bool,
    printer: Printer<W>,
    tracer: Option<Router>,
    events: Option<&SdkLoggerProvider>,
) -> Dispatch
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let depth = if debug { Level::DEBUG } else { Level::INFO };
    let ids = ids::Source::default();
    let traced = tracer.is_some();
    let mut layers: Vec<Box<dyn Layer<Registry> + Send + Sync>> = Vec::new();
    // The tracer comes first, because the printer asks it for ids.
    if let Some(tracer) = tracer {
        let layer = tracing_opentelemetry::layer()
            .with_tracer(tracer)
            .with_threads(false)
            // The source location is the same for all spans of a name.
            .with_location(false)
            .with_tracked_inactivity(false);
        layers.push(layer.with_filter(filter_fn(move |m| ours(m) && *m.level() <= depth)).boxed());
    }
    if settings.any_otlp() {
        layers.push(Ear.with_filter(filter_fn(rejected::concerns)).boxed());
    }
    if let Some(events) = events {
        let bridge = OpenTelemetryTracingBridge::new(&CleanLogs(events.clone()));
        layers.push(bridge.with_filter(env_filter(settings, debug).and(filter_fn(ours))).boxed());
    }
    let always =
        filter_fn(move |m| (m.is_span() && ours(m) && *m.level() <= depth) || worth_showing(m));
    let filter = env_filter(settings, debug).or(always);
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(printer.writer)
        .with_ansi(false)
        .log_internal_errors(false);
    layers.push(match settings.format {
        LogFormat::Text => lines
            .fmt_fields(DefaultFields::new())
            .event_format(Line::new(LogFormat::Text, ids.clone(), printer.colour))
            .with_filter(filter)
            .boxed(),
        LogFormat::Json => lines
            .fmt_fields(JsonFields::new())
            .event_format(Line::new(LogFormat::Json, ids.clone(), false))
            .with_filter(filter)
            .boxed(),
    });
    let dispatch = Dispatch::new(tracing_subscriber::registry().with(layers));
    if traced {
        ids.connect(&dispatch);
    }
    dispatch
}

fn ours(metadata: &Metadata<'_>) -> bool {
    metadata.target().starts_with("klio")
}

/// The OpenTelemetry libraries' diagnostics are off unless OTEL_LOG_LEVEL is set, because they are repeated with every
/// failed export. The few listed here come once, and mean that something is lost for good.
fn worth_showing(metadata: &Metadata<'_>) -> bool {
    const NAMES: [&str; 6] = [
        "DroppingStarted",
        "InstrumentCreationFailed",
        "MetricValidationFailed",
        "MetricScrapeFailed",
        "InternalError",
        "WorkerThreadTerminated",
    ];
    metadata.is_event()
        && metadata.target().starts_with("opentelemetry")
        && *metadata.level() <= Level::WARN
        && NAMES.iter().any(|name| metadata.name().ends_with(name))
}

fn env_filter(settings: &Settings, debug: bool) -> EnvFilter {
    // The queue client logs every connection it makes; the supervisor logs what matters.
    let default = if debug { "info,klio=debug" } else { "info,async_nats=warn" };
    let wanted = settings.filter.as_deref().unwrap_or(default);
    // This comes first, so that the user's own directive for it wins.
    EnvFilter::builder().parse_lossy(format!("opentelemetry={},{wanted}", settings.sdk_level))
}
