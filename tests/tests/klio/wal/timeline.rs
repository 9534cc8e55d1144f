//! Failover: a promoted standby's timeline continues, the old primary cannot come back over it (P8), gaps are recorded. Two
//! that write at once are `two_writers.rs`.

use klio_tests::{
    install_crypto,
    postgres::{Postgres, Stop},
    s3::S3,
    site::{PATIENCE, Site},
    wait::eventually,
};

/// No archive lag, in every place that tells: what an idle cluster must show.
async fn no_archive_lag(site: &Site, when: &str) {
    eventually(&format!("no archive lag {when}"), PATIENCE, || async {
        let status = site.status().await.ok_or("no status")?;
        let metrics = site.metrics().await;
        let gauge = |name| metrics.value(name, &[("cluster_name", "main")]);
        let size = gauge("klio_wal_archive_lag_size_bytes");
        let time = gauge("klio_wal_archive_lag_time_seconds");
        let even = status["archived_lsn"] == status["sealed_lsn"];
        let seen = format!("{size:?} {time:?} {status}");
        if even && (size, time) == (Some(0.0), Some(0.0)) { Ok(()) } else { Err(seen) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_promoted_standby_continues_and_the_old_primary_cannot_come_back() {
    install_crypto();
    let s3 = S3::new();
    let mut site = Site::new().await.tier2(&s3);
    site.start().await;
    let mut old = Postgres::builder().segment_mib(1).set("wal_keep_size", "1GB").start().await;
    let mut stream = site.stream(&old);
    let standby = old.standby().await;
    let end = old.write_wal(3 << 20).await;
    site.wait_flushed(end).await;
    stream.terminate(PATIENCE).await;
    // The last bytes of timeline 1 reach the standby only: its sidecar must fetch them from there.
    old.write_wal(300 << 10).await;
    let last = old.flush_lsn().await;
    standby.wait_true(&format!("select pg_last_wal_receive_lsn() >= '{last}'")).await;
    old.stop(Stop::Immediate).await;
    standby.promote().await;
    assert_eq!(standby.timeline().await.get(), 2);
    let _stream = site.stream(&standby);
    let end = standby.write_wal(3 << 20).await;
    eventually("timeline 2 to be durable", PATIENCE, || async {
        let status = site.status().await?;
        let flushed: klio_pg::Lsn = status["flushed_lsn"].as_str()?.parse().ok()?;
        (status["timeline"] == 2 && flushed >= end).then_some(())
    })
    .await;
    let archived = site.lsn("archived_lsn").await.expect("a position");
    let sealed = site.lsn("sealed_lsn").await.expect("a position");
    assert!(archived > klio_pg::Lsn::ZERO && archived <= sealed, "{archived} of {sealed}");
    // Both timelines and the history are there, and archived.
    let (code, history) = site.fetch("00000002.history").await;
    assert_eq!(code, Some(0));
    let own = std::fs::read(standby.pg_wal().join("00000002.history")).expect("the standby has it");
    assert_eq!(history, own);
    let size = standby.segment_size().await;
    let switch = standby.switch_wal().await;
    standby.write_wal(1).await;
    site.wait_archived(switch.segment_start(size)).await;
    no_archive_lag(&site, "after the promotion").await;
    eventually("both timelines in the bucket", PATIENCE, || async {
        let keys = s3.keys("klio/main/wal/");
        let has = |part: &str| keys.iter().any(|k| k.contains(part));
        has("/00000001/") && has("/00000002/") && has("00000002.history")
    })
    .await;
    let before = s3.keys("klio/main/wal/00000001/");
    // The old primary comes back as a standby of nobody, which writes nothing, and is refused: nothing changes.
    let signal = old.data_dir().join("standby.signal");
    std::fs::write(&signal, "").expect("write standby.signal");
    klio_tests::postgres::install::give(&signal);
    old.start().await;
    let mut refused = site.stream(&old);
    let status = refused.wait_exit(PATIENCE).await;
    assert_eq!(status.code(), Some(14), "{}", refused.log());
    for part in ["in recovery", "rebuild it", "klio timeline follow"] {
        assert!(refused.log().contains(part), "{part}: {}", refused.log());
    }
    assert_eq!(s3.keys("klio/main/wal/00000001/"), before);
    let flushed = site.lsn("flushed_lsn").await.expect("a position");
    assert!(flushed >= end);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_switch_of_timeline_is_followed_live() {
    install_crypto();
    let mut site = Site::new().await;
    site.start().await;
    let mut primary = Postgres::builder().segment_mib(1).set("wal_keep_size", "1GB").start().await;
    let standby = primary.standby().await;
    // Klio streams from the standby, which is promoted under it.
    let mut stream = site.stream(&standby);
    let end = primary.write_wal(2 << 20).await;
    site.wait_flushed(end).await;
    primary.stop(Stop::Immediate).await;
    standby.promote().await;
    let end = standby.write_wal(2 << 20).await;
    eventually("timeline 2 to be durable", PATIENCE, || async {
        let status = site.status().await?;
        let flushed: klio_pg::Lsn = status["flushed_lsn"].as_str()?.parse().ok()?;
        (status["timeline"] == 2 && flushed >= end).then_some(())
    })
    .await;
    assert!(stream.is_running(), "klio stream ended:\n{}", stream.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn wal_that_postgres_has_removed_is_recorded_as_a_gap_never_skipped_silently() {
    install_crypto();
    let s3 = S3::new();
    let mut site = Site::new().await.tier2(&s3);
    site.start().await;
    let pg = Postgres::builder()
        .segment_mib(1)
        .set("min_wal_size", "2MB")
        .set("max_wal_size", "4MB")
        .set("max_slot_wal_keep_size", "2MB")
        .start()
        .await;
    let mut stream = site.stream(&pg);
    let end = pg.write_wal(1 << 20).await;
    site.wait_flushed(end).await;
    stream.terminate(PATIENCE).await;
    for _ in 0..6 {
        pg.write_wal(4 << 20).await;
        pg.switch_wal().await;
        pg.execute("checkpoint").await;
    }
    pg.wait_true("select wal_status = 'lost' from pg_replication_slots where slot_name = 'klio'")
        .await;
    // One gap is what this is about: a slow machine must not make a second one.
    pg.execute("alter system set max_slot_wal_keep_size = -1").await;
    pg.execute("select pg_reload_conf()").await;
    let _stream = site.stream(&pg);
    let end = pg.write_wal(1 << 20).await;
    site.wait_flushed(end).await;
    let status = site.status().await.expect("status");
    assert_eq!(status["gaps"].as_array().map(Vec::len), Some(1), "{status}");
    // A loss of coverage is a non-zero exit, in the listing and in the metrics.
    let outcome = site.klio(None, &["status"]).await;
    assert_ne!(outcome.code, Some(0), "{}", outcome.stdout);
    let metrics = site.metrics().await;
    assert_eq!(metrics.value("klio_wal_gaps", &[("cluster_name", "main")]), Some(1.0));
    // What comes behind the gap is archived as ever, and the gap is no lag: an alarm that never ends is none.
    let size = pg.segment_size().await;
    pg.write_wal(2 << 20).await;
    let switch = pg.switch_wal().await;
    pg.write_wal(1).await;
    site.wait_archived(switch.segment_start(size)).await;
    no_archive_lag(&site, "behind the gap").await;
    let keys = s3.keys("klio/main/wal/");
    assert!(
        keys.iter().any(|key| key.ends_with(".partial.zst.age")),
        "the bytes before it: {keys:?}"
    );
    site.stop().await;
    site.start().await;
    no_archive_lag(&site, "after a restart").await;
    site.stop().await;
    std::fs::remove_dir_all(site.dir().join("data/queue")).expect("remove the queue");
    site.start().await;
    no_archive_lag(&site, "after the queue was deleted").await;
    pg.write_wal(2 << 20).await;
    let switch = pg.switch_wal().await;
    pg.write_wal(1).await;
    site.wait_archived(switch.segment_start(size)).await;
    no_archive_lag(&site, "at the end").await;
    let status = site.status().await.expect("status");
    assert_eq!(status["gaps"].as_array().map(Vec::len), Some(1), "still on record: {status}");
    // And with on_gap = "stop" it ends with its own exit status instead.
}
