//! OBJECT1-OBJECT4 and P7 on stores without faults.

use super::{BUCKET, KEY, S3, config, noise, open, s3, sealed, source};
use crate::{
    Kind,
    layout::ClusterName,
    tier2::{Download, Moved, Outcome, Progress, Secret, Sha256Sum, Source, Tier2, Tier2Config},
};
use futures::TryStreamExt;
use url::Url;

async fn read(download: Download) -> Vec<u8> {
    let chunks: Vec<bytes::Bytes> = download.try_collect().await.unwrap();
    chunks.concat()
}

/// Both kinds of store behave the same.
async fn upload_round_trips(tier2: &Tier2, bytes: usize) {
    let directory = tempfile::tempdir().unwrap();
    let source = sealed(directory.path(), "a", &noise(1, bytes), 1);
    let local = std::fs::read(&source.path).unwrap();
    let progress = Progress::default();
    let first = progress.watch(tier2.upload(&source, KEY)).await.unwrap();
    // A small file for a directory is written at once.
    let counted = !tier2.url().starts_with("file:") || bytes > 8 << 20;
    let Moved { bytes: moved, last } = progress.moved();
    assert!(!counted || moved >= first.size && last.is_some(), "{moved} of {}", first.size);
    assert_eq!(first.outcome, Outcome::Stored);
    assert_eq!(first.size, local.len() as u64);
    assert_eq!(first.sha256, Sha256Sum::of(&local));
    assert_eq!(read(tier2.download(KEY).await.unwrap()).await, local);
    assert_eq!(tier2.size_of(KEY).await.unwrap(), Some(first.size));
    let again = tier2.upload(&source, KEY).await.unwrap();
    assert_eq!(again.outcome, Outcome::AlreadyThere);
    let cluster: ClusterName = "pg-1".parse().unwrap();
    let listed = tier2.list_wal(&cluster).await.unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].file.key(&cluster), KEY);
    assert_eq!(listed[0].size, first.size);
    assert!(listed[0].modified_unix > 1_700_000_000);
    assert_eq!(tier2.clusters().await.unwrap(), vec![cluster]);
}

#[tokio::test]
async fn a_small_and_a_large_file_round_trip_through_s3() {
    for bytes in [100_000, (20 << 20) + 7] {
        let s3 = S3::start().await;
        upload_round_trips(&open(&s3), bytes).await;
        let parts = s3.requests().iter().filter(|r| r.contains("partNumber=")).count();
        assert_eq!(parts, if bytes > 8 << 20 { 3 } else { 0 }, "{:?}", s3.requests());
    }
}

/// P5: before tier 1 evicts a file, its object is read, even if it had to be uploaded again a moment before.
#[tokio::test]
async fn a_proof_reads_the_object_whether_it_was_there_or_not() {
    let s3 = S3::start().await;
    let (tier2, directory) = (open(&s3), tempfile::tempdir().unwrap());
    let source = sealed(directory.path(), "a", &noise(1, 100_000), 1);
    let read =
        || s3.requests().iter().filter(|r| r.starts_with("GET") && r.contains(".zst")).count();
    for reads in [1, 2] {
        tier2.prove(&source, KEY).await.unwrap();
        assert_eq!(read(), reads, "{:?}", s3.requests());
    }
    let other = sealed(directory.path(), "b", &noise(2, 100_000), 1);
    assert_eq!(tier2.prove(&other, KEY).await.unwrap_err().kind, Kind::Conflict);
}

#[tokio::test]
async fn a_small_and_a_large_file_round_trip_through_a_directory() {
    for bytes in [100_000, (20 << 20) + 7] {
        let directory = tempfile::tempdir().unwrap();
        let url = Url::from_directory_path(directory.path()).unwrap();
        let tier2 = Tier2::open(&Tier2Config::new(url)).unwrap();
        tier2.probe().await.unwrap();
        upload_round_trips(&tier2, bytes).await;
    }
}

#[tokio::test]
async fn the_same_plaintext_sealed_twice_is_the_same_file() {
    let s3 = S3::start().await;
    let (tier2, directory) = (open(&s3), tempfile::tempdir().unwrap());
    let plain = b"write-ahead log ".repeat(50_000);
    let first = sealed(directory.path(), "a", &plain, 1);
    tier2.upload(&first, KEY).await.unwrap();
    // Sealed again: another level, and two frames instead of one.
    let (left, right) = plain.split_at(300_000);
    let mut frames = zstd::encode_all(left, 9).unwrap();
    frames.extend(zstd::encode_all(right, 9).unwrap());
    let second = directory.path().join("b");
    std::fs::write(&second, &frames).unwrap();
    let uploaded = tier2.upload(&source(second), KEY).await.unwrap();
    assert_eq!(uploaded.outcome, Outcome::AlreadyThere);
    assert_eq!(uploaded.size, std::fs::metadata(&first.path).unwrap().len());
}

