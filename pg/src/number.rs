//! Numbers as PostgreSQL stores them in WAL on the machines that it supports: little-endian.

/// Parses a little-endian number.
pub(crate) fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b))
}
