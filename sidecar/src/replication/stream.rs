//! The WAL stream: START_REPLICATION and all messages until its end.
//!
//! Data is read only when the caller asks for an event, so PostgreSQL waits when we are full. WAL is delivered
//! without holes or overlaps: each message starts where the previous one ended. P1: the server is told positions only
//! through [`WalStream::send_status`]; the status that is sent during a long silence repeats the last ones.
//! Cancel-safe: every method that borrows the stream may be dropped at any await and called again.

use super::{
    commands::Client,
    error::{Error, ErrorKind, ServerError},
    rows::{self, Row},
    slot::SlotName,
    wire::{Frame, Wire, silent},
};
use crate::conninfo::Host;
use bytes::BytesMut;
use klio_pg::{Lsn, ReplicationMessage, StatusUpdate, TimelineId, decode_message, encode_status};
use postgres_protocol::message::frontend;
use std::{
    fmt,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::time::Instant;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// WAL or a keepalive.
    Message(ReplicationMessage),
    /// Nothing more will come. Returned again by each further call.
    End(StreamEnd),
}

/// Why a stream ended without an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamEnd {
    /// The whole timeline has been received; the server continues on another one.
    TimelineEnded {
        /// Not always the next number.
        next: TimelineId,
        /// The position at which the server left this timeline.
        switch: Lsn,
    },
    /// The server shuts down and has sent all its WAL; the connection is closed.
    ServerShutdown,
    /// We ended the stream ([`WalStream::finish`]).
    Stopped,
}

/// A stream that ended.
#[derive(Debug)]
pub struct Finished {
    pub end: StreamEnd,
    /// The connection, ready for commands; `None` if the server has shut down.
    pub client: Option<Client>,
}

#[derive(Debug)]
enum State {
    Streaming,
    /// Waits for the server's result and ReadyForQuery; `stopping` if we ended the stream.
    Ending {
        stopping: bool,
        next: Option<(TimelineId, Lsn)>,
    },
    Ended(StreamEnd),
    /// An error was returned; no further call can succeed.
    Broken,
}

/// WAL of one timeline from one position on.
pub struct WalStream {
    wire: Wire,
    host: Host,
    op: String,
    timeline: TimelineId,
    next_lsn: Lsn,
    state: State,
    status: StatusUpdate,
    heard: Instant,
    pinged: Option<Instant>,
}

impl fmt::Debug for WalStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WalStream({}, {:?}, {:?})", self.host, self.next_lsn, self.state)
    }
}

impl WalStream {
    pub(super) async fn begin(
        mut wire: Wire,
        host: Host,
        slot: Option<&SlotName>,
        timeline: TimelineId,
        start: Lsn,
    ) -> Result<WalStream, Error> {
        let named = slot.map_or(String::new(), |s| format!("SLOT \"{s}\" "));
        let sql = format!("START_REPLICATION {named}PHYSICAL {start} TIMELINE {}", timeline.get());
        let op = format!("start replication at {start} on timeline {}", timeline.get());
        rows::send(&mut wire, &op, &sql)?;
        let Frame { tag, body } = wire.receive(&op).await.map_err(|e| e.at(&host))?;
        let state = match tag {
            b'W' => State::Streaming,
            // Nothing is left of this timeline: only the row with the next timeline follows.
            b'T' => State::Ending { stopping: false, next: None },
            b'E' => return Err(Error::from_server(op, ServerError::parse(&body)).at(&host)),
            tag => return Err(rows::unexpected(&op, "WAL", tag).at(&host)),
        };
        let zero = Lsn::ZERO;
        Ok(WalStream {
            wire,
            host,
            op: format!("stream timeline {}", timeline.get()),
            timeline,
            next_lsn: start,
            state,
            status: StatusUpdate {
                written: zero,
                flushed: zero,
                sent_unix_micros: 0,
                reply_requested: false,
            },
            heard: Instant::now(),
            pinged: None,
        })
    }

    pub const fn timeline(&self) -> TimelineId {
        self.timeline
    }
    /// The LSN of the next byte of WAL.
    pub const fn next_lsn(&self) -> Lsn {
        self.next_lsn
    }
    pub const fn host(&self) -> &Host {
        &self.host
    }

    /// Waits for the next event. Cancel-safe.
    ///
    /// # Errors
    /// `WalRemoved` when the server has removed the next WAL; `StartAheadOfServer` when it has less than the
    /// requested start; `Io` when the connection broke or the server sent nothing for too long; `Protocol` when WAL
    /// is skipped or repeated. The stream cannot be used after an error.
    pub async fn next(&mut self) -> Result<Event, Error> {
        loop {
            if let Some(event) = self.try_next()? {
                return Ok(event);
            }
            let limit = self.silence_limit();
            tokio::select! {
                biased;
                done = self.wire.exchange(&self.op) => match done {
                    Ok(()) => {
                        self.heard = Instant::now();
                        self.pinged = None;
                    }
                    Err(e) => return Err(self.fail(e)),
                },
                () = tokio::time::sleep_until(limit) => self.on_silence()?,
            }
        }
    }

    /// An event that has already arrived, without waiting and without a system call. To take many messages at once,
    /// call this after [`WalStream::next`] until it returns `None`.
    ///
    /// # Errors
    /// As for [`WalStream::next`].
    pub fn try_next(&mut self) -> Result<Option<Event>, Error> {
        loop {
            match self.state {
                State::Ended(end) => return Ok(Some(Event::End(end))),
                State::Broken => {
                    let message = "expected no further call after an error";
                    return Err(Error::protocol(self.op.as_str(), message).at(&self.host));
                }
                State::Streaming | State::Ending { .. } => {}
            }
            let frame = match self.wire.buffered(&self.op) {
                Ok(Some(frame)) => frame,
                Ok(None) => return Ok(None),
                Err(e) => return Err(self.fail(e)),
            };
            match self.on_frame(frame) {
                Ok(None) => {}
                Ok(event) => return Ok(event),
                Err(e) => return Err(self.fail(e)),
            }
        }
    }

