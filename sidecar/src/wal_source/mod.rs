//! Where a restore gets its WAL from: a server, or the bucket itself.
//!
//! P7: `NotFound` from [`WalSource::ask`] is definitive and fresh: nothing here remembers an absence. Whatever
//! breaks after an answer began is another error, and so is a file whose plain bytes are not what the name says.

mod bucket;
mod fetch;
mod named;
mod place;
mod prompt;
mod server;
mod shape;
#[cfg(test)]
pub(crate) mod testing;

pub use fetch::{Expected, Fetch, Received};
pub(crate) use fetch::{ended, span};
pub use place::Target;
pub use shape::Shape;

use crate::{bucket::Bucket, config::Config, error::Error, server_link::ServerLink};
use bytes::Bytes;
use futures::stream::BoxStream;
use klio_storage::{
    crypt::Keys,
    layout::{ClusterName, WalFile},
};
use std::{path::Path, sync::Arc};

/// Gives WAL files.
#[tonic::async_trait]
pub trait WalSource: Send + Sync {
    /// Finds a file and begins to read it. `other_copy` after a copy turned out damaged: read the second one,
    /// where there are two.
    ///
    /// # Errors
    /// `NotFound` is definitive (P7).
    async fn ask(&self, file: WalFile, other_copy: bool) -> Result<Answer, Error>;
}

/// A file that is being read.
pub struct Answer {
    /// What the bytes will be.
    pub shape: Shape,
    /// To decrypt them with; `None` when they come as they are.
    pub keys: Option<Keys>,
    /// The bytes; the end of the stream is the end of the file.
    pub pieces: BoxStream<'static, Result<Bytes, Error>>,
}

impl std::fmt::Debug for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Answer").field("shape", &self.shape).finish_non_exhaustive()
    }
}

/// The source that the configuration names, for PostgreSQL: where that is a standby, which follows every history of a
/// timeline that it is shown, those of undecided and retired timelines are not shown.
///
/// # Errors
/// Wrong settings, and files that cannot be read.
pub fn open(config: &Config) -> Result<Arc<dyn WalSource>, Error> {
    open_as(config, config.cluster()?, true)
}

/// Whether the PostgreSQL of this data directory is a standby; it is one with both signal files, too
/// (<https://www.postgresql.org/docs/current/runtime-config-wal.html>, "Archive Recovery").
pub(crate) fn is_standby(data: &Path) -> bool {
    data.join("standby.signal").exists()
}

/// Whether the PostgreSQL that asks is one. It runs its restore_command in its data directory, and what that starts
/// lives there. Looked at for each question: a standby is promoted while its agent lives.
fn a_standby_asks() -> bool {
    is_standby(Path::new("."))
}

/// The same for a history that is known already. `for_postgresql`: it asks, and not a program that has to see everything.
///
/// # Errors
/// As [`open`].
pub fn open_as(
    config: &Config,
    cluster: ClusterName,
    for_postgresql: bool,
) -> Result<Arc<dyn WalSource>, Error> {
    Ok(match Bucket::open(config)? {
        Some(bucket) => Arc::new(named::Named::new(bucket, cluster, for_postgresql)),
        None => {
            let link = ServerLink::new(&config.server)?;
            Arc::new(server::FromServer::new(link, &cluster, for_postgresql))
        }
    })
}
