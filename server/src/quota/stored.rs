//! The stored bytes of a cluster: of all its generations together, in the tier that has more of them.
//!
//! - Only stored bytes count in the end. Bytes that a caller is sending count while they arrive, and no longer if they
//!   are refused, interrupted or found to be stored already, so retries cost nothing.
//! - Both tiers are measured periodically by a separate task, and again before anything is refused, so that bytes
//!   which were just removed are free. Only one measurement of a cluster runs at a time; code that only shows the
//!   value takes the last one.

use super::{QuotaConfig, Quotas, State, lock, room_for, within};
use crate::base::BaseStore;
use klio_pg::ByteSize;
use klio_storage::{
    disk::durable,
    layout::{BackupName, ClusterName},
};
use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tokio_util::sync::CancellationToken;
use tonic::Status;

/// How long a measurement is used before bytes are accepted; bytes that are stored meanwhile are added to it.
const MEASURE_EVERY: Duration = Duration::from_secs(600);
/// The interval of measurements for showing the value, because WAL is not counted when it arrives.
const MEASURE_SHOWN: Duration = Duration::from_secs(60);
/// How old a measurement may be when something is refused, so that a caller that is refused repeatedly does not keep
/// the disk busy.
const MEASURE_AGAIN: Duration = Duration::from_secs(10);

/// The bytes of one cluster.
#[derive(Default)]
pub(super) struct Stored {
    measured: Option<Instant>,
    tier1: u64,
    tier2: u64,
    /// Bytes that are being received.
    coming: u64,
    /// The running backup of each generation.
    backups: BTreeMap<ClusterName, OfBackup>,
}

/// The bytes of one backup.
struct OfBackup {
    name: BackupName,
    stored: u64,
    coming: u64,
}

impl Stored {
    fn is_fresh(&self, within: Duration) -> bool {
        self.measured.is_some_and(|at| at.elapsed() < within)
    }

    const fn on_tier1(&self) -> u64 {
        self.tier1.saturating_add(self.coming)
    }

    /// In the tier that has more.
    fn most(&self) -> u64 {
        self.on_tier1().max(self.tier2)
    }

    /// The bytes that the running backup has stored and is sending; another backup begins at 0.
    fn of_backup(&mut self, place: &ClusterName, running: Option<&BackupName>) -> u64 {
        let Some(running) = running else {
            self.backups.remove(place);
            return 0;
        };
        let begin = || OfBackup { name: running.clone(), stored: 0, coming: 0 };
        let backup = self.backups.entry(place.clone()).or_insert_with(begin);
        if backup.name != *running {
            *backup = begin();
        }
        backup.stored.saturating_add(backup.coming)
    }

    /// Updates the counters when these bytes begin to arrive or have arrived.
    fn change(&mut self, coming: &What, change: impl Fn(&mut u64, &mut u64)) {
        change(&mut self.tier1, &mut self.coming);
        let backup = self.backups.get_mut(&coming.place);
        if let Some(backup) = backup.filter(|b| Some(&b.name) == coming.backup.as_ref()) {
            change(&mut backup.stored, &mut backup.coming);
        }
    }
}

/// Bytes that arrive, and where they belong.
struct What {
    place: ClusterName,
    backup: Option<BackupName>,
    size: u64,
}

/// Bytes that are being received; dropping this releases them.
pub struct Coming {
    state: Arc<Mutex<State>>,
    what: What,
    stored: bool,
}

impl Coming {
    /// Counts the bytes as stored.
    pub fn stored(mut self) {
        self.stored = true;
    }
}

impl Drop for Coming {
    fn drop(&mut self) {
        let (size, stored) = (self.what.size, self.stored);
        let mut state = lock(&self.state);
        let Some(all) = state.stored.get_mut(&self.what.place.base()) else { return };
        all.change(&self.what, |there, coming| {
            *coming = coming.saturating_sub(size);
            *there = there.saturating_add(if stored { size } else { 0 });
        });
    }
}

