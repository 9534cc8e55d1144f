//! Which times a cluster can be recovered to, computed from what is in memory, so that the gauges of a scrape ask
//! neither a disk nor a bucket. Pure.
//!
//! The result is conservative: a backup counts only with every byte of WAL from its start on, and WAL after a hole
//! counts only with a backup after the hole. `klio list` and a restore look at the files themselves.

use super::gauges::Summary;
use klio_pg::{HistoryEntry, SegmentSize, TimelineHistory, TimelineId};
use klio_storage::{
    catalog::{
        Frontier, Holdings, KnownGap, Run, TimelineHoldings, Timelines,
        holdings::{MINIMAL, minimal, without},
        recovery::{Path, Reach, Stop},
    },
    wal::{Gap, LevelChange, Position},
};
use std::collections::BTreeMap;

/// What is known about a cluster's WAL.
pub(super) struct Known {
    /// The WAL of tier 1, including what was evicted because tier 2 has it.
    pub positions: Vec<Position>,
    /// The archived WAL.
    pub frontiers: Vec<Frontier>,
    pub gaps: Vec<Gap>,
    /// Changes of `wal_level`: no recovery can replay WAL across them.
    pub levels: Vec<LevelChange>,
    pub histories: Vec<TimelineHistory>,
    pub segment_size: SegmentSize,
    /// Which timelines are undecided or retired.
    pub timelines: Timelines,
}

/// The cluster can be recovered to every moment between the two. Unix seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Window {
    /// The end of the window's oldest backup, by PostgreSQL's clock.
    pub earliest: f64,
    /// The newest moment up to which all WAL is known to be stored.
    pub latest: f64,
}

/// The window that reaches furthest on the timeline that is followed; `None` without a backup that can be recovered.
/// `as_of` is a time, by the server's clock, up to which all of PostgreSQL's WAL is stored.
pub(super) fn window<'a>(
    known: &Known,
    backups: impl Iterator<Item = &'a Summary>,
    as_of: Option<f64>,
) -> Option<Window> {
    let holdings = holdings(known);
    let counts = |line: &&TimelineHoldings| {
        !line.runs.is_empty() && !known.timelines.is_aside(line.timeline)
    };
    let newest = holdings.timelines.iter().rfind(counts)?;
    let path = Path::new(&holdings, newest.timeline, known.segment_size).ok()?;
    let leads = |b: &&Summary| path.passes(b.start.0, b.start.1) && path.passes(b.stop.0, b.stop.1);
    let reached: Vec<(&Summary, Reach)> = backups
        .filter(leads)
        .map(|backup| (backup, path.reach(backup.start.1)))
        .filter(|(backup, reach)| reach.end >= backup.stop.1)
        .collect();
    let end = reached.iter().map(|(_, reach)| reach.end).max()?;
    let together = reached.iter().filter(|(_, reach)| reach.end == end);
    let stopped = together.clone().map(|(backup, _)| backup.stopped_unix);
    let earliest = stopped.clone().min_by(f64::total_cmp)?;
    let newest_backup = stopped.max_by(f64::total_cmp)?;
    let whole = together.clone().all(|(_, reach)| matches!(reach.stop, Stop::End { .. }));
    // If there is a hole, more WAL is stored than can be reached, and it is unknown here at what time the WAL before
    // the hole ended.
    let latest = as_of.filter(|_| whole).map_or(newest_backup, |at| at.max(newest_backup));
    Some(Window { earliest, latest })
}

fn holdings(known: &Known) -> Holdings {
    let mut lines: BTreeMap<TimelineId, Vec<Run>> = BTreeMap::new();
    let tier1 = known.positions.iter().map(|p| (p.timeline, p.start, p.flushed));
    let tier2 = known.frontiers.iter().map(|f| (f.timeline, f.start, f.archived));
    for (timeline, start, end) in tier1.chain(tier2).filter(|(_, start, end)| start < end) {
        lines.entry(timeline).or_default().push(Run { start, end });
    }
    let history = |timeline| known.histories.iter().find(|h| h.timeline() == timeline);
    let mut unpassed: Vec<KnownGap> = Vec::new();
    let timelines: Vec<_> = lines
        .into_iter()
        .map(|(timeline, runs)| {
            let runs = merge(runs);
            let minimal = minimal(&known.levels, timeline, &runs);
            unpassed.extend(minimal.iter().map(|run| KnownGap {
                timeline,
                from: run.start,
                to: run.end,
                reason: MINIMAL.to_owned(),
            }));
            // A frontier passes over recorded gaps, whose WAL is not stored anywhere.
            let gaps = known.gaps.iter().filter(|g| g.timeline == timeline);
            let missing = gaps.map(|g| Run { start: g.from, end: g.to }).chain(minimal);
            TimelineHoldings {
                timeline,
                history: history(timeline).map(text),
                runs: without(runs, &missing.collect::<Vec<_>>()),
                caught_up: false,
            }
        })
        .collect();
    let gap = |gap: &Gap| KnownGap {
        timeline: gap.timeline,
        from: gap.from,
        to: gap.to,
        reason: gap.reason.clone(),
    };
    Holdings {
        segment_size: known.segment_size.as_u32(),
        timelines,
        gaps: known.gaps.iter().map(gap).chain(unpassed).collect(),
        ..Holdings::default()
    }
}

