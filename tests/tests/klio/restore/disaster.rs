//! docs/disaster.md does what it says: its commands are taken out of the page and run as they stand, with stock restic, age, zstd, curl
//! and PostgreSQL; only the values of its settings are replaced. No program of Klio runs meanwhile.

use klio_tests::{
    disaster::commands,
    install_crypto,
    postgres::{Postgres, Stop, install},
    programs,
    s3::{REGION, S3},
    scratch::Scratch,
    site::{PATIENCE, Site},
    timelines::wait_line,
    wait::{eventually, eventually_now},
    workload::{self, Oracle, Target, Workload, differences},
};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

/// Each segment comes through curl, age and zstd, one after the other: on a loaded machine that takes minutes.
const RECOVERY: Duration = Duration::from_secs(300);

/// PostgreSQL as the page starts it: a daemon, stopped in any case.
struct Daemon(PathBuf);

impl Drop for Daemon {
    fn drop(&mut self) {
        let mut stop = install::command(&install::client("pg_ctl"));
        stop.arg("-D").arg(&self.0).args(["-m", "immediate", "stop"]);
        let _ = stop.output();
    }
}

struct Lost {
    s3: S3,
    site: Site,
    pg: Postgres,
    places: PathBuf,
    scratch: Scratch,
    oracle: Oracle,
}

/// A cluster with a workload, a backup in the middle and everything archived; then its primary and its server are stopped.
async fn lose(plain: bool) -> Lost {
    install_crypto();
    let s3 = S3::new();
    let mut site = Site::new().await.tier2(&s3);
    if plain {
        site.set("KLIO_ENCRYPTION__OFF", "true");
    }
    site.start().await;
    let mut pg = Postgres::builder()
        .segment_mib(1)
        .set("max_prepared_transactions", "20")
        .set("wal_keep_size", "8GB")
        .start()
        .await;
    let scratch = Scratch::new("disaster");
    install::give(scratch.path());
    let places = scratch.join("places");
    let base = workload::setup(&pg, &places).await;
    let stream = site.stream(&pg);
    let mut load = Workload::start(&pg, base, &places, 11, 0, false).await;
    let more = async |count: usize| {
        let enough = load.count() + count;
        eventually_now("transactions", PATIENCE, || load.count() > enough).await;
    };
    more(200).await;
    let backup = site.klio(Some(&pg), &["backup"]).await;
    assert_eq!(backup.code, Some(0), "{}{}", backup.stdout, backup.stderr);
    more(300).await;
    load.stop().await;
    let segment = pg.segment_size().await;
    let switched = pg.switch_wal().await.segment_start(segment);
    pg.write_wal(1).await;
    site.wait_archived(switched).await;
    s3.wait_backup("main").await;
    pg.stop(Stop::Fast).await;
    drop(stream);
    site.stop().await;
    let mut oracle = load.finish(&pg).await;
    oracle.safe = switched;
    Lost { s3, site, pg, places, scratch, oracle }
}

fn give_all(path: &Path) {
    install::give(path);
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            give_all(&entry.path());
        } else {
            install::give(&entry.path());
        }
    }
}

/// What the page needs to know of a cluster with a site and a directory for what it makes.
fn settings(site: &Site, scratch: &Scratch) -> Vec<(&'static str, String)> {
    let text = |path: PathBuf| path.display().to_string();
    let identity = scratch.join("identity.txt");
    if let Some(kept) = site.identity() {
        fs::copy(kept, &identity).expect("copy the identity");
        install::give(&identity);
    }
    vec![
        ("CLUSTER", "main".to_owned()),
        ("IDENTITY", text(identity)),
        ("PGBIN", text(install::bin_dir(install::DEBIAN_MAJOR))),
        ("PGDATA", text(scratch.join("restored"))),
        ("WORK", text(scratch.join("work"))),
    ]
}

fn of_bucket(s3: &S3) -> Vec<(&'static str, String)> {
    let settings = s3.settings();
    vec![
        ("S3", s3.endpoint()),
        ("DIRECTORY", format!("{}/klio", settings.bucket)),
        ("AWS_DEFAULT_REGION", REGION.to_owned()),
        ("AWS_ACCESS_KEY_ID", settings.access_key.clone()),
        ("AWS_SECRET_ACCESS_KEY", settings.secret_key.clone()),
    ]
}

