//! Checks a stream of WAL: every 8 KiB page begins with a header that says where it belongs.
//!
//! Source: `src/include/access/xlog_internal.h`. Integers are little-endian, the byte order of every
//! platform that Klio is built for. The record data follows the header:
//!
//! | bytes | field | check |
//! |---|---|---|
//! | 0..2 | xlp_magic | the PostgreSQL version's |
//! | 2..4 | xlp_info | "long header" exactly at a segment's start |
//! | 4..8 | xlp_tli | the streamed timeline, or an ancestor below its switch point |
//! | 8..16 | xlp_pageaddr | this page's LSN |
//! | 16..20 | xlp_rem_len | - |
//! | 24..32 | xlp_sysid (long) | the pinned system identifier |
//! | 32..36 | xlp_seg_size (long) | the pinned segment size |
//! | 36..40 | xlp_xlog_blcksz (long) | 8192 |
//!
//! After a segment switch (`pg_switch_wal`, `archive_timeout`) PostgreSQL leaves the rest of the segment
//! zero, including the page headers. A page without a header is therefore accepted only if everything up
//! to the segment's end is zero.
//!
//! The checker sees the bytes in order; a header may be split between two messages.

use crate::{Lsn, SegmentSize, TimelineHistory, TimelineId};

/// XLOG_BLCKSZ of every packaged PostgreSQL. A different size is refused by the check of the long
/// header.
pub const PAGE_BYTES: u64 = 8192;

const SHORT_HEADER: usize = 24;
const LONG_HEADER: usize = 40;
const XLP_LONG_HEADER: u16 = 0x0002;

/// What every page of a stream has to match.
#[derive(Debug, Clone)]
pub struct PageExpectation {
    /// Pinned at first contact (P8).
    pub system_identifier: u64,
    /// Pinned at first contact.
    pub segment_size: SegmentSize,
    /// server_version_num divided by 10000; determines xlp_magic.
    pub postgres_major: u32,
    /// The streamed timeline with its ancestors.
    pub history: TimelineHistory,
}

/// WAL that does not belong where it was sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("check WAL page at {page}: expected {field} {expected}, found {found}")]
pub struct PageError {
    /// LSN of the page.
    pub page: Lsn,
    /// The name of the header field.
    pub field: &'static str,
    pub expected: String,
    pub found: String,
}

/// Checks the page headers of a stream of WAL that may begin anywhere and has no holes.
#[derive(Debug)]
pub struct PageChecker {
    expect: PageExpectation,
    position: Lsn,
    /// The first part of a header whose rest has not arrived yet.
    header: [u8; LONG_HEADER],
    header_len: usize,
    in_header: bool,
    /// Where the zeros after a segment switch began.
    zeros_from: Option<Lsn>,
}

/// XLOG_PAGE_MAGIC by major version; `None` for versions that this program does not know yet.
const fn magic_of(postgres_major: u32) -> Option<u16> {
    match postgres_major {
        15 => Some(0xD110),
        16 => Some(0xD113),
        17 => Some(0xD116),
        18 => Some(0xD118),
        _ => None,
    }
}

impl PageChecker {
    /// Creates a checker whose first byte is at `start`. Bytes before the first page boundary cannot be
    /// checked and are accepted: they continue a page whose header was checked when it arrived.
    pub fn new(expect: PageExpectation, start: Lsn) -> Self {
        let in_header = start.as_u64().is_multiple_of(PAGE_BYTES);
        Self {
            expect,
            position: start,
            header: [0; LONG_HEADER],
            header_len: 0,
            in_header,
            zeros_from: None,
        }
    }

    /// The LSN of the next byte.
    pub const fn position(&self) -> Lsn {
        self.position
    }

    /// Checks the next bytes.
    ///
    /// # Errors
    /// The first header that does not match. The checker cannot be used after that.
    pub fn check(&mut self, mut data: &[u8]) -> Result<(), PageError> {
        while !data.is_empty() {
            let offset = self.position.as_u64() % PAGE_BYTES;
            if self.position.offset_in(self.expect.segment_size) == 0 {
                self.zeros_from = None;
            }
            if let Some(from) = self.zeros_from {
                data = self.check_zeros(from, data)?;
                continue;
            }
            if offset == 0 {
                self.in_header = true;
                self.header_len = 0;
            }
            let take = if self.in_header {
                let want = self.header_bytes() - self.header_len;
                let take = want.min(data.len());
                self.header[self.header_len..self.header_len + take].copy_from_slice(&data[..take]);
                self.header_len += take;
                take
            } else {
                data.len().min((PAGE_BYTES - offset) as usize)
            };
            self.position = self.position.advance(take as u64);
            data = &data[take..];
            if self.in_header && self.header_len == self.header_bytes() {
                self.in_header = false;
                self.check_header()?;
            }
        }
        Ok(())
    }

