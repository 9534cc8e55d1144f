//! A restored copy whose tablespaces lie elsewhere takes the original's place: under its name, as one history (P11).

#[path = "restore/rig.rs"]
mod rig;

use klio_tests::{
    postgres::{Stop, install},
    proof::Source,
    site::PATIENCE,
    wait::eventually,
};
use rig::{Rig, rows};
use serde_json::Value;
use std::fs;

async fn into_production(major: u32) {
    let mut rig = Rig::new(major, false).await;
    rig.backup("only").await;
    let live = rig.dir("live");
    fs::create_dir(&live).expect("make");
    install::give(&live);
    rig.pg.execute(&format!("create tablespace later location '{}'", live.display())).await;
    rig.pg
        .execute("create table far tablespace later as select generate_series(1, 1000) as id")
        .await;
    rig.row(1).await;
    rig.flushed().await;
    rig.stream = None;
    rig.pg.stop(Stop::Fast).await;

    let map = format!("{}={}", live.display(), rig.dir("elsewhere").display());
    rig.pg = rig.restored(Source::Server, &["--latest", "--tablespace-map", &map]).await;
    rig.stream = Some(rig.site.stream(&rig.pg));
    let row = rig.row(2).await;
    eventually("the new timeline", PATIENCE, || async {
        let flushed = rig.site.lsn("flushed_lsn").await?;
        let status = rig.site.status().await?;
        (status["timeline"] == 2 && flushed >= row.lsn).then_some(())
    })
    .await;
    let outcome = rig.klio(Source::Server, &["generation", "list", "--json"]).await;
    let all: Value = serde_json::from_str(&outcome.stdout).expect("JSON");
    assert!(!outcome.stdout.contains("undecided"), "{all:#}");

    // And it is restored again, through the segment that begins with the changed record.
    fs::remove_dir_all(&live).expect("remove");
    let again = rig.restored(Source::Server, &["--latest"]).await;
    assert_eq!(rows(&again).await, 2);
    assert_eq!(again.value("select count(*) from far").await, "1000");
    assert!(!live.exists(), "it went back to the original's place");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_with_its_tablespaces_elsewhere_goes_on_under_the_same_name_on_15() {
    into_production(15).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_with_its_tablespaces_elsewhere_goes_on_under_the_same_name_on_17() {
    into_production(17).await;
}
