//! The configuration of `klio`: `klio.toml`, `KLIO_*` variables and command line options.
//!
//! Each layer overrides the one before: default, file, environment, options. Unknown names are refused.
//! [`Config::validate`] reports all problems at once, before anything is opened. Passwords are never printed.

pub mod bucket;
mod fingerprint;
pub mod keys;
mod source;
mod value;

pub use value::{Secret, parse_duration};

use crate::error::{Error, Failure};
use klio_pg::ByteSize;
use klio_storage::{layout::ClusterName, tier2::Tier2Config};
use serde::Deserialize;
use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

/// All settings of `klio`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The cluster's name on the server.
    cluster: Option<String>,
    /// One of the cluster's histories, by its number; empty for the current one.
    generation: String,
    /// The server's address and the certificates.
    pub server: Server,
    /// How to connect to PostgreSQL.
    pub postgres: Postgres,
    /// Settings of `klio stream`.
    pub stream: Stream,
    /// Where a restore reads from, and how WAL is read ahead.
    pub restore: Restore,
    /// The bucket's options, with the same names as in klio-server's configuration; used only with `restore.from`.
    pub tier2: Option<Tier2Config>,
    /// How and when base backups are taken.
    pub backup: Backup,
    /// Settings of restore drills.
    pub drill: Drill,
    /// HTTP for probes and metrics.
    pub admin: Admin,
    /// Logs, traces and metrics.
    pub telemetry: Telemetry,
    /// The file that was read.
    #[serde(skip)]
    pub file: Option<PathBuf>,
}

/// `[server]`
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Server {
    /// `https://host:port`
    pub address: String,
    /// CA certificate that signed the server's certificate.
    pub ca: PathBuf,
    /// Our client certificate, with intermediate certificates.
    pub cert: PathBuf,
    /// The private key of the client certificate.
    pub key: PathBuf,
    /// Do not use TLS: anybody on the network can read and change WAL.
    pub unsafe_plaintext: bool,
    /// Limit for one attempt: name lookup, TCP and TLS together.
    #[serde(deserialize_with = "value::duration")]
    pub connect_timeout: Duration,
}

/// `[postgres]`
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Postgres {
    /// libpq connection string or URL.
    pub dsn: Secret,
    /// Name of the physical replication slot.
    pub slot: String,
    /// Create the slot if it does not exist.
    pub create_slot: bool,
    /// The data directory; if empty, PostgreSQL is asked.
    pub data_directory: PathBuf,
}

/// What to do if PostgreSQL has removed WAL that the server does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnGap {
    /// Record the gap on the server and go on with the oldest WAL that is left.
    Record,
    /// End with exit status 22.
    Stop,
}

/// `[stream]`
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Stream {
    /// What to do if WAL was removed before it was received.
    pub on_gap: OnGap,
    /// Limit of the WAL in one message.
    #[serde(deserialize_with = "value::size")]
    pub batch_size: ByteSize,
    /// Interval of status messages to PostgreSQL and the server while there is nothing else to send.
    #[serde(deserialize_with = "value::duration")]
    pub status_interval: Duration,
    /// First pause after a failure.
    #[serde(deserialize_with = "value::duration")]
    pub retry_min: Duration,
    /// Longest pause between attempts.
    #[serde(deserialize_with = "value::duration")]
    pub retry_max: Duration,
    /// How long a stop waits for the last acknowledgement.
    #[serde(deserialize_with = "value::duration")]
    pub stop_timeout: Duration,
}

/// `[restore]`
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Restore {
    /// The bucket to read from instead of the server: `s3://bucket/prefix` and so on; empty: the server.
    pub from: String,
    /// age identity file for an encrypted bucket; empty if there is none.
    pub identity: PathBuf,
    /// Limit of the WAL that is fetched before PostgreSQL asks for it; `0B` disables this and the agent.
    #[serde(deserialize_with = "value::size")]
    pub read_ahead: ByteSize,
    /// Directory for WAL that was read ahead, on the file system of `pg_wal`; if empty, `.klio` beside `%p`.
    pub spool_dir: PathBuf,
    /// The read-ahead agent exits if nothing was asked for during this time.
    #[serde(deserialize_with = "value::duration")]
    pub agent_idle: Duration,
}

/// How PostgreSQL writes the checkpoint at the start of a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Checkpoint {
    /// Fast for a backup that somebody waits for, spread for a scheduled one.
    Auto,
    /// At once.
    Fast,
    /// Over checkpoint_completion_target of checkpoint_timeout, as any other checkpoint.
    Spread,
}

/// What to do about a page with a wrong checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnBadPages {
    /// The backup is taken, the pages are listed in its record, and `klio backup` ends with 3.
    Record,
    /// The backup fails.
    Fail,
}

