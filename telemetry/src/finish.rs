//! The end: flush and stop every provider within one bound.
//!
//! Each signal has a thread of its own, so that one that hangs does not starve the others. Not tokio's
//! blocking threads: the runtime waits for those when it is dropped, and a hanging collector would delay the
//! exit after all. What is still at it when the time is up is left behind and ends with the process.

use opentelemetry_sdk::{
    error::OTelSdkResult, logs::SdkLoggerProvider, metrics::SdkMeterProvider,
    trace::SdkTracerProvider,
};
use std::{
    thread,
    time::{Duration, Instant},
};
use tokio::sync::mpsc;

/// Whether everything was flushed and stopped, without error, in time.
pub(crate) async fn all(
    traces: Option<SdkTracerProvider>,
    metrics: Option<SdkMeterProvider>,
    logs: Option<SdkLoggerProvider>,
    timeout: Duration,
) -> bool {
    let deadline = Instant::now() + timeout;
    let (report, mut reports) = mpsc::channel::<bool>(3);
    let detach = |name: &str, work: Box<dyn FnOnce() -> OTelSdkResult + Send>| {
        let report = report.clone();
        let run = move || {
            // Nobody listens any more once the time is up.
            let _ = report.try_send(work().is_ok());
        };
        thread::Builder::new().name(name.into()).spawn(run).is_ok()
    };
    let mut good = true;
    if let Some(provider) = traces {
        let work = move || provider.shutdown_with_timeout(left(deadline));
        good &= detach("flush-traces", Box::new(work));
    }
    if let Some(provider) = metrics {
        let work = move || provider.shutdown_with_timeout(left(deadline));
        good &= detach("flush-metrics", Box::new(work));
    }
    if let Some(provider) = logs {
        let work = move || provider.shutdown_with_timeout(left(deadline));
        good &= detach("flush-logs", Box::new(work));
    }
    drop(report);
    // The channel closes when the last thread is through.
    let finished = tokio::time::timeout_at(deadline.into(), async {
        while let Some(result) = reports.recv().await {
            good &= result;
        }
    });
    finished.await.is_ok() && good
}

fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}
