//! The contents of a snapshot, as listed by the caller.

use crate::Error;
use std::{io, path::PathBuf, time::SystemTime};

/// A tree of files to archive.
pub trait Source: Send + Sync {
    /// A time no later than the first look at any file's times, in the clock that stamps files.
    ///
    /// A file that changed less than `YOUNG` before it may change again without a new timestamp, so the next backup
    /// reads it again.
    fn listing_began(&self) -> SystemTime;

    /// Every directory, file and link, in the order of `Path`'s comparison: a directory before its contents, names
    /// by their bytes. Called once per snapshot. The iterator ends after an error.
    fn entries(&self) -> SourceEntries;
}

pub type SourceEntries = Box<dyn Iterator<Item = Result<SourceEntry, Error>> + Send>;

/// Opens a file; called at most once, on another thread. `NotFound` means that the file vanished since it was
/// listed: it is omitted and counted. Every other error makes the snapshot fail (REPO3).
pub type Open = Box<dyn FnOnce() -> io::Result<Box<dyn io::Read + Send>> + Send>;

/// The kind of an entry.
pub enum EntryKind {
    /// A directory.
    Dir,
    /// A regular file.
    File {
        /// Size in bytes when the file was listed. Exactly this many bytes are stored, as in PostgreSQL's own base
        /// backup: what was appended since is cut off, what was truncated since is filled with zeros. WAL replay
        /// corrects both.
        size: u64,
        open: Open,
    },
    /// A symbolic link and its target.
    Symlink(PathBuf),
}

impl std::fmt::Debug for EntryKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Dir => f.write_str("Dir"),
            Self::File { size, .. } => write!(f, "File({size} bytes)"),
            Self::Symlink(target) => write!(f, "Symlink({})", target.display()),
        }
    }
}

/// One directory, file or link.
#[derive(Debug)]
pub struct SourceEntry {
    /// Relative to the root of the snapshot, for example `data/base/1/1259`.
    pub path: PathBuf,
    pub kind: EntryKind,
    /// Permission bits, as `st_mode & 0o7777`.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time of the content.
    pub mtime: SystemTime,
    /// Time of the last change of any kind.
    pub ctime: SystemTime,
}

/// Receives progress reports from several threads; must be quick.
pub trait Progress: Send + Sync {
    /// `n` more bytes of files are done: read, or known to be unchanged.
    fn bytes(&self, n: u64);
    /// One more file is done.
    fn file_done(&self);
    /// `n` more bytes were added to the repository.
    fn stored(&self, _n: u64) {}
}

/// Ignores all reports.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn bytes(&self, _n: u64) {}
    fn file_done(&self) {}
}
