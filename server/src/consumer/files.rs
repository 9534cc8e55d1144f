//! Finished files of tier 1, as the consumer needs to see them.

use klio_pg::{SegmentSize, TimelineId};
use klio_storage::{
    Error,
    crypt::AtRest,
    layout::{ClusterName, Form, WalFile},
    wal::{Gap, Position, Removed, WalStore},
};
use std::path::PathBuf;

/// A finished file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredFile {
    pub file: WalFile,
    /// Bytes on disk.
    pub size: u64,
    /// Unix time in seconds at which it was finished.
    pub modified_unix: u64,
}

/// Reads tier 1. Unless a method says otherwise it blocks, so it is called on blocking threads.
pub trait Tier1Files: Send + Sync + 'static {
    /// The clusters that have any files.
    ///
    /// # Errors
    /// An I/O error of the disk.
    fn clusters(&self) -> Result<Vec<ClusterName>, Error>;
    /// Every finished file of a cluster.
    ///
    /// # Errors
    /// An I/O error of the disk.
    fn list(&self, cluster: &ClusterName) -> Result<Vec<StoredFile>, Error>;
    /// The path at which a finished file lies in a form, if it exists.
    fn path(&self, cluster: &ClusterName, file: WalFile, form: Form) -> PathBuf;
    /// How finished files are encrypted.
    fn at_rest(&self) -> AtRest;
    /// Where a cluster's archive state is stored.
    fn archive_path(&self, cluster: &ClusterName) -> PathBuf;
    /// The cluster's segment size; `None` while nothing is pinned.
    fn segment_size(&self, cluster: &ClusterName) -> Option<SegmentSize>;
    /// The recorded gaps. From memory: never waits for a disk.
    fn gaps(&self, cluster: &ClusterName) -> Vec<Gap>;
    /// How far each timeline with WAL reaches, sealed or not. From memory: never waits for a disk.
    fn positions(&self, cluster: &ClusterName) -> Vec<Position>;
    /// Whether the timeline is undecided or retired. From memory.
    fn is_aside(&self, _: &ClusterName, _: TimelineId) -> bool {
        false
    }
    /// Whether retention has expired the file in both tiers. From memory: never waits for a disk.
    fn expired(&self, cluster: &ClusterName, file: WalFile) -> bool;
    /// Reads a finished file again that was found damaged, and sets it aside if it is. Returns true if so; the file
    /// then counts as missing.
    ///
    /// # Errors
    /// An I/O error of the disk.
    fn doubt(&self, _: &ClusterName, _: WalFile) -> Result<bool, Error> {
        Ok(false)
    }
}

/// The store itself: knows what is pinned, and lists its finished files.
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

    fn path(&self, cluster: &ClusterName, file: WalFile, form: Form) -> PathBuf {
        self.root().join(file.key_in(cluster, form))
    }

    fn at_rest(&self) -> AtRest {
        WalStore::at_rest(self).clone()
    }

    fn archive_path(&self, cluster: &ClusterName) -> PathBuf {
        klio_storage::catalog::archive_file::path(self.root(), cluster)
    }

    fn segment_size(&self, cluster: &ClusterName) -> Option<SegmentSize> {
        self.pinned(cluster).map(|pinned| pinned.segment_size)
    }

    fn gaps(&self, cluster: &ClusterName) -> Vec<Gap> {
        WalStore::gaps(self, cluster)
    }

    fn positions(&self, cluster: &ClusterName) -> Vec<Position> {
        WalStore::positions(self, cluster)
    }

    fn is_aside(&self, cluster: &ClusterName, timeline: TimelineId) -> bool {
        self.timelines(cluster).is_aside(timeline)
    }

    fn expired(&self, cluster: &ClusterName, file: WalFile) -> bool {
        self.removed(cluster, file) == Some(Removed::Expired)
    }

    fn doubt(&self, cluster: &ClusterName, file: WalFile) -> Result<bool, Error> {
        WalStore::doubt(self, cluster, file)
    }
}
