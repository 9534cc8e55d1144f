//! Decides which PostgreSQL a cluster is, over both tiers (P8), so that a lost tier 1 or a second server does not
//! admit a foreign PostgreSQL or an old primary.
//!
//! If tier 1 knows the cluster, it alone answers: a stream that has begun never waits for the bucket (P4). If tier 1
//! does not know it, the bucket is asked before anything is written. While the bucket does not answer nothing is
//! accepted, and the caller is told to come again. A new cluster loses nothing while the bucket is down: its
//! PostgreSQL keeps the WAL, and none was acknowledged (P1). The check is strict because two systems in one prefix, or
//! an old primary's WAL in front of a newer timeline, cannot be separated afterwards.

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

/// How long to wait for the bucket's answer. It is shorter than a sidecar waits, so that the sidecar receives the
/// reason.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// The identity that is pinned at first contact.
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

    /// The same check; also binds a new name to this PostgreSQL.
    ///
    /// # Errors
    /// The errors of [`BaseStore::check_system`], and an I/O error of the disk.
    pub async fn pin(&self, cluster: &ClusterName, system: System) -> Result<(), Status> {
        self.check_system(cluster, system).await?;
        self.adopt_generations(cluster).await?;
        let (store, name) = (self.wal().clone(), cluster.clone());
        run(move || store.pin(&name, pinned(system))).await?;
        let object = BaseObject::Cluster;
        // Announced before the first WAL, so that whoever finds WAL in the bucket can find out whose it is.
        if self.archives().size(cluster, &object).is_none() {
            self.announce(cluster, object, 0);
        }
        Ok(())
    }

    /// The timeline that is followed, by tier 1 or else by the bucket; the text names the tier for a message.
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

    /// The same, if it is newer than `found`. If only the bucket knows it, a timeline that descends from `found`, and
    /// whose history this tier 1 has received, does not count: its PostgreSQL finishes the older timeline first.
    ///
    /// # Errors
    /// The errors of [`BaseStore::followed_timeline`].
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

    /// Refuses a timeline that is older than the followed one, unless it is undecided or retired already. Asks tier 1
    /// only.
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

    /// Reads tier 2's `cluster.json`.
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

    /// The bucket's answer at first contact, or the reason why there is none.
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
            "open cluster {cluster}: the cluster is new to this server, so tier 2 ({url}) has to be asked for its owner, and did not answer"
        )))
    }
}

/// Whether the object was read and is damaged or of a newer version. A person has to look at it, because its content
/// is unknown.
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
