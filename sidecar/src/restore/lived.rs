//! Which timeline lived at a time.
//!
//! After a restore to an earlier moment, or a promotion while the old primary wrote on, two timelines part, and a time may be one
//! that only one of them lived through: the other one was still to begin. A restore along that one would give the state
//! in which they parted, without a word. A timeline lived at a time when a transaction ended on it behind the parting, at
//! that time or before.

use super::{Scratch, show_time, source::Source, wal::Wal};
use crate::error::{Error, Failure};
use klio_pg::{Lsn, TimelineId};
use klio_proto::Code;
use klio_storage::catalog::{Path, Plan, Survey};

/// A timeline that lived at the time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lived {
    /// Which.
    pub timeline: TimelineId,
    /// Where it parted from the way of the plan.
    pub parted: Lsn,
    /// Whether the way of the plan lived then too.
    pub beside: bool,
    /// When the first transaction behind that ended on the way of the plan.
    pub first_here: Option<i64>,
}

impl Lived {
    /// What a restore along `chosen` to `wanted` misses.
    pub fn note(&self, chosen: TimelineId, wanted: i64) -> String {
        let (theirs, ours, at) = (self.timeline.get(), chosen.get(), self.parted);
        if self.beside {
            return format!(
                "timeline {theirs} lived at that time too, apart from timeline {ours} since {at}: --target-timeline {theirs} \
                 restores its state"
            );
        }
        let since = self.first_here.map_or_else(
            || "has no transaction of its own yet".to_owned(),
            |first| format!("has its first transaction at {}", show_time(first)),
        );
        format!(
            "at {} timeline {theirs} lived: it went on after {at}, where timeline {ours} parts from it, and timeline {ours} {since}",
            show_time(wanted)
        )
    }

    /// Nobody said which timeline is meant.
    pub fn refusal(&self, chosen: TimelineId, wanted: i64) -> Error {
        let (theirs, ours) = (self.timeline.get(), chosen.get());
        Error::new(Failure::Unreachable, self.note(chosen, wanted)).hint(format!(
            "--target-timeline {theirs} restores that moment, --target-timeline {ours} the state in which the two parted; \
             nothing was touched"
        ))
    }
}

/// For who named the timeline: the look at the others failed.
pub fn not_known(error: &Error) -> String {
    format!("whether another timeline lived at that time is not known: {error}")
}

/// For who did not: what can be done about it, beside what the failure itself says.
pub fn needed(error: Error) -> Error {
    let lacks = matches!(
        error.failure,
        Failure::Unreachable | Failure::Code(Code::Gap | Code::NotFound | Code::Corrupt)
    );
    if !lacks {
        return error;
    }
    let hint = "with --target-timeline no other timeline's WAL is needed";
    let both = match error.hint.is_empty() {
        true => hint.to_owned(),
        false => format!("{}; {hint}", error.hint),
    };
    error.hint(both)
}

/// Every other timeline that lived at `wanted`.
///
/// # Errors
/// WAL that cannot be read.
pub async fn elsewhere(
    source: &Source,
    scratch: &Scratch,
    survey: &Survey,
    plan: &Plan,
    wanted: i64,
) -> Result<Vec<Lived>, Error> {
    let mut lived = Vec::new();
    let major = plan.backup.postgres_version / 10_000;
    let first_ending = async |path: &Path, from: Lsn, to: Lsn| {
        let wal = Wal { source, scratch, path, postgres_major: major };
        let found = wal.find(from, to, &mut |found| found.landmark.stops_by_time()).await?;
        Ok::<_, Error>(found.and_then(|found| found.landmark.unix_micros()))
    };
    let others = survey.timelines().filter(|timeline| *timeline != plan.path.timeline());
    for other in others.filter_map(|timeline| survey.path(timeline)) {
        let parted = plan.path.parts_from(other).filter(|at| *at > plan.backup.stop_lsn);
        let Some(parted) = parted else { continue };
        let end = other.reach(parted).end;
        let theirs = if end > parted { first_ending(other, parted, end).await? } else { None };
        if theirs.is_none_or(|time| time > wanted) {
            continue;
        }
        let first_here = match plan.reach.end > parted {
            true => first_ending(&plan.path, parted, plan.reach.end).await?,
            false => None,
        };
        let beside = first_here.is_some_and(|time| time <= wanted);
        lived.push(Lived { timeline: other.timeline(), parted, beside, first_here });
    }
    Ok(lived)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A full disk was said to be a matter of --target-timeline, and its own hint was lost.
    #[test]
    fn a_failure_keeps_its_hint_and_another_one_is_only_added_for_wal() {
        let full = Error::new(Failure::Local, "write: no space left").hint("free some space");
        assert_eq!(needed(full.clone()).hint, "free some space");
        assert!(not_known(&full).contains("no space left"));
        let gap =
            Error::new(Failure::Code(Code::Gap), "it was lost").hint("klio list wal shows it");
        let hint = needed(gap).hint;
        assert!(hint.starts_with("klio list wal shows it; with --target-timeline"), "{hint}");
    }

    #[test]
    fn a_moment_of_another_timeline_is_refused_with_both_ways_out() {
        let [one, two] = [1, 2].map(|n| TimelineId::new(n).unwrap());
        let mut lived = Lived {
            timeline: one,
            parted: Lsn::new(0x300_0060),
            beside: false,
            first_here: Some(1_795_266_180_500_000),
        };
        let refusal = lived.refusal(two, 1_795_266_180_000_000);
        assert!(
            refusal.message.contains("timeline 1 lived") && refusal.message.contains("0/3000060")
        );
        assert!(refusal.message.contains("13:03:00.500000+00"), "{refusal}");
        assert!(refusal.hint.contains("--target-timeline 1 restores that moment"), "{refusal}");
        lived.beside = true;
        assert!(lived.note(two, 0).contains("--target-timeline 1 restores its state"));
    }
}
