//! Moves WAL from one open stream of PostgreSQL to one open stream of the server, and acknowledgements back.
//!
//! - There is no timer: WAL is sent as soon as the connection accepts it; until then, more WAL that has already
//!   arrived joins the message. An acknowledgement is reported to PostgreSQL at once.
//! - Memory is bounded: one batch here, two messages in flight, and the server's window. When all are full, nothing
//!   is read and PostgreSQL retains the WAL.
//! - P1: PostgreSQL is told only positions that [`Flow`] took from the server's acknowledgements.
//! - When PostgreSQL fails, the WAL that it had sent is made durable before the failure is reported: its disk may be
//!   gone, and removed WAL cannot be requested again.
//!
//! One task. Every branch of the loop is cancel-safe, and handlers run after the other branches are dropped.

use super::{
    batch::Batch,
    flow::Flow,
    metrics::Metrics,
    prove::Prover,
    source::{Event, Wal},
    trace::SegmentTrace,
};
use crate::error::{Error, Failure};
use bytes::Bytes;
use futures::future::BoxFuture;
use klio_pg::{Lsn, ReplicationMessage, StatusUpdate};
use klio_proto::{
    Code,
    v1::{self, receive_request::Kind, receive_response},
};
use klio_storage::crash_point;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;

/// How a stream ended without an error of the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// The whole timeline is durable on the server.
    Timeline,
    /// PostgreSQL shut down; all its WAL is durable.
    Shutdown,
    /// `stop` was cancelled.
    Stopped,
    /// PostgreSQL failed; [`Pump::failure`] says how. Used only inside the loop, never returned.
    Failed,
}

/// Both open streams.
pub(super) struct Pump<'a, W> {
    /// `None` after it was closed cleanly.
    pub wal: Option<W>,
    /// The first failure on PostgreSQL's side.
    pub failure: Option<Error>,
    /// `None` after half-closing.
    pub requests: Option<mpsc::Sender<v1::ReceiveRequest>>,
    pub answers: Streaming<v1::ReceiveResponse>,
    pub flow: Flow,
    pub batch_bytes: usize,
    pub status_interval: Duration,
    pub stop_timeout: Duration,
    pub metrics: &'a Metrics,
    pub trace: SegmentTrace,
    /// PostgreSQL's end of WAL at the start, so that the server knows at once how far behind it is.
    pub end: Lsn,
    /// Answers the server's question whether PostgreSQL writes.
    pub proof: Proof<'a>,
}

/// At most one question is being answered: a newer one replaces an older one, whose time is over.
pub(super) struct Proof<'a> {
    ask: Prover<'a>,
    asking: Option<BoxFuture<'a, v1::Alive>>,
    /// The answer, until there is room to send it.
    unsent: Option<v1::Alive>,
}

impl<'a> Proof<'a> {
    pub(super) fn new(ask: Prover<'a>) -> Self {
        Self { ask, asking: None, unsent: None }
    }

    fn begin(&mut self, nonce: u64) {
        self.asking = Some((self.ask)(nonce));
    }
}

/// The position and send time of one message whose acknowledgement is timed.
type Probe = Option<(Lsn, Instant)>;

