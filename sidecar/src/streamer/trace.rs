//! One span for each segment that is sent, as the root of its own trace. Messages get no spans of their own.
//!
//! The segment's first message carries the trace context. The server's spans for receiving, sealing, queueing and
//! uploading continue it, so that one trace id follows a segment from PostgreSQL to the bucket.

use klio_pg::{Lsn, SegmentName, SegmentSize, TimelineId};
use tracing::Span;

/// The span of the segment that is being sent.
#[derive(Debug)]
pub(super) struct SegmentTrace {
    cluster: String,
    timeline: TimelineId,
    size: SegmentSize,
    current: Option<(SegmentName, Span)>,
    /// Bytes sent of the current segment.
    bytes: u64,
    messages: u64,
}

impl SegmentTrace {
    pub const fn new(cluster: String, timeline: TimelineId, size: SegmentSize) -> Self {
        Self { cluster, timeline, size, current: None, bytes: 0, messages: 0 }
    }

    /// Bytes from `at` to the end of its segment. No message crosses a segment boundary.
    pub const fn left_in_segment(&self, at: Lsn) -> u64 {
        self.size.bytes() - at.offset_in(self.size)
    }

    /// The trace context to send with a message of `bytes` at `at`; empty unless the message is the first of its
    /// segment.
    pub fn context(&mut self, at: Lsn, bytes: u64) -> String {
        let name = SegmentName::containing(self.timeline, at, self.size);
        if matches!(&self.current, Some((current, _)) if *current == name) {
            self.bytes += bytes;
            self.messages += 1;
            return String::new();
        }
        self.end();
        (self.bytes, self.messages) = (bytes, 1);
        let span = tracing::info_span!(
            parent: None,
            "wal.send",
            cluster = self.cluster,
            segment = %name,
            bytes = tracing::field::Empty,
            messages = tracing::field::Empty,
        );
        let mut context = String::new();
        span.in_scope(|| {
            klio_telemetry::propagate::inject(&mut |key, value| {
                if key == "traceparent" {
                    context = value;
                }
            });
        });
        // The sidecar's only log line about a segment; it carries the trace id.
        span.in_scope(|| tracing::debug!("sending a WAL segment"));
        self.current = Some((name, span));
        context
    }

    fn end(&mut self) {
        if let Some((_, span)) = self.current.take() {
            span.record("bytes", self.bytes);
            span.record("messages", self.messages);
        }
    }
}

impl Drop for SegmentTrace {
    fn drop(&mut self) {
        self.end();
    }
}
