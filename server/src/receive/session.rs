//! One live stream: a loop that reads messages while the disk is busy, and sends an acknowledgement when a sync ends.
//!
//! When a stream has been idle for [`REST_AFTER`], a note is written to the journal that all of it is durable. No byte
//! waits for that: none is outstanding then, and bytes that arrive meanwhile are written as usual.
//!
//! The append of one batch may overlap the sync of the batch before. Two syncs of one file never overlap (the store
//! ensures it), and acknowledgements are sent in order.

use super::{
    batch::{Chunk, Pending},
    compare::Comparer,
    open::{self, Caller, Opened},
    proof::{Claimant, Proof},
    slot::{Lent, Slot},
    trace::SegmentSpans,
};
use crate::{
    access::auth::{Auth, Identity},
    base::BaseStore,
    errors,
    metrics::Metrics,
    registry::{Claimed, Registry},
    seal::Sealer,
};
use klio_pg::{ByteSize, Lsn};
use klio_proto::{
    Code,
    v1::{self, receive_request, receive_response},
    wal::{Alive, Open},
};
use klio_storage::{
    catalog::Standing,
    crash_point,
    layout::{BaseObject, ClusterName},
    wal::{FlushedLsn, Seam, WalStore, Writer},
};
use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};
use tokio::{
    sync::{mpsc, oneshot},
    task::{JoinError, JoinHandle},
};
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

/// How often the certificate of a long stream is checked again.
const RECHECK_INTERVAL: Duration = Duration::from_secs(30);

/// Settings of all sessions.
#[derive(Debug, Clone)]
pub struct ReceiverOptions {
    /// The most bytes that a client may send beyond what is acknowledged.
    pub window: ByteSize,
    /// What to do with another history.
    pub on_divergence: OnDivergence,
}

/// What to do with a history that differs from the one stored under its cluster's name (P11).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnDivergence {
    /// Receive it as a generation of its own; a person decides.
    #[default]
    KeepBoth,
    /// Refuse it; a person decides.
    Refuse,
}

/// Creates sessions; cheap to clone.
#[derive(Clone)]
pub struct Receiver {
    pub store: WalStore,
    /// Knows which PostgreSQL a cluster is, over both tiers.
    pub base: BaseStore,
    pub registry: Arc<Registry>,
    pub sealer: Sealer,
    /// Checks certificates again while streaming.
    pub auth: Auth,
    /// Checks whether new WAL continues the stored WAL.
    pub comparer: Comparer,
    pub metrics: Arc<Metrics>,
    pub options: ReceiverOptions,
    /// Ends all sessions when cancelled.
    pub shutdown: CancellationToken,
}

/// When this much waits, the next batch is checked and compressed while the previous one is still being synced. With
/// less, everything that arrives during a sync goes into the next batch, which is faster for small commits.
const OVERLAP_BYTES: u64 = 512 << 10;
/// How long a stream is idle before the note is written to the journal behind the last batch. It is less than a
/// second, the time after which damage to the journal has to be distinguishable from a torn tail.
const REST_AFTER: Duration = Duration::from_millis(700);
/// The number of batches under way: one being synced, one being appended.
const WRITES_MAX: usize = 2;

/// How long the final error may wait for a client that does not read.
const LAST_WORD_TIMEOUT: Duration = Duration::from_secs(5);

pub(super) type Responses = mpsc::Sender<Result<v1::ReceiveResponse, Status>>;
/// Returns the writer after appending, before its bytes are synced.
type Home = oneshot::Receiver<(Lent, Result<(), klio_storage::Error>)>;
type Synced = (Result<FlushedLsn, klio_storage::Error>, Duration);

