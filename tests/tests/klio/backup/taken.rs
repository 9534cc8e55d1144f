//! Base backups, end to end: PostgreSQL's files -> klio backup -> klio-server, and what must not go wrong on the way.
//!
//! What a backup holds is looked at with the storage crate on tier 1; that it restores, too, is shown here without
//! `klio restore`, whose own tests are elsewhere.

use klio_proto::v1::{OpenRepositoryRequest, base_client::BaseClient};
use klio_storage::{
    catalog::BackupRecord,
    disk::RealDisk,
    repository::{LocalFiles, Reader, Repository, Secret, StoredKind},
};
use klio_tests::{
    client,
    http::Metrics,
    install_crypto,
    otlp::Collector,
    ports,
    postgres::{Postgres, Stop, install},
    process::Running,
    programs::{self, Outcome},
    s3::S3,
    site::{PATIENCE, Site},
    wait::{eventually, eventually_now},
};
use rustix::process::Signal;
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    os::unix::fs::{FileExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

/// A server, and a PostgreSQL with checksums that streams to it.
struct Setup {
    site: Site,
    pg: Postgres,
    stream: Running,
}

impl Setup {
    async fn new(major: u32) -> Self {
        install_crypto();
        let pg = Postgres::builder().major(major).initdb("-k").start().await;
        let mut site = Site::new().await;
        site.start().await;
        let stream = site.stream(&pg);
        Self { site, pg, stream }
    }

    async fn backup(&self, args: &[&str]) -> Outcome {
        backup(&self.site, &self.pg, args).await
    }

    async fn record(&self, args: &[&str]) -> BackupRecord {
        let outcome = self.backup(args).await;
        assert!(
            matches!(outcome.code, Some(0)),
            "backup: {:?}\n{}\n{}",
            outcome.code,
            outcome.stderr,
            self.site.log()
        );
        record(&outcome)
    }

    fn start_backup(&self, args: &[&str]) -> Running {
        let all: Vec<&str> = ["backup", "--json"].iter().chain(args).copied().collect();
        let command = self.site.klio_command(Some(&self.pg), &all);
        Running::spawn("klio backup", command, &self.site.scratch("backup.log"))
    }

    /// A file that takes a while: it does not compress. PostgreSQL does not look at it.
    fn ballast(&self, mebibytes: usize) {
        let mut random = fs::File::open("/dev/urandom").expect("open /dev/urandom");
        let mut bytes = vec![0; mebibytes << 20];
        std::io::Read::read_exact(&mut random, &mut bytes).expect("read /dev/urandom");
        fs::write(self.pg.data_dir().join("ballast"), bytes).expect("write ballast");
    }

    fn packs(&self) -> Vec<PathBuf> {
        let data = self.site.tier1().join("main/base/data");
        let directories = fs::read_dir(data).into_iter().flatten().flatten();
        directories
            .flat_map(|directory| fs::read_dir(directory.path()).into_iter().flatten().flatten())
            .map(|file| file.path())
            .filter(|path| path.file_name().is_some_and(|name| name.len() == 64))
            .collect()
    }

    async fn wait_pack(&self, running: &mut Running) {
        eventually_now("a pack on tier 1", PATIENCE, || {
            assert!(running.is_running(), "backup ended too early: {}", running.log());
            !self.packs().is_empty()
        })
        .await;
    }

    async fn names(&self) -> Vec<String> {
        let channel = client::connect(&self.site, &self.site.bundle()).await.expect("connect");
        let request = klio_proto::v1::ListBackupsRequest { cluster: "main".into() };
        let answer = BaseClient::new(channel).list_backups(request).await;
        let entries = answer.map(|a| a.into_inner().backups).unwrap_or_default();
        let name = |record: &[u8]| {
            let record: BackupRecord = serde_json::from_slice(record).expect("a record");
            record.name.to_string()
        };
        entries.iter().map(|entry| name(&entry.record)).collect()
    }

    /// PostgreSQL has no session of ours any more.
    async fn wait_out_of_backup_mode(&self) {
        let sql =
            "SELECT count(*) = 0 FROM pg_stat_activity WHERE application_name = 'klio backup'";
        self.pg.wait_true(sql).await;
    }
}

async fn backup(site: &Site, pg: &Postgres, args: &[&str]) -> Outcome {
    let all: Vec<&str> = ["backup", "--json"].iter().chain(args).copied().collect();
    site.klio(Some(pg), &all).await
}

fn record(outcome: &Outcome) -> BackupRecord {
    let json: Value = serde_json::from_str(&outcome.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}\n{}", outcome.stdout, outcome.stderr));
    serde_json::from_value(json["backup"].clone()).expect("a record")
}

/// A snapshot, opened on tier 1 with what the server gives the cluster's certificate.
async fn open(site: &Site, record: &BackupRecord) -> Reader {
    let channel = client::connect(site, &site.bundle()).await.expect("connect");
    let request = OpenRepositoryRequest { cluster: "main".into(), ..Default::default() };
    let answer = BaseClient::new(channel).open_repository(request).await.expect("open repository");
    let secret: Secret = serde_json::from_slice(&answer.into_inner().secret).expect("a secret");
    let files = LocalFiles::new(Arc::new(RealDisk), site.tier1().join("main/base"));
    let id = record.snapshot.parse().expect("a snapshot id");
    let open = move || Repository::open(Arc::new(files), &secret)?.reader(&id);
    tokio::task::spawn_blocking(open).await.expect("no panic").expect("open the snapshot")
}

/// Path to size; directories have none.
fn listing(reader: &Reader) -> BTreeMap<String, Option<u64>> {
    let entries = reader.entries().expect("list").map(|e| e.expect("an entry"));
    entries
        .map(|e| {
            let size = match e.kind {
                StoredKind::File { size, .. } => Some(size),
                _ => None,
            };
            (e.path.display().to_string(), size)
        })
        .collect()
}

/// Writes a snapshot's data directory where `pg` expects it, and tablespaces below `tablespaces`.
fn restore(site: &Site, reader: &Reader, record: &BackupRecord, pg: &Postgres, tablespaces: &Path) {
    for entry in reader.entries().expect("list") {
        let entry = entry.expect("an entry");
        let target = match entry.path.strip_prefix("data") {
            Ok(rest) => pg.data_dir().join(rest),
            Err(_) => {
                tablespaces.join(entry.path.strip_prefix("tablespaces").expect("a tablespace"))
            }
        };
        match &entry.kind {
            StoredKind::Dir => fs::create_dir_all(&target).expect("make directory"),
            StoredKind::Symlink(to) => std::os::unix::fs::symlink(to, &target).expect("make link"),
            StoredKind::File { size, chunks } => {
                let mut file = fs::File::create(&target).expect("create");
                for chunk in chunks {
                    file.write_all(&reader.chunk(chunk).expect("a chunk")).expect("write");
                }
                assert_eq!(file.metadata().expect("stat").len(), *size, "{}", target.display());
            }
        }
        fs::set_permissions(&target, fs::Permissions::from_mode(entry.mode)).expect("set mode");
    }
    let map: String = record
        .tablespaces
        .iter()
        .map(|t| format!("{} {}\n", t.oid, tablespaces.join(t.oid.to_string()).display()))
        .collect();
    if !map.is_empty() {
        fs::write(pg.data_dir().join("tablespace_map"), map).expect("write tablespace_map");
    }
    fs::write(pg.data_dir().join("recovery.signal"), "").expect("write recovery.signal");
    // PostgreSQL's user cannot read the bundle of a test that runs as root.
    let (klio, bundle) = (programs::klio(), site.bundle());
    let wal = site.scratch("wal");
    fs::create_dir_all(&wal).expect("make directory");
    let mut name =
        reader_segment(record.start_timeline.get(), record.start_lsn, record.segment_size);
    loop {
        let target = wal.join(&name);
        let status = programs::command(&klio)
            .args(["wal-fetch", &name])
            .arg(&target)
            .arg("-c")
            .arg(&bundle)
            .env("KLIO_RESTORE__READ_AHEAD", "0B")
            .status()
            .expect("run klio wal-fetch");
        if !status.success() {
            assert_eq!(status.code(), Some(1), "wal-fetch {name}");
            break;
        }
        install::give(&target);
        name = next_segment(&name, record.segment_size);
    }
    install::give(&wal);
    let settings = format!("restore_command = 'cp {}/%f \"%p\"'\n", wal.display());
    let mut conf = fs::OpenOptions::new()
        .append(true)
        .open(pg.data_dir().join("postgresql.conf"))
        .expect("open postgresql.conf");
    conf.write_all(settings.as_bytes()).expect("write postgresql.conf");
    give_all(&pg.data_dir());
    give_all(tablespaces);
    pg.adopt();
}

fn reader_segment(timeline: u32, lsn: klio_pg::Lsn, size: u32) -> String {
    let timeline = klio_pg::TimelineId::new(timeline).expect("a timeline");
    let size = klio_pg::SegmentSize::new(size).expect("a size");
    klio_pg::SegmentName::containing(timeline, lsn, size).to_string()
}

fn next_segment(name: &str, size: u32) -> String {
    let name: klio_pg::SegmentName = name.parse().expect("a segment");
    let size = klio_pg::SegmentSize::new(size).expect("a size");
    name.next(size).expect("a next one").to_string()
}

fn give_all(path: &Path) {
    if !path.exists() {
        return;
    }
    install::give(path);
    if path.is_dir() && !path.is_symlink() {
        fs::read_dir(path).expect("list").flatten().for_each(|entry| give_all(&entry.path()));
    }
}

async fn sums(pg: &Postgres) -> Vec<Vec<String>> {
    let tables = ["pgbench_accounts", "pgbench_tellers", "pgbench_branches"];
    let column = |table: &str| format!("{}balance", &table[8..9]);
    let mut all = Vec::new();
    for table in tables {
        all.extend(pg.rows(&format!("SELECT sum({}) FROM {table}", column(table))).await);
    }
    all.extend(pg.rows("SELECT sum(delta) FROM pgbench_history").await);
    all
}

/// Under load, with a tablespace; then a restored copy has balanced books.
async fn taken_under_load_restores(major: u32) {
    let setup = Setup::new(major).await;
    let Setup { site, pg, .. } = &setup;
    let space = site.scratch("space");
    fs::create_dir_all(&space).expect("make directory");
    install::give(&space);
    pg.execute(&format!("CREATE TABLESPACE extra LOCATION '{}'", space.display())).await;
    pg.execute("CREATE TABLE elsewhere (n int) TABLESPACE extra").await;
    pg.execute("INSERT INTO elsewhere SELECT generate_series(1, 5000)").await;
    pg.execute("CREATE UNLOGGED TABLE volatile AS SELECT generate_series(1, 50000) AS n").await;
    pg.pgbench(&["-i", "-s", "3", "-q"]).await;
    let mut load = pg.start_pgbench(&["-T", "300", "-c", "2"]);
    pg.wait_true("SELECT count(*) > 100 FROM pgbench_history").await;
    let session = pg.session().await;
    session
        .rows("CREATE TEMP TABLE mine AS SELECT generate_series(1, 50000) AS n")
        .await
        .expect("temp");
    let temporary = session.rows("SELECT pg_relation_filepath('mine')").await.expect("path");
    let unlogged = pg.value("SELECT pg_relation_filepath('volatile')").await;
    let first = setup.record(&["--label", "under load", "--keep"]).await;
    assert_eq!((first.label.as_deref(), first.keep), (Some("under load"), true));
    assert!(
        first.pages.enabled && first.pages.bad == 0 && first.pages.checked > 100,
        "{:?}",
        first.pages
    );
    assert!(!first.from_standby && first.stop_lsn > first.start_lsn);
    load.kill9_tree();
    let reader = open(site, &first).await;
    let listed = listing(&reader);
    assert_eq!(listed["data/base"], None);
    assert!(listed["data/global/pg_control"] == Some(8192));
    assert!(listed["data/backup_label"].is_some() && listed["data/tablespace_map"].is_some());
    assert!(!listed.contains_key(&format!("data/{}", temporary[0][0])), "temporary table");
    assert!(!listed.contains_key(&format!("data/{unlogged}")), "unlogged table");
    assert_eq!(listed[&format!("data/{unlogged}_init")], Some(0));
    assert!(!listed.contains_key("data/postmaster.pid"));
    assert!(!listed.keys().any(|path| path.starts_with("data/pg_wal/0")), "WAL");
    let oid = first.tablespaces[0].oid;
    assert!(listed.keys().any(|p| p.starts_with(&format!("tablespaces/{oid}/PG_{major}_"))));
    let (files, bytes) =
        listed.values().flatten().fold((0, 0), |(n, sum), size| (n + 1, sum + size));
    assert_eq!((first.files, first.size_bytes), (files, bytes));

    // A second one stores what changed.
    pg.execute("CHECKPOINT").await;
    let second = setup.record(&[]).await;
    let third = setup.record(&[]).await;
    assert!(second.stored_bytes < first.stored_bytes, "{second:?}");
    assert!(
        third.stored_bytes * 10 < first.stored_bytes,
        "{} of {}",
        third.stored_bytes,
        first.stored_bytes
    );
    assert_eq!(setup.names().await.len(), 3);

    // The first one, with all WAL there is, is the end of the load.
    site.wait_flushed(pg.flush_lsn().await).await;
    let expected = sums(pg).await;
    let mut copy = Postgres::empty(major);
    restore(site, &reader, &first, &copy, &copy.socket_dir().join("spaces"));
    copy.start().await;
    copy.wait_true("SELECT NOT pg_is_in_recovery()").await;
    assert_eq!(sums(&copy).await, expected);
    assert_eq!(copy.value("SELECT count(*) FROM elsewhere").await, "5000");
    assert_eq!(copy.value("SELECT count(*) FROM volatile").await, "0");
    copy.execute("CREATE EXTENSION IF NOT EXISTS amcheck").await;
    let checked = copy.amcheck().await;
    assert_eq!(checked.code, Some(0), "{}{}", checked.stdout, checked.stderr);
    copy.stop(Stop::Fast).await;
    // Debian's pg_checksums reads its own version only.
    if major == install::DEBIAN_MAJOR {
        let checked = copy.checksums().await;
        assert_eq!(checked.code, Some(0), "{}{}", checked.stdout, checked.stderr);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_postgres_15_under_load_restores_and_the_next_stores_what_changed() {
    taken_under_load_restores(15).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_postgres_17_under_load_restores_and_the_next_stores_what_changed() {
    taken_under_load_restores(17).await;
}

/// A flipped bit in a table's file, which PostgreSQL has not noticed.
async fn corrupt(setup: &Setup) {
    let pg = &setup.pg;
    pg.execute("CREATE TABLE victim AS SELECT generate_series(1, 10000) AS n").await;
    pg.execute("CHECKPOINT").await;
    let path = pg.data_dir().join(pg.value("SELECT pg_relation_filepath('victim')").await);
    let file = fs::OpenOptions::new().read(true).write(true).open(path).expect("open victim");
    let mut byte = [0];
    file.read_exact_at(&mut byte, 3 * 8192 + 4000).expect("read");
    file.write_all_at(&[byte[0] ^ 0x20], 3 * 8192 + 4000).expect("write");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_page_is_found_named_and_decided_on_by_policy() {
    let setup = Setup::new(15).await;
    corrupt(&setup).await;
    let outcome = setup.backup(&[]).await;
    assert_eq!(outcome.code, Some(3), "{outcome:?}");
    assert!(outcome.stderr.contains("block 3"), "{}", outcome.stderr);
    let record = record(&outcome);
    assert_eq!((record.pages.bad, record.pages.examples[0].block), (1, 3));
    let mut command = setup.site.klio_command(Some(&setup.pg), &["backup", "--full-read"]);
    command.env("KLIO_BACKUP__ON_BAD_PAGES", "fail");
    let outcome = programs::run(command).await;
    assert_eq!(outcome.code, Some(21), "{outcome:?}");
    assert_eq!(setup.names().await, [record.name.to_string()]);
    setup.wait_out_of_backup_mode().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_or_unreadable_data_directory_is_refused_with_what_to_do() {
    let setup = Setup::new(15).await;
    let other = Postgres::new().await;
    for (directory, code, text) in [
        ("/nowhere".to_owned(), 6, "must run where PostgreSQL runs"),
        (other.data_dir().display().to_string(), 4, "the same PostgreSQL"),
    ] {
        let mut command = setup.site.klio_command(Some(&setup.pg), &["backup"]);
        command.env("KLIO_POSTGRES__DATA_DIRECTORY", directory);
        let outcome = programs::run(command).await;
        assert_eq!(outcome.code, Some(code), "{outcome:?}");
        assert!(outcome.stderr.contains(text), "{}", outcome.stderr);
    }
    setup.wait_out_of_backup_mode().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_may_not_back_up_is_told_what_to_grant() {
    let setup = Setup::new(15).await;
    let pg = &setup.pg;
    pg.execute("CREATE ROLE modest LOGIN REPLICATION").await;
    let dsn = pg.conninfo().replace("user=postgres", "user=modest");
    let run = async || {
        let mut command = setup.site.klio_command(None, &["backup", "--json"]);
        command.env("KLIO_POSTGRES__DSN", &dsn);
        programs::run(command).await
    };
    let outcome = run().await;
    assert!(
        outcome.code == Some(4) && outcome.stderr.contains("pg_read_all_settings"),
        "{outcome:?}"
    );
    pg.execute("GRANT pg_read_all_settings TO modest").await;
    let outcome = run().await;
    assert!(outcome.code == Some(5) && outcome.stderr.contains("GRANT EXECUTE"), "{outcome:?}");
    pg.execute("GRANT EXECUTE ON FUNCTION pg_backup_start(text, boolean) TO modest").await;
    pg.execute("GRANT EXECUTE ON FUNCTION pg_backup_stop(boolean) TO modest").await;
    let outcome = run().await;
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
}

/// The first line was "the backup is taken without proving which history PostgreSQL continues", and a hint to grant REPLICATION.
#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_a_postgresql_that_cannot_be_reached_says_only_that() {
    let setup = Setup::new(15).await;
    for (dsn, text) in [
        ("host=127.0.0.1 port=1 user=postgres".to_owned(), "is PostgreSQL running"),
        (setup.pg.conninfo().replace("user=postgres", "user=nobody"), "check the user"),
    ] {
        let mut command = setup.site.klio_command(None, &["backup"]);
        command.env("KLIO_POSTGRES__DSN", &dsn);
        let outcome = programs::run(command).await;
        assert_eq!(outcome.code, Some(5), "{outcome:?}");
        assert!(outcome.stderr.contains(text), "{}", outcome.stderr);
        assert!(!outcome.stderr.contains("the backup is taken"), "{}", outcome.stderr);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_backup_leaves_postgres_out_of_backup_mode_and_the_next_uses_what_was_sent() {
    let setup = Setup::new(15).await;
    setup.ballast(256);
    let mut killed = setup.start_backup(&[]);
    setup.wait_pack(&mut killed).await;
    killed.kill9();
    setup.wait_out_of_backup_mode().await;
    eventually_now("PostgreSQL to say that it gave the backup up", PATIENCE, || {
        setup.pg.log().contains("aborting backup due to backend exiting")
    })
    .await;
    assert_eq!(setup.names().await, Vec::<String>::new());
    let sent: u64 = setup.packs().iter().map(|p| fs::metadata(p).map_or(0, |m| m.len())).sum();
    assert!(sent >= 16 << 20, "{sent} bytes were sent");
    // The server may need a moment to see that the first one is gone.
    let next = eventually("the next backup", PATIENCE, || async {
        let outcome = setup.backup(&[]).await;
        match outcome.code {
            Some(0) => Ok(record(&outcome)),
            Some(23) => Err(outcome.stderr),
            code => panic!("{code:?}: {}", outcome.stderr),
        }
    })
    .await;
    assert!(next.size_bytes > 256 << 20);
    let again = next.stored_bytes + sent;
    assert!(
        again < next.size_bytes + (8 << 20),
        "{} stored after {sent} were sent",
        next.stored_bytes
    );
    assert_eq!(listing(&open(&setup.site, &next).await)["data/ballast"], Some(256 << 20));
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_ends_a_backup_in_good_order_and_streaming_goes_on() {
    let mut setup = Setup::new(15).await;
    setup.ballast(256);
    let mut stopped = setup.start_backup(&[]);
    setup.wait_pack(&mut stopped).await;
    stopped.signal(Signal::INT);
    let status = stopped.wait_exit(Duration::from_secs(30)).await;
    assert_eq!(status.code(), Some(9), "{}", stopped.log());
    setup.wait_out_of_backup_mode().await;
    assert_eq!(setup.names().await, Vec::<String>::new());
    assert!(setup.stream.is_running());
    let lsn = setup.pg.write_wal(1).await;
    setup.site.wait_flushed(lsn).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_while_postgres_writes_a_spread_checkpoint_ends_the_wait_at_once() {
    let setup = Setup::new(15).await;
    setup.pg.execute("CREATE TABLE big AS SELECT generate_series(1, 500000) AS n").await;
    let mut waiting = setup.start_backup(&["--checkpoint", "spread"]);
    let sql = "SELECT count(*) = 1 FROM pg_stat_activity WHERE application_name = 'klio backup' \
               AND query LIKE '%pg_backup_start%' AND state = 'active' AND wait_event LIKE 'Checkpoint%'";
    setup.pg.wait_true(sql).await;
    waiting.signal(Signal::TERM);
    let status = waiting.wait_exit(Duration::from_secs(30)).await;
    assert_eq!(status.code(), Some(9), "{}", waiting.log());
    setup.wait_out_of_backup_mode().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_postgres_ends_fails_the_backup_and_the_server_may_restart_meanwhile() {
    let mut setup = Setup::new(15).await;
    setup.ballast(256);
    let mut lost = setup.start_backup(&[]);
    setup.wait_pack(&mut lost).await;
    let sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'klio backup'";
    setup.pg.execute(sql).await;
    let status = lost.wait_exit(PATIENCE).await;
    assert_eq!(status.code(), Some(5), "{}", lost.log());
    assert_eq!(setup.names().await, Vec::<String>::new());
    // A restart of the server in the middle of the next one is nothing but a pause.
    setup.ballast(256);
    let packs = setup.packs().len();
    let mut next = setup.start_backup(&[]);
    eventually_now("another pack", PATIENCE, || {
        assert!(next.is_running(), "{}", next.log());
        setup.packs().len() > packs
    })
    .await;
    setup.site.kill9();
    setup.site.start().await;
    let status = next.wait_exit(PATIENCE).await;
    assert_eq!(status.code(), Some(0), "{status}: {}", next.log());
    assert_eq!(setup.names().await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_backup_beside_the_first_is_refused() {
    let setup = Setup::new(15).await;
    setup.ballast(256);
    let mut first = setup.start_backup(&["--name", "first"]);
    setup.wait_pack(&mut first).await;
    let second = setup.backup(&["--name", "second"]).await;
    assert_eq!(second.code, Some(23), "{second:?}");
    let status = first.wait_exit(PATIENCE).await;
    assert_eq!(status.code(), Some(0), "{status}: {}", first.log());
    assert_eq!(setup.names().await, ["first"]);
    let again = setup.backup(&["--name", "first"]).await;
    assert!(again.code != Some(0) && again.stderr.contains("first"), "{again:?}");
    assert!(again.stderr.contains("choose another --name"), "{again:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_stream_the_backup_says_so_before_it_copies() {
    let mut setup = Setup::new(15).await;
    setup.stream.kill9();
    setup.pg.write_wal(1).await;
    let mut command = setup.site.klio_command(Some(&setup.pg), &["backup"]);
    command.env("KLIO_BACKUP__WAL_TIMEOUT", "2s");
    let outcome = programs::run(command).await;
    assert_eq!(outcome.code, Some(10), "{outcome:?}");
    assert!(outcome.stderr.contains("klio stream must run"), "{}", outcome.stderr);
    assert!(setup.packs().is_empty());
    setup.wait_out_of_backup_mode().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_s_backup_is_one_and_its_promotion_ends_it() {
    let setup = Setup::new(15).await;
    setup.pg.execute("CREATE TABLE t AS SELECT generate_series(1, 1000) AS n").await;
    let standby = setup.pg.standby().await;
    let taken = backup(&setup.site, &standby, &[]).await;
    assert_eq!(taken.code, Some(0), "{taken:?}");
    let taken = record(&taken);
    assert!(taken.from_standby && taken.backup_label.contains("BACKUP FROM: standby"), "{taken:?}");
    let listed = listing(&open(&setup.site, &taken).await);
    assert!(!listed.contains_key("data/standby.signal"));

    let bytes = vec![7; 1 << 20];
    let mut ballast = fs::File::create(standby.data_dir().join("ballast")).expect("create");
    let mut random = fs::File::open("/dev/urandom").expect("open");
    for _ in 0..256 {
        let mut piece = bytes.clone();
        std::io::Read::read_exact(&mut random, &mut piece).expect("read");
        ballast.write_all(&piece).expect("write");
    }
    let packs = setup.packs().len();
    let command = setup.site.klio_command(Some(&standby), &["backup"]);
    let mut promoted = Running::spawn("klio backup", command, &setup.site.scratch("promoted.log"));
    eventually_now("another pack", PATIENCE, || {
        assert!(promoted.is_running(), "{}", promoted.log());
        setup.packs().len() > packs
    })
    .await;
    standby.promote().await;
    let status = promoted.wait_exit(PATIENCE).await;
    assert_eq!(status.code(), Some(5), "{}", promoted.log());
    assert!(promoted.log().contains("promoted"), "{}", promoted.log());
    assert_eq!(setup.names().await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schedule_takes_a_first_backup_at_once_and_its_metrics_outlive_the_process() {
    let mut setup = Setup::new(15).await;
    setup.stream.terminate(PATIENCE).await;
    let port = ports::free();
    let stream = |schedule: &str, log: &str| {
        let mut command = setup.site.klio_command(Some(&setup.pg), &["stream"]);
        command
            .env("KLIO_BACKUP__SCHEDULE", schedule)
            .env("OTEL_METRICS_EXPORTER", "prometheus")
            .env("OTEL_EXPORTER_PROMETHEUS_PORT", port.to_string());
        Running::spawn("klio stream", command, &setup.site.scratch(log))
    };
    let value = async |name: &str| {
        let labels = [("cluster_name", "main")];
        Metrics::scrape(port).await.ok().and_then(|m| m.value(name, &labels))
    };
    let mut scheduled = stream("0 3 1 1 * Europe/Berlin", "scheduled.log");
    scheduled.wait_log("scheduled backup taken", PATIENCE).await;
    eventually("the metric of success", PATIENCE, || async {
        value("klio_backup_successes_total").await == Some(1.0)
    })
    .await;
    assert_eq!(value("klio_backup_running").await, Some(0.0));
    let completed = value("klio_backup_latest_completion_time_seconds").await.expect("a time");
    let duration = value("klio_backup_latest_duration_seconds").await.expect("a duration");
    let next = value("klio_backup_next_time_seconds").await.expect("a next time");
    assert!(completed > 1e9 && duration > 0.0 && next > completed, "{completed} {duration} {next}");
    let lsn = setup.pg.write_wal(1).await;
    setup.site.wait_flushed(lsn).await;
    scheduled.terminate(PATIENCE).await;

    let _plain = stream("", "plain.log");
    let again = eventually("the time of the newest backup", PATIENCE, || async {
        value("klio_backup_latest_completion_time_seconds").await
    })
    .await;
    assert!((again - completed).abs() < 5.0, "{again} after {completed}");
    assert_eq!(setup.names().await.len(), 1);
}

/// Also that a backup from a standby reaches the bucket (peers lost those).
#[tokio::test(flavor = "multi_thread")]
async fn a_standby_s_backup_reaches_tier_2() {
    install_crypto();
    let s3 = S3::new();
    let pg = Postgres::builder().initdb("-k").start().await;
    let mut site = Site::new().await.tier2(&s3);
    site.start().await;
    let _stream = site.stream(&pg);
    let standby = pg.standby().await;
    let taken = backup(&site, &standby, &[]).await;
    assert_eq!(taken.code, Some(0), "{taken:?}");
    let taken = record(&taken);
    eventually("the record in the bucket", PATIENCE, || async {
        let channel = client::connect(&site, &site.bundle()).await.expect("connect");
        let request = klio_proto::v1::ListBackupsRequest { cluster: "main".into() };
        let answer = BaseClient::new(channel).list_backups(request).await.map(|a| a.into_inner());
        answer.is_ok_and(|a| a.backups.len() == 1 && a.backups[0].tier2)
    })
    .await;
    let key = format!("klio/main/base/snapshots/{}", taken.snapshot);
    assert!(s3.bucket_dir().join(key).is_file());
}

#[tokio::test(flavor = "multi_thread")]
async fn one_trace_holds_a_backup_s_phases_and_the_server_s_part_in_them() {
    let collector = Collector::new().await;
    install_crypto();
    let pg = Postgres::new().await;
    let mut site = Site::new().await;
    let variables = [
        ("OTEL_TRACES_EXPORTER", "otlp".to_owned()),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint()),
        ("OTEL_BSP_SCHEDULE_DELAY", "100".to_owned()),
    ];
    variables.iter().for_each(|(name, value)| site.set(name, value));
    site.start().await;
    let _stream = site.stream(&pg);
    let mut command = site.klio_command(Some(&pg), &["backup", "--name", "traced"]);
    command.envs(variables);
    let outcome = programs::run(command).await;
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    eventually_now("the spans of a backup", PATIENCE, || {
        let spans = collector.spans();
        let Some(backup) = spans.iter().find(|s| s.name == "backup") else {
            return Err("no backup".to_owned());
        };
        if backup.attributes.get("backup.name").map(String::as_str) != Some("traced") {
            return Err(format!("{:?}", backup.attributes));
        }
        for name in ["backup_run", "backup_verify", "backup_maintenance"] {
            if !spans.iter().any(|s| s.name == name && s.parent == backup.id) {
                return Err(format!("no {name} below backup"));
            }
        }
        let server =
            |s: &&klio_tests::otlp::Span| s.service == "klio-server" && s.trace == backup.trace;
        if spans.iter().find(server).is_none() {
            Err("nothing of the server".into())
        } else {
            Ok(())
        }
    })
    .await;
}
