//! A restore ends where it said, or fails (P7): no break in WAL, wherever it comes from, is taken for the end.

use super::rig::{Rig, UNREACHABLE, ends, recover, rows};
use klio_pg::Lsn;
use klio_tests::{
    postgres::{Postgres, Stop, install},
    proof::Source,
    site::Site,
};
use serde_json::Value;
use std::{fs, io::Write, path::Path, process::Command};

/// What PostgreSQL says when WAL ends before the target.
const TOO_EARLY: &str = "recovery ended before configured recovery target was reached";

fn append(path: &Path, text: &str) {
    let mut file = fs::OpenOptions::new().append(true).open(path).expect("open");
    file.write_all(text.as_bytes()).expect("write");
}

/// The plan's recovery_target_lsn.
fn target(json: &str) -> Lsn {
    let json: Value = serde_json::from_str(json).expect("JSON");
    let settings = &json["plan"]["settings"];
    assert_eq!(settings["recovery_target_inclusive"], "true", "{json:#}");
    assert_eq!(settings["recovery_target_timeline"], "1", "{json:#}");
    let lsn = settings["recovery_target_lsn"].as_str().unwrap_or_else(|| panic!("{json:#}"));
    lsn.parse().expect("an LSN")
}

/// While the database goes on writing, the end is that of the plan; and a restore_command that says "no such file" too
/// early is no end.
async fn the_end_is_the_plan_s(major: u32) {
    let mut rig = Rig::new(major, false).await;
    rig.backup("only").await;
    rig.row(1).await;
    rig.flushed().await;
    let mut copy = Postgres::empty(major);
    let said = rig.files(Source::Server, &copy, &["--latest", "--json"]).await;
    let end = target(&said.stdout);
    rig.row(2).await;
    rig.pg.switch_wal().await;
    rig.row(3).await;
    rig.flushed().await;
    recover(&mut copy).await;
    assert_eq!((rows(&copy).await, copy.redo_done()), (1, Some(end)));

    // The last record lies in the segment that is being received.
    let mut copy = Postgres::empty(major);
    let said = rig.files(Source::Server, &copy, &["--latest", "--json"]).await;
    assert!(target(&said.stdout) > end);
    append(&copy.data_dir().join("postgresql.auto.conf"), "restore_command = 'false'\n");
    let log = ends(&mut copy).await;
    assert!(log.contains("FATAL") && !log.contains("archive recovery complete"), "{log}");

    // What was held when it was planned, and is not when PostgreSQL asks.
    let mut copy = Postgres::empty(major);
    rig.files(Source::Server, &copy, &["--latest"]).await;
    rig.stream = None;
    rig.site.stop().await;
    let wal = rig.site.wal_dir(1);
    let newest = fs::read_dir(&wal).expect("read").flatten().map(|entry| entry.path());
    let newest = newest.filter(|path| path.extension().is_some_and(|e| e == "open")).max();
    fs::remove_file(newest.expect("a segment")).expect("remove");
    rig.site.start().await;
    let log = ends(&mut copy).await;
    assert!(log.contains("FATAL") && !log.contains("archive recovery complete"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_newest_state_ends_where_the_plan_said_or_fails_on_15() {
    the_end_is_the_plan_s(15).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_newest_state_ends_where_the_plan_said_or_fails_on_16() {
    the_end_is_the_plan_s(16).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_newest_state_ends_where_the_plan_said_or_fails_on_17() {
    the_end_is_the_plan_s(17).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_newest_state_ends_where_the_plan_said_or_fails_on_18() {
    the_end_is_the_plan_s(18).await;
}

/// A restore_command that answers 1 behind the first segments: PostgreSQL has records, but not all.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_of_one_too_early_is_no_end() {
    let rig = Rig::new(15, false).await;
    rig.backup("only").await;
    let mut lsn = rig.row(1).await.lsn;
    for row in 2..5 {
        rig.pg.switch_wal().await;
        lsn = rig.row(row).await.lsn;
    }
    rig.flushed().await;
    let mut copy = Postgres::empty(15);
    rig.files(Source::Server, &copy, &["--latest"]).await;
    let auto = copy.data_dir().join("postgresql.auto.conf");
    let text = fs::read_to_string(&auto).expect("read");
    let command = text.lines().find_map(|l| l.strip_prefix("restore_command = '")).expect("set");
    let last = rig.pg.segment_of(lsn).await;
    append(
        &auto,
        &format!("restore_command = '[ %f \\!= {last} ] && {command}\n").replace("\\!", "!"),
    );
    let log = ends(&mut copy).await;
    assert!(log.contains(TOO_EARLY) && !log.contains("archive recovery complete"), "{log}");
    assert!(log.contains("redo done"), "it had begun: {log}");
}

/// One record longer than several segments, at the end: looked at from one segment it has no beginning or no end.
#[tokio::test(flavor = "multi_thread")]
async fn a_record_longer_than_segments_is_the_end_when_it_is_the_last() {
    let rig = Rig::new(15, false).await;
    rig.backup("only").await;
    rig.row(1).await;
    let sql = "select pg_logical_emit_message(false, 'x', repeat('b', 6000000))";
    rig.pg.value(sql).await;
    // Nothing else writes WAL, but a snapshot of running transactions may.
    rig.pg.execute("checkpoint").await;
    let long = rig.pg.value(sql).await;
    rig.pg.switch_wal().await;
    rig.flushed().await;
    let mut copy = Postgres::empty(15);
    let said = rig.files(Source::Server, &copy, &["--latest", "--json"]).await;
    let end: Lsn = long.parse().expect("an LSN");
    // The function gives where the record ends; it begins before that.
    assert!(target(&said.stdout).advance(6_500_000) > end, "{} {end}", target(&said.stdout));
    recover(&mut copy).await;
    assert_eq!(copy.redo_done(), Some(target(&said.stdout)));
}

/// Records that break off in WAL that is held are not its end: nothing is restored to "the last record".
#[tokio::test(flavor = "multi_thread")]
async fn records_that_break_off_before_the_held_end_are_refused() {
    let site = Site::unencrypted().await;
    let pg = Rig::builder(15).start().await;
    let rig = Rig::of(site, pg, false).await;
    rig.backup("only").await;
    let before = rig.row(1).await;
    rig.pg.switch_wal().await;
    let spoilt = rig.row(2).await;
    rig.pg.switch_wal().await;
    let after = rig.pg.switch_wal().await;
    rig.flushed().await;
    let name = rig.pg.segment_of(spoilt.lsn).await;
    let file = rig.site.wal_dir(1).join(format!("{name}.zst"));
    klio_tests::wait::eventually("the segment to be sealed", klio_tests::site::PATIENCE, || {
        let there = file.exists();
        async move { there.then_some(()) }
    })
    .await;
    let mut content = rig.site.decode(&file);
    let place = usize::try_from(spoilt.lsn.offset_in(rig.pg.segment_size().await)).expect("small");
    content[place - 300] ^= 1;
    let plain = rig.dir("segment");
    fs::write(&plain, content).expect("write");
    let mut zstd = Command::new("zstd");
    let status = zstd.args(["-q", "-f", "--check", "-o"]).arg(&file).arg(&plain).status();
    assert!(status.expect("zstd runs").success());
    let lsn = after.to_string();
    rig.refused(&["--target-lsn", &lsn], UNREACHABLE, &["WAL breaks off at", "checksum is wrong"])
        .await;
    rig.refused(&["--latest"], UNREACHABLE, &["WAL breaks off at", "--target-lsn"]).await;
    rig.refused(&["--target-name", "none"], UNREACHABLE, &["WAL breaks off at"]).await;
    // What lies before it can be reached.
    let mut copy = rig.restored(Source::Server, &["--target-lsn", &before.lsn.to_string()]).await;
    assert_eq!(rows(&copy).await, 1);
    copy.stop(Stop::Immediate).await;
    install::give(&plain);
}
