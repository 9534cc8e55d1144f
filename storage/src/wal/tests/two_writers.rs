//! Two PostgreSQLs write at once, each on its own timeline: both are stored, one is followed, and a person decides.
//!
//! The random histories crash anywhere, as in `crash.rs`. Afterwards everything that either writer was told is durable
//! is there, byte for byte, and so is what was recorded about the conflict.

use super::{
    timeline::{SWITCH, append_child, child},
    *,
};
use crate::{
    layout::Form,
    timelines::{Decision, Mark, Standing},
};
use std::{sync::mpsc, time::Duration};

fn undecided(timeline: u32, against: u32) -> Mark {
    Mark {
        timeline: tli(timeline),
        standing: Standing::Undecided,
        against: tli(against),
        reason: "both write".into(),
        marked_unix: 3.5,
        decided_unix: None,
        decided_by: None,
        earlier: Vec::new(),
        unknown: Default::default(),
    }
}

fn decide(
    store: &WalStore,
    rig: &Rig,
    how: impl Fn(&crate::timelines::Timelines, &Decision) -> crate::timelines::Timelines,
) {
    let decision = Decision { by: "ann".into(), at_unix: 4.5 };
    let changed = store
        .change_timelines(&rig.name, |marks| Ok::<_, ()>(Some(how(marks, &decision))))
        .unwrap();
    assert_eq!(changed, Ok(true));
}

#[test]
fn both_timelines_are_received_at_once_and_the_followed_one_stays_the_followed_one() {
    let rig = Rig::new(1);
    let store = rig.open();
    let mut production = rig.writer(&store, 1, MIB);
    rig.append_and_flush(&mut production, SWITCH + 5000);
    store.put_history(&rig.name, tli(2), &child().0).unwrap();
    assert!(store.mark(&rig.name, undecided(2, 1)).unwrap());
    let mut copy = rig.writer(&store, 2, 3 * MIB);
    let mut expected = SWITCH + 5000;
    for step in 1..20 {
        append_child(&rig, &mut copy, 3 * MIB + step * 200_000).unwrap();
        expected += 150_000;
        rig.append(&mut production, expected).unwrap();
        assert_eq!(copy.flush().unwrap().lsn(), at(3 * MIB + step * 200_000));
        assert_eq!(production.flush().unwrap().lsn(), at(expected));
        for (writer, timeline) in [(&production, 1), (&copy, 2)] {
            if let Some(next) = writer.preparation() {
                next.run().unwrap();
            }
            assert_eq!(writer.timeline(), tli(timeline));
        }
    }
    assert_eq!(store.followed(&rig.name), Some(tli(1)));
    let partials = store.unsealed(&rig.name);
    assert!(partials.iter().all(|file| matches!(file, WalFile::Segment(_))), "{partials:?}");
    rig.check_readable(&store, &root_history());
    rig.check_readable(&store, &child().1);
    for file in partials {
        store.seal(&rig.name, file).unwrap();
    }
    drop((production, copy, store));
    // A restart decides nothing.
    let store = rig.open();
    assert_eq!(store.problems(&rig.name), Vec::<String>::new());
    assert_eq!(store.followed(&rig.name), Some(tli(1)));
    assert_eq!(store.timelines(&rig.name).marks(), [undecided(2, 1)]);
    let _production = rig.writer(&store, 1, expected);
    let _copy = rig.writer(&store, 2, 3 * MIB + 19 * 200_000);
}

