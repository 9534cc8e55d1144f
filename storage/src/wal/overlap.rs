//! Digests of WAL pages: the two sides compare these without sending the WAL itself (P11). Pure.
//!
//! - There is one digest per page: the first 16 bytes of the SHA-256 of the part of the page inside the
//!   range.
//! - A difference is reported as the first page that differs. Pages that only one side has are not a
//!   difference.

use klio_pg::{Lsn, PAGE_BYTES};
use sha2::{Digest as _, Sha256};

/// Length of one digest in bytes: long enough that nobody can construct two pages with the same digest.
pub const DIGEST_BYTES: usize = 16;

/// Computes the digests of a run of WAL.
#[derive(Debug)]
pub struct PageDigests {
    position: Lsn,
    hasher: Sha256,
    /// The digests of the completed pages.
    done: Vec<u8>,
}

impl PageDigests {
    /// Starts a run at `start`, which must be the beginning of a page.
    pub fn new(start: Lsn) -> Self {
        Self { position: start, hasher: Sha256::new(), done: Vec::new() }
    }

    /// The LSN of the next byte.
    pub const fn position(&self) -> Lsn {
        self.position
    }

    pub fn push(&mut self, mut data: &[u8]) {
        while !data.is_empty() {
            let left = PAGE_BYTES - self.position.as_u64() % PAGE_BYTES;
            let take = usize::try_from(left).map_or(data.len(), |left| left.min(data.len()));
            self.hasher.update(&data[..take]);
            self.position = self.position.advance(take as u64);
            data = &data[take..];
            if self.position.as_u64().is_multiple_of(PAGE_BYTES) {
                self.end_page();
            }
        }
    }

    fn end_page(&mut self) {
        self.done.extend_from_slice(&self.hasher.finalize_reset()[..DIGEST_BYTES]);
    }

    /// The digests of all pages; the last page may be incomplete.
    pub fn finish(mut self) -> Vec<u8> {
        if !self.position.as_u64().is_multiple_of(PAGE_BYTES) {
            self.end_page();
        }
        self.done
    }
}

/// The number of digests of a run.
pub const fn pages(start: Lsn, end: Lsn) -> u64 {
    end.bytes_since(start).div_ceil(PAGE_BYTES)
}

/// The first page whose digests differ. Both lists begin at `start`.
pub fn first_difference(start: Lsn, ours: &[u8], theirs: &[u8]) -> Option<Lsn> {
    let pairs = ours.chunks_exact(DIGEST_BYTES).zip(theirs.chunks_exact(DIGEST_BYTES));
    let page = pairs.enumerate().find(|(_, (a, b))| a != b)?.0;
    Some(start.advance(page as u64 * PAGE_BYTES))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn digests(start: Lsn, bytes: &[u8], cut: usize) -> Vec<u8> {
        let mut digests = PageDigests::new(start);
        bytes.chunks(cut).for_each(|piece| digests.push(piece));
        digests.finish()
    }

    proptest! {
        #[test]
        fn the_page_of_a_changed_byte_is_named_however_both_sides_are_cut(
            length in 1usize..70_000, at in any::<prop::sample::Index>(), a in 1usize..20_000, b in 1usize..20_000,
        ) {
            let start = Lsn::new(3 << 20);
            let bytes: Vec<u8> = (0..length).map(|n| ((n * n) >> 5) as u8).collect();
            let ours = digests(start, &bytes, a);
            prop_assert_eq!(ours.len() as u64, pages(start, start.advance(length as u64)) * DIGEST_BYTES as u64);
            prop_assert_eq!(first_difference(start, &ours, &digests(start, &bytes, b)), None);
            let at = at.index(length);
            let mut other = bytes;
            other[at] ^= 0x10;
            let page = start.advance(at as u64 / PAGE_BYTES * PAGE_BYTES);
            prop_assert_eq!(first_difference(start, &ours, &digests(start, &other, b)), Some(page));
        }
    }

    #[test]
    fn what_only_one_side_has_is_no_difference() {
        let (start, bytes) = (Lsn::new(0), vec![7; 40_000]);
        let (whole, part) = (digests(start, &bytes, 999), digests(start, &bytes[..16_384], 999));
        assert_eq!(first_difference(start, &whole, &part), None);
        assert_eq!(first_difference(start, &[], &part), None);
    }
}
