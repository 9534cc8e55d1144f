//! `klio restore --standby`: from the archive to a standby that streams from its primary, stays one while nobody answers,
//! follows a failover, and is promoted by a person only. All with real PostgreSQL.

use super::rig::{LOCAL, Rig, rows};
use klio_tests::{
    postgres::{Postgres, Stop},
    programs,
    proof::Source,
    site::{PATIENCE, Site},
    wait::eventually,
};
use std::fs;

const SECRET: &str = "s3cr3t-word";

fn primary(pg: &Postgres) -> String {
    format!("{} password={SECRET}", pg.conninfo())
}

/// Restores as a standby of `of`; what it said holds no secret.
async fn restore(rig: &Rig, standby: &Postgres, of: Option<&Postgres>, more: &[&str]) -> String {
    let conninfo = of.map(primary);
    let primary = conninfo.as_ref().map(|text| ["--primary-conninfo", text.as_str()]);
    let primary = primary.as_ref().map_or(&[][..], |words| &words[..]);
    let args = [&["--standby"], primary, more].concat();
    let said = rig.files(Source::Server, standby, &args).await;
    let said = said.stdout + &said.stderr;
    assert!(!said.contains(SECRET), "{said}");
    standby.adopt();
    let data = standby.data_dir();
    assert!(data.join("standby.signal").exists() && !data.join("recovery.signal").exists());
    let auto = fs::read_to_string(data.join("postgresql.auto.conf")).expect("read");
    assert_eq!(auto.contains(SECRET), of.is_some(), "{auto}");
    assert!(auto.contains("recovery_target_timeline = 'latest'"), "{auto}");
    said
}

async fn wait_rows(standby: &Postgres, number: u32) {
    let sql = format!("select pg_is_in_recovery() and max(id) = {number} from t");
    standby.wait_true(&sql).await;
}

async fn streams(standby: &Postgres, slot: &str) {
    let sql = format!(
        "select count(*) = 1 from pg_stat_wal_receiver where status = 'streaming' and \
         coalesce(slot_name, '') = '{slot}'"
    );
    standby.wait_true(&sql).await;
}