/// `[backup]`
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Backup {
    /// When `klio stream` takes backups: five cron fields and a time zone; empty for never.
    pub schedule: String,
    /// A backup begins up to this much later than scheduled, at random.
    #[serde(deserialize_with = "value::duration")]
    pub jitter: Duration,
    /// First pause after a scheduled backup failed.
    #[serde(deserialize_with = "value::duration")]
    pub retry_min: Duration,
    /// Longest pause between attempts.
    #[serde(deserialize_with = "value::duration")]
    pub retry_max: Duration,
    pub checkpoint: Checkpoint,
    pub on_bad_pages: OnBadPages,
    /// How long to wait for WAL that the backup needs while none of it arrives at the server.
    #[serde(deserialize_with = "value::duration")]
    pub wal_timeout: Duration,
    /// Have the server verify the backup after it is committed.
    pub verify: bool,
    /// Percentage of its data that the server then reads and checks, 0 to 100.
    #[serde(deserialize_with = "value::percent")]
    pub verify_read_percent: f64,
    /// Have the server apply the retention policy afterwards.
    pub maintenance: bool,
}

/// `[drill]`
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Drill {
    /// The directory below which drills restore; if empty, the system's temporary directory.
    pub dir: PathBuf,
    /// If klio runs as root: the user who runs PostgreSQL, which does not run as root.
    pub run_as: String,
    /// The directory of PostgreSQL's programs; if empty, they are searched for.
    pub bin_dir: PathBuf,
    /// The role for the checks, a superuser of the cluster.
    pub user: String,
}

/// `[admin]`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Admin {
    /// The address to listen on; empty to not listen.
    pub listen: String,
}

/// `[telemetry]`
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Telemetry {
    /// `false` turns telemetry off, whatever the environment says.
    pub enabled: bool,
    /// `service.name`; empty leaves it to `OTEL_SERVICE_NAME` and the default `klio`.
    pub service_name: String,
    /// OTLP endpoint for traces.
    pub trace_endpoint: String,
    /// Send logs too.
    pub export_logs: bool,
    /// OTLP endpoint for logs.
    pub logs_endpoint: String,
    /// A log filter as in `RUST_LOG`; if empty, `RUST_LOG` is used.
    pub log_level: String,
    /// `text` or `json`; if empty, `KLIO_LOG_FORMAT` is used.
    pub log_format: String,
}

impl Default for Server {
    fn default() -> Self {
        Self {
            address: String::new(),
            ca: "ca.crt".into(),
            cert: "client.crt".into(),
            key: "client.key".into(),
            unsafe_plaintext: false,
            connect_timeout: Duration::from_secs(10),
        }
    }
}

impl Default for Postgres {
    fn default() -> Self {
        Self {
            dsn: Secret::default(),
            slot: "klio".into(),
            create_slot: true,
            data_directory: PathBuf::new(),
        }
    }
}

impl Default for Stream {
    fn default() -> Self {
        Self {
            on_gap: OnGap::Record,
            batch_size: ByteSize::kib(512),
            status_interval: Duration::from_secs(10),
            retry_min: Duration::from_millis(100),
            retry_max: Duration::from_secs(15),
            stop_timeout: Duration::from_secs(10),
        }
    }
}

impl Default for Restore {
    fn default() -> Self {
        Self {
            from: String::new(),
            identity: PathBuf::new(),
            read_ahead: ByteSize::mib(512),
            spool_dir: PathBuf::new(),
            agent_idle: Duration::from_secs(60),
        }
    }
}

impl Default for Backup {
    fn default() -> Self {
        Self {
            schedule: String::new(),
            jitter: Duration::ZERO,
            retry_min: Duration::from_secs(60),
            retry_max: Duration::from_secs(3600),
            checkpoint: Checkpoint::Auto,
            on_bad_pages: OnBadPages::Record,
            wal_timeout: Duration::from_secs(60),
            verify: true,
            // The structure, names and sizes of everything are always verified, and this percentage of the bytes.
            verify_read_percent: 1.0,
            maintenance: true,
        }
    }
}

impl Default for Drill {
    fn default() -> Self {
        let (run_as, user) = ("postgres".into(), "postgres".into());
        Self { dir: PathBuf::new(), run_as, bin_dir: PathBuf::new(), user }
    }
}

impl Default for Telemetry {
    fn default() -> Self {
        Self {
            enabled: true,
            service_name: String::new(),
            trace_endpoint: String::new(),
            export_logs: false,
            logs_endpoint: String::new(),
            log_level: String::new(),
            log_format: String::new(),
        }
    }
}

