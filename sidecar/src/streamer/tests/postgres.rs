//! A simulated PostgreSQL: sends a byte pattern, records what it is told, can be promoted and can remove WAL.

use crate::{
    error::{Error, Failure},
    fake_server::byte_at,
    streamer::source::{Event, Identity, Primary, Session, Wal},
};
use bytes::Bytes;
use klio_pg::{
    Lsn, PrimaryKeepalive, ReplicationMessage, SegmentSize, StatusUpdate, TimelineId, XLogData,
};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};
use tokio::sync::Notify;

/// 1 MiB segments keep the tests small.
pub const SEGMENT: u64 = 1 << 20;

#[derive(Debug)]
pub struct Inner {
    pub timeline: u32,
    pub end: u64,
    /// Where each ended timeline was left.
    pub ends: BTreeMap<u32, u64>,
    pub histories: BTreeMap<u32, String>,
    pub slot: u64,
    pub oldest: u64,
    pub chunk: u64,
    pub starts: Vec<(u32, u64)>,
    /// WAL ranges that were read for a comparison.
    pub reads: Vec<(u32, u64)>,
    /// Bytes from here on belong to another history.
    pub other_from: Option<u64>,
    /// Positions passed to `has`.
    pub looked: Vec<u64>,
    pub reports: Vec<StatusUpdate>,
    pub sent: u64,
    pub shutdown: bool,
    pub in_recovery: bool,
    pub ask_reply: bool,
    pub crashed: bool,
    /// New connections are refused.
    pub refuses: bool,
}

impl Inner {
    fn bytes(&self, from: u64, to: u64) -> Vec<u8> {
        let other = |at: u64| self.other_from.is_some_and(|from| at >= from);
        (from..to).map(|at| byte_at(at) ^ u8::from(other(at))).collect()
    }
}

#[derive(Debug, Clone)]
pub struct FakePostgres {
    inner: Arc<Mutex<Inner>>,
    changed: Arc<Notify>,
}

impl FakePostgres {
    /// Timeline 1 with WAL from `start` to `end`, all of it retained by the slot.
    pub fn new(start: u64, end: u64) -> Self {
        let inner = Inner {
            timeline: 1,
            end,
            ends: BTreeMap::new(),
            histories: BTreeMap::new(),
            slot: start,
            // PostgreSQL retains whole segments.
            oldest: start - start % SEGMENT,
            chunk: 128 << 10,
            starts: vec![],
            reads: vec![],
            other_from: None,
            looked: vec![],
            reports: vec![],
            sent: 0,
            shutdown: false,
            in_recovery: false,
            ask_reply: false,
            crashed: false,
            refuses: false,
        };
        Self { inner: Arc::new(Mutex::new(inner)), changed: Arc::default() }
    }

    pub fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }

    pub fn change(&self, change: impl FnOnce(&mut Inner)) {
        change(&mut self.inner());
        self.changed.notify_waiters();
    }

    /// Promotes to `timeline` at the current end; new WAL follows up to `end`.
    pub fn promote(&self, timeline: u32, end: u64) {
        self.change(|inner| {
            let old = inner.histories.get(&inner.timeline).cloned().unwrap_or_default();
            let line = format!("{}\t{}\tpromoted\n", inner.timeline, Lsn::new(inner.end));
            inner.histories.insert(timeline, old + &line);
            inner.ends.insert(inner.timeline, inner.end);
            inner.timeline = timeline;
            inner.end = end;
        });
    }

    /// The highest position ever reported as flushed.
    pub fn flushed(&self) -> u64 {
        self.inner().reports.iter().map(|r| r.flushed.as_u64()).max().unwrap_or(0)
    }

    pub async fn until(&self, what: &str, is: impl Fn(&Inner) -> bool) {
        let wait = async {
            while !is(&self.inner()) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        if tokio::time::timeout(Duration::from_secs(20), wait).await.is_err() {
            panic!("{what} did not happen: {:?}", self.inner());
        }
    }
}

impl Primary for FakePostgres {
    type Session = Self;
    async fn connect(&self) -> Result<Self, Error> {
        if self.inner().refuses {
            return Err(Error::new(Failure::Postgres, "connection refused, as told"));
        }
        Ok(self.clone())
    }
}

