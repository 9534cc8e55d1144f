//! Timelines and gaps: a fork is stored separately and overwrites nothing; missing WAL is recorded.

use super::*;

/// Timeline 2 leaves timeline 1 in the middle of segment 3.
pub(super) const SWITCH: u64 = 3 * MIB + 300_000;

pub(super) fn child() -> (Vec<u8>, TimelineHistory) {
    let text = format!("1\t{}\tno recovery target specified\n", at(SWITCH)).into_bytes();
    let history = TimelineHistory::parse(tli(2), &text).unwrap();
    (text, history)
}

pub(super) fn append_child(rig: &Rig, writer: &mut Writer, to: u64) -> Result<Lsn, Error> {
    let from = writer.position();
    writer.append(from, &rig.wal.bytes(&child().1, from, at(to)))
}

#[test]
fn a_promoted_standby_goes_on_and_the_old_primary_cannot_come_back() {
    let rig = Rig::new(1);
    let store = rig.open();
    let mut old = rig.writer(&store, 1, MIB);
    // The old primary sent more than the standby had.
    rig.append_and_flush(&mut old, SWITCH + 5000);
    drop(old);
    let refused = store.open_writer(&rig.name, &Rig::request(2, 3 * MIB)).unwrap_err();
    let none = OpenRefusal::NoHistory(tli(2));
    assert!(matches!(refused, OpenError::Refused { refusal, .. } if refusal == none));
    store.put_history(&rig.name, tli(2), &child().0).unwrap();
    let mut new = rig.writer(&store, 2, 3 * MIB);
    assert_eq!(store.unsealed(&rig.name).len(), 2, "no byte of timeline 2 is durable yet");
    append_child(&rig, &mut new, 5 * MIB).unwrap();
    new.flush().unwrap();
    let partial = WalFile::Partial(segment(1, 3));
    assert!(new.take_finished().contains(&partial));
    drop(new);
    let refused = store.open_writer(&rig.name, &Rig::request(1, SWITCH + 5000)).unwrap_err();
    let stale = OpenRefusal::Stale { newest: tli(2), found: tli(1) };
    assert!(matches!(refused, OpenError::Refused { refusal, .. } if refusal == stale));
    for file in store.unsealed(&rig.name) {
        store.seal(&rig.name, file).unwrap();
    }
    let stored: Vec<String> =
        store.list(&rig.name).unwrap().iter().map(|s| s.file.to_string()).collect();
    let expected = [
        "000000010000000000000001",
        "000000010000000000000002",
        "000000020000000000000003",
        "000000020000000000000004",
        "000000010000000000000003.partial",
        "00000002.history",
    ];
    assert_eq!(stored, expected);
    assert_eq!(rig.read(&store, partial), rig.bytes(3 * MIB, SWITCH + 5000));
    let asked_whole = rig.read(&store, WalFile::Segment(segment(1, 3)));
    assert_eq!(asked_whole.len() as u64, SWITCH + 5000 - 3 * MIB);
    assert_eq!(rig.read(&store, WalFile::History(tli(2))), child().0);
    rig.check_readable(&store, &child().1);
    drop(store);
    let store = rig.open();
    assert_eq!(store.positions(&rig.name)[0].flushed, at(SWITCH + 5000), "from the partial file");
    assert_eq!(store.positions(&rig.name)[0].sealed, at(SWITCH + 5000));
    assert_eq!(store.unsealed(&rig.name), []);
}

#[test]
fn a_fence_lets_the_newer_timeline_in_at_once() {
    let rig = Rig::new(2);
    let store = rig.open();
    let mut old = rig.writer(&store, 1, MIB);
    rig.append_and_flush(&mut old, SWITCH);
    store.put_history(&rig.name, tli(2), &child().0).unwrap();
    store.fence(&rig.name);
    let mut new = rig.writer(&store, 2, 3 * MIB);
    assert_eq!(rig.append(&mut old, SWITCH + 100).unwrap_err().kind, Kind::Conflict);
    append_child(&rig, &mut new, SWITCH + 100).unwrap();
    new.flush().unwrap();
    rig.check_readable(&store, &child().1);
}

