//! Verifies a repository.
//!
//! Everything but packs is read and checked against its name. Packs are compared in size with what the index says. The
//! trees of every snapshot are read, and every chunk is looked up. A share of the packs is read completely: a pack's
//! SHA-256 must be its name, and every piece in it must decrypt. Checking continues after a problem, so that one run
//! reports all of them.

use super::{
    Progress, Repository, SnapshotId,
    index::{BlobKind, Index, Place},
    needed::needed,
    read_checked,
    reader::{Reader, open_blob, tree_of},
};
use crate::{
    Error, Kind,
    layout::{BaseFile, BaseKind},
    sum::Sha256Sum,
};
use rand::seq::SliceRandom;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

/// The problem of a pack that the index names but nobody needs.
const UNNEEDED: &str = "the index names it, but it does not exist, and no snapshot needs it; hint: klio retention apply removes it from the index";
/// Packs that are in memory at the same time.
const READERS_MAX: usize = 4;

/// Damaged or missing data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The damaged or missing file, if a single one is to blame; another copy of it repairs the problem.
    pub file: Option<BaseFile>,
    /// The incomplete snapshot, if the problem affects only this one.
    pub snapshot: Option<SnapshotId>,
    /// The problem as a sentence.
    pub detail: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.detail)
    }
}

impl Repository {
    /// Checks the structure, and reads `read_percent` (0 to 100) of the bytes in packs, chosen at random.
    ///
    /// # Errors
    /// Errors that say nothing about the stored data, such as an unreachable store. Everything else is reported as a
    /// problem.
    pub fn check(
        &self,
        read_percent: f64,
        progress: &Arc<dyn Progress>,
    ) -> Result<Vec<Problem>, Error> {
        let mut check = Check {
            repository: self,
            problems: Vec::new(),
            absent: Vec::new(),
            seen: BTreeSet::new(),
        };
        check.small_files()?;
        let index = check.index()?;
        check.packs(&index)?;
        let index = Arc::new(index);
        let needed = check.snapshots(&index)?;
        check.absent(&index, &needed);
        check.marked(&index, &needed);
        check.read(&index, read_percent, progress)?;
        Ok(check.problems)
    }
}

struct Check<'a> {
    repository: &'a Repository,
    problems: Vec<Problem>,
    /// Packs that the index names but that do not exist.
    absent: Vec<BaseFile>,
    /// Packs that the index names unmarked; their existence was checked.
    seen: BTreeSet<BaseFile>,
}

/// What the snapshots need.
struct Needed {
    /// Positions in `Index::packs`.
    packs: BTreeSet<u32>,
    /// Whether every snapshot could be read, so that nothing else is needed.
    all: bool,
}

/// Whether an error is about the stored data, not about the access to it.
fn is_finding(error: &Error) -> bool {
    matches!(error.kind, Kind::Corrupt | Kind::NotFound | Kind::Invalid)
}

