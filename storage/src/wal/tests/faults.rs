//! Specific faults: a failed fsync, a full disk, and bugs of other archivers.

use super::*;

/// P3. As in pgmoneta, and "fsyncgate": a retried fsync reports success for bytes that are gone.
#[test]
fn a_failed_fsync_is_final_and_nothing_after_it_is_acknowledged() {
    for seed in 0..60 {
        let rig = Rig::new(seed);
        let store = rig.open();
        let mut writer = rig.writer(&store, 1, MIB);
        rig.append_and_flush(&mut writer, MIB + 3000);
        rig.append(&mut writer, MIB + 40_000).unwrap();
        rig.disk.fail_sync_after(0);
        assert_eq!(writer.flush().unwrap_err().kind, Kind::Poisoned);
        for _ in 0..2 {
            assert_eq!(writer.flush().unwrap_err().kind, Kind::Poisoned);
            assert_eq!(rig.append(&mut writer, MIB + 50_000).unwrap_err().kind, Kind::Poisoned);
        }
        assert_eq!(writer.flushed().lsn(), at(MIB + 3000));
        drop(writer);
        // What was acknowledged is still there, and the stream continues right behind it.
        let mut writer = rig.writer(&store, 1, MIB + 3000);
        rig.append_and_flush(&mut writer, MIB + 60_000);
        drop(writer);
        drop(store);
        rig.disk.restart(Restart::PowerLoss);
        let store = rig.open();
        assert_eq!(store.positions(&rig.name)[0].flushed, at(MIB + 60_000), "seed {seed}");
        rig.check_readable(&store, &root_history());
    }
}

/// P3: the process dies right after the failed fsync. The page cache still shows bytes that the disk does not have, and
/// these must not be acknowledged because they are visible.
#[test]
fn a_restart_after_a_failed_fsync_trusts_only_what_it_synced_itself() {
    for seed in 0..60 {
        let rig = Rig::new(seed);
        let store = rig.open();
        let mut writer = rig.writer(&store, 1, MIB);
        rig.append_and_flush(&mut writer, MIB + 3000);
        rig.append(&mut writer, MIB + 40_000).unwrap();
        rig.disk.fail_sync_after(0);
        writer.flush().unwrap_err();
        rig.disk.restart(Restart::Kill);
        drop((writer, store));
        let store = rig.open();
        let resumed = store.positions(&rig.name)[0].flushed;
        assert!(resumed >= at(MIB + 3000));
        drop(rig.writer(&store, 1, resumed.as_u64()));
        rig.disk.restart(Restart::PowerLoss);
        drop(store);
        let store = rig.open();
        assert!(store.positions(&rig.name)[0].flushed >= resumed, "seed {seed}");
        rig.check_readable(&store, &root_history());
    }
}

#[test]
fn a_failed_write_is_final_and_the_writer_opens_again() {
    for seed in 0..30 {
        let rig = Rig::new(seed);
        let store = rig.open();
        let mut writer = rig.writer(&store, 1, MIB);
        rig.append_and_flush(&mut writer, MIB + 3000);
        rig.disk.fail_write_after(0);
        assert_eq!(rig.append(&mut writer, MIB + 4000).unwrap_err().kind, Kind::Poisoned);
        assert_eq!(writer.flush().unwrap_err().kind, Kind::Poisoned);
        drop(writer);
        let mut writer = rig.writer(&store, 1, MIB + 3000);
        rig.append_and_flush(&mut writer, MIB + 3500);
        rig.disk.restart(Restart::PowerLoss);
        drop((writer, store));
        let store = rig.open();
        assert_eq!(store.positions(&rig.name)[0].flushed, at(MIB + 3500));
        rig.check_readable(&store, &root_history());
    }
}

/// Klio up to 0.0.20 and pgmoneta reported the position when the bytes were passed on. P1
#[test]
fn appended_bytes_are_not_reported_as_flushed() {
    let rig = Rig::new(1);
    let store = rig.open();
    let mut writer = rig.writer(&store, 1, MIB);
    rig.append(&mut writer, 2 * MIB + 5).unwrap();
    // The rotation had to sync the first segment; the second one is only written.
    assert_eq!(writer.flushed().lsn(), at(2 * MIB));
    assert_eq!(store.positions(&rig.name)[0].flushed, at(2 * MIB));
}

