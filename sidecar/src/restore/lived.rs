//! Finds out which timelines existed at a given time.
//!
//! After a restore to an earlier moment, or a promotion while the old primary went on, a timeline branches off from
//! another. At a given time maybe only one of the two had transactions, because the other one began later. A restore
//! along the other one would silently give the state of the branch point. A timeline is said to have lived at a time
//! if a transaction after the branch point ended on it at or before that time.

use super::{Scratch, show_time, source::Source, wal::Wal};
use crate::error::{Error, Failure};
use klio_pg::{Lsn, TimelineId};
use klio_proto::Code;
use klio_storage::catalog::{Path, Plan, Survey};

/// Another timeline that lived at the target time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lived {
    pub timeline: TimelineId,
    /// Where it branches off from the path of the plan.
    pub parted: Lsn,
    /// Whether the path of the plan lived at that time too.
    pub beside: bool,
    /// When the first transaction after the branch point ended on the path of the plan, in microseconds since 1970.
    pub first_here: Option<i64>,
}

impl Lived {
    /// What a restore along `chosen` to `wanted` leaves out.
    pub fn note(&self, chosen: TimelineId, wanted: i64) -> String {
        let (theirs, ours, at) = (self.timeline.get(), chosen.get(), self.parted);
        if self.beside {
            return format!(
                "at that time there was also timeline {theirs}, which branches off from timeline {ours} at {at}: \
                 --target-timeline {theirs} restores its state"
            );
        }
        let since = self.first_here.map_or_else(
            || "has no transaction of its own yet".to_owned(),
            |first| format!("has its first transaction at {}", show_time(first)),
        );
        format!(
            "at {} only timeline {theirs} existed: it went on after {at}, where timeline {ours} branches off, and timeline {ours} {since}",
            show_time(wanted)
        )
    }

    /// The error if the user did not say which timeline is meant.
    pub fn refusal(&self, chosen: TimelineId, wanted: i64) -> Error {
        let (theirs, ours) = (self.timeline.get(), chosen.get());
        Error::new(Failure::Unreachable, self.note(chosen, wanted)).hint(format!(
            "--target-timeline {theirs} restores that moment, --target-timeline {ours} the state at the branch point; \
             nothing was touched"
        ))
    }
}

/// The note for a user who named the timeline, if the other timelines could not be read.
pub fn not_known(error: &Error) -> String {
    format!("cannot tell whether another timeline existed at that time: {error}")
}

/// Adds a hint to the error for a user who did not name the timeline and could avoid the failure by naming it.
pub fn needed(error: Error) -> Error {
    let lacks = matches!(
        error.failure,
        Failure::Unreachable | Failure::Code(Code::Gap | Code::NotFound | Code::Corrupt)
    );
    if !lacks {
        return error;
    }
    let hint = "with --target-timeline the WAL of other timelines is not needed";
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

    /// A full disk used to be reported as a matter of --target-timeline, and its own hint was lost.
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
            refusal.message.contains("only timeline 1 existed")
                && refusal.message.contains("0/3000060")
        );
        assert!(refusal.message.contains("13:03:00.500000+00"), "{refusal}");
        assert!(refusal.hint.contains("--target-timeline 1 restores that moment"), "{refusal}");
        lived.beside = true;
        assert!(lived.note(two, 0).contains("--target-timeline 1 restores its state"));
    }
}
