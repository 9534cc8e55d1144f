//! Where a stream continues, over both tiers. A tier 1 that replaces a lost one, or was set back, continues behind
//! what tier 2 holds (P2), and WAL that neither tier has is recorded as a gap before anything else is received.
//!
//! Tier 1 alone answers while it knows the cluster and the stream continues its WAL: a stream that has begun never
//! waits for the bucket (P4). Tier 2 is asked when tier 1 has nothing, and when PostgreSQL no longer has the WAL that
//! tier 1 lacks, before a gap is declared. A generation of which tier 1 has nothing may be new, or was lost with the
//! tier 1 before this one: tier 2 is asked for it when a PostgreSQL continues none of those that tier 1 has (P11). While
//! tier 2 does not answer nothing is decided, and the replication slot keeps the WAL.

use super::{BaseStore, holdings::Tier2Use, run};
use klio_pg::{Lsn, SegmentSize, TimelineId};
use klio_proto::{Code, wal::Open};
use klio_storage::{
    catalog::{Holdings, Run, holdings::Parts},
    layout::ClusterName,
    record::Unknown,
    wal::{Gap, Position, TakenOver},
};
use std::collections::BTreeSet;
use tonic::Status;

/// The reason of a gap between the WAL that tier 2 holds.
const LOST: &str =
    "lost with the tier 1 before this one: it was not in tier 2 yet, and PostgreSQL has removed it";

/// How far a timeline reaches, over both tiers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    pub timeline: TimelineId,
    /// The first stored byte.
    pub start: Lsn,
    /// Where the stream continues. If only tier 2 has the last WAL, this is the start of a segment, because the bytes
    /// of a partial segment there come again in a whole one.
    pub flushed: Lsn,
    /// One past the last stored byte.
    pub end: Lsn,
    /// Whether its history file is on tier 1.
    pub has_history: bool,
    /// Whether tier 1 holds less, so that this follows from tier 2.
    pub from_tier2: bool,
    /// WAL missing between what tier 2 holds that is not in a recorded gap; PostgreSQL may still have it.
    pub missing: Vec<Run>,
    /// The same directly behind tier 1's own end. It was requested before anything else; if the stream continues
    /// further up because PostgreSQL no longer has it, the hole has to be recorded.
    pub missing_first: Option<Run>,
}

/// What is recorded before a stream continues after the end of the WAL in tier 2.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Takeover {
    /// The WAL that only tier 2 has, by timeline.
    pub lines: Vec<TakenOver>,
    /// The WAL that neither tier has.
    gaps: Vec<(TimelineId, Run)>,
}

impl From<&Position> for Line {
    fn from(p: &Position) -> Self {
        Self {
            timeline: p.timeline,
            start: p.start,
            flushed: p.flushed,
            end: p.flushed,
            has_history: p.has_history,
            from_tier2: false,
            missing: Vec::new(),
            missing_first: None,
        }
    }
}

impl BaseStore {
    /// How far each timeline reaches, ascending. With `with_tier2` both tiers are asked, as when tier 1 knows nothing.
    ///
    /// # Errors
    /// `UNAVAILABLE` when tier 2 has to be asked and does not answer.
    pub async fn positions(
        &self,
        cluster: &ClusterName,
        with_tier2: bool,
    ) -> Result<Vec<Line>, Status> {
        let near = self.wal().positions(cluster);
        if self.tier2().is_none() || !with_tier2 {
            return Ok(near.iter().map(Line::from).collect());
        }
        let holdings = self.both_tiers(cluster, Tier2Use::Fresh).await?;
        Ok(lines(&near, &holdings))
    }

