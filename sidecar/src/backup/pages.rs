//! Reads a relation's file and checks its pages on the way.
//!
//! - A page that PostgreSQL is writing may be read half old, half new. So a page with a wrong checksum is read again
//!   several times, and the bytes of the last read are passed on.
//! - Only pages that were not changed since the backup began count: WAL replay of the backup repairs later changes,
//!   whatever was read.
//! - A page whose LSN lies after the end of the backup cannot be right. Such pages are remembered until the end is
//!   known.
//! - Nothing is changed or hidden: bad pages are stored as they are.

use klio_pg::{Lsn, PageHeader, page_checksum};
use klio_storage::catalog::{BadPage, PagesRecord};
use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicU64, atomic::Ordering::Relaxed},
    time::Duration,
};

/// How much is read at a time: several chunks, so that the disk's read-ahead is worthwhile.
const READ_BYTES: usize = 256 << 10;
/// The pauses before each retry of a bad page. Writing a page takes microseconds.
const AGAIN: [Duration; 4] = [
    Duration::ZERO,
    Duration::from_millis(1),
    Duration::from_millis(20),
    Duration::from_millis(100),
];
/// Limit for the sum of all pauses: a file of only bad pages must not take hours.
const PAUSES: Duration = Duration::from_secs(10);
/// How many bad pages are listed by name.
const EXAMPLES: usize = 100;
/// How many pages with an LSN after the backup's start are remembered until its end is known. Further ones count as
/// bad at once: pages whose checksum stays wrong over several reads are rare, so that many are damage.
const SUSPECTS: usize = 1000;
/// More WAL than any backup takes: a page with an LSN further away is bad, whatever the end is.
const FAR: u64 = 1 << 50;

/// The results of the page checks over all files of a backup.
#[derive(Debug)]
pub struct PageCheck {
    start: Lsn,
    block_size: usize,
    segment_blocks: u32,
    checked: AtomicU64,
    paused: AtomicU64,
    found: Mutex<Found>,
}

#[derive(Debug, Default)]
struct Found {
    bad: u64,
    examples: Vec<BadPage>,
    /// Pages with a wrong checksum whose LSN says that they changed after the backup began.
    suspects: Vec<(Lsn, BadPage)>,
    /// Pages counted as bad before the end was known, because there were too many suspects.
    overflow: u64,
}

/// The result of checking a page once.
enum Look {
    /// An empty new page, or its checksum is right. `checked` if the page did not change since the backup began.
    Fine {
        checked: bool,
    },
    Wrong {
        lsn: Lsn,
        expected: u16,
        found: u16,
    },
}

impl PageCheck {
    /// For a backup that began at `start`.
    pub fn new(start: Lsn, block_size: u32, segment_blocks: u32) -> Self {
        Self {
            start,
            block_size: block_size as usize,
            segment_blocks,
            checked: AtomicU64::new(0),
            paused: AtomicU64::new(0),
            found: Mutex::default(),
        }
    }

    /// Number of pages with wrong checksums so far.
    pub fn bad(&self) -> u64 {
        self.found().bad
    }

    /// The result for a backup that ended at `stop`.
    pub fn finish(&self, stop: Lsn) -> PagesRecord {
        let mut found = self.found();
        if found.overflow > 0 {
            tracing::warn!(
                pages = found.overflow,
                "too many pages with wrong checksums and LSNs from during the backup; counting these as bad"
            );
        }
        for (lsn, page) in std::mem::take(&mut found.suspects) {
            if lsn > stop {
                found.add(page);
            }
        }
        PagesRecord {
            enabled: true,
            checked: self.checked.load(Relaxed),
            bad: found.bad,
            examples: found.examples.clone(),
            ..PagesRecord::default()
        }
    }

    fn found(&self) -> MutexGuard<'_, Found> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn look(&self, page: &[u8], block: u32) -> Look {
        let Some(header) = PageHeader::read(page) else { return Look::Fine { checked: false } };
        let checked = header.lsn < self.start;
        if header.is_new() {
            // PostgreSQL accepts a page without a header only if it is all zeros.
            if page.iter().all(|b| *b == 0) {
                return Look::Fine { checked: false };
            }
        } else if header.checksum == page_checksum(page, block) {
            return Look::Fine { checked };
        }
        Look::Wrong {
            lsn: header.lsn,
            expected: page_checksum(page, block),
            found: header.checksum,
        }
    }

    /// Sleeps before a page is read again, until the sum of the pauses reaches its limit.
    fn pause(&self, pause: Duration) {
        let spent = self.paused.fetch_add(pause.as_micros() as u64, Relaxed);
        if !pause.is_zero() && Duration::from_micros(spent) < PAUSES {
            std::thread::sleep(pause);
        }
    }

    fn wrong(&self, lsn: Lsn, page: BadPage) {
        let mut found = self.found();
        if lsn < self.start || lsn.bytes_since(self.start) > FAR {
            found.add(page);
        } else if found.suspects.len() < SUSPECTS {
            found.suspects.push((lsn, page));
        } else {
            found.overflow += 1;
            found.add(page);
        }
    }
}

