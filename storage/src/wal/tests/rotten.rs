//! Sealed files that rot, and journals that were zeroed: set aside, reported, requested again, and healed.

use super::*;

const DIRECTORY: &str = "wal/00000001";

/// Segments 2 to 4 of timeline 1: the first two sealed, and a part of the third.
fn sealed(rig: &Rig) -> (WalStore, Writer) {
    let store = rig.open();
    let mut writer = rig.writer(&store, 1, 2 * MIB);
    for to in [2 * MIB + 700, 3 * MIB, 4 * MIB, 4 * MIB + 700] {
        rig.append_and_flush(&mut writer, to);
    }
    for number in [2, 3] {
        store.seal(&rig.name, file(number)).unwrap();
    }
    (store, writer)
}

fn file(number: u64) -> WalFile {
    WalFile::Segment(segment(1, number))
}

fn stored(rig: &Rig, file: WalFile) -> PathBuf {
    let form = if rig.at_rest.is_on() { Form::Age } else { Form::Plain };
    Rig::path("wal").join(file.relative_in(form))
}

fn rot(rig: &Rig, file: WalFile) {
    let path = stored(rig, file);
    let size = rig.disk.stat(&path).unwrap().size;
    rig.disk.flip_bit(&path, size * 2 / 3, 3).unwrap();
}

fn aside(rig: &Rig) -> Vec<String> {
    let names = rig.disk.list(&Rig::path(DIRECTORY)).unwrap().into_iter().map(|entry| entry.name);
    names.filter(|name| name.contains(".damaged-")).collect()
}

fn hole(number: u64) -> Hole {
    Hole { timeline: tli(1), start: at(number * MIB), end: at((number + 1) * MIB) }
}

fn fill(rig: &Rig, store: &WalStore, number: u64) -> Result<WalFile, Error> {
    let mut refill = store.refill(&rig.name, tli(1), at(number * MIB))?;
    refill.push(&rig.bytes(number * MIB, (number + 1) * MIB))?;
    refill.finish()
}

fn flushed(store: &WalStore, rig: &Rig) -> Lsn {
    store.positions(&rig.name)[0].flushed
}

/// Before, it stayed a hole forever, and eviction and verification failed on it forever.
#[test]
fn a_sealed_file_that_rotted_is_put_aside_and_made_anew() {
    for rig in [Rig::new(1), Rig::encrypted(1)] {
        let (store, writer) = sealed(&rig);
        assert!(!store.doubt(&rig.name, file(3)).unwrap(), "what is good stays");
        rot(&rig, file(3));
        assert!(store.doubt(&rig.name, file(3)).unwrap());
        drop(writer);
        let mut store = store;
        // However often the server starts.
        for _ in 0..3 {
            assert_eq!(flushed(&store, &rig), at(4 * MIB + 700), "nothing goes back");
            assert_eq!(store.holes(&rig.name), [hole(3)]);
            let lost = store.damaged(&rig.name);
            assert_eq!((lost.len(), lost[0].from, lost[0].to), (1, at(3 * MIB), at(4 * MIB)));
            assert_eq!(store.damaged_journals(&rig.name), 1);
            let problems = store.problems(&rig.name);
            assert_eq!(problems.len(), 1, "{problems:?}");
            assert!(problems[0].contains("as long as PostgreSQL has it"), "{problems:?}");
            assert_eq!(store.read(&rig.name, file(3)).unwrap_err().kind, Kind::Corrupt, "P7");
            assert!(store.list(&rig.name).unwrap().iter().all(|stored| stored.file != file(3)));
            assert_eq!(store.unsealed(&rig.name), []);
            assert_eq!(aside(&rig).len(), 1);
            drop(store);
            rig.disk.restart(Restart::PowerLoss);
            store = rig.open();
        }
        let mut writer = rig.writer(&store, 1, 4 * MIB + 700);
        rig.append_and_flush(&mut writer, 4 * MIB + 900);
        assert_eq!(store.holes(&rig.name), [hole(3)], "what is streamed heals nothing before it");
        assert_eq!(fill(&rig, &store, 3).unwrap(), file(3));
        assert_eq!((store.holes(&rig.name), store.problems(&rig.name)), (vec![], vec![]));
        store.seal(&rig.name, file(3)).unwrap();
        drop((writer, store));
        rig.disk.restart(Restart::PowerLoss);
        let store = rig.open();
        assert_eq!((store.damaged(&rig.name), store.problems(&rig.name)), (vec![], vec![]));
        rig.check_readable(&store, &root_history());
        assert_eq!(aside(&rig).len(), 1, "never removed by us");
        assert!(!store.doubt(&rig.name, file(3)).unwrap());
    }
}

