//! Walks the records of WAL and reports what a recovery has to know: commits and aborts with their time and
//! transaction, restore points, the settings that the server was started with, and created and dropped
//! tablespaces.
//!
//! Sources: `src/include/access/xlogrecord.h`, `xlog_internal.h`, `xact.h`, `catalog/pg_control.h` of
//! PostgreSQL 15 to 18. Little endian. A record:
//!
//! | bytes | field | |
//! |---|---|---|
//! | 0..4 | xl_tot_len | including this header; 0 where WAL ends |
//! | 4..8 | xl_xid | |
//! | 8..16 | xl_prev | start of the previous record |
//! | 16 | xl_info | upper half: the record type within the resource manager |
//! | 17 | xl_rmid | 0 XLOG, 1 XACT, 5 TBLSPC |
//! | 20..24 | xl_crc | CRC-32C of what follows the header, then of bytes 0..20 |
//! | 24.. | block headers, then their bytes, then main data | |
//!
//! Records begin at multiples of 8, and page headers are between their bytes. After XLOG_SWITCH the next
//! record is in the next segment. Pushed bytes must continue each other; memory does not grow with the size
//! of a record. As in PostgreSQL, the first incomplete or invalid record is the end of WAL.

use crate::{
    Lsn, PAGE_BYTES, SegmentSize,
    number::number,
    replication::unix_micros_from_pg,
    wal_change::{self, WalParameters},
    wal_prepare::Prepared,
    wal_xact::{self, Kept},
};

const SHORT_HEADER: usize = 24;
const LONG_HEADER: usize = 40;
const RECORD_HEADER: usize = 24;
const CONTINUES: u16 = 0x0001;
/// The previous record was cut off by a crash and is written anew (XLP_FIRST_IS_OVERWRITE_CONTRECORD).
const OVERWRITES: u16 = 0x0008;
const RM_XLOG: u8 = 0;
const RM_XACT: u8 = 1;
const RM_TBLSPC: u8 = 5;
const XACT_OPERATION: u8 = 0x70;
const XACT_PREPARE: u8 = 0x10;
const XLOG_SWITCH: u8 = 0x40;
const XLOG_PARAMETER_CHANGE: u8 = 0x60;
const XLOG_RESTORE_POINT: u8 = 0x70;
const TBLSPC_CREATE: u8 = 0x00;
const TBLSPC_DROP: u8 = 0x10;
/// XLogRecordMaxSize: PostgreSQL never writes a larger record.
const RECORD_BYTES_MAX: u32 = 1020 << 20;

/// The end of a transaction, a restore point, or a change of settings or tablespaces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Landmark {
    /// A transaction committed.
    Commit {
        /// The top-level transaction id. For a prepared transaction, the id it was prepared with, if the
        /// record is short enough to be parsed completely.
        xid: u32,
        /// Microseconds since 1970, in PostgreSQL's clock.
        unix_micros: i64,
    },
    /// A transaction was rolled back.
    Abort {
        /// As in a commit.
        xid: u32,
        /// As in a commit.
        unix_micros: i64,
    },
    /// A transaction was prepared; it ends with a commit or an abort that has its id.
    Prepared(Prepared),
    /// `pg_create_restore_point`.
    RestorePoint {
        name: String,
        /// Microseconds since 1970, in PostgreSQL's clock.
        unix_micros: i64,
    },
    /// The server was started with changed settings.
    Parameters(WalParameters),
    /// `CREATE TABLESPACE`: replay creates a link to this location.
    TablespaceCreated {
        oid: u32,
        /// The location as PostgreSQL received it; empty for one inside the data directory
        /// (`allow_in_place_tablespaces`).
        path: Vec<u8>,
    },
    /// `DROP TABLESPACE`.
    TablespaceDropped { oid: u32 },
}

impl Landmark {
    /// Microseconds since 1970, in PostgreSQL's clock, if the record has a time.
    pub const fn unix_micros(&self) -> Option<i64> {
        match self {
            Landmark::Commit { unix_micros, .. }
            | Landmark::Abort { unix_micros, .. }
            | Landmark::RestorePoint { unix_micros, .. } => Some(*unix_micros),
            Landmark::Prepared(_)
            | Landmark::Parameters(_)
            | Landmark::TablespaceCreated { .. }
            | Landmark::TablespaceDropped { .. } => None,
        }
    }

