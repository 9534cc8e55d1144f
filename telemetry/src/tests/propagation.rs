//! The trace context passes through carriers, and broken headers do no harm.

use super::*;
use std::collections::HashMap;

type Carrier = HashMap<String, String>;

fn sent(dispatch: &Dispatch) -> (Carrier, Option<String>) {
    tracing::dispatcher::with_default(dispatch, || {
        let _span = tracing::info_span!("send").entered();
        let mut carrier = Carrier::new();
        propagate::inject(&mut |k, v| {
            carrier.insert(k.to_owned(), v);
        });
        (carrier, current_trace_id())
    })
}

fn received(dispatch: &Dispatch, carrier: &Carrier) -> Option<String> {
    tracing::dispatcher::with_default(dispatch, || {
        let span = tracing::info_span!("receive");
        propagate::adopt(&span, &|k| carrier.get(k).cloned());
        let _entered = span.entered();
        tracing::info_span!("deeper").in_scope(|| {
            tracing::info!("line");
            current_trace_id()
        })
    })
}

#[test]
fn the_trace_id_goes_on_at_the_other_end() {
    let (_sender, from, _) = built(true, &[]);
    let (carrier, trace) = sent(&from);
    assert!(carrier["traceparent"].ends_with("-01"), "{carrier:?}");
    for debug in [true, false] {
        let (_receiver, to, lines) = built(debug, &[]);
        assert_eq!(received(&to, &carrier), trace);
        assert!(lines.text().contains(&format!("trace_id={}", trace.clone().unwrap())));
    }
}

#[test]
fn without_tracing_nothing_is_sent() {
    let (_sender, from, _) = built(false, &[]);
    assert_eq!(sent(&from).0, Carrier::new());
}

#[test]
fn broken_headers_start_a_new_trace() {
    let (_receiver, to, _) = built(true, &[]);
    for bad in ["", "00-xyz", "00-00000000000000000000000000000000-0000000000000000-01", "\u{e9}"] {
        let carrier = Carrier::from([("traceparent".to_owned(), bad.to_owned())]);
        assert!(received(&to, &carrier).is_some(), "{bad:?}");
    }
    assert!(received(&to, &Carrier::new()).is_some());
}
