//! If nothing is configured, telemetry costs next to nothing.
//!
//! This is a program of its own, because telemetry is started for the whole process. The limits are loose, because it
//! also runs unoptimised on a busy machine. They detect a span that allocates a page or makes a system call, not one
//! that is twice as slow. Figures: docs/benchmarks.md.

use klio_telemetry::{BARE, Options};
use std::{
    collections::BTreeMap,
    hint::black_box,
    time::{Duration, Instant},
};

/// The limit for one span: a segment of 16 MiB takes more than a thousand times as long on any machine.
const SPAN_MAX: Duration = Duration::from_micros(30);
/// The limit for a log line that is not shown.
const HIDDEN_MAX: Duration = Duration::from_micros(3);

/// The best of several rounds, so that time used by another program does not count.
fn best(work: impl Fn()) -> Duration {
    const COUNT: u32 = 1000;
    let round = || {
        let begun = Instant::now();
        (0..COUNT).for_each(|_| work());
        begun.elapsed() / COUNT
    };
    (0..20).map(|_| round()).min().expect("rounds")
}

#[tokio::test]
async fn nothing_configured_makes_spans_and_hidden_lines_cost_next_to_nothing() {
    let options = Options {
        service: "klio",
        version: "0",
        debug: false,
        log_format: None,
        log_filter: Some("info".into()),
        // Independent of the tester's shell.
        overrides: BTreeMap::from([("OTEL_SDK_DISABLED".into(), "true".into())]),
    };
    let _telemetry = klio_telemetry::start(options).expect("nothing is misconfigured");
    let span = best(|| {
        let bytes = black_box(7_u64);
        let _entered = tracing::info_span!(target: "klio_cost", "seal", bytes).entered();
    });
    let hidden = best(|| tracing::debug!(target: "klio_cost", value = black_box(7_u64), "hidden"));
    assert!(span < SPAN_MAX, "a span takes {span:?}");
    assert!(hidden < HIDDEN_MAX, "a hidden line takes {hidden:?}");
}

/// The build without telemetry is for the cost benchmark only.
#[test]
fn a_usual_build_has_telemetry() {
    const { assert!(!BARE, "feature `bare` is on") };
}
