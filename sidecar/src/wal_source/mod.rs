//! The source of a restore's WAL: a server, or the bucket itself.
//!
//! P7: `NotFound` from [`WalSource::ask`] is definitive and fresh; nothing here remembers that a file was absent. A
//! failure after an answer began is another error, and so is a file whose content does not match its name.

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

#[tonic::async_trait]
pub trait WalSource: Send + Sync {
    /// Finds a file and begins to read it. `other_copy` is set after a copy turned out to be damaged: the second copy
    /// is read, if there is one.
    ///
    /// # Errors
    /// `NotFound` is definitive (P7).
    async fn ask(&self, file: WalFile, other_copy: bool) -> Result<Answer, Error>;
}

/// A file that is being read.
pub struct Answer {
    /// How to interpret the bytes.
    pub shape: Shape,
    /// Keys to decrypt the bytes with; `None` if they are not encrypted.
    pub keys: Option<Keys>,
    /// The bytes; the end of the stream is the end of the file.
    pub pieces: BoxStream<'static, Result<Bytes, Error>>,
}

impl std::fmt::Debug for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Answer").field("shape", &self.shape).finish_non_exhaustive()
    }
}

/// The configured source, for use by PostgreSQL. A standby follows every timeline whose history file it finds, so the
/// history files of undecided and retired timelines are hidden from it.
///
/// # Errors
/// Wrong settings, or a file named by them cannot be read.
pub fn open(config: &Config) -> Result<Arc<dyn WalSource>, Error> {
    open_as(config, config.cluster()?, true)
}

/// Like [`open`], for a program that serves a whole recovery: it stays with the generation that it began with (P11).
///
/// # Errors
/// As for [`open`].
pub fn open_settled(config: &Config) -> Result<Arc<dyn WalSource>, Error> {
    opened(config, config.cluster()?, true, server::FromServer::settled)
}

/// Whether the PostgreSQL of this data directory is a standby; it is one even if both signal files exist
/// (<https://www.postgresql.org/docs/current/runtime-config-wal.html>, "Archive Recovery").
pub(crate) fn is_standby(data: &Path) -> bool {
    data.join("standby.signal").exists()
}

/// Whether the requesting PostgreSQL is a standby. It runs restore_command in its data directory, which is also the
/// working directory of the agent that this starts. Checked at each request, because a standby may be promoted while
/// its agent runs.
fn a_standby_asks() -> bool {
    is_standby(Path::new("."))
}

/// Like [`open`], for a given history. `for_postgresql` is false for a program that has to see every timeline.
///
/// # Errors
/// As for [`open`].
pub fn open_as(
    config: &Config,
    cluster: ClusterName,
    for_postgresql: bool,
) -> Result<Arc<dyn WalSource>, Error> {
    let of_server = |link, cluster| server::FromServer::new(link, cluster, for_postgresql);
    opened(config, cluster, for_postgresql, of_server)
}

/// The bucket where the configuration names one, which always stays with the generation that it began with; else the server.
fn opened(
    config: &Config,
    cluster: ClusterName,
    for_postgresql: bool,
    of_server: impl FnOnce(ServerLink, ClusterName) -> server::FromServer,
) -> Result<Arc<dyn WalSource>, Error> {
    Ok(match Bucket::open(config)? {
        Some(bucket) => Arc::new(named::Named::new(bucket, cluster, for_postgresql)),
        None => Arc::new(of_server(ServerLink::new(&config.server)?, cluster)),
    })
}
