//! Faults of the disk that it does not report: bits that rot, synced writes that are lost or go to another place, reads
//! that fail. Each is a class of its own.
//!
//! Acknowledged bytes are never lost silently: either they are there, byte for byte, or the store reports exactly what
//! is missing, keeps the damaged file aside, and continues from the last good byte. A torn tail is not damage and is
//! not reported.

use super::*;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
        (self.0 ^ (self.0 >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9) >> 16
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    None,
    BitRot,
    LostWrite,
    Misdirected,
    ReadError,
}

const DIRECTORY: &str = "wal/00000001";

fn open_journals(rig: &Rig) -> Vec<PathBuf> {
    let directory = Rig::path(DIRECTORY);
    let Ok(entries) = rig.disk.list(&directory) else { return Vec::new() };
    let open = entries.into_iter().filter(|entry| entry.name.ends_with(".open"));
    open.map(|entry| directory.join(entry.name)).collect()
}

fn aside(rig: &Rig) -> Vec<PathBuf> {
    let directory = Rig::path(DIRECTORY);
    let entries = rig.disk.list(&directory).unwrap();
    let kept = entries.into_iter().filter(|entry| entry.name.contains(".open.damaged-"));
    kept.map(|entry| directory.join(entry.name)).collect()
}

fn request(start: Lsn, slot: Lsn) -> OpenRequest {
    OpenRequest { slot_restart: Some(slot), ..Rig::request(1, start.as_u64()) }
}

fn flushed(store: &WalStore, rig: &Rig) -> Lsn {
    store.positions(&rig.name).first().map_or(at(2 * MIB), |position| position.flushed)
}

/// One stream with one class of fault.
struct Life {
    rig: Rig,
    random: Random,
    fault: Fault,
    acked: Lsn,
    written: Lsn,
}

impl Life {
    fn new(seed: u64, fault: Fault) -> Self {
        let rig = if seed.is_multiple_of(2) { Rig::new(seed) } else { Rig::encrypted(seed) };
        Self { rig, random: Random(seed), fault, acked: at(2 * MIB), written: at(2 * MIB) }
    }

    fn write(&mut self, writer: &mut Writer) {
        let size = match self.random.below(6) {
            0..=2 => 1 + self.random.below(500),
            3 | 4 => 1 + self.random.below(40_000),
            _ => 1 + self.random.below(600_000),
        };
        let end = self.rig.append(writer, writer.position().as_u64() + size).unwrap();
        self.written = self.written.max(end);
    }

    /// The fault happens in a sync that reports success.
    fn flush(&mut self, writer: &mut Writer) {
        match self.fault {
            Fault::LostWrite if self.random.below(4) == 0 => self.rig.disk.lose_in_sync_after(0),
            Fault::Misdirected if self.random.below(4) == 0 => {
                self.rig.disk.misdirect_in_sync_after(0)
            }
            _ => {}
        }
        self.acked = writer.flush().unwrap().lsn();
        self.rig.disk.clear_faults();
    }

    fn stream(&mut self, store: &WalStore, writer: &mut Writer) {
        for _ in 0..3 + self.random.below(9) {
            self.write(writer);
            if self.random.below(3) > 0 {
                self.flush(writer);
            }
            if self.random.below(4) == 0 {
                writer.flusher().rest().unwrap();
            }
            if self.random.below(6) == 0 {
                for file in store.unsealed(&self.rig.name) {
                    // A damaged journal is refused; sealed files are checked later.
                    let _ = store.seal(&self.rig.name, file);
                }
            }
        }
    }

    fn rot(&mut self) {
        let journals = open_journals(&self.rig);
        if journals.is_empty() {
            return;
        }
        let path = &journals[self.random.below(journals.len() as u64) as usize];
        match self.fault {
            Fault::BitRot => {
                let size = self.rig.disk.stat(path).unwrap().size;
                for _ in 0..1 + self.random.below(3) {
                    let byte = self.random.below(size);
                    // Bytes that never reached the medium cannot rot.
                    let _ = self.rig.disk.flip_bit(path, byte, (byte % 8) as u8);
                }
            }
            Fault::ReadError => self.rig.disk.fail_reads(path).unwrap(),
            _ => {}
        }
    }