    /// Checks zeros after a segment switch, and returns the data behind the segment.
    fn check_zeros<'a>(&mut self, from: Lsn, data: &'a [u8]) -> Result<&'a [u8], PageError> {
        let size = self.expect.segment_size;
        let left = size.bytes() - self.position.offset_in(size);
        let take = data.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let (zeros, rest) = data.split_at(take);
        if let Some(at) = zeros.iter().position(|b| *b != 0) {
            return Err(PageError {
                page: from,
                field: "page without a header, so zeros up to the end of the segment,",
                expected: "0".into(),
                found: format!("{} at {}", zeros[at], self.position.advance(at as u64)),
            });
        }
        self.position = self.position.advance(take as u64);
        Ok(rest)
    }

    /// The page whose header is being read.
    fn page(&self) -> Lsn {
        Lsn::new(self.position.as_u64() - self.header_len as u64)
    }

    fn header_bytes(&self) -> usize {
        if self.page().offset_in(self.expect.segment_size) == 0 {
            LONG_HEADER
        } else {
            SHORT_HEADER
        }
    }

    fn check_header(&mut self) -> Result<(), PageError> {
        let page = self.page();
        let starts_segment = page.offset_in(self.expect.segment_size) == 0;
        if !starts_segment && self.header[..SHORT_HEADER] == [0; SHORT_HEADER] {
            self.zeros_from = Some(page);
            return Ok(());
        }
        let number = |at: usize, len: usize| {
            self.header[at..at + len].iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b))
        };
        let equal = |field, expected: u64, found: u64, hex: bool| {
            let show = |n: u64| if hex { format!("{n:#X}") } else { n.to_string() };
            if expected == found {
                return Ok(());
            }
            Err(PageError { page, field, expected: show(expected), found: show(found) })
        };
        let magic = number(0, 2);
        // A newer PostgreSQL than this program knows: the magic number only grows.
        let expected = magic_of(self.expect.postgres_major).map_or(magic.max(0xD119), u64::from);
        equal("xlp_magic", expected, magic, true)?;
        let at = Lsn::new(number(8, 8));
        if at != page {
            let (expected, found) = (page.to_string(), at.to_string());
            return Err(PageError { page, field: "xlp_pageaddr", expected, found });
        }
        self.check_timeline(page, number(4, 4) as u32)?;
        let long = number(2, 2) as u16 & XLP_LONG_HEADER != 0;
        equal("xlp_info long header flag", starts_segment.into(), long.into(), false)?;
        if starts_segment {
            equal("xlp_sysid", self.expect.system_identifier, number(24, 8), false)?;
            equal("xlp_seg_size", self.expect.segment_size.bytes(), number(32, 4), false)?;
            equal("xlp_xlog_blcksz", PAGE_BYTES, number(36, 4), false)?;
        }
        Ok(())
    }

    /// A new timeline's first segment repeats its parent's bytes up to the switch point, with the
    /// parent's number in their headers. The page that contains the switch point keeps the parent's
    /// number.
    fn check_timeline(&self, page: Lsn, found: u32) -> Result<(), PageError> {
        let history = &self.expect.history;
        let own = history.timeline();
        let after_switch = history.switch_point().is_none_or(|switch| page >= switch);
        let good = if after_switch {
            found == own.get()
        } else {
            TimelineId::new(found)
                .is_some_and(|t| t == own || history.entries().iter().any(|e| e.timeline == t))
        };
        if good {
            return Ok(());
        }
        let expected = if after_switch {
            own.get().to_string()
        } else {
            format!("{} or an ancestor", own.get())
        };
        Err(PageError { page, field: "xlp_tli", expected, found: found.to_string() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SEGMENT: u32 = 1 << 20;

    fn expectation() -> PageExpectation {
        PageExpectation {
            system_identifier: 77,
            segment_size: SegmentSize::new(SEGMENT).unwrap(),
            postgres_major: 15,
            history: TimelineHistory::root(TimelineId::new(1).unwrap()),
        }
    }

    fn wal(start: u64, pages: u64) -> Vec<u8> {
        let mut out = Vec::new();
        for n in 0..pages {
            let at = start + n * PAGE_BYTES;
            let long = at.is_multiple_of(u64::from(SEGMENT));
            let mut page = vec![0xAB; PAGE_BYTES as usize];
            page[0..2].copy_from_slice(&0xD110u16.to_le_bytes());
            page[2..4].copy_from_slice(&(if long { 2u16 } else { 0 }).to_le_bytes());
            page[4..8].copy_from_slice(&1u32.to_le_bytes());
            page[8..16].copy_from_slice(&at.to_le_bytes());
            if long {
                page[24..32].copy_from_slice(&77u64.to_le_bytes());
                page[32..36].copy_from_slice(&SEGMENT.to_le_bytes());
                page[36..40].copy_from_slice(&8192u32.to_le_bytes());
            }
            out.extend(page);
        }
        out
    }

    proptest! {
        #[test]
        fn good_wal_passes_however_it_is_cut(start in 0usize..20000, cuts in prop::collection::vec(1usize..9000, 1..40)) {
            let all = wal(u64::from(SEGMENT) * 3 - 8192, 8);
            let base = u64::from(SEGMENT) * 3 - 8192;
            let mut checker = PageChecker::new(expectation(), Lsn::new(base + start as u64));
            let mut rest = &all[start..];
            for cut in cuts {
                let n = cut.min(rest.len());
                prop_assert_eq!(checker.check(&rest[..n]), Ok(()));
                rest = &rest[n..];
            }
            prop_assert_eq!(checker.check(rest), Ok(()));
        }

        #[test]
        fn a_flipped_bit_in_a_checked_field_is_found(byte in prop::sample::select(vec![0usize, 1, 4, 5, 8, 9, 12, 15, 24, 31, 32, 35, 36, 39]), bit in 0u8..8, cut in 1usize..9000) {
            let mut all = wal(u64::from(SEGMENT) * 3, 2);
            all[byte] ^= 1 << bit;
            let mut checker = PageChecker::new(expectation(), Lsn::new(u64::from(SEGMENT) * 3));
            let outcome = all.chunks(cut).try_for_each(|c| checker.check(c));
            prop_assert!(outcome.is_err());
        }
    }

    /// Found by streaming from a real PostgreSQL: after pg_switch_wal, whole pages are zero.
    #[test]
    fn zeros_after_a_switch_pass_up_to_the_end_of_the_segment_and_nowhere_else() {
        let base = u64::from(SEGMENT) * 3;
        let mut all = wal(base, u64::from(SEGMENT) / PAGE_BYTES + 2);
        all[3 * 8192..SEGMENT as usize].fill(0);
        for cut in [1000, 8192, 70_000, all.len()] {
            let mut checker = PageChecker::new(expectation(), Lsn::new(base));
            assert_eq!(all.chunks(cut).try_for_each(|c| checker.check(c)), Ok(()), "cut {cut}");
        }
        for bad in [3 * 8192 + 30, 5 * 8192 + 2, SEGMENT as usize - 1] {
            let mut damaged = all.clone();
            damaged[bad] = 7;
            let mut checker = PageChecker::new(expectation(), Lsn::new(base));
            assert!(damaged.chunks(5000).try_for_each(|c| checker.check(c)).is_err(), "{bad}");
        }
        all[SEGMENT as usize..].fill(0);
        let mut checker = PageChecker::new(expectation(), Lsn::new(base));
        assert!(checker.check(&all).is_err(), "a segment cannot begin with zeros");
    }

    #[test]
    fn wal_of_another_system_names_both_identifiers() {
        let mut expect = expectation();
        expect.system_identifier = 78;
        let error =
            PageChecker::new(expect, Lsn::new(1 << 20)).check(&wal(1 << 20, 1)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "check WAL page at 0/100000: expected xlp_sysid 78, found 77"
        );
    }

    #[test]
    fn a_new_timeline_may_begin_with_its_parents_pages() {
        let mut expect = expectation();
        let two = TimelineId::new(2).unwrap();
        expect.history = TimelineHistory::parse(two, b"1\t0/102100\tpromoted\n").unwrap();
        // Pages 0 and 1 begin below the switch point; page 2 is after it and must be timeline 2.
        let mut checker = PageChecker::new(expect, Lsn::new(1 << 20));
        let mut all = wal(1 << 20, 3);
        assert_eq!(checker.check(&all[..2 * 8192]), Ok(()));
        all[2 * 8192 + 4] = 2;
        assert_eq!(checker.check(&all[2 * 8192..]), Ok(()));
        let mut next = wal((1 << 20) + 3 * 8192, 1);
        next[4] = 1;
        assert!(checker.check(&next).is_err());
    }
}
