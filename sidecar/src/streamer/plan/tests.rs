//! Tests the plan with a model of the server that stores whatever is planned.

use super::*;
use proptest::prelude::*;

const MIB: u64 = 1 << 20;

fn tli(n: u32) -> TimelineId {
    TimelineId::new(n).unwrap()
}

fn lsn(n: u64) -> Lsn {
    Lsn::new(n)
}

#[test]
fn only_whole_segments_of_postgresqls_own_past_are_given_again() {
    let (history, mib) = (TimelineHistory::parse(tli(2), b"1\t0/3800000\tx\n").unwrap(), 1 << 24);
    let facts = Facts {
        held: vec![],
        history,
        postgres_end: lsn(9 * mib),
        slot_restart: None,
        segment_size: SegmentSize::new(1 << 24).unwrap(),
        beside: true,
    };
    let damaged = |timeline, starts: &[u64]| {
        let damaged = starts.iter().map(|n| (lsn(n * mib), lsn((n + 1) * mib))).collect();
        Held { damaged, ..held(timeline, 7 * mib) }
    };
    // Timeline 1 was left within a segment; timeline 3 is another branch; timeline 7 is not held.
    let all = [damaged(1, &[1, 2, 3]), damaged(2, &[3, 5, 7]), damaged(3, &[4])];
    let wanted: Vec<_> =
        facts.wanted(&all).iter().map(|w| (w.timeline.get(), w.start.as_u64() / mib)).collect();
    assert_eq!(wanted, [(2, 5), (2, 3), (1, 2), (1, 1)]);
}

fn held(timeline: u32, flushed: u64) -> Held {
    let (timeline, flushed) = (tli(timeline), lsn(flushed));
    Held { timeline, flushed, has_history: false, missing: vec![], damaged: vec![] }
}

/// A history such as `[(1, 5 MiB), (3, 7 MiB)]` leading to `own`.
fn history(own: u32, ends: &[(u32, u64)]) -> TimelineHistory {
    let text: String = ends.iter().map(|(t, end)| format!("{t}\t{}\tx\n", lsn(*end))).collect();
    TimelineHistory::parse(tli(own), text.as_bytes()).unwrap()
}

fn facts(history: TimelineHistory, held: Vec<Held>, end: u64, slot: Option<u64>) -> Facts {
    Facts {
        held,
        history,
        postgres_end: lsn(end),
        slot_restart: slot.map(lsn),
        segment_size: SegmentSize::new(MIB as u32).unwrap(),
        beside: false,
    }
}

/// The current server decides about timelines off our path; for a server of an earlier version the plan refuses the
/// older one.
#[test]
fn a_timeline_off_our_path_does_not_matter_to_a_server_that_takes_each_for_itself() {
    let lines = vec![held(1, 6 * MIB + 7), held(2, 8 * MIB)];
    let ask = |history, held: &[Held], beside| {
        Facts { beside, ..facts(history, held.to_vec(), 9 * MIB, Some(3 * MIB)) }.plan()
    };
    // The old primary beside a promoted copy.
    let stale = Refusal::Stale { held: tli(2), postgres: tli(1) };
    assert_eq!(ask(history(1, &[]), &lines, false), Err(stale));
    let plan = ask(history(1, &[]), &lines, true).unwrap();
    assert_eq!((plan.timeline, plan.start), (tli(1), lsn(6 * MIB + 7)));
    // Production's next timeline beside it: its ancestor is finished first, without a gap.
    let path = history(3, &[(1, 7 * MIB)]);
    let plan = ask(path.clone(), &lines, true).unwrap();
    assert_eq!((plan.timeline, plan.start, plan.gap), (tli(1), lsn(6 * MIB + 7), None));
    assert!(ask(path, &lines, false).unwrap().gap.is_some());
    // A timeline of which nothing is held begins as at first contact.
    let plan = ask(history(1, &[]), &[held(2, 8 * MIB)], true).unwrap();
    assert_eq!((plan.timeline, plan.start), (tli(1), lsn(3 * MIB)));
}

#[test]
fn first_contact_begins_at_the_segment_of_the_slot() {
    let plan = facts(history(1, &[]), vec![], 9 * MIB, Some(3 * MIB + 77)).plan().unwrap();
    assert_eq!(plan, Plan { timeline: tli(1), start: lsn(3 * MIB), durable: None, gap: None });
}