    /// What only tier 2 has, if `open` continues behind it, and what is lost in between. Writes nothing.
    ///
    /// # Errors
    /// `UNAVAILABLE`; `BAD_POSITION` when the stream continues elsewhere.
    pub async fn to_take_over(
        &self,
        cluster: &ClusterName,
        open: &Open,
    ) -> Result<Takeover, Status> {
        if self.tier2().is_none() {
            return Ok(Takeover::default());
        }
        let holdings = self.both_tiers(cluster, Tier2Use::Cached).await?;
        let lines = lines(&self.wal().positions(cluster), &holdings);
        let from = open.gap.as_ref().map_or(open.start, |gap| gap.from);
        let size = open.system.segment_size;
        let (lines, gaps) = taken(&lines, open.timeline, from, size).map_err(|expected| {
            Code::BadPosition.status(format!(
                "open cluster {cluster}: expected a start at {expected}, where tier 2 ends, found {from}"
            ))
        })?;
        Ok(Takeover { lines, gaps })
    }

    /// Determines the same again and records it durably. Returns false when there is nothing to take over.
    ///
    /// # Errors
    /// The errors of [`BaseStore::to_take_over`], and an I/O error of the disk.
    pub async fn take_over(
        &self,
        cluster: &ClusterName,
        open: &Open,
        now_unix: f64,
    ) -> Result<bool, Status> {
        let Takeover { lines, gaps } = self.to_take_over(cluster, open).await?;
        if lines.is_empty() {
            return Ok(false);
        }
        for line in &lines {
            tracing::warn!(%cluster, timeline = ?line.timeline, start = %line.start, end = %line.end, "the stream continues behind WAL that only tier 2 has");
        }
        let gap = |(timeline, run): (TimelineId, Run)| {
            tracing::error!(%cluster, ?timeline, from = %run.start, to = %run.end, "neither tier has this WAL: recording the gap");
            let (from, to) = (run.start, run.end);
            let (reason, unknown) = (LOST.to_owned(), Unknown::default());
            Gap { timeline, from, to, reason, recorded_unix: now_unix, unknown }
        };
        let gaps = gaps.into_iter().map(gap).collect();
        let levels = self.levels_in_tier2(cluster, Tier2Use::Cached).await?;
        let (store, name) = (self.wal().clone(), cluster.clone());
        run(move || {
            store.add_levels(&name, &levels)?;
            store.take_over(&name, &lines, gaps)
        })
        .await?;
        Ok(true)
    }

    /// The WAL of both tiers, without histories: continuing a stream needs none, so one that cannot be read must not
    /// stop it.
    async fn both_tiers(&self, cluster: &ClusterName, how: Tier2Use) -> Result<Holdings, Status> {
        let parts = self.parts_with(cluster, how).await.map_err(|status| {
            if Code::of(&status) != Code::Unavailable {
                return status;
            }
            let url = self.tier2().map_or("", |tier2| tier2.url());
            Code::Unavailable.status(format!(
                "open cluster {cluster}: tier 2 ({url}) does not say how far its WAL reaches: no answer"
            ))
        })?;
        // WAL that no recovery can replay is stored all the same; only bytes count here.
        Ok(Holdings::from_parts(Parts { levels: Vec::new(), ..parts }))
    }
}

/// The reason for a gap between the end of the WAL in tier 2 and the place where the stream went on, after tier 1 was lost.
pub fn lost_with_tier1(reason: &str) -> String {
    format!("lost with the tier 1 before this one, as far as it was acknowledged: {reason}")
}

