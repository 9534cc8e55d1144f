//! `<cluster>/horizon.json`: what was removed of each timeline on purpose, and the functions that remove
//! it.
//!
//! | field | what |
//! |---|---|
//! | `timeline` | the timeline |
//! | `first` | the first byte that was ever held |
//! | `held_from` | below this there is no WAL in either tier: retention removed it |
//! | `local_from` | below this WAL may be missing on tier 1: it is in tier 2 |
//!
//! In the format of `crate::record`. `first <= held_from <= local_from`, and each only grows. The file is
//! written before anything is removed, so that removed WAL is never mistaken for lost WAL, and a restart
//! shows the same start as before. WAL that was removed on purpose does not mark the end of WAL (P7).
//!
//! Only finished files are removed, only below `local_from`, and never the last one of a timeline,
//! because it says how far the timeline was received (P2). P5 is up to the caller, which proves each file
//! in tier 2 right before it removes it.

use super::{
    WalStore,
    cluster::{Cluster, State, lock},
    kept::{Horizon, Horizons, Removed},
};
use crate::{
    Error, Kind, Op,
    disk::Disk,
    layout::{ClusterName, Form, WalFile},
    record::{self, Unknown},
};
use klio_pg::{Lsn, SegmentName, TimelineId};
use std::{io, path::PathBuf};

const FILE: &str = "horizon.json";

/// Reads the file; empty when there is none.
pub(super) fn load(disk: &dyn Disk, cluster: &Cluster) -> Result<Horizons, Error> {
    let all: Vec<Horizon> = record::load(disk, &path(cluster))?.unwrap_or_default();
    Ok(all.into_iter().map(|horizon| (horizon.timeline, horizon)).collect())
}

fn path(cluster: &Cluster) -> PathBuf {
    cluster.directory().join(FILE)
}

impl State {
    /// Why a segment is missing, if it was removed on purpose.
    pub(super) fn removed(&self, timeline: TimelineId, start: Lsn) -> Option<Removed> {
        let taken = || self.is_taken_over(timeline, start).then_some(Removed::Tier2Only);
        let Some(horizon) = self.horizons.get(&timeline) else { return taken() };
        match start {
            start if start < horizon.first || start >= horizon.local_from => taken(),
            start if start < horizon.held_from => Some(Removed::Expired),
            _ => Some(Removed::Tier2Only),
        }
    }
}

impl State {
    /// Whether a file lies entirely below the horizon and is not the last finished one of its timeline.
    fn may_remove(&self, file: WalFile) -> bool {
        let size = self.pinned.map(|p| p.segment_size);
        let (Some(name), Some(size)) = (start_of(file), size) else { return false };
        let Some(end) = name.start_lsn(size).map(|start| start.advance(size.bytes())) else {
            return false;
        };
        let horizon = self.horizons.get(&name.timeline());
        let sealed = self.lines.get(&name.timeline()).and_then(|line| line.sealed);
        horizon.is_some_and(|h| end <= h.local_from) && sealed.is_some_and(|sealed| end < sealed.1)
    }
}

impl WalStore {
    /// What was removed of each timeline, ascending.
    pub fn horizons(&self, name: &ClusterName) -> Vec<Horizon> {
        let cluster = self.find(name);
        cluster.map(|c| lock(&c.state).horizons.values().cloned().collect()).unwrap_or_default()
    }

    /// Why a file is missing on tier 1, if it was removed on purpose.
    pub fn removed(&self, name: &ClusterName, file: WalFile) -> Option<Removed> {
        let cluster = self.find(name)?;
        let state = lock(&cluster.state);
        let (WalFile::Segment(segment) | WalFile::Partial(segment)) = file else { return None };
        let start = segment.start_lsn(state.pinned?.segment_size)?;
        state.removed(segment.timeline(), start)
    }

