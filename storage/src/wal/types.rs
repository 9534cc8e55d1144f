//! What callers of the WAL store pass in and get back.

use super::reader::OpenSegment;
use crate::{
    Error, Op,
    crypt::{AtRest, Keys},
    layout::{Form, WalFile},
    record::Unknown,
};
use klio_pg::{Lsn, SegmentSize, TimelineId};
use serde::{Deserialize, Serialize};
use std::{
    fmt,
    fs::File,
    io::Read,
    path::{Path, PathBuf},
    sync::Arc,
};

/// What identifies a cluster's WAL, fixed at first contact (P8).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pinned {
    /// `IDENTIFY_SYSTEM`'s systemid.
    pub system_identifier: u64,
    /// `wal_segment_size`.
    pub segment_size: SegmentSize,
    /// `server_version_num`, 150000 or more.
    pub postgres_version: u32,
}

/// How far a timeline is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// The timeline.
    pub timeline: TimelineId,
    /// The first byte held.
    pub start: Lsn,
    /// One past the last durable byte; streaming resumes here. After a recorded gap at its end: the gap's end.
    pub flushed: Lsn,
    /// Everything held below this is in sealed files.
    pub sealed: Lsn,
    /// Whether the timeline's history file is stored.
    pub has_history: bool,
}

/// WAL that will never be here, on record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Gap {
    /// The timeline that was streamed when it was declared.
    pub timeline: TimelineId,
    /// The first missing byte.
    pub from: Lsn,
    /// One past the last missing byte; a segment's start.
    pub to: Lsn,
    /// Why, in the words of who declared it.
    pub reason: String,
    /// When, in seconds since 1970.
    pub recorded_unix: f64,
    /// What a newer version says besides.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// A gap that a sidecar declares when it opens a writer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GapDeclaration {
    /// The first missing byte: the durable position.
    pub from: Lsn,
    /// One past the last missing byte, a segment's start; the stream goes on here.
    pub to: Lsn,
    /// Why.
    pub reason: String,
}

/// Where a writer wants to begin.
#[derive(Debug, Clone, PartialEq)]
pub struct OpenRequest {
    /// The timeline that will be streamed.
    pub timeline: TimelineId,
    /// The first byte that will be appended.
    pub start: Lsn,
    /// WAL that is lost for good, if some is.
    pub gap: Option<GapDeclaration>,
    /// Now, in seconds since 1970: for the gap's record.
    pub now_unix: f64,
    /// Where the client's slot keeps WAL from, where it had one before: PostgreSQL was told that all below was flushed.
    pub slot_restart: Option<Lsn>,
}

/// Why a writer may not be opened there. Trying the same again will not help, except for `WriterPresent`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenRefusal {
    /// The cluster was never pinned.
    #[error("expected a cluster that was identified first, found none of that name")]
    NotPinned,
    /// A newer timeline is followed; a new timeline wins over an old one, never the other way round (P8). Unless the
    /// old one is on record as undecided.
    #[error("expected timeline {newest} or newer, found stale timeline {found}")]
    Stale {
        /// The timeline that is followed.
        newest: TimelineId,
        /// The one asked for.
        found: TimelineId,
    },
    /// A person decided against the timeline.
    #[error("expected a timeline that is not retired, found {timeline}: {reason}")]
    Retired {
        /// The one its PostgreSQL is on.
        timeline: TimelineId,
        /// What was found at the time.
        reason: String,
    },
    /// The history file of the timeline is not stored yet.
    #[error("expected the history file of timeline {0} to be stored first, found none")]
    NoHistory(TimelineId),
    /// The stream would overwrite or leave out bytes (P2).
    #[error("expected a start at {expected}, found {found}")]
    WrongStart {
        /// The durable position, or for a new timeline the start of the segment with its switch point.
        expected: Lsn,
        /// The one asked for.
        found: Lsn,
    },
    /// The first byte of a timeline must be a segment's first byte.
    #[error("expected a start at the beginning of a segment, {expected}, found {found}")]
    NotSegmentStart {
        /// The beginning of the segment it is in.
        expected: Lsn,
        /// The one asked for.
        found: Lsn,
    },
    /// WAL on the way to a new timeline was not received; stream it first, or declare the gap.
    #[error("expected WAL of timeline {timeline} from {from} to {to} to be held first, found none")]
    Missing {
        /// The timeline it is on.
        timeline: TimelineId,
        /// The first missing byte.
        from: Lsn,
        /// One past the last missing byte.
        to: Lsn,
    },
    /// The declared gap is not the one there is.
    #[error("expected a gap {expected}, found one from {from} to {to}")]
    BadGap {
        /// What it should have been.
        expected: String,
        /// As declared.
        from: Lsn,
        /// As declared.
        to: Lsn,
    },
    /// Another writer is alive; fence it first if it is to give way (WAL3).
    #[error("expected no other writer of timeline {timeline}, found one")]
    WriterPresent {
        /// The timeline it writes.
        timeline: TimelineId,
    },
}

