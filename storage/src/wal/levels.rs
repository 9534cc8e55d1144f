//! `<cluster>/wal_levels.json`: where a server began to write WAL with `wal_level = minimal`, and where it ended.
//!
//! | field | what |
//! |---|---|
//! | `timeline` | of the record that says so |
//! | `lsn` | its first byte |
//! | `minimal` | WAL from here on leaves bulk loads out; or no longer |
//!
//! In the shape of `crate::record`. Recovery does not pass the record that begins such a stretch, whatever is held behind it:
//! to whoever plans one it is a hole. Noted before the bytes are acknowledged. Only changes are kept, so a database that never
//! does this has no such file. Entries are only added: what one tier has, the other may take over.

use super::{
    WalStore,
    cluster::{Cluster, lock},
};
use crate::{
    Error, Op,
    disk::read_small,
    layout::ClusterName,
    record::{self, Unknown},
};
use klio_pg::{Lsn, TimelineId, WalLevel, WalParameters};
use serde::{Deserialize, Serialize};
use std::{io, path::PathBuf};

/// The file's name in a cluster's directory of either tier.
pub const LEVELS: &str = "wal_levels.json";

/// A change to or from `wal_level = minimal`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LevelChange {
    /// Of the record that says so.
    pub timeline: TimelineId,
    /// Its first byte.
    pub lsn: Lsn,
    /// To it, or away from it.
    pub minimal: bool,
    /// What a newer version says besides.
    #[serde(flatten)]
    pub unknown: Unknown,
}

impl LevelChange {
    /// Reads the bytes of the file in either tier. `place` is for the error.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn decode_all(bytes: &[u8], place: &str) -> Result<Vec<Self>, Error> {
        record::decode(bytes, place)
    }
}

/// Both, ascending. What changes nothing is left out.
pub fn join_levels(one: &[LevelChange], other: &[LevelChange]) -> Vec<LevelChange> {
    let mut all = [one, other].concat();
    all.sort_by_key(|change| (change.timeline, change.lsn));
    all.dedup_by_key(|change| (change.timeline, change.lsn));
    let mut minimal = None;
    all.retain(|change| {
        let before = minimal.replace((change.timeline, change.minimal));
        match before {
            Some((timeline, before)) if timeline == change.timeline => before != change.minimal,
            _ => change.minimal,
        }
    });
    all
}

fn path(cluster: &Cluster) -> PathBuf {
    cluster.directory().join(LEVELS)
}

impl Cluster {
    /// Puts what a receiver found on record, if it is news.
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
            tracing::error!(cluster = %self.name, ?timeline, %lsn, "WAL is written with wal_level = minimal from here on: no recovery passes this; take a base backup when it is over");
        }
        lock(&self.state).levels = all;
        Ok(true)
    }
}

impl WalStore {
    /// Every change to and from `wal_level = minimal` that was seen, by timeline and place.
    pub fn levels(&self, name: &ClusterName) -> Vec<LevelChange> {
        self.find(name).map(|cluster| lock(&cluster.state).levels.clone()).unwrap_or_default()
    }

    /// Adds what the other tier knows. True when it is news.
    ///
    /// # Errors
    /// `NotFound` for a cluster that is not here; as the disk fails.
    pub fn add_levels(&self, name: &ClusterName, more: &[LevelChange]) -> Result<bool, Error> {
        self.need(name, Op::Write)?.add_levels(more)
    }

    /// The file as it lies on tier 1; `None` when there is none.
    ///
    /// # Errors
    /// As the disk fails.
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
