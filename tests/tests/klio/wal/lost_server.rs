//! A server whose disk is lost, and a new one in its place with the same identity and the same bucket.
//!
//! P6: the new one's tier 1 begins in the middle of what the bucket holds. That is no reason to let go of anything.
//! P8: and what the bucket knows of a cluster counts as before: no stranger and no old primary is welcome.

use klio_storage::catalog::BackupRecord;
use klio_tests::{
    install_crypto,
    postgres::Postgres,
    s3::{Fault, Rule, S3},
    site::{PATIENCE, Site},
    wait::eventually,
};
use serde_json::Value;
use std::{collections::BTreeSet, fs};

/// Three whole segments and a bit, all in the bucket.
async fn archive_some(site: &Site, pg: &Postgres) {
    let segment = pg.segment_size().await;
    pg.write_wal(3 * segment.bytes()).await;
    let switched = pg.switch_wal().await.segment_start(segment);
    pg.write_wal(1).await;
    site.wait_archived(switched).await;
}

async fn backup(site: &Site, pg: &Postgres, s3: &S3, name: &str) -> BackupRecord {
    let taken = site.klio(Some(pg), &["backup", "--json", "--name", name]).await;
    assert_eq!(taken.code, Some(0), "{}{}", taken.stdout, taken.stderr);
    let key = format!("klio/main/backups/{name}.json");
    eventually(&key, PATIENCE, || async {
        s3.keys("klio/main/backups").contains(&key).then_some(())
    })
    .await;
    let json: Value = serde_json::from_str(&taken.stdout).expect("JSON");
    serde_json::from_value(json["backup"].clone()).expect("a record")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_server_in_place_of_a_lost_one_lets_nothing_go_that_older_backups_need() {
    install_crypto();
    let s3 = S3::new();
    let pg = Postgres::builder().segment_mib(1).start().await;
    let mut site = Site::new().await.tier2(&s3);
    site.start().await;
    let stream = site.stream(&pg);
    let first = backup(&site, &pg, &s3, "first").await;
    archive_some(&site, &pg).await;
    drop(stream);
    site.stop().await;
    let begins = pg.segment_of(first.start_lsn).await.to_string();
    let needed: BTreeSet<String> = s3
        .keys("klio/main/wal")
        .into_iter()
        .filter(|key| key.rsplit('/').next().is_some_and(|name| *name >= *begins))
        .collect();
    assert!(needed.len() >= 4, "{needed:?}");

    fs::remove_dir_all(site.dir().join("data")).expect("lose the disk");
    site.start().await;
    let _stream = site.stream(&pg);
    archive_some(&site, &pg).await;
    // Maintenance comes with it.
    backup(&site, &pg, &s3, "second").await;
    let applied = site.klio(None, &["retention", "apply"]).await;
    assert_eq!(applied.code, Some(0), "{}{}", applied.stdout, applied.stderr);
    let held: BTreeSet<String> = s3.keys("klio/main/wal").into_iter().collect();
    let lost: Vec<&String> = needed.difference(&held).collect();
    assert!(lost.is_empty(), "retention let go what backup first needs: {lost:?}");
    let to = site.scratch("restored").display().to_string();
    let args = ["restore", "--dry-run", "--latest", "--backup", "first", "--to", &to];
    let planned = site.klio(None, &args).await;
    assert_eq!(planned.code, Some(0), "{}{}", planned.stdout, planned.stderr);
    // WAL that only the bucket has is looked at like the rest.
    let verified = site.klio(None, &["verify", "--wal"]).await;
    assert_eq!(verified.code, Some(0), "{}{}", verified.stdout, verified.stderr);
    let behind = pg.segment_of(first.stop_lsn).await.to_string();
    let victim = needed.iter().find(|key| {
        key.rsplit('/').next().is_some_and(|name| !name.starts_with(&behind) && *name > *behind)
    });
    let victim = victim.expect("WAL behind the first backup");
    fs::remove_file(s3.bucket_dir().join(victim)).expect("lose an object");
    let verified = site.klio(None, &["verify", "--wal"]).await;
    assert_ne!(verified.code, Some(0), "{victim} is gone: {}{}", verified.stdout, verified.stderr);
    assert!(verified.stdout.contains("is missing"), "{}{}", verified.stdout, verified.stderr);
    site.stop().await;
}

/// P8: an empty tier 1 is no reason to take WAL of another PostgreSQL, or of an old primary, into a cluster's prefix.
#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_and_an_old_primary_are_refused_though_only_the_bucket_knows_the_cluster() {
    install_crypto();
    let s3 = S3::new();
    let (pg, stranger) = (Postgres::builder().segment_mib(1).start().await, Postgres::new().await);
    let mut site = Site::new().await.tier2(&s3);
    site.set("KLIO_TIER2__RETRY_TIMEOUT_SECONDS", "1");
    site.set("KLIO_WAL__ON_DIVERGENCE", "refuse");
    site.start().await;
    let stream = site.stream(&pg);
    archive_some(&site, &pg).await;
    eventually("what identifies the cluster in the bucket", PATIENCE, || async {
        s3.keys("klio/main").contains(&"klio/main/cluster.json".to_owned()).then_some(())
    })
    .await;
    let standby = pg.standby().await;
    drop(stream);
    site.stop().await;
    fs::remove_dir_all(site.dir().join("data")).expect("lose the disk");
    let before = s3.keys("klio");
    site.start().await;

    let mut refused = site.stream(&stranger);
    let status = refused.wait_exit(PATIENCE).await;
    assert_eq!(status.code(), Some(17), "{}", refused.log());
    let (own, other) = (pg.system_identifier().await, stranger.system_identifier().await);
    for part in [own.to_string(), other.to_string(), "s3://".to_owned()] {
        assert!(refused.log().contains(&part), "{part}: {}", refused.log());
    }

    // As a promoted standby would have left it.
    let newer = s3.bucket_dir().join("klio/main/wal/00000002.history.age");
    fs::write(&newer, "x").expect("write to the bucket");
    // One that writes would be received beside it, as undecided; a standby proves nothing.
    let mut refused = site.stream(&standby);
    let status = refused.wait_exit(PATIENCE).await;
    assert_eq!(status.code(), Some(14), "{}", refused.log());
    assert!(refused.log().contains("s3://"), "{}", refused.log());
    fs::remove_file(&newer).expect("remove from the bucket");
    assert!(!site.wal_dir(1).exists(), "WAL was taken");
    assert_eq!(s3.keys("klio"), before);

    // Nobody knows while the bucket does not answer: WAL waits in PostgreSQL, and goes on by itself.
    s3.faults().inject(Rule::always(Fault::InternalError));
    let mut waiting = site.stream(&pg);
    waiting.wait_log("does not say how far its WAL reaches", PATIENCE).await;
    let end = pg.write_wal(1 << 20).await;
    assert!(waiting.is_running() && !site.wal_dir(1).exists(), "{}", waiting.log());
    s3.faults().heal();
    site.wait_flushed(end).await;
    // From now on tier 1 knows, and the bucket may be down (P4).
    s3.faults().inject(Rule::always(Fault::InternalError));
    drop(waiting);
    let _stream = site.stream(&pg);
    let end = pg.write_wal(1 << 20).await;
    site.wait_flushed(end).await;
}
