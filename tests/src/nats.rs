//! A plain nats-server with JetStream, as a user would run one for `queue.url`.
//!
//! It listens on loopback only, asks for a user and a password, and syncs every write (P4 does not need it, our embedded one
//! does it too). Its store survives [`Nats::kill9`] and [`Nats::start`].

use crate::{env, ports, process::Running, scratch::Scratch, wait};
use std::{fs, path::PathBuf, process::Command, time::Duration};

/// User that may do everything.
pub const USER: &str = "klio";
/// Its password.
pub const PASSWORD: &str = "secret";

const READY: Duration = Duration::from_secs(20);
const READY_LINE: &str = "Server is ready";

/// A nats-server.
#[derive(Debug)]
pub struct Nats {
    running: Option<Running>,
    scratch: Scratch,
    port: u16,
}

impl Nats {
    /// Starts one with an empty store.
    ///
    /// # Panics
    /// When it does not answer within 20 seconds.
    pub async fn new() -> Self {
        let mut nats = Self { running: None, scratch: Scratch::new("nats"), port: ports::free() };
        nats.write_config();
        nats.start().await;
        nats
    }

    fn write_config(&self) {
        let config = format!(
            "listen: 127.0.0.1:{}\nserver_name: test\nmax_payload: 8MB\n\
             jetstream {{ store_dir: \"{}\", sync_interval: always }}\n\
             authorization {{ user: {USER}, password: {PASSWORD} }}\n",
            self.port,
            self.store_dir().display(),
        );
        fs::write(self.scratch.join("nats.conf"), config).expect("write nats.conf");
    }

    /// Starts it again after [`Nats::kill9`] or [`Nats::stop`].
    ///
    /// # Panics
    /// When it does not answer within 20 seconds.
    pub async fn start(&mut self) {
        let mut command = Command::new(env::tool("nats-server"));
        command.arg("-c").arg(self.scratch.join("nats.conf")).current_dir(self.scratch.path());
        let log = self.scratch.join("nats.log");
        let before = fs::read_to_string(&log).unwrap_or_default().matches(READY_LINE).count();
        let mut running = Running::spawn("nats-server", command, &log);
        wait::eventually_now("nats-server ready", READY, || {
            assert!(running.is_running(), "nats-server ended: {}", running.log());
            running.log().matches(READY_LINE).count() > before
                && std::net::TcpStream::connect(("127.0.0.1", self.port)).is_ok()
        })
        .await;
        self.running = Some(running);
    }

    /// SIGKILL.
    pub fn kill9(&mut self) {
        self.running = None;
    }

    /// An orderly stop.
    ///
    /// # Panics
    /// When it takes more than 20 seconds.
    pub async fn stop(&mut self) {
        if let Some(mut running) = self.running.take() {
            running.terminate(READY).await;
        }
    }

    /// Where it keeps its streams.
    #[must_use]
    pub fn store_dir(&self) -> PathBuf {
        self.scratch.join("store")
    }

    /// URL with user and password. `async_nats::connect` ignores these two: give them as options as well.
    #[must_use]
    pub fn url(&self) -> String {
        format!("nats://{USER}:{PASSWORD}@127.0.0.1:{}", self.port)
    }

    /// Its port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Its process, while it runs.
    pub fn running(&mut self) -> Option<&mut Running> {
        self.running.as_mut()
    }
}
