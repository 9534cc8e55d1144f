//! Finds XLOG_PARAMETER_CHANGE in a stream of WAL without parsing all records, at the speed of memory and starting at
//! any byte, as a receiver sees it.
//!
//! The record (`xl_parameter_change`) is always 54 bytes long: 24 bytes of header, 2 of data header, 28 of data. It
//! begins at a multiple of 8 and may have page headers between its bytes. A candidate must have a correct checksum, and
//! the previous record that it names must come before it. User data with a copy of such a record at such a position is
//! taken for one, but nobody writes that by accident.

use crate::{
    Lsn, PAGE_BYTES, SegmentSize,
    number::number,
    wal_change::{self, WalParameters},
};

const RECORD: usize = 54;
const HEADER: usize = 24;
const INFO: u8 = 0x60;
/// The length of a record with a long page header between its bytes.
const SPAN: usize = RECORD + 40;

/// Scans WAL in pieces of any size.
#[derive(Debug, Clone)]
pub struct LevelScan {
    size: SegmentSize,
    /// The LSN of the next byte.
    position: Lsn,
    /// The last bytes, starting at a multiple of 8, in which a record may have begun.
    rest: Vec<u8>,
}

enum Look {
    No,
    /// It may be one; more bytes are needed to decide.
    More,
    Yes(WalParameters),
}

impl LevelScan {
    pub const fn new(size: SegmentSize) -> Self {
        Self { size, position: Lsn::ZERO, rest: Vec::new() }
    }

    /// Scans the bytes at `at`. A piece that does not continue the previous one starts a new scan.
    pub fn push(&mut self, at: Lsn, data: &[u8], found: &mut dyn FnMut(Lsn, WalParameters)) {
        if at != self.position {
            self.rest.clear();
        }
        self.position = at.advance(data.len() as u64);
        // A record that began in the earlier bytes is checked with as many of the new bytes as it can need.
        let mut both = std::mem::take(&mut self.rest);
        let (begun, old) = (Lsn::new(at.as_u64() - both.len() as u64), both.len());
        if !both.is_empty() {
            both.extend_from_slice(&data[..data.len().min(SPAN)]);
        }
        self.rest = if both.is_empty() {
            self.scan(at, data, usize::MAX, found)
        } else if data.len() <= SPAN {
            self.scan(begun, &both, usize::MAX, found)
        } else {
            self.scan(begun, &both, old, found);
            self.scan(at, data, usize::MAX, found)
        };
    }

    /// Scans the positions below `limit`; returns the bytes that have to be scanned again with more data.
    fn scan(
        &self,
        at: Lsn,
        data: &[u8],
        limit: usize,
        found: &mut dyn FnMut(Lsn, WalParameters),
    ) -> Vec<u8> {
        let first = (at.as_u64().wrapping_neg() % 8) as usize;
        for offset in (first..data.len().min(limit)).step_by(8) {
            let Some(length) = data.get(offset..offset + 4) else {
                return data[offset..].to_vec();
            };
            if number(length) != RECORD as u64 {
                continue;
            }
            let place = at.advance(offset as u64);
            match self.look(place, &data[offset..]) {
                Look::No => {}
                Look::More => return data[offset..].to_vec(),
                Look::Yes(parameters) => found(place, parameters),
            }
        }
        Vec::new()
    }

    fn look(&self, place: Lsn, data: &[u8]) -> Look {
        let mut record = [0; RECORD];
        let mut got = 0;
        let mut at = place;
        let mut data = data;
        while got < RECORD {
            if at.as_u64().is_multiple_of(PAGE_BYTES) {
                let header = if at.offset_in(self.size) == 0 { 40 } else { HEADER };
                let Some(rest) = data.get(header..) else { return Look::More };
                (data, at) = (rest, at.advance(header as u64));
            }
            let left = PAGE_BYTES - at.as_u64() % PAGE_BYTES;
            let take = (RECORD - got).min(left as usize);
            let Some(bytes) = data.get(..take) else {
                return if may_be(&record[..got], data) { Look::More } else { Look::No };
            };
            record[got..got + take].copy_from_slice(bytes);
            (got, data, at) = (got + take, &data[take..], at.advance(take as u64));
        }
        match check(&record, place) {
            Some(parameters) => Look::Yes(parameters),
            None => Look::No,
        }
    }
}

/// Whether the beginning of a record can still be of this kind.
fn may_be(got: &[u8], more: &[u8]) -> bool {
    let byte = |at: usize| got.get(at).or_else(|| more.get(at - got.len().min(at))).copied();
    byte(16).is_none_or(|info| info & 0xF0 == INFO) && byte(17).is_none_or(|rmid| rmid == 0)
}

