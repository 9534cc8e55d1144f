//! One journal file: creating it, reading it frame by frame, copying it.
//!
//! - A name `<segment>.open` always refers to a file whose header is durable, and the name itself is durable before the
//!   first frame is written.
//! - Space ahead of the frames is filled with zeros, not only reserved, so that syncing a frame changes no metadata.
//! - A copy gets a new journal id, and a new key if it is encrypted, so that bytes beyond its end in an older file can
//!   never be taken for its continuation. It ends with a closing frame: all of it is synced before it gets its name.
//! - Where the good frames end early, the bytes behind them are only evidence ([`Tail`]) and are never used as WAL.

use super::{
    cipher::{self, Cipher, JournalKeys},
    frame::{self, Codec, FIRST_FRAME, Format, FrameHeader, HeaderError, JournalHeader},
};
use crate::{
    Error, Kind, Op, crash_point,
    disk::{Disk, FileHandle, durable, read_full},
};
use klio_pg::Lsn;
use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

/// Reads are at least this large, so that small frames are read many at a time.
const READ_BYTES: usize = 256 << 10;
/// Zeros are written in pieces of this size.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// A journal that is open for appending.
#[derive(Debug)]
pub(super) struct Journal {
    pub(super) file: FileHandle,
    pub(super) path: PathBuf,
    pub(super) header: JournalHeader,
    /// For an encrypted journal.
    pub(super) cipher: Option<Arc<Cipher>>,
    /// File offset of the next frame.
    pub(super) offset: u64,
    /// Length of the part of the file that has been written at least once.
    pub(super) allocated: u64,
}

impl Journal {
    /// The closing frame which says that everything up to `at` is durable, to be written at the end.
    pub(super) fn closing_frame(&self, at: Lsn) -> Vec<u8> {
        let mut frame = vec![0; self.header.frame_header()];
        let fields = FrameHeader::closing(&self.header, at);
        cipher::finish(&fields, &mut frame, self.offset, self.cipher.as_deref());
        frame
    }
}

pub(super) fn write_zeros(file: &FileHandle, from: u64, to: u64) -> io::Result<()> {
    let mut at = from;
    while at < to {
        let count = (to - at).min(ZEROS.len() as u64);
        file.write_all_at(&ZEROS[..count as usize], at)?;
        at += count;
    }
    Ok(())
}

/// Creates an empty journal with `preallocate` bytes behind its header, reusing a spare file if one is given. Replaces
/// an existing journal at `path`: the caller knows that nobody uses that one.
pub(super) fn create(
    disk: &dyn Disk,
    path: &Path,
    header: JournalHeader,
    cipher: Option<Arc<Cipher>>,
    spare: Option<&Path>,
    preallocate: u64,
) -> Result<Journal, Error> {
    let block = first_block(&header, cipher.as_deref());
    let tmp = durable::tmp_path(path);
    durable::remove_if_there(disk, &tmp)?;
    let (file, from) = match spare.map(|spare| (spare, disk.open(spare, true))) {
        Some((spare, Ok(file))) => (file, spare),
        _ => (disk.create_new(&tmp).map_err(|e| Error::io(Op::Create, &tmp, e))?, tmp.as_path()),
    };
    let build = || -> Result<u64, Error> {
        let size = file.size().map_err(|e| Error::io(Op::Open, from, e))?;
        file.write_all_at(&block, 0).map_err(|e| Error::io(Op::Write, from, e))?;
        let end = size.max(FIRST_FRAME + preallocate);
        write_zeros(&file, size.max(FIRST_FRAME), end)
            .map_err(|e| Error::io(Op::Write, from, e))?;
        file.sync_all().map_err(|e| Error::io(Op::Sync, from, e))?;
        crash_point!("journal.written");
        durable::rename(disk, from, path)?;
        crash_point!("journal.created");
        Ok(end)
    };
    let allocated = build().inspect_err(|_| {
        // The first error is the one to report; recovery at the next start removes the rest.
        let _ = disk.remove(from);
    })?;
    let (path, offset) = (path.to_owned(), FIRST_FRAME);
    Ok(Journal { file, path, header, cipher, offset, allocated })
}

