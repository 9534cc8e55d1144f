//! A flipped bit in any kind of file is found, and is never returned as content.

use super::*;
use crate::repository::{Problem, Progress, Without};
use std::collections::BTreeSet;

fn check(repository: &Repository, percent: f64) -> Vec<Problem> {
    let silent: Arc<dyn Progress> = Arc::new(Silent);
    repository.check(percent, &silent).unwrap()
}

fn tree() -> Fake {
    let mut tree = Fake::new();
    for n in 0..40 {
        tree = tree.file(&format!("data/{n:03}"), &noise(n, 100_000));
    }
    tree
}

#[test]
fn a_sound_repository_has_no_problems() {
    let home = home();
    back_up(&home.repository, &tree(), None, "one");
    assert_eq!(check(&home.repository, 0.0), []);
    assert_eq!(check(&home.repository, 100.0), []);
}

#[test]
fn a_bit_flip_in_every_kind_of_file_is_found_and_named() {
    let home = home();
    let (_, summary) = back_up(&home.repository, &tree(), None, "one");
    for kind in BaseKind::ALL {
        for (file, size) in home.files.list(kind).unwrap() {
            let path = home.files.path(file);
            let good = std::fs::read(&path).unwrap();
            for at in [0, size / 2, size - 1] {
                let mut bad = good.clone();
                bad[at as usize] ^= 1;
                std::fs::write(&path, bad).unwrap();
                let problems = check(&home.repository, 100.0);
                let named = problems.iter().any(|problem| problem.file == Some(file));
                assert!(named, "{} byte {at}: {problems:?}", file.relative());
                // Content that was not archived is never returned.
                if let Ok(found) = restored(&home.repository, &summary) {
                    assert!(found == tree().expected());
                }
            }
            std::fs::write(&path, good).unwrap();
        }
    }
    assert_eq!(check(&home.repository, 100.0), []);
}

#[test]
fn a_flipped_bit_in_a_chunk_is_an_error_for_its_reader() {
    let home = home();
    let (_, summary) = back_up(&home.repository, &tree(), None, "one");
    let reader = home.repository.reader(&summary.id).unwrap();
    let entries: Vec<_> = reader.entries().unwrap().map(Result::unwrap).collect();
    let chunk = entries
        .iter()
        .find_map(|entry| match &entry.kind {
            StoredKind::File { chunks, .. } => chunks.first(),
            _ => None,
        })
        .unwrap();
    let at = reader.chunk_location(chunk).unwrap();
    let path = home.files.path(at.pack);
    let good = std::fs::read(&path).unwrap();
    for byte in [0, 15, 16, at.length / 2, at.length - 1] {
        let mut bad = good.clone();
        bad[(at.offset + byte) as usize] ^= 0x80;
        std::fs::write(&path, bad).unwrap();
        let error = reader.chunk(chunk).unwrap_err();
        assert_eq!(error.kind, crate::Kind::Corrupt, "byte {byte}");
        assert!(error.place.contains(&at.pack.relative()), "{error}");
    }
}

fn packs(home: &Home) -> BTreeSet<BaseFile> {
    home.files.list(BaseKind::Data).unwrap().into_iter().map(|(file, _)| file).collect()
}

/// Flips one bit in each; the sizes stay the same.
fn flip(home: &Home, packs: &BTreeSet<BaseFile>) {
    for file in packs {
        let path = home.files.path(*file);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[20] ^= 1;
        std::fs::write(path, bytes).unwrap();
    }
}

#[test]
fn packs_that_are_known_to_be_damaged_are_sent_again_and_older_backups_heal() {
    let home = home();
    let (_, old) = back_up(&home.repository, &tree(), None, "old");
    let damaged = packs(&home);
    let is_large =
        |file: &&BaseFile| std::fs::metadata(home.files.path(**file)).unwrap().len() > 100_000;
    let (chunks, trees): (Vec<_>, Vec<_>) = damaged.iter().partition(is_large);
    flip(&home, &chunks.into_iter().copied().collect());
    assert!(restored(&home.repository, &old).is_err());
    // The damage is unknown: the next backup is damaged, too.
    let (_, fooled) = back_up(&home.repository, &tree(), None, "fooled");
    assert!(restored(&home.repository, &fooled).is_err());
    flip(&home, &trees.into_iter().copied().collect());

    let without = Arc::new(Without::new(home.files.clone(), damaged.clone()));
    let mut knowing = Repository::open(without, &home.secret).unwrap();
    assert_eq!(knowing.adopt().unwrap().absent, damaged.len() as u64);
    for (name, parent) in [("whole", None), ("child", Some(&old))] {
        let (_, new) = back_up(&knowing, &tree(), parent, name);
        assert!(restored(&knowing, &new).unwrap() == tree().expected());
        assert!(knowing.packs_of(&[new.id]).unwrap().is_disjoint(&damaged));
    }
    assert!(knowing.packs_of(&[old.id]).unwrap().is_disjoint(&damaged));
    // Also for a reader that only has the files, such as a restore from the bucket: if one place fails, the others are
    // tried.
    for snapshot in [&old, &fooled] {
        assert!(restored(&home.repository, snapshot).unwrap() == tree().expected());
    }
    // ABSENT3: after maintenance nothing refers to them.
    assert_eq!(knowing.drop_absent().unwrap().torn, vec![]);
    for _ in 0..2 {
        home.repository.prune(std::time::Duration::ZERO).unwrap();
    }
    assert!(check(&home.repository, 100.0).is_empty());
    assert!(restored(&home.repository, &old).unwrap() == tree().expected());
}

#[test]
fn a_missing_or_shortened_pack_is_found_without_reading_packs() {
    let home = home();
    back_up(&home.repository, &tree(), None, "one");
    let (file, size) = home.files.list(BaseKind::Data).unwrap()[0];
    let path = home.files.path(file);
    let good = std::fs::read(&path).unwrap();
    let found = |problems: Vec<Problem>| problems.iter().any(|p| p.file == Some(file));
    std::fs::write(&path, &good[..size as usize - 1]).unwrap();
    assert!(found(check(&home.repository, 0.0)));
    std::fs::remove_file(&path).unwrap();
    assert!(found(check(&home.repository, 0.0)));
}

#[test]
fn a_missing_index_or_snapshot_file_never_reads_as_less_content() {
    let home = home();
    let (_, summary) = back_up(&home.repository, &tree(), None, "one");
    for (file, _) in home.files.list(BaseKind::Index).unwrap() {
        let bytes = home.files.read(file).unwrap();
        home.files.remove(file).unwrap();
        assert!(!check(&home.repository, 0.0).is_empty());
        let reading = restored(&home.repository, &summary);
        assert!(reading.is_err() || reading.unwrap() == tree().expected());
        home.files.write(file, &[bytes]).unwrap();
    }
    home.files.remove(BaseFile { kind: BaseKind::Snapshot, id: summary.id.file().id }).unwrap();
    assert_eq!(restored(&home.repository, &summary).unwrap_err().kind, crate::Kind::NotFound);
}
