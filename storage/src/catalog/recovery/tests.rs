//! Recovery plans: the right backup for each target, refusals with their holes, and properties over random holdings.

use super::*;
use crate::{
    catalog::{KnownGap, TimelineHoldings},
    testing::backup_record,
};
use proptest::prelude::*;

const MIB: u64 = 1 << 20;

fn size() -> SegmentSize {
    SegmentSize::new(1 << 20).unwrap()
}

fn tli(n: u32) -> TimelineId {
    TimelineId::new(n).unwrap()
}

/// Positions in segments: 5.5 is in the middle of segment 5.
fn lsn(segments: f64) -> Lsn {
    Lsn::new((segments * MIB as f64) as u64)
}

fn runs(of: &[(f64, f64)]) -> Vec<Run> {
    of.iter().map(|(start, end)| Run { start: lsn(*start), end: lsn(*end) }).collect()
}

fn held(timeline: u32, history: Option<&str>, of: &[(f64, f64)]) -> TimelineHoldings {
    TimelineHoldings {
        timeline: tli(timeline),
        history: history.map(str::to_owned),
        runs: runs(of),
        caught_up: false,
    }
}

fn history(of: &[(u32, f64)]) -> String {
    of.iter().map(|(t, at)| format!("{t}\t{}\tno recovery target specified\n", lsn(*at))).collect()
}

fn holdings(timelines: Vec<TimelineHoldings>) -> Holdings {
    Holdings { segment_size: MIB as u32, timelines, as_of_unix: 1e6, ..Holdings::default() }
}

/// A backup whose time is 1000 s for each segment.
fn backup(name: &str, timeline: u32, start: f64, stop: f64) -> BackupRecord {
    BackupRecord {
        started_postgres_unix: start * 1000.0,
        stopped_postgres_unix: stop * 1000.0,
        ..backup_record(name.parse().unwrap(), tli(timeline), lsn(start), lsn(stop))
    }
}

fn time(segments: f64) -> Target {
    Target::Time { unix_micros: (segments * 1e9) as i64 }
}

fn chosen(survey: &Survey, target: &Target) -> Result<(String, u32), String> {
    survey
        .plan(target, TimelineChoice::Latest, None)
        .map(|plan| (plan.backup.name.to_string(), plan.path.timeline().get()))
        .map_err(|refusal| refusal.to_string())
}

#[test]
fn the_newest_backup_that_ended_before_the_target_is_chosen() {
    let held = holdings(vec![held(1, None, &[(1.0, 20.0)])]);
    let all = vec![backup("b", 1, 10.0, 11.0), backup("a", 1, 2.0, 3.0)];
    let survey = Survey::new(&held, all);
    let expect = |name: &str| Ok((name.to_owned(), 1));
    assert_eq!(chosen(&survey, &Target::Latest), expect("b"));
    assert_eq!(chosen(&survey, &Target::Immediate), expect("b"));
    assert_eq!(chosen(&survey, &time(11.0)), expect("b"));
    assert_eq!(chosen(&survey, &time(10.999)), expect("a"));
    assert_eq!(chosen(&survey, &Target::Lsn(lsn(10.5))), expect("a"));
    assert_eq!(chosen(&survey, &Target::Lsn(lsn(20.0))), expect("b"));
    let early = chosen(&survey, &time(2.5)).unwrap_err();
    assert!(early.contains("before the end of backup a"), "{early}");
    assert!(early.contains("from 1970-01-01T00:50:00Z (0/300000) to 0/1400000"), "{early}");
    let late = chosen(&survey, &Target::Lsn(lsn(20.5))).unwrap_err();
    assert!(late.contains("0/1480000 is behind the end of the WAL"), "{late}");
}

/// P7, REACH2.
#[test]
fn ways_part_where_the_first_of_them_left_the_other() {
    let timelines = [
        held(1, None, &[(1.0, 20.0)]),
        held(2, Some(&history(&[(1, 8.5)])), &[(8.0, 12.0)]),
        held(3, Some(&history(&[(1, 8.5), (2, 10.5)])), &[(10.0, 15.0)]),
        held(4, Some(&history(&[(1, 6.5)])), &[(6.0, 15.0)]),
    ];
    let survey = Survey::new(&holdings(timelines.to_vec()), Vec::new());
    let path = |timeline| survey.path(tli(timeline)).unwrap();
    for (one, other, at) in [(1, 2, 8.5), (1, 3, 8.5), (2, 3, 10.5), (3, 4, 6.5), (1, 4, 6.5)] {
        assert_eq!(path(one).parts_from(path(other)), Some(lsn(at)), "{one} {other}");
        assert_eq!(path(other).parts_from(path(one)), Some(lsn(at)), "{other} {one}");
    }
    assert_eq!(path(3).parts_from(path(3)), None);
    assert_eq!(survey.timelines().map(TimelineId::get).collect::<Vec<_>>(), [1, 2, 3, 4]);
}

