//! Of two packs with the same content, each is verified before one is removed, and packs that are read are verified
//! (P13).

use super::{Fake, back_up, home, noise, restored};
use crate::{
    layout::{BaseFile, BaseKind},
    repository::{Files, Forge, ForgedPiece, Without},
    sum::Sha256Sum,
};
use std::{collections::BTreeSet, sync::Arc, time::Duration};

fn claims(home: &super::Home, forge: &Forge) -> Vec<serde_json::Value> {
    let mut packs = Vec::new();
    for (file, _) in home.files.list(BaseKind::Index).unwrap() {
        let index = forge.open(&home.files.read(file).unwrap()).unwrap();
        packs.extend(index["packs"].as_array().unwrap().clone());
    }
    packs
}

fn store(home: &super::Home, kind: BaseKind, bytes: Vec<u8>) -> BaseFile {
    let file = BaseFile { kind, id: Sha256Sum::of(&bytes) };
    home.files.write(file, &[bytes.into()]).unwrap();
    file
}

/// Builds what an older server accepted from a client: packs of garbage with the right size, and an index that claims
/// they have existing contents.
fn poison(home: &super::Home, forge: &Forge) -> BTreeSet<BaseFile> {
    let (mut entries, mut bad) = (Vec::new(), BTreeSet::new());
    for (number, mut pack) in claims(home, forge).into_iter().enumerate() {
        let (mut size, mut offset) = (36, 0);
        for blob in pack["blobs"].as_array_mut().unwrap() {
            let length = blob["length"].as_u64().unwrap();
            blob["offset"] = offset.into();
            offset += length;
            size += length + if blob["uncompressed_length"].is_null() { 37 } else { 41 };
        }
        let file = store(home, BaseKind::Data, noise(900 + number as u64, size as usize));
        pack["id"] = serde_json::json!(file.id);
        entries.push(pack);
        bad.insert(file);
    }
    store(home, BaseKind::Index, forge.index(&entries).unwrap());
    bad
}

#[test]
fn a_poisoned_index_makes_no_good_pack_go() {
    for round in 0..4 {
        let home = home();
        let forge = Forge::new(&home.secret).unwrap();
        let tree = Fake::new().file("data/a", &noise(round, 200_000)).file("data/b", b"small");
        let first = back_up(&home.repository, &tree, None, "b1").1;
        let second = back_up(&home.repository, &tree.file("data/c", b"more"), None, "b2").1;
        let expected = [&first, &second].map(|s| restored(&home.repository, s).unwrap());
        let bad = poison(&home, &forge);
        // The server does this before a prune.
        let found = home.repository.prove_duplicates().unwrap();
        assert_eq!(found.keys().copied().collect::<BTreeSet<_>>(), bad);
        let files = Arc::clone(&home.files) as Arc<dyn Files>;
        let knowing = home.repository.with_files(Arc::new(Without::new(files, bad.clone())));
        assert_eq!(knowing.drop_absent().unwrap().torn, []);
        for _ in 0..2 {
            home.repository.prune(Duration::ZERO).unwrap();
        }
        for (snapshot, expected) in [&first, &second].into_iter().zip(&expected) {
            assert_eq!(restored(&home.repository, snapshot).unwrap(), *expected, "round {round}");
        }
        let left = home.files.list(BaseKind::Data).unwrap();
        assert!(left.iter().all(|(file, _)| !bad.contains(file)), "the garbage went");
        assert_eq!(home.repository.prove_duplicates().unwrap().len(), 0);
    }
}

#[test]
fn a_pack_is_good_when_it_holds_what_the_index_says_and_only_then() {
    let home = home();
    let forge = Forge::new(&home.secret).unwrap();
    back_up(&home.repository, &Fake::new().file("data/a", &noise(1, 100_000)), None, "b1");
    let bad = poison(&home, &forge);
    let check = |file: BaseFile| {
        let bytes = home.files.read(file).unwrap();
        home.repository.pack_proof().unwrap().check(file, &bytes)
    };
    for (file, _) in home.files.list(BaseKind::Data).unwrap() {
        assert_eq!(check(file).is_err(), bad.contains(&file), "{}", file.relative());
    }
    // A good pack for which an index claims wrong contents: whoever looks there finds other bytes.
    let (pack, mut entry) =
        forge.pack(&[ForgedPiece::good(b"one"), ForgedPiece::good(b"two")]).unwrap();
    let file = store(&home, BaseKind::Data, pack);
    assert_eq!(check(file), Ok(()), "no index names it");
    store(&home, BaseKind::Index, forge.index(std::slice::from_ref(&entry)).unwrap());
    assert_eq!(check(file), Ok(()));
    entry["blobs"][1]["id"] = serde_json::json!(Sha256Sum::of(b"three"));
    store(&home, BaseKind::Index, forge.index(&[entry]).unwrap());
    let told = check(file).unwrap_err();
    assert!(told.contains("the index says"), "{told}");
    // With one bit flipped.
    let mut bytes = home.files.read(file).unwrap().to_vec();
    bytes[40] ^= 1;
    let told = home.repository.pack_proof().unwrap().check(file, &bytes.into()).unwrap_err();
    assert!(told.contains("SHA-256 of its name"), "{told}");
}

/// A tree that is named twice is read once, and a snapshot is complete if every chunk is in the index.
#[test]
fn a_directory_that_holds_another_one_many_times_is_read_once() {
    let home = home();
    let forge = Forge::new(&home.secret).unwrap();
    let first = back_up(&home.repository, &Fake::new().file("data/a", b"a"), None, "b1").1;
    let mut tree = serde_json::json!({"nodes": []}).to_string();
    let mut pieces = Vec::new();
    for _ in 0..12 {
        let id = Sha256Sum::of(tree.as_bytes());
        pieces.push(ForgedPiece { tree: true, ..ForgedPiece::good(tree.as_bytes()) });
        let node =
            |n: u32| serde_json::json!({"name": format!("{n}"), "type": "dir", "subtree": id});
        tree = serde_json::json!({"nodes": (0..40).map(node).collect::<Vec<_>>()}).to_string();
    }
    pieces.push(ForgedPiece { tree: true, ..ForgedPiece::good(tree.as_bytes()) });
    let (pack, entry) = forge.pack(&pieces).unwrap();
    let pack = store(&home, BaseKind::Data, pack);
    store(&home, BaseKind::Index, forge.index(&[entry]).unwrap());
    let mut snapshot = forge.open(&home.files.read(first.id.file()).unwrap()).unwrap();
    snapshot["tree"] = serde_json::json!(Sha256Sum::of(tree.as_bytes()));
    let sealed = forge.seal(snapshot.to_string().as_bytes()).unwrap();
    let id = crate::repository::SnapshotId::new(store(&home, BaseKind::Snapshot, sealed).id);
    assert!(home.repository.packs_of(&[id]).unwrap().contains(&pack));
    home.repository.prune(Duration::ZERO).unwrap();
}
