//! Exit statuses of whole commands, run in this process against a server in memory.

use super::*;
use crate::{
    fake_server::FakeServer,
    wal_source::testing::{FakeSource, compress},
};
use klio_proto::{
    Code,
    v1::{FetchHeader, FetchKind, FetchResponse},
};
use std::{path::Path, thread};

const SEGMENT: &str = "000000010000000000000003";

/// Runs `klio` as PostgreSQL would, on a thread of its own because `klio` creates its own runtime.
async fn klio(arguments: &[&str]) -> u8 {
    let all: Vec<OsString> = ["klio"].iter().chain(arguments).map(Into::into).collect();
    let (done, result) = tokio::sync::oneshot::channel();
    thread::spawn(move || done.send(main(all)));
    result.await.unwrap()
}

fn configure(directory: &Path, address: &str) -> String {
    let path = directory.join("klio.toml");
    let text =
        format!("cluster = \"pg-1\"\n[server]\naddress = \"{address}\"\nunsafe_plaintext = true\n");
    std::fs::write(&path, text).unwrap();
    path.display().to_string()
}

async fn fetch(config: &str, name: &str, path: &Path) -> u8 {
    let path = path.display().to_string();
    klio(&["--config", config, "wal-fetch", name, &path, "--timeout", "1s"]).await
}

fn segment() -> (Vec<u8>, Vec<FetchResponse>) {
    let plain = FakeSource::new(0..1).plain(SEGMENT.parse().unwrap());
    let stored = compress(&plain);
    let header = FetchHeader {
        kind: FetchKind::SegmentZstd.into(),
        plain_size: 1 << 20,
        segment_size: 1 << 20,
        tier: "tier1".into(),
        before_hole: false,
    };
    let mut messages = vec![FetchResponse { header: Some(header), data: bytes::Bytes::new() }];
    let pieces = stored.chunks(500).map(bytes::Bytes::copy_from_slice);
    messages.extend(pieces.map(|data| FetchResponse { header: None, data }));
    (plain, messages)
}

#[tokio::test]
async fn wal_fetch_gives_a_segment_back() {
    let (server, directory) = (FakeServer::start().await, tempfile::tempdir().unwrap());
    let (plain, messages) = segment();
    server.change(|s| drop(s.files.insert(SEGMENT.into(), messages)));
    let config = configure(directory.path(), &server.address);
    let path = directory.path().join("RECOVERYXLOG");
    assert_eq!(fetch(&config, SEGMENT, &path).await, 0);
    assert!(std::fs::read(&path).unwrap() == plain);
}

/// P7. With WAL-G, and with plugins for CloudNativePG, a network error was taken for the end of WAL.
#[tokio::test]
async fn wal_fetch_answers_one_only_when_the_server_says_not_found() {
    let (server, directory) = (FakeServer::start().await, tempfile::tempdir().unwrap());
    let config = configure(directory.path(), &server.address);
    let path = directory.path().join("RECOVERYXLOG");
    assert_eq!(fetch(&config, SEGMENT, &path).await, 1);
    for code in Code::ALL.iter().filter(|code| **code != Code::NotFound) {
        server.change(|s| s.fetch_error = Some(*code));
        assert_eq!(fetch(&config, SEGMENT, &path).await, 200, "{code:?}");
    }
    server.change(|s| s.fetches = 0);
    server.change(|s| s.fetch_error = Some(Code::Unavailable));
    assert_eq!(fetch(&config, SEGMENT, &path).await, 200);
    assert!(server.script().fetches > 1, "tried only once");
    assert!(!path.exists());
}

/// P7.
#[tokio::test]
async fn wal_fetch_stops_recovery_when_the_answer_is_cut_off() {
    let (server, directory) = (FakeServer::start().await, tempfile::tempdir().unwrap());
    let (_, mut messages) = segment();
    messages.truncate(messages.len() - 1);
    server.change(|s| drop(s.files.insert(SEGMENT.into(), messages)));
    let config = configure(directory.path(), &server.address);
    let path = directory.path().join("RECOVERYXLOG");
    assert_eq!(fetch(&config, SEGMENT, &path).await, 200);
    let left: Vec<_> = std::fs::read_dir(directory.path()).unwrap().collect();
    assert_eq!(left.len(), 1, "only klio.toml is left: {left:?}");
}