/// P2: another streamer reopened the partial segment and cut it.
#[test]
fn resume_is_at_the_exact_byte_inside_the_segment() {
    let at = 4 * MIB + 4711;
    let plan = facts(history(1, &[]), vec![held(1, at)], 9 * MIB, Some(3 * MIB)).plan().unwrap();
    assert_eq!((plan.start, plan.durable), (lsn(at), Some(lsn(at))));
}

#[test]
fn an_ancestor_is_finished_before_its_descendant_begins() {
    let path = history(2, &[(1, 5 * MIB + 100)]);
    let plan = facts(path, vec![held(1, 4 * MIB)], 9 * MIB, None).plan().unwrap();
    assert_eq!((plan.timeline, plan.start), (tli(1), lsn(4 * MIB)));
}

#[test]
fn a_new_timeline_begins_at_the_segment_of_the_switch_point() {
    let path = history(2, &[(1, 5 * MIB + 100)]);
    for flushed in [5 * MIB + 100, 6 * MIB] {
        let plan = facts(path.clone(), vec![held(1, flushed)], 9 * MIB, None).plan().unwrap();
        let expected = Plan { timeline: tli(2), start: lsn(5 * MIB), durable: None, gap: None };
        assert_eq!(plan, expected, "flushed {flushed}");
    }
}

/// WAL-G's wal-receive assumed that the next timeline has the next number.
#[test]
fn the_next_timeline_comes_from_history_not_plus_one() {
    let path = history(7, &[(1, 5 * MIB), (4, 7 * MIB)]);
    let plan = facts(path, vec![held(1, 5 * MIB)], 9 * MIB, None).plan().unwrap();
    assert_eq!(plan.timeline, tli(4));
}

#[test]
fn an_old_primary_is_refused() {
    let refused =
        facts(history(1, &[]), vec![held(1, MIB), held(2, 2 * MIB)], 9 * MIB, None).plan();
    assert_eq!(refused, Err(Refusal::Stale { held: tli(2), postgres: tli(1) }));
}

#[test]
fn a_primary_that_lost_wal_is_refused() {
    let refused = facts(history(1, &[]), vec![held(1, 5 * MIB)], 4 * MIB, None).plan();
    assert!(matches!(refused, Err(Refusal::Behind { .. })), "{refused:?}");
}

/// Two promotions from the same parent: timeline 3 was received first, then 4 wins.
#[test]
fn a_fork_beside_a_received_timeline_declares_what_is_missing() {
    let path = history(4, &[(1, 8 * MIB + 5)]);
    let plan = facts(path, vec![held(1, 5 * MIB), held(3, 6 * MIB)], 9 * MIB, None).plan().unwrap();
    let gap = Some(Gap { from: lsn(5 * MIB), to: lsn(8 * MIB) });
    assert_eq!(plan, Plan { timeline: tli(4), start: lsn(8 * MIB), durable: None, gap });
}

#[test]
fn removed_wal_becomes_a_declared_gap_up_to_what_the_slot_keeps() {
    let facts = facts(history(1, &[]), vec![held(1, 2 * MIB + 9)], 9 * MIB, Some(6 * MIB + 3));
    let plan = facts.plan().unwrap();
    let sure = facts.sure(&plan).unwrap();
    let plan = facts.after_removal(plan, sure);
    assert_eq!(plan.gap, Some(Gap { from: lsn(2 * MIB + 9), to: lsn(6 * MIB) }));
    assert_eq!((plan.start, plan.durable), (lsn(6 * MIB), Some(lsn(2 * MIB + 9))));
}

#[test]
fn removed_wal_at_first_contact_is_no_gap() {
    let facts = facts(history(1, &[]), vec![], 9 * MIB, None);
    let first = Plan { timeline: tli(1), start: lsn(2 * MIB), durable: None, gap: None };
    let plan = facts.after_removal(first, facts.sure(&first).unwrap());
    assert_eq!((plan.start, plan.gap), (lsn(9 * MIB), None));
}

#[test]
fn what_the_server_misses_is_streamed_first_if_postgresql_has_it() {
    let mut line = held(1, 8 * MIB);
    line.missing = vec![lsn(3 * MIB + 77), lsn(6 * MIB)];
    let facts = facts(history(1, &[]), vec![line], 9 * MIB, None);
    let starts: Vec<_> = facts.earlier(&facts.plan().unwrap());
    let at = |n: u64| Plan { timeline: tli(1), start: lsn(n), durable: Some(lsn(n)), gap: None };
    assert_eq!(starts, [at(3 * MIB), at(6 * MIB)]);
}

