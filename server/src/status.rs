//! What is known of every cluster, in one place: for `klio status`, the gauges and /readyz.
//!
//! Nothing here decides anything. Sources: the store (durable facts), the registry (live sessions),
//! the archive (tier 2), the queue's cached numbers.

use crate::{
    base::BaseStore,
    consumer::{ArchiveState, Archives},
    maintenance::MaintenanceMetrics,
    metrics::{self, Gauge, GaugeTable, Metrics},
    queue::Queue,
    receive::{Progress, Registry},
};
use klio_pg::{Lsn, TimelineId};
use klio_storage::{
    layout::ClusterName,
    wal::{Gap, Pinned, WalStore},
};
use std::{
    io::Write,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// Reading a thousand clusters for each of thirty gauges would be thirty thousand reads.
const CACHE_AGE: Duration = Duration::from_millis(500);

/// Everything about one cluster.
#[derive(Debug, Clone)]
pub struct ClusterView {
    /// Its name.
    pub name: ClusterName,
    /// What was pinned at first contact.
    pub pinned: Option<Pinned>,
    /// The newest timeline held.
    pub timeline: Option<TimelineId>,
    /// Durable on tier 1, of that timeline.
    pub flushed: Lsn,
    /// In sealed segments, of that timeline.
    pub sealed: Lsn,
    /// A sidecar is streaming.
    pub connected: bool,
    /// The session's view.
    pub progress: Progress,
    /// Tier 2's view; `None` without tier 2.
    pub archive: Option<ArchiveState>,
    /// Recorded holes.
    pub gaps: Vec<Gap>,
    /// Unix time of the newest WAL file on tier 1.
    pub latest_written: Option<f64>,
    /// What is wrong.
    pub problems: Vec<String>,
}

impl ClusterView {
    /// Contiguously in tier 2, of the newest timeline; 0/0 when nothing is.
    pub fn archived(&self) -> Lsn {
        self.archive.as_ref().map_or(Lsn::ZERO, |a| a.archived_lsn)
    }

    /// Finished bytes that tier 2 has not; 0 on an idle cluster. Bytes of a recorded gap are nobody's.
    pub fn archive_lag_bytes(&self) -> u64 {
        let Some(archive) = self.archive.as_ref().filter(|a| a.timeline == self.timeline) else {
            return 0;
        };
        let (from, to) = (archive.archived_lsn, self.sealed);
        let overlap = |gap: &Gap| gap.to.min(to).bytes_since(gap.from.max(from));
        to.bytes_since(from).saturating_sub(self.gaps.iter().map(overlap).sum())
    }

    /// Age of the oldest finished file that tier 2 has not.
    pub fn archive_lag_seconds(&self, now_unix: f64) -> f64 {
        let oldest = self.archive.as_ref().and_then(|a| a.oldest_unarchived_unix);
        oldest.map_or(0.0, |since| (now_unix - since).max(0.0))
    }
}

/// Writes and syncs a byte: what a full or read-only disk refuses.
fn probe(root: &Path) -> std::io::Result<()> {
    let path = root.join(".probe");
    let mut file = std::fs::File::create(&path)?;
    file.write_all(b"k")?;
    file.sync_data()
}

/// Now, in Unix seconds.
pub fn now_unix() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// Reads all sources.
pub struct StatusBoard {
    /// Tier 1.
    pub store: WalStore,
    /// Live sessions.
    pub registry: Arc<Registry>,
    /// Last times.
    pub metrics: Arc<Metrics>,
    /// Tier 2; `None` when not configured.
    pub archives: Option<Archives>,
    /// Verification, drills, maintenance.
    pub maintenance: Option<Arc<MaintenanceMetrics>>,
    /// Base backups.
    pub base: Option<BaseStore>,
    /// The queue.
    pub queue: Queue,
    /// When the server's certificate ends, Unix seconds; `None` with plaintext.
    pub certificate_expiry: Box<dyn Fn() -> Option<i64> + Send + Sync>,
    /// The last reading of all gauges.
    pub cache: Mutex<Option<(Instant, GaugeTable)>>,
}

impl StatusBoard {
    /// Every cluster, read now.
    pub fn clusters(&self) -> Vec<ClusterView> {
        self.store.clusters().iter().map(|name| self.cluster(name)).collect()
    }

    /// One cluster, read now.
    pub fn cluster(&self, name: &ClusterName) -> ClusterView {
        let positions = self.store.positions(name);
        let newest = positions.iter().max_by_key(|p| p.timeline);
        let state = self.registry.cluster(name);
        let archive = self.archives.as_ref().map(|archives| archives.state(name));
        let mut problems = self.store.problems(name);
        problems.extend(archive.iter().flat_map(|a| a.problems.clone()));
        let base = self.base.as_ref().map(|base| base.archives().state(name).problems);
        problems.extend(base.into_iter().flatten());
        ClusterView {
            pinned: self.store.pinned(name),
            timeline: newest.map(|p| p.timeline),
            flushed: newest.map_or(Lsn::ZERO, |p| p.flushed),
            sealed: newest.map_or(Lsn::ZERO, |p| p.sealed),
            connected: state.connected(),
            progress: state.progress(),
            archive,
            gaps: self.store.gaps(name),
            latest_written: self.metrics.latest_written(name),
            problems,
            name: name.clone(),
        }
    }

    /// All gauges, at most [`CACHE_AGE`] old: one reading for all instruments of a scrape.
    pub fn gauge_table(&self) -> GaugeTable {
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        match &*cache {
            Some((at, table)) if at.elapsed() < CACHE_AGE => table.clone(),
            _ => {
                let table = metrics::table(self.gauges());
                *cache = Some((Instant::now(), table.clone()));
                table
            }
        }
    }

    /// All gauges of the catalogue.
    fn gauges(&self) -> Vec<Gauge> {
        let (now, now_unix) = (Instant::now(), now_unix());
        let mut gauges = self.base.as_ref().map(BaseStore::gauges).unwrap_or_default();
        gauges.extend(self.maintenance.iter().flat_map(|m| m.gauges(now_unix)));
        for view in &self.clusters() {
            let mut put = |name, value| {
                gauges.push(Gauge { name, cluster: Some(view.name.clone()), value });
            };
            put("klio.wal.connected", f64::from(u8::from(view.connected)));
            put("klio.wal.received_lsn", view.progress.received.max(view.flushed).as_u64() as f64);
            put("klio.wal.flushed_lsn", view.flushed.as_u64() as f64);
            put("klio.wal.sealed_lsn", view.sealed.as_u64() as f64);
            put("klio.wal.flush_lag_size", view.progress.lag_bytes() as f64);
            put("klio.wal.flush_lag_time", view.progress.lag_seconds(now));
            put("klio.wal.gaps", view.gaps.len() as f64);
            if let Some(unix) = view.latest_written {
                put("klio.wal.latest_written_time", unix);
            }
            if let Some(archive) = &view.archive {
                put("klio.wal.archived_lsn", archive.archived_lsn.as_u64() as f64);
                put("klio.wal.archive_lag_size", view.archive_lag_bytes() as f64);
                put("klio.wal.archive_lag_time", view.archive_lag_seconds(now_unix));
                if let Some(unix) = archive.latest_archived_unix {
                    put("klio.consumer.latest_written_time", unix);
                }
            }
        }
        let queue = self.queue.stats();
        let mut put = |name, value| gauges.push(Gauge { name, cluster: None, value });
        put("klio.queue.messages", queue.messages as f64);
        put("klio.queue.bytes", queue.bytes as f64);
        put("klio.queue.connected", f64::from(u8::from(queue.connected)));
        if let Some(expiry) = (self.certificate_expiry)() {
            put("klio.tls.certificate_expiry_time", expiry as f64);
        }
        gauges
    }

    /// What keeps the server from its work: empty when it is ready. Writes a byte to tier 1.
    pub fn readiness(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if let Err(error) = probe(self.store.root()) {
            problems.push(format!("tier 1 is not writable: {error}"));
        }
        if !self.queue.stats().connected {
            problems.push("queue: not connected; WAL is received, archiving waits".into());
        }
        problems
    }
}
