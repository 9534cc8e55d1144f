//! A store that answers 500, throttles, resets or hangs.

use super::{KEY, S3, noise, open, s3::Fault, sealed};
use crate::{Kind, tier2::Outcome};
use http::Method;

/// Fails the first `times` requests of a method.
fn first(
    times: usize,
    method: Method,
    fault: Fault,
) -> impl FnMut(&http::request::Parts) -> Option<Fault> {
    let mut left = times;
    move |parts| {
        if parts.method != method || left == 0 {
            return None;
        }
        left -= 1;
        Some(fault)
    }
}

#[tokio::test]
async fn errors_and_throttling_are_retried_inside_one_attempt() {
    for fault in [Fault::Status(500, "InternalError"), Fault::Status(503, "SlowDown")] {
        let s3 = S3::start().await;
        s3.on_request(first(3, Method::PUT, fault));
        let directory = tempfile::tempdir().unwrap();
        let source = sealed(directory.path(), "a", &noise(1, 100_000), 1);
        let done = open(&s3).upload(&source, KEY).await.unwrap();
        assert_eq!(done.outcome, Outcome::Stored);
        let puts = s3.requests().iter().filter(|r| r.starts_with("PUT")).count();
        assert_eq!(puts, 4);
    }
}

#[tokio::test]
async fn a_store_that_stays_down_ends_the_attempt_as_transient() {
    let s3 = S3::start().await;
    s3.on_request(|_| Some(Fault::Status(503, "SlowDown")));
    let mut config = super::config(&s3);
    config.retry_timeout_seconds = 1;
    let tier2 = crate::tier2::Tier2::open(&config).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let source = sealed(directory.path(), "a", b"x", 1);
    let error = tier2.upload(&source, KEY).await.unwrap_err();
    assert_eq!(error.kind, Kind::Transient, "{error}");
}

/// A bug in similar tools: an upload that fails half way publishes a truncated object (OBJECT3).
#[tokio::test]
async fn a_reset_in_the_middle_of_the_body_leaves_no_object() {
    for bytes in [4 << 20, 20 << 20] {
        let s3 = S3::start().await;
        s3.on_request(first(100, Method::PUT, Fault::ResetAfter(1 << 20)));
        let directory = tempfile::tempdir().unwrap();
        let source = sealed(directory.path(), "a", &noise(1, bytes), 1);
        let mut config = super::config(&s3);
        config.retry_timeout_seconds = 1;
        let tier2 = crate::tier2::Tier2::open(&config).unwrap();
        let error = tier2.upload(&source, KEY).await.unwrap_err();
        assert_eq!(error.kind, Kind::Transient, "{error}");
        assert!(!s3.object(&format!("prefix/{KEY}")).exists());
        let aborts = s3.requests().iter().filter(|r| r.starts_with("DELETE")).count();
        assert_eq!(aborts > 0, bytes > 8 << 20, "multipart uploads are aborted");
        s3.heal();
        assert_eq!(tier2.size_of(KEY).await.unwrap(), None);
        assert_eq!(tier2.upload(&source, KEY).await.unwrap().outcome, Outcome::Stored);
    }
}

/// The conditional PUT of the retry finds the object of the first attempt, which must not look like
/// another client's.
#[tokio::test]
async fn an_answer_lost_after_storing_is_not_a_conflict() {
    let s3 = S3::start().await;
    s3.on_request(first(1, Method::PUT, Fault::ResetAfterStoring));
    let directory = tempfile::tempdir().unwrap();
    let source = sealed(directory.path(), "a", &noise(1, 100_000), 1);
    let tier2 = open(&s3);
    let uploaded = match tier2.upload(&source, KEY).await {
        Ok(uploaded) => uploaded,
        Err(error) => {
            assert_eq!(error.kind, Kind::Transient, "{error}");
            tier2.upload(&source, KEY).await.unwrap()
        }
    };
    assert_eq!(uploaded.outcome, Outcome::AlreadyThere);
}

#[tokio::test]
async fn a_store_that_hangs_is_given_up_after_the_timeout() {
    let s3 = S3::start().await;
    s3.on_request(first(100, Method::PUT, Fault::Hang));
    let directory = tempfile::tempdir().unwrap();
    let source = sealed(directory.path(), "a", b"wal", 1);
    let tier2 = crate::tier2::Tier2::open(&super::hurried(&s3)).unwrap();
    let error = tier2.upload(&source, KEY).await.unwrap_err();
    assert_eq!(error.kind, Kind::Transient, "{error}");
    s3.heal();
    assert_eq!(open(&s3).size_of(KEY).await.unwrap(), None);
}

#[tokio::test]
async fn nobody_listening_is_transient_with_a_hint() {
    let s3 = S3::start().await;
    let mut config = super::config(&s3);
    config.endpoint = Some("http://127.0.0.1:9".into());
    config.retry_timeout_seconds = 1;
    let error = crate::tier2::Tier2::open(&config).unwrap().probe().await.unwrap_err();
    assert_eq!(error.kind, Kind::Transient, "{error}");
    assert!(error.hint.is_some(), "{error}");
}

/// Found by a verification of an object that was just being uploaded: first a 404, then it is listed.
#[tokio::test]
async fn an_object_that_appears_between_two_answers_is_read() {
    let s3 = S3::start().await;
    let directory = tempfile::tempdir().unwrap();
    let source = sealed(directory.path(), "a", &noise(1, 1000), 1);
    open(&s3).upload(&source, KEY).await.unwrap();
    s3.on_request(first(1, Method::GET, Fault::Status(404, "NoSuchKey")));
    let whole = open(&s3).download(KEY).await.unwrap().whole().await.unwrap();
    assert!(!whole.is_empty());
}
