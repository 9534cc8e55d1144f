//! The worker of one cluster's jobs of one kind: pulls them from its own durable consumer, processes them, and
//! acknowledges them.
//!
//! JOB1  a job is acknowledged only after its upload is proven and recorded.
//! JOB2  a job is redelivered without end. The pause doubles, with jitter: up to five minutes for an error of one
//!     file, up to half a minute for an error of the object store, so that uploads resume soon after an outage.
//! JOB3  during a long upload or a wait for a slot, the queue is told that the job is in progress.
//! JOB4  jobs that the queue does not deliver are created again, however the queue is damaged (P4): while files wait
//!     and no job comes, the remedies of [`Remedy`] are tried one after the other, and a problem is reported.

use super::{Attempt, wal::is_of_the_store};
use crate::queue::{Connection, JobError, Queue, Repair, STREAM};
use async_nats::jetstream::{
    AckKind, Message,
    consumer::{AckPolicy, DeliverPolicy, PullConsumer, pull},
};
use futures::{StreamExt, future::BoxFuture};
use klio_storage::crash_point;
use klio_storage::layout::ClusterName;
use std::{
    future::Future,
    sync::{
        Arc, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::{
    sync::{Mutex, Semaphore},
    task::JoinSet,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

/// If a job shows no progress for this long, the queue delivers it again.
const ACK_WAIT: Duration = Duration::from_secs(30);
const PROGRESS_INTERVAL: Duration = Duration::from_secs(10);
/// The most unacknowledged jobs, delayed ones included, so that this many files of a cluster may fail without stopping
/// its other files.
const OUT_MAX: i64 = 10_000;
/// How long one request for jobs stays open. After each request without an answer it is checked whether there should
/// have been a job.
const PULL_EXPIRES: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 15 });
/// How many errors of the queue in a row, a second apart, lead to a remedy.
const ERRORS_MAX: u32 = 3;
/// The pause after all remedies were tried: something else is wrong, and trying again at once would only lose jobs.
const TRIED_ALL_PAUSE: Duration = Duration::from_secs(600);
const RETRY_MIN: Duration = Duration::from_secs(1);
/// The longest pause for a file that is damaged or in conflict, which waits for a person.
const RETRY_MAX: Duration = Duration::from_secs(300);
/// The longest pause for the object store. Only an attempt shows that it answers again, and one attempt per cluster at
/// a time is no burden ([`Turns`]).
const STORE_RETRY_MAX: Duration = Duration::from_secs(30);
/// The pause between two attempts to use a queue that answers with errors.
const FOLLOW_PAUSE: Duration = Duration::from_secs(1);

/// How the jobs of one kind and cluster are processed.
pub(super) trait Process: Send + Sync + 'static {
    fn cluster(&self) -> &ClusterName;
    fn queue(&self) -> &Queue;
    /// The name of the durable consumer, its description, and its subjects.
    fn consumer(&self) -> (String, &'static str, String);
    /// Whether finished files wait for upload.
    fn waits(&self) -> bool;
    /// Records that archiving has stopped, and why; `None` when it continues.
    fn stands(&self, why: Option<String>);
    /// Whether the object of a job may change, so that it may be queued again while the job runs.
    fn changes(&self) -> bool {
        false
    }
    /// Called when the queue has removed the job, so that the same job can be queued again.
    fn removed_from_queue(&self, _message: &Message) {}
    /// Processes a job that was delivered for the `delivered`-th time, and returns how to acknowledge it.
    fn process<'a>(&'a self, message: &'a Message, delivered: i64) -> BoxFuture<'a, AckKind>;
}

/// What is done about a queue that delivers no jobs, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Remedy {
    /// Jobs may be lost: compare the tiers, which queues them again.
    Compare,
    /// The consumer has forgotten what it has to deliver: create it again, so that it delivers everything.
    Consumer,
    /// Create the stream again, for all clusters.
    Stream,
    /// Delete the queue's store on disk.
    Store,
}

/// What was tried since the last job came.
#[derive(Default)]
struct Tried {
    errors: u32,
    remedies: usize,
    /// Since when files wait and no job comes.
    since: Option<Instant>,
    pause_until: Option<Instant>,
}

