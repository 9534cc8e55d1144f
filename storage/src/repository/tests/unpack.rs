//! Files from a client are verified before they count: a pack that claims contents it does not have is refused (P13).

use super::{Fake, back_up, home, noise};
use crate::{
    Error, Kind,
    layout::{BaseFile, BaseKind},
    repository::{Files, Forge, ForgedPiece, Repository},
    sum::Sha256Sum,
};
use bytes::Bytes;
use proptest::{collection::vec, prelude::*, test_runner::TestRunner};

fn open(repository: &Repository, pack: &[u8]) -> Result<u64, Error> {
    let (pack, file) = (Bytes::copy_from_slice(pack), file(BaseKind::Data, pack));
    let read =
        |offset: u64, length: u64| Ok(pack.slice(offset as usize..(offset + length) as usize));
    repository.open_pack(file, pack.len() as u64, &read)
}

fn file(kind: BaseKind, bytes: &[u8]) -> BaseFile {
    BaseFile { kind, id: Sha256Sum::of(bytes) }
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, Error>, words: &str) {
    let error = result.expect_err("refused");
    assert!(error.to_string().contains(words), "{words:?} is missing in {error}");
}

#[test]
fn every_pack_of_a_real_backup_opens() {
    let home = home();
    let tree = Fake::new().file("data/a", &noise(1, 300_000)).file("data/b", &[0; 100_000]);
    back_up(&home.repository, &tree, None, "b1");
    let mut pieces = 0;
    for (file, size) in home.files.list(BaseKind::Data).unwrap() {
        let read = |offset, length| home.files.read_range(file, offset, length);
        pieces += home.repository.open_pack(file, size, &read).unwrap();
    }
    assert!(pieces > 30, "{pieces}");
    for (file, size) in home.files.list(BaseKind::Index).unwrap() {
        let sealed = home.files.read(file).unwrap();
        assert_eq!(sealed.len() as u64, size);
        for claim in home.repository.read_claims(file, &sealed).unwrap() {
            let pack = claim.pack();
            let size = home.files.read(pack).unwrap().len() as u64;
            let read = |offset, length| home.files.read_range(pack, offset, length);
            home.repository.check_claim(claim, size, &read).unwrap();
        }
    }
    for (file, _) in home.files.list(BaseKind::Snapshot).unwrap() {
        home.repository.check_snapshot_file(file, &home.files.read(file).unwrap()).unwrap();
    }
}

#[test]
fn a_pack_that_claims_what_it_does_not_hold_does_not_open() {
    let home = home();
    let forge = Forge::new(&home.secret).unwrap();
    let (repository, good) = (&home.repository, ForgedPiece::good(b"some bytes of a file"));
    let pack = |pieces: &[ForgedPiece]| forge.pack(pieces).unwrap().0;
    assert_eq!(open(repository, &pack(&[good.clone(), good.clone()])).unwrap(), 2);
    let plain = ForgedPiece { says: None, ..good.clone() };
    assert_eq!(open(repository, &pack(&[plain])).unwrap(), 1);

    refused(open(repository, &noise(3, 5_000)), "list");
    refused(open(repository, &[0; 3]), "list");
    refused(open(repository, &pack(&[])), "list");
    let swapped = ForgedPiece { id: Sha256Sum::of(b"another"), ..good.clone() };
    refused(open(repository, &pack(&[good.clone(), swapped])), "SHA-256");
    for says in [1, 19, 21, 8 << 20] {
        let lies = ForgedPiece { says: Some(says), ..good.clone() };
        refused(open(repository, &pack(&[lies])), "length");
    }
    for (says, word) in [(0, "found 0"), (9 << 20, "at most"), (u32::MAX, "at most")] {
        let lies = ForgedPiece { says: Some(says), ..good.clone() };
        refused(open(repository, &pack(&[lies])), word);
    }
    let mut flipped = pack(std::slice::from_ref(&good));
    flipped[20] ^= 1;
    refused(open(repository, &flipped), "authentication");
    // The pieces of one pack with the list of another.
    let (long, short) = (pack(&[good.clone(), good.clone()]), pack(std::slice::from_ref(&good)));
    let mixed = [&long[..30], &short].concat();
    refused(open(repository, &mixed), "list");
    let other = super::super::Secret::generate();
    let strange = Forge::new(&other).unwrap().pack(&[good]).unwrap().0;
    refused(open(repository, &strange), "list");
}

