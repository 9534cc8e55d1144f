//! Combines the parts of a backup into one snapshot, and lists snapshots.
//!
//! REPO3: before a snapshot is saved, every tree of it is read again, every chunk is looked up in an index that was
//! read after the last write, and files and bytes are compared with the totals of the parts. Needed packs that
//! maintenance has marked meanwhile are unmarked first.

use super::{
    Part, Repository, SnapshotId, Snapshots, StoredKind,
    index::{BlobKind, Index, IndexJson, retried},
    reader::{Reader, sum, tree_of},
};
use crate::{
    Error, Kind, Op,
    layout::{BackupName, BaseKind, ClusterName},
    sum::Sha256Sum,
};
use rustic_core::{
    TreeId,
    jiff::{Timestamp, tz::TimeZone},
    last_modified_node,
    repofile::{SnapshotFile, SnapshotSummary as Summary},
};
use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

/// The metadata of a snapshot; stock restic shows it, too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotMeta {
    /// Host of the snapshot.
    pub cluster: ClusterName,
    /// Label and tag of the snapshot.
    pub backup: BackupName,
    /// Time of the snapshot: when the backup began.
    pub began: SystemTime,
}

/// What is known about a saved snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotSummary {
    pub id: SnapshotId,
    /// The backup it belongs to; `None` for a snapshot that klio did not make.
    pub backup: Option<BackupName>,
    /// When the backup began.
    pub began: SystemTime,
    /// The snapshot it was compared with.
    pub parent: Option<SnapshotId>,
    /// Number of files and links.
    pub files: u64,
    /// Number of these that were not read because the parent has them unchanged.
    pub files_unchanged: u64,
    /// Number of directories without the root.
    pub directories: u64,
    /// Total size of the files in bytes.
    pub bytes: u64,
    /// Bytes of new content, before compression.
    pub added_bytes: u64,
    /// Bytes that the new content took in the repository.
    pub stored_bytes: u64,
}

impl Repository {
    /// Merges the parts and saves the snapshot.
    ///
    /// # Errors
    /// `Invalid` when two parts contain the same file; `Corrupt` when something in a part is not in the repository.
    pub fn assemble(&self, parts: &[Part], meta: &SnapshotMeta) -> Result<SnapshotSummary, Error> {
        self.put_back_marked(|index| {
            parts
                .iter()
                .filter_map(|part| index.find(BlobKind::Tree, &part.tree).map(|p| p.pack))
                .collect()
        })?;
        let (root, trees_stored) = self.merge(parts)?;
        let index = self.index()?;
        let reader = Reader::new(self.clone(), Arc::new(index), root);
        let contents = contents(&reader)?;
        require_all(parts, &contents)?;
        self.put_back(reader.index(), &contents.packs)?;
        let mut snapshot = describe(parts, meta, &contents)?;
        snapshot.tree = TreeId::from(super::backend::id(root));
        if let Some(summary) = &mut snapshot.summary {
            summary.data_added_packed += trees_stored;
        }
        let id = self.save(snapshot.clone())?;
        summarise(id, &snapshot)
    }

    /// Every snapshot, oldest first.
    ///
    /// # Errors
    /// `Corrupt` when one is damaged.
    pub fn snapshots(&self) -> Result<Vec<SnapshotSummary>, Error> {
        let mut found = retried(|| {
            let files = self.files.list(BaseKind::Snapshot)?;
            let summary = |id| summarise(id, &self.snapshot_file(id)?);
            files
                .into_iter()
                .map(|(file, _)| summary(SnapshotId::new(file.id)))
                .collect::<Result<Vec<_>, _>>()
        })?;
        found.sort_by_key(|snapshot| (snapshot.began, snapshot.id));
        Ok(found)
    }

    /// The merged tree, and the number of bytes it added.
    fn merge(&self, parts: &[Part]) -> Result<(Sha256Sum, u64), Error> {
        if let [part] = parts {
            return Ok((part.tree, 0));
        }
        let trees: Vec<_> =
            parts.iter().map(|p| TreeId::from(super::backend::id(p.tree))).collect();
        retried(|| {
            let (opened, _) = self.rustic(Snapshots::Withhold)?;
            let indexed = opened.to_indexed_ids().map_err(|e| self.fail(Op::Read, e))?;
            let mut summary = Summary::default();
            let root = indexed
                .merge_trees(&trees, &last_modified_node, &mut summary)
                .map_err(|e| self.fail(Op::Write, e))?;
            Ok((sum(&root.to_hex())?, summary.data_added_packed))
        })
    }

    fn save(&self, snapshot: SnapshotFile) -> Result<SnapshotId, Error> {
        let (opened, trace) = self.rustic(Snapshots::Save)?;
        opened.save_snapshots(vec![snapshot]).map_err(|e| self.fail(Op::Write, e))?;
        match trace.saved().as_slice() {
            [file] => Ok(SnapshotId::new(file.id)),
            other => {
                let detail = format!("expected one saved snapshot, found {}", other.len());
                Err(Error::new(Kind::Io, Op::Write, self.place(), detail))
            }
        }
    }

