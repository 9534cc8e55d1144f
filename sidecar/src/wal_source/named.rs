//! Resolves a cluster's name to one of its histories in a bucket. This happens with the first file and is then kept:
//! a decision that a person makes during a recovery must not switch the recovery to another history's WAL (P11).

use super::{Answer, WalSource, bucket::FromBucket};
use crate::{bucket::Bucket, error::Error};
use klio_storage::layout::{ClusterName, WalFile};
use tokio::sync::OnceCell;

/// Reads a bucket under a cluster name whose history is resolved at the first request.
pub(super) struct Named {
    bucket: Bucket,
    named: ClusterName,
    for_postgresql: bool,
    found: OnceCell<FromBucket>,
}

impl Named {
    pub fn new(bucket: Bucket, named: ClusterName, for_postgresql: bool) -> Self {
        Self { bucket, named, for_postgresql, found: OnceCell::new() }
    }
}

#[tonic::async_trait]
impl WalSource for Named {
    async fn ask(&self, file: WalFile, other_copy: bool) -> Result<Answer, Error> {
        let find = async || {
            let place = self.bucket.resolve(&self.named).await?;
            Ok::<_, Error>(FromBucket::new(self.bucket.clone(), place, self.for_postgresql))
        };
        self.found.get_or_try_init(find).await?.ask(file, other_copy).await
    }
}
