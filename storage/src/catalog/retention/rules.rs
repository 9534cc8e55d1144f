//! Which backups the policies select.

use super::{
    BackupPlan, Decision, Facts, KnownBackup, Policies, Policy,
    days::{Period, moment},
};
use crate::catalog::BackupRecord;
use klio_pg::{TimelineHistory, TimelineId};
use std::collections::BTreeSet;

/// 2000-01-01: no PostgreSQL version that Klio supports was backed up before.
const FIRST_UNIX: f64 = 946_684_800.0;
/// Year 10000: no working clock says that.
const LAST_UNIX: f64 = 253_402_300_800.0;
const DAY_SECONDS: f64 = 86_400.0;

/// Whether the backup's time is plausible, so that a policy can use it.
pub(super) fn has_time(record: &BackupRecord) -> bool {
    (FIRST_UNIX..LAST_UNIX).contains(&record.committed_unix)
}

/// The sort key by time. Implausible times come first, so that they are never the newest.
pub(super) fn order(record: &BackupRecord) -> f64 {
    if has_time(record) { record.committed_unix } else { 0.0 }
}

/// Whether a backup is old enough to displace others.
pub(super) fn is_aged(record: &BackupRecord, policies: &Policies, now_unix: f64) -> bool {
    record.committed_unix + policies.minimum_age_seconds as f64 <= now_unix
}

/// Decides about each backup; `backups` are oldest first.
pub(super) fn decide(
    backups: &[&KnownBackup],
    facts: &Facts,
    policies: &Policies,
    now_unix: f64,
) -> Vec<BackupPlan> {
    let aged = |backup: &KnownBackup| is_aged(&backup.record, policies, now_unix);
    let everything: Vec<usize> = (0..backups.len()).collect();
    let timed = |only: &dyn Fn(&KnownBackup) -> bool| -> Vec<usize> {
        let fits = |i: &usize| has_time(&backups[*i].record) && only(backups[*i]);
        everything.iter().copied().filter(fits).collect()
    };
    let named = |policy: &Policy, only: &dyn Fn(&KnownBackup) -> bool| {
        // Applied twice: a damaged backup must not push out a good one, and is not dropped because it is damaged.
        let good = timed(&|b| only(b) && !b.damaged);
        let all = timed(only);
        let mut reasons = name_all(policy, backups, &good, facts);
        for (reasons, more) in reasons.iter_mut().zip(name_all(policy, backups, &all, facts)) {
            let new: Vec<String> = more.into_iter().filter(|m| !reasons.contains(m)).collect();
            reasons.extend(new);
        }
        reasons
    };
    let by1 = named(&policies.tier1, &KnownBackup::is_within_reach);
    // What tier 1's policy selects exists in tier 2, too. A young backup may take an older one's place on tier 1, but
    // must not end its existence.
    let by1_aged = named(&policies.tier1, &|b| b.is_within_reach() && aged(b));
    let exists = |b: &KnownBackup| b.tier2 || !facts.has_tier2 && b.is_within_reach();
    let mut by2 = named(&policies.tier2, &|b| exists(b) && aged(b));
    let all = named(&policies.tier2, &exists);
    for ((backup, own), all) in backups.iter().zip(&mut by2).zip(all) {
        // A young backup is selected by the full rules; old ones only compete with old ones.
        if has_time(&backup.record) && !aged(backup) {
            own.push(young(policies));
            own.extend(all);
        }
    }
    let newest = |fits: &dyn Fn(&KnownBackup) -> bool| timed(fits).last().copied();
    let newest_good = newest(&|b| !b.damaged && b.is_within_reach());
    let newest_good2 = newest(&|b| !b.damaged && b.tier2);
    let newest_aged = newest(&|b| !b.damaged && b.is_within_reach() && aged(b));
    let newest_aged2 = newest(&|b| !b.damaged && b.tier2 && aged(b));
    let always = |index: usize| {
        let mut reasons = Vec::new();
        if !has_time(&backups[index].record) {
            reasons.push("its time is impossible, so no rule applies".to_owned());
        }
        if backups[index].record.keep {
            reasons.push("keep flag".to_owned());
        }
        if !backups[index].is_within_reach() {
            reasons
                .push("even both tiers together lack a part of it, so no rule applies".to_owned());
        }
        match newest_good {
            None => reasons.push("no backup is known to be good".to_owned()),
            Some(newest) if newest == index => reasons.push("newest good backup".to_owned()),
            // The good backup is too young to displace anything, even a backup with known damage.
            Some(_) if newest_aged.is_none() => {
                reasons
                    .push(format!("no backup is known to be good that is not {}", young(policies)));
            }
            Some(_) if newest_good2 == Some(index) => {
                reasons.push("newest good backup in tier 2".to_owned());
            }
            Some(_) if [newest_aged, newest_aged2].contains(&Some(index)) => {
                reasons.push(format!("newest good backup that is not {}", young(policies)));
            }
            Some(_) => {}
        }
        reasons
    };
    let plan = |index: usize| {
        let mut far = by2[index].clone();
        if far.is_empty() {
            far.extend(by1_aged[index].iter().map(|reason| format!("tier 1: {reason}")));
        }
        decide_one(backups[index], facts.has_tier2, &by1[index], &far, always(index), policies)
    };
    everything.iter().map(|index| plan(*index)).collect()
}

