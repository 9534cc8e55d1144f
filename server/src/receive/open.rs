//! Opens a session: the caller's claim, what the store holds, and the one place of the cluster.
//!
//! Order: pinned system, stale timeline, place (fences an earlier session), writer. Nothing but the name's system is
//! written before all but the last have agreed. Who the cluster is, over both tiers, is `base`'s to say (P8).

use super::{
    compare::{Comparer, Continuity},
    registry::{Claim, Place, Registry},
};
use crate::{base::BaseStore, errors};
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
    let Continuity { seam, unproven } = comparer.continuity(cluster, &open).await?;
    let request = OpenRequest {
        timeline: open.timeline,
        start: open.start,
        gap: open.gap.map(|g| GapDeclaration { from: g.from, to: g.to, reason: g.reason }),
        now_unix,
        slot_restart: open.slot_restart,
    };
    let (at, name) = (base.wal().clone(), cluster.clone());
    let opened = tokio::task::spawn_blocking(move || at.open_writer(&name, &request)).await;
    let opened = opened.map_err(|e| Code::Internal.status(format!("open writer: {e}")))?;
    let writer = opened.map_err(|error| match &error {
        OpenError::Refused { refusal, .. } => refusal_code(refusal).status(&error),
        OpenError::Failed(error) => errors::status(error),
    })?;
    Ok(Opened { place, writer, segment_size, seam, unproven })
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