/// Only errors of the medium count as damage: a program that has run out of file handles has lost nothing.
#[test]
fn only_what_the_medium_does_not_give_back_is_taken_for_damaged() {
    const EMFILE: i32 = 24;
    for rig in [Rig::new(2), Rig::encrypted(2)] {
        let (store, _writer) = sealed(&rig);
        rig.disk.fail_reads_with(&stored(&rig, file(3)), EMFILE).unwrap();
        assert!(store.doubt(&rig.name, file(3)).is_err());
        assert!(aside(&rig).is_empty() && store.damaged(&rig.name).is_empty());
        rig.disk.clear_faults();
        rig.disk.fail_reads(&stored(&rig, file(3))).unwrap();
        assert!(store.doubt(&rig.name, file(3)).unwrap());
        assert_eq!(aside(&rig).len(), 1);
    }
}

#[test]
fn a_good_copy_in_its_place_is_read_and_heals() {
    let rig = Rig::new(6);
    let (store, _writer) = sealed(&rig);
    let path = stored(&rig, file(3));
    let good = crate::disk::read_small(&rig.disk, &path, 2 * MIB).unwrap();
    let put = |bytes: &[u8]| durable::overwrite(&rig.disk, &path, bytes).unwrap();
    let mut bad = good.clone();
    bad[good.len() / 2] ^= 1;
    for number in 1..=3 {
        put(&bad);
        let read = store.read(&rig.name, file(3)).and_then(|found| store.plain_bytes(found));
        assert_eq!(read.unwrap_err().kind, Kind::Corrupt);
        assert!(store.doubt(&rig.name, file(3)).unwrap());
        assert_eq!((aside(&rig).len(), store.damaged(&rig.name).len()), (number, 1));
        assert_eq!(store.read(&rig.name, file(3)).unwrap_err().kind, Kind::Corrupt);
    }
    put(&good);
    assert_eq!(rig.read(&store, file(3)), rig.bytes(3 * MIB, 4 * MIB));
    assert!(!store.doubt(&rig.name, file(3)).unwrap());
    assert_eq!((store.holes(&rig.name), store.problems(&rig.name)), (vec![], vec![]));
    rig.check_readable(&store, &root_history());
}

/// The last sealed file is rebuilt beside the stream, or by the stream after a restart with nothing behind it.
#[test]
fn the_last_sealed_file_of_a_timeline_comes_again_like_any_other() {
    for restarts in [false, true] {
        let rig = Rig::new(4);
        let store = rig.open();
        let mut writer = rig.writer(&store, 1, 2 * MIB);
        rig.append_and_flush(&mut writer, 3 * MIB);
        store.seal(&rig.name, file(2)).unwrap();
        rot(&rig, file(2));
        assert!(store.doubt(&rig.name, file(2)).unwrap());
        if !restarts {
            rig.append_and_flush(&mut writer, 3 * MIB + 10);
            fill(&rig, &store, 2).unwrap();
            store.seal(&rig.name, file(2)).unwrap();
            assert_eq!(store.problems(&rig.name), Vec::<String>::new());
            rig.check_readable(&store, &root_history());
            continue;
        }
        drop((writer, store));
        rig.disk.restart(Restart::PowerLoss);
        let store = rig.open();
        assert_eq!(flushed(&store, &rig), at(2 * MIB));
        let lost = store.damaged(&rig.name);
        assert_eq!((lost[0].from, lost[0].to), (at(2 * MIB), at(3 * MIB)), "not in silence");
        let slot_restart = Some(at(3 * MIB));
        let open = OpenRequest { slot_restart, ..Rig::request(1, 2 * MIB) };
        let mut writer = store.open_writer(&rig.name, &open).unwrap();
        rig.append_and_flush(&mut writer, 3 * MIB + 10);
        assert_eq!((store.damaged(&rig.name), store.problems(&rig.name)), (vec![], vec![]));
        rig.check_readable(&store, &root_history());
    }
}

