//! Puts a sealed file that rotted and was set aside back in place, from a good copy. This is for partial segments,
//! which no PostgreSQL sends again once their timeline is over.
//!
//! Nothing changes before the copy has arrived completely, was synced and was verified. The file is then renamed under
//! the locks with which a writer is opened, so that it never appears beside a journal that continues.

use super::{
    WalStore,
    cluster::{Cluster, lock},
    rotten::Sealed,
};
use crate::{
    Error, Kind, Op,
    disk::{FileHandle, durable},
    layout::{ClusterName, Form, WalFile},
};
use klio_pg::SegmentName;
use std::{path::PathBuf, sync::Arc};

/// A copy of a sealed file that is being received. Dropping it discards the copy.
#[derive(Debug)]
pub struct Mend {
    cluster: Arc<Cluster>,
    file: WalFile,
    form: Form,
    tmp: PathBuf,
    handle: FileHandle,
    at: u64,
}

impl WalStore {
    /// The files of which tier 2 may have a good copy: segments for [`WalStore::refill`], partial ones for
    /// [`WalStore::mend`].
    pub fn mendable(&self, name: &ClusterName) -> Vec<WalFile> {
        let Some(cluster) = self.find(name) else { return Vec::new() };
        let Some(size) = lock(&cluster.state).pinned.map(|pinned| pinned.segment_size) else {
            return Vec::new();
        };
        let holes = self.holes(name).into_iter();
        let whole = holes.map(|hole| SegmentName::containing(hole.timeline, hole.start, size));
        let mut files: Vec<WalFile> = whole.map(WalFile::Segment).collect();
        let rotten = self.damaged(name).into_iter().filter(|d| d.sealed);
        let begun = rotten.filter(|d| d.to.offset_in(size) != 0);
        files.extend(
            begun.map(|d| WalFile::Partial(SegmentName::containing(d.timeline, d.from, size))),
        );
        files
    }

    /// Begins to receive a copy of a sealed file, in the given stored form.
    ///
    /// # Errors
    /// `NotFound` for an unknown cluster; an I/O error of the disk.
    pub fn mend(&self, name: &ClusterName, file: WalFile, form: Form) -> Result<Mend, Error> {
        let cluster = self.need(name, Op::Create)?;
        let path = cluster.path_in(file, form);
        let tmp = durable::tmp_path(&path.with_extension("mend"));
        durable::remove_if_there(cluster.disk(), &tmp)?;
        let handle = cluster.disk().create_new(&tmp).map_err(|e| Error::io(Op::Create, &tmp, e))?;
        Ok(Mend { cluster, file, form, tmp, handle, at: 0 })
    }
}

impl Mend {
    /// Appends the next stored bytes.
    ///
    /// # Errors
    /// An I/O error of the disk.
    pub fn push(&mut self, stored: &[u8]) -> Result<(), Error> {
        let written = self.handle.write_all_at(stored, self.at);
        self.at += stored.len() as u64;
        written.map_err(|e| Error::io(Op::Write, &self.tmp, e))
    }

    /// Verifies the copy and renames it into place, durably.
    ///
    /// # Errors
    /// `Corrupt` when the copy is damaged or incomplete, `Conflict` when the file is no longer missing, or an I/O error
    /// of the disk.
    pub fn finish(self) -> Result<(), Error> {
        let Self { cluster, file, form, tmp, handle, .. } = &self;
        handle.sync_all().map_err(|e| Error::io(Op::Sync, tmp, e))?;
        let pinned = cluster.pinned()?;
        let (count, read) =
            cluster.read_sealed(Sealed { file: *file, path: tmp, form: *form }, None, &pinned);
        read?;
        let _one = lock(&cluster.op);
        let _files = lock(&cluster.files);
        let start = lock(&cluster.state).missed_begin(*file, count).ok_or_else(|| {
            let detail = "expected a missing file of at most this length, found none";
            Error::new(Kind::Conflict, Op::Rename, *file, detail)
        })?;
        let path = cluster.path_in(*file, *form);
        durable::rename(cluster.disk(), tmp, &path)?;
        lock(&cluster.state).found_again(*file, start, start.advance(count));
        cluster.store_damaged()
    }
}

impl Drop for Mend {
    fn drop(&mut self) {
        if let Err(error) = durable::remove_if_there(self.cluster.disk(), &self.tmp) {
            tracing::warn!(%error, "cannot remove a temporary copy of a sealed file; it stays until the next start");
        }
    }
}