impl Quotas {
    /// Counts `size` bytes of a base backup before they are received. They stay counted once [`Coming::stored`] is
    /// called.
    ///
    /// # Errors
    /// `QUOTA`, or `DISK_FULL` when the rest of the disk is reserved for WAL.
    pub async fn put(
        &self,
        base: &BaseStore,
        place: &ClusterName,
        size: u64,
    ) -> Result<Coming, Status> {
        let quota = self.config.of(Some(place));
        if let Ok((free, total)) = base.wal().free_space() {
            room_for(free, total, quota.keep_free_percent, size)?;
        }
        if quota.stored_bytes.bytes() != 0 {
            self.measure(base, place, MEASURE_EVERY).await;
            if self.count(base, place, &quota, size).is_err() {
                self.measure(base, place, MEASURE_AGAIN).await;
            }
        }
        self.count(base, place, &quota, size)
    }

    fn count(
        &self,
        base: &BaseStore,
        place: &ClusterName,
        quota: &QuotaConfig,
        size: u64,
    ) -> Result<Coming, Status> {
        let backup = base.reservations().running(place).backup;
        let mut state = lock(&self.state);
        let all = state.stored.entry(place.base()).or_default();
        let of_backup = all.of_backup(place, backup.as_ref());
        let most = all.most();
        within("quota.stored_bytes", place, quota.stored_bytes, most, size)?;
        within("quota.backup_bytes", place, quota.backup_bytes, of_backup, size)?;
        let what = What { place: place.clone(), backup, size };
        all.change(&what, |_, coming| *coming = coming.saturating_add(size));
        Ok(Coming { state: Arc::clone(&self.state), what, stored: false })
    }

    /// Measures both tiers, unless that was done within `within`. A second caller waits, and uses the same result.
    async fn measure(&self, base: &BaseStore, place: &ClusterName, within: Duration) {
        let name = place.base();
        let turn = lock(&self.state).measuring.entry(name.clone()).or_default().clone();
        let _one = turn.lock().await;
        if lock(&self.state).stored.get(&name).is_some_and(|known| known.is_fresh(within)) {
            return;
        }
        let (this, base, place) = (self.clone(), base.clone(), place.clone());
        let looked = tokio::task::spawn_blocking(move || {
            let places = places(&base, &place);
            let near = places.iter().map(|p| bytes_below(&base.root().join(p.as_str()))).sum();
            (near, this.in_tier2(&base, &places))
        });
        match looked.await {
            Ok((near, far)) => {
                let mut state = lock(&self.state);
                let all = state.stored.entry(name).or_default();
                (all.measured, all.tier1, all.tier2) = (Some(Instant::now()), near, far);
            }
            Err(error) => tracing::warn!(%error, "cannot measure the stored bytes of a cluster"),
        }
    }

    fn in_tier2(&self, base: &BaseStore, places: &[ClusterName]) -> u64 {
        let wal = |place| self.archives.as_ref().map_or(0, |a| a.state(place).totals.bytes);
        let files = |place| base.archives().bytes(place);
        places.iter().map(|place| wal(place).saturating_add(files(place))).sum()
    }

    /// Measures every cluster that has a limit, until cancelled.
    pub async fn keep_measuring(self, base: BaseStore, cancel: CancellationToken) {
        let mut tick = tokio::time::interval(MEASURE_SHOWN);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = cancel.cancelled() => return,
                _ = tick.tick() => {}
            }
            let mut names: Vec<ClusterName> =
                base.wal().clusters().iter().map(ClusterName::base).collect();
            names.dedup();
            for name in names {
                let bound = self.config.of(Some(&name)).stored_bytes.bytes();
                if bound != 0 && !cancel.is_cancelled() {
                    self.measure(&base, &name, MEASURE_SHOWN / 2).await;
                }
            }
        }
    }

    /// The share of its quota that a cluster uses, as last measured; `None` if there is no limit or no measurement
    /// yet.
    pub fn used(&self, cluster: &ClusterName) -> Option<Used> {
        let quota = self.config.of(Some(cluster)).stored_bytes;
        let state = lock(&self.state);
        let all = state.stored.get(&cluster.base()).filter(|all| all.measured.is_some())?;
        (quota.bytes() != 0).then(|| Used { bytes: all.most(), quota })
    }
}

/// The stored bytes of a cluster and its quota.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    bytes: u64,
    quota: ByteSize,
}

impl Used {
    /// 1 means that the quota is fully used.
    pub fn ratio(&self) -> f64 {
        self.bytes as f64 / self.quota.bytes().max(1) as f64
    }

    /// The problem as text, if more is stored than the quota allows.
    pub fn problem(&self) -> Option<String> {
        (self.bytes > self.quota.bytes()).then(|| {
            let (used, quota) = (ByteSize::new(self.bytes), self.quota);
            format!("{used} are stored, more than quota.stored_bytes of {quota}: base backups are refused, WAL is still received")
        })
    }
}

