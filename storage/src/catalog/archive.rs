//! How far each timeline of a cluster is archived without a hole. Pure.
//!
//! FRONTIER1  the frontier of a timeline is the end of the unbroken run of archived segments that begins with the
//!            timeline's first segment in either tier. It is never simply the latest upload (P5).
//! FRONTIER2  recording an upload never moves a frontier back. Only `hold` may, when tier 1 turns out to have an
//!            earlier segment than was known, and `rebuild`, from listings of both tiers.
//! FRONTIER3  a recorded gap does not end the run, because its WAL will never arrive: the frontier continues behind it.
//!            If a gap begins inside a segment, the bytes before it are a partial segment, and the frontier waits for
//!            that one too. Other partial segments and history files do not affect the frontier.
//!
//! Gaps are passed in and never stored here: tier 1 has them on record, and two records could differ. Archived segments
//! are stored as ranges, so memory grows with the number of holes and not with the amount of WAL.

use crate::{layout::WalFile, wal::Gap};
use klio_pg::{Lsn, SegmentSize, TimelineId};
use std::collections::{BTreeMap, BTreeSet};

#[cfg(test)]
mod tests;

/// What is known to be archived of one cluster.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Archive {
    segment_size: SegmentSize,
    timelines: BTreeMap<u32, Run>,
    /// Timelines whose history file is archived.
    histories: BTreeSet<u32>,
    totals: Totals,
    latest_archived_unix: Option<u64>,
    /// Objects whose size differs from the local file's although their plaintext is the same: this was proven once and
    /// need not be compared again. Maps the name to the object's size.
    other_sizes: BTreeMap<String, u64>,
}

/// What tier 2 has of a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct Totals {
    /// WAL files of all kinds.
    pub files: u64,
    /// Their size in the object store.
    pub bytes: u64,
}

/// How far one timeline is archived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frontier {
    pub timeline: TimelineId,
    /// Start of the timeline's first segment.
    pub start: Lsn,
    /// Everything from `start` up to here is archived, or is in a recorded gap.
    pub archived: Lsn,
}

/// Segments of one timeline as numbers (LSN divided by segment size).
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
struct Run {
    /// The first complete segment in either tier.
    start: Option<u64>,
    /// Archived segments as ranges (first to one past the last), which neither overlap nor touch.
    archived: BTreeMap<u64, u64>,
    /// Partial segments in either tier, and whether they are archived.
    partials: BTreeMap<u64, bool>,
}

/// A recorded gap in whole segments.
struct Hole {
    /// The segment of which only the beginning exists.
    partial: Option<u64>,
    /// The first segment that is missing entirely.
    first: u64,
    /// The segment with which WAL continues.
    end: u64,
}

impl Hole {
    fn of(gap: &Gap, segment_size: SegmentSize) -> Self {
        let number = |lsn: Lsn| lsn.as_u64() / segment_size.bytes();
        let inside = gap.from.offset_in(segment_size) != 0;
        let first = number(gap.from) + u64::from(inside);
        Self { partial: inside.then(|| number(gap.from)), first, end: number(gap.to) }
    }
}

impl Run {
    fn has(&self, number: u64) -> bool {
        self.end_of_range(number).is_some()
    }

    /// One past the last segment of the archived range that contains `number`.
    fn end_of_range(&self, number: u64) -> Option<u64> {
        let (_, end) = self.archived.range(..=number).next_back()?;
        (number < *end).then_some(*end)
    }

    fn hold(&mut self, number: u64) {
        self.start = Some(self.start.map_or(number, |start| start.min(number)));
    }

    fn archive(&mut self, number: u64) {
        if self.has(number) {
            return;
        }
        let before = self.archived.range(..number).next_back().filter(|(_, end)| **end == number);
        let first = before.map_or(number, |(first, _)| *first);
        let end = self.archived.remove(&(number + 1)).unwrap_or(number + 1);
        self.archived.insert(first, end);
    }

    /// Start and end of the run; `None` without any segment. The bytes before a gap may be all that exists of the first
    /// segment.
    fn frontier(&self, holes: &[Hole]) -> Option<(u64, u64)> {
        let partials = holes.iter().filter_map(|hole| hole.partial);
        let held = partials.filter(|number| self.partials.contains_key(number));
        let start = held.chain(self.start).min()?;
        let mut at = start;
        // This terminates: each step moves forward, to one of finitely many range ends.
        while let Some(next) = self.step(at, holes) {
            at = next;
        }
        Some((start, at))
    }

    fn step(&self, at: u64, holes: &[Hole]) -> Option<u64> {
        let over = |hole: &Hole| match hole {
            Hole { first, end, .. } if (*first..*end).contains(&at) => Some(*end),
            Hole { partial, .. }
                if *partial == Some(at) && self.partials.get(&at) == Some(&true) =>
            {
                Some(at + 1)
            }
            _ => None,
        };
        self.end_of_range(at).or_else(|| holes.iter().find_map(over))
    }
}

