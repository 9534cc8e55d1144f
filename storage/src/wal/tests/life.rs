//! A segment's life: received, finished, sealed, read, recycled.

use super::*;

#[test]
fn what_is_flushed_can_be_read_while_it_is_received_and_nothing_else() {
    let rig = Rig::new(1);
    let store = rig.open();
    let mut writer = rig.writer(&store, 1, 3 * MIB);
    let file = WalFile::Segment(segment(1, 3));
    assert_eq!(store.read(&rig.name, file).unwrap_err().kind, Kind::NotFound);
    rig.append(&mut writer, 3 * MIB + 100).unwrap();
    assert_eq!(store.read(&rig.name, file).unwrap_err().kind, Kind::NotFound);
    writer.flush().unwrap();
    rig.append(&mut writer, 3 * MIB + 50_000).unwrap();
    assert_eq!(rig.read(&store, file), rig.bytes(3 * MIB, 3 * MIB + 100));
    let reader = store.read(&rig.name, file).unwrap();
    assert_eq!(writer.flush().unwrap().lsn(), at(3 * MIB + 50_000));
    assert_eq!(store.plain_bytes(reader).unwrap().len(), 100, "a reader keeps its end");
    assert_eq!(rig.read(&store, file), rig.bytes(3 * MIB, 3 * MIB + 50_000));
    let position = store.positions(&rig.name)[0];
    assert_eq!((position.start, position.sealed), (at(3 * MIB), at(3 * MIB)));
    assert_eq!(position.flushed, at(3 * MIB + 50_000));
}

#[test]
fn batches_of_any_size_become_the_segments_they_were() {
    let rig = Rig::new(2);
    let store = rig.open();
    let mut writer = rig.writer(&store, 1, 3 * MIB);
    let (mut end, mut step) = (3 * MIB, 1);
    while end < 6 * MIB {
        end += step;
        step = (step * 7 + 13) % 300_001;
        rig.append(&mut writer, end).unwrap();
        if step % 3 == 0 {
            writer.flush().unwrap();
        }
    }
    writer.flush().unwrap();
    let finished: Vec<WalFile> = (3..6).map(|n| WalFile::Segment(segment(1, n))).collect();
    assert_eq!(writer.take_finished(), finished);
    assert_eq!(writer.take_finished(), []);
    assert_eq!(store.unsealed(&rig.name), finished);
    for file in finished {
        let sealed = store.seal(&rig.name, file).unwrap();
        assert_eq!(store.seal(&rig.name, file).unwrap(), sealed, "sealing is idempotent");
        let Found::Stored { size, plain_size, .. } = store.read(&rig.name, file).unwrap() else {
            panic!("expected a stored file");
        };
        assert_eq!((size, plain_size), (sealed.size, MIB));
    }
    rig.check_readable(&store, &root_history());
    assert_eq!(store.list(&rig.name).unwrap().len(), 3);
    assert_eq!(store.positions(&rig.name)[0].sealed, at(6 * MIB));
}

#[test]
fn an_append_may_span_segments_and_a_restart_goes_on_exactly() {
    let rig = Rig::new(3);
    let store = rig.open();
    let mut writer = rig.writer(&store, 1, MIB);
    rig.append_and_flush(&mut writer, 4 * MIB + 77);
    drop(writer);
    drop(store);
    let store = rig.open();
    assert_eq!(store.problems(&rig.name), Vec::<String>::new());
    assert_eq!(store.positions(&rig.name)[0].flushed, at(4 * MIB + 77));
    let mut writer = rig.writer(&store, 1, 4 * MIB + 77);
    rig.append_and_flush(&mut writer, 5 * MIB);
    rig.check_readable(&store, &root_history());
    assert_eq!(store.unsealed(&rig.name).len(), 4);
}

