//! Who a cluster is, over both tiers (P8): a tier 1 that was lost, or a second server, makes no stranger and no old primary
//! welcome.
//!
//! Where tier 1 knows, it alone answers: no stream that has begun ever waits for the bucket (P4). Where it knows nothing,
//! the bucket is asked before anything is written, and while that does not answer nothing is taken: the caller is told
//! to come again. A new cluster beside a bucket that is down loses nothing by it: its PostgreSQL keeps the WAL, and none
//! was acknowledged (P1). Two systems in one prefix, or an old primary's WAL in front of a newer timeline, nobody takes
//! apart again.

use super::{BaseStore, run};
use crate::errors;
use klio_pg::TimelineId;
use klio_proto::{Code, wal::System};
use klio_storage::{
    Error, Kind, Op,
    layout::{BaseObject, ClusterName},
    record,
    tier2::Tier2,
    wal::Pinned,
};
use std::{future::Future, time::Duration};
use tonic::Status;

/// For the bucket's answer. Shorter than a sidecar waits, so that it hears why.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// What is pinned at first contact.
const fn pinned(system: System) -> Pinned {
    Pinned {
        system_identifier: system.system_identifier,
        segment_size: system.segment_size,
        postgres_version: system.postgres_version,
    }
}

impl BaseStore {
    /// Refuses a PostgreSQL other than the one that either tier knows. Writes nothing.
    ///
    /// # Errors
    /// `WRONG_SYSTEM`; `UNAVAILABLE` when the bucket has to be asked and does not answer.
    pub async fn check_system(&self, cluster: &ClusterName, found: System) -> Result<(), Status> {
        if let Some(known) = self.wal().pinned(cluster) {
            return same_system(cluster, known, found, "");
        }
        let Some(tier2) = self.tier2() else { return Ok(()) };
        match self.ask(cluster, tier2, self.read_pinned(tier2, cluster)).await? {
            Some(known) => same_system(cluster, known, found, &as_in(tier2)),
            None => Ok(()),
        }
    }

    /// The same, and binds the name to this PostgreSQL where it is new.
    ///
    /// # Errors
    /// As [`BaseStore::check_system`], and as the disk fails.
    pub async fn pin(&self, cluster: &ClusterName, system: System) -> Result<(), Status> {
        self.check_system(cluster, system).await?;
        self.adopt_generations(cluster).await?;
        let (store, name) = (self.wal().clone(), cluster.clone());
        run(move || store.pin(&name, pinned(system))).await?;
        let object = BaseObject::Cluster;
        // Ahead of the first WAL: whoever finds that in the bucket shall find out whose it is.
        if self.archives().size(cluster, &object).is_none() {
            self.announce(cluster, object, 0);
        }
        Ok(())
    }

    /// The timeline that is followed, by tier 1 or else by the bucket, and in which of them that stands, for a message.
    ///
    /// # Errors
    /// `UNAVAILABLE` when the bucket has to be asked and does not answer.
    pub async fn followed_timeline(
        &self,
        cluster: &ClusterName,
    ) -> Result<Option<(TimelineId, String)>, Status> {
        if let Some(followed) = self.wal().followed(cluster) {
            return Ok(Some((followed, String::new())));
        }
        let Some(tier2) = self.tier2() else { return Ok(None) };
        let held = self.ask(cluster, tier2, tier2.timelines(cluster)).await?;
        let followed = self.wal().timelines(cluster).followed(held);
        Ok(followed.map(|followed| (followed, as_in(tier2))))
    }

    /// The same, where it is newer than `found`. By the bucket alone one that came from `found`, and whose history this
    /// tier 1 was given, is none: its PostgreSQL finishes the older first.
    ///
    /// # Errors
    /// As [`BaseStore::followed_timeline`].
    pub async fn newer_timeline(
        &self,
        cluster: &ClusterName,
        found: TimelineId,
    ) -> Result<Option<(TimelineId, String)>, Status> {
        let by_bucket = self.wal().followed(cluster).is_none();
        let comes_from_it = |newest: TimelineId| {
            let history = self.wal().history(cluster, newest).ok();
            history.is_some_and(|history| history.end_of(found).is_some())
        };
        let followed = self.followed_timeline(cluster).await?;
        Ok(followed.filter(|(newest, _)| *newest > found && !(by_bucket && comes_from_it(*newest))))
    }