/// The power may fail at any step: the file is in its place, or its WAL is known to be missing.
#[test]
fn a_crash_while_a_rotten_file_is_put_aside_loses_no_knowledge() {
    for crash in 0..12 {
        let rig = Rig::new(crash);
        let (store, writer) = sealed(&rig);
        rot(&rig, file(3));
        rig.disk.crash_after(crash);
        let found = store.doubt(&rig.name, file(3));
        drop((writer, store));
        rig.disk.restart(Restart::PowerLoss);
        let store = rig.open();
        assert_eq!(flushed(&store, &rig), at(4 * MIB + 700), "step {crash}");
        let there = rig.disk.stat(&stored(&rig, file(3))).is_ok();
        match store.holes(&rig.name).as_slice() {
            [] => assert!(there && found.is_err(), "step {crash}"),
            holes => assert!(holes == [hole(3)] && !there, "step {crash}"),
        }
        // Its journal may have reappeared with the power failure: it is then sealed again, and nothing is missing.
        if !there || store.doubt(&rig.name, file(3)).unwrap() {
            fill(&rig, &store, 3).unwrap();
        }
        assert_eq!(store.problems(&rig.name), Vec::<String>::new(), "step {crash}");
        rig.check_readable(&store, &root_history());
    }
}

/// Timeline 1 up to 2 MiB + 700, sealed as a partial segment, and timeline 2.
fn promoted(rig: &Rig) -> (WalStore, WalFile) {
    let store = rig.open();
    let mut writer = rig.writer(&store, 1, MIB);
    rig.append_and_flush(&mut writer, 2 * MIB + 700);
    drop(writer);
    let history = format!("1\t{}\tx\n", at(2 * MIB + 700));
    store.put_history(&rig.name, tli(2), history.as_bytes()).unwrap();
    let child = TimelineHistory::parse(tli(2), history.as_bytes()).unwrap();
    let mut writer = rig.writer(&store, 2, 2 * MIB);
    writer.append(at(2 * MIB), &rig.wal.bytes(&child, at(2 * MIB), at(2 * MIB + 900))).unwrap();
    writer.flush().unwrap();
    for file in store.unsealed(&rig.name) {
        store.seal(&rig.name, file).unwrap();
    }
    (store, WalFile::Partial(segment(1, 2)))
}

/// Regression test: at start it counted as WAL of its timeline, and its length as acknowledged WAL that was lost.
#[test]
fn the_partial_segment_of_another_postgresql_is_put_aside_and_none_of_it_counts() {
    for found_at_start in [true, false] {
        let rig = Rig::new(8);
        let (mut store, partial) = promoted(&rig);
        let foreign =
            SimulatedWal::small(78).bytes(&root_history(), at(2 * MIB), at(2 * MIB + 5000));
        let mut context = zstd::bulk::Compressor::new(1).unwrap();
        context.set_parameter(zstd::zstd_safe::CParameter::ChecksumFlag(true)).unwrap();
        let foreign = context.compress(&foreign).unwrap();
        crate::disk::durable::overwrite(&rig.disk, &stored(&rig, partial), &foreign).unwrap();
        if found_at_start {
            drop(store);
            rig.disk.restart(Restart::Kill);
            store = rig.open();
        } else {
            assert!(store.doubt(&rig.name, partial).unwrap());
        }
        let lost = store.damaged(&rig.name);
        let to = at(2 * MIB + if found_at_start { 1 } else { 700 });
        assert_eq!((lost.len(), lost[0].from, lost[0].to), (1, at(2 * MIB), to));
        assert_eq!(aside(&rig).len(), 1, "{found_at_start}");
        assert_eq!(store.read(&rig.name, partial).unwrap_err().kind, Kind::Corrupt, "P7");
    }
}

