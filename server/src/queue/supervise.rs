//! Maintains the connection: to a child that is restarted whenever it dies, or to an existing NATS.
//!
//! A store that the embedded server cannot use is deleted: after several short runs in a row, and when a consumer
//! requests it. The queue is a hint (P4).
//!
//! Each new connection has a new generation. Work on an older one starts again, and all clusters are compared once
//! (P4: the queue may have lost anything).

use super::{
    Connection, Error, QueueConfig, Repair, Shared,
    child::{self, Credentials, Forker, SYSTEM_USER, USER},
    stream,
};
use crate::private;
use async_nats::{Client, ConnectOptions, Event, jetstream};
use std::{
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, atomic::Ordering},
    time::Duration,
};
use tokio::{sync::Notify, task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;

const BACKOFF_MIN: Duration = Duration::from_millis(200);
const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// A run that lasted this long was good: after the next failure the pauses begin short again.
const GOOD_RUN: Duration = Duration::from_secs(60);
/// After this many bad runs in a row, the store is assumed to be the reason.
const BAD_RUNS_MAX: u32 = 3;
/// The highest number for stores that cannot be deleted and are renamed instead.
const ASIDE_MAX: u32 = 1000;
/// How often counts are refreshed and the stream's existence is checked.
const TEND_INTERVAL: Duration = Duration::from_secs(2);
/// The queue counts as stuck after this many failed publishes without a successful one, over at least [`STUCK_AFTER`].
const STUCK_FAILURES: u32 = 3;
const STUCK_AFTER: Duration = Duration::from_secs(4);
const CONNECT_WITHIN: Duration = Duration::from_secs(10);

/// Runs the embedded server until cancelled.
pub(super) async fn embedded(
    shared: Arc<Shared>,
    config: QueueConfig,
    executable: PathBuf,
    directory: PathBuf,
    cancel: CancellationToken,
) {
    let forker = match Forker::start() {
        Ok(forker) => forker,
        Err(error) => return shared.set_problem(Some(error.to_string())),
    };
    let mut backoff = Backoff::new();
    let mut bad_runs = 0;
    while !cancel.is_cancelled() {
        let begun = Instant::now();
        let before = shared.generation.load(Ordering::Relaxed);
        let run = run_child(&shared, &config, &executable, &directory, &forker, &cancel).await;
        shared.disconnected();
        if let Err(error) = run {
            tracing::warn!(%error, "the queue is down; restarting it");
            shared.set_problem(Some(error.to_string()));
            let came_up = shared.generation.load(Ordering::Relaxed) != before;
            let good = came_up && begun.elapsed() > GOOD_RUN;
            bad_runs = if good { 0 } else { bad_runs + 1 };
            if bad_runs >= BAD_RUNS_MAX || matches!(error, Error::Store) {
                bad_runs = 0;
                discard_store(&directory).await;
            }
            backoff.pause(begun, &cancel).await;
        }
    }
}

/// Deletes the store, or at least renames it.
async fn discard_store(directory: &Path) {
    let store = directory.join(child::STORE);
    let gone = tokio::fs::remove_dir_all(&store).await;
    let gone = match gone {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            // Stores that could not be deleted before have lower numbers.
            let aside = |number: u32| directory.join(format!("jetstream.damaged.{number}"));
            let free = (1..=ASIDE_MAX).map(aside).find(|place| !place.exists());
            tokio::fs::rename(&store, free.unwrap_or_else(|| aside(ASIDE_MAX))).await
        }
        _ => Ok(()),
    };
    match gone {
        Ok(()) => {
            tracing::warn!("the queue starts again with an empty store; the tiers will be compared")
        }
        Err(error) => {
            tracing::error!(%error, store = %store.display(), "cannot remove or rename the queue's store; hint: check the disk")
        }
    }
}

