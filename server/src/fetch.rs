//! Finds a WAL file for a restore: tier 1, then tier 2.
//!
//! P7: `NOT_FOUND` means that both tiers were asked and both definitively have no such file. A tier
//! that could not be asked makes the answer `UNAVAILABLE`, which is retried and never ends a recovery.

use crate::errors;
use klio_proto::Code;
use klio_storage::{
    Kind,
    layout::{ClusterName, WalFile},
    tier2::{Download, Tier2},
    wal::{Found, WalStore},
};
use tonic::Status;

/// Where a file was found.
pub enum Located {
    /// On this server's disk.
    Tier1 {
        /// The file.
        found: Found,
        /// wal_segment_size in bytes.
        segment_size: u32,
    },
    /// In the bucket, with the file it really is (a partial may answer for a segment).
    Tier2 {
        /// Which file.
        file: WalFile,
        /// Its bytes.
        download: Download,
        /// wal_segment_size in bytes; 0 when the cluster is not pinned here.
        segment_size: u32,
    },
}

/// Reads both tiers; cheap to clone.
#[derive(Clone)]
pub struct Source {
    /// Tier 1.
    pub store: WalStore,
    /// Tier 2, if there is one.
    pub tier2: Option<Tier2>,
}

impl Source {
    /// Finds a file.
    ///
    /// # Errors
    /// `NOT_FOUND` is definitive.
    pub async fn find(&self, cluster: &ClusterName, file: WalFile) -> Result<Located, Status> {
        let (store, name) = (self.store.clone(), cluster.clone());
        let read = tokio::task::spawn_blocking(move || store.read(&name, file)).await;
        let read = read.map_err(|e| Code::Internal.status(format!("read tier 1: {e}")))?;
        match read {
            Ok(found) => {
                return Ok(Located::Tier1 { found, segment_size: self.segment_size(cluster) });
            }
            Err(error) if error.kind == Kind::NotFound => {}
            // A damaged or unreadable copy: the other tier may have a good one.
            Err(error) if self.tier2.is_some() => {
                tracing::error!(%cluster, %file, %error, "tier 1 copy is not readable; asking tier 2");
            }
            Err(error) => return Err(errors::status(&error)),
        }
        self.find_in_tier2(cluster, file).await
    }

    fn segment_size(&self, cluster: &ClusterName) -> u32 {
        self.store.pinned(cluster).map_or(0, |p| p.segment_size.as_u32())
    }

    async fn find_in_tier2(&self, cluster: &ClusterName, file: WalFile) -> Result<Located, Status> {
        let missing = || Code::NotFound.status(format!("cluster {cluster} has no {file}"));
        let Some(tier2) = &self.tier2 else { return Err(missing()) };
        let segment_size = self.segment_size(cluster);
        // PostgreSQL asks for a segment; of an ended timeline only the partial may exist.
        let partial = match file {
            WalFile::Segment(name) => Some(WalFile::Partial(name)),
            _ => None,
        };
        for file in [Some(file), partial].into_iter().flatten() {
            match tier2.download(&file.key(cluster)).await {
                Ok(download) => return Ok(Located::Tier2 { file, download, segment_size }),
                Err(error) if error.kind == Kind::NotFound => {}
                Err(error) => {
                    tracing::warn!(%cluster, %file, %error, "tier 2 could not be asked");
                    return Err(
                        Code::Unavailable.status(format!("read {file}: tier 2 did not answer"))
                    );
                }
            }
        }
        Err(missing())
    }
}
