//! Looks into WAL itself: for the last commit before a position, for a restore point, for a transaction.
//!
//! P7: WAL that is listed and cannot be read is an error, never an end, and so are records that break off before
//! the end of what is held. What lies behind a way's reach is not looked at: it may be zeros, or another timeline's.

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

/// Segments on the way at once while WAL is searched forwards.
const AHEAD: usize = 4;
const READ_BYTES: usize = 256 << 10;

/// Reads the WAL of one way.
pub struct Wal<'a> {
    /// From where.
    pub source: &'a Source,
    /// Where fetched segments lie.
    pub scratch: &'a Scratch,
    /// Along which timelines.
    pub path: &'a Path,
    /// Of the cluster.
    pub postgres_major: u32,
}

/// The end of a stretch of WAL.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tail {
    /// Start of the last whole record: PostgreSQL compares `recovery_target_lsn` with where records start.
    pub last_record: Option<Lsn>,
    /// The last commit or abort.
    pub last_ending: Option<Found>,
    /// Its records break off before the stretch does; what is behind that counts for nothing above.
    pub broken: Option<Break>,
}

/// Where records break off in WAL that is held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Break {
    /// No record can be read from here on.
    pub at: Lsn,
    /// In words.
    pub why: &'static str,
    /// Up to where WAL is held.
    pub to: Lsn,
}

impl Break {
    /// Nothing behind it can be reached (P7): it is no end of WAL.
    pub fn refusal(&self) -> Error {
        let Self { at, why, to } = self;
        let message = format!(
            "WAL breaks off at {at} ({why}), though it is held up to {to}: what is behind cannot be replayed"
        );
        Error::new(Failure::Unreachable, message).hint(format!(
            "a --target-lsn or --target-time before {at} can be reached; klio verify --wal tells what is damaged; \
             nothing was touched"
        ))
    }
}

impl Tail {
    /// The same, of a stretch that has to be whole.
    ///
    /// # Errors
    /// Where its records break off.
    pub fn whole(self) -> Result<Self, Error> {
        match &self.broken {
            Some(broken) => Err(broken.refusal()),
            None => Ok(self),
        }
    }
}

/// Most records are shorter than that; one may have 1 GiB.
const PAST_FIRST_BYTES: u64 = 1 << 16;

/// What a walk met.
struct Seen {
    /// Where its first record begins, whole or not.
    first: Option<Lsn>,
    /// Where its last whole record begins.
    last: Option<Lsn>,
    broken: Option<Break>,
}

impl Wal<'_> {
    /// The end of `[floor, to)`: looks backwards from `to`, no further than needed. A record may be longer than a
    /// segment: it is looked at from where it begins to where the next one does.
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
        // Where a record begins that was looked at already, or WAL ends.
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

    /// The first landmark in `[from, to)` that fits.
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
            // More may come from bytes that were read already: PostgreSQL stops at the first.
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

    /// Shows every landmark in `[from, to)` until `each` says that it is enough; where records break off before.
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

    /// A place, at most `end`, before which the first record that begins at `at` or later ends.
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

    /// So many bytes from `from` on, or as many as there are.
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

    /// Walks from `start`, the start of a page, up to `to`, until `each` says that it is enough.
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
        let message = format!("read WAL at {at}: it is listed as held, and {names:?} is not there");
        Err(Error::new(Failure::Code(Code::Corrupt), message))
    }
}

/// Where the record has to begin that a walk looks for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Begin {
    /// In the first segment: without one, the walk ends there.
    InFirstSegment,
    Anywhere,
}

/// Records that begin on a page can be read from its start.
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
