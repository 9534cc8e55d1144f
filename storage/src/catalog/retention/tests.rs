//! The retention plan: what each rule keeps, the effect of doubts, and properties over random catalogs.

use super::*;
use crate::testing::backup_record;
use proptest::prelude::*;
use std::collections::BTreeSet;

const DAY: f64 = 86_400.0;
/// 2026-11-01 00:00 UTC, a Sunday.
const BEGIN: f64 = 1_793_491_200.0;
const SEGMENT: u64 = 1 << 20;

fn timeline(number: u32) -> TimelineId {
    TimelineId::new(number).unwrap()
}

fn record(name: &str, committed: f64, line: u32, start: u64) -> BackupRecord {
    let start = Lsn::new(start);
    BackupRecord {
        started_postgres_unix: committed - 60.0,
        stopped_postgres_unix: committed - 10.0,
        begun_unix: committed - 60.0,
        committed_unix: committed,
        ..backup_record(name.parse().unwrap(), timeline(line), start, start.advance(4096))
    }
}

fn known(record: BackupRecord) -> KnownBackup {
    KnownBackup { record, tier1: true, tier2: true, together: true, damaged: false }
}

fn line(number: u32, history: &str, end: u64) -> KnownTimeline {
    let timeline = timeline(number);
    let history = TimelineHistory::parse(timeline, history.as_bytes()).unwrap();
    KnownTimeline { timeline, history: Some(history), end: Lsn::new(end) }
}

fn facts(backups: Vec<KnownBackup>) -> Facts {
    Facts {
        backups,
        problems: vec![],
        clock: vec![],
        timelines: vec![line(1, "", 100 * SEGMENT)],
        segment_size: SegmentSize::new(SEGMENT as u32).unwrap(),
        has_tier2: true,
    }
}

/// One backup per day for `days` days, on timeline 1, one segment apart.
fn daily(days: u32) -> Facts {
    let backup = |day: u32| {
        let (at, start) = (BEGIN + f64::from(day) * DAY, u64::from(day + 1) * SEGMENT + 40);
        known(record(&format!("d{day}"), at, 1, start))
    };
    facts((0..days).map(backup).collect())
}

fn policies(tier1: Policy, tier2: Policy) -> Policies {
    Policies { tier1, tier2, minimum_age_seconds: 0 }
}

fn last(last: u32) -> Policy {
    Policy { last, ..Policy::default() }
}

/// Nothing is removed for good.
fn is_all_there(plan: &RetentionPlan) -> bool {
    plan.expired().is_empty() && plan.wal.iter().all(|line| line.tier2_below.is_none())
}

fn expired(plan: &RetentionPlan) -> Vec<String> {
    plan.expired().iter().map(|name| name.as_str().to_owned()).collect()
}

const NOW: f64 = BEGIN + 400.0 * DAY;

#[test]
fn the_default_keeps_a_month_and_the_newest_near() {
    let plan = plan(&daily(40), &Policies::default(), NOW);
    // The window begins on day 9, at the time of backup d9.
    assert_eq!(expired(&plan), (0..8).map(|day| format!("d{day}")).collect::<Vec<_>>());
    assert_eq!(plan.evicted().len(), 31);
    let oldest = &plan.backups[8];
    assert!(oldest.tier2.reasons[0].contains("recovery window 30 d begins with it"), "{oldest:?}");
    assert_eq!(plan.wal[0].tier2_below, Some(Lsn::new(9 * SEGMENT)));
    assert_eq!(plan.wal[0].tier1_below, Some(Lsn::new(40 * SEGMENT)));
    assert!(plan.wal[0].tier2_reason.contains("d8"), "{}", plan.wal[0].tier2_reason);
}