#[test]
fn a_reconnect_without_restart_goes_on_and_gives_up_only_what_was_not_flushed() {
    let rig = Rig::new(4);
    let store = rig.open();
    let mut writer = rig.writer(&store, 1, MIB);
    rig.append_and_flush(&mut writer, MIB + 5000);
    rig.append(&mut writer, MIB + 9000).unwrap();
    drop(writer);
    let mut writer = rig.writer(&store, 1, MIB + 5000);
    assert_eq!(writer.flushed().lsn(), at(MIB + 5000));
    rig.append_and_flush(&mut writer, MIB + 5001);
    drop(writer);
    drop(store);
    rig.disk.restart(Restart::Kill);
    let store = rig.open();
    assert_eq!(store.positions(&rig.name)[0].flushed, at(MIB + 5001));
    rig.check_readable(&store, &root_history());
}

/// One write and one sync: what a single commit waits for.
#[test]
fn a_small_append_and_flush_is_one_write_and_one_sync() {
    for rig in [Rig::new(5), Rig::encrypted(5)] {
        let store = rig.open();
        let mut writer = rig.writer(&store, 1, MIB);
        rig.append_and_flush(&mut writer, MIB + 100);
        let (writes, syncs) = rig.disk.writes_and_syncs();
        rig.append_and_flush(&mut writer, MIB + 8292);
        assert_eq!(rig.disk.writes_and_syncs(), (writes + 1, syncs + 1));
        writer.flush().unwrap();
        assert_eq!(rig.disk.writes_and_syncs(), (writes + 1, syncs + 1), "nothing new, no sync");
    }
}

#[test]
fn steady_state_recycles_journals_and_changes_no_file_length() {
    let rig = Rig::new(6);
    let store = rig.open();
    let mut writer = rig.writer(&store, 1, MIB);
    let mut lengths = Vec::new();
    for end in (MIB..12 * MIB).step_by(128 << 10).skip(1) {
        rig.append_and_flush(&mut writer, end);
        writer.preparation().map_or(Ok(()), Preparation::run).unwrap();
        for file in writer.take_finished() {
            store.seal(&rig.name, file).unwrap();
        }
        lengths.push(rig.disk.used());
    }
    let names = rig.disk.list(&Rig::path("wal/00000001")).unwrap();
    let open = names.iter().filter(|n| n.name.ends_with(".open")).count();
    assert!(open <= 2, "{names:?}");
    // From here on only sealed files are added: eight steps per segment, one new file.
    let steady = &lengths[40..80];
    let growths = steady.windows(2).filter(|w| w[1] > w[0]).count();
    assert!(growths <= 5 + 1, "{growths}");
    rig.check_readable(&store, &root_history());
}

/// P1. Found by the restore proof on a busy machine: the preparation ran after the writer had created the journal and
/// before it was registered, and created it again. The next preparation removed the file, with a mebibyte of
/// acknowledged WAL.
#[test]
fn a_preparation_that_comes_late_leaves_the_writers_journal_alone() {
    let rig = Rig::new(31);
    let store = rig.open();
    let mut writer = rig.writer(&store, 1, MIB);
    rig.append_and_flush(&mut writer, 2 * MIB);
    let cluster = store.need(&rig.name, Op::Open).unwrap();
    // The first half of what the writer does at the start of a new segment.
    let (journal, entry) = cluster.next_journal(tli(1), at(2 * MIB)).unwrap();
    cluster.prepare(tli(1), at(2 * MIB), 0).unwrap();
    assert!(lock(&cluster.state).prepared.is_empty(), "made a second time");
    assert_eq!((&journal.path, journal.header.start), (&entry.path, at(2 * MIB)));
    assert_eq!(lock(&cluster.state).journal(segment(1, 2)).unwrap().path, entry.path);
}