/// All generations of a cluster that this server has.
fn places(base: &BaseStore, place: &ClusterName) -> Vec<ClusterName> {
    let mut all = base.wal().clusters();
    all.retain(|other| other.base() == place.base());
    if !all.contains(place) {
        all.push(place.clone());
    }
    all
}

fn bytes_below(directory: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(directory) else { return 0 };
    let is_temporary =
        |name: &std::ffi::OsStr| name.as_encoded_bytes().ends_with(durable::TMP_SUFFIX.as_bytes());
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(found) if found.is_dir() => bytes_below(&entry.path()),
            // Bytes that are being received are counted separately.
            Ok(_) if is_temporary(&entry.file_name()) => 0,
            Ok(found) => found.len(),
            Err(_) => 0, // just removed
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use klio_proto::Code;

    fn cluster(name: &str) -> ClusterName {
        ClusterName::parse_generation(name).unwrap()
    }

    fn coming(quotas: &Quotas, place: &str, backup: &str, size: u64) -> (u64, Coming) {
        let what = What { place: cluster(place), backup: backup.parse().ok(), size };
        let mut state = lock(&quotas.state);
        let all = state.stored.entry(what.place.base()).or_default();
        let before = all.of_backup(&what.place, what.backup.as_ref());
        all.change(&what, |_, coming| *coming += size);
        drop(state);
        (before, Coming { state: Arc::clone(&quotas.state), what, stored: false })
    }

    #[test]
    fn retries_and_files_that_were_there_count_nothing() {
        let quotas = Quotas::new(QuotaConfig::default(), None);
        let near = || lock(&quotas.state).stored[&cluster("a")].on_tier1();
        for _ in 0..10 {
            let (stored, broken_off) = coming(&quotas, "a", "one", 7);
            assert_eq!((stored, near()), (0, 7), "it counts while it comes");
            drop(broken_off);
            assert_eq!(near(), 0);
        }
        coming(&quotas, "a", "one", 7).1.stored();
        let (stored, second) = coming(&quotas, "a", "one", 5);
        assert_eq!((stored, near()), (7, 12));
        second.stored();
        assert_eq!(coming(&quotas, "a", "two", 1).0, 0, "each backup begins at 0");
        assert_eq!(coming(&quotas, "a@2", "two", 1).0, 0, "and each generation has its own");
        coming(&quotas, "a@2", "two", 3).1.stored();
        assert_eq!(near(), 15, "and all share the cluster's bytes");
    }

    #[test]
    fn one_that_ends_after_its_backup_counts_for_the_cluster_and_no_other_backup() {
        let quotas = Quotas::new(QuotaConfig::default(), None);
        let (_, late) = coming(&quotas, "a", "one", 7);
        let (_, next) = coming(&quotas, "a", "two", 1);
        late.stored();
        drop(next);
        assert_eq!(coming(&quotas, "a", "two", 1).0, 0);
        assert_eq!(lock(&quotas.state).stored[&cluster("a")].on_tier1(), 7);
    }

    #[test]
    fn stored_bytes_stop_base_backups_and_are_said() {
        let (a, quota) = (cluster("a"), ByteSize::new(100));
        assert!(within("quota.stored_bytes", &a, quota, 60, 40).is_ok());
        let refused = within("quota.stored_bytes", &a, quota, 60, 41).unwrap_err();
        assert_eq!(Code::of(&refused), Code::Quota);
        assert!(refused.message().contains("quota.stored_bytes"), "{refused:?}");
        assert_eq!(Used { bytes: 100, quota }.problem(), None);
        assert!(Used { bytes: 101, quota }.problem().unwrap().contains("WAL is still received"));
    }

    #[test]
    fn a_directory_is_measured_with_all_below_it_but_what_comes() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("d")).unwrap();
        std::fs::write(dir.path().join("d/x"), [0; 10]).unwrap();
        std::fs::write(dir.path().join("y"), [0; 5]).unwrap();
        std::fs::write(durable::tmp_path(&dir.path().join("y")), [0; 50]).unwrap();
        assert_eq!(bytes_below(dir.path()), 15);
        assert_eq!(bytes_below(&dir.path().join("none")), 0);
    }
}