#[test]
fn the_newest_of_each_period_stays() {
    let policy = Policy { daily: 2, weekly: 2, monthly: 2, yearly: 2, ..Policy::default() };
    let mut facts = daily(40);
    facts.backups.push(known(record("d39b", BEGIN + 39.5 * DAY, 1, 60 * SEGMENT)));
    let plan = plan(&facts, &policies(last(1), policy), NOW);
    let kept: Vec<(&str, String)> = plan
        .backups
        .iter()
        .filter(|b| b.tier2.keep)
        .map(|b| (b.name.as_str(), b.tier2.reasons.join(", ")))
        .collect();
    let expected = [
        ("d29", "monthly 2026-11"),
        ("d35", "weekly 2026-W49"),
        ("d38", "daily 2026-12-09"),
        ("d39b", "newest good backup, newest good backup in tier 2"),
    ];
    assert_eq!(kept.len(), expected.len(), "{kept:?}");
    for ((name, reasons), (expected, reason)) in kept.iter().zip(expected) {
        assert_eq!(*name, expected);
        let reason = reason.split(", ").next().unwrap();
        assert!(reasons.contains(reason), "{name}: {reasons}");
    }
}

#[test]
fn one_unreadable_record_empties_the_plan_and_says_so() {
    let mut facts = daily(10);
    let policies = policies(last(1), last(1));
    assert!(!plan(&facts, &policies, NOW).is_empty());
    facts.problems.push("read record of d3: not JSON".into());
    let plan = plan(&facts, &policies, NOW);
    assert!(plan.is_empty());
    assert!(plan.alarms[0].contains("d3"), "{:?}", plan.alarms);
}

#[test]
fn a_clock_behind_the_newest_record_expires_nothing() {
    let policies = policies(last(1), last(1));
    for now in [0.0, BEGIN + 8.9 * DAY, f64::NAN] {
        let plan = plan(&daily(10), &policies, now);
        assert!(is_all_there(&plan), "{now}");
        assert!(plan.alarms[0].contains("clock"), "{:?}", plan.alarms);
    }
    assert!(!plan(&daily(10), &policies, BEGIN + 9.0 * DAY).is_empty());
}

#[test]
fn a_clock_far_ahead_expires_no_more_than_a_right_one() {
    let facts = daily(40);
    let policies = Policies { minimum_age_seconds: 0, ..Policies::default() };
    let right = plan(&facts, &policies, BEGIN + 39.0 * DAY);
    let ahead = plan(&facts, &policies, BEGIN + 3900.0 * DAY);
    assert_eq!(expired(&right), expired(&ahead));
    // Everything that has the minimum age counts; still, nothing is removed because of its age alone.
    let ahead_default = plan(&facts, &Policies::default(), BEGIN + 3900.0 * DAY);
    assert_eq!(expired(&ahead_default), expired(&ahead));
}

/// Three tiny valid backups within a minute.
#[test]
fn backups_of_this_week_push_out_none_that_is_older() {
    let mut facts = daily(30);
    let now = BEGIN + 29.5 * DAY;
    for number in 0..3 {
        let at = now - 30.0 + f64::from(number);
        facts.backups.push(known(record(&format!("tiny{number}"), at, 1, 90 * SEGMENT)));
    }
    let policies = Policies { minimum_age_seconds: 7 * 86_400, ..policies(last(1), last(2)) };
    let plan = plan(&facts, &policies, now);
    // d22 is seven and a half days old: with d21 it is one of the last two that count.
    assert_eq!(expired(&plan), (0..21).map(|day| format!("d{day}")).collect::<Vec<_>>());
    let reasons = |name: &str| {
        let found = plan.backups.iter().find(|b| b.name.as_str() == name).unwrap();
        found.tier2.reasons.join(", ")
    };
    assert!(reasons("d25").contains("younger than 7 d"), "{}", reasons("d25"));
    assert!(reasons("tiny2").contains("newest good backup, younger"), "{}", reasons("tiny2"));
    assert!(
        reasons("d22").contains("newest good backup that is not younger"),
        "{}",
        reasons("d22")
    );
    assert_eq!(plan.wal[0].tier2_below, Some(Lsn::new(22 * SEGMENT)));
    let later = super::plan(&facts, &policies, now + 8.0 * DAY);
    assert_eq!(expired(&later).len(), 31, "a person had a week");
}

