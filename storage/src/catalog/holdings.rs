//! What WAL and which timelines are held of a cluster: the facts that recovery is planned from.
//!
//! The same from a server (both tiers and the open segment) and from a listing of the bucket alone.
//! A run is contiguous: every byte between its ends can be given back.

use klio_pg::{Lsn, TimelineId};
use serde::{Deserialize, Serialize};

/// A cluster's WAL.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Holdings {
    /// Bytes; 0 when nothing is known.
    pub segment_size: u32,
    /// Text, as many JSON readers round large numbers.
    pub system_identifier: String,
    /// Ascending.
    pub timelines: Vec<TimelineHoldings>,
    /// WAL that is known never to come.
    pub gaps: Vec<KnownGap>,
    /// Clock of who made this, Unix seconds.
    pub as_of_unix: f64,
}

/// A timeline's WAL.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TimelineHoldings {
    /// Which.
    pub timeline: TimelineId,
    /// Its history file as PostgreSQL wrote it; timeline 1 has none.
    pub history: Option<String>,
    /// Ascending, not touching each other.
    pub runs: Vec<Run>,
    /// Receiving it now, and all that PostgreSQL has is here: then the state at any later moment up to
    /// `as_of_unix` is the state at the end of the last run.
    pub caught_up: bool,
}

/// A contiguous run of WAL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// Its first byte.
    pub start: Lsn,
    /// One past its last byte.
    pub end: Lsn,
}

/// A recorded gap.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct KnownGap {
    /// Which timeline.
    pub timeline: TimelineId,
    /// First byte missing.
    pub from: Lsn,
    /// First byte held again.
    pub to: Lsn,
    /// Why.
    pub reason: String,
}