/// OBJECT6: the partial segment of a timeline whose PostgreSQL came back is longer than the stored one.
async fn grows(tier2: &Tier2, bytes: usize) {
    let directory = tempfile::tempdir().unwrap();
    let plain = noise(1, bytes);
    let of = |name: &str, plain: &[u8], grows| Source {
        grows,
        ..sealed(directory.path(), name, plain, 1)
    };
    let beginning = of("a", &plain[..bytes / 3], true);
    tier2.upload(&beginning, KEY).await.unwrap();
    let all = of("b", &plain, false);
    let refused = tier2.upload(&all, KEY).await.unwrap_err();
    assert_eq!(refused.kind, Kind::Conflict, "only what is said to grow");
    let mut changed = plain.clone();
    changed[bytes / 4] ^= 1;
    for other in [of("c", &changed, true), of("d", &noise(2, bytes), true)] {
        assert_eq!(tier2.upload(&other, KEY).await.unwrap_err().kind, Kind::Conflict);
    }
    assert_eq!(
        read(tier2.download(KEY).await.unwrap()).await,
        std::fs::read(&beginning.path).unwrap()
    );
    let all = Source { grows: true, ..all };
    assert_eq!(tier2.upload(&all, KEY).await.unwrap().outcome, Outcome::Stored);
    assert_eq!(tier2.upload(&all, KEY).await.unwrap().outcome, Outcome::AlreadyThere);
    let stored = std::fs::read(&all.path).unwrap();
    assert_eq!(read(tier2.download(KEY).await.unwrap()).await, stored);
    // A longer object is never replaced by its beginning.
    assert_eq!(tier2.upload(&beginning, KEY).await.unwrap_err().kind, Kind::Conflict);
    assert_eq!(read(tier2.download(KEY).await.unwrap()).await, stored);
}

#[tokio::test]
async fn a_beginning_gives_way_to_the_whole_and_to_nothing_else() {
    for bytes in [100_000, (9 << 20) + 7] {
        let s3 = S3::start().await;
        grows(&open(&s3), bytes).await;
        let directory = tempfile::tempdir().unwrap();
        let url = Url::from_directory_path(directory.path()).unwrap();
        grows(&Tier2::open(&Tier2Config::new(url)).unwrap(), bytes).await;
    }
}

#[tokio::test]
async fn other_plaintext_is_a_conflict_and_is_never_overwritten() {
    let s3 = S3::start().await;
    let (tier2, directory) = (open(&s3), tempfile::tempdir().unwrap());
    for bytes in [100_000, 9 << 20] {
        let key = format!("pg-1/wal/{bytes}");
        let first = sealed(directory.path(), "a", &noise(1, bytes), 1);
        tier2.upload(&first, &key).await.unwrap();
        let second = sealed(directory.path(), "b", &noise(2, bytes), 1);
        let error = tier2.upload(&second, &key).await.unwrap_err();
        assert_eq!(error.kind, Kind::Conflict, "{error}");
        let kept = read(tier2.download(&key).await.unwrap()).await;
        assert_eq!(kept, std::fs::read(&first.path).unwrap());
    }
}

#[tokio::test]
async fn an_object_that_is_not_zstd_is_a_conflict_not_damage_of_ours() {
    let s3 = S3::start().await;
    let (tier2, directory) = (open(&s3), tempfile::tempdir().unwrap());
    let object = s3.object(&format!("prefix/{KEY}"));
    std::fs::create_dir_all(object.parent().unwrap()).unwrap();
    std::fs::write(&object, b"somebody else's").unwrap();
    let ours = sealed(directory.path(), "a", b"wal", 1);
    assert_eq!(tier2.upload(&ours, KEY).await.unwrap_err().kind, Kind::Conflict);
    assert_eq!(std::fs::read(&object).unwrap(), b"somebody else's");
}

