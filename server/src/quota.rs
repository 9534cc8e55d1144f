//! Limits on what one caller may use (P13): calls, connections, restores and stored bytes of each cluster.
//!
//! - WAL is never refused because of a quota. Its calls are counted separately, and the bytes it stores are counted
//!   and reported, but they only stop base backups. Acknowledged WAL is never dropped because of a quota.
//! - Base backups leave a share of tier 1's disk to the WAL of all clusters.
//! - A place is freed when its value is dropped, so no place can be left occupied.
//! - All generations of a cluster share its quota: another history does not get another quota.

mod stored;

pub use stored::{Coming, Used};

use crate::consumer::Archives;
use klio_pg::ByteSize;
use klio_proto::Code;
use klio_storage::layout::ClusterName;
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use stored::Stored;
use tonic::Status;

/// The limit of concurrent calls of the WAL service: one stream, its predecessor that is ending, and the requests
/// before it.
const WAL_CALLS_MAX: usize = 16;
/// The most bytes that are left free on a large disk: 64 segments, until somebody makes room.
const KEEP_FREE_BYTES_MAX: u64 = 1 << 30;
/// The highest percentage of the disk that may be reserved for WAL.
const KEEP_FREE_MAX: f64 = 90.0;

/// `[quota]`: limits for every cluster. 0 means no limit.
#[derive(Debug, Clone, PartialEq, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QuotaConfig {
    /// Bytes that a cluster may store in a tier, WAL and base backups together; beyond it base backups are refused.
    pub stored_bytes: ByteSize,
    /// Bytes that one base backup may store.
    pub backup_bytes: ByteSize,
    /// Concurrent calls, except those that send WAL.
    pub calls: usize,
    /// Concurrent connections.
    pub connections: usize,
    /// Concurrent restores.
    pub restores: usize,
    /// Percentage of tier 1's disk that base backups leave to WAL.
    pub keep_free_percent: f64,
    /// Limits for single clusters.
    pub clusters: BTreeMap<ClusterName, QuotaPatch>,
}

impl Default for QuotaConfig {
    fn default() -> Self {
        Self {
            stored_bytes: ByteSize::new(0),
            backup_bytes: ByteSize::new(0),
            // A restore with 16 workers needs some dozens.
            calls: 256,
            connections: 64,
            restores: 16,
            keep_free_percent: 5.0,
            clusters: BTreeMap::new(),
        }
    }
}

/// `[quota.clusters.NAME]`: replaces the limits that it names.
#[derive(Debug, Clone, Default, PartialEq, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QuotaPatch {
    /// As in `[quota]`.
    pub stored_bytes: Option<ByteSize>,
    /// As in `[quota]`.
    pub backup_bytes: Option<ByteSize>,
    /// As in `[quota]`.
    pub calls: Option<usize>,
    /// As in `[quota]`.
    pub connections: Option<usize>,
    /// As in `[quota]`.
    pub restores: Option<usize>,
}

impl QuotaConfig {
    pub fn validate(&self) -> Vec<String> {
        let percent = self.keep_free_percent;
        let mut problems = Vec::new();
        if !(0.0..=KEEP_FREE_MAX).contains(&percent) {
            problems.push(format!(
                "quota.keep_free_percent: expected 0 to {KEEP_FREE_MAX}, found {percent}"
            ));
        }
        for name in self.clusters.keys().filter(|name| name.number().is_some()) {
            let base = name.base();
            problems.push(format!(
                "[quota.clusters.\"{name}\"]: expected the name of a cluster, found that of a generation; hint: all generations share the quota of [quota.clusters.{base}]"
            ));
        }
        problems
    }

    /// The limits of a cluster, for all its generations; the general ones for a caller without a cluster.
    fn of(&self, cluster: Option<&ClusterName>) -> Self {
        let mut all = Self { clusters: BTreeMap::new(), ..self.clone() };
        let own = cluster.and_then(|cluster| self.clusters.get(&cluster.base()));
        let Some(own) = own else { return all };
        all.stored_bytes = own.stored_bytes.unwrap_or(all.stored_bytes);
        all.backup_bytes = own.backup_bytes.unwrap_or(all.backup_bytes);
        all.calls = own.calls.unwrap_or(all.calls);
        all.connections = own.connections.unwrap_or(all.connections);
        all.restores = own.restores.unwrap_or(all.restores);
        all
    }
}

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    Connections,
    Calls,
    WalCalls,
}

/// The owner of a quota: the cluster of a tenant, or the name of any other caller.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Whose {
    /// A tenant.
    Cluster(ClusterName),
    /// A caller without a cluster.
    Person(String),
}

