//! What a restore reads of a backup before it begins: the files outside of PostgreSQL's own directories, all links,
//! pg_control, prepared transactions, and whether `global` has subscriptions.
//!
//! Memory is bounded (RESTORE5): no file of a database is read, and none that is larger than [`FILE_MAX`].

use super::{included::Read, joined, of_storage};
use crate::error::{Error, Failure};
use klio_pg::{ControlFile, Prepared};
use klio_proto::Code;
use klio_storage::repository::{Entry, Reader, StoredKind};
use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

/// Files with settings are smaller than this.
const FILE_MAX: u64 = 1 << 20;
/// The directory with one file for each prepared transaction.
const TWOPHASE: &str = "pg_twophase";
/// The OID of `pg_subscription`, and the magic number at the start of `pg_filenode.map` (`relmapper.c`).
const SUBSCRIPTIONS: (u32, u32) = (6100, 0x0059_2717);

/// What was collected of a snapshot; paths are relative to the data directory.
#[derive(Debug)]
pub struct Stored {
    reader: Reader,
    files: BTreeMap<PathBuf, Entry>,
    /// Every link, and where it leads.
    pub links: BTreeMap<PathBuf, PathBuf>,
    control: Option<Entry>,
}

impl Stored {
    /// Contains nothing yet; every entry is then passed to [`Stored::see`].
    pub fn new(reader: Reader) -> Self {
        Self { reader, files: BTreeMap::new(), links: BTreeMap::new(), control: None }
    }

    /// Takes in the next entry of the snapshot.
    pub fn see(&mut self, entry: &Entry) {
        let Ok(path) = entry.path.strip_prefix("data") else { return };
        match &entry.kind {
            StoredKind::Symlink(to) => drop(self.links.insert(path.to_owned(), to.clone())),
            StoredKind::File { .. } if path == Path::new(ControlFile::PATH) => {
                self.control = Some(entry.clone());
            }
            StoredKind::File { size, .. } if *size <= FILE_MAX && is_looked_at(path) => {
                self.files.insert(path.to_owned(), entry.clone());
            }
            // The content of these is not read; only their size matters.
            StoredKind::File { .. } if path.starts_with("global") => {
                self.files.insert(path.to_owned(), entry.clone());
            }
            _ => {}
        }
    }

    /// Reads pg_control.
    ///
    /// # Errors
    /// `Corrupt`, or the repository cannot be read.
    pub fn control(&self) -> Result<ControlFile, Error> {
        let corrupt = |what: String| Error::new(Failure::Code(Code::Corrupt), what);
        let entry = self.control.as_ref();
        let entry = entry.ok_or_else(|| corrupt("the backup has no pg_control".into()))?;
        ControlFile::parse(&self.content(entry)?)
            .map_err(|error| corrupt(format!("the snapshot's pg_control: {error}")))
    }

    /// Whether the backup has this file or link.
    pub fn has(&self, path: &str) -> bool {
        let path = Path::new(path);
        self.files.contains_key(path) || self.links.contains_key(path)
    }

    /// Whether `pg_subscription` has rows, or had some.
    ///
    /// # Errors
    /// The repository cannot be read.
    pub fn subscriptions(&self) -> Result<bool, Error> {
        let Some(map) = self.stored(Path::new("global/pg_filenode.map"))? else { return Ok(false) };
        let file = filenode(&map, SUBSCRIPTIONS.0);
        let entry = file.and_then(|file| self.files.get(Path::new(&format!("global/{file}"))));
        Ok(entry
            .is_some_and(|entry| matches!(entry.kind, StoredKind::File { size, .. } if size > 0)))
    }

    /// The transactions that were prepared before the backup's checkpoint.
    ///
    /// # Errors
    /// The repository cannot be read.
    pub fn prepared(&self) -> Result<Vec<Prepared>, Error> {
        let files = self.files.iter().filter(|(path, _)| path.starts_with(TWOPHASE));
        let states = files.map(|(_, entry)| Ok(Prepared::parse(&self.content(entry)?)));
        states.filter_map(Result::transpose).collect()
    }

    fn content(&self, entry: &Entry) -> Result<Vec<u8>, Error> {
        let StoredKind::File { chunks, .. } = &entry.kind else { return Ok(Vec::new()) };
        let mut content = Vec::new();
        for id in chunks {
            content.extend_from_slice(&self.reader.chunk(id).map_err(|e| of_storage(&e))?);
        }
        Ok(content)
    }
}

/// Runs `work` on a thread that may block.
///
/// # Errors
/// Those of `work`.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    joined(tokio::task::spawn_blocking(move || Ok(work())).await)?
}

/// Whether a file is read: it is outside of the directories that PostgreSQL manages, or a prepared transaction.
fn is_looked_at(path: &Path) -> bool {
    let first = path.iter().next().map(|name| name.to_string_lossy().into_owned());
    let first = first.unwrap_or_default();
    let plain = path.components().count() == 1 || path.starts_with(TWOPHASE);
    plain || (first != "base" && !first.starts_with("pg_"))
}

/// The file number of a mapped relation. The map has a magic number, a count, and pairs of OID and file number.
fn filenode(map: &[u8], oid: u32) -> Option<u32> {
    let mut words =
        map.chunks_exact(4).map(|word| word.iter().rev().fold(0, |n, b| n << 8 | u32::from(*b)));
    let (magic, count) = (words.next()?, words.next()?);
    let pairs: Vec<u32> = words.take(usize::try_from(count).ok()?.min(64) * 2).collect();
    let found = pairs.chunks_exact(2).find(|pair| pair[0] == oid)?;
    (magic == SUBSCRIPTIONS.1).then_some(found[1])
}

impl Read for Stored {
    fn stored(&self, path: &Path) -> Result<Option<Vec<u8>>, Error> {
        self.files.get(path).map(|entry| self.content(entry)).transpose()
    }
    fn link(&self, path: &Path) -> Option<PathBuf> {
        self.links.get(path).cloned()
    }
    fn stored_names(&self, directory: &Path) -> Vec<PathBuf> {
        let all = self.files.keys().chain(self.links.keys());
        all.filter(|path| path.parent() == Some(directory)).cloned().collect()
    }
    fn outside(&self, path: &Path) -> io::Result<Vec<u8>> {
        let meta = fs::metadata(path)?;
        // Reading a pipe or a device could block for ever.
        if !meta.is_file() || meta.len() > FILE_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        fs::read(path)
    }
    fn outside_names(&self, directory: &Path) -> io::Result<Vec<PathBuf>> {
        fs::read_dir(directory)?.map(|entry| entry.map(|entry| entry.path())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapped_relation_is_found() {
        let words = [0x0059_2717_u32, 2, 1262, 1262, 6100, 16_401, 0, 0];
        let map: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        assert_eq!(filenode(&map, 6100), Some(16_401));
        assert_eq!(filenode(&map, 6000), None);
        assert_eq!(filenode(&map[..12], 6100), None);
        assert_eq!(filenode(b"", 6100), None);
    }

    #[test]
    fn files_with_settings_are_looked_at_and_tables_are_not() {
        for path in ["postgresql.conf", "pg_hba.conf", "conf.d/x.conf", "certs/a/b", "global/6100"]
        {
            assert!(is_looked_at(Path::new(path)), "{path}");
        }
        for path in ["base/5/1259", "pg_xact/0000", "pg_wal/x"] {
            assert!(!is_looked_at(Path::new(path)), "{path}");
        }
    }
}