#[test]
fn a_history_is_kept_and_another_of_the_same_timeline_is_refused() {
    let rig = Rig::new(3);
    let store = rig.open();
    store.put_history(&rig.name, tli(2), &child().0).unwrap();
    store.put_history(&rig.name, tli(2), &child().0).unwrap();
    let other = b"1\t0/5000000\tanother promotion\n";
    assert_eq!(store.put_history(&rig.name, tli(2), other).unwrap_err().kind, Kind::Conflict);
    for bad in [&b""[..], b"x", b"3\t0/1\tx\n"] {
        assert_eq!(store.put_history(&rig.name, tli(3), bad).unwrap_err().kind, Kind::Invalid);
    }
    assert_eq!(store.history(&rig.name, tli(2)).unwrap(), child().1);
    assert_eq!(store.history(&rig.name, tli(3)).unwrap_err().kind, Kind::NotFound);
    assert_eq!(store.history(&rig.name, tli(1)).unwrap(), root_history());
    drop(store);
    assert_eq!(rig.open().history(&rig.name, tli(2)).unwrap(), child().1);
}

#[test]
fn a_gap_is_recorded_and_the_segment_before_it_becomes_partial() {
    let rig = Rig::new(4);
    let store = rig.open();
    let mut writer = rig.writer(&store, 1, MIB);
    rig.append_and_flush(&mut writer, 2 * MIB + 1234);
    drop(writer);
    let gap = GapDeclaration {
        from: at(2 * MIB + 1234),
        to: at(9 * MIB),
        reason: "slot lost WAL".into(),
    };
    let request = OpenRequest { gap: Some(gap), ..Rig::request(1, 9 * MIB) };
    let mut writer = store.open_writer(&rig.name, &request).unwrap();
    let partial = WalFile::Partial(segment(1, 2));
    assert_eq!(writer.take_finished(), [partial]);
    rig.append_and_flush(&mut writer, 9 * MIB + 10);
    drop(writer);
    store.seal(&rig.name, partial).unwrap();
    drop(store);
    let store = rig.open();
    assert_eq!(store.problems(&rig.name), Vec::<String>::new());
    let gaps = store.gaps(&rig.name);
    assert_eq!(gaps.len(), 1);
    assert_eq!((gaps[0].from, gaps[0].to), (at(2 * MIB + 1234), at(9 * MIB)));
    assert_eq!((gaps[0].reason.as_str(), gaps[0].recorded_unix), ("slot lost WAL", 1.5));
    assert_eq!(store.positions(&rig.name)[0].flushed, at(9 * MIB + 10));
    assert_eq!(rig.read(&store, partial), rig.bytes(2 * MIB, 2 * MIB + 1234));
    rig.check_readable(&store, &root_history());
}

#[test]
fn what_a_new_timeline_lacks_is_refused_by_name_and_accepted_as_a_gap() {
    let rig = Rig::new(5);
    let store = rig.open();
    let mut old = rig.writer(&store, 1, MIB);
    rig.append_and_flush(&mut old, 2 * MIB + 99);
    drop(old);
    store.put_history(&rig.name, tli(2), &child().0).unwrap();
    let refused = store.open_writer(&rig.name, &Rig::request(2, 3 * MIB)).unwrap_err();
    let (from, to) = (at(2 * MIB + 99), at(3 * MIB));
    let missing = OpenRefusal::Missing { timeline: tli(1), from, to };
    assert!(matches!(refused, OpenError::Refused { refusal, .. } if refusal == missing));
    let gap = GapDeclaration { from, to, reason: "gone".into() };
    let request = OpenRequest { gap: Some(gap), ..Rig::request(2, 3 * MIB) };
    drop(store.open_writer(&rig.name, &request).unwrap());
    // The first answer was lost: the same request again, or without the gap, means the same stream.
    drop(store.open_writer(&rig.name, &request).unwrap());
    let mut writer = rig.writer(&store, 2, 3 * MIB);
    append_child(&rig, &mut writer, 4 * MIB).unwrap();
    writer.flush().unwrap();
    assert_eq!(store.gaps(&rig.name).len(), 1);
    let partial = WalFile::Partial(segment(1, 2));
    assert!(store.unsealed(&rig.name).contains(&partial));
}
