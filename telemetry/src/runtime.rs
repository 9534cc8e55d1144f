//! The tokio runtime's figures, as observable instruments of the runtime in which [`observe`] is called.
//!
//! Only figures that tokio offers without `--cfg tokio_unstable` are used. These do not include polls, so the polls of
//! long tasks are timed here ([`Polls`]). The names are ours, because OpenTelemetry has none yet. Without metrics
//! nothing is timed.

use opentelemetry::{KeyValue, metrics::Meter};
use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};
use tokio::runtime::Handle;

/// A longer poll delays everything else on its worker; for example an fsync belongs on a blocking thread.
const SLOW: Duration = Duration::from_millis(10);

/// Times the polls of the tasks given to [`Polls::watch`]. Cheap to clone; the default value times nothing.
#[derive(Debug, Clone, Default)]
pub struct Polls(Option<Arc<Counts>>);

#[derive(Debug, Default)]
struct Counts {
    polls: AtomicU64,
    nanoseconds: AtomicU64,
    slow: AtomicU64,
}

impl Polls {
    /// A value that times polls.
    pub(crate) fn timing() -> Self {
        Self(Some(Arc::default()))
    }

    /// Wraps a task so that its polls are timed. As cancel-safe as the task.
    pub fn watch<F: Future>(&self, task: F) -> Watched<F> {
        Watched { task: Box::pin(task), counts: self.0.clone() }
    }
}

/// A task whose polls are timed.
#[derive(Debug)]
pub struct Watched<F> {
    task: Pin<Box<F>>,
    counts: Option<Arc<Counts>>,
}

impl<F: Future> Future for Watched<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let Some(counts) = self.counts.clone() else { return self.task.as_mut().poll(cx) };
        let begun = Instant::now();
        let polled = self.task.as_mut().poll(cx);
        let took = begun.elapsed();
        counts.polls.fetch_add(1, Relaxed);
        let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        counts.nanoseconds.fetch_add(nanoseconds, Relaxed);
        if took > SLOW {
            counts.slow.fetch_add(1, Relaxed);
        }
        polled
    }
}

fn observe_polls(meter: &Meter, polls: &Polls) {
    let Some(counts) = &polls.0 else { return };
    let (all, time, slow) = (counts.clone(), counts.clone(), counts.clone());
    meter
        .u64_observable_counter("klio.runtime.polls")
        .with_unit("{poll}")
        .with_description("polls of Klio's own long tasks")
        .with_callback(move |observer| observer.observe(all.polls.load(Relaxed), &[]))
        .build();
    meter
        .f64_observable_counter("klio.runtime.poll_time")
        .with_unit("s")
        .with_description("time spent in polls of Klio's own long tasks")
        .with_callback(move |observer| {
            observer.observe(time.nanoseconds.load(Relaxed) as f64 / 1e9, &[]);
        })
        .build();
    meter
        .u64_observable_counter("klio.runtime.slow_polls")
        .with_unit("{poll}")
        .with_description(
            "polls of Klio's own long tasks that occupied a worker for more than 10 ms",
        )
        .with_callback(move |observer| observer.observe(slow.slow.load(Relaxed), &[]))
        .build();
}

/// Registers the instruments; outside a runtime those of the runtime are left out.
pub(crate) fn observe(meter: &Meter, polls: &Polls) {
    observe_polls(meter, polls);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn polls_are_counted_and_a_slow_one_is_told_from_the_others() {
        let polls = Polls::timing();
        let task = async {
            tokio::task::yield_now().await;
            // Blocks on purpose: a poll is slow only if it takes the time.
            std::thread::sleep(SLOW * 2);
            7
        };
        assert_eq!(polls.watch(task).await, 7);
        let counts = polls.0.as_ref().unwrap();
        assert_eq!((counts.polls.load(Relaxed), counts.slow.load(Relaxed)), (2, 1));
        assert!(counts.nanoseconds.load(Relaxed) >= 2 * SLOW.as_nanos() as u64);
    }

    #[tokio::test]
    async fn without_metrics_nothing_is_timed() {
        assert_eq!(Polls::default().watch(async { 7 }).await, 7);
    }
}
