//! A temporary directory for this process alone, removed when dropped.

use super::local;
use crate::error::Error;
use std::{
    fs,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// Creates a directory that only this user can enter, below `parent` or else below the system's temporary directory.
    ///
    /// # Errors
    /// An I/O error of the file system.
    pub fn new(parent: Option<&Path>) -> Result<Self, Error> {
        let system = std::env::temp_dir();
        let path = parent.unwrap_or(&system).join(format!("klio-{}", uuid::Uuid::new_v4()));
        let made = fs::DirBuilder::new().mode(0o700).create(&path);
        made.map_err(|error| {
            let parent = parent.unwrap_or(&system).display();
            local("make directory", &path, &error)
                .hint(format!("{parent} must be a directory that this user may write to"))
        })?;
        Ok(Self(path))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Removes all files except the `keep` that sort first by name: WAL is searched backwards, so these are needed next.
    pub fn trim(&self, keep: usize) {
        let names = fs::read_dir(&self.0).into_iter().flatten().flatten();
        let mut files: Vec<PathBuf> = names.map(|entry| entry.path()).collect();
        files.sort();
        files.iter().skip(keep).for_each(|path| drop(fs::remove_file(path)));
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In an earlier version, `klio drill --in /nonexistent` only said that a directory could not be made.
    #[test]
    fn a_place_that_is_not_there_is_named_with_what_it_must_be() {
        let error = Scratch::new(Some(Path::new("/nonexistent"))).err().unwrap();
        assert!(error.hint.starts_with("/nonexistent must be a directory"), "{error}");
    }
}
