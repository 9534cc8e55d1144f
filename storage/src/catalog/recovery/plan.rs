//! Finds a backup and a path for a recovery target, or the reason why there is none.

use super::{Hole, Path, Reach, Stop, Survey};
use crate::{catalog::BackupRecord, layout::BackupName};
use klio_pg::{Lsn, TimelineId};
use std::fmt;

/// Where a recovery should end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// The end of the timeline.
    Latest,
    /// As soon as the backup is consistent.
    Immediate,
    /// After the last commit at or before this time: microseconds since 1970, in PostgreSQL's clock.
    Time { unix_micros: i64 },
    /// After the record that begins at or after this position.
    Lsn(Lsn),
    /// At the restore point of this name.
    Name(String),
    /// After this transaction's commit or abort.
    Xid(u32),
}

/// Which timeline to follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TimelineChoice {
    /// The newest; if a backup is given, the newest that it leads to.
    #[default]
    Latest,
    /// The backup's timeline.
    Current,
    Number(TimelineId),
}

/// A backup, a path, and how far WAL can be replayed along it.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The backup to restore.
    pub backup: BackupRecord,
    /// The path along which WAL is replayed; its timeline is the one to follow.
    pub path: Path,
    /// How far WAL can be replayed.
    pub reach: Reach,
    /// Notes for the user.
    pub notes: Vec<String>,
}

/// Why a target cannot be recovered to.
#[derive(Debug, Clone, PartialEq)]
pub struct Refusal {
    /// What is in the way.
    pub problem: String,
    /// The hole that is in the way, if that is the problem.
    pub hole: Option<Hole>,
    /// What can be recovered instead, one sentence each.
    pub reachable: Vec<String>,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.problem)?;
        if self.reachable.is_empty() {
            return f.write_str("; nothing can be recovered");
        }
        f.write_str("\nreachable:")?;
        self.reachable.iter().try_for_each(|line| write!(f, "\n  {line}"))
    }
}

impl std::error::Error for Refusal {}

/// Why a backup is unsuitable; later variants explain more.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Unfit {
    OffTheWay,
    TooLate,
    Beyond,
    Hole,
    OwnWal,
}

struct Rejected {
    why: Unfit,
    problem: String,
    hole: Option<Hole>,
}

impl Survey {
    /// The best plan for a target.
    ///
    /// # Errors
    /// The reason why there is none.
    pub fn plan(
        &self,
        target: &Target,
        timeline: TimelineChoice,
        backup: Option<&BackupName>,
    ) -> Result<Plan, Refusal> {
        let refuse = |text: &str| Err(self.refusal(text.to_owned(), None));
        self.plans(target, timeline, backup)?.into_iter().next().map_or_else(|| refuse("none"), Ok)
    }

    /// Every plan for a target, the newest backup first. For `Time`, `Name` and `Xid` only the choice of
    /// backup is decided here; the rest can only be read from the WAL.
    ///
    /// # Errors
    /// The reason why there is none; the list is never empty.
    pub fn plans(
        &self,
        target: &Target,
        timeline: TimelineChoice,
        backup: Option<&BackupName>,
    ) -> Result<Vec<Plan>, Refusal> {
        let wanted = |record: &&BackupRecord| backup.is_none_or(|name| record.name == *name);
        let mut candidates = self.backups.iter().rev().filter(wanted).peekable();
        if candidates.peek().is_none() {
            return Err(self.no_backup(backup));
        }
        let mut plans = Vec::new();
        let mut rejected: Vec<Rejected> = Vec::new();
        for record in candidates {
            match self.fit(record, target, timeline, backup.is_some()) {
                Ok(plan) => plans.push(plan),
                Err(no) => rejected.push(no),
            }
        }
        if plans.is_empty() {
            return Err(self.explain(rejected));
        }
        Ok(plans)
    }

