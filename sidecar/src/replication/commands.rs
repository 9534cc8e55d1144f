//! Commands on an idle replication connection
//! (<https://www.postgresql.org/docs/current/protocol-replication.html>).
//!
//! Every method leaves the connection ready for the next command, even after an error of the server. Not cancel-safe:
//! a call that is dropped half way leaves its answer unread, so the client must be dropped as well.

use super::{
    connect::{self, Purpose},
    error::{Error, ErrorKind},
    rows::{self, Row},
    slot::{CreatedSlot, SlotName, SlotState},
    stream::WalStream,
    wire::Wire,
};
use crate::conninfo::{ConnInfo, Host};
use bytes::Bytes;
use klio_pg::{Lsn, SegmentSize, TimelineId};
use std::{fmt, time::Duration};

/// A logged-in connection that is not streaming.
pub struct Client {
    wire: Wire,
    host: Host,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Client({})", self.host)
    }
}

/// The answer to IDENTIFY_SYSTEM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SystemIdentity {
    /// Assigned by initdb; the same on every standby of the cluster.
    pub system_identifier: u64,
    pub timeline: TimelineId,
    /// The position up to which its WAL is flushed; on a standby, up to which it can be streamed.
    pub flush_lsn: Lsn,
}

/// `server_version_num`, such as 150018.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ServerVersion(u32);

impl ServerVersion {
    pub const fn new(number: u32) -> Self {
        Self(number)
    }
    pub const fn number(self) -> u32 {
        self.0
    }
    /// The major version, such as 15.
    pub const fn major(self) -> u32 {
        self.0 / 10_000
    }
}

impl fmt::Display for ServerVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major(), self.0 % 10_000)
    }
}

impl Client {
    /// Opens a physical replication connection.
    ///
    /// # Errors
    /// An error of kind `Connect`, `Tls`, `Auth` or `Permission` needs a person's attention.
    pub async fn connect(info: &ConnInfo) -> Result<Client, Error> {
        Self::open(info, Purpose::Replication).await
    }

    /// Opens an ordinary connection, for [`Client::query`] in [`ConnInfo::sql_database`].
    ///
    /// # Errors
    /// As for [`Client::connect`].
    pub async fn connect_sql(info: &ConnInfo) -> Result<Client, Error> {
        Self::open(info, Purpose::Sql).await
    }

    async fn open(info: &ConnInfo, purpose: Purpose) -> Result<Client, Error> {
        let (wire, host) = connect::open(info, purpose).await?;
        Ok(Client { wire, host })
    }

    pub(super) const fn from_parts(wire: Wire, host: Host) -> Client {
        Client { wire, host }
    }

    /// The host that the connection was made to, out of those in the connection string.
    pub const fn host(&self) -> &Host {
        &self.host
    }

    /// Sets how long the server may send nothing before the connection counts as dead; initially 60 s.
    pub fn set_patience(&mut self, patience: Duration) {
        self.wire.set_patience(patience);
    }

    /// The process number that was sent at login: that of PostgreSQL's backend, or one invented by a connection
    /// pooler.
    pub const fn peer_pid(&self) -> Option<u32> {
        self.wire.peer_pid()
    }

    /// Whether the server was in recovery when it last reported `in_hot_standby`.
    pub fn in_hot_standby(&self) -> bool {
        self.wire.parameter("in_hot_standby") == Some("on")
    }

    async fn run(&mut self, op: &str, sql: &str) -> Result<Vec<Row>, Error> {
        rows::run(&mut self.wire, op, sql).await.map_err(|e| e.at(&self.host))
    }

    /// Runs a simple query: SQL on a [`Client::connect_sql`] connection, otherwise a replication command or SHOW. For
    /// several statements the rows of all are returned together.
    ///
    /// # Errors
    /// The server reported an error, or the connection broke.
    pub async fn query(&mut self, sql: &str) -> Result<Vec<Row>, Error> {
        self.run("run query", sql).await
    }

    /// Runs IDENTIFY_SYSTEM.
    ///
    /// # Errors
    /// A broken connection, or a row of an unexpected form.
    pub async fn identify_system(&mut self) -> Result<SystemIdentity, Error> {
        const OP: &str = "identify system";
        let row = rows::one(OP, self.run(OP, "IDENTIFY_SYSTEM").await?)?;
        Ok(SystemIdentity {
            system_identifier: row.get(OP, 0, "a system identifier")?,
            timeline: timeline(OP, &row, 1)?,
            flush_lsn: row.get(OP, 2, "an LSN")?,
        })
    }

    /// The value of a setting, as SHOW prints it.
    ///
    /// # Errors
    /// `Server` for an unknown setting or one that the role may not see.
    pub async fn show(&mut self, setting: &str) -> Result<String, Error> {
        let op = format!("show {setting}");
        let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'.';
        if setting.is_empty() || !setting.bytes().all(plain) {
            return Err(Error::protocol(op, "expected the name of a setting"));
        }
        let row = rows::one(&op, self.run(&op, &format!("SHOW {setting}")).await?)?;
        row.get(&op, 0, "a value")
    }

    /// # Errors
    /// A broken connection.
    pub async fn server_version(&mut self) -> Result<ServerVersion, Error> {
        let text = self.show("server_version_num").await?;
        text.parse().map(ServerVersion).map_err(|_| {
            Error::protocol("read server version", format!("expected a number, found {text:?}"))
        })
    }