impl<W: Wal> Pump<'_, W> {
    /// Runs until one end closes its stream. The stream of PostgreSQL is closed cleanly.
    pub async fn run(&mut self, stop: &CancellationToken) -> Result<Ended, Error> {
        let mut batch = Batch::default();
        let mut probe: Probe = None;
        let mut ended: Option<Ended> = None;
        let mut wal_end = self.end;
        let mut tick = tokio::time::interval(self.status_interval);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let deadline = tokio::time::sleep(Duration::MAX);
        tokio::pin!(deadline);
        self.tell(wal_end);
        loop {
            if self.failure.is_some() && ended.is_none() {
                ended = Some(Ended::Failed);
                deadline.as_mut().reset(tokio::time::Instant::now() + self.stop_timeout);
            }
            if ended.is_some() && batch.is_empty() {
                // Half-close: the server then flushes everything, acknowledges it and ends its side.
                self.requests = None;
            }
            let sendable = !batch.is_empty() && self.flow.room() > 0;
            let provable = self.proof.unsent.is_some() && self.requests.is_some();
            let readable = ended.is_none() && batch.len() < self.batch_bytes;
            tokio::select! {
                biased;
                answer = self.answers.message() => match answer {
                    Ok(Some(answer)) => self.on_answer(answer, &mut probe).await?,
                    Ok(None) => return self.close(ended).await,
                    Err(status) => return Err(Error::from_status("stream WAL", &status)),
                },
                () = stop.cancelled(), if ended.is_none() => {
                    ended = Some(Ended::Stopped);
                    deadline.as_mut().reset(tokio::time::Instant::now() + self.stop_timeout);
                }
                () = &mut deadline, if matches!(ended, Some(Ended::Stopped | Ended::Failed)) => {
                    tracing::warn!("the last acknowledgement did not arrive in time; the next start asks the server for its position");
                    return self.failure.take().map_or(Ok(Ended::Stopped), Err);
                }
                alive = asked(self.proof.asking.as_mut()) => {
                    (self.proof.asking, self.proof.unsent) = (None, Some(alive));
                }
                open = has_place(self.requests.as_ref()), if provable => {
                    if !open {
                        return Err(self.refused().await);
                    }
                    self.send_proof();
                }
                open = has_place(self.requests.as_ref()), if sendable => {
                    if !open {
                        return Err(self.refused().await);
                    }
                    self.send(&mut batch, wal_end);
                    probe.get_or_insert((self.flow.sent(), Instant::now()));
                }
                event = next(self.wal.as_mut()), if readable => {
                    self.read(event, &mut batch, &mut wal_end, &mut ended).await;
                }
                _ = tick.tick() => self.on_tick(&batch).await,
            }
        }
    }

    /// Handles an event and those that have already arrived, until the batch is full.
    async fn read(
        &mut self,
        first: Result<Event, Error>,
        batch: &mut Batch,
        wal_end: &mut Lsn,
        ended: &mut Option<Ended>,
    ) {
        let mut next = first.map(Some);
        loop {
            match next {
                Ok(Some(event)) => self.on_event(event, batch, wal_end, ended).await,
                Ok(None) => break,
                Err(error) => self.failure = Some(error),
            }
            if ended.is_some() || self.failure.is_some() || batch.len() >= self.batch_bytes {
                break;
            }
            next = self.wal.as_mut().map_or(Ok(None), Wal::try_next);
        }
        self.metrics.state.set_wal_end(*wal_end);
    }

    async fn on_event(
        &mut self,
        event: Event,
        batch: &mut Batch,
        wal_end: &mut Lsn,
        ended: &mut Option<Ended>,
    ) {
        match event {
            Event::Message(ReplicationMessage::XLogData(wal)) => {
                let expected = self.flow.sent().advance(batch.len() as u64);
                if wal.start != expected {
                    let message = format!("read WAL: expected {expected}, found {}", wal.start);
                    self.failure = Some(Error::new(Failure::Postgres, message));
                    return;
                }
                *wal_end = wal.wal_end;
                batch.push(wal.data);
            }
            Event::Message(ReplicationMessage::Keepalive(keepalive)) => {
                *wal_end = keepalive.wal_end;
                if keepalive.reply_requested {
                    self.report(false).await;
                }
                if batch.is_empty() {
                    self.tell(*wal_end);
                }
            }
            Event::TimelineEnded => *ended = Some(Ended::Timeline),
            Event::Shutdown => *ended = Some(Ended::Shutdown),
        }
    }

    async fn on_answer(
        &mut self,
        answer: v1::ReceiveResponse,
        probe: &mut Probe,
    ) -> Result<(), Error> {
        let ack = match answer.kind {
            Some(receive_response::Kind::Ack(ack)) => ack,
            Some(receive_response::Kind::Prove(asked)) => {
                self.proof.begin(asked.nonce);
                return Ok(());
            }
            _ => {
                let message = "stream WAL: expected an acknowledgement, found another message";
                return Err(Error::new(Failure::Code(Code::Invalid), message));
            }
        };
        let before = self.flow.report();
        let (received, flushed) = (Lsn::new(ack.received_lsn), Lsn::new(ack.flushed_lsn));
        self.flow
            .on_ack(received, flushed)
            .map_err(|error| Error::new(Failure::Code(Code::Internal), error))?;
        if let Some((position, sent)) = *probe
            && flushed >= position
        {
            self.metrics.on_ack_latency(sent.elapsed());
            *probe = None;
        }
        let now = self.flow.report();
        self.metrics.state.set_positions(now.0, now.1);
        if now != before {
            crash_point!("stream.acknowledged");
            self.report(false).await;
        }
        Ok(())
    }

    /// Sends a sign of life to both ends. PostgreSQL is asked for its position; the position that it reported earlier
    /// is not sent to the server again, because the server would take it for current (P7).
    async fn on_tick(&mut self, batch: &Batch) {
        self.report(true).await;
        if batch.is_empty() {
            self.tell(Lsn::ZERO);
        }
    }

    /// Tells the server PostgreSQL's end of WAL, without WAL; zero means unknown.
    fn tell(&self, wal_end: Lsn) {
        if let Some(requests) = &self.requests {
            // If the queue is full, WAL is on its way and carries the same information.
            let _ =
                requests.try_send(append(self.flow.sent(), Bytes::new(), wal_end, String::new()));
        }
    }

    /// Queues a message for which [`has_place`] found room. If the connection has ended since, the message is lost
    /// and the answer side reports the error.
    fn send(&mut self, batch: &mut Batch, wal_end: Lsn) {
        let start = self.flow.sent();
        let limit = self.flow.room().min(self.trace.left_in_segment(start));
        let data = batch.take(self.batch_bytes.min(usize::try_from(limit).unwrap_or(usize::MAX)));
        let bytes = data.len() as u64;
        let traceparent = self.trace.context(start, bytes);
        if let Some(requests) = &self.requests {
            let _ = requests.try_send(append(start, data, wal_end, traceparent));
        }
        self.flow.on_sent(bytes);
        self.metrics.on_sent(bytes);
    }

    fn send_proof(&mut self) {
        let Some(alive) = self.proof.unsent.take() else { return };
        if let Some(requests) = &self.requests {
            let _ = requests.try_send(v1::ReceiveRequest { kind: Some(Kind::Alive(alive)) });
        }
    }

    /// Tells PostgreSQL how far the server is, and optionally asks for its own position.
    async fn report(&mut self, reply_requested: bool) {
        if self.failure.is_some() {
            return;
        }
        let Some(wal) = &mut self.wal else { return };
        let (written, flushed) = self.flow.report();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
        let sent_unix_micros = i64::try_from(now).unwrap_or(i64::MAX);
        let update = StatusUpdate { written, flushed, sent_unix_micros, reply_requested };
        self.failure = wal.status(update).await.err();
    }

    /// Called when the server has ended its side.
    async fn close(&mut self, ended: Option<Ended>) -> Result<Ended, Error> {
        let Some(ended) = ended.filter(|_| self.requests.is_none()) else {
            let message = "stream WAL: the server ended the stream";
            return Err(Error::new(Failure::Code(Code::Unavailable), message));
        };
        if !self.flow.is_settled() {
            let (sent, flushed) = (self.flow.sent(), self.flow.flushed());
            let message = format!("end stream: expected {sent} to be flushed, found {flushed}");
            return Err(Error::new(Failure::Code(Code::Unavailable), message));
        }
        self.report(false).await;
        if let Some(failure) = self.failure.take() {
            return Err(failure);
        }
        if let Some(wal) = self.wal.take() {
            wal.finish().await;
        }
        Ok(ended)
    }

    /// The request side is closed; the answer side says why.
    async fn refused(&mut self) -> Error {
        let lost = || Error::new(Failure::Code(Code::Unavailable), "stream WAL: connection lost");
        loop {
            match tokio::time::timeout(Duration::from_secs(5), self.answers.message()).await {
                Ok(Ok(Some(_))) => {}
                Ok(Err(status)) => return Error::from_status("stream WAL", &status),
                Ok(Ok(None)) | Err(_) => return lost(),
            }
        }
    }
}

/// Never returns without a stream.
async fn next<W: Wal>(wal: Option<&mut W>) -> Result<Event, Error> {
    match wal {
        Some(wal) => wal.next().await,
        None => std::future::pending().await,
    }
}

/// Never returns when no question is being answered. Cancel-safe.
async fn asked(asking: Option<&mut BoxFuture<'_, v1::Alive>>) -> v1::Alive {
    match asking {
        Some(asking) => asking.await,
        None => std::future::pending().await,
    }
}

/// Waits until a message can be queued; `false` when the receiver is gone. There is no other sender, so the room is
/// still there afterwards.
async fn has_place<T>(sender: Option<&mpsc::Sender<T>>) -> bool {
    match sender {
        Some(sender) => sender.reserve().await.is_ok(),
        None => false,
    }
}

fn append(start: Lsn, data: Bytes, wal_end: Lsn, traceparent: String) -> v1::ReceiveRequest {
    v1::ReceiveRequest {
        kind: Some(Kind::Append(v1::Append {
            start_lsn: start.as_u64(),
            data,
            wal_end_lsn: wal_end.as_u64(),
            traceparent,
        })),
    }
}
