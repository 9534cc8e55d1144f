//! The frontier in any order of uploads, over gaps, and across rebuilds.

use super::*;
use klio_pg::SegmentName;
use proptest::prelude::*;

fn size() -> SegmentSize {
    SegmentSize::new(16 << 20).unwrap()
}

fn segment(timeline: u32, number: u64) -> WalFile {
    let lsn = Lsn::new(number * size().bytes());
    WalFile::Segment(SegmentName::containing(TimelineId::new(timeline).unwrap(), lsn, size()))
}

fn archived(archive: &Archive, timeline: u32) -> u64 {
    let all = archive.frontiers(&[]);
    let one = all.iter().find(|f| f.timeline.get() == timeline).unwrap();
    one.archived.as_u64() / size().bytes()
}

/// A bug in similar tools: deletion on tier 1 was limited by the latest uploaded segment.
#[test]
fn the_bound_is_the_contiguous_frontier_not_the_latest_upload() {
    let mut archive = Archive::new(size());
    archive.hold((3..10).map(|n| segment(1, n)));
    for number in [3, 4, 9, 7] {
        archive.record(segment(1, number), 1, Some(100));
    }
    assert_eq!(archived(&archive, 1), 5);
    assert!(archive.has("000000010000000000000009".parse().unwrap()));
    assert!(!archive.has("000000010000000000000005".parse().unwrap()));
    archive.record(segment(1, 5), 1, Some(100));
    assert_eq!(archived(&archive, 1), 6);
    archive.record(segment(1, 6), 1, Some(100));
    assert_eq!(archived(&archive, 1), 8);
    archive.record(segment(1, 8), 1, Some(100));
    assert_eq!(archived(&archive, 1), 10);
}

/// Two seal workers may finish in reverse order.
#[test]
fn an_earlier_segment_that_shows_up_late_holds_the_frontier() {
    let mut archive = Archive::new(size());
    archive.hold([segment(1, 5)]);
    archive.record(segment(1, 5), 1, None);
    assert_eq!(archived(&archive, 1), 6);
    archive.hold([segment(1, 4)]);
    assert_eq!(archived(&archive, 1), 4);
    archive.record(segment(1, 4), 1, None);
    assert_eq!(archived(&archive, 1), 6);
}

#[test]
fn the_same_segment_counts_once() {
    let mut archive = Archive::new(size());
    for time in [Some(5), None, Some(3)] {
        archive.record(segment(1, 1), 10, time);
    }
    assert_eq!(archive.totals(), Totals { files: 1, bytes: 10 });
    assert_eq!(archive.latest_archived_unix(), Some(5));
}

#[test]
fn timelines_do_not_help_each_other() {
    let mut archive = Archive::new(size());
    archive.hold([segment(1, 3), segment(1, 4), segment(2, 4)]);
    archive.record(segment(2, 4), 1, Some(5));
    assert_eq!(archived(&archive, 1), 3);
    assert_eq!(archived(&archive, 2), 5);
}

#[test]
fn what_tier1_no_longer_holds_still_counts_from_the_bucket() {
    let archive = Archive::new(size())
        .rebuild((5..8).map(|n| segment(1, n)), (2..6).map(|n| (segment(1, n), 10, n)));
    assert_eq!(archived(&archive, 1), 6);
    assert_eq!(archive.frontiers(&[])[0].start, Lsn::new(2 * size().bytes()));
    assert_eq!(archive.totals(), Totals { files: 4, bytes: 40 });
    assert_eq!(archive.latest_archived_unix(), Some(5));
}

#[test]
fn a_rebuild_shows_an_object_that_vanished() {
    let mut archive = Archive::new(size());
    archive.hold((0..4).map(|n| segment(1, n)));
    (0..4).for_each(|n| archive.record(segment(1, n), 1, Some(n)));
    let rebuilt =
        archive.rebuild((0..4).map(|n| segment(1, n)), [0, 1, 3].map(|n| (segment(1, n), 1, n)));
    assert_eq!(archived(&rebuilt, 1), 2);
}

#[test]
fn partials_and_histories_count_but_move_nothing() {
    let mut archive = Archive::new(size());
    archive.record("000000010000000000000003.partial".parse().unwrap(), 7, Some(1));
    archive.record("00000002.history".parse().unwrap(), 3, None);
    assert!(archive.frontiers(&[]).is_empty());
    assert_eq!(archive.totals(), Totals { files: 2, bytes: 10 });
}