/// The parts of the configuration that a command needs, so that `wal-fetch`, for example, needs no PostgreSQL settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Needs {
    /// Server address, certificates and the cluster's name.
    pub server: bool,
    /// The cluster's name.
    pub cluster: bool,
    /// Connection string and slot.
    pub postgres: bool,
    /// Something to restore from: the bucket in `restore.from`, or else the server.
    pub source: bool,
}

impl Config {
    /// Reads file, environment and options. `explicit` is the file from `--config`.
    ///
    /// # Errors
    /// A file that cannot be read or is wrong; the message lists every problem that can be found without opening anything.
    pub fn load(explicit: Option<&Path>, flags: &[(&str, String)]) -> Result<Self, Error> {
        let environment: Vec<(String, String)> = std::env::vars_os()
            .filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)))
            .collect();
        let variable = |name: &str| {
            environment.iter().find(|(k, v)| k == name && !v.is_empty()).map(|(_, v)| v.clone())
        };
        let file = match explicit
            .map(Path::to_owned)
            .or_else(|| variable("KLIO_CONFIG").map(Into::into))
        {
            Some(named) => Some(named),
            None => search(variable("HOME").as_deref()).into_iter().find(|path| path.is_file()),
        };
        let text = file.as_deref().map(read).transpose()?;
        let mut config = Self::from_layers(text.as_deref(), &environment, flags)
            .map_err(|problems| wrong(file.as_deref(), &problems))?;
        if let Some(file) = file {
            let directory = file.parent().unwrap_or(Path::new("")).to_owned();
            let server = &mut config.server;
            for path in [&mut server.ca, &mut server.cert, &mut server.key] {
                *path = directory.join(&path);
            }
            if let Some(tier2) = &mut config.tier2 {
                [&mut tier2.ca_file, &mut tier2.service_account_file]
                    .into_iter()
                    .flatten()
                    .for_each(|path| *path = directory.join(&path));
            }
            // This path can come from an option, which is relative to the current directory and not to the file.
            if flags.iter().all(|(name, _)| *name != "restore.identity")
                && !config.restore.identity.as_os_str().is_empty()
            {
                config.restore.identity = directory.join(&config.restore.identity);
            }
            config.file = Some(file);
        }
        Ok(config)
    }

    /// The pure part of [`Config::load`].
    ///
    /// # Errors
    /// Every problem found.
    pub fn from_layers(
        file: Option<&str>,
        environment: &[(String, String)],
        flags: &[(&str, String)],
    ) -> Result<Self, Vec<String>> {
        let table = source::merge(file, environment, flags)?;
        table
            .try_into()
            .map_err(|error: toml::de::Error| vec![error.to_string().trim_end().replace('\n', " ")])
    }

    /// The cluster's name.
    ///
    /// # Errors
    /// It is not set or not a valid name.
    pub fn cluster(&self) -> Result<ClusterName, Error> {
        let text = self.cluster.as_deref().unwrap_or_default();
        if text.is_empty() {
            return Err(Error::new(Failure::Config, format!("read setting cluster: {NOT_SET}"))
                .hint("set cluster in klio.toml, KLIO_CLUSTER or --cluster"));
        }
        // A restore_command names the cluster with its generation (`main@2`). That number wins over `generation`, which
        // may have been changed since.
        let numbered = match self.generation.as_str() {
            "" => text.to_owned(),
            _ if text.contains('@') => text.to_owned(),
            number => format!("{text}@{number}"),
        };
        ClusterName::parse_generation(&numbered).map_err(|error| {
            Error::new(Failure::Config, format!("read setting cluster: {error}"))
                .hint("set cluster in klio.toml, KLIO_CLUSTER or --cluster")
        })
    }

    /// The address of the admin port; `None` if it is not set.
    ///
    /// # Errors
    /// It is not a valid address.
    pub fn admin_listen(&self) -> Result<Option<SocketAddr>, Error> {
        let text = self.admin.listen.as_str();
        if text.is_empty() {
            return Ok(None);
        }
        text.parse().map(Some).map_err(|_| {
            Error::new(
                Failure::Config,
                format!("admin.listen: expected an address such as 127.0.0.1:9465, found {text:?}"),
            )
        })
    }

    /// Checks the settings that a command will use.
    ///
    /// # Errors
    /// One error that lists every problem.
    pub fn validate(&self, needs: Needs) -> Result<(), Error> {
        let mut problems = Vec::new();
        if needs.server || (needs.source && self.restore.from.is_empty()) {
            self.server.problems(&mut problems);
        }
        if needs.source && !self.restore.from.is_empty() {
            problems.extend(bucket::settings(self).err().into_iter().flatten());
        }
        if needs.cluster
            && let Err(error) = self.cluster()
        {
            problems.push(error.message);
        }
        if needs.postgres {
            self.postgres.problems(&mut problems);
            self.stream.problems(&mut problems);
            self.backup.problems(&mut problems);
        }
        if let Err(error) = self.admin_listen() {
            problems.push(error.message);
        }
        if problems.is_empty() { Ok(()) } else { Err(wrong(self.file.as_deref(), &problems)) }
    }
}