/// Before, this made the whole cluster unusable.
#[test]
fn a_rotten_end_of_a_finished_timeline_is_a_hole_and_stops_nothing() {
    for rig in [Rig::new(1), Rig::encrypted(1)] {
        for found_at_start in [true, false] {
            let rig = Rig { disk: SimDisk::new(3), ..rig.clone() };
            let (mut store, partial) = promoted(&rig);
            let good = crate::disk::read_small(&rig.disk, &stored(&rig, partial), MIB).unwrap();
            rot(&rig, partial);
            if !found_at_start {
                assert!(store.doubt(&rig.name, partial).unwrap());
            }
            for how in [Restart::Kill, Restart::PowerLoss, Restart::PowerLoss] {
                drop(store);
                rig.disk.restart(how);
                store = rig.open();
                let lost = store.damaged(&rig.name);
                assert_eq!((lost.len(), lost[0].timeline, lost[0].from), (1, tli(1), at(2 * MIB)));
                assert_eq!(aside(&rig).len(), 1);
                let problems = store.problems(&rig.name).join("\n");
                assert!(problems.contains("its timeline is over"), "{problems}");
                let asked = WalFile::Segment(segment(1, 2));
                for file in [asked, partial] {
                    assert_eq!(store.read(&rig.name, file).unwrap_err().kind, Kind::Corrupt, "P7");
                }
            }
            let writer = rig.writer(&store, 2, 2 * MIB + 900);
            assert_eq!(writer.position(), at(2 * MIB + 900), "the other timeline goes on");
            // A good copy of it, as tier 2 may have one.
            let form = if rig.at_rest.is_on() { Form::Age } else { Form::Plain };
            assert_eq!(store.mendable(&rig.name), [partial]);
            for bytes in [&good[..good.len() / 2], b"", &good[..]] {
                let mut mend = store.mend(&rig.name, partial, form).unwrap();
                bytes.chunks(100).for_each(|piece| mend.push(piece).unwrap());
                assert_eq!(mend.finish().is_ok(), bytes == good);
                assert_eq!(store.problems(&rig.name).is_empty(), bytes == good);
            }
            drop((writer, store));
            rig.disk.restart(Restart::PowerLoss);
            let store = rig.open();
            assert_eq!(store.problems(&rig.name), Vec::<String>::new());
            rig.check_readable(&store, &root_history());
        }
    }
}

/// Its PostgreSQL came back: it sends the whole segment again.
#[test]
fn a_rotten_partial_segment_behind_which_its_stream_goes_on_is_asked_for_again() {
    for found_at_start in [true, false] {
        let rig = Rig::new(5);
        let store = rig.open();
        let mut writer = rig.writer(&store, 1, MIB);
        rig.append_and_flush(&mut writer, 2 * MIB + 700);
        drop(writer);
        store.set_over(&rig.name, true);
        for file in store.unsealed(&rig.name) {
            store.seal(&rig.name, file).unwrap();
        }
        store.set_over(&rig.name, false);
        let partial = WalFile::Partial(segment(1, 2));
        rot(&rig, partial);
        let store = if found_at_start {
            drop(store);
            rig.disk.restart(Restart::Kill);
            rig.open()
        } else {
            let open = store.open_writer(&rig.name, &Rig::request(1, 2 * MIB + 700));
            assert!(open.is_err(), "{open:?}");
            store
        };
        assert_eq!(flushed(&store, &rig), at(2 * MIB));
        assert_eq!(store.damaged(&rig.name).len(), 1, "not in silence");
        let open =
            OpenRequest { slot_restart: Some(at(2 * MIB + 700)), ..Rig::request(1, 2 * MIB) };
        let mut writer = store.open_writer(&rig.name, &open).unwrap();
        rig.append_and_flush(&mut writer, 2 * MIB + 900);
        assert_eq!((store.damaged(&rig.name), store.problems(&rig.name)), (vec![], vec![]));
        drop((writer, store));
        rig.disk.restart(Restart::PowerLoss);
        let store = rig.open();
        assert_eq!(flushed(&store, &rig), at(2 * MIB + 900));
        rig.check_readable(&store, &root_history());
    }
}