/// How far each timeline reaches. Pure.
fn lines(near: &[Position], holdings: &Holdings) -> Vec<Line> {
    let size = SegmentSize::new(holdings.segment_size).ok();
    let known = near.iter().map(|p| p.timeline);
    let listed = holdings.timelines.iter().filter(|line| !line.runs.is_empty());
    let all: BTreeSet<TimelineId> = known.chain(listed.map(|line| line.timeline)).collect();
    let line = |timeline| {
        let own = near.iter().find(|p| p.timeline == timeline);
        let runs = holdings.timeline(timeline).map_or(&[][..], |line| &line.runs);
        let far = size.and_then(|size| {
            let last = runs.last()?.end;
            Some((last.segment_start(size), last, runs))
        });
        match (own, far) {
            (Some(own), Some((flushed, end, runs))) if own.flushed < flushed => {
                let missing = missing(runs, holdings, timeline);
                let behind = |run: &Run| run.start <= own.flushed && own.flushed < run.end;
                let missing_first = missing.iter().find(|run| behind(run)).copied();
                let missing_first = missing_first.map(|run| Run { start: own.flushed, ..run });
                let missing = missing.into_iter().filter(|run| run.start > own.flushed).collect();
                let start = own.start.min(runs[0].start);
                let line = Line { start, flushed, end, from_tier2: true, ..own.into() };
                Some(Line { missing, missing_first, ..line })
            }
            (Some(own), _) => Some(own.into()),
            (None, Some((flushed, end, runs))) => Some(Line {
                timeline,
                start: runs[0].start,
                flushed,
                end,
                has_history: false,
                from_tier2: true,
                missing: missing(runs, holdings, timeline),
                missing_first: None,
            }),
            (None, None) => None,
        }
    };
    all.into_iter().filter_map(line).collect()
}

/// The parts that lie between two runs and in no recorded gap.
fn missing(runs: &[Run], holdings: &Holdings, timeline: TimelineId) -> Vec<Run> {
    let mut gaps: Vec<Run> = holdings
        .gaps
        .iter()
        .filter(|gap| gap.timeline == timeline)
        .map(|gap| Run { start: gap.from, end: gap.to })
        .collect();
    gaps.sort_by_key(|gap| gap.start);
    let mut found = Vec::new();
    for pair in runs.windows(2) {
        let (mut at, to) = (pair[0].end, pair[1].start);
        for gap in gaps.iter().filter(|gap| gap.start < to) {
            if gap.end <= at {
                continue;
            }
            if at < gap.start {
                found.push(Run { start: at, end: gap.start });
            }
            at = gap.end;
        }
        if at < to {
            found.push(Run { start: at, end: to });
        }
    }
    found
}

/// What is taken over from tier 2, and the runs that are missing in it.
type Taken = (Vec<TakenOver>, Vec<(TimelineId, Run)>);

/// What to record for a stream of `timeline` that continues at `from`; the error is the position where it may continue
/// instead. Pure.
fn taken(lines: &[Line], timeline: TimelineId, from: Lsn, size: SegmentSize) -> Result<Taken, Lsn> {
    let (mut taken, mut gaps) = (Vec::new(), Vec::new());
    for line in lines.iter().filter(|line| line.from_tier2) {
        let own = line.timeline == timeline;
        let fits = line.missing.iter().any(|run| run.start.segment_start(size) == from);
        if own && from != line.flushed && !fits {
            return Err(line.flushed);
        }
        let end = if own { from } else { line.flushed };
        let start = line.start.min(end);
        let unknown = Unknown::default();
        taken.push(TakenOver { timeline: line.timeline, start, end, unknown });
        let lost = line.missing_first.iter().chain(&line.missing).filter(|run| run.end <= end);
        gaps.extend(lost.map(|run| (line.timeline, *run)));
    }
    Ok((taken, gaps))
}

#[cfg(test)]
mod tests {
    use super::*;
    use klio_storage::catalog::{KnownGap, TimelineHoldings};

    const MIB: u64 = 1 << 20;

    fn lsn(tenths: u64) -> Lsn {
        Lsn::new(tenths * MIB / 10)
    }
    fn tli(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }
    fn run(start: u64, end: u64) -> Run {
        Run { start: lsn(start), end: lsn(end) }
    }
    fn size() -> SegmentSize {
        SegmentSize::new(MIB as u32).unwrap()
    }
    fn near(timeline: u32, start: u64, flushed: u64) -> Position {
        let (start, flushed) = (lsn(start), lsn(flushed));
        Position { timeline: tli(timeline), start, flushed, sealed: flushed, has_history: true }
    }
    fn holdings(lines: &[(u32, &[Run])], gaps: &[(u32, Run)]) -> Holdings {
        let line = |(timeline, runs): &(u32, &[Run])| TimelineHoldings {
            timeline: tli(*timeline),
            history: None,
            runs: runs.to_vec(),
            caught_up: false,
        };
        let gap = |(timeline, run): &(u32, Run)| KnownGap {
            timeline: tli(*timeline),
            from: run.start,
            to: run.end,
            reason: "removed".into(),
        };
        Holdings {
            segment_size: MIB as u32,
            timelines: lines.iter().map(line).collect(),
            gaps: gaps.iter().map(gap).collect(),
            ..Holdings::default()
        }
    }

