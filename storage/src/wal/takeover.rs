//! `<cluster>/taken_over.json`: WAL that only tier 2 had when a stream continued behind it, because this tier 1
//! replaced one that was lost, or was reset to an earlier state.
//!
//! | field | what |
//! |---|---|
//! | `timeline` | the timeline |
//! | `start` | the first byte that tier 2 had of it |
//! | `end` | the segment start where the stream continued |
//!
//! In the format of `crate::record`. It is written before the first byte behind `end` is received, so that the missing
//! WAL on tier 1 is never taken for a loss and its start is not forgotten: WAL that is missing here below `end` is in
//! tier 2, or in a gap that is recorded together with it. `end` only grows. This is a separate file, which older
//! programs leave alone: to them tier 1 begins in the middle.

use super::{
    WalStore,
    cluster::{Cluster, State, lock},
    kept::{AllTakenOver, TakenOver},
    record::store_gaps,
    types::Gap,
};
use crate::{Error, Op, disk::Disk, layout::ClusterName, record};
use klio_pg::{Lsn, SegmentSize, TimelineId};
use std::path::PathBuf;

const FILE: &str = "taken_over.json";

/// Reads the file; empty when there is none.
pub(super) fn load(disk: &dyn Disk, cluster: &Cluster) -> Result<AllTakenOver, Error> {
    let all: Vec<TakenOver> = record::load(disk, &path(cluster))?.unwrap_or_default();
    Ok(all.into_iter().map(|taken| (taken.timeline, taken)).collect())
}

fn path(cluster: &Cluster) -> PathBuf {
    cluster.directory().join(FILE)
}

impl State {
    /// Whether a byte is not expected on tier 1, because tier 2 had it when the stream continued behind it.
    pub(super) fn is_taken_over(&self, timeline: TimelineId, lsn: Lsn) -> bool {
        self.taken_over.get(&timeline).is_some_and(|taken| taken.holds(lsn))
    }
}

impl WalStore {
    /// The WAL that only tier 2 had of each timeline when its stream continued behind it.
    pub fn taken_over(&self, name: &ClusterName) -> Vec<TakenOver> {
        let cluster = self.find(name);
        cluster.map(|c| lock(&c.state).taken_over.values().cloned().collect()).unwrap_or_default()
    }

    /// Records durably what only tier 2 has of timelines whose stream continues behind it, and the gaps that neither
    /// tier fills. A recorded entry that reaches further stays.
    ///
    /// # Errors
    /// `NotFound` for an unknown cluster; an I/O error of the disk, and then at most the gaps are recorded.
    pub fn take_over(
        &self,
        name: &ClusterName,
        lines: &[TakenOver],
        gaps: Vec<Gap>,
    ) -> Result<(), Error> {
        let cluster = self.need(name, Op::Write)?;
        let _one = lock(&cluster.op);
        cluster.ensure_loaded()?;
        let size = cluster.pinned()?.segment_size;
        let (mut all, mut recorded) = {
            let state = lock(&cluster.state);
            (state.taken_over.clone(), state.gaps.clone())
        };
        let is_new = |gap: &Gap| {
            !recorded.iter().any(|g| (g.timeline, g.from, g.to) == (gap.timeline, gap.from, gap.to))
        };
        let gaps: Vec<Gap> = gaps.into_iter().filter(is_new).collect();
        // The gaps come first: a taken-over stretch without its gaps would claim bytes that neither tier has.
        if !gaps.is_empty() {
            recorded.extend(gaps);
            store_gaps(self.disk(), &cluster.directory().join("gaps.json"), &recorded)?;
            lock(&cluster.state).gaps = recorded;
        }
        lines.iter().for_each(|line| join(&mut all, line, size));
        let list: Vec<TakenOver> = all.values().cloned().collect();
        record::store(self.disk(), &path(&cluster), &list)?;
        lock(&cluster.state).taken_over = all;
        Ok(())
    }
}

