//! The disk below tier 1, as a small trait with two implementations: the real one and a simulated one.
//!
//! The trait states what a caller may rely on after a crash, and no more:
//! - written bytes are certain to survive only once `sync_data` or `sync_all` of that file returned `Ok`;
//! - a created, renamed or removed name is certain to survive only once `sync_dir` of its directory returned
//!   `Ok`;
//! - until then any part of it may survive, in any order, torn at sector boundaries;
//! - after a failed sync the state of the file is unknown, and a later `Ok` does not change that.
//!
//! There is no way to truncate a file: acknowledged bytes can only be replaced by a complete new file (P2).

pub mod durable;
mod real;
#[cfg(any(test, feature = "testing"))]
mod sim;

pub use real::RealDisk;
#[cfg(any(test, feature = "testing"))]
pub use sim::{Restart, SimDisk};

use std::{fmt, io, path::Path, sync::Arc};

/// The unit that a disk writes atomically; writes can be torn between sectors.
pub const SECTOR_BYTES: u64 = 512;

/// An open file. Offsets are explicit, so one handle may be shared.
pub trait DiskFile: Send + Sync + fmt::Debug {
    /// Reads at `offset`; returns fewer bytes than requested only at the end of the file.
    ///
    /// # Errors
    /// An error of the operating system.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Writes all of `bytes` at `offset`. After an error any part may have been written.
    ///
    /// # Errors
    /// An error of the operating system.
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// fdatasync: content and length. Must not be called again on this handle after an error (P3).
    ///
    /// # Errors
    /// An error of the operating system; the state of the content is then unknown.
    fn sync_data(&self) -> io::Result<()>;

    /// fsync: fdatasync plus the times. Must not be called again on this handle after an error (P3).
    ///
    /// # Errors
    /// An error of the operating system; the state of the content is then unknown.
    fn sync_all(&self) -> io::Result<()>;

    /// The length in bytes.
    ///
    /// # Errors
    /// An error of the operating system.
    fn size(&self) -> io::Result<u64>;
}

/// A shared open file.
pub type FileHandle = Arc<dyn DiskFile>;

/// A lock that is held until this value is dropped.
pub trait DiskLock: Send + Sync + fmt::Debug {}

/// One name in a directory.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// Entries whose names are not UTF-8 are never listed, because Klio does not create any.
    pub name: String,
    pub is_dir: bool,
}

/// Facts about a file.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stat {
    pub size: u64,
    /// Seconds since 1970.
    pub modified_unix: f64,
}

/// Files and directories. All calls block.
pub trait Disk: Send + Sync + fmt::Debug {
    /// Opens an existing file, for reading and, with `write`, for writing. Changes nothing.
    ///
    /// # Errors
    /// `NotFound` when there is none.
    fn open(&self, path: &Path, write: bool) -> io::Result<FileHandle>;

    /// Creates a file that must not exist.
    ///
    /// # Errors
    /// `AlreadyExists` when it does.
    fn create_new(&self, path: &Path) -> io::Result<FileHandle>;

    /// Renames a file, replacing `to`.
    ///
    /// # Errors
    /// An error of the operating system.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file.
    ///
    /// # Errors
    /// `NotFound` when there is none.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Creates a directory whose parent exists.
    ///
    /// # Errors
    /// `AlreadyExists` when there is something of that name.
    fn create_dir(&self, path: &Path) -> io::Result<()>;

    /// Removes an empty directory.
    ///
    /// # Errors
    /// An error of the operating system.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;

    /// Makes the names in a directory durable.
    ///
    /// # Errors
    /// An error of the operating system; it is then unknown which names are durable.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;

    /// The names in a directory, sorted.
    ///
    /// # Errors
    /// `NotFound` when there is no such directory.
    fn list(&self, path: &Path) -> io::Result<Vec<Entry>>;

    /// Size and time of a file.
    ///
    /// # Errors
    /// `NotFound` when there is none.
    fn stat(&self, path: &Path) -> io::Result<Stat>;

    /// Sets the modification time of a file, for a copy that replaces an older file. Not durable by itself.
    ///
    /// # Errors
    /// An error of the operating system.
    fn set_modified(&self, path: &Path, unix: f64) -> io::Result<()>;

    /// Free and total bytes of the file system that holds `path`.
    ///
    /// # Errors
    /// An error of the operating system.
    fn space(&self, path: &Path) -> io::Result<(u64, u64)>;

    /// Takes an exclusive lock on a file, and creates the file if needed.
    ///
    /// # Errors
    /// `WouldBlock` when somebody else holds it.
    fn lock(&self, path: &Path) -> io::Result<Box<dyn DiskLock>>;
}

/// Fills `buf` from `offset`; returns the number of bytes before the end of the file.
///
/// # Errors
/// An error of the disk.
pub fn read_full(file: &dyn DiskFile, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        match file.read_at(&mut buf[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

/// Reads a whole small file.
///
/// # Errors
/// An error of the disk, or `InvalidData` when the file is longer than `limit` bytes.
pub fn read_small(disk: &dyn Disk, path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let file = disk.open(path, false)?;
    let size = file.size()?;
    if size > limit {
        let text = format!("expected at most {limit} bytes, found {size}");
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    let mut content = vec![0; size as usize];
    let got = read_full(file.as_ref(), &mut content, 0)?;
    content.truncate(got);
    Ok(content)
}
