//! Gathers neighbouring chunks in a worker's memory, so that they are written in one call, and lets reads and writes
//! bypass the page cache where the file system allows it.
//!
//! A restore writes each file once, and all of them together are larger than memory, so the page cache only costs
//! time: without it, a restore is several times as fast (docs/benchmarks.md). What must stay true: whoever adds
//! chunks calls `write` at the end, so that none is left in memory; a file system that refuses direct I/O gets
//! ordinary calls; and a direct write is not a durable one (RESTORE4), so `finish` syncs all the same.

use rustix::{
    fs::{FallocateFlags, OFlags, fallocate, fcntl_getfl, fcntl_setfl},
    io::Errno,
};
use std::{fs::File, io, os::unix::fs::FileExt};

/// Bytes that are gathered before a write, and read at once: large enough for the disk, small enough for each worker.
pub(super) const FULL: usize = 1 << 20;
/// Direct I/O needs memory, offset and length to be multiples of this: the machine's page; few disks need more.
const ALIGN: usize = 4096;
/// The unit that is compared and rewritten: PostgreSQL's page, which is a multiple of the block size of disks.
const PAGE: usize = 8192;

/// Makes reads and writes of this file bypass the page cache, if the file is large, consists of whole blocks, and the
/// file system supports it.
pub(super) fn go_direct(file: &File, size: u64) -> io::Result<()> {
    if size < FULL as u64 || !size.is_multiple_of(ALIGN as u64) {
        return Ok(());
    }
    match fcntl_setfl(file, fcntl_getfl(file)? | OFlags::DIRECT) {
        Ok(()) | Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Allocates the blocks of a new file, so that several workers can write to it at once, and a full disk is reported
/// before the first write.
pub(super) fn reserve(file: &File, size: u64) -> io::Result<()> {
    match size {
        0 => Ok(()),
        _ => match fallocate(file, FallocateFlags::empty(), 0, size) {
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            Err(error) => Err(error.into()),
        },
    }
}

/// Repeats a call with the page cache if direct I/O is refused: the disk needs larger blocks, or a short call left a rest.
fn or_ordinary(file: &File, call: impl Fn() -> io::Result<()>) -> io::Result<()> {
    match call() {
        Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {
            fcntl_setfl(file, fcntl_getfl(file)? - OFlags::DIRECT)?;
            call()
        }
        done => done,
    }
}

/// Memory that begins at a block boundary.
#[derive(Debug, Default)]
pub(super) struct Blocks {
    memory: Vec<u8>,
}

impl Blocks {
    /// The first `length` bytes; their content is undefined.
    pub(super) fn of(&mut self, length: usize) -> &mut [u8] {
        if self.memory.len() < length + ALIGN {
            self.memory.resize(length + ALIGN, 0);
        }
        let begin = self.memory.as_ptr().align_offset(ALIGN).min(ALIGN);
        &mut self.memory[begin..begin + length]
    }

    /// Reads `length` bytes of a file.
    pub(super) fn read(&mut self, file: &File, offset: u64, length: usize) -> io::Result<&[u8]> {
        let bytes = std::cell::RefCell::new(self.of(length));
        or_ordinary(file, || file.read_exact_at(&mut bytes.borrow_mut(), offset))?;
        Ok(bytes.into_inner())
    }
}

/// The chunks that one worker has gathered.
#[derive(Debug, Default)]
pub(super) struct Strip {
    blocks: Blocks,
    /// Where the gathered bytes go in the file.
    offset: u64,
    length: usize,
}

impl Strip {
    /// Discards what a failed piece left over, which belongs to another file.
    pub(super) fn start_over(&mut self) {
        self.length = 0;
    }

    /// Adds a chunk. Writes what was gathered before if the chunk does not follow it, and also when the memory is full.
    pub(super) fn add(&mut self, file: &File, offset: u64, mut chunk: &[u8]) -> io::Result<()> {
        if offset != self.offset + self.length as u64 {
            self.write(file)?;
            self.offset = offset;
        }
        while !chunk.is_empty() {
            let (now, rest) = chunk.split_at(chunk.len().min(FULL - self.length));
            self.blocks.of(FULL)[self.length..][..now.len()].copy_from_slice(now);
            self.length += now.len();
            chunk = rest;
            if self.length == FULL {
                self.write(file)?;
            }
        }
        Ok(())
    }

    /// Adds those pages of a chunk that differ from the file, and returns how many bytes they have: only pages that
    /// changed are written, not the chunks around them. `old` is memory for the file's content.
    pub(super) fn add_what_differs(
        &mut self,
        file: &File,
        offset: u64,
        chunk: &[u8],
        old: &mut Blocks,
    ) -> io::Result<u64> {
        let old = old.read(file, offset, chunk.len())?;
        let mut place = offset;
        let mut added = 0;
        for (page, old) in chunk.chunks(PAGE).zip(old.chunks(PAGE)) {
            if page != old {
                self.add(file, place, page)?;
                added += page.len() as u64;
            }
            place += page.len() as u64;
        }
        Ok(added)
    }

    /// Writes everything that was gathered.
    pub(super) fn write(&mut self, file: &File) -> io::Result<()> {
        let bytes = &*self.blocks.of(self.length);
        let written = or_ordinary(file, || file.write_all_at(bytes, self.offset));
        self.offset += self.length as u64;
        self.length = 0;
        written
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Chunks of one size, at these places counted in chunks; what a file then must have, and has.
    fn poured(chunk: usize, places: &[usize], direct: bool) -> (Vec<u8>, Vec<u8>) {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("relation");
        let file = File::create(&path).unwrap();
        let size = (places.iter().max().unwrap() + 1) * chunk;
        if direct {
            reserve(&file, size as u64).unwrap();
            go_direct(&file, size as u64).unwrap();
        }
        let mut expected = vec![0; size];
        let mut strip = Strip::default();
        for (number, place) in places.iter().enumerate() {
            let bytes = vec![u8::try_from(number % 255 + 1).unwrap(); chunk];
            expected[place * chunk..][..chunk].copy_from_slice(&bytes);
            strip.add(&file, (place * chunk) as u64, &bytes).unwrap();
        }
        strip.write(&file).unwrap();
        assert_eq!(strip.length, 0, "something was left behind");
        (expected, std::fs::read(&path).unwrap())
    }

    #[test]
    fn chunks_land_where_they_belong_with_and_without_holes_between_them() {
        // Nine pages each: three in a row, a hole, then more than one write's worth; then one larger than a write.
        let places: Vec<usize> = [0, 1, 2, 7].into_iter().chain(8..60).collect();
        for direct in [false, true] {
            let (expected, found) = poured(72 << 10, &places, direct);
            assert!(expected == found, "direct {direct}: other bytes");
            let (expected, found) = poured(3 << 20, &[1, 0], direct);
            assert!(expected == found, "direct {direct}: other bytes");
        }
    }

    #[test]
    fn only_pages_that_differ_are_written() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("relation");
        // Nine pages and a bit, of which the first, two in a row and the bit differ.
        let length = 9 * PAGE + 100;
        let (old, mut new) = (vec![1; length], vec![1; length]);
        for place in [0, 3 * PAGE + 17, 4 * PAGE, length - 1] {
            new[place] = 2;
        }
        std::fs::write(&path, [old.clone(), old].concat()).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let (mut strip, mut buffer) = (Strip::default(), Blocks::default());
        for (chunk, differ) in [(0, 3 * PAGE + 100), (1, 3 * PAGE + 100)] {
            let offset = (chunk * length) as u64;
            let added = strip.add_what_differs(&file, offset, &new, &mut buffer).unwrap();
            assert_eq!(added, differ as u64, "chunk {chunk}");
        }
        strip.write(&file).unwrap();
        assert!(std::fs::read(&path).unwrap() == [new.clone(), new.clone()].concat());
        let again = strip.add_what_differs(&file, 0, &new, &mut buffer).unwrap();
        assert_eq!(again, 0, "it is all there");
    }

    #[test]
    fn what_is_no_whole_block_is_written_the_ordinary_way() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("odd");
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        go_direct(&file, FULL as u64).unwrap();
        let mut strip = Strip::default();
        strip.add(&file, 100, b"neither its place nor its length").unwrap();
        strip.write(&file).unwrap();
        let found = std::fs::read(&path).unwrap();
        assert_eq!(&found[100..132], b"neither its place nor its length");
        go_direct(&file, FULL as u64).unwrap();
        let mut blocks = Blocks::default();
        assert_eq!(blocks.read(&file, 100, 7).unwrap(), b"neither");
    }

    #[test]
    fn memory_begins_at_a_whole_block_however_much_is_asked_for() {
        let mut blocks = Blocks::default();
        for length in [1, ALIGN, 3 << 20, 5] {
            let bytes = blocks.of(length);
            assert_eq!((bytes.len(), bytes.as_ptr().align_offset(ALIGN)), (length, 0));
        }
    }

    #[test]
    fn a_failed_write_is_an_error() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("relation");
        std::fs::write(&path, b"").unwrap();
        let file = File::open(&path).unwrap();
        let mut strip = Strip::default();
        strip.add(&file, 0, b"chunk").unwrap();
        assert!(strip.write(&file).is_err(), "the file is open for reading only");
    }
}
