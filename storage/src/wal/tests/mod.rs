//! Tests of the whole store on the simulated disk, and some on the real one. One concern per file.

mod crash;
mod faults;
mod keys;
mod life;
mod real;
mod refusal;
mod rot;
mod rotten;
mod timeline;
mod two_writers;
mod unreadable;

use super::*;
use crate::crypt::{AtRest, Keys};
use crate::{
    disk::{Restart, SimDisk},
    testing::SimulatedWal,
};
use std::sync::{
    OnceLock,
    atomic::{AtomicU64, Ordering},
};

/// Segment size of the simulated cluster.
pub(super) const MIB: u64 = 1 << 20;

/// A store on a simulated disk, and the WAL that is sent to it.
#[derive(Clone)]
pub(super) struct Rig {
    pub(super) disk: SimDisk,
    pub(super) wal: SimulatedWal,
    pub(super) name: ClusterName,
    /// Settings for the next time the store is opened.
    pub(super) at_rest: AtRest,
}

/// The same keys for all tests, because they do not test X25519.
pub(super) fn keys() -> Keys {
    static KEYS: OnceLock<Keys> = OnceLock::new();
    KEYS.get_or_init(|| Keys::from_text(&Keys::generate().0, &[]).unwrap()).clone()
}

pub(super) fn tli(n: u32) -> TimelineId {
    TimelineId::new(n).unwrap()
}

pub(super) fn at(lsn: u64) -> Lsn {
    Lsn::new(lsn)
}

pub(super) fn segment(timeline: u32, number: u64) -> SegmentName {
    let size = klio_pg::SegmentSize::new(MIB as u32).unwrap();
    SegmentName::containing(tli(timeline), at(number * MIB), size)
}

pub(super) fn options() -> WalOptions {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    WalOptions {
        preallocate: 16 << 10,
        // Never the same twice in one run of the program; the values do not matter.
        next_id: Arc::new(|| NEXT.fetch_add(0x9E37_79B9, Ordering::Relaxed)),
        ..WalOptions::default()
    }
}

pub(super) fn root_history() -> TimelineHistory {
    TimelineHistory::root(tli(1))
}

impl Rig {
    pub(super) fn new(seed: u64) -> Self {
        let name = "pg".parse().unwrap();
        let at_rest = AtRest::Off;
        Self { disk: SimDisk::new(seed), wal: SimulatedWal::small(77), name, at_rest }
    }

    pub(super) fn encrypted(seed: u64) -> Self {
        Self { at_rest: AtRest::On(keys()), ..Self::new(seed) }
    }

    /// Opens the store and pins the cluster.
    pub(super) fn open(&self) -> WalStore {
        let store = self.try_open().unwrap();
        store.pin(&self.name, self.wal.pinned()).unwrap();
        store
    }

    pub(super) fn try_open(&self) -> Result<WalStore, Error> {
        let options = WalOptions { at_rest: self.at_rest.clone(), ..options() };
        WalStore::open(Arc::new(self.disk.clone()), "/tier1".into(), options)
    }

    pub(super) fn request(timeline: u32, start: u64) -> OpenRequest {
        let (timeline, start) = (tli(timeline), at(start));
        OpenRequest { timeline, start, gap: None, now_unix: 1.5, slot_restart: None }
    }

    pub(super) fn writer(&self, store: &WalStore, timeline: u32, start: u64) -> Writer {
        store.open_writer(&self.name, &Self::request(timeline, start)).unwrap()
    }

    pub(super) fn bytes(&self, from: u64, to: u64) -> Vec<u8> {
        self.wal.bytes(&root_history(), at(from), at(to))
    }

    /// Appends timeline 1's WAL up to `to`.
    pub(super) fn append(&self, writer: &mut Writer, to: u64) -> Result<Lsn, Error> {
        let from = writer.position();
        writer.append(from, &self.bytes(from.as_u64(), to))
    }

    pub(super) fn append_and_flush(&self, writer: &mut Writer, to: u64) {
        self.append(writer, to).unwrap();
        assert_eq!(writer.flush().unwrap().lsn(), at(to));
    }

    pub(super) fn read(&self, store: &WalStore, file: WalFile) -> Vec<u8> {
        store.plain_bytes(store.read(&self.name, file).unwrap()).unwrap()
    }

    /// Checks that everything the store reports of a timeline can be read, byte for byte.
    pub(super) fn check_readable(&self, store: &WalStore, history: &TimelineHistory) {
        let timeline = history.timeline();
        let positions = store.positions(&self.name);
        let Some(position) = positions.iter().find(|p| p.timeline == timeline) else { return };
        let gaps = store.gaps(&self.name);
        let mut start = position.start.as_u64();
        while start < position.flushed.as_u64() {
            let end = start + MIB;
            let gap = gaps
                .iter()
                .find(|g| g.timeline == timeline && g.to > at(start) && g.from < at(end));
            let until = gap.map_or(position.flushed, |gap| gap.from).min(at(end));
            if until > at(start) {
                let found =
                    self.read(store, WalFile::Segment(segment(timeline.get(), start / MIB)));
                let expected = self.wal.bytes(history, at(start), until);
                assert!(found == expected, "bytes from {} to {until} differ", at(start));
            }
            start = end;
        }
    }

    pub(super) fn path(relative: &str) -> PathBuf {
        Path::new("/tier1/pg").join(relative)
    }
}
