//! Which key decrypts which file on tier 1, and re-encrypting files for other keys.
//!
//! - If a key does not decrypt the files that are there, the server refuses to start before it touches anything.
//! - Re-encryption replaces each file by a complete, synced one. After a crash in between, every file can still be
//!   decrypted with one of the identities in the identity file, which keeps the old ones.

use super::{WalStore, cipher, cluster::lock, frame::JournalHeader};
use crate::{
    Error, Kind, Op,
    crypt::{self, AtRest, HEADER_LIMIT_BYTES},
    disk::{Disk, read_full},
    layout::{ClusterName, Form, OPEN_KEY, WalFile},
};
use std::{
    io,
    path::{Path, PathBuf},
};

/// An encrypted file on tier 1 and its recipients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Locked {
    pub path: PathBuf,
    /// The recipients that its header names; empty when it names none.
    pub recipients: Vec<String>,
}

fn names(disk: &dyn Disk, directory: &Path) -> Result<Vec<crate::disk::Entry>, Error> {
    match disk.list(directory) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        other => other.map_err(|e| Error::io(Op::List, directory, e)),
    }
}

/// The encrypted files of a cluster in groups: its key files first, then WAL in order.
fn age_files(disk: &dyn Disk, cluster: &Path) -> Result<Vec<Vec<PathBuf>>, Error> {
    let in_directory = |directory: &Path| -> Result<Vec<PathBuf>, Error> {
        let entries = names(disk, directory)?.into_iter();
        let files = entries.filter(|e| !e.is_dir && e.name.ends_with(Form::Age.suffix()));
        let mut paths: Vec<PathBuf> = files.map(|e| directory.join(e.name)).collect();
        paths.sort();
        Ok(paths)
    };
    let wal = cluster.join("wal");
    let mut groups = vec![in_directory(cluster)?, in_directory(&wal)?];
    for entry in names(disk, &wal)?.iter().filter(|entry| entry.is_dir) {
        groups.push(in_directory(&wal.join(&entry.name))?);
    }
    Ok(groups)
}

fn head(disk: &dyn Disk, path: &Path) -> Result<Vec<u8>, Error> {
    let failed = |e| Error::io(Op::Read, path, e);
    let file = disk.open(path, false).map_err(failed)?;
    let mut head = vec![0; HEADER_LIMIT_BYTES];
    let count = read_full(file.as_ref(), &mut head, 0).map_err(failed)?;
    head.truncate(count);
    Ok(head)
}

/// Every encrypted file of a cluster on tier 1, with its recipients.
///
/// # Errors
/// An I/O error of the disk.
pub fn locked(disk: &dyn Disk, root: &Path, cluster: &ClusterName) -> Result<Vec<Locked>, Error> {
    let mut found = Vec::new();
    for path in age_files(disk, &root.join(cluster.as_str()))?.into_iter().flatten() {
        let recipients = crypt::recipients_of(&head(disk, &path)?).unwrap_or_default();
        found.push(Locked { path, recipients });
    }
    Ok(found)
}

/// Checks that the keys decrypt the files on tier 1, by the key files of each cluster and the first and last encrypted
/// file of each WAL directory. Changes nothing. A damaged file is not a problem of keys, so it passes.
///
/// # Errors
/// `Denied`, with the file and its recipients; an I/O error of the disk.
pub fn check_keys(disk: &dyn Disk, root: &Path, at_rest: &AtRest) -> Result<(), Error> {
    for entry in names(disk, root)?.iter().filter(|entry| entry.is_dir) {
        if ClusterName::parse_generation(&entry.name).is_err() {
            continue;
        }
        let directory = root.join(&entry.name);
        let groups = age_files(disk, &directory)?;
        for (number, group) in groups.iter().enumerate() {
            let ends = [group.first(), group.last()];
            let some: Vec<&PathBuf> = match number {
                0 => group.iter().collect(),
                _ => ends.into_iter().flatten().collect(),
            };
            for path in some {
                check_file(disk, path, at_rest)?;
            }
        }
        if at_rest.reading().is_none() {
            check_journals(disk, &directory.join("wal"), at_rest)?;
        }
    }
    Ok(())
}

/// Fails if there is an encrypted journal but no key at all.
fn check_journals(disk: &dyn Disk, wal: &Path, at_rest: &AtRest) -> Result<(), Error> {
    for directory in names(disk, wal)?.iter().filter(|entry| entry.is_dir) {
        let directory = wal.join(&directory.name);
        for entry in names(disk, &directory)?.iter().filter(|e| e.name.ends_with(".open")) {
            let path = directory.join(&entry.name);
            let encrypted =
                JournalHeader::decode(&head(disk, &path)?).is_ok_and(|h| h.key.is_some());
            if encrypted {
                at_rest.need(path.display())?;
            }
        }
    }
    Ok(())
}

fn check_file(disk: &dyn Disk, path: &Path, at_rest: &AtRest) -> Result<(), Error> {
    let head = head(disk, path)?;
    // Without journals an unused data key does no harm, and encrypted journals report the missing key themselves.
    if at_rest.reading().is_none() && path.ends_with(OPEN_KEY) {
        return Ok(());
    }
    match at_rest.need(path.display())?.decrypt(io::Cursor::new(head)) {
        Err(error) if error.kind == Kind::Denied => Err(error.at(path.display())),
        _ => Ok(()),
    }
}

impl WalStore {
    /// Wraps the data key of a cluster's journals for the current recipients. False when there is none.
    ///
    /// # Errors
    /// `Denied`, `Corrupt`, or an I/O error of the disk; then the old wrapping is still in place.
    pub fn rewrap_key(&self, name: &ClusterName) -> Result<bool, Error> {
        let cluster = self.need(name, Op::Write)?;
        let _one = lock(&cluster.op);
        match self.at_rest().writing() {
            Some(keys) => cipher::rewrap(self.disk(), &cluster.directory().join(OPEN_KEY), keys),
            None => Ok(false),
        }
    }

    /// Rewrites a finished file as the settings ask for (encrypted for the current recipients, or plain), unless it
    /// already is. This reads all of the file and so verifies it. True when the file was rewritten.
    ///
    /// # Errors
    /// `Denied`, `Corrupt`, or an I/O error of the disk; then the old file is still in place.
    pub fn rewrap(&self, name: &ClusterName, file: WalFile) -> Result<bool, Error> {
        let cluster = self.need(name, Op::Write)?;
        let _one = lock(&cluster.op);
        let Some(stored) = cluster.stored(file)? else { return Ok(false) };
        let good = match (self.at_rest().writing(), stored.form) {
            (None, form) => form == Form::Plain,
            (Some(_), Form::Plain) => false,
            (Some(keys), Form::Age) => {
                let there = crypt::recipients_of(&head(self.disk(), &stored.path)?);
                there.is_some_and(|there| there == keys.recipients())
            }
        };
        if good {
            return Ok(false);
        }
        let limit = cluster.pinned()?.segment_size.bytes();
        if !matches!(file, WalFile::History(_)) {
            let found = cluster.plain_size_of(&stored, limit)?;
            if matches!(file, WalFile::Segment(_)) && found != limit {
                let detail = format!("expected {limit} bytes inside, found {found}");
                return Err(Error::new(Kind::Corrupt, Op::Read, stored.path.display(), detail));
            }
        }
        let mut plain = cluster.open_plain(&stored.path, stored.form)?;
        cluster.write_stored(file, |sink, _| {
            let copied = io::copy(&mut plain, sink);
            copied.map(drop).map_err(|e| crypt::payload_error(stored.path.display(), &e))
        })?;
        Ok(true)
    }
}