#[test]
fn latest_is_refused_in_front_of_a_hole_and_the_refusal_names_it() {
    let mut held = holdings(vec![held(1, None, &[(1.0, 5.0), (7.0, 9.0)])]);
    held.gaps.push(KnownGap {
        timeline: tli(1),
        from: lsn(5.0),
        to: lsn(7.0),
        reason: "PostgreSQL had removed it".into(),
    });
    let survey = Survey::new(&held, vec![backup("a", 1, 2.0, 3.0)]);
    for target in [Target::Latest, Target::Lsn(lsn(8.0))] {
        let refusal = survey.plan(&target, TimelineChoice::Latest, None).unwrap_err();
        let hole = refusal.hole.clone().unwrap();
        assert_eq!((hole.from, hole.to), (lsn(5.0), lsn(7.0)));
        assert_eq!(hole.reason, "PostgreSQL had removed it");
        assert!(refusal.to_string().contains("to 0/500000, with backup a"), "{refusal}");
    }
    let plan = survey.plan(&Target::Lsn(lsn(4.5)), TimelineChoice::Latest, None).unwrap();
    assert_eq!(plan.reach.end, lsn(5.0));
    assert!(plan.notes[0].contains("nothing after 0/500000"), "{:?}", plan.notes);
    let line = &survey.lines()[0];
    assert_eq!((line.windows.len(), line.holes.len()), (1, 1));
    assert_eq!(line.unserved, runs(&[(7.0, 9.0)]));
    // A backup behind the hole makes the end reachable again.
    let survey = Survey::new(&held, vec![backup("a", 1, 2.0, 3.0), backup("b", 1, 7.0, 7.5)]);
    assert_eq!(chosen(&survey, &Target::Latest), Ok(("b".into(), 1)));
    assert!(survey.lines()[0].unserved.is_empty());
}

/// Recorded gaps explain their part of a hole; the rest is still reported as lost.
#[test]
fn a_hole_that_is_on_record_in_part_has_both_reasons() {
    let mut held = holdings(vec![held(1, None, &[(1.0, 5.0), (9.0, 12.0)])]);
    let gap = |from, to| KnownGap {
        timeline: tli(1),
        from: lsn(from),
        to: lsn(to),
        reason: "expired by retention".into(),
    };
    let path = |held: &Holdings| Path::new(held, tli(1), size()).unwrap();
    let reason = |held: &Holdings| path(held).holes(lsn(1.0))[0].reason.clone();
    assert_eq!(reason(&held), "never received, or lost");
    assert_eq!(path(&held).lost(lsn(1.0)).len(), 1);
    held.gaps = vec![gap(0.0, 7.0)];
    assert_eq!(reason(&held), "expired by retention; in part: never received, or lost");
    assert_eq!(path(&held).lost(lsn(1.0)).len(), 1);
    held.gaps = vec![gap(7.0, 9.0), gap(0.0, 7.0)];
    assert_eq!(reason(&held), "expired by retention");
    assert_eq!(path(&held).lost(lsn(1.0)), []);
    // Another timeline's record has no effect.
    held.gaps[1].timeline = tli(2);
    assert_eq!(path(&held).lost(lsn(1.0)).len(), 1);
}

/// WAL that was acknowledged and rotted is a hole with that reason, in the middle and at the end.
#[test]
fn what_is_damaged_on_tier_1_is_a_hole_that_says_so() {
    let rotten = |from, to| KnownGap {
        timeline: tli(1),
        from: lsn(from),
        to: lsn(to),
        reason: "damaged on tier 1".into(),
    };
    let mut held = holdings(vec![held(1, None, &[(1.0, 5.0), (6.0, 12.0)])]);
    let path = |held: &Holdings| Path::new(held, tli(1), size()).unwrap();
    held.damaged = vec![rotten(5.0, 6.0)];
    let holes = path(&held).lost(lsn(1.0));
    assert_eq!((holes.len(), holes[0].reason.as_str()), (1, "damaged on tier 1"));
    assert_eq!(path(&held).reach(lsn(7.0)).end, lsn(12.0));
    held.damaged = vec![rotten(12.0, 13.0)];
    let Stop::Hole(hole) = path(&held).reach(lsn(7.0)).stop else { panic!("not the end") };
    assert_eq!((hole.from, hole.to), (lsn(12.0), lsn(13.0)));
    held.damaged = vec![rotten(11.0, 12.0)];
    assert!(matches!(path(&held).reach(lsn(7.0)).stop, Stop::End { .. }), "held elsewhere");
}