async fn run_child(
    shared: &Shared,
    config: &QueueConfig,
    executable: &Path,
    directory: &Path,
    forker: &Forker,
    cancel: &CancellationToken,
) -> Result<(), Error> {
    private::directory(directory).map_err(Error::file("create", directory))?;
    let credentials = Credentials::random();
    let mut log = JoinSet::new();
    let max_bytes = config.max_bytes.bytes();
    let start = child::start(forker, executable, directory, max_bytes, &credentials, |stderr| {
        log.spawn(child::forward_log(stderr));
    });
    let mut running = tokio::select! {
        running = start => running?,
        () = cancel.cancelled() => return Ok(()), // dropping the child kills it
    };
    let lost = Arc::new(Notify::new());
    let outcome = {
        let url = running.url.clone();
        let work = async {
            check(&url, &credentials).await?;
            let options =
                ConnectOptions::with_user_and_password(USER.into(), credentials.password.clone())
                    .max_reconnects(10);
            let client = connect(options, &url, Arc::clone(&lost)).await?;
            shared.connected(client, config).await?;
            tend(shared, config, &lost).await
        };
        tokio::select! {
            result = work => result,
            error = running.ended() => Err(error),
            () = cancel.cancelled() => Ok(()),
        }
    };
    shared.disconnected();
    running.stop().await;
    outcome
}

async fn check(url: &str, credentials: &Credentials) -> Result<(), Error> {
    let password = credentials.system_password.clone();
    let options = ConnectOptions::with_user_and_password(SYSTEM_USER.into(), password);
    let client = connect(options, url, Arc::default()).await?;
    stream::check_settings(&client).await
}

/// Uses an existing NATS until cancelled.
pub(super) async fn external(
    shared: Arc<Shared>,
    config: QueueConfig,
    url: String,
    cancel: CancellationToken,
) {
    let mut backoff = Backoff::new();
    while !cancel.is_cancelled() {
        let begun = Instant::now();
        let lost = Arc::new(Notify::new());
        let work = async {
            let client = connect(external_options(&config).await?, &url, Arc::clone(&lost)).await?;
            shared.connected(client, &config).await?;
            tend(&shared, &config, &lost).await
        };
        let outcome = tokio::select! {
            result = work => result,
            () = cancel.cancelled() => Ok(()),
        };
        shared.disconnected();
        if let Err(error) = outcome {
            tracing::warn!(%error, "the queue is down; connecting again");
            shared.set_problem(Some(error.to_string()));
            backoff.pause(begun, &cancel).await;
        }
    }
}

async fn external_options(config: &QueueConfig) -> Result<ConnectOptions, Error> {
    let mut options = ConnectOptions::new();
    if let Some(file) = &config.credentials_file {
        options = options.credentials_file(file).await.map_err(Error::file("read", file))?;
    }
    if let (Some(user), Some(password)) = (&config.user, &config.password) {
        options = options.user_and_password(user.clone(), password.expose().to_owned());
    }
    if let Some(file) = &config.ca_file {
        options = options.add_root_certificates(file.clone()).require_tls(true);
    }
    Ok(options)
}

/// Connects; `lost` is notified when the connection breaks.
async fn connect(options: ConnectOptions, url: &str, lost: Arc<Notify>) -> Result<Client, Error> {
    let fail = Error::nats("connect to the queue");
    let options = options.name("klio-server").connection_timeout(CONNECT_WITHIN).event_callback(
        move |event| {
            let lost = Arc::clone(&lost);
            async move {
                match event {
                    Event::Disconnected | Event::Closed => lost.notify_one(),
                    other => tracing::debug!(event = %other, "the state of the connection to the queue changed"),
                }
            }
        },
    );
    options.connect(url).await.map_err(|e| fail(&e))
}

