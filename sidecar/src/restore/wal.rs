//! Looks into WAL itself: for the last commit before a position, for a restore point, for a transaction.
//!
//! P7: WAL that is listed and cannot be read is an error, never an end. What lies behind a way's reach is
//! not looked at: it may be zeros, or another timeline's.

use super::{Scratch, source::Source};
use crate::error::{Error, Failure};
use futures::{StreamExt, TryStreamExt, stream};
use klio_pg::{Found, Lsn, RecordWalker, SegmentName};
use klio_proto::Code;
use klio_storage::{catalog::Path, layout::WalFile};
use std::{
    fs::File,
    io::Read,
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
    /// Start of the last whole record.
    pub last_record: Option<Lsn>,
    /// The last commit or abort.
    pub last_ending: Option<Found>,
}

impl Wal<'_> {
    /// The end of `[floor, to)`: looks backwards from `to`, no further than needed.
    ///
    /// # Errors
    /// WAL that cannot be read.
    pub async fn tail(&self, floor: Lsn, to: Lsn) -> Result<Tail, Error> {
        let size = self.path.segment_size();
        let mut tail = Tail::default();
        if to <= floor {
            return Ok(tail);
        }
        let mut start = Lsn::new(to.as_u64() - 1).segment_start(size);
        loop {
            // A record may begin in a segment and end in the next.
            let end = to.min(start.advance(2 * size.bytes()));
            let mut ending = None;
            let mut keep = |found: Found| {
                if found.lsn >= floor && found.landmark.stops_by_time() {
                    ending = Some(found);
                }
                false
            };
            let last = self.walk(start, end, &mut keep).await?;
            tail.last_record = tail.last_record.max(last.filter(|last| *last >= floor));
            tail.last_ending = tail.last_ending.or(ending);
            let done = tail.last_record.is_some() && tail.last_ending.is_some();
            if done || start <= floor {
                return Ok(tail);
            }
            self.scratch.trim(3);
            start = Lsn::new(start.as_u64() - size.bytes());
        }
    }

    /// The first landmark in `[from, to)` that fits.
    ///
    /// # Errors
    /// WAL that cannot be read.
    pub async fn find(
        &self,
        from: Lsn,
        to: Lsn,
        fits: &mut dyn FnMut(&Found) -> bool,
    ) -> Result<Option<Found>, Error> {
        let mut hit = None;
        self.walk(from.segment_start(self.path.segment_size()), to, &mut |found| {
            if found.lsn >= from && fits(&found) {
                hit = Some(found);
            }
            hit.is_some()
        })
        .await?;
        Ok(hit)
    }

    /// Walks whole segments from `start`, the start of one, up to `to`, until `each` says that it is enough.
    /// Gives the start of the last whole record.
    async fn walk(
        &self,
        start: Lsn,
        to: Lsn,
        each: &mut dyn FnMut(Found) -> bool,
    ) -> Result<Option<Lsn>, Error> {
        let size = self.path.segment_size();
        let mut walker = RecordWalker::new(size, self.postgres_major, start);
        let starts = (start.as_u64()..to.as_u64()).step_by(size.bytes() as usize).map(Lsn::new);
        let files = stream::iter(starts)
            .map(|at| async move { Ok::<_, Error>((at, self.segment(at).await?)) });
        let mut files = std::pin::pin!(files.buffered(AHEAD));
        let mut enough = false;
        while let Some((at, file)) = files.try_next().await? {
            let limit = size.bytes().min(to.bytes_since(at));
            let fed = feed(&mut walker, &file, limit, &mut |found| enough |= each(found));
            fed.map_err(|error| super::local("read", &file, &error))?;
            if at.advance(2 * size.bytes()) < to {
                let _ = std::fs::remove_file(&file);
            }
            if enough {
                break;
            }
        }
        Ok(walker.last_record())
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

fn feed(
    walker: &mut RecordWalker,
    file: &FilePath,
    limit: u64,
    each: &mut dyn FnMut(Found),
) -> std::io::Result<()> {
    let mut file = File::open(file)?.take(limit);
    let mut buffer = vec![0; READ_BYTES];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(()),
            bytes => walker.push(&buffer[..bytes], each),
        }
    }
}

/// Where the records of a partial segment end: a listing of the bucket does not tell.
///
/// # Errors
/// WAL that cannot be read.
pub async fn partial_end(
    source: &Source,
    name: SegmentName,
    scratch: &Scratch,
) -> Result<Option<Lsn>, Error> {
    let file = source.fetch(WalFile::Partial(name), scratch).await?;
    let end = || -> std::io::Result<Option<Lsn>> {
        let length = u32::try_from(std::fs::metadata(&file)?.len()).unwrap_or(0);
        let Ok(size) = klio_pg::SegmentSize::new(length) else { return Ok(None) };
        let Some(start) = name.start_lsn(size) else { return Ok(None) };
        // Zeros behind the last byte that came; what is before them counts, even half a record.
        let content = std::fs::read(&file)?;
        let used = content.iter().rposition(|byte| *byte != 0).map_or(0, |at| at as u64 + 1);
        let used = used.next_multiple_of(8).min(size.bytes());
        Ok((used > 0).then(|| start.advance(used)))
    };
    end().map_err(|error| super::local("read", &file, &error))
}