/// Why a writer was not opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The request cannot be right.
    #[error("open writer of {cluster}: {refusal}")]
    Refused {
        /// The cluster.
        cluster: String,
        /// The cause.
        refusal: OpenRefusal,
    },
    /// The disk would not.
    #[error(transparent)]
    Failed(#[from] Error),
}

/// A finished file on disk.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredFile {
    /// What it is.
    pub file: WalFile,
    /// How it lies there.
    pub form: Form,
    /// Bytes on disk.
    pub size: u64,
    /// When it was written, in seconds since 1970.
    pub modified_unix: f64,
}

/// What sealing gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sealed {
    /// What it is.
    pub file: WalFile,
    /// How it lies there.
    pub form: Form,
    /// Bytes on disk.
    pub size: u64,
    /// SHA-256 of the file as it is on disk.
    pub sha256: [u8; 32],
}

/// How a stored file is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// As PostgreSQL wrote it.
    Plain,
    /// A standard zstd file.
    Zstd,
}

/// Where a WAL file can be read.
#[derive(Debug)]
pub enum Found {
    /// A finished file.
    Stored {
        /// What was found: the partial one where only that exists.
        file: WalFile,
        /// Where it lies.
        path: PathBuf,
        /// Bytes on disk.
        size: u64,
        /// Bytes after decoding.
        plain_size: u64,
        /// How to decode it, when it is decrypted.
        encoding: Encoding,
        /// What decrypts it, where it is encrypted.
        keys: Option<Keys>,
    },
    /// A segment that is not sealed: its durable bytes so far.
    Open(Box<OpenSegment>),
}

/// Opens a finished file of the real disk: gives what it holds, decrypted where there are keys. Errors while reading go
/// through [`crate::crypt::payload_error`].
///
/// # Errors
/// Of the disk; `Denied` or `Corrupt` of an encrypted one.
pub fn open_stored(path: &Path, keys: Option<&Keys>) -> Result<Box<dyn Read + Send>, Error> {
    let file = File::open(path).map_err(|e| Error::io(Op::Read, path, e))?;
    match keys {
        None => Ok(Box::new(file)),
        Some(keys) => Ok(Box::new(keys.decrypt(file).map_err(|e| e.at(path.display()))?)),
    }
}

/// Settings of a store; `default()` is right for real disks.
#[derive(Clone)]
pub struct WalOptions {
    /// Bytes written ahead of need when a journal has to grow.
    pub preallocate: u64,
    /// Recycled files kept for each cluster.
    pub spares: usize,
    /// Idle compression contexts kept for the whole store (about 2 MiB each).
    pub contexts: usize,
    /// Random numbers for journal ids.
    pub next_id: Arc<dyn Fn() -> u64 + Send + Sync>,
    /// Whether and with what everything is encrypted.
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
