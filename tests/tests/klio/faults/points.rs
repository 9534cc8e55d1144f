//! Every crash point of the programs: the process dies there by SIGKILL and is started again. Nothing that was
//! acknowledged is missing (P1 to P6), and nobody has to repair anything.
//!
//! The points of maintenance are in `maintenance/rules.rs`. What must stay true: each point is in exactly one list, and a
//! test fails when the program never comes to a point of its list.

use super::crash::{compare_all, first_segment};
use klio_pg::Lsn;
use klio_storage::crash::POINTS;
use klio_tests::{
    crash::Armed,
    install_crypto,
    postgres::{Postgres, install},
    process::Running,
    programs,
    proof::Restorer,
    s3::S3,
    scratch::Scratch,
    site::{PATIENCE, Site},
    wait::eventually,
};
use std::{
    fs,
    os::unix::process::ExitStatusExt,
    path::Path,
    process::{Command, ExitStatus},
};

/// Of the server, from the first byte of WAL to tier 2, each with the pass at which it dies.
const RECEIVING: [(&str, u64); 13] = [
    ("wal.appended", 20),
    ("wal.synced", 5),
    ("wal.acknowledged", 5),
    ("journal.written", 2),
    ("journal.created", 2),
    ("seal.written", 1),
    ("seal.renamed", 1),
    ("seal.recycled", 1),
    ("queue.published", 1),
    ("upload.begun", 1),
    ("wal.uploaded", 1),
    ("wal.recorded", 1),
    ("queue.acknowledged", 1),
];
/// Of `klio stream`.
const STREAMING: &str = "stream.acknowledged";
/// Of `klio backup`.
const TAKING: [&str; 7] = [
    "backup.reserved",
    "backup.started",
    "backup.copied",
    "backup.stopped",
    "backup.assembled",
    "backup.covered",
    "backup.committed",
];
/// Of the server, while a backup arrives and goes to tier 2.
const KEEPING: [&str; 5] =
    ["file.written", "file.renamed", "commit.checked", "commit.written", "base.uploaded"];
/// Of `klio restore`.
const RESTORING: [&str; 6] = [
    "restore.marked",
    "restore.copied",
    "restore.configured",
    "restore.synced",
    "restore.controlled",
    "restore.done",
];
/// Of `klio-server key rotate --rewrap-wal`.
const ROTATING: [&str; 4] = ["key.written", "key.replaced", "key.rewrapped", "key.wal"];
/// Of the server, when a history begins or a person decides.
const DECIDING: &str = "generation.decided";

#[test]
fn every_crash_point_has_a_test_and_a_row_in_the_documentation() {
    let maintenance = crate::maintenance::rules::CRASH_POINTS;
    let mut walked: Vec<&str> = RECEIVING.iter().map(|(point, _)| *point).collect();
    walked.extend([STREAMING, DECIDING]);
    walked.extend(TAKING.iter().chain(&KEEPING).chain(&RESTORING).chain(&ROTATING));
    walked.extend(maintenance);
    let mut all: Vec<&str> = POINTS.iter().map(|point| point.name).collect();
    walked.sort_unstable();
    all.sort_unstable();
    assert_eq!(walked, all);
    let page =
        fs::read_to_string(klio_tests::env::repository().join("docs/testing.md")).expect("a page");
    for point in POINTS {
        let row = format!("| `{}` | {} |", point.name, point.state);
        assert!(page.contains(&row), "docs/testing.md lacks this row:\n{row}");
    }
}

fn was_killed(status: ExitStatus, armed: &Armed) {
    assert_eq!(status.signal(), Some(9), "{}: it ended with {status}", armed.point());
}

fn arm(site: &mut Site, armed: &Armed) {
    site.unset(Armed::VARIABLE);
    site.set(Armed::VARIABLE, &armed.value());
}

/// What PostgreSQL was told to be durable, and the length of the server's log when it was told so.
struct Told {
    point: &'static str,
    acknowledged: Lsn,
    log_bytes: usize,
}

impl Told {
    async fn now(site: &Site, pg: &Postgres, armed: &Armed) -> Self {
        let slot = "select restart_lsn from pg_replication_slots where slot_name = 'klio'";
        let acknowledged = pg.value(slot).await.parse().expect("an LSN");
        Self { point: armed.point(), acknowledged, log_bytes: site.log().len() }
    }

