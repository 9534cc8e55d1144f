//! The oracle is right about PostgreSQL itself: without Klio, what is read back equals what is expected, over kills too.

use klio_tests::{
    postgres::Postgres,
    scratch::Scratch,
    workload::{self, Target, Workload, differences},
};
use std::time::Duration;

#[tokio::test(flavor = "multi_thread")]
async fn after_kills_postgres_holds_what_the_oracle_expects() {
    let mut pg = Postgres::builder()
        .set("max_prepared_transactions", "20")
        .set("wal_keep_size", "8GB")
        .start()
        .await;
    let scratch = Scratch::new("tablespaces");
    let places = scratch.join("places");
    let base = workload::setup(&pg, &places).await;
    let mut load = Workload::start(&pg, base, &places, 7, 0, false).await;
    for enough in [400, 800] {
        klio_tests::wait::eventually_now("transactions", Duration::from_secs(60), || {
            load.count() > enough
        })
        .await;
        pg.kill9();
        pg.start().await;
    }
    load.stop().await;
    pg.kill9();
    eprintln!("{:#?}", load.refusals());
    pg.start().await;
    let end = pg.insert_lsn().await;
    let oracle = load.finish(&pg).await;
    assert!(oracle.records.len() > 300, "{} records", oracle.records.len());
    let expected = oracle.expect_at(&Target::Latest, end).expect("the end of WAL");
    let found = workload::read(&pg).await.expect("readable");
    let differences = differences(&expected, &found);
    assert!(differences.is_empty(), "{differences:#?}");
    assert!(expected.tables.len() > 3 && !expected.large.is_empty() && expected.history.count > 50);
}
