//! Detects what the OTLP exporters only log: a collector that accepted only part of the data, or an answer that is not
//! OTLP.
//!
//! Both come with a good status, and the exporter reports them in diagnostics that are off. They are recorded on the
//! exporting thread, which asks for them right afterwards ([`taken`]), so that signals are not mixed up.

use std::{cell::Cell, fmt};
use tracing::{
    Event, Metadata, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{Layer, layer::Context};

/// What the answer to an export said besides its status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Said {
    /// This many spans, points or records were refused.
    Rejected(i64),
    /// The answer was not OTLP.
    Nonsense,
}

thread_local! {
    static SAID: Cell<Option<Said>> = const { Cell::new(None) };
}

/// What was recorded on this thread since the last call.
pub(crate) fn taken() -> Option<Said> {
    SAID.take()
}

/// Whether [`Ear`] records this event.
pub(crate) fn concerns(metadata: &Metadata<'_>) -> bool {
    let name = metadata.name();
    metadata.is_event()
        && metadata.target() == "opentelemetry-otlp"
        && (name.ends_with(".PartialSuccess") || name.ends_with(".ResponseParseError"))
}

/// The layer that records; to be filtered with [`concerns`].
pub(crate) struct Ear;

impl<S: Subscriber> Layer<S> for Ear {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut count = Count(0);
        event.record(&mut count);
        let parse_error = event.metadata().name().ends_with(".ResponseParseError");
        SAID.set(Some(if parse_error { Said::Nonsense } else { Said::Rejected(count.0) }));
    }
}

struct Count(i64);

impl Visit for Count {
    fn record_i64(&mut self, field: &Field, value: i64) {
        if field.name().starts_with("rejected_") {
            self.0 = value;
        }
    }
    fn record_debug(&mut self, _: &Field, _: &dyn fmt::Debug) {}
}
