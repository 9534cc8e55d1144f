//! One journal file: made, read frame by frame, copied.
//!
//! - A name `<segment>.open` leads only to a file whose header is durable, and is itself durable before the first frame is
//!   written into it.
//! - Space is written (zeros), not only reserved, ahead of the frames, so that syncing a frame changes no metadata.
//! - A copy gets a new journal id, so that nothing beyond its end in any older file can ever be taken for its continuation.

use super::frame::{FIRST_FRAME, FRAME_HEADER, FrameHeader, JournalHeader};
use crate::{
    Error, Kind, Op,
    disk::{Disk, FileHandle, durable, read_full},
};
use klio_pg::Lsn;
use std::{
    io,
    path::{Path, PathBuf},
};

/// Reads are made in pieces of this size where frames are small.
const READ_BYTES: usize = 256 << 10;
/// Zeros are written in pieces of this size.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// A journal ready to be written at its end.
#[derive(Debug)]
pub(super) struct Journal {
    pub(super) file: FileHandle,
    pub(super) path: PathBuf,
    pub(super) header: JournalHeader,
    /// Where the next frame goes.
    pub(super) offset: u64,
    /// Bytes of the file that have been written at least once.
    pub(super) allocated: u64,
}

/// Writes zeros from `from` to `to`.
pub(super) fn write_zeros(file: &FileHandle, from: u64, to: u64) -> io::Result<()> {
    let mut at = from;
    while at < to {
        let count = (to - at).min(ZEROS.len() as u64);
        file.write_all_at(&ZEROS[..count as usize], at)?;
        at += count;
    }
    Ok(())
}

/// Makes an empty journal with `preallocate` bytes behind its header, out of a spare file where there is one.
pub(super) fn create(
    disk: &dyn Disk,
    path: &Path,
    header: JournalHeader,
    spare: Option<&Path>,
    preallocate: u64,
) -> Result<Journal, Error> {
    let tmp = durable::tmp_path(path);
    durable::remove_if_there(disk, &tmp)?;
    let (file, from) = match spare.map(|spare| (spare, disk.open(spare, true))) {
        Some((spare, Ok(file))) => (file, spare),
        _ => (disk.create_new(&tmp).map_err(|e| Error::io(Op::Create, &tmp, e))?, tmp.as_path()),
    };
    let build = || -> Result<u64, Error> {
        let size = file.size().map_err(|e| Error::io(Op::Open, from, e))?;
        file.write_all_at(&header.encode(), 0).map_err(|e| Error::io(Op::Write, from, e))?;
        let end = size.max(FIRST_FRAME + preallocate);
        write_zeros(&file, size.max(FIRST_FRAME), end)
            .map_err(|e| Error::io(Op::Write, from, e))?;
        file.sync_all().map_err(|e| Error::io(Op::Sync, from, e))?;
        durable::rename(disk, from, path)?;
        Ok(end)
    };
    let allocated = build().inspect_err(|_| {
        // The first error is the one to report; start removes what is left.
        let _ = disk.remove(from);
    })?;
    Ok(Journal { file, path: path.to_owned(), header, offset: FIRST_FRAME, allocated })
}

/// Reads and checks the header of the journal of `path`.
pub(super) fn read_header(file: &FileHandle, path: &Path) -> Result<JournalHeader, Error> {
    let mut block = vec![0; FIRST_FRAME as usize];
    let got = read_full(file.as_ref(), &mut block, 0).map_err(|e| Error::io(Op::Read, path, e))?;
    JournalHeader::decode(&block[..got])
        .map_err(|e| Error::new(Kind::Corrupt, Op::Open, path.display(), e))
}

/// Walks the frames of a journal from its beginning.
#[derive(Debug)]
pub(super) struct Frames {
    file: FileHandle,
    path: PathBuf,
    header: JournalHeader,
    /// Where the next frame must begin, in the file and in the WAL.
    offset: u64,
    position: Lsn,
    window: Vec<u8>,
    window_at: u64,
    window_len: usize,
}

/// A frame that passed every check.
#[derive(Debug)]
pub(super) struct Frame<'a> {
    pub(super) header: FrameHeader,
    pub(super) stored: &'a [u8],
}

impl Frames {
    /// Opens a journal for reading.
    pub(super) fn open(disk: &dyn Disk, path: &Path) -> Result<Self, Error> {
        let file = disk.open(path, false).map_err(|e| Error::io(Op::Open, path, e))?;
        Self::of(file, path)
    }

