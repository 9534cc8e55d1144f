//! SHA-256 of stored bytes: recorded in jobs and used to prove an object (P5).
//!
//! The text form is 64 lower-case hexadecimal digits, as `sha256sum` prints it.

use sha2::{Digest, Sha256};
use std::{fmt, io, str::FromStr};

/// The SHA-256 of a stored file (its compressed bytes, not the segment inside).
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(try_from = "String", into = "String")]
pub struct Sha256Sum([u8; 32]);

/// The text is not a SHA-256 in hexadecimal.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected a SHA-256 of 64 hexadecimal digits, found {found:?}")]
pub struct Sha256SumError {
    found: String,
}

impl Sha256Sum {
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    pub const fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Computes the checksum of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        let mut hasher = Hasher::default();
        hasher.update(bytes);
        hasher.finish()
    }
}

impl fmt::Display for Sha256Sum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Sha256Sum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Sha256Sum {
    type Err = Sha256SumError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fail = || Sha256SumError { found: text.chars().take(70).collect() };
        if text.len() != 64 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(fail());
        }
        let mut sum = [0; 32];
        for (index, byte) in sum.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).map_err(|_| fail())?;
        }
        Ok(Self(sum))
    }
}

impl TryFrom<String> for Sha256Sum {
    type Error = Sha256SumError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Sha256Sum> for String {
    fn from(sum: Sha256Sum) -> String {
        sum.to_string()
    }
}

/// Counts and hashes what is written to it; stores nothing.
#[derive(Default)]
pub struct Hasher {
    sha256: Sha256,
    bytes: u64,
}

impl Hasher {
    pub fn update(&mut self, bytes: &[u8]) {
        self.sha256.update(bytes);
        self.bytes += bytes.len() as u64;
    }

    /// Number of bytes that were added.
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The checksum of everything that was added.
    pub fn finish(self) -> Sha256Sum {
        Sha256Sum(self.sha256.finalize().into())
    }
}

impl io::Write for Hasher {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.update(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn agrees_with_sha256sum() {
        assert_eq!(
            Sha256Sum::of(b"").to_string(),
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
    }

    #[test]
    fn refuses_what_is_not_a_sum() {
        for bad in ["", "00", &"g".repeat(64), &"ä".repeat(32), &"0".repeat(65)] {
            assert!(bad.parse::<Sha256Sum>().is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn text_round_trips(bytes: [u8; 32]) {
            let sum = Sha256Sum::new(bytes);
            prop_assert_eq!(sum.to_string().parse(), Ok(sum));
        }
    }
}
