//! `klio check` finds what is not fit and says what to do; and the path that README.md describes works as it is written.

use klio_tests::{
    install_crypto,
    postgres::{Builder, Postgres},
    process::Running,
    programs::{self, Outcome},
    readme,
    s3::S3,
    site::{PATIENCE, Site},
    wait::eventually,
};
use serde_json::Value;
use std::{fs, process::Command};

/// One item of `klio check --json`.
#[derive(Debug, Clone)]
struct Item {
    state: String,
    name: String,
    text: String,
    hint: String,
}

/// The items and the exit status; every item that is not OK says what to do.
async fn check(site: &Site, dsn: &str) -> (Vec<Item>, Outcome) {
    let mut command = site.klio_command(None, &["check", "--json"]);
    command.env("KLIO_POSTGRES__DSN", dsn);
    let outcome = programs::run(command).await;
    let value: Value =
        serde_json::from_str(&outcome.stdout).unwrap_or_else(|_| panic!("{outcome:?}"));
    let text = |item: &Value, key: &str| item[key].as_str().unwrap_or_default().to_owned();
    let items = value["items"].as_array().expect("items").iter().map(|item| Item {
        state: text(item, "state"),
        name: text(item, "item"),
        text: text(item, "text"),
        hint: text(item, "hint"),
    });
    let items: Vec<Item> = items.collect();
    for item in &items {
        assert_eq!(item.hint.is_empty(), item.state == "OK", "{item:?}");
    }
    (items, outcome)
}

/// Exactly these items fail, and their text and hint together contain these words.
async fn fails(site: &Site, dsn: &str, expected: &[(&str, &[&str])]) {
    let (items, outcome) = check(site, dsn).await;
    assert_eq!(outcome.code, Some(3), "{items:#?}");
    let failed: Vec<&Item> = items.iter().filter(|i| i.state == "FAIL").collect();
    let names: Vec<&str> = failed.iter().map(|i| i.name.as_str()).collect();
    let wanted: Vec<&str> = expected.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, wanted, "{items:#?}");
    for (item, (_, words)) in failed.iter().zip(expected) {
        for word in *words {
            let all = format!("{} {}", item.text, item.hint);
            assert!(all.contains(word), "{word:?} is missing in {item:?}");
        }
    }
}

async fn running() -> Site {
    install_crypto();
    let mut site = Site::new().await;
    site.start().await;
    ready(&site).await;
    site
}

async fn ready(site: &Site) {
    eventually("/readyz", PATIENCE, || async { site.probe("/readyz").await.0 == 200 }).await;
}

fn small() -> Builder {
    Postgres::builder().segment_mib(1)
}