/// P7.
#[tokio::test]
async fn every_wrong_way_to_call_it_stops_recovery() {
    let directory = tempfile::tempdir().unwrap();
    // Nobody listens on this port: the kernel chose it and it was closed again.
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", closed.local_addr().unwrap());
    drop(closed);
    let config = configure(directory.path(), &address);
    let path = directory.path().join("x").display().to_string();
    let bucket = format!("file://{}", directory.path().display());
    for arguments in [
        &["wal-fetch"][..],
        &["wal-fetch", SEGMENT],
        &["wal-fetch", SEGMENT, &path, "extra"],
        &["wal-fetch", SEGMENT, &path, "--timeout", "soon"],
        &["wal-fetch", SEGMENT, &path, "--nonsense"],
        &["wal-ftech", SEGMENT, &path],
        &["--config", "/does/not/exist", "wal-fetch", SEGMENT, &path],
        &["--config", &config, "wal-fetch", "../../etc/passwd", &path],
        &["--config", &config, "wal-fetch", SEGMENT, &path, "--timeout", "100ms"],
        &["--config", &config, "wal-fetch", SEGMENT, &path, "--from", "file:///does/not/exist"],
        &["-c", &config, "wal-fetch", SEGMENT, &path, "--from", &bucket, "--identity", "/none"],
    ] {
        assert_eq!(klio(arguments).await, 200, "{arguments:?}");
    }
    assert!(!Path::new(&path).exists());
}

/// The exception from P7: a status above 125 would end a standby, which could then be neither promoted nor started
/// while the archive is away. For a file that does not exist the status stays 1.
#[tokio::test]
async fn no_trouble_and_no_wrong_call_stops_a_standby() {
    let (server, directory) = (FakeServer::start().await, tempfile::tempdir().unwrap());
    let config = configure(directory.path(), &server.address);
    let data = directory.path().join("data");
    std::fs::create_dir_all(data.join("pg_wal")).unwrap();
    std::fs::write(data.join("recovery.signal"), "").unwrap();
    let path = data.join("pg_wal/RECOVERYXLOG");
    let text = path.display().to_string();
    let bucket = format!("file://{}", directory.path().display());
    let wrong = [
        &["wal-fetch", SEGMENT, &text, "extra"][..],
        &["wal-fetch", SEGMENT, &text, "--nonsense"],
        &["wal-ftech", SEGMENT, &text],
        &["--config", "/does/not/exist", "wal-fetch", SEGMENT, &text],
        &["--config", &config, "wal-fetch", "../../etc/passwd", &text],
        &["--config", &config, "wal-fetch", SEGMENT, &text, "--from", "file:///does/not/exist"],
        &["-c", &config, "wal-fetch", SEGMENT, &text, "--from", &bucket, "--identity", "/none"],
    ];
    for arguments in wrong {
        assert_eq!(klio(arguments).await, 200, "{arguments:?}");
    }
    std::fs::write(data.join("standby.signal"), "").unwrap();
    for arguments in wrong {
        assert_eq!(klio(arguments).await, 75, "{arguments:?}");
    }
    for code in Code::ALL.iter().filter(|code| **code != Code::NotFound) {
        server.change(|s| s.fetch_error = Some(*code));
        assert_eq!(fetch(&config, SEGMENT, &path).await, 75, "{code:?}");
    }
    server.change(|s| s.fetch_error = None);
    assert_eq!(fetch(&config, SEGMENT, &path).await, 1);
    let (plain, messages) = segment();
    server.change(|s| drop(s.files.insert(SEGMENT.into(), messages)));
    assert_eq!(fetch(&config, SEGMENT, &path).await, 0);
    assert!(std::fs::read(&path).unwrap() == plain);
}

/// A firewall that drops packets: the connection is neither accepted nor refused.
#[tokio::test]
async fn a_server_that_is_silent_holds_a_standby_for_less_than_it_waits_anyway() {
    let directory = tempfile::tempdir().unwrap();
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let config = configure(directory.path(), &format!("http://{}", silent.local_addr().unwrap()));
    let data = directory.path().join("data");
    std::fs::create_dir_all(data.join("pg_wal")).unwrap();
    std::fs::write(data.join("standby.signal"), "").unwrap();
    let path = data.join("pg_wal/RECOVERYXLOG").display().to_string();
    let begun = std::time::Instant::now();
    assert_eq!(klio(&["--config", &config, "wal-fetch", SEGMENT, &path]).await, 75);
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn help_is_not_a_failure() {
    for arguments in [
        &["help"][..],
        &["help", "exit-codes"],
        &["help", "config"],
        &["help", "stream"],
        &["--version"],
        &["--help"],
    ] {
        assert_eq!(klio(arguments).await, 0, "{arguments:?}");
    }
}

#[tokio::test]
async fn a_wrong_configuration_ends_with_4_and_a_lost_server_with_10() {
    let directory = tempfile::tempdir().unwrap();
    let config = configure(directory.path(), "http://127.0.0.1:1");
    assert_eq!(klio(&["--config", &config, "status"]).await, 10);
    std::fs::write(&config, "nonsense = true").unwrap();
    assert_eq!(klio(&["--config", &config, "status"]).await, 4);
}