impl Session for FakePostgres {
    type Wal = FakeWal;
    async fn identify(&mut self) -> Result<Identity, Error> {
        let inner = self.inner();
        Ok(Identity {
            system_identifier: 77,
            version: 150_018,
            segment_size: SegmentSize::new(SEGMENT as u32).unwrap(),
            timeline: TimelineId::new(inner.timeline).unwrap(),
            end: Lsn::new(inner.end),
            in_recovery: inner.in_recovery,
        })
    }
    async fn slot(&mut self) -> Result<Option<Lsn>, Error> {
        Ok(Some(Lsn::new(self.inner().slot)))
    }
    async fn history(&mut self, timeline: TimelineId) -> Result<Option<Bytes>, Error> {
        Ok(self.inner().histories.get(&timeline.get()).cloned().map(Bytes::from))
    }
    async fn read(
        self,
        timeline: TimelineId,
        start: Lsn,
        end: Lsn,
        take: &mut (dyn FnMut(&[u8]) + Send),
    ) -> Result<Self, Error> {
        let mut inner = self.inner();
        inner.reads.push((timeline.get(), start.as_u64()));
        if start.as_u64() < inner.oldest {
            return Err(Error::new(Failure::WalRemoved, "has already been removed"));
        }
        let data = inner.bytes(start.as_u64(), end.as_u64());
        drop(inner);
        data.chunks(5000).for_each(take);
        Ok(self)
    }
    async fn start(self, timeline: TimelineId, start: Lsn) -> Result<FakeWal, Error> {
        let (timeline, position) = (timeline.get(), start.as_u64());
        {
            let mut inner = self.inner();
            inner.starts.push((timeline, position));
            assert!(position <= inner.end, "starts beyond the end");
        }
        Ok(FakeWal { postgres: self, timeline, position })
    }
    async fn has(self, _: TimelineId, at: Lsn) -> Result<bool, Error> {
        let mut inner = self.inner();
        inner.looked.push(at.as_u64());
        Ok(at.as_u64() >= inner.oldest)
    }
}

#[derive(Debug)]
pub struct FakeWal {
    postgres: FakePostgres,
    timeline: u32,
    position: u64,
}

impl FakeWal {
    fn ready(&mut self) -> Option<Event> {
        let mut inner = self.postgres.inner();
        if std::mem::take(&mut inner.ask_reply) {
            return Some(Event::Message(ReplicationMessage::Keepalive(PrimaryKeepalive {
                wal_end: Lsn::new(inner.end),
                sent_unix_micros: 0,
                reply_requested: true,
            })));
        }
        let ended = inner.ends.get(&self.timeline).copied();
        let limit = ended.unwrap_or(inner.end);
        let bytes = inner.chunk.min(limit.saturating_sub(self.position));
        if bytes == 0 {
            if ended.is_some() {
                return Some(Event::TimelineEnded);
            }
            return inner.shutdown.then_some(Event::Shutdown);
        }
        let start = self.position;
        self.position += bytes;
        inner.sent = inner.sent.max(self.position);
        let data = inner.bytes(start, start + bytes);
        Some(Event::Message(ReplicationMessage::XLogData(XLogData {
            start: Lsn::new(start),
            wal_end: Lsn::new(inner.end),
            sent_unix_micros: 0,
            data: Bytes::from(data),
        })))
    }
}

impl Wal for FakeWal {
    async fn next(&mut self) -> Result<Event, Error> {
        loop {
            let changed = Arc::clone(&self.postgres.changed);
            let mut changed = std::pin::pin!(changed.notified());
            changed.as_mut().enable();
            if let Some(event) = self.try_next()? {
                return Ok(event);
            }
            changed.await;
        }
    }
    /// As in PostgreSQL, removed WAL is noticed when it is read, not at the start.
    fn try_next(&mut self) -> Result<Option<Event>, Error> {
        if self.position < self.postgres.inner().oldest {
            return Err(Error::new(Failure::WalRemoved, "has already been removed"));
        }
        if self.postgres.inner().crashed {
            return Err(Error::new(Failure::Postgres, "connection lost"));
        }
        Ok(self.ready())
    }
    async fn status(&mut self, update: StatusUpdate) -> Result<(), Error> {
        self.postgres.inner().reports.push(update);
        Ok(())
    }
    async fn finish(self) {}
}
