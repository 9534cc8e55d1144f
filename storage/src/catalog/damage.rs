//! What is known to be damaged in a cluster and was not disproved since: `<cluster>/damaged.json`, tier 1 only, in the
//! shape of `crate::record`.
//!
//! An outcome (`outcomes.rs`) says what one backup lacks. This says what is bad whoever needs it: a pack stays in it when every
//! backup has found its content elsewhere, or the next one would take the bad copy for the good one. What is in it leaves it
//! only by being read and found good, or gone. Who lost the file (with tier 1, say) prunes as if nothing were damaged, until
//! a verification of everything has found it again.

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

/// Damage of a cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownDamage {
    /// Packs of which no tier has a good copy.
    #[serde(default)]
    pub packs: Vec<Damage>,
    /// Whatever else is no single backup's: records that cannot be read, WAL that is lost behind the backups.
    #[serde(default)]
    pub others: Vec<Damage>,
    /// What a newer version says besides.
    #[serde(flatten)]
    pub unknown: Unknown,
}

impl KnownDamage {
    /// The packs.
    pub fn pack_files(&self, cluster: &ClusterName) -> BTreeSet<BaseFile> {
        self.packs.iter().filter_map(|damage| pack_of(cluster, &damage.key)).collect()
    }
}

/// The pack of this key; `None` for any other key.
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

/// What is known; nothing where there is no file. `root` is tier 1's.
///
/// # Errors
/// `Corrupt`, or as the disk fails.
pub fn load(disk: &dyn Disk, root: &Path, cluster: &ClusterName) -> Result<KnownDamage, Error> {
    let known = record::load(disk, &path(root, cluster)).map_err(|error| match error.kind {
        Kind::Corrupt => {
            let hint =
                "remove it from the cluster's directory of tier 1, then klio verify --read-data all finds again what it said";
            error.hint(hint)
        }
        _ => error,
    })?;
    Ok(known.unwrap_or_default())
}

/// Replaces what is known, durably.
///
/// # Errors
/// As the disk fails; then the old one is still there.
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
