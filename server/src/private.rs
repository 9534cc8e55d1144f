//! Directories and files that only the server's user should be able to read.
//!
//! What the server creates has private modes from the start. If one of its own directories was left open by an earlier
//! version, it is closed, because nobody else needs it. Keys and the configuration are only reported: whoever mounted
//! them with other modes may have a reason.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

const DIRECTORY_MODE: u32 = 0o700;
/// Everybody except owner and group.
const OTHERS: u32 = 0o007;
/// Group and others. The group is often intended (fsGroup of Kubernetes).
const NOT_OWNER: u32 = 0o077;

/// Creates a directory, with its parents, for the owner alone. An existing one that we own is closed to others.
///
/// # Errors
/// The directory cannot be created.
pub fn directory(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(DIRECTORY_MODE).create(path)?;
    let found = fs::metadata(path)?;
    let mode = found.permissions().mode() & 0o7777;
    if mode & NOT_OWNER == 0 {
        return Ok(());
    }
    let place = path.display();
    if found.uid() == rustix::process::geteuid().as_raw() {
        fs::set_permissions(path, fs::Permissions::from_mode(mode & !NOT_OWNER))?;
        tracing::warn!(
            "{place} was readable by others (mode {mode:03o}); others no longer have access"
        );
    } else if mode & OTHERS != 0 {
        tracing::warn!(
            "{place} is readable by others (mode {mode:03o}) and belongs to another user; hint: chmod o-rwx {place}"
        );
    }
    Ok(())
}

/// Warns of those of these files that others can read; each contains a secret.
pub fn warn_of_readable(secrets: &[PathBuf]) {
    for path in secrets {
        let Some(mode) = others_may_read(path) else { continue };
        let place = path.display();
        tracing::warn!(
            "{place} contains a secret and is readable by others (mode {mode:03o}); hint: chmod o-rwx {place}"
        );
    }
}

/// The mode of a file that everybody may read or change.
fn others_may_read(path: &Path) -> Option<u32> {
    let mode = fs::metadata(path).ok()?.permissions().mode() & 0o777;
    (mode & OTHERS != 0).then_some(mode)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn a_directory_is_made_closed_and_an_open_one_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let new = dir.path().join("a/b");
        directory(&new).unwrap();
        assert_eq!((mode(&new), mode(new.parent().unwrap())), (0o700, 0o700));
        fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).unwrap();
        directory(&new).unwrap();
        assert_eq!(mode(&new), 0o700);
    }

    #[test]
    fn a_key_that_everybody_can_read_is_found_and_one_of_a_group_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let key = dir.path().join("key");
        fs::write(&key, "secret").unwrap();
        for (set, found) in [(0o644, true), (0o602, true), (0o640, false), (0o600, false)] {
            fs::set_permissions(&key, fs::Permissions::from_mode(set)).unwrap();
            assert_eq!(others_may_read(&key).is_some(), found, "{set:03o}");
        }
        assert_eq!(others_may_read(&dir.path().join("none")), None);
    }
}