impl Server {
    fn problems(&self, problems: &mut Vec<String>) {
        let address = self.address.as_str();
        if address.is_empty() {
            problems.push(format!("server.address: {NOT_SET}"));
            return;
        }
        let expected = if self.unsafe_plaintext { "http" } else { "https" };
        match url::Url::parse(address) {
            Ok(url) if url.scheme() == expected && url.host().is_some() => {}
            _ => problems.push(format!(
                "server.address: expected {expected}://host:port, found {address:?}"
            )),
        }
    }
}

impl Postgres {
    fn problems(&self, problems: &mut Vec<String>) {
        let good = (1..=63).contains(&self.slot.len())
            && self.slot.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
        if !good {
            problems.push(format!(
                "postgres.slot: expected 1 to 63 characters a-z, 0-9 or _, found {:?}",
                self.slot
            ));
        }
    }
}

impl Stream {
    fn problems(&self, problems: &mut Vec<String>) {
        let batch = self.batch_size;
        if batch < ByteSize::kib(8) || batch > ByteSize::mib(2) {
            problems.push(format!("stream.batch_size: expected 8KiB to 2MiB, found {batch}"));
        }
        // PostgreSQL's default wal_sender_timeout is 60 s; with a longer interval, PostgreSQL would close the connection.
        let status = self.status_interval;
        if status < Duration::from_millis(100) || status > Duration::from_secs(30) {
            problems
                .push(format!("stream.status_interval: expected 100ms to 30s, found {status:?}"));
        }
        if self.retry_min.is_zero() || self.retry_max < self.retry_min {
            problems.push(format!(
                "stream.retry_max: expected at least retry_min ({:?}, more than 0), found {:?}",
                self.retry_min, self.retry_max
            ));
        }
    }
}

impl Backup {
    fn problems(&self, problems: &mut Vec<String>) {
        if !self.schedule.is_empty()
            && let Err(problem) = crate::schedule::Schedule::parse(&self.schedule)
        {
            problems.push(format!("backup.schedule: {problem}"));
        }
        if self.retry_min.is_zero() || self.retry_max < self.retry_min {
            problems.push(format!(
                "backup.retry_max: expected at least retry_min ({:?}, more than 0), found {:?}",
                self.retry_min, self.retry_max
            ));
        }
    }
}

/// Whether traces may have to be exported. In doubt, yes.
pub fn telemetry_wanted(config: &Config) -> bool {
    let variable = |name: &std::ffi::OsStr| name.as_encoded_bytes().starts_with(b"OTEL_");
    !config.telemetry.trace_endpoint.is_empty()
        || config.telemetry.export_logs
        || std::env::vars_os().any(|(name, _)| variable(&name))
}

/// Reads one environment variable.
pub fn environment(name: &str) -> Option<String> {
    std::env::var_os(name)?.into_string().ok()
}

fn search(home: Option<&str>) -> Vec<PathBuf> {
    let home = home.map(|home| Path::new(home).join(".config/klio/klio.toml"));
    ["klio.toml".into()].into_iter().chain(home).chain(["/etc/klio/klio.toml".into()]).collect()
}

fn read(path: &Path) -> Result<String, Error> {
    std::fs::read_to_string(path).map_err(|error| {
        Error::new(Failure::Config, format!("read configuration {}: {error}", path.display()))
            .hint("klio-server client writes a bundle with a klio.toml in it")
    })
}

/// The end of a message about a setting that is not set.
const NOT_SET: &str = "not set";

fn wrong(file: Option<&Path>, problems: &[String]) -> Error {
    let place = file.map_or_else(|| "environment and flags".into(), |f| f.display().to_string());
    // If nothing is missing, a missing klio.toml is not the problem.
    let lacks = problems.iter().any(|problem| problem.ends_with(NOT_SET));
    let hint = match file {
        None if lacks => {
            "no klio.toml was found: name one with --config or KLIO_CONFIG; klio help config lists every setting"
        }
        _ => "klio help config lists every setting",
    };
    Error::new(Failure::Config, format!("read configuration from {place}: {}", problems.join("; ")))
        .hint(hint)
}

#[cfg(test)]
mod tests;
