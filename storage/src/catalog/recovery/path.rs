//! The path to a timeline: which stretch of WAL belongs to which timeline, and which of it exists.
//!
//! A timeline's first segment repeats its parent's bytes up to the switch point, and PostgreSQL prefers the file of
//! the newer timeline (`XLogFileReadAnyTLI`). So the parent's last bytes may exist in the child's segment only.

use crate::{
    Error,
    catalog::{BackupRecord, Holdings, KnownGap, Run},
};
use klio_pg::{Lsn, SegmentName, SegmentSize, TimelineId};

/// Missing WAL.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Hole {
    /// The timeline of the first missing byte.
    pub timeline: TimelineId,
    /// The first missing byte.
    pub from: Lsn,
    /// The first byte that exists again, or is known to have existed.
    pub to: Lsn,
    /// Why it is missing, as far as that is known.
    pub reason: String,
}

impl std::fmt::Display for Hole {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { timeline, from, to, reason } = self;
        write!(f, "WAL of timeline {} from {from} to {to} is missing ({reason})", timeline.get())
    }
}

/// Why WAL cannot be replayed any further.
#[derive(Debug, Clone, PartialEq)]
pub enum Stop {
    /// The end of the existing WAL; nothing is known to follow it.
    End {
        /// Until then PostgreSQL had no more WAL either: the last state is the state at any moment up to this time
        /// (Unix seconds).
        idle_until_unix: Option<f64>,
    },
    /// More WAL exists behind it, or is known to have existed.
    Hole(Hole),
}

/// How far WAL can be replayed.
#[derive(Debug, Clone, PartialEq)]
pub struct Reach {
    /// One past the last byte.
    pub end: Lsn,
    /// The timeline of the last byte.
    pub timeline: TimelineId,
    /// Why replay stops there.
    pub stop: Stop,
}

/// A timeline on the path, from its switch point to the point where the path leaves it.
#[derive(Debug, Clone, PartialEq)]
struct Line {
    timeline: TimelineId,
    begin: Lsn,
    end: Option<Lsn>,
    runs: Vec<Run>,
    gaps: Vec<(Run, String)>,
    /// WAL that is missing because it is damaged on tier 1, without another record.
    damaged: Vec<(Run, String)>,
}

impl Line {
    fn holds_to(&self, at: Lsn, size: SegmentSize) -> Option<Lsn> {
        if at < self.begin.segment_start(size) {
            return None;
        }
        let run = self.runs.iter().find(|run| run.start <= at && at < run.end)?;
        Some(self.end.map_or(run.end, |end| run.end.min(end))).filter(|end| *end > at)
    }

    /// The first byte after `at` that exists.
    fn next(&self, at: Lsn, size: SegmentSize) -> Option<Lsn> {
        let counts = |lsn: &Lsn| *lsn > at && self.end.is_none_or(|end| *lsn < end);
        // Its first segment repeats the parent's bytes, and they count as in `holds_to`.
        let begin = self.begin.segment_start(size);
        let runs = self.runs.iter().filter(|run| run.end > begin).map(|run| run.start.max(begin));
        runs.filter(counts).min()
    }
}

/// The reason for a hole, or a part of one, without a record.
const UNKNOWN: &str = "never received, or lost";

/// The end of the recorded gaps that cover `at` without a break; `at` itself if no gap covers it.
fn recorded_to(at: Lsn, gaps: &[(Run, &str)]) -> Lsn {
    let further = |to: Lsn, (gap, _): &(Run, &str)| match gap.start <= to {
        true => to.max(gap.end),
        false => to,
    };
    gaps.iter().fold(at, further)
}

/// The reason for a hole. If only a part of it is recorded, both reasons. `damaged` is the reason for the part
/// without a record, if it is known.
fn why(from: Lsn, to: Lsn, gaps: &[(Run, &str)], damaged: Option<&str>) -> String {
    let mut reasons: Vec<&str> = Vec::new();
    for (_, reason) in gaps.iter().filter(|(gap, _)| gap.start < to) {
        if !reasons.contains(reason) {
            reasons.push(reason);
        }
    }
    if recorded_to(from, gaps) < to {
        reasons.push(damaged.unwrap_or(UNKNOWN));
    }
    reasons.join("; in part: ")
}