/// The server's clock was 400 days ahead while two of four backups were committed.
#[test]
fn a_record_whose_clocks_are_far_apart_holds_everything_until_a_person_dates_it() {
    let mut facts = daily(4);
    for backup in &mut facts.backups[2..] {
        backup.record.committed_unix += 400.0 * DAY;
    }
    let policies = policies(last(1), last(1));
    for now in [BEGIN + 404.0 * DAY, BEGIN + 5.0 * DAY, BEGIN + 900.0 * DAY] {
        let plan = plan(&facts, &policies, now);
        assert!(is_all_there(&plan), "{now}");
        let told = plan.alarms.join("; ");
        assert!(
            told.contains("d2") && told.contains("400.0 days") && told.contains("redate"),
            "{told}"
        );
    }
    for backup in &mut facts.backups[2..] {
        backup.record.committed_unix -= 400.0 * DAY;
        backup.record.redated_unix = Some(BEGIN + 5.0 * DAY);
    }
    assert_eq!(expired(&plan(&facts, &policies, BEGIN + 5.0 * DAY)), ["d0", "d1", "d2"]);
    // A person's decision about the clocks is accepted, even if PostgreSQL's is the wrong one.
    facts.backups[3].record.stopped_postgres_unix += 9000.0 * DAY;
    assert_eq!(plan(&facts, &policies, BEGIN + 5.0 * DAY).alarms, [""; 0]);
    facts.backups[3].record.redated_unix = None;
    assert_eq!(plan(&facts, &policies, BEGIN + 5.0 * DAY).alarms.len(), 1);
}

#[test]
fn what_the_server_doubts_of_its_clock_lets_nothing_go_for_good() {
    let mut facts = daily(4);
    let policies = policies(last(1), last(1));
    assert!(!plan(&facts, &policies, NOW).is_empty());
    facts.clock.push("the clock jumped".into());
    let plan = plan(&facts, &policies, NOW);
    assert!(is_all_there(&plan) && plan.alarms == ["the clock jumped"], "{:?}", plan.alarms);
}

/// Before, one record with an implausible time also stopped the eviction of the cluster's WAL, and tier 1 ran full
/// for all clusters.
#[test]
fn what_tier_2_has_leaves_tier_1_whatever_a_clock_says() {
    let (mut facts, policies) = (daily(6), policies(last(1), last(1)));
    facts.backups[2].record.stopped_postgres_unix -= 1.5 * DAY;
    let doubtful = plan(&facts, &policies, NOW);
    assert_eq!((doubtful.hold, doubtful.alarms.len()), (Hold::ForGood, 1));
    assert!(is_all_there(&doubtful));
    let gone: Vec<String> = doubtful.evicted().iter().map(ToString::to_string).collect();
    assert_eq!(gone, ["d0", "d1", "d3", "d4"], "the one in doubt stays near");
    assert_eq!(doubtful.wal[0].tier1_below, Some(Lsn::new(3 * SEGMENT)));
    facts.backups[2].record.redated_unix = Some(NOW);
    facts.clock.push("the server's clock jumped".into());
    let doubtful = plan(&facts, &policies, NOW);
    assert!(is_all_there(&doubtful));
    assert_eq!(doubtful.wal[0].tier1_below, Some(Lsn::new(6 * SEGMENT)));
    // Without a bucket, and where a record cannot be read, everything stays.
    facts.problems.push("read record of d3: not JSON".into());
    assert!(plan(&facts, &policies, NOW).is_empty());
    facts.problems.clear();
    facts.has_tier2 = false;
    for backup in &mut facts.backups {
        backup.tier2 = false;
    }
    assert!(plan(&facts, &policies, NOW).is_empty());
}

#[test]
fn a_backup_of_an_odd_time_stays_and_takes_no_place() {
    let mut facts = daily(3);
    for (name, odd) in [("zero", 0.0), ("minus", -5.0), ("huge", 1e18)] {
        facts.backups.push(known(record(name, odd, 1, 50 * SEGMENT)));
    }
    let plan = plan(&facts, &policies(last(1), last(2)), NOW);
    assert_eq!(expired(&plan), ["d0"]);
}

#[test]
fn what_is_not_archived_stays_on_tier_1_and_pushes_nothing_out_of_tier_2() {
    let mut facts = daily(6);
    for backup in &mut facts.backups[3..] {
        backup.tier2 = false;
    }
    let plan = plan(&facts, &policies(last(1), last(2)), NOW);
    assert_eq!(expired(&plan), ["d0"]);
    assert_eq!(plan.evicted().len(), 2);
    assert_eq!(plan.backups[3].tier1.reasons, ["not proven in tier 2 yet"]);
}