/// REACH2: a recorded gap counts even if no WAL behind it has arrived.
#[test]
fn a_gap_at_the_end_is_a_hole_and_not_the_end() {
    let mut held = holdings(vec![held(1, None, &[(1.0, 5.25)])]);
    let gap = (tli(1), lsn(5.25), lsn(7.0));
    held.gaps.push(KnownGap { timeline: gap.0, from: gap.1, to: gap.2, reason: "x".into() });
    let survey = Survey::new(&held, vec![backup("a", 1, 2.0, 3.0)]);
    assert!(survey.plan(&Target::Latest, TimelineChoice::Latest, None).is_err());
}

/// REACH2: the hole is inside a partial segment. Timeline 2 branched off at 5.5, but timeline 1 exists only up to 5.25.
#[test]
fn a_partial_segment_that_ends_before_the_switch_is_a_hole() {
    let two = history(&[(1, 5.5)]);
    let all = vec![backup("a", 1, 2.0, 3.0)];
    let with = |one: f64, two_runs: &[(f64, f64)]| {
        Survey::new(
            &holdings(vec![held(1, None, &[(1.0, one)]), held(2, Some(&two), two_runs)]),
            all.clone(),
        )
    };
    assert!(chosen(&with(5.25, &[(6.0, 8.0)]), &Target::Latest).is_err());
    assert!(chosen(&with(5.25, &[]), &Target::Latest).is_err());
    assert!(chosen(&with(5.25, &[(5.5, 8.0)]), &Target::Latest).is_err());
    // The child's first segment repeats the parent's bytes.
    let whole = with(5.25, &[(5.0, 8.0)]);
    assert_eq!(chosen(&whole, &Target::Latest), Ok(("a".into(), 2)));
    let plan = whole.plan(&Target::Latest, TimelineChoice::Latest, None).unwrap();
    assert_eq!((plan.reach.end, plan.reach.timeline), (lsn(8.0), tli(2)));
    let names: Vec<String> = plan.path.names(lsn(5.3)).iter().map(ToString::to_string).collect();
    assert_eq!(names, ["000000020000000000000005", "000000010000000000000005"]);
    assert_eq!(plan.path.names(lsn(4.0)).len(), 1);
    assert_eq!(plan.path.names(lsn(6.0)).len(), 1);
    // But only the first segment.
    assert!(chosen(&with(4.5, &[(5.0, 8.0)]), &Target::Latest).is_err());
    // Timeline 1 alone can still be reached up to its end.
    let plan = with(5.25, &[]).plan(&Target::Latest, TimelineChoice::Current, None);
    assert_eq!(plan.unwrap().reach.end, lsn(5.25));
}

/// Found by `windows_and_holes_are_true`: the part of the copy before the switch was ignored, so the hole was too long.
#[test]
fn a_hole_ends_where_the_child_s_copy_of_the_parent_s_segment_begins() {
    let two = history(&[(1, 2.25)]);
    let one = held(1, None, &[(1.0, 1.9375), (2.0625, 3.5)]);
    let held = holdings(vec![one, held(2, Some(&two), &[(2.0, 2.03125), (2.125, 2.5)])]);
    let survey = Survey::new(&held, Vec::new());
    let holes = &survey.lines()[1].holes;
    let ends: Vec<(Lsn, Lsn)> = holes.iter().map(|hole| (hole.from, hole.to)).collect();
    assert_eq!(ends, [(lsn(1.9375), lsn(2.0)), (lsn(2.03125), lsn(2.0625))]);
}

#[test]
fn a_backup_that_the_timeline_has_left_behind_is_passed_over() {
    let two = history(&[(1, 5.5)]);
    let held = holdings(vec![held(1, None, &[(1.0, 12.0)]), held(2, Some(&two), &[(5.0, 9.0)])]);
    let all = vec![backup("old", 1, 2.0, 3.0), backup("dead", 1, 7.0, 8.0)];
    let survey = Survey::new(&held, all);
    assert_eq!(chosen(&survey, &Target::Latest), Ok(("old".into(), 2)));
    let plan = survey.plan(&time(9.0), TimelineChoice::Latest, None).unwrap();
    assert_eq!(plan.backup.name.as_str(), "old");
    assert!(plan.notes.iter().any(|n| n.contains("timeline 1 after it was left")), "{plan:?}");
    let one = TimelineChoice::Number(tli(1));
    let plan = survey.plan(&Target::Latest, one, None).unwrap();
    assert_eq!((plan.backup.name.as_str(), plan.reach.end), ("dead", lsn(12.0)));
    // A chosen backup follows the timeline that it leads to.
    let dead: BackupName = "dead".parse().unwrap();
    let plan = survey.plan(&Target::Latest, TimelineChoice::Latest, Some(&dead)).unwrap();
    assert_eq!(plan.path.timeline(), tli(1));
    let two = TimelineChoice::Number(tli(2));
    let refusal = survey.plan(&Target::Latest, two, Some(&dead)).unwrap_err();
    assert!(refusal.problem.contains("is not on the path to"), "{refusal}");
}