/// The path to a timeline through its ancestors.
#[derive(Debug, Clone, PartialEq)]
pub struct Path {
    timeline: TimelineId,
    size: SegmentSize,
    lines: Vec<Line>,
    idle_until_unix: Option<f64>,
    /// The history file exists, or this is timeline 1, which has none.
    pub has_history: bool,
}

impl Path {
    /// Builds the path from the existing WAL.
    ///
    /// # Errors
    /// `Corrupt` for a history file that PostgreSQL would refuse.
    pub fn new(
        holdings: &Holdings,
        timeline: TimelineId,
        size: SegmentSize,
    ) -> Result<Self, Error> {
        let history = holdings.history(timeline)?;
        let ancestors = history.entries().iter().map(|e| (e.timeline, Some(e.end)));
        let mut begin = Lsn::ZERO;
        let mut lines = Vec::new();
        for (line, end) in ancestors.chain([(timeline, None)]) {
            let held = holdings.timeline(line);
            let of_line = |all: &[KnownGap]| {
                let own = all.iter().filter(|gap| gap.timeline == line);
                own.map(|g| (Run { start: g.from, end: g.to }, g.reason.clone())).collect()
            };
            lines.push(Line {
                timeline: line,
                begin,
                end,
                runs: held.map(|held| held.runs.clone()).unwrap_or_default(),
                gaps: of_line(&holdings.gaps),
                damaged: of_line(&holdings.damaged),
            });
            begin = end.unwrap_or(begin);
        }
        let own = holdings.timeline(timeline);
        let idle_until_unix = own.is_some_and(|own| own.caught_up).then_some(holdings.as_of_unix);
        let has_history = timeline.get() == 1 || own.is_some_and(|own| own.history.is_some());
        Ok(Self { timeline, size, lines, idle_until_unix, has_history })
    }

    /// The timeline at the end of the path.
    pub const fn timeline(&self) -> TimelineId {
        self.timeline
    }
    pub const fn segment_size(&self) -> SegmentSize {
        self.size
    }
    /// The position up to which this path and another one are the same; `None` when one is the beginning of the
    /// other.
    pub fn parts_from(&self, other: &Self) -> Option<Lsn> {
        for (ours, theirs) in self.lines.iter().zip(&other.lines) {
            if ours.timeline != theirs.timeline {
                return Some(ours.begin.min(theirs.begin));
            }
            if ours.end != theirs.end {
                return [ours.end, theirs.end].into_iter().flatten().min();
            }
        }
        None
    }

    /// Where this timeline left its parent; `None` without a parent.
    pub fn switch_point(&self) -> Option<Lsn> {
        self.lines.last().filter(|_| self.lines.len() > 1).map(|line| line.begin)
    }
    /// The timelines on the path, oldest first.
    pub fn timelines(&self) -> impl Iterator<Item = TimelineId> {
        self.lines.iter().map(|line| line.timeline)
    }

    /// Whether the byte before `lsn` belongs to `timeline` on this path.
    pub fn passes(&self, timeline: TimelineId, lsn: Lsn) -> bool {
        let line = self.lines.iter().find(|line| line.timeline == timeline);
        line.is_some_and(|l| lsn >= l.begin && l.end.is_none_or(|end| lsn <= end))
    }

    /// Whether a recovery from this backup can follow this path: the path must not have left the backup's timeline
    /// before the backup ended.
    pub fn serves(&self, backup: &BackupRecord) -> bool {
        self.passes(backup.start_timeline, backup.start_lsn)
            && self.passes(backup.stop_timeline, backup.stop_lsn)
    }

    fn line_at(&self, at: Lsn) -> usize {
        let found = self.lines.iter().position(|l| l.end.is_none_or(|end| at < end));
        found.unwrap_or(self.lines.len() - 1)
    }

    /// How far WAL can be replayed from `from` on.
    pub fn reach(&self, from: Lsn) -> Reach {
        let mut at = from;
        loop {
            let lines = &self.lines[self.line_at(at)..];
            match lines.iter().filter_map(|line| line.holds_to(at, self.size)).max() {
                Some(end) => at = end,
                None => break,
            }
        }
        // The timeline of the last replayed byte, which is the one before `at`.
        let timeline = self.lines[self.line_at(Lsn::new(at.as_u64().saturating_sub(1)))].timeline;
        Reach { end: at, timeline, stop: self.stop_at(at) }
    }