/// Klio reopened the partial segment with truncation, so acknowledged bytes vanished. P2
#[test]
fn a_reopen_never_truncates_what_was_acknowledged() {
    let rig = Rig::new(1);
    let store = rig.open();
    let file = WalFile::Segment(segment(1, 1));
    for end in [MIB + 1, MIB + 7000, MIB + 70_000, MIB + 300_000] {
        let start = store.positions(&rig.name).first().map_or(MIB, |p| p.flushed.as_u64());
        let mut writer = rig.writer(&store, 1, start);
        let before = start > MIB;
        if before {
            assert_eq!(rig.read(&store, file), rig.bytes(MIB, start));
        }
        rig.append_and_flush(&mut writer, end);
    }
    assert_eq!(rig.read(&store, file), rig.bytes(MIB, MIB + 300_000));
}

/// Klio renamed without fsync of the directory; the sealed file's name, and the segment with it, was lost. P1
#[test]
fn a_sealed_segment_and_its_name_survive_a_power_loss_right_after_sealing() {
    for seed in 0..60 {
        let rig = Rig::new(seed);
        let store = rig.open();
        let mut writer = rig.writer(&store, 1, MIB);
        rig.append_and_flush(&mut writer, 3 * MIB);
        let files = writer.take_finished();
        let sealed: Vec<Sealed> =
            files.iter().map(|file| store.seal(&rig.name, *file).unwrap()).collect();
        rig.disk.restart(Restart::PowerLoss);
        drop((writer, store));
        let store = rig.open();
        assert_eq!(rig.read(&store, files[0]), rig.bytes(MIB, 2 * MIB), "seed {seed}");
        // If the journals' names reappeared, they refer to files that nothing else may be written to.
        let mut writer = rig.writer(&store, 1, 3 * MIB);
        rig.append_and_flush(&mut writer, 6 * MIB);
        // They are then sealed a second time, to the same bytes.
        for (file, before) in files.iter().zip(&sealed) {
            assert_eq!(store.seal(&rig.name, *file).unwrap(), *before);
        }
        rig.check_readable(&store, &root_history());
    }
}

#[test]
fn a_full_disk_acknowledges_nothing_keeps_all_and_goes_on_when_space_returns() {
    for seed in 0..20 {
        let rig = Rig::new(seed);
        let store = rig.open();
        let mut writer = rig.writer(&store, 1, MIB);
        rig.append_and_flush(&mut writer, MIB + 200_000);
        let acked = writer.flushed();
        rig.disk.set_capacity(Some(rig.disk.used() + 2000));
        let error = loop {
            let to = writer.position().as_u64() + 60_000;
            match rig.append(&mut writer, to) {
                Ok(_) => {}
                Err(e) => break e,
            }
        };
        assert_eq!(error.kind, Kind::Full, "{error}");
        assert!(writer.flushed() == acked);
        assert_eq!(
            rig.read(&store, WalFile::Segment(segment(1, 1))),
            rig.bytes(MIB, MIB + 200_000),
            "reads go on"
        );
        // What was written can still be made durable; then the same writer continues.
        let written = writer.position();
        assert_eq!(writer.flush().unwrap().lsn(), written);
        let to = written.as_u64() + 60_000;
        assert_eq!(rig.append(&mut writer, to).unwrap_err().kind, Kind::Full);
        rig.disk.set_capacity(None);
        rig.append_and_flush(&mut writer, 4 * MIB);
        rig.disk.restart(Restart::PowerLoss);
        drop((writer, store));
        let store = rig.open();
        assert_eq!(store.positions(&rig.name)[0].flushed, at(4 * MIB), "seed {seed}");
        rig.check_readable(&store, &root_history());
    }
}

#[test]
fn recovery_without_space_still_serves_reads_and_succeeds_later() {
    for restart in [Restart::Kill, Restart::PowerLoss] {
        let rig = Rig::new(9);
        let store = rig.open();
        let mut writer = rig.writer(&store, 1, MIB);
        rig.append_and_flush(&mut writer, MIB + 500_000);
        drop((writer, store));
        rig.disk.restart(restart);
        rig.disk.set_capacity(Some(rig.disk.used()));
        let store = rig.try_open().unwrap();
        assert_eq!(store.problems(&rig.name).len(), 1);
        let file = WalFile::Segment(segment(1, 1));
        assert_eq!(rig.read(&store, file), rig.bytes(MIB, MIB + 500_000));
        let request = Rig::request(1, MIB + 500_000);
        let error = store.open_writer(&rig.name, &request).unwrap_err();
        assert!(matches!(error, OpenError::Failed(e) if e.kind == Kind::Full));
        rig.disk.set_capacity(None);
        let mut writer = rig.writer(&store, 1, MIB + 500_000);
        assert_eq!(store.problems(&rig.name), Vec::<String>::new());
        rig.append_and_flush(&mut writer, MIB + 600_000);
        rig.check_readable(&store, &root_history());
    }
}

