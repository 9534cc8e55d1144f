//! The configuration of `klio`: `klio.toml`, `KLIO_*`, flags.
//!
//! default < file < environment < flag. Unknown names are refused. [`Config::validate`] gives every
//! problem at once, before anything is opened. Passwords never print.

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

/// Everything `klio` can be told.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The cluster's name on the server.
    cluster: Option<String>,
    /// One of its histories by its number; empty for the current one.
    generation: String,
    /// Where the server is and how to prove who we are.
    pub server: Server,
    /// Where PostgreSQL is.
    pub postgres: Postgres,
    /// How `klio stream` behaves.
    pub stream: Stream,
    /// Where a restore reads from, and how WAL is read ahead.
    pub restore: Restore,
    /// The bucket's options, as klio-server has them; used with `restore.from` only.
    pub tier2: Option<Tier2Config>,
    /// How base backups are taken, and when.
    pub backup: Backup,
    /// How restores are practised.
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
    /// `https://host:port`.
    pub address: String,
    /// The authority of the server's certificate.
    pub ca: PathBuf,
    /// Our certificate, with intermediates.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// No TLS: anybody on the way can read and change WAL.
    pub unsafe_plaintext: bool,
    /// For one attempt: name lookup, TCP and TLS together.
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
    /// Create the slot when it is missing.
    pub create_slot: bool,
    /// Where the data directory is; empty: PostgreSQL is asked.
    pub data_directory: PathBuf,
}

/// What to do when PostgreSQL has removed WAL that the server does not hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnGap {
    /// Record the gap on the server and go on where WAL is left.
    Record,
    /// End with exit status 22.
    Stop,
}

/// `[stream]`
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Stream {
    /// When WAL was removed before it was received.
    pub on_gap: OnGap,
    /// Most WAL in one message.
    #[serde(deserialize_with = "value::size")]
    pub batch_size: ByteSize,
    /// How often both ends hear of us when nothing else is to be said.
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
    /// age identity file, for a bucket that is encrypted; empty: none.
    pub identity: PathBuf,
    /// Most WAL that is fetched before PostgreSQL asks for it; `0B`: none, and no agent.
    #[serde(deserialize_with = "value::size")]
    pub read_ahead: ByteSize,
    /// Where WAL waits until it is asked for; empty: `.klio` beside `%p`. On the file system of `pg_wal`.
    pub spool_dir: PathBuf,
    /// The read-ahead agent ends when nothing was asked for this long.
    #[serde(deserialize_with = "value::duration")]
    pub agent_idle: Duration,
}

/// How PostgreSQL writes the checkpoint that a backup begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Checkpoint {
    /// Fast for a backup that somebody waits for, spread for a scheduled one.
    Auto,
    /// At once.
    Fast,
    /// Over checkpoint_completion_target of checkpoint_timeout, as any other.
    Spread,
}

/// What a page with a wrong checksum does to the backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnBadPages {
    /// It is taken, the pages are in its record, and `klio backup` ends with 3.
    Record,
    /// It fails.
    Fail,
}

/// `[backup]`
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Backup {
    /// When `klio stream` takes backups: five cron fields and a time zone; empty: never.
    pub schedule: String,
    /// A backup begins up to this much later than scheduled, by chance.
    #[serde(deserialize_with = "value::duration")]
    pub jitter: Duration,
    /// First pause after a scheduled backup failed.
    #[serde(deserialize_with = "value::duration")]
    pub retry_min: Duration,
    /// Longest pause.
    #[serde(deserialize_with = "value::duration")]
    pub retry_max: Duration,
    /// The checkpoint it begins with.
    pub checkpoint: Checkpoint,
    /// Pages with wrong checksums.
    pub on_bad_pages: OnBadPages,
    /// How long WAL that the backup needs may make no progress to the server.
    #[serde(deserialize_with = "value::duration")]
    pub wal_timeout: Duration,
    /// Verify the backup on the server when it is committed.
    pub verify: bool,
    /// Share of its data that the server then reads back, 0 to 100.
    #[serde(deserialize_with = "value::percent")]
    pub verify_read_percent: f64,
    /// Apply the retention policy on the server afterwards.
    pub maintenance: bool,
}