    #[test]
    fn an_empty_tier_1_goes_on_where_tier_2_ends() {
        let (one, two) = ([run(10, 80)], [run(70, 125)]);
        let held = holdings(&[(1, &one), (2, &two)], &[]);
        let lines = lines(&[], &held);
        let ends: Vec<_> = lines.iter().map(|l| (l.start, l.flushed, l.from_tier2)).collect();
        // The last segment of tier 2 is partial, so it counts from its beginning.
        assert_eq!(ends, [(lsn(10), lsn(80), true), (lsn(70), lsn(120), true)]);
        assert_eq!(lines[1].end, lsn(125));
        let (taken, gaps) = taken(&lines, tli(2), lsn(120), size()).unwrap();
        assert_eq!(taken.len(), 2);
        assert_eq!((taken[1].start, taken[1].end, gaps.len()), (lsn(70), lsn(120), 0));
    }

    #[test]
    fn where_tier_1_holds_as_much_it_alone_counts() {
        let held = [run(10, 83)];
        let known = [near(1, 10, 83)];
        let lines = lines(&known, &holdings(&[(1, &held)], &[]));
        assert_eq!(lines, [Line::from(&known[0])]);
        assert_eq!(taken(&lines, tli(1), lsn(83), size()), Ok((vec![], vec![])));
    }

    #[test]
    fn a_tier_1_that_was_set_back_goes_on_behind_tier_2_or_where_postgresql_still_can() {
        // Tier 1 up to 4.5; tier 2 up to 4, then 5 to 7, and 8 to 9.
        let held = [run(10, 45), run(50, 70), run(80, 90)];
        let lines = lines(&[near(1, 20, 45)], &holdings(&[(1, &held)], &[]));
        assert_eq!((lines[0].start, lines[0].flushed), (lsn(10), lsn(90)));
        // The WAL directly behind tier 1's own end was tried before.
        assert_eq!(lines[0].missing, [run(70, 80)]);
        // A stream that continues further up leaves a hole there, which is recorded like any other.
        let first = (tli(1), run(45, 50));
        let (whole, gaps) = taken(&lines, tli(1), lsn(70), size()).unwrap();
        assert_eq!((whole[0].end, gaps), (lsn(70), vec![first]));
        let (whole, gaps) = taken(&lines, tli(1), lsn(90), size()).unwrap();
        assert_eq!((whole[0].end, gaps), (lsn(90), vec![first, (tli(1), run(70, 80))]));
        assert_eq!(taken(&lines, tli(1), lsn(60), size()), Err(lsn(90)));
        assert_eq!(
            taken(&lines, tli(1), lsn(45), size()),
            Err(lsn(90)),
            "tier 1 goes on by itself"
        );
    }

    #[test]
    fn what_is_on_record_as_a_gap_is_not_missing() {
        let held = [run(10, 25), run(50, 90)];
        let with =
            |gaps: &[(u32, Run)]| lines(&[], &holdings(&[(1, &held)], gaps)).remove(0).missing;
        assert_eq!(with(&[]), [run(25, 50)]);
        assert_eq!(with(&[(1, run(25, 50))]), []);
        assert_eq!(with(&[(2, run(25, 50))]), [run(25, 50)]);
        assert_eq!(with(&[(1, run(25, 30)), (1, run(40, 45))]), [run(30, 40), run(45, 50)]);
    }
}
