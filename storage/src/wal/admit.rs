//! Decides whether a writer may begin at the position it asks for. Pure.
//!
//! - A stream starts exactly at the durable position of its timeline, or at a segment boundary if the timeline has no
//!   WAL yet. Nothing is overwritten and nothing is skipped (P2).
//! - A PostgreSQL on an older timeline than the followed one is refused (P8), unless its timeline is recorded as
//!   undecided: then both timelines are received. A PostgreSQL on a retired timeline is always refused.
//! - A new timeline needs its history file and its ancestors' WAL up to the segment that contains the switch point. The
//!   new timeline sends that segment again from its beginning, so an ancestor may end anywhere inside it.
//! - Missing WAL is either streamed first or declared as a gap, which is recorded. It is never skipped silently.

use super::kept::TakenOver;
use super::types::{Gap, GapDeclaration, OpenRefusal, OpenRequest};
use crate::record::Unknown;
use crate::timelines::{Standing, Timelines};
use klio_pg::{Lsn, SegmentSize, TimelineHistory, TimelineId};

/// The properties of a timeline that matter for admission.
#[derive(Debug, Clone, Copy)]
pub(super) struct Held {
    pub(super) timeline: TimelineId,
    /// The timeline has at least one durable byte.
    pub(super) has_wal: bool,
    /// Where its stream resumes.
    pub(super) position: Lsn,
}

/// Adds the WAL that is about to be taken over from tier 2 to the WAL held on tier 1.
pub(super) fn take_over(held: &mut Vec<Held>, taken: &[TakenOver]) {
    for TakenOver { timeline, end, .. } in taken {
        match held.iter_mut().find(|line| line.timeline == *timeline) {
            Some(line) => {
                line.has_wal = true;
                line.position = line.position.max(*end);
            }
            None => held.push(Held { timeline: *timeline, has_wal: true, position: *end }),
        }
    }
}

/// The gap that has to be recorded before the writer begins, if any.
pub(super) type Admission = Option<Gap>;

/// Whether a PostgreSQL on `timeline` may stream at all.
pub(super) fn may_stream(
    marks: &Timelines,
    followed: Option<TimelineId>,
    timeline: TimelineId,
) -> Result<(), OpenRefusal> {
    if let Some(mark) = marks.mark(timeline) {
        match mark.standing {
            Standing::Retired => {
                return Err(OpenRefusal::Retired { timeline, reason: mark.reason.clone() });
            }
            Standing::Undecided => return Ok(()),
            // A newer timeline may have been followed since this decision; the check below finds that.
            Standing::Followed => {}
        }
    }
    match followed.filter(|followed| *followed > timeline) {
        Some(newest) => Err(OpenRefusal::Stale { newest, found: timeline }),
        None => Ok(()),
    }
}

/// The rules about the start position.
pub(super) fn admit(
    size: SegmentSize,
    held: &[Held],
    gaps: &[Gap],
    history: Option<&TimelineHistory>,
    request: &OpenRequest,
) -> Result<Admission, OpenRefusal> {
    let timeline = request.timeline;
    let history = history.ok_or(OpenRefusal::NoHistory(timeline))?;
    match held.iter().find(|h| h.timeline == timeline) {
        Some(line) => resume(size, line.position, gaps, request),
        None => begin(size, held, history, request),
    }
}

fn gap_of(request: &OpenRequest, gap: &GapDeclaration) -> Gap {
    Gap {
        timeline: request.timeline,
        from: gap.from,
        to: gap.to,
        reason: gap.reason.clone(),
        recorded_unix: request.now_unix,
        unknown: Unknown::default(),
    }
}

fn check_gap(
    size: SegmentSize,
    from: Lsn,
    request: &OpenRequest,
) -> Result<Admission, OpenRefusal> {
    let Some(gap) = &request.gap else { return Ok(None) };
    let good = gap.from == from
        && gap.to > gap.from
        && gap.to.offset_in(size) == 0
        && gap.to == request.start;
    if good {
        return Ok(Some(gap_of(request, gap)));
    }
    let start = request.start;
    let expected =
        format!("from {from} to the stream's start {start}, which is a segment boundary");
    Err(OpenRefusal::BadGap { expected, from: gap.from, to: gap.to })
}

fn resume(
    size: SegmentSize,
    position: Lsn,
    gaps: &[Gap],
    request: &OpenRequest,
) -> Result<Admission, OpenRefusal> {
    let recorded = |declared: &GapDeclaration| {
        gaps.iter()
            .any(|g| (g.timeline, g.from, g.to) == (request.timeline, declared.from, declared.to))
    };
    match &request.gap {
        // This is a retry: the answer to the first declaration was lost.
        Some(gap) if position == request.start && gap.to == position && recorded(gap) => Ok(None),
        Some(_) => check_gap(size, position, request),
        None if request.start == position => Ok(None),
        None => Err(OpenRefusal::WrongStart { expected: position, found: request.start }),
    }
}

