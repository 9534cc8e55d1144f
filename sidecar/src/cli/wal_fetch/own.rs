//! Keeps PostgreSQL's own copy of an unfinished segment if it is the longer one.
//!
//! Of a segment that is still being received, the server has only the beginning; the rest is zeros. A standby often
//! has more of it, from its primary. PostgreSQL would rename the fetched file over its own
//! (KeepFileRestoredFromArchive() in xlogarchive.c): it would lose WAL that nobody else may have, and a promotion
//! would not find its last record again and panic (FinishWalRecovery() in xlogrecovery.c). So if the fetched file has
//! no more than PostgreSQL's own, the answer is "no such file", and PostgreSQL reads its own copy, as it does with
//! archives that only take complete segments. Bytes and records decide: a file that is longer, or of another history,
//! is handed over as always.
//!
//! The same holds for the history file of a timeline that standbys pass over: a PostgreSQL that has the real history,
//! from its own promotion or from a restore, keeps it.

use super::data_dir;
use klio_pg::{Lsn, PAGE_BYTES, RecordWalker, SEGMENT_HEADER_BYTES, SegmentHeader};
use klio_storage::{catalog::PASSED_OVER, layout::WalFile};
use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom},
    path::Path,
};

const READ_BYTES: usize = 256 << 10;

/// Whether PostgreSQL has at least as much itself as the `file` that was fetched to `path`. If so, the fetched file
/// is removed again.
///
/// # Errors
/// An I/O error of the file system.
pub(super) fn is_enough(file: WalFile, path: &Path) -> io::Result<bool> {
    let Some(data) = data_dir(path) else { return Ok(false) };
    let own = data.join("pg_wal").join(file.to_string());
    if !own.is_file() {
        return Ok(false);
    }
    let enough = match file {
        WalFile::Segment(_) => has_as_much(&own, path, data)?,
        WalFile::History(_) => fs::read(path)? == PASSED_OVER.as_bytes(),
        WalFile::Partial(_) => false,
    };
    if !enough {
        return Ok(false);
    }
    fs::remove_file(path)?;
    Ok(true)
}

/// The reason as text, for PostgreSQL's log.
pub(super) fn message(file: WalFile) -> String {
    match file {
        WalFile::History(_) => {
            format!(
                "{file} is in pg_wal already; the stored one only tells standbys to pass over this timeline"
            )
        }
        WalFile::Segment(_) | WalFile::Partial(_) => {
            format!("everything that is stored of {file} so far is in pg_wal already")
        }
    }
}

fn has_as_much(own: &Path, came: &Path, data: &Path) -> io::Result<bool> {
    let (mut own, mut came) = (File::open(own)?, File::open(came)?);
    let size = came.metadata()?.len();
    let Some(end) = end_of(&mut came, size)? else { return Ok(false) };
    let may_be_whole = end + PAGE_BYTES > size;
    if own.metadata()?.len() != size || !begins_alike(&mut own, &mut came, end)? {
        return Ok(false);
    }
    let Ok(major) = fs::read_to_string(data.join("PG_VERSION")) else { return Ok(false) };
    let Ok(major) = major.trim().parse() else { return Ok(false) };
    // The last bytes of a record may be zeros, so only the records show where the content ends.
    let [own, came] = [records_end(&mut own, major)?, records_end(&mut came, major)?];
    Ok(own > came || (own == came && !may_be_whole))
}

/// The offset after the last byte that is not zero; `None` if all are zero.
fn end_of(file: &mut File, size: u64) -> io::Result<Option<u64>> {
    let mut page = vec![0; PAGE_BYTES as usize];
    let mut at = size.saturating_sub(PAGE_BYTES);
    loop {
        file.seek(SeekFrom::Start(at))?;
        file.read_exact(&mut page)?;
        if let Some(last) = page.iter().rposition(|byte| *byte != 0) {
            return Ok(Some(at + last as u64 + 1));
        }
        if at == 0 {
            return Ok(None);
        }
        at = at.saturating_sub(PAGE_BYTES);
    }
}

