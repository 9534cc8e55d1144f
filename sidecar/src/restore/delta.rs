//! Removes what a directory has and the backup does not have, one directory at a time.
//!
//! Only the names of the directories that are open at the moment are in memory (RESTORE5). A symbolic link is removed,
//! never followed; only `pg_wal` may be one, because it may lie on another disk. A file system's lost+found stays.

use crate::backup::LOST_AND_FOUND;
use std::{
    collections::HashSet,
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
};

/// Removes what is left over while the entries of a snapshot are passed in depth-first order.
#[derive(Debug, Default)]
pub struct Leftovers {
    open: Vec<(PathBuf, HashSet<OsString>)>,
    /// Number of files and directories that were removed.
    pub removed: u64,
}

impl Leftovers {
    /// Takes in the place of the next entry.
    ///
    /// # Errors
    /// An I/O error of the file system.
    pub fn pass(&mut self, place: &Path, is_dir: bool) -> io::Result<()> {
        self.close_until(place)?;
        if let (Some((_, names)), Some(name)) = (self.open.last_mut(), place.file_name()) {
            names.insert(name.to_owned());
        }
        if is_dir {
            self.open.push((place.to_owned(), HashSet::new()));
        }
        Ok(())
    }

    /// Keeps a file of an open directory because it is written later. Does nothing for other directories.
    pub fn keep(&mut self, place: &Path) {
        let directory = place.parent();
        if let Some((_, names)) =
            self.open.iter_mut().find(|(open, _)| Some(open.as_path()) == directory)
            && let Some(name) = place.file_name()
        {
            names.insert(name.to_owned());
        }
    }

    /// Cleans the directories that are still open; there are no more entries.
    ///
    /// # Errors
    /// An I/O error of the file system.
    pub fn finish(&mut self) -> io::Result<()> {
        while let Some((directory, names)) = self.open.pop() {
            self.clean(&directory, &names)?;
        }
        Ok(())
    }

    fn close_until(&mut self, place: &Path) -> io::Result<()> {
        while let Some((directory, _)) = self.open.last() {
            if place.parent() == Some(directory.as_path()) {
                return Ok(());
            }
            if let Some((directory, names)) = self.open.pop() {
                self.clean(&directory, &names)?;
            }
        }
        Ok(())
    }

    fn clean(&mut self, directory: &Path, names: &HashSet<OsString>) -> io::Result<()> {
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            let name = entry.file_name();
            if !names.contains(&name) && name != LOST_AND_FOUND {
                let path = entry.path();
                remove(&path).map_err(|error| {
                    let text = format!("remove {}: {error}", path.display());
                    io::Error::new(error.kind(), text)
                })?;
                self.removed += 1;
            }
        }
        Ok(())
    }
}

/// Removes a file, a directory with its content, or a link without what it points to. Nothing there is no error.
///
/// # Errors
/// An I/O error of the file system.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_backup_has_stays_and_links_are_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let (root, outside) = (directory.path().join("data"), directory.path().join("outside"));
        fs::create_dir_all(root.join("base/1")).unwrap();
        fs::create_dir_all(root.join("old/deep")).unwrap();
        fs::create_dir_all(&outside).unwrap();
        fs::create_dir(root.join(LOST_AND_FOUND)).unwrap();
        for file in ["data/a", "data/stale", "data/base/1/kept", "data/base/1/gone", "outside/safe"]
        {
            fs::write(directory.path().join(file), "x").unwrap();
        }
        std::os::unix::fs::symlink(&outside, root.join("link")).unwrap();
        let mut leftovers = Leftovers::default();
        for (path, is_dir) in [
            ("", true),
            ("a", false),
            ("base", true),
            ("base/1", true),
            ("base/1/kept", false),
            ("z", false),
        ] {
            let place = if path.is_empty() { root.clone() } else { root.join(path) };
            leftovers.pass(&place, is_dir).unwrap();
        }
        leftovers.keep(&root.join("late"));
        fs::write(root.join("late"), "x").unwrap();
        leftovers.finish().unwrap();
        let mut left: Vec<_> =
            fs::read_dir(&root).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["a", "base", "late", LOST_AND_FOUND]);
        assert!(root.join("base/1/kept").exists() && !root.join("base/1/gone").exists());
        assert!(outside.join("safe").exists());
        assert_eq!(leftovers.removed, 4);
    }
}
