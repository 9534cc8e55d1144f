//! Base backups on the server: a repository and a list of records for each cluster, over both tiers.
//!
//! BASE1  a repository has one secret for ever. It is durable before the repository's config exists, and a tier 1 that
//!     lost it takes it from tier 2 and never makes a new one (P10);
//! BASE2  a client only appends: an existing file is never removed, nor replaced by other bytes (P8);
//! BASE3  a record is written last, when everything it names is stored (`commit.rs`); in tier 2 it is written after
//!     everything it needs was proven there (`consumer/base.rs`);
//! BASE4  what only tier 2 has can be listed and read, because tier 1 may be empty;
//! BASE5  "not found" means that both tiers were asked and neither has it (P7);
//! BASE6  a name belongs to one PostgreSQL, in both tiers: another one, or an older timeline, is refused (P8,
//!     `identity.rs`);
//! BASE7  what a client sends is decrypted and checked before it counts (P13, `admit.rs`).
//!
//! This module removes nothing. `maintenance` does, through [`BaseStore::repository`].

mod admit;
mod archive;
mod backups;
mod commit;
mod config;
mod coverage;
mod damage;
mod gauges;
mod generations;
mod get;
mod holdings;
mod identity;
mod learned;
mod list;
mod needs;
mod positions;
mod put;
mod repository;
mod reserve;
mod server_files;
mod timelines;
mod window;

pub use archive::{BaseArchiveState, BaseArchives};
pub use backups::{Backups, ListedBackup};
pub use config::BaseConfig;
pub(crate) use generations::decided;
#[cfg(test)]
pub(crate) use generations::stranger;
pub use get::FileBytes;
pub use positions::{Line, lost_with_tier1};
pub use put::Incoming;
pub use reserve::{Caller, Lease, Removal, Reservations, Running};
pub use server_files::ServerFiles;

use crate::{
    clock::{self, ClockWatch},
    queue::{BaseJob, Queue},
    readers::Readers,
    registry::Registry,
};
use klio_proto::Code;
use klio_storage::{
    Error,
    crypt::AtRest,
    disk::Disk,
    layout::{BaseObject, ClusterName},
    repository::{LocalFiles, Settings},
    tier2::Tier2,
    wal::WalStore,
};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::Semaphore;
use tonic::Status;

/// How many files of one cluster are received at once. A sidecar that sends more has to wait: each file takes memory
/// of a few messages, and ten writers do not make one fast disk faster.
const PUTS_MAX: usize = 4;

/// How many files of clients are checked at once, over all clusters: half of the processors, so that some are left for
/// WAL.
fn admitted_at_once() -> usize {
    std::thread::available_parallelism().map_or(1, |count| count.get() / 2).clamp(1, 4)
}

/// Unix seconds; injected, so that tests have their own clock.
pub type Clock = Arc<dyn Fn() -> f64 + Send + Sync>;

/// What a [`BaseStore`] is made of.
pub struct Parts {
    /// Tier 1's WAL: what is pinned, and what a backup needs.
    pub store: WalStore,
    pub disk: Arc<dyn Disk>,
    pub tier2: Option<Tier2>,
    /// How secrets are encrypted.
    pub at_rest: AtRest,
    /// Settings of new repositories.
    pub settings: Settings,
    /// Receives the jobs for tier 2.
    pub queue: Queue,
    /// Live streams, which tell whether a cluster's WAL is caught up.
    pub registry: Arc<Registry>,
    pub clock: Clock,
}

/// Base backups of all clusters. Cheap to clone.
#[derive(Clone)]
pub struct BaseStore(Arc<Inner>);

struct Inner {
    parts: Parts,
    archives: BaseArchives,
    reservations: Reservations,
    readers: Readers,
    clusters: Mutex<BTreeMap<ClusterName, Arc<ClusterBase>>>,
    histories: holdings::HistoryCache,
    records: backups::RecordCache,
    needs: needs::NeedsCache,
    gauges: gauges::Summaries,
    generations: generations::Known,
    timelines: learned::Learned,
    /// Allows one change of the damage record at a time.
    damage: Mutex<()>,
    /// Limits how many files of clients are checked at once.
    admitting: Arc<Semaphore>,
    /// Watches the clock since the start.
    watch: ClockWatch,
}

/// One cluster's part of tier 1.
struct ClusterBase {
    files: Arc<LocalFiles>,
    /// Allows one repository to be created at a time (BASE1).
    opening: tokio::sync::Mutex<()>,
    /// Allows one record to be written at a time.
    committing: tokio::sync::Mutex<()>,
    puts: Arc<Semaphore>,
}

