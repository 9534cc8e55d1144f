//! The first bytes of a WAL segment: XLogLongPageHeaderData, whose table is in `page.rs`.
//!
//! It says to which PostgreSQL, timeline and position a file belongs, so that a file with a wrong name is not
//! replayed.

use crate::{Lsn, SegmentName, SegmentSize, TimelineId};

/// `SizeOfXLogLongPHD`.
pub const SEGMENT_HEADER_BYTES: usize = 40;

const XLP_LONG_HEADER: u16 = 0x0002;

/// The parsed header of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentHeader {
    /// The timeline of the first page: the segment's own, or an ancestor's whose bytes the segment begins with.
    pub timeline: TimelineId,
    /// LSN of the segment's first byte.
    pub start: Lsn,
    pub system_identifier: u64,
    pub segment_size: SegmentSize,
}

/// Bytes with which no segment of that name begins.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("check the first page: expected {field} {expected}, found {found}")]
pub struct SegmentHeaderError {
    /// The name of the header field.
    pub field: &'static str,
    pub expected: String,
    pub found: String,
}

fn wrong(
    field: &'static str,
    expected: impl std::fmt::Display,
    found: impl std::fmt::Display,
) -> SegmentHeaderError {
    SegmentHeaderError { field, expected: expected.to_string(), found: found.to_string() }
}

impl SegmentHeader {
    /// Parses the beginning of a segment.
    ///
    /// # Errors
    /// The field that is invalid.
    pub fn parse(bytes: &[u8; SEGMENT_HEADER_BYTES]) -> Result<Self, SegmentHeaderError> {
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let word = |at: usize| u32::from(half(at)) | u32::from(half(at + 2)) << 16;
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        // Every XLOG_PAGE_MAGIC since PostgreSQL 9.6 is 0xD0xx or 0xD1xx; PostgreSQL checks the rest.
        if !matches!(half(0) >> 8, 0xD0 | 0xD1) {
            return Err(wrong("magic", "0xD1xx", format_args!("{:#06X}", half(0))));
        }
        if half(2) & XLP_LONG_HEADER == 0 {
            return Err(wrong("page header", "a long one, as at a segment's start", "a short one"));
        }
        let timeline = TimelineId::new(word(4)).ok_or_else(|| wrong("timeline", "from 1", 0))?;
        let segment_size = SegmentSize::new(word(32))
            .map_err(|error| wrong("segment size", "a power of two", error))?;
        let start = Lsn::new(long(8));
        Ok(Self { timeline, start, system_identifier: long(24), segment_size })
    }

    /// Checks that a segment of this name can begin with this header.
    ///
    /// # Errors
    /// The field that does not match.
    pub fn belongs_to(&self, name: SegmentName) -> Result<(), SegmentHeaderError> {
        let start = name.start_lsn(self.segment_size);
        if start != Some(self.start) {
            let expected = start.map_or_else(|| "of that segment".into(), |s| s.to_string());
            return Err(wrong("position", expected, self.start));
        }
        if self.timeline > name.timeline() {
            let expected = format!("{} or an ancestor", name.timeline());
            return Err(wrong("timeline", expected, self.timeline));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(timeline: u32, start: u64, system: u64, size: u32) -> [u8; SEGMENT_HEADER_BYTES] {
        let mut bytes = [0; SEGMENT_HEADER_BYTES];
        bytes[..2].copy_from_slice(&0xD116_u16.to_le_bytes());
        bytes[2..4].copy_from_slice(&XLP_LONG_HEADER.to_le_bytes());
        bytes[4..8].copy_from_slice(&timeline.to_le_bytes());
        bytes[8..16].copy_from_slice(&start.to_le_bytes());
        bytes[24..32].copy_from_slice(&system.to_le_bytes());
        bytes[32..36].copy_from_slice(&size.to_le_bytes());
        bytes
    }

    #[test]
    fn a_segment_belongs_to_its_name_and_to_no_other() {
        let found = SegmentHeader::parse(&header(2, 5 << 24, 42, 1 << 24)).unwrap();
        assert_eq!(found.system_identifier, 42);
        let belongs = |name: &str| found.belongs_to(name.parse().unwrap()).is_ok();
        assert!(belongs("000000020000000000000005"));
        // The first segment of a descendant repeats its parent's bytes.
        assert!(belongs("000000030000000000000005"));
        assert!(!belongs("000000010000000000000005"));
        assert!(!belongs("000000020000000000000006"));
        assert!(!belongs("000000020000000100000005"));
    }

    #[test]
    fn what_is_no_segment_is_refused() {
        assert!(SegmentHeader::parse(&[0; SEGMENT_HEADER_BYTES]).is_err());
        assert!(SegmentHeader::parse(&header(0, 0, 1, 1 << 24)).is_err());
        assert!(SegmentHeader::parse(&header(1, 0, 1, 3)).is_err());
        let mut short = header(1, 0, 1, 1 << 24);
        short[2] = 0;
        assert!(SegmentHeader::parse(&short).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_give_an_answer(bytes: [u8; 32], end: [u8; 8]) {
            let mut all = [0; SEGMENT_HEADER_BYTES];
            all[..32].copy_from_slice(&bytes);
            all[32..].copy_from_slice(&end);
            let _ = SegmentHeader::parse(&all);
        }
    }
}