impl Receiver {
    /// Serves one stream to its end. If it ends with an error, that is the last thing sent.
    pub async fn serve(
        self,
        identity: Identity,
        cluster: ClusterName,
        open: Open,
        who: String,
        mut inbound: Streaming<v1::ReceiveRequest>,
        responses: Responses,
    ) {
        let (timeline, can_prove) = (open.timeline, open.can_prove);
        let writer_id = open.writer_id.clone();
        let comparer = self.comparer.clone();
        let (metrics, shutdown) = (Arc::clone(&self.metrics), self.shutdown.clone());
        let store = self.store.clone();
        let started = async {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64());
            let mut claimant = Claimant { inbound: &mut inbound, responses: &responses, can_prove };
            let caller = Caller { who: who.clone(), prove: claimant.prove() };
            open::open(&self.base, &self.comparer, &self.registry, &cluster, caller, open, now)
                .await
        };
        let outcome = match started.await {
            Err(status) => {
                tracing::warn!(%cluster, %who, code = Code::of(&status).name(), error = status.message(), "stream refused");
                Err(status)
            }
            Ok(opened) => {
                let start = opened.writer.position();
                tracing::info!(%cluster, ?timeline, %start, %who, "stream begins");
                let mut session = Session::new(self, identity, cluster.clone(), opened, can_prove);
                let outcome = session.run(inbound, &responses).await;
                let flushed = session.flushed;
                session.settle().await;
                match &outcome {
                    Ok(()) => tracing::info!(%cluster, ?timeline, %flushed, "stream ends"),
                    Err(status) => {
                        tracing::warn!(%cluster, ?timeline, %flushed, code = Code::of(status).name(), error = status.message(), "stream ends")
                    }
                }
                outcome
            }
        };
        if let Err(status) = outcome {
            if Code::of(&status) == Code::Diverged {
                comparer.found(&writer_id, &cluster, status.message());
            }
            // Unpinned names get no series, and our own shutdown is not a failure.
            if store.pinned(&cluster).is_some() && !shutdown.is_cancelled() {
                metrics.session_failed(&cluster, Code::of(&status));
            }
            // The client may never read the error.
            let _ = tokio::time::timeout(LAST_WORD_TIMEOUT, responses.send(Err(status))).await;
        }
    }
}

struct Session {
    with: Receiver,
    identity: Identity,
    cluster: ClusterName,
    /// Holds the writer while nothing is being appended.
    slot: Slot,
    /// Answers whether PostgreSQL writes, when another timeline's session asks.
    proof: Proof,
    appending: Option<Home>,
    /// Oldest first.
    syncing: VecDeque<JoinHandle<Synced>>,
    preparing: Option<JoinHandle<()>>,
    /// Since when the stream has been idle; `None` once the journal says that all of it is durable.
    busy: Option<tokio::time::Instant>,
    resting: Option<JoinHandle<()>>,
    pending: Pending,
    flushed: Lsn,
    spans: SegmentSpans,
    seam: Option<Seam>,
    unproven: Option<String>,
    /// The number of changes of `wal_level` that were announced to tier 2.
    levels: usize,
}

impl Session {
    fn new(
        with: Receiver,
        identity: Identity,
        cluster: ClusterName,
        opened: Opened,
        can_prove: bool,
    ) -> Self {
        let Opened { claimed, writer, segment_size, seam, unproven } = opened;
        let Claimed { place, questions } = claimed;
        let start = writer.position();
        let timeline = writer.timeline();
        let spans = SegmentSpans::new(cluster.clone(), timeline, segment_size);
        place.begin(start);
        let window = with.options.window.bytes();
        let levels = with.store.levels(&cluster).len();
        Self {
            levels,
            pending: Pending::new(start, window),
            with,
            identity,
            cluster,
            slot: Slot::new(writer, place),
            proof: Proof::new(questions, can_prove),
            appending: None,
            syncing: VecDeque::with_capacity(WRITES_MAX),
            preparing: None,
            busy: None,
            resting: None,
            flushed: start,
            spans,
            seam,
            unproven,
        }
    }

    async fn run(
        &mut self,
        mut inbound: Streaming<v1::ReceiveRequest>,
        responses: &Responses,
    ) -> Result<(), Status> {
        self.say_opened(responses).await?;
        self.seal_finished();
        let mut half_closed = false;
        let mut recheck = tokio::time::interval(RECHECK_INTERVAL);
        let mut auth = self.with.auth.clone();
        let (shutdown, fenced) = (self.with.shutdown.clone(), self.slot.place.fenced.clone());
        loop {
            self.begin_write();
            if half_closed && self.is_settled() {
                return Ok(());
            }
            tokio::select! {
                () = shutdown.cancelled() => {
                    return Err(Code::Unavailable.status("the server is shutting down"));
                }
                () = fenced.cancelled() => {
                    return Err(self.why_fenced());
                }
                appended = appended(&mut self.appending) => {
                    self.appending = None;
                    self.after_append(appended)?;
                }
                synced = synced(&mut self.syncing) => {
                    self.syncing.pop_front();
                    let ack = self.after_sync(synced)?;
                    if let Some(ack) = ack {
                        // A client that does not read must not hold its place against a newer timeline (P8).
                        tokio::select! {
                            () = shutdown.cancelled() => {}
                            () = fenced.cancelled() => {}
                            sent = send(responses, receive_response::Kind::Ack(ack)) => {
                                sent?;
                                crash_point!("wal.acknowledged");
                            }
                        }
                    }
                }
                message = inbound.message(), if !half_closed => match message? {
                    Some(message) => {
                        self.take(message)?;
                        self.note_unproven().await?;
                    }
                    None => {
                        half_closed = true;
                        self.proof.close();
                    }
                },
                () = rest_due(self.busy), if self.is_settled() => self.rest(),
                () = self.proof.step(responses) => {}
                () = auth.changed() => self.with.auth.recheck(&self.identity)?,
                _ = recheck.tick() => self.with.auth.recheck(&self.identity)?,
            }
        }
    }