/// Nothing panics while it holds one of these locks; if something did, the plain values inside would stay usable.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl BaseStore {
    /// Opens the store over these tiers. Removes unfinished files of a crash and reads the records of tier 1;
    /// blocking.
    pub fn open(parts: Parts) -> Self {
        let this = Self(Arc::new(Inner {
            archives: BaseArchives::default(),
            reservations: Reservations::default(),
            readers: Readers::default(),
            clusters: Mutex::default(),
            histories: holdings::HistoryCache::default(),
            records: backups::RecordCache::default(),
            needs: needs::NeedsCache::default(),
            gauges: gauges::Summaries::default(),
            generations: generations::Known::default(),
            timelines: learned::Learned::default(),
            damage: Mutex::default(),
            admitting: Arc::new(Semaphore::new(admitted_at_once())),
            watch: ClockWatch::new((parts.clock)(), clock::since_boot()),
            parts,
        }));
        for cluster in this.wal().clusters() {
            // Nobody writes yet: clients are served only after this has returned.
            if let Err(error) = this.cluster(&cluster).files.sweep() {
                tracing::warn!(%cluster, %error, "cannot remove unfinished repository files");
            }
            this.remember(&cluster);
        }
        this
    }

    /// The reservations of repositories.
    pub fn reservations(&self) -> &Reservations {
        &self.0.reservations
    }

    /// Who reads WAL for a restore at the moment.
    pub fn readers(&self) -> &Readers {
        &self.0.readers
    }

    /// What is known about tier 2.
    pub fn archives(&self) -> &BaseArchives {
        &self.0.archives
    }

    pub fn wal(&self) -> &WalStore {
        &self.0.parts.store
    }

    pub fn disk(&self) -> &Arc<dyn Disk> {
        &self.0.parts.disk
    }

    /// The bucket, if one is configured.
    pub fn tier2(&self) -> Option<&Tier2> {
        self.0.parts.tier2.as_ref()
    }

    /// How secrets are encrypted.
    pub fn at_rest(&self) -> &AtRest {
        &self.0.parts.at_rest
    }

    /// zstd level for new data.
    pub fn compression_level(&self) -> i32 {
        self.0.parts.settings.compression_level
    }

    /// The current time in Unix seconds.
    pub fn now_unix(&self) -> f64 {
        (self.0.parts.clock)()
    }

    /// The reasons why `now_unix` cannot be believed; empty when there are none.
    pub fn clock_doubts(&self) -> Vec<String> {
        self.0.watch.doubts(&clock::Reading {
            wall_unix: self.now_unix(),
            since_boot: clock::since_boot(),
            bucket: self.tier2().and_then(Tier2::heard_date),
            now: std::time::Instant::now(),
        })
    }

    pub fn root(&self) -> &Path {
        self.wal().root()
    }

    /// The path of an object on tier 1.
    pub fn path(&self, cluster: &ClusterName, object: &BaseObject) -> PathBuf {
        self.root().join(object.key(cluster))
    }

    fn cluster(&self, name: &ClusterName) -> Arc<ClusterBase> {
        let mut clusters = lock(&self.0.clusters);
        if let Some(known) = clusters.get(name) {
            return known.clone();
        }
        let root = self.root().join(name.as_str()).join("base");
        let made = Arc::new(ClusterBase {
            files: Arc::new(LocalFiles::new(self.disk().clone(), root)),
            opening: tokio::sync::Mutex::new(()),
            committing: tokio::sync::Mutex::new(()),
            puts: Arc::new(Semaphore::new(PUTS_MAX)),
        });
        // An administrator may ask for any name, so only clusters that exist are remembered.
        if self.wal().pinned(name).is_some() {
            clusters.insert(name.clone(), made.clone());
        }
        made
    }

    /// Announces that an object is new on tier 1, so that it is uploaded later. Never waits (P4).
    pub fn announce(&self, cluster: &ClusterName, object: BaseObject, size: u64) {
        if self.tier2().is_none() {
            return;
        }
        self.0.archives.announce(cluster, object.clone(), self.now_unix());
        self.0.parts.queue.publish(BaseJob { cluster: cluster.clone(), object, size });
    }
}

/// Runs blocking work that returns an error of `storage`.
async fn run<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Status> {
    crate::errors::blocking(work).await
}

/// The error of tier 2 in the form that a caller may see.
fn tier2_status(what: &str, cluster: &ClusterName, error: &Error) -> Status {
    tracing::warn!(%cluster, %error, "{what}: tier 2 could not be asked");
    Code::Unavailable.status(format!("{what} of {cluster}: {}", crate::errors::of_tier2(error)))
}
