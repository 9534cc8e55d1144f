//! How far WAL may be removed.

use super::{BackupPlan, Facts, KnownBackup, KnownTimeline, WalPlan, rules};
use crate::catalog::BackupRecord;
use klio_pg::{Lsn, TimelineId};

/// The position below which WAL may be removed, with the reason.
type Horizon = (Option<Lsn>, String);

/// The plan for every timeline.
pub(super) fn horizons(
    backups: &[&KnownBackup],
    decided: &[BackupPlan],
    facts: &Facts,
    is_aged: &dyn Fn(&BackupRecord) -> bool,
) -> Vec<WalPlan> {
    let kept = |which: &dyn Fn(&BackupPlan) -> bool| -> Vec<&BackupRecord> {
        let fits = backups.iter().zip(decided).filter(|(_, plan)| which(plan));
        fits.map(|(backup, _)| &backup.record).collect()
    };
    let any = kept(&|plan| plan.tier1.keep || plan.tier2.keep);
    let mut near = kept(&|plan| plan.tier1.keep);
    // Tier 1 may keep no backup at all; the WAL after the newest good one is kept anyway.
    let good = backups.iter().rfind(|b| !b.damaged && rules::has_time(&b.record));
    near.extend(good.or(backups.last()).map(|b| &b.record));
    // From all backups, not only the kept ones: otherwise keeping one more backup could allow WAL to be removed. A
    // young backup displaces nothing, and that includes another timeline's WAL (P13).
    let old = backups.iter().map(|b| &b.record).filter(|record| is_aged(record));
    let last = old.map(|record| record.start_timeline).max();
    let plan = |line: &KnownTimeline| {
        let (tier2_below, tier2_reason) = for_good(line, &any, last, facts, is_aged);
        // WAL that may be removed for good may be removed here too.
        let both = (tier2_below, tier2_reason.clone());
        let own = facts.has_tier2.then(|| horizon(line, &near, last, facts));
        let (tier1_below, tier1_reason) = own.filter(|own| own.0 >= both.0).unwrap_or(both);
        let timeline = line.timeline;
        WalPlan { timeline, tier1_below, tier1_reason, tier2_below, tier2_reason }
    };
    sorted(facts).into_iter().map(plan).collect()
}

/// The same plan without permanent removal: only WAL that tier 2 has is evicted from tier 1.
pub(super) fn only_near(plans: Vec<WalPlan>, facts: &Facts, reason: &str) -> Vec<WalPlan> {
    let near =
        |plan: WalPlan| WalPlan { tier2_below: None, tier2_reason: reason.to_owned(), ..plan };
    match facts.has_tier2 {
        true => plans.into_iter().map(near).collect(),
        false => nothing(facts, reason),
    }
}

/// Keeps everything on every timeline.
pub(super) fn nothing(facts: &Facts, reason: &str) -> Vec<WalPlan> {
    let keep = |line: &KnownTimeline| WalPlan {
        timeline: line.timeline,
        tier1_below: None,
        tier1_reason: reason.to_owned(),
        tier2_below: None,
        tier2_reason: reason.to_owned(),
    };
    sorted(facts).into_iter().map(keep).collect()
}

fn sorted(facts: &Facts) -> Vec<&KnownTimeline> {
    let mut lines: Vec<&KnownTimeline> = facts.timelines.iter().collect();
    lines.sort_by_key(|line| line.timeline);
    lines
}

/// As `horizon`, but if only young backups need the timeline, nothing is removed: the WAL below them may be needed by
/// something that they do not show (P13).
fn for_good(
    line: &KnownTimeline,
    kept: &[&BackupRecord],
    last: Option<TimelineId>,
    facts: &Facts,
    is_aged: &dyn Fn(&BackupRecord) -> bool,
) -> Horizon {
    let mut needing =
        kept.iter().filter(|record| may_read(record, line.timeline, facts)).peekable();
    if needing.peek().is_some() && !needing.any(|record| is_aged(record)) {
        return (
            None,
            "every backup that leads to it is too young to displace anything".to_owned(),
        );
    }
    horizon(line, kept, last, facts)
}

fn horizon(
    line: &KnownTimeline,
    kept: &[&BackupRecord],
    last: Option<TimelineId>,
    facts: &Facts,
) -> Horizon {
    if kept.is_empty() {
        return (None, "there is no backup: nothing is removed".to_owned());
    }
    let needing = kept.iter().filter(|record| may_read(record, line.timeline, facts));
    match needing.min_by_key(|record| record.start_lsn) {
        Some(first) => {
            let below = first.start_lsn.segment_start(facts.segment_size);
            (Some(below), format!("backup {} needs it from {} on", first.name, first.start_lsn))
        }
        None if last.is_some_and(|last| line.timeline < last) => {
            let below = line.end.segment_start(facts.segment_size);
            (Some(below), "it ended, and no kept backup leads to it".to_owned())
        }
        None => (None, "it is newer than every backup".to_owned()),
    }
}

/// Whether a recovery from this backup may read WAL of the timeline. If the timeline's history is unknown, it may.
fn may_read(record: &BackupRecord, timeline: TimelineId, facts: &Facts) -> bool {
    if timeline <= record.start_timeline {
        return timeline == record.start_timeline;
    }
    let Some(history) = rules::history(facts, timeline) else { return true };
    let mut entries = history.entries().iter();
    entries.any(|e| e.timeline == record.start_timeline && record.start_lsn <= e.end)
}
