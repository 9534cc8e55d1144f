//! Directories and files that nobody but the server's user should read.
//!
//! What the server makes is closed from the start. A directory of its own that an earlier build left open is closed, as that takes
//! nothing from anybody; keys and the configuration are told of and left: who mounted them so may have a reason.

use crate::config::Config;
use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

const DIRECTORY_MODE: u32 = 0o700;
/// Everybody else.
const OTHERS: u32 = 0o007;
/// Members of the group, who are often meant (fsGroup of Kubernetes), and everybody else.
const NOT_OWNER: u32 = 0o077;

/// Makes a directory, and those above it, for the owner alone. One that is there and ours is closed to others.
///
/// # Errors
/// It cannot be made.
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
        tracing::warn!("{place} could be read by others (mode {mode:03o}); it was closed to them");
    } else if mode & OTHERS != 0 {
        tracing::warn!(
            "{place} can be read by others (mode {mode:03o}) and is not ours to close; hint: chmod o-rwx {place}"
        );
    }
    Ok(())
}

/// Says which keys, and which configuration, others can read.
pub fn warn_of_readable_secrets(config: &Config) {
    for path in secrets(config) {
        let Some(mode) = others_may_read(&path) else { continue };
        let place = path.display();
        tracing::warn!(
            "{place} holds a secret and can be read by others (mode {mode:03o}); hint: chmod o-rwx {place}"
        );
    }
}

fn secrets(config: &Config) -> Vec<PathBuf> {
    let mut paths = vec![config.file.clone()];
    paths.extend(config.tls.as_ref().map(|tls| tls.key.clone()));
    paths.extend(config.encryption.identity_file.clone());
    paths.extend(config.queue.credentials_file.clone());
    paths.extend(config.tier2.as_ref().and_then(|tier2| tier2.service_account_file.clone()));
    // Signs client bundles, where `klio-server init` made it.
    paths.extend(config.file.parent().map(|directory| directory.join(crate::pki::CA_KEY)));
    paths
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
