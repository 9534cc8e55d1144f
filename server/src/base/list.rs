//! Lists repository files over both tiers.
//!
//! For a cluster that is on tier 1, only this process writes to the bucket, so what it knows after one listing stays
//! true and a running backup does not wait for the bucket. If the bucket was never listed and does not answer, tier 1
//! alone is the answer where it has a repository. Files that only tier 2 has are then stored once more, which costs
//! only space (P4). Without a repository on tier 1 the answer is `UNAVAILABLE` (P7). Packs that are known to be
//! damaged are left out (`damage.rs`).

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
/// Clients do not cause another listing for this long after one failed.
const FAILED_AGE: Duration = Duration::from_secs(15);

impl BaseStore {
    /// Every file of a kind with its size, except packs that are known to be damaged.
    ///
    /// # Errors
    /// `UNAVAILABLE` when only tier 2 could answer.
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
        // If both tiers have a file, tier 1 gives its size.
        all.extend(local);
        all.retain(|file, _| !damaged.contains(file));
        Ok(all)
    }

    /// All objects of a cluster in tier 2 besides WAL: the known ones, or else a new listing. Empty without a tier 2.
    ///
    /// # Errors
    /// An error of the bucket.
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
        // While the bucket is down, one client waits for it once, instead of every call of a backup (P4).
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

    /// The last listing, if it is still true. A cluster that is not on tier 1 may be written by another server:
    /// several servers may use one bucket, each for its own clusters.
    fn known_of_tier2(&self, cluster: &ClusterName) -> Option<BTreeMap<BaseObject, u64>> {
        match self.wal().pinned(cluster) {
            Some(_) => self.archives().objects(cluster),
            None => self.archives().objects_younger(cluster, FOREIGN_AGE),
        }
    }

    /// Whether the bucket was listed, so that an object that is not known is not there.
    pub(super) fn knows_tier2(&self, cluster: &ClusterName) -> bool {
        self.known_of_tier2(cluster).is_some()
    }

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

    /// Lists tier 1 in the order in which tier 2 should receive the objects: first what opens the repository, records
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
