//! Opens a session: the caller's claim, what the store holds, and the one place of the cluster's timeline.
//!
//! Order: pinned system, position and history, other timelines (`conflict`), place (ends an earlier session), writer. Who
//! would be refused ends nobody: all that can be looked at is looked at before the place is taken. Nothing but the name's
//! system, and a conflict that was found, is written before all but the last have agreed. Who the cluster is, over both
//! tiers, is `base`'s to say (P8).

use super::{
    compare::{Comparer, Continuity},
    conflict::{self, Settled},
    registry::{Claim, Claimed, Registry},
};
use crate::{base::BaseStore, errors};
use klio_pg::{SegmentSize, TimelineId};
use klio_proto::{
    Code,
    wal::{AlivePostgres, Open},
};
use klio_storage::{
    layout::ClusterName,
    wal::{GapDeclaration, OpenError, OpenRefusal, OpenRequest, Seam, Writer},
};
use std::sync::Arc;
use tonic::Status;

/// How often sessions that came while others were asked are asked, too. The client waits meanwhile.
const ROUNDS_MAX: usize = 2;

/// A session that may begin.
pub struct Opened {
    /// The place of the cluster's timeline.
    pub claimed: Claimed,
    /// The store's writer of it.
    pub writer: Writer,
    /// wal_segment_size.
    pub segment_size: SegmentSize,
    /// Looks at the first new record, where nothing else proved that it continues what is held (P11).
    pub seam: Option<Seam>,
    /// Why nothing proved it, to be recorded with the first byte.
    pub unproven: Option<String>,
}

/// Who wants to stream.
pub struct Caller<F> {
    /// For messages: certificate name and address.
    pub who: String,
    /// Asks its PostgreSQL whether it writes now.
    pub prove: F,
}

/// Runs blocking work of the store and translates its error.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, klio_storage::Error> + Send + 'static,
) -> Result<T, Status> {
    // What it logs and queues belongs to the caller's trace.
    let span = tracing::Span::current();
    match tokio::task::spawn_blocking(move || span.in_scope(work)).await {
        Ok(result) => result.map_err(|error| errors::status(&error)),
        Err(error) => Err(Code::Internal.status(format!("storage task: {error}"))),
    }
}

/// Opens `cluster` for the caller `who`.
///
/// # Errors
/// `WRONG_SYSTEM`, `DIVERGED`, `STALE_TIMELINE`, `RETIRED_TIMELINE`, `WRITER_CONFLICT`, `BAD_POSITION` or what the disk says;
/// `UNAVAILABLE` when the bucket has to be asked at first contact and does not answer.
pub async fn open(
    base: &BaseStore,
    comparer: &Comparer,
    registry: &Arc<Registry>,
    cluster: &ClusterName,
    caller: Caller<impl Future<Output = Option<AlivePostgres>>>,
    open: Open,
    now_unix: f64,
) -> Result<Opened, Status> {
    let Caller { who, prove } = caller;
    let segment_size = open.system.segment_size;
    base.pin(cluster, open.system).await?;
    base.adopt_timelines(cluster).await?;
    let (timeline, lives_on) = (open.timeline, open.lives_on);
    let request = OpenRequest {
        timeline: open.timeline,
        start: open.start,
        gap: open.gap.as_ref().map(|g| GapDeclaration {
            from: g.from,
            to: g.to,
            reason: g.reason.clone(),
        }),
        now_unix,
        slot_restart: open.slot_restart,
    };
    let (at, name, asked) = (base.wal().clone(), cluster.clone(), request.clone());
    of_the_store(move || at.check_writer(&name, &asked, lives_on)).await?;
    // Nothing is appended behind it unseen: the writer is opened only where what is held still ends there.
    let Continuity { seam, unproven } = comparer.continuity(cluster, &open).await?;
    let mut claim =
        Claim { writer_id: open.writer_id.clone(), who, timeline, lives_on, aside: false };
    let mut settled = conflict::settle(base, registry, cluster, &claim, now_unix, prove).await?;
    let mut rounds = 0;
    let claimed = loop {
        let Settled { aside, displaced } = settled;
        claim.aside = aside;
        if let Some(claimed) = registry.claim(cluster, claim.clone(), &displaced).await? {
            break claimed;
        }
        rounds += 1;
        if rounds == ROUNDS_MAX {
            let message = format!("open cluster {cluster}: older sessions come and go");
            return Err(Code::WriterConflict.status(message));
        }
        settled = conflict::ask_rivals(base, registry, cluster, &claim, now_unix).await?;
    };
    // Again: while others were asked, a newer timeline may have come.
    base.check_timeline_here(cluster, lives_on)?;
    let (at, name) = (base.wal().clone(), cluster.clone());
    let writer = of_the_store(move || at.open_writer_of(&name, &request, lives_on)).await?;
    Ok(Opened { claimed, writer, segment_size, seam, unproven })
}

/// Asks the store, off the runtime's workers.
async fn of_the_store<T: Send + 'static>(
    question: impl FnOnce() -> Result<T, OpenError> + Send + 'static,
) -> Result<T, Status> {
    let asked = tokio::task::spawn_blocking(question).await;
    let answer = asked.map_err(|e| Code::Internal.status(format!("open writer: {e}")))?;
    answer.map_err(|error| match &error {
        OpenError::Refused { refusal, .. } => refusal_code(refusal).status(&error),
        OpenError::Failed(error) => errors::status(error),
    })
}

/// Of a timeline against which a person decided.
pub(super) fn retired(cluster: &ClusterName, timeline: TimelineId) -> Status {
    Code::RetiredTimeline
        .status(format!("stream cluster {cluster}: timeline {} was retired", timeline.get()))
}

fn refusal_code(refusal: &OpenRefusal) -> Code {
    match refusal {
        OpenRefusal::NotPinned | OpenRefusal::NoHistory(_) => Code::Invalid,
        OpenRefusal::Stale { .. } => Code::StaleTimeline,
        OpenRefusal::Retired { .. } => Code::RetiredTimeline,
        OpenRefusal::WriterPresent { .. } => Code::WriterConflict,
        OpenRefusal::WrongStart { .. }
        | OpenRefusal::NotSegmentStart { .. }
        | OpenRefusal::Missing { .. }
        | OpenRefusal::BadGap { .. } => Code::BadPosition,
    }
}
