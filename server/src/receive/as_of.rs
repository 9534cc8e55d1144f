//! `<cluster>/as_of.json`: until when all that PostgreSQL had is known to be durable, for the time after a restart.
//!
//! Nothing else on tier 1 tells it: a file's time is when it was written, and WAL may come hours late, be sealed late,
//! or be written again for another key. Never later than the truth; without it, or when it cannot be read, nothing is
//! claimed. Written from time to time and at the end, whole but not synced: it takes no sync from WAL.

use super::Registry;
use klio_storage::{
    disk::{RealDisk, durable},
    layout::ClusterName,
    record,
    wal::WalStore,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio_util::sync::CancellationToken;

/// So much is forgotten at most by a server that is killed.
const KEEP_INTERVAL: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
struct AsOf {
    as_of_unix: f64,
}

fn path(root: &Path, cluster: &ClusterName) -> PathBuf {
    root.join(cluster.as_str()).join("as_of.json")
}

/// Unix time until which all was known to be durable when it was last kept. Blocking.
pub fn load(store: &WalStore, cluster: &ClusterName) -> Option<f64> {
    let read = record::load::<AsOf>(&RealDisk, &path(store.root(), cluster));
    let read = read.unwrap_or_else(|error| {
        tracing::warn!(%cluster, %error, "cannot read as_of.json; the recovery window has no time until WAL arrives");
        None
    });
    read.map(|kept| kept.as_of_unix)
}

fn store(root: &Path, cluster: &ClusterName, as_of_unix: f64) -> io::Result<()> {
    let path = path(root, cluster);
    let bytes = record::encode(&AsOf { as_of_unix }, path.display()).map_err(io::Error::other)?;
    let tmp = durable::tmp_path(&path);
    fs::write(&tmp, bytes)?;
    fs::rename(&tmp, &path)
}

/// Keeps it for every cluster that is streamed, until the end.
pub async fn run(
    wal: WalStore,
    registry: Arc<Registry>,
    clock: fn() -> f64,
    cancel: CancellationToken,
) {
    let mut kept = BTreeMap::new();
    loop {
        let last = tokio::select! {
            () = cancel.cancelled() => true,
            () = tokio::time::sleep(KEEP_INTERVAL) => false,
        };
        let (wal, registry) = (wal.clone(), registry.clone());
        let round = tokio::task::spawn_blocking(move || {
            keep(&wal, &registry, clock, &mut kept);
            kept
        });
        match round.await {
            Ok(told) if !last => kept = told,
            _ => return,
        }
    }
}

/// Writes what is news.
fn keep(
    wal: &WalStore,
    registry: &Registry,
    clock: fn() -> f64,
    kept: &mut BTreeMap<ClusterName, Instant>,
) {
    for (cluster, state) in registry.all() {
        let Some(at) = state.progress().durable_as_of else { continue };
        if kept.get(&cluster).is_some_and(|before| *before >= at) {
            continue;
        }
        match store(wal.root(), &cluster, clock() - at.elapsed().as_secs_f64()) {
            Ok(()) => drop(kept.insert(cluster, at)),
            Err(error) => {
                tracing::debug!(%cluster, %error, "keep until when all was durable");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use klio_pg::Lsn;
    use klio_storage::wal::WalOptions;

    #[test]
    fn what_is_claimed_after_a_restart_is_what_was_known_and_never_a_file_s_time() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().to_owned();
        let open = || WalStore::open(Arc::new(RealDisk), root.clone(), WalOptions::default());
        let (wal, cluster): (_, ClusterName) = (open().unwrap(), "pg".parse().unwrap());
        fs::create_dir_all(root.join("pg")).unwrap();
        let registry = Registry::default();
        let mut kept = BTreeMap::new();
        let now = || 1000.0;
        // Files there are, but nobody has said that they are all.
        registry.cluster(&cluster).update(|p| p.told(Lsn::new(100), Instant::now()));
        keep(&wal, &registry, now, &mut kept);
        assert_eq!(load(&wal, &cluster), None);
        registry.cluster(&cluster).update(|p| p.flushed = Lsn::new(100));
        keep(&wal, &registry, now, &mut kept);
        drop(wal);
        let wal = open().unwrap();
        let claimed = load(&wal, &cluster).unwrap();
        assert!(claimed <= 1000.0 && claimed > 900.0, "{claimed}");
        // What is no news is not written.
        let before = fs::read(path(&root, &cluster)).unwrap();
        keep(&wal, &registry, || 5000.0, &mut kept);
        assert_eq!(fs::read(path(&root, &cluster)).unwrap(), before);
        fs::write(path(&root, &cluster), "{").unwrap();
        assert_eq!(load(&wal, &cluster), None);
    }
}
