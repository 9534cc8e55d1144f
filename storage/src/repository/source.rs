//! What goes into a snapshot, as the caller lists it.

use crate::Error;
use std::{io, path::PathBuf, time::SystemTime};

/// A tree of files to archive.
pub trait Source: Send + Sync {
    /// A moment not later than the first look at any file's times, in the clock that stamps files.
    ///
    /// A file changed less than `YOUNG` before it may change again without a new time; the next backup
    /// reads it again.
    fn listing_began(&self) -> SystemTime;

    /// Every directory, file and link, in the order of `Path`'s comparison: a directory before what is in it,
    /// names by their bytes. Asked for once per snapshot. The iterator ends when something is wrong with it.
    fn entries(&self) -> SourceEntries;
}

/// A listing as it goes.
pub type SourceEntries = Box<dyn Iterator<Item = Result<SourceEntry, Error>> + Send>;

/// Opens a file; called at most once, on another thread. `NotFound` means that the file vanished since it was
/// listed: it is left out and counted. Every other error fails the snapshot (REPO3).
pub type Open = Box<dyn FnOnce() -> io::Result<Box<dyn io::Read + Send>> + Send>;

/// What an entry is.
pub enum EntryKind {
    /// A directory.
    Dir,
    /// A regular file.
    File {
        /// Bytes when it was listed. Stored are exactly this many, as PostgreSQL's own base backup does it: what was
        /// appended since is cut, what was truncated since is zeros. Replay puts either right.
        size: u64,
        /// Opens it.
        open: Open,
    },
    /// A symbolic link and where it points.
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
    /// Below the root of the snapshot, for example `data/base/1/1259`.
    pub path: PathBuf,
    /// What it is.
    pub kind: EntryKind,
    /// Permission bits, as `st_mode & 0o7777`.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// When its content last changed.
    pub mtime: SystemTime,
    /// When it last changed in any way.
    pub ctime: SystemTime,
}

/// Told about the work while it runs, from several threads; must be quick.
pub trait Progress: Send + Sync {
    /// So many more bytes of files are dealt with: read, or known to be unchanged.
    fn bytes(&self, n: u64);
    /// One more file is dealt with.
    fn file_done(&self);
    /// So many more bytes were added to the repository.
    fn stored(&self, _n: u64) {}
}

/// Tells nobody.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn bytes(&self, _n: u64) {}
    fn file_done(&self) {}
}
