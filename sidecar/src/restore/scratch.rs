//! A directory of our own for a while; removed when dropped.

use super::local;
use crate::error::Error;
use std::{
    fs,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

/// The directory.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// A new one, for us alone, below `parent`, else below the system's place for such.
    ///
    /// # Errors
    /// As the file system fails.
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

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// A path in it.
    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Removes all files but the `keep` that sort first by their names: WAL is looked at backwards.
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

    /// `klio drill --in /nonexistent` said only that a directory could not be made.
    #[test]
    fn a_place_that_is_not_there_is_named_with_what_it_must_be() {
        let error = Scratch::new(Some(Path::new("/nonexistent"))).err().unwrap();
        assert!(error.hint.starts_with("/nonexistent must be a directory"), "{error}");
    }
}
