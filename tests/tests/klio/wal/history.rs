//! One history (P11): what is held of a cluster is one PostgreSQL's, and another history is found at the first contact,
//! kept apart, remembered, and decided by a person.

use klio_tests::{
    client, install_crypto,
    postgres::{Postgres, Stop, install},
    process::Running,
    programs,
    proof::{Restored, Restorer, Source},
    s3::{Fault, Rule, S3},
    scratch::Scratch,
    site::{PATIENCE, Site},
    wait::eventually,
    workload::Target,
};
use serde_json::Value;
use std::{
    path::{Path, PathBuf},
    process::Command,
};

/// A small PostgreSQL that keeps its WAL.
async fn postgres() -> Postgres {
    Postgres::builder().segment_mib(1).set("wal_keep_size", "256MB").start().await
}

/// The whole directory, as a snapshot of the volume would keep it. PostgreSQL is stopped.
fn snapshot(pg: &Postgres, into: &Path) -> PathBuf {
    std::fs::create_dir_all(into).expect("a directory for the snapshot");
    let copy = into.join("snapshot");
    copy_tree(&pg.data_dir(), &copy);
    copy
}

fn copy_tree(from: &Path, to: &Path) {
    let status = Command::new("cp").arg("-a").arg(from).arg(to).status().expect("run cp");
    assert!(status.success(), "copy {from:?} to {to:?}");
}

/// The machine is set back: the directory is that of the snapshot again.
fn set_back(pg: &mut Postgres, snapshot: &Path) {
    pg.destroy_data();
    copy_tree(snapshot, &pg.data_dir());
}

async fn generations(site: &Site) -> Vec<Value> {
    let outcome = site.klio(None, &["generation", "list", "--json"]).await;
    let value: Value = serde_json::from_str(&outcome.stdout).expect("generations as JSON");
    value["generations"].as_array().expect("a list").clone()
}

fn states(generations: &[Value]) -> Vec<(u64, String)> {
    let state = |g: &Value| {
        let state = g["state"].as_str().expect("a state").to_owned();
        (g["generation"].as_u64().expect("a number"), state)
    };
    generations.iter().map(state).collect()
}

async fn wait_states(site: &Site, expected: &[(u64, &str)]) -> Vec<Value> {
    let wanted: Vec<_> = expected.iter().map(|(n, state)| (*n, (*state).to_owned())).collect();
    eventually(&format!("generations {expected:?}"), PATIENCE, || async {
        let found = generations(site).await;
        if states(&found) == wanted { Ok(found) } else { Err(found) }
    })
    .await
}

/// Everything of this PostgreSQL is acknowledged: a commit that waits for Klio would have returned.
async fn acknowledged(pg: &Postgres, lsn: klio_pg::Lsn) {
    pg.wait_true(&format!(
        "select coalesce(bool_or(flush_lsn >= '{lsn}'), false) from pg_stat_replication"
    ))
    .await;
}

/// The one problem that is left is that no sidecar is connected.
async fn only_nothing_streams(site: &Site) {
    eventually("nothing but the absent stream to be a problem", PATIENCE, || async {
        let said = site.klio(None, &["status"]).await.stdout;
        let problems = said.matches("problem: ").count();
        if problems == 1 && said.contains("problem: nothing streams") { Ok(()) } else { Err(said) }
    })
    .await;
}

async fn decide(site: &Site, bundle: &Path, words: &[&str]) -> programs::Outcome {
    let mut command = site.klio_command_of(bundle, None, words);
    command.env("KLIO_CLUSTER", "main");
    programs::run(command).await
}