    /// Stored WAL is right, or known to be damaged.
    fn check_held(&self, store: &WalStore, upto: Lsn) {
        let mut start = 2 * MIB;
        while start < upto.as_u64() {
            let until = upto.min(at(start + MIB));
            let file = WalFile::Segment(segment(1, start / MIB));
            match store.read(&self.rig.name, file).and_then(|found| store.plain_bytes(found)) {
                Ok(found) => {
                    let expected = self.rig.bytes(start, until.as_u64());
                    assert!(found.starts_with(&expected), "{:?} from {}", self.fault, at(start));
                }
                Err(error) => {
                    assert_ne!(error.kind, Kind::NotFound, "P7: {error}");
                    let told = !store.problems(&self.rig.name).is_empty()
                        || store.damaged_journals(&self.rig.name) > 0;
                    assert!(told || store.read(&self.rig.name, file).is_ok(), "{error}");
                }
            }
            start += MIB;
        }
    }

    /// Restarts, and opens the writer where the stream resumes.
    fn come_back(&mut self) -> (WalStore, Writer) {
        let how = if self.random.below(3) == 0 { Restart::Kill } else { Restart::PowerLoss };
        self.rig.disk.restart(how);
        self.rot();
        let mut store = self.rig.try_open().unwrap();
        let known = store.pin(&self.rig.name, self.rig.wal.pinned());
        if self.fault == Fault::ReadError && known.is_err() {
            assert!(!store.problems(&self.rig.name).is_empty());
            self.rig.disk.clear_faults();
            drop(store);
            store = self.rig.open();
        } else {
            known.unwrap();
        }
        let before = flushed(&store, &self.rig);
        for loss in store.damaged(&self.rig.name) {
            assert!(loss.from >= before, "{loss:?}");
            // If a journal's header is damaged, it cannot be decided which of its frames were acknowledged.
            assert!(loss.to <= self.written, "{loss:?}, acked {}", self.acked);
        }
        let start = flushed(&store, &self.rig);
        let writer = store.open_writer(&self.rig.name, &request(start, self.acked)).unwrap();
        let lost = store.damaged(&self.rig.name);
        if start >= self.acked {
            assert_eq!(lost, [], "{:?}: nothing acknowledged is missing", self.fault);
        } else {
            let mut upto = start;
            while let Some(loss) = lost.iter().find(|l| l.from <= upto && l.to > upto) {
                upto = loss.to;
            }
            assert!(
                upto >= self.acked,
                "{:?}: from {start} to {} is missing, told is {lost:?}",
                self.fault,
                self.acked
            );
            assert_ne!(self.fault, Fault::None, "a torn tail is no damage");
        }
        for kept in lost.iter().filter_map(|loss| loss.kept.as_ref()) {
            assert!(self.rig.disk.stat(&Rig::path(DIRECTORY).join(kept)).is_ok());
        }
        self.check_held(&store, start);
        (store, writer)
    }

    fn run(&mut self) {
        let mut store = self.rig.open();
        let mut writer = self.rig.writer(&store, 1, 2 * MIB);
        for _ in 0..5 {
            self.stream(&store, &mut writer);
            drop((writer, store));
            (store, writer) = self.come_back();
            // PostgreSQL sends again what it was told was flushed.
            let missing = self.acked;
            let told = store.damaged(&self.rig.name).iter().map(|loss| loss.to).max();
            let missing = told.map_or(missing, |told| told.max(missing));
            if writer.position() < missing {
                self.rig.append(&mut writer, missing.as_u64()).unwrap();
                self.acked = writer.flush().unwrap().lsn();
            }
            self.acked = self.acked.max(writer.flushed().lsn());
            assert_eq!(store.damaged(&self.rig.name), [], "all of it is held again");
            self.check_held(&store, self.acked);
        }
    }
}

fn live(fault: Fault) {
    for seed in 0..60 {
        let run = std::panic::catch_unwind(|| Life::new(seed, fault).run());
        assert!(run.is_ok(), "{fault:?}, seed {seed}");
    }
}

#[test]
fn torn_tails_are_silent() {
    live(Fault::None);
}

#[test]
fn rotten_bits_are_never_silent() {
    live(Fault::BitRot);
}

#[test]
fn synced_writes_that_are_lost_are_never_silent() {
    live(Fault::LostWrite);
}

