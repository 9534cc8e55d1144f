//! The WAL and timelines that exist of a cluster: the facts from which recovery is planned.
//!
//! The format is the same whether they come from a server (both tiers and the open segment) or from a listing
//! of the bucket alone. A run is contiguous: every byte between its ends can be restored.

use super::{Mark, Standing, Timelines};
use crate::{Error, Kind, Op, layout::WalFile, wal::LevelChange};
use klio_pg::{Lsn, SegmentSize, TimelineHistory, TimelineId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Holdings {
    /// In bytes; 0 if unknown.
    pub segment_size: u32,
    /// A string, because many JSON readers round large numbers.
    pub system_identifier: String,
    /// Ascending.
    pub timelines: Vec<TimelineHoldings>,
    /// WAL that is known to be lost.
    pub gaps: Vec<KnownGap>,
    /// WAL that was received and is damaged on tier 1. It may be sent again, and may be in tier 2.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub damaged: Vec<KnownGap>,
    /// Timelines that were written at the same time as another one, and what was decided about them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub marks: Vec<Mark>,
    /// When this was made, Unix seconds in the clock of whoever made it.
    pub as_of_unix: f64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TimelineHoldings {
    pub timeline: TimelineId,
    /// The history file as PostgreSQL wrote it; timeline 1 has none.
    pub history: Option<String>,
    /// Ascending; they do not touch each other.
    pub runs: Vec<Run>,
    /// The timeline is being received, and all WAL that PostgreSQL has is here. The state at any later moment
    /// up to `as_of_unix` is then the state at the end of the last run.
    pub caught_up: bool,
}

/// A contiguous run of WAL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    pub start: Lsn,
    /// One past the last byte.
    pub end: Lsn,
}

/// A recorded gap.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct KnownGap {
    pub timeline: TimelineId,
    /// The first missing byte.
    pub from: Lsn,
    /// The first byte that exists again.
    pub to: Lsn,
    pub reason: String,
}

/// A finished file in a tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeldFile {
    pub file: WalFile,
    /// One past the last byte of a partial segment, if that is known; otherwise the partial segment is ignored.
    pub end: Option<Lsn>,
}

impl From<WalFile> for HeldFile {
    fn from(file: WalFile) -> Self {
        Self { file, end: None }
    }
}

/// Durable WAL of a segment that is not sealed yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenWal {
    pub timeline: TimelineId,
    pub start: Lsn,
    /// One past the last durable byte.
    pub end: Lsn,
}

/// The input of [`Holdings::from_parts`]. A bucket alone has no `tier1`, no `open` and no `caught_up`.
#[derive(Debug, Clone, Default)]
pub struct Parts {
    /// Without it no segment can be interpreted.
    pub segment_size: Option<SegmentSize>,
    /// As pinned at first contact.
    pub system_identifier: Option<u64>,
    /// Finished files on tier 1.
    pub tier1: Vec<HeldFile>,
    /// Finished files in tier 2.
    pub tier2: Vec<HeldFile>,
    /// Unsealed WAL on tier 1.
    pub open: Vec<OpenWal>,
    /// The content of every history file of either tier.
    pub histories: BTreeMap<TimelineId, String>,
    /// The recorded gaps.
    pub gaps: Vec<KnownGap>,
    /// As in [`Holdings`].
    pub damaged: Vec<KnownGap>,
    /// The recorded decisions about timelines.
    pub marks: Timelines,
    /// Where WAL was written that recovery cannot pass.
    pub levels: Vec<LevelChange>,
    /// The timeline that is being received, if all WAL that PostgreSQL has is here.
    pub caught_up: Option<TimelineId>,
    /// The current time, Unix seconds.
    pub as_of_unix: f64,
}

impl Holdings {
    /// Merges listings into runs. Pure.
    pub fn from_parts(parts: Parts) -> Self {
        let mut timelines: BTreeMap<TimelineId, Vec<Run>> = BTreeMap::new();
        for file in parts.tier1.iter().chain(&parts.tier2) {
            let runs = timelines.entry(file.file.timeline()).or_default();
            runs.extend(parts.segment_size.and_then(|size| run_of(*file, size)));
        }
        for open in parts.open.iter().filter(|open| open.start < open.end) {
            let run = Run { start: open.start, end: open.end };
            timelines.entry(open.timeline).or_default().push(run);
        }
        for timeline in parts.histories.keys() {
            timelines.entry(*timeline).or_default();
        }
        let mut histories = parts.histories;
        let mut gaps = parts.gaps;
        let line = |(timeline, runs)| {
            let runs = merge(runs);
            let minimal = minimal(&parts.levels, timeline, &runs);
            // Even if all WAL was received, the current state cannot be recovered.
            let caught_up = parts.caught_up == Some(timeline)
                && !minimal.iter().any(|m| runs.last().is_some_and(|last| m.end >= last.end));
            let runs = without(runs, &minimal);
            gaps.extend(minimal.into_iter().map(|run| KnownGap {
                timeline,
                from: run.start,
                to: run.end,
                reason: MINIMAL.to_owned(),
            }));
            TimelineHoldings { timeline, history: histories.remove(&timeline), runs, caught_up }
        };
        let timelines = timelines.into_iter().map(line).collect();
        Self {
            segment_size: parts.segment_size.map_or(0, SegmentSize::as_u32),
            system_identifier: parts
                .system_identifier
                .map_or_else(String::new, |id| id.to_string()),
            timelines,
            gaps,
            damaged: parts.damaged,
            marks: parts.marks.marks().to_vec(),
            as_of_unix: parts.as_of_unix,
        }
    }