/// t01 of the public reports: a volume's snapshot is put back, and PostgreSQL passes the point that the server has.
#[tokio::test(flavor = "multi_thread")]
async fn a_primary_that_was_set_back_is_received_apart_and_a_person_decides() {
    install_crypto();
    let s3 = S3::new();
    let mut site = Site::new().await.tier2(&s3);
    site.start().await;
    let mut pg = postgres().await;
    let mut stream = site.stream(&pg);
    pg.execute("create table t (who text)").await;
    let backup = site.klio(Some(&pg), &["backup", "--name", "b1", "--quiet"]).await;
    assert_eq!(backup.code, Some(0), "{}", backup.stderr);
    stream.terminate(PATIENCE).await;
    pg.stop(Stop::Fast).await;
    let kept = snapshot(&pg, &site.scratch("kept"));
    pg.start().await;
    let mut stream = site.stream(&pg);
    pg.execute("insert into t select 'lost' from generate_series(1, 5000)").await;
    let first = pg.write_wal(2 << 20).await;
    site.wait_flushed(first).await;
    stream.terminate(PATIENCE).await;
    pg.stop(Stop::Immediate).await;
    set_back(&mut pg, &kept);
    pg.start().await;
    pg.execute("insert into t select 'after' from generate_series(1, 9000)").await;
    let second = pg.write_wal(6 << 20).await;
    assert!(second > first, "it has passed the point that is held");
    let mut stream = site.stream(&pg);
    acknowledged(&pg, second).await;
    let found = wait_states(&site, &[(1, "current"), (2, "undecided")]).await;
    assert!(found[1]["reason"].as_str().expect("a reason").contains("timeline 1"), "{found:?}");
    // Nothing was mixed: what is held of the first is what it wrote, and status says what waits.
    let status = site.status().await.expect("status");
    assert_eq!(status["flushed_lsn"], first.to_string(), "{status}");
    let outcome = site.klio(None, &["status"]).await;
    assert_eq!(outcome.code, Some(3), "{}", outcome.stdout);
    assert!(outcome.stdout.contains("klio generation follow 2"), "{}", outcome.stdout);
    let metrics = site.metrics().await;
    let gauge = metrics.value("klio_cluster_undecided_generations", &[("cluster_name", "main")]);
    assert_eq!(gauge, Some(1.0));
    // A restart heals nothing and makes no third one.
    stream.terminate(PATIENCE).await;
    site.stop().await;
    site.start().await;
    let mut stream = site.stream(&pg);
    let third = pg.write_wal(1 << 20).await;
    acknowledged(&pg, third).await;
    wait_states(&site, &[(1, "current"), (2, "undecided")]).await;
    // Its backup goes to it, and to nothing else.
    let backup = site.klio(Some(&pg), &["backup", "--name", "b2", "--quiet"]).await;
    assert_eq!(backup.code, Some(0), "{}", backup.stderr);
    let listed = site.klio(None, &["list"]).await;
    assert!(listed.stdout.contains("b1") && !listed.stdout.contains("b2"), "{}", listed.stdout);
    let listed = site.klio(None, &["list", "--generation", "2"]).await;
    assert!(listed.stdout.contains("b2") && !listed.stdout.contains("b1"), "{}", listed.stdout);
    // Its WAL and its backup go to the bucket like any other's: a record comes last.
    let record = s3.bucket_dir().join("klio/main@2/backups/b2.json");
    eventually("the backup of generation 2 in the bucket", PATIENCE, || async { record.is_file() })
        .await;
    // The cluster's own certificate decides nothing; an operator's does, and the dry run changes nothing.
    let refused = site.klio(None, &["generation", "follow", "2"]).await;
    assert_eq!(refused.code, Some(15), "{}", refused.stderr);
    let bundle = site.operator("ops").await;
    let dry = decide(&site, &bundle, &["generation", "follow", "2", "--dry-run"]).await;
    assert_eq!(dry.code, Some(0), "{}", dry.stderr);
    assert!(dry.stdout.contains("1 base backup, b2"), "{}", dry.stdout);
    wait_states(&site, &[(1, "current"), (2, "undecided")]).await;
    let done = decide(&site, &bundle, &["generation", "follow", "2"]).await;
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    wait_states(&site, &[(1, "older"), (2, "current")]).await;
    // Nothing more is to come of the first: its end is in the bucket as well, to its last byte.
    let of_first = || s3.keys("klio/main/wal/");
    eventually("the end of generation 1 in the bucket", PATIENCE, || async {
        of_first().iter().any(|key| key.contains(".partial"))
    })
    .await;
    let fourth = pg.write_wal(1 << 20).await;
    acknowledged(&pg, fourth).await;
    assert!(stream.is_running(), "{}", stream.log());
    let outcome = site.klio(None, &["status"]).await;
    assert_eq!(outcome.code, Some(0), "{}", outcome.stdout);
    // The older one is still there, and a restore of it, from wherever, has its rows and no others.
    let listed = site.klio(None, &["list", "--generation", "1"]).await;
    assert!(listed.stdout.contains("b1"), "{}", listed.stdout);
    for (source, generation, expected) in [
        (Source::Bucket, 1, "lost"),
        (Source::Server, 1, "lost"),
        (Source::Bucket, 2, "after"),
        (Source::Server, 2, "after"),
    ] {
        let scratch = Scratch::new("older");
        let restorer = Restorer::new(&site, &s3, source, &scratch).generation(generation);
        let files = restorer.files(&Target::Latest, None, &[]).await;
        let mut restored = Restored::recover(files, false).await;
        let found = restored.pg.value("select string_agg(distinct who, ' ') from t").await;
        assert_eq!(found, expected, "generation {generation} from {source:?}");
        restored.stop().await;
    }
}