fn first_block(header: &JournalHeader, cipher: Option<&Cipher>) -> Vec<u8> {
    let mut block = header.encode();
    if let Some(cipher) = cipher {
        cipher.sign(&mut block);
    }
    block
}

/// Iterates over the frames of a journal from its beginning.
#[derive(Debug)]
pub(super) struct Frames {
    file: FileHandle,
    path: PathBuf,
    header: JournalHeader,
    cipher: Option<Arc<Cipher>>,
    /// Where the next frame must begin, in the file and in the WAL.
    offset: u64,
    position: Lsn,
    /// The highest flushed LSN in the good frames so far.
    flushed: Lsn,
    window: Vec<u8>,
    window_at: u64,
    window_len: usize,
}

/// A frame that passed every check.
#[derive(Debug)]
pub(super) struct Frame<'a> {
    pub(super) header: FrameHeader,
    /// The payload, still encoded by the codec but decrypted.
    pub(super) stored: &'a [u8],
}

/// What lies behind the good frames of a journal that is not full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tail {
    /// No frames of this journal.
    Clean,
    /// Frames of this journal that are incomplete or do not continue the WAL. Nothing in the file says that they were
    /// acknowledged.
    Torn,
    /// A good frame says that WAL up to this LSN was flushed: the medium lost or changed it.
    Lost(Lsn),
}

impl Frames {
    /// Opens a journal for reading.
    pub(super) fn open(disk: &dyn Disk, path: &Path, keys: &JournalKeys) -> Result<Self, Error> {
        let file = disk.open(path, false).map_err(|e| Error::io(Op::Open, path, e))?;
        Self::of(file, path, keys)
    }

    /// Reads the journal through a file that is already open.
    pub(super) fn of(file: FileHandle, path: &Path, keys: &JournalKeys) -> Result<Self, Error> {
        let mut block = vec![0; FIRST_FRAME as usize];
        let got =
            read_full(file.as_ref(), &mut block, 0).map_err(|e| Error::io(Op::Read, path, e))?;
        let header = JournalHeader::decode(&block[..got]).map_err(|e| {
            let newer = matches!(e, HeaderError::Newer(_));
            let kind = if newer { Kind::Newer } else { Kind::Corrupt };
            Error::new(kind, Op::Open, path.display(), e)
        })?;
        let cipher = keys.cipher(&header, &block[..got], path)?;
        Ok(Self {
            file,
            path: path.to_owned(),
            header,
            cipher,
            offset: FIRST_FRAME,
            position: header.start,
            flushed: header.start,
            window: Vec::new(),
            window_at: 0,
            window_len: 0,
        })
    }

    pub(super) const fn header(&self) -> &JournalHeader {
        &self.header
    }
    pub(super) fn cipher(&self) -> Option<Arc<Cipher>> {
        self.cipher.clone()
    }
    /// The end of the good frames read so far, as an LSN.
    pub(super) const fn position(&self) -> Lsn {
        self.position
    }
    /// The highest flushed LSN in the good frames read so far.
    pub(super) const fn flushed(&self) -> Lsn {
        self.flushed
    }
    /// The end of the good frames read so far, as a file offset.
    pub(super) const fn offset(&self) -> u64 {
        self.offset
    }

    /// Makes `len` bytes at `offset` available in the window; fewer at the end of the file.
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

    fn range(&self, offset: u64, len: usize) -> std::ops::Range<usize> {
        let from = (offset - self.window_at) as usize;
        from.min(self.window_len)..(from + len).min(self.window_len)
    }

    fn window(&self, offset: u64, len: usize) -> &[u8] {
        &self.window[self.range(offset, len)]
    }

    /// Whether the frame in the window is unmodified; an encrypted frame is decrypted in place.
    fn check(&mut self, format: Format, offset: u64, len: usize) -> bool {
        let range = self.range(offset, len);
        let whole = &mut self.window[range];
        if whole.len() < len {
            return false;
        }
        let good = match &self.cipher {
            Some(cipher) => cipher.open(offset, format, whole).is_ok(),
            None => frame::is_intact(format, whole),
        };
        if !good {
            // Decryption has destroyed the bytes in the window, and the file may still grow, so read them again.
            self.window_len = 0;
        }
        good
    }