#[test]
fn synced_writes_that_land_elsewhere_are_never_silent() {
    live(Fault::Misdirected);
}

#[test]
fn reads_that_fail_are_never_taken_for_the_end() {
    live(Fault::ReadError);
}

/// Three batches, each flushed before the next, and a closing frame; returns where the frames begin in the file.
fn three_batches(rig: &Rig) -> (WalStore, Writer) {
    let store = rig.open();
    let mut writer = rig.writer(&store, 1, 2 * MIB);
    for n in 1..=3 {
        rig.append_and_flush(&mut writer, 2 * MIB + n * 100);
    }
    writer.flusher().rest().unwrap();
    (store, writer)
}

fn journal() -> PathBuf {
    Rig::path("wal/00000001/000000010000000000000002.open")
}

#[test]
fn a_bad_bit_sets_the_position_back_visibly_until_the_bytes_are_held_again() {
    for (frame, good) in [(0, 0), (1, 100), (2, 200)] {
        for rig in [Rig::new(1), Rig::encrypted(1)] {
            drop(three_batches(&rig));
            let header = if rig.at_rest.is_on() { 56 } else { 44 };
            let as_found = crate::disk::read_small(&rig.disk, &journal(), MIB).unwrap();
            rig.disk.flip_bit(&journal(), 4096 + frame * (header + 100) + header + 7, 2).unwrap();
            rig.disk.restart(Restart::Kill);
            let lost = |store: &WalStore| {
                let all = store.damaged(&rig.name);
                all.into_iter().map(|d| (d.from, d.to, d.kept.is_some())).collect::<Vec<_>>()
            };
            let expected = vec![(at(2 * MIB + good), at(2 * MIB + 300), true)];
            // However often the server starts: the damaged file is set aside once, and the loss is reported until it is
            // healed.
            for _ in 0..3 {
                let store = rig.open();
                assert_eq!(lost(&store), expected);
                assert_eq!(store.damaged_journals(&rig.name), 1);
                let problems = store.problems(&rig.name);
                assert!(problems.iter().any(|p| p.contains("damaged on tier 1")), "{problems:?}");
                assert_eq!(flushed(&store, &rig), at(2 * MIB + good));
                assert_eq!(aside(&rig).len(), 1);
                drop(store);
                rig.disk.restart(Restart::PowerLoss);
            }
            let kept = crate::disk::read_small(&rig.disk, &aside(&rig)[0], MIB).unwrap();
            assert_eq!(kept.len(), as_found.len());
            assert_eq!(kept.iter().zip(&as_found).filter(|(a, b)| a != b).count(), 1);
            let store = rig.open();
            let start = at(2 * MIB + good);
            let open = store.open_writer(&rig.name, &request(start, at(2 * MIB + 300)));
            let mut writer = open.unwrap();
            rig.append_and_flush(&mut writer, 2 * MIB + 250);
            assert_eq!(lost(&store).len(), 1, "not all of it is here again");
            rig.append_and_flush(&mut writer, 2 * MIB + 300);
            assert_eq!(lost(&store), []);
            assert_eq!(store.problems(&rig.name), Vec::<String>::new());
            assert_eq!(aside(&rig).len(), 1, "never removed by us");
            drop((writer, store));
            rig.disk.restart(Restart::PowerLoss);
            let store = rig.open();
            assert_eq!(lost(&store), []);
            rig.check_readable(&store, &root_history());
        }
    }
}

/// Two unsealed segments: the first is full and the second continues.
fn two_segments(rig: &Rig) -> (WalStore, Writer) {
    let store = rig.open();
    let mut writer = rig.writer(&store, 1, 2 * MIB);
    for to in [2 * MIB + 700, 2 * MIB + 1400, 3 * MIB + 700] {
        rig.append_and_flush(&mut writer, to);
    }
    (store, writer)
}

fn hole() -> Hole {
    Hole { timeline: tli(1), start: at(2 * MIB), end: at(3 * MIB) }
}