/// A supervisor starts klio stream again and again, and PostgreSQL writes past the point meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_history_stays_refused_whatever_it_writes_and_however_often_it_comes() {
    install_crypto();
    let mut site = Site::new().await;
    site.set("KLIO_WAL__ON_DIVERGENCE", "refuse");
    site.start().await;
    let mut pg = postgres().await;
    let mut stream = site.stream(&pg);
    let end = pg.write_wal(1 << 20).await;
    site.wait_flushed(end).await;
    stream.terminate(PATIENCE).await;
    pg.stop(Stop::Fast).await;
    let kept = snapshot(&pg, &site.scratch("kept"));
    pg.start().await;
    let mut stream = site.stream(&pg);
    let first = pg.write_wal(2 << 20).await;
    site.wait_flushed(first).await;
    stream.terminate(PATIENCE).await;
    pg.stop(Stop::Immediate).await;
    set_back(&mut pg, &kept);
    pg.start().await;
    // It has written nothing yet, then something, then more than is held.
    for bytes in [0, 300 << 10, 6 << 20] {
        if bytes > 0 {
            pg.write_wal(bytes).await;
        }
        let mut refused = site.stream(&pg);
        let status = refused.wait_exit(PATIENCE).await;
        assert_eq!(status.code(), Some(25), "{}", refused.log());
    }
    wait_states(&site, &[(1, "current"), (2, "refused")]).await;
    assert_eq!(site.lsn("flushed_lsn").await, Some(first));
    assert_eq!(site.klio(None, &["status"]).await.code, Some(3));
    let bundle = site.operator("ops").await;
    let done = decide(&site, &bundle, &["generation", "retire", "2"]).await;
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    let mut refused = site.stream(&pg);
    assert_eq!(refused.wait_exit(PATIENCE).await.code(), Some(25), "{}", refused.log());
    assert!(refused.log().contains("retired"), "{}", refused.log());
    only_nothing_streams(&site).await;
    // Set back to the same state once more: it left in the same place, and is not what was retired.
    pg.stop(Stop::Immediate).await;
    set_back(&mut pg, &kept);
    pg.start().await;
    for bytes in [0, 300 << 10, 6 << 20] {
        if bytes > 0 {
            pg.write_wal(bytes).await;
        }
        let mut refused = site.stream(&pg);
        assert_eq!(refused.wait_exit(PATIENCE).await.code(), Some(25), "{}", refused.log());
    }
    wait_states(&site, &[(1, "current"), (2, "retired"), (3, "refused")]).await;
}

/// Two copies of one state are promoted to the same number: their history files are the same, byte for byte.
#[tokio::test(flavor = "multi_thread")]
async fn twins_with_the_same_timeline_and_history_are_told_apart_by_their_wal() {
    install_crypto();
    let mut site = Site::new().await;
    site.start().await;
    let mut pg = postgres().await;
    let mut stream = site.stream(&pg);
    let (a, b) = (pg.standby().await, pg.standby().await);
    let end = pg.write_wal(1 << 20).await;
    site.wait_flushed(end).await;
    stream.terminate(PATIENCE).await;
    let last = pg.flush_lsn().await;
    for twin in [&a, &b] {
        twin.wait_true(&format!("select pg_last_wal_replay_lsn() >= '{last}'")).await;
    }
    pg.stop(Stop::Immediate).await;
    a.promote().await;
    b.promote().await;
    let mut first = site.stream(&a);
    let end = a.write_wal(1 << 20).await;
    acknowledged(&a, end).await;
    first.terminate(PATIENCE).await;
    let ours = b.write_wal(3 << 20).await;
    let _second = site.stream(&b);
    acknowledged(&b, ours).await;
    wait_states(&site, &[(1, "current"), (2, "undecided")]).await;
    assert_eq!(site.lsn("flushed_lsn").await, Some(a.flush_lsn().await));
    // Both at once, each into its own.
    let _first = site.stream(&a);
    let end = a.write_wal(1 << 20).await;
    acknowledged(&a, end).await;
    let end = b.write_wal(1 << 20).await;
    acknowledged(&b, end).await;
    wait_states(&site, &[(1, "current"), (2, "undecided")]).await;
}

