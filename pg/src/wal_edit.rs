//! Removes the location from the WAL record of `CREATE TABLESPACE`, so that its replay touches no place outside of the
//! data directory. PostgreSQL then creates `pg_tblspc/<oid>` itself, or uses it if it exists
//! (`create_tablespace_directories` in tablespace.c, the same in PostgreSQL 15 to 18; an existing link is used
//! unchanged).
//!
//! Only a copy of the WAL is changed, on its way to a restored cluster, byte by byte at known positions: the first byte
//! of the location becomes zero, and the record's CRC is recomputed. Its length stays the same. The format of a record
//! is described in `wal_record.rs`, its main data in `wal_change.rs`.

use crate::{Lsn, PAGE_BYTES, SegmentSize, number::number};

const SHORT_HEADER: u64 = 24;
const LONG_HEADER: u64 = 40;
const RECORD_HEADER: usize = 24;
/// A location has at most 1023 bytes (MAXPGPATH).
const RECORD_MAX: u64 = 2048;
/// The length of WAL that contains such a record, wherever it begins.
pub const TABLESPACE_RECORD_SPAN: u64 = RECORD_MAX + 2 * LONG_HEADER;

/// One byte of WAL that differs in the copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Edit {
    pub at: Lsn,
    /// The byte that PostgreSQL wrote.
    pub old: u8,
    /// The byte in the copy.
    pub new: u8,
}

impl std::fmt::Display for Edit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {:02x} {:02x}", self.at, self.old, self.new)
    }
}

impl std::str::FromStr for Edit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("expected a position and two bytes, found {text:?}");
        let words: Vec<&str> = text.split_whitespace().collect();
        let [at, old, new] = words[..] else { return Err(wrong()) };
        let byte = |word| u8::from_str_radix(word, 16).map_err(|_| wrong());
        Ok(Self { at: at.parse().map_err(|_| wrong())?, old: byte(old)?, new: byte(new)? })
    }
}

/// The edits for the record that begins at `lsn`; `wal` is the WAL from there on. `None` for anything but a complete
/// `CREATE TABLESPACE` record with a location.
pub fn tablespace_in_place(size: SegmentSize, lsn: Lsn, wal: &[u8]) -> Option<Vec<Edit>> {
    let bytes = record(size, lsn, wal)?;
    let old: Vec<u8> = bytes.iter().map(|(_, byte)| *byte).collect();
    if crc(&old).to_le_bytes() != old[20..24] {
        return None;
    }
    let mut new = old.clone();
    let location = main_data(&old)? + 4;
    if *new.get(location)? == 0 {
        return None;
    }
    new[location] = 0;
    let sum = crc(&new).to_le_bytes();
    new[20..24].copy_from_slice(&sum);
    let edits = bytes.iter().zip(&new).filter(|((_, old), new)| old != *new);
    Some(edits.map(|((at, old), new)| Edit { at: *at, old: *old, new: *new }).collect())
}

/// Applies those of the edits that are inside a segment.
///
/// # Errors
/// The position where the segment has a byte other than the expected one: it is not the WAL that the edits were made
/// for.
pub fn edit_segment(edits: &[Edit], start: Lsn, segment: &mut [u8]) -> Result<bool, Lsn> {
    let mut changed = false;
    for edit in edits.iter().filter(|edit| edit.at >= start) {
        let place = usize::try_from(edit.at.bytes_since(start)).ok();
        let Some(byte) = place.and_then(|place| segment.get_mut(place)) else { continue };
        if *byte != edit.old && *byte != edit.new {
            return Err(edit.at);
        }
        changed |= *byte != edit.new;
        *byte = edit.new;
    }
    Ok(changed)
}

/// A record's bytes, without the page headers between them.
fn record(size: SegmentSize, lsn: Lsn, wal: &[u8]) -> Option<Vec<(Lsn, u8)>> {
    let mut bytes = Vec::new();
    let mut at = lsn;
    let mut total = u64::MAX;
    while (bytes.len() as u64) < total {
        if at.as_u64().is_multiple_of(PAGE_BYTES) {
            at = at.advance(if at.offset_in(size) == 0 { LONG_HEADER } else { SHORT_HEADER });
        }
        let place = usize::try_from(at.bytes_since(lsn)).ok()?;
        bytes.push((at, *wal.get(place)?));
        at = at.advance(1);
        if bytes.len() == 4 {
            let length: Vec<u8> = bytes.iter().map(|(_, byte)| *byte).collect();
            total = number(&length);
            if !(RECORD_HEADER as u64..=RECORD_MAX).contains(&total) {
                return None;
            }
        }
    }
    Some(bytes)
}