    async fn say_opened(&self, responses: &Responses) -> Result<(), Status> {
        let opened = v1::Opened {
            start_lsn: self.flushed.as_u64(),
            window_bytes: self.with.options.window.bytes(),
        };
        send(responses, receive_response::Kind::Opened(opened)).await
    }

    /// The reason is a person who closed this history or retired this timeline, or another session that took over.
    fn why_fenced(&self) -> Status {
        // Not DIVERGED, which in a stream means that its WAL differs: the sidecar would begin another generation.
        if let Err(closed) = self.with.base.check_open_here(&self.cluster) {
            let why = closed.message();
            return Code::WriterConflict.status(format!("the stream ends by a decision: {why}"));
        }
        let lives_on = self.slot.place.lives_on;
        let standing = self.with.store.timelines(&self.cluster).standing(lives_on);
        if standing == Some(Standing::Retired) {
            return open::retired(&self.cluster, lives_on);
        }
        Code::WriterConflict.status("a newer session of this cluster has taken over")
    }

    fn take(&mut self, message: v1::ReceiveRequest) -> Result<(), Status> {
        let append = match message.kind {
            Some(receive_request::Kind::Append(append)) => append,
            Some(receive_request::Kind::Alive(alive)) => {
                self.proof.answered(Alive::try_from(alive)?);
                return Ok(());
            }
            _ => {
                let message = "read stream: expected an append message after open";
                return Err(Code::Invalid.status(message));
            }
        };
        let wal_end = Lsn::new(append.wal_end_lsn);
        let length = append.data.len() as u64;
        if length > 0 {
            let start = Lsn::new(append.start_lsn);
            self.check_seam(start, &append.data)?;
            let chunk = Chunk { start, data: append.data, traceparent: append.traceparent };
            self.pending.accept(chunk, self.flushed, |chunk| self.spans.arrive(chunk))?;
        }
        let received = self.pending.end();
        self.slot.place.update(|p| {
            p.received = received;
            p.received_bytes += length;
            if wal_end > Lsn::ZERO {
                p.told(wal_end.max(received), Instant::now());
            }
        });
        self.with.metrics.received(&self.cluster, length);
        Ok(())
    }

