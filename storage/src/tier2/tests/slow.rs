//! Multipart uploads over a bad link: they finish, acknowledged parts are not sent again, and no unfinished
//! upload remains.

use super::{KEY, S3, config, noise, s3::Fault, sealed, source, uplink::Uplink};
use crate::{
    Kind,
    tier2::{Outcome, Source, Tier2},
};
use http::{Method, request};
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

const MIB: u64 = 1 << 20;
/// Three parts.
const BYTES: usize = 24 << 20;
/// How long a request may go without progress in these tests.
const PATIENCE: Duration = Duration::from_secs(3);

fn open_through(s3: &S3, link: &Uplink) -> Tier2 {
    let mut config = config(s3);
    config.endpoint = Some(link.endpoint.clone());
    config.request_timeout_seconds = PATIENCE.as_secs() as u32;
    config.retry_timeout_seconds = 1;
    Tier2::open(&config).unwrap()
}

/// The file has nothing to decode, because only the link is measured.
fn file(directory: &tempfile::TempDir, name: &str) -> Source {
    let path = directory.path().join(name);
    let line = noise(name.bytes().map(u64::from).sum(), 100_003);
    std::fs::write(&path, line.repeat(BYTES / line.len() + 1).split_at(BYTES).0).unwrap();
    Source { zstd: false, ..source(path) }
}

/// How often each part was sent.
fn parts_sent(s3: &S3) -> BTreeMap<u32, usize> {
    let mut sent = BTreeMap::new();
    for request in s3.requests() {
        let Some((_, rest)) = request.split_once("partNumber=") else { continue };
        let number = rest.split('&').next().unwrap().parse().unwrap();
        *sent.entry(number).or_default() += 1;
    }
    sent
}

fn uploads_begun(s3: &S3) -> usize {
    s3.requests().iter().filter(|r| r.starts_with("POST") && r.contains("?uploads")).count()
}

fn sent(times: [usize; 3]) -> BTreeMap<u32, usize> {
    (1..).zip(times).filter(|(_, times)| *times > 0).collect()
}

/// What the store has of incomplete uploads.
fn half_done(s3: &S3) -> Vec<String> {
    let bucket = s3.object("");
    let root = bucket.parent().unwrap();
    let directories =
        [bucket.as_path(), root].map(|directory| std::fs::read_dir(directory).unwrap());
    let names = directories.into_iter().flatten().flatten();
    let names = names.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with(".upload")).collect()
}

fn is_part(parts: &request::Parts, number: u32) -> bool {
    let query = parts.uri.query().unwrap_or_default();
    parts.method == Method::PUT && query.contains(&format!("partNumber={number}&"))
}

/// Before, each PUT had 60 seconds including its body, and everything sent was discarded.
#[tokio::test]
async fn a_large_file_over_a_slow_link_arrives_with_no_part_sent_twice() {
    let s3 = S3::start().await;
    let link = Uplink::new(&s3.endpoint, 4 * MIB);
    let directory = tempfile::tempdir().unwrap();
    let (source, begun) = (file(&directory, "a"), Instant::now());
    let done = open_through(&s3, &link).upload(&source, KEY).await.unwrap();
    assert_eq!(done.outcome, Outcome::Stored);
    assert!(begun.elapsed() > PATIENCE, "it took longer than nothing may move");
    assert_eq!(parts_sent(&s3), sent([1, 1, 1]));
    assert_eq!(uploads_begun(&s3), 1);
    assert_eq!(half_done(&s3), Vec::<String>::new());
    let stored = std::fs::read(s3.object(&format!("prefix/{KEY}"))).unwrap();
    assert!(stored == std::fs::read(&source.path).unwrap());
}