impl Archive {
    /// An empty archive.
    pub const fn new(segment_size: SegmentSize) -> Self {
        Self {
            segment_size,
            timelines: BTreeMap::new(),
            histories: BTreeSet::new(),
            totals: Totals { files: 0, bytes: 0 },
            latest_archived_unix: None,
            other_sizes: BTreeMap::new(),
        }
    }

    /// Computes the archive from listings of both tiers. `held` is tier 1; `archived` is what tier 2 was proven to
    /// have, with the sizes and times of the objects. Facts that only earlier uploads could tell are preserved.
    pub fn rebuild(
        &self,
        held: impl IntoIterator<Item = WalFile>,
        archived: impl IntoIterator<Item = (WalFile, u64, u64)>,
    ) -> Self {
        let mut next = Self::new(self.segment_size);
        next.latest_archived_unix = self.latest_archived_unix;
        next.hold(held);
        for (file, size, modified_unix) in archived {
            if let Some(known) = self.other_sizes.get_key_value(&file.to_string())
                && *known.1 == size
            {
                next.other_sizes.insert(known.0.clone(), size);
            }
            next.record(file, size, Some(modified_unix));
        }
        next
    }

    /// Adds files on tier 1: the first segment of a timeline is where its run begins. A segment before the known
    /// beginning counts as not archived, so the frontier goes back to it (FRONTIER1).
    pub fn hold(&mut self, files: impl IntoIterator<Item = WalFile>) {
        for file in files {
            let Some(number) = self.number(file) else { continue };
            let run = self.timelines.entry(file.timeline().get()).or_default();
            match file {
                WalFile::Partial(_) => {
                    run.partials.entry(number).or_insert(false);
                }
                _ => run.hold(number),
            }
        }
    }

    /// Records a proven object; `written_unix` is when it was written, if that is known. Recording a file again changes
    /// nothing else.
    pub fn record(&mut self, file: WalFile, size: u64, written_unix: Option<u64>) {
        self.latest_archived_unix = self.latest_archived_unix.max(written_unix);
        if self.has(file) {
            return;
        }
        self.totals.files += 1;
        self.totals.bytes += size;
        let timeline = file.timeline().get();
        let Some(number) = self.number(file) else {
            if let WalFile::History(_) = file {
                self.histories.insert(timeline);
            }
            return;
        };
        let run = self.timelines.entry(timeline).or_default();
        if let WalFile::Partial(_) = file {
            run.partials.insert(number, true);
        } else {
            run.hold(number);
            run.archive(number);
        }
    }

    /// Records that an object whose size differs from the local file's was proven to have the same content.
    pub fn accept_size(&mut self, file: WalFile, size: u64) {
        self.other_sizes.insert(file.to_string(), size);
    }

    /// Call this before a local file that was proven to be archived is rewritten with another size: its object then
    /// stays accepted.
    pub fn keep_size(&mut self, file: WalFile, local_size: u64) {
        self.other_sizes.entry(file.to_string()).or_insert(local_size);
    }

    /// Whether an object of `size` is known to match a local file of `local_size`.
    pub fn accepts(&self, file: WalFile, local_size: u64, size: u64) -> bool {
        local_size == size || self.other_sizes.get(&file.to_string()) == Some(&size)
    }

    /// Whether a file is known to be archived.
    pub fn has(&self, file: WalFile) -> bool {
        let timeline = file.timeline().get();
        let Some(number) = self.number(file) else {
            return matches!(file, WalFile::History(_)) && self.histories.contains(&timeline);
        };
        self.timelines.get(&timeline).is_some_and(|run| match file {
            WalFile::Partial(_) => run.partials.get(&number) == Some(&true),
            _ => run.has(number),
        })
    }

    /// The frontier of each timeline with a segment, ascending, given all recorded gaps.
    pub fn frontiers(&self, gaps: &[Gap]) -> Vec<Frontier> {
        let lsn = |number: u64| Lsn::new(number.saturating_mul(self.segment_size.bytes()));
        let frontier = |(timeline, run): (&u32, &Run)| {
            let timeline = TimelineId::new(*timeline)?;
            let own = gaps.iter().filter(|gap| gap.timeline == timeline);
            let holes: Vec<Hole> = own.map(|gap| Hole::of(gap, self.segment_size)).collect();
            let (start, archived) = run.frontier(&holes)?;
            Some(Frontier { timeline, start: lsn(start), archived: lsn(archived) })
        };
        self.timelines.iter().filter_map(frontier).collect()
    }

    /// What tier 2 has.
    pub const fn totals(&self) -> Totals {
        self.totals
    }

    /// Unix time in seconds of the newest upload.
    pub const fn latest_archived_unix(&self) -> Option<u64> {
        self.latest_archived_unix
    }

    pub const fn segment_size(&self) -> SegmentSize {
        self.segment_size
    }

    /// The LSN of a segment's first byte; `None` for a history file.
    pub fn start_of(&self, file: WalFile) -> Option<Lsn> {
        match file {
            WalFile::Segment(name) | WalFile::Partial(name) => name.start_lsn(self.segment_size),
            WalFile::History(_) => None,
        }
    }

    fn number(&self, file: WalFile) -> Option<u64> {
        Some(self.start_of(file)?.as_u64() / self.segment_size.bytes())
    }
}
