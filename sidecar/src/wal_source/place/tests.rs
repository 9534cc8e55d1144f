//! A whole file is placed; one that is cut off, damaged or belongs to somebody else leaves nothing behind.

use super::*;
use crate::wal_source::testing::{FakeSource, SYSTEM, compress, segment};
use std::sync::Arc;

const PLAIN: usize = 300_000;

fn name() -> WalFile {
    WalFile::Segment(segment(1, 5))
}

fn plain() -> Vec<u8> {
    FakeSource::new(0..1).plain(segment(1, 5))[..PLAIN].to_vec()
}

/// Two frames one after the other, each with a checksum, as the server stores segments.
fn compressed() -> Vec<u8> {
    let plain = plain();
    [compress(&plain[..PLAIN / 2]), compress(&plain[PLAIN / 2..])].concat()
}

fn partial(compressed: bool) -> Filling {
    let segment = klio_pg::SegmentSize::new(1 << 20).ok();
    let shape = Shape {
        content: Content::Partial,
        compressed,
        plain: Some(PLAIN as u64),
        segment,
        before_hole: false,
    };
    Filling { file: name(), shape, keys: None, expected: Expected::default() }
}

/// Writes `bytes` in pieces; `whole` says whether the end marker follows.
fn put(bytes: &[u8], filling: &Filling, whole: bool) -> (Result<Received, Error>, Option<Vec<u8>>) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("RECOVERYXLOG");
    let (sender, queue) = mpsc::channel(10_000);
    for piece in bytes.chunks(1000) {
        sender.try_send(Bytes::copy_from_slice(piece)).unwrap();
    }
    if whole {
        sender.try_send(Bytes::new()).unwrap();
    }
    drop(sender);
    let target = Target::beside(&path).unwrap();
    let result = fill(&target, filling, queue);
    if result.is_ok() {
        target.commit(&path, true).unwrap();
    }
    drop(target);
    let files = fs::read_dir(directory.path()).unwrap().count();
    assert_eq!(files, usize::from(result.is_ok()), "nothing is left beside the file");
    (result, fs::read(&path).ok())
}

#[test]
fn a_segment_is_decoded_and_padded_to_its_full_size() {
    for (bytes, compress) in [(compressed(), true), (plain(), false)] {
        let (result, content) = put(&bytes, &partial(compress), true);
        assert_eq!(result.unwrap().size, 1 << 20);
        let content = content.unwrap();
        assert_eq!(content.len(), 1 << 20);
        assert!(content[..PLAIN] == plain() && content[PLAIN..].iter().all(|b| *b == 0));
    }
}

#[test]
fn an_encrypted_segment_needs_its_key() {
    let (identity, _) = Keys::generate();
    let keys = Keys::from_text(&identity, &[]).unwrap();
    let mut encrypted = keys.encrypt(Vec::new()).unwrap();
    encrypted.write_all(&compressed()).unwrap();
    let encrypted = encrypted.finish().unwrap();
    let with = |keys: Keys| Filling { keys: Some(keys), ..partial(true) };
    let (result, content) = put(&encrypted, &with(keys.clone()), true);
    assert_eq!(result.unwrap().size, 1 << 20);
    assert!(content.unwrap()[..PLAIN] == plain());
    let (other, _) = Keys::generate();
    let stranger = Keys::from_text(&other, &[]).unwrap();
    let failure = put(&encrypted, &with(stranger), true).0.unwrap_err().failure;
    assert_eq!(failure, Failure::Code(Code::Forbidden));
    for cut in [10, encrypted.len() / 2, encrypted.len() - 1] {
        assert!(put(&encrypted[..cut], &with(keys.clone()), true).0.is_err(), "cut at {cut}");
    }
}

/// P7: a file that was received half must not exist, not even under its temporary name.
#[test]
fn whatever_is_cut_off_leaves_nothing_behind() {
    let (all, raw) = (compressed(), plain());
    for cut in [0, 1, all.len() / 2, all.len() - 1] {
        for whole in [true, false] {
            let (result, content) = put(&all[..cut], &partial(true), whole);
            assert!(result.is_err(), "cut at {cut}, end marker {whole}");
            assert_eq!(content, None);
        }
    }
    assert!(put(&all, &partial(true), false).0.is_err(), "the end marker is missing");
    assert!(put(&raw[..PLAIN - 1], &partial(false), true).0.is_err());
}

#[test]
fn too_much_and_damaged_bytes_are_refused() {
    let mut longer = compressed();
    longer.extend(compressed());
    assert!(put(&longer, &partial(true), true).0.is_err());
    let mut damaged = compressed();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 0x10;
    let (result, content) = put(&damaged, &partial(true), true);
    assert_eq!(result.unwrap_err().failure, Failure::Code(Code::Corrupt));
    assert_eq!(content, None);
}

/// P7: PostgreSQL would take such a file for the end of WAL.
#[test]
fn wal_of_another_place_or_postgresql_is_refused() {
    let bytes = compressed();
    let failure = |filling: Filling| put(&bytes, &filling, true).0.unwrap_err().failure;
    let elsewhere = Filling { file: WalFile::Segment(segment(1, 6)), ..partial(true) };
    assert_eq!(failure(elsewhere), Failure::Code(Code::Corrupt));
    let expected = Expected { system_identifier: Some(SYSTEM + 1), has_target: false };
    let stranger = Filling { expected, ..partial(true) };
    assert_eq!(failure(stranger), Failure::Code(Code::WrongSystem));
    let ours = Expected { system_identifier: Some(SYSTEM), has_target: false };
    assert!(put(&bytes, &Filling { expected: ours, ..partial(true) }, true).0.is_ok());
}

#[test]
fn an_existing_file_survives_a_failed_fetch() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x");
    fs::write(&path, "old").unwrap();
    let (sender, queue) = mpsc::channel::<Bytes>(1);
    drop(sender);
    let target = Target::beside(&path).unwrap();
    assert!(fill(&target, &partial(true), queue).is_err());
    drop(target);
    assert_eq!(fs::read(&path).unwrap(), b"old");
}

/// The file of a killed process is used again; a running process keeps its own.
#[test]
fn two_processes_never_write_one_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("RECOVERYXLOG");
    fs::write(directory.path().join("RECOVERYXLOG.klio-part"), "of a killed process").unwrap();
    let first = Arc::new(Target::beside(&path).unwrap());
    let second = Target::beside(&path).unwrap();
    assert_ne!(first.path, second.path);
    first.commit(&path, false).unwrap();
    second.commit(&path, false).unwrap();
    drop((first, second));
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
}