#[test]
fn an_accepted_size_survives_a_rebuild_while_the_object_keeps_it() {
    let mut archive = Archive::new(size());
    archive.accept_size(segment(1, 1), 50);
    assert!(archive.accepts(segment(1, 1), 60, 50));
    let same = archive.rebuild([segment(1, 1)], [(segment(1, 1), 50, 1)]);
    assert!(same.accepts(segment(1, 1), 60, 50));
    let changed = archive.rebuild([segment(1, 1)], [(segment(1, 1), 51, 1)]);
    assert!(!changed.accepts(segment(1, 1), 60, 50));
}

fn partial(timeline: u32, number: u64) -> WalFile {
    match segment(timeline, number) {
        WalFile::Segment(name) => WalFile::Partial(name),
        other => other,
    }
}

/// The positions are in sixteenths of a segment: `0x38` is the middle of segment 3.
fn gap(timeline: u32, from: u64, to: u64) -> Gap {
    let lsn = |sixteenths: u64| Lsn::new(sixteenths << 20);
    let timeline = TimelineId::new(timeline).unwrap();
    Gap {
        timeline,
        from: lsn(from),
        to: lsn(to),
        reason: "lost".into(),
        recorded_unix: 1.0,
        unknown: Default::default(),
    }
}

/// Start and end of the run, in segments.
fn run(archive: &Archive, timeline: u32, gaps: &[Gap]) -> Option<(u64, u64)> {
    let all = archive.frontiers(gaps);
    let one = all.iter().find(|f| f.timeline.get() == timeline)?;
    let number = |lsn: Lsn| lsn.as_u64() / size().bytes();
    Some((number(one.start), number(one.archived)))
}

#[test]
fn behind_a_gap_the_frontier_goes_on_once_the_partial_before_it_is_archived() {
    let gaps = [gap(1, 0x58, 0x90)];
    let mut archive = Archive::new(size());
    archive.hold([3, 4].map(|n| segment(1, n)));
    for number in [3, 4, 9, 10] {
        archive.record(segment(1, number), 1, None);
    }
    // The partial is not even sealed yet.
    assert_eq!(run(&archive, 1, &gaps), Some((3, 5)));
    archive.hold([partial(1, 5)]);
    assert_eq!(run(&archive, 1, &gaps), Some((3, 5)));
    archive.record(partial(1, 5), 1, None);
    assert_eq!(run(&archive, 1, &gaps), Some((3, 11)));
    // Without a recorded gap it is only a hole.
    assert_eq!(run(&archive, 1, &[]), Some((3, 5)));
    assert!(!archive.has(segment(1, 7)));
}

/// On an idle cluster nothing may arrive for a long time after the gap, which must not look like lag.
#[test]
fn a_gap_at_the_end_is_passed_at_once() {
    let mut archive = Archive::new(size());
    archive.record(segment(1, 3), 1, None);
    assert_eq!(run(&archive, 1, &[gap(1, 0x40, 0x90)]), Some((3, 9)));
    assert_eq!(run(&archive, 1, &[gap(1, 0x40, 0x90), gap(1, 0x90, 0xb0)]), Some((3, 11)));
    assert_eq!(run(&archive, 1, &[gap(1, 0x41, 0x50)]), Some((3, 4)));
}

#[test]
fn a_gap_does_not_hide_a_segment_that_is_not_archived_before_it() {
    let gaps = [gap(1, 0x60, 0x90)];
    let mut archive = Archive::new(size());
    archive.hold([3, 4, 5].map(|n| segment(1, n)));
    for number in [3, 5, 9] {
        archive.record(segment(1, number), 1, None);
    }
    assert_eq!(run(&archive, 1, &gaps), Some((3, 4)));
    archive.record(segment(1, 4), 1, None);
    assert_eq!(run(&archive, 1, &gaps), Some((3, 10)));
}

#[test]
fn a_partial_before_a_gap_may_be_the_first_that_is_held() {
    let gaps = [gap(1, 0x38, 0x90)];
    let mut archive = Archive::new(size());
    archive.hold([partial(1, 3), segment(1, 9)]);
    archive.record(segment(1, 9), 1, None);
    assert_eq!(run(&archive, 1, &gaps), Some((3, 3)));
    archive.record(partial(1, 3), 1, None);
    assert_eq!(run(&archive, 1, &gaps), Some((3, 10)));
}