async fn a_life_of_standbys(major: u32) {
    let mut rig = Rig::new(major, false).await;
    rig.row(1).await;
    rig.backup("one").await;
    rig.row(2).await;
    rig.pg.switch_wal().await;
    rig.flushed().await;
    rig.pg.value("select pg_create_physical_replication_slot('one', true)").await;

    let mut one = Postgres::empty(major);
    let said = restore(&rig, &one, Some(&rig.pg), &["--primary-slot-name", "one"]).await;
    for word in
        ["a standby of", "slot one", "password=***", "holds a password", "pg_create_physical"]
    {
        assert!(said.contains(word), "{word}: {said}");
    }
    one.start().await;
    wait_rows(&one, 2).await;
    streams(&one, "one").await;
    rig.row(3).await;
    wait_rows(&one, 3).await;

    // From what is archived alone, for ever behind it.
    let mut two = Postgres::empty(major);
    let said = restore(&rig, &two, None, &[]).await;
    assert!(said.contains("follows the archive alone"), "{said}");
    two.start().await;
    wait_rows(&two, 3).await;

    // Nobody answers restore_command; a restart changes nothing.
    rig.stream = None;
    rig.site.stop().await;
    rig.row(4).await;
    wait_rows(&one, 4).await;
    one.restart().await;
    streams(&one, "one").await;
    rig.row(5).await;
    wait_rows(&one, 5).await;
    wait_rows(&two, 3).await;
    rig.site.start().await;
    rig.stream = Some(rig.site.stream(&rig.pg));
    wait_rows(&two, 5).await;

    // Failover: the other one follows through the archive, and the old primary becomes a standby of the new one.
    rig.flushed().await;
    rig.stream = None;
    rig.pg.stop(Stop::Fast).await;
    one.promote().await;
    rig.stream = Some(rig.site.stream(&one));
    one.execute("insert into t values (6)").await;
    wait_rows(&two, 6).await;
    assert!(one.pg_wal().join("00000002.history").exists());
    restore(&rig, &rig.pg, Some(&one), &["--delta"]).await;
    assert!(rig.pg.pg_wal().join("00000002.history").exists());
    rig.pg.start().await;
    streams(&rig.pg, "").await;
    one.execute("insert into t values (7)").await;
    wait_rows(&rig.pg, 7).await;
    wait_rows(&two, 7).await;

    // And back: the copy that came by --delta is promoted.
    one.stop(Stop::Fast).await;
    rig.pg.promote().await;
    assert_eq!(rows(&rig.pg).await, 7);
    assert!(rig.pg.pg_wal().join("00000003.history").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_from_the_archive_streams_follows_a_failover_and_takes_over_on_15() {
    a_life_of_standbys(15).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_from_the_archive_streams_follows_a_failover_and_takes_over_on_18() {
    a_life_of_standbys(18).await;
}

/// What its files say of recovery, of another primary and of a tablespace elsewhere.
#[tokio::test(flavor = "multi_thread")]
async fn a_standby_takes_nothing_of_the_cluster_s_own_recovery_and_changes_no_wal() {
    let builder = Rig::builder(17)
        .set("primary_conninfo", "host=elsewhere")
        .set("archive_cleanup_command", "false")
        .set("hot_standby_feedback", "on");
    let rig = Rig::of(Site::new().await, builder.start().await, false).await;
    rig.backup("one").await;
    // Nobody has asked PostgreSQL yet: it reads them when it starts.
    let conf = rig.pg.data_dir().join("postgresql.conf");
    let text = fs::read_to_string(&conf).expect("read");
    fs::write(&conf, text + "recovery_target_time = '2020-01-01'\n").expect("write");
    rig.backup("two").await;
    rig.row(1).await;
    rig.flushed().await;
    let mut standby = Postgres::empty(17);
    let said = restore(&rig, &standby, None, &[]).await;
    assert!(said.contains("primary_conninfo of the cluster's own files is emptied"), "{said}");
    assert!(said.contains("recovery_target_time in postgresql.conf was made a comment"), "{said}");
    standby.start().await;
    wait_rows(&standby, 1).await;
    for (name, value) in [
        ("primary_conninfo", ""),
        ("archive_cleanup_command", ""),
        ("recovery_target_time", ""),
        ("hot_standby_feedback", "on"),
    ] {
        assert_eq!(standby.value(&format!("show {name}")).await, value, "{name}");
    }

    let place = rig.dir("place");
    let elsewhere = rig.dir("elsewhere");
    fs::create_dir(&place).expect("make");
    klio_tests::postgres::install::give(&place);
    rig.pg.execute(&format!("create tablespace late location '{}'", place.display())).await;
    rig.flushed().await;
    let map = format!("{}={}", place.display(), elsewhere.display());
    let words =
        ["made after the backup cannot go elsewhere on a standby", "take a base backup now"];
    rig.refused(&["--standby", "--tablespace-map", &map], LOCAL, &words).await;
}

/// PostgreSQL looks for newer timelines number by number: one that was decided against must not be the end of its way.
#[tokio::test(flavor = "multi_thread")]
async fn a_standby_comes_past_a_retired_timeline_to_the_one_that_is_followed() {
    let mut rig = Rig::new(15, false).await;
    rig.row(1).await;
    rig.backup("one").await;
    let copy = rig.pg.standby().await;
    copy.promote().await;
    let mistake = rig.site.stream(&copy);
    eventually("an undecided timeline", PATIENCE, || async {
        let list = rig.site.klio(None, &["timeline", "list"]).await;
        list.stdout.contains("undecided").then_some(()).ok_or(list.stdout)
    })
    .await;
    let bundle = rig.site.operator("ann").await;
    let retire = ["timeline", "retire", "2", "--cluster", "main"];
    let retired = programs::run(rig.site.klio_command_of(&bundle, None, &retire)).await;
    assert_eq!(retired.code, Some(0), "{}", retired.stderr);
    drop((mistake, copy));

    // One that has only the archive, and one that streams besides.
    rig.pg.switch_wal().await;
    rig.flushed().await;
    let mut archive = Postgres::empty(15);
    restore(&rig, &archive, None, &[]).await;
    archive.start().await;
    wait_rows(&archive, 1).await;

    // Production is restored: 2 is taken, so it becomes timeline 3.
    rig.stream = None;
    rig.pg.stop(Stop::Fast).await;
    rig.pg = rig.restored(Source::Server, &["--latest"]).await;
    assert_eq!(rig.pg.timeline().await.get(), 3);
    rig.stream = Some(rig.site.stream(&rig.pg));
    rig.row(2).await;
    rig.pg.switch_wal().await;
    rig.flushed().await;
    wait_rows(&archive, 2).await;
    // Its history of 2 is in no pg_wal of ours: a standby that streams gets over it by the archive, too.
    archive.stop(Stop::Fast).await;
    let auto = archive.data_dir().join("postgresql.auto.conf");
    let text = fs::read_to_string(&auto).expect("read");
    let streaming = format!("{text}primary_conninfo = '{}'\n", primary(&rig.pg));
    fs::write(&auto, streaming).expect("write");
    archive.start().await;
    streams(&archive, "").await;
}
