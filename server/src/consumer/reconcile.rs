//! Compares tier 1 with tier 2 and queues what is missing (P4).
//!
//! Runs at start, periodically, and whenever the queue has connected or lost something. It uploads existing files when
//! tier 2 is added later, and restores the jobs of a lost queue. Queuing a file twice is harmless.

use super::{Parts, clusters};
use crate::queue::{Job, Task, Wanted};
use futures::{StreamExt, stream};
use klio_storage::{Error, Kind, Op, layout::ClusterName};
use std::{collections::BTreeSet, sync::Arc, time::Duration};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

/// How many clusters are compared at once.
const CLUSTERS_AT_ONCE: usize = 4;
/// How many jobs are published at once, sharing the queue's fsync.
const JOBS_AT_ONCE: usize = 32;
/// Several losses within this time cause one comparison.
const SETTLE: Duration = Duration::from_millis(200);
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(30);

/// Compares until cancelled.
pub(super) async fn run(parts: Parts, every: Duration, cancel: CancellationToken) {
    let mut next_full = Instant::now();
    let mut failed: BTreeSet<ClusterName> = BTreeSet::new();
    let mut retry_after = RETRY_MIN;
    // A fixed time, because comparisons of other clusters would otherwise postpone the retry for ever.
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
        if wanted.all {
            next_full = Instant::now() + every;
            failed.clear();
        }
        let round = async {
            let which = match wanted.all {
                true => all_clusters(&parts).await,
                false => wanted.clusters.into_iter().collect(),
            };
            reconcile_all(&parts, which).await
        };
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

/// The clusters on tier 1, and the generations of them that only tier 2 has.
async fn all_clusters(parts: &Parts) -> Vec<ClusterName> {
    let here = clusters(parts).await;
    let Some(base) = &parts.base else { return here };
    let names: BTreeSet<ClusterName> = here.iter().map(ClusterName::base).collect();
    for cluster in names {
        if let Err(error) = base.regain_generations(&cluster).await {
            tracing::warn!(%cluster, %error, "cannot find the generations that only tier 2 has; trying again later");
        }
    }
    clusters(parts).await
}

/// Returns the clusters that failed.
async fn reconcile_all(parts: &Parts, which: Vec<ClusterName>) -> Vec<ClusterName> {
    let each = stream::iter(which).map(|cluster| {
        let span = tracing::info_span!(parent: None, "reconcile", %cluster);
        compare(parts, cluster).instrument(span)
    });
    each.buffer_unordered(CLUSTERS_AT_ONCE).filter_map(|failed| async { failed }).collect().await
}

/// Returns the cluster if the comparison failed.
async fn compare(parts: &Parts, cluster: ClusterName) -> Option<ClusterName> {
    // Both run, because an error of one kind of object must not stop the other.
    let (wal, base) =
        (reconcile(parts, &cluster).await, super::base::reconcile(parts, &cluster).await);
    match wal.and(base) {
        Ok(()) => None,
        Err(error) => {
            tracing::warn!(%cluster, %error, "cannot compare the tiers; trying again later");
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
    // Files that expired since they were listed are not missing, and no frontier begins with them.
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
    tracing::info!(%cluster, files = compared.missing.len(), "queuing files that tier 2 does not have");
    let jobs = compared.missing.into_iter().map(|file| Job {
        cluster: cluster.clone(),
        file: file.file,
        size: file.size,
        sha256: None,
    });
    publish(parts, cluster, jobs).await
}

/// Queues jobs in order, so that a frontier advances from the first one on.
pub(super) async fn publish(
    parts: &Parts,
    cluster: &ClusterName,
    jobs: impl Iterator<Item = impl Into<Task>>,
) -> Result<(), Error> {
    let published = stream::iter(jobs)
        .map(|job| parts.queue.publish_and_wait(job))
        .buffered(JOBS_AT_ONCE)
        .filter_map(|result| async { result.err() });
    // The first failure ends it: the queue is down or full, and everything is tried again later.
    let first = std::pin::pin!(published).next().await;
    match first {
        // When the queue connects, it asks for a comparison of all clusters.
        Some(_) if !parts.queue.stats().connected => Ok(()),
        Some(error) => {
            Err(Error::new(Kind::Transient, Op::Upload, format!("queue jobs of {cluster}"), error))
        }
        None => Ok(()),
    }
}