    /// Whether a recovery to a time can stop here: before a commit or an abort, never at a restore point
    /// (`recoveryStopsBefore` in `xlogrecovery.c`).
    pub const fn stops_by_time(&self) -> bool {
        matches!(self, Landmark::Commit { .. } | Landmark::Abort { .. })
    }
}

/// A landmark and its position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// First byte of its record, with which `recovery_target_lsn` is compared.
    pub lsn: Lsn,
    /// One past the last byte of its record.
    pub end: Lsn,
    /// First byte of the previous record.
    pub prev: Lsn,
    pub landmark: Landmark,
    /// Whether it ends a prepared transaction.
    pub of_prepared: bool,
}

/// What the next byte belongs to.
#[derive(Debug)]
enum State {
    /// The rest of a record whose beginning was not seen, with the number of bytes left.
    Skip(u64),
    /// A record, possibly not begun yet.
    Record(Box<Partial>),
    /// After XLOG_SWITCH: the rest of the segment is meaningless.
    ToSegmentEnd,
    /// No more records follow.
    Ended(&'static str),
}

#[derive(Debug)]
struct Partial {
    start: Lsn,
    header: [u8; RECORD_HEADER],
    got: u64,
    total: u64,
    crc: u32,
    kept: Kept,
    keep: bool,
}

impl Partial {
    fn new() -> Box<Self> {
        Box::new(Self {
            start: Lsn::ZERO,
            header: [0; RECORD_HEADER],
            got: 0,
            total: 0,
            crc: 0,
            kept: Kept::default(),
            keep: false,
        })
    }
    fn prev(&self) -> Lsn {
        Lsn::new(number(&self.header[8..16]))
    }
    fn info(&self) -> u8 {
        self.header[16] & 0xF0
    }
    fn rmid(&self) -> u8 {
        self.header[17]
    }
    /// As PostgreSQL's ValidXLogRecordHeader.
    fn check_header(&mut self, previous: Option<Lsn>) -> Result<(), &'static str> {
        self.total = number(&self.header[0..4]);
        let largest = u64::from(RECORD_BYTES_MAX);
        if self.total < RECORD_HEADER as u64 || self.total > largest {
            return Err(if self.total == 0 { "zeros" } else { "a record of an impossible length" });
        }
        if previous.is_some_and(|p| p != self.prev()) {
            return Err("a record that does not follow the previous one");
        }
        self.keep = match self.rmid() {
            RM_XACT | RM_TBLSPC => true,
            RM_XLOG => matches!(self.info(), XLOG_RESTORE_POINT | XLOG_PARAMETER_CHANGE),
            _ => false,
        };
        Ok(())
    }
    fn crc_is_right(&self) -> bool {
        let crc = crc32c::crc32c_append(self.crc, &self.header[..20]);
        u64::from(crc) == number(&self.header[20..24])
    }
}

/// Finds the landmarks in the WAL that is pushed into it.
#[derive(Debug)]
pub struct RecordWalker {
    size: SegmentSize,
    major: u32,
    position: Lsn,
    header: [u8; LONG_HEADER],
    header_len: usize,
    state: State,
    first_page: bool,
    first: Option<Lsn>,
    last: Option<Lsn>,
    /// Whether the next record's xl_prev must be `last`. Not so behind a record that a crash cut off.
    chained: bool,
    end: Option<Lsn>,
    first_prev: Option<Lsn>,
}

impl RecordWalker {
    /// Creates a walker whose first byte is that of the page at `start`, preferably the start of a segment.
    /// A record that began before it is skipped.
    pub fn new(size: SegmentSize, postgres_major: u32, start: Lsn) -> Self {
        let start = Lsn::new(start.as_u64() - start.as_u64() % PAGE_BYTES);
        Self {
            size,
            major: postgres_major,
            position: start,
            header: [0; LONG_HEADER],
            header_len: 0,
            state: State::Record(Partial::new()),
            first_page: true,
            first: None,
            last: None,
            chained: true,
            end: None,
            first_prev: None,
        }
    }

