//! The server as a whole: configuration -> build -> run -> drain.
//!
//! Start: first the ports (a taken port must not leave half a server), then tier 1 with its recovery, then everything
//! else. Receiving WAL needs tier 1 only: queue and bucket may be down (P4), except that for a cluster unknown to tier
//! 1 the bucket is asked first (P8).
//!
//! Stop: no new streams are accepted, sessions end with what is durable, seals finish, and consumer and queue stop,
//! all within [`DRAIN_TIMEOUT`]. Tasks that do not end in time are logged by name.

use crate::{
    access::{
        auth::{self, Auth},
        tls::{self, Loaded},
    },
    admin::{self, bind},
    base::{self, BaseStore},
    config::Config,
    consumer::{self, Archives, Tier1Files},
    encryption::KeyProblem,
    fetch::Source,
    grpc::{
        BaseService, CatalogService, Histories, WalService,
        counted::{self, CountLayer},
        trace::TraceLayer,
    },
    maintenance::{self, Maintenance, MaintenanceMetrics},
    metrics::{self, Metrics, Snapshots},
    private,
    queue::{Publisher, Queue, Started},
    quota::{Quotas, Whose},
    receive::{Comparer, Receiver, ReceiverOptions, as_of},
    registry::Registry,
    seal,
    status::{StatusBoard, now_unix},
};
use anyhow::Context;
use klio_proto::v1::{
    FILE_DESCRIPTOR_SET, base_server::BaseServer, catalog_server::CatalogServer,
    wal_server::WalServer,
};
use klio_storage::{
    disk::RealDisk,
    tier2::Tier2,
    wal::{WalOptions, WalStore, check_keys},
};
use klio_telemetry::{
    Telemetry,
    rpc::{RpcLayer, RpcMeter, Side},
};
use std::{future::Future, sync::Arc, time::Duration};
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    task::{JoinHandle, JoinSet},
};
use tokio_stream::{
    StreamExt,
    wrappers::{ReceiverStream, TcpListenerStream},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::transport::{Server, server::Router};
use tonic_health::{ServingStatus, server::HealthReporter};
use tower::layer::util::{Identity, Stack};

/// The time for the whole shutdown, except the flush of telemetry.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(20);
/// The part of it for removing unfinished uploads from the bucket.
const ABANDON_TIMEOUT: Duration = Duration::from_secs(5);
/// A message is at most a batch of WAL with some room; larger ones are refused unread.
const MESSAGE_BYTES_MAX: usize = 4 << 20;
/// A client needs one stream of WAL, some fetches and some requests; one that wants more is broken.
const STREAMS_PER_CONNECTION_MAX: u32 = 64;
/// Finds a peer that vanished silently, so that its place becomes free.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// How often gRPC health is updated to what /readyz says; each check writes a byte to tier 1.
const HEALTH_INTERVAL: Duration = Duration::from_secs(2);

/// A running server.
pub struct Running {
    /// Ends accepting and receiving.
    front: CancellationToken,
    /// Ends sealing, uploading and answering.
    back: CancellationToken,
    /// Ends the queue and its child, when nobody uses it any more.
    last: CancellationToken,
    sessions: TaskTracker,
    tasks: Vec<(&'static str, JoinHandle<()>)>,
    background: Vec<(&'static str, JoinHandle<()>)>,
    consumer_tasks: JoinSet<()>,
    queue_tasks: JoinSet<()>,
    tier2: Option<Tier2>,
}

/// Starts everything. The server accepts connections when this returns.
///
/// # Errors
/// A port, a certificate or tier 1 cannot be used.
pub async fn start(config: Config, telemetry: &Telemetry) -> anyhow::Result<Running> {
    let listener = bind(config.listen.to_string(), "gRPC").await?;
    private::warn_of_readable(&config.secret_files());
    let admin_listener = match config.admin.listen {
        Some(address) => Some(bind(address.to_string(), "health and metrics").await?),
        None => None,
    };
    let page = telemetry.prometheus().cloned();
    let scrape_listener = match &page {
        Some(page) => admin::scrape_port(page, telemetry).await?,
        None => None,
    };
    let certificates = match &config.tls {
        Some(files) => Some(watch::Sender::new(Arc::new(files.load()?))),
        None => None,
    };
    let tier2 = config.tier2.as_ref().map(Tier2::open).transpose().context("open tier 2")?;
    let tier2 = tier2.map(Tier2::keeping_parts);
    let store = open_store(&config).await?;

    let [front, back, last] = std::array::from_fn(|_| CancellationToken::new());
    let metrics = Arc::new(Metrics::new(&telemetry.meter()).timing(telemetry.polls()));
    remember_last_times(&store, &metrics).await?;
    let queue_directory = config.data_dir.join("queue");
    let Started { queue, tasks: queue_tasks } =
        Queue::start(&config.queue, &queue_directory, last.clone())
            .await
            .context("start the queue")?;
    let registry = Arc::new(Registry::default());
    let base = open_base(&config, &store, &tier2, &queue, &registry).await?;
    let files: Arc<dyn Tier1Files> = Arc::new(store.clone());
    let mut consumer_tasks = JoinSet::new();
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
        consumer_tasks = consumer::start(&config.consumer, parts, back.clone());
        archives
    });
    let publisher = Publisher::new(queue.clone(), archives.as_ref().map(Archives::listener));
    let (sealer, hints) = seal::channel();
    let sealing = seal::Context {
        base: base.clone(),
        queue: publisher.clone(),
        metrics: metrics.clone(),
        workers: config.wal.seal_workers,
    };
    let sealing = spawn(telemetry.polls().watch(seal::run(sealing, hints, back.clone())));

    let (roles, rules) = watch::channel(Arc::new(config.auth.clone()));
    let auth = Auth::new(certificates.as_ref().map(watch::Sender::subscribe), rules);
    let quotas = Quotas::new(config.quota.clone(), archives.clone());
    let measuring = spawn(quotas.clone().keep_measuring(base.clone(), back.clone()));
    let sessions = TaskTracker::new();
    let expiry = certificates.as_ref().map(watch::Sender::subscribe);
    let maintenance_metrics = Arc::new(MaintenanceMetrics::default());
    let maintenance = open_maintenance(&config, &base, &archives, &maintenance_metrics).await?;
    let board = Arc::new(StatusBoard {
        store: store.clone(),
        registry: registry.clone(),
        metrics: metrics.clone(),
        archives,
        base: Some(base.clone()),
        maintenance: Some(maintenance_metrics),
        quotas: quotas.clone(),
        queue: queue.clone(),
        certificate_expiry: Box::new(move || expiry.as_ref().map(|e| e.borrow().expires_unix)),
        snapshots: Snapshots::default(),
    });
    let gauges = board.clone();
    metrics::observe(&telemetry.meter(), move |instrument| gauges.table(instrument));

    let keeping = as_of::run(store.clone(), registry.clone(), now_unix, back.clone());
    let keeping = spawn(telemetry.polls().watch(keeping));
    let comparer = Comparer::new(base.clone());
    let histories = Histories { base: base.clone(), registry: registry.clone() };
    let receiver = Receiver {
        store: store.clone(),
        base: base.clone(),
        comparer: comparer.clone(),
        registry,
        sealer,
        auth: auth.clone(),
        metrics,
        options: ReceiverOptions {
            window: config.wal.window_bytes,
            on_divergence: config.wal.on_divergence,
        },
        shutdown: front.clone(),
    };
    let source = Source { store, tier2: tier2.clone(), readers: base.readers().clone() };
    let wal = WalService {
        auth: auth.clone(),
        receiver,
        source,
        queue: publisher,
        tasks: sessions.clone(),
    };
    let base = BaseService {
        auth: auth.clone(),
        base,
        comparer,
        maintenance: maintenance.clone(),
        quotas: quotas.clone(),
        tasks: sessions.clone(),
        shutdown: front.clone(),
    };
    let served = tier2.clone();
    let catalog =
        CatalogService { auth: auth.clone(), histories, board: board.clone(), tier2: served };
    let count = CountLayer { auth: auth.clone(), quotas: quotas.clone() };
    let admit: tls::Admit = Arc::new(move |chain| {
        // A client without a role is refused by its first call; until then all such clients share one quota.
        let whose = match auth.identify_chain(chain) {
            Ok(identity) => counted::whose(&identity),
            Err(_) => Some(Whose::Person(String::new())),
        };
        whose.map(|whose| quotas.connection(whose)).transpose()
    });
    let rpc = RpcMeter::new(&telemetry.meter(), Side::Server, &klio_proto::SERVICES);
    let (router, health) = router(rpc, count, wal, catalog, base).await?;
    let mut tasks = serve(router, listener, certificates, config.tls.clone(), admit, &front);
    let reloading = auth::reload(config.file.clone(), Config::load_rules, roles, front.clone());
    tasks.push(("roles", spawn(reloading)));

    let readiness: admin::Readiness = Arc::new(move || {
        let board = board.clone();
        Box::pin(async move {
            let read = tokio::task::spawn_blocking(move || board.readiness()).await;
            read.unwrap_or_else(|error| vec![error.to_string()])
        })
    });
    tasks.push(("health", spawn(health.follow(readiness.clone(), front.clone()))));
    if let Some(listener) = admin_listener {
        tracing::info!(address = %listener.local_addr()?, "serving /livez, /readyz and, with OTEL_METRICS_EXPORTER=prometheus, /metrics");
        let router = admin::router(readiness, page.clone());
        tasks.push(("admin", spawn(admin::serve(listener, router, back.clone()))));
    }
    if let (Some(listener), Some(page)) = (scrape_listener, page) {
        let router = admin::metrics_router(page);
        tasks.push(("metrics", spawn(admin::serve(listener, router, back.clone()))));
    }
    let maintaining = spawn(telemetry.polls().watch(maintenance.run(front.clone())));
    let background = vec![
        ("seal", sealing),
        ("maintenance", maintaining),
        ("as of", keeping),
        ("quota", measuring),
    ];
    Ok(Running {
        front,
        back,
        last,
        sessions,
        tasks,
        background,
        consumer_tasks,
        queue_tasks,
        tier2,
    })
}

/// The only place that spawns tasks: every handle is owned by [`Running`].
#[expect(clippy::disallowed_methods, reason = "the handle is owned by Running")]
pub(crate) fn spawn(task: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
    tokio::spawn(task)
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

async fn open_maintenance(
    config: &Config,
    base: &BaseStore,
    archives: &Option<Archives>,
    metrics: &Arc<MaintenanceMetrics>,
) -> anyhow::Result<Maintenance> {
    let parts = maintenance::Parts {
        base: base.clone(),
        archives: archives.clone(),
        settings: config.maintenance_settings(),
        data_dir: config.data_dir.clone(),
        config_path: config.file.clone(),
        program: std::env::current_exe().context("find klio-server's own program")?,
        metrics: metrics.clone(),
    };
    Ok(tokio::task::spawn_blocking(move || Maintenance::new(parts)).await?)
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

/// All services behind the layers that measure, trace and count calls.
type Services = Router<Stack<CountLayer, Stack<TraceLayer, Stack<RpcLayer, Identity>>>>;

async fn router(
    rpc: RpcMeter,
    count: CountLayer,
    wal: WalService,
    catalog: CatalogService,
    base: BaseService,
) -> anyhow::Result<(Services, Health)> {
    let (health, health_service) = tonic_health::server::health_reporter();
    Health(health.clone()).set(false).await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .build_v1()
        .context("prepare gRPC reflection")?;
    let router = Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX)
        .initial_stream_window_size(2 << 20)
        .initial_connection_window_size(4 << 20)
        .max_frame_size(256 << 10)
        .layer(rpc.layer())
        .layer(TraceLayer)
        .layer(count)
        .add_service(WalServer::new(wal).max_decoding_message_size(MESSAGE_BYTES_MAX))
        .add_service(CatalogServer::new(catalog).max_decoding_message_size(64 << 10))
        .add_service(BaseServer::new(base).max_decoding_message_size(MESSAGE_BYTES_MAX))
        .add_service(health_service)
        .add_service(reflection);
    Ok((router, Health(health)))
}

/// Answers of gRPC's own health service: the same as /readyz, for each service and for the server as a whole.
struct Health(HealthReporter);

impl Health {
    async fn set(&self, ready: bool) {
        let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
        for service in ["", "klio.v1.Wal", "klio.v1.Catalog", "klio.v1.Base"] {
            self.0.set_service_status(service, status).await;
        }
    }

    /// Follows readiness until cancelled; a server that stops is not serving.
    async fn follow(self, readiness: admin::Readiness, cancel: CancellationToken) {
        loop {
            self.set(readiness().await.is_empty()).await;
            tokio::select! {
                () = cancel.cancelled() => break,
                () = tokio::time::sleep(HEALTH_INTERVAL) => {}
            }
        }
        self.set(false).await;
    }
}

fn serve(
    router: Services,
    listener: TcpListener,
    certificates: Option<watch::Sender<Arc<Loaded>>>,
    files: Option<tls::TlsFiles>,
    admit: tls::Admit,
    front: &CancellationToken,
) -> Vec<(&'static str, JoinHandle<()>)> {
    let stop = front.clone().cancelled_owned();
    let address = listener.local_addr().map_or_else(|_| "?".into(), |a| a.to_string());
    let (Some(certificates), Some(files)) = (certificates, files) else {
        tracing::warn!(%address, "receiving WAL WITHOUT TLS: unsafe_plaintext is set");
        let incoming = TcpListenerStream::new(listener)
            .map(|tcp| tcp.inspect(|tcp| drop(tcp.set_nodelay(true))));
        let served =
            async move { report(router.serve_with_incoming_shutdown(incoming, stop).await) };
        return vec![("grpc", spawn(served))];
    };
    tracing::info!(%address, "receiving WAL over TLS 1.3 with client certificates");
    let (ready, accepted) = mpsc::channel(64);
    let accepting = tls::accept(listener, certificates.subscribe(), admit, ready, front.clone());
    let incoming = ReceiverStream::new(accepted);
    let served = async move { report(router.serve_with_incoming_shutdown(incoming, stop).await) };
    vec![
        ("accept", spawn(accepting)),
        ("certificates", spawn(tls::reload(files, certificates, front.clone()))),
        ("grpc", spawn(served)),
    ]
}

fn report(served: Result<(), tonic::transport::Error>) {
    if let Err(error) = served {
        tracing::error!(%error, "the gRPC server failed");
    }
}

impl Running {
    /// Resolves with the name of a required task that has ended by itself.
    pub async fn broken(&mut self) -> &'static str {
        let tasks = self.tasks.iter_mut().chain(&mut self.background);
        let ends = tasks.map(|(name, handle)| {
            Box::pin(async move {
                if let Err(error) = handle.await {
                    tracing::error!(task = *name, %error, "a task ended unexpectedly");
                }
                *name
            })
        });
        futures::future::select_all(ends).await.0
    }

    /// Stops in order; returns within [`DRAIN_TIMEOUT`].
    pub async fn stop(mut self) {
        let deadline = tokio::time::Instant::now() + DRAIN_TIMEOUT;
        self.front.cancel();
        self.sessions.close();
        if tokio::time::timeout_at(deadline, self.sessions.wait()).await.is_err() {
            tracing::warn!(left = self.sessions.len(), "streams did not end in time");
        }
        self.back.cancel();
        for (name, mut handle) in self.background.into_iter().chain(self.tasks) {
            if handle.is_finished() {
                continue;
            }
            if tokio::time::timeout_at(deadline, &mut handle).await.is_err() {
                tracing::warn!(task = name, "task did not end in time");
                handle.abort();
            }
        }
        drain("consumer", &mut self.consumer_tasks, deadline).await;
        if let Some(tier2) = &self.tier2 {
            abandon(tier2, deadline).await;
        }
        self.last.cancel();
        drain("queue", &mut self.queue_tasks, deadline).await;
        tracing::info!("stopped");
    }
}

/// Removes unfinished uploads. An object store that does not answer does not delay the stop; its lifecycle rule
/// removes what is left.
async fn abandon(tier2: &Tier2, deadline: tokio::time::Instant) {
    let until = deadline.min(tokio::time::Instant::now() + ABANDON_TIMEOUT);
    if tokio::time::timeout_at(until, tier2.abandon()).await.is_err() {
        tracing::warn!("tier 2 did not answer in time; unfinished uploads stay there");
    }
}

async fn drain(name: &'static str, tasks: &mut JoinSet<()>, deadline: tokio::time::Instant) {
    let all = async { while tasks.join_next().await.is_some() {} };
    if tokio::time::timeout_at(deadline, all).await.is_err() {
        tracing::warn!(task = name, "task did not end in time");
    }
}
