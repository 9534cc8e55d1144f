//! Reads the durable bytes of a segment that is not sealed yet.
//!
//! Never gives a byte beyond what was durable when it was opened, and checks every frame on the way. A sidecar may
//! append meanwhile, and the segment may be sealed meanwhile: the bytes stay the same.

use super::{
    cluster::Unsealed,
    frame::Codec,
    journal::{Frame, Frames},
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
    at: usize,
}

/// Puts a frame's WAL into `out`.
pub(super) fn decode_frame(
    context: &mut DCtx<'_>,
    frame: &Frame<'_>,
    out: &mut Vec<u8>,
) -> Result<(), Error> {
    out.clear();
    if frame.header.codec == Codec::Raw {
        out.extend_from_slice(frame.stored);
        return Ok(());
    }
    let expected = frame.header.raw_len as usize;
    out.resize(expected, 0);
    let fail = |found: String| {
        let detail = format!("expected a zstd frame of {expected} bytes, found {found}");
        Error::new(Kind::Corrupt, Op::Decode, format!("WAL at {}", frame.header.start), detail)
    };
    match context.decompress(&mut out[..], frame.stored) {
        Ok(found) if found == expected => Ok(()),
        Ok(found) => Err(fail(format!("{found}"))),
        Err(code) => Err(fail(zstd::zstd_safe::get_error_name(code).to_owned())),
    }
}

impl OpenSegment {
    pub(super) fn open(disk: &dyn Disk, entry: Arc<Unsealed>) -> Result<Self, Error> {
        let end = entry.durable();
        let frames = Frames::open(disk, &entry.path)?;
        let context = DCtx::try_create().ok_or_else(|| {
            Error::new(Kind::Transient, Op::Decode, entry.path.display(), "no memory for zstd")
        })?;
        let (timeline, start) = (entry.timeline, entry.start);
        Ok(Self { frames, _pin: entry, timeline, start, end, context, buffer: Vec::new(), at: 0 })
    }

    /// The segment.
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
    /// How many bytes there are.
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
        decode_frame(&mut self.context, &frame, &mut self.buffer)?;
        Ok(Some(&self.buffer))
    }
}

impl io::Read for OpenSegment {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.at >= self.buffer.len() {
            self.at = 0;
            match self.next_chunk() {
                Ok(Some(_)) => {}
                Ok(None) => {
                    self.buffer.clear();
                    return Ok(0);
                }
                Err(e) => return Err(io::Error::new(io::ErrorKind::InvalidData, e)),
            }
        }
        let count = out.len().min(self.buffer.len() - self.at);
        out[..count].copy_from_slice(&self.buffer[self.at..self.at + count]);
        self.at += count;
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
