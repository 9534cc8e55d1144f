//! Encryption at rest: what is on disk, changes of keys, and interruptions in the middle of them.

use super::{timeline::child, *};
use crate::crypt::recipients_of;
use zeroize::Zeroizing;

fn held(rig: &Rig, store: &WalStore) -> Vec<StoredFile> {
    store.list(&rig.name).unwrap()
}

/// One sealed segment, a sealed partial one, a history and an open journal.
fn filled(rig: &Rig) {
    let store = rig.open();
    let mut writer = rig.writer(&store, 1, 2 * MIB);
    rig.append_and_flush(&mut writer, 3 * MIB + 20_000);
    drop(writer);
    let (text, _) = child();
    store.put_history(&rig.name, tli(2), &text).unwrap();
    for file in store.unsealed(&rig.name) {
        store.seal(&rig.name, file).unwrap();
    }
}

fn content(disk: &SimDisk, path: &Path) -> Vec<u8> {
    crate::disk::read_small(disk, path, 64 << 20).unwrap()
}

fn replace(disk: &SimDisk, path: &Path, bytes: &[u8]) {
    disk.remove(path).unwrap();
    disk.create_new(path).unwrap().write_all_at(bytes, 0).unwrap();
}

/// Keys whose file has a new identity before the one of `keys()`, and keys with the new one only.
fn rotated(old: &Zeroizing<String>) -> (Keys, Keys) {
    let (new, _) = Keys::generate();
    let both = format!("{}{}", *new, **old);
    (Keys::from_text(&both, &[]).unwrap(), Keys::from_text(&new, &[]).unwrap())
}

#[test]
fn every_finished_file_is_an_age_file_and_is_read_back() {
    let rig = Rig::encrypted(1);
    filled(&rig);
    let store = rig.open();
    let files = held(&rig, &store);
    assert!(files.len() >= 2, "{files:?}");
    for stored in &files {
        let path = Path::new("/tier1").join(stored.file.key_in(&rig.name, Form::Age));
        assert_eq!(recipients_of(&content(&rig.disk, &path)).unwrap(), keys().recipients());
    }
    let first = rig.read(&store, WalFile::Segment(segment(1, 2)));
    assert!(first == rig.bytes(2 * MIB, 3 * MIB));
    assert_eq!(rig.read(&store, WalFile::History(tli(2))), child().0);
}

#[test]
fn a_bit_flip_in_a_sealed_file_or_a_history_is_found() {
    let rig = Rig::encrypted(1);
    filled(&rig);
    let store = rig.open();
    for file in [WalFile::Segment(segment(1, 2)), WalFile::History(tli(2))] {
        let path = Path::new("/tier1").join(file.key_in(&rig.name, Form::Age));
        let good = content(&rig.disk, &path);
        for at in [30, 150, good.len() / 2, good.len() - 1] {
            let mut bad = good.clone();
            bad[at] ^= 1;
            replace(&rig.disk, &path, &bad);
            let read = store.read(&rig.name, file).and_then(|found| store.plain_bytes(found));
            let error = read.expect_err(&format!("{file} byte {at}"));
            assert!(matches!(error.kind, Kind::Corrupt | Kind::Denied), "{error}");
        }
        replace(&rig.disk, &path, &good);
    }
    rig.read(&store, WalFile::Segment(segment(1, 2)));
}

#[test]
fn a_wrong_key_or_none_is_refused_before_anything_is_touched() {
    let rig = Rig::encrypted(1);
    filled(&rig);
    let root = Path::new("/tier1");
    let operations = rig.disk.operations();
    let other = Keys::from_text(&Keys::generate().0, &[]).unwrap();
    let error = check_keys(&rig.disk, root, &AtRest::On(other)).unwrap_err();
    assert_eq!(error.kind, Kind::Denied);
    let text = error.to_string();
    assert!(text.contains("open.key.age") && text.contains(&keys().own()[0]), "{text}");
    let error = check_keys(&rig.disk, root, &AtRest::Off).unwrap_err();
    assert_eq!(error.kind, Kind::Denied, "{error}");
    check_keys(&rig.disk, root, &AtRest::On(keys())).unwrap();
    check_keys(&rig.disk, root, &AtRest::OffWith(keys())).unwrap();
    assert_eq!(rig.disk.operations(), operations, "something was written");
}