#[test]
fn a_backup_whose_own_wal_has_a_hole_is_never_chosen() {
    let held = holdings(vec![held(1, None, &[(1.0, 6.0), (7.0, 9.0)])]);
    let all = vec![backup("good", 1, 2.0, 3.0), backup("bad", 1, 5.0, 7.5)];
    let survey = Survey::new(&held, all);
    assert_eq!(chosen(&survey, &Target::Immediate), Ok(("good".into(), 1)));
    let bad: BackupName = "bad".parse().unwrap();
    let refusal = survey.plan(&Target::Immediate, TimelineChoice::Latest, Some(&bad)).unwrap_err();
    assert_eq!(refusal.hole.unwrap().from, lsn(6.0));
    assert_eq!(survey.broken(&survey.backups()[1]).unwrap().to, lsn(7.0));
}

#[test]
fn nothing_at_all_is_refused_in_words() {
    let survey = Survey::new(&Holdings::default(), Vec::new());
    assert_eq!(
        chosen(&survey, &Target::Latest).unwrap_err(),
        "there is no base backup; nothing can be recovered"
    );
    let survey = Survey::new(&Holdings::default(), vec![backup("a", 1, 2.0, 3.0)]);
    let refusal = chosen(&survey, &Target::Latest).unwrap_err();
    assert!(refusal.contains("there is no WAL of timeline 1"), "{refusal}");
}

#[test]
fn an_idle_database_is_recoverable_until_it_was_seen_idle() {
    let mut line = held(1, None, &[(1.0, 5.0)]);
    line.caught_up = true;
    let survey = Survey::new(&holdings(vec![line]), vec![backup("a", 1, 2.0, 3.0)]);
    let plan = survey.plan(&time(900.0), TimelineChoice::Latest, None).unwrap();
    assert_eq!(plan.reach.stop, Stop::End { idle_until_unix: Some(1e6) });
}

/// A random tree of timelines with random holes.
fn site() -> impl Strategy<Value = (Holdings, Vec<BackupRecord>)> {
    let lost = prop::collection::vec(any::<prop::sample::Index>(), 0..4);
    let lines =
        prop::collection::vec((any::<prop::sample::Index>(), 1u32..80, lost, any::<bool>()), 1..5);
    let backups = prop::collection::vec((any::<prop::sample::Index>(), 0u32..80, 1u32..10), 0..6);
    (lines, backups).prop_map(|(lines, backups)| {
        let mut known: Vec<(Vec<(u32, f64)>, f64)> = Vec::new();
        let mut timelines = Vec::new();
        for (n, (parent, length, lost, copy)) in lines.into_iter().enumerate() {
            let (mut way, from) = (Vec::new(), 1.0);
            let mut begin = from;
            if n > 0 {
                let parent = parent.index(n);
                let (before, end) = known[parent].clone();
                let start = before.last().map_or(1.0, |(_, at)| *at);
                begin = start + (end - start) * 0.5;
                way = before;
                way.push((parent as u32 + 1, begin));
            }
            let end = begin + f64::from(length) / 8.0;
            let start = if copy { begin.floor() } else { begin };
            let mut pieces = vec![(start.max(1.0), end)];
            for at in lost {
                let (a, b) = pieces.pop().unwrap();
                let cut = a + (b - a) * (at.index(8) as f64 / 8.0);
                if cut > a && cut + 0.125 < b {
                    pieces.extend([(a, cut), (cut + 0.125, b)]);
                } else {
                    pieces.push((a, b));
                }
            }
            let text = (n > 0).then(|| history(&way));
            timelines.push(held(n as u32 + 1, text.as_deref(), &pieces));
            known.push((way, end));
        }
        let all = backups.into_iter().enumerate().map(|(n, (line, at, length))| {
            let line = line.index(known.len());
            let start = known[line].0.last().map_or(1.0, |(_, at)| *at) + f64::from(at) / 8.0;
            backup(&format!("b{n}"), line as u32 + 1, start, start + f64::from(length) / 8.0)
        });
        let all = all.collect();
        (holdings(timelines), all)
    })
}

