//! Lists repository files over both tiers.
//!
//! This process is the only one that writes to the bucket what tier 1 has a cluster of, so what it knows of it after one listing stays
//! true: a running backup does not wait for the bucket. While it was never listed and does not answer, tier 1
//! alone is the answer where it has a repository: what only tier 2 has is then stored once more, which costs
//! space and nothing else (P4). Packs that are known to be damaged are left out (`damage.rs`). Without a repository on tier 1 the answer is `UNAVAILABLE` (P7).

use super::{BaseStore, run, tier2_status};
use klio_storage::{
    Error, Kind, Op,
    layout::{BaseFile, BaseKind, BaseObject, ClusterName, base::repository_prefix},
    repository::Files,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};
use tonic::Status;

/// How long a listing of a cluster that is not on tier 1 is used.
const FOREIGN_AGE: Duration = Duration::from_secs(30);
/// A bucket that could not be listed is not asked again by clients for this long.
const FAILED_AGE: Duration = Duration::from_secs(15);

impl BaseStore {
    /// Every file of a kind with its size, but packs that are known to be damaged.
    ///
    /// # Errors
    /// `UNAVAILABLE` when only tier 2 could say.
    pub async fn list_files(
        &self,
        cluster: &ClusterName,
        kind: BaseKind,
    ) -> Result<BTreeMap<BaseFile, u64>, Status> {
        let (this, name) = (self.clone(), cluster.clone());
        let files = self.cluster(cluster).files.clone();
        let (local, has_repository, damaged) = run(move || {
            let local = files.list(kind)?;
            let damaged =
                if kind == BaseKind::Data { this.damaged_packs(&name) } else { BTreeSet::new() };
            Ok((local, !files.list(BaseKind::Config)?.is_empty(), damaged))
        })
        .await?;
        let mut all = match self.list_tier2(cluster).await {
            Ok(objects) => objects
                .into_iter()
                .filter_map(|(object, size)| match object {
                    BaseObject::File(file) if file.kind == kind => Some((file, size)),
                    _ => None,
                })
                .collect(),
            Err(error) if has_repository => {
                tracing::warn!(%cluster, %error, "tier 2 cannot be listed; tier 1 alone is used");
                BTreeMap::new()
            }
            Err(error) => return Err(tier2_status("list repository files", cluster, &error)),
        };
        // Tier 1 says what a file's size is where both have it.
        all.extend(local);
        all.retain(|file, _| !damaged.contains(file));
        Ok(all)
    }

    /// All that tier 2 holds of a cluster besides WAL, as known; listed where it is not. Empty without
    /// tier 2.
    ///
    /// # Errors
    /// As the bucket fails.
    pub async fn list_tier2(
        &self,
        cluster: &ClusterName,
    ) -> Result<BTreeMap<BaseObject, u64>, Error> {
        if self.tier2().is_none() {
            return Ok(BTreeMap::new());
        }
        if let Some(known) = self.known_of_tier2(cluster) {
            return Ok(known);
        }
        let _turn = self.archives().begin_comparing(cluster).await;
        if let Some(known) = self.known_of_tier2(cluster) {
            return Ok(known);
        }
        // A bucket that is down costs one client one wait, not every call of a backup (P4).
        if let Some(problem) = self.archives().failed_lately(cluster, FAILED_AGE) {
            return Err(Error::new(
                Kind::Transient,
                Op::List,
                format!("{cluster} in tier 2"),
                problem,
            ));
        }
        let stored = self.objects_of_tier2(cluster).await.inspect_err(|error| {
            self.archives().failed(cluster, error.to_string());
        })?;
        let held = self.objects_of_tier1(cluster).await?;
        self.archives().compared(cluster, &held, &stored, self.now_unix());
        Ok(self.archives().objects(cluster).unwrap_or_default())
    }

    /// What is known and still true. Of a cluster that is not on tier 1 another server may be the writer:
    /// several servers may use one bucket, each for clusters of its own.
    fn known_of_tier2(&self, cluster: &ClusterName) -> Option<BTreeMap<BaseObject, u64>> {
        match self.wal().pinned(cluster) {
            Some(_) => self.archives().objects(cluster),
            None => self.archives().objects_younger(cluster, FOREIGN_AGE),
        }
    }

    /// Whether the bucket was listed, so that what is not known to be there is not there.
    pub(super) fn knows_tier2(&self, cluster: &ClusterName) -> bool {
        self.known_of_tier2(cluster).is_some()
    }

    /// Lists the bucket.
    pub(crate) async fn objects_of_tier2(
        &self,
        cluster: &ClusterName,
    ) -> Result<Vec<(BaseObject, u64)>, Error> {
        let Some(tier2) = self.tier2() else { return Ok(Vec::new()) };
        let directory = format!("{cluster}/");
        let mut found = Vec::new();
        for prefix in [repository_prefix(cluster), format!("{cluster}/backups")] {
            let listed = tier2.list_prefix(&prefix).await?;
            found.extend(listed.into_iter().filter_map(|object| {
                let relative = object.key.strip_prefix(&directory)?;
                Some((BaseObject::parse_relative(relative)?, object.size))
            }));
        }
        for object in [
            BaseObject::Cluster,
            BaseObject::Generations,
            BaseObject::Timelines,
            BaseObject::WalLevels,
            BaseObject::Secret { encrypted: true },
            BaseObject::Secret { encrypted: false },
        ] {
            if let Some(size) = tier2.size_of(&object.key(cluster)).await? {
                found.push((object, size));
            }
        }
        Ok(found)
    }

    /// Lists tier 1, in the order in which tier 2 should get it: what opens the repository first, records
    /// last.
    pub(crate) async fn objects_of_tier1(
        &self,
        cluster: &ClusterName,
    ) -> Result<Vec<(BaseObject, u64)>, Error> {
        let (this, cluster) = (self.clone(), cluster.clone());
        let listed = tokio::task::spawn_blocking(move || this.objects_on_disk(&cluster)).await;
        listed.map_err(|error| Error::new(Kind::Io, Op::List, "tier 1", error))?
    }

    fn objects_on_disk(&self, cluster: &ClusterName) -> Result<Vec<(BaseObject, u64)>, Error> {
        let mut found = Vec::new();
        for object in [
            BaseObject::Cluster,
            BaseObject::Generations,
            BaseObject::Timelines,
            BaseObject::WalLevels,
            BaseObject::Secret { encrypted: true },
            BaseObject::Secret { encrypted: false },
        ] {
            let path = self.path(cluster, &object);
            match self.disk().stat(&path) {
                Ok(stat) => found.push((object, stat.size)),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(e) => return Err(Error::io(Op::List, &path, e)),
            }
        }
        let part = self.cluster(cluster);
        for kind in
            [BaseKind::Config, BaseKind::Key, BaseKind::Data, BaseKind::Index, BaseKind::Snapshot]
        {
            let files = part.files.list(kind)?.into_iter();
            found.extend(files.map(|(file, size)| (BaseObject::File(file), size)));
        }
        for (name, size) in self.records_on_disk(cluster)? {
            found.push((BaseObject::Record(name), size));
        }
        Ok(found)
    }
}
