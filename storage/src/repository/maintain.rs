//! Operations of the server only: forgetting snapshots, and removing what no snapshot needs (P8).
//!
//! REPO4: removal has two phases. An unneeded pack is marked, and is removed after it has been marked for
//! `keep_marked`. If it is needed again meanwhile, it is unmarked. Packs younger than `keep_marked` are not touched at
//! all, because they may belong to a backup that has not saved its snapshot yet. So nothing that a backup or a restore
//! saw in an index is removed while it runs, as long as it takes less than `keep_marked`. P6: a snapshot or index that
//! cannot be read makes the whole prune fail.

use super::{
    Repository, SnapshotId, Snapshots,
    needed::needed,
    reader::{Reader, tree_of},
};
use crate::{
    Error, Kind, Op,
    layout::{BaseFile, BaseKind},
};
use rustic_core::{PruneOptions, PruneStats, jiff::Span};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

/// The result of a prune.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PruneOutcome {
    /// Packs that were marked now, to be removed after `keep_marked`.
    pub packs_marked: u64,
    /// Packs whose needed contents were written to new packs; they were marked as well.
    pub packs_repacked: u64,
    /// Marked packs that are needed again.
    pub packs_recovered: u64,
    /// Packs that were removed.
    pub packs_removed: u64,
    /// Size of the removed packs in bytes.
    pub bytes_removed: u64,
    /// Bytes that are still needed.
    pub bytes_used: u64,
    /// Bytes that will be removed: marked, or waiting to be repacked.
    pub bytes_unused: u64,
}

/// rustic's own total of unused packs includes the young ones that it keeps.
fn packs_to_mark(stats: &PruneStats) -> u64 {
    // The type of the planned action is not exported, but its name is.
    let marked = stats.debug.0.iter().filter(|(key, _)| format!("{:?}", key.todo) == "MarkDelete");
    marked.map(|(_, packs)| packs.packs).sum()
}

impl Repository {
    /// Forgets snapshots. Data that only they needed stays until `prune`. A snapshot that no longer exists is not an
    /// error.
    ///
    /// # Errors
    /// An error of the files; the snapshots before the failed one are then forgotten.
    pub fn forget(&self, ids: &[SnapshotId]) -> Result<(), Error> {
        ids.iter().try_for_each(|id| self.files.remove(id.file()))
    }

    /// Removes packs that were marked long enough ago, and marks packs that no snapshot needs. Only one may run per
    /// repository, and none beside a backup that has been running for longer than `keep_marked`.
    ///
    /// # Errors
    /// An error of the files, or anything that cannot be read.
    pub fn prune(&self, keep_marked: Duration) -> Result<PruneOutcome, Error> {
        let (opened, _) = self.rustic(Snapshots::Save)?;
        let keep =
            i64::try_from(keep_marked.as_secs()).ok().and_then(|s| Span::new().try_seconds(s).ok());
        let keep = keep.ok_or_else(|| {
            let detail = format!("keep_marked of {keep_marked:?} is out of range");
            Error::new(Kind::Invalid, Op::Remove, self.place(), detail)
        })?;
        let mut options = PruneOptions::default();
        options.keep_delete = keep;
        options.keep_pack = keep;
        options.instant_delete = false;
        // Listed before the plan lists them: a surplus snapshot here costs one check, a missing one would cost data.
        let known = self.files.list(BaseKind::Snapshot)?;
        let plan = opened.prune_plan(&options).map_err(|e| self.fail(Op::Read, e))?;
        let (stats, size) = (&plan.stats, plan.stats.size_sum());
        let outcome = PruneOutcome {
            packs_marked: packs_to_mark(stats),
            packs_repacked: stats.packs.repack,
            packs_recovered: stats.packs_to_delete.recover,
            packs_removed: stats.packs_to_delete.remove,
            bytes_removed: stats.size_to_delete.remove,
            bytes_used: size.used,
            bytes_unused: size.unused,
        };
        opened.prune(&options, plan).map_err(|e| self.fail(Op::Remove, e))?;
        self.keep_newcomers(&known)?;
        Ok(outcome)
    }

    /// Unmarks packs that are needed by a snapshot which was saved meanwhile.
    fn keep_newcomers(&self, known: &[(BaseFile, u64)]) -> Result<(), Error> {
        let mut now = self.files.list(BaseKind::Snapshot)?;
        now.retain(|snapshot| !known.contains(snapshot));
        if now.is_empty() {
            return Ok(());
        }
        let index = Arc::new(self.index()?);
        for (file, _) in now {
            let root = tree_of(&self.snapshot_file(SnapshotId::new(file.id))?)?;
            let reader = Reader::new(self.clone(), Arc::clone(&index), root);
            self.put_back(&index, &needed(&reader)?)?;
        }
        Ok(())
    }

    /// The files that are needed to restore these snapshots: packs, index files, the snapshots, the config and the
    /// keys.
    ///
    /// # Errors
    /// `NotFound` when one of them is missing; `Corrupt` when something cannot be read.
    pub fn packs_of(&self, snapshots: &[SnapshotId]) -> Result<BTreeSet<BaseFile>, Error> {
        Ok(self.needed_by(snapshots)?.into_keys().collect())
    }

    /// As `packs_of`, with the size that each file must have, if it is known: for packs it comes from the index. A
    /// missing pack is included only when nothing else has its contents (ABSENT1).
    ///
    /// # Errors
    /// As `packs_of`.
    pub fn needed_by(
        &self,
        snapshots: &[SnapshotId],
    ) -> Result<BTreeMap<BaseFile, Option<u64>>, Error> {
        let index = Arc::new(self.index()?);
        let mut files = BTreeMap::from([(BaseFile::CONFIG, None)]);
        files.extend(self.files.list(BaseKind::Key)?.into_iter().map(|(file, _)| (file, None)));
        for id in snapshots {
            files.insert(id.file(), None);
            let root = tree_of(&self.snapshot_file(*id)?)?;
            let reader = Reader::new(self.clone(), Arc::clone(&index), root);
            for pack in needed(&reader)? {
                let pack = &index.packs[pack as usize];
                files.insert(pack.file(), Some(pack.size));
                files.insert(BaseFile { kind: BaseKind::Index, id: pack.index }, None);
            }
        }
        Ok(files)
    }
}