fn zero(rig: &Rig, path: &Path, from: u64) {
    let file = rig.disk.open(path, true).unwrap();
    let size = file.size().unwrap();
    file.write_all_at(&vec![0; (size - from) as usize], from).unwrap();
    file.sync_all().unwrap();
}

/// A journal with only zeros looks like one that was just created; so does one with only its header.
#[test]
fn a_zeroed_journal_is_told_from_one_that_was_never_written() {
    for header in [0, 4096] {
        for rig in [Rig::new(1), Rig::encrypted(1)] {
            // Other journals behind it show that it was full.
            for seals in [false, true] {
                let rig = Rig { disk: SimDisk::new(7), ..rig.clone() };
                let store = rig.open();
                let mut writer = rig.writer(&store, 1, 2 * MIB);
                rig.append_and_flush(&mut writer, 4 * MIB + 700);
                if seals {
                    store.seal(&rig.name, file(3)).unwrap();
                }
                drop((writer, store));
                let path = Rig::path(DIRECTORY).join(format!("{}.open", segment(1, 2)));
                zero(&rig, &path, header);
                rig.disk.restart(Restart::Kill);
                let store = rig.open();
                assert_eq!(store.holes(&rig.name), [hole(2)], "header kept: {}", header > 0);
                assert_eq!(flushed(&store, &rig), at(4 * MIB + 700));
                let problems = store.problems(&rig.name);
                assert!(problems[0].contains("as long as PostgreSQL has it"), "{problems:?}");
                assert_eq!(store.read(&rig.name, file(2)).unwrap_err().kind, Kind::Corrupt);
                let writer = rig.writer(&store, 1, 4 * MIB + 700);
                fill(&rig, &store, 2).unwrap();
                assert_eq!((store.holes(&rig.name), store.problems(&rig.name)), (vec![], vec![]));
                assert_eq!(aside(&rig).len(), 1);
                drop((writer, store));
                rig.disk.restart(Restart::PowerLoss);
                rig.check_readable(&rig.open(), &root_history());
            }
        }
    }
}

/// At the end of the WAL, only the client's slot shows it.
#[test]
fn the_slot_proves_that_a_zeroed_last_journal_had_wal() {
    for header in [0, 4096] {
        let rig = Rig::new(2);
        let store = rig.open();
        let mut writer = rig.writer(&store, 1, 2 * MIB);
        rig.append_and_flush(&mut writer, 3 * MIB + 700);
        store.seal(&rig.name, file(2)).unwrap();
        drop((writer, store));
        let path = Rig::path(DIRECTORY).join(format!("{}.open", segment(1, 3)));
        zero(&rig, &path, header);
        rig.disk.restart(Restart::Kill);
        let store = rig.open();
        assert_eq!(flushed(&store, &rig), at(3 * MIB));
        let slot_restart = Some(at(3 * MIB + 700));
        let open = OpenRequest { slot_restart, ..Rig::request(1, 3 * MIB) };
        let mut writer = store.open_writer(&rig.name, &open).unwrap();
        let lost = store.damaged(&rig.name);
        assert_eq!((lost[0].from, lost[0].to), (at(3 * MIB), at(3 * MIB + 700)));
        assert!(store.problems(&rig.name)[0].contains("PostgreSQL is asked for it again"));
        assert_eq!(aside(&rig).len(), usize::from(header == 0));
        rig.append_and_flush(&mut writer, 3 * MIB + 700);
        assert_eq!(store.problems(&rig.name), Vec::<String>::new());
        rig.check_readable(&store, &root_history());
    }
}
