//! Records that cannot be read are kept, reported and never overwritten.

use super::{MIB, Rig, at, tli};
use crate::{
    disk::{Disk, Restart},
    record::Unknown,
    wal::{LevelChange, OpenError, OpenRequest},
};
use std::path::PathBuf;

const LEVELS: &str = "wal_levels.json";

fn change(lsn: u64, minimal: bool) -> LevelChange {
    LevelChange { timeline: tli(1), lsn: at(lsn), minimal, unknown: Unknown::default() }
}

fn read(rig: &Rig, name: &str) -> Option<Vec<u8>> {
    crate::disk::read_small(&rig.disk, &Rig::path(name), MIB).ok()
}

fn told(rig: &Rig) -> bool {
    let problems = rig.open().problems(&rig.name);
    problems.iter().any(|p| p.contains(".unreadable") && p.contains("is unknown"))
}

#[test]
fn a_record_that_cannot_be_read_is_kept_aside_and_shown_whatever_is_noted_afterwards() {
    for file in [LEVELS, "damaged-wal.json"] {
        let rig = Rig::new(5);
        let store = rig.open();
        store.add_levels(&rig.name, &[change(100, true)]).unwrap();
        drop((rig.writer(&store, 1, 2 * MIB), store));
        if read(&rig, file).is_none() {
            let text = br#"{"format": 2, "crc32c": "00000000", "body": []}"#;
            crate::disk::durable::overwrite(&rig.disk, &Rig::path(file), text).unwrap();
        } else {
            rig.disk.flip_bit(&Rig::path(file), 60, 1).unwrap();
        }
        let as_found = read(&rig, file).unwrap();
        for run in 0..3 {
            rig.disk.restart(Restart::PowerLoss);
            assert!(told(&rig), "{file}, run {run}");
            let store = rig.open();
            // New changes are recorded, received and acknowledged.
            store.add_levels(&rig.name, &[change(200 + run, run % 2 == 0)]).unwrap();
            let start = store.positions(&rig.name).first().map_or(2 * MIB, |p| p.flushed.as_u64());
            rig.append_and_flush(&mut rig.writer(&store, 1, start), start + 100);
            assert_eq!(read(&rig, &format!("{file}.unreadable")).as_ref(), Some(&as_found));
        }
        // Damaged again: the second copy gets its own name.
        rig.disk.restart(Restart::Kill);
        rig.disk.flip_bit(&Rig::path(LEVELS), 60, 1).unwrap();
        drop(rig.open());
        let second = if file == LEVELS { "unreadable.2" } else { "unreadable" };
        assert!(read(&rig, &format!("{LEVELS}.{second}")).is_some());
        assert_eq!(read(&rig, &format!("{file}.unreadable")), Some(as_found));
    }
}

/// As after an update back to the newer version, or after a person has put a copy in its place.
#[test]
fn what_can_be_read_again_is_joined_to_what_was_noted_meanwhile() {
    let rig = Rig::new(6);
    let store = rig.open();
    store.add_levels(&rig.name, &[change(100, true)]).unwrap();
    let good = read(&rig, LEVELS).unwrap();
    drop(store);
    let newer = String::from_utf8(good.clone()).unwrap().replace("\"format\": 2", "\"format\": 9");
    crate::disk::durable::overwrite(&rig.disk, &Rig::path(LEVELS), newer.as_bytes()).unwrap();
    rig.disk.restart(Restart::Kill);
    assert!(told(&rig));
    rig.open().add_levels(&rig.name, &[change(50, true)]).unwrap();
    let aside: PathBuf = Rig::path(&format!("{LEVELS}.unreadable"));
    assert_eq!(crate::disk::read_small(&rig.disk, &aside, MIB).unwrap(), newer.as_bytes());
    crate::disk::durable::overwrite(&rig.disk, &aside, &good).unwrap();
    rig.disk.restart(Restart::Kill);
    assert!(!told(&rig));
    assert_eq!(rig.open().levels(&rig.name), [change(50, true)]);
    assert!(rig.disk.stat(&aside).is_err());
}

/// P13: a client's slot is only its claim.
#[test]
fn a_slot_that_cannot_be_true_or_of_a_client_that_is_refused_records_no_damage() {
    let rig = Rig::new(7);
    let store = rig.open();
    rig.append_and_flush(&mut rig.writer(&store, 1, 2 * MIB), 2 * MIB + 100);
    let open = |start: u64, slot: u64| {
        let request = OpenRequest { slot_restart: Some(at(slot)), ..Rig::request(1, start) };
        store.open_writer(&rig.name, &request)
    };
    // Refused because of its start position: nothing in its request has an effect.
    let refused = open(3 * MIB, 4 * MIB).map(drop);
    assert!(matches!(refused, Err(OpenError::Refused { .. })), "{refused:?}");
    assert_eq!(store.damaged(&rig.name), []);
    for slot in [u64::MAX, 1 << 40, 2 * MIB + 100 + 257 * MIB] {
        drop(open(2 * MIB + 100, slot).unwrap());
        assert_eq!(store.damaged(&rig.name), [], "{slot:x}");
    }
    drop(open(2 * MIB + 100, 2 * MIB + 300).unwrap());
    let lost: Vec<_> = store.damaged(&rig.name).iter().map(|d| (d.from, d.to)).collect();
    assert_eq!(lost, [(at(2 * MIB + 100), at(2 * MIB + 300))], "what can be true is believed");
}