fn begins_alike(one: &mut File, other: &mut File, length: u64) -> io::Result<bool> {
    let (mut left, mut right) = (vec![0; READ_BYTES], vec![0; READ_BYTES]);
    one.seek(SeekFrom::Start(0))?;
    other.seek(SeekFrom::Start(0))?;
    let mut rest = length;
    while rest > 0 {
        let part = rest.min(READ_BYTES as u64) as usize;
        one.read_exact(&mut left[..part])?;
        other.read_exact(&mut right[..part])?;
        if left[..part] != right[..part] {
            return Ok(false);
        }
        rest -= part as u64;
    }
    Ok(true)
}

/// The position after the last complete record; `None` if there is none.
fn records_end(file: &mut File, major: u32) -> io::Result<Option<Lsn>> {
    file.seek(SeekFrom::Start(0))?;
    let mut header = [0; SEGMENT_HEADER_BYTES];
    file.read_exact(&mut header)?;
    let Ok(header) = SegmentHeader::parse(&header) else { return Ok(None) };
    file.seek(SeekFrom::Start(0))?;
    let mut walker = RecordWalker::new(header.segment_size, major, header.start);
    let mut buffer = vec![0; READ_BYTES];
    while walker.ended().is_none() {
        match file.read(&mut buffer)? {
            0 => break,
            bytes => walker.push(&buffer[..bytes], &mut |_| {}),
        }
    }
    Ok(walker.records_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether PostgreSQL's own copy is enough, and whether the fetched file still exists.
    fn asked(own: Option<&[u8]>, came: &[u8]) -> (bool, bool) {
        let directory = tempfile::tempdir().unwrap();
        let wal = directory.path().join("pg_wal");
        fs::create_dir(&wal).unwrap();
        fs::write(directory.path().join("PG_VERSION"), "15\n").unwrap();
        let file: WalFile = "000000010000000000000001".parse().unwrap();
        own.inspect(|own| fs::write(wal.join(file.to_string()), own).unwrap());
        let path = wal.join("RECOVERYXLOG");
        fs::write(&path, came).unwrap();
        let enough = is_enough(file, &path).unwrap();
        (enough, path.exists())
    }

    fn segment(bytes: usize) -> Vec<u8> {
        let mut all = vec![7; bytes];
        all.resize(1 << 20, 0);
        all
    }

    #[test]
    fn what_postgresql_has_as_much_of_itself_is_not_put_over_it() {
        assert_eq!(asked(Some(&segment(600_000)), &segment(500_000)), (true, false));
        assert_eq!(asked(Some(&segment(500_000)), &segment(500_000)), (true, false));
    }

    #[test]
    fn what_is_longer_or_another_is_given() {
        let mut other = segment(600_000);
        other[400_000] = 8;
        for (own, came) in [
            (None, segment(500_000)),
            (Some(segment(400_000)), segment(500_000)),
            (Some(other), segment(500_000)),
            // A complete segment, also if the same is there.
            (Some(segment(1 << 20)), segment(1 << 20)),
            (Some(segment(600_000)[..700_000].to_vec()), segment(500_000)),
            (Some(segment(600_000)), vec![0; 1 << 20]),
        ] {
            assert_eq!(asked(own.as_deref(), &came), (false, true));
        }
    }

    const SEGMENT: usize = 1 << 20;

    fn crc32c(bytes: impl Iterator<Item = u8>) -> u32 {
        let step = |crc: u32, byte: u8| {
            let crc = crc ^ u32::from(byte);
            (0..8).fold(crc, |crc, _| (crc >> 1) ^ (0x82F6_3B78 & (crc & 1).wrapping_neg()))
        };
        !bytes.fold(!0, step)
    }

    /// Segment 1 of timeline 1 with records of these lengths, as PostgreSQL 15 writes them, followed by zeros.
    fn records(lengths: &[usize]) -> Vec<u8> {
        let mut out: Vec<u8> = Vec::new();
        let mut prev = 0_u64;
        for length in lengths {
            out.resize(out.len().next_multiple_of(8), 0);
            let mut record = vec![0; *length];
            record[..4].copy_from_slice(&(*length as u32).to_le_bytes());
            record[8..16].copy_from_slice(&prev.to_le_bytes());
            record[17] = 10;
            record[24..].fill(0x5A);
            let crc = crc32c(record[24..].iter().chain(&record[..20]).copied());
            record[20..24].copy_from_slice(&crc.to_le_bytes());
            let mut begun = None;
            for (done, byte) in record.iter().enumerate() {
                if out.len().is_multiple_of(PAGE_BYTES as usize) {
                    page_header(&mut out, length - done, done > 0);
                }
                begun.get_or_insert(out.len());
                out.push(*byte);
            }
            prev = (SEGMENT + begun.unwrap()) as u64;
        }
        assert!(out.len() <= SEGMENT);
        out.resize(SEGMENT, 0);
        out
    }

    fn page_header(out: &mut Vec<u8>, remaining: usize, continues: bool) {
        let (at, long) = (SEGMENT + out.len(), out.is_empty());
        let mut header = [0; 40];
        header[..2].copy_from_slice(&0xD110_u16.to_le_bytes());
        header[2..4].copy_from_slice(&(u16::from(continues) | u16::from(long) << 1).to_le_bytes());
        header[4] = 1;
        header[8..16].copy_from_slice(&(at as u64).to_le_bytes());
        if continues {
            header[16..20].copy_from_slice(&(remaining as u32).to_le_bytes());
        }
        if long {
            header[24] = 77;
            header[32..36].copy_from_slice(&(SEGMENT as u32).to_le_bytes());
            header[36..40].copy_from_slice(&(PAGE_BYTES as u32).to_le_bytes());
        }
        out.extend_from_slice(if long { &header } else { &header[..24] });
    }

    /// In the last page, bytes alone do not show whether a segment is complete, but its records do.
    #[test]
    fn an_unfinished_segment_that_reaches_the_last_page_is_judged_by_its_records() {
        // Up to 3000 bytes before the end, minus a page header each.
        let most = SEGMENT - 3000 - 40 - 127 * 24;
        let (came, longer) = (records(&[100, most - 100]), records(&[100, most - 100, 1000]));
        assert!(came[SEGMENT - PAGE_BYTES as usize..].contains(&0x5A));
        assert_eq!(asked(Some(&longer), &came), (true, false), "PostgreSQL has a record more");
        assert_eq!(asked(Some(&came), &longer), (false, true), "what came has one more");
        // PostgreSQL has as much, but the fetched one may be complete, so it is handed over.
        assert_eq!(asked(Some(&came), &came), (false, true));
        // If it ends before the last page, it cannot be complete.
        let short = records(&[100, most / 2]);
        assert_eq!(asked(Some(&short), &short), (true, false));
        // A torn record does not count as more.
        let mut torn = longer.clone();
        torn[SEGMENT - 2500] ^= 1;
        assert_eq!(asked(Some(&torn), &came), (false, true));
        // Another history, however long.
        let mut other = longer.clone();
        other[SEGMENT / 2] ^= 1;
        assert_eq!(asked(Some(&other), &came), (false, true));
    }

    #[test]
    fn its_own_history_is_not_replaced_by_one_that_says_to_pass_over_it() {
        let directory = tempfile::tempdir().unwrap();
        let wal = directory.path().join("pg_wal");
        fs::create_dir(&wal).unwrap();
        let (file, path) = ("00000002.history".parse().unwrap(), wal.join("RECOVERYHISTORY"));
        fs::write(&path, PASSED_OVER).unwrap();
        assert!(!is_enough(file, &path).unwrap());
        fs::write(wal.join("00000002.history"), "1\t0/3000000\tx\n").unwrap();
        assert!(is_enough(file, &path).unwrap() && !path.exists());
        fs::write(&path, "1\t0/3000000\tx\n").unwrap();
        assert!(!is_enough(file, &path).unwrap());
    }

    #[test]
    fn only_postgresql_s_own_question_is_compared() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("somewhere");
        fs::write(&path, segment(1)).unwrap();
        assert!(!is_enough("000000010000000000000001".parse().unwrap(), &path).unwrap());
        assert!(path.exists());
    }
}