    pub fn timeline(&self, timeline: TimelineId) -> Option<&TimelineHoldings> {
        self.timelines.iter().find(|line| line.timeline == timeline)
    }

    /// The recorded decisions about timelines.
    pub fn timelines_on_record(&self) -> Timelines {
        Timelines::new(self.marks.clone())
    }

    /// A timeline's standing, if one is recorded.
    pub fn standing(&self, timeline: TimelineId) -> Option<Standing> {
        self.marks.iter().find(|mark| mark.timeline == timeline).map(|mark| mark.standing)
    }

    /// A timeline's ancestors; empty for one without a history file.
    ///
    /// # Errors
    /// `Corrupt` for a history that PostgreSQL would refuse.
    pub fn history(&self, timeline: TimelineId) -> Result<TimelineHistory, Error> {
        let Some(text) = self.timeline(timeline).and_then(|line| line.history.as_ref()) else {
            return Ok(TimelineHistory::root(timeline));
        };
        TimelineHistory::parse(timeline, text.as_bytes())
            .map_err(|e| Error::new(Kind::Corrupt, Op::Read, timeline.history_file_name(), e))
    }

    /// The first stretch of missing WAL between `start` and `stop` on the path to `timeline`, over every
    /// timeline on the path; `None` when every byte exists. The first segment of a timeline repeats its
    /// parent's bytes and counts for them: after a promotion in the middle of a segment, the child's copy may
    /// be the only one that ever arrives.
    ///
    /// # Errors
    /// As [`Holdings::history`].
    pub fn first_missing(
        &self,
        timeline: TimelineId,
        start: Lsn,
        stop: Lsn,
    ) -> Result<Option<(TimelineId, Run)>, Error> {
        let way = self.way(timeline, stop)?;
        let mut at = start;
        for (index, leg) in way.iter().enumerate() {
            while at < leg.end {
                let held = way[index..].iter().filter_map(|later| later.holds_to(at)).max();
                let Some(end) = held else {
                    let next = leg.runs.iter().map(|run| run.start).find(|start| *start > at);
                    let end = next.map_or(leg.end, |next| next.min(leg.end));
                    return Ok(Some((leg.timeline, Run { start: at, end })));
                };
                at = end.min(leg.end);
            }
        }
        Ok(None)
    }

    /// The timelines on the path to `timeline`, each up to the point where the path leaves it, and none beyond
    /// `stop`.
    fn way(&self, timeline: TimelineId, stop: Lsn) -> Result<Vec<Leg<'_>>, Error> {
        let history = self.history(timeline)?;
        let size = SegmentSize::new(self.segment_size).ok();
        let ancestors = history.entries().iter().map(|entry| (entry.timeline, entry.end));
        let mut from = Lsn::ZERO;
        let mut way = Vec::new();
        for (line, end) in ancestors.chain([(timeline, stop)]) {
            let runs = self.timeline(line).map_or(&[][..], |line| &line.runs);
            let begin = size.map_or(from, |size| from.segment_start(size));
            way.push(Leg { timeline: line, begin, end: end.min(stop), runs });
            from = end;
        }
        Ok(way)
    }
}

/// A timeline on a path.
struct Leg<'a> {
    timeline: TimelineId,
    /// The start of its first segment.
    begin: Lsn,
    end: Lsn,
    runs: &'a [Run],
}

impl Leg<'_> {
    fn holds_to(&self, at: Lsn) -> Option<Lsn> {
        let run = self.runs.iter().find(|run| run.start <= at && at < run.end)?;
        (self.begin <= at && at < self.end).then_some(run.end)
    }
}

fn run_of(held: HeldFile, size: SegmentSize) -> Option<Run> {
    match held.file {
        WalFile::Segment(name) => {
            let start = name.start_lsn(size)?;
            Some(Run { start, end: start.advance(size.bytes()) })
        }
        WalFile::Partial(name) => {
            let (start, end) = (name.start_lsn(size)?, held.end?);
            (start < end).then_some(Run { start, end })
        }
        WalFile::History(_) => None,
    }
}