#[tokio::test(flavor = "multi_thread")]
async fn when_all_is_fit_every_line_is_ok() {
    install_crypto();
    let (pg, s3) = (small().start().await, S3::new());
    let mut site = Site::new().await.tier2(&s3);
    site.start().await;
    ready(&site).await;
    let (items, outcome) = check(&site, &pg.conninfo()).await;
    assert_eq!(outcome.code, Some(0), "{items:#?}");
    // Free space of the machine that runs the tests is its own affair.
    let odd: Vec<_> =
        items.iter().filter(|i| i.state != "OK" && !i.name.contains("tier 1")).collect();
    assert!(odd.is_empty(), "{odd:#?}");
    // It looks only: no slot is left behind, nothing is pinned.
    assert_eq!(pg.value("SELECT count(*) FROM pg_replication_slots").await, "0");
    assert!(!site.tier1().join("main").exists());
    // Also while it streams, and for people.
    let _stream = site.stream(&pg);
    site.wait_flushed(pg.write_wal(1).await).await;
    let outcome = site.klio(Some(&pg), &["check"]).await;
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert!(outcome.stdout.contains("OK    wal_level"), "{outcome:?}");
    assert!(outcome.stdout.contains(" 0 failed"), "{outcome:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_postgres_that_cannot_replicate_is_told_what_to_set() {
    let site = running().await;
    let pg = small().set("wal_level", "minimal").set("max_wal_senders", "0").start().await;
    let (items, outcome) = check(&site, &pg.conninfo()).await;
    assert_eq!(outcome.code, Some(3), "{items:#?}");
    let failed: Vec<_> = items.iter().filter(|i| i.state == "FAIL").collect();
    for (name, advice) in
        [("wal_level", "wal_level = replica"), ("max_wal_senders", "raise max_wal_senders")]
    {
        let item = failed.iter().find(|i| i.name == name);
        let item = item.unwrap_or_else(|| panic!("{name} does not fail: {items:#?}"));
        assert!(item.hint.contains(advice), "{item:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_may_not_replicate_and_a_wrong_password_are_told_apart() {
    let site = running().await;
    let pg = small()
        .hba("host all all 127.0.0.1/32 scram-sha-256")
        .hba("host replication all 127.0.0.1/32 scram-sha-256")
        .start()
        .await;
    pg.execute("CREATE ROLE plain LOGIN PASSWORD 'right'").await;
    pg.execute("CREATE ROLE fit LOGIN REPLICATION PASSWORD 'right'").await;
    let dsn = |user: &str, password: &str| {
        format!("host=127.0.0.1 port={} user={user} password={password} dbname=postgres", pg.port())
    };
    let (items, outcome) = check(&site, &dsn("fit", "right")).await;
    assert_eq!(outcome.code, Some(0), "{items:#?}");
    fails(&site, &dsn("plain", "right"), &[("postgres", &["ALTER ROLE ... REPLICATION"])]).await;
    fails(&site, &dsn("fit", "wrong"), &[("postgres", &["password"])]).await;
    let (items, _) = check(&site, &dsn("fit", "hunter2")).await;
    assert!(!format!("{items:?}").contains("hunter2"), "{items:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_free_slot_or_walsender_is_found_before_streaming_finds_it() {
    let site = running().await;
    let none = small().set("max_replication_slots", "0").start().await;
    fails(&site, &none.conninfo(), &[("max_replication_slots", &["0 of 0", "raise"])]).await;
    let taken = small().set("max_replication_slots", "1").set("max_wal_senders", "2").start().await;
    let (items, outcome) = check(&site, &taken.conninfo()).await;
    assert_eq!(outcome.code, Some(0), "{items:#?}");
    taken.execute("SELECT pg_create_physical_replication_slot('other')").await;
    fails(&site, &taken.conninfo(), &[("max_replication_slots", &["1 of 1", "drop a slot"])]).await;
    // Ours, once it exists, is not counted against itself.
    taken.execute("SELECT pg_drop_replication_slot('other')").await;
    taken.execute("SELECT pg_create_physical_replication_slot('klio')").await;
    let (items, outcome) = check(&site, &taken.conninfo()).await;
    assert_eq!(outcome.code, Some(0), "{items:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_end_that_is_down_is_one_failure_and_the_other_is_still_looked_at() {
    let mut site = running().await;
    let mut pg = small().start().await;
    site.stop().await;
    fails(&site, &pg.conninfo(), &[("server", &["is klio-server running"])]).await;
    site.start().await;
    ready(&site).await;
    pg.stop(klio_tests::postgres::Stop::Fast).await;
    fails(&site, &pg.conninfo(), &[("postgres", &["is PostgreSQL running"])]).await;
}

/// A documented command with this site's places instead of the documented ones.
fn real(command: &str, site: &Site, pg: &Postgres) -> Command {
    let bundle = site.bundle().display().to_string();
    let command = command
        .replace("/tmp/klio", &site.dir().display().to_string())
        .replace("/tmp/segment", &site.scratch("segment").display().to_string())
        .replace("-c ...", &format!("-c {bundle}"));
    let mut words = command.split_whitespace();
    let program = match words.next() {
        Some("klio-server") => programs::klio_server(),
        Some("klio") => programs::klio(),
        other => panic!("a program that is not ours: {other:?}"),
    };
    let mut real = programs::command(&program);
    real.args(words).env("KLIO_POSTGRES__DSN", pg.conninfo());
    real
}

#[tokio::test(flavor = "multi_thread")]
async fn the_path_by_hand_in_the_readme_works_as_written() {
    install_crypto();
    let pg = Postgres::new().await;
    // Only the ports differ from what is documented: `Site` has run `init` with them.
    let mut site = Site::new().await;
    let mut commands = readme::commands("## By hand", &["klio"]).into_iter();
    let mut next = |begin: &str| {
        let command = commands.next().unwrap_or_else(|| panic!("{begin}: README.md has no more"));
        assert!(command.starts_with(begin), "expected {begin}, found {command:?} in README.md");
        command
    };
    assert_eq!(next("klio-server init"), "klio-server init /tmp/klio --cluster main");
    assert_eq!(next("klio-server run"), "klio-server run -c /tmp/klio/klio-server.toml");
    site.start().await;
    ready(&site).await;
    let run = async |command: &str| {
        let outcome = programs::run(real(command, &site, &pg)).await;
        assert_eq!(outcome.code, Some(0), "{command}: {outcome:?}");
        outcome
    };
    run(&next("klio check")).await;
    let stream = real(&next("klio stream"), &site, &pg);
    let mut stream = Running::spawn("klio stream", stream, &site.scratch("stream.log"));
    site.wait_flushed(pg.write_wal(1 << 20).await).await;
    pg.set("synchronous_standby_names", "klio").await;
    pg.wait_true("SELECT count(*) = 1 FROM pg_stat_replication WHERE sync_state = 'sync'").await;
    let original = fs::read(pg.pg_wal().join("000000010000000000000001"));
    let end = pg.switch_wal().await;
    site.wait_flushed(pg.write_wal(1).await).await;
    assert!(original.is_ok(), "a new cluster begins with segment 1");
    let size = pg.segment_size().await;
    eventually("the first segment to be sealed", PATIENCE, || async {
        site.lsn("sealed_lsn").await >= Some(end.segment_start(size))
    })
    .await;
    let outcome = run(&next("klio status")).await;
    assert!(outcome.stdout.contains("main") && outcome.stdout.contains("connected"), "{outcome:?}");
    let outcome = run(&next("klio list wal")).await;
    assert!(outcome.stdout.contains("tier1"), "{outcome:?}");
    let fetch = next("klio wal-fetch");
    run(&fetch).await;
    let original = fs::read(pg.pg_wal().join("000000010000000000000001")).expect("kept");
    assert!(fs::read(site.scratch("segment")).expect("fetched") == original, "{fetch}: differs");
    run("klio-server client app@other -c /tmp/klio/klio-server.toml").await;
    run("klio-server client ops --admin -c /tmp/klio/klio-server.toml").await;
    pg.set("synchronous_standby_names", "").await;
    assert!(stream.terminate(PATIENCE).await.success());
    run("klio slot drop -c ...").await;
    assert_eq!(pg.value("SELECT count(*) FROM pg_replication_slots").await, "0");
}
