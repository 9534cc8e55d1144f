//! REPO4: what a running backup or restore has seen in an index stays; what nobody needs is removed, in two steps.

use super::*;
use crate::{repository::Progress, tier2::Sha256Sum};

const DAY: Duration = Duration::from_secs(86_400);
const NOW: Duration = Duration::ZERO;

fn tree(seed: u64) -> Fake {
    Fake::new()
        .file("data/common", &noise(1, 2 << 20))
        .file("data/own", &noise(seed, 2 << 20))
        .file("data/small", &noise(seed + 1000, 9000))
}

fn packs(home: &Home) -> usize {
    home.files.list(BaseKind::Data).unwrap().len()
}

fn sound(home: &Home) {
    let silent: Arc<dyn Progress> = Arc::new(Silent);
    assert_eq!(home.repository.check(100.0, &silent).unwrap(), []);
}

#[test]
fn packs_are_marked_first_and_go_only_after_they_were_marked_long_enough() {
    let home = home();
    let (_, old) = back_up(&home.repository, &tree(10), None, "old");
    let (_, new) = back_up(&home.repository, &tree(20), None, "new");
    home.repository.forget(&[old.id]).unwrap();
    let before = packs(&home);

    let young = home.repository.prune(DAY).unwrap();
    assert_eq!(
        (young.packs_marked, young.packs_removed),
        (0, 0),
        "packs of a running backup are young"
    );
    let marked = home.repository.prune(NOW).unwrap();
    assert!(marked.packs_marked + marked.packs_repacked > 0, "{marked:?}");
    assert_eq!(marked.packs_removed, 0);
    assert!(packs(&home) >= before, "the first step removes nothing");
    sound(&home);

    let waiting = home.repository.prune(DAY).unwrap();
    assert_eq!(waiting.packs_removed, 0);
    assert!(packs(&home) >= before, "they have not been marked for a day");

    let removed = home.repository.prune(NOW).unwrap();
    assert!(removed.packs_removed > 0, "{removed:?}");
    assert!(packs(&home) < before);
    sound(&home);
    assert!(restored(&home.repository, &new).unwrap() == tree(20).expected());
}

#[test]
fn a_restore_that_loaded_the_index_before_a_prune_finds_every_chunk_after_it() {
    let home = home();
    let (_, old) = back_up(&home.repository, &tree(10), None, "old");
    let (_, new) = back_up(&home.repository, &tree(20), None, "new");
    let readers = [&old, &new].map(|s| home.repository.reader(&s.id).unwrap());
    home.repository.forget(&[old.id]).unwrap();
    home.repository.prune(NOW).unwrap();
    for reader in &readers {
        for entry in reader.entries().unwrap() {
            if let StoredKind::File { chunks, .. } = entry.unwrap().kind {
                chunks.iter().for_each(|chunk| drop(reader.chunk(chunk).unwrap()));
            }
        }
    }
}

/// The chunks that the second backup found in the index are marked before it saves its snapshot.
#[test]
fn a_backup_that_runs_beside_a_prune_is_whole_and_its_packs_are_put_back() {
    let home = home();
    let (_, old) = back_up(&home.repository, &tree(10), None, "old");
    home.repository.forget(&[old.id]).unwrap();
    let part = home.repository.snapshot(&tree(10), None, Arc::new(Silent)).unwrap();
    assert_eq!(part.added_bytes, 0, "it relies on the packs of a forgotten backup");
    let outcome = home.repository.prune(NOW).unwrap();
    assert!(outcome.packs_marked > 0);
    let again = home.repository.assemble(&[part], &meta("again")).unwrap();
    sound(&home);
    // Not even if maintenance continues at once.
    home.repository.prune(NOW).unwrap();
    home.repository.prune(NOW).unwrap();
    sound(&home);
    assert!(restored(&home.repository, &again).unwrap() == tree(10).expected());
}

/// As above, but the snapshot was saved while the prune was deciding: the next prune unmarks the packs, and until then
/// our readers find them.
#[test]
fn packs_marked_although_a_snapshot_needs_them_are_read_and_recovered() {
    let home = home();
    let (_, kept) = back_up(&home.repository, &tree(10), None, "kept");
    let snapshot = home.files.read(kept.id.file()).unwrap();
    home.repository.forget(&[kept.id]).unwrap();
    home.repository.prune(NOW).unwrap();
    home.files.write(kept.id.file(), &[snapshot]).unwrap();
    assert!(restored(&home.repository, &kept).unwrap() == tree(10).expected());
    let outcome = home.repository.prune(NOW).unwrap();
    assert!(outcome.packs_recovered > 0, "{outcome:?}");
    sound(&home);
}

