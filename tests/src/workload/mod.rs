//! A random workload on a real PostgreSQL with an oracle: what the database held at any point that can be recovered to.
//!
//! Several workers move money (with history sums), write rows of all sizes (TOAST) and large objects, create, alter, truncate, move
//! and drop logged, unlogged and temporary tables, prepare transactions, undo subtransactions; one more creates and
//! drops tablespaces and databases, checkpoints, switches WAL and makes restore points. All random choices come from a seed, but
//! how the workers interleave is PostgreSQL's: so expected content is computed afterwards from what was noted and from WAL.
//! What must stay true: nothing here trusts Klio. PostgreSQL may be killed at any moment.

mod compare;
mod model;
mod oracle;
mod plan;
mod sql;
mod wal;
mod worker;

pub use compare::{differences, read};
pub use model::{ACCOUNTS, Effect, History, Model, Prepared, Table, Text};
pub use oracle::{Oracle, Target, Transaction};
pub use wal::{Kind, Record};

use crate::postgres::{Postgres, install};
use klio_pg::Lsn;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicI64, AtomicU32, Ordering},
    },
    time::Duration,
};
use tokio::task::JoinSet;
use worker::Worker;

/// Workers besides the one for what concerns the whole cluster.
const WORKERS: u32 = 4;
/// How long workers may finish what they are at; then they are aborted, which is as good as a lost connection.
const GRACE: Duration = Duration::from_secs(5);
/// Tablespaces that stay; `tz0` to `tz2` come and go.
const STAYING: [&str; 2] = ["ts0", "ts1"];
/// `tz3` is for whoever needs one that is made at a certain moment.
const PLACES: [&str; 6] = ["ts0", "ts1", "tz0", "tz1", "tz2", "tz3"];

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whose a table or large object is, and names nobody has used.
#[derive(Debug)]
pub struct Owner {
    number: u32,
    generation: u32,
    next: Arc<AtomicI64>,
    objects: AtomicU32,
}

impl Owner {
    fn ids(&self, count: i64) -> i64 {
        self.next.fetch_add(count, Ordering::Relaxed)
    }
    fn large(&self) -> u32 {
        let object = self.objects.fetch_add(1, Ordering::Relaxed);
        self.number * 10_000_000 + self.generation * 1_000_000 + object
    }
    fn gid(&self) -> String {
        format!("g_{}_{}", self.number, self.ids(1))
    }
    fn table(&self, number: i64) -> String {
        format!("w{}_t{number}", self.number)
    }
    fn prepared_table(&self) -> String {
        format!("w{}_p", self.number)
    }
    /// Whether the table is this worker's.
    #[must_use]
    pub fn owns_table(&self, name: &str) -> bool {
        name.split('_').next() == Some(format!("w{}", self.number).as_str())
    }
    fn may_change(&self, name: &str) -> bool {
        name.starts_with(&format!("w{}_t", self.number))
    }
    /// Whether the large object is this worker's.
    #[must_use]
    pub fn owns_large(&self, id: u32) -> bool {
        id / 10_000_000 == self.number
    }
}

/// What the workers have in common.
struct Shared {
    conninfo: String,
    places: PathBuf,
    tablespaces: Vec<String>,
    /// COMMIT waits for Klio, so an answer means that nothing may lose it.
    synchronous: bool,
    stop: AtomicBool,
    /// By mark.
    transactions: Mutex<BTreeMap<i64, Transaction>>,
    restore_points: Mutex<Vec<String>>,
    refusals: Mutex<BTreeMap<String, u64>>,
}

impl Shared {
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
    fn transactions(&self) -> MutexGuard<'_, BTreeMap<i64, Transaction>> {
        lock(&self.transactions)
    }
    fn restore_points(&self) -> MutexGuard<'_, Vec<String>> {
        lock(&self.restore_points)
    }
    fn acknowledge(&self, mark: i64) {
        if let Some(transaction) = self.transactions().get_mut(&mark) {
            transaction.acknowledged = self.synchronous;
        }
    }
    fn forget(&self, mark: i64) {
        self.transactions().remove(&mark);
    }
    fn note_refusal(&self, why: &str) {
        let short: String = why.chars().take(160).collect();
        *lock(&self.refusals).entry(short).or_default() += 1;
    }
}