#[test]
fn a_damaged_backup_pushes_no_good_one_out() {
    let mut facts = daily(5);
    facts.backups[4].damaged = true;
    let plan = plan(&facts, &policies(last(1), last(1)), NOW);
    assert_eq!(expired(&plan), ["d0", "d1", "d2"]);
    assert!(plan.backups[3].tier2.reasons.contains(&"newest good backup".to_owned()));
}

#[test]
fn without_a_bucket_tier_1_keeps_what_either_policy_names() {
    let mut facts = daily(5);
    facts.has_tier2 = false;
    for backup in &mut facts.backups {
        backup.tier2 = false;
    }
    let plan = plan(&facts, &policies(last(3), last(1)), NOW);
    assert_eq!(expired(&plan), ["d0", "d1"]);
    assert!(plan.evicted().is_empty());
    assert_eq!(plan.wal[0].tier1_below, Some(Lsn::new(3 * SEGMENT)));
}

/// Tier 2 was removed from the configuration: backups that were evicted to it displace nothing.
#[test]
fn what_no_tier_can_give_back_counts_for_no_rule_and_raises_an_alarm() {
    for has_tier2 in [false, true] {
        let mut facts = daily(6);
        facts.has_tier2 = has_tier2;
        for (day, backup) in facts.backups.iter_mut().enumerate() {
            (backup.tier1, backup.tier2) = (day == 1 || day == 2, false);
            backup.together = backup.tier1;
        }
        let plan = plan(&facts, &policies(last(1), last(2)), NOW);
        assert!(plan.is_empty(), "{plan:?}");
        assert_eq!(plan.alarms.len(), 1, "{:?}", plan.alarms);
        for part in ["d0 and 3 more", "hint: put the bucket", "[tier2]"] {
            assert!(plan.alarms[0].contains(part), "{part}: {:?}", plan.alarms);
        }
        // Tier 2 does not have its record yet, so nobody may be advised to remove it.
        assert_eq!(plan.alarms[0].contains("remove its record"), !has_tier2, "{:?}", plan.alarms);
        let reasons = |day: usize| plan.backups[day].tier1.reasons.join(", ");
        assert!(reasons(2).contains("last 1"), "{}", reasons(2));
        assert!(!reasons(5).contains("last"), "{}", reasons(5));
    }
}

/// Tier 1 evicted packs, and a new backup builds on one that only the bucket has.
#[test]
fn a_backup_that_only_both_tiers_together_have_is_within_reach() {
    let mut facts = daily(6);
    for (day, backup) in facts.backups.iter_mut().enumerate() {
        (backup.tier1, backup.tier2) = (false, day < 5);
    }
    let plan = plan(&facts, &policies(last(1), last(2)), NOW);
    assert_eq!(plan.alarms, [""; 0]);
    assert_eq!(expired(&plan), ["d0", "d1", "d2"]);
    let newest = &plan.backups[5];
    assert!(newest.tier1.keep && newest.tier2.keep, "{newest:?}");
    let reasons = newest.tier1.reasons.join(", ");
    assert!(reasons.contains("not proven in tier 2 yet"), "{reasons}");
}

#[test]
fn without_any_backup_no_wal_goes() {
    let plan = plan(&facts(vec![]), &Policies::default(), NOW);
    assert!(plan.is_empty());
    assert!(plan.wal[0].tier2_reason.contains("no backup"));
}

