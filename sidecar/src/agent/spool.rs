//! The directory for prefetched WAL. It lies on the file system of `pg_wal`, so that handing a segment over is a
//! rename.
//!
//! It is used only if it has mode 0700 and belongs to our user. One agent at a time holds the lock, and the holder
//! may remove everything. File names carry a tag of the agent, so that a name given out by an earlier agent never
//! means another file.

use super::local;
use crate::error::{Error, Failure};
use sha2::{Digest, Sha256};
use std::{
    fs::{self, DirBuilder, File, TryLockError},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

const LOCK: &str = "agent.lock";
const SOCKET: &str = "agent.sock";
const LOG: &str = "agent.log";

/// How long a new agent waits for one that is exiting.
const CLAIM_TRIES: u32 = 40;
const CLAIM_PAUSE: Duration = Duration::from_millis(50);

/// The spool of a recovery into `path` (%p of restore_command): `.klio` beside it, or a directory of its own in
/// `configured`.
pub fn spool_for(path: &Path, configured: &Path) -> PathBuf {
    let directory = path.parent().unwrap_or(Path::new(""));
    if configured.as_os_str().is_empty() {
        return directory.join(".klio");
    }
    let absolute = std::path::absolute(directory).unwrap_or_else(|_| directory.to_owned());
    let sum = Sha256::digest(absolute.as_os_str().as_encoded_bytes());
    let short: String = sum.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    configured.join(format!("klio-{short}"))
}

pub(super) fn socket_in(spool: &Path) -> PathBuf {
    spool.join(SOCKET)
}

/// Creates or empties the log file of the agent that serves a spool.
pub(super) fn new_log(spool: &Path) -> io::Result<File> {
    File::create(spool.join(LOG))
}

/// Creates the directory if it does not exist, and checks that it belongs to our user and nobody else has access.
///
/// # Errors
/// A file-system error, or another user may have written to the directory.
pub(super) fn prepare(spool: &Path) -> Result<(), Error> {
    match DirBuilder::new().mode(0o700).create(spool) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(local("create spool", spool, &error));
        }
        _ => {}
    }
    let found = fs::symlink_metadata(spool).map_err(|error| local("look at", spool, &error))?;
    let ours = found.uid() == rustix::process::geteuid().as_raw();
    if !found.is_dir() || !ours || found.mode() & 0o077 != 0 {
        let found = format!("owner {} and mode {:o}", found.uid(), found.mode() & 0o7777);
        let message = format!(
            "use spool {}: expected a directory of this user with mode 700, found {found}",
            spool.display()
        );
        return Err(Error::new(Failure::Local, message));
    }
    Ok(())
}

/// A spool that this process has locked; dropping this removes it.
#[derive(Debug)]
pub(super) struct Spool {
    directory: PathBuf,
    files: Files,
    _lock: File,
}

impl Spool {
    /// Takes over a spool and removes its content. `None` while another agent serves it.
    ///
    /// # Errors
    /// A file-system error.
    pub async fn claim(directory: &Path) -> Result<Option<Self>, Error> {
        for _ in 0..CLAIM_TRIES {
            // Inside the loop, because an exiting agent removes the directory.
            prepare(directory)?;
            if let Some(lock) = lock(&directory.join(LOCK))? {
                let spool = Self {
                    directory: directory.to_owned(),
                    files: Files::new(directory),
                    _lock: lock,
                };
                spool.clean(&[LOCK, LOG]);
                return Ok(Some(spool));
            }
            tokio::time::sleep(CLAIM_PAUSE).await;
        }
        Ok(None)
    }

    pub fn socket(&self) -> PathBuf {
        socket_in(&self.directory)
    }

    pub fn files(&self) -> Files {
        self.files.clone()
    }