    /// Records durably that WAL of a timeline below these positions may be absent from tier 1, and from
    /// both tiers. A position never goes back: a higher recorded one stays. Both are rounded down to a
    /// segment boundary, and `held_from` is limited to `local_from`.
    ///
    /// # Errors
    /// `NotFound` for a timeline without WAL; an I/O error of the disk, and then nothing is recorded.
    pub fn raise_horizon(
        &self,
        name: &ClusterName,
        timeline: TimelineId,
        local_from: Lsn,
        held_from: Lsn,
    ) -> Result<Horizon, Error> {
        let cluster = self.need(name, Op::Write)?;
        let _one = lock(&cluster.op);
        cluster.ensure_loaded()?;
        let (mut horizons, first, size) = {
            let state = lock(&cluster.state);
            let position = state.positions().into_iter().find(|p| p.timeline == timeline);
            let first = position.map(|p| p.start);
            (state.horizons.clone(), first, state.pinned.map(|p| p.segment_size))
        };
        let (Some(first), Some(size)) = (first, size) else {
            let detail = "expected WAL of this timeline, found none";
            return Err(Error::new(Kind::NotFound, Op::Write, timeline, detail));
        };
        let horizon = horizons.entry(timeline).or_insert(Horizon {
            timeline,
            first,
            held_from: first,
            local_from: first,
            unknown: Unknown::default(),
        });
        horizon.local_from = horizon.local_from.max(local_from.segment_start(size));
        let held_from = held_from.segment_start(size).min(horizon.local_from);
        horizon.held_from = horizon.held_from.max(held_from);
        let horizon = horizon.clone();
        let all: Vec<&Horizon> = horizons.values().collect();
        record::store(self.disk(), &path(&cluster), &all)?;
        lock(&cluster.state).horizons = horizons;
        Ok(horizon)
    }

    /// The finished and partial segments of a timeline that lie entirely below its horizon, oldest first,
    /// without the last finished file.
    ///
    /// # Errors
    /// An I/O error of the disk.
    pub fn removable(
        &self,
        name: &ClusterName,
        timeline: TimelineId,
    ) -> Result<Vec<super::StoredFile>, Error> {
        let cluster = self.need(name, Op::List)?;
        let mut files = self.list(name)?;
        let state = lock(&cluster.state);
        files.retain(|f| f.file.timeline() == timeline && state.may_remove(f.file));
        files.sort_by_key(|f| (start_of(f.file), f.file));
        Ok(files)
    }

    /// Removes a finished file from tier 1 in every form it has there, and returns the number of bytes
    /// freed. The caller has proven the file in tier 2 a moment ago (P5), or it has expired (P6).
    ///
    /// # Errors
    /// `Invalid` for a file that the horizon protects; an I/O error of the disk.
    pub fn remove(&self, name: &ClusterName, file: WalFile) -> Result<u64, Error> {
        let cluster = self.need(name, Op::Remove)?;
        if !lock(&cluster.state).may_remove(file) {
            let detail = "expected a file below the horizon of its timeline, found another";
            return Err(Error::new(Kind::Invalid, Op::Remove, file, detail));
        }
        let mut bytes = 0;
        for form in [Form::Plain, Form::Age] {
            let path = cluster.path_in(file, form);
            let size = match self.disk().stat(&path) {
                Ok(stat) => stat.size,
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(Error::io(Op::Remove, &path, e)),
            };
            self.disk().remove(&path).map_err(|e| Error::io(Op::Remove, &path, e))?;
            bytes += size;
        }
        Ok(bytes)
    }
}

