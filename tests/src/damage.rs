//! Damage as a disk makes it.

use std::{fs, path::Path};

/// Flips a bit in the middle of a file.
///
/// # Panics
/// When the file cannot be read or written, or is empty.
pub fn flip(path: &Path) {
    let mut bytes = fs::read(path).unwrap_or_else(|e| panic!("read {}: {e}", path.display()));
    let at = bytes.len() / 2;
    bytes[at] ^= 1;
    fs::write(path, bytes).unwrap_or_else(|e| panic!("write {}: {e}", path.display()));
}
