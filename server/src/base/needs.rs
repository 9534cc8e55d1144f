//! Which repository files a snapshot needs.
//!
//! The answer follows from the snapshot's trees, all of which have to be read, so it is remembered while it stays
//! true. Maintenance that moves chunks to other packs writes new index files and removes the old ones, so an answer is
//! valid only while its index files exist. If a chunk is in two packs, the answer also depends on which packs exist
//! (`absent.rs` of the repository), so these are checked as well.

use super::{BaseStore, ServerFiles, lock, run};
use bytes::Bytes;
use klio_storage::{
    Error, Kind, Op,
    layout::{BaseFile, BaseKind, ClusterName},
    repository::{Files, Repository, SnapshotId},
};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};
use tonic::Status;

/// The most files in all remembered answers together: some 30 MiB.
const REMEMBERED_MAX: usize = 500_000;

/// The files that a snapshot needs, with their sizes where the index gives them.
type Needed = Arc<BTreeMap<BaseFile, Option<u64>>>;

/// What both tiers hold together, to check whether an answer is still valid.
pub(super) struct Held {
    indexes: BTreeMap<BaseFile, u64>,
    packs: BTreeMap<BaseFile, u64>,
}

/// Remembered answers.
#[derive(Default)]
pub(super) struct NeedsCache(Mutex<Answers>);

type Id = (ClusterName, SnapshotId);

#[derive(Default)]
struct Answers {
    /// Answers, and when each was last asked for.
    known: BTreeMap<Id, (u64, Needed)>,
    /// The number of files in all answers.
    files: usize,
    /// Counts the questions; serves as the clock for the least recently used answer.
    asked: u64,
}

impl Answers {
    fn get(&mut self, id: &Id) -> Option<Needed> {
        self.asked += 1;
        let (asked, needed) = self.known.get_mut(id)?;
        *asked = self.asked;
        Some(needed.clone())
    }

    fn remove(&mut self, id: &Id) {
        if let Some((_, needed)) = self.known.remove(id) {
            self.files -= needed.len();
        }
    }

    /// Removes the least recently used answers until there is room.
    fn put(&mut self, id: Id, needed: Needed) {
        self.remove(&id);
        while self.files + needed.len() > REMEMBERED_MAX {
            let oldest = self.known.iter().min_by_key(|(_, (asked, _))| *asked);
            let Some(oldest) = oldest.map(|(id, _)| id.clone()) else { break };
            self.remove(&oldest);
        }
        if needed.len() > REMEMBERED_MAX {
            return;
        }
        self.asked += 1;
        self.files += needed.len();
        self.known.insert(id, (self.asked, needed));
    }
}

impl NeedsCache {
    /// The remembered answer, if every index file and every pack it depends on is still there, with the right size.
    fn get(&self, id: &Id, held: &Held) -> Option<Needed> {
        let mut known = lock(&self.0);
        let needed = known.get(id)?;
        let stands = needed.contains_key(&id.1.file())
            && needed.iter().all(|(file, size)| match file.kind {
                BaseKind::Index => held.indexes.contains_key(file),
                BaseKind::Data => {
                    held.packs.get(file).is_some_and(|held| size.is_none_or(|size| size == *held))
                }
                _ => true,
            });
        if !stands {
            known.remove(id);
        }
        stands.then_some(needed)
    }

    fn put(&self, id: Id, needed: Needed) {
        lock(&self.0).put(id, needed);
    }
}

impl BaseStore {
    /// The files that a snapshot needs, config and keys included, with the sizes of packs.
    ///
    /// # Errors
    /// `NOT_FOUND` when one of them is missing, `CORRUPT`.
    pub async fn needs(
        &self,
        cluster: &ClusterName,
        snapshot: SnapshotId,
    ) -> Result<Needed, Status> {
        let held = self.held(cluster).await?;
        self.needs_beside(cluster, snapshot, &held).await
    }

    /// Lists both tiers for `needs_beside`.
    pub(super) async fn held(&self, cluster: &ClusterName) -> Result<Held, Status> {
        let indexes = self.list_files(cluster, BaseKind::Index).await?;
        let packs = self.list_files(cluster, BaseKind::Data).await?;
        Ok(Held { indexes, packs })
    }

    /// The same as `needs`, for a caller that asks about many snapshots and lists the files once.
    pub(super) async fn needs_beside(
        &self,
        cluster: &ClusterName,
        snapshot: SnapshotId,
        held: &Held,
    ) -> Result<Needed, Status> {
        self.needs_with(cluster, snapshot, None, held).await
    }

    /// The same as `needs`, for a snapshot that is about to be stored; `bytes` are those of its file.
    pub(super) async fn needs_of_new(
        &self,
        cluster: &ClusterName,
        snapshot: SnapshotId,
        bytes: Bytes,
    ) -> Result<Needed, Status> {
        let held = self.held(cluster).await?;
        self.needs_with(cluster, snapshot, Some(bytes), &held).await
    }

    async fn needs_with(
        &self,
        cluster: &ClusterName,
        snapshot: SnapshotId,
        new: Option<Bytes>,
        held: &Held,
    ) -> Result<Needed, Status> {
        let id = (cluster.clone(), snapshot);
        if let Some(known) = self.0.needs.get(&id, held) {
            return Ok(known);
        }
        let secret = self.open_repository(cluster, None).await?;
        let mut listed = BTreeMap::new();
        for kind in BaseKind::ALL {
            listed.insert(kind, self.list_files(cluster, kind).await?);
        }
        let new = new.map(|bytes| (snapshot.file(), bytes));
        let files: Arc<dyn Files> = Arc::new(ReadOnly { files: self.files(cluster), listed, new });
        let needed = run(move || Repository::open(files, &secret)?.needed_by(&[snapshot])).await?;
        let needed = Arc::new(needed);
        self.0.needs.put(id, needed.clone());
        Ok(needed)
    }
}