    fn put_back_marked(&self, needed: impl FnOnce(&Index) -> BTreeSet<u32>) -> Result<(), Error> {
        let index = self.index()?;
        let needed = needed(&index);
        self.put_back(&index, &needed)
    }

    /// Unmarks packs that are needed although they are marked for removal, by naming them in a new index file.
    pub(super) fn put_back(&self, index: &Index, needed: &BTreeSet<u32>) -> Result<(), Error> {
        let packs: Vec<_> =
            needed.iter().filter_map(|&pack| index.marked_pack(pack).cloned()).collect();
        if packs.is_empty() {
            return Ok(());
        }
        tracing::info!(packs = packs.len(), "unmarking packs that are needed again");
        self.write_index(&IndexJson { packs, packs_to_delete: Vec::new() })?;
        Ok(())
    }
}

/// The contents of a snapshot.
#[derive(Debug, Default)]
pub(super) struct Contents {
    pub(super) files: u64,
    pub(super) directories: u64,
    pub(super) bytes: u64,
    /// Positions in `Index::packs`.
    pub(super) packs: BTreeSet<u32>,
}

/// Reads every tree of a snapshot and looks up every chunk.
pub(super) fn contents(reader: &Reader) -> Result<Contents, Error> {
    let mut all = Contents::default();
    let mut entries = reader.entries()?;
    for entry in &mut entries {
        let entry = entry?;
        match &entry.kind {
            StoredKind::Dir => all.directories += 1,
            StoredKind::Symlink(_) => all.files += 1,
            StoredKind::File { size, chunks } => {
                all.files += 1;
                let mut found = 0;
                for chunk in chunks {
                    let place = reader.chunk_place(chunk)?;
                    found += place.plain();
                    all.packs.insert(place.pack);
                }
                if found != *size {
                    let detail = format!("expected {size} bytes, found chunks with {found}");
                    return Err(Error::new(Kind::Corrupt, Op::Read, entry.path.display(), detail));
                }
                all.bytes += size;
            }
        }
    }
    all.packs.extend(entries.tree_packs());
    Ok(all)
}

fn require_all(parts: &[Part], found: &Contents) -> Result<(), Error> {
    let total = |of: fn(&Part) -> u64| parts.iter().map(of).sum::<u64>();
    let expected = (total(|p| p.files), total(|p| p.bytes));
    if expected == (found.files, found.bytes) {
        return Ok(());
    }
    let detail = format!(
        "expected (files, bytes) {expected:?}, found ({}, {}): a file may be in two parts",
        found.files, found.bytes
    );
    Err(Error::new(Kind::Invalid, Op::Write, "the merged snapshot", detail))
}

fn describe(parts: &[Part], meta: &SnapshotMeta, found: &Contents) -> Result<SnapshotFile, Error> {
    let time = Timestamp::try_from(meta.began)
        .map_err(|e| Error::new(Kind::Invalid, Op::Write, "the snapshot's time", e))?;
    let total = |of: fn(&Part) -> u64| parts.iter().map(of).sum::<u64>();
    let mut summary = Summary::default();
    summary.total_files_processed = found.files;
    summary.total_dirs_processed = found.directories;
    summary.total_bytes_processed = found.bytes;
    summary.files_unmodified = total(|p| p.files_unchanged);
    summary.files_new = found.files.saturating_sub(summary.files_unmodified);
    summary.data_added = total(|p| p.added_bytes);
    summary.data_added_packed = total(|p| p.stored_bytes);
    summary.backup_start = time.to_zoned(TimeZone::UTC);
    let mut snapshot = SnapshotFile {
        time: time.to_zoned(TimeZone::UTC),
        program_version: format!("klio {}", env!("CARGO_PKG_VERSION")),
        parent: parts.iter().find_map(|p| p.parent).map(|p| super::backend::id(p.file().id).into()),
        label: meta.backup.as_str().to_owned(),
        hostname: meta.cluster.to_string(),
        username: "klio".to_owned(),
        summary: Some(summary),
        ..SnapshotFile::default()
    };
    snapshot.paths.add("/".to_owned());
    snapshot.tags.add(meta.backup.as_str().to_owned());
    Ok(snapshot)
}

fn summarise(id: SnapshotId, snapshot: &SnapshotFile) -> Result<SnapshotSummary, Error> {
    tree_of(snapshot)?;
    let summary = snapshot.summary.clone().unwrap_or_default();
    let parent = snapshot.parent.map(|id| sum(&id.to_hex())).transpose()?;
    let began = SystemTime::from(snapshot.time.timestamp());
    Ok(SnapshotSummary {
        id,
        backup: snapshot.label.parse().ok(),
        began: began.max(UNIX_EPOCH),
        parent: parent.map(SnapshotId::new),
        files: summary.total_files_processed,
        files_unchanged: summary.files_unmodified,
        directories: summary.total_dirs_processed,
        bytes: summary.total_bytes_processed,
        added_bytes: summary.data_added,
        stored_bytes: summary.data_added_packed,
    })
}