fn join(all: &mut AllTakenOver, line: &TakenOver, size: SegmentSize) {
    let end = line.end.segment_start(size);
    let known = all.entry(line.timeline).or_insert_with(|| TakenOver { end, ..line.clone() });
    known.start = known.start.min(line.start);
    known.end = known.end.max(end);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        disk::{Restart, SimDisk},
        layout::WalFile,
        record::Unknown,
        testing::SimulatedWal,
        wal::{OpenRequest, Removed, WalOptions},
    };
    use klio_pg::TimelineHistory;
    use std::{path::Path, sync::Arc};

    const SEGMENT: u64 = 1 << 20;

    fn timeline() -> TimelineId {
        TimelineId::new(1).unwrap()
    }

    fn lsn(segments: u64) -> Lsn {
        Lsn::new(segments * SEGMENT)
    }

    fn segment(number: u64) -> WalFile {
        format!("0000000100000000{number:08X}").parse().unwrap()
    }

    fn open(disk: &Arc<SimDisk>) -> WalStore {
        WalStore::open(disk.clone(), "/tier1".into(), WalOptions::default()).unwrap()
    }

    fn new(disk: &Arc<SimDisk>, cluster: &ClusterName) -> WalStore {
        disk.create_dir(Path::new("/tier1")).unwrap();
        let store = open(disk);
        store.pin(cluster, SimulatedWal::small(7).pinned()).unwrap();
        store
    }

    fn write(store: &WalStore, cluster: &ClusterName, from: Lsn, to: Lsn) {
        let request = OpenRequest {
            timeline: timeline(),
            start: from,
            gap: None,
            now_unix: 0.0,
            slot_restart: None,
        };
        let mut writer = store.open_writer(cluster, &request).unwrap();
        let history = TimelineHistory::root(timeline());
        writer.append(from, &SimulatedWal::small(7).bytes(&history, from, to)).unwrap();
        writer.flush().unwrap();
    }

    fn taken(start: u64, end: Lsn) -> TakenOver {
        TakenOver { timeline: timeline(), start: lsn(start), end, unknown: Unknown::default() }
    }

    /// P2: WAL that was acknowledged by the previous tier 1 is not lost, and the stream continues behind it.
    #[test]
    fn a_new_tier_1_goes_on_at_the_end_of_what_tier_2_has() {
        let (disk, cluster) = (Arc::new(SimDisk::new(3)), "pg".parse().unwrap());
        let mut store = new(&disk, &cluster);
        // A partial segment is received again from its beginning, because the complete segment is another object.
        store.take_over(&cluster, &[taken(2, lsn(7).advance(99))], vec![]).unwrap();
        for round in 0..2 {
            let position = store.positions(&cluster)[0];
            assert_eq!((position.start, position.flushed), (lsn(2), lsn(7)), "round {round}");
            for (number, expected) in [(1, None), (2, Some(Removed::Tier2Only)), (7, None)] {
                assert_eq!(store.removed(&cluster, segment(number)), expected, "{number}");
                let kind = store.read(&cluster, segment(number)).unwrap_err().kind;
                assert_eq!(kind, crate::Kind::NotFound, "{number}");
            }
            let request = OpenRequest {
                timeline: timeline(),
                start: lsn(9),
                gap: None,
                now_unix: 0.0,
                slot_restart: None,
            };
            assert!(store.open_writer(&cluster, &request).is_err(), "WAL is left out");
            drop(store);
            disk.restart(Restart::Kill);
            store = open(&disk);
        }
        write(&store, &cluster, lsn(7), lsn(8).advance(8192));
        let position = store.positions(&cluster)[0];
        assert_eq!((position.start, position.flushed), (lsn(2), lsn(8).advance(8192)));
        // Eviction and the horizon fit together with what was taken over.
        store.raise_horizon(&cluster, timeline(), lsn(5), lsn(4)).unwrap();
        assert_eq!(store.removed(&cluster, segment(3)), Some(Removed::Expired));
        assert_eq!(store.removed(&cluster, segment(6)), Some(Removed::Tier2Only));
        assert_eq!(store.positions(&cluster)[0].start, lsn(4));
    }

    /// A disk that was reset to an earlier state: its last journal ends in the middle of a segment that tier 2 has
    /// complete.
    #[test]
    fn a_tier_1_that_was_set_back_keeps_what_it_has_and_goes_on_behind_tier_2() {
        let (disk, cluster) = (Arc::new(SimDisk::new(4)), "pg".parse().unwrap());
        let store = new(&disk, &cluster);
        write(&store, &cluster, lsn(2), lsn(3).advance(4096));
        let gap = Gap {
            timeline: timeline(),
            from: lsn(5),
            to: lsn(6),
            reason: "lost with tier 1".into(),
            recorded_unix: 1.0,
            unknown: Unknown::default(),
        };
        store.take_over(&cluster, &[taken(1, lsn(8))], vec![gap.clone()]).unwrap();
        // Repeated, as after a lost answer: one gap stays one.
        store.take_over(&cluster, &[taken(1, lsn(8))], vec![gap]).unwrap();
        assert_eq!(store.gaps(&cluster).len(), 1);
        write(&store, &cluster, lsn(8), lsn(9).advance(8192));
        drop(store);
        disk.restart(Restart::Kill);
        let store = open(&disk);
        assert!(store.problems(&cluster).is_empty(), "{:?}", store.problems(&cluster));
        let position = store.positions(&cluster)[0];
        assert_eq!((position.start, position.flushed), (lsn(1), lsn(9).advance(8192)));
        for file in store.unsealed(&cluster) {
            store.seal(&cluster, file).unwrap();
        }
        // The existing WAL stays, and no journal waits forever to be sealed.
        assert_eq!(store.positions(&cluster)[0].sealed, lsn(9));
        let partial = WalFile::Partial("000000010000000000000003".parse().unwrap());
        assert!(store.list(&cluster).unwrap().iter().any(|stored| stored.file == partial));
        assert_eq!(store.removed(&cluster, segment(4)), Some(Removed::Tier2Only));
    }
}
