//! Lists a cluster's backups over both tiers.
//!
//! A record that cannot be read is listed as a problem, so that a backup never disappears silently (P6). When tier 1
//! is empty, the list comes from tier 2 (BASE4). A backup is in tier 2 when its record is, because the consumer
//! uploads the record last.

use super::{BaseStore, lock, run, tier2_status};
use klio_proto::Code;
use klio_storage::{
    Error, Op,
    catalog::{BackupRecord, DrillOutcome, VerifyOutcome, archive_file, outcomes},
    layout::{BackupName, BaseFile, BaseKind, BaseObject, ClusterName},
    record,
    repository::{Files, SnapshotId},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::{Arc, Mutex},
};
use tonic::Status;

/// Records that only tier 2 has, after they were read; records never change.
pub(super) type RecordCache = Mutex<BTreeMap<(ClusterName, BackupName), (u64, BackupRecord)>>;

/// A backup and what is known about it.
#[derive(Debug, Clone, PartialEq)]
pub struct ListedBackup {
    pub record: BackupRecord,
    /// Whether everything it needs is on tier 1.
    pub tier1: bool,
    /// Whether everything it needs was proven in tier 2.
    pub tier2: bool,
    /// Whether every file it needs is on tier 1 or proven in tier 2.
    pub together: bool,
    /// The result of the newest verification.
    pub verified: Option<VerifyOutcome>,
    /// The result of the newest drill.
    pub drilled: Option<DrillOutcome>,
}

/// A cluster's backups.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Backups {
    /// Oldest first.
    pub backups: Vec<ListedBackup>,
    /// Problems of records that cannot be read. While there is one, nothing may be removed (P6).
    pub problems: Vec<String>,
}

/// What is on tier 1.
#[derive(Default)]
struct OnDisk {
    records: BTreeMap<BackupName, BackupRecord>,
    unreadable: BTreeMap<BackupName, String>,
    /// Repository files.
    files: BTreeSet<BaseFile>,
    /// Whether there was ever a bucket, so that packs may have been evicted from tier 1.
    had_bucket: bool,
}

/// Which tiers have the files of a backup.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Reach {
    tier1: bool,
    together: bool,
}

impl OnDisk {
    /// Whether a file that a backup needs may be missing on tier 1. A pack that the bucket has and tier 1 does not was
    /// evicted. This says nothing about an earlier bucket, which this server cannot list.
    fn may_lack_files(&self, objects: &BTreeMap<BaseObject, u64>) -> bool {
        let only_there = |object: &BaseObject| matches!(object, BaseObject::File(file) if file.kind == BaseKind::Data && !self.files.contains(file));
        self.had_bucket || objects.keys().any(only_there)
    }

    fn reach<'a>(
        &self,
        needed: impl Iterator<Item = &'a BaseFile>,
        objects: &BTreeMap<BaseObject, u64>,
    ) -> Reach {
        let mut reach = Reach { tier1: true, together: true };
        for file in needed.filter(|file| !self.files.contains(file)) {
            reach.tier1 = false;
            reach.together &= objects.contains_key(&BaseObject::File(*file));
        }
        reach
    }
}