#[test]
fn a_preparation_that_comes_after_its_segment_was_sealed_makes_nothing() {
    let rig = Rig::new(32);
    let store = rig.open();
    let mut writer = rig.writer(&store, 1, MIB);
    rig.append_and_flush(&mut writer, 2 * MIB - 9);
    let late = writer.preparation().unwrap();
    rig.append_and_flush(&mut writer, 3 * MIB);
    store.seal(&rig.name, WalFile::Segment(segment(1, 2))).unwrap();
    late.run().unwrap();
    let open = Rig::path("wal/00000001/000000010000000000000002.open");
    assert!(rig.disk.stat(&open).is_err(), "a journal of a sealed segment");
    rig.append_and_flush(&mut writer, 5 * MIB);
    rig.check_readable(&store, &root_history());
}

/// The same with real threads, as in the server.
#[test]
fn preparations_on_another_thread_cost_no_byte() {
    let rig = Rig::new(33);
    let store = rig.open();
    let mut writer = rig.writer(&store, 1, MIB);
    std::thread::scope(|scope| {
        for end in (MIB..60 * MIB).step_by(512 << 10).skip(1) {
            rig.append_and_flush(&mut writer, end);
            if let Some(preparation) = writer.preparation() {
                scope.spawn(move || preparation.run().unwrap());
            }
        }
    });
    rig.check_readable(&store, &root_history());
}

#[test]
fn a_journal_that_is_being_read_is_not_recycled_under_the_reader() {
    let rig = Rig::new(7);
    let store = rig.open();
    let mut writer = rig.writer(&store, 1, MIB);
    rig.append_and_flush(&mut writer, 2 * MIB + 10);
    let file = WalFile::Segment(segment(1, 1));
    let reader = store.read(&rig.name, file).unwrap();
    assert!(matches!(reader, Found::Open(_)));
    store.seal(&rig.name, file).unwrap();
    rig.append_and_flush(&mut writer, 5 * MIB);
    assert_eq!(store.plain_bytes(reader).unwrap(), rig.bytes(MIB, 2 * MIB));
}

#[test]
fn a_segment_still_being_received_is_not_sealed() {
    let rig = Rig::new(8);
    let store = rig.open();
    let mut writer = rig.writer(&store, 1, MIB);
    rig.append_and_flush(&mut writer, 2 * MIB - 1);
    assert_eq!(store.unsealed(&rig.name), []);
    for file in [WalFile::Segment(segment(1, 1)), WalFile::Partial(segment(1, 1))] {
        assert_eq!(store.seal(&rig.name, file).unwrap_err().kind, Kind::Invalid);
    }
    let absent = WalFile::Segment(segment(1, 9));
    assert_eq!(store.seal(&rig.name, absent).unwrap_err().kind, Kind::NotFound);
}

#[test]
fn two_threads_may_append_and_flush_at_once() {
    let rig = Rig::new(9);
    let store = rig.open();
    let mut writer = rig.writer(&store, 1, MIB);
    let flusher = writer.flusher();
    std::thread::scope(|scope| {
        let flushing = scope.spawn(move || {
            let mut last = flusher.flush().unwrap();
            while last.lsn() < at(4 * MIB) {
                let next = flusher.flush().unwrap();
                assert!(next >= last);
                last = next;
            }
        });
        for end in (MIB..=4 * MIB).step_by(64 << 10).skip(1) {
            rig.append(&mut writer, end).unwrap();
        }
        flushing.join().unwrap();
    });
    assert_eq!(writer.take_finished().len(), 3);
    rig.check_readable(&store, &root_history());
}

