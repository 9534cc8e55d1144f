//! What is learnt of a backup after its record was written: `<cluster>/verify/<name>.json` and
//! `<cluster>/drills/<name>.json`, tier 1 only, the newest one of each, in the shape of `crate::record`.
//!
//! Losing them loses knowledge, never a backup. One that cannot be read is an error for the caller, who
//! shows it and goes on: nothing is decided from them.

use super::{DrillOutcome, VerifyOutcome};
use crate::{
    Error, Op,
    disk::{Disk, durable},
    layout::{BackupName, ClusterName},
    record,
};
use serde::{Serialize, de::DeserializeOwned};
use std::path::{Path, PathBuf};

const VERIFIED: &str = "verify";
const DRILLED: &str = "drills";

fn path(root: &Path, cluster: &ClusterName, folder: &str, name: &BackupName) -> PathBuf {
    root.join(cluster.as_str()).join(folder).join(format!("{name}.json"))
}

/// The newest verification of a backup; `None` when there was none. `root` is tier 1's.
///
/// # Errors
/// `Corrupt`, or as the disk fails.
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
/// `Corrupt`, or as the disk fails.
pub fn load_drilled(
    disk: &dyn Disk,
    root: &Path,
    cluster: &ClusterName,
    name: &BackupName,
) -> Result<Option<DrillOutcome>, Error> {
    record::load(disk, &path(root, cluster, DRILLED, name))
}

/// Keeps a verification for every backup that it looked at, durably, unless a newer one is there.
///
/// # Errors
/// As the disk fails; some may have been written then.
pub fn store_verified(
    disk: &dyn Disk,
    root: &Path,
    cluster: &ClusterName,
    outcome: &VerifyOutcome,
) -> Result<(), Error> {
    for name in &outcome.backups {
        let at = path(root, cluster, VERIFIED, name);
        store(disk, root, cluster, &at, outcome, |o: &VerifyOutcome| o.finished_unix)?;
    }
    Ok(())
}

/// Keeps a drill, durably, unless a newer one is there.
///
/// # Errors
/// As the disk fails.
pub fn store_drilled(
    disk: &dyn Disk,
    root: &Path,
    cluster: &ClusterName,
    outcome: &DrillOutcome,
) -> Result<(), Error> {
    let at = path(root, cluster, DRILLED, &outcome.backup);
    store(disk, root, cluster, &at, outcome, |o: &DrillOutcome| o.finished_unix)
}

/// Forgets what is known of a backup that is gone.
///
/// # Errors
/// As the disk fails; one that is not there is no error.
pub fn remove(
    disk: &dyn Disk,
    root: &Path,
    cluster: &ClusterName,
    name: &BackupName,
) -> Result<(), Error> {
    [VERIFIED, DRILLED]
        .into_iter()
        .try_for_each(|folder| durable::remove_if_there(disk, &path(root, cluster, folder, name)))
}

fn store<T: Serialize + DeserializeOwned>(
    disk: &dyn Disk,
    root: &Path,
    cluster: &ClusterName,
    path: &Path,
    outcome: &T,
    finished: impl Fn(&T) -> f64,
) -> Result<(), Error> {
    // One that cannot be read is replaced: it says nothing any more.
    let newer = |there: T| finished(&there) > finished(outcome);
    if record::load::<T>(disk, path).ok().flatten().is_some_and(newer) {
        return Ok(());
    }
    durable::create_dir(disk, &root.join(cluster.as_str()))?;
    let folder = path.parent().ok_or_else(|| {
        Error::new(crate::Kind::Invalid, Op::Write, path.display(), "expected a folder, found none")
    })?;
    durable::create_dir(disk, folder)?;
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
        }
    }

    #[test]
    fn the_newest_drill_is_kept_whatever_comes_later_in_time() {
        let (disk, root) = (SimDisk::new(1), Path::new("/tier1"));
        disk.create_dir(root).unwrap();
        let cluster: ClusterName = "pg".parse().unwrap();
        let name = "b.1".parse().unwrap();
        let load = || load_drilled(&disk, root, &cluster, &name).unwrap();
        assert_eq!(load(), None);
        for (finished, ok) in [(5.0, true), (9.0, false), (7.0, true)] {
            store_drilled(&disk, root, &cluster, &drill(finished, ok)).unwrap();
        }
        assert_eq!(load(), Some(drill(9.0, false)));
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
