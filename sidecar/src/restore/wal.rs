//! Searches WAL: for the last commit before a position, for a restore point, for a transaction.
//!
//! WAL that is listed but cannot be read is an error, never an end of WAL; so are records that break off before the
//! end of the stored WAL (P7). WAL beyond the reach of the path is not read, since it may be zeros or another timeline's.

use super::{Scratch, source::Source};
use crate::error::{Error, Failure};
use futures::{StreamExt, TryStreamExt, stream};
use klio_pg::{Found, Lsn, RecordWalker};
use klio_proto::Code;
use klio_storage::{catalog::Path, layout::WalFile};
use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    ops::Range,
    path::{Path as FilePath, PathBuf},
};

/// Segments that are fetched at once while WAL is searched forwards.
const AHEAD: usize = 4;
const READ_BYTES: usize = 256 << 10;

/// Reads WAL along one path of timelines.
pub struct Wal<'a> {
    pub source: &'a Source,
    /// Directory for the fetched segments.
    pub scratch: &'a Scratch,
    /// The timelines to read, and where they branch off.
    pub path: &'a Path,
    /// The cluster's major version, which decides the format of WAL records.
    pub postgres_major: u32,
}

/// The end of a range of WAL.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tail {
    /// Start of the last complete record: PostgreSQL compares `recovery_target_lsn` with where records start.
    pub last_record: Option<Lsn>,
    /// The last commit or abort.
    pub last_ending: Option<Found>,
    /// Where the records break off before the end of the range. The fields above then describe only what is before it.
    pub broken: Option<Break>,
}

/// A position at which records break off although WAL after it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Break {
    /// The first position from which no record can be read.
    pub at: Lsn,
    /// The reason, as text for the user.
    pub why: &'static str,
    /// The end of the stored WAL.
    pub to: Lsn,
}

impl Break {
    /// The error of a restore that would need WAL behind the break. A break must not be taken for the end of WAL (P7).
    pub fn refusal(&self) -> Error {
        let Self { at, why, to } = self;
        let message = format!(
            "WAL breaks off at {at} ({why}) although it is stored up to {to}: nothing after {at} can be replayed"
        );
        Error::new(Failure::Unreachable, message).hint(format!(
            "a --target-lsn or --target-time before {at} can be reached; klio verify --wal shows what is damaged; \
             nothing was touched"
        ))
    }
}

impl Tail {
    /// Insists that the range is complete.
    ///
    /// # Errors
    /// The break, if the records break off before the end of the range.
    pub fn whole(self) -> Result<Self, Error> {
        match &self.broken {
            Some(broken) => Err(broken.refusal()),
            None => Ok(self),
        }
    }
}

/// First guess of a record's length: most are shorter, but a record may have up to 1 GiB.
const PAST_FIRST_BYTES: u64 = 1 << 16;

/// What one walk found.
struct Seen {
    /// Where the first record begins, even if it is incomplete.
    first: Option<Lsn>,
    /// Where the last complete record begins.
    last: Option<Lsn>,
    broken: Option<Break>,
}