/// Refreshes the counts while the connection lasts; creates the stream again if somebody removed it.
async fn tend(shared: &Shared, config: &QueueConfig, lost: &Notify) -> Result<(), Error> {
    let fail = Error::nats("watch the queue");
    loop {
        tokio::select! {
            () = lost.notified() => return Err(fail(&"the connection broke")),
            () = tokio::time::sleep(TEND_INTERVAL) => {}
        }
        if shared.is_stuck() {
            return Err(fail(&"it answers, but accepts no jobs"));
        }
        let jetstream = shared.jetstream().ok_or_else(|| fail(&"not connected"))?;
        match shared.wanted_repair() {
            Some(Repair::Store) if config.url.is_none() => return Err(Error::Store),
            Some(_) => {
                tracing::warn!("creating the stream of jobs again; the tiers will be compared");
                if let Err(error) = jetstream.delete_stream(stream::STREAM).await {
                    tracing::warn!(%error, "cannot remove the stream of jobs");
                }
            }
            None => {}
        }
        match jetstream.get_stream(stream::STREAM).await {
            Ok(stream) => shared.count(stream.cached_info()),
            Err(error) => {
                tracing::warn!(%error, "the stream of jobs does not exist; creating it");
                let info =
                    stream::ensure(&jetstream, config.max_bytes.bytes(), config.replicas).await?;
                shared.count(&info);
                shared.next_generation();
            }
        }
    }
}

impl Shared {
    async fn connected(&self, client: Client, config: &QueueConfig) -> Result<(), Error> {
        let jetstream = jetstream::new(client);
        let info = stream::ensure(&jetstream, config.max_bytes.bytes(), config.replicas).await?;
        self.count(&info);
        self.set_problem(None);
        let generation = self.generation.fetch_add(1, Ordering::Relaxed) + 1;
        self.connection.send_replace(Some(Connection { generation, jetstream }));
        self.wanted.all();
        tracing::info!(generation, "the queue is up");
        Ok(())
    }

    /// Whether every publish has failed for a while although the queue is connected. After a full disk nats-server
    /// 2.15 keeps a stream closed for writing until it is restarted (found by filling one).
    fn is_stuck(&self) -> bool {
        let mut failing = self.failing.lock().unwrap_or_else(PoisonError::into_inner);
        let stuck =
            failing.is_some_and(|(since, n)| n >= STUCK_FAILURES && since.elapsed() > STUCK_AFTER);
        if stuck {
            *failing = None;
        }
        stuck
    }

    /// The requested repair, if it applies to the current connection.
    fn wanted_repair(&self) -> Option<Repair> {
        let wanted = self.repair.lock().unwrap_or_else(PoisonError::into_inner).take();
        let (generation, what) = wanted?;
        (generation == self.generation.load(Ordering::Relaxed)).then_some(what)
    }

    fn next_generation(&self) {
        let generation = self.generation.fetch_add(1, Ordering::Relaxed) + 1;
        self.connection.send_modify(|connection| {
            if let Some(connection) = connection {
                connection.generation = generation;
            }
        });
        self.wanted.all();
    }

    fn disconnected(&self) {
        self.connection.send_replace(None);
    }

    fn jetstream(&self) -> Option<jetstream::Context> {
        self.connection.borrow().as_ref().map(|c| c.jetstream.clone())
    }

    fn count(&self, info: &jetstream::stream::Info) {
        self.messages.store(info.state.messages, Ordering::Relaxed);
        self.bytes.store(info.state.bytes, Ordering::Relaxed);
        let oldest = match info.state.messages {
            0 => 0,
            _ => info.state.first_timestamp.unix_timestamp().max(0),
        };
        self.oldest_unix.store(oldest, Ordering::Relaxed);
    }
}

/// Pauses that grow after short runs, with jitter so that several servers do not retry in step.
struct Backoff(Duration);

impl Backoff {
    const fn new() -> Self {
        Self(BACKOFF_MIN)
    }

    async fn pause(&mut self, begun: Instant, cancel: &CancellationToken) {
        if begun.elapsed() > GOOD_RUN {
            self.0 = BACKOFF_MIN;
        }
        let pause = self.0.mul_f64(rand::random_range(0.5..1.0));
        self.0 = (self.0 * 2).min(BACKOFF_MAX);
        tokio::select! {
            () = cancel.cancelled() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }
}
