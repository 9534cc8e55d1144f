//! W3C trace context in carriers with text keys, such as gRPC metadata and NATS headers.
//!
//! OTEL_PROPAGATORS selects the formats (tracecontext and baggage by default). When tracing is off nothing is written,
//! and a received context is used only to show the caller's trace id in log lines.

use crate::{env::Propagator, ids};
use opentelemetry::{
    Context,
    baggage::BaggageExt,
    global,
    propagation::{Extractor, Injector, TextMapCompositePropagator, TextMapPropagator},
    trace::TraceContextExt,
};
use opentelemetry_sdk::propagation::{BaggagePropagator, TraceContextPropagator};
use tracing_opentelemetry::OpenTelemetrySpanExt;

struct Set<'a>(&'a mut dyn FnMut(&str, String));

impl Injector for Set<'_> {
    fn set(&mut self, key: &str, value: String) {
        (self.0)(key, value);
    }
}

struct Get(Vec<(&'static str, String)>);

/// All keys that the two propagators read.
const KEYS: [&str; 3] = ["traceparent", "tracestate", "baggage"];

impl Get {
    // `Extractor::get` returns a reference and the carrier an owned value, so all values are read first.
    fn new(get: &dyn Fn(&str) -> Option<String>) -> Self {
        Self(KEYS.iter().filter_map(|k| get(k).map(|v| (*k, v))).collect())
    }
}

impl Extractor for Get {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|(k, _)| *k == key).map(|(_, v)| v.as_str())
    }
    fn keys(&self) -> Vec<&str> {
        self.0.iter().map(|(k, _)| *k).collect()
    }
}

/// Writes the current tracing span's context, with one call of `set` per header. Writes nothing outside a span.
pub fn inject(set: &mut dyn FnMut(&str, String)) {
    if crate::BARE {
        return;
    }
    let cx = tracing::Span::current().context();
    if cx.span().span_context().is_valid() {
        global::get_text_map_propagator(|p| p.inject_context(&cx, &mut Set(set)));
    }
}

/// Makes the sender's span the parent of `span`, which must not have been entered yet. With broken or missing headers
/// `span` stays a root.
pub fn adopt(span: &tracing::Span, get: &dyn Fn(&str) -> Option<String>) {
    if crate::BARE {
        return;
    }
    let carrier = Get::new(get);
    let cx = global::get_text_map_propagator(|p| p.extract_with_context(&Context::new(), &carrier));
    let remote = cx.span().span_context().clone();
    // Baggage may be sent without a trace context.
    if !remote.is_valid() && cx.baggage().is_empty() {
        return;
    }
    if span.set_parent(cx).is_err() && remote.is_valid() {
        ids::adopt(span, &remote);
    }
}

/// Installs `chosen` as the process's propagators.
pub(crate) fn install(chosen: &[Propagator]) {
    global::set_text_map_propagator(composite(chosen));
}

fn composite(chosen: &[Propagator]) -> TextMapCompositePropagator {
    let each = chosen.iter().map(|p| -> Box<dyn TextMapPropagator + Send + Sync> {
        match p {
            Propagator::TraceContext => Box::new(TraceContextPropagator::new()),
            Propagator::Baggage => Box::new(BaggagePropagator::new()),
        }
    });
    TextMapCompositePropagator::new(each.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry::{KeyValue, trace::SpanId, trace::TraceId};
    use opentelemetry::{trace::SpanContext, trace::TraceFlags, trace::TraceState};

    #[test]
    fn only_the_chosen_formats_are_written() {
        let span = SpanContext::new(
            TraceId::from(1_u128),
            SpanId::from(2_u64),
            TraceFlags::SAMPLED,
            true,
            TraceState::default(),
        );
        let cx = Context::new()
            .with_remote_span_context(span)
            .with_baggage([KeyValue::new("tenant", "a")]);
        let table: [(&[Propagator], &[&str]); 4] = [
            (&[], &[]),
            (&[Propagator::TraceContext], &["traceparent", "tracestate"]),
            (&[Propagator::Baggage], &["baggage"]),
            (
                &[Propagator::TraceContext, Propagator::Baggage],
                &["baggage", "traceparent", "tracestate"],
            ),
        ];
        for (chosen, expected) in table {
            let mut keys = Vec::new();
            let mut set = |k: &str, _: String| keys.push(k.to_owned());
            composite(chosen).inject_context(&cx, &mut Set(&mut set));
            keys.sort();
            assert_eq!(keys, expected, "{chosen:?}");
        }
    }
}