#[test]
fn a_second_writer_of_the_same_timeline_is_refused_beside_another_timelines() {
    let rig = Rig::new(2);
    let store = rig.open();
    let mut production = rig.writer(&store, 1, MIB);
    rig.append_and_flush(&mut production, SWITCH);
    store.put_history(&rig.name, tli(2), &child().0).unwrap();
    store.mark(&rig.name, undecided(2, 1)).unwrap();
    let copy = rig.writer(&store, 2, 3 * MIB);
    for (timeline, start) in [(1, SWITCH), (2, 3 * MIB)] {
        let refused = store.open_writer(&rig.name, &Rig::request(timeline, start)).unwrap_err();
        let present = OpenRefusal::WriterPresent { timeline: tli(timeline) };
        assert!(matches!(refused, OpenError::Refused { refusal, .. } if refusal == present));
    }
    assert!(store.is_written(&rig.name, tli(1)) && store.is_written(&rig.name, tli(2)));
    drop(copy);
    assert!(!store.is_written(&rig.name, tli(2)));
    rig.append_and_flush(&mut production, SWITCH + 10);
}

/// The empty journal that another timeline's writer has just opened is in use, even though it has no byte yet.
#[test]
fn opening_one_timeline_takes_nothing_from_another() {
    let rig = Rig::new(3);
    let store = rig.open();
    store.put_history(&rig.name, tli(2), &child().0).unwrap();
    store.mark(&rig.name, undecided(2, 1)).unwrap();
    let mut copy = rig.writer(&store, 2, 3 * MIB);
    let mut production = rig.writer(&store, 1, MIB);
    append_child(&rig, &mut copy, 3 * MIB + 100).unwrap();
    copy.flush().unwrap();
    rig.append_and_flush(&mut production, MIB + 100);
    drop((copy, production, store));
    let store = rig.open();
    rig.check_readable(&store, &root_history());
    rig.check_readable(&store, &child().1);
    assert_eq!(store.positions(&rig.name).len(), 2);
}

/// Its stream had ended, the other timeline was taken for its successor, and its last segment was sealed as it was.
#[test]
fn an_older_timeline_that_comes_back_goes_on_behind_its_sealed_partial() {
    for rig in [Rig::new(4), Rig::encrypted(4)] {
        let store = rig.open();
        let mut production = rig.writer(&store, 1, MIB);
        rig.append_and_flush(&mut production, SWITCH + 5000);
        drop(production);
        store.put_history(&rig.name, tli(2), &child().0).unwrap();
        let mut copy = rig.writer(&store, 2, 3 * MIB);
        append_child(&rig, &mut copy, 4 * MIB).unwrap();
        copy.flush().unwrap();
        for file in store.unsealed(&rig.name) {
            store.seal(&rig.name, file).unwrap();
        }
        let back = Rig::request(1, SWITCH + 5000);
        let refused = store.open_writer(&rig.name, &back).unwrap_err();
        let stale = OpenRefusal::Stale { newest: tli(2), found: tli(1) };
        assert!(matches!(refused, OpenError::Refused { refusal, .. } if refusal == stale));
        store.mark(&rig.name, undecided(1, 2)).unwrap();
        let mut production = store.open_writer(&rig.name, &back).unwrap();
        rig.append_and_flush(&mut production, 3 * MIB + 900_000);
        assert_eq!(store.followed(&rig.name), Some(tli(2)), "until a person decides");
        drop((production, copy, store));
        let store = rig.open();
        let mut production = rig.writer(&store, 1, 3 * MIB + 900_000);
        rig.append_and_flush(&mut production, 4 * MIB + 10);
        for file in store.unsealed(&rig.name) {
            store.seal(&rig.name, file).unwrap();
        }
        drop((production, store));
        let store = rig.open();
        assert_eq!(store.problems(&rig.name), Vec::<String>::new());
        rig.check_readable(&store, &root_history());
        let whole = rig.read(&store, WalFile::Segment(segment(1, 3)));
        assert_eq!(whole, rig.bytes(3 * MIB, 4 * MIB));
    }
}

