//! The records that are kept beside a cluster's WAL, as values: what is damaged, what was removed, where `wal_level`
//! changed, and what only tier 2 had. The files and their rules are described where they are written: `damage.rs`,
//! `horizon.rs`, `levels.rs` and `takeover.rs`.

use crate::{
    Error,
    record::{self, Unknown},
};
use klio_pg::{Lsn, TimelineId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The hint for damaged WAL that nothing sends again.
pub(super) const NOT_ASKED: &str = "PostgreSQL is not asked for this again: take a base backup now (klio backup) to be protected from then on, and check the disk";
/// The hint for damaged WAL in the middle of a timeline, whose segment PostgreSQL may still have (`refill.rs`).
pub(super) const ASKED: &str = "klio stream asks PostgreSQL for it as long as PostgreSQL has it; if this problem stays, take a base backup now (klio backup) to be protected from then on, and check the disk";

/// WAL that was acknowledged and is damaged here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DamagedWal {
    pub timeline: TimelineId,
    /// Where the good WAL ends.
    pub from: Lsn,
    /// One past the last byte that is known to have been acknowledged.
    pub to: Lsn,
    /// The name of the damaged file in its timeline's directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept: Option<String>,
    /// The damaged file is a sealed file, not a journal.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub sealed: bool,
    /// Fields that a newer version wrote.
    #[serde(flatten)]
    pub unknown: Unknown,
}

impl DamagedWal {
    /// Whether a loss is proven.
    pub(super) fn is_loss(&self) -> bool {
        self.to > self.from
    }

    pub(super) fn is_of(&self, timeline: TimelineId, harm: Harm) -> bool {
        (self.timeline, self.from, self.to) == (timeline, harm.from, harm.to)
    }

    /// The problem as a sentence for people.
    pub(super) fn sentence(&self, who: Who) -> String {
        let Self { timeline, from, to, kept, sealed, .. } = self;
        let what = if *sealed { "the file" } else { "the journal" };
        let kept = match kept {
            Some(kept) => format!("{what} is kept as wal/{timeline}/{kept}"),
            None => "nothing is left of it".into(),
        };
        let next = match who {
            Who::Stream => "PostgreSQL is asked for it again; hint: check the disk".to_owned(),
            Who::Refill => format!("it is fetched from tier 2 if it is there; hint: {ASKED}"),
            Who::Tier2 => format!("only tier 2 may have it; hint: {NOT_ASKED}"),
            Who::Nobody => format!("its timeline is over; hint: {NOT_ASKED}"),
        };
        format!(
            "damaged on tier 1: WAL of timeline {timeline} from {from} to {to} was acknowledged but can no longer be read; {kept}; {next}"
        )
    }
}

/// Where damaged WAL can come from again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Who {
    /// The stream of its timeline, which resumes where the good WAL ends.
    Stream,
    /// A refill beside the stream (`refill.rs`).
    Refill,
    /// Only tier 2: PostgreSQL no longer has it.
    Tier2,
    /// Nothing: its timeline is over.
    Nobody,
}

/// Damage that was found behind the good frames of a journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Harm {
    /// Where the good WAL ends.
    pub(super) from: Lsn,
    /// As in [`DamagedWal`].
    pub(super) to: Lsn,
}

/// What was removed of a timeline.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Horizon {
    pub timeline: TimelineId,
    /// The first byte that was ever held.
    pub first: Lsn,
    /// Below this there is no WAL in either tier.
    pub held_from: Lsn,
    /// Below this WAL may be missing on tier 1.
    pub local_from: Lsn,
    /// Fields that a newer version wrote.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// Why a segment is not on tier 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Removed {
    /// Retention removed it for good.
    Expired,
    /// It was evicted from tier 1 and is in tier 2 only.
    Tier2Only,
}

/// By timeline.
pub(super) type Horizons = BTreeMap<TimelineId, Horizon>;

/// A change to or from `wal_level = minimal`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LevelChange {
    /// Timeline of the WAL record that changes the level.
    pub timeline: TimelineId,
    /// The first byte of that record.
    pub lsn: Lsn,
    /// True for a change to `minimal`, false for a change away from it.
    pub minimal: bool,
    /// Fields that a newer version wrote.
    #[serde(flatten)]
    pub unknown: Unknown,
}

impl LevelChange {
    /// Parses the bytes of the file from either tier. `place` is for the error.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn decode_all(bytes: &[u8], place: &str) -> Result<Vec<Self>, Error> {
        record::decode(bytes, place)
    }
}

/// Merges both lists in ascending order, without entries that change nothing.
pub fn join_levels(one: &[LevelChange], other: &[LevelChange]) -> Vec<LevelChange> {
    let mut all = [one, other].concat();
    all.sort_by_key(|change| (change.timeline, change.lsn));
    all.dedup_by_key(|change| (change.timeline, change.lsn));
    let mut minimal = None;
    all.retain(|change| {
        let before = minimal.replace((change.timeline, change.minimal));
        match before {
            Some((timeline, before)) if timeline == change.timeline => before != change.minimal,
            _ => change.minimal,
        }
    });
    all
}

/// The WAL that tier 2 had of a timeline when this tier 1 had less.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TakenOver {
    pub timeline: TimelineId,
    /// The first byte that tier 2 had.
    pub start: Lsn,
    /// The segment start where the stream continues.
    pub end: Lsn,
    /// Fields that a newer version wrote.
    #[serde(flatten)]
    pub unknown: Unknown,
}

impl TakenOver {
    pub(super) fn holds(&self, lsn: Lsn) -> bool {
        self.start <= lsn && lsn < self.end
    }
}

/// By timeline.
pub(super) type AllTakenOver = BTreeMap<TimelineId, TakenOver>;