    fn stop_at(&self, at: Lsn) -> Stop {
        let index = self.line_at(at);
        let here = &self.lines[index];
        let later = &self.lines[index..];
        let held = later.iter().filter_map(|line| line.next(at, self.size)).min();
        let gaps = self.gaps_after(at);
        // PostgreSQL was promoted at the end of this timeline, so its WAL existed up to there.
        let promoted = here.end.filter(|end| *end > at);
        // Damaged WAL existed.
        let damaged = here.damaged.iter().map(|(run, _)| run.end).filter(|end| *end > at);
        let known = gaps.iter().map(|(gap, _)| gap.end).chain(promoted).chain(damaged).max();
        match held.or(known) {
            None => Stop::End { idle_until_unix: self.idle_until_unix },
            Some(to) => {
                let damaged = here.damaged.iter().find(|(run, _)| run.start < to && at < run.end);
                let reason = why(at, to, &gaps, damaged.map(|(_, reason)| reason.as_str()));
                Stop::Hole(Hole { timeline: here.timeline, from: at, to, reason })
            }
        }
    }

    /// The recorded gaps on the path from `at` on, ascending, limited to the parts that matter.
    fn gaps_after(&self, at: Lsn) -> Vec<(Run, &str)> {
        let mut gaps = Vec::new();
        for line in &self.lines[self.line_at(at)..] {
            let begin = line.begin.segment_start(self.size);
            let own = line.gaps.iter().map(|(gap, reason)| {
                let end = line.end.map_or(gap.end, |end| gap.end.min(end));
                (Run { start: gap.start.max(begin), end }, reason.as_str())
            });
            gaps.extend(own.filter(|(gap, _)| gap.start < gap.end && gap.end > at));
        }
        gaps.sort_by_key(|(gap, _)| (gap.start, gap.end));
        gaps
    }

    /// The holes behind `from` that are not completely recorded as missing.
    pub fn lost(&self, from: Lsn) -> Vec<Hole> {
        let mut holes = self.holes(from);
        holes.retain(|hole| recorded_to(hole.from, &self.gaps_after(hole.from)) < hole.to);
        holes
    }

    /// Every hole behind the first byte of WAL, in order.
    pub fn holes(&self, from: Lsn) -> Vec<Hole> {
        let mut holes = Vec::new();
        let mut at = from;
        while let Stop::Hole(hole) = self.reach(at).stop {
            if hole.to <= at && !holes.is_empty() {
                break;
            }
            at = hole.to;
            holes.push(hole);
        }
        holes
    }

    /// The first existing byte on any timeline of the path.
    pub fn first_held(&self) -> Option<Lsn> {
        let counts = |line: &Line| {
            let (begin, end) = (line.begin.segment_start(self.size), line.end);
            let runs = line.runs.iter().filter(move |run| run.end > begin);
            runs.map(move |run| run.start.max(begin))
                .filter(move |start| end.is_none_or(|end| *start < end))
                .min()
        };
        self.lines.iter().filter_map(counts).min()
    }

    /// One past the last existing byte of the timeline itself.
    pub fn own_end(&self) -> Option<Lsn> {
        self.lines.last()?.runs.last().map(|run| run.end)
    }

    /// The file names that a segment can have on this path, in the order of PostgreSQL's preference: the newest
    /// timeline with some of it first.
    pub fn names(&self, at: Lsn) -> Vec<SegmentName> {
        let start = at.segment_start(self.size);
        let mut lines: Vec<&Line> =
            self.lines.iter().filter(|l| l.begin.segment_start(self.size) <= start).collect();
        lines.retain(|line| line.end.is_none_or(|end| start < end));
        let stop = start.advance(self.size.bytes());
        lines.retain(|line| line.runs.iter().any(|run| run.start < stop && run.end > start));
        let name = |line: &&Line| SegmentName::containing(line.timeline, start, self.size);
        lines.iter().rev().map(name).collect()
    }
}
