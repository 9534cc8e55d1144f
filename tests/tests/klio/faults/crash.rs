//! Everything that can be killed is killed with SIGKILL at random moments; nothing acknowledged is ever missing (P1, P2),
//! and no hand is needed. The seed is printed; `KLIO_TEST_SEED` repeats a run's choices.

use klio_tests::{
    env, install_crypto,
    postgres::{Postgres, pg_waldump},
    process::Running,
    s3::S3,
    site::{PATIENCE, Site},
    wait::{eventually, eventually_now},
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
    time::Duration,
};

fn dice() -> StdRng {
    StdRng::seed_from_u64(env::seed())
}

/// A random moment: the point of the test is that any will do.
async fn a_while(dice: &mut StdRng) {
    tokio::time::sleep(Duration::from_millis(dice.random_range(5..400))).await;
}

/// 50 rounds: load, SIGKILL for one of server, sidecar, nats-server and PostgreSQL, and on.
#[tokio::test(flavor = "multi_thread")]
async fn fifty_kills_under_load_lose_nothing_and_need_no_hand() {
    install_crypto();
    let mut dice = dice();
    let mut pg = Postgres::builder().segment_mib(1).set("wal_keep_size", "8GB").start().await;
    let s3 = S3::new();
    let mut site = Site::new().await.tier2(&s3);
    site.start().await;
    let mut stream = site.stream(&pg);
    pg.pgbench(&["-i", "-q", "-s", "1"]).await;
    let first = first_segment(&site, &pg).await;
    let mut highest = klio_pg::Lsn::ZERO;
    for round in 0..50 {
        let load = pg.start_pgbench(&["-n", "-c", "2", "-T", "600"]);
        a_while(&mut dice).await;
        match dice.random_range(0..4) {
            0 => {
                site.kill9();
                a_while(&mut dice).await;
                site.start().await;
            }
            1 => {
                stream.kill9();
                a_while(&mut dice).await;
                stream = site.stream(&pg);
            }
            2 => kill_nats(&mut site).await,
            _ => {
                pg.kill9();
                pg.start().await;
            }
        }
        drop(load);
        if let Some(flushed) = site.lsn("flushed_lsn").await {
            assert!(flushed >= highest, "round {round}: acknowledged {highest}, now {flushed}");
            highest = flushed;
        }
    }
    assert!(stream.is_running(), "klio stream ended:\n{}", stream.log());
    let size = pg.segment_size().await;
    let end = pg.switch_wal().await;
    pg.write_wal(1).await;
    site.wait_archived(end.segment_start(size)).await;
    compare_all(&site, &pg, first, end).await;
}

pub(super) async fn first_segment(site: &Site, pg: &Postgres) -> klio_pg::SegmentName {
    let size = pg.segment_size().await;
    let lsn =
        eventually("WAL to arrive", PATIENCE, || async { site.lsn("flushed_lsn").await }).await;
    let held = std::fs::read_dir(site.wal_dir(1)).expect("tier 1 has the timeline");
    let names = held.filter_map(|e| e.ok()?.file_name().to_str()?.get(..24)?.parse().ok());
    names.min().unwrap_or_else(|| klio_pg::SegmentName::containing(timeline(1), lsn, size))
}

fn timeline(n: u32) -> klio_pg::TimelineId {
    klio_pg::TimelineId::new(n).expect("not 0")
}

/// SIGKILL for the queue, which may just be starting again; the server must start another by itself.
async fn kill_nats(site: &mut Site) {
    let server = site.server().pid();
    let find = || {
        let children = klio_tests::process::descendants(server);
        (!children.is_empty()).then_some(children)
    };
    let children = eventually_now("a nats-server child", PATIENCE, find).await;
    children.iter().for_each(klio_tests::process::Descendant::kill9);
}

/// Every archived segment equals PostgreSQL's own.
pub(super) async fn compare_all(
    site: &Site,
    pg: &Postgres,
    first: klio_pg::SegmentName,
    end: klio_pg::Lsn,
) {
    let size = pg.segment_size().await;
    let mut name = first;
    let mut compared = 0;
    while name.start_lsn(size).expect("a segment") < end {
        let original = std::fs::read(pg.pg_wal().join(name.to_string())).expect("pg_wal keeps it");
        let (code, fetched) = site.fetch(&name.to_string()).await;
        assert!(code == Some(0) && fetched == original, "{name} differs, exit {code:?}");
        compared += 1;
        name = name.next(size).expect("a next segment");
    }
    println!("{compared} segments compared");
    assert!(compared > 3);
}