fn decide_one(
    backup: &KnownBackup,
    has_tier2: bool,
    by1: &[String],
    by2: &[String],
    always: Vec<String>,
    policies: &Policies,
) -> BackupPlan {
    let why = |mut reasons: Vec<String>, otherwise: String| {
        let keep = !reasons.is_empty();
        if !keep {
            reasons.push(otherwise);
        }
        (keep, reasons)
    };
    let asked = |by: &[String], tier: &str| -> Vec<String> {
        by.iter().map(|reason| format!("{tier}: {reason}")).collect()
    };
    let (tier1, tier2) = if has_tier2 {
        let mut one: Vec<String> = by1.to_vec();
        if !backup.tier2 {
            one.push("not proven in tier 2 yet".to_owned());
        }
        let mut two = always;
        two.extend(by2.to_vec());
        if two.is_empty() {
            two.extend(asked(&one, "tier 1"));
        }
        let evicted = "it is proven in tier 2 and no rule of tier 1 selects it".to_owned();
        (why(one, evicted), why(two, unnamed(&policies.tier2)))
    } else {
        let mut all = always;
        all.extend(by2.to_vec());
        let more = asked(by1, "tier 1").into_iter().filter(|reason| !by2.contains(reason));
        all.extend(more);
        let both = why(all, unnamed(&policies.tier2));
        (both.clone(), both)
    };
    let present2 = if has_tier2 { backup.tier2 } else { backup.tier1 };
    BackupPlan {
        name: backup.record.name.clone(),
        committed_unix: backup.record.committed_unix,
        tier1: Decision { present: backup.tier1, keep: tier1.0, reasons: tier1.1 },
        tier2: Decision { present: present2, keep: tier2.0, reasons: tier2.1 },
    }
}

fn young(policies: &Policies) -> String {
    let seconds = policies.minimum_age_seconds;
    match seconds % 86_400 {
        0 => format!("younger than {} d", seconds / 86_400),
        _ => format!("younger than {seconds} s"),
    }
}

fn unnamed(policy: &Policy) -> String {
    let Policy { last, hourly, daily, weekly, monthly, yearly, recovery_window_days } = policy;
    let counts = [
        ("last", last),
        ("hourly", hourly),
        ("daily", daily),
        ("weekly", weekly),
        ("monthly", monthly),
        ("yearly", yearly),
        ("recovery window days", recovery_window_days),
    ];
    let set = counts.iter().filter(|(_, count)| **count > 0);
    let words: Vec<String> = set.map(|(word, count)| format!("{word} {count}")).collect();
    format!("no rule selects it ({})", words.join(", "))
}