/// The history in the format that PostgreSQL writes.
fn text(history: &TimelineHistory) -> String {
    let line = |e: &HistoryEntry| format!("{}\t{}\tknown\n", e.timeline.get(), e.end);
    history.entries().iter().map(line).collect()
}

/// Sorted, with runs that touch or overlap joined.
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
    use klio_pg::Lsn;

    fn tli(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    fn lsn(megabytes: u64) -> Lsn {
        Lsn::new(megabytes << 20)
    }

    fn known(start: u64, end: u64) -> Known {
        let position = Position {
            timeline: tli(1),
            start: lsn(start),
            flushed: lsn(end),
            sealed: lsn(end),
            has_history: false,
        };
        Known {
            positions: vec![position],
            frontiers: Vec::new(),
            gaps: Vec::new(),
            levels: Vec::new(),
            histories: Vec::new(),
            segment_size: SegmentSize::new(1 << 20).unwrap(),
            timelines: Timelines::default(),
        }
    }

    /// A backup from and to these MiB of WAL, which ended at this time.
    fn backup(from: u64, to: u64, stopped_unix: f64) -> Summary {
        Summary::of_wal((tli(1), lsn(from)), (tli(1), lsn(to)), stopped_unix)
    }

    fn both(known: &Known, backups: &[Summary], as_of: f64) -> Option<(f64, f64)> {
        window(known, backups.iter(), Some(as_of)).map(|w| (w.earliest, w.latest))
    }

    #[test]
    fn the_window_begins_with_the_oldest_backup_whose_wal_is_all_there() {
        let backups = [backup(2, 3, 20.0), backup(5, 6, 50.0), backup(9, 10, 90.0)];
        assert_eq!(both(&known(1, 20), &backups, 1000.0), Some((20.0, 1000.0)));
        // Part of the oldest backup's WAL is gone, so it does not count.
        assert_eq!(both(&known(4, 20), &backups, 1000.0), Some((50.0, 1000.0)));
        // Part of the newest backup's WAL has not arrived.
        assert_eq!(both(&known(1, 9), &backups, 40.0), Some((20.0, 50.0)));
        assert_eq!(both(&known(1, 20), &[], 1000.0), None);
    }

    #[test]
    fn what_comes_after_a_gap_counts_only_with_a_backup_behind_it() {
        let mut known = known(1, 20);
        let gap = |from, to| Gap {
            timeline: tli(1),
            from: lsn(from),
            to: lsn(to),
            reason: "removed".into(),
            recorded_unix: 70.0,
            unknown: Default::default(),
        };
        known.gaps.push(gap(7, 8));
        let before = [backup(2, 3, 20.0), backup(5, 6, 50.0)];
        assert_eq!(both(&known, &before, 1000.0), Some((20.0, 50.0)));
        let behind = [backup(2, 3, 20.0), backup(9, 10, 90.0)];
        assert_eq!(both(&known, &behind, 1000.0), Some((90.0, 1000.0)));
    }

    #[test]
    fn what_comes_after_minimal_wal_counts_only_with_a_backup_behind_it() {
        let mut known = known(1, 20);
        let at = |at, minimal| LevelChange {
            timeline: tli(1),
            lsn: lsn(at),
            minimal,
            unknown: Default::default(),
        };
        known.levels = vec![at(7, true), at(8, false)];
        let before = [backup(2, 3, 20.0), backup(5, 6, 50.0)];
        assert_eq!(both(&known, &before, 1000.0), Some((20.0, 50.0)));
        let behind = [backup(2, 3, 20.0), backup(9, 10, 90.0)];
        assert_eq!(both(&known, &behind, 1000.0), Some((90.0, 1000.0)));
        known.levels.pop();
        assert_eq!(both(&known, &behind, 1000.0), Some((20.0, 20.0)));
    }

    #[test]
    fn wal_that_only_the_bucket_has_counts() {
        let mut known = known(8, 20);
        known.frontiers.push(Frontier { timeline: tli(1), start: lsn(1), archived: lsn(9) });
        assert_eq!(both(&known, &[backup(2, 3, 20.0)], 1000.0), Some((20.0, 1000.0)));
    }

    #[test]
    fn a_promotion_does_not_end_the_window() {
        let mut known = known(1, 10);
        let position = Position {
            timeline: tli(2),
            start: lsn(9),
            flushed: lsn(15),
            sealed: lsn(15),
            has_history: true,
        };
        known.positions.push(position);
        let history = format!("1\t{}\tx\n", lsn(10));
        known.histories.push(TimelineHistory::parse(tli(2), history.as_bytes()).unwrap());
        assert_eq!(both(&known, &[backup(2, 3, 20.0)], 1000.0), Some((20.0, 1000.0)));
    }
}
