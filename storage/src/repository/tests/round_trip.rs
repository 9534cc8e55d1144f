//! Archived content is restored unchanged.

use super::*;
use crate::{Kind, repository::Progress};
use std::sync::atomic::{AtomicU64, Ordering};

fn tree() -> Fake {
    let page = 8192;
    Fake::new()
        .file("data/PG_VERSION", b"17\n")
        .file("data/base/1/1259", &noise(1, 20 * page))
        .file("data/base/1/1259_vm", &vec![0; 3 * page])
        .file("data/base/1/empty", b"")
        .file("data/base/1/odd", &noise(2, 3 * page + 17))
        .file("data/base/1/same", &noise(1, 20 * page))
        .with("data/log", Content::Dir)
        .with("data/pg_tblspc/16384", Content::Link("/srv/space"))
        .file("data/quote\"back\\slash\u{e4}", b"name")
        .file("tablespaces/16384/PG_17/1/2", &noise(3, 2 * page))
}

#[test]
fn a_tree_of_two_parts_comes_back_as_it_was() {
    let home = home();
    let first = tree();
    let second =
        Fake::new().file("data/backup_label", b"START").file("data/global/pg_control", b"control");
    let parts =
        [&first, &second].map(|s| home.repository.snapshot(s, None, Arc::new(Silent)).unwrap());
    assert!(home.repository.snapshots().unwrap().is_empty(), "a part is no backup");
    let summary = home.repository.assemble(&parts, &meta("one")).unwrap();

    let mut expected = first.expected();
    expected.extend(second.expected());
    assert!(restored(&home.repository, &summary).unwrap() == expected);
    assert_eq!(summary.files, 11);
    assert_eq!(summary.directories as usize, expected.values().filter(|b| *b == b"dir").count());
    assert_eq!(home.repository.snapshots().unwrap(), [summary]);
}

#[test]
fn modes_owners_and_times_come_back_to_the_nanosecond() {
    let home = home();
    let (_, summary) = back_up(&home.repository, &tree(), None, "one");
    for entry in home.repository.reader(&summary.id).unwrap().entries().unwrap() {
        let entry = entry.unwrap();
        assert_eq!((entry.mode, entry.uid, entry.gid), (0o640, 7, 8), "{}", entry.path.display());
        assert_eq!(entry.mtime, long_ago());
    }
}

#[test]
fn equal_content_is_stored_once() {
    let home = home();
    let (part, _) = back_up(&home.repository, &tree(), None, "one");
    // base/1/same has the content of base/1/1259, and all pages of _vm are the same.
    assert_eq!(part.added_bytes, 3 + 20 * 8192 + 8192 + (3 * 8192 + 17) + 4 + 2 * 8192);
    let (again, _) = back_up(&home.repository, &tree(), None, "two");
    assert_eq!(again.added_bytes, 0);
}

#[test]
fn a_repository_is_made_once_and_opens_with_its_own_secret_only() {
    let home = home();
    let files = || Arc::clone(&home.files) as Arc<dyn Files>;
    Repository::create(files(), &home.secret, &settings()).unwrap();
    Repository::open(files(), &home.secret).unwrap();
    let other = Secret::generate();
    assert_eq!(Repository::create(files(), &other, &settings()).unwrap_err().kind, Kind::Conflict);
    assert_eq!(Repository::open(files(), &other).unwrap_err().kind, Kind::Denied);
    let nothing = LocalFiles::new(Arc::new(RealDisk), home.directory.path().join("nothing"));
    let missing = Repository::open(Arc::new(nothing), &home.secret).unwrap_err();
    assert_eq!(missing.kind, Kind::NotFound);
}

#[test]
fn a_crash_between_config_and_key_is_repaired_by_the_next_create() {
    let home = home();
    let keys = home.files.list(crate::layout::BaseKind::Key).unwrap();
    assert_eq!(keys.len(), 1);
    home.files.remove(keys[0].0).unwrap();
    let files = Arc::clone(&home.files) as Arc<dyn Files>;
    Repository::create(files, &home.secret, &settings()).unwrap();
    assert_eq!(home.files.list(crate::layout::BaseKind::Key).unwrap().len(), 1);
}

#[test]
fn a_secret_shows_nothing_of_itself() {
    let secret = Secret::generate();
    let text = format!("{secret:?} {:?}", home().repository);
    assert!(!text.contains(secret.password.as_str()) && !text.contains("encrypt"), "{text}");
    let mut broken = secret.clone();
    broken.master_key = zeroize::Zeroizing::new(secret.master_key.replace("encrypt", "decrypt"));
    let files = Arc::clone(&home().files) as Arc<dyn Files>;
    let error = Repository::open(files, &broken).unwrap_err();
    assert_eq!(error.kind, Kind::Invalid);
    let key: serde_json::Value = serde_json::from_str(&secret.master_key).unwrap();
    assert!(!format!("{error:?}").contains(key["encrypt"].as_str().unwrap()));
}

