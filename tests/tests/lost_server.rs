//! A server whose disk is lost, and a new one in its place with the same identity and the same bucket.
//!
//! P6: the new one's tier 1 begins in the middle of what the bucket holds. That is no reason to let go of anything.

use klio_storage::catalog::BackupRecord;
use klio_tests::{
    install_crypto,
    postgres::Postgres,
    s3::S3,
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
