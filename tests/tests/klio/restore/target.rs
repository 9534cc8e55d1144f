//! What `--exclusive`, transaction ids with their epoch, and prepared transactions come to: PostgreSQL's own rows say it.

use super::rig::{Rig, UNREACHABLE, rows};
use klio_tests::{postgres::Stop, proof::Source, site::Site};

/// What was typed cannot be meant.
const CONFIG: Option<i32> = Some(4);

async fn before_and_behind(major: u32) {
    let rig = Rig::new(major, false).await;
    rig.row(1).await;
    rig.backup("only").await;
    let two = rig.row(2).await;
    let three = rig.row(3).await;
    let four = rig.row(4).await;
    rig.pg.execute("select pg_create_restore_point('here')").await;
    rig.row(5).await;
    rig.flushed().await;
    let session = rig.pg.session().await;
    let epoch = "select (pg_current_xact_id()::text::numeric::bigint >> 32)";
    let epoch: u64 = session.rows(epoch).await.expect("ask")[0][0].parse().expect("a number");
    let of_epoch =
        |epoch: u64| ((epoch << 32) + three.xid.parse::<u64>().expect("an id")).to_string();
    let full = of_epoch(epoch);
    for (args, expected) in [
        (vec!["--target-time", &three.time], 3),
        (vec!["--target-time", &three.time, "--exclusive"], 2),
        (vec!["--target-xid", &three.xid], 3),
        (vec!["--target-xid", &three.xid, "--exclusive"], 2),
        (vec!["--target-xid", &full, "--exclusive"], 2),
        // Between the rows: no record begins there but the next one.
        (vec!["--target-lsn", &two.lsn.to_string(), "--exclusive"], 2),
        (vec!["--target-name", "here"], 4),
    ] {
        let pg = rig.restored(Source::Server, &args).await;
        assert_eq!(rows(&pg).await, expected, "{args:?}");
    }
    // The last of all: there is no later record that would stop a recovery before it.
    let last = rig.row(6).await;
    rig.flushed().await;
    for (args, expected) in [
        (vec!["--target-time", &last.time, "--exclusive"], 5),
        (vec!["--target-xid", &last.xid, "--exclusive"], 5),
        (vec!["--target-xid", &last.xid], 6),
    ] {
        let pg = rig.restored(Source::Server, &args).await;
        assert_eq!(rows(&pg).await, expected, "{args:?}");
    }
    // A name, a moment of consistency and the end have no "before".
    for target in [&["--target-name", "here"][..], &["--target-immediate"], &["--latest"]] {
        let args = [target, &["--exclusive"]].concat();
        rig.refused(&args, CONFIG, &["--exclusive", "--target-time"]).await;
    }
    let other = of_epoch(epoch + 7);
    rig.refused(&["--target-xid", &other], UNREACHABLE, &["epoch"]).await;
    assert_eq!(four.rows, 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exclusive_end_is_before_what_an_inclusive_one_is_behind_on_15() {
    before_and_behind(15).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exclusive_end_is_before_what_an_inclusive_one_is_behind_on_18() {
    before_and_behind(18).await;
}

async fn prepared(major: u32) {
    let builder = Rig::builder(major).set("max_prepared_transactions", "10");
    let rig = Rig::of(Site::new().await, builder.start().await, false).await;
    let prepare = async |row: u32, name: &str| {
        let session = rig.pg.session().await;
        for sql in [
            "begin".to_owned(),
            format!("insert into t values ({row})"),
            format!("prepare transaction '{}'", name.replace('\'', "''")),
        ] {
            session.rows(&sql).await.expect("prepare");
        }
    };
    prepare(100, "old one").await;
    prepare(101, "old two").await;
    rig.backup("only").await;
    prepare(102, "it's new").await;
    let one = rig.row(1).await;
    rig.pg.execute("commit prepared 'old one'").await;
    rig.pg.execute("rollback prepared 'it''s new'").await;
    let two = rig.row(2).await;
    rig.flushed().await;
    let time = one.time.clone();
    for (args, names) in [
        (["--target-time", &time], vec!["it's new", "old one", "old two"]),
        (["--target-lsn", &two.lsn.to_string()], vec!["old two"]),
    ] {
        let dry = rig.dir("dry").display().to_string();
        let all = [&["restore", "--to", &dry, "--dry-run"], &args[..]].concat();
        let said = rig.klio(Source::Server, &all).await.stderr;
        for name in ["it's new", "old one", "old two"] {
            assert_eq!(
                said.contains(&format!("{name:?}")),
                names.contains(&name),
                "{args:?}: {said}"
            );
        }
        let mut pg = rig.restored(Source::Server, &args).await;
        let found = "select string_agg(gid, ',' order by gid) from pg_prepared_xacts";
        assert_eq!(pg.value(found).await, names.join(","), "{args:?}");
        pg.stop(Stop::Immediate).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_prepared_at_the_target_is_told_before_on_15() {
    prepared(15).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_prepared_at_the_target_is_told_before_on_18() {
    prepared(18).await;
}
