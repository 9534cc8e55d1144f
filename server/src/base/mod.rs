//! Base backups on the server: a repository and a list of records for each cluster, over both tiers.
//!
//! BASE1  a repository has one secret for ever: it is durable before the repository's config exists, and a
//!     tier 1 that lost it takes it from tier 2, never a new one (P10);
//! BASE2  a client appends: what is there is never replaced by other bytes nor removed (P8);
//! BASE3  a record is written last, when everything it names is held (`commit.rs`); in tier 2 it comes after
//!     everything it needs is proven there (`consumer/base.rs`);
//! BASE4  what only tier 2 has can be listed and read: tier 1 may be empty;
//! BASE5  "not found" means that both tiers were asked and both have no such thing (P7);
//! BASE7  what a client sends is opened before it counts (P13, `admit.rs`);
//! BASE6  a name is of one PostgreSQL, in both tiers: whoever brings another, or an older timeline, is refused (P8,
//!     `identity.rs`).
//!
//! Removes nothing: that is `maintenance`, through [`BaseStore::repository`].

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
pub use get::FileBytes;
pub use positions::{Line, lost_with_tier1};
pub use put::Incoming;
pub use reserve::{Caller, Lease, Removal, Reservations, Running};
pub use server_files::ServerFiles;

use crate::{
    clock::{self, ClockWatch},
    queue::{BaseJob, Queue},
    readers::Readers,
    receive::Registry,
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

/// Files of one cluster that are received at once. A sidecar that wants more waits: each takes memory of
/// a few messages, and one fast disk is not made faster by ten writers.
const PUTS_MAX: usize = 4;

/// Files of clients that are opened at once, over all clusters: half of the processors, and some are for WAL.
fn admitted_at_once() -> usize {
    std::thread::available_parallelism().map_or(1, |count| count.get() / 2).clamp(1, 4)
}

/// Unix seconds, from outside: tests have their own.
pub type Clock = Arc<dyn Fn() -> f64 + Send + Sync>;

/// What it works with.
pub struct Parts {
    /// Tier 1's WAL: what is pinned, and what a backup needs.
    pub store: WalStore,
    /// Tier 1's disk.
    pub disk: Arc<dyn Disk>,
    /// The bucket.
    pub tier2: Option<Tier2>,
    /// How secrets are kept.
    pub at_rest: AtRest,
    /// Of repositories that are made.
    pub settings: Settings,
    /// Gets jobs for tier 2.
    pub queue: Queue,
    /// Live streams: whether a cluster's WAL is caught up.
    pub registry: Arc<Registry>,
    /// Now.
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
    /// One change of what is known to be damaged at a time.
    damage: Mutex<()>,
    /// Files of clients that are opened at once.
    admitting: Arc<Semaphore>,
    /// Since the start.
    watch: ClockWatch,
}

/// One cluster's part of tier 1.
struct ClusterBase {
    files: Arc<LocalFiles>,
    /// One repository is made at a time (BASE1).
    opening: tokio::sync::Mutex<()>,
    /// One record is written at a time.
    committing: tokio::sync::Mutex<()>,
    puts: Arc<Semaphore>,
}

/// Nothing panics while it holds one of these locks; if it did, plain values stay usable.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl BaseStore {
    /// Over these tiers. Removes what a crash left unfinished and reads the records of tier 1; blocking.
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
            // Nobody writes yet: clients come when this has returned.
            if let Err(error) = this.cluster(&cluster).files.sweep() {
                tracing::warn!(%cluster, %error, "unfinished repository files stay");
            }
            this.remember(&cluster);
        }
        this
    }

    /// Who works on which repository now.
    pub fn reservations(&self) -> &Reservations {
        &self.0.reservations
    }

    /// Who reads WAL now.
    pub fn readers(&self) -> &Readers {
        &self.0.readers
    }

    /// What is known of tier 2.
    pub fn archives(&self) -> &BaseArchives {
        &self.0.archives
    }

    /// Tier 1's WAL.
    pub fn wal(&self) -> &WalStore {
        &self.0.parts.store
    }

    /// Tier 1's disk.
    pub fn disk(&self) -> &Arc<dyn Disk> {
        &self.0.parts.disk
    }

    /// The bucket, if there is one.
    pub fn tier2(&self) -> Option<&Tier2> {
        self.0.parts.tier2.as_ref()
    }

    /// How secrets are kept.
    pub fn at_rest(&self) -> &AtRest {
        &self.0.parts.at_rest
    }

    /// zstd level for new data.
    pub fn compression_level(&self) -> i32 {
        self.0.parts.settings.compression_level
    }

    /// Now, Unix seconds.
    pub fn now_unix(&self) -> f64 {
        (self.0.parts.clock)()
    }

    /// Why `now_unix` cannot be believed, in words; nothing where there is no reason.
    pub fn clock_doubts(&self) -> Vec<String> {
        self.0.watch.doubts(&clock::Reading {
            wall_unix: self.now_unix(),
            since_boot: clock::since_boot(),
            bucket: self.tier2().and_then(Tier2::heard_date),
            now: std::time::Instant::now(),
        })
    }

    /// Tier 1's directory.
    pub fn root(&self) -> &Path {
        self.wal().root()
    }

    /// Where an object lies on tier 1.
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
        // An administrator may ask for any name: only real clusters are remembered.
        if self.wal().pinned(name).is_some() {
            clusters.insert(name.clone(), made.clone());
        }
        made
    }

    /// Something new is on tier 1: tier 2 gets it, some time soon. Never waits (P4).
    pub fn announce(&self, cluster: &ClusterName, object: BaseObject, size: u64) {
        if self.tier2().is_none() {
            return;
        }
        self.0.archives.announce(cluster, object.clone(), self.now_unix());
        self.0.parts.queue.publish(BaseJob { cluster: cluster.clone(), object, size });
    }
}

/// Runs blocking work, with an error of `storage`.
async fn run<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Status> {
    crate::receive::open::blocking(work).await
}

/// Trouble with tier 2 as a caller may see it.
fn tier2_status(what: &str, cluster: &ClusterName, error: &Error) -> Status {
    tracing::warn!(%cluster, %error, "{what}: tier 2 could not be asked");
    Code::Unavailable.status(format!("{what} of {cluster}: {}", crate::errors::of_tier2(error)))
}