impl Wal<'_> {
    /// Finds the end of `[floor, to)` by looking backwards from `to`, no further than needed. A record may be longer
    /// than a segment, so each walk ends where the first record of the previous walk begins.
    ///
    /// # Errors
    /// WAL that cannot be read.
    pub async fn tail(&self, floor: Lsn, to: Lsn) -> Result<Tail, Error> {
        let size = self.path.segment_size();
        let mut tail = Tail::default();
        if to <= floor {
            return Ok(tail);
        }
        let lowest = page_of(floor);
        let mut start = Lsn::new(to.as_u64() - 1).segment_start(size).max(lowest);
        // Where the first record of the previous walk begins; at first, the end of WAL.
        let mut next = to;
        loop {
            let mut ending = None;
            let mut keep = |found: Found| {
                if found.lsn >= floor && found.landmark.stops_by_time() {
                    ending = Some(found);
                }
                false
            };
            let seen = self.walk(start, next, Begin::InFirstSegment, &mut keep).await?;
            if let Some(broken) = seen.broken {
                tail = Tail { broken: Some(Break { to, ..broken }), ..Tail::default() };
                next = start;
            }
            tail.last_record = tail.last_record.or(seen.last.filter(|last| *last >= floor));
            tail.last_ending = tail.last_ending.or(ending);
            next = seen.first.unwrap_or(next);
            let done = tail.last_record.is_some() && tail.last_ending.is_some();
            if done || start <= lowest {
                return Ok(tail);
            }
            self.scratch.trim(3);
            start = Lsn::new(start.segment_start(size).as_u64() - size.bytes()).max(lowest);
        }
    }

    /// The first landmark in `[from, to)` for which `fits` is true.
    ///
    /// # Errors
    /// WAL that cannot be read; records that break off before it is found.
    pub async fn find(
        &self,
        from: Lsn,
        to: Lsn,
        fits: &mut dyn FnMut(&Found) -> bool,
    ) -> Result<Option<Found>, Error> {
        let mut hit = None;
        let mut each = |found: Found| {
            // The same buffer may yield more landmarks after the hit, but PostgreSQL stops at the first.
            if hit.is_none() && found.lsn >= from && fits(&found) {
                hit = Some(found);
            }
            hit.is_some()
        };
        let seen = self.walk(page_of(from), to, Begin::Anywhere, &mut each).await?;
        match (hit, seen.broken) {
            (None, Some(broken)) => Err(broken.refusal()),
            (hit, _) => Ok(hit),
        }
    }

    /// Passes every landmark in `[from, to)` to `each` until it returns true. The result is where records break off
    /// before that, if they do.
    ///
    /// # Errors
    /// WAL that cannot be read.
    pub async fn scan(
        &self,
        from: Lsn,
        to: Lsn,
        each: &mut dyn FnMut(Found) -> bool,
    ) -> Result<Option<Break>, Error> {
        let mut each = |found: Found| found.lsn >= from && each(found);
        Ok(self.walk(page_of(from), to, Begin::Anywhere, &mut each).await?.broken)
    }

    /// A position, at most `end`, before which the first record that begins at `at` or later is complete.
    ///
    /// # Errors
    /// WAL that cannot be read.
    pub async fn past_record(&self, at: Lsn, end: Lsn) -> Result<Lsn, Error> {
        let mut span = PAST_FIRST_BYTES;
        loop {
            let to = end.min(at.advance(span));
            let seen = self.walk(page_of(at), to, Begin::Anywhere, &mut |_| false).await?;
            let found = seen.last.is_some_and(|last| last >= at);
            if to == end || found || seen.broken.is_some() {
                return Ok(to);
            }
            span = span.saturating_mul(16);
        }
    }

    /// The bytes from `from` on; fewer than `length` if WAL ends before.
    ///
    /// # Errors
    /// WAL that cannot be read.
    pub async fn bytes(&self, from: Lsn, length: u64) -> Result<Vec<u8>, Error> {
        let size = self.path.segment_size();
        let mut bytes = Vec::new();
        let mut at = from;
        while at < from.advance(length) && !(at > from && self.path.names(at).is_empty()) {
            let file = self.segment(at).await?;
            let content = std::fs::read(&file).map_err(|e| super::local("read", &file, &e))?;
            let begin = usize::try_from(at.offset_in(size)).unwrap_or(usize::MAX);
            bytes.extend_from_slice(content.get(begin..).unwrap_or_default());
            at = at.segment_start(size).advance(size.bytes());
        }
        bytes.truncate(usize::try_from(length).unwrap_or(usize::MAX));
        Ok(bytes)
    }

    /// Walks from `start`, which must be the start of a page, up to `to` or until `each` returns true.
    async fn walk(
        &self,
        start: Lsn,
        to: Lsn,
        begin: Begin,
        each: &mut dyn FnMut(Found) -> bool,
    ) -> Result<Seen, Error> {
        let size = self.path.segment_size();
        let mut walker = RecordWalker::new(size, self.postgres_major, start);
        let first = start.segment_start(size);
        let starts = (first.as_u64()..to.as_u64()).step_by(size.bytes() as usize).map(Lsn::new);
        let files = stream::iter(starts)
            .map(|at| async move { Ok::<_, Error>((at, self.segment(at).await?)) });
        let mut files = std::pin::pin!(files.buffered(AHEAD));
        let mut enough = false;
        while let Some((at, file)) = files.try_next().await? {
            let part = start.bytes_since(at)..size.bytes().min(to.bytes_since(at));
            let fed = feed(&mut walker, &file, part, &mut |found| enough |= each(found));
            fed.map_err(|error| super::local("read", &file, &error))?;
            if at.advance(2 * size.bytes()) < to && begin == Begin::Anywhere {
                let _ = std::fs::remove_file(&file);
            }
            let none = begin == Begin::InFirstSegment && walker.first_record().is_none();
            if enough || none || walker.ended().is_some() {
                break;
            }
        }
        let broken = walker.ended().map(|why| Break {
            at: walker.records_end().or(walker.first_record()).unwrap_or(start),
            why,
            to,
        });
        Ok(Seen { first: walker.first_record(), last: walker.last_record(), broken })
    }

    async fn segment(&self, at: Lsn) -> Result<PathBuf, Error> {
        let names = self.path.names(at);
        for name in &names {
            for file in [WalFile::Segment(*name), WalFile::Partial(*name)] {
                match self.source.fetch(file, self.scratch).await {
                    Err(error) if error.failure == Failure::Code(Code::NotFound) => {}
                    other => return other,
                }
            }
        }
        let message = format!("read WAL at {at}: expected one of {names:?} as listed, found none");
        Err(Error::new(Failure::Code(Code::Corrupt), message))
    }
}

/// Where the first record of a walk has to begin.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Begin {
    /// In the first segment; otherwise the walk ends after that segment.
    InFirstSegment,
    Anywhere,
}

/// The start of a position's page: a record can only be found by reading from the start of a page.
fn page_of(at: Lsn) -> Lsn {
    Lsn::new(at.as_u64() - at.as_u64() % klio_pg::PAGE_BYTES)
}

fn feed(
    walker: &mut RecordWalker,
    file: &FilePath,
    part: Range<u64>,
    each: &mut dyn FnMut(Found),
) -> std::io::Result<()> {
    let mut file = File::open(file)?;
    file.seek(SeekFrom::Start(part.start))?;
    let mut file = file.take(part.end.saturating_sub(part.start));
    let mut buffer = vec![0; READ_BYTES];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(()),
            bytes => walker.push(&buffer[..bytes], each),
        }
    }
}