/// A gigabyte of zeros in a few kilobytes is recognized without being decompressed.
#[test]
fn a_piece_that_would_fill_the_memory_is_told_by_its_size() {
    let home = home();
    let forge = Forge::new(&home.secret).unwrap();
    let says = Some(20_000);
    let bomb = ForgedPiece { plain: vec![0; 64 << 20], says, ..ForgedPiece::good(b"x") };
    refused(open(&home.repository, &forge.pack(std::slice::from_ref(&bomb)).unwrap().0), "length");
    let json = zstd::bulk::compress(&vec![b' '; 300 << 20], 1).unwrap();
    let sealed = forge.seal(&[&[2], json.as_slice()].concat()).unwrap();
    refused(home.repository.read_claims(file(BaseKind::Index, &sealed), &sealed), "decrypt it");
}

#[test]
fn an_index_says_of_a_pack_what_the_pack_says_and_nothing_else() {
    let home = home();
    let forge = Forge::new(&home.secret).unwrap();
    let pieces = [ForgedPiece::good(b"one"), ForgedPiece::good(b"two")];
    let (pack, entry) = forge.pack(&pieces).unwrap();
    let check = |index: serde_json::Value| -> Result<(), Error> {
        let sealed = forge.seal(index.to_string().as_bytes()).unwrap();
        let claims = home.repository.read_claims(file(BaseKind::Index, &sealed), &sealed)?;
        for claim in claims {
            let pack = Bytes::copy_from_slice(&pack);
            let read = |offset: u64, length: u64| {
                Ok(pack.slice(offset as usize..(offset + length) as usize))
            };
            home.repository.check_claim(claim, pack.len() as u64, &read)?;
        }
        Ok(())
    };
    check(serde_json::json!({"packs": [entry]})).unwrap();
    check(serde_json::json!({"packs": [entry], "supersedes": [], "packs_to_delete": []})).unwrap();
    let changed = |at: usize, key: &str, value: serde_json::Value| {
        let mut entry = entry.clone();
        entry["blobs"][at][key] = value;
        serde_json::json!({"packs": [entry]})
    };
    let existing = serde_json::json!(Sha256Sum::of(b"of an earlier backup"));
    refused(check(changed(0, "id", existing)), "own list");
    refused(check(changed(0, "length", 33.into())), "own list");
    refused(check(changed(1, "offset", 0.into())), "own list");
    refused(check(changed(1, "type", "tree".into())), "own list");
    let mut fewer = entry.clone();
    fewer["blobs"].as_array_mut().unwrap().pop();
    refused(check(serde_json::json!({"packs": [fewer]})), "own list");

    let id = Sha256Sum::of(b"an index of an earlier backup");
    let denied = [
        (serde_json::json!({"packs": [entry], "supersedes": [id]}), "supersedes"),
        (serde_json::json!({"packs": [], "packs_to_delete": [entry]}), "removal"),
        (serde_json::json!({"packs": [entry], "packs_to_delete": [entry]}), "removal"),
        (serde_json::json!({"packs": []}), "none in it"),
        (serde_json::json!({"packs": [entry, entry]}), "once"),
    ];
    for (index, word) in denied {
        let error = check(index).expect_err("refused");
        assert_eq!(error.kind, Kind::Denied, "{error}");
        assert!(error.to_string().contains(word), "{word:?} is missing in {error}");
    }
    refused(check(serde_json::json!({"nothing": 1})), "index JSON");
}

