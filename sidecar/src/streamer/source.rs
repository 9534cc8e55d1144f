//! The source of WAL: PostgreSQL, as the streamer uses it, in three steps: connect, prepare the session, stream.
//!
//! There are two implementations: the real one over `replication`, and the simulated PostgreSQL of the tests. Errors
//! are already classified by what the streamer does about them ([`Failure`]).

use super::slot::SlotKeeper;
use crate::{
    conninfo::ConnInfo,
    error::{Error, Failure},
    replication::{self, Client, ErrorKind, SlotName},
};
use bytes::Bytes;
use klio_pg::{Lsn, ReplicationMessage, SegmentSize, StatusUpdate, TimelineId};
use std::{sync::Arc, time::Duration};

/// PostgreSQL sends WAL that it has at once, so no answer within this time is an error.
const HAS_WITHIN: Duration = Duration::from_secs(20);

/// Identifies a PostgreSQL and says where it is now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Assigned by initdb.
    pub system_identifier: u64,
    /// `server_version_num`.
    pub version: u32,
    /// `wal_segment_size`.
    pub segment_size: SegmentSize,
    pub timeline: TimelineId,
    /// End of the WAL that can be sent now.
    pub end: Lsn,
    /// A standby may lag behind what the server holds; a primary may not.
    pub in_recovery: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// WAL or a keepalive.
    Message(ReplicationMessage),
    /// The whole timeline has been sent; PostgreSQL continues on another one.
    TimelineEnded,
    /// PostgreSQL shuts down and has sent all its WAL.
    Shutdown,
}

/// A PostgreSQL that can be connected to.
pub trait Primary: Send + Sync {
    /// A connection that is not streaming yet.
    type Session: Session;
    fn connect(&self) -> impl Future<Output = Result<Self::Session, Error>> + Send;
}

/// A connection that is not streaming yet.
pub trait Session: Send {
    /// The stream that the connection becomes.
    type Wal: Wal;
    fn identify(&mut self) -> impl Future<Output = Result<Identity, Error>> + Send;
    /// Makes sure that the slot exists and retains WAL; returns the oldest position that it retains.
    fn slot(&mut self) -> impl Future<Output = Result<Option<Lsn>, Error>> + Send;
    /// The position up to which PostgreSQL was told that WAL is flushed, given the slot's restart position; `None`
    /// for a slot that was just created.
    fn acknowledged(&self, restart: Option<Lsn>) -> Option<Lsn> {
        restart
    }
    /// A timeline's history file; `None` when PostgreSQL has none for it.
    fn history(
        &mut self,
        timeline: TimelineId,
    ) -> impl Future<Output = Result<Option<Bytes>, Error>> + Send;
    /// Reads WAL from `start` to `end`, or to the end of the timeline, without using the slot, and returns the
    /// connection.
    fn read(
        self,
        timeline: TimelineId,
        start: Lsn,
        end: Lsn,
        take: &mut (dyn FnMut(&[u8]) + Send),
    ) -> impl Future<Output = Result<Self, Error>> + Send
    where
        Self: Sized;
    /// Begins to stream.
    fn start(
        self,
        timeline: TimelineId,
        start: Lsn,
    ) -> impl Future<Output = Result<Self::Wal, Error>> + Send;
    /// Whether PostgreSQL still has the WAL at `at`, a position before its end. Only an attempt to read it tells,
    /// because PostgreSQL often has more WAL than the slot retains. Does not use the slot; consumes the connection.
    fn has(self, timeline: TimelineId, at: Lsn)
    -> impl Future<Output = Result<bool, Error>> + Send;
}

/// A WAL stream. `next` is cancel-safe.
pub trait Wal: Send {
    fn next(&mut self) -> impl Future<Output = Result<Event, Error>> + Send;
    /// An event that has already arrived.
    fn try_next(&mut self) -> Result<Option<Event>, Error>;
    /// Tells PostgreSQL how far the server is (P1: the caller is responsible for `flushed`).
    fn status(&mut self, update: StatusUpdate) -> impl Future<Output = Result<(), Error>> + Send;
    /// Ends the stream cleanly.
    fn finish(self) -> impl Future<Output = ()> + Send;
}

#[derive(Debug)]
pub struct Postgres {
    info: Arc<ConnInfo>,
    slot: SlotKeeper,
}

impl Postgres {
    /// Opens no connection yet.
    pub fn new(info: Arc<ConnInfo>, slot: SlotName, create_slot: bool) -> Self {
        Self { info, slot: SlotKeeper::new(slot, create_slot) }
    }
}

#[derive(Debug)]
pub struct PostgresSession {
    client: Client,
    slot: SlotKeeper,
}

impl Primary for Postgres {
    type Session = PostgresSession;
    async fn connect(&self) -> Result<PostgresSession, Error> {
        let client = Client::connect(&self.info).await?;
        Ok(PostgresSession { client, slot: self.slot.clone() })
    }
}