fn start_of(file: WalFile) -> Option<SegmentName> {
    match file {
        WalFile::Segment(name) | WalFile::Partial(name) => Some(name),
        WalFile::History(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        disk::{Restart, SimDisk},
        testing::SimulatedWal,
        wal::{OpenRequest, WalOptions},
    };
    use klio_pg::TimelineHistory;
    use std::sync::Arc;

    const SEGMENT: u64 = 1 << 20;

    fn timeline() -> TimelineId {
        TimelineId::new(1).unwrap()
    }

    fn segment(number: u64) -> WalFile {
        format!("0000000100000000{number:08X}").parse().unwrap()
    }

    fn open(disk: &Arc<SimDisk>) -> WalStore {
        WalStore::open(disk.clone(), "/tier1".into(), WalOptions::default()).unwrap()
    }

    /// Segments 1 to 5 sealed, half of 6 received.
    fn filled(disk: &Arc<SimDisk>, cluster: &ClusterName) -> WalStore {
        disk.create_dir(std::path::Path::new("/tier1")).unwrap();
        let (store, wal) = (open(disk), SimulatedWal::small(7));
        store.pin(cluster, wal.pinned()).unwrap();
        let start = Lsn::new(SEGMENT);
        let request = OpenRequest {
            timeline: timeline(),
            start,
            gap: None,
            now_unix: 0.0,
            slot_restart: None,
        };
        let mut writer = store.open_writer(cluster, &request).unwrap();
        let mut at = start;
        while at < Lsn::new(6 * SEGMENT + SEGMENT / 2) {
            let to = at.advance(SEGMENT / 2);
            writer.append(at, &wal.bytes(&TimelineHistory::root(timeline()), at, to)).unwrap();
            writer.flush().unwrap();
            at = to;
        }
        drop(writer);
        for file in store.unsealed(cluster) {
            store.seal(cluster, file).unwrap();
        }
        store
    }

    #[test]
    fn the_beginning_does_not_jump_and_an_absence_has_its_reason() {
        let (disk, cluster) = (Arc::new(SimDisk::new(3)), "pg".parse().unwrap());
        let mut store = filled(&disk, &cluster);
        let position = store.positions(&cluster);
        let raised =
            store.raise_horizon(&cluster, timeline(), Lsn::new(4 * SEGMENT + 9), Lsn::ZERO);
        assert_eq!(raised.unwrap().local_from, Lsn::new(4 * SEGMENT));
        let files = store.removable(&cluster, timeline()).unwrap();
        let names: Vec<WalFile> = files.iter().map(|f| f.file).collect();
        assert_eq!(names, [segment(1), segment(2), segment(3)]);
        for file in names {
            assert!(store.remove(&cluster, file).unwrap() > 0);
        }
        for _ in 0..2 {
            assert_eq!(store.positions(&cluster), position);
            assert_eq!(store.read(&cluster, segment(2)).unwrap_err().kind, Kind::NotFound);
            assert_eq!(store.removed(&cluster, segment(2)), Some(Removed::Tier2Only));
            assert_eq!(store.removed(&cluster, segment(0)), None);
            assert_eq!(store.removed(&cluster, segment(4)), None);
            assert!(store.read(&cluster, segment(4)).is_ok());
            assert!(store.problems(&cluster).is_empty());
            drop(store);
            disk.restart(Restart::Kill);
            store = open(&disk);
        }
        store.raise_horizon(&cluster, timeline(), Lsn::ZERO, Lsn::new(3 * SEGMENT)).unwrap();
        assert_eq!(store.removed(&cluster, segment(2)), Some(Removed::Expired));
        assert_eq!(store.removed(&cluster, segment(3)), Some(Removed::Tier2Only));
        assert_eq!(store.positions(&cluster)[0].start, Lsn::new(3 * SEGMENT));
        assert_eq!(store.horizons(&cluster)[0].first, Lsn::new(SEGMENT));
    }

    /// P2: the file that says how far the stream was received is never removed.
    #[test]
    fn neither_the_last_sealed_segment_nor_what_the_horizon_protects_can_be_removed() {
        let (disk, cluster) = (Arc::new(SimDisk::new(4)), "pg".parse().unwrap());
        let store = filled(&disk, &cluster);
        assert_eq!(store.remove(&cluster, segment(1)).unwrap_err().kind, Kind::Invalid);
        store.raise_horizon(&cluster, timeline(), Lsn::new(900 * SEGMENT), Lsn::ZERO).unwrap();
        for protected in [segment(5), segment(6), "00000002.history".parse().unwrap()] {
            let error = store.remove(&cluster, protected).unwrap_err();
            assert_eq!(error.kind, Kind::Invalid, "{protected}");
        }
        assert_eq!(store.removable(&cluster, timeline()).unwrap().len(), 4);
        let position = store.positions(&cluster);
        for file in store.removable(&cluster, timeline()).unwrap() {
            store.remove(&cluster, file.file).unwrap();
        }
        drop(store);
        disk.restart(Restart::Kill);
        assert_eq!(open(&disk).positions(&cluster), position);
    }

    #[test]
    fn a_damaged_horizon_is_a_problem_and_stops_no_receiving() {
        let (disk, cluster) = (Arc::new(SimDisk::new(5)), "pg".parse().unwrap());
        let store = filled(&disk, &cluster);
        store.raise_horizon(&cluster, timeline(), Lsn::new(3 * SEGMENT), Lsn::ZERO).unwrap();
        drop(store);
        disk.restart(Restart::Kill);
        crate::disk::durable::overwrite(
            disk.as_ref(),
            std::path::Path::new("/tier1/pg/horizon.json"),
            b"{",
        )
        .unwrap();
        let store = open(&disk);
        assert!(
            store.problems(&cluster)[0].contains("horizon.json"),
            "{:?}",
            store.problems(&cluster)
        );
        let start = store.positions(&cluster)[0].flushed;
        let request = OpenRequest {
            timeline: timeline(),
            start,
            gap: None,
            now_unix: 0.0,
            slot_restart: None,
        };
        assert!(store.open_writer(&cluster, &request).is_ok());
    }
}