    fn fit(
        &self,
        record: &BackupRecord,
        target: &Target,
        choice: TimelineChoice,
        by_name: bool,
    ) -> Result<Plan, Rejected> {
        let path = self.choose_path(record, target, choice, by_name)?;
        let reach = path.reach(record.start_lsn);
        let no = |why, problem: String, hole: Option<Hole>| Rejected { why, problem, hole };
        let name = &record.name;
        if reach.end < record.stop_lsn {
            let hole = self.broken(record);
            let detail = hole.as_ref().map_or_else(String::new, ToString::to_string);
            let text = format!("backup {name} needs WAL up to {}, but {detail}", record.stop_lsn);
            return Err(no(Unfit::OwnWal, text, hole));
        }
        let behind = |what: &str| {
            let text = format!("the target is before the end of backup {name}, which ended {what}");
            no(Unfit::TooLate, text, None)
        };
        match target {
            Target::Time { unix_micros } if micros(record.stopped_postgres_unix) > *unix_micros => {
                return Err(behind(&format!("at {}", show_time(record.stopped_postgres_unix))));
            }
            Target::Lsn(lsn) if *lsn < record.stop_lsn => {
                return Err(behind(&format!("at {}", record.stop_lsn)));
            }
            _ => {}
        }
        let must_reach = match target {
            Target::Latest => None,
            Target::Lsn(lsn) if *lsn > reach.end => Some(lsn.to_string()),
            _ => return Ok(self.finish(record, path, reach, target, choice)),
        };
        match (&reach.stop, must_reach) {
            (Stop::End { .. }, None) => Ok(self.finish(record, path, reach, target, choice)),
            (Stop::End { .. }, Some(lsn)) => {
                let text = format!(
                    "{lsn} is behind the end of the WAL of timeline {}, which is {}",
                    path.timeline().get(),
                    reach.end
                );
                Err(no(Unfit::Beyond, text, None))
            }
            (Stop::Hole(hole), wanted) => {
                let wanted = wanted.unwrap_or_else(|| "the end of WAL".into());
                let text = format!("from backup {name} on, {wanted} cannot be reached: {hole}");
                Err(no(Unfit::Hole, text, Some(hole.clone())))
            }
        }
    }

    fn choose_path(
        &self,
        record: &BackupRecord,
        target: &Target,
        choice: TimelineChoice,
        by_name: bool,
    ) -> Result<&Path, Rejected> {
        let own = record.stop_timeline;
        let wanted = match choice {
            TimelineChoice::Number(number) => Some(number),
            TimelineChoice::Current => Some(own),
            TimelineChoice::Latest if *target == Target::Immediate => Some(own),
            TimelineChoice::Latest if by_name => {
                let leading = |path: &&Path| {
                    path.serves(record)
                        && (path.timeline() == own || !self.timelines.is_aside(path.timeline()))
                };
                self.paths.values().rev().find(leading).map(Path::timeline)
            }
            TimelineChoice::Latest => self.newest(),
        };
        let no = |problem: String| Rejected { why: Unfit::OffTheWay, problem, hole: None };
        if wanted.is_none() && !by_name && !self.paths.is_empty() {
            let text = "every timeline with WAL is undecided or retired: choose one with --target-timeline";
            return Err(no(text.to_owned()));
        }
        let standing = self.timelines.mark(own).filter(|_| self.timelines.is_aside(own));
        if let Some(mark) = standing.filter(|_| !by_name && wanted == Some(own)) {
            let named = matches!(choice, TimelineChoice::Number(_));
            if !named {
                return Err(no(format!(
                    "backup {} is on timeline {}, which is {}: choose it with --target-timeline",
                    record.name,
                    own.get(),
                    mark.standing
                )));
            }
        }
        let wanted = wanted.unwrap_or(own);
        let Some(path) = self.paths.get(&wanted) else {
            return Err(no(format!("there is no WAL of timeline {}", wanted.get())));
        };
        if !path.serves(record) {
            let text = format!(
                "backup {} ended on timeline {} at {}, which is not on the path to timeline {}",
                record.name,
                own.get(),
                record.stop_lsn,
                wanted.get()
            );
            return Err(no(text));
        }
        if !path.has_history && wanted != record.start_timeline {
            return Err(no(format!("{} is missing", wanted.history_file_name())));
        }
        Ok(path)
    }

