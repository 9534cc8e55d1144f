//! Reads the durable bytes of a segment that is not sealed yet.
//!
//! It never returns a byte beyond what was durable when it was opened, and it checks every frame. More WAL may be
//! appended and the segment may be sealed meanwhile: the bytes stay the same.

use super::{
    cipher::JournalKeys,
    frame::Codec,
    journal::{Frame, Frames},
    unsealed::Unsealed,
};
use crate::{Error, Kind, Op, disk::Disk};
use klio_pg::{Lsn, SegmentSize};
use std::{fmt, io, sync::Arc};
use zstd::zstd_safe::DCtx;

/// The durable bytes of an open segment, as a reader.
pub struct OpenSegment {
    frames: Frames,
    /// Keeps the file from being recycled.
    _pin: Arc<Unsealed>,
    timeline: klio_pg::TimelineId,
    start: Lsn,
    end: Lsn,
    context: DCtx<'static>,
    buffer: Vec<u8>,
    /// The part of `buffer` that `Read` has not returned yet.
    rest: std::ops::Range<usize>,
}

/// Decodes a frame's WAL into `out`, which only ever grows, and returns the part of `out` that holds it.
pub(super) fn decode_frame<'a>(
    context: &mut DCtx<'_>,
    frame: &Frame<'_>,
    out: &'a mut Vec<u8>,
) -> Result<&'a [u8], Error> {
    let expected = frame.header.raw_len as usize;
    if out.len() < expected {
        *out = vec![0; expected];
    }
    let plain = &mut out[..expected];
    if frame.header.codec == Codec::Raw {
        plain.copy_from_slice(frame.stored);
        return Ok(plain);
    }
    let fail = |found: &dyn fmt::Display| {
        let detail = format!("expected a zstd frame of {expected} bytes, found {found}");
        Error::new(Kind::Corrupt, Op::Decode, format!("WAL at {}", frame.header.start), detail)
    };
    match context.decompress(&mut *plain, frame.stored) {
        Ok(found) if found == expected => Ok(plain),
        Ok(found) => Err(fail(&found)),
        Err(code) => Err(fail(&zstd::zstd_safe::get_error_name(code))),
    }
}

impl OpenSegment {
    pub(super) fn open(
        disk: &dyn Disk,
        entry: Arc<Unsealed>,
        keys: &JournalKeys,
    ) -> Result<Self, Error> {
        let end = entry.durable();
        let frames = Frames::open(disk, &entry.path, keys)?;
        let context = DCtx::try_create().ok_or_else(|| {
            Error::new(Kind::Transient, Op::Decode, entry.path.display(), "no memory for zstd")
        })?;
        let (timeline, start) = (entry.timeline, entry.start);
        Ok(Self {
            frames,
            _pin: entry,
            timeline,
            start,
            end,
            context,
            buffer: Vec::new(),
            rest: 0..0,
        })
    }

    pub const fn segment(&self, size: SegmentSize) -> klio_pg::SegmentName {
        klio_pg::SegmentName::containing(self.timeline, self.start, size)
    }
    /// LSN of the first byte.
    pub const fn start(&self) -> Lsn {
        self.start
    }
    /// One past the last byte that will be read.
    pub const fn end(&self) -> Lsn {
        self.end
    }
    pub const fn plain_size(&self) -> u64 {
        self.end.bytes_since(self.start)
    }

    /// The next piece, at most 1 MiB; `None` at the end.
    ///
    /// # Errors
    /// `Corrupt` when the bytes on disk are not those that were written.
    pub fn next_chunk(&mut self) -> Result<Option<&[u8]>, Error> {
        if self.frames.position() >= self.end {
            return Ok(None);
        }
        let Some(frame) = self.frames.next()? else {
            return Err(self.frames.lost(self.end));
        };
        decode_frame(&mut self.context, &frame, &mut self.buffer).map(Some)
    }
}

impl io::Read for OpenSegment {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.rest.is_empty() {
            let invalid = |e| io::Error::new(io::ErrorKind::InvalidData, e);
            let Some(chunk) = self.next_chunk().map_err(invalid)? else { return Ok(0) };
            self.rest = 0..chunk.len();
        }
        let count = out.len().min(self.rest.len());
        let from = self.rest.start;
        out[..count].copy_from_slice(&self.buffer[from..from + count]);
        self.rest.start += count;
        Ok(count)
    }
}

impl fmt::Debug for OpenSegment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenSegment")
            .field("timeline", &self.timeline)
            .field("start", &self.start)
            .field("end", &self.end)
            .finish_non_exhaustive()
    }
}