/// Prepares a new cluster: needs `max_prepared_transactions`. `places` becomes the directory of tablespaces.
///
/// # Panics
/// When a statement fails.
pub async fn setup(pg: &Postgres, places: &Path) -> Model {
    make_places(places);
    pg.execute(&sql::setup(ACCOUNTS)).await;
    for name in STAYING {
        pg.execute(&sql::tablespace(name, places)).await;
    }
    let model = read(pg).await.expect("read what was just made");
    let differences =
        differences(&Model::initial(), &Model { tablespaces: BTreeMap::new(), ..model.clone() });
    assert!(differences.is_empty(), "{differences:?}");
    model
}

/// Makes empty directories for all tablespaces, whatever was there.
///
/// # Panics
/// When the disk refuses.
pub fn make_places(places: &Path) {
    let _ = std::fs::remove_dir_all(places);
    for name in PLACES {
        let place = places.join(name);
        std::fs::create_dir_all(&place).expect("make the directory of a tablespace");
        install::give(&place);
    }
    install::give(places);
}

/// The directories of all tablespaces that there may ever be.
#[must_use]
pub fn places(places: &Path) -> Vec<PathBuf> {
    PLACES.iter().map(|name| places.join(name)).collect()
}

/// Makes a tablespace that no worker makes, unless it is there; it stays empty. The oracle learns of it from WAL.
///
/// # Panics
/// When PostgreSQL refuses.
pub async fn one_more_tablespace(pg: &Postgres, places: &Path) {
    if pg.value("select count(*) from pg_tablespace where spcname = 'tz3'").await == "0" {
        pg.execute(&sql::tablespace("tz3", places)).await;
    }
}

/// A running workload. Dropped, it ends at once.
pub struct Workload {
    shared: Arc<Shared>,
    workers: JoinSet<()>,
    base: Model,
    start: Lsn,
    timeline: u32,
}

impl Workload {
    /// Begins to work on a cluster that holds `base`. `generation` (0 to 9) keeps names apart when a restored cluster goes on;
    /// `synchronous` says that COMMIT waits for Klio.
    ///
    /// # Panics
    /// When PostgreSQL does not answer.
    pub async fn start(
        pg: &Postgres,
        base: Model,
        places: &Path,
        seed: u64,
        generation: u32,
        synchronous: bool,
    ) -> Self {
        let shared = Arc::new(Shared {
            conninfo: format!("{} connect_timeout=5", pg.conninfo()),
            places: places.to_owned(),
            tablespaces: STAYING.map(str::to_owned).to_vec(),
            synchronous,
            stop: AtomicBool::new(false),
            transactions: Mutex::default(),
            restore_points: Mutex::default(),
            refusals: Mutex::default(),
        });
        let (start, timeline) = (pg.insert_lsn().await, pg.timeline().await.get());
        let next = Arc::new(AtomicI64::new(i64::from(generation) * 100_000_000 + 1));
        let mut workers = JoinSet::new();
        for number in 1..=WORKERS + 1 {
            let owner =
                Owner { number, generation, next: Arc::clone(&next), objects: AtomicU32::new(1) };
            let seed = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(u64::from(number));
            let worker = Worker::new(owner, seed, Arc::clone(&shared), &base);
            if number <= WORKERS {
                workers.spawn(worker.run());
            } else {
                workers.spawn(worker::administrate(worker));
            }
        }
        Self { shared, workers, base, start, timeline }
    }

    /// Transactions noted so far.
    #[must_use]
    pub fn count(&self) -> usize {
        self.shared.transactions().len()
    }

    /// Ends the work and reads WAL: PostgreSQL may run, have stopped or have been killed.
    ///
    /// # Panics
    /// When a worker panicked, or WAL cannot be read.
    pub async fn finish(mut self, pg: &Postgres) -> Oracle {
        self.stop().await;
        let records = wal::records(pg, self.timeline, self.start).await;
        let transactions = std::mem::take(&mut *self.shared.transactions());
        Oracle { base: self.base.clone(), transactions, records, safe: Lsn::ZERO }
    }

    /// Ends the work; [`Workload::finish`] may follow later.
    ///
    /// # Panics
    /// When a worker panicked.
    pub async fn stop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        let all = async {
            while let Some(ended) = self.workers.join_next().await {
                ended.expect("a worker does not panic");
            }
        };
        if tokio::time::timeout(GRACE, all).await.is_err() {
            self.workers.abort_all();
            while self.workers.join_next().await.is_some() {}
        }
    }

    /// Statements that PostgreSQL refused, with how often: a sign that the workload does less than it should.
    #[must_use]
    pub fn refusals(&self) -> BTreeMap<String, u64> {
        lock(&self.shared.refusals).clone()
    }
}
