//! Compares tier 1 with tier 2 and queues what is missing (P4).
//!
//! At the start, from time to time, whenever the queue came up or lost something. This is what
//! backfills when tier 2 is added later, and what heals a lost queue. Queuing twice is harmless.

use super::{Parts, clusters};
use crate::queue::{Job, Task, Wanted};
use futures::{StreamExt, stream};
use klio_storage::{Error, Kind, Op, layout::ClusterName};
use std::{collections::BTreeSet, sync::Arc, time::Duration};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

/// Clusters compared at once.
const CLUSTERS_AT_ONCE: usize = 4;
/// Jobs published at once: they share the queue's fsync.
const JOBS_AT_ONCE: usize = 32;
/// Many losses in a moment are one round.
const SETTLE: Duration = Duration::from_millis(200);
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(30);

/// Compares until cancelled.
pub(super) async fn run(parts: Parts, every: Duration, cancel: CancellationToken) {
    let mut next_full = Instant::now();
    let mut failed: BTreeSet<ClusterName> = BTreeSet::new();
    let mut retry_after = RETRY_MIN;
    // Not from each round on: wishes for other clusters would put it off for ever.
    let mut retry_at = Instant::now();
    while !cancel.is_cancelled() {
        let wanted = tokio::select! {
            () = cancel.cancelled() => break,
            () = tokio::time::sleep_until(next_full) => Wanted { all: true, ..Wanted::default() },
            () = tokio::time::sleep_until(retry_at), if !failed.is_empty() => {
                Wanted { all: false, clusters: std::mem::take(&mut failed) }
            }
            wanted = parts.queue.wanted() => wanted,
        };
        let which = if wanted.all {
            next_full = Instant::now() + every;
            failed.clear();
            clusters(&parts).await
        } else {
            wanted.clusters.into_iter().collect()
        };
        let round = reconcile_all(&parts, which);
        let failures = tokio::select! {
            () = cancel.cancelled() => break,
            failures = round => failures,
        };
        if !failures.is_empty() {
            retry_at = Instant::now() + retry_after;
            retry_after = (retry_after * 2).min(RETRY_MAX);
        } else if failed.is_empty() {
            retry_after = RETRY_MIN;
        }
        failed.extend(failures);
        tokio::select! {
            () = cancel.cancelled() => break,
            () = tokio::time::sleep(SETTLE) => {}
        }
    }
}

/// Gives back the clusters that failed.
async fn reconcile_all(parts: &Parts, which: Vec<ClusterName>) -> Vec<ClusterName> {
    let each = stream::iter(which).map(|cluster| {
        let span = tracing::info_span!(parent: None, "reconcile", %cluster);
        compare(parts, cluster).instrument(span)
    });
    each.buffer_unordered(CLUSTERS_AT_ONCE).filter_map(|failed| async { failed }).collect().await
}

/// Gives back the cluster when it failed.
async fn compare(parts: &Parts, cluster: ClusterName) -> Option<ClusterName> {
    // One kind's trouble is not the other's.
    let (wal, base) =
        (reconcile(parts, &cluster).await, super::base::reconcile(parts, &cluster).await);
    match wal.and(base) {
        Ok(()) => None,
        Err(error) => {
            tracing::warn!(%cluster, %error, "the tiers cannot be compared; tried again later");
            parts.archives.problem(&cluster, None, format!("compare the tiers: {error}"));
            Some(cluster)
        }
    }
}

async fn reconcile(parts: &Parts, cluster: &ClusterName) -> Result<(), Error> {
    parts.archives.begin_comparing(cluster);
    let mut held = {
        let (files, cluster) = (Arc::clone(&parts.files), cluster.clone());
        let listed = tokio::task::spawn_blocking(move || files.list(&cluster)).await;
        listed.map_err(|error| Error::new(Kind::Io, Op::List, "tier 1", error))??
    };
    let mut stored = parts.tier2.list_wal(cluster).await?;
    // Listed before, and let go since: nothing of it is missing, and no frontier begins with it.
    held.retain(|f| !parts.files.expired(cluster, f.file));
    stored.retain(|o| !parts.files.expired(cluster, o.file));
    if let Some(base) = &parts.base {
        super::heal::heal(&parts.tier2, base.wal(), cluster, &stored).await;
    }
    let compared = parts.archives.compared(cluster, &held, &stored).await?;
    parts.archives.no_problem(cluster);
    if compared.missing.is_empty() {
        return Ok(());
    }
    tracing::info!(%cluster, files = compared.missing.len(), "queuing what tier 2 does not have");
    let jobs = compared.missing.into_iter().map(|file| Job {
        cluster: cluster.clone(),
        file: file.file,
        size: file.size,
        sha256: None,
    });
    publish(parts, cluster, jobs).await
}

/// Queues jobs in order, so that a frontier moves from the first one on.
pub(super) async fn publish(
    parts: &Parts,
    cluster: &ClusterName,
    jobs: impl Iterator<Item = impl Into<Task>>,
) -> Result<(), Error> {
    let published = stream::iter(jobs)
        .map(|job| parts.queue.publish_and_wait(job))
        .buffered(JOBS_AT_ONCE)
        .filter_map(|result| async { result.err() });
    // The first failure ends it: the queue is down or full, and the whole is tried again.
    let first = std::pin::pin!(published).next().await;
    match first {
        // Coming up, the queue asks for all clusters by itself.
        Some(_) if !parts.queue.stats().connected => Ok(()),
        Some(error) => {
            Err(Error::new(Kind::Transient, Op::Upload, format!("queue jobs of {cluster}"), error))
        }
        None => Ok(()),
    }
}