/// Rot in the part of a journal that is also sealed does not silently lose WAL that was acknowledged behind it.
#[test]
fn a_resumed_journal_that_rots_below_its_sealed_partial_loses_nothing_in_silence() {
    const PARTIAL: u64 = SWITCH + 5000;
    let journal = Rig::path(&format!("wal/00000001/{}.open", segment(1, 3)));
    // The WAL behind it is the rest of its segment, or the rest and some of the next segment.
    for upto in [3 * MIB + 900_000, 4 * MIB + 9000] {
        for byte in [20, 4096 + 60] {
            let rig = Rig::new(7);
            let store = rig.open();
            let mut production = rig.writer(&store, 1, MIB);
            rig.append_and_flush(&mut production, PARTIAL);
            drop(production);
            store.put_history(&rig.name, tli(2), &child().0).unwrap();
            let mut copy = rig.writer(&store, 2, 3 * MIB);
            append_child(&rig, &mut copy, 4 * MIB).unwrap();
            copy.flush().unwrap();
            for file in store.unsealed(&rig.name) {
                store.seal(&rig.name, file).unwrap();
            }
            store.mark(&rig.name, undecided(1, 2)).unwrap();
            let mut production = rig.writer(&store, 1, PARTIAL);
            rig.append_and_flush(&mut production, upto - 4000);
            rig.append_and_flush(&mut production, upto);
            drop((production, copy, store));
            rig.disk.flip_bit(&journal, byte, 1).unwrap();
            let store = rig.open();
            if upto > 4 * MIB {
                // More WAL follows: a hole, which is neither the end of WAL nor absent.
                let problems = store.problems(&rig.name);
                assert!(problems[0].contains("found it intact up to"), "{problems:?}");
                let kind = store.read(&rig.name, WalFile::Segment(segment(1, 3))).unwrap_err().kind;
                assert_eq!(kind, Kind::Corrupt);
                assert!(rig.disk.stat(&journal).is_ok());
                continue;
            }
            let position = store.positions(&rig.name)[0];
            assert_eq!(position.flushed, at(PARTIAL), "byte {byte}");
            let mut again = Rig::request(1, PARTIAL);
            again.slot_restart = Some(at(upto - 4000));
            let mut production = store.open_writer(&rig.name, &again).unwrap();
            let lost = store.damaged(&rig.name);
            assert!(lost[0].from == at(PARTIAL) && lost[0].to >= at(upto - 4000), "{lost:?}");
            rig.append_and_flush(&mut production, upto);
            assert!(store.damaged(&rig.name).is_empty());
            rig.check_readable(&store, &root_history());
            let kept = format!("wal/00000001/{}.open.damaged-1", segment(1, 3));
            assert!(rig.disk.stat(&Rig::path(&kept)).is_ok(), "byte {byte}");
        }
    }
}

/// Before, WAL that arrived behind the sealed end stayed in a journal forever, on tier 1 only.
#[test]
fn what_came_behind_a_sealed_end_is_sealed_with_it_when_the_timeline_is_over_again() {
    for how in [Restart::Kill, Restart::PowerLoss] {
        for rig in [Rig::new(9), Rig::encrypted(9)] {
            let partial = WalFile::Partial(segment(1, 2));
            let mut store = rig.open();
            let mut at = MIB;
            for end in [777, 900, 900_000] {
                let mut writer = rig.writer(&store, 1, at);
                at = 2 * MIB + end;
                rig.append_and_flush(&mut writer, at);
                drop((writer, store));
                rig.disk.restart(how);
                store = rig.open();
                store.set_over(&rig.name, true);
                for file in store.unsealed(&rig.name) {
                    store.seal(&rig.name, file).unwrap();
                }
                assert_eq!(store.unsealed(&rig.name), []);
                assert_eq!(rig.read(&store, partial), rig.bytes(2 * MIB, at));
                drop(store);
                rig.disk.restart(how);
                store = rig.open();
                assert_eq!(store.positions(&rig.name)[0].flushed.as_u64(), at);
                assert_eq!(rig.read(&store, partial), rig.bytes(2 * MIB, at));
            }
            assert_eq!(store.problems(&rig.name), Vec::<String>::new());
        }
    }
}