    fn belongs(&self, header: &FrameHeader) -> bool {
        header.journal == self.header.id
            && header.format == self.header.format
            && header.encrypted == self.cipher.is_some()
            && header.end() <= self.header.end()
    }

    /// The header of the frame at `offset`, if a frame of this journal could begin there.
    fn header_at(&mut self, offset: u64) -> Result<Option<FrameHeader>, Error> {
        let room = self.header.frame_header();
        self.fill(offset, room).map_err(|e| Error::io(Op::Read, &self.path, e))?;
        let header = FrameHeader::decode(self.window(offset, room));
        Ok(header.filter(|header| self.belongs(header)))
    }

    /// Whether the frame at `offset` is complete and unmodified.
    fn is_whole(&mut self, offset: u64, header: &FrameHeader) -> Result<bool, Error> {
        let len = header.file_bytes() as usize;
        self.fill(offset, len).map_err(|e| Error::io(Op::Read, &self.path, e))?;
        Ok(self.check(header.format, offset, len))
    }

    /// Moves past the next frame of any kind; returns its header and its offset.
    fn step(&mut self) -> Result<Option<(FrameHeader, u64)>, Error> {
        let offset = self.offset;
        let header = self.header_at(offset)?.filter(|header| header.start == self.position);
        let Some(header) = header else { return Ok(None) };
        if !self.is_whole(offset, &header)? {
            return Ok(None);
        }
        self.offset += header.file_bytes();
        self.position = header.end();
        self.flushed = self.flushed.max(header.flushed);
        Ok(Some((header, offset)))
    }

    /// The next frame with WAL, or `None` where the good frames end: at a torn tail, zeros, or an earlier use of the
    /// file.
    ///
    /// # Errors
    /// Only when the file cannot be read, which does not mean that the journal ends there.
    pub(super) fn next(&mut self) -> Result<Option<Frame<'_>>, Error> {
        loop {
            let Some((header, offset)) = self.step()? else { return Ok(None) };
            if header.codec == Codec::Closing {
                continue;
            }
            let stored =
                &self.window(offset, header.file_bytes() as usize)[header.header_bytes()..];
            return Ok(Some(Frame { header, stored }));
        }
    }

    /// Moves to the end of the good frames, or to `limit`.
    pub(super) fn skip_to(&mut self, limit: Lsn) -> Result<(), Error> {
        while self.position < limit && self.step()?.is_some() {}
        Ok(())
    }

    /// Moves past closing frames.
    pub(super) fn skip_closing(&mut self) -> Result<(), Error> {
        let closing = |header: FrameHeader| header.codec == Codec::Closing;
        while self.header_at(self.offset)?.is_some_and(closing) && self.step()?.is_some() {}
        Ok(())
    }

    /// Classifies the bytes behind the good frames. Call it when `next` has returned `None`.
    pub(super) fn tail(&mut self) -> Result<Tail, Error> {
        if self.position == self.header.end() {
            return Ok(Tail::Clean);
        }
        let failed = |path: &Path, e| Error::io(Op::Read, path, e);
        let (room, bad) = (self.header.frame_header(), self.offset);
        self.fill(bad, room).map_err(|e| failed(&self.path, e))?;
        let mut torn = frame::resembles(self.window(bad, room), self.header.id, self.position);
        let (mut at, mut lost) = (bad, self.position);
        while let Some(offset) = self.find_frame(at)? {
            at = offset + 1;
            let header = self.header_at(offset)?.filter(|header| header.start >= self.position);
            let Some(header) = header else { continue };
            if self.is_whole(offset, &header)? {
                (torn, at) = (true, offset + header.file_bytes());
                lost = lost.max(header.flushed);
            }
        }
        Ok(match (lost > self.position, torn) {
            (true, _) => Tail::Lost(lost),
            (false, true) => Tail::Torn,
            (false, false) => Tail::Clean,
        })
    }

    /// The first offset from `at` on where bytes look like the beginning of a frame with this journal's id.
    fn find_frame(&mut self, at: u64) -> Result<Option<u64>, Error> {
        const NUMBER_AT: usize = 8;
        let (room, number) = (NUMBER_AT + 8, self.header.id.to_le_bytes());
        let mut at = at;
        loop {
            self.fill(at, READ_BYTES).map_err(|e| Error::io(Op::Read, &self.path, e))?;
            let piece = self.window(at, READ_BYTES);
            if piece.len() < room {
                return Ok(None);
            }
            if let Some(found) = find(&piece[NUMBER_AT..], &number) {
                return Ok(Some(at + found as u64));
            }
            // The last bytes are searched again with the next piece, because an id may be split between the two.
            at += (piece.len() - room + 1) as u64;
        }
    }

    /// The error for good frames that end before acknowledged WAL does: the medium lost or changed bytes.
    pub(super) fn lost(&self, expected: Lsn) -> Error {
        let detail =
            format!("expected WAL up to {expected}, found it intact up to {}", self.position);
        Error::new(Kind::Corrupt, Op::Read, self.path.display(), detail)
            .hint("the disk lost or changed synced bytes; check it before writing to it again")
    }
}

