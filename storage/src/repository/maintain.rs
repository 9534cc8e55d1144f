//! What only the server does: forgetting snapshots, and removing what no snapshot needs (P8).
//!
//! REPO4: in two phases. A pack that is not needed is marked, and goes when it has been marked for `keep_marked`; one that is
//! needed again meanwhile is put back. Packs younger than `keep_marked` are not touched at all: they may belong to a
//! backup that has not saved its snapshot yet. So nothing that a backup or a restore saw in an index vanishes under it, as long
//! as it takes less than `keep_marked`. P6: a snapshot or index that cannot be read fails the whole prune.

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

/// What a prune did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PruneOutcome {
    /// Packs marked now, to go after `keep_marked`.
    pub packs_marked: u64,
    /// Packs whose useful rest was written anew; they were marked, too.
    pub packs_repacked: u64,
    /// Marked packs that are needed again.
    pub packs_recovered: u64,
    /// Packs that were removed.
    pub packs_removed: u64,
    /// Their bytes.
    pub bytes_removed: u64,
    /// Bytes that are still needed.
    pub bytes_used: u64,
    /// Bytes that will go, marked or waiting to be repacked.
    pub bytes_unused: u64,
}

/// rustic's own sum of unused packs has the young ones in it that it keeps.
fn packs_to_mark(stats: &PruneStats) -> u64 {
    // The type of what to do with a pack is not exported; its name is.
    let marked = stats.debug.0.iter().filter(|(key, _)| format!("{:?}", key.todo) == "MarkDelete");
    marked.map(|(_, packs)| packs.packs).sum()
}

impl Repository {
    /// Forgets snapshots. What only they needed stays until `prune`. One that is gone already is no error.
    ///
    /// # Errors
    /// As the files fail; those before it are forgotten then.
    pub fn forget(&self, ids: &[SnapshotId]) -> Result<(), Error> {
        ids.iter().try_for_each(|id| self.files.remove(id.file()))
    }

    /// Removes what was marked long enough ago, and marks what no snapshot needs. One at a time for a repository, and not
    /// beside a backup that has run for longer than `keep_marked`.
    ///
    /// # Errors
    /// As files fail, and when anything cannot be read.
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
        // Listed before the plan lists them: a snapshot too many here costs a look, one too few would cost data.
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

    /// Puts back what was marked although a snapshot needs it that was saved meanwhile.
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

    /// The files that these snapshots need, so that whoever has them can restore each: packs, index files, the snapshots, the
    /// config and the keys.
    ///
    /// # Errors
    /// `NotFound` when one of them is gone; `Corrupt` when something cannot be read.
    pub fn packs_of(&self, snapshots: &[SnapshotId]) -> Result<BTreeSet<BaseFile>, Error> {
        Ok(self.needed_by(snapshots)?.into_keys().collect())
    }

    /// As `packs_of`, and how many bytes each must have where that is known: of packs, by the index. A pack that is not
    /// there is among them only when nothing else has what is in it (ABSENT1).
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