#[test]
fn sealing_on_a_full_disk_loses_nothing_and_succeeds_later() {
    let rig = Rig::new(3);
    let store = rig.open();
    let mut writer = rig.writer(&store, 1, MIB);
    rig.append_and_flush(&mut writer, 2 * MIB);
    let file = writer.take_finished()[0];
    rig.disk.set_capacity(Some(rig.disk.used() + 10_000));
    assert_eq!(store.seal(&rig.name, file).unwrap_err().kind, Kind::Full);
    assert_eq!(rig.read(&store, file), rig.bytes(MIB, 2 * MIB));
    assert_eq!(store.unsealed(&rig.name), [file]);
    assert_eq!(store.problems(&rig.name).len(), 1);
    rig.disk.set_capacity(None);
    store.seal(&rig.name, file).unwrap();
    assert_eq!(rig.read(&store, file), rig.bytes(MIB, 2 * MIB));
    assert_eq!(store.problems(&rig.name), Vec::<String>::new());
}

/// The power fails while the file of a sealed segment becomes the next journal: the old name may reappear and refer to
/// the same bytes.
#[test]
fn a_recycled_journal_is_never_taken_for_the_segment_it_was() {
    for seed in 0..200 {
        let rig = Rig::new(seed);
        let store = rig.open();
        let mut writer = rig.writer(&store, 1, MIB);
        rig.append_and_flush(&mut writer, 2 * MIB);
        store.seal(&rig.name, writer.take_finished()[0]).unwrap();
        rig.append_and_flush(&mut writer, 3 * MIB);
        store.seal(&rig.name, writer.take_finished()[0]).unwrap();
        // These bytes go to the recycled files.
        rig.append_and_flush(&mut writer, 3 * MIB + (seed * 7919) % MIB + 1);
        let acked = writer.flushed().lsn();
        rig.append(&mut writer, acked.as_u64() + 20_000).unwrap();
        rig.disk.restart(Restart::PowerLoss);
        drop((writer, store));
        let store = rig.open();
        assert_eq!(store.problems(&rig.name), Vec::<String>::new());
        let flushed = store.positions(&rig.name)[0].flushed;
        assert!(flushed >= acked, "seed {seed}");
        rig.check_readable(&store, &root_history());
        // New journals must not use a file that an old name still refers to.
        let mut writer = rig.writer(&store, 1, flushed.as_u64());
        rig.append_and_flush(&mut writer, 6 * MIB);
        for file in store.unsealed(&rig.name) {
            store.seal(&rig.name, file).unwrap();
        }
        rig.check_readable(&store, &root_history());
    }
}

/// P1, P3: the fsync of a directory fails after the rename of a small file, the process dies, and the next one sees the
/// file. WAL must not be acknowledged because of a name that is not durable.
#[test]
fn a_small_file_that_is_only_seen_is_written_again_before_wal_relies_on_it() {
    for seed in 0..60 {
        for failing in 0..8 {
            let rig = Rig::new(seed);
            let store = rig.try_open().unwrap();
            rig.disk.fail_sync_after(failing);
            let _ = store.pin(&rig.name, rig.wal.pinned());
            let _ = store.put_history(&rig.name, tli(2), &timeline::child().0);
            drop(store);
            rig.disk.restart(Restart::Kill);
            let store = rig.open();
            store.put_history(&rig.name, tli(2), &timeline::child().0).unwrap();
            let mut writer = rig.writer(&store, 2, 3 * MIB);
            timeline::append_child(&rig, &mut writer, 3 * MIB + 500).unwrap();
            writer.flush().unwrap();
            rig.disk.restart(Restart::PowerLoss);
            drop((writer, store));
            let store = rig.try_open().unwrap();
            assert_eq!(store.problems(&rig.name), Vec::<String>::new(), "{seed} {failing}");
            assert_eq!(store.history(&rig.name, tli(2)).unwrap(), timeline::child().1);
            rig.check_readable(&store, &timeline::child().1);
            assert_eq!(store.positions(&rig.name)[0].flushed, at(3 * MIB + 500));
        }
    }
}