impl Found {
    fn add(&mut self, page: BadPage) {
        tracing::warn!(
            file = page.file,
            block = page.block,
            expected = page.expected,
            found = page.found,
            "page with a wrong checksum"
        );
        self.bad += 1;
        if self.examples.len() < EXAMPLES {
            self.examples.push(page);
            if self.examples.len() == EXAMPLES {
                tracing::warn!(
                    "listed {EXAMPLES} pages with wrong checksums; further ones are only counted"
                );
            }
        }
    }
}

/// Reads a relation's file page by page.
#[derive(Debug)]
pub struct PageReader {
    file: File,
    /// Relative to the data directory, for the record.
    name: String,
    check: Arc<PageCheck>,
    first_block: u32,
    buffer: Vec<u8>,
    given: usize,
    /// The offset in the file at which the buffer ends.
    at: u64,
}

impl PageReader {
    /// `segment` is the file's number within the relation's fork.
    pub fn new(file: File, name: String, segment: u32, check: Arc<PageCheck>) -> Self {
        let first_block = segment.wrapping_mul(check.segment_blocks);
        Self { file, name, check, first_block, buffer: Vec::new(), given: 0, at: 0 }
    }

    /// Fills the buffer with whole pages, as far as the file has them.
    fn refill(&mut self) -> io::Result<()> {
        let from = self.at;
        let size = self.check.block_size;
        let want = READ_BYTES.next_multiple_of(size);
        // For a small table the buffer is no larger than the file.
        let left = self.file.metadata()?.len().saturating_sub(from);
        let want = usize::try_from(left.next_multiple_of(size as u64)).unwrap_or(want).min(want);
        self.buffer.resize(want, 0);
        let got = read_full(&self.file, &mut self.buffer, from)?;
        self.buffer.truncate(got);
        self.given = 0;
        self.at += got as u64;
        // An incomplete page at the end is being appended right now; its content comes from WAL.
        for index in 0..got / size {
            let block = (from / size as u64) as u32 + index as u32;
            let place = index * size..(index + 1) * size;
            self.check_page(block, from + place.start as u64, place)?;
        }
        Ok(())
    }

    fn check_page(&mut self, block: u32, at: u64, place: std::ops::Range<usize>) -> io::Result<()> {
        let block = self.first_block.wrapping_add(block);
        let mut look = self.check.look(&self.buffer[place.clone()], block);
        for pause in AGAIN {
            let Look::Wrong { .. } = look else { break };
            self.check.pause(pause);
            // If the file has become shorter, the page cannot be read again.
            if read_full(&self.file, &mut self.buffer[place.clone()], at)? < place.len() {
                break;
            }
            look = self.check.look(&self.buffer[place.clone()], block);
        }
        match look {
            Look::Fine { checked } => {
                self.check.checked.fetch_add(checked.into(), Relaxed);
            }
            Look::Wrong { lsn, expected, found } => {
                self.check.checked.fetch_add((lsn < self.check.start).into(), Relaxed);
                let file = self.name.clone();
                self.check.wrong(lsn, BadPage { file, block: block.into(), expected, found });
            }
        }
        Ok(())
    }
}

impl Read for PageReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.given == self.buffer.len() {
            self.refill()?;
        }
        let count = buf.len().min(self.buffer.len() - self.given);
        buf[..count].copy_from_slice(&self.buffer[self.given..self.given + count]);
        self.given += count;
        Ok(count)
    }
}