/// Why existing WAL still counts as a hole.
pub const MINIMAL: &str = "written with wal_level = minimal: recovery cannot pass it";

/// The stretches of a timeline that recovery cannot pass. A stretch that has not ended extends to the end of
/// the WAL.
pub fn minimal(levels: &[LevelChange], timeline: TimelineId, runs: &[Run]) -> Vec<Run> {
    let mut own: Vec<&LevelChange> = levels.iter().filter(|c| c.timeline == timeline).collect();
    own.sort_by_key(|change| change.lsn);
    let last = runs.last().map_or(Lsn::ZERO, |run| run.end);
    let mut found: Vec<Run> = Vec::new();
    let mut begun = None;
    for change in own {
        match (begun, change.minimal) {
            (None, true) => begun = Some(change.lsn),
            (Some(start), false) => {
                found.push(Run { start, end: change.lsn });
                begun = None;
            }
            _ => {}
        }
    }
    found.extend(begun.filter(|start| *start < last).map(|start| Run { start, end: last }));
    found
}

/// The runs without these stretches.
pub fn without(runs: Vec<Run>, stretches: &[Run]) -> Vec<Run> {
    stretches.iter().fold(runs, |runs, stretch| {
        let cut = |run: Run| {
            let before = Run { start: run.start, end: run.end.min(stretch.start) };
            let after = Run { start: run.start.max(stretch.end), end: run.end };
            let overlaps = stretch.start < run.end && run.start < stretch.end;
            if overlaps { vec![before, after] } else { vec![run] }
        };
        runs.into_iter().flat_map(cut).filter(|run| run.start < run.end).collect()
    })
}