/// RPO 0: Klio is the only synchronous standby; PostgreSQL is killed and its data directory deleted. Every transaction
/// whose COMMIT returned has its commit record in Klio's WAL, as pg_waldump reads it.
#[tokio::test(flavor = "multi_thread")]
async fn every_commit_that_returned_is_in_klios_wal_after_the_primary_is_gone() {
    install_crypto();
    let mut dice = dice();
    for round in 0..3 {
        let mut pg = Postgres::builder().segment_mib(1).start().await;
        let mut site = Site::new().await;
        site.start().await;
        let _stream = site.stream(&pg);
        pg.execute("create table t (n int)").await;
        pg.set("synchronous_standby_names", "klio").await;
        pg.wait_true("select count(*) > 0 from pg_stat_replication where sync_state = 'sync'")
            .await;
        let first = first_segment(&site, &pg).await;
        let committed = Arc::new(Mutex::new(BTreeSet::<String>::new()));
        let mut clients = tokio::task::JoinSet::new();
        for _ in 0..3 {
            let (session, committed) = (pg.session().await, committed.clone());
            clients.spawn(async move {
                loop {
                    let begun = session
                        .rows("begin; insert into t values (1); select txid_current()")
                        .await;
                    let Ok(rows) = begun else { return };
                    let xid = rows[0][0].clone();
                    if session.rows("commit").await.is_err() {
                        return;
                    }
                    committed.lock().expect("not poisoned").insert(xid);
                }
            });
        }
        eventually("some commits", PATIENCE, || async {
            committed.lock().expect("not poisoned").len() > 20
        })
        .await;
        a_while(&mut dice).await;
        if round == 1 {
            // Klio crashes as well, in the middle of it all.
            site.kill9();
        }
        pg.kill9();
        pg.destroy_data();
        while clients.join_next().await.is_some() {}
        if round == 1 {
            site.start().await;
        }
        let committed = committed.lock().expect("not poisoned").clone();
        let found = commits_in_klio(&site, first).await;
        let missing: Vec<_> = committed.difference(&found).collect();
        assert!(
            missing.is_empty(),
            "round {round}: {} of {} commits missing: {missing:?}",
            missing.len(),
            committed.len()
        );
    }
}

/// Transaction ids with a commit record in what wal-fetch gives.
async fn commits_in_klio(site: &Site, first: klio_pg::SegmentName) -> BTreeSet<String> {
    let size = klio_pg::SegmentSize::new(1 << 20).expect("1 MiB");
    let dir = site.scratch("fetched-wal");
    std::fs::create_dir_all(&dir).expect("make a directory");
    let mut name = first;
    let mut last = None;
    loop {
        let (code, content) = site.fetch(&name.to_string()).await;
        match code {
            Some(0) => {
                std::fs::write(dir.join(name.to_string()), content).expect("write a segment")
            }
            Some(1) => break,
            other => panic!("wal-fetch {name}: exit {other:?}"),
        }
        last = Some(name);
        name = name.next(size).expect("a next segment");
    }
    let last = last.expect("at least one segment").to_string();
    let path = dir.display().to_string();
    // It ends with an error where the zeros after the last byte begin: that is the end of WAL.
    let outcome = pg_waldump(&["-p", &path, "-r", "Transaction", &first.to_string(), &last]).await;
    let commits = outcome.stdout.lines().filter(|line| line.contains("desc: COMMIT"));
    commits
        .filter_map(|line| {
            let rest = line.split_once("tx:")?.1;
            Some(rest.split_once(',')?.0.trim().to_owned())
        })
        .collect()
}

/// A sidecar that is killed leaves its place at once, and one that is stopped ends with status 0.
#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_stream_ends_well_and_everything_it_acknowledged_is_there() {
    install_crypto();
    let pg = Postgres::builder().segment_mib(1).start().await;
    let mut site = Site::new().await;
    site.start().await;
    let mut stream = site.stream(&pg);
    let end = pg.write_wal(3 << 20).await;
    site.wait_flushed(end).await;
    let status = stream.terminate(PATIENCE).await;
    assert!(status.success(), "{status}:\n{}", stream.log());
    // The slot knows what Klio has: nothing would be sent twice, nothing is kept for nobody.
    let confirmed = pg
        .value("select restart_lsn >= '0/0' from pg_replication_slots where slot_name = 'klio'")
        .await;
    assert_eq!(confirmed, "t");
    site.stop().await;
    site.start().await;
    let held = site.lsn("flushed_lsn").await.expect("a position");
    assert!(held >= end, "{held} < {end}");
    let again: Running = site.stream(&pg);
    let end = pg.write_wal(1 << 20).await;
    site.wait_flushed(end).await;
    drop(again);
}