fn check(record: &[u8; RECORD], place: Lsn) -> Option<WalParameters> {
    if record[16] & 0xF0 != INFO || record[17] != 0 {
        return None;
    }
    let crc = crc32c::crc32c_append(crc32c::crc32c(&record[HEADER..]), &record[..20]);
    let before = number(&record[8..16]) < place.as_u64();
    let right = u64::from(crc) == number(&record[20..24]) && before;
    // Main data of up to 255 bytes, with nothing before it.
    let main = right && record[HEADER] == 255 && usize::from(record[HEADER + 1]) == RECORD - 26;
    main.then(|| wal_change::parameters(&record[HEADER + 2..])).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::WalLevel;
    use proptest::prelude::*;

    const SEGMENT: u64 = 1 << 20;

    fn record(previous: u64, level: u32) -> Vec<u8> {
        let mut body: Vec<u8> = vec![255, 28];
        for field in [100u32, 8, 10, 0, 64, level] {
            body.extend(field.to_le_bytes());
        }
        body.extend([0; 4]);
        let mut header = Vec::new();
        header.extend((RECORD as u32).to_le_bytes());
        header.extend(0u32.to_le_bytes());
        header.extend(previous.to_le_bytes());
        header.extend([INFO, 0, 0, 0]);
        let crc = crc32c::crc32c_append(crc32c::crc32c(&body), &header);
        header.extend(crc.to_le_bytes());
        [header, body].concat()
    }

    /// WAL from `base` on with a record at each of these positions, which page headers may split; the rest is noise
    /// that looks like the beginning of a record everywhere.
    fn wal(base: u64, length: usize, places: &[u64]) -> Vec<u8> {
        let noise = [54, 0, 0, 0, 1, 2, 3, 4];
        let mut bytes: Vec<u8> = (0..length).map(|n| noise[n % 8]).collect();
        for place in places {
            let mut at = (place - base) as usize;
            for byte in record(place - 120, 0) {
                let lsn = base + at as u64;
                if lsn.is_multiple_of(PAGE_BYTES) {
                    at += if lsn.is_multiple_of(SEGMENT) { 40 } else { 24 };
                }
                bytes[at] = byte;
                at += 1;
            }
        }
        bytes
    }

    fn scan(base: u64, bytes: &[u8], cut: usize) -> Vec<u64> {
        let mut scan = LevelScan::new(SegmentSize::new(SEGMENT as u32).unwrap());
        let (mut found, mut at) = (Vec::new(), base);
        for piece in bytes.chunks(cut) {
            scan.push(Lsn::new(at), piece, &mut |lsn, parameters| {
                assert_eq!(parameters.wal_level, WalLevel::Minimal);
                found.push(lsn.as_u64());
            });
            at += piece.len() as u64;
        }
        found
    }

    #[test]
    fn the_last_bytes_that_came_are_enough() {
        let base = 3 * SEGMENT;
        let place = base + 4096;
        let bytes = wal(base, 4096 + RECORD, &[place]);
        assert_eq!(scan(base, &bytes, 1 << 20), [place]);
        assert_eq!(scan(base, &bytes[..bytes.len() - 1], 1 << 20), []);
    }

    #[test]
    fn a_flipped_bit_or_an_impossible_order_is_no_record() {
        let base = 3 * SEGMENT;
        let good = record(base, 0);
        for bit in 0..RECORD * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(scan(base + 8192 + 64, &bad, 64), [], "bit {bit}");
        }
        assert_eq!(scan(base + 8192 + 64, &good, 64), [base + 8192 + 64]);
        assert_eq!(scan(base + 8192 + 64, &record(base + 8192 + 64, 0), 64), []);
    }

    proptest! {
        #[test]
        fn records_are_found_however_wal_is_cut_and_wherever_a_page_ends(
            near in prop::collection::btree_set(1u64..60, 1..4),
            back in 0u64..12,
            cut in 1usize..9000,
            skew in 0u64..64,
        ) {
            // Around the ends of pages, the last of which is the end of a segment.
            let base = 4 * SEGMENT - 60 * PAGE_BYTES;
            let places: Vec<u64> = near.iter().map(|page| base + page * PAGE_BYTES - back * 8).collect();
            let places: Vec<u64> = places.into_iter().filter(|p| !p.is_multiple_of(PAGE_BYTES)).collect();
            let bytes = wal(base, 64 * PAGE_BYTES as usize, &places);
            prop_assert_eq!(scan(base, &bytes, cut), places.clone());
            let skewed = scan(base + skew, &bytes[skew as usize..], cut);
            prop_assert_eq!(skewed, places);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..9000), cut in 1usize..200, at in 0u64..9000) {
            scan(at, &bytes, cut);
        }
    }
}
