//! A directory for one test, deleted when dropped (or, when the test program is killed, by its [`guard`]).
//!
//! Others may enter it (mode 755): as root, the tests run PostgreSQL as another user.

use crate::{env, guard};
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

static KEEP_FAILED: AtomicBool = AtomicBool::new(false);

/// From now on the directories of a test that panics are kept, and named on standard error.
pub fn keep_failed() {
    KEEP_FAILED.store(true, Ordering::Relaxed);
}

/// As root, the tests run PostgreSQL as another user, who has to get in.
///
/// # Panics
/// When the directory is not ours.
pub fn open_to_others(dir: &Path) {
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755))
        .unwrap_or_else(|e| panic!("open {} to others: {e}", dir.display()));
}

/// A scratch directory.
#[derive(Debug)]
pub struct Scratch {
    dir: tempfile::TempDir,
}

impl Scratch {
    /// Makes a new, empty one below [`env::scratch_root`]; `name` shows in its path.
    ///
    /// # Panics
    /// When the place cannot be written.
    #[must_use]
    pub fn new(name: &str) -> Self {
        let root = env::scratch_root();
        let dir = tempfile::Builder::new()
            .prefix(&format!("klio-{name}-"))
            .tempdir_in(&root)
            .unwrap_or_else(|e| panic!("make scratch directory in {}: {e}", root.display()));
        open_to_others(dir.path());
        guard::delete_in_the_end(dir.path());
        Self { dir }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// A path inside it (not created).
    #[must_use]
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.path().join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if std::thread::panicking() && KEEP_FAILED.load(Ordering::Relaxed) {
            self.dir.disable_cleanup(true);
            guard::keep(self.path());
            eprintln!("kept {}", self.path().display());
        }
    }
}
