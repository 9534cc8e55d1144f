//! The timelines of a cluster, and a person's decisions about them.

use super::catalog::CatalogService;
use crate::access::auth::Identity;
use crate::{
    base::BaseStore,
    status::{StatusBoard, now_unix},
};
use klio_pg::TimelineId;
use klio_proto::{
    Code,
    v1::{self, TimelineDecision},
};
use klio_storage::{
    catalog::{Decision, DecisionError, Standing, Timelines},
    layout::ClusterName,
};
use tonic::Status;

/// Every timeline, with these marks applied.
pub(super) fn records(
    board: &StatusBoard,
    cluster: &ClusterName,
    marks: &Timelines,
) -> Vec<v1::TimelineRecord> {
    let store = &board.store;
    let positions = store.positions(cluster);
    let followed = marks.followed(positions.iter().map(|position| position.timeline));
    // On a new server nothing is followed before the first contact, so the decisions tell.
    let decided = marks.marks().iter().filter(|mark| mark.standing == Standing::Followed);
    let followed = followed.or_else(|| decided.map(|mark| mark.timeline).max());
    let live = board.registry.cluster(cluster);
    let held = positions.iter().map(|position| position.timeline);
    let known = held.chain(marks.marks().iter().map(|mark| mark.timeline));
    let all: std::collections::BTreeSet<TimelineId> = known.collect();
    let record = |timeline: TimelineId| {
        let position = positions.iter().find(|position| position.timeline == timeline);
        let history = store.history(cluster, timeline).ok();
        let parent = history.as_ref().and_then(|history| history.entries().last());
        let mark = marks.mark(timeline);
        let standing = match mark.map(|mark| mark.standing) {
            Some(Standing::Undecided) => Standing::Undecided.as_str(),
            Some(Standing::Retired) => Standing::Retired.as_str(),
            _ if followed == Some(timeline) => Standing::Followed.as_str(),
            _ => "",
        };
        v1::TimelineRecord {
            timeline: timeline.get(),
            standing: standing.to_owned(),
            connected: live.lives(timeline),
            start_lsn: position.map_or(0, |position| position.start.as_u64()),
            flushed_lsn: position.map_or(0, |position| position.flushed.as_u64()),
            parent: parent.map_or(0, |entry| entry.timeline.get()),
            switch_lsn: parent.map_or(0, |entry| entry.end.as_u64()),
            reason: mark.map(|mark| mark.reason.clone()).unwrap_or_default(),
            marked_time: mark.map_or(0.0, |mark| mark.marked_unix),
            decided_time: mark.and_then(|mark| mark.decided_unix).unwrap_or(0.0),
            decided_by: mark.and_then(|mark| mark.decided_by.clone()).unwrap_or_default(),
        }
    };
    all.into_iter().map(record).collect()
}

/// What a decision changes, one sentence each.
fn changes(before: &[v1::TimelineRecord], after: &[v1::TimelineRecord]) -> Vec<String> {
    let word = |record: &v1::TimelineRecord| match record.standing.as_str() {
        "" => "an ended ancestor".to_owned(),
        standing => standing.to_owned(),
    };
    let mut changes = Vec::new();
    for (old, new) in before.iter().zip(after).filter(|(old, new)| old.standing != new.standing) {
        let mut text = format!("timeline {}: {} -> {}", new.timeline, word(old), word(new));
        if new.standing == Standing::Retired.as_str() {
            let ended = if new.connected { "its stream is ended, and " } else { "" };
            text += &format!(
                "; {ended}nothing more of it is received; its WAL stays until retention expires it"
            );
        }
        changes.push(text);
    }
    changes
}

impl CatalogService {
    fn base(&self) -> Result<&BaseStore, Status> {
        let base = self.board.base.as_ref();
        base.ok_or_else(|| Code::Internal.status("expected a store of base backups, found none"))
    }

    pub(super) async fn timelines_of(
        &self,
        cluster: &ClusterName,
    ) -> Result<v1::TimelinesResponse, Status> {
        let marks = self.base()?.timelines(cluster).await?;
        Ok(v1::TimelinesResponse { timelines: records(&self.board, cluster, &marks) })
    }

    pub(super) async fn decide(
        &self,
        identity: &Identity,
        cluster: &ClusterName,
        request: &v1::DecideTimelineRequest,
    ) -> Result<v1::DecideTimelineResponse, Status> {
        let invalid = |text: &str| Code::Invalid.status(format!("decide about a timeline: {text}"));
        let timeline = TimelineId::new(request.timeline)
            .ok_or_else(|| invalid("expected a timeline from 1 up, found 0"))?;
        let what = request.decision();
        let decision = Decision { by: identity.name.clone(), at_unix: now_unix() };
        let decide = move |marks: &Timelines, held: &[TimelineId]| match what {
            TimelineDecision::Retire => marks.retire(timeline, held, &decision),
            _ => marks.follow(timeline, held, &decision),
        };
        if what == TimelineDecision::Unspecified {
            return Err(invalid("expected follow or retire, found neither"));
        }
        let decided = self.base()?.decide_timeline(cluster, request.dry_run, decide).await?;
        let (before, after) = decided.map_err(|why| refused(cluster, &why))?;
        let before = records(&self.board, cluster, &before);
        let timelines = records(&self.board, cluster, &after);
        let changes = changes(&before, &timelines);
        if !request.dry_run {
            tracing::warn!(%cluster, by = identity.name, ?changes, "a person decided about a timeline");
        }
        Ok(v1::DecideTimelineResponse { timelines, changes })
    }
}

fn refused(cluster: &ClusterName, why: &DecisionError) -> Status {
    let (code, hint) = match why {
        DecisionError::Unknown(_) => (Code::NotFound, "klio timeline list shows the known ones"),
        DecisionError::RetiresFollowed(_) => {
            (Code::Invalid, "klio timeline follow T retires the one followed before")
        }
        DecisionError::Followed(_) | DecisionError::Retired(_) => (
            Code::Invalid,
            "nothing needs to be done; klio timeline list shows who decided, and when",
        ),
    };
    code.status(format!("decide about a timeline of {cluster}: {why}; hint: {hint}"))
}
