//! A whole Klio on scratch directories: `klio-server init`, the server, sidecars, and questions to both.
//!
//! Everything goes through the programs a user has. Certificates are those of `init`; ports are free ones and stay the
//! same over restarts. The server's queue is its own nats-server child.

use crate::{
    client, env,
    http::Metrics,
    ports,
    postgres::Postgres,
    process::Running,
    programs,
    s3::{self, S3},
    scratch::Scratch,
    wait::eventually,
};
use klio_pg::Lsn;
use klio_proto::v1::{StatusRequest, catalog_client::CatalogClient};
use serde_json::Value;
use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};
use tonic::transport::Channel;

/// Two cores, parallel tests and debug builds: what takes a second alone may take many here.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A server with its directory.
pub struct Site {
    // Dropped before the directory, in which the log is that a failing test shows.
    server: Option<Running>,
    scratch: Scratch,
    cluster: String,
    port: u16,
    admin: u16,
    prometheus: u16,
    variables: Vec<(String, String)>,
    channel: tokio::sync::Mutex<Option<Channel>>,
}

impl Site {
    /// A directory made by `klio-server init`; nothing runs yet.
    pub async fn new() -> Self {
        Self::named("main").await
    }

    /// The same with encryption at rest switched off.
    pub async fn unencrypted() -> Self {
        Self::init("main", &["--unencrypted"]).await
    }

    /// The same with another cluster name.
    pub async fn named(cluster: &str) -> Self {
        Self::init(cluster, &[]).await
    }

    async fn init(cluster: &str, more: &[&str]) -> Self {
        let scratch = Scratch::new("site");
        let (port, admin, prometheus) = (ports::free(), ports::free(), ports::free());
        let site = Self {
            scratch,
            cluster: cluster.into(),
            port,
            admin,
            prometheus,
            variables: Vec::new(),
            server: None,
            channel: tokio::sync::Mutex::default(),
        };
        let (dir, listen, admin) = (
            site.dir().display().to_string(),
            format!("127.0.0.1:{port}"),
            format!("127.0.0.1:{admin}"),
        );
        let args =
            ["init", &dir, "--cluster", cluster, "--listen", &listen, "--admin-listen", &admin];
        let outcome = site.klio_server(&[&args, more].concat()).await;
        assert_eq!(outcome.code, Some(0), "init: {}", outcome.stderr);
        site
    }

    /// Archives to this endpoint from the next start on.
    #[must_use]
    pub fn tier2(mut self, s3: &S3) -> Self {
        self.set_tier2(s3);
        self
    }

    /// As [`Site::tier2`], for a site that exists.
    pub fn set_tier2(&mut self, s3: &S3) {
        let settings = s3.settings();
        for (name, value) in [
            ("URL", format!("s3://{}/klio", settings.bucket)),
            ("ENDPOINT", s3.endpoint()),
            ("REGION", s3::REGION.into()),
            ("ACCESS_KEY_ID", settings.access_key.clone()),
            ("SECRET_ACCESS_KEY", settings.secret_key.clone()),
        ] {
            self.set(&format!("KLIO_TIER2__{name}"), &value);
        }
    }

    /// A variable for the server, from the next start on.
    pub fn set(&mut self, name: &str, value: &str) {
        self.variables.push((name.into(), value.into()));
    }

    /// Gives the server a clock of its own from the next start on, which [`Site::turn_clock`] sets while it runs. Only the time of day
    /// is another: what measures how long something takes is the machine's.
    ///
    /// # Panics
    /// When libfaketime is not installed.
    pub fn own_clock(&mut self) {
        self.turn_clock(0);
        let (library, file) = (env::faketime(), self.clock_file());
        for (name, value) in [
            ("LD_PRELOAD", library.display().to_string()),
            ("FAKETIME_TIMESTAMP_FILE", file.display().to_string()),
            ("FAKETIME_NO_CACHE", "1".to_owned()),
            ("DONT_FAKE_MONOTONIC", "1".to_owned()),
            ("NO_FAKE_STAT", "1".to_owned()),
        ] {
            self.set(name, &value);
        }
    }

