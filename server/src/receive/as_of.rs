//! `<cluster>/as_of.json`: the time up to which all of PostgreSQL's WAL is known to be durable, kept across a restart.
//!
//! No other file on tier 1 says this: the time of a WAL file is when the file was written, and WAL may arrive hours
//! late, be sealed late, or be written again for another key. The recorded time is never later than the true one.
//! Without the file, or when it cannot be read, no time is claimed. The file is written periodically and at shutdown,
//! as a whole but without fsync, so that it takes no I/O away from WAL.

use crate::registry::Registry;
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

/// A server that is killed loses at most this much of the recorded time.
const KEEP_INTERVAL: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
struct AsOf {
    as_of_unix: f64,
}

fn path(root: &Path, cluster: &ClusterName) -> PathBuf {
    root.join(cluster.as_str()).join("as_of.json")
}

/// The last recorded Unix time up to which all WAL was durable. Blocking.
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

/// Records the time of every cluster that streams, until `cancel`, and once more at the end.
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

/// Writes the times that have advanced since the last round.
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
                tracing::debug!(%cluster, %error, "cannot record the time up to which WAL is durable");
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
        // There are files, but PostgreSQL has not yet said where its WAL ends, so nothing is known to be complete.
        registry.cluster(&cluster).update(|p| p.told(Lsn::new(100), Instant::now()));
        keep(&wal, &registry, now, &mut kept);
        assert_eq!(load(&wal, &cluster), None);
        registry.cluster(&cluster).update(|p| p.flushed = Lsn::new(100));
        keep(&wal, &registry, now, &mut kept);
        drop(wal);
        let wal = open().unwrap();
        let claimed = load(&wal, &cluster).unwrap();
        assert!(claimed <= 1000.0 && claimed > 900.0, "{claimed}");
        // A time that has not advanced is not written again.
        let before = fs::read(path(&root, &cluster)).unwrap();
        keep(&wal, &registry, || 5000.0, &mut kept);
        assert_eq!(fs::read(path(&root, &cluster)).unwrap(), before);
        fs::write(path(&root, &cluster), "{").unwrap();
        assert_eq!(load(&wal, &cluster), None);
    }
}
