//! The resident read-ahead agent: fetches the WAL that PostgreSQL will ask for next, so that replay is the limit.
//!
//! Started by the first `klio wal-fetch` of a recovery, one for each data directory; ends by itself.
//! AGENT1  It only ever makes a fetch faster: without it, or with one that is stuck, killed or in trouble, `wal-fetch`
//!     fetches directly, and the answer is the same.
//! AGENT2  Nothing is remembered but whole segments that lie in the spool. An absence, an unfinished segment and a
//!     history file are asked for anew each time (P7).
//! AGENT3  The caller renames the file out of the spool itself, so a caller that was killed places nothing later.
//! AGENT4  What lies in the spool and is being fetched is bounded, and so is memory.
//! AGENT5  When it ends, its spool is gone; what a killed one left is removed by the next.

mod ahead;
pub(crate) mod client;
mod engine;
mod inherited;
mod life;
mod serve;
mod spool;
#[cfg(test)]
mod tests;
mod wire;

pub use inherited::close_inherited;
pub use life::signalled;
pub use spool::{remove_left, spool_for};

use crate::{
    config::Config,
    error::{Error, local},
    wal_source::{self, Expected},
};
use engine::{Engine, Limits};
use std::path::PathBuf;
use tokio::{net::UnixListener, sync::mpsc};
use tokio_util::sync::CancellationToken;

/// What `klio wal-agent` is told by the `wal-fetch` that starts it.
#[derive(Debug, Clone)]
pub struct Job {
    /// The spool.
    pub spool: PathBuf,
    /// The data directory that is being recovered, where that is known.
    pub data_dir: Option<PathBuf>,
    /// Of the settings it was started with: callers with others are not served.
    pub fingerprint: String,
}

/// Asks waiting for the engine: each is a connection.
const ASKS_MAX: usize = 16;

/// Runs an agent to its end.
///
/// # Errors
/// When it cannot begin. That another one serves this spool is no error.
pub async fn run(config: &Config, job: &Job) -> Result<(), Error> {
    let Some(spool) = spool::Spool::claim(&job.spool).await? else { return Ok(()) };
    let source = wal_source::open(config)?;
    let socket = spool.socket();
    let listener = wire::short_path(&socket).and_then(|short| UnixListener::bind(short.path()));
    let listener = listener.map_err(|error| local("listen on", &socket, &error))?;
    let expected = job.data_dir.as_deref().map(Expected::of_data_dir).unwrap_or_default();
    let limits = Limits { bytes_max: config.restore.read_ahead.bytes(), ..Limits::default() };
    let (asks, queue) = mpsc::channel(ASKS_MAX);
    let leave = CancellationToken::new();
    let engine = Engine::new(source, expected, spool.files(), limits, leave.clone());
    let life = life::Life::new(job.data_dir.clone(), config.restore.agent_idle);
    tracing::info!(spool = %job.spool.display(), "reading WAL ahead");
    let served = serve::Served { fingerprint: job.fingerprint.clone(), asks, leave: leave.clone() };
    tokio::select! {
        () = engine.run(queue) => {}
        () = serve::serve(listener, served, life.activity()) => {}
        why = life.ended() => tracing::info!("{why}"),
        () = leave.cancelled() => {}
        () = terminated() => {}
    }
    // Nobody new finds us, then everything goes.
    drop(spool);
    Ok(())
}

async fn terminated() {
    use tokio::signal::unix::{SignalKind, signal};
    match signal(SignalKind::terminate()) {
        Ok(mut term) => {
            term.recv().await;
        }
        Err(_) => std::future::pending().await,
    }
}
