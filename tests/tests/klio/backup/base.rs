//! The base-backup service on the wire: what it promises to honest clients, and what it refuses others.

use klio_pg::Lsn;
use klio_proto::{
    Code,
    v1::{self, FileKind, reserve_request::Purpose},
};
use klio_storage::{
    layout::{BaseFile, BaseKind},
    tier2::Sha256Sum,
};
use klio_tests::{
    base_client::{Base, make, name_of, open_request, pack, real_pack, segment_size},
    client::{self, SYSTEM},
    install_crypto,
    mount::SmallDisk,
    s3::{Fault, Rule, S3},
    site::{PATIENCE, Site},
    wait::eventually,
};
use std::{path::PathBuf, time::Duration};
use tonic::{Status, transport::Channel};

const START: Lsn = Lsn::new(0x0100_0000);

async fn connect(site: &Site) -> (Base, Channel) {
    let channel = client::connect(site, &site.bundle()).await.expect("connect");
    (Base::new(&channel, "main"), channel)
}

async fn started(s3: Option<&S3>) -> (Site, Base, Channel) {
    install_crypto();
    let mut site = Site::new().await;
    if let Some(s3) = s3 {
        site.set_tier2(s3);
    }
    site.start().await;
    let (base, channel) = connect(&site).await;
    (site, base, channel)
}

#[track_caller]
fn expect<T: std::fmt::Debug>(result: Result<T, Status>, code: Code, words: &[&str]) {
    let status = result.expect_err("refused");
    assert_eq!(Code::of(&status), code, "{status:?}");
    for word in words {
        assert!(status.message().contains(word), "{word:?} is missing in {:?}", status.message());
    }
}

/// Every file below the cluster's `base` directory.
fn files(site: &Site) -> Vec<PathBuf> {
    fn walk(directory: &std::path::Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
            match entry.path() {
                path if path.is_dir() => walk(&path, found),
                path => found.push(path),
            }
        }
    }
    let mut found = Vec::new();
    walk(&site.tier1().join("main/base"), &mut found);
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn files_are_put_once_listed_and_given_back_in_ranges() {
    let (_site, base, _) = started(None).await;
    let secret = base.open().await.expect("a repository");
    let again = base.open().await.expect("the same");
    assert_eq!(secret.password, again.password);
    let plain: Vec<u8> = (0..4_999_895_u32).map(|n| (n * 7 / 5) as u8).collect();
    // With nonces, tags and the list of what is in it.
    let (file, bytes) = real_pack(&secret, &plain);
    assert_eq!(bytes.len(), 5_000_000, "for the ranges below");
    let _lease = base.reserve_backup("mine").await;
    assert!(!base.put(file, &bytes).await.expect("stored"));
    assert!(base.put(file, &bytes).await.expect("there already"));
    assert_eq!(
        base.list(FileKind::Data).await.expect("a list"),
        [(file.id.to_string(), 5_000_000)]
    );
    assert_eq!(base.list(FileKind::Config).await.expect("a list").len(), 1);
    assert_eq!(base.get(file, 0, 0).await.expect("all"), bytes);
    assert_eq!(base.get(file, 4_999_990, 0).await.expect("the end"), bytes[4_999_990..]);
    assert_eq!(
        base.get(file, 1_000_001, 2_000_003).await.expect("a range"),
        bytes[1_000_001..3_000_004]
    );
    expect(base.get(file, 4_999_999, 2).await, Code::Corrupt, &[]);
    let mixed = base.get_ranges(file, &[(3_000_000, 1_500_000), (7, 1), (0, 3)]).await;
    let expected = [&bytes[3_000_000..4_500_000], &bytes[7..8], &bytes[0..3]].concat();
    assert_eq!(mixed.expect("ranges"), expected);
    expect(base.get_ranges(file, &[(7, 1), (4_999_999, 2)]).await, Code::Corrupt, &[]);
    expect(base.get_ranges(file, &[(7, 1), (9, 0)]).await, Code::Invalid, &["range"]);
    expect(base.get(pack(b"never"), 0, 0).await, Code::NotFound, &[]);
}

