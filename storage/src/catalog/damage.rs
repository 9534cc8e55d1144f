//! Damage in a cluster that has been found and not been disproved since: `<cluster>/damaged.json`, tier 1 only, in the
//! format of `crate::record`.
//!
//! An outcome (`outcomes.rs`) says what one backup lacks. This file says what is damaged, no matter who needs it: a
//! pack stays listed even when every backup has found its content elsewhere, because otherwise the next backup would
//! take the bad copy for a good one. An entry is removed only when its file was read and found good, or was deleted. If
//! the file is lost (with tier 1, say), pruning assumes that nothing is damaged until a full verification has found the
//! damage again.

use super::Damage;
use crate::{
    Error, Kind,
    disk::{Disk, durable},
    layout::{BaseFile, BaseKind, BaseObject, ClusterName},
    record::{self, Unknown},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownDamage {
    /// Packs of which no tier has a good copy.
    #[serde(default)]
    pub packs: Vec<Damage>,
    /// Damage that does not belong to a single backup: records that cannot be read, WAL that is lost behind the
    /// backups.
    #[serde(default)]
    pub others: Vec<Damage>,
    /// Fields that a newer version wrote.
    #[serde(flatten)]
    pub unknown: Unknown,
}

impl KnownDamage {
    /// The damaged packs as repository files.
    pub fn pack_files(&self, cluster: &ClusterName) -> BTreeSet<BaseFile> {
        self.packs.iter().filter_map(|damage| pack_of(cluster, &damage.key)).collect()
    }
}

/// The pack with this key; `None` for any other key.
pub fn pack_of(cluster: &ClusterName, key: &str) -> Option<BaseFile> {
    let relative = key.strip_prefix(cluster.as_str())?.strip_prefix('/')?;
    match BaseObject::parse_relative(relative)? {
        BaseObject::File(file) if file.kind == BaseKind::Data => Some(file),
        _ => None,
    }
}

fn path(root: &Path, cluster: &ClusterName) -> PathBuf {
    root.join(cluster.as_str()).join("damaged.json")
}

/// Reads the file; no damage if there is none. `root` is that of tier 1.
///
/// # Errors
/// `Corrupt`, or an I/O error of the disk.
pub fn load(disk: &dyn Disk, root: &Path, cluster: &ClusterName) -> Result<KnownDamage, Error> {
    let known = record::load(disk, &path(root, cluster)).map_err(|error| match error.kind {
        Kind::Corrupt => {
            let hint =
                "remove the file from the cluster's directory on tier 1, then run klio verify --read-data all, which finds the damage again";
            error.hint(hint)
        }
        _ => error,
    })?;
    Ok(known.unwrap_or_default())
}

/// Replaces the file, durably.
///
/// # Errors
/// An I/O error of the disk; then the old file is still in place.
pub fn store(
    disk: &dyn Disk,
    root: &Path,
    cluster: &ClusterName,
    known: &KnownDamage,
) -> Result<(), Error> {
    let path = path(root, cluster);
    if *known == KnownDamage::default() {
        return durable::remove_if_there(disk, &path);
    }
    durable::create_dir(disk, &root.join(cluster.as_str()))?;
    record::store(disk, &path, known)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::SimDisk;

    #[test]
    fn what_is_known_is_kept_and_only_packs_are_packs() {
        let (disk, root) = (SimDisk::new(1), Path::new("/tier1"));
        disk.create_dir(root).unwrap();
        let cluster: ClusterName = "pg".parse().unwrap();
        let damage = |key: String| Damage { tier: "tier1".into(), key, problem: "bad".into() };
        assert_eq!(load(&disk, root, &cluster).unwrap(), KnownDamage::default());
        let id = "ab".repeat(32);
        let keys = [
            format!("pg/base/data/ab/{id}"),
            format!("pg/base/index/{id}"),
            format!("pg2/base/data/ab/{id}"),
            "pg/wal/00000001/000000010000000000000001.zst".into(),
        ];
        let known = KnownDamage {
            packs: keys.map(damage).into(),
            others: vec![damage("pg/wal".into())],
            unknown: Unknown::default(),
        };
        store(&disk, root, &cluster, &known).unwrap();
        assert_eq!(load(&disk, root, &cluster).unwrap(), known);
        let packs = known.pack_files(&cluster);
        let expected = BaseFile { kind: BaseKind::Data, id: id.parse().unwrap() };
        assert_eq!(packs, BTreeSet::from([expected]));
        store(&disk, root, &cluster, &KnownDamage::default()).unwrap();
        assert_eq!(load(&disk, root, &cluster).unwrap(), KnownDamage::default());
    }
}
