//! Snapshots that no record names: the remains of backups that were never committed.
//!
//! A listing may leave out a record, a new server may see a bucket for the first time, and a backup may be about to be
//! committed. So a snapshot is removed in two phases, like packs. The first run that finds it without a record marks
//! it, by the server's clock only (`<cluster>/orphans.json`, tier 1 only, in the format of `record`). A run days later
//! forgets it if no listing in between named it, and if neither tier has a record of its backup's name when asked for
//! it by that name. So nothing is forgotten in the first days of an empty tier 1. Losing the file costs only those
//! days.

use super::Ground;
use anyhow::{Context, bail};
use klio_storage::{
    catalog::BackupRecord,
    layout::BackupName,
    record,
    repository::{SnapshotId, SnapshotSummary},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

/// Since when each snapshot has been without a record, in Unix seconds.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Marks {
    #[serde(default)]
    since_unix: BTreeMap<String, f64>,
}

impl Marks {
    /// The marks after a listing at the time `now_unix`, and the snapshots that have been marked for long enough.
    fn after(
        &self,
        without: &BTreeSet<SnapshotId>,
        now_unix: f64,
        wait_seconds: f64,
    ) -> (Self, BTreeSet<SnapshotId>) {
        let (mut marks, mut due) = (Self::default(), BTreeSet::new());
        for id in without {
            let known = self.since_unix.get(&id.to_string()).copied();
            // A mark that lies in the future comes from a clock that was wrong.
            let since = known.filter(|since| *since <= now_unix).unwrap_or(now_unix);
            if since + wait_seconds <= now_unix {
                due.insert(*id);
            }
            marks.since_unix.insert(id.to_string(), since);
        }
        (marks, due)
    }
}

fn path(ground: &Ground) -> PathBuf {
    ground.root.join(ground.cluster.as_str()).join("orphans.json")
}

/// Marks the snapshots without a record, and returns those that may be removed now.
pub(super) fn due(
    ground: &Ground,
    all: &[SnapshotSummary],
    recorded: &BTreeSet<SnapshotId>,
    now_unix: f64,
    wait_seconds: f64,
) -> anyhow::Result<BTreeSet<SnapshotId>> {
    let without =
        all.iter().map(|snapshot| snapshot.id).filter(|id| !recorded.contains(id)).collect();
    let path = path(ground);
    let known: Marks = match record::load(ground.disk.as_ref(), &path) {
        Ok(known) => known.unwrap_or_default(),
        Err(error) => {
            tracing::warn!(%error, "cannot read orphans.json; snapshots without a record are marked again");
            Marks::default()
        }
    };
    let (marks, due) = known.after(&without, now_unix, wait_seconds);
    if marks != known {
        record::store(ground.disk.as_ref(), &path, &marks).context("mark snapshots")?;
    }
    Ok(due)
}

/// The backups that do have one of these snapshots, found by asking both tiers for their names. P6: a record that
/// exists and cannot be read stops the work.
pub(super) fn asked_for(
    ground: &Ground,
    all: &[SnapshotSummary],
    forget: &BTreeSet<SnapshotId>,
) -> anyhow::Result<BTreeMap<SnapshotId, BackupName>> {
    let mut found = BTreeMap::new();
    for snapshot in all.iter().filter(|snapshot| forget.contains(&snapshot.id)) {
        let Some(name) = &snapshot.backup else { continue };
        for body in records_of(ground, name)? {
            let id: SnapshotId = body.snapshot.parse().context("read a snapshot's id")?;
            if forget.contains(&id) {
                found.insert(id, name.clone());
            }
        }
    }
    Ok(found)
}

fn records_of(ground: &Ground, name: &BackupName) -> anyhow::Result<Vec<BackupRecord>> {
    let key = name.record_key(&ground.cluster);
    let asking = || format!("ask for the record of {name}");
    let mut found = Vec::new();
    let local: Option<BackupRecord> =
        record::load(ground.disk.as_ref(), &ground.root.join(&key)).with_context(asking)?;
    found.extend(local);
    if let Some(tier2) = &ground.tier2 {
        let read = tier2.read_small(&key, record::LIMIT_BYTES);
        if let Some(bytes) = ground.runtime.block_on(read).with_context(asking)? {
            found.push(record::decode(&bytes, &key).with_context(asking)?);
        }
    }
    if let Some(other) = found.iter().find(|body| body.name != *name) {
        bail!("ask for the record of {name}: found that of {}", other.name);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use klio_storage::tier2::Sha256Sum;

    const DAY: f64 = 86_400.0;

    fn id(text: &str) -> SnapshotId {
        SnapshotId::new(Sha256Sum::of(text.as_bytes()))
    }

    #[test]
    fn a_snapshot_goes_only_when_it_was_without_a_record_for_days() {
        let (a, b) = (id("a"), id("b"));
        let none = BTreeSet::new();
        // The first run of an empty tier 1, years after the snapshot was made.
        let (marks, due) = Marks::default().after(&BTreeSet::from([a]), 1000.0 * DAY, 3.0 * DAY);
        assert_eq!(due, none);
        let (marks, due) = marks.after(&BTreeSet::from([a, b]), 1002.0 * DAY, 3.0 * DAY);
        assert_eq!(due, none);
        let (_, due) = marks.after(&BTreeSet::from([a, b]), 1003.0 * DAY, 3.0 * DAY);
        assert_eq!(due, BTreeSet::from([a]));
        // A listing in between named its record, so the wait starts again.
        let (marks, _) = marks.after(&BTreeSet::from([b]), 1002.5 * DAY, 3.0 * DAY);
        let (_, due) = marks.after(&BTreeSet::from([a, b]), 1003.0 * DAY, 3.0 * DAY);
        assert_eq!(due, none);
    }

    #[test]
    fn a_mark_of_the_future_begins_anew() {
        let all = BTreeSet::from([id("a")]);
        let (marks, _) = Marks::default().after(&all, 1400.0 * DAY, 3.0 * DAY);
        let (marks, due) = marks.after(&all, 1000.0 * DAY, 3.0 * DAY);
        assert!(due.is_empty() && marks.since_unix.values().all(|since| *since == 1000.0 * DAY));
        assert_eq!(marks.after(&all, 1003.0 * DAY, 3.0 * DAY).1, all);
    }
}