/// Runs the page and waits until recovery has ended; what the page's commands printed, and PostgreSQL's log. The restored cluster
/// listens where `pg` did.
async fn run_page(
    pg: &Postgres,
    scratch: &Scratch,
    way: &str,
    settings: &[(&'static str, String)],
) -> (Daemon, String, String) {
    let script = commands(&[way, "start"], settings);
    let file = scratch.join("script");
    fs::write(&file, &script).expect("write the script");
    let mut command: Command = install::command("/bin/bash".as_ref());
    command.args(["-euo", "pipefail"]).arg(&file).env("HOME", scratch.path());
    let daemon = Daemon(scratch.join("restored"));
    let outcome = programs::run(command).await;
    let log = || fs::read_to_string(scratch.join("work/postgres.log")).unwrap_or_default();
    assert_eq!(outcome.code, Some(0), "{}\n{}\n{}", outcome.stdout, outcome.stderr, log());
    eventually("recovery to end", RECOVERY, || async {
        pg.value("select not pg_is_in_recovery()").await == "t"
    })
    .await;
    (daemon, outcome.stdout, log())
}

impl Lost {
    /// Runs the page, and compares what comes back with what was there.
    async fn restore(self, way: &str, more: Vec<(&'static str, String)>) {
        workload::make_places(&self.places);
        let settings = [settings(&self.site, &self.scratch), more].concat();
        let (daemon, _, log) = run_page(&self.pg, &self.scratch, way, &settings).await;
        let redone = log.rsplit_once("redo done at ").expect("it recovered").1;
        let redone = redone.split(' ').next().and_then(|text| text.parse().ok()).expect("an LSN");
        let expected = self.oracle.expect_at(&Target::Latest, redone).expect("all of the archive");
        let found = workload::read(&self.pg).await.expect("readable");
        let differences = differences(&expected, &found);
        assert!(differences.is_empty(), "{differences:#?}");
        let check = self.pg.amcheck().await;
        assert_eq!(check.code, Some(0), "pg_amcheck: {}{}", check.stdout, check.stderr);
        drop(daemon);
    }
}

async fn from_bucket(plain: bool) {
    let lost = lose(plain).await;
    // The server's disk is gone, all but the identity, which the user keeps elsewhere.
    fs::remove_dir_all(lost.site.dir().join("data")).expect("lose the server's disk");
    if plain {
        // A record without another history, as after a stream whose continuity nothing proved.
        let record = r#"{"format":2,"crc32c":"0","body":{"version":1,"generations":[],"unproven":[{"generation":1}]}}"#;
        let file = lost.s3.bucket_dir().join("klio/main/generations.json");
        fs::write(file, record).expect("write to the bucket");
    }
    let more = of_bucket(&lost.s3);
    lost.restore("bucket", more).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_restores_from_the_bucket_alone() {
    from_bucket(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_restores_from_an_unencrypted_bucket() {
    from_bucket(true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_restores_from_the_files_of_a_server() {
    let lost = lose(false).await;
    lost.s3.faults().inject(klio_tests::s3::Rule::always(klio_tests::s3::Fault::Reset));
    let tier1 = lost.scratch.join("tier1");
    fs::rename(lost.site.tier1(), &tier1).expect("take the disk out");
    give_all(&tier1);
    let more = vec![("TIER1", tier1.display().to_string())];
    lost.restore("files", more).await;
}

/// PostgreSQL's own `latest` would follow it: its history is in the archive like any other.
#[tokio::test(flavor = "multi_thread")]
async fn the_page_does_not_follow_a_copy_that_streamed_by_mistake() {
    install_crypto();
    let s3 = S3::new();
    let mut site = Site::new().await.tier2(&s3);
    site.start().await;
    let mut pg = Postgres::builder().segment_mib(1).set("wal_keep_size", "1GB").start().await;
    let stream = site.stream(&pg);
    pg.write_wal(1).await;
    let backup = site.klio(Some(&pg), &["backup"]).await;
    assert_eq!(backup.code, Some(0), "{}{}", backup.stdout, backup.stderr);
    let copy = pg.standby().await;
    copy.promote().await;
    let mistake = site.stream(&copy);
    copy.execute("create table of_the_copy ()").await;
    let theirs = copy.write_wal(4 << 20).await;
    wait_line(&site, 2, "undecided", theirs).await;
    pg.execute("create table of_production ()").await;
    let segment = pg.segment_size().await;
    let switched = pg.switch_wal().await.segment_start(segment);
    pg.write_wal(1).await;
    site.wait_archived(switched).await;
    s3.wait_backup("main").await;
    let held = ["timelines.json", "wal/00000002.history"].map(|key| format!("klio/main/{key}"));
    eventually("the copy's history in the bucket", PATIENCE, || async {
        let keys = s3.keys("klio/main");
        let there = |key: &String| keys.iter().any(|k| k.strip_suffix(".age").unwrap_or(k) == key);
        held.iter().all(there).then_some(()).ok_or(keys)
    })
    .await;
    drop((stream, mistake, copy));
    pg.stop(Stop::Fast).await;
    site.stop().await;

    let scratch = Scratch::new("disaster");
    install::give(scratch.path());
    let settings = [settings(&site, &scratch), of_bucket(&s3)].concat();
    let (_daemon, said, _) = run_page(&pg, &scratch, "bucket", &settings).await;
    assert!(said.contains("timeline 2 is undecided: it is not followed"), "{said}");
    let there = async |table: &str| pg.value(&format!("select to_regclass('{table}')")).await;
    assert_eq!(there("of_production").await, "of_production", "{said}");
    assert_ne!(there("of_the_copy").await, "of_the_copy", "{said}");
    // The number of the copy's timeline is not given again.
    assert_eq!(pg.timeline().await.get(), 3);
}