fn read_full(file: &File, buf: &mut [u8], at: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        match file.read_at(&mut buf[done..], at + done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const START: Lsn = Lsn::new(1000);

    fn page(lsn: u64, block: u32, fill: u8) -> Vec<u8> {
        let mut page = vec![fill; 8192];
        page[..4].copy_from_slice(&((lsn >> 32) as u32).to_le_bytes());
        page[4..8].copy_from_slice(&(lsn as u32).to_le_bytes());
        page[14..16].copy_from_slice(&8192_u16.to_le_bytes());
        let sum = page_checksum(&page, block);
        page[8..10].copy_from_slice(&sum.to_le_bytes());
        page
    }

    fn read(bytes: &[u8], segment: u32) -> (Vec<u8>, Arc<PageCheck>) {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        let check = Arc::new(PageCheck::new(START, 8192, 131_072));
        let mut all = Vec::new();
        let name = "base/5/16384".to_owned();
        PageReader::new(file, name, segment, Arc::clone(&check)).read_to_end(&mut all).unwrap();
        (all, check)
    }

    #[test]
    fn good_pages_of_any_segment_pass() {
        for segment in [0, 3] {
            let first = segment * 131_072;
            let pages: Vec<u8> = (0..100).flat_map(|n| page(7, first + n, n as u8)).collect();
            let (all, check) = read(&pages, segment);
            assert!(all == pages);
            let record = check.finish(Lsn::new(2000));
            assert_eq!((record.checked, record.bad), (100, 0));
        }
    }

    #[test]
    fn a_flipped_bit_is_found_named_and_stored_as_it_is() {
        let mut pages: Vec<u8> = (0..40).flat_map(|n| page(7, n, 1)).collect();
        pages[33 * 8192 + 5000] ^= 4;
        let (all, check) = read(&pages, 0);
        assert!(all == pages);
        let record = check.finish(Lsn::new(2000));
        assert_eq!((record.checked, record.bad), (40, 1));
        assert_eq!(
            (record.examples[0].file.as_str(), record.examples[0].block),
            ("base/5/16384", 33)
        );
    }

    #[test]
    fn pages_changed_since_the_backup_began_do_not_count_unless_they_lie() {
        let mut pages = [page(1500, 0, 1), page(5000, 1, 1), page(999, 2, 1)].concat();
        for at in [100, 8192 + 100] {
            pages[at] ^= 1;
        }
        let (_, check) = read(&pages, 0);
        assert_eq!(check.bad(), 0);
        let record = check.finish(Lsn::new(2000));
        assert_eq!((record.checked, record.bad, record.examples[0].block), (1, 1, 1));
    }

    /// Pages with wrong checksums whose LSNs lie after the backup's start, each one byte of WAL later.
    fn suspects(count: u64) -> Arc<PageCheck> {
        let check = Arc::new(PageCheck::new(START, 8192, 131_072));
        for block in 0..count {
            let file = "base/5/16384".to_owned();
            check.wrong(Lsn::new(1500 + block), BadPage { file, block, expected: 1, found: 2 });
        }
        check
    }

    #[test]
    fn more_suspects_than_are_remembered_count_as_bad_and_the_list_is_cut() {
        let before_the_end = suspects(SUSPECTS as u64).finish(Lsn::new(1_000_000));
        assert_eq!((before_the_end.bad, before_the_end.examples.len()), (0, 0));
        let check = suspects(SUSPECTS as u64 + 500);
        assert_eq!(check.bad(), 500, "known before the end, so that a policy can act");
        let record = check.finish(Lsn::new(1499));
        assert_eq!((record.bad, record.examples.len()), (SUSPECTS as u64 + 500, EXAMPLES));
    }

    #[test]
    fn new_pages_have_no_checksum_but_must_be_zeros() {
        let mut pages = vec![0; 3 * 8192];
        pages[8192 + 4000] = 1;
        let (_, check) = read(&pages, 0);
        let record = check.finish(Lsn::new(2000));
        assert_eq!((record.bad, record.examples[0].block), (1, 1));
    }

    #[test]
    fn a_page_that_is_not_whole_is_passed_on_unchecked() {
        let mut pages = page(7, 0, 1);
        pages.extend([9; 500]);
        let (all, check) = read(&pages, 0);
        assert!(all == pages);
        assert_eq!(check.finish(Lsn::new(2000)).bad, 0);
    }

    /// The first read sees half of a write; the next one finds the whole page.
    #[test]
    fn a_torn_page_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let good = page(7, 0, 1);
        let mut torn = good.clone();
        torn[6000] ^= 1;
        std::fs::write(&path, &torn).unwrap();
        let check = Arc::new(PageCheck::new(START, 8192, 131_072));
        let file = File::open(&path).unwrap();
        let mut reader = PageReader::new(file, "f".into(), 0, Arc::clone(&check));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(5));
                let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
                file.write_all_at(&good, 0).unwrap();
            });
            let mut all = Vec::new();
            reader.read_to_end(&mut all).unwrap();
            assert!(all == good, "what is handed on is what was read last");
        });
        assert_eq!(check.finish(Lsn::new(2000)).bad, 0);
    }
}
