//! Jobs from the receiving side to the consumer, on NATS JetStream.
//!
//! QUEUE1  the queue is a hint (P4): losing all of it loses nothing. Clusters whose jobs may have been lost are named
//!     by `wanted`, and the reconciler derives the jobs again.
//! QUEUE2  `publish` never waits and never fails, so no problem of the queue affects receiving.
//! QUEUE3  a job is queued at most once: its subject is its identity.
//! QUEUE4  an embedded server syncs every write, listens on loopback with credentials of this run, and never outlives
//!     us.

mod child;
mod config;
mod error;
pub mod job;
mod publish;
mod stream;
mod supervise;
mod wanted;

#[cfg(test)]
pub(crate) mod tests;

pub use config::QueueConfig;
pub use error::Error;
pub use job::{BaseJob, Job, JobError, Task};
pub use publish::{Listener, Publisher};
pub use stream::STREAM;
pub use wanted::Wanted;

use async_nats::jetstream;
use publish::Waiting;
use std::{
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::Instant,
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

/// A connection. A new generation means that all work on an older one must start again.
#[derive(Clone, Debug)]
pub struct Connection {
    /// Counts connections, and streams that had to be created again.
    pub generation: u64,
    /// JetStream on this connection.
    pub jetstream: jetstream::Context,
}

/// Cached numbers, at most a few seconds old; reading them causes no request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueStats {
    /// The number of stored jobs.
    pub messages: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Time of the oldest job, in Unix seconds; 0 when there is none, `None` before the first count.
    pub oldest_unix: Option<i64>,
    /// Whether jobs can be queued now.
    pub connected: bool,
}

/// What is created again when the queue does not deliver its jobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Repair {
    /// The stream, and with it all consumers and jobs. All clusters are compared afterwards.
    Stream,
    /// The embedded server's store on disk; for an existing NATS the stream.
    Store,
}

struct Shared {
    /// The requested repair, and the generation it applies to.
    repair: Mutex<Option<(u64, Repair)>>,
    connection: watch::Sender<Option<Connection>>,
    generation: AtomicU64,
    wanted: wanted::WantedSet,
    messages: AtomicU64,
    bytes: AtomicU64,
    /// -1 before the first count, 0 when there is no job.
    oldest_unix: AtomicI64,
    problem: Mutex<Option<String>>,
    /// Since when every publish has failed, and how many have.
    failing: Mutex<Option<(Instant, u32)>>,
}

impl Shared {
    /// Records whether a publish succeeded.
    fn published(&self, well: bool) {
        let mut failing = self.failing.lock().unwrap_or_else(PoisonError::into_inner);
        *failing = match *failing {
            _ if well => None,
            Some((since, count)) => Some((since, count.saturating_add(1))),
            None => Some((Instant::now(), 1)),
        };
    }

    fn set_problem(&self, problem: Option<String>) {
        *self.problem.lock().unwrap_or_else(PoisonError::into_inner) = problem;
    }
}

/// A cheap handle on the queue.
#[derive(Clone)]
pub struct Queue {
    shared: Arc<Shared>,
    inbox: mpsc::Sender<Waiting>,
}

/// A started queue; the caller owns its tasks, which end soon after `cancel`.
pub struct Started {
    pub queue: Queue,
    /// To be awaited at shutdown, after the consumer has ended. The last thing they do is to stop the child.
    pub tasks: JoinSet<()>,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue").field("stats", &self.stats()).finish()
    }
}

impl Queue {
    /// Starts the embedded server in `directory`, or connects to `config.url`, in the background. The queue may become
    /// ready later than the server (QUEUE2).
    ///
    /// # Errors
    /// Errors that waiting cannot solve: a bad configuration, or a missing or outdated executable.
    pub async fn start(
        config: &QueueConfig,
        directory: &Path,
        cancel: CancellationToken,
    ) -> Result<Started, Error> {
        let problems = config.validate();
        if !problems.is_empty() {
            return Err(Error::Config(problems.join("; ")));
        }
        let (inbox, waiting) = mpsc::channel(publish::WAITING_MAX);
        let shared = Arc::new(Shared {
            repair: Mutex::default(),
            connection: watch::Sender::new(None),
            generation: AtomicU64::new(0),
            wanted: wanted::WantedSet::default(),
            messages: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            oldest_unix: AtomicI64::new(-1),
            problem: Mutex::new(Some("starting".into())),
            failing: Mutex::default(),
        });
        let mut tasks = JoinSet::new();
        let (state, config) = (Arc::clone(&shared), config.clone());
        if let Some(url) = config.url.clone() {
            tasks.spawn(supervise::external(state, config, url, cancel.clone()));
        } else {
            let executable = config.find_executable()?;
            child::check_version(&executable).await?;
            let directory =
                std::path::absolute(directory).map_err(Error::file("resolve", directory))?;
            tasks.spawn(supervise::embedded(state, config, executable, directory, cancel.clone()));
        }
        tasks.spawn(publish::run(Arc::clone(&shared), waiting, cancel));
        Ok(Started { queue: Self { shared, inbox }, tasks })
    }

    /// Queues a job soon, with the current span's trace context. Never waits and never fails: if a job is lost on the
    /// way, its cluster is marked in `wanted`.
    pub fn publish(&self, job: impl Into<Task>) {
        let job = job.into();
        let cluster = job.cluster().clone();
        if self.inbox.try_send(Waiting::new(job)).is_err() {
            self.shared.wanted.cluster(&cluster);
        }
    }

    /// Queues a job and waits for the queue's confirmation; for the reconciler.
    ///
    /// # Errors
    /// The queue is down, full or slow. A job that is queued already is not an error.
    pub async fn publish_and_wait(&self, job: impl Into<Task>) -> Result<(), Error> {
        publish::publish_now(&self.shared, &Waiting::new(job.into())).await
    }

    /// Requests a repair of the connection of this generation; a newer connection has been repaired since. Loses
    /// nothing (QUEUE1).
    pub fn repair(&self, generation: u64, what: Repair) {
        let mut repair = self.shared.repair.lock().unwrap_or_else(PoisonError::into_inner);
        *repair = (*repair).max(Some((generation, what)));
    }

    /// Marks a cluster for reconciliation.
    pub fn want(&self, cluster: &klio_storage::layout::ClusterName) {
        self.shared.wanted.cluster(cluster);
    }

    /// Waits until something may have been lost, and takes what has to be compared. For one caller. Cancel-safe.
    pub async fn wanted(&self) -> Wanted {
        self.shared.wanted.take().await
    }

    /// The current connection, and its changes.
    pub fn connection(&self) -> watch::Receiver<Option<Connection>> {
        self.shared.connection.subscribe()
    }

    /// Cached numbers for gauges.
    pub fn stats(&self) -> QueueStats {
        QueueStats {
            messages: self.shared.messages.load(Ordering::Relaxed),
            bytes: self.shared.bytes.load(Ordering::Relaxed),
            oldest_unix: Some(self.shared.oldest_unix.load(Ordering::Relaxed)).filter(|t| *t >= 0),
            connected: self.shared.connection.borrow().is_some(),
        }
    }

    /// Why the queue is not connected, for /readyz; `None` when it is.
    pub fn problem(&self) -> Option<String> {
        if self.shared.connection.borrow().is_some() {
            return None;
        }
        let problem = self.shared.problem.lock().unwrap_or_else(PoisonError::into_inner);
        Some(problem.clone().unwrap_or_else(|| "not connected".into()))
    }
}