/// A backup from before the branch is the only path to the newer timeline.
#[test]
fn the_window_keeps_the_way_to_a_timeline_that_branched_off_before_the_newest_backup() {
    let mut facts = facts(vec![
        known(record("a", BEGIN, 1, 10 * SEGMENT)),
        known(record("b", BEGIN + DAY, 1, 20 * SEGMENT)),
        // PITR to segment 15 on day 2.
        known(record("c", BEGIN + 10.0 * DAY, 2, 30 * SEGMENT)),
    ]);
    facts.timelines = vec![
        line(1, "", 25 * SEGMENT),
        line(2, &format!("1\t{}\tpitr\n", Lsn::new(15 * SEGMENT)), 40 * SEGMENT),
    ];
    let week = Policy { recovery_window_days: 7, ..Policy::default() };
    let plan = plan(&facts, &policies(last(1), week), NOW);
    assert_eq!(expired(&plan), Vec::<String>::new());
    assert_eq!(plan.wal[0].tier2_below, Some(Lsn::new(10 * SEGMENT)));
    assert_eq!(plan.wal[1].tier2_below, Some(Lsn::new(10 * SEGMENT)));
}

#[test]
fn a_timeline_to_which_no_kept_backup_leads_goes_and_the_newest_never() {
    let mut facts = facts(vec![
        known(record("a", BEGIN, 1, 10 * SEGMENT)),
        known(record("c", BEGIN + 10.0 * DAY, 2, 30 * SEGMENT)),
    ]);
    let branch = format!("1\t{}\tpitr\n", Lsn::new(15 * SEGMENT));
    facts.timelines = vec![
        line(1, "", 25 * SEGMENT),
        line(2, &branch, 40 * SEGMENT),
        line(3, &branch, 20 * SEGMENT),
    ];
    let plan = plan(&facts, &policies(last(1), last(1)), NOW);
    assert_eq!(expired(&plan), ["a"]);
    assert_eq!(plan.wal[0].tier2_below, Some(Lsn::new(25 * SEGMENT)));
    assert_eq!(plan.wal[1].tier2_below, Some(Lsn::new(30 * SEGMENT)));
    assert_eq!(plan.wal[2].tier2_below, None);
}

#[test]
fn a_plan_is_the_same_after_json() {
    let plan = plan(&daily(9), &Policies::default(), NOW);
    let text = serde_json::to_string(&plan).unwrap();
    assert_eq!(serde_json::from_str::<RetentionPlan>(&text).unwrap(), plan);
}

/// Timelines 1 to 3; 2 and 3 branch off anywhere, 3 from 1 or 2.
fn any_timelines() -> impl Strategy<Value = Vec<KnownTimeline>> {
    (1..40u64, 1..40u64, any::<bool>(), any::<[bool; 2]>()).prop_map(
        |(fork2, fork3, nested, known)| {
            let fork = |at: u64| Lsn::new(at * SEGMENT + 77);
            let two = format!("1\t{}\tx\n", fork(fork2));
            let three = match nested && fork3 >= fork2 {
                true => format!("{two}2\t{}\tx\n", fork(fork3)),
                false => format!("1\t{}\tx\n", fork(fork3)),
            };
            let mut lines = vec![
                line(1, "", 50 * SEGMENT),
                line(2, &two, 60 * SEGMENT),
                line(3, &three, 70 * SEGMENT),
            ];
            for (index, known) in known.into_iter().enumerate() {
                if !known {
                    lines[index + 1].history = None;
                }
            }
            lines
        },
    )
}

fn any_facts() -> impl Strategy<Value = Facts> {
    let backup = (0..200_000u32, 1..4u32, 1..45u64, any::<[bool; 4]>(), 0..20u8);
    (prop::collection::vec(backup, 0..10), any_timelines(), any::<bool>()).prop_map(
        |(backups, timelines, has_tier2)| {
            let make = |(index, (minutes, line, segment, flags, odd))| {
                let at = BEGIN + f64::from(minutes) * 60.0;
                let at = if odd == 0 { 3.0 } else { at };
                let mut record = record(&format!("b{index}"), at, line, segment * SEGMENT + 40);
                record.keep = odd == 1;
                let [tier1, tier2, spread, damaged] = flags;
                let (tier2, spread) = (tier2 && has_tier2, spread && has_tier2);
                let tier1 = tier1 || !tier2 && !spread;
                KnownBackup { record, tier1, tier2, together: true, damaged }
            };
            let backups: Vec<KnownBackup> = backups.into_iter().enumerate().map(make).collect();
            Facts { timelines, has_tier2, ..facts(backups) }
        },
    )
}