    /// Tells the server which WAL is written and flushed on the Klio server. Cancel-safe: after the call, the update
    /// is sent by it or by the next call.
    ///
    /// # Errors
    /// The server reads nothing within the patience. A broken connection is reported by the next [`WalStream::next`],
    /// after everything that the server had sent before.
    pub async fn send_status(&mut self, status: &StatusUpdate) -> Result<(), Error> {
        if !matches!(self.state, State::Streaming) {
            return Ok(());
        }
        self.status = *status;
        self.queue_status(*status)?;
        match self.wire.flush(&self.op).await {
            Ok(()) => Ok(()),
            Err(e) => Err(self.fail(e)),
        }
    }

    /// Ends the stream cleanly; WAL that is still on the way is dropped.
    ///
    /// # Errors
    /// A broken connection, or an error of the server.
    pub async fn finish(mut self) -> Result<Finished, Error> {
        if matches!(self.state, State::Streaming) {
            frontend::copy_done(self.wire.output());
            self.state = State::Ending { stopping: true, next: None };
        }
        loop {
            if let Event::End(end) = self.next().await? {
                let alive = end != StreamEnd::ServerShutdown;
                let client = alive.then(|| Client::from_parts(self.wire, self.host));
                return Ok(Finished { end, client });
            }
        }
    }

    fn on_frame(&mut self, Frame { tag, body }: Frame) -> Result<Option<Event>, Error> {
        let op = self.op.as_str();
        match (tag, &mut self.state) {
            (b'E', _) => Err(Error::from_server(op, ServerError::parse(&body))),
            (b'd', State::Streaming) => {
                let message =
                    decode_message(body).map_err(|e| Error::caused(ErrorKind::Protocol, op, e))?;
                if let ReplicationMessage::XLogData(wal) = &message {
                    if wal.start != self.next_lsn {
                        let message =
                            format!("expected WAL from {}, found {}", self.next_lsn, wal.start);
                        return Err(Error::protocol(op, message));
                    }
                    self.next_lsn = wal.start.advance(wal.data.len() as u64);
                }
                Ok(Some(Event::Message(message)))
            }
            (b'c', State::Streaming) => {
                frontend::copy_done(self.wire.output());
                self.state = State::Ending { stopping: false, next: None };
                Ok(None)
            }
            // A server that shuts down sends this as its last message, without CopyDone before it.
            (b'C', State::Streaming) => Ok(self.end(StreamEnd::ServerShutdown)),
            (b'D', State::Ending { next, .. }) => {
                *next = Some(next_timeline(op, &Row::parse(op, body)?)?);
                Ok(None)
            }
            (b'd', State::Ending { stopping: true, .. }) | (b'T' | b'C' | b'c', _) => Ok(None),
            (b'Z', State::Ending { stopping, next }) => match (*next, *stopping) {
                (Some((next, switch)), _) => {
                    Ok(self.end(StreamEnd::TimelineEnded { next, switch }))
                }
                (None, true) => Ok(self.end(StreamEnd::Stopped)),
                (None, false) => Err(Error::protocol(op, "expected the next timeline, found none")),
            },
            (tag, _) => Err(rows::unexpected(op, "WAL", tag)),
        }
    }

    fn end(&mut self, end: StreamEnd) -> Option<Event> {
        self.state = State::Ended(end);
        Some(Event::End(end))
    }

    fn fail(&mut self, e: Error) -> Error {
        self.state = State::Broken;
        e.at(&self.host)
    }

    fn queue_status(&mut self, status: StatusUpdate) -> Result<(), Error> {
        let mut payload = BytesMut::with_capacity(34);
        encode_status(&status, &mut payload);
        let message = frontend::CopyData::new(payload.freeze())
            .map_err(|e| Error::caused(ErrorKind::Protocol, self.op.as_str(), e))?;
        message.write(self.wire.output());
        Ok(())
    }

    fn half_patience(&self) -> Duration {
        self.wire.patience() / 2
    }

    /// When to act on silence: first a status request is sent, then the connection is given up. The request comes
    /// first even if the caller has not read for a while, so that a live server is not taken for dead.
    fn silence_limit(&self) -> Instant {
        self.pinged.unwrap_or(self.heard) + self.half_patience()
    }

    fn on_silence(&mut self) -> Result<(), Error> {
        if self.pinged.is_some() {
            let e = silent(&self.op, "a message", self.wire.patience());
            return Err(self.fail(e));
        }
        self.pinged = Some(Instant::now());
        if !matches!(self.state, State::Streaming) {
            return Ok(());
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
        let sent_unix_micros = i64::try_from(now).unwrap_or(i64::MAX);
        self.queue_status(StatusUpdate { sent_unix_micros, reply_requested: true, ..self.status })
    }
}

fn next_timeline(op: &str, row: &Row) -> Result<(TimelineId, Lsn), Error> {
    let number: u32 = row.get(op, 0, "a timeline")?;
    let timeline = TimelineId::new(number)
        .ok_or_else(|| Error::protocol(op, "expected the next timeline, found 0"))?;
    Ok((timeline, row.get(op, 1, "the LSN of the switch")?))
}
