//! The tokio runtime's figures, as observables of the runtime [`observe`] is called in.
//!
//! Only what tokio offers without `--cfg tokio_unstable`. Names are ours: OpenTelemetry has none yet.

use opentelemetry::{KeyValue, metrics::Meter};
use tokio::runtime::Handle;

/// Registers the instruments; outside a runtime, none.
pub(crate) fn observe(meter: &Meter) {
    let Ok(handle) = Handle::try_current() else { return };
    gauge(
        meter,
        &handle,
        "klio.runtime.workers",
        "{thread}",
        "worker threads of the async runtime",
        |h| h.metrics().num_workers() as u64,
    );
    gauge(
        meter,
        &handle,
        "klio.runtime.tasks",
        "{task}",
        "tasks that are alive in the async runtime",
        |h| h.metrics().num_alive_tasks() as u64,
    );
    gauge(
        meter,
        &handle,
        "klio.runtime.queue_depth",
        "{task}",
        "tasks waiting in the async runtime's global queue",
        |h| h.metrics().global_queue_depth() as u64,
    );
    let busy = handle.clone();
    meter
        .f64_observable_counter("klio.runtime.busy_time")
        .with_unit("s")
        .with_description("time each worker of the async runtime spent on tasks")
        .with_callback(move |observer| {
            let metrics = busy.metrics();
            for worker in 0..metrics.num_workers() {
                let seconds = metrics.worker_total_busy_duration(worker).as_secs_f64();
                observer.observe(seconds, &[label(worker)]);
            }
        })
        .build();
    meter
        .u64_observable_counter("klio.runtime.parks")
        .with_description("times each worker of the async runtime ran out of tasks and slept")
        .with_callback(move |observer| {
            let metrics = handle.metrics();
            for worker in 0..metrics.num_workers() {
                observer.observe(metrics.worker_park_count(worker), &[label(worker)]);
            }
        })
        .build();
}

fn label(worker: usize) -> KeyValue {
    KeyValue::new("worker", i64::try_from(worker).unwrap_or(i64::MAX))
}

fn gauge(
    meter: &Meter,
    handle: &Handle,
    name: &'static str,
    unit: &'static str,
    description: &'static str,
    read: fn(&Handle) -> u64,
) {
    let handle = handle.clone();
    meter
        .u64_observable_gauge(name)
        .with_unit(unit)
        .with_description(description)
        .with_callback(move |observer| observer.observe(read(&handle), &[]))
        .build();
}
