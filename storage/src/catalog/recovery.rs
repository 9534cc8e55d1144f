//! Decides what can be recovered, and from which backup. Pure: the same holdings and records give the same
//! plan.
//!
//! REACH1  a plan's backup and every byte of WAL from its start to the plan's reach exist;
//! REACH2  a recovery never stops at a hole as if that were the end of WAL (P7): `latest` is refused there;
//! REACH3  a refusal says what can be reached instead, and what is in the way.
//!
//! Times are PostgreSQL's, not this machine's. Where exactly a time, a name or a transaction is can only be
//! read from the WAL itself: whoever executes a plan looks there (sidecar, `restore/target.rs`).

mod path;
mod plan;
#[cfg(test)]
mod tests;

pub use path::{Hole, Path, Reach, Stop};
pub use plan::{Plan, Refusal, Target, TimelineChoice};

use super::{BackupRecord, Holdings, Run, Standing, Timelines};
use crate::layout::BackupName;
use klio_pg::{Lsn, SegmentSize, TimelineId};
use std::collections::BTreeMap;

/// What exists, prepared for planning.
#[derive(Debug, Clone)]
pub struct Survey {
    /// Oldest end first.
    backups: Vec<BackupRecord>,
    paths: BTreeMap<TimelineId, Path>,
    /// Which timelines are undecided or retired: these are only followed if they are named explicitly.
    timelines: Timelines,
    problems: Vec<String>,
}

/// What can be recovered when a timeline is followed to its end.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    pub timeline: TimelineId,
    /// The parent timeline, and the switch point.
    pub parent: Option<(TimelineId, Lsn)>,
    /// If it is undecided or retired: a restore follows it only if its number is given.
    pub aside: Option<Standing>,
    /// Ascending.
    pub windows: Vec<Window>,
    /// Ascending, behind the first byte of WAL.
    pub holes: Vec<Hole>,
    /// WAL that cannot be reached from any backup.
    pub unserved: Vec<Run>,
}

/// Every position from the end of the first of these backups up to `reach` can be recovered.
#[derive(Debug, Clone, PartialEq)]
pub struct Window {
    /// Oldest first; never empty.
    pub backups: Vec<BackupName>,
    /// The earliest position: where the oldest of the backups ended.
    pub from: Lsn,
    /// The time of that position, in PostgreSQL's clock.
    pub from_unix: f64,
    /// The latest position.
    pub reach: Reach,
}

impl Survey {
    /// Builds the survey from the answer of a server or the listing of a bucket.
    pub fn new(holdings: &Holdings, backups: Vec<BackupRecord>) -> Self {
        let mut problems = Vec::new();
        let known = backups.first().map_or(0, |backup| backup.segment_size);
        let size = if holdings.segment_size == 0 { known } else { holdings.segment_size };
        let mut paths = BTreeMap::new();
        match SegmentSize::new(size) {
            Err(error) if size > 0 => problems.push(error.to_string()),
            Err(_) => {}
            Ok(size) => {
                for held in &holdings.timelines {
                    match Path::new(holdings, held.timeline, size) {
                        Ok(path) => drop(paths.insert(held.timeline, path)),
                        Err(error) => problems.push(error.to_string()),
                    }
                }
            }
        }
        let mut backups = backups;
        backups.sort_by(|a, b| {
            let order = |r: &BackupRecord| (r.stop_timeline, r.stop_lsn);
            a.stopped_postgres_unix
                .total_cmp(&b.stopped_postgres_unix)
                .then(order(a).cmp(&order(b)))
        });
        Self { backups, paths, timelines: holdings.timelines_on_record(), problems }
    }

    /// The backups, oldest end first.
    pub fn backups(&self) -> &[BackupRecord] {
        &self.backups
    }
    /// Problems with what could not be read. Nothing is known about the timelines that they name.
    pub fn problems(&self) -> &[String] {
        &self.problems
    }
    pub fn path(&self, timeline: TimelineId) -> Option<&Path> {
        self.paths.get(&timeline)
    }
    /// All timelines, ascending.
    pub fn timelines(&self) -> impl Iterator<Item = TimelineId> {
        self.paths.keys().copied()
    }
    /// The newest timeline that is neither undecided nor retired.
    pub fn newest(&self) -> Option<TimelineId> {
        self.timelines.followed(self.paths.keys().copied())
    }

    /// The recorded decisions about timelines.
    pub const fn marks(&self) -> &Timelines {
        &self.timelines
    }

    /// What can be recovered on each timeline, ascending.
    pub fn lines(&self) -> Vec<Line> {
        self.paths.values().map(|path| self.line(path)).collect()
    }

    fn line(&self, path: &Path) -> Line {
        let mut windows: Vec<Window> = Vec::new();
        let serving = self.backups.iter().filter(|backup| path.serves(backup));
        for backup in serving {
            let reach = path.reach(backup.start_lsn);
            if reach.end < backup.stop_lsn {
                continue;
            }
            match windows.iter_mut().find(|window| window.reach == reach) {
                Some(window) => window.backups.push(backup.name.clone()),
                None => windows.push(Window {
                    backups: vec![backup.name.clone()],
                    from: backup.stop_lsn,
                    from_unix: backup.stopped_postgres_unix,
                    reach,
                }),
            }
        }
        let first = path.first_held();
        let mut unserved = Vec::new();
        let holes = first.map(|first| path.holes(first)).unwrap_or_default();
        let starts = first.into_iter().chain(holes.iter().map(|hole| hole.to));
        for start in starts {
            let end = path.reach(start).end;
            if start < end && windows.iter().all(|window| window.reach.end != end) {
                unserved.push(Run { start, end });
            }
        }
        let parent = path.switch_point().and_then(|at| {
            let before = path.timelines().take_while(|t| *t != path.timeline()).last()?;
            Some((before, at))
        });
        let timeline = path.timeline();
        let aside = self.timelines.standing(timeline).filter(|_| self.timelines.is_aside(timeline));
        Line { timeline, parent, aside, windows, holes, unserved }
    }

    /// What is missing of a backup's own WAL, between its start and its stop; `None` when nothing is.
    pub fn broken(&self, backup: &BackupRecord) -> Option<Hole> {
        let unknown = || Hole {
            timeline: backup.stop_timeline,
            from: backup.start_lsn,
            to: backup.stop_lsn,
            reason: "there is no WAL of this timeline".into(),
        };
        let Some(path) = self.paths.get(&backup.stop_timeline) else { return Some(unknown()) };
        let reach = path.reach(backup.start_lsn);
        (reach.end < backup.stop_lsn).then(|| match reach.stop {
            Stop::Hole(hole) => hole,
            Stop::End { .. } => Hole { from: reach.end, ..unknown() },
        })
    }
}