/// For each backup, the reasons why a policy selects it; only `candidates` count.
fn name_all(
    policy: &Policy,
    backups: &[&KnownBackup],
    candidates: &[usize],
    facts: &Facts,
) -> Vec<Vec<String>> {
    let mut reasons = vec![Vec::new(); backups.len()];
    for index in candidates.iter().rev().take(policy.last as usize) {
        reasons[*index].push(format!("last {}", policy.last));
    }
    let periods = [
        (Period::Hour, policy.hourly),
        (Period::Day, policy.daily),
        (Period::Week, policy.weekly),
        (Period::Month, policy.monthly),
        (Period::Year, policy.yearly),
    ];
    for (period, count) in periods {
        let mut seen = BTreeSet::new();
        for index in candidates.iter().rev() {
            if seen.len() >= count as usize {
                break;
            }
            let Some(name) = period.of(backups[*index].record.committed_unix) else { continue };
            if seen.insert(name.clone()) {
                reasons[*index].push(format!("{} {name}", period.word()));
            }
        }
    }
    if policy.recovery_window_days > 0 {
        name_window(policy.recovery_window_days, backups, candidates, facts, &mut reasons);
    }
    reasons
}

/// Selects all backups in the window, and for each timeline that was alive in it the newest backup before the window.
fn name_window(
    days: u32,
    backups: &[&KnownBackup],
    candidates: &[usize],
    facts: &Facts,
    reasons: &mut [Vec<String>],
) {
    let Some(newest) = candidates.last() else { return };
    let begin = backups[*newest].record.committed_unix - f64::from(days) * DAY_SECONDS;
    for index in candidates {
        if backups[*index].record.committed_unix >= begin {
            reasons[*index].push(format!("recovery window {days} d"));
        }
    }
    let older: Vec<usize> =
        candidates.iter().copied().filter(|i| backups[*i].record.committed_unix < begin).collect();
    for (timeline, history) in alive(backups, &older, facts) {
        let leads = |i: &&usize| leads_to(&backups[**i].record, timeline, history.as_ref());
        let Some(index) = older.iter().rev().find(leads) else { continue };
        let reason = format!("recovery window {days} d begins with it ({})", moment(begin));
        if !reasons[*index].contains(&reason) {
            reasons[*index].push(reason);
        }
    }
}

/// Timelines that may have had WAL in the window. A timeline is over if a backup from before the window is on a newer
/// one (P8: a new timeline replaces an old one, never the other way round).
fn alive(
    backups: &[&KnownBackup],
    older: &[usize],
    facts: &Facts,
) -> Vec<(TimelineId, Option<TimelineHistory>)> {
    let held = facts.timelines.iter().map(|t| t.timeline);
    let backed_up = backups.iter().flat_map(|b| [b.record.start_timeline, b.record.stop_timeline]);
    let all: BTreeSet<TimelineId> = held.chain(backed_up).collect();
    let history = |timeline: TimelineId| history(facts, timeline);
    let known = all.iter().all(|timeline| history(*timeline).is_some());
    let over = older.iter().map(|i| backups[*i].record.start_timeline).max();
    let is_over = |timeline: &TimelineId| known && over.is_some_and(|newer| newer > *timeline);
    all.iter().filter(|t| !is_over(t)).map(|t| (*t, history(*t))).collect()
}

/// A timeline's ancestors, if they are known.
pub(super) fn history(facts: &Facts, timeline: TimelineId) -> Option<TimelineHistory> {
    let known = facts.timelines.iter().find(|t| t.timeline == timeline);
    let stored = known.and_then(|t| t.history.clone());
    stored.or_else(|| (timeline.get() == 1).then(|| TimelineHistory::root(timeline)))
}

/// Whether a recovery from this backup can end on a timeline. If the history is unknown, only on the backup's own
/// timeline.
fn leads_to(
    record: &BackupRecord,
    timeline: TimelineId,
    history: Option<&TimelineHistory>,
) -> bool {
    if record.stop_timeline == timeline {
        return true;
    }
    let entries = history.map(TimelineHistory::entries).unwrap_or_default();
    entries.iter().any(|e| e.timeline == record.stop_timeline && record.stop_lsn <= e.end)
}
