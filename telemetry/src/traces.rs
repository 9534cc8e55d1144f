//! The tracer provider: exporters behind batch processors, the sampler.
//!
//! Without an exporter it still generates ids, which `--debug` needs, and starts no thread.

use crate::{
    env::{Batch, Problem, TraceSettings},
    otlp,
    watch::{Clean, Health, Watched},
};
use opentelemetry::{
    Context,
    trace::{SpanBuilder, Tracer, TracerProvider},
};
use opentelemetry_sdk::{
    Resource,
    trace::{BatchConfig, BatchConfigBuilder, BatchSpanProcessor, SdkTracer, SdkTracerProvider},
};
use std::sync::Arc;

/// The provider, and the health of its exporter if it sends to a collector.
pub(crate) fn build(
    settings: &TraceSettings,
    resource: Resource,
    problems: &mut Vec<Problem>,
) -> (SdkTracerProvider, Option<Arc<Health>>) {
    let mut health = None;
    let mut builder =
        SdkTracerProvider::builder().with_resource(resource).with_sampler(settings.sampler.clone());
    if let Some(otlp) = &settings.otlp {
        match otlp::spans(otlp) {
            Ok((exporter, cause)) => {
                let watch = Health::new(otlp, cause);
                let processor =
                    BatchSpanProcessor::builder(Watched::new(exporter, Arc::clone(&watch)))
                        .with_batch_config(batch(&settings.batch))
                        .build();
                builder = builder.with_span_processor(processor);
                health = Some(watch);
            }
            Err(problem) => problems.push(problem),
        }
    }
    if settings.console {
        let exporter = Clean(opentelemetry_stdout::SpanExporter::default());
        builder = builder.with_simple_exporter(exporter);
    }
    (builder.build(), health)
}

fn batch(settings: &Batch) -> BatchConfig {
    let mut builder = BatchConfigBuilder::default();
    if let Some(queue) = settings.queue {
        builder = builder.with_max_queue_size(queue);
    }
    if let Some(size) = settings.size {
        builder = builder.with_max_export_batch_size(size);
    }
    if let Some(delay) = settings.delay {
        builder = builder.with_scheduled_delay(delay);
    }
    builder.build()
}

/// The spans of a base backup's life cycle. The name of their tracer is part of the documented interface.
const BACKUP_SPANS: [&str; 4] = ["backup", "backup_run", "backup_verify", "backup_maintenance"];

/// Sends each span to its documented tracer: `klio.backup`, or `klio` for all others.
#[derive(Debug, Clone)]
pub(crate) struct Router {
    klio: SdkTracer,
    backup: SdkTracer,
}

impl Router {
    pub(crate) fn new(provider: &SdkTracerProvider) -> Self {
        Self { klio: provider.tracer("klio"), backup: provider.tracer("klio.backup") }
    }
}

impl Tracer for Router {
    type Span = opentelemetry_sdk::trace::Span;

    fn build_with_context(&self, builder: SpanBuilder, parent: &Context) -> Self::Span {
        let backup = BACKUP_SPANS.contains(&builder.name.as_ref());
        let tracer = if backup { &self.backup } else { &self.klio };
        tracer.build_with_context(builder, parent)
    }
}
