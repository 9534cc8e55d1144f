//! Requests that are refused without writing anything: wrong system, wrong position, wrong bytes, a
//! second writer.

use super::*;
use klio_pg::SegmentSize;

#[test]
fn another_system_another_segment_size_and_an_old_postgres_are_refused() {
    let rig = Rig::new(1);
    let store = rig.open();
    let pinned = rig.wal.pinned();
    let other = Pinned { system_identifier: 78, ..pinned };
    let error = store.pin(&rig.name, other).unwrap_err();
    assert_eq!(error.kind, Kind::Conflict);
    assert!(error.to_string().contains("expected system identifier 77, found 78"), "{error}");
    let other = Pinned { segment_size: SegmentSize::new(16 << 20).unwrap(), ..pinned };
    let error = store.pin(&rig.name, other).unwrap_err();
    assert!(
        error.to_string().contains("expected WAL segment size 1048576, found 16777216"),
        "{error}"
    );
    let other = Pinned { postgres_version: 140_011, ..pinned };
    assert_eq!(store.pin(&"old".parse().unwrap(), other).unwrap_err().kind, Kind::Invalid);
    assert_eq!(store.clusters(), std::slice::from_ref(&rig.name));
    let newer = Pinned { postgres_version: 170_005, ..pinned };
    store.pin(&rig.name, newer).unwrap();
    drop(store);
    let store = rig.try_open().unwrap();
    assert_eq!(store.pinned(&rig.name), Some(newer));
}

#[test]
fn a_second_server_on_the_same_directory_is_refused() {
    let rig = Rig::new(1);
    let _store = rig.open();
    assert_eq!(rig.try_open().unwrap_err().kind, Kind::Conflict);
}

#[test]
fn bytes_that_jump_back_or_ahead_are_refused_and_nothing_is_written() {
    let rig = Rig::new(1);
    let store = rig.open();
    let mut writer = rig.writer(&store, 1, MIB);
    rig.append_and_flush(&mut writer, MIB + 10_000);
    let before = rig.disk.writes_and_syncs();
    for start in [MIB, MIB + 9999, MIB + 10_001, 5 * MIB, 0] {
        let error = writer.append(at(start), &rig.bytes(start, start + 10)).unwrap_err();
        assert_eq!(error.kind, Kind::Invalid);
        assert!(error.to_string().contains("expected WAL from 0/102710 on"), "{error}");
    }
    assert_eq!(rig.disk.writes_and_syncs(), before);
    rig.append_and_flush(&mut writer, MIB + 20_000);
    rig.check_readable(&store, &root_history());
}

#[test]
fn a_corrupt_page_header_is_refused_with_all_of_its_append() {
    let rig = Rig::new(1);
    let store = rig.open();
    let mut writer = rig.writer(&store, 1, MIB);
    // Ends inside a page header, which the checker must see completely nevertheless.
    rig.append_and_flush(&mut writer, MIB + 8192 + 10);
    let before = rig.disk.writes_and_syncs();
    let good = rig.bytes(MIB + 8192 + 10, 3 * MIB);
    for wrong in [0, 5 * 8192 - 10, MIB as usize - 8192 - 10 + 26] {
        let mut bad = good.clone();
        bad[wrong] ^= 0x40;
        let error = writer.append(at(MIB + 8192 + 10), &bad).unwrap_err();
        assert_eq!(error.kind, Kind::Invalid, "{wrong}");
    }
    assert_eq!(rig.disk.writes_and_syncs(), before);
    writer.append(at(MIB + 8192 + 10), &good).unwrap();
    writer.flush().unwrap();
    rig.check_readable(&store, &root_history());
}

#[test]
fn a_page_header_cut_by_a_reconnect_is_still_checked() {
    for offset in [1, 12, 23, 24, 39, 40] {
        let rig = Rig::new(1);
        let store = rig.open();
        let mut writer = rig.writer(&store, 1, MIB);
        rig.append_and_flush(&mut writer, 2 * MIB + offset);
        drop(writer);
        let mut writer = rig.writer(&store, 1, 2 * MIB + offset);
        let mut bad = rig.bytes(2 * MIB + offset, 2 * MIB + 9000);
        if offset <= 39 {
            bad[39 - offset as usize] ^= 1;
            assert_eq!(writer.append(at(2 * MIB + offset), &bad).unwrap_err().kind, Kind::Invalid);
        }
        rig.append_and_flush(&mut writer, 2 * MIB + 9000);
    }
}

#[test]
fn a_second_writer_is_refused_until_the_first_is_fenced_or_gone() {
    let rig = Rig::new(1);
    let store = rig.open();
    let mut first = rig.writer(&store, 1, MIB);
    rig.append_and_flush(&mut first, MIB + 100);
    rig.append(&mut first, MIB + 200).unwrap();
    let refused = store.open_writer(&rig.name, &Rig::request(1, MIB + 100)).unwrap_err();
    let present = OpenRefusal::WriterPresent { timeline: tli(1) };
    assert!(matches!(refused, OpenError::Refused { refusal, .. } if refusal == present));
    assert!(store.fence(&rig.name));
    assert!(first.is_fenced());
    let mut second = rig.writer(&store, 1, MIB + 100);
    // The old writer can do nothing any more, and dropping it does not end the new one.
    assert_eq!(rig.append(&mut first, MIB + 300).unwrap_err().kind, Kind::Conflict);
    assert_eq!(first.flush().unwrap_err().kind, Kind::Conflict);
    drop(first);
    rig.append_and_flush(&mut second, MIB + 5000);
    rig.check_readable(&store, &root_history());
    drop(second);
    assert!(!store.fence(&rig.name));
}

#[test]
fn a_cluster_that_was_never_pinned_has_nothing() {
    let rig = Rig::new(1);
    let store = rig.try_open().unwrap();
    let refused = store.open_writer(&rig.name, &Rig::request(1, MIB)).unwrap_err();
    assert!(matches!(refused, OpenError::Refused { refusal: OpenRefusal::NotPinned, .. }));
    let file = WalFile::Segment(segment(1, 1));
    assert_eq!(store.read(&rig.name, file).unwrap_err().kind, Kind::NotFound);
    assert_eq!(store.seal(&rig.name, file).unwrap_err().kind, Kind::NotFound);
    assert_eq!(store.positions(&rig.name), []);
}

#[test]
fn the_end_of_the_address_space_is_refused() {
    let rig = Rig::new(1);
    let store = rig.open();
    let start = u64::MAX - MIB + 1;
    let mut writer = rig.writer(&store, 1, start);
    let error = writer.append(at(start), &rig.bytes(start, start + 100)).unwrap_err();
    assert_eq!(error.kind, Kind::Invalid);
}
