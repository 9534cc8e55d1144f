//! One cluster's jobs: pulled from its own durable consumer, uploaded, recorded, acknowledged.
//!
//! W1  acknowledged only after the upload is proven and recorded.
//! W2  redelivered without end; the pause doubles up to five minutes, with jitter.
//! W3  a long upload, or a wait for a slot, tells the queue that it goes on.

use super::{Attempt, Parts};
use crate::queue::{Connection, Job, JobError, STREAM, job::subjects_of};
use async_nats::jetstream::{
    AckKind, Message,
    consumer::{AckPolicy, DeliverPolicy, PullConsumer, pull},
};
use futures::StreamExt;
use klio_storage::{
    Error, Kind,
    layout::{ClusterName, WalFile},
    tier2::{Outcome, Sha256Sum, Source, Uploaded},
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::{
    sync::{Mutex, Semaphore},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

/// Without a word for this long, a job goes to somebody else.
const ACK_WAIT: Duration = Duration::from_secs(30);
const PROGRESS_INTERVAL: Duration = Duration::from_secs(10);
/// Jobs out at once, delayed ones included: so many files of one cluster may fail without stopping
/// the others of that cluster.
const OUT_MAX: i64 = 10_000;
/// How long one question for jobs stays open.
const PULL_EXPIRES: Duration = Duration::from_secs(30);
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(300);
/// Between two tries to follow a queue that answers with errors.
const FOLLOW_PAUSE: Duration = Duration::from_secs(1);

/// The worker of a cluster.
pub(super) struct Worker {
    shared: Arc<Shared>,
    own_slots: Arc<Semaphore>,
    own_slots_max: usize,
}

struct Shared {
    parts: Parts,
    cluster: ClusterName,
    /// Of all clusters; fair, first come first served.
    slots: Arc<Semaphore>,
    /// The last attempt failed.
    failing: AtomicBool,
    /// While failing, one at a time: three hanging uploads must not take the slots of others.
    one_at_a_time: Mutex<()>,
}

impl Worker {
    pub(super) fn new(
        parts: Parts,
        cluster: ClusterName,
        slots: Arc<Semaphore>,
        per_cluster: usize,
    ) -> Self {
        let shared = Shared {
            parts,
            cluster,
            slots,
            failing: AtomicBool::new(false),
            one_at_a_time: Mutex::new(()),
        };
        Self {
            shared: Arc::new(shared),
            own_slots: Arc::new(Semaphore::new(per_cluster)),
            own_slots_max: per_cluster,
        }
    }

    /// Until cancelled. Uploads outlive a reconnect; only their acknowledgement may get lost.
    pub(super) async fn run(self, cancel: CancellationToken) {
        let mut uploads = JoinSet::new();
        let mut connections = self.shared.parts.queue.connection();
        loop {
            let connection = tokio::select! {
                () = cancel.cancelled() => break,
                up = connections.wait_for(Option::is_some) => match up {
                    Ok(connection) => connection.clone(),
                    Err(_) => break,
                },
            };
            let Some(connection) = connection else { continue };
            let generation = connection.generation;
            let ended = tokio::select! {
                () = cancel.cancelled() => break,
                ended = self.follow(&connection, &mut uploads) => ended,
                _ = connections.wait_for(|c| c.as_ref().is_none_or(|c| c.generation != generation)) => {
                    continue;
                }
            };
            if let Err(error) = ended {
                tracing::debug!(cluster = %self.shared.cluster, %error, "jobs cannot be pulled");
                tokio::select! {
                    () = cancel.cancelled() => break,
                    () = tokio::time::sleep(FOLLOW_PAUSE) => {}
                }
            }
        }
        uploads.shutdown().await;
    }

    /// Pulls and starts jobs until something breaks.
    async fn follow(
        &self,
        connection: &Connection,
        uploads: &mut JoinSet<()>,
    ) -> Result<(), async_nats::Error> {
        let consumer: PullConsumer = connection
            .jetstream
            .create_consumer_on_stream(consumer_config(&self.shared.cluster), STREAM)
            .await?;
        loop {
            while uploads.try_join_next().is_some() {}
            let first = Arc::clone(&self.own_slots).acquire_owned().await?;
            let mut free = vec![first];
            while free.len() < self.own_slots_max
                && let Ok(more) = Arc::clone(&self.own_slots).try_acquire_owned()
            {
                free.push(more);
            }
            let batch = consumer.batch().max_messages(free.len()).expires(PULL_EXPIRES);
            let mut messages = batch.messages().await?;
            let mut any = false;
            while let Some(message) = messages.next().await {
                any = true;
                let Some(slot) = free.pop() else { break };
                let (shared, message) = (Arc::clone(&self.shared), message?);
                uploads.spawn(async move {
                    shared.handle(message).await;
                    drop(slot);
                });
            }
            if !any {
                // Somebody may have removed it: then nothing would ever come.
                consumer.get_info().await?;
            }
        }
    }
}

fn consumer_config(cluster: &ClusterName) -> pull::Config {
    pull::Config {
        durable_name: Some(format!("wal-{cluster}")),
        description: Some("WAL files of one cluster on their way to tier 2".into()),
        deliver_policy: DeliverPolicy::All,
        ack_policy: AckPolicy::Explicit,
        ack_wait: ACK_WAIT,
        max_deliver: -1,
        max_ack_pending: OUT_MAX,
        filter_subject: subjects_of(cluster),
        ..pull::Config::default()
    }
}

impl Shared {
    async fn handle(&self, message: Message) {
        let delivered = message.info().map_or(1, |info| info.delivered.max(1));
        let mut work = std::pin::pin!(self.process(&message, delivered));
        let answer = loop {
            tokio::select! {
                answer = &mut work => break answer,
                () = tokio::time::sleep(PROGRESS_INTERVAL) => {
                    let _ = message.ack_with(AckKind::Progress).await;
                }
            }
        };
        // Lost: the job comes again, and finds its work done.
        if let Err(error) = message.ack_with(answer).await {
            tracing::debug!(cluster = %self.cluster, %error, "an acknowledgement was lost");
        }
    }

    async fn process(&self, message: &Message, delivered: i64) -> AckKind {
        let job = match Job::decode(&message.payload) {
            Ok(job) if job.cluster == self.cluster => job,
            Ok(job) => return self.refuse(&format!("a job of {} came here", job.cluster)),
            Err(error @ JobError::Version(_)) => return self.refuse(&error.to_string()),
            Err(error) => {
                // Nothing can ever read it, and the file it meant is found by comparing.
                tracing::error!(cluster = %self.cluster, %error, "a job that is none is dropped");
                return AckKind::Term;
            }
        };
        let span = tracing::info_span!(
            "offload",
            otel.kind = "consumer",
            otel.status_code = tracing::field::Empty,
            error.type = tracing::field::Empty,
            messaging.system = "nats",
            cluster = %job.cluster,
            timeline = job.file.timeline().get(),
            segment = %job.file,
            bytes = job.size,
            delivered,
            outcome = tracing::field::Empty,
        );
        klio_telemetry::propagate::adopt(&span, &|key| {
            message.headers.as_ref()?.get(key).map(|value| value.as_str().to_owned())
        });
        self.offload(&job, delivered).instrument(span).await
    }

    /// Left in the queue for a server that understands it.
    fn refuse(&self, problem: &str) -> AckKind {
        tracing::warn!(cluster = %self.cluster, problem, "a job is left in the queue");
        self.parts.archives.problem(&self.cluster, None, problem.to_owned());
        AckKind::Nak(Some(RETRY_MAX))
    }

    async fn offload(&self, job: &Job, delivered: i64) -> AckKind {
        let result = {
            let _alone = match self.failing.load(Ordering::Relaxed) {
                true => Some(self.one_at_a_time.lock().await),
                false => None,
            };
            let Ok(_slot) = self.slots.acquire().await else { return AckKind::Nak(None) };
            self.upload(job).await
        };
        let (attempt, result) = match result {
            Ok(uploaded) => match self.record(job, uploaded).await {
                Ok(attempt) => (attempt, Ok(())),
                Err(error) => (Attempt::Transient, Err(error)),
            },
            Err(error) => (attempt_of(&error), Err(error)),
        };
        self.failing.store(result.is_err() && is_of_the_store(attempt), Ordering::Relaxed);
        let span = tracing::Span::current();
        span.record("outcome", attempt.as_str());
        let Err(error) = result else { return AckKind::Ack };
        self.parts.observer.attempted(&self.cluster, attempt, 0);
        span.record("otel.status_code", "ERROR");
        span.record("error.type", attempt.as_str());
        let pause = pause(delivered);
        tracing::warn!(
            cluster = %self.cluster, file = %job.file, %error, attempt = delivered,
            pause_seconds = pause.as_secs_f64(), "offload failed; tried again"
        );
        let text = format!("offload {}: {error}", job.file);
        self.parts.archives.problem(&self.cluster, Some(job.file), text);
        AckKind::Nak(Some(pause))
    }

    async fn upload(&self, job: &Job) -> Result<Uploaded, Error> {
        let key = job.file.key(&self.cluster);
        let source = self.source(job);
        match self.parts.tier2.upload(&source, &key).await {
            // Not on tier 1 any more: done if tier 2 has it.
            Err(error) if error.kind == Kind::NotFound => {
                match self.parts.tier2.size_of(&key).await? {
                    Some(size) => Ok(Uploaded {
                        size,
                        sha256: job.sha256.unwrap_or(Sha256Sum::new([0; 32])),
                        outcome: Outcome::AlreadyThere,
                    }),
                    None => Err(error.hint("the file is in neither tier: restore it to tier 1")),
                }
            }
            result => result,
        }
    }

    fn source(&self, job: &Job) -> Source {
        let files = &self.parts.files;
        let segment = matches!(job.file, WalFile::Segment(_));
        let size = segment.then(|| files.segment_size(&self.cluster)).flatten();
        Source {
            path: files.path(&self.cluster, job.file),
            sha256: job.sha256,
            zstd: !matches!(job.file, WalFile::History(_)),
            plaintext_bytes: size.map(|size| size.bytes()),
        }
    }

    /// R1 before W1.
    async fn record(&self, job: &Job, uploaded: Uploaded) -> Result<Attempt, Error> {
        let path = self.parts.files.path(&self.cluster, job.file);
        let local_size = tokio::fs::metadata(&path).await.ok().map(|m| m.len());
        let archives = &self.parts.archives;
        archives.record(&self.cluster, job.file, local_size, uploaded).await?;
        let (attempt, bytes) = match uploaded.outcome {
            Outcome::Stored => (Attempt::Stored, uploaded.size),
            Outcome::AlreadyThere => (Attempt::AlreadyThere, 0),
        };
        self.parts.observer.attempted(&self.cluster, attempt, bytes);
        tracing::debug!(cluster = %self.cluster, file = %job.file, outcome = attempt.as_str(), "offloaded");
        Ok(attempt)
    }
}

const fn attempt_of(error: &Error) -> Attempt {
    match error.kind {
        Kind::NotFound => Attempt::Missing,
        Kind::Corrupt => Attempt::Corrupt,
        Kind::Conflict => Attempt::Conflict,
        Kind::Denied => Attempt::Denied,
        Kind::Invalid => Attempt::Invalid,
        Kind::Full | Kind::Poisoned | Kind::Transient | Kind::Io => Attempt::Transient,
    }
}

/// Trouble of one file says nothing about the next one.
const fn is_of_the_store(attempt: Attempt) -> bool {
    matches!(attempt, Attempt::Denied | Attempt::Invalid | Attempt::Transient)
}

/// W2: about 1, 2, 4 … 300 seconds, of which a random half to whole.
fn pause(delivered: i64) -> Duration {
    let doublings = (delivered.max(1) - 1).min(16) as u32;
    let whole = RETRY_MIN.saturating_mul(1 << doublings).min(RETRY_MAX);
    whole.mul_f64(rand::random_range(0.5..=1.0))
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn pauses_double_with_jitter_and_end_at_five_minutes() {
        for (delivered, most) in
            [(1, 1.0), (2, 2.0), (5, 16.0), (9, 256.0), (10, 300.0), (i64::MAX, 300.0)]
        {
            for _ in 0..50 {
                let seconds = pause(delivered).as_secs_f64();
                assert!(seconds <= most && seconds >= most / 2.0, "{delivered}: {seconds}");
            }
        }
    }
}
