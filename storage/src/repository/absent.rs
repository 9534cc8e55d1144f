//! Packs that an index file names but that do not exist.
//!
//! A backup that ran beside a prune may have named packs that were just being removed, or a disk may have lost them.
//! Whoever trusts such an index assumes that chunks were sent although they are gone, and no later backup is ever
//! complete. So:
//!
//! ABSENT1  a chunk that has a place in an existing pack is never looked for in a missing one;
//!          if the content at one place is damaged, the others are tried;
//! ABSENT2  a backup sends chunks again that only missing packs have: `adopt` notes these packs, and from then on
//!          rustic's view of the index does not contain them (`Hidden`);
//! ABSENT3  maintenance removes them from the index once every snapshot is complete without them. As long as one is
//!          not, nothing is changed: the index shows which pack is missing, and the pack may be found again.
//!
//! A pack that is known to be damaged and has no good copy counts as missing: whoever knows of the damage leaves it out
//! of the listing (`Without`). The pack itself stays in place for its good pieces.
//!
//! Dropping an index entry loses nothing: a pack ends with its own list of contents, from which `adopt` can name it
//! again.

use super::{
    Repository, SnapshotId,
    index::{Index, IndexIds, retried},
    needed::needed,
    reader::{Reader, tree_of},
    sealer::Sealer,
};
use crate::{
    Error, Kind, Op,
    layout::{BaseFile, BaseKind},
    sum::Sha256Sum,
};
use bytes::Bytes;
use std::{collections::BTreeSet, sync::Arc};

/// The result of `drop_absent`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AbsentPacks {
    /// Number of packs that an index names but that do not exist.
    pub absent: u64,
    /// The snapshots that are incomplete without them; if there is any, nothing was changed.
    pub torn: Vec<SnapshotId>,
}

/// Packs that rustic must not see in an index.
pub(super) struct Hidden {
    packs: BTreeSet<Sha256Sum>,
    sealer: Sealer,
}

impl std::fmt::Debug for Hidden {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Hidden({} packs)", self.packs.len())
    }
}

impl Hidden {
    /// The index file without these packs. A file that cannot be read is passed on unchanged, so that rustic refuses
    /// it.
    pub(super) fn filter(&self, sealed: Bytes) -> Bytes {
        let without = || -> Option<Vec<u8>> {
            let rest = without(&self.sealer.open_file(&sealed)?, &self.packs)?;
            self.sealer.seal(&rest.json).ok()
        };
        without().map_or(sealed.clone(), Bytes::from)
    }
}

/// An index file after some packs were dropped from it.
struct Rest {
    json: Vec<u8>,
    packs: usize,
}

/// The JSON of an index file without some packs; `None` when it names none of them. Everything else stays unchanged,
/// including the times on which rustic bases removal.
fn without(json: &[u8], packs: &BTreeSet<Sha256Sum>) -> Option<Rest> {
    let ids: IndexIds = serde_json::from_slice(json).ok()?;
    if !ids.all().any(|id| packs.contains(&id)) {
        return None;
    }
    let mut content: serde_json::Value = serde_json::from_slice(json).ok()?;
    let mut left = 0;
    for list in ["packs", "packs_to_delete"] {
        let Some(list) = content.get_mut(list).and_then(|list| list.as_array_mut()) else {
            continue;
        };
        list.retain(|pack| {
            let id = pack.get("id").and_then(|id| id.as_str()).and_then(|id| id.parse().ok());
            id.is_none_or(|id| !packs.contains(&id))
        });
        left += list.len();
    }
    Some(Rest { json: serde_json::to_vec(&content).ok()?, packs: left })
}

impl Repository {
    /// ABSENT2: makes later backups through this handle ignore these packs.
    pub(super) fn hide(&mut self, packs: BTreeSet<Sha256Sum>) {
        self.hidden = match packs.is_empty() {
            true => None,
            false => Some(Arc::new(Hidden { packs, sealer: self.key.sealer.clone() })),
        };
    }

    /// ABSENT3: removes missing packs from the index. Must not run beside a backup.
    ///
    /// # Errors
    /// When files cannot be read or written, and when a snapshot or an index file is unreadable (P6).
    pub fn drop_absent(&self) -> Result<AbsentPacks, Error> {
        let index = Arc::new(self.index()?);
        let packs = index.absent();
        if packs.is_empty() {
            return Ok(AbsentPacks::default());
        }
        let torn = self.torn(&index)?;
        if torn.is_empty() {
            for (file, _) in retried(|| self.files.list(BaseKind::Index))? {
                self.rewrite_without(file, &packs)?;
            }
        }
        Ok(AbsentPacks { absent: packs.len() as u64, torn })
    }

    /// The snapshots that need something that does not exist.
    fn torn(&self, index: &Arc<Index>) -> Result<Vec<SnapshotId>, Error> {
        let mut torn = Vec::new();
        for (file, _) in self.files.list(BaseKind::Snapshot)? {
            let id = SnapshotId::new(file.id);
            let root = tree_of(&self.snapshot_file(id)?)?;
            let reader = Reader::new(self.clone(), Arc::clone(index), root);
            match needed(&reader) {
                Ok(packs) if packs.iter().all(|&p| !index.packs[p as usize].absent) => {}
                Ok(_) => torn.push(id),
                Err(error) if matches!(error.kind, Kind::NotFound | Kind::Corrupt) => torn.push(id),
                Err(error) => return Err(error),
            }
        }
        Ok(torn)
    }

    /// The new file is written before the old one is removed.
    fn rewrite_without(&self, file: BaseFile, packs: &BTreeSet<Sha256Sum>) -> Result<(), Error> {
        let json = self.read_json(file)?;
        let Some(rest) = without(&json, packs) else { return Ok(()) };
        if rest.packs > 0 {
            let sealed = self.key.sealer.seal(&rest.json)?;
            let new = BaseFile { kind: BaseKind::Index, id: Sha256Sum::of(&sealed) };
            self.files.write(new, &[sealed.into()])?;
        }
        self.files.remove(file).map_err(|error| {
            let detail =
                format!("replace an index file that names missing packs: {}", error.detail);
            Error::new(error.kind, Op::Remove, error.place, detail)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_loses_the_absent_packs_and_nothing_else() {
        let [a, b, c] = [b"a", b"b", b"c"].map(|text| Sha256Sum::of(text));
        let json = serde_json::json!({
            "packs": [{"id": a, "blobs": [], "time": "x"}, {"id": b, "blobs": []}],
            "packs_to_delete": [{"id": c, "blobs": [], "time": "2026-11-21T00:00:00Z", "size": 7}],
            "supersedes": ["y"],
        });
        let rest = without(json.to_string().as_bytes(), &BTreeSet::from([b])).unwrap();
        let left: serde_json::Value = serde_json::from_slice(&rest.json).unwrap();
        let expected = serde_json::json!({
            "packs": [{"id": a, "blobs": [], "time": "x"}],
            "packs_to_delete": [{"id": c, "blobs": [], "time": "2026-11-21T00:00:00Z", "size": 7}],
            "supersedes": ["y"],
        });
        assert_eq!((left, rest.packs), (expected, 2));
        let other = BTreeSet::from([Sha256Sum::of(b"d")]);
        assert!(without(json.to_string().as_bytes(), &other).is_none());
        assert!(without(b"no json", &other).is_none());
    }
}