/// Sends a segment again in pieces while the stream continues; `spoil` changes a byte of it.
fn fill(
    rig: &Rig,
    store: &WalStore,
    writer: &mut Writer,
    spoil: Option<usize>,
) -> Result<WalFile, Error> {
    let mut refill = store.refill(&rig.name, tli(1), at(2 * MIB))?;
    let again = store.refill(&rig.name, tli(1), at(2 * MIB)).unwrap_err();
    assert_eq!(again.kind, Kind::Conflict, "one at a time");
    let mut bytes = rig.bytes(2 * MIB, 3 * MIB);
    if let Some(at) = spoil {
        bytes[at] ^= 1;
    }
    for piece in bytes.chunks(100_000) {
        refill.push(piece)?;
        rig.append_and_flush(writer, writer.position().as_u64() + 10);
    }
    refill.finish()
}

/// Before, the loss was reported but permanent: the stream continues at its end and never came back to it.
#[test]
fn a_damaged_segment_in_the_middle_is_made_anew_beside_the_stream() {
    // Damage in its first frame, in a later one, and in the header.
    for byte in [4096 + 44 + 7, 4096 + 1000, 20] {
        for rig in [Rig::new(1), Rig::encrypted(1)] {
            drop(two_segments(&rig));
            rig.disk.flip_bit(&journal(), byte, 2).unwrap();
            rig.disk.restart(Restart::Kill);
            let store = rig.open();
            assert_eq!(flushed(&store, &rig), at(3 * MIB + 700), "nothing goes back");
            assert_eq!(store.holes(&rig.name), [hole()]);
            let problems = store.problems(&rig.name).join("\n");
            assert!(
                problems.contains("as long as PostgreSQL has it")
                    && problems.contains("klio backup"),
                "{problems}"
            );
            let mut writer = rig.writer(&store, 1, 3 * MIB + 700);
            let file = fill(&rig, &store, &mut writer, None).unwrap();
            let position = writer.position();
            assert_eq!(file, WalFile::Segment(segment(1, 2)));
            assert_eq!((store.holes(&rig.name), store.problems(&rig.name)), (vec![], vec![]));
            assert_eq!(store.damaged_journals(&rig.name), 0);
            assert_eq!(aside(&rig).len(), 1, "what was damaged is kept");
            drop((writer, store));
            rig.disk.restart(Restart::PowerLoss);
            let store = rig.open();
            assert_eq!(flushed(&store, &rig), position);
            rig.check_readable(&store, &root_history());
            store.seal(&rig.name, file).unwrap();
            rig.check_readable(&store, &root_history());
        }
    }
}

#[test]
fn other_bytes_than_those_that_are_held_never_take_a_segments_place() {
    let rig = Rig::new(1);
    drop(two_segments(&rig));
    // Damage behind the first 700 bytes, which are good.
    rig.disk.flip_bit(&journal(), 4096 + 44 + 700 + 44 + 9, 2).unwrap();
    rig.disk.restart(Restart::Kill);
    let store = rig.open();
    let mut writer = rig.writer(&store, 1, 3 * MIB + 700);
    let error = fill(&rig, &store, &mut writer, Some(300)).unwrap_err();
    assert!(matches!(error.kind, Kind::Conflict | Kind::Invalid), "{error}");
    let mut short = store.refill(&rig.name, tli(1), at(2 * MIB)).unwrap();
    short.push(&rig.bytes(2 * MIB, 3 * MIB - 1)).unwrap();
    assert_eq!(short.finish().unwrap_err().kind, Kind::Invalid);
    let mut long = store.refill(&rig.name, tli(1), at(2 * MIB)).unwrap();
    assert_eq!(long.push(&rig.bytes(2 * MIB, 3 * MIB + 1)).unwrap_err().kind, Kind::Invalid);
    drop(long);
    assert_eq!(store.holes(&rig.name), [hole()], "nothing has changed");
    let names = rig.disk.list(&Rig::path(DIRECTORY)).unwrap();
    assert!(names.iter().all(|entry| !entry.name.ends_with(".tmp")), "{names:?}");
    let whole = store.refill(&rig.name, tli(1), at(3 * MIB)).unwrap_err();
    assert_eq!(whole.kind, Kind::NotFound, "what is not damaged is not written over");
    fill(&rig, &store, &mut writer, None).unwrap();
    assert_eq!(store.holes(&rig.name), []);
}

