//! Encryption at rest, end to end: nothing readable on disk or in the bucket, keys that are wrong, missing or rotated,
//! and the same bytes given back whatever was switched meanwhile (P2, P10).

use klio_pg::{Lsn, SegmentName};
use klio_storage::crypt::{Keys, recipients_of};
use klio_tests::{
    install_crypto,
    postgres::{
        Postgres,
        install::{self, MAJORS},
    },
    programs,
    proof::{Restorer, Source},
    s3::S3,
    scratch::Scratch,
    site::{PATIENCE, Site},
    wait::eventually,
};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::SystemTime,
};

/// Exit status of klio-server when the key is missing or wrong.
const NO_KEY: Option<i32> = Some(3);
const MARKER: &str = "klio-plaintext-marker-0123456789";

async fn postgres() -> Postgres {
    Postgres::builder().major(MAJORS[0]).segment_mib(1).set("wal_keep_size", "1GB").start().await
}

/// Puts a recognisable text into the WAL, in records so small that nothing compresses them.
async fn write_marker(pg: &Postgres) {
    let message = format!("SELECT pg_logical_emit_message(false, 'klio', '{MARKER}')");
    for _ in 0..20 {
        pg.execute(&message).await;
    }
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        match entry.path() {
            path if path.is_dir() => found.extend(files(&path)),
            path => found.push(path),
        }
    }
    found
}

fn with_marker(directory: &Path) -> Vec<PathBuf> {
    let holds = |path: &PathBuf| {
        let content = fs::read(path).unwrap_or_default();
        content.windows(MARKER.len()).any(|window| window == MARKER.as_bytes())
    };
    files(directory).into_iter().filter(holds).collect()
}

/// What lies below a directory, and since when.
fn state(directory: &Path) -> BTreeMap<PathBuf, (u64, SystemTime)> {
    let of = |path: PathBuf| {
        let metadata = fs::metadata(&path).expect("nothing changes meanwhile");
        (path, (metadata.len(), metadata.modified().expect("a time")))
    };
    files(directory).into_iter().map(of).collect()
}

/// Streams some segments and waits until they are archived; gives where the next ones begin.
async fn fill(site: &Site, pg: &Postgres, megabytes: u64) -> Lsn {
    let stream = site.stream(pg);
    write_marker(pg).await;
    pg.write_wal(megabytes << 20).await;
    let end = pg.switch_wal().await;
    write_marker(pg).await;
    let end = end.segment_start(pg.segment_size().await);
    site.wait_archived(end).await;
    site.wait_flushed(pg.flush_lsn().await).await;
    drop(stream);
    end
}

async fn first_segment(site: &Site) -> SegmentName {
    let names = || {
        let held = fs::read_dir(site.wal_dir(1)).ok()?;
        held.filter_map(|e| e.ok()?.file_name().to_str()?.get(..24)?.parse().ok()).min()
    };
    eventually("a segment on tier 1", PATIENCE, || async { names() }).await
}

/// Every whole segment from `first` up to `end`, through wal-fetch.
async fn compare(site: &Site, pg: &Postgres, first: SegmentName, end: Lsn) -> usize {
    let size = pg.segment_size().await;
    let (mut name, mut compared) = (first, 0);
    while name.start_lsn(size).is_some_and(|start| start < end) {
        let original = fs::read(pg.pg_wal().join(name.to_string())).expect("pg_wal keeps it");
        let (code, fetched) = site.fetch(&name.to_string()).await;
        assert!(code == Some(0) && fetched == original, "{name} differs, exit {code:?}");
        compared += 1;
        name = name.next(size).expect("a next segment");
    }
    compared
}

