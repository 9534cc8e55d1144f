//! One span for each segment being received, never one for each message.
//!
//! The span begins with the segment's first byte, continues the sidecar's trace and goes on into
//! sealing, so that one trace id follows a segment from PostgreSQL to the bucket.

use super::batch::Chunk;
use klio_pg::{Lsn, SegmentName, SegmentSize, TimelineId};
use klio_storage::layout::{ClusterName, WalFile};
use std::collections::BTreeMap;
use tracing::Span;

/// Spans of the segments that have begun to arrive and are not finished.
pub struct SegmentSpans {
    cluster: ClusterName,
    timeline: TimelineId,
    size: SegmentSize,
    open: BTreeMap<SegmentName, Span>,
}

impl SegmentSpans {
    /// None yet.
    pub fn new(cluster: ClusterName, timeline: TimelineId, size: SegmentSize) -> Self {
        Self { cluster, timeline, size, open: BTreeMap::new() }
    }

    /// Begins spans for segments that this chunk is the first of.
    pub fn arrive(&mut self, chunk: &Chunk) {
        let last = Lsn::new(chunk.start.as_u64() + (chunk.data.len() as u64).saturating_sub(1));
        for at in [chunk.start, last] {
            let name = SegmentName::containing(self.timeline, at, self.size);
            if self.open.contains_key(&name) {
                continue;
            }
            let span = tracing::info_span!(
                parent: None, "wal.receive", cluster = %self.cluster, segment = %name
            );
            if !chunk.traceparent.is_empty() {
                klio_telemetry::propagate::adopt(&span, &|key| {
                    (key == "traceparent").then(|| chunk.traceparent.clone())
                });
            }
            self.open.insert(name, span);
        }
    }

    /// The span of a finished segment, to go on with.
    pub fn finish(&mut self, file: WalFile) -> Span {
        match file {
            WalFile::Segment(name) => self.open.remove(&name).unwrap_or_else(Span::none),
            _ => Span::none(),
        }
    }
}