#[test]
fn a_journal_that_rots_before_it_is_sealed_is_made_anew_without_a_restart() {
    let rig = Rig::new(1);
    let (store, mut writer) = two_segments(&rig);
    let file = WalFile::Segment(segment(1, 2));
    rig.disk.flip_bit(&journal(), 4096 + 1000, 2).unwrap();
    assert_eq!(store.seal(&rig.name, file).unwrap_err().kind, Kind::Corrupt);
    assert_eq!(store.holes(&rig.name), [hole()]);
    assert!(store.problems(&rig.name)[0].contains("as long as PostgreSQL has it"));
    assert_eq!(store.unsealed(&rig.name), [], "sealing is not tried again and again");
    fill(&rig, &store, &mut writer, None).unwrap();
    store.seal(&rig.name, file).unwrap();
    assert_eq!((store.holes(&rig.name), store.problems(&rig.name)), (vec![], vec![]));
    rig.check_readable(&store, &root_history());
}

/// Whenever the power fails, the segment is complete or the hole is still recorded.
#[test]
fn a_crash_while_a_segment_is_made_anew_changes_nothing_or_finishes_it() {
    let mut finished = 0;
    for seed in 0..24 {
        let rig = Rig::new(seed);
        drop(two_segments(&rig));
        rig.disk.flip_bit(&journal(), 4096 + 1000, 2).unwrap();
        rig.disk.restart(Restart::Kill);
        let store = rig.open();
        let mut writer = rig.writer(&store, 1, 3 * MIB + 700);
        rig.disk.fail_sync_after(seed);
        let filled = fill_quietly(&rig, &store);
        rig.disk.clear_faults();
        drop((writer.flush(), writer, store));
        rig.disk.restart(Restart::PowerLoss);
        let store = rig.open();
        finished += u64::from(filled.is_ok());
        match store.holes(&rig.name).as_slice() {
            [] => rig.check_readable(&store, &root_history()),
            holes => assert!(filled.is_err() && holes == [hole()], "{filled:?} {holes:?}"),
        }
    }
    assert!(finished > 0);
}

fn fill_quietly(rig: &Rig, store: &WalStore) -> Result<WalFile, Error> {
    let mut refill = store.refill(&rig.name, tli(1), at(2 * MIB))?;
    refill.push(&rig.bytes(2 * MIB, 3 * MIB))?;
    refill.finish()
}

/// WAL that is not sent again must not be waited for: the reported problem says what to do.
#[test]
fn damage_that_is_never_asked_for_again_says_that_a_base_backup_helps() {
    // In the middle of a timeline, where the rest of the segment is a recorded gap.
    for byte in [4096 + 44 + 7, 20] {
        let rig = Rig::new(1);
        let store = rig.open();
        let mut writer = rig.writer(&store, 1, 2 * MIB);
        rig.append_and_flush(&mut writer, 2 * MIB + 700);
        drop(writer);
        let reason = "removed".to_owned();
        let gap = GapDeclaration { from: at(2 * MIB + 700), to: at(3 * MIB), reason };
        let behind = OpenRequest { gap: Some(gap), ..Rig::request(1, 3 * MIB) };
        let mut writer = store.open_writer(&rig.name, &behind).unwrap();
        rig.append_and_flush(&mut writer, 3 * MIB + 700);
        drop((writer, store));
        rig.disk.flip_bit(&journal(), byte, 2).unwrap();
        rig.disk.restart(Restart::Kill);
        let store = rig.open();
        assert_eq!(
            flushed(&store, &rig),
            at(3 * MIB + 700),
            "what is acknowledged does not go back"
        );
        let problems = store.problems(&rig.name).join("\n");
        assert!(problems.contains("klio backup"), "{problems}");
        assert!(problems.contains("PostgreSQL is not asked"), "{problems}");
        assert_eq!(store.holes(&rig.name), []);
    }
    // At the end of a timeline, while it is streamed and after another one has begun.
    let rig = Rig::new(1);
    drop(three_batches(&rig));
    rig.disk.flip_bit(&journal(), 4096 + 44 + 100 + 44 + 7, 2).unwrap();
    rig.disk.restart(Restart::Kill);
    let store = rig.open();
    assert!(store.problems(&rig.name)[0].contains("PostgreSQL is asked for it again"));
    let history = format!("1\t{}\tx\n", at(2 * MIB + 300));
    store.put_history(&rig.name, tli(2), history.as_bytes()).unwrap();
    let child = TimelineHistory::parse(tli(2), history.as_bytes()).unwrap();
    let mut writer = rig.writer(&store, 2, 2 * MIB);
    writer.append(at(2 * MIB), &rig.wal.bytes(&child, at(2 * MIB), at(2 * MIB + 900))).unwrap();
    writer.flush().unwrap();
    let problems = store.problems(&rig.name).join("\n");
    assert!(
        problems.contains("its timeline is over") && problems.contains("klio backup"),
        "{problems}"
    );
}

