//! A repository's files for the server's own work: creation, maintenance, verification.
//!
//! Reads fall through to tier 2. Writes go to tier 1 and are queued for upload. Removals remove from both tiers, tier
//! 2 first, and are reported to `archive`. This is for the server alone, because nothing else can remove repository
//! files (BASE2).

use super::BaseStore;
use bytes::Bytes;
use klio_storage::{
    Error,
    layout::{BaseFile, BaseKind, BaseObject, ClusterName},
    repository::{BucketFiles, Files, LocalFiles, Tiered},
};
use std::sync::Arc;
use tokio::runtime::Handle;

/// Both tiers of one cluster's repository. Every call blocks, so it must run on a blocking thread.
pub struct ServerFiles {
    base: BaseStore,
    cluster: ClusterName,
    local: Arc<LocalFiles>,
    /// Both tiers, or tier 1 alone if there is no tier 2.
    files: Arc<dyn Files>,
}

impl std::fmt::Debug for ServerFiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ServerFiles({})", self.files.place())
    }
}

impl BaseStore {
    /// A cluster's repository files for the server's own work. Must be called inside the runtime.
    pub fn files(&self, cluster: &ClusterName) -> ServerFiles {
        let local = self.cluster(cluster).files.clone();
        let files: Arc<dyn Files> = match self.tier2() {
            Some(tier2) => {
                let bucket = BucketFiles::new(tier2.clone(), cluster.clone(), Handle::current());
                Arc::new(Tiered::new(local.clone(), Arc::new(bucket)))
            }
            None => local.clone(),
        };
        ServerFiles { base: self.clone(), cluster: cluster.clone(), local, files }
    }
}

impl ServerFiles {
    pub fn local(&self) -> &Arc<LocalFiles> {
        &self.local
    }
}

#[deny(clippy::missing_trait_methods)]
impl Files for ServerFiles {
    fn place(&self) -> String {
        self.files.place()
    }

    fn list(&self, kind: BaseKind) -> Result<Vec<(BaseFile, u64)>, Error> {
        self.files.list(kind)
    }

    fn read(&self, file: BaseFile) -> Result<Bytes, Error> {
        self.files.read(file)
    }

    fn read_range(&self, file: BaseFile, offset: u64, length: u64) -> Result<Bytes, Error> {
        self.files.read_range(file, offset, length)
    }

    fn write(&self, file: BaseFile, parts: &[Bytes]) -> Result<(), Error> {
        self.local.write(file, parts)?;
        let size = parts.iter().map(|part| part.len() as u64).sum();
        self.base.announce(&self.cluster, BaseObject::File(file), size);
        Ok(())
    }

    fn remove(&self, file: BaseFile) -> Result<(), Error> {
        self.files.remove(file)?;
        self.base.archives().removed(&self.cluster, &BaseObject::File(file));
        Ok(())
    }
}
