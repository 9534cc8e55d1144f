//! Opens a session: the caller's claim, what the store holds, and the one place of the cluster.
//!
//! Order: pinned system, stale timeline, place (fences an earlier session), writer. Nothing but the name's system is
//! written before all but the last have agreed. Who the cluster is, over both tiers, is `base`'s to say (P8).

use super::{
    compare::{Comparer, Continuity},
    registry::{Claim, Place, Registry},
};
use crate::{
    base::{BaseStore, lost_with_tier1},
    errors,
};
use klio_pg::SegmentSize;
use klio_proto::{Code, wal::Open};
use klio_storage::{
    layout::ClusterName,
    wal::{GapDeclaration, OpenError, OpenRefusal, OpenRequest, Seam, Writer},
};
use std::sync::Arc;
use tonic::Status;

/// A session that may begin.
pub struct Opened {
    /// The cluster's one place.
    pub place: Place,
    /// The store's one writer.
    pub writer: Writer,
    /// wal_segment_size.
    pub segment_size: SegmentSize,
    /// Looks at the first new record, where nothing else proved that it continues what is held (P11).
    pub seam: Option<Seam>,
    /// Why nothing proved it, to be recorded with the first byte.
    pub unproven: Option<String>,
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
/// `WRONG_SYSTEM`, `DIVERGED`, `STALE_TIMELINE`, `WRITER_CONFLICT`, `BAD_POSITION` or what the disk says; `UNAVAILABLE` when the bucket
/// has to be asked at first contact and does not answer.
pub async fn open(
    base: &BaseStore,
    comparer: &Comparer,
    registry: &Arc<Registry>,
    cluster: &ClusterName,
    who: String,
    open: Open,
    now_unix: f64,
) -> Result<Opened, Status> {
    let segment_size = open.system.segment_size;
    base.pin(cluster, open.system).await?;
    base.check_timeline(cluster, open.timeline).await?;
    let claim = Claim { writer_id: open.writer_id.clone(), who, timeline: open.timeline };
    let place = registry.claim(cluster, claim).await?;
    // Again: the session that was fenced may have been a newer timeline's.
    base.check_timeline_here(cluster, open.timeline)?;
    // After the fence: nobody else appends from here on.
    let mut taken_over = false;
    if lacks(base, cluster, &open) {
        taken_over = base.take_over(cluster, &open, now_unix).await?;
    }
    let Continuity { seam, unproven } = comparer.continuity(cluster, &open).await?;
    let lost = taken_over || begins_lost(base, cluster, &open);
    let writer = match begin(base, cluster, request_of(&open, lost, now_unix)).await {
        // Tier 2 may hold a timeline that tier 1 has nothing of: its disk was set back.
        Err(Refused::Position(status)) if !taken_over => {
            if !base.take_over(cluster, &open, now_unix).await? {
                return Err(status);
            }
            begin(base, cluster, request_of(&open, true, now_unix)).await
        }
        other => other,
    };
    let writer = writer.map_err(|refused| match refused {
        Refused::Position(status) | Refused::Other(status) => status,
    })?;
    Ok(Opened { place, writer, segment_size, seam, unproven })
}

/// Whether tier 1 holds less than what the stream continues: nothing at all, or not up to its beginning.
fn lacks(base: &BaseStore, cluster: &ClusterName, open: &Open) -> bool {
    let positions = base.wal().positions(cluster);
    let held = positions.iter().find(|p| p.timeline == open.timeline).map(|p| p.flushed);
    let from = open.gap.as_ref().map_or(open.start, |gap| gap.from);
    positions.is_empty() || held.is_some_and(|held| held < from)
}

/// Whether a declared gap begins right where what was taken over ends, with nothing received since.
fn begins_lost(base: &BaseStore, cluster: &ClusterName, open: &Open) -> bool {
    let from = open.gap.as_ref().map(|gap| gap.from);
    let taken = base.wal().taken_over(cluster);
    taken.iter().any(|taken| taken.timeline == open.timeline && Some(taken.end) == from)
}

/// `lost`: what is declared missing was acknowledged to a tier 1 that is gone.
fn request_of(open: &Open, lost: bool, now_unix: f64) -> OpenRequest {
    let gap = open.gap.as_ref().map(|gap| {
        let reason = match lost {
            true => lost_with_tier1(&gap.reason),
            false => gap.reason.clone(),
        };
        GapDeclaration { from: gap.from, to: gap.to, reason }
    });
    let (timeline, start, slot_restart) = (open.timeline, open.start, open.slot_restart);
    OpenRequest { timeline, start, gap, now_unix, slot_restart }
}

/// Why no writer was opened.
enum Refused {
    /// It would leave out or overwrite WAL, by what tier 1 knows.
    Position(Status),
    Other(Status),
}

async fn begin(
    base: &BaseStore,
    cluster: &ClusterName,
    request: OpenRequest,
) -> Result<Writer, Refused> {
    let (at, name) = (base.wal().clone(), cluster.clone());
    let opened = tokio::task::spawn_blocking(move || at.open_writer(&name, &request)).await;
    let opened =
        opened.map_err(|e| Refused::Other(Code::Internal.status(format!("open writer: {e}"))))?;
    opened.map_err(|error| match &error {
        OpenError::Refused { refusal, .. } => match refusal_code(refusal) {
            Code::BadPosition => Refused::Position(Code::BadPosition.status(&error)),
            code => Refused::Other(code.status(&error)),
        },
        OpenError::Failed(error) => Refused::Other(errors::status(error)),
    })
}

fn refusal_code(refusal: &OpenRefusal) -> Code {
    match refusal {
        OpenRefusal::NotPinned | OpenRefusal::NoHistory(_) => Code::Invalid,
        OpenRefusal::Stale { .. } => Code::StaleTimeline,
        OpenRefusal::WriterPresent { .. } => Code::WriterConflict,
        OpenRefusal::WrongStart { .. }
        | OpenRefusal::NotSegmentStart { .. }
        | OpenRefusal::Missing { .. }
        | OpenRefusal::BadGap { .. } => Code::BadPosition,
    }
}
