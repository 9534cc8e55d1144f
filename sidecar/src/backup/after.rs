//! The steps on the server after a backup was committed: verification and maintenance.
//!
//! A failure of theirs does not invalidate the backup, so it is reported separately.

use super::progress::Progress;
use crate::{
    error::{Error, Failure},
    server_link::BaseLink,
};
use bytes::Bytes;
use klio_proto::{
    Code,
    v1::{MaintainRequest, VerifyRequest, maintain_response, verify_response},
};
use klio_storage::{
    catalog::{MaintenanceOutcome, VerifyOutcome},
    layout::{BackupName, ClusterName},
};
use serde::de::DeserializeOwned;
use tonic::{Response, Status, Streaming};

/// The result of a step after the backup.
#[derive(Debug, Clone, PartialEq)]
pub enum After<T> {
    /// Disabled in the configuration.
    Off,
    /// The step completed.
    Ran(T),
    /// The step did not complete.
    Failed(Error),
}

impl<T> After<T> {
    pub const fn is_off(&self) -> bool {
        matches!(self, After::Off)
    }

    fn of(result: Result<T, Error>) -> Self {
        match result {
            Ok(outcome) => After::Ran(outcome),
            Err(error) => After::Failed(error),
        }
    }
}

impl After<VerifyOutcome> {
    /// Whether the verification did not complete or found damage.
    pub fn failed(&self) -> bool {
        match self {
            After::Off => false,
            After::Ran(outcome) => !outcome.ok,
            After::Failed(_) => true,
        }
    }
}

impl After<MaintenanceOutcome> {
    /// Whether the maintenance did not complete.
    pub const fn failed(&self) -> bool {
        matches!(self, After::Failed(_))
    }
}

/// Asks the server to verify one backup.
pub(super) async fn verify(
    base: &BaseLink,
    cluster: &ClusterName,
    name: &BackupName,
    read_percent: f64,
    progress: &Progress,
) -> After<VerifyOutcome> {
    progress.enter("verifying");
    let doing = "verify the backup";
    let request = VerifyRequest {
        cluster: cluster.to_string(),
        backup_name: name.to_string(),
        read_percent,
        wal: false,
    };
    let work = async {
        let answers = base.connection().await?.base().verify(request).await;
        outcome(doing, answers, |answer| match answer.kind {
            Some(verify_response::Kind::Outcome(bytes)) => Some(bytes),
            _ => None,
        })
        .await
    };
    After::of(work.await)
}

/// Asks the server to apply its retention policy.
pub(super) async fn maintain(
    base: &BaseLink,
    cluster: &ClusterName,
    progress: &Progress,
) -> After<MaintenanceOutcome> {
    progress.enter("maintenance");
    let doing = "maintain the repository";
    let request = MaintainRequest { cluster: cluster.to_string() };
    let work = async {
        let answers = base.connection().await?.base().maintain(request).await;
        outcome(doing, answers, |answer| match answer.kind {
            Some(maintain_response::Kind::Outcome(bytes)) => Some(bytes),
            _ => None,
        })
        .await
    };
    After::of(work.await)
}

/// Waits for the outcome, which is the last of the answers.
async fn outcome<A, T: DeserializeOwned>(
    doing: &str,
    answers: Result<Response<Streaming<A>>, Status>,
    read: impl Fn(A) -> Option<Bytes>,
) -> Result<T, Error> {
    let failed = |status: Status| Error::from_status(doing, &status);
    let mut answers = answers.map_err(failed)?.into_inner();
    while let Some(answer) = answers.message().await.map_err(failed)? {
        if let Some(bytes) = read(answer) {
            return serde_json::from_slice(&bytes)
                .map_err(|e| Error::new(Failure::Code(Code::Invalid), format!("{doing}: {e}")));
        }
    }
    Err(Error::new(
        Failure::Code(Code::Unavailable),
        format!("{doing}: expected an outcome, found none"),
    ))
}