impl Session for PostgresSession {
    type Wal = replication::WalStream;

    async fn identify(&mut self) -> Result<Identity, Error> {
        let client = &mut self.client;
        let version = client.server_version().await?;
        if version.major() < 15 {
            let message =
                format!("identify PostgreSQL: expected version 15 or newer, found {version}");
            return Err(Error::new(Failure::PostgresRefused, message)
                .hint("READ_REPLICATION_SLOT, which Klio needs, came with PostgreSQL 15"));
        }
        let segment_size = client.segment_size().await?;
        let system = client.identify_system().await?;
        Ok(Identity {
            system_identifier: system.system_identifier,
            version: version.number(),
            segment_size,
            timeline: system.timeline,
            end: system.flush_lsn,
            in_recovery: client.in_hot_standby(),
        })
    }

    fn acknowledged(&self, restart: Option<Lsn>) -> Option<Lsn> {
        self.slot.acknowledged(restart)
    }

    async fn slot(&mut self) -> Result<Option<Lsn>, Error> {
        self.slot.ensure(&mut self.client).await
    }

    async fn history(&mut self, timeline: TimelineId) -> Result<Option<Bytes>, Error> {
        match self.client.timeline_history(timeline).await {
            Ok(content) => Ok(Some(content)),
            Err(e) if e.kind() == ErrorKind::TimelineMissing => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    async fn read(
        self,
        timeline: TimelineId,
        start: Lsn,
        end: Lsn,
        take: &mut (dyn FnMut(&[u8]) + Send),
    ) -> Result<Self, Error> {
        let Self { client, slot } = self;
        let mut wal = client.start(None, timeline, start).await?;
        let mut at = start;
        while at < end {
            match event(wal.next().await?) {
                Event::Message(ReplicationMessage::XLogData(piece)) => {
                    let wanted = usize::try_from(end.bytes_since(at)).unwrap_or(usize::MAX);
                    take(&piece.data[..wanted.min(piece.data.len())]);
                    at = piece.start.advance(piece.data.len() as u64);
                }
                // PostgreSQL closes a connection that does not answer its keepalives. The answer reports no position.
                Event::Message(ReplicationMessage::Keepalive(alive)) => {
                    if alive.reply_requested {
                        let (written, flushed) = (Lsn::ZERO, Lsn::ZERO);
                        let nothing = StatusUpdate {
                            written,
                            flushed,
                            sent_unix_micros: 0,
                            reply_requested: false,
                        };
                        wal.send_status(&nothing).await?;
                    }
                }
                Event::TimelineEnded | Event::Shutdown => break,
            }
        }
        match wal.finish().await?.client {
            Some(client) => Ok(Self { client, slot }),
            None => Err(Error::new(Failure::Postgres, "read WAL: PostgreSQL shuts down")),
        }
    }

    async fn start(self, timeline: TimelineId, start: Lsn) -> Result<Self::Wal, Error> {
        let Self { client, slot } = self;
        client.start(Some(slot.name()), timeline, start).await.map_err(|e| {
            if slot.is_invalidated(&e) {
                return Error::new(Failure::Postgres, &e).hint("the slot will be created again");
            }
            Error::from(e)
        })
    }

    async fn has(self, timeline: TimelineId, at: Lsn) -> Result<bool, Error> {
        let first = async {
            let mut wal = self.client.start(None, timeline, at).await?;
            wal.next().await.map(drop)
        };
        match tokio::time::timeout(HAS_WITHIN, first).await {
            Ok(Ok(())) => Ok(true),
            Ok(Err(error)) if error.kind() == ErrorKind::WalRemoved => Ok(false),
            Ok(Err(error)) => Err(error.into()),
            Err(_) => {
                let message = format!("look for WAL at {at}: no answer within {HAS_WITHIN:?}");
                Err(Error::new(Failure::Postgres, message))
            }
        }
    }
}

impl Wal for replication::WalStream {
    async fn next(&mut self) -> Result<Event, Error> {
        self.next().await.map(event).map_err(Error::from)
    }
    fn try_next(&mut self) -> Result<Option<Event>, Error> {
        self.try_next().map(|e| e.map(event)).map_err(Error::from)
    }
    async fn status(&mut self, update: StatusUpdate) -> Result<(), Error> {
        self.send_status(&update).await.map_err(Error::from)
    }
    async fn finish(self) {
        // The stream is over, so a failure to close cleanly does not matter: PostgreSQL notices a closed socket as
        // well.
        if let Ok(replication::Finished { client: Some(client), .. }) = self.finish().await {
            client.close().await;
        }
    }
}

fn event(event: replication::Event) -> Event {
    match event {
        replication::Event::Message(message) => Event::Message(message),
        replication::Event::End(replication::StreamEnd::TimelineEnded { .. }) => {
            Event::TimelineEnded
        }
        replication::Event::End(_) => Event::Shutdown,
    }
}