impl Check<'_> {
    fn problem(&mut self, file: Option<BaseFile>, detail: impl fmt::Display) {
        let snapshot = file.filter(|f| f.kind == BaseKind::Snapshot).map(|f| SnapshotId::new(f.id));
        self.problems.push(Problem { file, snapshot, detail: detail.to_string() });
    }

    /// Records an error about the data as a problem, and returns other errors.
    fn note<T>(
        &mut self,
        file: Option<BaseFile>,
        result: Result<T, Error>,
    ) -> Result<Option<T>, Error> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(error) if is_finding(&error) => {
                self.problem(file, error);
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Checks the config and the keys.
    fn small_files(&mut self) -> Result<(), Error> {
        let repository = self.repository;
        let config = self.note(
            Some(BaseFile::CONFIG),
            read_checked(repository.files.as_ref(), BaseFile::CONFIG),
        )?;
        if let Some(sealed) = config
            && repository.key.sealer.open_file(&sealed).is_none()
        {
            let detail =
                repository.damaged(BaseFile::CONFIG, "the repository's key does not decrypt it");
            self.problem(Some(BaseFile::CONFIG), detail);
        }
        let keys = repository.files.list(BaseKind::Key)?;
        if keys.is_empty() {
            self.problem(
                None,
                format!("{}: no key file, so stock restic cannot open it", repository.place()),
            );
        }
        for (file, _) in keys {
            let result = read_checked(repository.files.as_ref(), file);
            self.note(Some(file), result)?;
        }
        Ok(())
    }

    fn index(&mut self) -> Result<Index, Error> {
        let mut index = Index::default();
        for (file, _) in self.repository.files.list(BaseKind::Index)? {
            let result = self.repository.add_index_file(&mut index, file);
            self.note(Some(file), result)?;
        }
        index.sort(&self.repository.files.list(BaseKind::Data)?.into_iter().collect());
        Ok(index)
    }

    /// Checks that every pack in the index exists and has the size that the index says.
    fn packs(&mut self, index: &Index) -> Result<(), Error> {
        let there: BTreeMap<_, _> =
            self.repository.files.list(BaseKind::Data)?.into_iter().collect();
        // If a pack is named more than once, one unmarked entry is enough to need it.
        let mut packs: Vec<_> = index.packs.iter().collect();
        packs.sort_by_key(|pack| (pack.id, pack.marked));
        for pack in packs {
            let file = pack.file();
            // Marked packs may be removed at any time, and some are marked without a list of their contents.
            if pack.marked || !self.seen.insert(file) {
                continue;
            }
            match there.get(&file) {
                None => self.absent.push(file),
                Some(&size) if size != pack.size => {
                    let detail = format!("expected {} bytes, found {size}", pack.size);
                    self.problem(Some(file), self.repository.damaged(file, detail));
                }
                Some(_) => {}
            }
        }
        Ok(())
    }

    /// Reports missing packs: one that nobody needs is only clutter in the index.
    fn absent(&mut self, index: &Index, needed: &Needed) {
        let packs: BTreeSet<Sha256Sum> =
            needed.packs.iter().map(|&pack| index.packs[pack as usize].id).collect();
        for file in std::mem::take(&mut self.absent) {
            let detail = match needed.all && !packs.contains(&file.id) {
                true => UNNEEDED,
                false => "the index names it, but it does not exist",
            };
            self.problem(Some(file), self.repository.damaged(file, detail));
        }
    }

    /// A pack that a snapshot needs must exist even if it is marked for removal.
    fn marked(&mut self, index: &Index, needed: &Needed) {
        let gone: BTreeSet<BaseFile> = needed
            .packs
            .iter()
            .map(|&pack| &index.packs[pack as usize])
            .filter(|pack| pack.absent && !self.seen.contains(&pack.file()))
            .map(|pack| pack.file())
            .collect();
        for file in gone {
            let detail = "marked for removal, but a snapshot needs it, and it is missing or has the wrong size";
            self.problem(Some(file), self.repository.damaged(file, detail));
        }
    }

    /// Checks that every tree of every snapshot can be read and every chunk is in the index. Returns the packs that
    /// they need.
    fn snapshots(&mut self, index: &Arc<Index>) -> Result<Needed, Error> {
        let mut all = Needed { packs: BTreeSet::new(), all: true };
        for (file, _) in self.repository.files.list(BaseKind::Snapshot)? {
            let snapshot = self.repository.snapshot_file(SnapshotId::new(file.id));
            let Some(snapshot) = self.note(Some(file), snapshot)? else {
                all.all = false;
                continue;
            };
            let reader =
                Reader::new(self.repository.clone(), Arc::clone(index), tree_of(&snapshot)?);
            match needed(&reader) {
                Ok(packs) => all.packs.extend(packs),
                Err(error) if is_finding(&error) => {
                    all.all = false;
                    let snapshot = Some(SnapshotId::new(file.id));
                    let detail = format!("snapshot {}: {error}", file.id);
                    self.problems.push(Problem { file: None, snapshot, detail });
                }
                Err(error) => return Err(error),
            }
        }
        Ok(all)
    }

    /// Reads packs completely.
    fn read(
        &mut self,
        index: &Index,
        percent: f64,
        progress: &Arc<dyn Progress>,
    ) -> Result<(), Error> {
        let blobs = index.by_pack();
        let mut packs: Vec<_> = blobs
            .chunk_by(|a, b| a.2.pack == b.2.pack)
            .filter(|pack| {
                // Missing packs, and packs of the wrong size, were reported before.
                let pack = index.pack(&pack[0].2);
                !pack.marked && !pack.absent
            })
            .collect();
        packs.shuffle(&mut rand::rng());
        let bytes = |pack: &&[(BlobKind, Sha256Sum, Place)]| index.pack(&pack[0].2).size;
        let mut left =
            packs.iter().map(bytes).sum::<u64>() as f64 * percent.clamp(0.0, 100.0) / 100.0;
        packs.retain(|pack| {
            let chosen = left > 0.0;
            left -= bytes(pack) as f64;
            chosen
        });
        self.read_all(index, &packs, progress)
    }

    fn read_all(
        &mut self,
        index: &Index,
        packs: &[&[(BlobKind, Sha256Sum, Place)]],
        progress: &Arc<dyn Progress>,
    ) -> Result<(), Error> {
        let next = AtomicUsize::new(0);
        let results = Mutex::new(Vec::new());
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(READERS_MAX);
        let repository = self.repository;
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    while let Some(pack) = packs.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let file = index.pack(&pack[0].2).file();
                        let result = read_pack(repository, file, pack);
                        progress.bytes(index.pack(&pack[0].2).size);
                        progress.file_done();
                        if let Err(error) = result {
                            results
                                .lock()
                                .unwrap_or_else(PoisonError::into_inner)
                                .push((file, error));
                        }
                    }
                });
            }
        });
        for (file, error) in results.into_inner().unwrap_or_else(PoisonError::into_inner) {
            self.note(Some(file), Err::<(), _>(error))?;
        }
        Ok(())
    }
}

fn read_pack(
    repository: &Repository,
    file: BaseFile,
    blobs: &[(BlobKind, Sha256Sum, Place)],
) -> Result<(), Error> {
    let bytes = read_checked(repository.files.as_ref(), file)?;
    for (_, id, place) in blobs {
        let (from, length) = (place.offset as usize, place.length as usize);
        let sealed = bytes.get(from..from + length);
        let sealed =
            sealed.ok_or_else(|| repository.damaged(file, "shorter than its index says"))?;
        open_blob(&repository.key.sealer, id, place, sealed)
            .map_err(|detail| repository.damaged(file, format!("piece {id}: {detail}")))?;
    }
    Ok(())
}