/// The partial at the end of a timeline is followed by another timeline, not by more of this one.
#[test]
fn the_partial_of_an_ended_timeline_moves_nothing() {
    let gaps = [gap(1, 0x28, 0x30), gap(2, 0x48, 0x60)];
    let mut archive = Archive::new(size());
    for file in [segment(1, 3), partial(1, 4), segment(1, 6), segment(2, 6)] {
        archive.record(file, 1, None);
    }
    assert_eq!(run(&archive, 1, &gaps), Some((3, 4)));
    // A gap between two timelines comes before the first segment of the newer one.
    assert_eq!(run(&archive, 2, &gaps), Some((6, 7)));
}

#[test]
fn partials_and_histories_count_once() {
    let mut archive = Archive::new(size());
    for file in [partial(1, 3), "00000002.history".parse().unwrap()] {
        assert!(!archive.has(file));
        archive.hold([file]);
        assert!(!archive.has(file));
        archive.record(file, 5, None);
        archive.record(file, 5, None);
        archive.hold([file]);
        assert!(archive.has(file));
    }
    assert_eq!(archive.totals(), Totals { files: 2, bytes: 10 });
    assert!(!archive.has(segment(1, 3)));
}

/// The files that a stream left on tier 1: pieces of whole segments, in order of position. Each piece except the
/// last is followed by a gap, which may begin in the middle of a segment.
fn stream() -> impl Strategy<Value = Vec<(u64, bool, u64)>> {
    prop::collection::vec((0u64..4, any::<bool>(), 1u64..5), 1..6)
}

proptest! {
    /// FRONTIER1 and FRONTIER2 in any order of uploads, compared with the plain definition.
    #[test]
    fn any_order_of_uploads_gives_the_frontier_of_the_definition(
        held in prop::collection::btree_set(0u64..40, 1..30),
        order in prop::collection::vec(0usize..64, 0..40),
    ) {
        let held: Vec<u64> = held.into_iter().collect();
        let mut archive = Archive::new(size());
        archive.hold(held.iter().map(|n| segment(1, *n)));
        let mut done = BTreeSet::new();
        let mut last = archived(&archive, 1);
        for index in order {
            let number = held[index % held.len()];
            done.insert(number);
            archive.record(segment(1, number), 1, None);
            let expected = (held[0]..).find(|n| !done.contains(n)).unwrap();
            prop_assert_eq!(archived(&archive, 1), expected);
            prop_assert!(expected >= last);
            last = expected;
        }
        let rebuilt = archive.rebuild(
            held.iter().map(|n| segment(1, *n)),
            done.iter().map(|n| (segment(1, *n), 1, 1)),
        );
        prop_assert_eq!(rebuilt.frontiers(&[]), archive.frontiers(&[]));
    }

    /// FRONTIER1 to FRONTIER3 with gaps, in any order of uploads, compared with the plain definition: go through
    ///           everything that ever existed, in order, up to the first file that is not archived.
    #[test]
    fn any_order_of_uploads_over_gaps_gives_the_frontier_of_the_definition(
        pieces in stream(),
        order in prop::collection::vec(any::<prop::sample::Index>(), 0..40),
    ) {
        // Files with the position that is reached by archiving them: a file at the end of a piece is followed by a
        // gap, which needs nothing more.
        let (mut units, mut gaps, mut at) = (vec![(segment(1, 1), 2)], Vec::new(), 2);
        for (whole, inside, lost) in pieces {
            for _ in 0..whole {
                units.push((segment(1, at), at + 1));
                at += 1;
            }
            let end = at + lost;
            if inside {
                units.push((partial(1, at), end));
            } else {
                units.last_mut().unwrap().1 = end;
            }
            gaps.push(gap(1, at * 16 + if inside { 5 } else { 0 }, end * 16));
            at = end;
        }
        let mut archive = Archive::new(size());
        archive.hold(units.iter().map(|(file, _)| *file));
        let (mut done, mut last) = (BTreeSet::new(), 1);
        for index in order {
            let (file, _) = *index.get(&units);
            done.insert(file);
            archive.record(file, 1, None);
            let reached = units.iter().take_while(|(file, _)| done.contains(file)).last();
            let expected = reached.map_or(1, |(_, to)| *to);
            prop_assert_eq!(run(&archive, 1, &gaps), Some((1, expected)));
            prop_assert!(expected >= last, "{} after {}", expected, last);
            last = expected;
        }
        for (file, _) in &units {
            prop_assert_eq!(archive.has(*file), done.contains(file));
        }
        let rebuilt = archive.rebuild(
            units.iter().map(|(file, _)| *file),
            done.iter().map(|file| (*file, 1, 1)),
        );
        prop_assert_eq!(rebuilt.frontiers(&gaps), archive.frontiers(&gaps));
        prop_assert_eq!(rebuilt.totals(), archive.totals());
    }
}