    fn clock_file(&self) -> PathBuf {
        self.scratch.join("clock")
    }

    /// The server's clock is so many seconds ahead of the machine's.
    ///
    /// # Panics
    /// When the scratch directory cannot be written.
    pub fn turn_clock(&self, seconds_ahead: i64) {
        let new = self.scratch.join("clock.new");
        std::fs::write(&new, format!("{seconds_ahead:+}\n")).expect("write the clock");
        std::fs::rename(&new, self.clock_file()).expect("turn the clock");
    }

    /// The server's directory.
    #[must_use]
    pub fn dir(&self) -> PathBuf {
        self.scratch.join("server")
    }

    /// Tier 1.
    #[must_use]
    pub fn tier1(&self) -> PathBuf {
        self.dir().join("data/tier1")
    }

    /// Where the cluster's WAL lies on tier 1.
    #[must_use]
    pub fn wal_dir(&self, timeline: u32) -> PathBuf {
        self.tier1().join(&self.cluster).join("wal").join(format!("{timeline:08X}"))
    }

    /// A scratch path that goes with the site.
    #[must_use]
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.scratch.join(name)
    }

    /// gRPC port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Port of the server's metrics page.
    #[must_use]
    pub fn prometheus_port(&self) -> u16 {
        self.prometheus
    }

    /// The bundle's configuration file.
    #[must_use]
    pub fn bundle(&self) -> PathBuf {
        self.dir().join(format!("clients/klio@{}/klio.toml", self.cluster))
    }

    /// The age identity that `init` made; `None` where encryption at rest is off.
    #[must_use]
    pub fn identity(&self) -> Option<PathBuf> {
        if self.variables.iter().any(|(n, v)| n == "KLIO_ENCRYPTION__OFF" && v == "true") {
            return None;
        }
        let config = std::fs::read_to_string(self.dir().join("klio-server.toml")).ok()?;
        let line = config.lines().find_map(|line| line.strip_prefix("identity_file = "))?;
        Some(self.dir().join(line.trim().trim_matches('"')))
    }

    /// What a finished file of either tier holds, by the programs of everybody: `age -d`, then `zstd -d`. `plain` is the
    /// path of its unencrypted form; that or the encrypted one must be there.
    #[must_use]
    pub fn decode(&self, plain: &Path) -> Vec<u8> {
        let mut age = plain.as_os_str().to_owned();
        age.push(".age");
        let mut content = if Path::new(&age).exists() {
            let identity = self.identity().expect("encryption is on");
            let mut command = Command::new("age");
            command.args(["-d", "-i"]).arg(identity).arg(&age);
            output_of(command)
        } else {
            std::fs::read(plain).unwrap_or_else(|e| panic!("read {}: {e}", plain.display()))
        };
        if plain.extension().is_some_and(|extension| extension == "zst") {
            let file = self.scratch.join("decoding.zst");
            std::fs::write(&file, &content).expect("write to the scratch directory");
            let mut command = Command::new("zstd");
            command.arg("-dcq").arg(&file);
            content = output_of(command);
        }
        content
    }

    /// Runs a command of `klio-server` that reads the configuration, with the variables of the server.
    pub async fn server_tool(&self, args: &[&str]) -> programs::Outcome {
        let mut command = programs::command(&programs::klio_server());
        command.args(args).arg("-c").arg(self.dir().join("klio-server.toml"));
        command.envs(self.variables.iter().cloned());
        programs::run(command).await
    }

    /// The bundle of a person who decides, made by the server's own tool at the first call.
    ///
    /// # Panics
    /// When the tool does not make it.
    pub async fn operator(&self, name: &str) -> PathBuf {
        let bundle = self.dir().join(format!("clients/{name}/klio.toml"));
        if !bundle.exists() {
            let made = self.server_tool(&["client", name, "--role", "operator"]).await;
            assert_eq!(made.code, Some(0), "{}", made.stderr);
        }
        bundle
    }

    /// Forgets a variable that was set.
    pub fn unset(&mut self, name: &str) {
        self.variables.retain(|(n, _)| n != name);
    }

    /// Runs `klio-server` with these arguments to its end.
    pub async fn klio_server(&self, args: &[&str]) -> programs::Outcome {
        let mut command = programs::command(&programs::klio_server());
        command.args(args);
        programs::run(command).await
    }

    /// Starts the server and waits until it receives.
    pub async fn start(&mut self) {
        self.launch();
        self.wait_live().await;
    }

    /// The same with a program of another build, and with no telemetry variable but those that were set.
    pub async fn start_as(&mut self, program: &Path) {
        let command = self.run_command(program);
        self.spawn(command);
        self.wait_live().await;
    }

    async fn wait_live(&mut self) {
        let (admin, server) = (self.admin, self.server.as_mut().expect("just launched"));
        eventually("klio-server to serve /livez", PATIENCE, || {
            assert!(server.is_running(), "klio-server ended:\n{}", server.log());
            async move { crate::http::get(admin, "/livez").await.is_ok_and(|(code, _)| code == 200) }
        })
        .await;
    }

    /// Starts the server without waiting.
    pub fn launch(&mut self) {
        let mut command = self.run_command(&programs::klio_server());
        command
            .env("OTEL_METRICS_EXPORTER", "prometheus")
            .env("OTEL_EXPORTER_PROMETHEUS_HOST", "127.0.0.1")
            .env("OTEL_EXPORTER_PROMETHEUS_PORT", self.prometheus.to_string())
            .envs(self.variables.iter().cloned());
        self.spawn(command);
    }

    fn run_command(&self, program: &Path) -> Command {
        let mut command = programs::command(program);
        command
            .args(["run", "-c"])
            .arg(self.dir().join("klio-server.toml"))
            .env("KLIO_QUEUE__EXECUTABLE", env::tool("nats-server"))
            .envs(self.variables.iter().cloned());
        command
    }

    fn spawn(&mut self, command: Command) {
        self.server =
            Some(Running::spawn("klio-server", command, &self.scratch.join("klio-server.log")));
    }

    /// The running server.
    pub fn server(&mut self) -> &mut Running {
        self.server.as_mut().expect("the server was started")
    }

    /// SIGKILL for the server alone: its nats-server must notice by itself.
    pub fn kill9(&mut self) {
        self.server().kill9();
        self.server = None;
    }

    /// SIGTERM, and the exit status must be 0.
    pub async fn stop(&mut self) {
        let status = self.server().terminate(PATIENCE).await;
        assert!(status.success(), "klio-server ended with {status}:\n{}", self.log());
        self.server = None;
    }

    /// The server's log, all runs.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.scratch.join("klio-server.log")).unwrap_or_default()
    }

    /// A `klio` command with the bundle's configuration and this PostgreSQL, if any.
    #[must_use]
    pub fn klio_command(&self, pg: Option<&Postgres>, args: &[&str]) -> Command {
        self.klio_command_of(&self.bundle(), pg, args)
    }

    /// The same with another bundle.
    #[must_use]
    pub fn klio_command_of(&self, bundle: &Path, pg: Option<&Postgres>, args: &[&str]) -> Command {
        let mut command = programs::command(&programs::klio());
        command.args(args).arg("-c").arg(bundle);
        // A test must not wait for the longest pause between attempts.
        command.env("KLIO_STREAM__RETRY_MAX", "1s");
        if let Some(pg) = pg {
            command.env("KLIO_POSTGRES__DSN", pg.conninfo());
        }
        command
    }

    /// Runs a `klio` command to its end.
    pub async fn klio(&self, pg: Option<&Postgres>, args: &[&str]) -> programs::Outcome {
        programs::run(self.klio_command(pg, args)).await
    }

    /// Starts `klio stream`.
    #[must_use]
    pub fn stream(&self, pg: &Postgres) -> Running {
        let name = format!("klio-stream-{}.log", pg.port());
        Running::spawn(
            "klio stream",
            self.klio_command(Some(pg), &["stream"]),
            &self.scratch.join(name),
        )
    }

    /// `klio status --json` of this cluster; `None` while the server does not answer or has nothing.
    pub async fn status(&self) -> Option<Value> {
        let outcome = self.klio(None, &["status", "--json"]).await;
        let value: Value = serde_json::from_str(&outcome.stdout).ok()?;
        value["clusters"].as_array()?.first().cloned()
    }

    /// One LSN of the status by its name, such as `flushed_lsn`; `None` while the server does not answer or has nothing. Asked over one
    /// connection: a program for each question would keep the machine busier than what the test waits for.
    ///
    /// # Panics
    /// When the status has no LSN of that name.
    pub async fn lsn(&self, field: &str) -> Option<Lsn> {
        let channel = self.channel().await?;
        let request = StatusRequest { cluster: self.cluster.clone() };
        let Ok(answer) = CatalogClient::new(channel).status(request).await else {
            *self.channel.lock().await = None;
            return None;
        };
        let status = answer.into_inner().clusters.into_iter().next()?;
        let lsn = match field {
            "received_lsn" => status.received_lsn,
            "flushed_lsn" => status.flushed_lsn,
            "sealed_lsn" => status.sealed_lsn,
            "archived_lsn" => status.archived_lsn,
            other => panic!("an LSN of the status, found {other}"),
        };
        (lsn > 0).then(|| Lsn::new(lsn))
    }

    async fn channel(&self) -> Option<Channel> {
        let mut channel = self.channel.lock().await;
        if channel.is_none() {
            *channel = client::connect(self, &self.bundle()).await.ok();
        }
        channel.clone()
    }

    /// Waits until tier 1 holds everything up to `lsn`.
    pub async fn wait_flushed(&self, lsn: Lsn) {
        self.wait_lsn("flushed_lsn", lsn).await;
    }

    /// Waits until tier 2 holds everything up to `lsn`.
    pub async fn wait_archived(&self, lsn: Lsn) {
        self.wait_lsn("archived_lsn", lsn).await;
    }

    async fn wait_lsn(&self, field: &str, lsn: Lsn) {
        eventually(
            &format!("{field} to reach {lsn}; server log:\n{}", tail(&self.log())),
            PATIENCE,
            || async {
                match self.lsn(field).await {
                    Some(found) if found >= lsn => Ok(()),
                    found => Err(found),
                }
            },
        )
        .await;
    }

    /// The metrics page.
    pub async fn metrics(&self) -> Metrics {
        Metrics::scrape(self.prometheus).await.expect("scrape klio-server")
    }

    /// The text of the metrics page.
    pub async fn metrics_page(&self) -> String {
        crate::http::get(self.prometheus, "/metrics").await.expect("scrape klio-server").1
    }

    /// A probe's status code and text.
    pub async fn probe(&self, path: &str) -> (u16, String) {
        crate::http::get(self.admin, path).await.expect("probe klio-server")
    }

    /// Waits until `/readyz` answers 200 or 503: the queue comes up, and goes, a moment after the server does.
    pub async fn wait_ready(&self, code: u16) {
        let what = format!("/readyz to answer {code}");
        eventually(&what, PATIENCE, || async {
            let (found, text) = self.probe("/readyz").await;
            (found == code).then_some(()).ok_or((found, text))
        })
        .await;
    }

    /// `klio wal-fetch`; gives the exit code and the file's content.
    pub async fn fetch(&self, name: &str) -> (Option<i32>, Vec<u8>) {
        let target = self.scratch.join(format!("fetched-{name}"));
        let path = target.display().to_string();
        let outcome = self.klio(None, &["wal-fetch", name, &path]).await;
        let content = std::fs::read(&target).unwrap_or_default();
        let _ = std::fs::remove_file(&target);
        (outcome.code, content)
    }
}

fn output_of(mut command: Command) -> Vec<u8> {
    let output = command.output().unwrap_or_else(|e| panic!("run {command:?}: {e}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {errors}");
    output.stdout
}

fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(30)..].join("\n")
}
