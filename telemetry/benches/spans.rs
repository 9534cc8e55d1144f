//! Measures what a span, a log line and an instrument cost in different configurations: `cargo bench -p
//! klio-telemetry`.
//!
//! Plain timing with medians of several rounds, without a framework. If nothing is configured, the cost must be
//! negligible compared with the work that a span covers (a segment, a request): well under a microsecond. `--debug` or
//! `OTEL_*` variables show the other cases; `--features klio-telemetry/bare` shows a build without telemetry.

use klio_telemetry::{Options, Telemetry};
use opentelemetry::{
    KeyValue,
    metrics::{MeterProvider, NoopMeterProvider},
};
use std::{collections::BTreeMap, hint::black_box, time::Instant};

const ROUNDS: usize = 9;
const COUNT: u32 = 100_000;

fn median(mut work: impl FnMut()) -> f64 {
    let mut each: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let begin = Instant::now();
            (0..COUNT).for_each(|_| work());
            begin.elapsed().as_nanos() as f64 / f64::from(COUNT)
        })
        .collect();
    each.sort_by(f64::total_cmp);
    each[ROUNDS / 2]
}

fn measure(title: &str, telemetry: Option<&Telemetry>) {
    let span = median(|| {
        let segment = black_box(7_u64);
        let _entered = tracing::info_span!(target: "klio_bench", "seal", segment).entered();
    });
    let hidden =
        median(|| tracing::debug!(target: "klio_bench", value = black_box(7_u64), "hidden"));
    let meter = match telemetry {
        Some(telemetry) => telemetry.meter(),
        None => NoopMeterProvider::new().meter("klio"),
    };
    let (counter, attributes) =
        (meter.u64_counter("klio.bench").build(), [KeyValue::new("cluster_name", "main")]);
    let count = median(|| counter.add(black_box(7), &attributes));
    println!(
        "{title:<40} span {span:>8.1} ns   hidden line {hidden:>6.2} ns   counter {count:>6.1} ns"
    );
}

fn main() {
    measure("no subscriber at all", None);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime can be built");
    let _entered = runtime.enter();
    // `--debug` switches the OpenTelemetry layer on, without an exporter.
    let debug = std::env::args().any(|a| a == "--debug");
    let telemetry = klio_telemetry::start(Options {
        service: "klio",
        version: "0",
        debug,
        log_format: None,
        log_filter: debug.then(|| "info".to_owned()),
        overrides: BTreeMap::new(),
    });
    let telemetry = telemetry.expect("strict mode makes no sense here");
    let title = if debug {
        "started, ids as exported (--debug)"
    } else {
        "started, as the environment says"
    };
    measure(title, Some(&telemetry));
}