/// Without a later frame, only the client's slot tells rot in the last frame.
#[test]
fn the_clients_slot_proves_what_the_file_cannot() {
    for rig in [Rig::new(1), Rig::encrypted(1)] {
        for single in [true, false] {
            let rig = Rig {
                disk: SimDisk::new(3),
                wal: rig.wal.clone(),
                name: rig.name.clone(),
                at_rest: rig.at_rest.clone(),
            };
            let store = rig.open();
            let mut writer = rig.writer(&store, 1, 2 * MIB);
            rig.append_and_flush(&mut writer, 2 * MIB + 100);
            let (mut end, mut good) = (100, 0);
            if !single {
                rig.append_and_flush(&mut writer, 2 * MIB + 200);
                (end, good) = (200, 100);
            }
            // The machine stops before the stream writes a closing frame.
            rig.disk.restart(Restart::Kill);
            drop((writer, store));
            let header = if rig.at_rest.is_on() { 56 } else { 44 };
            rig.disk.flip_bit(&journal(), 4096 + good / 100 * (header + 100) + 60, 1).unwrap();
            let store = rig.open();
            assert_eq!(store.damaged(&rig.name), [], "it may be a torn tail");
            assert_eq!(aside(&rig).len(), 1, "kept until the client has come");
            let start = flushed(&store, &rig);
            assert_eq!(start, at(2 * MIB + good));
            let writer = store.open_writer(&rig.name, &request(start, at(2 * MIB + end))).unwrap();
            let lost = store.damaged(&rig.name);
            assert_eq!((lost[0].from, lost[0].to), (start, at(2 * MIB + end)));
            assert!(lost[0].kept.is_some());
            assert_eq!(aside(&rig).len(), 1);
            drop((writer, store));
            rig.disk.restart(Restart::PowerLoss);
            assert_eq!(rig.open().damaged(&rig.name), lost, "a restart heals nothing");
        }
    }
}

#[test]
fn a_torn_tail_is_kept_only_until_the_client_has_come() {
    let rig = Rig::new(5);
    drop(three_batches(&rig));
    // As if the last two frames had never been acknowledged: the closing frame is torn as well.
    for at in [4096 + 2 * 144 + 60, 4096 + 3 * 144 + 10] {
        rig.disk.flip_bit(&journal(), at, 1).unwrap();
    }
    rig.disk.restart(Restart::Kill);
    let store = rig.open();
    assert_eq!((flushed(&store, &rig), store.damaged(&rig.name)), (at(2 * MIB + 200), vec![]));
    assert_eq!(aside(&rig).len(), 1);
    let start = at(2 * MIB + 200);
    let _writer = store.open_writer(&rig.name, &request(start, start)).unwrap();
    assert_eq!(aside(&rig), Vec::<PathBuf>::new());
    assert_eq!(store.problems(&rig.name), Vec::<String>::new());
    assert!(rig.disk.stat(&Rig::path("damaged-wal.json")).is_err());
}

#[test]
fn a_damaged_header_never_removes_the_journal() {
    for byte in [0, 8, 13, 25, 33, 41, 49] {
        for rig in [Rig::new(1), Rig::encrypted(1)] {
            drop(three_batches(&rig));
            rig.disk.flip_bit(&journal(), byte, 0).unwrap();
            rig.disk.restart(Restart::Kill);
            let store = rig.open();
            assert_eq!(aside(&rig).len(), 1, "byte {byte}");
            let lost = store.damaged(&rig.name);
            assert_eq!((lost[0].from, lost[0].to), (at(2 * MIB), at(2 * MIB + 300)));
            let start = at(2 * MIB);
            let open = store.open_writer(&rig.name, &request(start, at(2 * MIB + 300)));
            rig.append_and_flush(&mut open.unwrap(), 2 * MIB + 400);
            assert_eq!((store.damaged(&rig.name), aside(&rig).len()), (vec![], 1));
            rig.check_readable(&store, &root_history());
        }
    }
}

