//! ABSENT1 to ABSENT3: an index that names missing packs does not spoil later backups, and is repaired.

use super::*;
use crate::repository::{Progress, SnapshotId, index::IndexJson};

const NOW: Duration = Duration::ZERO;

fn tree(seed: u64) -> Fake {
    Fake::new().file("data/common", &noise(1, 2 << 20)).file("data/own", &noise(seed, 1 << 20))
}

fn check(home: &Home) -> Vec<String> {
    let silent: Arc<dyn Progress> = Arc::new(Silent);
    let found = home.repository.check(100.0, &silent).unwrap();
    found.into_iter().map(|problem| problem.detail).collect()
}

/// Removes the packs of a backup, as a prune does that began before it, and then its snapshot, which was never
/// committed.
fn lose(home: &Home, id: SnapshotId) -> Vec<BaseFile> {
    let packs: Vec<BaseFile> =
        home.files.list(BaseKind::Data).unwrap().iter().map(|f| f.0).collect();
    packs.iter().for_each(|file| home.files.remove(*file).unwrap());
    home.files.remove(id.file()).unwrap();
    packs
}

#[test]
fn packs_that_an_index_names_and_that_are_gone_are_sent_again() {
    let mut home = home();
    let (_, lost) = back_up(&home.repository, &tree(10), None, "lost");
    let packs = lose(&home, lost.id);
    let adopted = home.repository.adopt().unwrap();
    assert_eq!((adopted.packs, adopted.absent), (0, packs.len() as u64));
    let source = tree(10);
    let (part, whole) = back_up(&home.repository, &source, None, "whole");
    assert!(part.added_bytes >= 3 << 20, "only {} bytes were sent", part.added_bytes);
    assert!(restored(&home.repository, &whole).unwrap() == source.expected());
    // Other clients look for the chunks as well: those that restore, and those that commit.
    let other = Repository::open(home.files.clone(), &home.secret).unwrap();
    assert!(restored(&other, &whole).unwrap() == source.expected());
    let needed = other.packs_of(&[whole.id]).unwrap();
    assert!(packs.iter().all(|pack| !needed.contains(pack)));
}

#[test]
fn a_parent_whose_packs_are_gone_is_read_again() {
    let mut home = home();
    let source = tree(10);
    let (_, parent) = back_up(&home.repository, &source, None, "parent");
    for (file, _) in home.files.list(BaseKind::Data).unwrap() {
        home.files.remove(file).unwrap();
    }
    home.repository.adopt().unwrap();
    let (_, whole) = back_up(&home.repository, &source, Some(&parent), "whole");
    assert!(restored(&home.repository, &whole).unwrap() == source.expected());
    // The earlier backup, which had lost its packs, is complete again.
    assert!(restored(&home.repository, &parent).unwrap() == source.expected());
}

#[test]
fn a_pack_that_was_cut_short_is_sent_again() {
    let mut home = home();
    back_up(&home.repository, &tree(10), None, "one");
    for (file, size) in home.files.list(BaseKind::Data).unwrap() {
        let pack = std::fs::OpenOptions::new().write(true).open(home.files.path(file)).unwrap();
        pack.set_len(size / 2).unwrap();
    }
    assert!(home.repository.adopt().unwrap().absent > 0);
    let (_, whole) = back_up(&home.repository, &tree(10), None, "whole");
    assert!(restored(&home.repository, &whole).unwrap() == tree(10).expected());
}

#[test]
fn maintenance_takes_absent_packs_out_of_the_index_and_goes_on() {
    let mut home = home();
    let (_, lost) = back_up(&home.repository, &tree(10), None, "lost");
    let packs = lose(&home, lost.id);
    home.repository.adopt().unwrap();
    let (_, whole) = back_up(&home.repository, &tree(20), None, "whole");
    let found = check(&home);
    assert_eq!(found.len(), packs.len(), "{found:?}");
    assert!(found.iter().all(|f| f.contains("hint: klio retention apply")), "{found:?}");

    let server = Repository::open(home.files.clone(), &home.secret).unwrap();
    let dropped = server.drop_absent().unwrap();
    assert_eq!((dropped.absent, dropped.torn), (packs.len() as u64, vec![]));
    assert_eq!(check(&home), [""; 0]);
    assert_eq!(server.drop_absent().unwrap().absent, 0, "once is enough");
    server.prune(NOW).unwrap();
    server.prune(NOW).unwrap();
    assert_eq!(check(&home), [""; 0]);
    assert!(restored(&server, &whole).unwrap() == tree(20).expected());
}

#[test]
fn packs_that_a_snapshot_needs_stay_in_the_index_and_are_told() {
    let mut home = home();
    let (_, one) = back_up(&home.repository, &tree(10), None, "one");
    let (_, two) = back_up(&home.repository, &tree(20), None, "two");
    let kept = home.repository.packs_of(&[two.id]).unwrap();
    let only = home.repository.packs_of(&[one.id]).unwrap();
    let lost = only.difference(&kept).find(|f| f.kind == BaseKind::Data).unwrap();
    let bytes = home.files.read(*lost).unwrap();
    home.files.remove(*lost).unwrap();
    let indexes = home.files.list(BaseKind::Index).unwrap();
    let found = home.repository.drop_absent().unwrap();
    assert_eq!((found.absent, found.torn), (1, vec![one.id]));
    assert_eq!(home.files.list(BaseKind::Index).unwrap(), indexes);
    let problems = check(&home);
    assert!(problems.iter().any(|p| p.ends_with("but it does not exist")), "{problems:?}");
    // The pack may be found again, by a person or from the other tier.
    home.files.write(*lost, &[bytes]).unwrap();
    assert_eq!(check(&home), [""; 0]);
    assert_eq!(home.repository.adopt().unwrap().absent, 0);
}

#[test]
fn a_needed_pack_that_is_marked_and_gone_is_told() {
    let home = home();
    let (_, one) = back_up(&home.repository, &tree(10), None, "one");
    for (file, _) in home.files.list(BaseKind::Index).unwrap() {
        let json = home.repository.read_json(file).unwrap();
        let IndexJson { packs, .. } = serde_json::from_slice(&json).unwrap();
        home.repository.write_index(&IndexJson { packs: vec![], packs_to_delete: packs }).unwrap();
        home.files.remove(file).unwrap();
    }
    assert_eq!(check(&home), [""; 0], "a marked pack is as good as any while it is there");
    // The largest pack has the chunks; without trees the snapshot could not be read at all.
    let packs = home.files.list(BaseKind::Data).unwrap();
    let (lost, _) = packs.into_iter().max_by_key(|(_, size)| *size).unwrap();
    assert!(home.repository.packs_of(&[one.id]).unwrap().contains(&lost));
    home.files.remove(lost).unwrap();
    let problems = check(&home);
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(problems[0].contains("marked for removal, but a snapshot needs it"), "{problems:?}");
}