#[test]
fn the_answer_not_found_is_definitive_only_when_the_cluster_is_readable() {
    let rig = Rig::new(10);
    let store = rig.open();
    let mut writer = rig.writer(&store, 1, MIB);
    rig.append_and_flush(&mut writer, 3 * MIB);
    store.seal(&rig.name, WalFile::Segment(segment(1, 1))).unwrap();
    drop(writer);
    drop(store);
    rig.disk.flip_bit(&Rig::path(&format!("wal/00000001/{}.open", segment(1, 2))), 20, 1).unwrap();
    let store = rig.try_open().unwrap();
    assert_eq!((store.problems(&rig.name).len(), store.damaged(&rig.name).len()), (1, 1));
    // P7: the byte may exist, but that cannot be decided.
    let error = store.read(&rig.name, WalFile::Segment(segment(1, 2))).unwrap_err();
    assert_eq!(error.kind, Kind::Corrupt, "{error}");
    assert_eq!(rig.read(&store, WalFile::Segment(segment(1, 1))), rig.bytes(MIB, 2 * MIB));
    let refused = store.open_writer(&rig.name, &Rig::request(1, 3 * MIB)).unwrap_err();
    assert!(matches!(refused, OpenError::Refused { .. }), "P2: {refused}");
    drop(rig.writer(&store, 1, 2 * MIB));
    // WAL5: another cluster is not affected.
    let other: ClusterName = "other".parse().unwrap();
    store.pin(&other, rig.wal.pinned()).unwrap();
    let mut writer = store.open_writer(&other, &Rig::request(1, MIB)).unwrap();
    rig.append_and_flush(&mut writer, 2 * MIB);
}

#[test]
fn a_changed_byte_in_a_journal_is_never_sealed_or_read_as_wal() {
    let rig = Rig::new(11);
    let store = rig.open();
    let mut writer = rig.writer(&store, 1, MIB);
    rig.append_and_flush(&mut writer, 2 * MIB);
    let path = Rig::path(&format!("wal/00000001/{}.open", segment(1, 1)));
    rig.disk.flip_bit(&path, 10_000, 3).unwrap();
    let file = WalFile::Segment(segment(1, 1));
    assert_eq!(store.seal(&rig.name, file).unwrap_err().kind, Kind::Corrupt);
    assert_eq!(store.problems(&rig.name).len(), 1);
    let found = store.read(&rig.name, file).unwrap();
    assert_eq!(store.plain_bytes(found).unwrap_err().kind, Kind::Corrupt);
    rig.disk.flip_bit(&path, 10_000, 3).unwrap();
    store.seal(&rig.name, file).unwrap();
    assert_eq!(store.problems(&rig.name), Vec::<String>::new());
    assert_eq!(rig.read(&store, file), rig.bytes(MIB, 2 * MIB));
}

/// P7, P6: synced bytes that the medium lost are a loss. They are not the end of WAL, and the journal is not sealed.
#[test]
fn a_journal_that_lost_bytes_before_others_is_neither_a_partial_segment_nor_absent() {
    for flipped in [10, 500_000] {
        let rig = Rig::new(12);
        let store = rig.open();
        let mut writer = rig.writer(&store, 1, MIB);
        for end in (MIB..=4 * MIB).step_by(128 << 10).skip(1) {
            rig.append_and_flush(&mut writer, end);
        }
        drop((writer, store));
        let file = WalFile::Segment(segment(1, 2));
        let path = Rig::path(&format!("wal/00000001/{}.open", segment(1, 2)));
        let offset = 4096 + flipped.min(rig.disk.stat(&path).unwrap().size / 4);
        rig.disk.flip_bit(&path, offset, 1).unwrap();
        let store = rig.open();
        assert_eq!(store.problems(&rig.name).len(), 1);
        assert_eq!(store.read(&rig.name, file).unwrap_err().kind, Kind::Corrupt);
        store.put_history(&rig.name, tli(2), b"1\t0/400000\tx\n").unwrap();
        let mut writer = rig.writer(&store, 2, 4 * MIB);
        let history = store.history(&rig.name, tli(2)).unwrap();
        writer.append(at(4 * MIB), &rig.wal.bytes(&history, at(4 * MIB), at(5 * MIB))).unwrap();
        writer.flush().unwrap();
        for file in store.unsealed(&rig.name) {
            store.seal(&rig.name, file).unwrap();
        }
        assert!(rig.disk.stat(&path).is_ok(), "what is left is kept");
        assert_eq!(store.read(&rig.name, file).unwrap_err().kind, Kind::Corrupt);
        let after = WalFile::Segment(segment(1, 3));
        assert_eq!(rig.read(&store, after), rig.bytes(3 * MIB, 4 * MIB));
    }
}