impl BaseStore {
    /// All backups of a cluster.
    ///
    /// # Errors
    /// `UNAVAILABLE` when tier 1 has nothing of the cluster and tier 2 does not answer (P7).
    pub async fn backups(&self, cluster: &ClusterName) -> Result<Backups, Status> {
        let (this, name) = (self.clone(), cluster.clone());
        let mut disk = run(move || this.read_disk(&name)).await?;
        let mut listed = Backups::default();
        let objects = match self.list_tier2(cluster).await {
            Ok(objects) => objects,
            Err(error) if disk.records.is_empty() => {
                return Err(tier2_status("list backups", cluster, &error));
            }
            Err(error) => {
                tracing::warn!(%cluster, %error, "list backups: tier 2 could not be asked");
                listed.problems.push("tier 2 did not answer: what it holds is not known".into());
                BTreeMap::new()
            }
        };
        let mut in_tier2 = BTreeMap::new();
        for (object, size) in &objects {
            if let BaseObject::Record(name) = object {
                in_tier2.insert(name.clone(), *size);
            }
        }
        let mut elsewhere = BTreeMap::new();
        for (name, size) in &in_tier2 {
            if disk.records.contains_key(name) {
                continue;
            }
            match self.record_in_tier2(cluster, name, *size).await {
                Ok(record) => drop(elsewhere.insert(name.clone(), record)),
                Err(error) => listed.problems.push(format!("backup {name} in tier 2: {error}")),
            }
        }
        for (name, error) in &disk.unreadable {
            listed.problems.push(format!("backup {name} on tier 1: {error}"));
        }
        let within = self.within_reach(cluster, &disk, &objects).await;
        let (this, cluster) = (self.clone(), cluster.clone());
        run(move || {
            let records =
                std::mem::take(&mut disk.records).into_values().chain(elsewhere.into_values());
            for record in records {
                let reach = within.get(&record.name).copied().unwrap_or_default();
                let tier2 = in_tier2.contains_key(&record.name);
                listed.backups.push(this.listed(&cluster, record, reach, tier2));
            }
            let key = |b: &ListedBackup| (b.record.stopped_postgres_unix, b.record.committed_unix);
            listed.backups.sort_by(|a, b| {
                let (a, b) = (key(a), key(b));
                a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1))
            });
            this.remember_all(&cluster, listed.backups.iter().map(|b| &b.record));
            Ok(listed)
        })
        .await
    }

    /// Adds the results of verification and drills. Blocking.
    fn listed(
        &self,
        cluster: &ClusterName,
        record: BackupRecord,
        reach: Reach,
        tier2: bool,
    ) -> ListedBackup {
        let (disk, root, name) = (self.disk().as_ref(), self.root(), &record.name);
        let tell = |error: Error| tracing::warn!(%cluster, backup = %name, %error, "cannot read the result of a verification or drill");
        let verified = outcomes::load_verified(disk, root, cluster, name).unwrap_or_else(|e| {
            tell(e);
            None
        });
        let drilled = outcomes::load_drilled(disk, root, cluster, name).unwrap_or_else(|e| {
            tell(e);
            None
        });
        let Reach { tier1, together } = reach;
        ListedBackup { tier1, tier2, together: together || tier2, verified, drilled, record }
    }

    /// Which tiers can deliver the backups whose record is on tier 1. If nothing was ever evicted from tier 1, it has
    /// the files of every backup whose snapshot is there. Otherwise the snapshots are read, which costs reading their
    /// trees once.
    async fn within_reach(
        &self,
        cluster: &ClusterName,
        disk: &OnDisk,
        objects: &BTreeMap<BaseObject, u64>,
    ) -> BTreeMap<BackupName, Reach> {
        let may_lack_files = disk.may_lack_files(objects);
        let mut within = BTreeMap::new();
        let mut held = None;
        for record in disk.records.values() {
            let Ok(id) = record.snapshot.parse::<SnapshotId>() else { continue };
            if !may_lack_files && disk.files.contains(&id.file()) {
                within.insert(record.name.clone(), Reach { tier1: true, together: true });
                continue;
            }
            if held.is_none() {
                held = self.held(cluster).await.ok();
            }
            let Some(held) = &held else { continue };
            let reach = match self.needs_beside(cluster, id, held).await {
                Ok(needed) => disk.reach(needed.keys(), objects),
                Err(_) => Reach::default(),
            };
            within.insert(record.name.clone(), reach);
        }
        within
    }

    fn read_disk(&self, cluster: &ClusterName) -> Result<OnDisk, Error> {
        let mut disk = OnDisk::default();
        for (name, _) in self.records_on_disk(cluster)? {
            match self.record_on_disk(cluster, &name) {
                Ok(Some(record)) => drop(disk.records.insert(name, record)),
                Ok(None) => {}
                Err(error) => drop(disk.unreadable.insert(name, error.to_string())),
            }
        }
        let files = self.cluster(cluster).files.clone();
        for kind in BaseKind::ALL {
            disk.files.extend(files.list(kind)?.into_iter().map(|(file, _)| file));
        }
        disk.had_bucket = self.disk().stat(&archive_file::path(self.root(), cluster)).is_ok();
        Ok(disk)
    }

    /// Names and sizes of the records on tier 1. Blocking.
    pub(crate) fn records_on_disk(
        &self,
        cluster: &ClusterName,
    ) -> Result<Vec<(BackupName, u64)>, Error> {
        let directory = self.root().join(cluster.as_str()).join("backups");
        let entries = match self.disk().list(&directory) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(Error::io(Op::List, &directory, e)),
        };
        let mut found = Vec::new();
        for name in entries.iter().filter_map(|entry| BackupName::parse_record(&entry.name)) {
            let path = self.path(cluster, &BaseObject::Record(name.clone()));
            match self.disk().stat(&path) {
                Ok(stat) => found.push((name, stat.size)),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(Error::io(Op::List, &path, e)),
            }
        }
        Ok(found)
    }

    /// Reads a record on tier 1. Blocking.
    ///
    /// # Errors
    /// `Corrupt` when it cannot be read.
    pub fn record_on_disk(
        &self,
        cluster: &ClusterName,
        name: &BackupName,
    ) -> Result<Option<BackupRecord>, Error> {
        let path = self.path(cluster, &BaseObject::Record(name.clone()));
        record::load(self.disk().as_ref(), &path)
    }

    /// Reads a record in tier 2.
    ///
    /// # Errors
    /// `Corrupt`, or an error of the bucket.
    pub async fn record_in_tier2(
        &self,
        cluster: &ClusterName,
        name: &BackupName,
        size: u64,
    ) -> Result<BackupRecord, Error> {
        let id = (cluster.clone(), name.clone());
        if let Some((known, record)) = lock(&self.0.records).get(&id)
            && *known == size
        {
            return Ok(record.clone());
        }
        let key = name.record_key(cluster);
        let missing =
            || Error::new(klio_storage::Kind::NotFound, Op::Download, &key, "no such object");
        let tier2 = self.tier2().ok_or_else(missing)?;
        let bytes = tier2.read_small(&key, record::LIMIT_BYTES).await?.ok_or_else(missing)?;
        let read: BackupRecord = record::decode(&bytes, &key)?;
        lock(&self.0.records).insert(id, (size, read.clone()));
        Ok(read)
    }

    /// One backup, from either tier.
    ///
    /// # Errors
    /// `NOT_FOUND`; the errors of [`BaseStore::backups`].
    pub async fn backup(
        &self,
        cluster: &ClusterName,
        name: &BackupName,
    ) -> Result<Arc<BackupRecord>, Status> {
        let all = self.backups(cluster).await?;
        let found = all.backups.into_iter().find(|backup| backup.record.name == *name);
        found
            .map(|backup| Arc::new(backup.record))
            .ok_or_else(|| Code::NotFound.status(format!("cluster {cluster} has no backup {name}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use klio_storage::tier2::Sha256Sum;

    fn pack(text: &str) -> BaseFile {
        BaseFile { kind: BaseKind::Data, id: Sha256Sum::of(text.as_bytes()) }
    }

    fn bucket(packs: &[&str]) -> BTreeMap<BaseObject, u64> {
        packs.iter().map(|text| (BaseObject::File(pack(text)), 7)).collect()
    }

    #[test]
    fn a_backup_of_which_each_tier_has_a_part_is_there_together() {
        let disk = OnDisk { files: BTreeSet::from([pack("new")]), ..OnDisk::default() };
        let reach = |needed: &[&str], there: &[&str]| {
            let needed: Vec<BaseFile> = needed.iter().map(|text| pack(text)).collect();
            let reach = disk.reach(needed.iter(), &bucket(there));
            (reach.tier1, reach.together)
        };
        assert_eq!(reach(&["new"], &[]), (true, true));
        assert_eq!(reach(&["new", "old"], &["old"]), (false, true));
        assert_eq!(reach(&["new", "old"], &[]), (false, false));
        assert_eq!(reach(&["new", "old", "lost"], &["old"]), (false, false));
    }

    /// The listing of another bucket, or of an emptied one, says nothing about what went to the earlier one.
    #[test]
    fn where_there_was_a_bucket_once_tier_1_is_not_taken_for_whole() {
        let mut disk = OnDisk { files: BTreeSet::from([pack("a")]), ..OnDisk::default() };
        assert!(!disk.may_lack_files(&bucket(&[])) && !disk.may_lack_files(&bucket(&["a"])));
        assert!(disk.may_lack_files(&bucket(&["a", "b"])));
        disk.had_bucket = true;
        assert!(disk.may_lack_files(&bucket(&[])) && disk.may_lack_files(&bucket(&["a"])));
    }
}