fn sealed(site: &Site, name: SegmentName) -> PathBuf {
    site.wal_dir(1).join(format!("{name}.zst.age"))
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_postgresql_wrote_is_readable_on_disk_or_in_the_bucket() {
    install_crypto();
    let (s3, pg) = (S3::new(), postgres().await);
    let mut site = Site::new().await.tier2(&s3);
    site.start().await;
    let stream = site.stream(&pg);
    let first = first_segment(&site).await;
    for round in 0..3 {
        write_marker(&pg).await;
        pg.write_wal(2 << 20).await;
        // In the middle of it.
        site.kill9();
        write_marker(&pg).await;
        site.start().await;
        site.wait_flushed(pg.flush_lsn().await).await;
        assert_eq!(with_marker(&site.dir()), Vec::<PathBuf>::new(), "round {round}");
    }
    let end = pg.switch_wal().await.segment_start(pg.segment_size().await);
    pg.write_wal(1).await;
    site.wait_archived(end).await;
    assert!(compare(&site, &pg, first, end).await >= 4);
    assert_eq!(with_marker(&site.dir()), Vec::<PathBuf>::new());
    assert_eq!(with_marker(&s3.bucket_dir()), Vec::<PathBuf>::new());
    for key in s3.keys("klio/main/wal/") {
        assert!(key.ends_with(".age"), "{key}");
    }
    drop(stream);
    site.stop().await;
}

/// The control of the test above: without encryption the same search finds it.
#[tokio::test(flavor = "multi_thread")]
async fn without_encryption_the_marker_is_found() {
    install_crypto();
    let (s3, pg) = (S3::new(), postgres().await);
    let mut site = Site::unencrypted().await.tier2(&s3);
    site.start().await;
    let _stream = site.stream(&pg);
    eventually("the marker on tier 1", PATIENCE, || async {
        write_marker(&pg).await;
        !with_marker(&site.tier1()).is_empty()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_without_the_right_key_is_refused_and_touches_nothing() {
    install_crypto();
    let (s3, pg) = (S3::new(), postgres().await);
    let mut site = Site::new().await.tier2(&s3);
    site.start().await;
    fill(&site, &pg, 2).await;
    site.stop().await;
    let before = state(&site.tier1());
    let identity = site.identity().expect("init made one");
    let good = fs::read_to_string(&identity).expect("readable");
    let recipient = good.lines().find_map(|l| l.strip_prefix("# public key: ")).expect("named");
    // Another one.
    let made = site.klio_server(&["keygen"]).await;
    assert_eq!(made.code, Some(0), "{}", made.stderr);
    fs::write(&identity, &made.stdout).expect("write");
    let refused = site.server_tool(&["run"]).await;
    let said = format!("{}{}", refused.stdout, refused.stderr);
    assert_eq!(refused.code, NO_KEY, "{said}");
    assert!(said.contains("open.key.age") && said.contains(recipient), "{said}");
    assert!(!said.contains("AGE-SECRET-KEY"), "{said}");
    // None.
    fs::remove_file(&identity).expect("remove");
    let refused = site.server_tool(&["run"]).await;
    assert_eq!(refused.code, NO_KEY, "{}", refused.stderr);
    assert!(refused.stderr.contains("keygen"), "{}", refused.stderr);
    // Not even asked for.
    let config = site.dir().join("klio-server.toml");
    let text = fs::read_to_string(&config).expect("readable");
    let without = |off: &str| text.replace("identity_file = \"identity.txt\"", off);
    fs::write(&config, without("")).expect("write");
    let refused = site.server_tool(&["run"]).await;
    assert_eq!(refused.code, NO_KEY, "{}", refused.stderr);
    assert!(refused.stderr.contains("identity_file"), "{}", refused.stderr);
    // Switched off with encrypted WAL there and nothing that opens it.
    fs::write(&config, without("off = true")).expect("write");
    let refused = site.server_tool(&["run"]).await;
    assert_eq!(refused.code, NO_KEY, "{}", refused.stderr);
    assert_eq!(state(&site.tier1()), before, "touched");
    // And with the right one all is well.
    fs::write(&config, text).expect("write");
    fs::write(&identity, good).expect("write");
    site.start().await;
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_rotation_old_and_new_wal_is_given_back() {
    install_crypto();
    let (s3, pg) = (S3::new(), postgres().await);
    let mut site = Site::new().await.tier2(&s3);
    site.start().await;
    let stream = site.stream(&pg);
    let first = first_segment(&site).await;
    drop(stream);
    fill(&site, &pg, 2).await;
    let refused = site.server_tool(&["key", "rotate"]).await;
    assert_eq!(refused.code, Some(1), "the server runs: {}", refused.stderr);
    site.kill9();
    let identity = site.identity().expect("init made one");
    let old = fs::read_to_string(&identity).expect("readable");
    let rotated = eventually("the lock of the killed server to be free", PATIENCE, || async {
        let rotated = site.server_tool(&["key", "rotate"]).await;
        (rotated.code == Some(0)).then_some(rotated.stdout)
    })
    .await;
    assert!(rotated.contains("still need the identity"), "{rotated}");
    let both = fs::read_to_string(&identity).expect("readable");
    let new = both.strip_suffix(&old).expect("the old one is kept").to_owned();
    site.start().await;
    let end = fill(&site, &pg, 2).await;
    assert!(compare(&site, &pg, first, end).await >= 4);
    // From the bucket too: what is gone from tier 1 is asked for there.
    fs::remove_file(sealed(&site, first)).expect("it was sealed");
    let size = pg.segment_size().await;
    let second = first.next(size).and_then(|s| s.start_lsn(size)).expect("a second one");
    assert_eq!(compare(&site, &pg, first, second).await, 1);
    site.stop().await;
    // The old identity is needed until WAL is written again.
    fs::write(&identity, &new).expect("write");
    let refused = site.server_tool(&["run"]).await;
    assert_eq!(refused.code, NO_KEY, "{}", refused.stderr);
    fs::write(&identity, &both).expect("write");
    let shown = site.server_tool(&["key", "show", "--tier2"]).await;
    assert!(shown.stdout.contains("tier 2: "), "{}{}", shown.stdout, shown.stderr);
    let rewrapped = site.server_tool(&["key", "rewrap", "--rewrap-wal"]).await;
    assert_eq!(rewrapped.code, Some(0), "{}", rewrapped.stderr);
    let nothing = "nothing on tier 1 needs an older identity";
    assert!(rewrapped.stdout.contains(nothing), "{}", rewrapped.stdout);
    fs::write(&identity, &new).expect("write");
    site.start().await;
    let second = SegmentName::containing(first.timeline(), second, size);
    assert!(compare(&site, &pg, second, end).await >= 3);
    // What was written again is still known to be archived.
    let status = site.status().await.expect("a status");
    assert_eq!(status["unarchived_files"].as_u64().unwrap_or(0), 0, "{status}");
    site.stop().await;
}

/// The recipients of every age file below a directory.
fn recipients_below(directory: &Path) -> Vec<(PathBuf, Vec<String>)> {
    let encrypted =
        files(directory).into_iter().filter(|f| f.extension().is_some_and(|e| e == "age"));
    let read = |file: PathBuf| {
        let bytes = fs::read(&file).expect("readable");
        let to = recipients_of(&bytes).unwrap_or_else(|| panic!("{}: for whom?", file.display()));
        (file, to)
    };
    encrypted.map(read).collect()
}

/// P5, P10: after a rotation and a rewrap of both tiers, all there is restores without the old identity.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_rewrap_of_both_tiers_the_old_identity_may_be_thrown_away() {
    install_crypto();
    let (s3, pg) = (S3::new(), Postgres::builder().start().await);
    let mut site = Site::new().await.tier2(&s3);
    site.start().await;
    let stream = site.stream(&pg);
    pg.execute("create table t as select generate_series(1, 1000) g").await;
    let outcome = site.klio(Some(&pg), &["backup"]).await;
    assert_eq!(outcome.code, Some(0), "{}{}", outcome.stdout, outcome.stderr);
    pg.execute("insert into t select generate_series(1001, 2000)").await;
    let end = pg.switch_wal().await.segment_start(pg.segment_size().await);
    site.wait_archived(end).await;
    let bucket = s3.bucket_dir().join("klio/main");
    eventually("the backup in tier 2", PATIENCE, || async {
        fs::read_dir(bucket.join("backups")).is_ok_and(|mut found| found.next().is_some())
    })
    .await;
    drop(stream);
    site.stop().await;

    let identity = site.identity().expect("init made one");
    let old = fs::read_to_string(&identity).expect("readable");
    let [old_name, new_name] = {
        let rotated = site.server_tool(&["key", "rotate"]).await;
        assert_eq!(rotated.code, Some(0), "{}", rotated.stderr);
        assert!(
            rotated.stdout.contains("WAL in tier 2 still needs the identity"),
            "{}",
            rotated.stdout
        );
        let both = fs::read_to_string(&identity).expect("readable");
        let own = Keys::from_text(&both, &[]).expect("identities").own();
        [own[1].clone(), own[0].clone()]
    };
    let secret = bucket.join("repository.json.age");
    let to = |file: &Path| recipients_of(&fs::read(file).expect("readable")).expect("named");
    assert_eq!(
        to(&secret),
        std::slice::from_ref(&new_name),
        "the secret is wrapped again without asking"
    );
    let before = recipients_below(&bucket);
    assert!(before.iter().any(|(_, to)| to.contains(&old_name)), "{before:?}");

    let rewrapped = site.server_tool(&["key", "rewrap", "--rewrap-wal"]).await;
    assert_eq!(rewrapped.code, Some(0), "{}", rewrapped.stderr);
    for part in ["nothing on tier 1 needs an older", "nothing in tier 2 needs an older"] {
        assert!(rewrapped.stdout.contains(part), "{part}: {}", rewrapped.stdout);
    }
    for (file, to) in [recipients_below(&bucket), recipients_below(&site.tier1())].concat() {
        assert_eq!(to, std::slice::from_ref(&new_name), "{}", file.display());
    }
    let again = site.server_tool(&["key", "rewrap", "--rewrap-wal"]).await;
    assert!(again.stdout.contains("re-encrypted 0 WAL files in tier 2"), "{}", again.stdout);

    let both = fs::read_to_string(&identity).expect("readable");
    fs::write(&identity, both.strip_suffix(&old).expect("the old one is last")).expect("written");
    site.start().await;
    site.wait_archived(end).await;
    let status = site.status().await.expect("a status");
    assert_eq!(status["unarchived_files"].as_u64().unwrap_or(0), 0, "{status}");
    for source in [Source::Server, Source::Bucket] {
        let scratch = Scratch::new("rewrapped");
        install::give(scratch.path());
        let mut restored = Postgres::empty(install::DEBIAN_MAJOR);
        let to = restored.data_dir().display().to_string();
        let args = ["restore", "--latest", "--target-action", "promote", "--to", &to];
        let restorer = Restorer::new(&site, &s3, source, &scratch);
        let outcome = programs::run(restorer.command(&args.map(str::to_owned))).await;
        assert_eq!(outcome.code, Some(0), "{source:?}: {}{}", outcome.stdout, outcome.stderr);
        restored.adopt();
        restored.start().await;
        restored.wait_true("select not pg_is_in_recovery()").await;
        assert_eq!(restored.value("select count(*) from t").await, "2000", "{source:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn switched_on_and_off_again_every_segment_is_given_back() {
    install_crypto();
    let (s3, pg) = (S3::new(), postgres().await);
    let mut site = Site::unencrypted().await.tier2(&s3);
    site.start().await;
    let stream = site.stream(&pg);
    let first = first_segment(&site).await;
    drop(stream);
    fill(&site, &pg, 2).await;
    site.kill9();
    let identity = site.scratch("identity");
    let made = site.klio_server(&["keygen", "--out", &identity.display().to_string()]).await;
    assert_eq!(made.code, Some(0), "{}", made.stderr);
    site.set("KLIO_ENCRYPTION__IDENTITY_FILE", &identity.display().to_string());
    site.set("KLIO_ENCRYPTION__OFF", "false");
    site.start().await;
    let end = fill(&site, &pg, 2).await;
    assert!(compare(&site, &pg, first, end).await >= 4);
    site.kill9();
    site.unset("KLIO_ENCRYPTION__OFF");
    site.set("KLIO_ENCRYPTION__OFF", "true");
    site.start().await;
    let end = fill(&site, &pg, 2).await;
    assert!(compare(&site, &pg, first, end).await >= 6);
    let keys = s3.keys("klio/main/wal/");
    assert!(keys.iter().any(|k| k.ends_with(".zst")), "{keys:?}");
    assert!(keys.iter().any(|k| k.ends_with(".zst.age")), "{keys:?}");
    site.stop().await;
}

/// P10: what is still being received, without Klio.
#[tokio::test(flavor = "multi_thread")]
async fn an_open_journal_is_read_without_klio() {
    install_crypto();
    let pg = postgres().await;
    let mut site = Site::new().await;
    site.start().await;
    let stream = site.stream(&pg);
    let first = first_segment(&site).await;
    // Small frames and compressed ones.
    write_marker(&pg).await;
    pg.write_wal(300 << 10).await;
    write_marker(&pg).await;
    site.wait_flushed(pg.flush_lsn().await).await;
    drop(stream);
    site.stop().await;
    let open = fs::read_dir(site.wal_dir(1)).expect("a timeline").flatten().map(|e| e.path());
    let open = open.filter(|path| path.extension().is_some_and(|e| e == "open"));
    let journal = open.max().unwrap_or_else(|| panic!("expected a journal after {first}"));
    let script = klio_tests::env::repository().join("deploy/tools/open-journal.py");
    let output = std::process::Command::new("sh")
        .args(["-c", "age -d -i \"$1\" \"$2\" | \"$3\" \"$4\"", "read"])
        .arg(site.identity().expect("init made one"))
        .arg(site.tier1().join("main/open.key.age"))
        .args([&script, &journal])
        .output()
        .expect("run the script");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let name = journal.file_stem().expect("a name");
    let original = fs::read(pg.pg_wal().join(name)).expect("pg_wal has it");
    assert!(output.stdout.len() > 1000, "{} bytes: {errors}", output.stdout.len());
    assert!(original.starts_with(&output.stdout), "{errors}");
}

/// A bit flipped in a sealed file: tier 2 answers, or nobody does (P7).
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_sealed_file_is_never_given_back() {
    install_crypto();
    let pg = postgres().await;
    let mut site = Site::new().await;
    site.start().await;
    let stream = site.stream(&pg);
    let first = first_segment(&site).await;
    pg.write_wal(1 << 20).await;
    pg.switch_wal().await;
    eventually("the first segment to be sealed", PATIENCE, || async {
        sealed(&site, first).exists()
    })
    .await;
    drop(stream);
    let good = fs::read(sealed(&site, first)).expect("sealed");
    for at in [10, 300, good.len() / 2, good.len() - 1] {
        let mut bad = good.clone();
        bad[at] ^= 4;
        fs::write(sealed(&site, first), &bad).expect("write");
        let (code, fetched) = site.fetch(&first.to_string()).await;
        assert!(code.is_some_and(|code| code > 125), "byte {at}: exit {code:?}");
        assert!(fetched.is_empty(), "byte {at}");
    }
    fs::write(sealed(&site, first), &good).expect("write");
    assert_eq!(site.fetch(&first.to_string()).await.0, Some(0));
    site.stop().await;
}
