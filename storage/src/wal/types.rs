//! What callers of the WAL store pass in and get back.

use crate::{
    Error,
    crypt::AtRest,
    layout::{Form, WalFile},
    record::Unknown,
};
use klio_pg::{Lsn, SegmentSize, TimelineId};
use serde::{Deserialize, Serialize};
use std::{fmt, sync::Arc};

/// What identifies a cluster's WAL; fixed at first contact (P8).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pinned {
    /// `IDENTIFY_SYSTEM`'s systemid.
    pub system_identifier: u64,
    /// `wal_segment_size`.
    pub segment_size: SegmentSize,
    /// `server_version_num`, 150000 or more.
    pub postgres_version: u32,
}

/// How far a timeline was received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    pub timeline: TimelineId,
    /// The first byte of WAL.
    pub start: Lsn,
    /// One past the last durable byte, where streaming resumes. After a recorded gap at the end: the end of the gap.
    pub flushed: Lsn,
    /// All WAL below this is in sealed files.
    pub sealed: Lsn,
    pub has_history: bool,
}

/// WAL that is recorded as lost.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Gap {
    /// The timeline that was streamed when it was declared.
    pub timeline: TimelineId,
    /// The first missing byte.
    pub from: Lsn,
    /// One past the last missing byte; a segment's start.
    pub to: Lsn,
    /// The reason in the words of whoever declared the gap.
    pub reason: String,
    /// Seconds since 1970.
    pub recorded_unix: f64,
    /// Fields that a newer version wrote.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// A gap that a sidecar declares when it opens a writer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GapDeclaration {
    /// The first missing byte: the durable position.
    pub from: Lsn,
    /// One past the last missing byte, a segment boundary; the stream continues here.
    pub to: Lsn,
    pub reason: String,
}

/// Where a writer wants to begin, and what the client knows about it.
#[derive(Debug, Clone, PartialEq)]
pub struct OpenRequest {
    /// The timeline that will be streamed.
    pub timeline: TimelineId,
    /// The first byte that will be appended.
    pub start: Lsn,
    /// WAL that is lost for good, if any.
    pub gap: Option<GapDeclaration>,
    /// The current time in seconds since 1970, for the gap's record.
    pub now_unix: f64,
    /// The position from which the client's slot retains WAL, if it had one before: PostgreSQL was told that everything
    /// below was flushed.
    pub slot_restart: Option<Lsn>,
}

/// Why a writer may not be opened. Retrying does not help, except for `WriterPresent`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenRefusal {
    /// The cluster was never pinned.
    #[error("expected a pinned cluster, found none of that name")]
    NotPinned,
    /// A newer timeline is followed: a new timeline replaces an old one, never the other way round (P8), unless the old
    /// one is recorded as undecided.
    #[error("expected timeline {newest} or newer, found stale timeline {found}")]
    Stale {
        /// The timeline that is followed.
        newest: TimelineId,
        /// The requested timeline.
        found: TimelineId,
    },
    /// A person decided against the timeline.
    #[error("expected a timeline that is not retired, found {timeline}: {reason}")]
    Retired {
        /// The timeline of the client's PostgreSQL.
        timeline: TimelineId,
        /// The recorded reason.
        reason: String,
    },
    /// The history file of the timeline is not stored yet.
    #[error("expected the history file of timeline {0} to be stored first, found none")]
    NoHistory(TimelineId),
    /// The stream would overwrite or skip bytes (P2).
    #[error("expected a start at {expected}, found {found}")]
    WrongStart {
        /// The durable position; for a new timeline, the start of the segment with its switch point.
        expected: Lsn,
        /// The requested start.
        found: Lsn,
    },
    /// The first byte of a timeline must be a segment's first byte.
    #[error("expected a start at the beginning of a segment, {expected}, found {found}")]
    NotSegmentStart {
        /// The beginning of the segment that contains the requested start.
        expected: Lsn,
        /// The requested start.
        found: Lsn,
    },
    /// WAL before a new timeline was not received: stream it first, or declare the gap.
    #[error(
        "expected WAL of timeline {timeline} from {from} to {to} to be stored first, found none"
    )]
    Missing {
        /// The timeline of the missing WAL.
        timeline: TimelineId,
        /// The first missing byte.
        from: Lsn,
        /// One past the last missing byte.
        to: Lsn,
    },
    /// The declared gap does not match the missing WAL.
    #[error("expected a gap {expected}, found one from {from} to {to}")]
    BadGap {
        /// The expected gap, in words.
        expected: String,
        from: Lsn,
        to: Lsn,
    },
    /// Another writer is active; fence it first if it should be replaced (WAL3).
    #[error("expected no other writer of timeline {timeline}, found one")]
    WriterPresent { timeline: TimelineId },
}

/// Why a writer was not opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The request was refused.
    #[error("open writer of {cluster}: {refusal}")]
    Refused { cluster: String, refusal: OpenRefusal },
    /// The disk failed.
    #[error(transparent)]
    Failed(#[from] Error),
}

/// A finished file on disk.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredFile {
    pub file: WalFile,
    pub form: Form,
    /// Bytes on disk.
    pub size: u64,
    /// Modification time, in seconds since 1970.
    pub modified_unix: f64,
}

/// The result of sealing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sealed {
    pub file: WalFile,
    pub form: Form,
    /// Bytes on disk.
    pub size: u64,
    /// SHA-256 of the stored file.
    pub sha256: [u8; 32],
}

/// Settings of a store; `default()` is right for real disks.
#[derive(Clone)]
pub struct WalOptions {
    /// Bytes that are preallocated whenever a journal has to grow.
    pub preallocate: u64,
    /// Number of recycled files kept for each cluster.
    pub spares: usize,
    /// Number of idle compression contexts kept for the whole store (about 2 MiB each).
    pub contexts: usize,
    /// The source of random journal ids.
    pub next_id: Arc<dyn Fn() -> u64 + Send + Sync>,
    pub at_rest: AtRest,
}

impl Default for WalOptions {
    fn default() -> Self {
        Self {
            preallocate: 1 << 20,
            spares: 2,
            contexts: 4,
            next_id: Arc::new(rand::random),
            at_rest: AtRest::Off,
        }
    }
}

impl fmt::Debug for WalOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { preallocate, spares, contexts, next_id: _, at_rest } = self;
        f.debug_struct("WalOptions")
            .field("preallocate", preallocate)
            .field("spares", spares)
            .field("contexts", contexts)
            .field("at_rest", at_rest)
            .finish_non_exhaustive()
    }
}