#[test]
fn the_end_of_a_history_that_is_over_is_sealed_and_what_comes_all_the_same_goes_on_behind_it() {
    for rig in [Rig::new(8), Rig::encrypted(8)] {
        let store = rig.open();
        let mut writer = rig.writer(&store, 1, MIB);
        rig.append_and_flush(&mut writer, 2 * MIB + 777);
        let partial = WalFile::Partial(segment(1, 2));
        store.set_over(&rig.name, true);
        assert!(!store.unsealed(&rig.name).contains(&partial), "somebody writes it");
        drop(writer);
        assert!(store.unsealed(&rig.name).contains(&partial));
        for file in store.unsealed(&rig.name) {
            store.seal(&rig.name, file).unwrap();
        }
        assert_eq!(rig.read(&store, partial), rig.bytes(2 * MIB, 2 * MIB + 777));
        let mut writer = rig.writer(&store, 1, 2 * MIB + 777);
        rig.append_and_flush(&mut writer, 3 * MIB + 10);
        drop((writer, store));
        let store = rig.open();
        assert_eq!(store.problems(&rig.name), Vec::<String>::new());
        rig.check_readable(&store, &root_history());
    }
}

/// The moments of sealing at which a writer of the same journal may be opened: when the sealed file gets its name, and
/// when the journal's file is removed. The writer waits and continues behind the sealed part (P1).
#[test]
fn a_writer_that_is_opened_while_its_journal_is_sealed_loses_nothing() {
    let end = 2 * MIB + 900_000;
    let partial = WalFile::Partial(segment(1, 2));
    for (rig, form) in [(Rig::new(9), Form::Plain), (Rig::encrypted(9), Form::Age)] {
        for moment in [partial.relative_in(form), format!("00000001/{}.open", segment(1, 2))] {
            let rig = Rig { disk: SimDisk::new(9), ..rig.clone() };
            let store = rig.open();
            let mut writer = rig.writer(&store, 1, MIB);
            rig.append_and_flush(&mut writer, 2 * MIB);
            rig.append_and_flush(&mut writer, end);
            drop(writer);
            store.set_over(&rig.name, true);
            store.seal(&rig.name, WalFile::Segment(segment(1, 1))).unwrap();
            let place = Rig::path("wal").join(&moment);
            let (opened, wait) = mpsc::channel();
            let opener = (rig.clone(), store.clone(), opened);
            let (joined, handle) = mpsc::channel();
            rig.disk.before_name_changes(&place, move || {
                let (rig, store, opened) = opener;
                let thread = std::thread::spawn(move || {
                    let mut writer = rig.writer(&store, 1, end);
                    let _ = opened.send(());
                    rig.append_and_flush(&mut writer, end + 10);
                });
                // A writer that does not wait arrives within this time; one that waits is joined below.
                let _ = wait.recv_timeout(Duration::from_millis(300));
                joined.send(thread).unwrap();
            });
            store.seal(&rig.name, partial).unwrap();
            handle.recv().unwrap().join().unwrap();
            assert_eq!(store.positions(&rig.name)[0].flushed, at(end + 10), "{moment}");
            let mut writer = rig.writer(&store, 1, end + 10);
            rig.append_and_flush(&mut writer, end + 20);
            drop((writer, store));
            let store = rig.open();
            assert_eq!(store.problems(&rig.name), Vec::<String>::new());
            assert_eq!(store.positions(&rig.name)[0].flushed, at(end + 20), "{moment}");
            rig.check_readable(&store, &root_history());
        }
    }
}

