//! Objects whose content changes during their upload.

use super::*;
use klio_storage::{layout::BaseObject, record::Unknown, wal::LevelChange};

/// An interval so long that nothing is compared and only jobs cause uploads.
pub(super) const NEVER: u32 = 3600;

fn level(segments: f64, minimal: bool) -> LevelChange {
    let (timeline, lsn) = (TimelineId::new(1).unwrap(), lsn(segments));
    LevelChange { timeline, lsn, minimal, unknown: Unknown::default() }
}

/// Regression test: a decision made during the upload of the record before it reached the bucket only with the next
/// comparison. The queue accepts no second job for an object, and the first one had read the old content.
#[tokio::test(flavor = "multi_thread")]
async fn what_changes_while_it_is_uploaded_is_uploaded_again_at_once() {
    let (root, directory, s3) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), S3::start().await);
    let queue = TestQueue::up(directory.path()).await;
    let base = base_store(root.path(), &queue, Some(tier2(&s3)));
    base.wal().pin(&name("pg-1"), pinned(7)).unwrap();
    let key = BaseObject::WalLevels.key(&name("pg-1"));
    let test = Test::start_with(root.path(), &queue, &s3, Some(base.clone()), NEVER);
    eventually("the tiers are compared", || base.archives().objects(&name("pg-1")).is_some()).await;
    eventually("no job is left", || queue.queue.stats().messages == 0).await;
    // Listings of WAL: a missing object is looked for by a listing, too.
    let listings =
        || s3.requests().iter().filter(|r| r.contains("list-type") && r.contains("wal%2F")).count();
    let listed = listings();
    // The next change is made when the upload of this one has begun, and so has read all of it.
    let (changing, object) = (base.clone(), key.clone());
    let mut once = true;
    s3.on_request(move |parts| {
        if once && parts.method == "PUT" && parts.uri.path().ends_with(&object) {
            once = false;
            changing.wal().add_levels(&name("pg-1"), &[level(2.0, false)]).unwrap();
            changing.announce(&name("pg-1"), BaseObject::WalLevels, 0);
        }
        None
    });
    base.wal().add_levels(&name("pg-1"), &[level(1.0, true)]).unwrap();
    base.announce(&name("pg-1"), BaseObject::WalLevels, 0);
    eventually("both are in the bucket", || {
        let far = std::fs::read(s3.object(&key)).unwrap_or_default();
        let near = std::fs::read(root.path().join(&key)).unwrap();
        LevelChange::decode_all(&far, "far").is_ok_and(|all| all.len() == 2) && far == near
    })
    .await;
    eventually("nothing waits", || base.archives().state(&name("pg-1")).unarchived_files == 0)
        .await;
    assert_eq!(listings(), listed, "no comparison was needed for it");
    test.stop().await;
    queue.stop().await;
}
