//! Creates one span for each segment being received, never one for each message.
//!
//! The span begins with the segment's first byte, continues the sidecar's trace, and goes on into sealing, so that one
//! trace id follows a segment from PostgreSQL to the bucket.

use super::batch::Chunk;
use klio_pg::{Lsn, SegmentName, SegmentSize, TimelineId};
use klio_storage::layout::{ClusterName, WalFile};
use std::collections::BTreeMap;
use tracing::Span;

/// Spans of the segments that have begun to arrive and are not complete.
pub struct SegmentSpans {
    cluster: ClusterName,
    timeline: TimelineId,
    size: SegmentSize,
    open: BTreeMap<SegmentName, Receiving>,
}

/// A segment's span and counters.
struct Receiving {
    span: Span,
    bytes: u64,
    messages: u64,
}

impl SegmentSpans {
    pub fn new(cluster: ClusterName, timeline: TimelineId, size: SegmentSize) -> Self {
        Self { cluster, timeline, size, open: BTreeMap::new() }
    }

    /// Begins spans for the segments that this chunk is the first of, and counts its bytes.
    pub fn arrive(&mut self, chunk: &Chunk) {
        let last = Lsn::new(chunk.start.as_u64() + (chunk.data.len() as u64).saturating_sub(1));
        for at in [chunk.start, last] {
            let name = SegmentName::containing(self.timeline, at, self.size);
            if !self.open.contains_key(&name) {
                let span = self.begin(name, &chunk.traceparent);
                self.open.insert(name, Receiving { span, bytes: 0, messages: 0 });
            }
        }
        let name = SegmentName::containing(self.timeline, chunk.start, self.size);
        if let Some(receiving) = self.open.get_mut(&name) {
            receiving.bytes += chunk.data.len() as u64;
            receiving.messages += 1;
        }
    }

    fn begin(&self, name: SegmentName, traceparent: &str) -> Span {
        let span = tracing::info_span!(
            parent: None,
            "wal.receive",
            cluster = %self.cluster,
            segment = %name,
            bytes = tracing::field::Empty,
            messages = tracing::field::Empty,
        );
        if !traceparent.is_empty() {
            klio_telemetry::propagate::adopt(&span, &|key| {
                (key == "traceparent").then(|| traceparent.to_owned())
            });
        }
        span
    }

    /// Ends receiving a segment, and returns its span for the work that follows.
    pub fn finish(&mut self, file: WalFile) -> Span {
        match file {
            WalFile::Segment(name) => self.open.remove(&name).map_or_else(Span::none, |received| {
                received.span.record("bytes", received.bytes);
                received.span.record("messages", received.messages);
                received.span
            }),
            _ => Span::none(),
        }
    }
}