/// A store that is opened with the wrong key regardless changes nothing of the cluster either.
#[test]
fn a_cluster_whose_key_is_missing_is_left_alone() {
    let mut rig = Rig::encrypted(1);
    let store = rig.open();
    let mut writer = rig.writer(&store, 1, 2 * MIB);
    rig.append_and_flush(&mut writer, 2 * MIB + 5000);
    drop((writer, store));
    let journal = Rig::path(&format!("wal/00000001/{}.open", segment(1, 2)));
    let before = content(&rig.disk, &journal);
    let other = Keys::from_text(&Keys::generate().0, &[]).unwrap();
    for at_rest in [AtRest::On(other), AtRest::Off] {
        rig.at_rest = at_rest;
        let store = rig.try_open().unwrap();
        assert!(!store.problems(&rig.name).is_empty());
        let opened = store.open_writer(&rig.name, &Rig::request(1, 2 * MIB));
        assert!(matches!(opened, Err(OpenError::Failed(e)) if e.kind == Kind::Denied));
        assert!(content(&rig.disk, &journal) == before);
    }
    rig.at_rest = AtRest::On(keys());
    // The key itself is missing.
    rig.disk.remove(&Rig::path("open.key.age")).unwrap();
    let store = rig.try_open().unwrap();
    assert!(!store.problems(&rig.name).is_empty());
    assert!(content(&rig.disk, &journal) == before);
}

/// P2: whatever was rewritten, one of the two identities in the file decrypts it, at every moment.
#[test]
fn a_crash_anywhere_while_writing_again_for_a_new_key_leaves_everything_readable() {
    let (old, _) = Keys::generate();
    let (both, new) = rotated(&old);
    let old = Keys::from_text(&old, &[]).unwrap();
    let mut finished = false;
    for crash in (0..60).chain([100_000]) {
        let mut rig = Rig::new(crash);
        rig.at_rest = AtRest::On(old.clone());
        filled(&rig);
        rig.at_rest = AtRest::On(both.clone());
        rig.disk.crash_after(crash);
        let again = || -> Result<(), Error> {
            let store = rig.try_open()?;
            store.rewrap_key(&rig.name)?;
            for stored in store.list(&rig.name)? {
                store.rewrap(&rig.name, stored.file)?;
            }
            Ok(())
        };
        let done = again().is_ok();
        finished |= done;
        rig.disk.restart(Restart::PowerLoss);
        if done {
            rig.at_rest = AtRest::On(new.clone());
        }
        check_keys(&rig.disk, Path::new("/tier1"), &rig.at_rest).unwrap();
        let store = rig.try_open().unwrap();
        assert_eq!(store.problems(&rig.name), Vec::<String>::new(), "{crash}");
        assert!(rig.read(&store, WalFile::Segment(segment(1, 2))) == rig.bytes(2 * MIB, 3 * MIB));
        rig.check_readable(&store, &root_history());
        assert_eq!(rig.read(&store, WalFile::History(tli(2))), child().0);
    }
    assert!(finished);
}

#[test]
fn writing_again_takes_plain_files_in_and_does_nothing_twice() {
    let mut rig = Rig::new(1);
    filled(&rig);
    rig.at_rest = AtRest::On(keys());
    let store = rig.open();
    for stored in held(&rig, &store) {
        assert_eq!(stored.form, Form::Plain);
        assert!(store.rewrap(&rig.name, stored.file).unwrap());
        assert!(!store.rewrap(&rig.name, stored.file).unwrap());
    }
    assert!(held(&rig, &store).iter().all(|stored| stored.form == Form::Age));
    assert!(rig.read(&store, WalFile::Segment(segment(1, 2))) == rig.bytes(2 * MIB, 3 * MIB));
    let plain = Rig::path(&format!("wal/00000001/{}.zst", segment(1, 2)));
    assert!(rig.disk.stat(&plain).is_err(), "the plain file stayed");
}