impl Tried {
    const ALL: [Remedy; 4] = [Remedy::Compare, Remedy::Consumer, Remedy::Stream, Remedy::Store];

    /// The next remedy, if it is time for one.
    fn next(&mut self, now: Instant) -> Option<Remedy> {
        if self.pause_until.is_some_and(|until| now < until) {
            return None;
        }
        let next = Self::ALL[self.remedies % Self::ALL.len()];
        self.remedies += 1;
        self.pause_until = (next == Remedy::Store).then(|| now + TRIED_ALL_PAUSE);
        Some(next)
    }

    /// Counts an error of the queue. Comparing would not help against errors, so that remedy is skipped.
    fn failed(&mut self, now: Instant) -> Option<Remedy> {
        self.errors += 1;
        if self.errors < ERRORS_MAX {
            return None;
        }
        self.errors = 0;
        self.remedies = self.remedies.max(1);
        self.next(now)
    }

    /// Handles a request that brought no job. A remedy is due only if files were already waiting when the request
    /// before ended.
    fn nothing_came(&mut self, waits: bool, now: Instant) -> Option<Remedy> {
        self.errors = 0;
        match self.since {
            _ if !waits => *self = Self::default(),
            None => self.since = Some(now),
            Some(_) => return self.next(now),
        }
        None
    }
}

/// The worker of a cluster.
pub(super) struct Worker {
    shared: Arc<dyn Process>,
    /// Until when failed jobs are delayed; meanwhile a missing job does not mean that the queue does not deliver.
    delayed: Arc<std::sync::Mutex<Option<Instant>>>,
    own_slots: Arc<Semaphore>,
    own_slots_max: usize,
}

impl Worker {
    pub(super) fn new(shared: Arc<dyn Process>, own_slots_max: usize) -> Self {
        let own_slots = Arc::new(Semaphore::new(own_slots_max));
        Self { shared, delayed: Arc::default(), own_slots, own_slots_max }
    }

    /// Runs until cancelled. Uploads survive a reconnect; only their acknowledgement may be lost.
    pub(super) async fn run(self, cancel: CancellationToken) {
        let mut uploads = JoinSet::new();
        let mut connections = self.shared.queue().connection();
        let mut tried = Tried::default();
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
                ended = self.follow(&connection, &mut uploads, &mut tried) => ended,
                _ = connections.wait_for(|c| c.as_ref().is_none_or(|c| c.generation != generation)) => {
                    continue;
                }
            };
            if let Err(error) = ended {
                tracing::debug!(cluster = %self.shared.cluster(), %error, "cannot pull jobs from the queue");
                if let Some(remedy) = tried.failed(Instant::now()) {
                    let why = format!("the queue delivers no jobs: {error}");
                    tokio::select! {
                        () = cancel.cancelled() => break,
                        () = self.repair_queue(&connection, remedy, why) => {}
                    }
                }
                tokio::select! {
                    () = cancel.cancelled() => break,
                    () = tokio::time::sleep(FOLLOW_PAUSE) => {}
                }
            }
        }
        uploads.shutdown().await;
    }

    /// Pulls and starts jobs until an error occurs.
    async fn follow(
        &self,
        connection: &Connection,
        uploads: &mut JoinSet<()>,
        tried: &mut Tried,
    ) -> Result<(), async_nats::Error> {
        let consumer: PullConsumer = connection
            .jetstream
            .create_consumer_on_stream(consumer_config(self.shared.as_ref()), STREAM)
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
                let Some(slot) = free.pop() else { break };
                let (shared, message) = (Arc::clone(&self.shared), message?);
                if !any {
                    any = true;
                    *tried = Tried::default();
                    shared.stands(None);
                }
                let delayed = Arc::clone(&self.delayed);
                uploads.spawn(async move {
                    if let Some(pause) = handle(shared.as_ref(), message).await {
                        let until = Instant::now() + pause;
                        let mut delayed = delayed.lock().unwrap_or_else(PoisonError::into_inner);
                        *delayed = Some(delayed.map_or(until, |d| d.max(until)));
                    }
                    drop(slot);
                });
            }
            drop(free);
            if !any {
                // Somebody may have removed the consumer; then no job would ever come.
                consumer.get_info().await?;
                if let Some(remedy) = tried.nothing_came(self.waits_for_jobs(), Instant::now()) {
                    let why = "files are waiting for upload, but the queue has no jobs for them"
                        .to_owned();
                    self.repair_queue(connection, remedy, why).await;
                }
            }
        }
    }

    /// Whether files wait while none is being uploaded and none was delayed after a failure.
    fn waits_for_jobs(&self) -> bool {
        let idle = self.own_slots.available_permits() == self.own_slots_max;
        let delayed = *self.delayed.lock().unwrap_or_else(PoisonError::into_inner);
        let put_off = delayed.is_some_and(|until| Instant::now() < until + PULL_EXPIRES);
        let waits = idle && !put_off && self.shared.waits();
        if idle && !put_off && !waits {
            self.shared.stands(None);
        }
        waits
    }

    async fn repair_queue(&self, connection: &Connection, remedy: Remedy, why: String) {
        let (cluster, queue) = (self.shared.cluster(), self.shared.queue());
        tracing::warn!(%cluster, ?remedy, why, "archiving has stopped; repairing the queue");
        self.shared
            .stands(Some(format!("archiving has stopped: {why}; the queue is being repaired")));
        match remedy {
            Remedy::Compare => queue.want(cluster),
            Remedy::Consumer => {
                let (name, ..) = self.shared.consumer();
                let removed = connection.jetstream.delete_consumer_from_stream(&name, STREAM);
                // If it cannot be removed, the next remedy follows.
                if let Ok(Err(error)) = tokio::time::timeout(ACK_WAIT, removed).await {
                    tracing::debug!(%cluster, %error, "cannot remove the queue's consumer");
                }
                queue.want(cluster);
            }
            Remedy::Stream => queue.repair(connection.generation, Repair::Stream),
            Remedy::Store => queue.repair(connection.generation, Repair::Store),
        }
    }
}