/// Whether the byte at `at` can be replayed on the path to `timeline`, by definition, byte by byte.
fn is_held(holdings: &Holdings, timeline: TimelineId, at: Lsn) -> bool {
    let history = holdings.history(timeline).unwrap();
    let mut begin = Lsn::ZERO;
    let ends = history.entries().iter().map(|e| (e.timeline, e.end));
    for (line, end) in ends.chain([(timeline, Lsn::new(u64::MAX))]) {
        let counts = at >= begin.segment_start(size()) && at < end;
        let runs = holdings.timeline(line).map_or(&[][..], |l| &l.runs);
        if counts && runs.iter().any(|run| run.start <= at && at < run.end) {
            return true;
        }
        begin = end;
    }
    false
}

fn steps(from: Lsn, to: Lsn) -> impl Iterator<Item = Lsn> {
    (from.as_u64()..to.as_u64()).step_by((MIB / 16) as usize).map(Lsn::new)
}

proptest! {
    /// REACH1 and REACH2, for every target and choice.
    #[test]
    fn every_plan_is_whole((held, all) in site(), at in 0u32..200, which in 0u8..4, choice in 0u32..6) {
        let survey = Survey::new(&held, all.clone());
        let target = match which {
            0 => Target::Latest,
            1 => Target::Immediate,
            2 => Target::Lsn(lsn(f64::from(at) / 8.0)),
            _ => time(f64::from(at) / 8.0),
        };
        let choice = match choice {
            0 => TimelineChoice::Latest,
            1 => TimelineChoice::Current,
            n => TimelineChoice::Number(tli(n - 1)),
        };
        let result = survey.plans(&target, choice, None);
        for plan in result.iter().flatten() {
            let (record, timeline) = (&plan.backup, plan.path.timeline());
            prop_assert!(plan.reach.end >= record.stop_lsn);
            for byte in steps(record.start_lsn, plan.reach.end) {
                prop_assert!(is_held(&held, timeline, byte), "{byte} of {timeline:?}");
            }
            prop_assert!(!is_held(&held, timeline, plan.reach.end));
            let history = held.history(timeline).unwrap();
            let left = history.end_of(record.stop_timeline);
            prop_assert!(timeline == record.stop_timeline || left >= Some(record.stop_lsn));
            match &target {
                Target::Latest => prop_assert!(
                    steps(plan.reach.end, lsn(60.0)).all(|b| !is_held(&held, timeline, b))
                ),
                Target::Lsn(lsn) => prop_assert!(record.stop_lsn <= *lsn && *lsn <= plan.reach.end),
                Target::Time { unix_micros } => {
                    prop_assert!(record.stopped_postgres_unix * 1e6 <= *unix_micros as f64);
                }
                _ => {}
            }
        }
        // Newest first, and no suitable backup is missing.
        if let Ok(plans) = &result {
            let newer = |p: &[_]| { let (a, b): (&Plan, &Plan) = (&p[0], &p[1]); a.backup.stopped_postgres_unix >= b.backup.stopped_postgres_unix };
            prop_assert!(plans.windows(2).all(newer));
            if let (TimelineChoice::Number(n), Target::Lsn(at)) = (choice, &target) {
                let fit = |b: &&BackupRecord| {
                    let history = held.history(n).unwrap();
                    let on_way = b.stop_timeline == n || history.end_of(b.stop_timeline) >= Some(b.stop_lsn);
                    on_way && b.stop_lsn <= *at
                        && steps(b.start_lsn, *at).all(|byte| is_held(&held, n, byte))
                };
                prop_assert!(all.iter().filter(fit).count() <= plans.len());
            }
        } else if let Err(refusal) = result {
            prop_assert!(!refusal.to_string().is_empty());
        }
    }

    /// Everything that a listing calls recoverable is, to its last byte, and holes are where there is no WAL.
    #[test]
    fn windows_and_holes_are_true((held, all) in site()) {
        let survey = Survey::new(&held, all);
        for line in survey.lines() {
            for window in &line.windows {
                let first = survey.backups().iter().find(|b| b.name == window.backups[0]).unwrap();
                for byte in steps(first.start_lsn, window.reach.end) {
                    prop_assert!(is_held(&held, line.timeline, byte));
                }
            }
            for hole in &line.holes {
                prop_assert!(hole.from < hole.to);
                prop_assert!(steps(hole.from, hole.to).all(|b| !is_held(&held, line.timeline, b)));
            }
        }
    }
}