#[test]
fn the_oldest_segment_is_found_by_halves() {
    let facts = facts(history(1, &[]), vec![], 9 * MIB, None);
    assert_eq!(facts.between(lsn(2 * MIB + 9), lsn(9 * MIB)), Some(lsn(5 * MIB)));
    assert_eq!(facts.between(lsn(2 * MIB + 9), lsn(4 * MIB)), Some(lsn(3 * MIB)));
    assert_eq!(facts.between(lsn(2 * MIB + 9), lsn(3 * MIB)), None);
}

#[test]
fn removal_with_nothing_newer_waits() {
    let facts = facts(history(1, &[]), vec![held(1, 5 * MIB + 9)], 5 * MIB + 100, None);
    let refused = facts.sure(&facts.plan().unwrap());
    assert!(matches!(refused, Err(Refusal::NothingLeft { .. })), "{refused:?}");
}

#[test]
fn only_missing_history_files_are_asked_for_and_never_the_root_s() {
    let path = history(7, &[(1, 5 * MIB), (4, 7 * MIB)]);
    let mut facts = facts(path, vec![held(1, 5 * MIB), held(4, 7 * MIB)], 9 * MIB, None);
    facts.held[1].has_history = true;
    assert_eq!(facts.histories_wanted(), vec![tli(7)]);
    facts.held[1].has_history = false;
    assert_eq!(facts.histories_wanted(), vec![tli(4), tli(7)]);
}

/// Ascending switch points and timelines, some numbers skipped.
fn paths() -> impl Strategy<Value = (TimelineHistory, u64)> {
    let step = (1u32..4, 1u64..5 * MIB);
    (prop::collection::vec(step, 0..5), 1u64..5 * MIB).prop_map(|(steps, tail)| {
        let (mut timeline, mut at, mut ends) = (1, MIB, Vec::new());
        for (jump, bytes) in steps {
            at += bytes;
            ends.push((timeline, at));
            timeline += jump;
        }
        (history(timeline, &ends), at + tail)
    })
}

proptest! {
    /// Follows the plans with a server that stores all that is sent, while WAL is removed in between.
    #[test]
    fn following_the_plans_reaches_the_end_without_an_undeclared_hole(
        (path, end) in paths(),
        slot in 0u64..30 * MIB,
        start_part in 0.0f64..1.0,
        has_some: bool,
        removed_below in 0u64..30 * MIB,
    ) {
        let slot = slot.clamp(MIB, end);
        let size = SegmentSize::new(MIB as u32).unwrap();
        let at = lsn(MIB + ((end - MIB) as f64 * start_part) as u64);
        let mut server = if has_some {
            vec![held(path.timeline_at(at).get(), at.as_u64())]
        } else {
            vec![]
        };
        let mut covered = has_some.then_some(at);
        let own = path.timeline();
        let mut rounds = 0;
        loop {
            let facts = facts(path.clone(), server.clone(), end, Some(slot));
            let mut plan = facts.plan().unwrap();
            if plan.timeline == own && plan.start == lsn(end) {
                break;
            }
            // PostgreSQL always has the WAL that the slot retains; older WAL may have been removed.
            if plan.start < lsn(removed_below.min(slot)).segment_start(size) {
                plan = facts.after_removal(plan, facts.sure(&plan).unwrap());
            }
            prop_assert!(plan.timeline <= own);
            prop_assert!(server.iter().all(|h| h.timeline <= plan.timeline), "P8");
            let before = server.iter().find(|h| h.timeline == plan.timeline).map(|h| h.flushed);
            prop_assert!(before.is_none_or(|b| plan.start >= b), "P2: never back");
            prop_assert!(Some(plan.start) == before || plan.start.offset_in(size) == 0);
            match (covered, plan.gap) {
                (Some(covered), None) => prop_assert!(plan.start <= covered, "undeclared hole"),
                (Some(covered), Some(gap)) => {
                    prop_assert!(gap.from <= covered && gap.to == plan.start && gap.from < gap.to);
                }
                (None, gap) => prop_assert_eq!(gap, None),
            }
            let reach = path.end_of(plan.timeline).unwrap_or(lsn(end)).max(plan.start);
            server.retain(|h| h.timeline != plan.timeline);
            let line = held(plan.timeline.get(), reach.as_u64());
            server.push(Held { has_history: true, ..line });
            covered = covered.max(Some(reach));
            rounds += 1;
            prop_assert!(rounds <= path.entries().len() + 2, "does not come to an end");
        }
    }
}
