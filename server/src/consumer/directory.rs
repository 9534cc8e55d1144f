//! Tier 1 as a plain directory, by layout.rs alone: tests place files of their choice there, such as a damaged one,
//! without a store that would object.

use super::{StoredFile, Tier1Files};
use klio_pg::SegmentSize;
use klio_storage::{
    Error, Op,
    crypt::AtRest,
    layout::{ClusterName, Form, WalFile},
    wal::{Gap, Position},
};
use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::UNIX_EPOCH,
};

/// A directory of sealed files, and the facts that a store would know. Clones share it.
#[derive(Debug, Clone)]
pub(super) struct Directory {
    root: PathBuf,
    segment_size: SegmentSize,
    known: Arc<Mutex<Known>>,
}

/// The same for every cluster.
#[derive(Debug, Default)]
struct Known {
    gaps: Vec<Gap>,
    positions: Vec<Position>,
}

impl Directory {
    pub(super) fn new(root: impl Into<PathBuf>, segment_size: SegmentSize) -> Self {
        Self { root: root.into(), segment_size, known: Arc::default() }
    }

    /// Records a gap.
    pub(super) fn record_gap(&self, gap: Gap) {
        self.known.lock().unwrap().gaps.push(gap);
    }

    /// Sets how far timelines reach.
    pub(super) fn set_positions(&self, positions: &[Position]) {
        self.known.lock().unwrap().positions = positions.to_vec();
    }
}

impl Tier1Files for Directory {
    fn clusters(&self) -> Result<Vec<ClusterName>, Error> {
        let entries = entries(&self.root)?;
        let named = entries.iter().filter(|(_, path)| path.is_dir());
        Ok(named.filter_map(|(name, _)| name.parse().ok()).collect())
    }

    fn list(&self, cluster: &ClusterName) -> Result<Vec<StoredFile>, Error> {
        let wal = self.root.join(cluster.as_str()).join("wal");
        let mut found = Vec::new();
        for (name, path) in entries(&wal)? {
            if path.is_dir() {
                for (file, path) in entries(&path)? {
                    found.extend(stored(&format!("{name}/{file}"), &path)?);
                }
            } else {
                found.extend(stored(&name, &path)?);
            }
        }
        Ok(found)
    }

    fn path(&self, cluster: &ClusterName, file: WalFile, form: Form) -> PathBuf {
        self.root.join(file.key_in(cluster, form))
    }

    fn at_rest(&self) -> AtRest {
        AtRest::Off
    }

    fn archive_path(&self, cluster: &ClusterName) -> PathBuf {
        klio_storage::catalog::archive_file::path(&self.root, cluster)
    }

    fn segment_size(&self, _: &ClusterName) -> Option<SegmentSize> {
        Some(self.segment_size)
    }

    fn gaps(&self, _: &ClusterName) -> Vec<Gap> {
        self.known.lock().unwrap().gaps.clone()
    }

    fn positions(&self, _: &ClusterName) -> Vec<Position> {
        self.known.lock().unwrap().positions.clone()
    }

    fn expired(&self, _: &ClusterName, _: WalFile) -> bool {
        false
    }
}

/// The entries of a directory; empty if it does not exist.
fn entries(directory: &Path) -> Result<Vec<(String, PathBuf)>, Error> {
    let fail = |error| Error::io(Op::List, directory, error);
    let listing = match fs::read_dir(directory) {
        Ok(listing) => listing,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(fail(error)),
    };
    let mut found = Vec::new();
    for entry in listing {
        let entry = entry.map_err(fail)?;
        if let Ok(name) = entry.file_name().into_string() {
            found.push((name, entry.path()));
        }
    }
    Ok(found)
}

fn stored(relative: &str, path: &Path) -> Result<Option<StoredFile>, Error> {
    let Some((file, _)) = WalFile::parse_stored(relative) else { return Ok(None) };
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None), // just removed
        Err(error) => return Err(Error::io(Op::Read, path, error)),
    };
    let modified = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    let modified_unix = modified.map_or(0, |since| since.as_secs());
    Ok(Some(StoredFile { file, size: metadata.len(), modified_unix }))
}

#[test]
fn a_directory_shows_finished_files_only() {
    let directory = tempfile::tempdir().unwrap();
    let files = Directory::new(directory.path(), SegmentSize::new(1 << 20).unwrap());
    assert_eq!(files.clusters().unwrap(), vec![]);
    let wal = directory.path().join("pg-1/wal");
    fs::create_dir_all(wal.join("00000001")).unwrap();
    let name = "000000010000000000000001";
    for file in [
        format!("00000001/{name}.zst"),
        format!("00000001/{name}.open"),
        format!("00000001/{name}.zst.tmp"),
        "00000002.history".into(),
        "notes.txt".into(),
    ] {
        fs::write(wal.join(file), b"12345").unwrap();
    }
    fs::write(directory.path().join("Not-A-Cluster"), b"").unwrap();
    let cluster: ClusterName = "pg-1".parse().unwrap();
    assert_eq!(files.clusters().unwrap(), vec![cluster.clone()]);
    let mut listed = files.list(&cluster).unwrap();
    listed.sort_by_key(|f| f.file);
    let names: Vec<String> = listed.iter().map(|f| f.file.to_string()).collect();
    assert_eq!(names, [name, "00000002.history"]);
    assert!(listed.iter().all(|f| f.size == 5 && f.modified_unix > 1_700_000_000));
}