    /// `wal_segment_size`.
    ///
    /// # Errors
    /// A broken connection, or a size that PostgreSQL cannot have.
    pub async fn segment_size(&mut self) -> Result<SegmentSize, Error> {
        let text = self.show("wal_segment_size").await?;
        parse_size(&text).and_then(|bytes| SegmentSize::new(bytes).ok()).ok_or_else(|| {
            let message = format!("expected a size such as 16MB, found {text:?}");
            Error::protocol("read WAL segment size", message)
        })
    }

    /// Runs READ_REPLICATION_SLOT; `None` when the slot does not exist.
    ///
    /// # Errors
    /// The slot is logical, or the connection broke.
    pub async fn read_slot(&mut self, slot: &SlotName) -> Result<Option<SlotState>, Error> {
        let op = format!("read slot {slot}");
        let rows = self.run(&op, &format!("READ_REPLICATION_SLOT \"{slot}\"")).await?;
        let row = rows::one(&op, rows)?;
        if row.bytes(0).is_none() {
            return Ok(None);
        }
        let restart_lsn = match row.bytes(1) {
            None => None,
            Some(_) => Some(row.get(&op, 1, "an LSN or nothing")?),
        };
        let restart_timeline = match row.bytes(2) {
            None => None,
            Some(_) => Some(timeline(&op, &row, 2)?),
        };
        Ok(Some(SlotState { restart_lsn, restart_timeline }))
    }

    /// Creates a physical slot that retains WAL from now on (RESERVE_WAL). Without that option a slot retains nothing
    /// until its first use.
    ///
    /// # Errors
    /// `SlotExists`; `Server` with SQLSTATE 53400 when `max_replication_slots` is exhausted.
    pub async fn create_slot(&mut self, slot: &SlotName) -> Result<CreatedSlot, Error> {
        let op = format!("create slot {slot}");
        let sql = format!("CREATE_REPLICATION_SLOT \"{slot}\" PHYSICAL RESERVE_WAL");
        self.run(&op, &sql).await?;
        match self.read_slot(slot).await? {
            Some(SlotState { restart_lsn: Some(lsn), restart_timeline: Some(timeline) }) => {
                Ok(CreatedSlot { restart_lsn: lsn, restart_timeline: timeline })
            }
            found => {
                Err(Error::protocol(op, format!("expected it to retain WAL, found {found:?}")))
            }
        }
    }

    /// Drops a slot that nobody streams from.
    ///
    /// # Errors
    /// `SlotMissing` or `SlotInUse`.
    pub async fn drop_slot(&mut self, slot: &SlotName) -> Result<(), Error> {
        let sql = format!("DROP_REPLICATION_SLOT \"{slot}\"");
        self.run(&format!("drop slot {slot}"), &sql).await.map(drop)
    }

    /// The content of a timeline's history file; timeline 1 has none.
    ///
    /// # Errors
    /// `TimelineMissing`.
    pub async fn timeline_history(&mut self, timeline: TimelineId) -> Result<Bytes, Error> {
        let op = format!("read history of timeline {}", timeline.get());
        let sql = format!("TIMELINE_HISTORY {}", timeline.get());
        let row = rows::one(&op, self.run(&op, &sql).await?)?;
        row.bytes(1).cloned().ok_or_else(|| Error::protocol(op, "expected a history, found none"))
    }

    /// Starts to stream `timeline` from `start`, which may be inside a segment.
    ///
    /// PostgreSQL looks for the WAL only after it has accepted the command, so `WalRemoved` and `StartAheadOfServer`
    /// are reported by the first [`WalStream::next`].
    ///
    /// # Errors
    /// `SlotInUse`, `SlotMissing`, `TimelineMissing`; from PostgreSQL 18 on, `WalRemoved` for an invalidated slot.
    pub async fn start(
        self,
        slot: Option<&SlotName>,
        timeline: TimelineId,
        start: Lsn,
    ) -> Result<WalStream, Error> {
        WalStream::begin(self.wire, self.host, slot, timeline, start).await
    }

    /// Closes the connection cleanly.
    pub async fn close(self) {
        self.wire.close().await;
    }
}

fn timeline(op: &str, row: &Row, column: usize) -> Result<TimelineId, Error> {
    let number: u32 = row.get(op, column, "a timeline")?;
    TimelineId::new(number)
        .ok_or_else(|| Error::new(ErrorKind::Protocol, op, "expected a timeline, found 0"))
}

/// Parses a memory setting as SHOW prints it: a number and B, kB, MB, GB or TB.
fn parse_size(text: &str) -> Option<u32> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit: u64 = match unit.trim() {
        "" | "B" => 1,
        "kB" => 1 << 10,
        "MB" => 1 << 20,
        "GB" => 1 << 30,
        "TB" => 1 << 40,
        _ => return None,
    };
    u32::try_from(number.parse::<u64>().ok()?.checked_mul(unit)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_every_unit() {
        for (text, bytes) in [
            ("16MB", Some(16 << 20)),
            ("1GB", Some(1 << 30)),
            ("1024kB", Some(1 << 20)),
            ("16777216", Some(16 << 20)),
            ("16777216B", Some(16 << 20)),
            ("8TB", None),
            ("MB", None),
            ("16mb", None),
            ("", None),
        ] {
            assert_eq!(parse_size(text), bytes, "{text:?}");
        }
    }

    #[test]
    fn version_prints_as_people_say_it() {
        let version = ServerVersion::new(150_018);
        assert_eq!((version.major(), version.to_string().as_str()), (15, "15.18"));
    }
}
