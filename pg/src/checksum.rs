//! Checksums of data pages.
//!
//! The algorithm of PostgreSQL's `src/include/storage/checksum_impl.h`, a variant of FNV-1a: 32 parallel sums run over
//! a page's 32-bit words and then over two rounds of zeros. All sums and the block number are combined by XOR, and the
//! result is reduced modulo 65535, plus one. The checksum field itself counts as zero. The sums are independent of
//! each other, so the compiler uses vector instructions; the example `checksum_speed` measures the effect.
//!
//! A page's header (`storage/bufpage.h`): LSN as two 32-bit halves at 0, checksum at 8, flags at 10, lower
//! at 12, upper at 14. Integers are little-endian, as on every machine that Klio runs on.

use crate::Lsn;

/// Number of parallel sums.
const LANES: usize = 32;
/// Number of bytes that all lanes consume in one step.
const ROW_BYTES: usize = LANES * 4;
const FNV_PRIME: u32 = 16_777_619;
/// Offset of the checksum in a page.
const CHECKSUM_AT: usize = 8;

/// The initial value of each lane.
const OFFSETS: [u32; LANES] = [
    0x5B1F_36E9,
    0xB852_5960,
    0x02AB_50AA,
    0x1DE6_6D2A,
    0x79FF_467A,
    0x9BB9_F8A3,
    0x217E_7CD2,
    0x83E1_3D2C,
    0xF8D4_474F,
    0xE39E_B970,
    0x42C6_AE16,
    0x9932_16FA,
    0x7B09_3B5D,
    0x98DA_FF3C,
    0xF718_902A,
    0x0B1C_9CDB,
    0xE58F_764B,
    0x1876_36BC,
    0x5D7B_3BB1,
    0xE73D_E7DE,
    0x92BE_C979,
    0xCCA6_C0B2,
    0x304A_0979,
    0x85AA_43D4,
    0x7831_25BB,
    0x6CA8_EAA2,
    0xE407_EAC6,
    0x4B5C_FC3E,
    0x9FBF_8C76,
    0x15CA_20BE,
    0xF2CA_9FD3,
    0x959B_D756,
];

/// The parsed header of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageHeader {
    /// End of the WAL record that last changed the page.
    pub lsn: Lsn,
    /// The stored checksum.
    pub checksum: u16,
    /// Where free space ends; 0 in a page that was never written.
    pub upper: u16,
}

impl PageHeader {
    /// Length of the part of a page that is parsed.
    pub const BYTES: usize = 24;

    /// Parses the header; `None` if the page is shorter than a header.
    pub fn read(page: &[u8]) -> Option<Self> {
        let header: &[u8; Self::BYTES] = page.first_chunk()?;
        let half = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        let word = |at: usize| u64::from(half(at)) | u64::from(half(at + 2)) << 16;
        Some(Self {
            lsn: Lsn::new(word(0) << 32 | word(4)),
            checksum: half(CHECKSUM_AT),
            upper: half(14),
        })
    }

    /// Whether PostgreSQL never wrote the page: it then contains only zeros, without a checksum.
    pub const fn is_new(&self) -> bool {
        self.upper == 0
    }
}

#[inline(always)]
fn mix(sums: &mut [u32; LANES], words: &[u32; LANES]) {
    for (sum, word) in sums.iter_mut().zip(words) {
        let mixed = *sum ^ *word;
        *sum = mixed.wrapping_mul(FNV_PRIME) ^ (mixed >> 17);
    }
}

#[inline(always)]
fn words(row: &[u8]) -> [u32; LANES] {
    let mut words = [0; LANES];
    for (word, bytes) in words.iter_mut().zip(row.as_chunks::<4>().0) {
        *word = u32::from_le_bytes(*bytes);
    }
    words
}

/// The checksum a page should have. `block` is its number in the relation's fork, over all segments.
///
/// The page's length must be a multiple of 128 bytes, which is true for every block size of PostgreSQL; any
/// remainder is ignored.
pub fn page_checksum(page: &[u8], block: u32) -> u16 {
    let mut sums = OFFSETS;
    let mut rows = page.chunks_exact(ROW_BYTES);
    if let Some(first) = rows.next() {
        let mut row = words(first);
        // Checksum and flags share this word.
        row[CHECKSUM_AT / 4] &= 0xFFFF_0000;
        mix(&mut sums, &row);
    }
    for row in rows {
        mix(&mut sums, &words(row));
    }
    mix(&mut sums, &[0; LANES]);
    mix(&mut sums, &[0; LANES]);
    let folded = sums.iter().fold(0, |all, sum| all ^ sum) ^ block;
    (folded % 65_535 + 1) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Blocks 2 and 3 of a pg_class from `initdb -k` of PostgreSQL 15.
    const REAL: &[u8; 16_384] = include_bytes!("../testdata/pg_class_pages_2_3.bin");

    #[test]
    fn checksums_are_those_that_postgres_writes() {
        for (block, page) in [(2, &REAL[..8192]), (3, &REAL[8192..])] {
            let header = PageHeader::read(page).unwrap();
            assert_eq!(header.checksum, page_checksum(page, block), "block {block}");
            assert_ne!(header.checksum, page_checksum(page, block + 131_072), "another segment");
        }
    }

    /// The header of a page that was written.
    fn page() -> Vec<u8> {
        let mut page = vec![0_u8; 8192];
        page[..8].copy_from_slice(&[0, 0, 0, 0, 0x28, 0x19, 0x51, 0x01]);
        page[12..20].copy_from_slice(&[28, 0, 0xE0, 0x1F, 0, 0x20, 4, 0x20]);
        page
    }

    #[test]
    fn the_field_itself_does_not_count_and_everything_else_does() {
        let good = page();
        let sum = page_checksum(&good, 7);
        for at in 0..good.len() {
            let mut other = good.clone();
            other[at] ^= 0x10;
            let same = page_checksum(&other, 7) == sum;
            assert_eq!(same, (8..10).contains(&at), "byte {at}");
        }
        assert_ne!(page_checksum(&good, 8), sum, "a page at another place");
    }

    #[test]
    fn a_header_is_read_as_postgres_writes_it() {
        let header = PageHeader::read(&page()).unwrap();
        assert_eq!(header.lsn, "0/1511928".parse().unwrap());
        assert!(!header.is_new());
        assert!(PageHeader::read(&[0; 8192]).unwrap().is_new());
        assert_eq!(PageHeader::read(&[0; 23]), None);
    }

    #[test]
    fn a_checksum_is_never_zero() {
        for block in 0..2000 {
            assert_ne!(page_checksum(&[0; 1024], block), 0);
        }
    }
}
