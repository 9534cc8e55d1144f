//! Repository files in tier 2, below `<cluster>/base/` in the bucket.
//!
//! It blocks on the given runtime, so never call it from one of that runtime's own workers. Requests belong to the
//! span of the calling thread; the engine's threads have none, so theirs belong to the span in which this value was
//! created.

use super::{Files, local::require_name};
use crate::{
    Error,
    layout::{BaseFile, BaseKind, ClusterName, base::repository_prefix},
    tier2::Tier2,
};
use bytes::Bytes;
use tokio::runtime::Handle;
use tracing::{Instrument, Span};

/// The files of one repository in a bucket.
#[derive(Debug, Clone)]
pub struct BucketFiles {
    tier2: Tier2,
    cluster: ClusterName,
    runtime: Handle,
    span: Span,
}

impl BucketFiles {
    /// The files of `cluster`; requests run on `runtime`.
    pub fn new(tier2: Tier2, cluster: ClusterName, runtime: Handle) -> Self {
        Self { tier2, cluster, runtime, span: Span::current() }
    }

    fn wait<T>(&self, work: impl Future<Output = T>) -> T {
        let span = Some(Span::current()).filter(|span| !span.is_none());
        self.runtime.block_on(work.instrument(span.unwrap_or_else(|| self.span.clone())))
    }
}

impl Files for BucketFiles {
    fn place(&self) -> String {
        format!("{}/{}/base", self.tier2.url().trim_end_matches('/'), self.cluster)
    }

    fn list(&self, kind: BaseKind) -> Result<Vec<(BaseFile, u64)>, Error> {
        let Some(directory) = kind.directory() else {
            let size = self.wait(self.tier2.size_of(&BaseFile::CONFIG.key(&self.cluster)))?;
            return Ok(size.map(|size| (BaseFile::CONFIG, size)).into_iter().collect());
        };
        let base = format!("{}/", repository_prefix(&self.cluster));
        let listed = self.wait(self.tier2.list_prefix(&format!("{base}{directory}")))?;
        let file = |key: &str| key.strip_prefix(&base).and_then(BaseFile::parse_relative);
        Ok(listed.iter().filter_map(|object| Some((file(&object.key)?, object.size))).collect())
    }

    fn read(&self, file: BaseFile) -> Result<Bytes, Error> {
        let key = file.key(&self.cluster);
        self.wait(async { self.tier2.download(&key).await?.whole().await })
    }

    fn read_range(&self, file: BaseFile, offset: u64, length: u64) -> Result<Bytes, Error> {
        if length == 0 {
            // No store supports an empty range.
            return Ok(Bytes::new());
        }
        let key = file.key(&self.cluster);
        let range = self.tier2.download_range(&key, offset, Some(length));
        self.wait(async { range.await?.whole().await })
    }

    fn write(&self, file: BaseFile, parts: &[Bytes]) -> Result<(), Error> {
        require_name(&self.place(), file, parts)?;
        self.wait(self.tier2.put_bytes(&file.key(&self.cluster), parts))
    }

    fn remove(&self, file: BaseFile) -> Result<(), Error> {
        self.wait(self.tier2.remove(&file.key(&self.cluster)))
    }
}