fn any_policy() -> impl Strategy<Value = Policy> {
    (0..4u32, 0..4u32, 0..4u32, 0..4u32, 0..3u32, 0..3u32, 0..60u32).prop_map(
        |(last, hourly, daily, weekly, monthly, yearly, recovery_window_days)| Policy {
            last,
            hourly,
            daily,
            weekly,
            monthly,
            yearly,
            recovery_window_days,
        },
    )
}

fn any_policies() -> impl Strategy<Value = Policies> {
    (any_policy(), any_policy(), 0..20u64).prop_map(|(tier1, tier2, days)| Policies {
        tier1,
        tier2,
        minimum_age_seconds: days * 86_400,
    })
}

fn more(a: &Policy, b: &Policy) -> Policy {
    Policy {
        last: a.last + b.last,
        hourly: a.hourly + b.hourly,
        daily: a.daily + b.daily,
        weekly: a.weekly + b.weekly,
        monthly: a.monthly + b.monthly,
        yearly: a.yearly + b.yearly,
        recovery_window_days: a.recovery_window_days + b.recovery_window_days,
    }
}

/// Independent of the plan's code: the first byte of a timeline that a recovery from a backup reads, or `None` if
/// it never gets there.
fn first_needed(backup: &BackupRecord, line: &KnownTimeline) -> Option<Lsn> {
    let start = backup.start_lsn;
    if line.timeline == backup.start_timeline {
        return Some(start);
    }
    let left =
        line.history.as_ref()?.entries().iter().find(|e| e.timeline == backup.start_timeline)?;
    (start < left.end).then_some(start)
}