/// Also for a file that fits into the buffers on the path.
#[tokio::test]
async fn a_small_file_over_a_slow_link_arrives() {
    let s3 = S3::start().await;
    let link = Uplink::new(&s3.endpoint, 256 << 10);
    let directory = tempfile::tempdir().unwrap();
    let source = sealed(directory.path(), "a", &noise(1, 1 << 20), 1);
    let (tier2, begun) = (open_through(&s3, &link), Instant::now());
    assert_eq!(tier2.upload(&source, KEY).await.unwrap().outcome, Outcome::Stored);
    assert!(begun.elapsed() > PATIENCE);
    assert!(link.sent() < 2 * MIB, "sent once: {}", link.sent());
}

#[tokio::test]
async fn a_cut_in_the_middle_of_a_part_sends_only_that_part_again() {
    let s3 = S3::start().await;
    let link = Uplink::new(&s3.endpoint, 100 * MIB);
    link.cut_at(20 * MIB);
    let directory = tempfile::tempdir().unwrap();
    let tier2 = open_through(&s3, &link);
    assert_eq!(tier2.upload(&file(&directory, "a"), KEY).await.unwrap().outcome, Outcome::Stored);
    let times: Vec<usize> = parts_sent(&s3).into_values().collect();
    assert_eq!(times.iter().sum::<usize>(), 4, "{times:?}");
    assert_eq!(uploads_begun(&s3), 1);
}

#[tokio::test]
async fn a_part_that_fails_for_a_while_is_sent_again_and_no_other_is() {
    let s3 = S3::start().await;
    // Longer than the retries of one request.
    let (mut begun, outage) = (None, Duration::from_secs(2));
    s3.on_request(move |parts| {
        let fails = is_part(parts, 2) && begun.get_or_insert_with(Instant::now).elapsed() < outage;
        fails.then_some(Fault::Status(503, "SlowDown"))
    });
    let link = Uplink::new(&s3.endpoint, 100 * MIB);
    let directory = tempfile::tempdir().unwrap();
    let tier2 = open_through(&s3, &link);
    assert_eq!(tier2.upload(&file(&directory, "a"), KEY).await.unwrap().outcome, Outcome::Stored);
    let times = parts_sent(&s3);
    assert_eq!((times[&1], times[&3]), (1, 1), "{times:?}");
    assert!(times[&2] > 1, "{times:?}");
    assert_eq!(uploads_begun(&s3), 1);
}

#[tokio::test]
async fn a_link_that_stands_still_is_told_and_nothing_half_done_stays() {
    let s3 = S3::start().await;
    let link = Uplink::new(&s3.endpoint, 100 * MIB);
    link.still_at(12 * MIB);
    let (directory, tier2) = (tempfile::tempdir().unwrap(), open_through(&s3, &link));
    let (source, begun) = (file(&directory, "a"), Instant::now());
    let error = tier2.upload(&source, KEY).await.unwrap_err();
    assert_eq!(error.kind, Kind::Transient, "{error}");
    assert!(error.to_string().contains("the link stands still"), "{error}");
    assert!(error.to_string().contains("tier2.request_timeout_seconds"), "{error}");
    assert!(begun.elapsed() < PATIENCE * 8, "{:?}", begun.elapsed());
    assert!(!s3.object(&format!("prefix/{KEY}")).exists());
    // It could not be aborted at that time.
    assert_ne!(half_done(&s3), Vec::<String>::new());
    link.heal();
    tier2.abandon().await;
    assert_eq!(half_done(&s3), Vec::<String>::new());
    assert_eq!(tier2.upload(&source, KEY).await.unwrap().outcome, Outcome::Stored);
}