    /// When new WAL arrives and nothing proved that it continues the stored WAL, records this before the WAL is
    /// acknowledged.
    async fn note_unproven(&mut self) -> Result<(), Status> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let Some(writer) = &self.slot.writer else { return Ok(()) };
        let Some(reason) = self.unproven.take() else { return Ok(()) };
        let (timeline, at) = (writer.timeline(), self.flushed);
        let (base, now) = (&self.with.base, self.with.base.now_unix());
        base.note_unproven(&self.cluster, timeline, at, reason, now).await
    }

    /// P11: not one byte of another history is accepted.
    fn check_seam(&mut self, start: Lsn, data: &[u8]) -> Result<(), Status> {
        let Some(seam) = self.seam.as_mut().filter(|_| start == self.pending.end()) else {
            return Ok(());
        };
        if seam.push(data).map_err(|broken| Code::Diverged.status(&broken))? {
            self.seam = None;
        }
        Ok(())
    }

    /// Starts writing what waits, when the disk is free or the backlog is large enough to overlap.
    fn begin_write(&mut self) {
        let enough = self.syncing.is_empty() || self.pending.bytes() >= OVERLAP_BYTES;
        if self.pending.is_empty() || self.syncing.len() >= WRITES_MAX || !enough {
            return;
        }
        let Some(mut lent) = self.slot.lend() else { return };
        self.busy = Some(tokio::time::Instant::now());
        let batch = self.pending.take_batch();
        let (home, appending) = oneshot::channel();
        self.appending = Some(appending);
        self.syncing.push_back(tokio::task::spawn_blocking(move || {
            let began = Instant::now();
            let appended = append(&mut lent.writer, &batch);
            drop(batch);
            let flusher = lent.writer.flusher();
            // A session that has ended cannot take its writer back; the writer is then dropped here, which closes it.
            drop(home.send((lent, appended)));
            (flusher.flush(), began.elapsed())
        }));
    }

    /// Writes to the journal that all of it is durable, once for each idle period.
    fn rest(&mut self) {
        self.busy = None;
        let Some(writer) = &self.slot.writer else { return };
        let flusher = writer.flusher();
        self.resting = Some(tokio::task::spawn_blocking(move || {
            // The next append reports the same error and ends the session.
            if let Err(error) = flusher.rest() {
                tracing::warn!(%error, "cannot mark the journal of an idle stream as complete");
            }
        }));
    }

    fn after_append(
        &mut self,
        (lent, outcome): (Lent, Result<(), klio_storage::Error>),
    ) -> Result<(), Status> {
        if self.preparing.as_ref().is_none_or(JoinHandle::is_finished)
            && let Some(preparation) = lent.writer.preparation()
        {
            // A failure here costs nothing: the writer creates the next journal itself when it gets there.
            self.preparing = Some(tokio::task::spawn_blocking(move || {
                if let Err(error) = preparation.run() {
                    tracing::debug!(%error, "cannot prepare the next segment");
                }
            }));
        }
        self.slot.take_home(lent);
        self.seal_finished();
        let levels = self.with.store.levels(&self.cluster).len();
        if levels != self.levels {
            self.levels = levels;
            self.with.base.announce(&self.cluster, BaseObject::WalLevels, 0);
        }
        outcome.map_err(|error| errors::append_status(&error))
    }

    /// Whether everything that arrived is flushed or refused. An append ends with the last sync at the latest, but its
    /// result may not have been looked at yet: it may have failed, and more bytes may wait for its writer.
    fn is_settled(&self) -> bool {
        self.syncing.is_empty() && self.appending.is_none() && self.pending.is_empty()
    }

    fn after_sync(&mut self, synced: Result<Synced, JoinError>) -> Result<Option<v1::Ack>, Status> {
        // The task panicked: it is unknown which bytes were written, and the client has to connect again.
        let (result, took) =
            synced.map_err(|error| Code::Internal.status(format!("write WAL: {error}")))?;
        self.seal_finished();
        let flushed = result.map_err(|error| errors::status(&error))?;
        if flushed.lsn() <= self.flushed {
            return Ok(None); // An earlier sync covered these bytes as well.
        }
        self.busy = Some(tokio::time::Instant::now());
        self.flushed = flushed.lsn();
        let lsn = self.flushed;
        self.slot.place.update(|p| p.flushed = lsn);
        self.with.metrics.flushed(took);
        Ok(Some(v1::Ack {
            received_lsn: self.pending.end().as_u64(),
            flushed_lsn: flushed.lsn().as_u64(),
        }))
    }

    /// Hands finished segments to the sealer. They are durable, however the session ends.
    fn seal_finished(&mut self) {
        let Some(writer) = &mut self.slot.writer else { return };
        for file in writer.take_finished() {
            let span = self.spans.finish(file);
            self.with.sealer.push(self.cluster.clone(), file, span);
        }
    }

    /// Waits for writes under way, so that the place becomes free only when the writer is closed.
    async fn settle(mut self) {
        if let Some(appending) = self.appending.take()
            && let Ok((lent, _)) = appending.await
        {
            self.slot.take_home(lent);
        }
        for syncing in std::mem::take(&mut self.syncing) {
            let _ = syncing.await;
        }
        if let Some(resting) = self.resting.take() {
            let _ = resting.await;
        }
        self.seal_finished();
        // Closing takes the journal's lock, so it must not run on a worker thread of the runtime.
        let writer = self.slot.writer.take();
        let _ = tokio::task::spawn_blocking(move || drop(writer)).await;
    }
}

fn append(writer: &mut Writer, batch: &[Chunk]) -> Result<(), klio_storage::Error> {
    batch.iter().try_for_each(|chunk| writer.append(chunk.start, &chunk.data).map(|_| ()))
}

/// The writer after appending; never resolves while nothing is being appended. Cancel-safe: the receiver stays.
async fn appended(home: &mut Option<Home>) -> (Lent, Result<(), klio_storage::Error>) {
    if let Some(receiver) = home {
        match receiver.await {
            Ok(appended) => return appended,
            // Without a sender the task panicked, which `synced` reports. The receiver must not be polled again.
            Err(_) => *home = None,
        }
    }
    std::future::pending().await
}

/// The result of the oldest sync; never resolves while none is running. Cancel-safe: the handle stays.
async fn synced(syncing: &mut VecDeque<JoinHandle<Synced>>) -> Result<Synced, JoinError> {
    match syncing.front_mut() {
        Some(handle) => handle.await,
        None => std::future::pending().await,
    }
}

/// Resolves when a stream that was last busy at this time has been idle long enough; never when the journal already
/// says so. Cancel-safe.
async fn rest_due(busy: Option<tokio::time::Instant>) {
    match busy {
        Some(since) => tokio::time::sleep_until(since + REST_AFTER).await,
        None => std::future::pending().await,
    }
}

async fn send(responses: &Responses, kind: receive_response::Kind) -> Result<(), Status> {
    let response = v1::ReceiveResponse { kind: Some(kind) };
    let gone = |_| Code::Unavailable.status("the client hung up");
    responses.send(Ok(response)).await.map_err(gone)
}
