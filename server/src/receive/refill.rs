//! Receives a segment again whose acknowledged WAL was lost on tier 1, beside the stream of the same writer.
//!
//! - Only the writer that streams the cluster's history now may refill a segment, and only one that its history went
//!   through (P11). The bytes are compared with what is left of the segment and with what follows it. Nothing is
//!   changed until all of them have arrived.
//! - The stream continues meanwhile: no position moves, and none of the writer's locks is taken.

use super::Receiver;
use crate::errors::blocking;
use bytes::Bytes;
use klio_pg::{Lsn, TimelineHistory, TimelineId};
use klio_proto::{Code, wal::RefillBegin};
use klio_storage::layout::ClusterName;
use std::future::Future;
use tonic::Status;

/// A segment in pieces.
pub trait Pieces {
    /// The next piece; `None` after the last.
    fn next(&mut self) -> impl Future<Output = Result<Option<Bytes>, Status>> + Send;
}

/// Receives one segment.
///
/// # Errors
/// `WRONG_SYSTEM`; `BAD_POSITION` without a live stream of the same history; an error of the store when the bytes do
/// not fit.
pub async fn take(
    receiver: &Receiver,
    cluster: &ClusterName,
    begin: RefillBegin,
    mut pieces: impl Pieces,
) -> Result<(), Status> {
    let RefillBegin { system, writer_id, timeline, start, .. } = begin;
    receiver.base.check_system(cluster, system).await?;
    let lives_on = receiver.registry.cluster(cluster).lives_of(&writer_id);
    let end = start.checked_add(system.segment_size.bytes());
    let history = |own| receiver.store.history(cluster, own).ok();
    let passed = |own| end.is_some_and(|end| goes_through(own, history(own), timeline, end));
    if !lives_on.is_some_and(passed) {
        return Err(Code::BadPosition.status(format!(
            "refill a damaged segment: expected a live stream of the same writer that came from timeline {timeline}, found none"
        )));
    }
    let (store, name) = (receiver.store.clone(), cluster.clone());
    let mut refill = blocking(move || store.refill(&name, timeline, start)).await?;
    while let Some(piece) = pieces.next().await? {
        refill = blocking(move || refill.push(&piece).map(|()| refill)).await?;
    }
    let file = blocking(move || refill.finish()).await?;
    receiver.sealer.push(cluster.clone(), file, tracing::Span::current());
    Ok(())
}

/// Whether the WAL of `timeline` up to `end` is in the past of a PostgreSQL on timeline `own`.
fn goes_through(
    own: TimelineId,
    history: Option<TimelineHistory>,
    timeline: TimelineId,
    end: Lsn,
) -> bool {
    let ended = history.and_then(|history| history.end_of(timeline));
    own == timeline || ended.is_some_and(|ended| end <= ended)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_wal_of_the_streams_own_past_is_taken() {
        let tli = |number| TimelineId::new(number).unwrap();
        let history = || TimelineHistory::parse(tli(3), b"1\t0/5000000\tx\n").ok();
        let asked = |timeline, end| goes_through(tli(3), history(), tli(timeline), Lsn::new(end));
        assert!(asked(3, 0x900_0000) && asked(1, 0x500_0000));
        assert!(!asked(1, 0x600_0000), "behind where it left");
        assert!(!asked(2, 0x400_0000), "another branch");
        assert!(!goes_through(tli(3), None, tli(1), Lsn::new(0x400_0000)));
    }
}