#[tokio::test(flavor = "multi_thread")]
async fn lies_about_a_file_leave_nothing() {
    let (site, base, _) = started(None).await;
    expect(base.put(pack(b"early"), b"early").await, Code::Unavailable, &["reservation"]);
    let lease = base.reserve_backup("mine").await;
    expect(base.put(pack(b"early"), b"early").await, Code::Invalid, &["opened first"]);
    expect(base.open_as(0).await, Code::NotFound, &["no repository"]);
    let secret = base.open().await.expect("a repository");
    let before = files(&site);
    let (good, right) = real_pack(&secret, b"the right bytes");
    let (size, other) = (right.len(), vec![b'-'; right.len()]);
    let size = size.to_string();
    expect(base.put(good, &other).await, Code::Invalid, &["SHA-256"]);
    expect(base.put_as(good, 999, &right).await, Code::Invalid, &["999", &size]);
    expect(base.put_as(good, 7, &right).await, Code::Invalid, &["7 bytes"]);
    expect(base.put_as(good, 0, b"").await, Code::Invalid, &["file size"]);
    expect(base.put_as(good, 5 << 30, b"x").await, Code::Invalid, &["file size"]);
    // P13: bytes with the right name that are no pack, no index and no snapshot.
    for kind in [BaseKind::Data, BaseKind::Index, BaseKind::Snapshot] {
        let file = BaseFile { kind, id: Sha256Sum::of(b"garbage of any kind") };
        expect(base.put(file, b"garbage of any kind").await, Code::Invalid, &["store"]);
    }
    // P8: config and keys are the server's own.
    expect(base.put(BaseFile::CONFIG, b"{}").await, Code::Forbidden, &["config"]);
    let key = BaseFile { kind: BaseKind::Key, id: Sha256Sum::of(b"mine") };
    expect(base.put(key, b"mine").await, Code::Forbidden, &["keys"]);
    assert_eq!(files(&site), before);
    // And nothing can put other bytes over what is there.
    base.put(good, &right).await.expect("stored");
    expect(base.put(good, &other).await, Code::Invalid, &["SHA-256"]);
    assert_eq!(base.get(good, 0, 0).await.expect("still"), right);
    // Only for as long as the reservation lives.
    drop(lease);
    let (late, bytes) = real_pack(&secret, b"late");
    eventually("the reservation to end", PATIENCE, || async {
        match base.put(late, &bytes).await {
            Err(status) if Code::of(&status) == Code::Unavailable => Ok(()),
            other => Err(other),
        }
    })
    .await;
    // A stranger's PostgreSQL.
    expect(base.open_as(SYSTEM + 1).await, Code::WrongSystem, &["7000000000000000002"]);
}