    /// Over a file that is open already.
    pub(super) fn of(file: FileHandle, path: &Path) -> Result<Self, Error> {
        let header = read_header(&file, path)?;
        Ok(Self {
            file,
            path: path.to_owned(),
            header,
            offset: FIRST_FRAME,
            position: header.start,
            window: Vec::new(),
            window_at: 0,
            window_len: 0,
        })
    }

    pub(super) const fn header(&self) -> &JournalHeader {
        &self.header
    }
    /// The end of the valid frames seen so far, in the WAL.
    pub(super) const fn position(&self) -> Lsn {
        self.position
    }
    /// The same, in the file.
    pub(super) const fn offset(&self) -> u64 {
        self.offset
    }

    /// Makes `len` bytes at `offset` available; fewer at the end of the file.
    fn fill(&mut self, offset: u64, len: usize) -> io::Result<()> {
        let end = self.window_at + self.window_len as u64;
        if offset >= self.window_at && offset + len as u64 <= end {
            return Ok(());
        }
        let want = len.max(READ_BYTES);
        if self.window.len() < want {
            self.window = vec![0; want];
        }
        self.window_len = 0;
        self.window_len = read_full(self.file.as_ref(), &mut self.window[..want], offset)?;
        self.window_at = offset;
        Ok(())
    }

    fn window(&self, offset: u64, len: usize) -> &[u8] {
        let from = (offset - self.window_at) as usize;
        &self.window[from.min(self.window_len)..(from + len).min(self.window_len)]
    }

    /// The next frame, or `None` where the valid ones end: a torn tail, zeros, or an earlier use of the file.
    ///
    /// # Errors
    /// Only when the file cannot be read: that is not the end of it.
    pub(super) fn next(&mut self) -> Result<Option<Frame<'_>>, Error> {
        let failed = |path: &Path, e| Error::io(Op::Read, path, e);
        self.fill(self.offset, FRAME_HEADER).map_err(|e| failed(&self.path, e))?;
        let Some(header) = FrameHeader::decode(self.window(self.offset, FRAME_HEADER)) else {
            return Ok(None);
        };
        let continues = header.journal == self.header.id
            && header.start == self.position
            && header.end() <= self.header.end();
        if !continues {
            return Ok(None);
        }
        let (offset, len) = (self.offset, header.file_bytes() as usize);
        self.fill(offset, len).map_err(|e| failed(&self.path, e))?;
        let whole = self.window(offset, len);
        if whole.len() < len || !header.is_intact(whole, &whole[FRAME_HEADER..]) {
            return Ok(None);
        }
        self.offset += len as u64;
        self.position = header.end();
        let stored = &self.window(offset, len)[FRAME_HEADER..];
        Ok(Some(Frame { header, stored }))
    }

    /// Walks to the end of the valid frames, or to `limit`.
    pub(super) fn skip_to(&mut self, limit: Lsn) -> Result<(), Error> {
        while self.position < limit && self.next()?.is_some() {}
        Ok(())
    }

    /// Where the frames end is short of what was acknowledged: the medium lost or changed bytes.
    pub(super) fn lost(&self, expected: Lsn) -> Error {
        let detail =
            format!("expected WAL up to {expected}, found it whole up to {}", self.position);
        Error::new(Kind::Corrupt, Op::Read, self.path.display(), detail)
            .hint("the disk lost or changed synced bytes; check it before writing to it again")
    }
}

