//! The stream on JetStream: its settings, and the settings that the server must report.
//!
//! Work-queue retention: a job is removed when it is acknowledged. One message per subject, with discard-new for each:
//! a job that is queued is never queued twice, without any time window. The only limit is `max_bytes`; there is no
//! maximum age, so no job expires unseen.

use super::{Error, child, job};
use async_nats::{
    Client,
    jetstream::{
        self,
        context::PublishError,
        stream::{Config, DiscardPolicy, Info, RetentionPolicy, StorageType},
    },
};
use std::{error::Error as _, time::Duration};

/// The stream's name.
pub const STREAM: &str = "KLIO_JOBS";

const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// Creates the stream, or corrects the settings of an existing one.
pub(super) async fn ensure(
    jetstream: &jetstream::Context,
    max_bytes: u64,
    replicas: usize,
) -> Result<Info, Error> {
    let config = Config {
        name: STREAM.into(),
        description: Some("finished WAL files on their way to tier 2".into()),
        subjects: vec![job::SUBJECTS.into()],
        retention: RetentionPolicy::WorkQueue,
        storage: StorageType::File,
        discard: DiscardPolicy::New,
        discard_new_per_subject: true,
        max_messages_per_subject: 1,
        max_messages: -1,
        max_bytes: i64::try_from(max_bytes).unwrap_or(i64::MAX),
        // The server's default limit is 1000, and we need one consumer for each cluster.
        max_consumers: 100_000,
        num_replicas: replicas,
        // Subjects make jobs unique for as long as they are queued. With a longer window, a job would be dropped that
        // is queued again after its object vanished.
        duplicate_window: Duration::from_millis(100),
        ..Config::default()
    };
    let fail = Error::nats("create stream KLIO_JOBS");
    let info = jetstream.create_or_update_stream(config).await.map_err(|e| fail(&e))?;
    let c = &info.config;
    let exact = c.discard_new_per_subject && c.max_messages_per_subject == 1;
    if c.retention != RetentionPolicy::WorkQueue || c.storage != StorageType::File || !exact {
        return Err(Error::Refused {
            expected: "stream KLIO_JOBS with work-queue retention, file storage and one message a subject",
            found: format!("{:?}, {:?}, exact: {exact}", c.retention, c.storage),
        });
    }
    Ok(info)
}

/// Whether a publish failed because this very job is queued already, which counts as success.
pub(super) fn already_queued(error: &PublishError) -> bool {
    let Some(cause) = error.source() else { return false };
    let Some(answer) = cause.downcast_ref::<jetstream::Error>() else { return false };
    answer.to_string().contains("maximum messages per subject exceeded")
}

/// P4 needs a real fsync: refuses a server that does not sync each write, or is too old to do so.
pub(super) async fn check_settings(system: &Client) -> Result<(), Error> {
    let fail = Error::nats("ask nats-server for its settings");
    let question = system.request("$SYS.REQ.SERVER.PING.VARZ", "".into());
    let answer = tokio::time::timeout(ANSWER_WITHIN, question)
        .await
        .map_err(|_| fail(&"no answer"))?
        .map_err(|e| fail(&e))?;
    let answer: serde_json::Value =
        serde_json::from_slice(&answer.payload).map_err(|e| fail(&e))?;
    accept(&answer["data"])
}

fn accept(varz: &serde_json::Value) -> Result<(), Error> {
    let refuse = |expected, found: String| Err(Error::Refused { expected, found });
    let found = varz["version"].as_str().unwrap_or("no version");
    if child::version(found).is_none_or(|version| version < (2, 12)) {
        return refuse("version 2.12 or newer", found.into());
    }
    match varz["jetstream"]["config"]["sync_always"].as_bool() {
        Some(true) => Ok(()),
        _ => refuse("sync_interval: always", varz["jetstream"]["config"].to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Guards against a bug of other projects: JetStream's default is one fsync every two minutes.
    #[test]
    fn a_server_that_does_not_sync_always_is_refused() {
        let report =
            |version: &str, config| json!({"version": version, "jetstream": {"config": config}});
        assert!(accept(&report("2.15.1", json!({"sync_always": true}))).is_ok());
        for bad in [
            report("2.15.1", json!({"sync_interval": 120_000_000_000_u64})),
            report("2.15.1", json!({"sync_always": false})),
            report("2.9.10", json!({"sync_always": true})),
            json!({}),
        ] {
            assert!(matches!(accept(&bad), Err(Error::Refused { .. })), "{bad}");
        }
    }
}