/// Whoever has the key can encrypt anything: a pack's list, an index and a snapshot with any bytes are refused or
/// parsed, without a panic, and a request for bytes outside the pack is an error.
#[test]
fn no_bytes_of_a_client_with_the_key_make_it_panic() {
    let home = home();
    let forge = Forge::new(&home.secret).unwrap();
    let repository = &home.repository;
    let tree = Fake::new().file("data/a", &noise(1, 30_000));
    back_up(repository, &tree, None, "b1");
    let texts: Vec<(BaseKind, String)> = [BaseKind::Index, BaseKind::Snapshot]
        .into_iter()
        .flat_map(|kind| home.files.list(kind).unwrap())
        .map(|(file, _)| {
            let text = forge.open(&home.files.read(file).unwrap()).unwrap();
            (file.kind, text.to_string())
        })
        .collect();
    let try_pack = |pack: &[u8]| {
        let read = |offset: u64, length: u64| {
            let end = offset.checked_add(length).and_then(|end| usize::try_from(end).ok());
            let part = end.and_then(|end| pack.get(usize::try_from(offset).ok()?..end));
            let place = file(BaseKind::Data, pack).relative();
            let outside = || Error::new(Kind::Corrupt, crate::Op::Read, place, "outside");
            part.map(Bytes::copy_from_slice).ok_or_else(outside)
        };
        let _ = repository.open_pack(file(BaseKind::Data, pack), pack.len() as u64, &read);
    };
    let try_sealed = |kind: BaseKind, plain: &[u8]| {
        let sealed = forge.seal(plain).unwrap();
        let file = file(kind, &sealed);
        if kind == BaseKind::Snapshot {
            let _ = repository.check_snapshot_file(file, &sealed);
            return;
        }
        for claim in repository.read_claims(file, &sealed).into_iter().flatten() {
            let pack = claim.pack();
            let read = |offset, length| home.files.read_range(pack, offset, length);
            let _ = repository.check_claim(claim, 10_000, &read);
        }
    };
    // An entry of the list: its kind, lengths, an id; rarely a complete one.
    let entry = (0u8..5, any::<u32>(), 0u32..500, any::<[u8; 32]>(), 0usize..50);
    let entries = vec(entry, 0..4);
    let bytes = || vec(any::<u8>(), 0..400);
    let place = (any::<prop::sample::Index>(), any::<prop::sample::Index>(), "[\\x00-\\x7f]{0,3}");
    let strategy = (bytes(), entries, bytes(), any::<u32>(), place);
    let mut runner = TestRunner::new(ProptestConfig::default());
    let outcome = runner.run(&strategy, |(pieces, entries, plain, says, (text, at, put))| {
        let mut list = Vec::new();
        for (kind, large, small, id, cut) in entries {
            let length = if cut == 0 { large } else { small };
            let mut entry = vec![kind];
            entry.extend(length.to_le_bytes());
            entry.extend((kind >= 2).then(|| large.to_le_bytes()).into_iter().flatten());
            entry.extend(id);
            entry.truncate(if cut == 1 { 7 } else { 100 });
            list.extend(entry);
        }
        for list in [&list, &plain] {
            let sealed = forge.seal(list).unwrap();
            let mut pack = [pieces.as_slice(), &sealed].concat();
            pack.extend((sealed.len() as u32).to_le_bytes());
            try_pack(&pack);
            pack.truncate(pack.len() - 4);
            pack.extend(says.to_le_bytes());
            try_pack(&pack);
        }
        try_pack(&pieces);
        let (kind, text) = text.get(&texts);
        let mut changed = text.clone().into_bytes();
        let at = at.index(changed.len());
        changed.splice(at..(at + put.len()).min(text.len()), put.bytes());
        try_sealed(*kind, &changed);
        try_sealed(BaseKind::Index, &plain);
        try_sealed(BaseKind::Snapshot, &plain);
        Ok(())
    });
    outcome.unwrap();
}