#[tokio::test]
async fn a_damaged_tier1_file_is_never_uploaded() {
    let s3 = S3::start().await;
    let (tier2, directory) = (open(&s3), tempfile::tempdir().unwrap());
    let mut good = sealed(directory.path(), "a", &noise(1, 100_000), 1);
    let bytes = std::fs::read(&good.path).unwrap();
    let mut flipped = bytes.clone();
    flipped[50_000] ^= 1;
    for (name, content) in [("cut", &bytes[..90_000]), ("empty", &[][..]), ("bit", &flipped)] {
        let path = directory.path().join(name);
        std::fs::write(&path, content).unwrap();
        let error = tier2.upload(&source(path), KEY).await.unwrap_err();
        assert_eq!(error.kind, Kind::Corrupt, "{name}: {error}");
    }
    good.plaintext_bytes = Some(100_001);
    assert_eq!(tier2.upload(&good, KEY).await.unwrap_err().kind, Kind::Corrupt);
    let gone = source(directory.path().join("gone"));
    assert_eq!(tier2.upload(&gone, KEY).await.unwrap_err().kind, Kind::NotFound);
    assert_eq!(tier2.size_of(KEY).await.unwrap(), None);
}

#[tokio::test]
async fn a_missing_object_is_definitive_only_where_the_bucket_exists() {
    let s3 = S3::start().await;
    let tier2 = open(&s3);
    assert_eq!(tier2.download(KEY).await.unwrap_err().kind, Kind::NotFound);
    let mut elsewhere = config(&s3);
    elsewhere.url = "s3://no-such-bucket/prefix".into();
    let tier2 = Tier2::open(&elsewhere).unwrap();
    let error = tier2.download(KEY).await.unwrap_err();
    assert_ne!(error.kind, Kind::NotFound, "{error}");
    assert!(tier2.size_of(KEY).await.is_err());
    assert!(tier2.probe().await.is_err());
}

/// A proxy or a wrong route answers 404 to everything, without NoSuchKey.
#[tokio::test]
async fn a_proxys_404_is_not_a_missing_object() {
    let s3 = S3::start().await;
    s3.on_request(|_| Some(s3::Fault::Status(404, "Nope")));
    let error = open(&s3).download(KEY).await.unwrap_err();
    assert_ne!(error.kind, Kind::NotFound, "{error}");
}

#[tokio::test]
async fn an_unmounted_directory_is_not_a_missing_object() {
    let parent = tempfile::tempdir().unwrap();
    let directory = parent.path().join("mount");
    std::fs::create_dir(&directory).unwrap();
    let url = Url::from_directory_path(&directory).unwrap();
    let tier2 = Tier2::open(&Tier2Config::new(url)).unwrap();
    assert_eq!(tier2.download(KEY).await.unwrap_err().kind, Kind::NotFound);
    std::fs::remove_dir(&directory).unwrap();
    assert_eq!(tier2.download(KEY).await.unwrap_err().kind, Kind::Transient);
    assert!(tier2.list_wal(&"pg-1".parse().unwrap()).await.is_err());
}

#[tokio::test]
async fn a_wrong_secret_is_denied_with_a_hint_and_without_the_secret() {
    let s3 = S3::start().await;
    let mut wrong = config(&s3);
    wrong.secret_access_key = Some(Secret::new("hush-hush"));
    let error = Tier2::open(&wrong).unwrap().probe().await.unwrap_err();
    assert_eq!(error.kind, Kind::Denied, "{error}");
    assert!(error.hint.is_some());
    assert!(!format!("{error} {error:?}").contains("hush"));
}

#[tokio::test]
async fn many_uploads_share_a_small_memory_budget() {
    let s3 = S3::start().await;
    let mut small = config(&s3);
    small.upload_memory = klio_pg::ByteSize::mib(8);
    small.request_timeout_seconds = 30;
    let (tier2, directory) = (Tier2::open(&small).unwrap(), tempfile::tempdir().unwrap());
    let large = sealed(directory.path(), "large", &noise(1, 17 << 20), 1);
    let medium = sealed(directory.path(), "medium", &noise(2, 5 << 20), 1);
    let keys: Vec<String> = (0..6).map(|n| format!("pg-1/wal/{n}")).collect();
    let uploads = keys.iter().enumerate().map(|(n, key)| {
        let source = if n % 2 == 0 { &large } else { &medium };
        tier2.upload(source, key)
    });
    let done = futures::future::try_join_all(uploads).await.unwrap();
    assert!(done.iter().all(|d| d.outcome == Outcome::Stored));
    assert!(s3.object(&format!("prefix/{}", keys[5])).exists());
    assert_eq!(BUCKET, "archive");
}