fn consumer_config(work: &dyn Process) -> pull::Config {
    let (name, description, subjects) = work.consumer();
    pull::Config {
        durable_name: Some(name),
        description: Some(description.into()),
        deliver_policy: DeliverPolicy::All,
        ack_policy: AckPolicy::Explicit,
        ack_wait: ACK_WAIT,
        max_deliver: -1,
        max_ack_pending: OUT_MAX,
        filter_subject: subjects,
        ..pull::Config::default()
    }
}

/// Returns how long the job is delayed because it failed.
async fn handle(work: &dyn Process, message: Message) -> Option<Duration> {
    let delivered = message.info().map_or(1, |info| info.delivered.max(1));
    crash_point!("upload.begun");
    let mut processing = work.process(&message, delivered);
    let answer = loop {
        tokio::select! {
            answer = &mut processing => break answer,
            () = tokio::time::sleep(PROGRESS_INTERVAL) => {
                let _ = message.ack_with(AckKind::Progress).await;
            }
        }
    };
    drop(processing);
    let pause = match answer {
        AckKind::Nak(pause) => pause,
        _ => None,
    };
    let done = matches!(answer, AckKind::Ack);
    let told = match done && work.changes() {
        true => message.double_ack().await,
        false => message.ack_with(answer).await,
    };
    match told {
        Ok(()) if done => {
            crash_point!("queue.acknowledged");
            work.removed_from_queue(&message);
        }
        Ok(()) => {}
        // If the acknowledgement is lost, the job is delivered again and finds its work done.
        Err(error) => {
            tracing::debug!(cluster = %work.cluster(), %error, "cannot acknowledge a job; it will be delivered again");
        }
    }
    pause
}

/// The job in a message, or how to acknowledge a message without a job of this cluster. `problem` is told why a
/// message is left in the queue for a server that understands it.
pub(super) fn read_job<T>(
    cluster: &ClusterName,
    job: Result<T, JobError>,
    whose: impl Fn(&T) -> &ClusterName,
    problem: impl FnOnce(String),
) -> Result<T, AckKind> {
    let why = match job {
        Ok(job) if whose(&job) == cluster => return Ok(job),
        Ok(job) => format!("expected a job of {cluster}, found one of {}", whose(&job)),
        Err(error @ JobError::Version(_)) => error.to_string(),
        Err(error) => {
            // No version can read it, and a comparison queues the file again.
            tracing::error!(%cluster, %error, "dropping a malformed job");
            return Err(AckKind::Term);
        }
    };
    tracing::warn!(%cluster, problem = why, "cannot process a job; leaving it in the queue");
    problem(why);
    Err(AckKind::Nak(Some(RETRY_MAX)))
}

