//! A few rounds of the restore proof; `make soak` runs as many as wanted.

use klio_tests::proof::{Plan, round};

async fn good(seed: u64) {
    let report = round(seed, &Plan::test()).await;
    eprintln!("seed {seed}: {report}");
    assert!(!report.restores.is_empty(), "{report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn restores_to_random_targets_hold_what_was_there() {
    good(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn restores_to_random_targets_hold_what_was_there_again() {
    good(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn restores_to_random_targets_hold_what_was_there_once_more() {
    good(3).await;
}
