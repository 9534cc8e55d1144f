//! The trace id and span id of a log line.
//!
//! With the OpenTelemetry layer attached, they are the exported ids. Without it they are generated when a line inside
//! a span is logged for the first time, so that the lines of one piece of work can still be found together, and a span
//! without log lines costs nothing. Generated ids are never sent to anyone, because a peer could not find their span
//! (flags are 00, not sampled).

use opentelemetry::trace::{SpanContext, SpanId, TraceContextExt, TraceId};
use std::sync::{Arc, OnceLock};
use tracing::{Dispatch, Span, dispatcher::WeakDispatch};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::{
    Registry,
    registry::{LookupSpan, SpanRef},
};

/// The ids of a log line, as W3C defines them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ids {
    pub trace: TraceId,
    pub span: SpanId,
    pub flags: u8,
}

impl Ids {
    fn of(context: &SpanContext) -> Option<Self> {
        context.is_valid().then(|| Self {
            trace: context.trace_id(),
            span: context.span_id(),
            flags: context.trace_flags().to_u8(),
        })
    }
}

/// Finds the ids for the log formatter. It needs the finished dispatcher, because the OpenTelemetry layer can be asked
/// for its spans only through that. Until [`Source::connect`] is called, and without the layer, ids are generated.
#[derive(Debug, Clone, Default)]
pub(crate) struct Source {
    dispatch: Arc<OnceLock<WeakDispatch>>,
}

impl Source {
    /// Must be called once, with the dispatcher that has both the printer and the OpenTelemetry layer.
    pub(crate) fn connect(&self, dispatch: &Dispatch) {
        // A weak reference, because the dispatcher owns this value.
        let _ = self.dispatch.set(dispatch.downgrade());
    }

    /// The ids for a line logged in `span`.
    pub(crate) fn ids<S: for<'a> LookupSpan<'a>>(&self, span: &SpanRef<'_, S>) -> Ids {
        self.exported_ids(span).unwrap_or_else(|| made_up(span))
    }

    /// The ids of the innermost span that the OpenTelemetry layer did not filter out.
    fn exported_ids<S: for<'a> LookupSpan<'a>>(&self, span: &SpanRef<'_, S>) -> Option<Ids> {
        let dispatch = self.dispatch.get()?.upgrade()?;
        span.scope().find_map(|span| {
            let cx = tracing_opentelemetry::get_otel_context(&span.id(), &dispatch)?;
            Ids::of(cx.span().span_context())
        })
    }
}

/// Ids that were generated here or adopted from a peer, stored in the span.
struct MadeUp {
    trace: TraceId,
    span: SpanId,
}

fn made_up<S: for<'a> LookupSpan<'a>>(span: &SpanRef<'_, S>) -> Ids {
    let known = span.scope().find_map(|s| s.extensions().get::<MadeUp>().map(|m| m.trace));
    let trace = known.unwrap_or_else(|| {
        // Generated at the root, under its lock, so that two children that log at the same time get the same id.
        let root = span.scope().from_root().next();
        let new = TraceId::from(rand::random::<u128>().max(1));
        root.map_or(new, |root| kept(&root, new).trace)
    });
    kept(span, trace)
}

/// The ids stored in the span; if it has none yet, `trace` and a new span id are stored.
fn kept<S: for<'a> LookupSpan<'a>>(span: &SpanRef<'_, S>, trace: TraceId) -> Ids {
    let mut extensions = span.extensions_mut();
    if extensions.get_mut::<MadeUp>().is_none() {
        extensions.insert(MadeUp { trace, span: new_span_id() });
    }
    let (trace, span) = match extensions.get_mut::<MadeUp>() {
        Some(made_up) => (made_up.trace, made_up.span),
        None => (trace, new_span_id()),
    };
    Ids { trace, span, flags: 0 }
}

fn new_span_id() -> SpanId {
    SpanId::from(rand::random::<u64>().max(1))
}

fn with_span<T>(span: &Span, f: impl FnOnce(SpanRef<'_, Registry>) -> T) -> Option<T> {
    span.with_subscriber(|(id, dispatch)| {
        let registry = dispatch.downcast_ref::<Registry>()?;
        registry.span(id).map(f)
    })
    .flatten()
}

/// Gives `span` the trace id of a peer for its log lines, for the case that spans are not exported.
pub(crate) fn adopt(span: &Span, remote: &SpanContext) {
    with_span(span, |span| {
        let adopted = MadeUp { trace: remote.trace_id(), span: new_span_id() };
        span.extensions_mut().replace(adopted);
    });
}

/// The trace id of the current span, as 32 hexadecimal digits: the same as in its log lines.
pub fn current_trace_id() -> Option<String> {
    let span = Span::current();
    let cx = span.context();
    let trace = match Ids::of(cx.span().span_context()) {
        Some(ids) => ids.trace,
        None => with_span(&span, |span| made_up(&span).trace)?,
    };
    Some(trace.to_string())
}
