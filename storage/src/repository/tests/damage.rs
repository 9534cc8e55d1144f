//! A flipped bit in any kind of file is found, and never read as content.

use super::*;
use crate::repository::{Problem, Progress};

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
                // Never content that is not what was archived.
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
