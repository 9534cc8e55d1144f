//! What the server answers: who may connect and call, the gRPC services behind their layers, and the HTTP pages.

use super::{Ends, Task, data::Data, ports::Ports, spawn};
use crate::{
    access::{
        auth::{self, Auth, AuthConfig},
        tls::{self, Loaded},
    },
    admin,
    config::Config,
    fetch::Source,
    grpc::{
        BaseService, CatalogService, Histories, WalService,
        counted::{self, CountLayer},
        trace::TraceLayer,
    },
    maintenance::Maintenance,
    quota::{Quotas, Whose},
    receive::{Comparer, Receiver, ReceiverOptions},
    seal::Sealer,
    status::StatusBoard,
};
use anyhow::Context;
use klio_proto::v1::{
    FILE_DESCRIPTOR_SET, base_server::BaseServer, catalog_server::CatalogServer,
    wal_server::WalServer,
};
use klio_telemetry::{
    Telemetry,
    rpc::{RpcLayer, RpcMeter, Side},
};
use std::{sync::Arc, time::Duration};
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
};
use tokio_stream::{
    StreamExt,
    wrappers::{ReceiverStream, TcpListenerStream},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::transport::{Server, server::Router};
use tonic_health::{ServingStatus, server::HealthReporter};
use tower::layer::util::{Identity, Stack};

/// A message is at most a batch of WAL with some room; larger ones are refused unread.
const MESSAGE_BYTES_MAX: usize = 4 << 20;
/// A client needs one stream of WAL, some fetches and some requests; one that wants more is broken.
const STREAMS_PER_CONNECTION_MAX: u32 = 64;
/// Finds a peer that vanished silently, so that its place becomes free.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// How often gRPC health is updated to what /readyz says; each check writes a byte to tier 1.
const HEALTH_INTERVAL: Duration = Duration::from_secs(2);

type Certificates = Option<watch::Sender<Arc<Loaded>>>;

/// Who may connect and call, and how much.
pub(super) struct Access {
    auth: Auth,
    /// Changed when the configuration file is.
    roles: watch::Sender<Arc<AuthConfig>>,
    pub quotas: Quotas,
    /// `None` with unsafe plaintext.
    pub certificates: Certificates,
}

impl Access {
    /// Loads the certificates; `None` with unsafe plaintext.
    ///
    /// # Errors
    /// A file cannot be used.
    pub fn certificates(config: &Config) -> anyhow::Result<Certificates> {
        let loaded = config.tls.as_ref().map(tls::TlsFiles::load).transpose()?;
        Ok(loaded.map(|loaded| watch::Sender::new(Arc::new(loaded))))
    }

    pub fn new(config: &Config, certificates: Certificates, data: &Data) -> Self {
        let (roles, rules) = watch::channel(Arc::new(config.auth.clone()));
        let auth = Auth::new(certificates.as_ref().map(watch::Sender::subscribe), rules);
        let quotas = Quotas::new(config.quota.clone(), data.archives.clone());
        Self { auth, roles, quotas, certificates }
    }

    /// Decides about a connection before its first call.
    fn admit(&self) -> tls::Admit {
        let (auth, quotas) = (self.auth.clone(), self.quotas.clone());
        Arc::new(move |chain| {
            // A client without a role is refused by its first call; until then all such clients share one quota.
            let whose = match auth.identify_chain(chain) {
                Ok(identity) => counted::whose(&identity),
                Err(_) => Some(Whose::Person(String::new())),
            };
            whose.map(|whose| quotas.connection(whose)).transpose()
        })
    }
}

/// What the services are made of besides the data.
pub(super) struct Services {
    pub access: Access,
    pub board: Arc<StatusBoard>,
    pub maintenance: Maintenance,
    pub sealer: Sealer,
    /// Every stream and long call.
    pub sessions: TaskTracker,
}

impl Services {
    /// Serves gRPC and the HTTP pages until `ends` say otherwise.
    ///
    /// # Errors
    /// gRPC reflection or an address cannot be used.
    pub async fn serve(
        self,
        config: Config,
        data: &Data,
        ports: Ports,
        ends: &Ends,
        telemetry: &Telemetry,
    ) -> anyhow::Result<Vec<Task>> {
        let Ports { grpc, admin, page, scrape } = ports;
        let (wal, catalog, base) = self.calls(&config, data, ends);
        let Access { auth, quotas, .. } = &self.access;
        let count = CountLayer { auth: auth.clone(), quotas: quotas.clone() };
        let rpc = RpcMeter::new(&telemetry.meter(), Side::Server, &klio_proto::SERVICES);
        let (router, health) = router(rpc, count, wal, catalog, base).await?;
        let admit = self.access.admit();
        let Access { roles, certificates, .. } = self.access;
        let mut tasks = serve(router, grpc, certificates, config.tls, admit, &ends.front);
        let reloading = auth::reload(config.file, Config::load_rules, roles, ends.front.clone());
        tasks.push(("roles", spawn(reloading)));
        let readiness = readiness(self.board);
        tasks.push(("health", spawn(health.follow(readiness.clone(), ends.front.clone()))));
        if let Some(listener) = admin {
            tracing::info!(address = %listener.local_addr()?, "serving /livez, /readyz and, with OTEL_METRICS_EXPORTER=prometheus, /metrics");
            let router = admin::router(readiness, page.clone());
            tasks.push(("admin", spawn(admin::serve(listener, router, ends.back.clone()))));
        }
        if let (Some(listener), Some(page)) = (scrape, page) {
            let router = admin::metrics_router(page);
            tasks.push(("metrics", spawn(admin::serve(listener, router, ends.back.clone()))));
        }
        Ok(tasks)
    }

    fn calls(
        &self,
        config: &Config,
        data: &Data,
        ends: &Ends,
    ) -> (WalService, CatalogService, BaseService) {
        let Data { store, tier2, base, registry, publisher, metrics, .. } = data;
        let Access { auth, quotas, .. } = &self.access;
        let comparer = Comparer::new(base.clone());
        let receiver = Receiver {
            store: store.clone(),
            base: base.clone(),
            comparer: comparer.clone(),
            registry: registry.clone(),
            sealer: self.sealer.clone(),
            auth: auth.clone(),
            metrics: metrics.clone(),
            options: ReceiverOptions {
                window: config.wal.window_bytes,
                on_divergence: config.wal.on_divergence,
            },
            shutdown: ends.front.clone(),
        };
        let readers = base.readers().clone();
        let wal = WalService {
            auth: auth.clone(),
            receiver,
            source: Source { store: store.clone(), tier2: tier2.clone(), readers },
            queue: publisher.clone(),
            tasks: self.sessions.clone(),
        };
        let catalog = CatalogService {
            auth: auth.clone(),
            histories: Histories { base: base.clone(), registry: registry.clone() },
            board: self.board.clone(),
            tier2: tier2.clone(),
        };
        let base = BaseService {
            auth: auth.clone(),
            base: base.clone(),
            comparer,
            maintenance: self.maintenance.clone(),
            quotas: quotas.clone(),
            tasks: self.sessions.clone(),
            shutdown: ends.front.clone(),
        };
        (wal, catalog, base)
    }
}

fn readiness(board: Arc<StatusBoard>) -> admin::Readiness {
    Arc::new(move || {
        let board = board.clone();
        Box::pin(async move {
            let read = tokio::task::spawn_blocking(move || board.readiness()).await;
            read.unwrap_or_else(|error| vec![error.to_string()])
        })
    })
}

/// All services behind the layers that measure, trace and count calls.
type Layered = Router<Stack<CountLayer, Stack<TraceLayer, Stack<RpcLayer, Identity>>>>;

async fn router(
    rpc: RpcMeter,
    count: CountLayer,
    wal: WalService,
    catalog: CatalogService,
    base: BaseService,
) -> anyhow::Result<(Layered, Health)> {
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
    router: Layered,
    listener: TcpListener,
    certificates: Option<watch::Sender<Arc<Loaded>>>,
    files: Option<tls::TlsFiles>,
    admit: tls::Admit,
    front: &CancellationToken,
) -> Vec<Task> {
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
