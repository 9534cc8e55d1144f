//! The server as a whole: configuration -> build -> run -> drain.
//!
//! Start: first the ports (a taken port must not leave half a server), then tier 1 with its recovery, then everything
//! else. Receiving WAL needs tier 1 only: queue and bucket may be down (P4), except that for a cluster unknown to tier
//! 1 the bucket is asked first (P8).
//!
//! Stop: no new streams are accepted, sessions end with what is durable, seals finish, and consumer and queue stop,
//! all within [`DRAIN_TIMEOUT`]. Tasks that do not end in time are logged by name.

mod data;
mod ports;
mod services;

use crate::{
    config::Config, maintenance::MaintenanceMetrics, private, receive::as_of, seal,
    status::now_unix,
};
use data::{Data, Workers};
use klio_storage::tier2::Tier2;
use klio_telemetry::Telemetry;
use ports::Ports;
use services::{Access, Services};
use std::{future::Future, sync::Arc, time::Duration};
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// The time for the whole shutdown, except the flush of telemetry.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(20);
/// The part of it for removing unfinished uploads from the bucket.
const ABANDON_TIMEOUT: Duration = Duration::from_secs(5);

/// A task with its name, for the log.
type Task = (&'static str, JoinHandle<()>);

/// What ends the parts of a server, in this order.
#[derive(Debug, Clone, Default)]
struct Ends {
    /// Ends accepting and receiving.
    front: CancellationToken,
    /// Ends sealing, uploading and answering.
    back: CancellationToken,
    /// Ends the queue and its child, when nobody uses it any more.
    last: CancellationToken,
}

/// A running server.
pub struct Running {
    ends: Ends,
    sessions: TaskTracker,
    tasks: Vec<Task>,
    background: Vec<Task>,
    workers: Workers,
    tier2: Option<Tier2>,
}

/// Starts everything. The server accepts connections when this returns.
///
/// # Errors
/// A port, a certificate or tier 1 cannot be used.
pub async fn start(config: Config, telemetry: &Telemetry) -> anyhow::Result<Running> {
    let ports = Ports::bind(&config, telemetry).await?;
    private::warn_of_readable(&config.secret_files());
    let certificates = Access::certificates(&config)?;
    let ends = Ends::default();
    let (data, workers) = Data::open(&config, telemetry, &ends).await?;
    let (sealer, hints) = seal::channel();
    let access = Access::new(&config, certificates, &data);
    let metrics = Arc::new(MaintenanceMetrics::default());
    let maintenance = data.maintenance(&config, &metrics).await?;
    let board = data.board(&access, metrics, telemetry);
    let sessions = TaskTracker::new();

    let polls = telemetry.polls();
    let sealing = seal::run(data.sealing(&config), hints, ends.back.clone());
    let keeping =
        as_of::run(data.store.clone(), data.registry.clone(), now_unix, ends.back.clone());
    let measuring = access.quotas.clone().keep_measuring(data.base.clone(), ends.back.clone());
    let maintaining = maintenance.clone().run(ends.front.clone());
    let background = vec![
        ("seal", spawn(polls.watch(sealing))),
        ("maintenance", spawn(polls.watch(maintaining))),
        ("as of", spawn(polls.watch(keeping))),
        ("quota", spawn(measuring)),
    ];
    let services = Services { access, board, maintenance, sealer, sessions: sessions.clone() };
    let tasks = services.serve(config, &data, ports, &ends, telemetry).await?;
    Ok(Running { ends, sessions, tasks, background, workers, tier2: data.tier2 })
}

/// The only place that spawns tasks: every handle is owned by [`Running`].
#[expect(clippy::disallowed_methods, reason = "the handle is owned by Running")]
pub(crate) fn spawn(task: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
    tokio::spawn(task)
}

impl Running {
    /// Resolves with the name of a required task that has ended by itself.
    pub async fn broken(&mut self) -> &'static str {
        let tasks = self.tasks.iter_mut().chain(&mut self.background);
        let ends = tasks.map(|(name, handle)| {
            Box::pin(async move {
                if let Err(error) = handle.await {
                    tracing::error!(task = *name, %error, "a task ended unexpectedly");
                }
                *name
            })
        });
        futures::future::select_all(ends).await.0
    }

    /// Stops in order; returns within [`DRAIN_TIMEOUT`].
    pub async fn stop(mut self) {
        let deadline = tokio::time::Instant::now() + DRAIN_TIMEOUT;
        self.ends.front.cancel();
        self.sessions.close();
        if tokio::time::timeout_at(deadline, self.sessions.wait()).await.is_err() {
            tracing::warn!(left = self.sessions.len(), "streams did not end in time");
        }
        self.ends.back.cancel();
        for (name, mut handle) in self.background.into_iter().chain(self.tasks) {
            if handle.is_finished() {
                continue;
            }
            if tokio::time::timeout_at(deadline, &mut handle).await.is_err() {
                tracing::warn!(task = name, "task did not end in time");
                handle.abort();
            }
        }
        drain("consumer", &mut self.workers.consumer, deadline).await;
        if let Some(tier2) = &self.tier2 {
            abandon(tier2, deadline).await;
        }
        self.ends.last.cancel();
        drain("queue", &mut self.workers.queue, deadline).await;
        tracing::info!("stopped");
    }
}

/// Removes unfinished uploads. An object store that does not answer does not delay the stop; its lifecycle rule
/// removes what is left.
async fn abandon(tier2: &Tier2, deadline: tokio::time::Instant) {
    let until = deadline.min(tokio::time::Instant::now() + ABANDON_TIMEOUT);
    if tokio::time::timeout_at(until, tier2.abandon()).await.is_err() {
        tracing::warn!("tier 2 did not answer in time; unfinished uploads stay there");
    }
}

async fn drain(name: &'static str, tasks: &mut JoinSet<()>, deadline: tokio::time::Instant) {
    let all = async { while tasks.join_next().await.is_some() {} };
    if tokio::time::timeout_at(deadline, all).await.is_err() {
        tracing::warn!(task = name, "task did not end in time");
    }
}
