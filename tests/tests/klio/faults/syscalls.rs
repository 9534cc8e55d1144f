//! What the real programs ask of the real disk (P1, P2): the page cache hides a missing fsync from every test that kills a process,
//! so the system calls themselves are watched.

use klio_tests::{
    install_crypto,
    postgres::Postgres,
    programs,
    site::{PATIENCE, Site},
    strace::{Call, Strace, undurable_names},
    wait::eventually,
};
use std::path::{Path, PathBuf};

/// Between two moments: WAL was written into a journal, and after that the same journal was synced.
fn appended_and_synced(calls: &[Call], from: usize, to: usize) -> bool {
    let within = |call: &&Call| call.lines.0 >= from && call.lines.1 < to;
    let is_journal = |call: &&Call| call.path().extension().is_some_and(|end| end == "open");
    let mut appends = calls.iter().filter(within).filter(is_journal).filter(|c| c.writes());
    appends.any(|append| {
        let mut syncs = calls.iter().filter(within).filter(|c| c.syncs());
        syncs.any(|sync| sync.path() == append.path() && sync.lines.0 > append.lines.1)
    })
}

async fn server_of(site: &mut Site, bucket: &Path) {
    std::fs::create_dir_all(bucket).expect("make the bucket");
    site.set("KLIO_TIER2__URL", &format!("file://{}", bucket.display()));
    site.start().await;
}

/// P1: a COMMIT that returned was written to the journal and synced before it returned.
#[tokio::test(flavor = "multi_thread")]
async fn a_commit_returns_after_the_journal_was_synced() {
    install_crypto();
    let pg = Postgres::new().await;
    let mut site = Site::new().await;
    site.start().await;
    let _stream = site.stream(&pg);
    pg.execute("create table t (n int)").await;
    pg.set("synchronous_standby_names", "klio").await;
    pg.wait_true("select count(*) > 0 from pg_stat_replication where sync_state = 'sync'").await;
    let session = pg.session().await;
    let strace = Strace::attach(site.server().pid()).await;
    for n in 0..20 {
        let before = strace.now();
        session.rows(&format!("insert into t values ({n})")).await.expect("commit");
        let after = strace.now();
        let calls = strace.calls();
        assert!(appended_and_synced(&calls, before, after), "commit {n}: {:#?}", &calls);
    }
}

/// P1, P5: every file of both tiers is synced before it gets its name, and so is the name.
#[tokio::test(flavor = "multi_thread")]
async fn every_name_in_both_tiers_is_durable() {
    install_crypto();
    let pg = Postgres::builder().segment_mib(1).set("wal_keep_size", "1GB").start().await;
    let mut site = Site::new().await;
    let bucket = site.scratch("bucket");
    server_of(&mut site, &bucket).await;
    let mut strace = Strace::attach(site.server().pid()).await;
    let _stream = site.stream(&pg);
    eventually("a position", PATIENCE, || site.lsn("flushed_lsn")).await;
    let backup = site.klio(Some(&pg), &["backup", "--name", "b"]).await;
    assert_eq!(backup.code, Some(0), "{}", backup.stderr);
    pg.write_wal(3 << 20).await;
    let end = pg.switch_wal().await;
    pg.write_wal(1).await;
    site.wait_archived(end.segment_start(pg.segment_size().await)).await;
    let record = bucket.join("main/backups/b.json");
    eventually("the backup in the bucket", PATIENCE, || async { record.is_file() }).await;
    site.stop().await;
    strace.ended().await;
    let calls = strace.calls();
    let directories = [site.dir(), bucket];
    let given = |end: &str| {
        let ends = |path: &&PathBuf| path.to_string_lossy().ends_with(end);
        calls.iter().filter(|c| c.names() && c.paths.last().as_ref().is_some_and(ends)).count()
    };
    // What is watched is really there to be seen.
    for (end, least) in [(".zst.age", 6), (".open", 1), ("b.json", 2), ("cluster.json", 2)] {
        assert!(given(end) >= least, "{} names end with {end}", given(end));
    }
    // The moment in as_of.json only makes a display better after a crash; a spare journal that is lost is made anew.
    let wrong = undurable_names(&calls, &directories, &["as_of.json", ".spare"]);
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// A restore's files are on disk before pg_control, without which PostgreSQL does not start; a fetched segment before it has its name.
#[tokio::test(flavor = "multi_thread")]
async fn a_restore_is_on_disk_before_it_can_be_started() {
    install_crypto();
    let pg = Postgres::builder().segment_mib(1).set("wal_keep_size", "1GB").start().await;
    let mut site = Site::new().await;
    site.start().await;
    let _stream = site.stream(&pg);
    eventually("a position", PATIENCE, || site.lsn("flushed_lsn")).await;
    let backup = site.klio(Some(&pg), &["backup", "--name", "b"]).await;
    assert_eq!(backup.code, Some(0), "{}", backup.stderr);
    let target = site.scratch("restored");
    let to = target.display().to_string();
    let command = site.klio_command(None, &["restore", "--latest", "--to", &to]);
    let (strace, command) = Strace::wrap(&command);
    let restored = programs::run(command).await;
    assert_eq!(restored.code, Some(0), "{}", restored.stderr);
    let calls = strace.calls();
    let control = target.join("global/pg_control");
    let naming = calls.iter().find(|c| c.names() && c.paths.last() == Some(&control));
    let naming = naming.expect("pg_control gets its name by a rename");
    // Its bytes are synced under another name; then its owner and mode, without which PostgreSQL could not read it.
    let dressed = target.join("global/pg_control.klio");
    let kept = |c: &Call| c.syncs() && c.path() == dressed && c.lines.1 < naming.lines.0;
    assert!(calls.iter().any(kept), "pg_control is synced before it gets its name");
    let synced = calls.iter().find(|c| {
        c.name == "syncfs" && c.path().starts_with(&target) && c.lines.1 < naming.lines.0
    });
    let synced = synced.expect("the file system is synced before pg_control is there");
    let late = calls.iter().find(|c| {
        let inside =
            c.path().starts_with(&target) && c.path() != target.join("global/pg_control.klio");
        c.writes()
            && inside
            && c.lines.0 > synced.lines.0
            && c.lines.1 < naming.lines.0
            && !calls.iter().any(|s| s.syncs() && s.path() == c.path() && s.lines.0 > c.lines.1)
    });
    assert!(late.is_none(), "written after the sync: {late:?}");
    let wrong = undurable_names(&calls, &[target.join("global")], &[]);
    assert!(wrong.is_empty(), "{wrong:#?}");

    let size = pg.segment_size().await;
    let end = pg.switch_wal().await;
    pg.write_wal(1).await;
    let name = pg.segment_of(klio_pg::Lsn::new(end.segment_start(size).as_u64() - 1)).await;
    let name = name.to_string();
    site.wait_flushed(pg.flush_lsn().await).await;
    let directory = site.scratch("fetched");
    std::fs::create_dir_all(&directory).expect("make a directory");
    let path = directory.join(&name).display().to_string();
    let command = site.klio_command(None, &["wal-fetch", &name, &path]);
    let (strace, command) = Strace::wrap(&command);
    let fetched = programs::run(command).await;
    assert_eq!(fetched.code, Some(0), "{}", fetched.stderr);
    let calls = strace.calls();
    assert!(calls.iter().any(|c| c.names() && c.paths.last() == Some(&PathBuf::from(&path))));
    let wrong = undurable_names(&calls, &[directory], &[]);
    assert!(wrong.is_empty(), "{wrong:#?}");
}
