//! Feeds WAL from one replication slot to the server.
//!
//! The buffer is limited in bytes. When it is full, the sidecar stops reading from the replication connection and
//! PostgreSQL retains the WAL. Status updates sent to PostgreSQL carry only positions that the server reported as
//! flushed (P1). A session may be cancelled at any point: the next one asks the server where to begin (P2). Transient
//! errors are retried indefinitely, with growing pauses. Any other error ends the program with the exit status of its
//! error code.

mod batch;
mod choice;
pub mod disk;
mod ends;
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

pub use choice::history_of;
pub use metrics::{CATALOGUE, Metrics, State};
pub use source::{Event, Identity, Postgres, Primary, Session, Wal};

use crate::{
    backoff::Backoff,
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

#[derive(Debug, Clone)]
pub struct Options {
    /// The cluster's name on the server.
    pub cluster: ClusterName,
    /// What to do when PostgreSQL removed WAL before the server received it.
    pub on_gap: OnGap,
    /// Maximum number of WAL bytes in one message.
    pub batch_bytes: usize,
    /// Interval of the periodic status messages to PostgreSQL and to the server.
    pub status_interval: Duration,
    /// First pause after a failure.
    pub retry_min: Duration,
    /// Longest pause between attempts.
    pub retry_max: Duration,
    /// How long a stop waits for the last acknowledgement.
    pub stop_timeout: Duration,
}

impl Options {
    pub fn new(cluster: ClusterName, stream: &config::Stream) -> Self {
        Self {
            cluster,
            on_gap: stream.on_gap,
            // `config` limits it to 2 MiB.
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
    /// Random per process: the server lets the same writer reconnect at once and fences any other.
    writer_id: String,
}

impl<P: Primary> Streamer<P> {
    /// Opens no connection yet.
    pub fn new(primary: P, link: ServerLink, options: Options, metrics: Metrics) -> Self {
        let writer_id = uuid::Uuid::new_v4().to_string();
        Self { primary, link, options, metrics, writer_id }
    }

    /// Streams until `stop` is cancelled, then sends what was read, waits for its acknowledgement and closes the
    /// streams.
    ///
    /// # Errors
    /// An error that retrying does not resolve: see [`Failure::retryable`].
    pub async fn run(self, stop: CancellationToken) -> Result<(), Error> {
        let session = ends::Stream {
            primary: &self.primary,
            link: &self.link,
            options: &self.options,
            metrics: &self.metrics,
            writer_id: &self.writer_id,
        };
        let mut backoff = Backoff::new(self.options.retry_min, self.options.retry_max);
        let mut rng = StdRng::from_os_rng();
        let mut memory = ends::Memory::default();
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
