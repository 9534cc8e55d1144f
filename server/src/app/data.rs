//! What holds the data: tier 1, the bucket, the queue between them, and what is known of both.

use super::{Ends, services::Access};
use crate::{
    base::{self, BaseStore},
    config::Config,
    consumer::{self, Archives, Tier1Files},
    encryption::KeyProblem,
    maintenance::{self, Maintenance, MaintenanceMetrics},
    metrics::{self, Metrics, Snapshots},
    private,
    queue::{Publisher, Queue, Started},
    receive::as_of,
    registry::Registry,
    seal,
    status::{StatusBoard, now_unix},
};
use anyhow::Context;
use klio_storage::{
    disk::RealDisk,
    tier2::Tier2,
    wal::{WalOptions, WalStore, check_keys},
};
use klio_telemetry::Telemetry;
use std::sync::Arc;
use tokio::task::JoinSet;

/// What the services and the tasks of the server work with.
pub(super) struct Data {
    pub store: WalStore,
    pub tier2: Option<Tier2>,
    pub base: BaseStore,
    pub registry: Arc<Registry>,
    pub queue: Queue,
    pub publisher: Publisher,
    /// The state of tier 2; `None` without a bucket.
    pub archives: Option<Archives>,
    pub metrics: Arc<Metrics>,
}

/// The tasks that move data between the tiers.
pub(super) struct Workers {
    pub consumer: JoinSet<()>,
    pub queue: JoinSet<()>,
}

impl Data {
    /// Opens tier 1, with its recovery, and starts the queue and the uploads.
    ///
    /// # Errors
    /// Tier 1 cannot be used, or the queue or the bucket are configured wrongly.
    pub async fn open(
        config: &Config,
        telemetry: &Telemetry,
        ends: &Ends,
    ) -> anyhow::Result<(Self, Workers)> {
        let tier2 = config.tier2.as_ref().map(Tier2::open).transpose().context("open tier 2")?;
        let tier2 = tier2.map(Tier2::keeping_parts);
        let store = open_store(config).await?;
        let metrics = Arc::new(Metrics::new(&telemetry.meter()).timing(telemetry.polls()));
        remember_last_times(&store, &metrics).await?;
        let directory = config.data_dir.join("queue");
        let started = Queue::start(&config.queue, &directory, ends.last.clone()).await;
        let Started { queue, tasks } = started.context("start the queue")?;
        let registry = Arc::new(Registry::default());
        let base = open_base(config, &store, &tier2, &queue, &registry).await?;
        let files: Arc<dyn Tier1Files> = Arc::new(store.clone());
        let mut consumer = JoinSet::new();
        let archives = tier2.clone().map(|tier2| {
            let archives = Archives::new(files.clone());
            let parts = consumer::Parts {
                queue: queue.clone(),
                tier2,
                files,
                archives: archives.clone(),
                base: Some(base.clone()),
                observer: metrics.clone(),
            };
            consumer = consumer::start(&config.consumer, parts, ends.back.clone());
            archives
        });
        let publisher = Publisher::new(queue.clone(), archives.as_ref().map(Archives::listener));
        let data = Self { store, tier2, base, registry, queue, publisher, archives, metrics };
        Ok((data, Workers { consumer, queue: tasks }))
    }

    pub fn sealing(&self, config: &Config) -> seal::Context {
        seal::Context {
            base: self.base.clone(),
            queue: self.publisher.clone(),
            metrics: self.metrics.clone(),
            workers: config.wal.seal_workers,
        }
    }

    /// The state of everything, which the gauges show from now on.
    pub fn board(
        &self,
        access: &Access,
        maintenance: Arc<MaintenanceMetrics>,
        telemetry: &Telemetry,
    ) -> Arc<StatusBoard> {
        let expiry = access.certificates.as_ref().map(tokio::sync::watch::Sender::subscribe);
        let board = Arc::new(StatusBoard {
            store: self.store.clone(),
            registry: self.registry.clone(),
            metrics: self.metrics.clone(),
            archives: self.archives.clone(),
            base: Some(self.base.clone()),
            maintenance: Some(maintenance),
            quotas: access.quotas.clone(),
            queue: self.queue.clone(),
            certificate_expiry: Box::new(move || expiry.as_ref().map(|e| e.borrow().expires_unix)),
            snapshots: Snapshots::default(),
        });
        let gauges = board.clone();
        metrics::observe(&telemetry.meter(), move |instrument| gauges.table(instrument));
        board
    }

    pub async fn maintenance(
        &self,
        config: &Config,
        metrics: &Arc<MaintenanceMetrics>,
    ) -> anyhow::Result<Maintenance> {
        let parts = maintenance::Parts {
            base: self.base.clone(),
            archives: self.archives.clone(),
            settings: config.maintenance_settings(),
            data_dir: config.data_dir.clone(),
            config_path: config.file.clone(),
            program: std::env::current_exe().context("find klio-server's own program")?,
            metrics: metrics.clone(),
        };
        Ok(tokio::task::spawn_blocking(move || Maintenance::new(parts)).await?)
    }
}

async fn open_store(config: &Config) -> anyhow::Result<WalStore> {
    let root = config.data_dir.join("tier1");
    let at_rest = config.at_rest().map_err(KeyProblem::from)?;
    if !at_rest.is_on() {
        tracing::warn!("encryption at rest is OFF: [encryption] off = true");
    }
    let store = tokio::task::spawn_blocking(move || {
        private::directory(&root)
            .with_context(|| format!("create directory {}", root.display()))?;
        // Checked before anything is changed.
        check_keys(&RealDisk, &root, &at_rest).map_err(KeyProblem::from)?;
        let options = WalOptions { at_rest, ..WalOptions::default() };
        WalStore::open(Arc::new(RealDisk), root, options).context("open tier 1")
    });
    let store = store.await??;
    for cluster in store.clusters() {
        for position in store.positions(&cluster) {
            tracing::info!(%cluster, timeline = ?position.timeline, start = %position.start, flushed = %position.flushed, "recovered WAL of a timeline");
        }
        for problem in store.problems(&cluster) {
            tracing::error!(%cluster, problem, "problem on the tier 1 disk");
        }
    }
    Ok(store)
}

async fn open_base(
    config: &Config,
    store: &WalStore,
    tier2: &Option<Tier2>,
    queue: &Queue,
    registry: &Arc<Registry>,
) -> anyhow::Result<BaseStore> {
    let parts = base::Parts {
        store: store.clone(),
        disk: Arc::new(RealDisk),
        tier2: tier2.clone(),
        at_rest: store.at_rest().clone(),
        settings: config.base.settings(),
        queue: queue.clone(),
        registry: registry.clone(),
        clock: Arc::new(now_unix),
    };
    Ok(tokio::task::spawn_blocking(move || BaseStore::open(parts)).await?)
}

/// Reads the last times from the store, so that the gauges are right after a restart.
async fn remember_last_times(store: &WalStore, metrics: &Arc<Metrics>) -> anyhow::Result<()> {
    let (store, metrics) = (store.clone(), metrics.clone());
    tokio::task::spawn_blocking(move || {
        for cluster in store.clusters() {
            let newest = store.list(&cluster).unwrap_or_default();
            for file in newest {
                metrics.seen_written(&cluster, file.modified_unix);
            }
            if let Some(held) = as_of::load(&store, &cluster) {
                metrics.seen_held(&cluster, held);
            }
        }
    })
    .await?;
    Ok(())
}
