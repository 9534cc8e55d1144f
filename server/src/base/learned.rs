//! Joins the bucket's record of a cluster's decisions, once after each start, because this tier 1 may be new or may
//! have been set back.
//!
//! Nothing is decided before the bucket answered. A stream continues with what tier 1 knows, and does not wait for the
//! bucket long (P4).

use super::{BaseStore, lock};
use crate::errors;
use klio_proto::Code;
use klio_storage::{
    Error,
    layout::{BaseObject, ClusterName},
    record,
};
use std::{
    collections::BTreeMap,
    future::Future,
    sync::Mutex,
    time::{Duration, Instant},
};
use tonic::Status;

/// How long to wait for the bucket's answer before a decision. It is shorter than a sidecar waits, so that the sidecar
/// receives the reason.
const PATIENCE_TO_DECIDE: Duration = Duration::from_secs(10);
/// How long to wait before a stream continues with what tier 1 knows.
pub(super) const PATIENCE_TO_STREAM: Duration = Duration::from_secs(3);
/// When to ask again after the bucket gave no answer that could be joined.
const ASK_AGAIN_AFTER: Duration = Duration::from_secs(10);

/// The clusters whose record in the bucket was joined since the start, and when an attempt failed.
#[derive(Default)]
pub(super) struct Learned(Mutex<BTreeMap<ClusterName, Answer>>);

#[derive(Clone, Copy)]
enum Answer {
    Joined,
    NoneAt(Instant),
}

impl Answer {
    fn unusable() -> Self {
        Answer::NoneAt(Instant::now())
    }
}

impl Learned {
    fn may_ask(&self, cluster: &ClusterName, must: bool) -> bool {
        match lock(&self.0).get(cluster) {
            Some(Answer::Joined) => false,
            Some(Answer::NoneAt(at)) => must || at.elapsed() >= ASK_AGAIN_AFTER,
            None => true,
        }
    }

    fn note(&self, cluster: &ClusterName, answer: Answer) {
        lock(&self.0).insert(cluster.clone(), answer);
    }
}

/// The hint for two records that contradict each other; the error names the file.
pub(super) const APART_HINT: &str = "stop klio-server, decide which of the two files is right (the one on tier 1 or the one in the bucket; neither was changed), replace the other one with it, and start klio-server";

impl BaseStore {
    /// Reads the bucket's record and joins it, unless that was done before. `must` says that a decision depends on it.
    /// `join` is told until when it may ask the bucket for more.
    ///
    /// # Errors
    /// `UNAVAILABLE` when the bucket does not answer; an error of reading or joining the record.
    pub(super) async fn learn<T, J>(
        &self,
        learned: &Learned,
        (cluster, object): (&ClusterName, &BaseObject),
        must: bool,
        decode: impl FnOnce(&[u8], &str) -> Result<T, Error>,
        join: impl FnOnce(T, tokio::time::Instant) -> J,
    ) -> Result<(), Status>
    where
        J: Future<Output = Result<(), Error>>,
    {
        let Some(tier2) = self.tier2().filter(|_| learned.may_ask(cluster, must)) else {
            return Ok(());
        };
        let patience = if must { PATIENCE_TO_DECIDE } else { PATIENCE_TO_STREAM };
        let key = object.key(cluster);
        let question = tier2.read_small(&key, record::LIMIT_BYTES);
        let until = tokio::time::Instant::now() + patience;
        let why = match tokio::time::timeout_at(until, question).await {
            Ok(Ok(bytes)) => {
                let joined = match bytes.map(|bytes| decode(&bytes, &key)).transpose() {
                    Ok(Some(theirs)) => join(theirs, until).await,
                    Ok(None) => Ok(()),
                    Err(error) => Err(error),
                };
                let good = joined.is_ok();
                learned.note(cluster, if good { Answer::Joined } else { Answer::unusable() });
                return joined.map_err(|error| errors::status(&error));
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {} s", patience.as_secs()),
        };
        learned.note(cluster, Answer::unusable());
        let url = tier2.url();
        Err(Code::Unavailable.status(format!(
            "read {key}: tier 2 ({url}) has to be asked first for earlier decisions, and did not answer: {why}"
        )))
    }
}