/// Replaces a journal by a new file with the frames up to `limit`, and a new id; durable when it returns.
///
/// The old file stays in place until the new one is whole and synced, so that any failure (no space above all)
/// leaves what was there.
pub(super) fn copy_up_to(
    disk: &dyn Disk,
    path: &Path,
    limit: Lsn,
    new_id: u64,
) -> Result<Journal, Error> {
    let mut frames = Frames::open(disk, path)?;
    let header = JournalHeader { id: new_id, ..*frames.header() };
    let tmp = durable::tmp_path(path);
    durable::remove_if_there(disk, &tmp)?;
    let file = disk.create_new(&tmp).map_err(|e| Error::io(Op::Create, &tmp, e))?;
    let mut build = || -> Result<u64, Error> {
        let mut out = header.encode();
        let mut written = 0;
        while frames.position() < limit {
            let Some(frame) = frames.next()? else { break };
            let FrameHeader { codec, start, raw_len, .. } = frame.header;
            out.extend(FrameHeader::encode(codec, new_id, start, raw_len, frame.stored));
            out.extend(frame.stored);
            if out.len() >= READ_BYTES {
                file.write_all_at(&out, written).map_err(|e| Error::io(Op::Write, &tmp, e))?;
                written += out.len() as u64;
                out.clear();
            }
        }
        if frames.position() != limit {
            return Err(frames.lost(limit));
        }
        file.write_all_at(&out, written).map_err(|e| Error::io(Op::Write, &tmp, e))?;
        file.sync_all().map_err(|e| Error::io(Op::Sync, &tmp, e))?;
        durable::rename(disk, &tmp, path)?;
        Ok(written + out.len() as u64)
    };
    let offset = build().inspect_err(|_| {
        let _ = disk.remove(&tmp);
    })?;
    Ok(Journal { file, path: path.to_owned(), header, offset, allocated: offset })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::SimDisk;
    use crate::wal::{frame::Codec, scratch::ScratchPool};
    use klio_pg::{SegmentSize, TimelineId};

    fn header(id: u64) -> JournalHeader {
        JournalHeader {
            system_identifier: 1,
            timeline: TimelineId::new(1).unwrap(),
            segment_size: SegmentSize::new(1 << 20).unwrap(),
            start: Lsn::new(3 << 20),
            id,
        }
    }

    fn put(journal: &mut Journal, at: u64, raw: &[u8]) {
        ScratchPool::new(1).with(|scratch| {
            let frame = scratch.frame(journal.header.id, Lsn::new(at), raw);
            journal.file.write_all_at(frame, journal.offset).unwrap();
            journal.offset += frame.len() as u64;
        });
    }

    fn lengths(disk: &SimDisk, path: &Path) -> Vec<u32> {
        let mut frames = Frames::open(disk, path).unwrap();
        let mut found = Vec::new();
        while let Some(frame) = frames.next().unwrap() {
            found.push(frame.header.raw_len);
        }
        found
    }

    /// The frames of the earlier use lie exactly where those of the new one would go on.
    #[test]
    fn frames_of_an_earlier_use_of_the_file_never_pass() {
        let disk = SimDisk::new(1);
        let (path, spare) = (Path::new("/a.open"), Path::new("/spare"));
        let mut old = create(&disk, path, header(1), None, 8192).unwrap();
        for n in 0..4 {
            put(&mut old, (3 << 20) + n * 100, &[7; 100]);
        }
        disk.rename(path, spare).unwrap();
        let mut new = create(&disk, path, header(2), Some(spare), 8192).unwrap();
        assert!(lengths(&disk, path).is_empty());
        put(&mut new, 3 << 20, &[8; 100]);
        assert_eq!(lengths(&disk, path), [100]);
        assert!(disk.stat(spare).is_err());
    }

    #[test]
    fn a_copy_has_a_new_id_and_ends_where_it_was_told() {
        let disk = SimDisk::new(1);
        let path = Path::new("/a.open");
        let mut journal = create(&disk, path, header(1), None, 0).unwrap();
        for n in 0..5 {
            put(&mut journal, (3 << 20) + n * 40_000, &[n as u8; 40_000]);
        }
        let copy = copy_up_to(&disk, path, Lsn::new((3 << 20) + 80_000), 9).unwrap();
        assert_eq!(copy.header.id, 9);
        assert_eq!(lengths(&disk, path), [40_000, 40_000]);
        let mut frames = Frames::open(&disk, path).unwrap();
        assert_eq!(frames.next().unwrap().unwrap().header.codec, Codec::Zstd);
        frames.skip_to(Lsn::new(u64::MAX)).unwrap();
        assert_eq!(frames.offset(), copy.offset);
        let error = copy_up_to(&disk, path, Lsn::new((3 << 20) + 90_000), 9).unwrap_err();
        assert_eq!(error.kind, Kind::Corrupt);
        assert_eq!(lengths(&disk, path), [40_000, 40_000], "a failed copy leaves what was there");
    }

    #[test]
    fn frames_end_at_a_gap_in_the_lsns() {
        let disk = SimDisk::new(1);
        let path = Path::new("/a.open");
        let mut journal = create(&disk, path, header(1), None, 0).unwrap();
        put(&mut journal, 3 << 20, &[1; 10]);
        put(&mut journal, (3 << 20) + 11, &[1; 10]);
        assert_eq!(lengths(&disk, path), [10]);
    }
}
