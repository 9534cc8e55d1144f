//! Full disks: acknowledging stops, it is said, nothing is lost, and it goes on by itself when space returns.

use klio_tests::{
    install_crypto,
    mount::SmallDisk,
    postgres::Postgres,
    s3::S3,
    site::{PATIENCE, Site},
    wait::eventually,
};

async fn small() -> Postgres {
    Postgres::builder().segment_mib(1).set("wal_keep_size", "1GB").start().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_tier_1_stops_acknowledging_and_recovers_when_space_returns() {
    install_crypto();
    let pg = small().await;
    let mut site = Site::new().await;
    let disk = SmallDisk::mount(&site.tier1(), 24);
    site.start().await;
    let stream = site.stream(&pg);
    let size = pg.segment_size().await;
    let before = pg.write_wal(2 << 20).await;
    site.wait_flushed(before).await;
    let first = site.lsn("flushed_lsn").await.expect("a position");
    disk.fill();
    pg.write_wal(12 << 20).await;
    let end = pg.flush_lsn().await;
    eventually("the server to say that the disk is full", PATIENCE, || async {
        site.log().contains("DISK_FULL")
    })
    .await;
    // Not ready, and not acknowledged: what is flushed has not reached the end.
    eventually("/readyz to tell", PATIENCE, || async { site.probe("/readyz").await.0 == 503 })
        .await;
    let held = site.lsn("flushed_lsn").await.expect("a position");
    assert!(held >= first && held < end, "first {first}, held {held}, end {end}");
    // What was acknowledged is still given back while the disk is full.
    let name = pg.segment_of(before.segment_start(size)).await;
    let (code, content) = site.fetch(&name.to_string()).await;
    assert_eq!((code, content.len()), (Some(0), size.bytes() as usize));
    // A restart while full must lose nothing either.
    site.kill9();
    site.start().await;
    let status = site.status().await.expect("status");
    let after = status["flushed_lsn"].as_str().expect("a position").parse::<klio_pg::Lsn>();
    // What may only be seen in the page cache does not count before there is space to prove it (P1), and that is said.
    let said = status["problems"].to_string();
    let after = after.expect("an LSN");
    assert!(
        after >= held || (after >= first && said.contains("No space left on device")),
        "{held} acknowledged, {after} after the restart: {said}"
    );
    disk.relieve();
    site.wait_flushed(end).await;
    drop(stream);
    site.stop().await;
}

/// P4: the queue never slows down or blocks receiving WAL.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_holds_nothing_up_and_is_caught_up_with() {
    install_crypto();
    let pg = small().await;
    let s3 = S3::new();
    let mut site = Site::new().await.tier2(&s3);
    let disk = SmallDisk::mount(&site.dir().join("data/queue"), 16);
    site.start().await;
    let _stream = site.stream(&pg);
    let size = pg.segment_size().await;
    pg.write_wal(1 << 20).await;
    let end = pg.switch_wal().await.segment_start(size);
    pg.write_wal(1).await;
    site.wait_archived(end).await;
    disk.fill();
    let flushed = pg.write_wal(6 << 20).await;
    site.wait_flushed(flushed).await;
    let end = pg.switch_wal().await.segment_start(size);
    let last = pg.write_wal(1).await;
    site.wait_flushed(last).await;
    disk.relieve();
    site.wait_archived(end).await;
}