    /// The LSN of the next byte.
    pub const fn position(&self) -> Lsn {
        self.position
    }
    /// Start of the first record that begins in the pushed WAL, complete or not.
    pub const fn first_record(&self) -> Option<Lsn> {
        self.first
    }
    /// Start of the last complete record.
    pub const fn last_record(&self) -> Option<Lsn> {
        self.last
    }
    /// One past the last complete record, rounded as in PostgreSQL.
    pub const fn records_end(&self) -> Option<Lsn> {
        self.end
    }
    /// xl_prev of the first record whose header was read: the start of the record before it.
    pub const fn first_prev(&self) -> Option<Lsn> {
        self.first_prev
    }
    /// Why no more records are expected; `None` as long as they are.
    pub const fn ended(&self) -> Option<&'static str> {
        match self.state {
            State::Ended(why) => Some(why),
            _ => None,
        }
    }

    /// Parses the next bytes, and reports what is found in the order of WAL.
    pub fn push(&mut self, mut data: &[u8], found: &mut dyn FnMut(Found)) {
        while !data.is_empty() && self.ended().is_none() {
            let in_page = self.position.as_u64() % PAGE_BYTES;
            let header = self.header_bytes();
            let taken = if matches!(self.state, State::ToSegmentEnd) {
                self.to_segment_end(data.len())
            } else if in_page < header as u64 {
                self.take_page_header(data, header)
            } else {
                let left = (PAGE_BYTES - in_page).min(data.len() as u64) as usize;
                self.take(&data[..left], found)
            };
            self.position = self.position.advance(taken as u64);
            data = &data[taken..];
            if self.position.offset_in(self.size) == 0 && matches!(self.state, State::ToSegmentEnd)
            {
                self.state = State::Record(Partial::new());
            }
        }
    }

    fn header_bytes(&self) -> usize {
        let page = self.position.as_u64() - self.position.as_u64() % PAGE_BYTES;
        if Lsn::new(page).offset_in(self.size) == 0 { LONG_HEADER } else { SHORT_HEADER }
    }

    fn to_segment_end(&self, available: usize) -> usize {
        let left = self.size.bytes() - self.position.offset_in(self.size);
        available.min(usize::try_from(left).unwrap_or(usize::MAX))
    }

    fn take_page_header(&mut self, data: &[u8], whole: usize) -> usize {
        if self.position.as_u64().is_multiple_of(PAGE_BYTES) {
            self.header_len = 0;
        }
        let take = (whole - self.header_len).min(data.len());
        self.header[self.header_len..self.header_len + take].copy_from_slice(&data[..take]);
        self.header_len += take;
        if self.header_len == whole
            && let Err(why) = self.check_page()
        {
            self.state = State::Ended(why);
        }
        take
    }

    fn check_page(&mut self) -> Result<(), &'static str> {
        let page = self.position.as_u64() - self.position.as_u64() % PAGE_BYTES;
        if number(&self.header[0..2]) == 0 {
            return Err("zeros");
        }
        if number(&self.header[8..16]) != page {
            return Err("a page with another address");
        }
        let flags = number(&self.header[2..4]) as u16;
        let remaining = number(&self.header[16..20]);
        let continues = flags & CONTINUES != 0;
        let first = std::mem::replace(&mut self.first_page, false);
        match &mut self.state {
            State::Record(partial) if partial.got > 0 => {
                let left = match partial.got < RECORD_HEADER as u64 {
                    // xl_tot_len is never split between pages.
                    true => number(&partial.header[0..4]).saturating_sub(partial.got),
                    false => partial.total - partial.got,
                };
                if flags & OVERWRITES != 0 {
                    self.state = State::Record(Partial::new());
                    self.chained = false;
                } else if !continues || remaining != left {
                    return Err("a record that does not continue");
                }
            }
            State::Record(_) if continues && first => self.state = State::Skip(remaining),
            State::Record(_) if continues => return Err("a page in the middle of a record"),
            State::Skip(left) if flags & OVERWRITES != 0 => {
                *left = 0;
                self.state = State::Record(Partial::new());
            }
            State::Skip(left) if !continues || remaining != *left => {
                return Err("a record that does not continue");
            }
            _ => {}
        }
        Ok(())
    }

    /// Takes bytes within a page, behind its header.
    fn take(&mut self, data: &[u8], found: &mut dyn FnMut(Found)) -> usize {
        match &mut self.state {
            State::Skip(left) => {
                let take = (*left).min(data.len() as u64);
                *left -= take;
                if *left == 0 {
                    self.state = State::Record(Partial::new());
                }
                take as usize
            }
            State::Record(partial) if partial.got == 0 => {
                // Records begin at multiples of 8.
                let pad = self.position.as_u64().wrapping_neg() % 8;
                if pad > 0 {
                    return (pad as usize).min(data.len());
                }
                partial.start = self.position;
                self.first.get_or_insert(self.position);
                self.take_record(data, found)
            }
            State::Record(_) => self.take_record(data, found),
            State::ToSegmentEnd | State::Ended(_) => data.len(),
        }
    }

    fn take_record(&mut self, data: &[u8], found: &mut dyn FnMut(Found)) -> usize {
        let State::Record(partial) = &mut self.state else { return data.len() };
        let got = partial.got as usize;
        if got < RECORD_HEADER {
            let take = (RECORD_HEADER - got).min(data.len());
            partial.header[got..got + take].copy_from_slice(&data[..take]);
            partial.got += take as u64;
            if partial.got == RECORD_HEADER as u64
                && let Err(why) = partial.check_header(self.last.filter(|_| self.chained))
            {
                self.state = State::Ended(why);
            } else if partial.got == RECORD_HEADER as u64 {
                self.first_prev = self.first_prev.or(Some(partial.prev()));
                if partial.got == partial.total {
                    self.finish(take, found);
                }
            }
            return take;
        }
        let take = ((partial.total - partial.got).min(data.len() as u64)) as usize;
        partial.crc = crc32c::crc32c_append(partial.crc, &data[..take]);
        if partial.keep {
            partial.kept.push(&data[..take]);
        }
        partial.got += take as u64;
        if partial.got == partial.total {
            self.finish(take, found);
        }
        take
    }

    fn finish(&mut self, taken: usize, found: &mut dyn FnMut(Found)) {
        let next = State::Record(Partial::new());
        let State::Record(partial) = std::mem::replace(&mut self.state, next) else { return };
        if !partial.crc_is_right() {
            self.state = State::Ended("a record whose checksum is wrong");
            return;
        }
        let end = self.position.advance(taken as u64);
        let end = Lsn::new(end.as_u64().next_multiple_of(8));
        (self.last, self.end, self.chained) = (Some(partial.start), Some(end), true);
        if (partial.rmid(), partial.info()) == (RM_XLOG, XLOG_SWITCH) {
            let whole = end.offset_in(self.size) == 0;
            self.end = Some(if whole {
                end
            } else {
                end.segment_start(self.size).advance(self.size.bytes())
            });
            if !whole {
                self.state = State::ToSegmentEnd;
            }
        }
        if let Some(landmark) = self.landmark(&partial) {
            let of_prepared = partial.rmid() == RM_XACT && wal_xact::is_of_prepared(partial.info());
            let (lsn, prev) = (partial.start, partial.prev());
            found(Found { lsn, end, prev, landmark, of_prepared });
        }
    }

    fn landmark(&self, partial: &Partial) -> Option<Landmark> {
        let main = partial.keep.then(|| partial.kept.main_data())??;
        match (partial.rmid(), partial.info()) {
            (RM_XLOG, XLOG_PARAMETER_CHANGE) => {
                wal_change::parameters(main).map(Landmark::Parameters)
            }
            (RM_XLOG, _) => restore_point(main),
            (RM_TBLSPC, TBLSPC_CREATE) => {
                let (oid, path) = wal_change::tablespace_created(main)?;
                Some(Landmark::TablespaceCreated { oid, path })
            }
            (RM_TBLSPC, TBLSPC_DROP) => {
                let oid = wal_change::tablespace_dropped(main)?;
                Some(Landmark::TablespaceDropped { oid })
            }
            (RM_TBLSPC, _) => None,
            (RM_XACT, info) if info & XACT_OPERATION == XACT_PREPARE => {
                Prepared::parse(main).map(Landmark::Prepared)
            }
            _ => self.ending(partial, main),
        }
    }

    fn ending(&self, partial: &Partial, main: &[u8]) -> Option<Landmark> {
        let unix_micros = time(main)?;
        let header_xid = number(&partial.header[4..8]) as u32;
        let ending = wal_xact::ending(partial.header[16], main, self.major)?;
        let xid = ending.prepared_xid.unwrap_or(header_xid);
        Some(match ending.committed {
            true => Landmark::Commit { xid, unix_micros },
            false => Landmark::Abort { xid, unix_micros },
        })
    }
}

fn time(main: &[u8]) -> Option<i64> {
    let time = i64::from_le_bytes(main.get(..8)?.try_into().ok()?);
    Some(unix_micros_from_pg(time))
}

fn restore_point(main: &[u8]) -> Option<Landmark> {
    let unix_micros = time(main)?;
    let name = main.get(8..)?;
    let name = &name[..name.iter().position(|b| *b == 0).unwrap_or(name.len())];
    let name = String::from_utf8_lossy(name).into_owned();
    Some(Landmark::RestorePoint { name, unix_micros })
}

#[cfg(test)]
#[path = "wal_record_tests.rs"]
mod tests;