impl Whose {
    const fn cluster(&self) -> Option<&ClusterName> {
        match self {
            Self::Cluster(cluster) => Some(cluster),
            Self::Person(_) => None,
        }
    }
}

impl std::fmt::Display for Whose {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cluster(cluster) => write!(f, "cluster {cluster}"),
            Self::Person(name) => write!(f, "{name:?}"),
        }
    }
}

#[derive(Default)]
struct State {
    counts: BTreeMap<(Whose, What), usize>,
    stored: BTreeMap<ClusterName, Stored>,
    /// Held while a cluster's tiers are measured.
    measuring: BTreeMap<ClusterName, Arc<tokio::sync::Mutex<()>>>,
}

/// The quotas of all clusters. Cheap to clone.
#[derive(Clone)]
pub struct Quotas {
    config: Arc<QuotaConfig>,
    /// What tier 2 has of WAL; `None` without a bucket.
    archives: Option<Archives>,
    state: Arc<Mutex<State>>,
}

/// A counted connection or call; dropping it frees its place.
pub struct Counted {
    state: Arc<Mutex<State>>,
    key: (Whose, What),
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut state = lock(&self.state);
        if let Some(count) = state.counts.get_mut(&self.key) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                state.counts.remove(&self.key);
            }
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Quotas {
    pub fn new(config: QuotaConfig, archives: Option<Archives>) -> Self {
        Self { config: Arc::new(config), archives, state: Arc::default() }
    }

    fn take(&self, whose: Whose, what: What, most: usize) -> Result<Counted, Status> {
        let mut state = lock(&self.state);
        let count = state.counts.entry((whose.clone(), what)).or_default();
        if most != 0 && *count >= most {
            let (name, key) = match what {
                What::Connections => ("connections", "quota.connections"),
                What::Calls => ("calls", "quota.calls"),
                What::WalCalls => ("calls for WAL", "the bound for WAL"),
            };
            return Err(Code::Quota
                .status(format!("{whose} has {count} {name} open, as many as {key} allows")));
        }
        *count += 1;
        Ok(Counted { state: Arc::clone(&self.state), key: (whose, what) })
    }

    /// Counts a connection of this caller.
    ///
    /// # Errors
    /// `QUOTA` when there are as many as allowed.
    pub fn connection(&self, whose: Whose) -> Result<Counted, Status> {
        let most = self.config.of(whose.cluster()).connections;
        self.take(whose, What::Connections, most)
    }

    /// Counts a call of this caller; `method` is `package.Service/Method`.
    ///
    /// # Errors
    /// `QUOTA` when there are as many as allowed.
    pub fn call(&self, whose: Whose, method: &str) -> Result<Counted, Status> {
        // All calls of the WAL service, except the one that reads.
        let brings_wal = method.starts_with("klio.v1.Wal/") && method != "klio.v1.Wal/Fetch";
        if brings_wal {
            return self.take(whose, What::WalCalls, WAL_CALLS_MAX);
        }
        let most = self.config.of(whose.cluster()).calls;
        self.take(whose, What::Calls, most)
    }

    /// Whether one more restore may run besides `running` others of all the cluster's generations.
    ///
    /// # Errors
    /// `QUOTA` when there are as many as allowed.
    pub fn restore(&self, cluster: &ClusterName, running: usize) -> Result<(), Status> {
        let most = self.config.of(Some(cluster)).restores;
        if most == 0 || running < most {
            return Ok(());
        }
        Err(Code::Quota.status(format!(
            "cluster {} has {running} restores running, as many as quota.restores allows",
            cluster.base()
        )))
    }
}

fn within(
    key: &str,
    cluster: &ClusterName,
    quota: ByteSize,
    used: u64,
    size: u64,
) -> Result<(), Status> {
    if quota.bytes() == 0 || used.saturating_add(size) <= quota.bytes() {
        return Ok(());
    }
    let used = ByteSize::new(used);
    Err(Code::Quota.status(format!(
        "store a file of cluster {cluster}: {used} are in use, and {key} is {quota}"
    )))
}

