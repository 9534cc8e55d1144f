//! OBJECT2 and OBJECT4 for encrypted files: every age file has a key of its own, so only the plaintext can be compared.

use super::{KEY, S3, noise, open, sealed};
use crate::{
    Kind,
    crypt::{AtRest, Keys},
    tier2::{Outcome, Source, Wrapping},
};
use futures::TryStreamExt;
use std::path::Path;

const AGE_KEY: &str = "pg-1/wal/encrypted.age";

fn keys() -> Keys {
    Keys::from_text(&Keys::generate().0, &[]).unwrap()
}

/// `plain` as zstd in an age file, as tier 1 writes it.
fn encrypted(directory: &Path, name: &str, plain: &[u8], keys: &Keys) -> Source {
    let mut source = sealed(directory, name, plain, 1);
    let wrapped = keys.wrap(&std::fs::read(&source.path).unwrap()).unwrap();
    std::fs::write(&source.path, wrapped).unwrap();
    source.wrapping = Wrapping { age: true, other_key: None, at_rest: AtRest::On(keys.clone()) };
    source
}

#[tokio::test]
async fn the_same_plaintext_encrypted_twice_is_the_same_file() {
    let s3 = S3::start().await;
    let (tier2, directory, keys) = (open(&s3), tempfile::tempdir().unwrap(), keys());
    for bytes in [100_000, 9 << 20] {
        let (key, plain) = (format!("pg-1/wal/{bytes}.age"), noise(1, bytes));
        let first = encrypted(directory.path(), "a", &plain, &keys);
        assert_eq!(tier2.upload(&first, &key).await.unwrap().outcome, Outcome::Stored);
        let second = encrypted(directory.path(), "b", &plain, &keys);
        let again = tier2.upload(&second, &key).await.unwrap();
        assert_eq!(again.outcome, Outcome::AlreadyThere);
        assert_eq!(again.size, std::fs::metadata(&first.path).unwrap().len());
        let other = encrypted(directory.path(), "c", &noise(2, bytes), &keys);
        let error = tier2.upload(&other, &key).await.unwrap_err();
        assert_eq!(error.kind, Kind::Conflict, "{error}");
    }
}

#[tokio::test]
async fn the_plain_object_of_earlier_settings_is_the_same_file_or_a_conflict() {
    let s3 = S3::start().await;
    let (tier2, directory, keys) = (open(&s3), tempfile::tempdir().unwrap(), keys());
    let plain = noise(1, 100_000);
    tier2.upload(&sealed(directory.path(), "a", &plain, 1), KEY).await.unwrap();
    let mut now = encrypted(directory.path(), "b", &plain, &keys);
    now.wrapping.other_key = Some(KEY.into());
    let uploaded = tier2.upload(&now, AGE_KEY).await.unwrap();
    assert_eq!(uploaded.outcome, Outcome::AlreadyThere);
    assert_eq!(tier2.size_of(AGE_KEY).await.unwrap(), None);
    let mut other = encrypted(directory.path(), "c", &noise(2, 100_000), &keys);
    other.wrapping.other_key = Some(KEY.into());
    let error = tier2.upload(&other, AGE_KEY).await.unwrap_err();
    assert_eq!(error.kind, Kind::Conflict, "{error}");
    assert_eq!(tier2.size_of(AGE_KEY).await.unwrap(), None);
    // And in the other direction.
    let history = encrypted(directory.path(), "d", b"", &keys);
    std::fs::write(&history.path, keys.wrap(b"1\t0/5000000\tno recovery target\n").unwrap())
        .unwrap();
    let history = Source { zstd: false, ..history };
    tier2.upload(&history, "pg-1/wal/2.history.age").await.unwrap();
    let path = directory.path().join("e");
    std::fs::write(&path, b"1\t0/5000000\tno recovery target\n").unwrap();
    let wrapping = Wrapping {
        age: false,
        other_key: Some("pg-1/wal/2.history.age".into()),
        at_rest: AtRest::OffWith(keys),
    };
    let back =
        Source { path, sha256: None, zstd: false, plaintext_bytes: None, grows: false, wrapping };
    let uploaded = tier2.upload(&back, "pg-1/wal/2.history").await.unwrap();
    assert_eq!(uploaded.outcome, Outcome::AlreadyThere);
}

#[tokio::test]
async fn an_object_for_another_key_is_neither_the_same_nor_overwritten() {
    let s3 = S3::start().await;
    let (tier2, directory, ours, theirs) =
        (open(&s3), tempfile::tempdir().unwrap(), keys(), keys());
    let plain = noise(1, 50_000);
    tier2.upload(&encrypted(directory.path(), "a", &plain, &theirs), AGE_KEY).await.unwrap();
    let source = encrypted(directory.path(), "b", &plain, &ours);
    let error = tier2.upload(&source, AGE_KEY).await.unwrap_err();
    assert_eq!(error.kind, Kind::Denied, "{error}");
    assert!(error.to_string().contains(&theirs.own()[0]), "{error}");
}

#[tokio::test]
async fn a_damaged_encrypted_file_is_never_uploaded() {
    let s3 = S3::start().await;
    let (tier2, directory, keys) = (open(&s3), tempfile::tempdir().unwrap(), keys());
    let source = encrypted(directory.path(), "a", &noise(1, 200_000), &keys);
    let good = std::fs::read(&source.path).unwrap();
    for at in [100, 400, good.len() / 2, good.len() - 1] {
        let mut bad = good.clone();
        bad[at] ^= 1;
        std::fs::write(&source.path, bad).unwrap();
        let error = tier2.upload(&source, AGE_KEY).await.unwrap_err();
        assert!(matches!(error.kind, Kind::Corrupt | Kind::Denied), "byte {at}: {error}");
    }
    std::fs::write(&source.path, &good[..good.len() - 100]).unwrap();
    assert_eq!(tier2.upload(&source, AGE_KEY).await.unwrap_err().kind, Kind::Corrupt);
    assert_eq!(tier2.size_of(AGE_KEY).await.unwrap(), None);
}

/// What a caller gets of an object while it arrives; a truncated or changed one is never returned as complete.
#[tokio::test]
async fn a_download_is_decrypted_piece_by_piece() {
    let s3 = S3::start().await;
    let (tier2, directory, keys) = (open(&s3), tempfile::tempdir().unwrap(), keys());
    let source = encrypted(directory.path(), "a", &noise(1, 300_000), &keys);
    tier2.upload(&source, AGE_KEY).await.unwrap();
    let read = async |keys: &Keys| {
        let download = tier2.download(AGE_KEY).await.unwrap();
        let pieces = keys.decrypt_stream(download, AGE_KEY.into()).await?;
        let pieces: Vec<bytes::Bytes> = pieces.try_collect().await?;
        Ok::<_, crate::Error>(pieces.concat())
    };
    let zstd = read(&keys).await.unwrap();
    assert_eq!(zstd::decode_all(&zstd[..]).unwrap(), noise(1, 300_000));
    let other = Keys::from_text(&Keys::generate().0, &[]).unwrap();
    assert_eq!(read(&other).await.unwrap_err().kind, Kind::Denied);
    let object = s3.object(&format!("prefix/{AGE_KEY}"));
    let good = std::fs::read(&object).unwrap();
    let mut bad = good.clone();
    bad[good.len() / 2] ^= 1;
    for bytes in [bad, good[..good.len() - 1].to_vec(), good[..50].to_vec(), b"no age".to_vec()] {
        std::fs::write(&object, &bytes).unwrap();
        assert_eq!(read(&keys).await.unwrap_err().kind, Kind::Corrupt, "{}", bytes.len());
    }
}
