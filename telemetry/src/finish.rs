//! Shutdown: flushes and stops every provider within one time limit.
//!
//! Each signal has a thread of its own, so that one that hangs does not delay the others. These are not tokio's
//! blocking threads, because the runtime waits for those when it is dropped, and then a hanging collector would delay
//! the exit. A thread that is still working when the time is up is left behind and ends with the process.

use crate::env::Signal;
use opentelemetry_sdk::{
    error::OTelSdkResult, logs::SdkLoggerProvider, metrics::SdkMeterProvider,
    trace::SdkTracerProvider,
};
use std::{
    thread,
    time::{Duration, Instant},
};
use tokio::sync::mpsc;

/// How the shutdown of a signal ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// Everything was passed to the exporter. Whether the exporter delivered it is not known here.
    Flushed,
    /// The exporter, or the flush itself, ended with an error.
    Failed,
    /// It was still working when the time was up.
    Running,
}

/// How the shutdown of each signal ended; `Flushed` for signals that were off.
#[derive(Debug)]
pub(crate) struct Ends {
    pub traces: End,
    pub metrics: End,
    pub logs: End,
}

impl Ends {
    fn of(&mut self, signal: Signal) -> &mut End {
        match signal {
            Signal::Traces => &mut self.traces,
            Signal::Metrics => &mut self.metrics,
            Signal::Logs => &mut self.logs,
        }
    }
}

/// Flushes and stops the given providers, in at most `timeout`.
pub(crate) async fn all(
    traces: Option<SdkTracerProvider>,
    metrics: Option<SdkMeterProvider>,
    logs: Option<SdkLoggerProvider>,
    timeout: Duration,
) -> Ends {
    let deadline = Instant::now() + timeout;
    let (report, mut reports) = mpsc::channel::<(Signal, End)>(3);
    let mut ends = Ends { traces: End::Flushed, metrics: End::Flushed, logs: End::Flushed };
    let mut detach = |signal: Signal, work: Box<dyn FnOnce() -> OTelSdkResult + Send>| {
        let report = report.clone();
        let run = move || {
            let end = if work().is_ok() { End::Flushed } else { End::Failed };
            // The receiver is gone once the time is up.
            let _ = report.try_send((signal, end));
        };
        let spawned = thread::Builder::new().name(format!("flush-{}", signal.name())).spawn(run);
        *ends.of(signal) = if spawned.is_ok() { End::Running } else { End::Failed };
    };
    if let Some(provider) = traces {
        let work = move || provider.shutdown_with_timeout(left(deadline));
        detach(Signal::Traces, Box::new(work));
    }
    if let Some(provider) = metrics {
        let work = move || provider.shutdown_with_timeout(left(deadline));
        detach(Signal::Metrics, Box::new(work));
    }
    if let Some(provider) = logs {
        let work = move || provider.shutdown_with_timeout(left(deadline));
        detach(Signal::Logs, Box::new(work));
    }
    drop(report);
    // The channel closes when the last thread has ended; after the deadline the state of the others stays `Running`.
    let _ = tokio::time::timeout_at(deadline.into(), async {
        while let Some((signal, end)) = reports.recv().await {
            *ends.of(signal) = end;
        }
    })
    .await;
    ends
}

fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}