    fn finish(
        &self,
        record: &BackupRecord,
        path: &Path,
        reach: Reach,
        target: &Target,
        choice: TimelineChoice,
    ) -> Plan {
        let mut notes = Vec::new();
        if let (Stop::Hole(hole), true) = (&reach.stop, *target != Target::Immediate) {
            notes.push(format!("nothing after {} can be reached: {hole}", reach.end));
        }
        if !matches!(choice, TimelineChoice::Number(_)) {
            notes.extend(self.timelines.undecided().map(|mark| {
                let timeline = mark.timeline.get();
                format!(
                    "timeline {timeline} is undecided, so this restore does not follow it: {}; to restore along it, use --target-timeline {timeline}",
                    mark.reason
                )
            }));
        }
        if let (Target::Time { .. } | Target::Lsn(_), TimelineChoice::Latest) = (target, choice) {
            notes.extend(self.left_aside(path));
        }
        Plan { backup: record.clone(), path: path.clone(), reach, notes }
    }

    /// Names other timelines with WAL from the same period that are not on this path: the user may have meant
    /// one of them.
    fn left_aside(&self, path: &Path) -> Option<String> {
        let aside = |other: &&Path| {
            let end = other.own_end().filter(|_| other.timeline() != path.timeline());
            end.is_some_and(|end| !path.passes(other.timeline(), end))
        };
        let all: Vec<String> = self
            .paths
            .values()
            .filter(aside)
            .map(|other| other.timeline().get().to_string())
            .collect();
        (!all.is_empty()).then(|| {
            format!(
                "follows timeline {}; WAL written on timeline {} after it was left is not on this \
                 path: see --target-timeline",
                path.timeline().get(),
                all.join(", ")
            )
        })
    }

    fn no_backup(&self, name: Option<&BackupName>) -> Refusal {
        let problem = match (name, self.backups.is_empty()) {
            (_, true) => "there is no base backup".to_owned(),
            (Some(name), false) => format!("there is no base backup {name}"),
            (None, false) => "there is no usable base backup".to_owned(),
        };
        self.refusal(problem, None)
    }

    /// The newest backup's reason comes first, but a reason about the target itself is more important than one
    /// about the path.
    fn explain(&self, rejected: Vec<Rejected>) -> Refusal {
        let all_too_late = rejected.iter().all(|no| no.why <= Unfit::TooLate);
        let mut rejected = rejected;
        let chosen = if all_too_late {
            // Report the oldest backup's reason: nothing reaches that far back.
            rejected.iter().rposition(|no| no.why == Unfit::TooLate)
        } else {
            rejected.iter().position(|no| no.why > Unfit::TooLate)
        };
        let chosen = rejected.swap_remove(chosen.unwrap_or(0));
        self.refusal(chosen.problem, chosen.hole)
    }

    /// A refusal that lists what can be reached instead.
    pub fn refusal(&self, problem: String, hole: Option<Hole>) -> Refusal {
        let mut reachable = Vec::new();
        for line in self.lines() {
            for window in &line.windows {
                let end = &window.reach;
                let until = match &end.stop {
                    Stop::End { idle_until_unix: Some(unix) } => {
                        format!("{} (the state until {})", end.end, show_time(*unix))
                    }
                    _ => end.end.to_string(),
                };
                reachable.push(format!(
                    "timeline {}: from {} ({}) to {until}, with backup {}",
                    line.timeline.get(),
                    show_time(window.from_unix),
                    window.from,
                    window.backups.iter().map(BackupName::as_str).collect::<Vec<_>>().join(", "),
                ));
            }
        }
        Refusal { problem, hole, reachable }
    }
}

/// Whole microseconds, PostgreSQL's resolution.
fn micros(unix: f64) -> i64 {
    (unix * 1e6).round() as i64
}

fn show_time(unix: f64) -> String {
    jiff::Timestamp::from_microsecond(micros(unix))
        .map_or_else(|_| format!("{unix} s after 1970"), |time| time.to_string())
}
