//! Publishes jobs without ever making the caller wait (P4).
//!
//! `publish` hands the job to a bounded channel and returns. A job that does not fit, or fails on the way, is dropped,
//! and its cluster is marked for reconciliation: the file is still on disk.

use super::{
    Error, Queue, Shared,
    job::{Job, Task},
    stream::already_queued,
};
use async_nats::{HeaderMap, header::NATS_MESSAGE_ID, jetstream};
use klio_storage::{
    crash_point,
    layout::{ClusterName, WalFile},
    tier2::Sha256Sum,
};
use std::{sync::Arc, time::Duration};
use tokio::{sync::mpsc, task::JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, field::Empty};

/// The most jobs that wait for the queue: a few seconds' worth of a server that seals as fast as it can.
pub(super) const WAITING_MAX: usize = 1024;
/// How many publishes may be under way at once, sharing an fsync of the queue.
const IN_FLIGHT_MAX: usize = 64;
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// A job with the trace it belongs to.
pub(super) struct Waiting {
    job: Task,
    headers: Vec<(String, String)>,
}

impl Waiting {
    /// A job with the current span's trace context.
    pub(super) fn new(job: Task) -> Self {
        let mut headers = Vec::new();
        klio_telemetry::propagate::inject(&mut |key, value| headers.push((key.to_owned(), value)));
        Self { job, headers }
    }
}

/// Called for each finished file before it is queued, so that it counts as not archived at once.
pub type Listener = Arc<dyn Fn(&Job) + Send + Sync>;

/// The receiving side's handle for announcing finished files. Cheap to clone, never blocks, never fails.
#[derive(Clone)]
pub struct Publisher {
    queue: Queue,
    listener: Option<Listener>,
}

impl Publisher {
    /// Publishes on this queue; `listener` is the archive's, if tier 2 is configured.
    pub const fn new(queue: Queue, listener: Option<Listener>) -> Self {
        Self { queue, listener }
    }

    /// Announces a finished file whose checksum is known.
    pub fn publish_sealed(
        &self,
        cluster: &ClusterName,
        file: WalFile,
        size: u64,
        sha256: Option<Sha256Sum>,
    ) {
        let job = Job { cluster: cluster.clone(), file, size, sha256 };
        if let Some(listener) = &self.listener {
            listener(&job);
        }
        self.queue.publish(job);
    }

    /// Announces a finished file.
    pub fn publish_path(&self, cluster: &ClusterName, file: WalFile, size: u64) {
        self.publish_sealed(cluster, file, size, None);
    }
}

/// Publishes waiting jobs until cancelled.
pub(super) async fn run(
    shared: Arc<Shared>,
    mut inbox: mpsc::Receiver<Waiting>,
    cancel: CancellationToken,
) {
    let mut flying = JoinSet::new();
    loop {
        let waiting = tokio::select! {
            () = cancel.cancelled() => break,
            Some(_) = flying.join_next() => continue,
            waiting = inbox.recv(), if flying.len() < IN_FLIGHT_MAX => waiting,
        };
        let Some(waiting) = waiting else { break };
        let shared = Arc::clone(&shared);
        flying.spawn(async move {
            if let Err(error) = publish_now(&shared, &waiting).await {
                tracing::debug!(%error, cluster = %waiting.job.cluster(), "cannot queue a job; the tiers will be compared");
                shared.wanted.cluster(waiting.job.cluster());
            }
        });
    }
    // Jobs without a confirmation are found by comparing the tiers at the next start.
    flying.shutdown().await;
}

/// Queues one job and waits for the queue's confirmation. Also `Ok` if it was queued already.
pub(super) async fn publish_now(shared: &Shared, waiting: &Waiting) -> Result<(), Error> {
    let fail = Error::nats("publish a job");
    let jetstream = {
        let connection = shared.connection.borrow();
        connection.as_ref().map(|c| c.jetstream.clone()).ok_or_else(|| fail(&"not connected"))?
    };
    let job = &waiting.job;
    let span = span_of(job);
    klio_telemetry::propagate::adopt(&span, &|key| {
        let found = waiting.headers.iter().find(|(name, _)| name == key);
        found.map(|(_, value)| value.clone())
    });
    let send = async {
        let sent = tokio::time::timeout(ANSWER_WITHIN, send(&jetstream, job)).await;
        sent.unwrap_or_else(|_| Err(fail(&"no answer in time")))
    };
    let outcome = send.instrument(span.clone()).await;
    // A queue that is full by its own limit works as intended.
    let full = outcome.as_ref().is_err_and(|e| e.to_string().contains("maximum bytes exceeded"));
    shared.published(outcome.is_ok() || full);
    if outcome.is_err() {
        span.record("otel.status_code", "ERROR");
        span.record("error.type", if full { "queue_full" } else { "queue" });
    }
    outcome
}

fn span_of(job: &Task) -> tracing::Span {
    match job {
        Task::Wal(job) => tracing::info_span!(
            "wal.publish",
            otel.kind = "producer",
            otel.status_code = Empty,
            error.type = Empty,
            messaging.system = "nats",
            cluster = %job.cluster,
            file = %job.file,
        ),
        Task::Base(job) => tracing::info_span!(
            "base.publish",
            otel.kind = "producer",
            otel.status_code = Empty,
            error.type = Empty,
            messaging.system = "nats",
            cluster = %job.cluster,
            object = %job.object,
        ),
    }
}

/// The message id. The queue drops a message whose id it has just seen, even if that job is done, so an object that
/// may have changed gets a new id. The subject ensures that it is not queued twice.
fn message_id(job: &Task) -> String {
    match job {
        Task::Base(job) if !job.object.is_fixed() => {
            format!("{}/{:016x}", job.id(), rand::random::<u64>())
        }
        _ => job.id(),
    }
}

async fn send(jetstream: &jetstream::Context, job: &Task) -> Result<(), Error> {
    let fail = Error::nats("publish a job");
    let mut headers = HeaderMap::new();
    headers.insert(NATS_MESSAGE_ID, message_id(job).as_str());
    // The consumer's span becomes a child of this one, which is a child of the sender's.
    klio_telemetry::propagate::inject(&mut |key, value| headers.insert(key, value.as_str()));
    let payload = job.encode().into();
    let published = jetstream.publish_with_headers(job.subject(), headers, payload).await;
    let answer = match published {
        Ok(answer) => answer.await.map(|_| ()),
        Err(error) => Err(error),
    };
    match answer {
        Err(error) if !already_queued(&error) => {
            let cause = std::error::Error::source(&error).map(|c| format!(": {c}"));
            Err(fail(&format_args!("{error}{}", cause.unwrap_or_default())))
        }
        _ => {
            crash_point!("queue.published");
            Ok(())
        }
    }
}
