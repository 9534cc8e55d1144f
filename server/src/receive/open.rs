//! Opens a session: the caller's claim, what the store holds, and the one place of the cluster.
//!
//! Order: pinned system, stale timeline, place (fences an earlier session), writer. Nothing is
//! written before all but the last have agreed.

use super::registry::{Claim, Place, Registry};
use crate::errors;
use klio_pg::SegmentSize;
use klio_proto::{Code, wal::Open};
use klio_storage::{
    layout::ClusterName,
    wal::{GapDeclaration, OpenError, OpenRefusal, OpenRequest, Pinned, WalStore, Writer},
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
}

/// What is pinned at first contact.
pub fn pinned(system: klio_proto::wal::System) -> Pinned {
    Pinned {
        system_identifier: system.system_identifier,
        segment_size: system.segment_size,
        postgres_version: system.postgres_version,
    }
}

/// P8: refuses a PostgreSQL other than the one pinned at first contact. Writes nothing.
pub fn check_system(
    store: &WalStore,
    cluster: &ClusterName,
    found: klio_proto::wal::System,
) -> Result<(), Status> {
    let Some(pinned) = store.pinned(cluster) else { return Ok(()) };
    let refuse = |what: &str, expected: String, found: String| {
        Err(Code::WrongSystem
            .status(format!("open cluster {cluster}: expected {what} {expected}, found {found}")))
    };
    let (expected, id) = (pinned.system_identifier, found.system_identifier);
    if expected != id {
        return refuse("system identifier", expected.to_string(), id.to_string());
    }
    let (expected, size) = (pinned.segment_size.bytes(), found.segment_size.bytes());
    if expected != size {
        return refuse("WAL segment size", expected.to_string(), size.to_string());
    }
    Ok(())
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
/// `WRONG_SYSTEM`, `STALE_TIMELINE`, `WRITER_CONFLICT`, `BAD_POSITION` or what the disk says.
pub async fn open(
    store: &WalStore,
    registry: &Arc<Registry>,
    cluster: &ClusterName,
    who: String,
    open: Open,
    now_unix: f64,
) -> Result<Opened, Status> {
    check_system(store, cluster, open.system)?;
    let pin = pinned(open.system);
    let segment_size = open.system.segment_size;
    let (at, name) = (store.clone(), cluster.clone());
    blocking(move || at.pin(&name, pin)).await?;
    refuse_stale(store, cluster, &open)?;
    let claim = Claim { writer_id: open.writer_id.clone(), who, timeline: open.timeline };
    let place = registry.claim(cluster, claim).await?;
    // Again: the session that was fenced may have been a newer timeline's.
    refuse_stale(store, cluster, &open)?;
    let request = OpenRequest {
        timeline: open.timeline,
        start: open.start,
        gap: open.gap.map(|g| GapDeclaration { from: g.from, to: g.to, reason: g.reason }),
        now_unix,
    };
    let (at, name) = (store.clone(), cluster.clone());
    let opened = tokio::task::spawn_blocking(move || at.open_writer(&name, &request)).await;
    let opened = opened.map_err(|e| Code::Internal.status(format!("open writer: {e}")))?;
    let writer = opened.map_err(|error| match &error {
        OpenError::Refused { refusal, .. } => refusal_code(refusal).status(&error),
        OpenError::Failed(error) => errors::status(error),
    })?;
    Ok(Opened { place, writer, segment_size })
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

/// P8: a new timeline wins over an old one, never the other way round.
fn refuse_stale(store: &WalStore, cluster: &ClusterName, open: &Open) -> Result<(), Status> {
    let newest = store.positions(cluster).iter().map(|p| p.timeline).max();
    match newest {
        Some(newest) if newest > open.timeline => Err(Code::StaleTimeline.status(format!(
            "open cluster {cluster}: expected timeline {newest:?} or newer, found {:?}",
            open.timeline
        ))),
        _ => Ok(()),
    }
}