#[test]
fn what_postgres_no_longer_has_is_a_gap_with_the_reason() {
    let rig = Rig::new(1);
    drop(three_batches(&rig));
    rig.disk.flip_bit(&journal(), 4096 + 144 + 60, 0).unwrap();
    rig.disk.restart(Restart::Kill);
    let store = rig.open();
    let (from, to) = (at(2 * MIB + 100), at(3 * MIB));
    let gap = Some(GapDeclaration { from, to, reason: "PostgreSQL removed it".into() });
    let slot_restart = Some(at(2 * MIB + 300));
    let open = OpenRequest { gap, slot_restart, ..Rig::request(1, 3 * MIB) };
    let _writer = store.open_writer(&rig.name, &open).unwrap();
    let gaps = store.gaps(&rig.name);
    assert_eq!(gaps[0].reason, "damaged on tier 1: PostgreSQL removed it");
    assert_eq!((store.damaged(&rig.name), aside(&rig).len()), (vec![], 1));
    assert!(rig.disk.stat(&Rig::path("damaged-wal.json")).is_err());
}

/// Proving a journal needs space for a copy. Until there is space, only what its frames report as flushed may be
/// reported.
#[test]
fn a_journal_whose_proof_failed_for_want_of_space_counts_as_far_as_it_is_known() {
    for rig in [Rig::new(1), Rig::encrypted(1)] {
        let store = rig.open();
        let mut writer = rig.writer(&store, 1, 2 * MIB);
        rig.append_and_flush(&mut writer, 2 * MIB + 100);
        rig.append_and_flush(&mut writer, 2 * MIB + 200);
        // Visible in the page cache, never synced.
        rig.append(&mut writer, 2 * MIB + 300).unwrap();
        rig.disk.restart(Restart::Kill);
        drop((writer, store));
        rig.disk.set_capacity(Some(rig.disk.used()));
        let store = rig.try_open().unwrap();
        assert_eq!(flushed(&store, &rig), at(2 * MIB + 200));
        assert!(!store.problems(&rig.name).is_empty());
        let file = WalFile::Segment(segment(1, 2));
        assert_eq!(rig.read(&store, file).len(), 300, "what is seen can be read");
        rig.disk.set_capacity(None);
        let open = store.open_writer(&rig.name, &Rig::request(1, 2 * MIB + 200));
        assert!(matches!(open, Err(OpenError::Refused { .. })), "{open:?}");
        assert_eq!(flushed(&store, &rig), at(2 * MIB + 300), "healed without a hand");
        assert_eq!(store.problems(&rig.name), Vec::<String>::new());
        rig.writer(&store, 1, 2 * MIB + 300);
    }
}

/// Rot that is found during sealing: there is no sealed file, and it is never the end of WAL.
#[test]
fn a_journal_that_rots_before_it_is_sealed_makes_no_sealed_file() {
    for rig in [Rig::new(1), Rig::encrypted(1)] {
        let store = rig.open();
        let mut writer = rig.writer(&store, 1, 2 * MIB);
        rig.append_and_flush(&mut writer, 3 * MIB + 10);
        rig.disk.flip_bit(&journal(), 4096 + 5000, 0).unwrap();
        let file = WalFile::Segment(segment(1, 2));
        assert_eq!(store.seal(&rig.name, file).unwrap_err().kind, Kind::Corrupt);
        assert!(rig.disk.stat(&journal()).is_ok());
        assert!(store.list(&rig.name).unwrap().is_empty());
        let found = store.read(&rig.name, file).unwrap();
        assert_eq!(store.plain_bytes(found).unwrap_err().kind, Kind::Corrupt);
        assert!(!store.problems(&rig.name).is_empty());
        // The stream continues; after a restart the journal is recognized as cut short, and is left alone.
        rig.append_and_flush(&mut writer, 3 * MIB + 20);
        drop((writer, store));
        rig.disk.restart(Restart::PowerLoss);
        let store = rig.open();
        assert_eq!(
            (flushed(&store, &rig), store.damaged_journals(&rig.name)),
            (at(3 * MIB + 20), 1)
        );
        assert_eq!(store.read(&rig.name, file).unwrap_err().kind, Kind::Corrupt);
        assert!(rig.disk.stat(&journal()).is_ok());
    }
}