/// The first position of `wanted`. Most of the searched bytes are zeros, which are skipped in blocks.
fn find(bytes: &[u8], wanted: &[u8; 8]) -> Option<usize> {
    let mut at = 0;
    while at + wanted.len() <= bytes.len() {
        let block = bytes.get(at..at + FIRST_FRAME as usize);
        if block.is_some_and(|block| block == &ZEROS[..block.len()]) && wanted != &[0; 8] {
            // Step back a little: the id may begin in the last bytes of the block.
            at += FIRST_FRAME as usize - wanted.len();
            continue;
        }
        let end = bytes.len().min(at + FIRST_FRAME as usize);
        let here = bytes[at..end].windows(wanted.len()).position(|window| window == wanted);
        if let Some(here) = here {
            return Some(at + here);
        }
        at = end + 1 - wanted.len();
    }
    None
}

/// What the frames prove in a journal whose header is damaged.
pub(super) struct Evidence {
    /// One past the last byte of WAL in them. Its last part may not have been acknowledged; that cannot be decided.
    pub(super) upto: Lsn,
    /// All WAL below this was flushed before the last frame was written.
    pub(super) flushed: Lsn,
}

/// Reads the frames with WAL from `start` to `end` in a journal whose header is damaged; `upto` is `start` if there are
/// none. The journal's id and key are unknown, so encrypted frames cannot be verified. The result is only used for
/// reports.
pub(super) fn evidence(
    disk: &dyn Disk,
    path: &Path,
    start: Lsn,
    end: Lsn,
) -> Result<Evidence, Error> {
    let failed = |e| Error::io(Op::Read, path, e);
    let file = disk.open(path, false).map_err(failed)?;
    let (mut offset, mut found) = (FIRST_FRAME, Evidence { upto: start, flushed: start });
    let mut frame = vec![0; frame::FRAME_HEADER_MAX + frame::FRAME_RAW_MAX];
    loop {
        let got = read_full(file.as_ref(), &mut frame[..frame::FRAME_HEADER_MAX], offset);
        let got = got.map_err(failed)?;
        let inside = |header: &FrameHeader| header.start == found.upto && header.end() <= end;
        let Some(header) = FrameHeader::decode(&frame[..got]).filter(inside) else {
            return Ok(found);
        };
        let len = header.file_bytes() as usize;
        let got = read_full(file.as_ref(), &mut frame[..len], offset).map_err(failed)?;
        if got < len || (!header.encrypted && !frame::is_intact(header.format, &frame[..len])) {
            return Ok(found);
        }
        found.flushed = found.flushed.max(header.flushed.min(end));
        found.upto = header.end();
        offset += len as u64;
    }
}