#[tokio::test]
async fn the_next_attempt_goes_on_where_the_last_one_ended() {
    let s3 = S3::start().await;
    let link = Uplink::new(&s3.endpoint, 100 * MIB);
    link.still_at(20 * MIB);
    let (directory, tier2) =
        (tempfile::tempdir().unwrap(), open_through(&s3, &link).keeping_parts());
    let source = file(&directory, "a");
    tier2.upload(&source, KEY).await.unwrap_err();
    let before = parts_sent(&s3);
    link.heal();
    assert_eq!(tier2.upload(&source, KEY).await.unwrap().outcome, Outcome::Stored);
    let after = parts_sent(&s3);
    assert!(
        after.values().sum::<usize>() < before.values().sum::<usize>() + 3,
        "{before:?} {after:?}"
    );
    assert_eq!(uploads_begun(&s3), 1);
    assert_eq!(half_done(&s3), Vec::<String>::new());
    let stored = std::fs::read(s3.object(&format!("prefix/{KEY}"))).unwrap();
    assert!(stored == std::fs::read(&source.path).unwrap());
}

fn fail_part(s3: &S3, number: u32) {
    s3.on_request(move |parts| {
        is_part(parts, number).then_some(Fault::Status(403, "AccessDenied"))
    });
}

#[tokio::test]
async fn kept_parts_are_for_the_same_file_only_and_are_thrown_away_at_the_end() {
    let s3 = S3::start().await;
    let (directory, tier2) = (tempfile::tempdir().unwrap(), super::open(&s3).keeping_parts());
    fail_part(&s3, 3);
    let source = file(&directory, "a");
    assert_eq!(tier2.upload(&source, KEY).await.unwrap_err().kind, Kind::Denied);
    assert_ne!(half_done(&s3), Vec::<String>::new(), "kept");
    s3.heal();
    let other = file(&directory, "b");
    assert_eq!(tier2.upload(&other, KEY).await.unwrap().outcome, Outcome::Stored);
    assert_eq!(uploads_begun(&s3), 2);
    assert_eq!(half_done(&s3), Vec::<String>::new(), "the first one was aborted");
    let stored = std::fs::read(s3.object(&format!("prefix/{KEY}"))).unwrap();
    assert!(stored == std::fs::read(&other.path).unwrap());
    fail_part(&s3, 3);
    tier2.upload(&source, "pg-1/wal/b").await.unwrap_err();
    assert_ne!(half_done(&s3), Vec::<String>::new());
    tier2.abandon().await;
    assert_eq!(half_done(&s3), Vec::<String>::new());
}

/// A lifecycle rule or a person removed the upload.
#[tokio::test]
async fn an_upload_that_the_store_forgot_begins_anew() {
    let s3 = S3::start().await;
    let (directory, tier2) = (tempfile::tempdir().unwrap(), super::open(&s3).keeping_parts());
    fail_part(&s3, 3);
    let source = file(&directory, "a");
    tier2.upload(&source, KEY).await.unwrap_err();
    let first = s3.requests().into_iter().find_map(|request| {
        request.split_once("uploadId=").map(|(_, id)| id.split('&').next().unwrap().to_owned())
    });
    let forgotten = first.unwrap();
    s3.on_request(move |parts| {
        let query = parts.uri.query().unwrap_or_default();
        query.contains(&forgotten).then_some(Fault::Status(404, "NoSuchUpload"))
    });
    assert_eq!(tier2.upload(&source, KEY).await.unwrap().outcome, Outcome::Stored);
    assert_eq!(uploads_begun(&s3), 2);
}

#[tokio::test]
async fn a_cancelled_upload_goes_on_too() {
    let s3 = S3::start().await;
    let (directory, tier2) = (tempfile::tempdir().unwrap(), super::open(&s3).keeping_parts());
    // The last part never completes.
    s3.on_request(|parts| is_part(parts, 3).then_some(Fault::Hang));
    let source = file(&directory, "a");
    {
        let upload = tier2.upload(&source, KEY);
        let third = async {
            while !parts_sent(&s3).contains_key(&3) {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            _ = upload => panic!("it cannot end"),
            () = third => {}
        }
    }
    s3.heal();
    assert_eq!(tier2.upload(&source, KEY).await.unwrap().outcome, Outcome::Stored);
    assert_eq!(uploads_begun(&s3), 1);
    assert_eq!(parts_sent(&s3)[&1], 1);
}