    /// The next stream begins where PostgreSQL was told that everything is durable, or behind that.
    fn require(&self, log: &str) {
        let after = &log[self.log_bytes..];
        let (_, rest) = after.split_once("stream begins").expect("a stream began afterwards");
        let start = rest.split_once("start=").expect("the log tells where").1;
        let start: String =
            start.chars().take_while(|c| c.is_ascii_hexdigit() || *c == '/').collect();
        let start: Lsn = start.parse().expect("an LSN");
        let Self { point, acknowledged, .. } = self;
        assert!(
            start >= *acknowledged,
            "{point}: {acknowledged} was acknowledged, {start} was kept"
        );
    }
}

/// Writes WAL, segment after segment, until a program has died.
async fn write_until_death(pg: &Postgres, armed: &Armed) {
    let what = format!("a program to come to {}", armed.point());
    eventually(&what, PATIENCE, || async {
        pg.write_wal(32 << 10).await;
        pg.switch_wal().await;
        armed.has_died()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_death_at_any_point_of_receiving_and_archiving_loses_nothing() {
    install_crypto();
    let pg = Postgres::builder().segment_mib(1).set("wal_keep_size", "8GB").start().await;
    let s3 = S3::new();
    let mut site = Site::new().await.tier2(&s3);
    site.start().await;
    let mut stream = site.stream(&pg);
    site.wait_flushed(pg.write_wal(64 << 10).await).await;
    let first = first_segment(&site, &pg).await;
    site.stop().await;
    let mut told = Vec::new();
    for (point, pass) in RECEIVING {
        let armed = Armed::new(&site, point).pass(pass);
        arm(&mut site, &armed);
        site.launch();
        write_until_death(&pg, &armed).await;
        was_killed(site.server().wait_exit(PATIENCE).await, &armed);
        told.push(Told::now(&site, &pg, &armed).await);
    }
    site.unset(Armed::VARIABLE);
    site.start().await;
    site.wait_flushed(pg.write_wal(64 << 10).await).await;
    told.iter().for_each(|told| told.require(&site.log()));
    // The sidecar dies, too: it acknowledges again what PostgreSQL did not hear.
    stream.kill9();
    let armed = Armed::new(&site, STREAMING);
    let mut command = site.klio_command(Some(&pg), &["stream"]);
    command.env(Armed::VARIABLE, armed.value());
    stream = Running::spawn("klio stream", command, &site.scratch("dying-stream.log"));
    write_until_death(&pg, &armed).await;
    was_killed(stream.wait_exit(PATIENCE).await, &armed);
    let told = Told::now(&site, &pg, &armed).await;
    let mut stream = site.stream(&pg);
    let size = pg.segment_size().await;
    let end = pg.switch_wal().await;
    site.wait_flushed(pg.write_wal(1).await).await;
    told.require(&site.log());
    site.wait_archived(end.segment_start(size)).await;
    compare_all(&site, &pg, first, end).await;
    assert!(stream.is_running(), "klio stream ended:\n{}", stream.log());
}

/// A server with a bucket and a streaming PostgreSQL with a table `t`.
async fn with_table(s3: &S3) -> (Site, Postgres, Running) {
    install_crypto();
    let mut site = Site::new().await.tier2(s3);
    site.start().await;
    let pg = Postgres::builder().segment_mib(1).start().await;
    let stream = site.stream(&pg);
    pg.wait_true("select count(*) = 1 from pg_stat_replication where state = 'streaming'").await;
    pg.execute("create table t as select g, md5(g::text) from generate_series(1, 20000) g").await;
    (site, pg, stream)
}

const SUM: &str = "select sum(hashtext(md5)::bigint) from t";

/// Every backup verifies, and everything that was written restores.
async fn require_whole(site: &Site, pg: &Postgres) {
    let verified = site.klio(None, &["verify", "--read-data", "all", "--wal"]).await;
    assert_eq!(verified.code, Some(0), "{}{}", verified.stdout, verified.stderr);
    site.wait_flushed(pg.write_wal(1).await).await;
    let scratch = Scratch::new("points");
    install::give(scratch.path());
    let mut restored = Postgres::empty(install::DEBIAN_MAJOR);
    let outcome = programs::run(Restorer::of_server(site, &scratch).latest(&restored, &[])).await;
    assert_eq!(outcome.code, Some(0), "{}{}", outcome.stdout, outcome.stderr);
    restored.recover().await;
    assert_eq!(restored.value(SUM).await, pg.value(SUM).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_dies_at_any_point_leaves_postgresql_free_and_the_next_one_works() {
    let s3 = S3::new();
    let (site, pg, _stream) = with_table(&s3).await;
    for point in TAKING {
        pg.execute("update t set md5 = md5(md5) where g % 7 = 0").await;
        let armed = Armed::new(&site, point);
        let mut command = site.klio_command(Some(&pg), &["backup"]);
        command.env(Armed::VARIABLE, armed.value());
        let mut backup = Running::spawn("klio backup", command, &site.scratch("dying.log"));
        was_killed(backup.wait_exit(PATIENCE).await, &armed);
        assert!(armed.has_died(), "{point}");
        // The next one does not wait for the dead one, in PostgreSQL or in the server.
        pg.wait_true(
            "select count(*) = 0 from pg_stat_activity where application_name like 'klio backup%'",
        )
        .await;
        eventually("the next backup", PATIENCE, || async {
            let next = site.klio(Some(&pg), &["backup"]).await;
            if next.code == Some(0) { Ok(()) } else { Err((point, next.stderr)) }
        })
        .await;
    }
    // Committed is committed, although nobody was told: one more than those that were.
    let listed = site.klio(None, &["list", "--json"]).await.stdout;
    let listed: serde_json::Value = serde_json::from_str(&listed).expect("JSON");
    let backups = listed["backups"].as_array().map(Vec::len);
    assert_eq!(backups, Some(TAKING.len() + 1), "{listed}");
    require_whole(&site, &pg).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_dies_at_any_point_of_keeping_a_backup_has_it_whole_or_not_at_all() {
    let s3 = S3::new();
    let (mut site, pg, _stream) = with_table(&s3).await;
    for point in KEEPING {
        pg.execute("update t set md5 = md5(md5) where g % 7 = 0").await;
        site.stop().await;
        let armed = Armed::new(&site, point);
        arm(&mut site, &armed);
        site.start().await;
        let mut backup = Running::spawn(
            "klio backup",
            site.klio_command(Some(&pg), &["backup"]),
            &site.scratch("kept.log"),
        );
        was_killed(site.server().wait_exit(PATIENCE).await, &armed);
        site.unset(Armed::VARIABLE);
        site.start().await;
        // It goes on by itself or ends; whatever it does, the next one works.
        backup.wait_exit(PATIENCE).await;
        let next = site.klio(Some(&pg), &["backup"]).await;
        assert_eq!(next.code, Some(0), "{point}: {}{}", next.stdout, next.stderr);
        in_tier_2(&site, &s3).await;
    }
    require_whole(&site, &pg).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_dies_at_any_point_is_refused_by_postgresql_or_whole_and_the_next_one_ends_it()
 {
    let s3 = S3::new();
    let (site, pg, _stream) = with_table(&s3).await;
    let taken = site.klio(Some(&pg), &["backup"]).await;
    assert_eq!(taken.code, Some(0), "{}", taken.stderr);
    pg.execute("update t set md5 = md5(md5) where g % 7 = 0").await;
    site.wait_flushed(pg.write_wal(1).await).await;
    let scratch = Scratch::new("points");
    install::give(scratch.path());
    let restorer = Restorer::of_server(&site, &scratch);
    let mut restored = Postgres::empty(install::DEBIAN_MAJOR);
    // The first two once more, in the directory of a restore that is done.
    for (turn, point) in
        RESTORING.into_iter().chain(["restore.marked", "restore.copied"]).enumerate()
    {
        let armed = Armed::again(&site, point);
        let more: &[&str] = if turn == 0 { &[] } else { &["--delta"] };
        let mut command = restorer.latest(&restored, more);
        // PostgreSQL's user creates the mark.
        install::give(&site.scratch(""));
        command.env(Armed::VARIABLE, armed.value());
        let mut dying = Running::spawn("klio restore", command, &site.scratch("dying-restore.log"));
        was_killed(dying.wait_exit(PATIENCE).await, &armed);
        assert!(armed.has_died(), "{point}");
        let marker = restored.data_dir().join("klio-restore.unfinished").exists();
        let control = restored.data_dir().join("global/pg_control").exists();
        // Without the marker everything is there; without pg_control PostgreSQL does not start.
        assert_eq!(marker, point != "restore.done", "{point}");
        assert_eq!(control, matches!(point, "restore.controlled" | "restore.done"), "{point}");
    }
    let last = programs::run(restorer.latest(&restored, &["--delta"])).await;
    assert_eq!(last.code, Some(0), "{}{}", last.stdout, last.stderr);
    restored.recover().await;
    assert_eq!(restored.value(SUM).await, pg.value(SUM).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_of_keys_that_dies_at_any_point_leaves_everything_readable() {
    let s3 = S3::new();
    let (mut site, pg, _stream) = with_table(&s3).await;
    let taken = site.klio(Some(&pg), &["backup"]).await;
    assert_eq!(taken.code, Some(0), "{}", taken.stderr);
    let size = pg.segment_size().await;
    for point in ROTATING {
        let end = pg.switch_wal().await;
        pg.write_wal(1).await;
        site.wait_archived(end.segment_start(size)).await;
        site.stop().await;
        let armed = Armed::new(&site, point);
        arm(&mut site, &armed);
        let rotated = site.server_tool(&["key", "rotate", "--rewrap-wal"]).await;
        site.unset(Armed::VARIABLE);
        assert!(rotated.code.is_none() && armed.has_died(), "{point}: {rotated:?}");
        site.start().await;
    }
    site.stop().await;
    let again = site.server_tool(&["key", "rewrap", "--rewrap-wal"]).await;
    assert_eq!(again.code, Some(0), "{}", again.stderr);
    let nothing = "nothing on tier 1 needs an older identity";
    assert!(again.stdout.contains(nothing), "{}", again.stdout);
    site.start().await;
    require_whole(&site, &pg).await;
}

/// Another PostgreSQL under the same name begins a history; then a person decides.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_dies_while_a_history_begins_or_is_decided_on_remembers_both() {
    install_crypto();
    let s3 = S3::new();
    let mut site = Site::new().await.tier2(&s3);
    site.start().await;
    let (old, new) = (Postgres::builder().start().await, Postgres::builder().start().await);
    let _old = site.stream(&old);
    site.wait_flushed(old.write_wal(64 << 10).await).await;
    site.stop().await;
    let armed = Armed::new(&site, DECIDING);
    arm(&mut site, &armed);
    site.start().await;
    let _new = site.stream(&new);
    was_killed(site.server().wait_exit(PATIENCE).await, &armed);
    site.start().await;
    states(&site, &["current", "undecided"]).await;
    let bundle = site.operator("ops").await;
    let end = new.write_wal(64 << 10).await;
    new.wait_true(&format!(
        "select bool_or(flush_lsn >= '{end}') from pg_stat_replication where application_name = 'klio'"
    ))
    .await;
    site.stop().await;
    fs::remove_file(site.scratch(&format!("died-at-{DECIDING}"))).expect("it died once");
    site.start().await;
    let mut deciding = Running::spawn(
        "klio generation",
        follow_second(&site, &bundle),
        &site.scratch("decide.log"),
    );
    assert!(!deciding.wait_exit(PATIENCE).await.success(), "its server died");
    was_killed(site.server().wait_exit(PATIENCE).await, &armed);
    site.start().await;
    states(&site, &["older", "current"]).await;
    // Whoever was not told that it is done, and asks again, is told now.
    let again = programs::run(follow_second(&site, &bundle)).await;
    assert!(again.stderr.contains("generation 2 is current already"), "{again:?}");
    states(&site, &["older", "current"]).await;
    eventually("the decision in the bucket", PATIENCE, || async {
        let record = s3.bucket_dir().join("klio/main/generations.json");
        fs::read_to_string(record).is_ok_and(|text| text.contains("\"older\""))
    })
    .await;
}

fn follow_second(site: &Site, bundle: &Path) -> Command {
    site.klio_command_of(bundle, None, &["generation", "follow", "2", "--cluster", "main"])
}

/// Every backup that the server lists has its record in the bucket, also one whose upload was not queued (P4).
async fn in_tier_2(site: &Site, s3: &S3) {
    eventually("all backups in tier 2", PATIENCE, || async {
        let listed = site.klio(None, &["list", "--json"]).await.stdout;
        let listed: serde_json::Value = serde_json::from_str(&listed).map_err(|e| e.to_string())?;
        let backups = listed["backups"].as_array().ok_or("no list")?;
        let missing = backups.iter().filter_map(|backup| {
            let name = backup["name"].as_str()?;
            let record = s3.bucket_dir().join(format!("klio/main/backups/{name}.json"));
            (!record.exists()).then(|| name.to_owned())
        });
        let missing: Vec<String> = missing.collect();
        if missing.is_empty() { Ok(()) } else { Err(missing.join(" ")) }
    })
    .await;
}

async fn states(site: &Site, expected: &[&str]) {
    eventually("the histories", PATIENCE, || async {
        let list = site.klio(None, &["generation", "list", "--json"]).await.stdout;
        let list: serde_json::Value = serde_json::from_str(&list).ok()?;
        let states = list["generations"].as_array()?.iter().map(|g| g["state"].as_str());
        states.eq(expected.iter().map(|state| Some(*state))).then_some(())
    })
    .await;
}
