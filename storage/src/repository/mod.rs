//! Base backups: a restic-format repository for each cluster, through `rustic_core`.
//!
//! REPO1  a file is complete or absent, and durable when `write` returns;
//! REPO2  a file's name is the SHA-256 of its bytes, so every reader can verify it (except the config);
//! REPO3  a snapshot is saved only if every byte of every file in it was read without an error: rustic itself
//!        silently omits what it cannot read;
//! REPO4  nothing is removed at once: packs are marked first and removed a day later, so that whatever a running
//!        backup or restore has seen in an index stays available.
//!
//! All calls block, so they run on their own threads, never on an async worker.

mod absent;
mod adopt;
mod assemble;
mod backend;
mod check;
mod create;
mod fault;
pub mod files;
#[cfg(any(test, feature = "testing"))]
mod forge;
mod index;
mod maintain;
mod needed;
mod prove;
mod reader;
mod sealer;
pub mod secret;
mod snapshot;
mod source;
#[cfg(test)]
mod tests;
mod tree;
mod unpack;

pub use absent::AbsentPacks;
pub use adopt::Adopted;
pub use assemble::{SnapshotMeta, SnapshotSummary};
pub use check::Problem;
pub use files::{BucketFiles, Files, LocalFiles, Tiered, Windowed, Without};
#[cfg(any(test, feature = "testing"))]
pub use forge::{Forge, ForgedPiece};
pub use maintain::PruneOutcome;
pub use prove::PackProof;
pub use reader::{ChunkId, ChunkLocation, Entries, Entry, Reader, StoredKind};
pub use secret::{SECRET_LIMIT_BYTES, decode_secret, encode_secret, secret_objects};
pub use snapshot::{Part, YOUNG};
pub use source::{EntryKind, Open, Progress, Silent, Source, SourceEntries, SourceEntry};
pub use unpack::{Claim, INDEX_BYTES_MAX, ReadPart, SNAPSHOT_BYTES_MAX};

use crate::{
    Error, Kind, Op,
    layout::{BaseFile, BaseKind},
    tier2::{Sha256Sum, Sha256SumError},
};
use absent::Hidden;
use backend::{Backend, Snapshots, Trace};
use bytes::Bytes;
use klio_pg::ByteSize;
use rustic_core::{
    Credentials, OpenStatus, RepositoryBackends, RepositoryOptions, repofile::MasterKey,
};
use sealer::Sealer;
use std::{fmt, str::FromStr, sync::Arc};
use zeroize::Zeroizing;

/// What is needed to open a repository. Stored age-wrapped beside it, and given to the cluster's sidecar over mutual
/// TLS.
#[derive(Clone, serde::Serialize, serde::Deserialize)]
pub struct Secret {
    /// For restic and rustic: the password of the key file in the repository.
    pub password: Zeroizing<String>,
    /// restic's master key as JSON. It avoids deriving a key, which takes 128 MiB.
    pub master_key: Zeroizing<String>,
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// How a new repository stores data; fixed when it is created.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Size of a chunk in bytes, a multiple of PostgreSQL's page size. Smaller chunks find more identical data
    /// between two backups and cost more per byte (docs/benchmarks.md has the measurements behind the default of nine
    /// pages).
    pub chunk_size: ByteSize,
    /// zstd level, 1 to 22; 0 stores uncompressed.
    pub compression_level: i32,
    /// Size of a pack in bytes, which is also the size of a tier-2 job's upload. A backup that waits for the server
    /// holds up to six packs in memory: its peak was 108 MB with 16 MiB and 189 MB with 32 MiB, at the same speed
    /// (repository_speed, 40 MB/s).
    pub pack_size: ByteSize,
}

impl Default for Settings {
    fn default() -> Self {
        Self { chunk_size: ByteSize::kib(72), compression_level: 1, pack_size: ByteSize::mib(16) }
    }
}

/// The id of a snapshot: the name of its file.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(transparent)]
pub struct SnapshotId(Sha256Sum);

impl SnapshotId {
    /// From the id of a file in `snapshots/`.
    pub const fn new(sum: Sha256Sum) -> Self {
        Self(sum)
    }

    pub const fn file(self) -> BaseFile {
        BaseFile { kind: BaseKind::Snapshot, id: self.0 }
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for SnapshotId {
    type Err = Sha256SumError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}

/// An open repository; cheap to clone. It holds no lock: the server makes sure that only one maintenance runs.
#[derive(Debug, Clone)]
pub struct Repository {
    files: Arc<dyn Files>,
    key: Arc<Key>,
    /// ABSENT2: the packs that rustic must not see in an index.
    hidden: Option<Arc<Hidden>>,
    /// zstd level for new data; `None`: the config's.
    level: Option<i32>,
}

struct Key {
    master: MasterKey,
    sealer: Sealer,
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(..)")
    }
}

/// A repository opened by rustic, for one operation.
type Opened = rustic_core::Repository<OpenStatus>;

impl Repository {
    /// The name of its place, for messages.
    pub fn place(&self) -> String {
        self.files.place()
    }

    /// The same repository over other files, for example with a cache in front.
    #[must_use]
    pub fn with_files(&self, files: Arc<dyn Files>) -> Self {
        Self { files, ..self.clone() }
    }

    /// The same repository, with new data compressed at this zstd level (0: not compressed). Its config keeps the
    /// level from its creation.
    #[must_use]
    pub fn compressing(self, level: i32) -> Self {
        Self { level: Some(level), ..self }
    }

    fn fail(&self, op: Op, error: Box<rustic_core::RusticError>) -> Error {
        fault::classify(op, &self.place(), error)
    }

    fn backend(
        &self,
        snapshots: Snapshots,
        progress: Option<Arc<dyn Progress>>,
    ) -> (Backend, Arc<Trace>) {
        let trace = Arc::new(Trace::default());
        let files = Arc::clone(&self.files);
        let (shared, hidden) = (Arc::clone(&trace), self.hidden.clone());
        let level = self.level.map(|level| (level, self.key.sealer.clone()));
        (Backend { files, snapshots, progress, trace: shared, hidden, level }, trace)
    }

    /// Opens it for rustic.
    fn rustic(&self, snapshots: Snapshots) -> Result<(Opened, Arc<Trace>), Error> {
        let (backend, trace) = self.backend(snapshots, None);
        let opened = self.open_rustic(backend, rustic_core::NoProgressBars)?;
        Ok((opened, trace))
    }

    fn open_rustic(
        &self,
        backend: Backend,
        bars: impl rustic_core::ProgressBars,
    ) -> Result<Opened, Error> {
        let backends = RepositoryBackends::new(Arc::new(backend), None);
        let credentials = Credentials::Masterkey(self.key.master.clone());
        rustic_core::Repository::new_with_progress(&options(), &backends, bars)
            .and_then(|repository| repository.open(&credentials))
            .map_err(|e| self.fail(Op::Open, e))
    }
}

/// No cache: it would be in a home directory, and it would save little because our files are local or windowed.
fn options() -> RepositoryOptions {
    RepositoryOptions::default().no_cache(true)
}

/// Reads a whole file and verifies it against its name (REPO2).
fn read_checked(files: &dyn Files, file: BaseFile) -> Result<Bytes, Error> {
    let bytes = files.read(file)?;
    let found = Sha256Sum::of(&bytes);
    if file.kind == BaseKind::Config || found == file.id {
        return Ok(bytes);
    }
    let detail = format!("expected bytes with the SHA-256 of its name, found {found}");
    Err(Error::new(
        Kind::Corrupt,
        Op::Read,
        format!("{}/{}", files.place(), file.relative()),
        detail,
    ))
}