fn room_for(free: u64, total: u64, keep_percent: f64, size: u64) -> Result<(), Status> {
    let keep = ((total as f64 * keep_percent / 100.0) as u64).min(KEEP_FREE_BYTES_MAX);
    if keep_percent == 0.0 || free.saturating_sub(size) >= keep {
        return Ok(());
    }
    let (free, keep) = (ByteSize::new(free), ByteSize::new(keep));
    Err(Code::DiskFull.status(format!(
        "store a file: {free} are free on the server's tier-1 disk, and base backups leave {keep} of them to WAL (quota.keep_free_percent)"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster(name: &str) -> ClusterName {
        name.parse().unwrap()
    }

    fn quotas(text: &str) -> Quotas {
        Quotas::new(toml::from_str(text).unwrap(), None)
    }

    fn code<T>(result: Result<T, Status>) -> Option<Code> {
        result.err().map(|status| Code::of(&status))
    }

    #[test]
    fn a_cluster_has_its_bounds_and_no_other_one_feels_them() {
        let quotas = quotas("calls = 2\nconnections = 1\n[clusters.big]\ncalls = 3\n");
        let call = |name: &str| quotas.call(Whose::Cluster(cluster(name)), "klio.v1.Base/GetFile");
        let mut open: Vec<_> = (0..2).map(|_| call("a").unwrap()).collect();
        assert_eq!(code(call("a")), Some(Code::Quota));
        let _others: Vec<_> = (0..2).map(|_| call("b").unwrap()).collect();
        let _big: Vec<_> = (0..3).map(|_| call("big").unwrap()).collect();
        assert_eq!(code(call("big")), Some(Code::Quota));
        open.pop();
        assert!(call("a").is_ok(), "a place that is given back is free");
        let connection = |name: &str| quotas.connection(Whose::Cluster(cluster(name)));
        let _first = connection("a").unwrap();
        assert_eq!(code(connection("a")), Some(Code::Quota));
        assert!(connection("b").is_ok());
        assert!(quotas.connection(Whose::Person("a".into())).is_ok());
    }

    /// WAL must go on, whatever else the cluster does.
    #[test]
    fn calls_for_wal_have_places_of_their_own() {
        let quotas = quotas("calls = 1\n");
        let whose = || Whose::Cluster(cluster("a"));
        let _all = quotas.call(whose(), "klio.v1.Base/GetFile").unwrap();
        assert_eq!(code(quotas.call(whose(), "klio.v1.Wal/Fetch")), Some(Code::Quota));
        let wal: Vec<_> =
            (0..WAL_CALLS_MAX).map(|_| quotas.call(whose(), "klio.v1.Wal/Receive")).collect();
        assert!(wal.iter().all(Result::is_ok));
        assert_eq!(code(quotas.call(whose(), "klio.v1.Wal/Receive")), Some(Code::Quota));
    }

    #[test]
    fn zero_is_no_bound_and_nonsense_is_refused() {
        let none = quotas("calls = 0\nconnections = 0\nrestores = 0\n");
        let open: Vec<_> = (0..1000)
            .map(|_| none.call(Whose::Person("x".into()), "klio.v1.Base/Verify"))
            .collect();
        assert!(open.iter().all(Result::is_ok));
        assert!(none.restore(&cluster("a"), 1000).is_ok());
        assert_eq!(code(quotas("restores = 2").restore(&cluster("a"), 2)), Some(Code::Quota));
        assert!(toml::from_str::<QuotaConfig>("cals = 1").is_err());
        let bad: QuotaConfig = toml::from_str("keep_free_percent = 95").unwrap();
        assert_eq!(bad.validate().len(), 1);
        assert!(QuotaConfig::default().validate().is_empty());
    }

    #[test]
    fn base_backups_leave_a_share_of_the_disk_to_wal() {
        assert!(room_for(100, 1000, 5.0, 50).is_ok());
        assert_eq!(code(room_for(100, 1000, 5.0, 51)), Some(Code::DiskFull));
        assert_eq!(code(room_for(10, 1000, 5.0, 1)), Some(Code::DiskFull));
        assert!(room_for(10, 1000, 0.0, 11).is_ok());
        assert!(room_for(2 << 30, 100 << 30, 5.0, 1 << 30).is_ok(), "1 GiB at most");
    }

    #[test]
    fn what_is_set_for_a_cluster_holds_for_each_of_its_generations() {
        let config: QuotaConfig = toml::from_str("calls = 2\n[clusters.big]\ncalls = 3\n").unwrap();
        for (name, calls) in [("big", 3), ("big@2", 3), ("small@2", 2)] {
            let name = ClusterName::parse_generation(name).unwrap();
            assert_eq!(config.of(Some(&name)).calls, calls, "{name}");
        }
        let own: QuotaConfig = toml::from_str("[clusters.\"big@2\"]\ncalls = 3\n").unwrap();
        assert!(own.validate()[0].contains("[quota.clusters.big]"), "{:?}", own.validate());
    }
}
