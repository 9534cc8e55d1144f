//! Log sequence numbers: byte positions in the write-ahead log.
//!
//! The text form is PostgreSQL's `pg_lsn`: two hexadecimal halves, `16/B374D848`
//! (<https://www.postgresql.org/docs/current/datatype-pg-lsn.html>). It is serialized in this form.

use crate::SegmentSize;
use std::{fmt, str::FromStr};

/// A byte position in the WAL of one timeline. PostgreSQL uses `0/0` for "invalid".
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Lsn(u64);

impl Lsn {
    /// `0/0`, where no record ever is.
    pub const ZERO: Lsn = Lsn(0);

    pub const fn new(value: u64) -> Self {
        Self(value)
    }
    pub const fn as_u64(self) -> u64 {
        self.0
    }
    /// The position `bytes` further on, or `None` past the end of the address space.
    pub const fn checked_add(self, bytes: u64) -> Option<Lsn> {
        match self.0.checked_add(bytes) {
            Some(v) => Some(Lsn(v)),
            None => None,
        }
    }
    /// The position `bytes` further on, limited to the end of the address space, which no WAL
    /// reaches.
    pub const fn advance(self, bytes: u64) -> Lsn {
        Lsn(self.0.saturating_add(bytes))
    }
    /// Number of bytes from `earlier` to this position; 0 if `earlier` is not earlier.
    pub const fn bytes_since(self, earlier: Lsn) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
    /// The first byte of the segment that contains this byte.
    pub const fn segment_start(self, size: SegmentSize) -> Lsn {
        Lsn(self.0 - self.offset_in(size))
    }
    /// The offset of this byte in its segment.
    pub const fn offset_in(self, size: SegmentSize) -> u64 {
        self.0 & (size.bytes() - 1)
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

impl fmt::Debug for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text is not two hexadecimal halves joined by a slash.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected an LSN such as 16/B374D848, found {found:?}")]
pub struct ParseLsnError {
    found: String,
}

impl FromStr for Lsn {
    type Err = ParseLsnError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let half = |s: &str| {
            let plain = !s.is_empty() && s.len() <= 8 && s.bytes().all(|b| b.is_ascii_hexdigit());
            plain.then(|| u64::from_str_radix(s, 16).ok()).flatten()
        };
        text.split_once('/')
            .and_then(|(high, low)| Some(Lsn(half(high)? << 32 | half(low)?)))
            .ok_or_else(|| ParseLsnError { found: text.chars().take(40).collect() })
    }
}

impl serde::Serialize for Lsn {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Lsn {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(d)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_what_postgres_prints() {
        assert_eq!("16/B374D848".parse(), Ok(Lsn::new(0x16_B374_D848)));
        assert_eq!("0/0".parse(), Ok(Lsn::ZERO));
        assert_eq!("0/3000060".parse::<Lsn>().map(|l| l.to_string()), Ok("0/3000060".into()));
    }

    #[test]
    fn refuses_anything_else() {
        for bad in
            ["", "/", "1/", "/1", "1", "1/2/3", "+1/0", "0x1/0", "123456789/0", " 1/0", "1/g"]
        {
            assert!(bad.parse::<Lsn>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn knows_its_place_in_a_segment() {
        let size = SegmentSize::new(16 << 20).unwrap();
        let lsn = Lsn::new(0x0300_0060);
        assert_eq!(lsn.segment_start(size), Lsn::new(0x0300_0000));
        assert_eq!(lsn.offset_in(size), 0x60);
    }

    proptest! {
        #[test]
        fn text_round_trips(value: u64) {
            prop_assert_eq!(Lsn::new(value).to_string().parse(), Ok(Lsn::new(value)));
        }
    }
}
