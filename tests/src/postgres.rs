//! A real PostgreSQL server of any supported major version on scratch directories.
//!
//! Trusts every local connection, listens on a unix socket and on a free loopback port (both stay the same over restarts).
//! Its `fsync` is off unless [`Builder::durable`]: tests kill processes, not machines. Dropped, it is stopped and deleted.

use crate::{ports, process::Running, programs::Outcome, scratch::Scratch, wait};
use rustix::process::Signal;
use std::{
    path::{Path, PathBuf},
    time::Duration,
};

mod builder;
pub mod install;
mod session;
mod sql;
mod standby;
mod template;
mod tools;

pub use builder::Builder;
pub use session::Session;
pub use tools::pg_waldump;

/// Starting (with recovery) and stopping take less, also on a busy machine.
const DEADLINE: Duration = Duration::from_secs(60);

/// How PostgreSQL is asked to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Disconnects clients, waits for walsenders to send everything, checkpoints.
    Fast,
    /// Quits at once; the next start recovers.
    Immediate,
}

/// A PostgreSQL server.
#[derive(Debug)]
pub struct Postgres {
    major: u32,
    port: u16,
    running: Option<Running>,
    scratch: Scratch,
}

impl Postgres {
    /// What can be set before the first start.
    #[must_use]
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// PostgreSQL 15 with everything as it comes, started.
    ///
    /// # Panics
    /// When it does not start.
    pub async fn new() -> Self {
        Self::builder().start().await
    }

    /// An empty place for a server: directories and a port.
    fn place(major: u32) -> Self {
        let scratch = Scratch::new(&format!("pg{major}"));
        install::give(scratch.path());
        Self { major, port: ports::free(), running: None, scratch }
    }

    /// A place for a data directory that comes from elsewhere, such as a restore: [`Postgres::data_dir`] does not exist yet.
    #[must_use]
    pub fn empty(major: u32) -> Self {
        Self::place(major)
    }

    /// Makes the settings of a data directory that came from elsewhere fit this place; then it can be started.
    ///
    /// # Panics
    /// When there is none.
    pub fn adopt(&self) {
        let conf = self.data_dir().join("postgresql.conf");
        builder::append(&conf, &builder::place_settings(self));
    }

    /// Starts a restored data directory in this place, and waits until its recovery has ended.
    pub async fn recover(&mut self) {
        self.adopt();
        self.start().await;
        self.wait_true("select not pg_is_in_recovery()").await;
    }

    /// Where the last recovery ended: the beginning of the last record it replayed; `None` when it replayed none.
    #[must_use]
    pub fn redo_done(&self) -> Option<klio_pg::Lsn> {
        let log = self.log();
        let (_, rest) = log.rsplit_once("redo done at ")?;
        rest.split_whitespace().next()?.parse().ok()
    }

    /// Major version.
    #[must_use]
    pub fn major(&self) -> u32 {
        self.major
    }

    /// TCP port on 127.0.0.1.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Directory of the unix socket.
    #[must_use]
    pub fn socket_dir(&self) -> &Path {
        self.scratch.path()
    }

    /// The data directory.
    #[must_use]
    pub fn data_dir(&self) -> PathBuf {
        self.scratch.join("data")
    }

    /// The directory of WAL segments.
    #[must_use]
    pub fn pg_wal(&self) -> PathBuf {
        self.data_dir().join("pg_wal")
    }

    /// libpq connection string over the unix socket.
    #[must_use]
    pub fn conninfo(&self) -> String {
        let socket = self.socket_dir().display();
        format!("host={socket} port={} user=postgres dbname=postgres", self.port)
    }

    /// libpq connection string over TCP.
    #[must_use]
    pub fn tcp_conninfo(&self) -> String {
        format!("host=127.0.0.1 port={} user=postgres dbname=postgres", self.port)
    }

    /// The server's log so far, all runs.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    fn log_path(&self) -> PathBuf {
        self.scratch.join("log")
    }

    /// Its process (the postmaster), while it runs.
    pub fn running(&mut self) -> Option<&mut Running> {
        self.running.as_mut()
    }

    /// Starts it (again) and waits until it answers SQL.
    ///
    /// # Panics
    /// When it runs already, or does not answer within a minute.
    pub async fn start(&mut self) {
        self.launch();
        let name = format!("PostgreSQL {}", self.major);
        let running = self.running.as_mut().expect("it was launched");
        let conninfo = format!("{} connect_timeout=5", {
            let socket = self.scratch.path().display();
            format!("host={socket} port={} user=postgres dbname=postgres", self.port)
        });
        wait::eventually(&format!("{name} to answer"), DEADLINE, || {
            assert!(running.is_running(), "{name} ended while starting");
            Session::connect(&conninfo)
        })
        .await;
    }

    /// Starts it without waiting.
    ///
    /// # Panics
    /// When it runs already.
    pub fn launch(&mut self) {
        assert!(self.running.is_none(), "start PostgreSQL: it runs already");
        let mut command = install::command(&install::bin_dir(self.major).join("postgres"));
        command.arg("-D").arg(self.data_dir());
        let name = format!("PostgreSQL {}", self.major);
        self.running = Some(Running::spawn(&name, command, &self.log_path()));
    }

    /// Stops it and waits for the end. Nothing happens when it does not run.
    ///
    /// # Panics
    /// When it still runs after a minute.
    pub async fn stop(&mut self, how: Stop) {
        if let Some(mut running) = self.running.take() {
            running.signal(match how {
                Stop::Fast => Signal::INT,
                Stop::Immediate => Signal::QUIT,
            });
            running.wait_exit(DEADLINE).await;
        }
    }

    /// SIGKILL to the postmaster and all its children at once: as near to a power cut as a process gets.
    pub fn kill9(&mut self) {
        if let Some(mut running) = self.running.take() {
            running.kill9_tree();
        }
    }

    /// Stops it fast and starts it again.
    ///
    /// # Panics
    /// As [`Postgres::stop`] and [`Postgres::start`].
    pub async fn restart(&mut self) {
        self.stop(Stop::Fast).await;
        self.start().await;
    }

    /// Deletes its data directory, as the disk's death would: for tests of synchronous commit.
    ///
    /// # Panics
    /// When it runs.
    pub fn destroy_data(&mut self) {
        assert!(self.running.is_none(), "destroy the data of a running PostgreSQL");
        builder::free_shared_memory(&self.data_dir());
        std::fs::remove_dir_all(self.data_dir()).expect("delete the data directory");
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if let Some(running) = &mut self.running {
            // It leaves its shared memory behind when killed, so it gets a moment to clean up.
            running.signal(Signal::QUIT);
            for _ in 0..100 {
                if !running.is_running() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        self.running = None;
        builder::free_shared_memory(&self.data_dir());
    }
}

fn expect_success(what: &str, outcome: Outcome) -> Outcome {
    assert_eq!(outcome.code, Some(0), "{what}: {}{}", outcome.stdout, outcome.stderr);
    outcome
}
