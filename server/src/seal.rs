//! Turns finished journals into sealed segments, off the receiving path.
//!
//! - The list of files to seal is on disk (`WalStore::unsealed`). The channel carries only hints and may overflow; a
//!   rescan finds the rest.
//! - A seal that fails is tried again at the next rescan, for ever; the journal stays until then.
//! - Sealed files are announced to the queue, which never blocks sealing (P4).

use crate::{base::BaseStore, errors, metrics::Metrics, queue};
use klio_storage::{
    layout::{ClusterName, WalFile},
    tier2::Sha256Sum,
    wal::Sealed,
};
use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{
    sync::{Semaphore, mpsc},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, Span, field::Empty};

const HINTS_MAX: usize = 256;
const RESCAN_INTERVAL: Duration = Duration::from_secs(15);

struct Hint {
    cluster: ClusterName,
    file: WalFile,
    parent: Span,
}

/// Accepts hints; cheap to clone.
#[derive(Clone)]
pub struct Sealer {
    hints: mpsc::Sender<Hint>,
}

/// The receiving end, for [`run`].
pub struct Hints(mpsc::Receiver<Hint>);

/// A sealer and its queue of hints.
pub fn channel() -> (Sealer, Hints) {
    let (sender, receiver) = mpsc::channel(HINTS_MAX);
    (Sealer { hints: sender }, Hints(receiver))
}

impl Sealer {
    /// Announces that a file is ready to be sealed. Never waits.
    pub fn push(&self, cluster: ClusterName, file: WalFile, parent: Span) {
        // If the channel is full, the rescan finds the file on disk.
        let _ = self.hints.try_send(Hint { cluster, file, parent });
    }
}

/// What sealing needs.
#[derive(Clone)]
pub struct Context {
    /// Tier 1, and which of its histories are closed.
    pub base: BaseStore,
    /// Receives a job for each sealed file.
    pub queue: queue::Publisher,
    pub metrics: Arc<Metrics>,
    /// How many seals run at once.
    pub workers: usize,
}

type Busy = Arc<Mutex<HashSet<(ClusterName, WalFile)>>>;

/// Seals until cancelled; seals under way are finished first.
pub async fn run(context: Context, mut hints: Hints, cancel: CancellationToken) {
    let slots = Arc::new(Semaphore::new(context.workers.max(1)));
    let busy = Busy::default();
    let mut running = JoinSet::new();
    let mut rescan = tokio::time::interval(RESCAN_INTERVAL);
    rescan.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let work = tokio::select! {
            () = cancel.cancelled() => break,
            Some(_) = running.join_next() => continue,
            Some(hint) = hints.0.recv() => vec![hint],
            _ = rescan.tick() => find_work(&context.base).await,
        };
        for hint in work {
            if !busy_set(&busy).insert((hint.cluster.clone(), hint.file)) {
                continue;
            }
            let slot = tokio::select! {
                () = cancel.cancelled() => break,
                slot = slots.clone().acquire_owned() => slot,
            };
            let Ok(slot) = slot else { break };
            let context = context.clone();
            let key = Key { busy: busy.clone(), key: (hint.cluster.clone(), hint.file) };
            running.spawn(async move {
                seal(&context, hint).await;
                drop(key);
                drop(slot);
            });
        }
    }
    while running.join_next().await.is_some() {}
}

/// Marks a file as being sealed. The mark is removed even after a panic; otherwise the file would never be sealed.
struct Key {
    busy: Busy,
    key: (ClusterName, WalFile),
}

impl Drop for Key {
    fn drop(&mut self) {
        busy_set(&self.busy).remove(&self.key);
    }
}

fn busy_set(busy: &Busy) -> std::sync::MutexGuard<'_, HashSet<(ClusterName, WalFile)>> {
    busy.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn find_work(base: &BaseStore) -> Vec<Hint> {
    let base = base.clone();
    let found = tokio::task::spawn_blocking(move || {
        let store = base.wal();
        let files = |cluster: ClusterName| {
            // If the record cannot be read, the history counts as open.
            let over = base.takes_no_more(&cluster).unwrap_or(false);
            store.set_over(&cluster, over);
            store.unsealed(&cluster).into_iter().map(move |file| Hint {
                cluster: cluster.clone(),
                file,
                parent: Span::none(),
            })
        };
        store.clusters().into_iter().flat_map(files).collect()
    });
    found.await.unwrap_or_default()
}

/// The span covers all of the work, so that its log lines belong to the segment's trace, and so does the job.
async fn seal(context: &Context, hint: Hint) {
    let Hint { cluster, file, parent } = hint;
    let span = tracing::info_span!(
        parent: &parent,
        "wal.seal",
        %cluster,
        file = %file,
        bytes = Empty,
        error.type = Empty,
    );
    seal_one(context, cluster, file).instrument(span).await;
}

async fn seal_one(context: &Context, cluster: ClusterName, file: WalFile) {
    let (store, name, span) = (context.base.wal().clone(), cluster.clone(), Span::current());
    let sealed = tokio::task::spawn_blocking(move || span.in_scope(|| store.seal(&name, file)));
    match sealed.await {
        Ok(Ok(sealed)) => {
            after_seal(context, &cluster, &sealed);
            let Sealed { file, size, sha256, .. } = sealed;
            Span::current().record("bytes", size);
            context.queue.publish_sealed(&cluster, file, size, Some(Sha256Sum::new(sha256)));
        }
        Ok(Err(error)) => {
            Span::current().record("error.type", errors::code(&error).name());
            tracing::error!(%cluster, %file, %error, "cannot seal a segment; trying again");
            context.metrics.seal_failed(&cluster);
        }
        Err(error) => {
            Span::current().record("error.type", klio_proto::Code::Internal.name());
            tracing::error!(%cluster, %file, %error, "the task that seals a segment failed");
        }
    }
}

fn after_seal(context: &Context, cluster: &ClusterName, sealed: &Sealed) {
    tracing::debug!(%cluster, file = %sealed.file, bytes = sealed.size, "sealed");
    context.metrics.written(cluster, sealed.size);
}