/// Ordinary life makes no second history: a stop at a segment's exact end, a crash in the middle of writing.
#[tokio::test(flavor = "multi_thread")]
async fn restarts_crashes_and_exact_segment_ends_stay_one_history() {
    install_crypto();
    let mut site = Site::new().await;
    site.start().await;
    let mut pg = postgres().await;
    pg.execute("create table t (pad text)").await;
    for round in 0..3 {
        let mut stream = site.stream(&pg);
        pg.write_wal(700 << 10).await;
        let switch = pg.switch_wal().await;
        acknowledged(&pg, switch).await;
        stream.terminate(PATIENCE).await;
        let stream = site.stream(&pg);
        let end = pg.write_wal(100 << 10).await;
        acknowledged(&pg, end).await;
        // Writers are in the middle of records when all processes die.
        let writer = pg.start_pgbench(&["-n", "-T", "60", "-f", &script(&site, round)]);
        let more = klio_pg::Lsn::new(end.as_u64() + (2 << 20));
        site.wait_flushed(more).await;
        pg.kill9();
        drop(writer);
        drop(stream);
        pg.start().await;
    }
    let _stream = site.stream(&pg);
    let end = pg.write_wal(1 << 20).await;
    acknowledged(&pg, end).await;
    assert_eq!(states(&generations(&site).await), [(1, "current".to_owned())]);
    assert_eq!(site.klio(None, &["status"]).await.code, Some(0));
}

fn script(site: &Site, round: u32) -> String {
    let path = site.scratch("scripts").with_extension(round.to_string());
    let line =
        "insert into t select repeat(md5(random()::text), 600) from generate_series(1, 3);\n";
    std::fs::write(&path, line).expect("write a script");
    path.display().to_string()
}

/// pg_resetwal begins WAL anew: its first record follows nothing.
#[tokio::test(flavor = "multi_thread")]
async fn wal_that_was_reset_is_another_history() {
    install_crypto();
    let mut site = Site::new().await;
    site.start().await;
    let mut pg = postgres().await;
    let mut stream = site.stream(&pg);
    let end = pg.write_wal(2 << 20).await;
    site.wait_flushed(end).await;
    stream.terminate(PATIENCE).await;
    pg.stop(Stop::Fast).await;
    let program = install::bin_dir(pg.major()).join("pg_resetwal");
    let mut reset = install::command(&program);
    reset.arg("-f").arg(pg.data_dir());
    let reset = programs::run(reset).await;
    assert_eq!(reset.code, Some(0), "{}", reset.stderr);
    pg.start().await;
    let end = pg.write_wal(2 << 20).await;
    let _stream = site.stream(&pg);
    acknowledged(&pg, end).await;
    wait_states(&site, &[(1, "current"), (2, "undecided")]).await;
    let status = site.status().await.expect("status");
    assert_eq!(status["gaps"].as_array().map(Vec::len), Some(0), "{status}");
}

/// A wrong bundle, or pg_upgrade: another system identifier under the same name.
#[tokio::test(flavor = "multi_thread")]
async fn another_postgresql_under_the_same_name_is_a_generation_of_its_own() {
    install_crypto();
    let mut site = Site::new().await;
    site.start().await;
    let (old, new) = (postgres().await, postgres().await);
    let mut stream = site.stream(&old);
    let held = old.write_wal(1 << 20).await;
    acknowledged(&old, held).await;
    let backup = site.klio(Some(&old), &["backup", "--name", "b1", "--json"]).await;
    assert_eq!(backup.code, Some(0), "{}", backup.stderr);
    assert_eq!(generation_in(&backup), 1);
    let listed = site.klio(None, &["list"]).await;
    assert!(
        listed.stdout.starts_with("BACKUP"),
        "one generation is not mentioned: {}",
        listed.stdout
    );
    let upgraded = site.stream(&new);
    let end = new.write_wal(1 << 20).await;
    acknowledged(&new, end).await;
    wait_states(&site, &[(1, "current"), (2, "undecided")]).await;
    let held = old.write_wal(1 << 20).await;
    acknowledged(&old, held).await;
    let bundle = site.operator("ops").await;
    let done = decide(&site, &bundle, &["generation", "follow", "2"]).await;
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    // The former one is told so, and comes back for nothing.
    let status = stream.wait_exit(PATIENCE).await;
    assert_eq!(status.code(), Some(25), "{}", stream.log());
    assert!(stream.log().contains("older"), "{}", stream.log());
    let end = new.write_wal(1 << 20).await;
    acknowledged(&new, end).await;
    every_output_says_which_generation_it_is_about(&site).await;
    drop(upgraded);
}

