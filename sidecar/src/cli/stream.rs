//! `klio stream`: starts streamer, backup schedule, admin port and signal handling, and ends all of them in order.

use super::{conninfo, exit, slot};
use crate::{
    admin,
    backup::{self, Daemon},
    config::Config,
    conninfo::ConnInfo,
    error::{Error, Failure},
    replication::{Client, SlotName},
    server_link::ServerLink,
    streamer::{Metrics, Options, Postgres, State, Streamer, disk},
};
use klio_telemetry::Telemetry;
use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    task::{JoinHandle, JoinSet},
};
use tokio_util::sync::CancellationToken;

/// How often PostgreSQL is asked how much WAL the slot keeps.
const SLOT_INTERVAL: Duration = Duration::from_secs(30);
/// The same while there is no answer; at the very start, the slot does not exist yet.
const SLOT_RETRY: Duration = Duration::from_secs(5);
/// How long reading the state of PostgreSQL's disk may take.
const DISK_PATIENCE: Duration = Duration::from_secs(5);

pub(super) async fn run(config: &Config, telemetry: &Telemetry) -> Result<u8, Error> {
    // The base name: the streamer finds out which of the cluster's histories this PostgreSQL continues.
    let cluster = config.cluster()?.base();
    let info = Arc::new(conninfo(config)?);
    let slot = slot::name(config)?;
    let link = ServerLink::new(&config.server)?.metered(&telemetry.meter());
    let metrics = Metrics::new(&telemetry.meter(), cluster.as_str());
    let state = Arc::clone(&metrics.state);
    let stop = CancellationToken::new();
    let mut tasks = JoinSet::new();
    serve_admin(config, telemetry, &state, &stop, &mut tasks).await?;
    tasks.spawn(stop_on(signals()?, stop.clone()));
    let disk = config.postgres.data_directory.clone();
    tasks.spawn(watch_slot(Arc::clone(&info), slot.clone(), disk, state, stop.clone()));
    tracing::info!(
        cluster = %cluster,
        server = link.address(),
        slot = %slot,
        version = env!("CARGO_PKG_VERSION"),
        "klio stream begins"
    );
    let backups = backup::Metrics::new(&telemetry.meter(), cluster.as_str());
    let backups = Daemon::start(super::backup::backup(config, backups, &stop)?)?;
    let postgres = Postgres::new(info, slot, config.postgres.create_slot);
    let options = Options::new(cluster, &config.stream);
    let streamer = Streamer::new(postgres, link, options, metrics);
    let result = telemetry.polls().watch(streamer.run(stop.clone())).await;
    stop.cancel();
    let ended = async { while tasks.join_next().await.is_some() {} };
    if tokio::time::timeout(Duration::from_secs(2), ended).await.is_err() {
        tasks.abort_all();
    }
    // PostgreSQL leaves backup mode when the session ends, even if the thread is still running.
    if tokio::time::timeout(config.stream.stop_timeout, backups.ended()).await.is_err() {
        tracing::warn!("the backup that was running did not end in time");
    }
    result.map(|()| exit::OK)
}

async fn serve_admin(
    config: &Config,
    telemetry: &Telemetry,
    state: &Arc<State>,
    stop: &CancellationToken,
    tasks: &mut JoinSet<()>,
) -> Result<(), Error> {
    let pages = admin::pages(Arc::clone(state), telemetry.prometheus().cloned());
    if let Some(address) = config.admin_listen()? {
        let listener = admin::listen(address).await?;
        tasks.spawn(admin::serve(listener, pages.clone(), stop.clone()));
    }
    if let Some(page) = telemetry.prometheus() {
        // A metrics port that is in use must not keep WAL from being streamed (P9).
        match admin::listen((page.host.clone(), page.port)).await {
            Ok(listener) => drop(tasks.spawn(admin::serve(listener, pages, stop.clone()))),
            Err(error) => telemetry
                .misconfigured(page.unusable(&error.message))
                .map_err(|error| Error::new(Failure::Config, error))?,
        }
    }
    Ok(())
}

/// Handlers for SIGTERM and SIGINT.
pub(super) fn signals() -> Result<(Signal, Signal), Error> {
    Ok((handler(SignalKind::terminate())?, handler(SignalKind::interrupt())?))
}

/// Waits for one of the two signals.
pub(super) async fn signalled(signals: &mut (Signal, Signal)) {
    tokio::select! {
        _ = signals.0.recv() => {}
        _ = signals.1.recv() => {}
    }
}