fn crc(record: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&record[RECORD_HEADER..]), &record[..20])
}

/// Where the main data begins, behind the headers of the replication origin (253) and the top-level transaction (252).
fn main_data(record: &[u8]) -> Option<usize> {
    let mut at = RECORD_HEADER;
    loop {
        at += match record.get(at)? {
            253 => 3,
            252 => 5,
            255 => return Some(at + 2),
            254 => return Some(at + 5),
            _ => return None,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size() -> SegmentSize {
        SegmentSize::new(1 << 20).unwrap()
    }

    /// A record at `lsn`, with page headers of 0xEE between its bytes.
    fn wal(lsn: Lsn, location: &str) -> Vec<u8> {
        let mut main = 16_400_u32.to_le_bytes().to_vec();
        main.extend(location.as_bytes());
        main.push(0);
        let mut record = vec![0; RECORD_HEADER];
        record.extend([255, u8::try_from(main.len()).unwrap()]);
        record.extend(&main);
        let total = u32::try_from(record.len()).unwrap();
        record[..4].copy_from_slice(&total.to_le_bytes());
        record[17] = 5;
        let sum = crc(&record).to_le_bytes();
        record[20..24].copy_from_slice(&sum);
        let (mut wal, mut at) = (Vec::new(), lsn);
        for byte in record {
            if at.as_u64().is_multiple_of(PAGE_BYTES) {
                let header = if at.offset_in(size()) == 0 { LONG_HEADER } else { SHORT_HEADER };
                wal.extend(vec![0xEE; usize::try_from(header).unwrap()]);
                at = at.advance(header);
            }
            wal.push(byte);
            at = at.advance(1);
        }
        wal
    }

    #[test]
    fn the_location_is_taken_out_wherever_pages_and_segments_part_the_record() {
        for back in [8, 16, 24, 32, 40, 4096] {
            for page in [3 * PAGE_BYTES, 2 << 20] {
                let lsn = Lsn::new(page - back);
                let mut wal = wal(lsn, "/srv/tablespaces/x");
                let edits = tablespace_in_place(size(), lsn, &wal).unwrap();
                assert!(!edit_segment(&edits, Lsn::new(4 << 20), &mut wal.clone()).unwrap());
                assert!(edit_segment(&edits, lsn, &mut wal).unwrap());
                let bytes: Vec<u8> =
                    record(size(), lsn, &wal).unwrap().into_iter().map(|(_, byte)| byte).collect();
                assert_eq!(crc(&bytes).to_le_bytes(), bytes[20..24], "{lsn}");
                assert_eq!((bytes[30], bytes[31]), (0, b's'));
                // Repeated: there is nothing left to remove, and nothing to do.
                assert_eq!(tablespace_in_place(size(), lsn, &wal), None);
                assert!(!edit_segment(&edits, lsn, &mut wal).unwrap());
                wal.iter_mut().for_each(|byte| *byte ^= 0x55);
                assert!(edit_segment(&edits, lsn, &mut wal).is_err());
            }
        }
    }

    #[test]
    fn what_is_no_such_record_is_left_alone() {
        let lsn = Lsn::new(PAGE_BYTES + 100 * 8);
        let good = wal(lsn, "/x");
        assert!(tablespace_in_place(size(), lsn, &good[..good.len() - 1]).is_none());
        let mut bad = good.clone();
        bad[28] ^= 1;
        assert!(tablespace_in_place(size(), lsn, &bad).is_none());
        assert!(tablespace_in_place(size(), lsn, &[0; 4096]).is_none());
    }

    #[test]
    fn edits_are_text_and_back() {
        let edit = Edit { at: "1/23456789".parse().unwrap(), old: b'/', new: 0 };
        assert_eq!(edit.to_string(), "1/23456789 2f 00");
        assert_eq!(edit.to_string().parse(), Ok(edit));
        for bad in ["", "1/2 00", "1/2 0 zz", "x 00 00", "1/2 00 00 00"] {
            assert!(bad.parse::<Edit>().is_err(), "{bad}");
        }
    }
}