/// A repository as it was listed, for reading only, so that a bucket that is down does not stop a commit (P4).
#[derive(Debug)]
struct ReadOnly {
    files: ServerFiles,
    listed: BTreeMap<BaseKind, BTreeMap<BaseFile, u64>>,
    /// The file that is about to be stored.
    new: Option<(BaseFile, Bytes)>,
}

impl ReadOnly {
    fn denied(&self, op: Op) -> Result<(), Error> {
        Err(Error::new(Kind::Denied, op, self.files.place(), "expected to be read only"))
    }
}

#[deny(clippy::missing_trait_methods)]
impl Files for ReadOnly {
    fn place(&self) -> String {
        self.files.place()
    }

    fn list(&self, kind: BaseKind) -> Result<Vec<(BaseFile, u64)>, Error> {
        let files = self.listed.get(&kind).into_iter().flatten();
        Ok(files.map(|(file, size)| (*file, *size)).collect())
    }

    fn read(&self, file: BaseFile) -> Result<Bytes, Error> {
        match &self.new {
            Some((new, bytes)) if *new == file => Ok(bytes.clone()),
            _ => self.files.read(file),
        }
    }

    fn read_range(&self, file: BaseFile, offset: u64, length: u64) -> Result<Bytes, Error> {
        self.files.read_range(file, offset, length)
    }

    fn write(&self, _: BaseFile, _: &[Bytes]) -> Result<(), Error> {
        self.denied(Op::Write)
    }

    fn remove(&self, _: BaseFile) -> Result<(), Error> {
        self.denied(Op::Remove)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use klio_storage::tier2::Sha256Sum;

    fn file(kind: BaseKind, text: &str) -> BaseFile {
        BaseFile { kind, id: Sha256Sum::of(text.as_bytes()) }
    }

    /// A cache with one answer: a snapshot, an index file and a pack of 7 bytes.
    fn cache() -> (NeedsCache, (ClusterName, SnapshotId), [BaseFile; 2]) {
        let cache = NeedsCache::default();
        let snapshot = SnapshotId::new(Sha256Sum::of(b"s"));
        let id = ("pg".parse().unwrap(), snapshot);
        let (index, pack) = (file(BaseKind::Index, "old"), file(BaseKind::Data, "p"));
        let needed = BTreeMap::from([(snapshot.file(), None), (index, None), (pack, Some(7))]);
        cache.put(id.clone(), Arc::new(needed));
        (cache, id, [index, pack])
    }

    #[test]
    fn an_answer_is_forgotten_with_the_index_that_told_it() {
        let (cache, id, [old, pack]) = cache();
        let new = file(BaseKind::Index, "new");
        let (both, packs) = (BTreeMap::from([(old, 1), (new, 1)]), BTreeMap::from([(pack, 7)]));
        let both = Held { indexes: both, packs: packs.clone() };
        assert_eq!(cache.get(&id, &both).map(|needed| needed.len()), Some(3));
        assert_eq!(cache.get(&id, &Held { indexes: BTreeMap::from([(new, 1)]), packs }), None);
        assert_eq!(cache.get(&id, &both), None);
    }

    #[test]
    fn an_answer_is_forgotten_with_a_pack_that_is_gone_or_cut_short() {
        for packs in [vec![], vec![6]] {
            let (cache, id, [index, pack]) = cache();
            let indexes = BTreeMap::from([(index, 1)]);
            let whole = Held { indexes: indexes.clone(), packs: BTreeMap::from([(pack, 7)]) };
            let packs = packs.into_iter().map(|size| (pack, size)).collect();
            assert!(cache.get(&id, &whole).is_some());
            assert_eq!(cache.get(&id, &Held { indexes, packs }), None);
            assert_eq!(cache.get(&id, &whole), None);
        }
    }

    /// If more were asked for than fits, every question about one of many snapshots would read all its trees again.
    #[test]
    fn what_was_not_asked_for_the_longest_is_forgotten_and_nothing_else() {
        let cache = NeedsCache::default();
        let id = |number: u32| -> Id {
            ("pg".parse().unwrap(), SnapshotId::new(Sha256Sum::of(&number.to_le_bytes())))
        };
        // Four fit, five do not.
        let each = REMEMBERED_MAX / 4 - 1;
        let answer = |number: u32| -> Needed {
            let keys = (0..each as u32).map(|n| file(BaseKind::Key, &format!("{number} {n}")));
            Arc::new(keys.map(|key| (key, None)).chain([(id(number).1.file(), None)]).collect())
        };
        let held = Held { indexes: BTreeMap::new(), packs: BTreeMap::new() };
        let known = |number| cache.get(&id(number), &held).is_some();
        (0..4).for_each(|number| cache.put(id(number), answer(number)));
        assert!(known(0));
        cache.put(id(4), answer(4));
        assert!(!known(1), "the one that nobody asked for");
        assert!([0, 2, 3, 4].into_iter().all(known));
        let all = lock(&cache.0);
        let count: usize = all.known.values().map(|(_, needed)| needed.len()).sum();
        assert!(count == all.files && count <= REMEMBERED_MAX, "{count}, {}", all.files);
    }
}
