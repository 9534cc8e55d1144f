//! What is learnt about a backup after its record was written: `<cluster>/verify/<name>.json` and
//! `<cluster>/drills/<name>.json`, tier 1 only, the newest one of each, in the format of `crate::record`.
//!
//! The newest outcome is the one that arrived last, whatever its time says, because clocks jump. Losing the files loses
//! knowledge, never a backup. An unreadable file is an error for the caller, which reports it and continues. Two
//! decisions depend on them: a backup in which verification found damage does not take the place of a good one in
//! retention, and the next verification reads again whatever they list as damaged.

use super::{DrillOutcome, VerifyOutcome};
use crate::{
    Error, Op,
    disk::{Disk, durable},
    layout::{BackupName, ClusterName},
    record,
};
use serde::Serialize;
use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
};

const VERIFIED: &str = "verify";
const DRILLED: &str = "drills";

fn path(root: &Path, cluster: &ClusterName, directory: &str, name: &BackupName) -> PathBuf {
    root.join(cluster.as_str()).join(directory).join(format!("{name}.json"))
}

/// The newest verification of a backup; `None` when there was none. `root` is that of tier 1.
///
/// # Errors
/// `Corrupt`, or an I/O error of the disk.
pub fn load_verified(
    disk: &dyn Disk,
    root: &Path,
    cluster: &ClusterName,
    name: &BackupName,
) -> Result<Option<VerifyOutcome>, Error> {
    record::load(disk, &path(root, cluster, VERIFIED, name))
}

/// The newest drill of a backup; `None` when there was none.
///
/// # Errors
/// `Corrupt`, or an I/O error of the disk.
pub fn load_drilled(
    disk: &dyn Disk,
    root: &Path,
    cluster: &ClusterName,
    name: &BackupName,
) -> Result<Option<DrillOutcome>, Error> {
    record::load(disk, &path(root, cluster, DRILLED, name))
}

/// The backups that have an outcome.
///
/// # Errors
/// An I/O error of the disk.
pub fn names(
    disk: &dyn Disk,
    root: &Path,
    cluster: &ClusterName,
) -> Result<BTreeSet<BackupName>, Error> {
    let mut names = BTreeSet::new();
    for directory in [VERIFIED, DRILLED] {
        let directory = root.join(cluster.as_str()).join(directory);
        match disk.list(&directory) {
            Ok(entries) => {
                names.extend(entries.iter().filter_map(|e| BackupName::parse_record(&e.name)));
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(Error::io(Op::List, &directory, e)),
        }
    }
    Ok(names)
}

/// Stores a verification for every backup that it covers, durably, replacing the previous one.
///
/// # Errors
/// An I/O error of the disk; some outcomes may have been written by then.
pub fn store_verified(
    disk: &dyn Disk,
    root: &Path,
    cluster: &ClusterName,
    outcome: &VerifyOutcome,
) -> Result<(), Error> {
    for name in &outcome.backups {
        store(disk, root, cluster, &path(root, cluster, VERIFIED, name), outcome)?;
    }
    Ok(())
}

/// Stores a drill, durably, replacing the previous one.
///
/// # Errors
/// An I/O error of the disk.
pub fn store_drilled(
    disk: &dyn Disk,
    root: &Path,
    cluster: &ClusterName,
    outcome: &DrillOutcome,
) -> Result<(), Error> {
    store(disk, root, cluster, &path(root, cluster, DRILLED, &outcome.backup), outcome)
}

/// Removes the outcomes of a backup that was deleted.
///
/// # Errors
/// An I/O error of the disk; missing files are not an error.
pub fn remove(
    disk: &dyn Disk,
    root: &Path,
    cluster: &ClusterName,
    name: &BackupName,
) -> Result<(), Error> {
    [VERIFIED, DRILLED].into_iter().try_for_each(|directory| {
        durable::remove_if_there(disk, &path(root, cluster, directory, name))
    })
}

fn store<T: Serialize>(
    disk: &dyn Disk,
    root: &Path,
    cluster: &ClusterName,
    path: &Path,
    outcome: &T,
) -> Result<(), Error> {
    durable::create_dir(disk, &root.join(cluster.as_str()))?;
    let directory = path.parent().ok_or_else(|| {
        Error::new(
            crate::Kind::Invalid,
            Op::Write,
            path.display(),
            "expected a directory, found none",
        )
    })?;
    durable::create_dir(disk, directory)?;
    record::store(disk, path, outcome)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::SimDisk;

    fn drill(finished: f64, ok: bool) -> DrillOutcome {
        DrillOutcome {
            backup: "b.1".parse().unwrap(),
            ok,
            finished_unix: finished,
            restore_seconds: 1.25,
            recovery_seconds: 2.5,
            check_seconds: 0.1,
            recovered_lsn: None,
            problems: vec![],
            unknown: record::Unknown::default(),
        }
    }

    #[test]
    fn what_arrives_last_is_kept_whatever_its_time_says() {
        let (disk, root) = (SimDisk::new(1), Path::new("/tier1"));
        disk.create_dir(root).unwrap();
        let cluster: ClusterName = "pg".parse().unwrap();
        let name = "b.1".parse().unwrap();
        let load = || load_drilled(&disk, root, &cluster, &name).unwrap();
        assert_eq!(load(), None);
        // The second drill ran on a machine whose clock was a year ahead.
        for (finished, ok) in [(5.0, true), (5.0 + 31_536_000.0, true), (7.0, false)] {
            store_drilled(&disk, root, &cluster, &drill(finished, ok)).unwrap();
            assert_eq!(load(), Some(drill(finished, ok)));
        }
        assert_eq!(names(&disk, root, &cluster).unwrap(), BTreeSet::from([name.clone()]));
        remove(&disk, root, &cluster, &name).unwrap();
        assert_eq!(load(), None);
    }

    #[test]
    fn an_outcome_that_cannot_be_read_is_an_error_and_is_replaced() {
        let (disk, root) = (SimDisk::new(1), Path::new("/"));
        let cluster: ClusterName = "pg".parse().unwrap();
        let name = "b.1".parse().unwrap();
        store_drilled(&disk, root, &cluster, &drill(5.0, true)).unwrap();
        durable::overwrite(&disk, Path::new("/pg/drills/b.1.json"), b"{").unwrap();
        assert!(load_drilled(&disk, root, &cluster, &name).is_err());
        store_drilled(&disk, root, &cluster, &drill(4.0, true)).unwrap();
        assert_eq!(load_drilled(&disk, root, &cluster, &name).unwrap(), Some(drill(4.0, true)));
    }
}