#[test]
fn an_unreadable_snapshot_stops_maintenance() {
    let home = home();
    let (_, one) = back_up(&home.repository, &tree(10), None, "one");
    back_up(&home.repository, &tree(20), None, "two");
    let path = home.files.path(one.id.file());
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[40] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let before = packs(&home);
    assert!(home.repository.prune(NOW).is_err());
    assert!(home.repository.prune(NOW).is_err());
    assert_eq!(packs(&home), before);
}

#[test]
fn what_a_snapshot_needs_is_enough_to_restore_it_elsewhere() {
    let home = home();
    let (_, old) = back_up(&home.repository, &tree(10), None, "old");
    let (_, new) = back_up(&home.repository, &tree(20), None, "new");
    for (summary, seed) in [(&old, 10), (&new, 20)] {
        let needed = home.repository.packs_of(&[summary.id]).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let copy = Arc::new(LocalFiles::new(Arc::new(RealDisk), directory.path().join("base")));
        for file in needed {
            copy.write(file, &[home.files.read(file).unwrap()]).unwrap();
        }
        let repository = Repository::open(copy, &home.secret).unwrap();
        assert!(restored(&repository, summary).unwrap() == tree(seed).expected());
        assert_eq!(repository.snapshots().unwrap(), std::slice::from_ref(summary));
    }
    let both = home.repository.packs_of(&[old.id, new.id]).unwrap();
    assert!(both.len() > home.repository.packs_of(&[new.id]).unwrap().len());
}

type Action = Box<dyn FnOnce(&LocalFiles) + Send>;

/// Runs an action once, when the first index file is written or listed.
struct Meanwhile {
    inner: Arc<LocalFiles>,
    on_write: Mutex<Option<Action>>,
    /// Listed once, although it no longer exists.
    gone: Mutex<Option<BaseFile>>,
}

impl std::fmt::Debug for Meanwhile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Meanwhile")
    }
}

impl Files for Meanwhile {
    fn place(&self) -> String {
        self.inner.place()
    }
    fn list(&self, kind: BaseKind) -> Result<Vec<(BaseFile, u64)>, Error> {
        let mut listed = self.inner.list(kind)?;
        if kind == BaseKind::Index {
            listed.extend(self.gone.lock().unwrap().take().map(|file| (file, 100)));
        }
        Ok(listed)
    }
    fn read(&self, file: BaseFile) -> Result<Bytes, Error> {
        self.inner.read(file)
    }
    fn read_range(&self, file: BaseFile, offset: u64, length: u64) -> Result<Bytes, Error> {
        self.inner.read_range(file, offset, length)
    }
    fn write(&self, file: BaseFile, parts: &[Bytes]) -> Result<(), Error> {
        if file.kind == BaseKind::Index
            && let Some(action) = self.on_write.lock().unwrap().take()
        {
            action(&self.inner);
        }
        self.inner.write(file, parts)
    }
    fn remove(&self, file: BaseFile) -> Result<(), Error> {
        self.inner.remove(file)
    }
}

#[test]
fn a_snapshot_saved_while_a_prune_writes_its_marks_keeps_its_packs() {
    let home = home();
    let (_, one) = back_up(&home.repository, &tree(10), None, "one");
    let snapshot = home.files.read(one.id.file()).unwrap();
    home.repository.forget(&[one.id]).unwrap();
    let id = one.id.file();
    let save = move |files: &LocalFiles| files.write(id, &[snapshot]).unwrap();
    let files = Meanwhile {
        inner: Arc::clone(&home.files),
        on_write: Mutex::new(Some(Box::new(save))),
        gone: Mutex::default(),
    };
    let outcome = home.repository.with_files(Arc::new(files)).prune(NOW).unwrap();
    assert!(outcome.packs_marked > 0, "{outcome:?}");
    // For stock restic: no needed pack is named only in the list of packs to delete.
    let index = home.repository.index().unwrap();
    let reader = home.repository.reader(&one.id).unwrap();
    let needed = super::super::assemble::contents(&reader).unwrap().packs;
    assert!(needed.iter().all(|&pack| !index.packs[pack as usize].marked));
    home.repository.prune(NOW).unwrap();
    assert!(restored(&home.repository, &one).unwrap() == tree(10).expected());
}

/// A prune writes new index files and removes the old ones while others are reading them.
#[test]
fn an_index_file_that_goes_between_listing_and_reading_is_no_error() {
    let home = home();
    let (_, one) = back_up(&home.repository, &tree(10), None, "one");
    let repository = || {
        let id = Sha256Sum::of(b"gone");
        let gone = Mutex::new(Some(BaseFile { kind: BaseKind::Index, id }));
        let (inner, on_write) = (Arc::clone(&home.files), Mutex::default());
        home.repository.with_files(Arc::new(Meanwhile { inner, on_write, gone }))
    };
    assert!(restored(&repository(), &one).unwrap() == tree(10).expected());
    let part = repository().snapshot(&tree(10), None, Arc::new(Silent)).unwrap();
    assert_eq!(part.added_bytes, 0);
    repository().assemble(&[part], &meta("two")).unwrap();
}