/// Replaces a journal by a new file with the frames up to `limit`, a new id and a new key. The result is durable.
/// Whether it is encrypted depends on `keys`, not on the old file.
///
/// The old file stays in place until the new one is complete and synced, so that a failure (above all a full disk)
/// changes nothing.
pub(super) fn copy_up_to(
    disk: &dyn Disk,
    path: &Path,
    limit: Lsn,
    keys: &JournalKeys,
    next_id: &dyn Fn() -> u64,
) -> Result<Journal, Error> {
    let mut frames = Frames::open(disk, path, keys)?;
    let mut header = JournalHeader { format: Format::Current, ..*frames.header() };
    let cipher = keys.begin(&mut header, next_id)?;
    let tmp = durable::tmp_path(path);
    durable::remove_if_there(disk, &tmp)?;
    let file = disk.create_new(&tmp).map_err(|e| Error::io(Op::Create, &tmp, e))?;
    let mut build = || -> Result<u64, Error> {
        let mut out = first_block(&header, cipher.as_deref());
        let mut written = 0;
        while frames.position() < limit {
            let Some(frame) = frames.next()? else { break };
            let (format, journal, encrypted) = (header.format, header.id, cipher.is_some());
            let flushed = frame.header.flushed.max(header.start);
            let fields = FrameHeader { format, journal, encrypted, flushed, ..frame.header };
            let at = out.len();
            out.resize(at + header.frame_header(), 0);
            out.extend(frame.stored);
            cipher::finish(&fields, &mut out[at..], written + at as u64, cipher.as_deref());
            if out.len() >= READ_BYTES {
                file.write_all_at(&out, written).map_err(|e| Error::io(Op::Write, &tmp, e))?;
                written += out.len() as u64;
                out.clear();
            }
        }
        if frames.position() != limit {
            return Err(frames.lost(limit));
        }
        let at = out.len();
        out.resize(at + header.frame_header(), 0);
        let closing = FrameHeader::closing(&header, limit);
        cipher::finish(&closing, &mut out[at..], written + at as u64, cipher.as_deref());
        file.write_all_at(&out, written).map_err(|e| Error::io(Op::Write, &tmp, e))?;
        file.sync_all().map_err(|e| Error::io(Op::Sync, &tmp, e))?;
        durable::rename(disk, &tmp, path)?;
        Ok(written + out.len() as u64)
    };
    let offset = build().inspect_err(|_| {
        let _ = disk.remove(&tmp);
    })?;
    Ok(Journal { file, path: path.to_owned(), header, cipher, offset, allocated: offset })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::SimDisk;
    use crate::wal::{cipher::DataKey, frame::Codec, scratch::ScratchPool};
    use klio_pg::{SegmentSize, TimelineId};

    fn header(id: u64) -> JournalHeader {
        JournalHeader {
            format: Format::Current,
            system_identifier: 1,
            timeline: TimelineId::new(1).unwrap(),
            segment_size: SegmentSize::new(1 << 20).unwrap(),
            start: Lsn::new(3 << 20),
            id,
            key: None,
        }
    }

    /// Without and with encryption.
    fn both() -> [JournalKeys; 2] {
        let data = Some(Arc::new(DataKey::generate().unwrap()));
        [JournalKeys::default(), JournalKeys { data, writing: true }]
    }

    fn make(
        disk: &SimDisk,
        path: &Path,
        keys: &JournalKeys,
        id: u64,
        spare: Option<&Path>,
    ) -> Journal {
        let mut header = header(id);
        let cipher = keys.begin(&mut header, &|| id).unwrap();
        create(disk, path, header, cipher, spare, 8192).unwrap()
    }

    fn put(journal: &mut Journal, at: u64, raw: &[u8]) {
        ScratchPool::new(1).with(|scratch| {
            let cipher = journal.cipher.as_deref();
            // Each batch is synced before the next one, as with a slow stream.
            let places = (Lsn::new(at), Lsn::new(at));
            let frame = scratch.frame(&journal.header, cipher, journal.offset, places, raw);
            journal.file.write_all_at(frame, journal.offset).unwrap();
            journal.offset += frame.len() as u64;
        });
    }

    fn lengths(disk: &SimDisk, path: &Path, keys: &JournalKeys) -> Vec<u32> {
        let mut frames = Frames::open(disk, path, keys).unwrap();
        let mut found = Vec::new();
        while let Some(frame) = frames.next().unwrap() {
            found.push(frame.header.raw_len);
        }
        found
    }

    /// The frames of the earlier use lie exactly where frames of the new one would follow.
    #[test]
    fn frames_of_an_earlier_use_of_the_file_never_pass() {
        for keys in both() {
            let disk = SimDisk::new(1);
            let (path, spare) = (Path::new("/a.open"), Path::new("/spare"));
            let mut old = make(&disk, path, &keys, 1, None);
            for n in 0..4 {
                put(&mut old, (3 << 20) + n * 100, &[7; 100]);
            }
            disk.rename(path, spare).unwrap();
            let mut new = make(&disk, path, &keys, 2, Some(spare));
            assert!(lengths(&disk, path, &keys).is_empty());
            put(&mut new, 3 << 20, &[8; 100]);
            assert_eq!(lengths(&disk, path, &keys), [100]);
            assert!(disk.stat(spare).is_err());
        }
    }

    #[test]
    fn a_copy_has_a_new_id_and_ends_where_it_was_told() {
        let all = both();
        for (keys, writing) in [(0, false), (1, true), (0, true), (1, false)] {
            // Encryption that is switched off still decrypts older journals.
            let (keys, then) = (&all[keys], JournalKeys { writing, ..all[1].clone() });
            let disk = SimDisk::new(1);
            let path = Path::new("/a.open");
            let mut journal = make(&disk, path, keys, 1, None);
            for n in 0..5 {
                put(&mut journal, (3 << 20) + n * 40_000, &[n as u8; 40_000]);
            }
            let end = |bytes: u64| Lsn::new((3 << 20) + bytes);
            let copy = copy_up_to(&disk, path, end(80_000), &then, &|| 9).unwrap();
            assert_eq!((copy.header.id, copy.header.key.is_some()), (9, writing));
            assert_eq!(lengths(&disk, path, &then), [40_000, 40_000]);
            let mut frames = Frames::open(&disk, path, &then).unwrap();
            let first = frames.next().unwrap().unwrap();
            assert_eq!(first.header.codec, Codec::Zstd);
            assert_eq!(zstd::bulk::decompress(first.stored, 1 << 20).unwrap(), [0; 40_000]);
            frames.skip_to(Lsn::new(u64::MAX)).unwrap();
            assert_eq!((frames.offset(), frames.flushed()), (copy.offset, end(80_000)));
            let error = copy_up_to(&disk, path, end(90_000), &then, &|| 9).unwrap_err();
            assert_eq!(error.kind, Kind::Corrupt);
            let kept = lengths(&disk, path, &then);
            assert_eq!(kept, [40_000, 40_000], "a failed copy leaves what was there");
        }
    }

    /// Appends a closing frame behind the journal's WAL.
    fn close(journal: &mut Journal, at: u64) {
        let frame = journal.closing_frame(Lsn::new(at));
        journal.file.write_all_at(&frame, journal.offset).unwrap();
        journal.offset += frame.len() as u64;
    }

    fn tail(disk: &SimDisk, path: &Path, keys: &JournalKeys) -> (u64, Tail) {
        let mut frames = Frames::open(disk, path, keys).unwrap();
        frames.skip_to(frames.header().end()).unwrap();
        (frames.position().as_u64() - (3 << 20), frames.tail().unwrap())
    }

    /// Which frame is bad, and what follows it, tells rot from a torn tail.
    #[test]
    fn a_bad_frame_is_rot_only_where_a_later_one_says_that_it_was_flushed() {
        let base = 3 << 20;
        let lost = |bytes: u64| Tail::Lost(Lsn::new(base + bytes));
        for keys in both() {
            let disk = SimDisk::new(1);
            let path = Path::new("/a.open");
            let mut journal = make(&disk, path, &keys, 1, None);
            let mut begins = Vec::new();
            for n in 0..3 {
                begins.push(journal.offset);
                put(&mut journal, base + n * 100, &[7; 100]);
            }
            assert_eq!(tail(&disk, path, &keys), (300, Tail::Clean));
            let flip = |at: u64| disk.flip_bit(path, at, 3).unwrap();
            // Every byte of a frame matters, including those of its id and length.
            for inside in [0, 5, 9, 17, 25, 29, 33, 41, 50, 99] {
                for (bad, expected) in [
                    (0, (0, lost(200))),
                    // Nothing proves anything about the last frame.
                    (2, (200, Tail::Torn)),
                ] {
                    flip(begins[bad] + inside);
                    assert_eq!(tail(&disk, path, &keys), expected, "frame {bad} byte {inside}");
                    flip(begins[bad] + inside);
                }
                // When the third frame was written, the second one was known to be flushed.
                flip(begins[1] + inside);
                assert_eq!(tail(&disk, path, &keys), (100, lost(200)), "byte {inside}");
                flip(begins[1] + inside);
            }
            // A closing frame covers the last batch.
            close(&mut journal, base + 300);
            assert_eq!(tail(&disk, path, &keys), (300, Tail::Clean));
            flip(begins[2] + 60);
            assert_eq!(tail(&disk, path, &keys), (200, lost(300)));
        }
    }

    /// Two frames share one sync: the disk may have written only the second, and neither was acknowledged.
    #[test]
    fn a_good_frame_behind_a_bad_one_of_the_same_sync_proves_nothing() {
        for keys in both() {
            let disk = SimDisk::new(1);
            let path = Path::new("/a.open");
            let mut journal = make(&disk, path, &keys, 1, None);
            let start = Lsn::new(3 << 20);
            ScratchPool::new(1).with(|scratch| {
                for n in 0..2 {
                    let cipher = journal.cipher.as_deref();
                    let places = (start.advance(n * 50), start);
                    let frame =
                        scratch.frame(&journal.header, cipher, journal.offset, places, &[1; 50]);
                    journal.file.write_all_at(frame, journal.offset).unwrap();
                    journal.offset += frame.len() as u64;
                }
            });
            disk.flip_bit(path, FIRST_FRAME + 70, 1).unwrap();
            assert_eq!(tail(&disk, path, &keys), (0, Tail::Torn));
        }
    }

    #[test]
    fn a_closing_frame_holds_no_wal_and_the_stream_goes_on_behind_it() {
        for keys in both() {
            let disk = SimDisk::new(1);
            let path = Path::new("/a.open");
            let mut journal = make(&disk, path, &keys, 1, None);
            put(&mut journal, 3 << 20, &[1; 10]);
            close(&mut journal, (3 << 20) + 10);
            put(&mut journal, (3 << 20) + 10, &[2; 20]);
            close(&mut journal, (3 << 20) + 30);
            assert_eq!(lengths(&disk, path, &keys), [10, 20]);
            let mut frames = Frames::open(&disk, path, &keys).unwrap();
            frames.skip_to(Lsn::new((3 << 20) + 30)).unwrap();
            assert_ne!(frames.offset(), journal.offset);
            frames.skip_closing().unwrap();
            assert_eq!(frames.offset(), journal.offset);
        }
    }

    #[test]
    fn a_journal_of_the_first_builds_is_read_and_copied_into_the_current_format() {
        for keys in both() {
            let disk = SimDisk::new(1);
            let path = Path::new("/a.open");
            let mut header = JournalHeader { format: Format::First, ..header(1) };
            let cipher = keys.begin(&mut header, &|| 1).unwrap();
            let mut journal = create(&disk, path, header, cipher, None, 8192).unwrap();
            put(&mut journal, 3 << 20, &[1; 10]);
            put(&mut journal, (3 << 20) + 10, &[2; 20]);
            assert_eq!(lengths(&disk, path, &keys), [10, 20]);
            let end = Lsn::new((3 << 20) + 30);
            let copy = copy_up_to(&disk, path, end, &keys, &|| 2).unwrap();
            assert_eq!(copy.header.format, Format::Current);
            assert_eq!(lengths(&disk, path, &keys), [10, 20]);
            assert_eq!(tail(&disk, path, &keys), (30, Tail::Clean));
        }
    }

    #[test]
    fn a_number_is_found_wherever_it_stands() {
        let number = [1, 2, 3, 4, 5, 6, 7, 8];
        for at in [0, 1, 4080, 4088, 4089, 4092, 4095, 4096, 8185, 9000, 12_280] {
            let mut bytes = vec![0; 12_288];
            bytes[at..at + 8].copy_from_slice(&number);
            assert_eq!(find(&bytes, &number), Some(at));
            bytes[at] = 0;
            assert_eq!(find(&bytes, &number), None);
        }
    }

    #[test]
    fn frames_end_at_a_gap_in_the_lsns() {
        for keys in both() {
            let disk = SimDisk::new(1);
            let path = Path::new("/a.open");
            let mut journal = make(&disk, path, &keys, 1, None);
            put(&mut journal, 3 << 20, &[1; 10]);
            put(&mut journal, (3 << 20) + 11, &[1; 10]);
            assert_eq!(lengths(&disk, path, &keys), [10]);
        }
    }

    /// The bytes of the file, for tests that modify them.
    fn content(disk: &SimDisk, path: &Path) -> Vec<u8> {
        crate::disk::read_small(disk, path, 1 << 20).unwrap()
    }

    fn lies(disk: &SimDisk, path: &Path, bytes: &[u8]) {
        let _ = disk.remove(path);
        disk.create_new(path).unwrap().write_all_at(bytes, 0).unwrap();
    }

    #[test]
    fn every_bit_flip_in_an_encrypted_journal_is_found() {
        let [_, keys] = both();
        let disk = SimDisk::new(1);
        let path = Path::new("/a.open");
        let mut journal = make(&disk, path, &keys, 1, None);
        put(&mut journal, 3 << 20, b"one");
        put(&mut journal, (3 << 20) + 3, b"second");
        let good = content(&disk, path);
        let used = (0..96).chain(FIRST_FRAME as usize..journal.offset as usize);
        for byte in used {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[byte] ^= 1 << bit;
                lies(&disk, path, &bad);
                let whole = Frames::open(&disk, path, &keys).is_ok_and(|mut frames| {
                    frames.skip_to(Lsn::new(u64::MAX)).unwrap();
                    frames.position() == Lsn::new((3 << 20) + 9)
                });
                assert!(!whole, "byte {byte} bit {bit}");
            }
        }
    }

    #[test]
    fn a_frame_at_another_place_of_another_journal_or_cluster_is_refused() {
        let [_, keys] = both();
        let [_, other_cluster] = both();
        let disk = SimDisk::new(1);
        let path = Path::new("/a.open");
        let mut journal = make(&disk, path, &keys, 1, None);
        put(&mut journal, 3 << 20, &[5; 50]);
        put(&mut journal, (3 << 20) + 50, &[6; 50]);
        let good = content(&disk, path);
        let first = FIRST_FRAME as usize;
        let length = (journal.offset as usize - first) / 2;
        // The second frame's bytes at the position of the first, with the header of the first.
        let mut moved = good.clone();
        moved.copy_within(first + length..first + 2 * length, first);
        moved[first + 16..first + 24].copy_from_slice(&(3u64 << 20).to_le_bytes());
        lies(&disk, path, &moved);
        assert!(lengths(&disk, path, &keys).is_empty());
        // A header with the same id but another salt, and unmodified frames.
        let mut header = header(1);
        let cipher = keys.begin(&mut header, &|| 1).unwrap();
        assert_eq!(first_block(&header, cipher.as_deref()), good[..first]);
        header.key = Some(keys.data.as_ref().unwrap().info([1, 2]));
        let cipher = keys.data.as_ref().unwrap().cipher(&header).unwrap();
        let other = first_block(&header, Some(&cipher));
        lies(&disk, path, &[&other[..], &good[first..]].concat());
        assert!(lengths(&disk, path, &keys).is_empty());
        // A plain frame in an encrypted journal, as somebody without the key could write it.
        lies(&disk, path, &good);
        let mut plain = journal;
        plain.header.key = None;
        plain.cipher = None;
        plain.offset = FIRST_FRAME;
        plain.file = disk.open(path, true).unwrap();
        put(&mut plain, 3 << 20, &[9; 50]);
        assert!(lengths(&disk, path, &keys).is_empty());
        // With another cluster's key, and without any.
        lies(&disk, path, &good);
        assert_eq!(lengths(&disk, path, &keys), [50, 50]);
        for keys in [other_cluster, JournalKeys::default()] {
            let error = Frames::open(&disk, path, &keys).unwrap_err();
            assert_eq!(error.kind, Kind::Denied, "{error}");
        }
    }
}
