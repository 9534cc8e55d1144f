//! Durable rename, durable directory creation, and atomic overwrite of a small file. They are implemented
//! only here.
//!
//! Each returns `Ok` only when its effect survives a power loss. After an error the old or the new state
//! may be found, never a mixture, and repeating the call is safe: every attempt makes a new file and a new
//! rename, so that a failed fsync is never retried for the same change (P3).

use super::Disk;
use crate::{Error, Op};
use std::{
    ffi::OsString,
    io,
    path::{Path, PathBuf},
};

/// The suffix of unfinished files, which are removed at start.
pub const TMP_SUFFIX: &str = ".tmp";

/// `path` with `.tmp` appended.
pub fn tmp_path(path: &Path) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(TMP_SUFFIX);
    name.into()
}

pub(crate) fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("/"))
}

/// Renames a file whose content is already synced and makes the new name durable.
///
/// If the old name is in another directory, it may reappear after a crash.
///
/// # Errors
/// An error of the rename, or of the fsync of the new directory.
pub fn rename(disk: &dyn Disk, from: &Path, to: &Path) -> Result<(), Error> {
    disk.rename(from, to).map_err(|e| Error::io(Op::Rename, to, e))?;
    sync_dir(disk, parent(to))
}

/// Makes the names in a directory durable.
///
/// # Errors
/// An error of the fsync.
pub fn sync_dir(disk: &dyn Disk, directory: &Path) -> Result<(), Error> {
    disk.sync_dir(directory).map_err(|e| Error::io(Op::Sync, directory, e))
}

/// Writes `content` to `path`, durably: after a crash the old or the new content is there, complete.
///
/// # Errors
/// An error of any step.
pub fn overwrite(disk: &dyn Disk, path: &Path, content: &[u8]) -> Result<(), Error> {
    let tmp = tmp_path(path);
    remove_if_there(disk, &tmp)?;
    let write = || {
        let file = disk.create_new(&tmp).map_err(|e| Error::io(Op::Create, &tmp, e))?;
        file.write_all_at(content, 0).map_err(|e| Error::io(Op::Write, &tmp, e))?;
        file.sync_all().map_err(|e| Error::io(Op::Sync, &tmp, e))
    };
    write().inspect_err(|_| {
        // The first error is the one to report; the next start removes the rest.
        let _ = disk.remove(&tmp);
    })?;
    rename(disk, &tmp, path)
}

/// Creates a directory, durably, unless it exists. Its parent must exist.
///
/// # Errors
/// An error of any step. If its name cannot be made durable, the directory is removed again, so that the
/// next attempt does not rely on it.
pub fn create_dir(disk: &dyn Disk, path: &Path) -> Result<(), Error> {
    match disk.create_dir(path) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        Err(e) => return Err(Error::io(Op::Create, path, e)),
    }
    sync_dir(disk, parent(path)).inspect_err(|_| {
        // This fails, as intended, if the directory existed before and has files in it.
        let _ = disk.remove_dir(path);
    })
}

/// Removes a file, but not durably. A missing file is not an error.
///
/// # Errors
/// An I/O error of the disk.
pub fn remove_if_there(disk: &dyn Disk, path: &Path) -> Result<(), Error> {
    match disk.remove(path) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(Error::io(Op::Remove, path, e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{Restart, SimDisk, read_small};

    /// After a crash at any step the old or the new content is there, and the new one once `Ok` was
    /// returned.
    #[test]
    fn an_overwrite_is_old_or_new_after_a_crash_anywhere() {
        let path = Path::new("/a");
        let mut finished = false;
        for crash in 0..20 {
            for seed in 0..40 {
                let disk = SimDisk::new(seed);
                overwrite(&disk, path, &[1; 3000]).unwrap();
                disk.crash_after(crash);
                let done = overwrite(&disk, path, &[2; 4000]).is_ok();
                finished |= done;
                disk.restart(Restart::PowerLoss);
                let found = read_small(&disk, path, 9999).unwrap();
                assert!(found == [2; 4000] || (!done && found == [1; 3000]), "{crash} {seed}");
            }
        }
        assert!(finished);
    }

    /// A rename without an fsync of the directory may be lost with the power (P1).
    #[test]
    fn a_rename_without_fsync_of_the_directory_can_be_lost_and_a_durable_one_cannot() {
        let (from, to) = (Path::new("/a"), Path::new("/b"));
        let run = |seed, durably| {
            let disk = SimDisk::new(seed);
            let file = disk.create_new(from).unwrap();
            file.write_all_at(b"x", 0).unwrap();
            file.sync_all().unwrap();
            if durably {
                rename(&disk, from, to).unwrap();
            } else {
                disk.rename(from, to).unwrap();
            }
            disk.restart(Restart::PowerLoss);
            disk.stat(to).is_ok()
        };
        assert!((0..50).any(|seed| !run(seed, false)));
        assert!((0..50).all(|seed| run(seed, true)));
    }

    #[test]
    fn a_directory_whose_name_could_not_be_synced_is_not_trusted_later() {
        for seed in 0..50 {
            let disk = SimDisk::new(seed);
            disk.fail_sync_after(0);
            assert!(create_dir(&disk, Path::new("/d")).is_err());
            create_dir(&disk, Path::new("/d")).unwrap();
            disk.restart(Restart::PowerLoss);
            assert!(disk.list(Path::new("/d")).is_ok(), "seed {seed}");
        }
    }
}