/// A cluster's access to the slots that all clusters share.
pub(super) struct Turns {
    /// The slots of all clusters; fair, first come first served.
    slots: Arc<Semaphore>,
    /// Whether the last attempt failed.
    failing: AtomicBool,
    /// While attempts fail, one runs at a time, so that hanging uploads do not occupy the slots of other clusters.
    one_at_a_time: Mutex<()>,
}

impl Turns {
    pub(super) fn new(slots: Arc<Semaphore>) -> Self {
        Self { slots, failing: AtomicBool::new(false), one_at_a_time: Mutex::new(()) }
    }

    /// Runs `work` when it is its turn; `None` when the slots are closed.
    pub(super) async fn take<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        let _alone = match self.failing.load(Ordering::Relaxed) {
            true => Some(self.one_at_a_time.lock().await),
            false => None,
        };
        let _slot = self.slots.acquire().await.ok()?;
        Some(work.await)
    }

    /// Records whether the last attempt failed.
    pub(super) fn failed(&self, failed: bool) {
        self.failing.store(failed, Ordering::Relaxed);
    }
}

/// JOB2: about 1, 2, 4 … seconds after the first, second, third attempt, multiplied by a random factor between one
/// half and one.
pub(super) fn pause(delivered: i64, attempt: Attempt) -> Duration {
    let most = if is_of_the_store(attempt) { STORE_RETRY_MAX } else { RETRY_MAX };
    let doublings = (delivered.max(1) - 1).min(16) as u32;
    let whole = RETRY_MIN.saturating_mul(1 << doublings).min(most);
    whole.mul_f64(rand::random_range(0.5..=1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remedies_come_one_after_the_other_and_then_there_is_a_pause() {
        let (mut tried, now) = (Tried::default(), Instant::now());
        let mut look = |waits| tried.nothing_came(waits, now);
        assert_eq!(look(false), None);
        assert_eq!(look(true), None, "the first look only notes it");
        let found: Vec<_> = (0..5).map(|_| look(true)).collect();
        assert_eq!(found[..4], Tried::ALL.map(Some));
        assert_eq!(found[4], None);
        assert_eq!(look(false), None, "nothing waits any more: all is forgotten");
        assert_eq!((look(true), look(true)), (None, Some(Remedy::Compare)));
    }

    #[test]
    fn a_queue_that_answers_with_errors_gets_a_new_consumer_first() {
        let (mut tried, now) = (Tried::default(), Instant::now());
        let found: Vec<_> = (0..9).map(|_| tried.failed(now)).collect();
        let expected = [None, None, Some(Remedy::Consumer)];
        assert_eq!(found[..3], expected);
        assert_eq!(found.iter().flatten().count(), 3);
        assert_eq!(found[8], Some(Remedy::Store));
    }

    #[test]
    fn pauses_double_with_jitter_and_end_at_five_minutes_for_a_file() {
        for (delivered, most) in
            [(1, 1.0), (2, 2.0), (5, 16.0), (9, 256.0), (10, 300.0), (i64::MAX, 300.0)]
        {
            for _ in 0..50 {
                let seconds = pause(delivered, Attempt::Conflict).as_secs_f64();
                assert!(seconds <= most && seconds >= most / 2.0, "{delivered}: {seconds}");
            }
        }
    }

    /// Regression test: after a few 503s, a small record was waited for over two minutes.
    #[test]
    fn after_an_outage_of_the_store_whatever_failed_is_tried_within_half_a_minute() {
        for attempt in [Attempt::Transient, Attempt::Denied, Attempt::Invalid] {
            for delivered in (1..20).chain([i64::MAX]) {
                let pause = pause(delivered, attempt);
                assert!(pause <= Duration::from_secs(30), "{attempt:?} {delivered}: {pause:?}");
            }
        }
        assert!(pause(1, Attempt::Transient) <= Duration::from_secs(1), "and soon at first");
    }
}
