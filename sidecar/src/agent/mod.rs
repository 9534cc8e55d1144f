//! The resident read-ahead agent: fetches the WAL that PostgreSQL will request next, so that fetching does not slow
//! down replay.
//!
//! The first `klio wal-fetch` of a recovery starts it, one for each data directory; it exits by itself.
//! AGENT1  It only ever makes a fetch faster. When there is no agent, or it is stuck, killed or failing, `wal-fetch`
//!         fetches directly, and its answer is the same.
//! AGENT2  It remembers only whole segments, which lie in the spool. Whether a missing file, an unfinished segment or
//!         a history file exists by now is asked anew each time (P7).
//! AGENT3  The caller renames the file out of the spool itself, so that nothing is put in place for a caller that was
//!         killed.
//! AGENT4  Memory is bounded, and so is the size of what lies in the spool or is being fetched.
//! AGENT5  When the agent exits, it removes its spool; the spool of a killed agent is removed by the next one.

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

/// The command line that `wal-fetch` gives to the `klio wal-agent` that it starts.
#[derive(Debug, Clone)]
pub struct Job {
    pub spool: PathBuf,
    /// The data directory that is being recovered, if known.
    pub data_dir: Option<PathBuf>,
    /// Fingerprint of the settings that it was started with. Callers with other settings are not served.
    pub fingerprint: String,
}

/// Maximum number of requests that wait for the engine; each has a connection of its own.
const ASKS_MAX: usize = 16;

/// Runs an agent until it is no longer needed.
///
/// # Errors
/// The agent cannot start. When another agent serves this spool, the result is `Ok`.
pub async fn run(config: &Config, job: &Job) -> Result<(), Error> {
    let Some(spool) = spool::Spool::claim(&job.spool).await? else { return Ok(()) };
    let source = wal_source::open_settled(config)?;
    let socket = spool.socket();
    let listener = wire::short_path(&socket).and_then(|short| UnixListener::bind(short.path()));
    let listener = listener.map_err(|error| local("listen on", &socket, &error))?;
    let expected = job.data_dir.as_deref().map(Expected::of_data_dir).unwrap_or_default();
    let limits = Limits { bytes_max: config.restore.read_ahead.bytes(), ..Limits::default() };
    let (asks, queue) = mpsc::channel(ASKS_MAX);
    let leave = CancellationToken::new();
    let engine = Engine::new(source, expected, spool.files(), limits, leave.clone());
    let life = life::Life::new(job.data_dir.clone(), config.restore.agent_idle);
    tracing::info!(spool = %job.spool.display(), "the WAL read-ahead agent has started");
    let served = serve::Served { fingerprint: job.fingerprint.clone(), asks, leave: leave.clone() };
    tokio::select! {
        () = engine.run(queue) => {}
        () = serve::serve(listener, served, life.activity()) => {}
        why = life.ended() => tracing::info!(reason = why, "the WAL read-ahead agent is exiting"),
        () = leave.cancelled() => {}
        () = terminated() => {}
    }
    // Dropping the spool removes the socket first, so that no new caller arrives, and then everything else.
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