    fn clean(&self, keep: &[&str]) {
        for entry in fs::read_dir(&self.directory).into_iter().flatten().flatten() {
            let name = entry.file_name();
            if !keep.iter().any(|keep| name == *keep) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        // The socket goes first, so that no new caller connects; the lock goes last, so that a new agent starts with
        // a directory of its own.
        let _ = fs::remove_file(self.socket());
        self.clean(&[LOCK]);
        let _ = fs::remove_file(self.directory.join(LOCK));
        let _ = fs::remove_dir(&self.directory);
    }
}

/// Removes what a killed agent left, unless another agent serves this spool by now.
pub fn remove_left(directory: &Path) {
    if let Ok(Some(lock)) = lock(&directory.join(LOCK)) {
        drop(Spool { directory: directory.to_owned(), files: Files::new(directory), _lock: lock });
    }
}

/// The lock, if nobody else holds it and the file is still the one in the directory.
fn lock(path: &Path) -> Result<Option<File>, Error> {
    let open = File::options().create(true).truncate(false).write(true).open(path);
    let file = match open {
        Ok(file) => file,
        // The directory was removed after we created it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(local("open", path, &error)),
    };
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(None),
        Err(TryLockError::Error(error)) => return Err(local("lock", path, &error)),
    }
    let same = fs::metadata(path)
        .and_then(|there| Ok((there, file.metadata()?)))
        .is_ok_and(|(there, ours)| there.ino() == ours.ino() && there.dev() == ours.dev());
    Ok(same.then_some(file))
}

/// Unused file names in the spool. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Files {
    directory: Arc<Path>,
    tag: Arc<str>,
    number: Arc<AtomicU64>,
}

impl Files {
    pub fn new(directory: &Path) -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let tag = format!("{:x}-{:x}", std::process::id(), since.as_nanos());
        Self { directory: directory.into(), tag: tag.into(), number: Arc::default() }
    }

    /// A path that was never used before.
    pub fn unused(&self) -> PathBuf {
        let number = self.number.fetch_add(1, Ordering::Relaxed);
        self.directory.join(format!("{}-{number}", self.tag))
    }

    /// How many bytes may be written here: a quarter of the free space, because PostgreSQL needs the rest.
    pub fn room(&self) -> u64 {
        rustix::fs::statvfs(&*self.directory).map_or(0, |fs| fs.f_bavail * fs.f_frsize / 4)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn each_data_directory_has_its_spool() {
        let xlog = Path::new("pg_wal/RECOVERYXLOG");
        assert_eq!(spool_for(xlog, Path::new("")), Path::new("pg_wal/.klio"));
        let (a, b) = (Path::new("/a/pg_wal/RECOVERYXLOG"), Path::new("/b/pg_wal/RECOVERYXLOG"));
        let spool = Path::new("/spool");
        assert_ne!(spool_for(a, spool), spool_for(b, spool));
        assert_eq!(spool_for(a, spool).parent(), Some(spool));
        let history = Path::new("/a/pg_wal/RECOVERYHISTORY");
        assert_eq!(spool_for(a, spool), spool_for(history, spool));
    }

    #[tokio::test]
    async fn one_agent_at_a_time_and_nothing_stays() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join(".klio");
        fs::create_dir(&directory).unwrap();
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o700)).unwrap();
        fs::write(directory.join("left by a killed one"), "x").unwrap();
        fs::write(directory.join(SOCKET), "").unwrap();
        let first = Spool::claim(&directory).await.unwrap().unwrap();
        remove_left(&directory);
        assert!(directory.exists(), "it is served");
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 1, "the lock alone");
        assert!(lock(&directory.join(LOCK)).unwrap().is_none());
        fs::write(first.files().unused(), "x").unwrap();
        drop(first);
        assert!(!directory.exists());
        assert!(Spool::claim(&directory).await.unwrap().is_some());
    }

    #[test]
    fn a_directory_that_others_can_write_to_is_not_used() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join(".klio");
        fs::create_dir(&directory).unwrap();
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(prepare(&directory).unwrap_err().message.contains("mode 777"));
        fs::remove_dir(&directory).unwrap();
        std::os::unix::fs::symlink(parent.path(), &directory).unwrap();
        assert!(prepare(&directory).is_err());
    }
}
