//! Decides when more than one PostgreSQL wants to stream a cluster: which one is followed, which one gives way, and
//! what is left for a person to decide.
//!
//! - A newer timeline wins over an older one at once, unless the PostgreSQL of the older one proves now that it
//!   writes. Then both are received, and the newer one is undecided.
//! - An older timeline is stale, unless its PostgreSQL proves now that it writes. Then both are received, and the
//!   older one is undecided.
//! - A conflict is recorded durably before the first byte is received because of it.
//! - A proof is PostgreSQL's answer to a question asked now; what it said earlier does not count.

use crate::base::BaseStore;
use crate::registry::{Claim, Registry, Rival};
use klio_pg::{Lsn, TimelineHistory, TimelineId};
use klio_proto::{Code, wal::AlivePostgres};
use klio_storage::{
    catalog::{Mark, Standing, Timelines},
    layout::ClusterName,
    record::Unknown,
};
use tonic::Status;

/// The outcome for a claim.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Settled {
    /// The WAL of the claiming timeline is received, but the timeline stays undecided and is not followed.
    pub(super) aside: bool,
    /// Sessions that did not prove that they write, and have to end.
    pub(super) displaced: Vec<u64>,
}

/// A conflict with another timeline.
pub(super) struct Found {
    against: TimelineId,
    reason: String,
}

/// Why an answer does not prove that PostgreSQL writes this timeline; `None` when it does.
fn unproven(answer: Option<AlivePostgres>, lives_on: TimelineId) -> Option<String> {
    match answer {
        None => Some("it did not answer".to_owned()),
        Some(postgres) if postgres.in_recovery => Some("it is in recovery".to_owned()),
        Some(postgres) if postgres.timeline != lives_on => {
            Some(format!("it is on timeline {}", postgres.timeline.get()))
        }
        Some(_) => None,
    }
}

/// How a claim relates to the other timelines, before anything is written.
pub(super) enum Stands {
    /// The timeline is already undecided or retired.
    Aside,
    /// The timeline conflicts with another one, and is to be marked undecided.
    Against(Found),
    /// The timeline is the newest.
    Newest,
}

/// Compares the claim with the timelines known so far. `prove` asks the claimant's own PostgreSQL. Writes nothing.
///
/// # Errors
/// `STALE_TIMELINE`; an error of the bucket.
pub(super) async fn look(
    base: &BaseStore,
    registry: &Registry,
    cluster: &ClusterName,
    claim: &Claim,
    prove: impl Future<Output = Option<AlivePostgres>>,
) -> Result<Stands, Status> {
    let marks = base.wal().timelines(cluster);
    if marks.is_aside(claim.lives_on) {
        return Ok(Stands::Aside);
    }
    let found = match inherited(base, cluster, &marks, claim) {
        Some(found) => Some(found),
        None => older(base, registry, cluster, claim, prove).await?,
    };
    Ok(found.map_or(Stands::Newest, Stands::Against))
}

/// Settles a claim that may be admitted: records a conflict, or asks the live sessions of older timelines.
///
/// # Errors
/// An I/O error of the disk.
pub(super) async fn settle(
    base: &BaseStore,
    registry: &Registry,
    cluster: &ClusterName,
    claim: &Claim,
    stands: Stands,
    now_unix: f64,
) -> Result<Settled, Status> {
    match stands {
        Stands::Aside => Ok(Settled { aside: true, displaced: Vec::new() }),
        Stands::Against(found) => record(base, cluster, claim, found, now_unix).await,
        Stands::Newest => ask_rivals(base, registry, cluster, claim, now_unix).await,
    }
}

/// Asks the live sessions of older timelines to prove that they write.
///
/// # Errors
/// An I/O error of the disk.
pub(super) async fn ask_rivals(
    base: &BaseStore,
    registry: &Registry,
    cluster: &ClusterName,
    claim: &Claim,
    now_unix: f64,
) -> Result<Settled, Status> {
    let mut displaced = Vec::new();
    let rivals = registry.cluster(cluster).rivals(claim);
    match newer(claim, rivals, &mut displaced).await {
        Some(found) => record(base, cluster, claim, found, now_unix).await,
        None => Ok(Settled { aside: false, displaced }),
    }
}