#[test]
fn what_is_retired_is_refused_for_good_and_its_end_is_sealed() {
    let rig = Rig::new(5);
    let store = rig.open();
    let mut production = rig.writer(&store, 1, MIB);
    rig.append_and_flush(&mut production, SWITCH);
    store.put_history(&rig.name, tli(2), &child().0).unwrap();
    store.mark(&rig.name, undecided(2, 1)).unwrap();
    let mut copy = rig.writer(&store, 2, 3 * MIB);
    append_child(&rig, &mut copy, 4 * MIB + 50).unwrap();
    copy.flush().unwrap();
    let held = [tli(1), tli(2)];
    decide(&store, &rig, |marks, decision| marks.retire(tli(2), &held, decision).unwrap());
    drop(copy);
    for _ in 0..2 {
        let store = store.clone();
        let refused = store.open_writer(&rig.name, &Rig::request(2, 4 * MIB + 50)).unwrap_err();
        let retired = |refusal: &OpenRefusal| matches!(refusal, OpenRefusal::Retired { .. });
        assert!(
            matches!(&refused, OpenError::Refused { refusal, .. } if retired(refusal)),
            "{refused}"
        );
    }
    // A conflict that is found again changes nothing that was decided.
    assert!(!store.mark(&rig.name, undecided(2, 1)).unwrap());
    let partial = WalFile::Partial(segment(2, 4));
    assert!(store.unsealed(&rig.name).contains(&partial));
    store.seal(&rig.name, partial).unwrap();
    assert_eq!(rig.read(&store, partial).len(), 50);
    rig.append_and_flush(&mut production, SWITCH + 100);
}

