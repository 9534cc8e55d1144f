//! Decisions about histories after tier 1 was lost.

use super::{changing::NEVER, *};
use crate::base::stranger;
use klio_proto::Code;
use klio_storage::{
    generations::{Generations, State},
    layout::BaseObject,
    record,
};

/// The bucket's record: generation 2 is the current one, 3 is undecided.
fn known() -> Generations {
    let mut all = Generations { version: 3, ..Generations::default() };
    all.begin(stranger("set back", 7), 1.0, true).unwrap();
    all.follow(2, "ann", 2.0).unwrap();
    all.begin(stranger("a clone", 7), 3.0, true).unwrap();
    all
}

/// Regression test: after a lost tier 1 only the current generation was known there, so a decision was made without
/// asking the bucket, and did not reach it before klio-server was started again.
#[tokio::test(flavor = "multi_thread")]
async fn a_decision_after_a_lost_tier_1_is_made_on_the_bucket_s_record_and_reaches_it() {
    let (root, directory, s3) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), S3::start().await);
    let queue = TestQueue::up(directory.path()).await;
    let main = name("pg-1");
    let current = Generations::place(&main, 2);
    let key = BaseObject::Generations.key(&main);
    let far = || std::fs::read(s3.object(&key)).ok().and_then(|b| record::decode(&b, "far").ok());
    let object = s3.object(&key);
    std::fs::create_dir_all(object.parent().unwrap()).unwrap();
    std::fs::write(&object, record::encode(&known(), &key).unwrap()).unwrap();
    let base = base_store(root.path(), &queue, Some(tier2(&s3)));
    let test = Test::start_with(root.path(), &queue, &s3, Some(base.clone()), NEVER);
    // Only generation 2 streams again, and a decision needs the bucket.
    base.wal().pin(&current, pinned(7)).unwrap();
    s3.on_request(|_| Some(Fault::Status(503, "SlowDown")));
    let refused = base.change_generations(&main, |all| all.follow(3, "ann", 4.0)).await;
    assert_eq!(Code::of(&refused.unwrap_err()), Code::Unavailable);
    s3.heal();
    base.change_generations(&main, |all| all.follow(3, "ann", 4.0)).await.unwrap();
    eventually("the decision is in the bucket", || {
        far().is_some_and(|all: Generations| {
            (all.current(), all.get(2).map(|g| g.state)) == (3, Some(State::Older))
        })
    })
    .await;
    assert!(base.wal().clusters().contains(&main), "as after a restart");
    test.stop().await;
    queue.stop().await;
}

/// Regression test: generations that only the bucket had after tier 1 was lost were in no list of clusters, so nothing of
/// them ever expired or was verified, and no quota counted them.
#[tokio::test(flavor = "multi_thread")]
async fn generations_that_only_the_bucket_has_are_known_here_again() {
    let (root, directory, s3) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), S3::start().await);
    let queue = TestQueue::up(directory.path()).await;
    let main = name("pg-1");
    let [current, begun] = [2, 3].map(|number| Generations::place(&main, number));
    let put = |object: BaseObject, bytes: &[u8]| {
        let path = s3.object(&object.key(&main));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    };
    put(BaseObject::Generations, &record::encode(&known(), "generations").unwrap());
    let identity = serde_json::json!({
        "system_identifier": "7", "segment_size": SEGMENT, "postgres_version": 170_000,
    });
    put(BaseObject::Cluster, &record::encode(&identity, "cluster").unwrap());
    let undecided = serde_json::json!([{
        "timeline": 2, "standing": "undecided", "against": 1, "reason": "", "marked_unix": 1.0,
    }]);
    put(BaseObject::Timelines, &record::encode(&undecided, "timelines").unwrap());
    let base = base_store(root.path(), &queue, Some(tier2(&s3)));
    // Generation 2 streams again; nothing was received of generation 3 yet.
    base.wal().pin(&current, pinned(7)).unwrap();
    base.generations(&main).await.unwrap();
    assert!(base.wal().pinned(&main).is_none());
    let test = Test::start_with(root.path(), &queue, &s3, Some(base.clone()), NEVER);
    eventually("generation 1 is compared", || base.archives().records(&main).is_some()).await;
    assert_eq!(base.wal().pinned(&main), Some(pinned(7)));
    assert!(!base.wal().timelines(&main).is_empty(), "retention knows what is undecided");
    assert!(base.wal().pinned(&begun).is_none());
    test.stop().await;
    queue.stop().await;
}