    /// A new timeline wins over an old one, never the other way round; unless the old one is undecided. By tier 1 alone.
    ///
    /// # Errors
    /// `STALE_TIMELINE`.
    pub fn check_timeline_here(
        &self,
        cluster: &ClusterName,
        found: TimelineId,
    ) -> Result<(), Status> {
        if self.wal().timelines(cluster).is_aside(found) {
            return Ok(());
        }
        not_older(cluster, self.wal().followed(cluster), found)
    }

    /// What tier 2's `cluster.json` says.
    ///
    /// # Errors
    /// `UNAVAILABLE`, `CORRUPT`.
    pub async fn pinned_in_tier2(&self, cluster: &ClusterName) -> Result<Option<Pinned>, Status> {
        let Some(tier2) = self.tier2() else { return Ok(None) };
        self.read_pinned(tier2, cluster).await.map_err(|error| match is_unreadable(&error) {
            true => errors::status(&error),
            false => super::tier2_status("open", cluster, &error),
        })
    }

    async fn read_pinned(
        &self,
        tier2: &Tier2,
        cluster: &ClusterName,
    ) -> Result<Option<Pinned>, Error> {
        let key = BaseObject::Cluster.key(cluster);
        let bytes = tier2.read_small(&key, record::LIMIT_BYTES).await?;
        bytes.map(|bytes| Pinned::decode(&bytes, &key)).transpose()
    }

    /// The bucket's answer at first contact, or why there is none.
    pub(super) async fn ask<T>(
        &self,
        cluster: &ClusterName,
        tier2: &Tier2,
        question: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Status> {
        let why = match tokio::time::timeout(ANSWER_WITHIN, question).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) if is_unreadable(&error) => return Err(errors::status(&error)),
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {} s", ANSWER_WITHIN.as_secs()),
        };
        tracing::warn!(%cluster, error = why, "cannot confirm the owner of this cluster: tier 2 does not answer");
        let url = tier2.url();
        Err(Code::Unavailable.status(format!(
            "open cluster {cluster}: this server has nothing of it, so tier 2 ({url}) has to be asked whose it is, and did not answer"
        )))
    }
}

/// It came, and is damaged or of a newer version: a person has to look at it, as what it said is not known any more.
pub(super) fn is_unreadable(error: &Error) -> bool {
    matches!(error.kind, Kind::Corrupt | Kind::Newer) && error.op != Op::Download
}

fn as_in(tier2: &Tier2) -> String {
    format!(" as in tier 2 ({})", tier2.url())
}

fn same_system(
    cluster: &ClusterName,
    known: Pinned,
    found: System,
    place: &str,
) -> Result<(), Status> {
    let refuse = |what: &str, expected: String, found: String| {
        Err(Code::WrongSystem.status(format!(
            "open cluster {cluster}: expected {what} {expected}{place}, found {found}"
        )))
    };
    let (expected, id) = (known.system_identifier, found.system_identifier);
    if expected != id {
        return refuse("system identifier", expected.to_string(), id.to_string());
    }
    let (expected, size) = (known.segment_size.bytes(), found.segment_size.bytes());
    if expected != size {
        return refuse("WAL segment size", expected.to_string(), size.to_string());
    }
    Ok(())
}

fn not_older(
    cluster: &ClusterName,
    newest: Option<TimelineId>,
    found: TimelineId,
) -> Result<(), Status> {
    match newest {
        Some(newest) if newest > found => Err(Code::StaleTimeline.status(format!(
            "open cluster {cluster}: expected timeline {newest:?} or newer, found {found:?}"
        ))),
        _ => Ok(()),
    }
}
