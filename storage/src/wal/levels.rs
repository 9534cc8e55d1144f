//! `<cluster>/wal_levels.json`: where PostgreSQL began and ended to write WAL with `wal_level = minimal`.
//!
//! | field | what |
//! |---|---|
//! | `timeline` | timeline of the WAL record that changes the level |
//! | `lsn` | the first byte of that record |
//! | `minimal` | true: WAL from here on leaves out bulk loads; false: it no longer does |
//!
//! In the format of `crate::record`. Recovery cannot pass the record that begins such a stretch, whatever WAL follows,
//! so a recovery plan treats it as a hole. A change is recorded before its bytes are acknowledged. Only changes are
//! stored, so a cluster that never uses `minimal` has no such file. Entries are only added, so each tier can take over
//! the entries of the other.

use super::{
    WalStore,
    cluster::{Cluster, lock},
    kept::{LevelChange, join_levels},
};
use crate::{
    Error, Op,
    disk::read_small,
    layout::{ClusterName, LEVELS},
    record::{self, Unknown},
};
use klio_pg::{Lsn, TimelineId, WalLevel, WalParameters};
use std::{io, path::PathBuf};

fn path(cluster: &Cluster) -> PathBuf {
    cluster.directory().join(LEVELS)
}

impl Cluster {
    /// Records the level changes that a receiver found, if they are new.
    pub(super) fn note_levels(
        &self,
        timeline: TimelineId,
        found: &[(Lsn, WalParameters)],
    ) -> Result<(), Error> {
        let change = |(lsn, parameters): &(Lsn, WalParameters)| {
            let minimal = parameters.wal_level == WalLevel::Minimal;
            LevelChange { timeline, lsn: *lsn, minimal, unknown: Unknown::default() }
        };
        self.add_levels(&found.iter().map(change).collect::<Vec<_>>()).map(drop)
    }

    fn add_levels(&self, more: &[LevelChange]) -> Result<bool, Error> {
        let _one = lock(&self.noting);
        let known = lock(&self.state).levels.clone();
        let all = join_levels(&known, more);
        if all == known {
            return Ok(false);
        }
        record::store(self.disk(), &path(self), &all)?;
        let begun = all.iter().filter(|change| change.minimal && !known.contains(change));
        for LevelChange { timeline, lsn, .. } in begun {
            tracing::error!(cluster = %self.name, ?timeline, %lsn, "recovery cannot pass this WAL (wal_level = minimal); take a base backup after it");
        }
        lock(&self.state).levels = all;
        Ok(true)
    }
}

impl WalStore {
    /// Every recorded change to or from `wal_level = minimal`, by timeline and LSN.
    pub fn levels(&self, name: &ClusterName) -> Vec<LevelChange> {
        self.find(name).map(|cluster| lock(&cluster.state).levels.clone()).unwrap_or_default()
    }

    /// Adds the changes that the other tier knows. True when one was new.
    ///
    /// # Errors
    /// `NotFound` for an unknown cluster; an I/O error of the disk.
    pub fn add_levels(&self, name: &ClusterName, more: &[LevelChange]) -> Result<bool, Error> {
        self.need(name, Op::Write)?.add_levels(more)
    }

    /// The bytes of the file on tier 1; `None` when there is none.
    ///
    /// # Errors
    /// An I/O error of the disk.
    pub fn levels_file(&self, name: &ClusterName) -> Result<Option<Vec<u8>>, Error> {
        let cluster = self.need(name, Op::Read)?;
        let _one = lock(&cluster.noting);
        let path = path(&cluster);
        match read_small(self.disk(), &path, record::LIMIT_BYTES) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io(Op::Read, &path, e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        disk::{Disk, Restart, SimDisk},
        testing::SimulatedWal,
        wal::WalOptions,
    };
    use std::sync::Arc;

    fn change(timeline: u32, lsn: u64, minimal: bool) -> LevelChange {
        LevelChange {
            timeline: TimelineId::new(timeline).unwrap(),
            lsn: Lsn::new(lsn),
            minimal,
            unknown: Unknown::default(),
        }
    }

    #[test]
    fn only_changes_are_kept_whatever_the_order_in_which_they_come() {
        let some = [change(1, 50, false), change(1, 100, true), change(1, 150, true)];
        let more = [
            change(1, 200, false),
            change(1, 300, false),
            change(2, 10, false),
            change(1, 400, true),
        ];
        let expected = [change(1, 100, true), change(1, 200, false), change(1, 400, true)];
        assert_eq!(join_levels(&some, &more), expected);
        assert_eq!(join_levels(&more, &some), expected);
        assert_eq!(join_levels(&expected, &[]), expected);
    }

    #[test]
    fn what_was_noted_is_there_after_a_restart() {
        let (disk, cluster) = (Arc::new(SimDisk::new(3)), "pg".parse().unwrap());
        disk.create_dir(std::path::Path::new("/tier1")).unwrap();
        let open = || WalStore::open(disk.clone(), "/tier1".into(), WalOptions::default()).unwrap();
        let store = open();
        store.pin(&cluster, SimulatedWal::small(7).pinned()).unwrap();
        assert_eq!(store.levels_file(&cluster).unwrap(), None);
        assert!(!store.add_levels(&cluster, &[change(1, 7, false)]).unwrap());
        assert!(store.add_levels(&cluster, &[change(1, 8, true)]).unwrap());
        assert!(!store.add_levels(&cluster, &[change(1, 8, true)]).unwrap());
        drop(store);
        disk.restart(Restart::Kill);
        let store = open();
        assert_eq!(store.levels(&cluster), [change(1, 8, true)]);
        let file = store.levels_file(&cluster).unwrap().unwrap();
        assert_eq!(LevelChange::decode_all(&file, "x").unwrap(), store.levels(&cluster));
    }
}
