//! One journal file: made, read frame by frame, copied.
//!
//! - A name `<segment>.open` leads only to a file whose header is durable, and is itself durable before the first frame is
//!   written into it.
//! - Space is written (zeros), not only reserved, ahead of the frames, so that syncing a frame changes no metadata.
//! - A copy gets a new journal id, and a new key where it is encrypted, so that nothing beyond its end in any older file can ever be taken for its continuation.

use super::{
    cipher::{self, Cipher, JournalKeys},
    frame::{self, FIRST_FRAME, FrameHeader, JournalHeader},
};
use crate::{
    Error, Kind, Op,
    disk::{Disk, FileHandle, durable, read_full},
};
use klio_pg::Lsn;
use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
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
    /// Of an encrypted one.
    pub(super) cipher: Option<Arc<Cipher>>,
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

/// Makes an empty journal with `preallocate` bytes behind its header, out of a spare file where there is one. In place of
/// one that is there: the caller knows that nobody uses that.
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
        durable::rename(disk, from, path)?;
        Ok(end)
    };
    let allocated = build().inspect_err(|_| {
        // The first error is the one to report; start removes what is left.
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

/// Walks the frames of a journal from its beginning.
#[derive(Debug)]
pub(super) struct Frames {
    file: FileHandle,
    path: PathBuf,
    header: JournalHeader,
    cipher: Option<Arc<Cipher>>,
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
    /// Its bytes as the codec left them, decrypted.
    pub(super) stored: &'a [u8],
}

impl Frames {
    /// Opens a journal for reading.
    pub(super) fn open(disk: &dyn Disk, path: &Path, keys: &JournalKeys) -> Result<Self, Error> {
        let file = disk.open(path, false).map_err(|e| Error::io(Op::Open, path, e))?;
        Self::of(file, path, keys)
    }

    /// Over a file that is open already.
    pub(super) fn of(file: FileHandle, path: &Path, keys: &JournalKeys) -> Result<Self, Error> {
        let mut block = vec![0; FIRST_FRAME as usize];
        let got =
            read_full(file.as_ref(), &mut block, 0).map_err(|e| Error::io(Op::Read, path, e))?;
        let header = JournalHeader::decode(&block[..got])
            .map_err(|e| Error::new(Kind::Corrupt, Op::Open, path.display(), e))?;
        let cipher = keys.cipher(&header, &block[..got], path)?;
        Ok(Self {
            file,
            path: path.to_owned(),
            header,
            cipher,
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
    pub(super) fn cipher(&self) -> Option<Arc<Cipher>> {
        self.cipher.clone()
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

    fn range(&self, offset: u64, len: usize) -> std::ops::Range<usize> {
        let from = (offset - self.window_at) as usize;
        from.min(self.window_len)..(from + len).min(self.window_len)
    }

    fn window(&self, offset: u64, len: usize) -> &[u8] {
        &self.window[self.range(offset, len)]
    }

    /// Whether the frame in the window is as it was written; one that is encrypted is decrypted there.
    fn check(&mut self, offset: u64, len: usize) -> bool {
        let range = self.range(offset, len);
        let whole = &mut self.window[range];
        if whole.len() < len {
            return false;
        }
        let good = match &self.cipher {
            Some(cipher) => cipher.open(offset, whole).is_ok(),
            None => frame::is_intact(whole),
        };
        if !good {
            // Decrypting has spoilt it, and the file may get more: it is read again.
            self.window_len = 0;
        }
        good
    }

    /// The next frame, or `None` where the valid ones end: a torn tail, zeros, or an earlier use of the file.
    ///
    /// # Errors
    /// Only when the file cannot be read: that is not the end of it.
    pub(super) fn next(&mut self) -> Result<Option<Frame<'_>>, Error> {
        let failed = |path: &Path, e| Error::io(Op::Read, path, e);
        let header_bytes = self.header.frame_header();
        self.fill(self.offset, header_bytes).map_err(|e| failed(&self.path, e))?;
        let Some(header) = FrameHeader::decode(self.window(self.offset, header_bytes)) else {
            return Ok(None);
        };
        let continues = header.journal == self.header.id
            && header.encrypted == self.cipher.is_some()
            && header.start == self.position
            && header.end() <= self.header.end();
        if !continues {
            return Ok(None);
        }
        let (offset, len) = (self.offset, header.file_bytes() as usize);
        self.fill(offset, len).map_err(|e| failed(&self.path, e))?;
        if !self.check(offset, len) {
            return Ok(None);
        }
        self.offset += len as u64;
        self.position = header.end();
        let stored = &self.window(offset, len)[header_bytes..];
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

/// Replaces a journal by a new file with the frames up to `limit`, a new id and a new key; durable when it returns. The new
/// one is encrypted as `keys` say, whatever the old one was.
///
/// The old file stays in place until the new one is whole and synced, so that any failure (no space above all)
/// leaves what was there.
pub(super) fn copy_up_to(
    disk: &dyn Disk,
    path: &Path,
    limit: Lsn,
    keys: &JournalKeys,
    next_id: &dyn Fn() -> u64,
) -> Result<Journal, Error> {
    let mut frames = Frames::open(disk, path, keys)?;
    let mut header = *frames.header();
    let cipher = keys.begin(&mut header, next_id)?;
    let tmp = durable::tmp_path(path);
    durable::remove_if_there(disk, &tmp)?;
    let file = disk.create_new(&tmp).map_err(|e| Error::io(Op::Create, &tmp, e))?;
    let mut build = || -> Result<u64, Error> {
        let mut out = first_block(&header, cipher.as_deref());
        let mut written = 0;
        while frames.position() < limit {
            let Some(frame) = frames.next()? else { break };
            let (journal, encrypted) = (header.id, cipher.is_some());
            let fields = FrameHeader { journal, encrypted, ..frame.header };
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
            system_identifier: 1,
            timeline: TimelineId::new(1).unwrap(),
            segment_size: SegmentSize::new(1 << 20).unwrap(),
            start: Lsn::new(3 << 20),
            id,
            key: None,
        }
    }

    /// Plain, and with a key.
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
            let frame = scratch.frame(&journal.header, cipher, journal.offset, Lsn::new(at), raw);
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

    /// The frames of the earlier use lie exactly where those of the new one would go on.
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
            // What is switched off still opens what was encrypted before.
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
            assert_eq!(frames.offset(), copy.offset);
            let error = copy_up_to(&disk, path, end(90_000), &then, &|| 9).unwrap_err();
            assert_eq!(error.kind, Kind::Corrupt);
            let kept = lengths(&disk, path, &then);
            assert_eq!(kept, [40_000, 40_000], "a failed copy leaves what was there");
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

    /// The file's bytes, for tests that change them.
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
        // The second frame's bytes where the first one is, told to be the first.
        let mut moved = good.clone();
        moved.copy_within(first + length..first + 2 * length, first);
        moved[first + 16..first + 24].copy_from_slice(&(3u64 << 20).to_le_bytes());
        lies(&disk, path, &moved);
        assert!(lengths(&disk, path, &keys).is_empty());
        // A header of the same id with another salt, and the frames as they are.
        let mut header = header(1);
        let cipher = keys.begin(&mut header, &|| 1).unwrap();
        assert_eq!(first_block(&header, cipher.as_deref()), good[..first]);
        header.key = Some(keys.data.as_ref().unwrap().info([1, 2]));
        let cipher = keys.data.as_ref().unwrap().cipher(&header).unwrap();
        let other = first_block(&header, Some(&cipher));
        lies(&disk, path, &[&other[..], &good[first..]].concat());
        assert!(lengths(&disk, path, &keys).is_empty());
        // A plain frame in an encrypted journal, as somebody without the key would write it.
        lies(&disk, path, &good);
        let mut plain = journal;
        plain.header.key = None;
        plain.cipher = None;
        plain.offset = FIRST_FRAME;
        plain.file = disk.open(path, true).unwrap();
        put(&mut plain, 3 << 20, &[9; 50]);
        assert!(lengths(&disk, path, &keys).is_empty());
        // Another cluster's key, and none.
        lies(&disk, path, &good);
        assert_eq!(lengths(&disk, path, &keys), [50, 50]);
        for keys in [other_cluster, JournalKeys::default()] {
            let error = Frames::open(&disk, path, &keys).unwrap_err();
            assert_eq!(error.kind, Kind::Denied, "{error}");
        }
    }
}
