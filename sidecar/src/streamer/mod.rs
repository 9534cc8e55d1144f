//! Feeds WAL from one replication slot to the server.
//!
//! The buffer is counted in bytes; when it is full we stop reading, and PostgreSQL keeps the WAL for us.
//! Feedback to PostgreSQL carries only what the server reported as flushed (P1).
//! Cancel-safe: every session asks the server where to begin (P2).
//! What can pass by itself is tried again, for ever, with growing pauses; what cannot ends the
//! program with the exit status of its code.

mod backoff;
mod batch;
mod choice;
pub mod disk;
mod flow;
mod metrics;
mod overlap;
mod plan;
mod prove;
mod pump;
mod refill;
mod session;
mod slot;
mod source;
#[cfg(test)]
mod tests;
mod trace;

pub use backoff::Backoff;
pub use choice::history_of;
pub use metrics::{CATALOGUE, Metrics, State};
pub use source::{Event, Identity, Postgres, Primary, Session, Wal, sort};

use crate::{
    config::{self, OnGap},
    error::{Error, Failure},
    server_link::ServerLink,
};
use klio_storage::layout::ClusterName;
use pump::Ended;
use rand::{SeedableRng, rngs::StdRng};
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

/// How to stream.
#[derive(Debug, Clone)]
pub struct Options {
    /// The cluster's name on the server.
    pub cluster: ClusterName,
    /// When WAL was removed before it was received.
    pub on_gap: OnGap,
    /// Most WAL in one message.
    pub batch_bytes: usize,
    /// Signs of life to both ends.
    pub status_interval: Duration,
    /// First pause after a failure.
    pub retry_min: Duration,
    /// Longest pause.
    pub retry_max: Duration,
    /// How long a stop waits for the last acknowledgement.
    pub stop_timeout: Duration,
}

impl Options {
    /// From the `[stream]` section.
    pub fn new(cluster: ClusterName, stream: &config::Stream) -> Self {
        Self {
            cluster,
            on_gap: stream.on_gap,
            // Validated to 2 MiB at most.
            batch_bytes: stream.batch_size.bytes() as usize,
            status_interval: stream.status_interval,
            retry_min: stream.retry_min,
            retry_max: stream.retry_max,
            stop_timeout: stream.stop_timeout,
        }
    }
}

/// Streams one cluster.
#[derive(Debug)]
pub struct Streamer<P> {
    primary: P,
    link: ServerLink,
    options: Options,
    metrics: Metrics,
    /// Random per process: the server lets the same writer come back at once, and fences others.
    writer_id: String,
}

impl<P: Primary> Streamer<P> {
    /// Opens nothing yet.
    pub fn new(primary: P, link: ServerLink, options: Options, metrics: Metrics) -> Self {
        let writer_id = uuid::Uuid::new_v4().to_string();
        Self { primary, link, options, metrics, writer_id }
    }

    /// Streams until `stop`, which ends it in good order.
    ///
    /// # Errors
    /// What does not pass by itself: see [`Failure::retryable`].
    pub async fn run(self, stop: CancellationToken) -> Result<(), Error> {
        let session = session::Stream {
            primary: &self.primary,
            link: &self.link,
            options: &self.options,
            metrics: &self.metrics,
            writer_id: &self.writer_id,
        };
        let mut backoff = Backoff::new(self.options.retry_min, self.options.retry_max);
        let mut rng = StdRng::from_os_rng();
        let mut memory = session::Memory::default();
        loop {
            let span = tracing::info_span!("wal.stream", cluster = %self.options.cluster);
            let result = session.run(&mut memory, &stop).instrument(span).await;
            let flushed = self.metrics.state.flushed();
            if flushed != memory.flushed {
                memory.flushed = flushed;
                backoff.reset();
            }
            match result {
                Ok(Ended::Stopped) => return Ok(()),
                Ok(Ended::Timeline) => continue,
                Ok(Ended::Shutdown | Ended::Failed) => {
                    tracing::info!("PostgreSQL shut down; all it had is durable on the server");
                }
                Err(error) if error.retryable() => {
                    self.metrics.on_reconnect(error.failure.name());
                    report(&error);
                }
                Err(error) => return Err(error),
            }
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                () = tokio::time::sleep(backoff.pause(&mut rng)) => {}
            }
        }
    }
}

fn report(error: &Error) {
    if error.failure == Failure::WalRemoved {
        tracing::error!(error.type = error.failure.name(), hint = error.hint, "{}", error.message);
    } else {
        tracing::warn!(error.type = error.failure.name(), hint = error.hint, "{}; trying again", error.message);
    }
}