/// `[drill]`
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Drill {
    /// Below which directory; empty: the system's temporary one.
    pub dir: PathBuf,
    /// As root: the user who runs PostgreSQL, which refuses root.
    pub run_as: String,
    /// Where PostgreSQL's programs are; empty: the usual places.
    pub bin_dir: PathBuf,
    /// PostgreSQL role for the checks: a superuser of the cluster.
    pub user: String,
}

/// `[admin]`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Admin {
    /// Where to serve; empty means nowhere.
    pub listen: String,
}

/// `[telemetry]`
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Telemetry {
    /// `false` turns it off whatever the environment says.
    pub enabled: bool,
    /// `service.name`; empty leaves it to `OTEL_SERVICE_NAME` and the default `klio`.
    pub service_name: String,
    /// OTLP endpoint for traces.
    pub trace_endpoint: String,
    /// Send logs too.
    pub export_logs: bool,
    /// OTLP endpoint for logs.
    pub logs_endpoint: String,
    /// As `RUST_LOG`; empty leaves it to that.
    pub log_level: String,
    /// `text` or `json`; empty leaves it to `KLIO_LOG_FORMAT`.
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
            // Structure, names and sizes of everything, and a sample of the bytes.
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

/// What a command needs, so that `wal-fetch` does not ask for a PostgreSQL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Needs {
    /// Server address, certificates and the cluster's name.
    pub server: bool,
    /// The cluster's name.
    pub cluster: bool,
    /// Connection string and slot.
    pub postgres: bool,
    /// Something to restore from: the bucket of `restore.from`, else the server.
    pub source: bool,
}

impl Config {
    /// Reads file, environment and flags. `explicit` is `--config`.
    ///
    /// # Errors
    /// An unreadable or wrong file, with every problem that can be seen without opening anything.
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
            // A flag is relative to where it was typed, and this path can come from one.
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
    /// Missing or not a name.
    pub fn cluster(&self) -> Result<ClusterName, Error> {
        let text = self.cluster.as_deref().unwrap_or_default();
        if text.is_empty() {
            return Err(Error::new(Failure::Config, format!("read setting cluster: {NOT_SET}"))
                .hint("set cluster in klio.toml, KLIO_CLUSTER or --cluster"));
        }
        let numbered = match self.generation.as_str() {
            "" => text.to_owned(),
            number => format!("{text}@{number}"),
        };
        ClusterName::parse_generation(&numbered).map_err(|error| {
            Error::new(Failure::Config, format!("read setting cluster: {error}"))
                .hint("set cluster in klio.toml, KLIO_CLUSTER or --cluster")
        })
    }

    /// The admin address, when one is set.
    ///
    /// # Errors
    /// Not an address.
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

    /// Checks what the command is going to use.
    ///
    /// # Errors
    /// One error that lists every problem.
    pub fn validate(&self, needs: Needs) -> Result<(), Error> {
        let mut problems = Vec::new();
        if needs.server || (needs.source && self.restore.from.is_empty()) {
            self.server.problems(&mut problems);
        }
        if needs.source && !self.restore.from.is_empty() {
            problems.extend(crate::bucket::settings(self).err().into_iter().flatten());
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
        // PostgreSQL's wal_sender_timeout is 60 s; longer intervals would be cut by it.
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
            && let Err(problem) = crate::backup::Schedule::parse(&self.schedule)
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

/// Whether traces may have to go somewhere. In doubt, yes.
pub fn telemetry_wanted(config: &Config) -> bool {
    let variable = |name: &std::ffi::OsStr| name.as_encoded_bytes().starts_with(b"OTEL_");
    !config.telemetry.trace_endpoint.is_empty()
        || config.telemetry.export_logs
        || std::env::vars_os().any(|(name, _)| variable(&name))
}

/// One variable of the environment, for `conninfo`.
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

/// How a problem ends that a klio.toml would have solved.
const NOT_SET: &str = "not set";

fn wrong(file: Option<&Path>, problems: &[String]) -> Error {
    let place = file.map_or_else(|| "environment and flags".into(), |f| f.display().to_string());
    // What is set and wrong was not looked for in vain.
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
