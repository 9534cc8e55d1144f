//! What the bucket has of a cluster.

use super::{Tier2, fault::classify};
use crate::{
    Error, Op,
    layout::{ClusterName, Form, WalFile},
};
use futures::TryStreamExt;
use object_store::path::Path;

/// A finished WAL file in tier 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredObject {
    pub file: WalFile,
    /// Its stored form. A file may be listed in both forms.
    pub form: Form,
    /// Size of the object in bytes.
    pub size: u64,
    /// When it was written according to the store, Unix seconds.
    pub modified_unix: u64,
}

impl Tier2 {
    /// Every finished WAL file of a cluster, in no particular order. Other keys are ignored.
    ///
    /// # Errors
    /// An error of the store; a missing bucket is an error, an empty one is not.
    pub async fn list_wal(&self, cluster: &ClusterName) -> Result<Vec<StoredObject>, Error> {
        let prefix = format!("{cluster}/wal");
        self.require_directory(Op::List, &prefix)?;
        let path = Path::from(prefix.as_str());
        let mut found = Vec::new();
        let mut objects = self.store.list(Some(&path));
        let fail = |error| classify(Op::List, &self.place(&prefix), error);
        while let Some(meta) = objects.try_next().await.map_err(fail)? {
            let relative = meta.location.as_ref().strip_prefix(&prefix);
            let relative = relative.and_then(|r| r.strip_prefix('/'));
            if let Some((file, form)) = relative.and_then(WalFile::parse_stored) {
                let modified_unix = u64::try_from(meta.last_modified.timestamp()).unwrap_or(0);
                found.push(StoredObject { file, form, size: meta.size, modified_unix });
            }
        }
        Ok(found)
    }

    /// The clusters that have anything in this bucket and prefix.
    ///
    /// # Errors
    /// An error of the store.
    pub async fn clusters(&self) -> Result<Vec<ClusterName>, Error> {
        self.require_directory(Op::List, "")?;
        let listing = self.store.list_with_delimiter(None).await;
        let listing = listing.map_err(|error| classify(Op::List, &self.url, error))?;
        let name =
            |path: &Path| path.filename().and_then(|n| ClusterName::parse_generation(n).ok());
        Ok(listing.common_prefixes.iter().filter_map(name).collect())
    }
}
