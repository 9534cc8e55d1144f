//! Where a WAL file can be read on tier 1, and how it is opened.

use super::reader::OpenSegment;
use crate::{Error, Op, crypt::Keys, layout::WalFile};
use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

/// How the content of a stored file is encoded, once it is decrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// Unencoded, as PostgreSQL wrote it.
    Plain,
    /// A standard zstd file.
    Zstd,
}

/// Where a WAL file can be read.
#[derive(Debug)]
pub enum Found {
    /// A finished file.
    Stored {
        /// The file that was found: the partial one if only that exists.
        file: WalFile,
        path: PathBuf,
        /// Bytes on disk.
        size: u64,
        /// Bytes after decoding.
        plain_size: u64,
        /// How to decode the content, once it is decrypted.
        encoding: Encoding,
        /// The keys that decrypt it, if it is encrypted.
        keys: Option<Keys>,
    },
    /// A segment that is not sealed: its durable bytes so far.
    Open(Box<OpenSegment>),
}

/// Opens a finished file on the real disk and decrypts it if there are keys. Convert errors while reading with
/// [`crate::crypt::payload_error`].
///
/// # Errors
/// An I/O error of the disk; `Denied` or `Corrupt` for an encrypted file.
pub fn open_stored(path: &Path, keys: Option<&Keys>) -> Result<Box<dyn Read + Send>, Error> {
    let file = File::open(path).map_err(|e| Error::io(Op::Read, path, e))?;
    match keys {
        None => Ok(Box::new(file)),
        Some(keys) => Ok(Box::new(keys.decrypt(file).map_err(|e| e.at(path.display()))?)),
    }
}
