//! WAL segments: fixed-size pieces of a timeline, and their 24-digit file names.
//!
//! A name consists of the timeline, the high half of the LSN, and the segment's number within that
//! half, with eight hexadecimal digits each. With 16 MiB segments the last part runs from 00 to FF
//! (<https://www.postgresql.org/docs/current/wal-internals.html>).

use crate::{Lsn, TimelineId};
use std::{fmt, str::FromStr};

/// `wal_segment_size`: a power of two from 1 MiB to 1 GiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct SegmentSize(u32);

/// Not a size that PostgreSQL can be built with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "expected a WAL segment size that is a power of two from 1 MiB to 1 GiB, found {found} bytes"
)]
pub struct SegmentSizeError {
    found: u64,
}

impl SegmentSize {
    /// From the number of bytes.
    pub const fn new(bytes: u32) -> Result<Self, SegmentSizeError> {
        if bytes.is_power_of_two() && bytes >= 1 << 20 && bytes <= 1 << 30 {
            Ok(Self(bytes))
        } else {
            Err(SegmentSizeError { found: bytes as u64 })
        }
    }
    pub const fn bytes(self) -> u64 {
        self.0 as u64
    }
    /// The number of bytes, as PostgreSQL stores it.
    pub const fn as_u32(self) -> u32 {
        self.0
    }
    const fn per_high_half(self) -> u64 {
        (1 << 32) / self.bytes()
    }
}

impl TryFrom<u32> for SegmentSize {
    type Error = SegmentSizeError;
    fn try_from(bytes: u32) -> Result<Self, Self::Error> {
        Self::new(bytes)
    }
}

impl From<SegmentSize> for u32 {
    fn from(size: SegmentSize) -> u32 {
        size.0
    }
}

/// The file name of a segment. Ordered by timeline, then position.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentName {
    timeline: TimelineId,
    high: u32,
    low: u32,
}

impl SegmentName {
    /// The segment of `timeline` that contains the byte at `lsn`.
    pub const fn containing(timeline: TimelineId, lsn: Lsn, size: SegmentSize) -> Self {
        let number = lsn.as_u64() / size.bytes();
        Self {
            timeline,
            high: (number / size.per_high_half()) as u32,
            low: (number % size.per_high_half()) as u32,
        }
    }
    pub const fn timeline(self) -> TimelineId {
        self.timeline
    }
    /// The LSN of the first byte, or `None` when the name is impossible with this segment size.
    pub const fn start_lsn(self, size: SegmentSize) -> Option<Lsn> {
        if self.low as u64 >= size.per_high_half() {
            return None;
        }
        Some(Lsn::new(((self.high as u64) << 32) + self.low as u64 * size.bytes()))
    }
    /// The next segment of the same timeline.
    pub fn next(self, size: SegmentSize) -> Option<Self> {
        let next = self.start_lsn(size)?.checked_add(size.bytes())?;
        Some(Self::containing(self.timeline, next, size))
    }
}

impl fmt::Display for SegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:08X}{:08X}", self.timeline, self.high, self.low)
    }
}

impl fmt::Debug for SegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text is not the file name of a segment.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected a segment name of 24 upper-case hexadecimal digits, found {found:?}")]
pub struct ParseSegmentError {
    found: String,
}

impl FromStr for SegmentName {
    type Err = ParseSegmentError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let part = |range| text.get(range).and_then(|s| u32::from_str_radix(s, 16).ok());
        let plain = text.len() == 24
            && text.bytes().all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b));
        plain
            .then(|| {
                let timeline = TimelineId::new(part(0..8)?)?;
                Some(Self { timeline, high: part(8..16)?, low: part(16..24)? })
            })
            .flatten()
            .ok_or_else(|| ParseSegmentError { found: text.chars().take(60).collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tli(n: u32) -> TimelineId {
        TimelineId::new(n).unwrap()
    }

    #[test]
    fn names_match_postgres() {
        let size = SegmentSize::new(16 << 20).unwrap();
        let name = SegmentName::containing(tli(1), Lsn::new(0x1_FF00_0010), size);
        assert_eq!(name.to_string(), "0000000100000001000000FF");
        assert_eq!(name.next(size).unwrap().to_string(), "000000010000000200000000");
        assert_eq!(name.start_lsn(size), Some(Lsn::new(0x1_FF00_0000)));
    }

    #[test]
    fn a_name_that_cannot_exist_with_the_size_has_no_lsn() {
        let name: SegmentName = "000000010000000000000100".parse().unwrap();
        assert_eq!(name.start_lsn(SegmentSize::new(16 << 20).unwrap()), None);
        assert!(name.start_lsn(SegmentSize::new(1 << 20).unwrap()).is_some());
    }

    #[test]
    fn refuses_what_is_not_a_segment_name() {
        for bad in [
            "",
            "00000001",
            "00000001000000000000000g",
            "00000001000000000000000a",
            "000000000000000000000001",
            "../../../../etc/passwd00",
            "0000000100000000000000010",
            "000000010000000000000001.partial",
            "+00000010000000000000001",
        ] {
            assert!(bad.parse::<SegmentName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn only_sizes_postgres_can_have() {
        for bad in [0, 1, 1 << 19, 3 << 20, 1 << 31] {
            assert!(SegmentSize::new(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn name_and_position_agree(lsn: u64, t in 1u32.., power in 20u32..=30) {
            let size = SegmentSize::new(1 << power).unwrap();
            let name = SegmentName::containing(tli(t), Lsn::new(lsn), size);
            prop_assert_eq!(name.to_string().parse(), Ok(name));
            prop_assert_eq!(name.start_lsn(size), Some(Lsn::new(lsn).segment_start(size)));
        }
    }
}