fn generation_in(outcome: &programs::Outcome) -> u64 {
    let value: Value = serde_json::from_str(&outcome.stdout).expect("JSON");
    let plan = value.get("plan").unwrap_or(&value);
    plan["generation"].as_u64().unwrap_or_else(|| panic!("no generation in {value:#}"))
}

/// The second of two generations was just followed and has no backup yet.
async fn every_output_says_which_generation_it_is_about(site: &Site) {
    for words in [
        &["list"][..],
        &["list", "wal"],
        &["verify"],
        &["retention", "plan"],
        &["retention", "apply"],
        &["timeline", "list"],
    ] {
        let text = site.klio(None, words).await;
        assert!(text.stdout.starts_with("generation 2 of main\n"), "{words:?}: {}", text.stdout);
        let of_first = [words, &["--generation", "1", "--json"]].concat();
        assert_eq!(generation_in(&site.klio(None, &of_first).await), 1, "{words:?}");
    }
    let to = site.scratch("restored");
    let to = to.to_str().expect("UTF-8");
    let elsewhere =
        "cluster main has base backups in other generations, 1 in generation 1: use --generation 1";
    for words in [&["list"][..], &["verify"], &["restore", "--to", to, "--dry-run"], &["drill"]] {
        let said = site.klio(None, words).await.stderr;
        assert!(said.contains(elsewhere), "{words:?}: {said}");
    }
    let refused = site.klio(None, &["restore", "--to", to, "--dry-run"]).await.stderr;
    assert!(refused.contains("generation 2 of main: there is no base backup"), "{refused}");
    let named = ["restore", "--to", to, "--dry-run", "--generation", "1"];
    let planned = site.klio(None, &named).await;
    assert!(planned.stdout.contains("generation 1 of main"), "{planned:?}");
    assert_eq!(generation_in(&site.klio(None, &[&named[..], &["--json"]].concat()).await), 1);
}

/// It sends no digests: its stream goes on, and status says what nobody has proven.
#[tokio::test(flavor = "multi_thread")]
async fn a_sidecar_of_before_is_admitted_and_what_was_not_proven_is_shown() {
    install_crypto();
    let mut site = Site::new().await;
    site.start().await;
    let channel = client::connect(&site, &site.bundle()).await.expect("connect");
    let size = klio_pg::SegmentSize::new(1 << 20).expect("PostgreSQL allows 1 MiB");
    let start = klio_pg::Lsn::new(3 << 20);
    for round in 0..2 {
        let at = start.advance(round * 16384);
        let open = client::open("main", size, at);
        let mut stream = client::Stream::open(&channel, open).await.expect("admitted");
        stream.append(at, client::wal(at, 16384, size, 1)).await;
        stream.flushed(at.advance(16384)).await.expect("acknowledged");
    }
    let status = site.status().await.expect("status");
    let unproven = status["continuity_not_proven"].as_array().expect("a list").clone();
    assert_eq!(unproven.len(), 1, "not at first contact: {status}");
    assert_eq!(unproven[0]["at_lsn"], start.advance(16384).to_string());
    assert!(unproven[0]["reason"].as_str().is_some_and(|r| r.contains("older")), "{status}");
    drop(channel);
    // A note is no problem.
    only_nothing_streams(&site).await;
}

/// Somebody starts `klio stream` on a clone while production is backed up: that is no business of the backup.
#[tokio::test(flavor = "multi_thread")]
async fn a_clone_that_streams_during_a_backup_does_not_spoil_it() {
    install_crypto();
    let mut site = Site::new().await;
    site.start().await;
    let production =
        Postgres::builder().segment_mib(1).set("checkpoint_timeout", "1h").start().await;
    let _stream = site.stream(&production);
    production.execute("create table t as select generate_series(1, 200000) n").await;
    let end = production.write_wal(1 << 20).await;
    site.wait_flushed(end).await;
    // The backup has asked which history it is of, and waits for a checkpoint that takes its time.
    let backup = ["backup", "--checkpoint", "spread", "--name", "b1"];
    let command = site.klio_command(Some(&production), &backup);
    let mut backup = Running::spawn("klio backup", command, &site.scratch("backup.log"));
    production
        .wait_true("select bool_or(query ilike '%pg_backup_start%') from pg_stat_activity where pid <> pg_backend_pid()")
        .await;
    let clone = postgres().await;
    let _apart = site.stream(&clone);
    wait_states(&site, &[(1, "current"), (2, "undecided")]).await;
    production.execute("checkpoint").await;
    let status = backup.wait_exit(PATIENCE).await;
    assert!(status.success(), "{status}: {}", backup.log());
    let listed = site.klio(None, &["list", "--generation", "1"]).await;
    assert!(listed.stdout.contains("b1"), "{}", listed.stdout);
}