/// Records the conflict durably. From then on the claim is received without being followed, and ends no other session.
async fn record(
    base: &BaseStore,
    cluster: &ClusterName,
    claim: &Claim,
    found: Found,
    now_unix: f64,
) -> Result<Settled, Status> {
    let Found { against, reason } = found;
    let mark = |timeline: TimelineId, reason: String| Mark {
        timeline,
        standing: Standing::Undecided,
        against,
        reason,
        marked_unix: now_unix,
        decided_unix: None,
        decided_by: None,
        earlier: Vec::new(),
        unknown: Unknown::default(),
    };
    let wal = base.wal();
    let own = wal.history(cluster, claim.lives_on).ok();
    let marks = wal.timelines(cluster);
    let way = own.map(|own| marks.unmarked_on_the_way(&own, wal.followed(cluster)));
    for timeline in way.unwrap_or_default() {
        let (between, end) = (timeline.get(), claim.lives_on.get());
        let reason = format!("timeline {between} lies on the way to timeline {end}: {reason}");
        base.mark_timeline(cluster, mark(timeline, reason)).await?;
    }
    base.mark_timeline(cluster, mark(claim.lives_on, reason)).await?;
    Ok(Settled { aside: true, displaced: Vec::new() })
}

/// A child of a timeline that is undecided or retired gets the same standing.
fn inherited(
    base: &BaseStore,
    cluster: &ClusterName,
    marks: &Timelines,
    claim: &Claim,
) -> Option<Found> {
    let wal = base.wal();
    let own = wal.history(cluster, claim.lives_on).ok()?;
    let followed: Option<TimelineHistory> =
        wal.followed(cluster).and_then(|timeline| wal.history(cluster, timeline).ok());
    let parent = marks.inherits(&own, followed.as_ref())?;
    let reason = format!(
        "timeline {} came from {} and continues timeline {}, which is {}",
        claim.lives_on.get(),
        claim.who,
        parent.timeline.get(),
        parent.standing
    );
    Some(Found { against: parent.against, reason })
}

/// Looks for a conflict of a claim that is older than the followed timeline, or than one that streams and has no WAL
/// yet.
async fn older(
    base: &BaseStore,
    registry: &Registry,
    cluster: &ClusterName,
    claim: &Claim,
    prove: impl Future<Output = Option<AlivePostgres>>,
) -> Result<Option<Found>, Status> {
    let held = base.newer_timeline(cluster, claim.lives_on).await?;
    let live = registry.cluster(cluster).newer_live(claim);
    let live = live.map(|newest| (newest, " (which streams)".to_owned()));
    let newer = held.into_iter().chain(live).max_by_key(|(newest, _)| *newest);
    let Some((newest, place)) = newer else { return Ok(None) };
    let answer = prove.await;
    if let Some(why) = unproven(answer, claim.lives_on) {
        return Err(Code::StaleTimeline.status(format!(
            "open cluster {cluster}: expected timeline {newest:?} or newer{place}, found {:?}, whose PostgreSQL did not prove that it writes: {why}",
            claim.lives_on
        )));
    }
    let reason = format!(
        "timeline {} came from {} and proved at {} that its PostgreSQL writes, while timeline {} is followed",
        claim.lives_on.get(),
        claim.who,
        answer.map_or(Lsn::ZERO, |postgres| postgres.position),
        newest.get()
    );
    Ok(Some(Found { against: newest, reason }))
}

/// Asks each older live session, and finds a conflict if one of them proves that it writes.
async fn newer(claim: &Claim, rivals: Vec<Rival>, displaced: &mut Vec<u64>) -> Option<Found> {
    let mut found = None;
    for rival in rivals {
        let answer = rival.ask().await;
        let (old, new) = (rival.lives_on.get(), claim.lives_on.get());
        match unproven(answer, rival.lives_on) {
            Some(why) => {
                tracing::info!(
                    who = rival.who,
                    timeline = old,
                    newer = new,
                    why,
                    "session ends in favour of a newer timeline"
                );
                displaced.push(rival.id);
            }
            None => {
                let reason = format!(
                    "timeline {new} came from {} while {} streamed timeline {old}, whose PostgreSQL proved at {} that it writes",
                    claim.who,
                    rival.who,
                    answer.map_or(Lsn::ZERO, |postgres| postgres.position),
                );
                found = Some(Found { against: rival.lives_on, reason });
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tli(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    #[test]
    fn only_a_primary_on_its_own_timeline_that_answers_now_proves_that_it_writes() {
        let postgres = |in_recovery, timeline| {
            Some(AlivePostgres { in_recovery, timeline: tli(timeline), position: Lsn::new(9) })
        };
        assert_eq!(unproven(postgres(false, 1), tli(1)), None);
        for (answer, why) in [
            (None, "did not answer"),
            (postgres(true, 1), "in recovery"),
            (postgres(false, 2), "on timeline 2"),
        ] {
            assert!(unproven(answer, tli(1)).unwrap().contains(why));
        }
    }
}
