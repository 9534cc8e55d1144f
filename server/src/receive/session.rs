//! One live stream: a loop that reads messages while the disk is busy, and acknowledges when it is not.

use super::{
    batch::{Chunk, Pending},
    open::{self, Opened},
    registry::{Place, Registry},
    trace::SegmentSpans,
};
use crate::{
    errors,
    grpc::auth::{Auth, Identity},
    metrics::Metrics,
    seal::Sealer,
};
use klio_pg::{ByteSize, Lsn};
use klio_proto::{
    Code,
    v1::{self, receive_request, receive_response},
    wal::Open,
};
use klio_storage::{
    layout::{ClusterName, WalFile},
    wal::{FlushedLsn, WalStore, Writer},
};
use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};
use tokio::{sync::mpsc, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

/// How often a long stream's certificate is looked at again.
const RECHECK_INTERVAL: Duration = Duration::from_secs(30);

/// Settings of all sessions.
#[derive(Debug, Clone)]
pub struct ReceiverOptions {
    /// Most bytes a client may send beyond what is acknowledged.
    pub window: ByteSize,
}

/// Makes sessions; cheap to clone.
#[derive(Clone)]
pub struct Receiver {
    /// Tier 1.
    pub store: WalStore,
    /// Who streams what.
    pub registry: Arc<Registry>,
    /// Takes finished segments.
    pub sealer: Sealer,
    /// Checks certificates again while streaming.
    pub auth: Auth,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// Settings.
    pub options: ReceiverOptions,
    /// Ends all sessions.
    pub shutdown: CancellationToken,
}

type Responses = mpsc::Sender<Result<v1::ReceiveResponse, Status>>;
type Written = (Writer, Result<FlushedLsn, klio_storage::Error>, Duration);

impl Receiver {
    /// Serves one stream to its end; the last thing sent is its error, if it ends with one.
    pub async fn serve(
        self,
        identity: Identity,
        cluster: ClusterName,
        open: Open,
        who: String,
        inbound: Streaming<v1::ReceiveRequest>,
        responses: Responses,
    ) {
        let timeline = open.timeline;
        let started = async {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64());
            open::open(&self.store, &self.registry, &cluster, who.clone(), open, now).await
        };
        let outcome = match started.await {
            Err(status) => {
                tracing::warn!(%cluster, %who, code = Code::of(&status).name(), error = status.message(), "stream refused");
                Err(status)
            }
            Ok(opened) => {
                let start = opened.writer.position();
                tracing::info!(%cluster, ?timeline, %start, %who, "stream begins");
                let mut session = Session::new(self, identity, cluster.clone(), opened);
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
            let _ = responses.send(Err(status)).await;
        }
    }
}

struct Session {
    with: Receiver,
    identity: Identity,
    cluster: ClusterName,
    place: Place,
    /// At home while nothing is being written.
    writer: Option<Writer>,
    writing: Option<JoinHandle<Written>>,
    pending: Pending,
    flushed: Lsn,
    spans: SegmentSpans,
}

impl Session {
    fn new(with: Receiver, identity: Identity, cluster: ClusterName, opened: Opened) -> Self {
        let Opened { place, writer } = opened;
        let start = writer.position();
        let timeline = writer.timeline();
        let spans = SegmentSpans::new(cluster.clone(), timeline, writer.segment_size());
        place.state().update(|p| {
            p.timeline = Some(timeline);
            (p.received, p.flushed) = (start, start);
            p.wal_end = p.wal_end.max(start);
        });
        let window = with.options.window.bytes();
        Self {
            pending: Pending::new(start, window),
            with,
            identity,
            cluster,
            place,
            writer: Some(writer),
            writing: None,
            flushed: start,
            spans,
        }
    }

    async fn run(
        &mut self,
        mut inbound: Streaming<v1::ReceiveRequest>,
        responses: &Responses,
    ) -> Result<(), Status> {
        self.say_opened(responses).await?;
        let mut half_closed = false;
        let mut recheck = tokio::time::interval(RECHECK_INTERVAL);
        let mut auth = self.with.auth.clone();
        let (shutdown, fenced) = (self.with.shutdown.clone(), self.place.fenced.clone());
        loop {
            self.begin_write();
            if half_closed && self.writing.is_none() {
                return Ok(());
            }
            tokio::select! {
                () = shutdown.cancelled() => {
                    return Err(Code::Unavailable.status("the server is shutting down"));
                }
                () = fenced.cancelled() => {
                    return Err(Code::WriterConflict.status(
                        "a newer session of this cluster has taken over",
                    ));
                }
                written = finished(&mut self.writing) => {
                    self.writing = None;
                    self.after_write(written, responses).await?;
                }
                message = inbound.message(), if !half_closed => match message? {
                    Some(message) => self.take(message)?,
                    None => half_closed = true,
                },
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

    fn take(&mut self, message: v1::ReceiveRequest) -> Result<(), Status> {
        let Some(receive_request::Kind::Append(append)) = message.kind else {
            return Err(Code::Invalid.status("read stream: expected an append message after open"));
        };
        let wal_end = Lsn::new(append.wal_end_lsn);
        let length = append.data.len() as u64;
        if length > 0 {
            let start = Lsn::new(append.start_lsn);
            let chunk = Chunk { start, data: append.data, traceparent: append.traceparent };
            self.spans.arrive(&chunk);
            self.pending.accept(chunk, self.flushed)?;
        }
        let received = self.pending.end();
        self.place.state().update(|p| {
            p.received = received;
            p.received_bytes += length;
            p.wal_end = wal_end.max(received);
        });
        self.with.metrics.received(&self.cluster, length);
        Ok(())
    }

    /// Sends everything that waits to the disk, when the disk is free. One fsync covers it all.
    fn begin_write(&mut self) {
        if self.writing.is_some() || self.pending.is_empty() {
            return;
        }
        let Some(mut writer) = self.writer.take() else { return };
        let batch = self.pending.take_batch();
        self.writing = Some(tokio::task::spawn_blocking(move || {
            let began = Instant::now();
            let result = write(&mut writer, &batch);
            (writer, result, began.elapsed())
        }));
    }

    async fn after_write(&mut self, written: Written, responses: &Responses) -> Result<(), Status> {
        let (mut writer, result, took) = written;
        // Segments that were finished are durable whatever became of the rest.
        let complete = writer.take_finished();
        let wants_next = writer.wants_next();
        self.writer = Some(writer);
        for file in complete {
            self.finish_segment(file);
        }
        let flushed = result.map_err(|error| errors::status(&error))?;
        self.flushed = flushed.lsn();
        let lsn = self.flushed;
        self.place.state().update(|p| p.flushed = lsn);
        self.with.metrics.flushed(&self.cluster, took);
        let ack = v1::Ack {
            received_lsn: self.pending.end().as_u64(),
            flushed_lsn: flushed.lsn().as_u64(),
        };
        send(responses, receive_response::Kind::Ack(ack)).await?;
        if wants_next && self.pending.is_empty() {
            self.prepare_next();
        }
        Ok(())
    }

    /// Makes the next segment's journal ready while nothing waits. Failure is no loss: the writer
    /// makes it itself when it gets there.
    fn prepare_next(&mut self) {
        let Some(mut writer) = self.writer.take() else { return };
        self.writing = Some(tokio::task::spawn_blocking(move || {
            if let Err(error) = writer.prepare_next() {
                tracing::debug!(%error, "prepare the next segment");
            }
            let flushed = writer.flush();
            (writer, flushed, Duration::ZERO)
        }));
    }

    fn finish_segment(&mut self, file: WalFile) {
        let span = self.spans.finish(file);
        self.with.sealer.push(self.cluster.clone(), file, span);
    }

    /// Waits for a write that is still under way, so that the place is free only when the writer is.
    async fn settle(mut self) {
        if let Some(writing) = self.writing.take()
            && let Ok((mut writer, _, _)) = writing.await
        {
            for file in writer.take_finished() {
                self.finish_segment(file);
            }
        }
    }
}

fn write(writer: &mut Writer, batch: &[Chunk]) -> Result<FlushedLsn, klio_storage::Error> {
    for chunk in batch {
        writer.append(chunk.start, &chunk.data)?;
    }
    writer.flush()
}

/// The result of the write under way; never resolves without one. Cancel-safe: the handle stays.
async fn finished(writing: &mut Option<JoinHandle<Written>>) -> Written {
    let Some(handle) = writing else { return std::future::pending().await };
    match handle.await {
        Ok(written) => written,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

async fn send(responses: &Responses, kind: receive_response::Kind) -> Result<(), Status> {
    let response = v1::ReceiveResponse { kind: Some(kind) };
    let gone = |_| Code::Unavailable.status("the client hung up");
    responses.send(Ok(response)).await.map_err(gone)
}