#[test]
fn nobody_is_asked_to_give_way_to_a_writer_that_would_be_refused() {
    let rig = Rig::new(6);
    let store = rig.open();
    let mut live = rig.writer(&store, 1, MIB);
    rig.append_and_flush(&mut live, SWITCH);
    let ask = |timeline: u32, start, lives_on: u32| {
        store.check_writer(&rig.name, &Rig::request(timeline, start), tli(lives_on), &[])
    };
    let refusal = |outcome: Result<(), OpenError>| match outcome {
        Err(OpenError::Refused { refusal, .. }) => refusal,
        other => panic!("expected a refusal, found {other:?}"),
    };
    assert_eq!(refusal(ask(2, 3 * MIB, 2)), OpenRefusal::NoHistory(tli(2)));
    assert!(matches!(refusal(ask(1, MIB, 1)), OpenRefusal::WrongStart { .. }));
    store.put_history(&rig.name, tli(2), &child().0).unwrap();
    assert!(matches!(refusal(ask(2, 4 * MIB, 2)), OpenRefusal::Missing { .. }));
    assert!(ask(2, 3 * MIB, 2).is_ok() && ask(1, SWITCH, 1).is_ok() && ask(1, SWITCH, 2).is_ok());
    rig.append_and_flush(&mut live, SWITCH + 1);
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

/// What each side was told is durable.
struct Sides {
    rig: Rig,
    random: Random,
    acked: BTreeMap<TimelineId, Lsn>,
    marked: bool,
}

impl Sides {
    fn new(seed: u64) -> Self {
        let rig = if seed.is_multiple_of(2) { Rig::new(seed) } else { Rig::encrypted(seed) };
        Self { rig, random: Random(seed), acked: BTreeMap::new(), marked: false }
    }

    fn history(timeline: TimelineId) -> TimelineHistory {
        if timeline == tli(1) { root_history() } else { child().1 }
    }

    /// `None` once the simulated machine is off.
    fn open(&mut self, store: &WalStore, timeline: TimelineId) -> Option<Writer> {
        if self.rig.disk.crashed() {
            return None;
        }
        let known = store.positions(&self.rig.name);
        let first = if timeline == tli(1) { at(MIB) } else { at(3 * MIB) };
        let start = known.iter().find(|p| p.timeline == timeline).map_or(first, |p| p.flushed);
        let acked = self.acked.get(&timeline).copied().unwrap_or(start);
        assert!(start >= acked, "P2: {timeline} resumes at {start}, acknowledged was {acked}");
        let request =
            OpenRequest { slot_restart: None, ..Rig::request(timeline.get(), start.as_u64()) };
        match store.open_writer(&self.rig.name, &request) {
            Ok(writer) => Some(writer),
            Err(_) if self.rig.disk.crashed() => None,
            Err(error) => panic!("{error}"),
        }
    }

    fn append(&mut self, writer: &mut Writer) -> Option<()> {
        let length = 1 + self.random.below(400_000);
        let (from, history) = (writer.position(), Self::history(writer.timeline()));
        let data = self.rig.wal.bytes(&history, from, from.advance(length));
        writer.append(from, &data).ok()?;
        if self.random.below(2) == 0 {
            let flushed = writer.flush().ok()?.lsn();
            self.acked.insert(writer.timeline(), flushed);
        }
        Some(())
    }

    /// Production goes first; the copy connects, both write, either disconnects and comes back, the program restarts.
    fn run(&mut self) -> Option<()> {
        let mut store = self.rig.try_open().ok()?;
        store.pin(&self.rig.name, self.rig.wal.pinned()).ok()?;
        let mut one = self.open(&store, tli(1))?;
        let bytes = self.rig.bytes(MIB, SWITCH + 777);
        one.append(at(MIB), &bytes).ok()?;
        self.acked.insert(tli(1), one.flush().ok()?.lsn());
        store.put_history(&self.rig.name, tli(2), &child().0).ok()?;
        // Sometimes production is away when the copy connects, and is then the one that becomes undecided.
        drop(one);
        let away = self.random.below(3) == 0;
        if away {
            let mut two = self.open(&store, tli(2))?;
            self.append(&mut two)?;
            self.acked.insert(tli(2), two.flush().ok()?.lsn());
            for file in store.unsealed(&self.rig.name) {
                store.seal(&self.rig.name, file).ok()?;
            }
        }
        let mark = if away { undecided(1, 2) } else { undecided(2, 1) };
        store.mark(&self.rig.name, mark).ok()?;
        self.marked = true;
        for _ in 0..12 {
            let mut writers = [self.open(&store, tli(1))?, self.open(&store, tli(2))?];
            for _ in 0..self.random.below(6) {
                let which = self.random.below(2) as usize;
                if let Some(next) = writers[which].preparation().filter(|_| which == 0) {
                    next.run().ok()?;
                }
                self.append(&mut writers[which])?;
                for file in store.unsealed(&self.rig.name) {
                    store.seal(&self.rig.name, file).ok()?;
                }
            }
            drop(writers);
            if self.random.below(4) == 0 {
                drop(store);
                self.rig.disk.restart_program();
                store = self.rig.try_open().ok()?;
            }
        }
        Some(())
    }

    fn check(&mut self) {
        self.rig.disk.restart(Restart::PowerLoss);
        let store = self.rig.try_open().unwrap();
        assert_eq!(store.problems(&self.rig.name), Vec::<String>::new());
        let positions = store.positions(&self.rig.name);
        for (timeline, acked) in &self.acked {
            let held = positions.iter().find(|p| p.timeline == *timeline).map(|p| p.flushed);
            assert!(held.is_some_and(|held| held >= *acked), "P1: {timeline}: {held:?}, {acked}");
            self.rig.check_readable(&store, &Self::history(*timeline));
        }
        if self.marked {
            assert_eq!(store.timelines(&self.rig.name).undecided().count(), 1);
            for timeline in [tli(1), tli(2)] {
                let mut writer = self.open(&store, timeline).unwrap();
                self.append(&mut writer).unwrap();
            }
        }
    }
}

#[test]
fn a_crash_while_both_write_loses_nothing_that_either_was_told() {
    for seed in 0..40 {
        let operations = {
            let mut whole = Sides::new(seed);
            whole.run().unwrap();
            let count = whole.rig.disk.operations();
            whole.check();
            count
        };
        let mut random = Random(seed + 99);
        for _ in 0..6 {
            let operation = random.below(operations);
            let run = std::panic::catch_unwind(|| {
                let mut sides = Sides::new(seed);
                sides.rig.disk.crash_after(operation);
                let _ended_or_off = sides.run();
                sides.check();
            });
            assert!(run.is_ok(), "seed {seed}, crash at operation {operation} of {operations}");
        }
    }
}