fn names(names: Vec<BackupName>) -> BTreeSet<BackupName> {
    names.into_iter().collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn no_wal_that_a_kept_backup_needs_may_go(facts in any_facts(), policies in any_policies()) {
        let plan = plan(&facts, &policies, NOW);
        for decided in plan.backups.iter().filter(|b| b.tier1.keep || b.tier2.keep) {
            let backup = facts.backups.iter().find(|b| b.record.name == decided.name).unwrap();
            for (line, wal) in facts.timelines.iter().zip(&plan.wal) {
                let Some(first) = first_needed(&backup.record, line) else { continue };
                prop_assert!(wal.tier2_below.is_none_or(|below| below <= first));
                if decided.tier1.keep {
                    prop_assert!(wal.tier1_below.is_none_or(|below| below <= first));
                }
            }
        }
        // WAL behind the newest backup, on its own timeline and on every newer one, stays in both tiers.
        let newest = facts.backups.iter().map(|b| &b.record).filter(|r| r.committed_unix > BEGIN);
        if let Some(newest) = newest.max_by(|a, b| a.committed_unix.total_cmp(&b.committed_unix)) {
            for wal in plan.wal.iter().filter(|w| w.timeline >= newest.start_timeline) {
                let gone = wal.tier1_below.max(wal.tier2_below);
                let leads = facts.timelines.iter().any(|l| l.timeline == wal.timeline
                    && first_needed(newest, l).is_some());
                prop_assert!(!leads || gone.is_none_or(|below| below <= newest.start_lsn));
            }
        } else {
            prop_assert!(expired(&plan).is_empty());
        }
        for wal in &plan.wal {
            prop_assert!(wal.tier2_below <= wal.tier1_below);
        }
    }

    #[test]
    fn a_good_backup_stays_if_there_is_one(facts in any_facts(), policies in any_policies()) {
        let plan = plan(&facts, &policies, NOW);
        let gone = names(plan.expired());
        let good = |b: &&KnownBackup| !b.damaged;
        if facts.backups.iter().any(|b| good(&b)) {
            prop_assert!(facts.backups.iter().filter(good).any(|b| !gone.contains(&b.record.name)));
        } else {
            prop_assert!(gone.is_empty());
        }
        for backup in &facts.backups {
            let decided = plan.backups.iter().find(|b| b.name == backup.record.name).unwrap();
            prop_assert!(!backup.record.keep || decided.tier2.keep);
            prop_assert!(!facts.has_tier2 || backup.tier2 || decided.tier1.keep);
            prop_assert!(!decided.tier1.keep || decided.tier2.keep);
        }
    }

    #[test]
    fn asking_for_more_never_removes_more(facts in any_facts(), a in any_policies(), b in any_policies()) {
        let (tier1, tier2) = (more(&a.tier1, &b.tier1), more(&a.tier2, &b.tier2));
        let both = Policies { tier1, tier2, ..a.clone() };
        let (few, many) = (plan(&facts, &a, NOW), plan(&facts, &both, NOW));
        prop_assert!(names(many.expired()).is_subset(&names(few.expired())));
        for (few, many) in few.backups.iter().zip(&many.backups) {
            prop_assert!(!few.tier1.keep || many.tier1.keep);
            prop_assert!(!few.tier2.keep || many.tier2.keep);
        }
        for (few, many) in few.wal.iter().zip(&many.wal) {
            // A timeline that no backup led to may get its first backup by keeping more; only then is there a
            // horizon where there was none.
            prop_assert!(few.tier1_below.is_none() || many.tier1_below <= few.tier1_below);
            prop_assert!(few.tier2_below.is_none() || many.tier2_below <= few.tier2_below);
        }
    }

    #[test]
    fn doing_what_a_plan_says_leaves_nothing_to_do(facts in any_facts(), policies in any_policies()) {
        let first = plan(&facts, &policies, NOW);
        let gone = names(first.expired());
        let mut after = facts.clone();
        after.backups.retain(|b| !gone.contains(&b.record.name));
        let evicted = names(first.evicted());
        for backup in &mut after.backups {
            backup.tier1 &= !evicted.contains(&backup.record.name);
        }
        let second = plan(&after, &policies, NOW);
        prop_assert!(second.expired().is_empty());
        // At most fewer: if a backup of a newer timeline is gone, an older one may no longer be over.
        prop_assert!(names(second.evicted()).is_subset(&evicted));
    }

    #[test]
    fn what_may_go_now_may_go_later(facts in any_facts(), policies in any_policies(), later in 0.0..1e9f64, early in 0.0..2e7f64) {
        let now = BEGIN + early;
        let (first, second) = (plan(&facts, &policies, now), plan(&facts, &policies, now + later));
        prop_assert!(names(first.expired()).is_subset(&names(second.expired())));
        for (first, second) in first.wal.iter().zip(&second.wal) {
            // A timeline to which only young backups lead is left alone until they are old enough.
            prop_assert!(second.tier2_below.is_none() || first.tier2_below <= second.tier2_below);
        }
    }

    /// P13: whatever a client with a valid certificate commits now, nothing is removed that would not have been
    /// removed without it.
    #[test]
    fn young_backups_displace_nothing(
        facts in any_facts(),
        policies in any_policies(),
        more in prop::collection::vec((0.0..1.0f64, 1..4u32, 1..45u64, any::<[bool; 3]>()), 1..6),
        early in 0.0..2e7f64,
    ) {
        let now = BEGIN + early;
        let before = plan(&facts, &policies, now);
        let mut attacked = facts.clone();
        for (index, (age, line, segment, [tier1, tier2, damaged])) in more.into_iter().enumerate() {
            let at = now - age * policies.minimum_age_seconds as f64 * 0.999 + 1e-3;
            let record = record(&format!("x{index}"), at.min(now), line, segment * SEGMENT + 40);
            if rules::is_aged(&record, &policies, now) {
                continue;
            }
            let tier2 = tier2 && facts.has_tier2;
            let tier1 = tier1 || !tier2;
            attacked.backups.push(KnownBackup { record, tier1, tier2, together: true, damaged });
        }
        let after = plan(&attacked, &policies, now);
        for decided in before.backups.iter().filter(|b| b.tier1.keep || b.tier2.keep) {
            let now = after.backups.iter().find(|b| b.name == decided.name).unwrap();
            prop_assert!(now.tier1.keep || now.tier2.keep, "{decided:?} {now:?}");
            prop_assert!(!decided.tier2.keep || now.tier2.keep, "{decided:?} {now:?}");
        }
        for (before, after) in before.wal.iter().zip(&after.wal) {
            prop_assert!(after.tier2_below <= before.tier2_below, "{before:?} {after:?}");
        }
    }
}