/// P8, on every method.
#[tokio::test(flavor = "multi_thread")]
async fn another_clusters_certificate_is_refused_on_every_method() {
    let (_site, own, channel) = started(None).await;
    own.open().await.expect("a repository");
    let other = Base::new(&channel, "other");
    let name = || Some(name_of(BaseFile::CONFIG));
    let cluster = || "other".to_owned();
    let mut client = other.client.clone();
    expect(other.open().await.map(drop), Code::Forbidden, &["other"]);
    expect(other.open_as(0).await.map(drop), Code::Forbidden, &["other"]);
    expect(other.put(pack(b"x"), b"x").await, Code::Forbidden, &["other"]);
    expect(other.get(BaseFile::CONFIG, 0, 0).await, Code::Forbidden, &["other"]);
    let get = v1::GetFileRequest {
        cluster: "../main".into(),
        name: name(),
        ..v1::GetFileRequest::default()
    };
    expect(client.get_file(get).await.map(drop), Code::Invalid, &["../main"]);
    expect(other.list(FileKind::Data).await, Code::Forbidden, &["other"]);
    for purpose in [Purpose::Backup, Purpose::Restore] {
        expect(other.reserve(purpose, "").await.map(drop), Code::Forbidden, &["other"]);
    }
    let record = v1::CommitBackupRequest {
        cluster: cluster(),
        record: "{}".into(),
        writer_id: String::new(),
    };
    expect(client.commit_backup(record).await.map(drop), Code::Forbidden, &["other"]);
    expect(other.backups().await.map(drop), Code::Forbidden, &["other"]);
    expect(other.holdings().await.map(drop), Code::Forbidden, &["other"]);
    let verify = v1::VerifyRequest { cluster: cluster(), ..v1::VerifyRequest::default() };
    expect(client.verify(verify).await.map(drop), Code::Forbidden, &["other"]);
    let maintain = v1::MaintainRequest { cluster: cluster() };
    expect(client.maintain(maintain).await.map(drop), Code::Forbidden, &["other"]);
    let plan = v1::PlanRetentionRequest { cluster: cluster() };
    expect(client.plan_retention(plan).await.map(drop), Code::Forbidden, &["other"]);
    let drill = v1::RecordDrillRequest { cluster: cluster(), outcome: "{}".into() };
    expect(client.record_drill(drill).await.map(drop), Code::Forbidden, &["other"]);
    let request = open_request("../main", SYSTEM);
    expect(client.open_repository(request).await.map(drop), Code::Invalid, &["../main"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_backup_at_a_time_and_its_name_ends_with_its_connection() {
    let (site, base, _) = started(None).await;
    base.open().await.expect("a repository");
    let (name, stream) = base.reserve(Purpose::Backup, "").await.expect("reserved");
    assert!(name.len() == 16 && name.ends_with('Z'), "{name}");
    let (second, _) = connect(&site).await;
    expect(second.reserve(Purpose::Backup, "").await.map(drop), Code::Busy, &[&name]);
    let (restore, _lease) = second.reserve(Purpose::Restore, "").await.expect("restores are free");
    assert_eq!(restore, "");
    expect(second.reserve(Purpose::Backup, "../x").await.map(drop), Code::Invalid, &["../x"]);
    drop(stream);
    eventually("the reservation to end", PATIENCE, || async {
        second.reserve(Purpose::Backup, "mine").await.map(drop)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_exists_only_when_everything_it_needs_is_held() {
    let (mut site, base, channel) = started(None).await;
    let (start, stop) = (START.advance(8192), START.advance(20_000));
    let made = make(&base, &site.scratch("made"), "first", start, stop).await;
    let (lost, bytes) = made.of(BaseKind::Data).remove(0);
    let lease = base.reserve_backup("first").await;
    // What the index names must be there before it, and all that a snapshot needs before that (P13).
    for kind in [BaseKind::Index, BaseKind::Snapshot] {
        let (file, bytes) = made.of(kind).remove(0);
        expect(base.put(file, &bytes).await, Code::Invalid, &[]);
    }
    drop(lease);
    let lease = made.put(&base).await;
    let pack = site.tier1().join(lost.key(&"main".parse().expect("a name")));
    std::fs::remove_file(&pack).expect("lost");
    let holdings = base.holdings().await.expect("holdings");
    assert_eq!(holdings.timelines, []);
    expect(base.commit(&made.record).await, Code::Incomplete, &["0/1002000", "0/1004E20"]);
    let stream = base.stream_wal(&channel, START, 16384).await;
    expect(base.commit(&made.record).await, Code::Incomplete, &["0/1004000", "0/1004E20"]);
    drop(stream);
    let _stream = base.stream_wal(&channel, START.advance(16384), 16384).await;
    expect(base.commit(&made.record).await, Code::Incomplete, &["first"]);
    assert_eq!(base.backups().await.expect("a list").backups, []);
    base.put(lost, &bytes).await.expect("stored");
    // A disk cut it short: it is there, and not whole.
    let whole = bytes.len() as u64;
    let cut = std::fs::OpenOptions::new().write(true).open(&pack).expect("stored on tier 1");
    cut.set_len(whole - 1).expect("cut");
    let sizes = [format!("expected {whole} bytes"), format!("found {}", whole - 1)];
    let words = [sizes[0].as_str(), sizes[1].as_str()];
    expect(base.commit(&made.record).await, Code::Incomplete, &words);
    std::fs::write(&pack, &bytes).expect("whole again");
    let mut wrong = made.record.clone();
    wrong.system_identifier = "5".into();
    expect(base.commit(&wrong).await, Code::WrongSystem, &[]);
    wrong = made.record.clone();
    wrong.stop_lsn = wrong.start_lsn;
    expect(base.commit(&wrong).await, Code::Invalid, &["stop after the start"]);
    wrong = made.record.clone();
    wrong.snapshot = "ab".repeat(32);
    expect(base.commit(&wrong).await, Code::Incomplete, &["snapshot"]);
    wrong = made.record.clone();
    wrong.name = "second".parse().expect("a name");
    expect(base.commit(&wrong).await, Code::Busy, &["first"]);
    base.commit(&made.record).await.expect("committed");
    drop(lease);
    eventually("the reservation to end", PATIENCE, || async {
        let refused = base.commit(&wrong).await.map_err(|status| Code::of(&status));
        if refused == Err(Code::Unavailable) { Ok(()) } else { Err(refused) }
    })
    .await;
    base.commit(&made.record).await.expect("idempotent");
    wrong = made.record.clone();
    wrong.size_bytes += 1;
    expect(base.commit(&wrong).await, Code::Invalid, &["another backup has that name"]);
    expect(base.reserve(Purpose::Backup, "first").await.map(drop), Code::Invalid, &["first"]);
    for _ in 0..2 {
        let (entry, record) = base.entry("first").await;
        assert!(entry.tier1 && !entry.tier2);
        assert!(record.committed_unix > 1_700_000_000.0);
        assert_eq!(base.backups().await.expect("a list").problems, [] as [String; 0]);
        let metrics = site.metrics_page().await;
        assert!(metrics.contains("klio_base_snapshots{cluster_name=\"main\""), "{metrics}");
        assert!(metrics.contains("klio_base_latest_snapshot_size_bytes"), "{metrics}");
        // True after a restart, too.
        site.stop().await;
        site.start().await;
        let (again, _) = connect(&site).await;
        assert_eq!(again.entry("first").await.1.snapshot, made.record.snapshot);
    }
    std::fs::write(site.tier1().join("main/backups/torn.json"), "{").expect("written");
    let (base, _) = connect(&site).await;
    let listed = base.backups().await.expect("a list");
    assert_eq!(listed.backups.len(), 1);
    assert!(listed.problems[0].contains("torn"), "{:?}", listed.problems);
}

/// REPO1: whatever the moment, a file is whole or absent.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_leaves_only_whole_files() {
    let (mut site, base, _) = started(None).await;
    let secret = base.open().await.expect("a repository");
    let mut promised = Vec::new();
    for round in 0..6_u64 {
        let (base, _) = connect(&site).await;
        let _lease = base.reserve_backup("mine").await;
        let mut putting = tokio::task::JoinSet::new();
        for number in 0..4_u64 {
            let (base, secret) = (base.clone(), secret.clone());
            putting.spawn(async move {
                let mut kept = Vec::new();
                for n in 0_u64.. {
                    let seed = (round << 32 | number << 16 | n).to_le_bytes();
                    let plain = Sha256Sum::of(&seed).bytes().repeat(40_000);
                    let (file, bytes) = real_pack(&secret, &plain);
                    match base.put(file, &bytes).await {
                        Ok(_) => kept.push(file),
                        Err(_) => break,
                    }
                }
                kept
            });
        }
        tokio::time::sleep(Duration::from_millis(150 + 130 * round)).await;
        site.kill9();
        while let Some(kept) = putting.join_next().await {
            promised.extend(kept.expect("no panic"));
        }
        site.start().await;
        let (base, _) = connect(&site).await;
        let listed = base.list(FileKind::Data).await.expect("a list");
        for file in &promised {
            assert!(listed.iter().any(|(id, _)| *id == file.id.to_string()), "round {round}");
        }
        for path in files(&site) {
            let name = path.file_name().expect("a name").to_string_lossy().into_owned();
            if name == "config" {
                continue;
            }
            let sum = Sha256Sum::of(&std::fs::read(&path).expect("readable")).to_string();
            assert_eq!(sum, name, "round {round}: {}", path.display());
        }
    }
    assert!(!promised.is_empty(), "no file was ever stored");
}

/// COPY1: in the bucket, a record says that all of its backup is there.
#[tokio::test(flavor = "multi_thread")]
async fn a_backup_is_archived_only_after_all_it_needs_and_survives_the_loss_of_tier_1() {
    let s3 = S3::new();
    let (mut site, base, channel) = started(Some(&s3)).await;
    let (start, stop) = (START.advance(8192), START.advance(20_000));
    let secret = base.open().await.expect("a repository");
    let made = make(&base, &site.scratch("made"), "first", start, stop).await;
    let stream = base.stream_wal(&channel, START, 3 << 20).await;
    // The bucket takes no packs: the record must wait.
    s3.faults().inject(Rule::always(Fault::SlowDown).path("base/data/"));
    made.commit(&base).await;
    eventually("the index to be in the bucket", PATIENCE, || async {
        let keys = s3.keys("klio/main/base/index");
        if keys.is_empty() { Err(s3.keys("")) } else { Ok(()) }
    })
    .await;
    let (entry, _) = base.entry("first").await;
    assert!(entry.tier1 && !entry.tier2);
    assert_eq!(s3.keys("klio/main/backups"), [] as [String; 0]);
    s3.faults().heal();
    let archived = |base: Base| async move {
        match base.entry("first").await.0 {
            entry if entry.tier2 => Ok(()),
            entry => Err(entry),
        }
    };
    eventually("the backup to be in tier 2", PATIENCE, || archived(base.clone())).await;
    for (file, bytes) in &made.files {
        let object = s3.bucket_dir().join("klio").join(format!("main/base/{}", file.relative()));
        assert_eq!(std::fs::read(object).expect("an object"), *bytes);
    }
    let keys = s3.keys("klio/main");
    for needed in
        ["cluster.json", "repository.json.age", "base/config", "base/keys/", "backups/first.json"]
    {
        assert!(keys.iter().any(|key| key.contains(needed)), "{needed} in {keys:?}");
    }
    drop(stream);
    site.wait_archived(START.advance(3 << 20)).await;

    // The queue and what it knew is lost, and so are objects: both are found by comparing.
    site.stop().await;
    std::fs::remove_dir_all(site.dir().join("data/queue")).expect("the queue");
    let pack = made.of(BaseKind::Data)[0].0;
    let object = s3.bucket_dir().join(format!("klio/main/base/{}", pack.relative()));
    std::fs::remove_file(&object).expect("an object");
    std::fs::remove_file(s3.bucket_dir().join("klio/main/repository.json.age"))
        .expect("the secret");
    site.start().await;
    eventually("what was lost to be queued again", PATIENCE, || async {
        let secret = s3.bucket_dir().join("klio/main/repository.json.age");
        if object.exists() && secret.exists() { Ok(()) } else { Err(s3.keys("klio/main/base")) }
    })
    .await;

    // Tier 1 is lost: lists, files and the secret come from tier 2.
    site.stop().await;
    std::fs::remove_dir_all(site.tier1()).expect("tier 1");
    site.start().await;
    let (base, _) = connect(&site).await;
    let (entry, record) = base.entry("first").await;
    assert!(entry.tier2 && !entry.tier1);
    assert_eq!(record.snapshot, made.record.snapshot);
    assert_eq!(base.open_as(0).await.expect("the secret").password, secret.password);
    for (file, bytes) in &made.files {
        assert_eq!(base.get(*file, 0, 0).await.expect("from tier 2"), *bytes);
        assert_eq!(base.get(*file, 3, 20).await.expect("a range"), bytes[3..23]);
    }
    let holdings = base.holdings().await.expect("holdings");
    assert_eq!(holdings.segment_size, segment_size().as_u32());
    assert_eq!(holdings.system_identifier, SYSTEM.to_string());
    assert_eq!(holdings.timelines[0].runs[0].start, START);
    assert_eq!(holdings.timelines[0].runs[0].end, START.advance(3 << 20));
    expect(base.open_as(SYSTEM + 1).await, Code::WrongSystem, &["tier 2"]);
    // P10: a writer gets the old repository, not a second one.
    assert_eq!(base.open().await.expect("the same").password, secret.password);
    assert_eq!(base.list(FileKind::Config).await.expect("a list").len(), 1);
    assert_eq!(base.list(FileKind::Key).await.expect("a list").len(), 1);
}

/// P10: without an answer from tier 2 nobody knows whether there is a repository.
#[tokio::test(flavor = "multi_thread")]
async fn no_second_repository_is_made_while_the_bucket_is_down() {
    let s3 = S3::new();
    let (site, base, _) = started(Some(&s3)).await;
    s3.faults().inject(Rule::always(Fault::SlowDown));
    expect(base.open().await.map(drop), Code::Unavailable, &["tier 2"]);
    assert!(!site.tier1().join("main/base/config").exists());
    s3.faults().heal();
    base.open().await.expect("a repository");
}

/// BASE1, P10: a crash between secret and repository is finished with the same secret; a lost secret is a loss.
#[tokio::test(flavor = "multi_thread")]
async fn a_repository_has_one_secret_for_ever() {
    let (mut site, base, _) = started(None).await;
    let secret = base.open().await.expect("a repository");
    let directory = site.tier1().join("main");
    site.stop().await;
    std::fs::remove_dir_all(directory.join("base")).expect("as if it had crashed before");
    site.start().await;
    let (base, _) = connect(&site).await;
    assert_eq!(base.open().await.expect("finished").password, secret.password);
    std::fs::remove_file(directory.join("base/config"))
        .expect("as if it had crashed in the middle");
    assert_eq!(base.open().await.expect("finished").password, secret.password);
    assert_eq!(base.list(FileKind::Key).await.expect("a list").len(), 1);
    // What is written is not the secret itself.
    let wrapped = std::fs::read(directory.join("repository.json.age")).expect("the secret");
    assert!(!String::from_utf8_lossy(&wrapped).contains(secret.password.as_str()));
    assert!(!site.log().contains(secret.password.as_str()));
    std::fs::remove_file(directory.join("repository.json.age")).expect("lost");
    expect(base.open().await.map(drop), Code::Corrupt, &["lost its secret"]);
    assert!(!directory.join("repository.json.age").exists());
    std::fs::write(directory.join("repository.json.age"), &wrapped[..wrapped.len() - 9])
        .expect("cut");
    expect(base.open().await.map(drop), Code::Corrupt, &[]);
    std::fs::write(directory.join("repository.json.age"), wrapped).expect("put back");
    assert_eq!(base.open().await.expect("found again").password, secret.password);
}

/// COPY1: without its WAL a backup cannot be restored from the bucket, so its record waits for that, too. Found by the
/// restore proof: a bucket that had the record and not the WAL.
#[tokio::test(flavor = "multi_thread")]
async fn a_record_waits_for_the_wal_of_its_backup() {
    let s3 = S3::new();
    let (site, base, channel) = started(Some(&s3)).await;
    let size = u64::from(segment_size().as_u32());
    let (start, stop) = (START.advance(8192), START.advance(size + 20_000));
    let made = make(&base, &site.scratch("made"), "first", start, stop).await;
    s3.faults().inject(Rule::always(Fault::SlowDown).path("main/wal/"));
    // Two finished segments; the backup needs both.
    let _stream = base.stream_wal(&channel, START, 2 * size as usize + 8192).await;
    made.commit(&base).await;
    eventually("all files of the backup to be in the bucket", PATIENCE, || async {
        let keys = s3.keys("klio/main/base");
        let there = |file: &BaseFile| keys.iter().any(|key| key.ends_with(&file.relative()));
        if made.files.iter().all(|(file, _)| there(file)) { Ok(()) } else { Err(keys) }
    })
    .await;
    let refused = || s3.faults().count(|seen| seen.path.contains("main/wal/"));
    let before = refused();
    eventually("more attempts to store WAL", PATIENCE, || async { refused() > before + 3 }).await;
    assert_eq!(s3.keys("klio/main/backups"), [] as [String; 0], "a record without its WAL");
    assert!(!base.entry("first").await.0.tier2);
    s3.faults().heal();
    eventually("the backup to be in tier 2", PATIENCE, || async {
        base.entry("first").await.0.tier2
    })
    .await;
    assert!(s3.keys("klio/main/wal").len() >= 2, "{:?}", s3.keys("klio/main/wal"));
}

/// BASE4: tier 2 has what tier 1 no longer keeps.
#[tokio::test(flavor = "multi_thread")]
async fn what_tier_1_no_longer_keeps_is_read_from_tier_2() {
    let s3 = S3::new();
    let (mut site, base, channel) = started(Some(&s3)).await;
    let (start, stop) = (START.advance(8192), START.advance(20_000));
    let made = make(&base, &site.scratch("made"), "first", start, stop).await;
    let _stream = base.stream_wal(&channel, START, 32768).await;
    made.commit(&base).await;
    eventually("the backup to be in tier 2", PATIENCE, || async {
        base.entry("first").await.0.tier2
    })
    .await;
    let (file, bytes) = made.of(BaseKind::Data).remove(0);
    std::fs::remove_file(site.tier1().join("main/base").join(file.relative())).expect("evicted");
    let (entry, _) = base.entry("first").await;
    assert!(entry.tier2 && !entry.tier1);
    assert_eq!(base.get(file, 0, 0).await.expect("from tier 2"), bytes);
    let ranges: Vec<_> = (0..20).map(|n| (bytes.len() as u64 - 4 - 4 * n, 3)).collect();
    let expected = ranges.iter().flat_map(|&(at, _)| &bytes[at as usize..][..3]).copied();
    let found = base.get_ranges(file, &ranges).await.expect("ranges from tier 2");
    assert_eq!(found, expected.collect::<Vec<_>>());
    let far = (bytes.len() as u64, 1);
    expect(base.get_ranges(file, &[(0, 3), far]).await, Code::Corrupt, &[]);
    let listed = base.list(FileKind::Data).await.expect("a list");
    assert!(listed.contains(&(file.id.to_string(), bytes.len() as u64)));
    // The bucket does not answer: that is no absence (P7), and tier 1's list is still given.
    s3.faults().inject(Rule::always(Fault::SlowDown));
    expect(base.get(file, 0, 0).await, Code::Unavailable, &["tier 2"]);
    site.stop().await;
    site.start().await;
    let (base, _) = connect(&site).await;
    expect(base.get(file, 0, 0).await, Code::Unavailable, &["tier 2"]);
    assert_eq!(base.list(FileKind::Snapshot).await.expect("tier 1's").len(), 1);
    assert!(!base.backups().await.expect("tier 1's").problems.is_empty());
    let holdings = base.holdings().await.expect("tier 1's");
    assert_eq!(holdings.timelines[0].runs[0].end, START.advance(32768));
    // A backup goes on without the bucket (P4); only a first repository needs its word.
    base.open().await.expect("the repository of tier 1");
    let lease = base.reserve_backup("second").await;
    let made = make(&base, &site.scratch("second"), "second", start, stop).await;
    // A chunk of it may be in the pack that only tier 2 has: then it would have to wait.
    base.put(file, &bytes).await.expect("back on tier 1");
    drop(lease);
    made.commit(&base).await;
    s3.faults().heal();
}

/// WAL comes first on a disk that runs full.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_base_backups_and_still_takes_wal() {
    install_crypto();
    let mut site = Site::new().await;
    let disk = SmallDisk::mount(&site.tier1(), 40);
    site.start().await;
    let (base, channel) = connect(&site).await;
    let secret = base.open().await.expect("a repository");
    let _lease = base.reserve_backup("mine").await;
    let bytes = |seed: u8| real_pack(&secret, &Sha256Sum::of(&[seed]).bytes().repeat(250_000));
    let mut stored = 0;
    let refused = loop {
        let (file, bytes) = bytes(stored);
        match base.put(file, &bytes).await {
            Ok(_) => stored += 1,
            Err(status) => break status,
        }
    };
    expect(Err::<(), _>(refused), Code::DiskFull, &["to WAL (quota.keep_free_percent)"]);
    assert!((2..5).contains(&stored), "{stored}");
    let _stream = base.stream_wal(&channel, START, 32768).await;
    // Full to the last byte while a file is on its way: it leaves nothing.
    disk.fill();
    let (file, small) = real_pack(&secret, &b"small".repeat(1000));
    expect(base.put(file, &small).await, Code::DiskFull, &[]);
    assert!(files(&site).iter().all(|path| path.extension().is_none()), "{:?}", files(&site));
    disk.relieve();
    assert!(!base.put(file, &small).await.expect("stored"));
}