/// PostgreSQL removes WAL that no slot keeps.
async fn forget(pg: &Postgres) {
    pg.set("wal_keep_size", "0").await;
    for _ in 0..4 {
        pg.write_wal(2 << 20).await;
        pg.switch_wal().await;
        pg.execute("checkpoint").await;
    }
}

/// The server's disk is lost. Each history comes back as it was: the one that comes first, the one that comes second, and
/// the one that a person has retired.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_lost_tier_1_every_history_is_what_it_was_in_whatever_order_they_come() {
    install_crypto();
    let s3 = S3::new();
    let mut site = Site::new().await.tier2(&s3);
    site.set("KLIO_TIER2__RETRY_TIMEOUT_SECONDS", "1");
    site.start().await;
    let mut pg = postgres().await;
    let mut stream = site.stream(&pg);
    let twins = [pg.standby().await, pg.standby().await, pg.standby().await];
    let end = pg.write_wal(1 << 20).await;
    site.wait_flushed(end).await;
    stream.terminate(PATIENCE).await;
    let last = pg.flush_lsn().await;
    for twin in &twins {
        twin.wait_true(&format!("select pg_last_wal_replay_lsn() >= '{last}'")).await;
    }
    pg.stop(Stop::Immediate).await;
    let mut streams = Vec::new();
    for twin in &twins {
        twin.promote().await;
        streams.push(site.stream(twin));
        let end = twin.write_wal(3 << 20).await;
        acknowledged(twin, end).await;
    }
    let [production, clone, unwanted] = &twins;
    wait_states(&site, &[(1, "current"), (2, "undecided"), (3, "undecided")]).await;
    let bundle = site.operator("ops").await;
    let done = decide(&site, &bundle, &["generation", "retire", "3"]).await;
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    let known = [(1, "current"), (2, "undecided"), (3, "retired")];
    eventually("all of it in the bucket", PATIENCE, || async {
        let wal = |place: &str| s3.keys(&format!("klio/{place}/wal/00000002/"));
        let record = s3.bucket_dir().join("klio/main/generations.json");
        let record = std::fs::read_to_string(record).unwrap_or_default();
        let some = wal("main").len() >= 2 && wal("main@2").len() >= 2;
        let whole = wal("main@3").iter().any(|key| key.contains(".partial"));
        if some && whole && record.contains("retired") { Ok(()) } else { Err(s3.keys("klio")) }
    })
    .await;
    // The bucket is behind what is acknowledged, and only PostgreSQL still has the rest.
    s3.faults().inject(Rule::always(Fault::InternalError));
    for twin in [production, clone] {
        let end = twin.write_wal(2 << 20).await;
        acknowledged(twin, end).await;
    }
    for mut stream in streams.drain(..2) {
        stream.terminate(PATIENCE).await;
    }
    assert_eq!(streams[0].wait_exit(PATIENCE).await.code(), Some(25), "{}", streams[0].log());
    site.stop().await;
    std::fs::remove_dir_all(site.dir().join("data")).expect("lose the disk");
    s3.faults().heal();
    site.start().await;
    let mut streams = Vec::new();
    for twin in [clone, production] {
        streams.push(site.stream(twin));
        let end = twin.write_wal(1 << 20).await;
        acknowledged(twin, end).await;
    }
    wait_states(&site, &known).await;
    assert_eq!(site.lsn("flushed_lsn").await, Some(production.flush_lsn().await));
    let status = site.status().await.expect("status");
    assert_eq!(status["gaps"].as_array().map(Vec::len), Some(0), "{status}");
    // Of what the bucket has of the retired one, its PostgreSQL has only the last segment left.
    forget(unwanted).await;
    let mut refused = site.stream(unwanted);
    assert_eq!(refused.wait_exit(PATIENCE).await.code(), Some(25), "{}", refused.log());
    assert!(
        refused.log().contains("generation 3") && refused.log().contains("retired"),
        "{}",
        refused.log()
    );
    wait_states(&site, &known).await;
}
