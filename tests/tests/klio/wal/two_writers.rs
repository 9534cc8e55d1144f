//! Two PostgreSQLs of one cluster write at once, on two timelines: a copy that was promoted and streams by mistake, or an old
//! primary behind a healed network. Both are received and acknowledged, neither evicts the other, a person decides.

use klio_tests::{
    install_crypto,
    postgres::{Postgres, Stop},
    s3::S3,
    site::{PATIENCE, Site},
    timelines::{self, decide, wait_line},
    wait::eventually,
};
use serde_json::Value;
use std::fs;

/// What a restore without any wish would follow.
async fn latest(site: &Site) -> (Value, String) {
    let args = ["restore", "--dry-run", "--json", "--to", "/tmp/klio-nowhere"];
    let outcome = site.klio(None, &args).await;
    let plan: Value = serde_json::from_str(&outcome.stdout).unwrap_or_default();
    (plan["plan"]["timeline"].clone(), format!("{}{}", outcome.stdout, outcome.stderr))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_is_promoted_and_streams_by_mistake_takes_nothing_from_production() {
    install_crypto();
    let s3 = S3::new();
    let mut site = Site::new().await.tier2(&s3);
    site.start().await;
    let production = Postgres::builder().segment_mib(1).set("wal_keep_size", "1GB").start().await;
    let mut stream = site.stream(&production);
    let end = production.write_wal(1 << 20).await;
    site.wait_flushed(end).await;
    let backup = site.klio(Some(&production), &["backup", "--checkpoint", "fast"]).await;
    assert_eq!(backup.code, Some(0), "{}", backup.stderr);
    // Every commit of production waits for Klio from here on: one that hangs hangs this test.
    production.set("synchronous_standby_names", "klio").await;

    let copy = production.standby().await;
    copy.promote().await;
    assert_eq!(copy.timeline().await.get(), 2);
    let mut mistake = site.stream(&copy);
    let theirs = copy.write_wal(1 << 20).await;
    wait_line(&site, 2, "undecided", theirs).await;
    let ours = production.write_wal(1 << 20).await;
    wait_line(&site, 1, "followed", ours).await;
    assert!(stream.is_running() && mistake.is_running());

    // Both are acknowledged, the cluster is production, and it is not well.
    copy.wait_true(&format!("select bool_or(flush_lsn >= '{theirs}') from pg_stat_replication"))
        .await;
    let status = site.status().await.expect("status");
    assert_eq!(status["timeline"], 1, "{status}");
    assert!(status["problems"].to_string().contains("timeline 2 is undecided"), "{status}");
    assert_eq!(status["other_timelines"][0]["timeline"], 2, "{status}");
    let code = site.klio(None, &["status"]).await.code;
    assert_eq!(code, Some(3));
    let metrics = site.metrics().await;
    let gauge = "klio_cluster_undecided_timelines";
    assert_eq!(metrics.value(gauge, &[("cluster_name", "main")]), Some(1.0));
    let (followed, said) = latest(&site).await;
    assert_eq!(followed, 1, "{said}");
    assert!(said.contains("--target-timeline 2"), "{said}");
    assert!(site.log().contains("two PostgreSQLs write"), "{}", site.log());

    // Neither a restart nor time decides.
    site.stop().await;
    site.start().await;
    let (ours, theirs) = (production.write_wal(1 << 20).await, copy.write_wal(1 << 20).await);
    wait_line(&site, 1, "followed", ours).await;
    wait_line(&site, 2, "undecided", theirs).await;
    eventually("the record in the bucket", PATIENCE, || async {
        s3.keys("klio/main").contains(&"klio/main/timelines.json".to_owned()).then_some(())
    })
    .await;

    // A tenant decides nothing, a dry run changes nothing.
    let outcome = site.klio(None, &["timeline", "retire", "2"]).await;
    assert_eq!(outcome.code, Some(15), "{}", outcome.stderr);
    let ann = site.operator("ann").await;
    let outcome = decide(&site, &ann, &["retire", "2", "--dry-run"]).await;
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert!(outcome.stdout.contains("nothing was changed"), "{}", outcome.stdout);
    assert!(outcome.stdout.contains("undecided -> retired"), "{}", outcome.stdout);
    assert!(mistake.is_running());
    let outcome = decide(&site, &ann, &["retire", "1"]).await;
    assert_eq!(outcome.code, Some(20), "what is followed: {}", outcome.stderr);
    assert!(outcome.stderr.contains("hint: klio timeline follow T"), "{}", outcome.stderr);

    // Retired: its stream ends, and stays ended; production goes on, and all is well.
    let outcome = decide(&site, &ann, &["retire", "2"]).await;
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    for _ in 0..2 {
        let status = mistake.wait_exit(PATIENCE).await;
        assert_eq!(status.code(), Some(26), "{}", mistake.log());
        mistake = site.stream(&copy);
    }
    let ours = production.write_wal(1 << 20).await;
    wait_line(&site, 1, "followed", ours).await;
    let all = timelines::list(&site).await;
    assert_eq!(all[1]["decided_by"], "ann", "{all:?}");
    let list = site.klio(None, &["generation", "list", "--json"]).await.stdout;
    let list: Value = serde_json::from_str(&list).expect("JSON");
    assert_eq!(list["generations"][0]["timeline"], 1, "{list:#}");
    assert_eq!(latest(&site).await.0, 1);
    let problems = site.status().await.expect("status")["problems"].clone();
    assert!(!problems.to_string().contains("undecided"), "{problems}");

    // A change of mind: the other side is ended for good, the copy is the cluster.
    drop(mistake);
    let outcome = decide(&site, &ann, &["follow", "2"]).await;
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let status = stream.wait_exit(PATIENCE).await;
    assert_eq!(status.code(), Some(26), "{}", stream.log());
    let mistake = site.stream(&copy);
    let theirs = copy.write_wal(1 << 20).await;
    wait_line(&site, 2, "followed", theirs).await;
    assert_eq!(site.status().await.expect("status")["timeline"], 2);

    // The loss of tier 1 takes no decision away: the bucket has them, and a new server goes on by them.
    let record = s3.bucket_dir().join("klio/main/timelines.json");
    eventually("the decision in the bucket", PATIENCE, || async {
        let text = fs::read_to_string(&record).unwrap_or_default();
        text.contains("followed").then_some(()).ok_or(text)
    })
    .await;
    drop(mistake);
    site.stop().await;
    fs::remove_dir_all(site.dir().join("data")).expect("lose the disk");
    site.start().await;
    let standings: Vec<Value> =
        timelines::list(&site).await.iter().map(|line| line["standing"].clone()).collect();
    assert_eq!(standings, ["retired", "followed"]);
    let mut refused = site.stream(&production);
    let status = refused.wait_exit(PATIENCE).await;
    assert_eq!(status.code(), Some(26), "{}", refused.log());
    let _mistake = site.stream(&copy);
    let theirs = copy.write_wal(1 << 20).await;
    wait_line(&site, 2, "followed", theirs).await;
    assert_eq!(site.status().await.expect("status")["timeline"], 2);
    assert_eq!(latest(&site).await.0, 2);
}

/// What its PostgreSQL was on before, and nobody has heard of, is the copy's, too.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_was_promoted_twice_leaves_nothing_to_follow_on_its_way() {
    install_crypto();
    let mut site = Site::new().await;
    site.start().await;
    let production = Postgres::builder().segment_mib(1).set("wal_keep_size", "1GB").start().await;
    let _stream = site.stream(&production);
    let end = production.write_wal(1 << 20).await;
    site.wait_flushed(end).await;
    let backup = site.klio(Some(&production), &["backup", "--checkpoint", "fast"]).await;
    assert_eq!(backup.code, Some(0), "{}", backup.stderr);
    let copy = production.standby().await;
    copy.promote().await;
    copy.write_wal(2 << 20).await;
    let again = copy.standby().await;
    again.promote().await;
    assert_eq!(again.timeline().await.get(), 3);

    let _mistake = site.stream(&again);
    let theirs = again.write_wal(1 << 20).await;
    wait_line(&site, 3, "undecided", theirs).await;
    let ours = production.write_wal(1 << 20).await;
    wait_line(&site, 1, "followed", ours).await;
    let all = timelines::list(&site).await;
    assert_eq!(all[1]["standing"], "undecided", "{all:?}");
    let (followed, said) = latest(&site).await;
    assert_eq!(followed, 1, "{said}");
    assert_eq!(site.status().await.expect("status")["timeline"], 1);
    let ann = site.operator("ann").await;
    let outcome = decide(&site, &ann, &["follow", "1"]).await;
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert_eq!(latest(&site).await.0, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_primary_that_still_writes_is_received_behind_the_fork_until_a_person_decides() {
    install_crypto();
    let mut site = Site::new().await;
    site.start().await;
    let old = Postgres::builder().segment_mib(1).set("wal_keep_size", "1GB").start().await;
    let stream = site.stream(&old);
    let standby = old.standby().await;
    let end = old.write_wal(1 << 20).await;
    site.wait_flushed(end).await;
    // Its network is split off: its stream is gone, and the standby is promoted.
    drop(stream);
    standby.promote().await;
    let _new = site.stream(&standby);
    let end = standby.write_wal(3 << 20).await;
    wait_line(&site, 2, "followed", end).await;
    // Healed: the old one wrote on meanwhile.
    let split = old.write_wal(2 << 20).await;
    let mut back = site.stream(&old);
    wait_line(&site, 1, "undecided", split).await;
    let end = standby.write_wal(1 << 20).await;
    wait_line(&site, 2, "followed", end).await;
    assert!(back.is_running());
    assert_eq!(site.klio(None, &["timeline", "list"]).await.code, Some(3));
    let ann = site.operator("ann").await;
    let outcome = decide(&site, &ann, &["follow", "2"]).await;
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let status = back.wait_exit(PATIENCE).await;
    assert_eq!(status.code(), Some(26), "{}", back.log());
    let end = standby.write_wal(1 << 20).await;
    wait_line(&site, 2, "followed", end).await;
}

/// No hand is needed where the old primary does not write any more, though its sidecar lives on.
#[tokio::test(flavor = "multi_thread")]
async fn a_planned_switchover_needs_no_hand() {
    install_crypto();
    let mut site = Site::new().await;
    site.start().await;
    let mut old = Postgres::builder().segment_mib(1).set("wal_keep_size", "1GB").start().await;
    let stream = site.stream(&old);
    let standby = old.standby().await;
    let end = old.write_wal(1 << 20).await;
    site.wait_flushed(end).await;
    old.stop(Stop::Fast).await;
    standby.promote().await;
    let _new = site.stream(&standby);
    let end = standby.write_wal(2 << 20).await;
    wait_line(&site, 2, "followed", end).await;
    assert!(timelines::list(&site).await.iter().all(|line| line["standing"] != "undecided"));
    drop(stream);
}

/// What is listed and decided under the cluster's name is about the generation that is followed.
#[tokio::test(flavor = "multi_thread")]
async fn the_timelines_of_a_cluster_are_those_of_the_generation_that_is_followed() {
    install_crypto();
    let mut site = Site::new().await;
    site.start().await;
    let first = Postgres::builder().segment_mib(1).start().await;
    let mut stream = site.stream(&first);
    let end = first.write_wal(1 << 20).await;
    wait_line(&site, 1, "followed", end).await;
    stream.terminate(PATIENCE).await;
    // After pg_upgrade, say.
    let production = Postgres::builder().segment_mib(1).set("wal_keep_size", "1GB").start().await;
    let _stream = site.stream(&production);
    production
        .wait_true(
            "select coalesce(bool_or(flush_lsn is not null), false) from pg_stat_replication",
        )
        .await;
    let operator = site.operator("ops").await;
    let mut follow =
        site.klio_command_of(&operator, None, &["generation", "follow", "2", "--cluster", "main"]);
    follow.stdin(std::process::Stdio::null());
    let followed = klio_tests::programs::run(follow).await;
    assert_eq!(followed.code, Some(0), "{}", followed.stderr);
    let end = production.write_wal(3 << 20).await;
    wait_line(&site, 1, "followed", end).await;

    let copy = production.standby().await;
    copy.promote().await;
    let mut mistake = site.stream(&copy);
    let theirs = copy.write_wal(1 << 20).await;
    wait_line(&site, 2, "undecided", theirs).await;
    let retired = decide(&site, &operator, &["retire", "2"]).await;
    assert_eq!(retired.code, Some(0), "{}{}", retired.stdout, retired.stderr);
    assert_eq!(mistake.wait_exit(PATIENCE).await.code(), Some(26), "{}", mistake.log());
    // The older generation has its own timelines still.
    let older = site.klio(None, &["timeline", "list", "--json", "--generation", "1"]).await;
    let older: Value = serde_json::from_str(&older.stdout).expect("timelines as JSON");
    assert_eq!(older["timelines"].as_array().map(Vec::len), Some(1), "{older}");
}

/// The timeline of a copy is retired and hidden from standbys, so the failover of production takes its number again.
async fn a_number_that_was_retired_is_taken_again(tier1_is_lost: bool) {
    install_crypto();
    let s3 = S3::new();
    let mut site = Site::new().await.tier2(&s3);
    site.start().await;
    let mut production =
        Postgres::builder().segment_mib(1).set("wal_keep_size", "1GB").start().await;
    let mut stream = site.stream(&production);
    let (standby, copy) = (production.standby().await, production.standby().await);
    let end = production.write_wal(1 << 20).await;
    site.wait_flushed(end).await;
    copy.promote().await;
    let mut mistake = site.stream(&copy);
    let theirs = copy.write_wal(3 << 20).await;
    wait_line(&site, 2, "undecided", theirs).await;
    let ann = site.operator("ann").await;
    let outcome = decide(&site, &ann, &["retire", "2"]).await;
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert_eq!(mistake.wait_exit(PATIENCE).await.code(), Some(26), "{}", mistake.log());
    let far = |name: &str| fs::read_to_string(s3.bucket_dir().join("klio/main").join(name));
    eventually("the retired timeline in the bucket", PATIENCE, || async {
        let marks = far("timelines.json").unwrap_or_default();
        let keys = s3.keys("klio/main/wal/00000002");
        let is_there = marks.contains("retired") && keys.iter().any(|key| key.contains("partial"));
        if is_there { Ok(()) } else { Err((marks, keys)) }
    })
    .await;
    let (history, before) = (far("wal/00000002.history"), s3.keys("klio/main/wal/00000002"));
    if tier1_is_lost {
        site.stop().await;
        fs::remove_dir_all(site.dir().join("data")).expect("lose the disk");
        site.start().await;
    }
    let ours = production.write_wal(5 << 20).await;
    wait_line(&site, 1, "followed", ours).await;

    production.stop(Stop::Fast).await;
    stream.terminate(PATIENCE).await;
    standby.promote().await;
    assert_eq!(standby.timeline().await.get(), 2, "the same number");
    // Its commits are acknowledged without a hand, beside what was retired.
    let _new = site.stream(&standby);
    let end = standby.write_wal(2 << 20).await;
    standby
        .wait_true(&format!(
            "select coalesce(bool_or(flush_lsn >= '{end}'), false) from pg_stat_replication"
        ))
        .await;
    let outcome = site.klio(None, &["generation", "list", "--json"]).await;
    let all: Value = serde_json::from_str(&outcome.stdout).expect("generations as JSON");
    let state = |n: usize| (&all["generations"][n]["state"], &all["generations"][n]["timeline"]);
    assert_eq!(state(0).0, "current", "{all:#}");
    assert_eq!((state(1).0, state(1).1), (&"undecided".into(), &2.into()), "{all:#}");
    assert_eq!(timelines::list(&site).await[1]["standing"], "retired");
    assert_eq!(far("wal/00000002.history").ok(), history.ok(), "nothing was mixed");
    assert_eq!(s3.keys("klio/main/wal/00000002"), before);
    // It is the cluster as soon as a person says so, and backed up like any other.
    let follow = ["generation", "follow", "2", "--cluster", "main"];
    let outcome = klio_tests::programs::run(site.klio_command_of(&ann, None, &follow)).await;
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let backup = site.klio(Some(&standby), &["backup", "--checkpoint", "fast"]).await;
    assert_eq!(backup.code, Some(0), "{}", backup.stderr);
    let end = standby.write_wal(1 << 20).await;
    wait_line(&site, 2, "followed", end).await;
    assert_eq!(latest(&site).await.0, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failover_takes_the_number_of_a_retired_timeline_again() {
    a_number_that_was_retired_is_taken_again(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failover_takes_the_number_again_after_the_loss_of_tier_1() {
    a_number_that_was_retired_is_taken_again(true).await;
}
