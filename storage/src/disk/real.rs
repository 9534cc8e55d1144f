//! The disk of the operating system. Only the owner can read or lock what it creates, whatever the umask.

use super::{Disk, DiskFile, DiskLock, Entry, FileHandle, Stat};
use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt},
    path::Path,
    sync::Arc,
    time::{Duration, UNIX_EPOCH},
};

/// WAL and backups contain all data of the database.
const FILE_MODE: u32 = 0o600;
const DIRECTORY_MODE: u32 = 0o700;

#[derive(Debug, Clone, Copy, Default)]
pub struct RealDisk;

#[derive(Debug)]
struct RealFile(File);

impl DiskFile for RealFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.read_at(buf, offset)
    }
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }
    fn sync_all(&self) -> io::Result<()> {
        self.0.sync_all()
    }
    fn size(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }
}

#[derive(Debug)]
struct RealLock {
    file: File,
}

impl Drop for RealLock {
    /// Closing the file is not enough: a child that this process is just starting has the file open as well until it runs
    /// its program, and would hold the lock until then.
    fn drop(&mut self) {
        if let Err(error) = self.file.unlock() {
            tracing::debug!(%error, "cannot release the lock of tier 1");
        }
    }
}

impl DiskLock for RealLock {}

impl Disk for RealDisk {
    fn open(&self, path: &Path, write: bool) -> io::Result<FileHandle> {
        Ok(Arc::new(RealFile(OpenOptions::new().read(true).write(write).open(path)?)))
    }

    fn create_new(&self, path: &Path) -> io::Result<FileHandle> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(FILE_MODE);
        let file = options.open(path)?;
        Ok(Arc::new(RealFile(file)))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        fs::DirBuilder::new().mode(DIRECTORY_MODE).create(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn list(&self, path: &Path) -> io::Result<Vec<Entry>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            let is_dir = entry.file_type()?.is_dir();
            if let Ok(name) = entry.file_name().into_string() {
                names.push(Entry { name, is_dir });
            }
        }
        names.sort();
        Ok(names)
    }

    fn stat(&self, path: &Path) -> io::Result<Stat> {
        let metadata = fs::metadata(path)?;
        let modified = metadata.modified()?.duration_since(UNIX_EPOCH);
        let modified_unix = modified.map_or(0.0, |age| age.as_secs_f64());
        Ok(Stat { size: metadata.len(), modified_unix })
    }

    fn set_modified(&self, path: &Path, unix: f64) -> io::Result<()> {
        let age = Duration::try_from_secs_f64(unix).map_err(io::Error::other)?;
        OpenOptions::new().write(true).open(path)?.set_modified(UNIX_EPOCH + age)
    }

    fn space(&self, path: &Path) -> io::Result<(u64, u64)> {
        let stat = rustix::fs::statvfs(path)?;
        Ok((stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize))
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn DiskLock>> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(FILE_MODE);
        let file = options.open(path)?;
        match file.try_lock() {
            Ok(()) => Ok(Box::new(RealLock { file })),
            Err(TryLockError::WouldBlock) => Err(io::ErrorKind::WouldBlock.into()),
            Err(TryLockError::Error(e)) => Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A process that starts another one shares its files with it for a moment.
    #[test]
    fn a_lock_that_was_released_can_be_taken_although_a_child_has_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("LOCK");
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).open(&path).unwrap();
        file.lock().unwrap();
        let child_s = file.try_clone().unwrap();
        let lock = RealLock { file };
        assert!(RealDisk.lock(&path).is_err());
        drop(lock);
        assert!(RealDisk.lock(&path).is_ok());
        drop(child_s);
    }

    /// Earlier, tier 1 was world-readable under the usual umask, and any local user could hold its lock.
    #[test]
    fn nobody_but_the_owner_may_read_or_lock_what_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let (directory, file, lock) =
            (dir.path().join("d"), dir.path().join("d/f"), dir.path().join("d/LOCK"));
        RealDisk.create_dir(&directory).unwrap();
        RealDisk.create_new(&file).unwrap();
        let _lock = RealDisk.lock(&lock).unwrap();
        assert_eq!((mode(&directory), mode(&file), mode(&lock)), (0o700, 0o600, 0o600));
    }
}