fn handler(kind: SignalKind) -> Result<Signal, Error> {
    signal(kind).map_err(|error| Error::new(Failure::Local, format!("catch signals: {error}")))
}

async fn stop_on(mut signals: (Signal, Signal), stop: CancellationToken) {
    tokio::select! {
        () = signalled(&mut signals) => {}
        () = stop.cancelled() => return,
    }
    tracing::info!("stopping: waiting for the last acknowledgement");
    stop.cancel();
}

/// Best effort: if the role may not connect to a database, the gauges are just empty.
async fn watch_slot(
    info: Arc<ConnInfo>,
    slot: SlotName,
    data_directory: PathBuf,
    state: Arc<State>,
    stop: CancellationToken,
) {
    let mut tick = tokio::time::interval(SLOT_INTERVAL);
    let mut space = SpaceReader { patience: DISK_PATIENCE, hanging: None };
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = tick.tick() => {}
        }
        let read = async {
            let mut client = Client::connect_sql(&info).await.map_err(|e| e.to_string())?;
            let row = slot::read(&mut client, &slot).await.map_err(|e| e.message)?;
            let place = postgres_disk(&mut client, &data_directory).await;
            client.close().await;
            Ok::<_, String>((row.and_then(|row| row.retained_bytes), place))
        };
        let read = tokio::select! {
            () = stop.cancelled() => return,
            read = read => read,
        };
        if !matches!(read, Ok((Some(_), _))) {
            tick.reset_after(SLOT_RETRY);
        }
        match read {
            Ok((bytes, place)) => {
                state.set_slot_retained(bytes);
                state.set_postgres_disk(space.of(place).await);
            }
            Err(error) => {
                state.set_slot_retained(None);
                state.set_postgres_disk(None);
                tracing::debug!(error, "cannot read how much WAL the slot keeps");
            }
        }
    }
}

/// The directory on the disk with PostgreSQL's WAL, and the system identifier that it must have. `setting` is
/// `postgres.data_directory`; if it is empty, PostgreSQL is asked, which needs a role with pg_read_all_settings.
async fn postgres_disk(client: &mut Client, setting: &Path) -> Option<(PathBuf, u64)> {
    let sql = "SELECT system_identifier FROM pg_control_system()";
    let rows = client.query(sql).await.ok()?;
    let system_identifier = rows.first()?.text(0)?.parse().ok()?;
    let data = if setting.as_os_str().is_empty() {
        PathBuf::from(client.show("data_directory").await.ok()?)
    } else {
        setting.to_owned()
    };
    Some((data, system_identifier))
}

/// Reads the state of a disk that may hang: on a blocking thread, never on two at once, and with a time limit for the caller.
#[derive(Debug)]
struct SpaceReader {
    patience: Duration,
    hanging: Option<JoinHandle<Option<disk::Space>>>,
}

impl SpaceReader {
    /// `None` if the state cannot be read now.
    async fn of(&mut self, place: Option<(PathBuf, u64)>) -> Option<disk::Space> {
        let (data, system_identifier) = place?;
        let look = move || disk::space(&data, system_identifier);
        let mut reading = self.hanging.take().unwrap_or_else(|| tokio::task::spawn_blocking(look));
        match tokio::time::timeout(self.patience, &mut reading).await {
            Ok(space) => space.ok().flatten(),
            Err(_) => {
                self.hanging = Some(reading);
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[tokio::test]
    async fn a_disk_that_hangs_is_looked_at_once_and_waited_for_briefly() {
        let (answer, asked) = mpsc::channel::<()>();
        let hanging = tokio::task::spawn_blocking(move || {
            asked.recv().ok()?;
            Some(disk::Space { free: 1, total: 2 })
        });
        let patience = Duration::from_millis(10);
        let mut reader = SpaceReader { patience, hanging: Some(hanging) };
        let place = || Some((PathBuf::from("/nowhere"), 7));
        assert_eq!(reader.of(place()).await, None);
        assert!(reader.hanging.is_some(), "the one look goes on");
        answer.send(()).unwrap();
        reader.patience = DISK_PATIENCE;
        while !reader.hanging.as_ref().unwrap().is_finished() {
            std::thread::yield_now();
        }
        assert_eq!(reader.of(place()).await, Some(disk::Space { free: 1, total: 2 }));
        assert_eq!(reader.of(place()).await, None, "nothing is there, and it says so");
    }
}