#[test]
fn the_level_of_new_data_may_change_after_the_repository_was_made() {
    let home = home();
    let text = |number: u8| {
        let tree: String = (0..20_000).map(|n| format!("row {number} {n};")).collect();
        Fake::new().file("data/base/1/1259", tree.as_bytes())
    };
    let stored = |level: i32, number: u8| {
        let repository = home.repository.clone().compressing(level);
        let (part, summary) = back_up(&repository, &text(number), None, &format!("at-{level}"));
        assert!(restored(&home.repository, &summary).unwrap() == text(number).expected());
        (part.added_bytes, part.stored_bytes)
    };
    let (plain, fast, small) = (stored(0, 1), stored(1, 2), stored(19, 3));
    assert!(plain.1 >= plain.0, "uncompressed, and sealed: {plain:?}");
    assert!(fast.1 < fast.0 / 2, "{fast:?}");
    assert!(small.1 < fast.1, "{small:?}, {fast:?}");
}

#[test]
fn settings_that_cannot_work_are_named() {
    use klio_pg::ByteSize;
    let good = Settings::default();
    good.validate().unwrap();
    for (bad, name) in [
        (Settings { chunk_size: ByteSize::new(100_000), ..good }, "chunk_size"),
        (Settings { pack_size: ByteSize::kib(1), ..good }, "pack_size"),
        (Settings { compression_level: 23, ..good }, "compression_level"),
    ] {
        let error = bad.validate().unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
    }
}

#[derive(Default)]
struct Counts {
    bytes: AtomicU64,
    files: AtomicU64,
    stored: AtomicU64,
}

impl Progress for Counts {
    fn bytes(&self, n: u64) {
        self.bytes.fetch_add(n, Ordering::Relaxed);
    }
    fn file_done(&self) {
        self.files.fetch_add(1, Ordering::Relaxed);
    }
    fn stored(&self, n: u64) {
        self.stored.fetch_add(n, Ordering::Relaxed);
    }
}

#[test]
fn progress_reaches_every_byte_and_file_also_when_nothing_is_read() {
    let home = home();
    let mut parent = None;
    for name in ["one", "two"] {
        let counts = Arc::new(Counts::default());
        let id = parent.as_ref().map(|p: &SnapshotSummary| p.id);
        let part = home.repository.snapshot(&tree(), id.as_ref(), counts.clone()).unwrap();
        assert_eq!(counts.bytes.load(Ordering::Relaxed), part.bytes);
        // The link is not a file that is read.
        assert_eq!(counts.files.load(Ordering::Relaxed), part.files - 1);
        assert!(counts.stored.load(Ordering::Relaxed) >= part.stored_bytes);
        parent = Some(home.repository.assemble(&[part], &meta(name)).unwrap());
    }
}

#[test]
fn two_backups_at_the_same_time_are_both_whole() {
    let home = home();
    let trees: Vec<_> = (0..2)
        .map(|n| {
            tree()
                .file("data/own", &noise(50 + n, 3 << 20))
                .file("data/shared", &noise(60, 3 << 20))
        })
        .collect();
    let summaries: Vec<_> = std::thread::scope(|scope| {
        let work = |n: usize| {
            let (repository, tree) = (&home.repository, &trees[n]);
            scope.spawn(move || back_up(repository, tree, None, &format!("b{n}")).1)
        };
        let running: Vec<_> = (0..2).map(work).collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for (tree, summary) in trees.iter().zip(&summaries) {
        assert!(restored(&home.repository, summary).unwrap() == tree.expected());
    }
    let silent: Arc<dyn Progress> = Arc::new(Silent);
    assert_eq!(home.repository.check(100.0, &silent).unwrap(), []);
}

#[test]
fn chunks_can_be_read_by_location_and_from_many_threads() {
    let home = home();
    let (_, summary) = back_up(&home.repository, &tree(), None, "one");
    let reader = home.repository.reader(&summary.id).unwrap();
    let chunks: Vec<_> = reader
        .entries()
        .unwrap()
        .filter_map(|entry| match entry.unwrap().kind {
            StoredKind::File { chunks, .. } => Some(chunks),
            _ => None,
        })
        .flatten()
        .collect();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for id in &chunks {
                    let at = reader.chunk_location(id).unwrap();
                    let sealed = home.files.read_range(at.pack, at.offset, at.length).unwrap();
                    let bytes = reader.open_chunk(id, &sealed).unwrap();
                    assert_eq!(bytes, reader.chunk(id).unwrap());
                    assert_eq!(crate::repository::ChunkId::of(&bytes), *id);
                }
            });
        }
    });
}
