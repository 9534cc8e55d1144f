//! Finished files of tier 1, as the consumer needs to see them.

use klio_pg::SegmentSize;
use klio_storage::{
    Error, Op,
    layout::{ClusterName, WalFile},
    wal::WalStore,
};
use std::{
    fs, io,
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
};

/// A finished file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredFile {
    /// Which.
    pub file: WalFile,
    /// Bytes on disk.
    pub size: u64,
    /// Unix time in seconds at which it was finished.
    pub modified_unix: u64,
}

/// Reads tier 1. Blocking: called off the runtime's threads.
pub trait Tier1Files: Send + Sync + 'static {
    /// The clusters that have anything.
    ///
    /// # Errors
    /// As the disk fails.
    fn clusters(&self) -> Result<Vec<ClusterName>, Error>;
    /// Every finished file of a cluster.
    ///
    /// # Errors
    /// As the disk fails.
    fn list(&self, cluster: &ClusterName) -> Result<Vec<StoredFile>, Error>;
    /// Where a finished file lies.
    fn path(&self, cluster: &ClusterName, file: WalFile) -> PathBuf;
    /// Where the archive's state of a cluster is kept.
    fn archive_path(&self, cluster: &ClusterName) -> PathBuf;
    /// The cluster's segment size; `None` while nothing is pinned.
    fn segment_size(&self, cluster: &ClusterName) -> Option<SegmentSize>;
}

/// The store itself: knows what is pinned, and lists what it has finished.
impl Tier1Files for WalStore {
    fn clusters(&self) -> Result<Vec<ClusterName>, Error> {
        Ok(WalStore::clusters(self))
    }

    fn list(&self, cluster: &ClusterName) -> Result<Vec<StoredFile>, Error> {
        let files = WalStore::list(self, cluster)?.into_iter();
        let seconds = |unix: f64| unix.max(0.0) as u64;
        let files = files.map(|f| StoredFile {
            file: f.file,
            size: f.size,
            modified_unix: seconds(f.modified_unix),
        });
        Ok(files.collect())
    }

    fn path(&self, cluster: &ClusterName, file: WalFile) -> PathBuf {
        self.root().join(file.key(cluster))
    }

    fn archive_path(&self, cluster: &ClusterName) -> PathBuf {
        klio_storage::catalog::archive_file::path(self.root(), cluster)
    }

    fn segment_size(&self, cluster: &ClusterName) -> Option<SegmentSize> {
        self.pinned(cluster).map(|pinned| pinned.segment_size)
    }
}

/// Tier 1 as a plain directory, by layout.rs alone.
#[derive(Debug, Clone)]
pub struct Directory {
    root: PathBuf,
}

impl Directory {
    /// The tier-1 root.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
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

    fn path(&self, cluster: &ClusterName, file: WalFile) -> PathBuf {
        self.root.join(file.key(cluster))
    }

    fn archive_path(&self, cluster: &ClusterName) -> PathBuf {
        klio_storage::catalog::archive_file::path(&self.root, cluster)
    }

    /// `segment_size` in `cluster.json`, at the top or one level below it.
    fn segment_size(&self, cluster: &ClusterName) -> Option<SegmentSize> {
        let bytes = fs::read(self.root.join(cluster.as_str()).join("cluster.json")).ok()?;
        let value: serde_json::Value = serde_json::from_slice(&bytes).ok()?;
        let object = value.as_object()?;
        let field = object
            .get("segment_size")
            .or_else(|| object.values().find_map(|inner| inner.get("segment_size")))?;
        SegmentSize::new(u32::try_from(field.as_u64()?).ok()?).ok()
    }
}

/// What a folder holds; nothing where there is no folder.
fn entries(folder: &Path) -> Result<Vec<(String, PathBuf)>, Error> {
    let fail = |error| Error::io(Op::List, folder, error);
    let listing = match fs::read_dir(folder) {
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
    let Some(file) = WalFile::parse_relative(relative) else { return Ok(None) };
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None), // just removed
        Err(error) => return Err(Error::io(Op::Read, path, error)),
    };
    let modified = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    let modified_unix = modified.map_or(0, |since| since.as_secs());
    Ok(Some(StoredFile { file, size: metadata.len(), modified_unix }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_shows_finished_files_only() {
        let folder = tempfile::tempdir().unwrap();
        let files = Directory::new(folder.path());
        assert_eq!(files.clusters().unwrap(), vec![]);
        let wal = folder.path().join("pg-1/wal");
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
        fs::write(folder.path().join("Not-A-Cluster"), b"").unwrap();
        let cluster: ClusterName = "pg-1".parse().unwrap();
        assert_eq!(files.clusters().unwrap(), vec![cluster.clone()]);
        let mut listed = files.list(&cluster).unwrap();
        listed.sort_by_key(|f| f.file);
        let names: Vec<String> = listed.iter().map(|f| f.file.to_string()).collect();
        assert_eq!(names, [name, "00000002.history"]);
        assert!(listed.iter().all(|f| f.size == 5 && f.modified_unix > 1_700_000_000));
        assert_eq!(files.segment_size(&cluster), None);
        let pinned = folder.path().join("pg-1/cluster.json");
        for text in
            ["{\"segment_size\":1048576}", "{\"v\":1,\"cluster\":{\"segment_size\":1048576}}"]
        {
            fs::write(&pinned, text).unwrap();
            assert_eq!(files.segment_size(&cluster), SegmentSize::new(1 << 20).ok());
        }
    }
}