fn begin(
    size: SegmentSize,
    held: &[Held],
    history: &TimelineHistory,
    request: &OpenRequest,
) -> Result<Admission, OpenRefusal> {
    let start = request.start;
    if start.offset_in(size) != 0 {
        let expected = start.segment_start(size);
        return Err(OpenRefusal::NotSegmentStart { expected, found: start });
    }
    let first = history.switch_point().map(|switch| switch.segment_start(size));
    if let Some(expected) = first.filter(|first| start < *first) {
        return Err(OpenRefusal::WrongStart { expected, found: start });
    }
    match (missing(size, held, history, start), &request.gap) {
        (None, None) => Ok(None),
        (Some((timeline, from)), None) => Err(OpenRefusal::Missing { timeline, from, to: start }),
        (Some((_, from)), Some(_)) => check_gap(size, from, request),
        (None, Some(gap)) => {
            let expected = "only where WAL is missing".to_owned();
            Err(OpenRefusal::BadGap { expected, from: gap.from, to: gap.to })
        }
    }
}

/// The first missing byte on the way to `start`, seen from the newest ancestor with WAL.
fn missing(
    size: SegmentSize,
    held: &[Held],
    history: &TimelineHistory,
    start: Lsn,
) -> Option<(TimelineId, Lsn)> {
    let entries = history.entries();
    let (index, line) = entries.iter().enumerate().rev().find_map(|(index, entry)| {
        let line = held.iter().find(|h| h.has_wal && h.timeline == entry.timeline)?;
        Some((index, line))
    })?;
    let last_segment = entries[index].end.segment_start(size);
    let (timeline, from) = if line.position >= last_segment {
        let next = entries.get(index + 1).map_or(history.timeline(), |next| next.timeline);
        (next, last_segment)
    } else {
        (line.timeline, line.position)
    };
    (from < start).then_some((timeline, from))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::timelines::Mark;

    const MIB: u64 = 1 << 20;

    fn size() -> SegmentSize {
        SegmentSize::new(MIB as u32).unwrap()
    }
    fn tli(n: u32) -> TimelineId {
        TimelineId::new(n).unwrap()
    }
    fn held(timeline: u32, position: u64) -> Held {
        Held { timeline: tli(timeline), has_wal: true, position: Lsn::new(position) }
    }
    fn request(timeline: u32, start: u64, gap: Option<(u64, u64)>) -> OpenRequest {
        let gap = gap.map(|(from, to)| GapDeclaration {
            from: Lsn::new(from),
            to: Lsn::new(to),
            reason: "lost".into(),
        });
        OpenRequest {
            timeline: tli(timeline),
            start: Lsn::new(start),
            gap,
            now_unix: 5.0,
            slot_restart: None,
        }
    }
    fn history(timeline: u32, switches: &[(u32, u64)]) -> TimelineHistory {
        let text: String =
            switches.iter().map(|(t, at)| format!("{t}\t{}\tx\n", Lsn::new(*at))).collect();
        TimelineHistory::parse(tli(timeline), text.as_bytes()).unwrap()
    }
    fn ask(
        held: &[Held],
        history: &TimelineHistory,
        request: &OpenRequest,
    ) -> Result<Admission, OpenRefusal> {
        admit(size(), held, &[], Some(history), request)
    }

    #[test]
    fn the_first_byte_of_a_timeline_is_a_segments_first() {
        let root = history(1, &[]);
        assert_eq!(ask(&[], &root, &request(1, 3 * MIB, None)), Ok(None));
        let refused = ask(&[], &root, &request(1, 3 * MIB + 8, None));
        assert!(matches!(refused, Err(OpenRefusal::NotSegmentStart { .. })), "{refused:?}");
    }

    /// Other tools reopened the partial segment from its beginning and lost the acknowledged bytes in it (P2).
    #[test]
    fn a_held_timeline_goes_on_exactly_at_its_durable_position() {
        let (root, lines) = (history(1, &[]), [held(1, 3 * MIB + 77)]);
        assert_eq!(ask(&lines, &root, &request(1, 3 * MIB + 77, None)), Ok(None));
        for bad in [3 * MIB, 3 * MIB + 76, 3 * MIB + 78, 4 * MIB, 0] {
            let refused = ask(&lines, &root, &request(1, bad, None));
            let expected = Lsn::new(3 * MIB + 77);
            assert_eq!(refused, Err(OpenRefusal::WrongStart { expected, found: Lsn::new(bad) }));
        }
    }

    #[test]
    fn an_older_timeline_after_a_newer_one_is_stale() {
        let none = Timelines::default();
        let refused = may_stream(&none, Some(tli(2)), tli(1));
        assert_eq!(refused, Err(OpenRefusal::Stale { newest: tli(2), found: tli(1) }));
        assert_eq!(may_stream(&none, Some(tli(2)), tli(3)), Ok(()));
        assert_eq!(may_stream(&none, None, tli(1)), Ok(()));
    }

    #[test]
    fn what_is_undecided_streams_and_what_is_retired_never() {
        let mark = |standing| Mark {
            timeline: tli(1),
            standing,
            against: tli(2),
            reason: "both write".into(),
            marked_unix: 0.0,
            decided_unix: None,
            decided_by: None,
            earlier: Vec::new(),
            unknown: Unknown::default(),
        };
        let ask =
            |standing| may_stream(&Timelines::new(vec![mark(standing)]), Some(tli(2)), tli(1));
        assert_eq!(ask(Standing::Undecided), Ok(()));
        assert!(matches!(ask(Standing::Followed), Err(OpenRefusal::Stale { .. })));
        assert!(matches!(ask(Standing::Retired), Err(OpenRefusal::Retired { .. })));
    }

    #[test]
    fn a_new_timeline_needs_its_history() {
        let refused = admit(size(), &[], &[], None, &request(2, 3 * MIB, None));
        assert_eq!(refused, Err(OpenRefusal::NoHistory(tli(2))));
    }

    #[test]
    fn a_new_timeline_begins_in_the_segment_of_its_switch_point() {
        let child = history(2, &[(1, 3 * MIB + 500)]);
        for parent in [3 * MIB, 3 * MIB + 100, 3 * MIB + 500, 3 * MIB + 900] {
            assert_eq!(ask(&[held(1, parent)], &child, &request(2, 3 * MIB, None)), Ok(None));
        }
        let early = ask(&[held(1, 3 * MIB)], &child, &request(2, 2 * MIB, None));
        assert!(matches!(early, Err(OpenRefusal::WrongStart { .. })), "{early:?}");
        let late = ask(&[held(1, 3 * MIB)], &child, &request(2, 4 * MIB, None));
        let (from, to) = (Lsn::new(3 * MIB), Lsn::new(4 * MIB));
        assert_eq!(late, Err(OpenRefusal::Missing { timeline: tli(2), from, to }));
    }

    #[test]
    fn what_the_parent_lacks_is_named_and_a_gap_covers_it() {
        let child = history(2, &[(1, 5 * MIB + 500)]);
        let lines = [held(1, 3 * MIB + 7)];
        let (from, to) = (Lsn::new(3 * MIB + 7), Lsn::new(5 * MIB));
        assert_eq!(
            ask(&lines, &child, &request(2, 5 * MIB, None)),
            Err(OpenRefusal::Missing { timeline: tli(1), from, to })
        );
        let gap = Some((3 * MIB + 7, 5 * MIB));
        let admitted = ask(&lines, &child, &request(2, 5 * MIB, gap)).unwrap().unwrap();
        assert_eq!((admitted.from, admitted.to, admitted.timeline), (from, to, tli(2)));
        let wrong = ask(&lines, &child, &request(2, 5 * MIB, Some((3 * MIB, 5 * MIB))));
        assert!(matches!(wrong, Err(OpenRefusal::BadGap { .. })), "{wrong:?}");
    }

    #[test]
    fn a_whole_timeline_in_between_is_missed() {
        let child = history(3, &[(1, 3 * MIB + 500), (2, 6 * MIB + 1)]);
        let refused = ask(&[held(1, 3 * MIB + 500)], &child, &request(3, 6 * MIB, None));
        let (from, to) = (Lsn::new(3 * MIB), Lsn::new(6 * MIB));
        assert_eq!(refused, Err(OpenRefusal::Missing { timeline: tli(2), from, to }));
        let child = history(3, &[(1, 3 * MIB + 500), (2, 3 * MIB + 600)]);
        assert_eq!(ask(&[held(1, 3 * MIB + 500)], &child, &request(3, 3 * MIB, None)), Ok(None));
    }

    #[test]
    fn a_gap_begins_at_the_durable_position_and_ends_at_a_segment() {
        let (root, lines) = (history(1, &[]), [held(1, 3 * MIB + 77)]);
        let good = request(1, 5 * MIB, Some((3 * MIB + 77, 5 * MIB)));
        assert!(ask(&lines, &root, &good).unwrap().is_some());
        for (start, from, to) in [
            (5 * MIB, 3 * MIB, 5 * MIB),
            (5 * MIB + 1, 3 * MIB + 77, 5 * MIB + 1),
            (6 * MIB, 3 * MIB + 77, 5 * MIB),
            (3 * MIB, 3 * MIB + 77, 3 * MIB),
        ] {
            let refused = ask(&lines, &root, &request(1, start, Some((from, to))));
            assert!(matches!(refused, Err(OpenRefusal::BadGap { .. })), "{refused:?}");
        }
    }

    #[test]
    fn a_gap_may_be_declared_again_when_its_answer_was_lost() {
        let gap = Gap {
            timeline: tli(1),
            from: Lsn::new(3 * MIB + 77),
            to: Lsn::new(5 * MIB),
            reason: "lost".into(),
            recorded_unix: 1.0,
            unknown: Unknown::default(),
        };
        let again = request(1, 5 * MIB, Some((3 * MIB + 77, 5 * MIB)));
        let root = history(1, &[]);
        assert_eq!(admit(size(), &[held(1, 5 * MIB)], &[gap], Some(&root), &again), Ok(None));
    }
}