/// Sorts the runs and joins those that touch or overlap.
fn merge(mut runs: Vec<Run>) -> Vec<Run> {
    runs.sort_unstable_by_key(|run| (run.start, run.end));
    let mut merged: Vec<Run> = Vec::new();
    for run in runs {
        match merged.last_mut() {
            Some(last) if run.start <= last.end => last.end = last.end.max(run.end),
            _ => merged.push(run),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIZE: u64 = 1 << 20;

    fn tli(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    fn file(text: &str) -> HeldFile {
        text.parse::<WalFile>().unwrap().into()
    }

    fn segment(timeline: u32, number: u64) -> HeldFile {
        file(&format!("{timeline:08X}00000000{number:08X}"))
    }

    fn lsn(segments: f64) -> Lsn {
        Lsn::new((segments * SIZE as f64) as u64)
    }

    fn run(start: f64, end: f64) -> Run {
        Run { start: lsn(start), end: lsn(end) }
    }

    fn parts() -> Parts {
        Parts { segment_size: SegmentSize::new(SIZE as u32).ok(), ..Parts::default() }
    }

    #[test]
    fn both_tiers_and_the_open_segment_are_one_run() {
        let open = OpenWal { timeline: tli(1), start: lsn(4.0), end: lsn(4.25) };
        let holdings = Holdings::from_parts(Parts {
            tier1: vec![segment(1, 3), segment(1, 2)],
            tier2: vec![segment(1, 1), segment(1, 2), segment(1, 7)],
            open: vec![open],
            caught_up: Some(tli(1)),
            ..parts()
        });
        let line = holdings.timeline(tli(1)).unwrap();
        assert_eq!(line.runs, [run(1.0, 4.25), run(7.0, 8.0)]);
        assert!(line.caught_up);
        let missing = |start, stop| holdings.first_missing(tli(1), lsn(start), lsn(stop)).unwrap();
        assert_eq!(missing(1.5, 4.25), None);
        assert_eq!(missing(1.5, 7.5), Some((tli(1), run(4.25, 7.0))));
        assert_eq!(missing(0.5, 4.0), Some((tli(1), run(0.5, 1.0))));
        assert_eq!(missing(7.5, 9.0), Some((tli(1), run(8.0, 9.0))));
    }

    #[test]
    fn a_partial_counts_as_far_as_it_is_known() {
        let known = HeldFile { end: Some(lsn(2.5)), ..file("000000010000000000000002.partial") };
        let unknown = file("000000010000000000000009.partial");
        let tier1 = vec![segment(1, 1), known, unknown];
        let holdings = Holdings::from_parts(Parts { tier1, ..parts() });
        assert_eq!(holdings.timelines[0].runs, [run(1.0, 2.5)]);
    }

    /// The path to a timeline leaves each ancestor where its history says, and needs no WAL of the ancestor
    /// behind that point.
    #[test]
    fn a_backup_may_cross_timelines() {
        let mut histories = BTreeMap::new();
        let history = format!("1\t{}\tx\n3\t{}\ty\n", lsn(2.5), lsn(4.5));
        histories.insert(tli(5), history);
        let ended = HeldFile { end: Some(lsn(2.5)), ..file("000000010000000000000002.partial") };
        let files = vec![segment(1, 1), ended, segment(3, 2), segment(3, 3), segment(5, 4)];
        let whole = Parts { tier2: files.clone(), histories: histories.clone(), ..parts() };
        let holdings = Holdings::from_parts(whole);
        let missing = |h: &Holdings| h.first_missing(tli(5), lsn(1.0), lsn(4.75)).unwrap();
        // Timeline 3 lacks its segment 4, but its bytes up to its end at 4.5 are in the copy of timeline 5.
        assert_eq!(missing(&holdings), None);
        let mut fewer = files;
        fewer.retain(|held| held.file != segment(5, 4).file);
        let holdings = Holdings::from_parts(Parts { tier2: fewer, histories, ..parts() });
        assert_eq!(missing(&holdings), Some((tli(3), run(4.0, 4.5))));
    }

    /// WAL that exists but cannot be replayed is a hole with that reason; the WAL behind it is not affected.
    #[test]
    fn a_stretch_of_minimal_wal_is_a_hole() {
        let at = |segments: f64, minimal| LevelChange {
            timeline: tli(1),
            lsn: lsn(segments),
            minimal,
            unknown: Default::default(),
        };
        let tier1 = vec![segment(1, 1), segment(1, 2), segment(1, 3)];
        let with = |levels: Vec<LevelChange>| {
            let (tier1, caught_up) = (tier1.clone(), Some(tli(1)));
            Holdings::from_parts(Parts { tier1, levels, caught_up, ..parts() })
        };
        let ended = with(vec![at(1.5, true), at(2.25, false)]);
        assert_eq!(ended.timelines[0].runs, [run(1.0, 1.5), run(2.25, 4.0)]);
        assert!(ended.timelines[0].caught_up);
        let gap = &ended.gaps[0];
        assert_eq!((gap.from, gap.to, gap.reason.as_str()), (lsn(1.5), lsn(2.25), MINIMAL));
        let lasts = with(vec![at(2.5, true)]);
        assert_eq!(lasts.timelines[0].runs, [run(1.0, 2.5)]);
        assert!(!lasts.timelines[0].caught_up && lasts.gaps.len() == 1);
        // A stretch that begins behind the last WAL changes nothing.
        assert_eq!(with(vec![at(9.0, true)]).gaps, []);
    }

    /// The parent's last bytes were not received before the promotion; the child's first segment repeats them.
    #[test]
    fn the_child_s_copy_of_a_segment_counts_for_its_parent() {
        let histories = BTreeMap::from([(tli(2), format!("1\t{}\tx\n", lsn(2.75)))]);
        let ended = HeldFile { end: Some(lsn(2.25)), ..file("000000010000000000000002.partial") };
        let tier1 = vec![segment(1, 1), ended, segment(2, 2)];
        let whole = Parts { tier1, histories: histories.clone(), ..parts() };
        let holdings = Holdings::from_parts(whole);
        let missing = |h: &Holdings, stop| h.first_missing(tli(2), lsn(1.0), lsn(stop)).unwrap();
        assert_eq!(missing(&holdings, 2.9), None);
        // A child's segment before its first one belongs to no history.
        let tier1 = vec![segment(1, 1), segment(2, 1), segment(2, 3)];
        let holdings = Holdings::from_parts(Parts { tier1, histories, ..parts() });
        assert_eq!(missing(&holdings, 2.9), Some((tli(1), run(2.0, 2.75))));
    }

    proptest! {
        /// Runs ascend, do not touch each other, and contain exactly the given segments.
        #[test]
        fn runs_are_what_was_given(numbers in prop::collection::btree_set(0u64..60, 0..30), split: u64) {
            let (one, two): (Vec<u64>, Vec<u64>) =
                numbers.iter().partition(|n| (split >> (*n % 64)) & 1 == 0);
            let files = |numbers: Vec<u64>| numbers.into_iter().rev().map(|n| segment(1, n)).collect();
            let holdings =
                Holdings::from_parts(Parts { tier1: files(one), tier2: files(two), ..parts() });
            let runs = holdings.timelines.first().map(|l| l.runs.clone()).unwrap_or_default();
            prop_assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start));
            let held: Vec<u64> = runs
                .iter()
                .flat_map(|r| (r.start.as_u64() / SIZE)..(r.end.as_u64() / SIZE))
                .collect();
            prop_assert_eq!(held, numbers.into_iter().collect::<Vec<_>>());
        }
    }
}
