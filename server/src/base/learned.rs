//! Joins what the bucket has on record about a cluster's decisions, once after each start: this tier 1 may be new, or have been
//! set back.
//!
//! Nothing is decided before the bucket answered. Who streams goes on by what tier 1 knows, and does not wait for it long (P4).

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

/// For the bucket's answer before something is decided. Shorter than a sidecar waits, so that it hears why.
const PATIENCE_TO_DECIDE: Duration = Duration::from_secs(10);
/// And before a stream goes on by what tier 1 knows.
const PATIENCE_TO_STREAM: Duration = Duration::from_secs(3);
/// After the bucket gave no answer that could be joined.
const ASK_AGAIN_AFTER: Duration = Duration::from_secs(10);

/// Whose record in the bucket was joined since the start, and when there was none that could be.
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

/// What helps against two records that contradict each other; the error names the file.
pub(super) const APART_HINT: &str = "nothing was changed, and both are kept; stop klio-server, look which of the two is right (this file of the cluster, on tier 1 and in the bucket), put it in the place of the other, and start klio-server";

impl BaseStore {
    /// Reads the bucket's record and joins it, unless that was done. `must`: something is to be decided.
    ///
    /// # Errors
    /// `UNAVAILABLE` when the bucket does not answer; as the record cannot be read or joined.
    pub(super) async fn learn<T, J>(
        &self,
        learned: &Learned,
        (cluster, object): (&ClusterName, &BaseObject),
        must: bool,
        decode: impl FnOnce(&[u8], &str) -> Result<T, Error>,
        join: impl FnOnce(T) -> J,
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
        let why = match tokio::time::timeout(patience, question).await {
            Ok(Ok(bytes)) => {
                let joined = match bytes.map(|bytes| decode(&bytes, &key)).transpose() {
                    Ok(Some(theirs)) => join(theirs).await,
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
            "read {key}: tier 2 ({url}) has to be asked first what was decided before this server started: {why}"
        )))
    }
}
