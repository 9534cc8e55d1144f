//! The configuration of `klio-server`: one TOML file, overridden by `KLIO_*` variables.
//!
//! The environment wins over the file, and the file over the defaults. `KLIO_TIER2__URL` sets `url` in `[tier2]`. A
//! value is read as TOML if it is valid TOML (numbers, booleans, lists), otherwise as text. Unknown names are refused.
//! [`Config::validate`] returns all problems at once, before a port is opened or a file written.

use crate::{
    access::{auth::AuthConfig, pki, tls::TlsFiles},
    base::BaseConfig,
    consumer::ConsumerConfig,
    encryption::{self, EncryptionConfig},
    maintenance::{self, MaintenanceConfig, RetentionConfig, VerifyConfig},
    queue::QueueConfig,
    quota::QuotaConfig,
    receive::OnDivergence,
};
use klio_pg::ByteSize;
use klio_storage::{crypt::AtRest, tier2::Tier2Config};
use std::{
    collections::BTreeMap,
    fmt::Write as _,
    net::SocketAddr,
    path::{Path, PathBuf},
};
use toml::{Table, Value};

/// Variables that begin with `KLIO_` and are not settings.
const NOT_SETTINGS: [&str; 7] = [
    "KLIO_CONFIG",
    "KLIO_OTEL_STRICT",
    "KLIO_LOG_FORMAT",
    // Used by the tests.
    "KLIO_BIN_DIR",
    "KLIO_TEST_DIR",
    "KLIO_TEST_SEED",
    "KLIO_TEST_CRASH_AT",
];

/// First words of the sidecar's variables. They are ignored, because one shell may hold the settings of both programs.
const SIDECAR_SECTIONS: [&str; 7] =
    ["cluster", "server", "postgres", "stream", "backup", "restore", "drill"];

/// All settings of a server.
#[derive(Debug, Clone, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The directory of tier 1 and the queue.
    pub data_dir: PathBuf,
    /// The file it was read from; empty if there was none.
    #[serde(skip)]
    pub file: PathBuf,
    /// The address for sidecars.
    #[serde(default = "default_listen")]
    pub listen: SocketAddr,
    /// The address `https://host:port` that is written to client bundles.
    pub public_address: Option<String>,
    /// Certificates; required unless `unsafe_plaintext` is set.
    pub tls: Option<TlsFiles>,
    /// No TLS and no client certificates: everybody who reaches the port may do everything.
    #[serde(default)]
    pub unsafe_plaintext: bool,
    /// Roles for certificates of other authorities.
    #[serde(default)]
    pub auth: AuthConfig,
    /// Encryption at rest; on unless it is switched off.
    #[serde(default)]
    pub encryption: EncryptionConfig,
    /// Receiving and sealing.
    #[serde(default)]
    pub wal: WalConfig,
    /// Repositories of base backups.
    #[serde(default)]
    pub base: BaseConfig,
    /// Which backups and WAL are retained.
    #[serde(default)]
    pub retention: RetentionConfig,
    /// When retention is applied.
    #[serde(default)]
    pub maintenance: MaintenanceConfig,
    /// What is verified after a backup.
    #[serde(default)]
    pub verify: VerifyConfig,
    /// How much one cluster may use.
    #[serde(default)]
    pub quota: QuotaConfig,
    /// The job queue.
    #[serde(default)]
    pub queue: QueueConfig,
    /// The bucket. Without one, WAL stays on tier 1; it is archived when a bucket is added.
    pub tier2: Option<Tier2Config>,
    /// Uploading to tier 2.
    #[serde(default)]
    pub consumer: ConsumerConfig,
    /// Health and metrics over HTTP.
    #[serde(default)]
    pub admin: AdminConfig,
    /// Settings that win over the OTEL_* variables.
    #[serde(default)]
    pub telemetry: TelemetryConfig,
}

/// `[wal]`
#[derive(Debug, Clone, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WalConfig {
    /// The most bytes that a sidecar may send beyond what is acknowledged; limits the memory for each stream.
    pub window_bytes: ByteSize,
    /// How many segments are sealed at once.
    pub seal_workers: usize,
    /// What to do with a history that differs from the stored one.
    pub on_divergence: OnDivergence,
}

impl Default for WalConfig {
    fn default() -> Self {
        Self {
            window_bytes: ByteSize::mib(8),
            seal_workers: 2,
            on_divergence: OnDivergence::KeepBoth,
        }
    }
}

/// `[admin]`
#[derive(Debug, Clone, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdminConfig {
    /// Address of /livez, /readyz and /metrics.
    pub listen: Option<SocketAddr>,
}

impl Default for AdminConfig {
    fn default() -> Self {
        Self { listen: Some(SocketAddr::from(([127, 0, 0, 1], 7424))) }
    }
}

/// `[telemetry]`: these settings win over OTEL_*.
#[derive(Debug, Clone, Default, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TelemetryConfig {
    /// `false` turns all telemetry off.
    pub enabled: Option<bool>,
    /// `service.name`.
    pub service_name: Option<String>,
    /// OTLP endpoint for traces.
    pub trace_endpoint: Option<String>,
    /// Logs over OTLP as well.
    pub export_logs: Option<bool>,
    /// OTLP endpoint for logs.
    pub logs_endpoint: Option<String>,
    /// A filter in the form of RUST_LOG.
    pub log_level: Option<String>,
    /// `text` or `json`.
    pub log_format: Option<String>,
}

/// Every setting: name, default, meaning. docs/configuration.md is generated from it.
pub const SETTINGS: &[(&str, &str, &str)] = &[
    ("data_dir", "", "directory of tier 1 and the queue; required"),
    ("listen", "127.0.0.1:7423", "address:port for sidecars"),
    ("public_address", "", "https://host:port to put into client bundles"),
    (
        "unsafe_plaintext",
        "false",
        "do not use TLS or client certificates: everybody may do everything",
    ),
    ("tls.cert", "", "server certificate chain, PEM; read again when it changes"),
    ("tls.key", "", "private key of the server certificate, PEM"),
    ("tls.client_ca", "", "CA certificates of the clients, PEM"),
    (
        "auth.map",
        "[]",
        "list of { common_name, cluster } or { common_name, role }, role being observer, operator or admin; read again when the file changes",
    ),
    (
        "auth.trust_units",
        "false",
        "accept the organisational units klio-observer, klio-operator and klio-admin in certificates of every CA, not only of the one made by klio-server init; read again when the file changes",
    ),
    (
        "encryption.identity_file",
        "",
        "file with the age identity that decrypts everything; required unless off",
    ),
    ("encryption.recipients", "[]", "more age recipients, such as an offline recovery key"),
    (
        "encryption.off",
        "false",
        "store WAL and repository keys unencrypted; identity_file still decrypts older files",
    ),
    (
        "wal.window_bytes",
        "8388608",
        "most WAL that a sidecar may send ahead of the acknowledgements, in bytes",
    ),
    ("wal.seal_workers", "2", "segments to seal at the same time"),
    (
        "wal.on_divergence",
        "keep-both",
        "when PostgreSQL's WAL differs from the stored WAL: \"keep-both\" receives it as an undecided generation, \"refuse\" refuses it",
    ),
    ("base.chunk_size", "73728", "size of a chunk in bytes; fixed when a repository is made"),
    (
        "base.compression_level",
        "1",
        "zstd level of base backups, 0 to 22; 0 stores uncompressed; applies to new data",
    ),
    (
        "base.pack_size",
        "16777216",
        "size of a pack of chunks in bytes; fixed when a repository is made",
    ),
    (
        "retention.tier2.last",
        "2",
        "number of newest backups to keep; also hourly, daily, weekly, monthly, yearly: one backup for each of the last N periods (UTC)",
    ),
    (
        "retention.tier2.recovery_window_days",
        "30",
        "number of days before the newest backup to which any moment can be restored",
    ),
    (
        "retention.tier1.last",
        "1",
        "which of these backups keep a copy on tier 1; the same rules as for tier2",
    ),
    (
        "retention.minimum_age",
        "7d",
        "a backup younger than this is not deleted and causes no older one to be deleted, such as 7d, 12h or 90s; 0: no minimum",
    ),
    (
        "retention.clusters",
        "",
        "[retention.clusters.NAME] with tier1, tier2 and minimum_age: overrides for one cluster",
    ),
    ("maintenance.enabled", "true", "apply retention after backups and at intervals"),
    ("maintenance.interval_seconds", "86400", "time between two runs for a cluster"),
    (
        "maintenance.keep_marked_seconds",
        "82800",
        "how long a pack stays after it was found to be unused",
    ),
    (
        "maintenance.wait_for_backup_seconds",
        "600",
        "how long to wait for a running backup before skipping the cluster",
    ),
    ("verify.after_backup", "true", "verify in tier 2 what a backup stored"),
    (
        "verify.read_percent",
        "10",
        "percentage of packs that are read to verify a backup; indexes and snapshots are always read",
    ),
    (
        "quota.stored_bytes",
        "0",
        "bytes that a cluster may store in a tier, WAL and base backups together; beyond it base backups are refused and WAL is still received; 0 is no limit",
    ),
    ("quota.backup_bytes", "0", "bytes that one base backup may store; 0 is no limit"),
    (
        "quota.calls",
        "256",
        "concurrent calls of a cluster, except those that send WAL; 0 is no limit",
    ),
    ("quota.connections", "64", "concurrent connections of a cluster; 0 is no limit"),
    ("quota.restores", "16", "concurrent restores of a cluster; 0 is no limit"),
    (
        "quota.keep_free_percent",
        "5",
        "percentage of tier 1's disk, at most 1 GiB, that base backups leave free for WAL; 0 leaves nothing",
    ),
    (
        "quota.clusters",
        "",
        "[quota.clusters.NAME] with any of these except keep_free_percent: overrides for one cluster",
    ),
    ("queue.url", "", "URL of an existing NATS server to use instead of the embedded one"),
    (
        "queue.executable",
        "",
        "nats-server 2.12 or newer; default: beside klio-server, .tools/bin, PATH",
    ),
    (
        "queue.max_bytes",
        "268435456",
        "most bytes of queued jobs; when full, jobs are derived from the tiers later",
    ),
    ("queue.ca_file", "", "CA certificate of the existing NATS"),
    ("queue.credentials_file", "", "NATS credentials file"),
    ("queue.user", "", "user of the existing NATS"),
    ("queue.password", "", "password for the existing NATS"),
    ("queue.replicas", "1", "copies of the stream in an existing NATS cluster"),
    ("consumer.uploads", "4", "concurrent uploads of all clusters"),
    ("consumer.uploads_per_cluster", "3", "concurrent uploads of one cluster"),
    ("consumer.reconcile_interval_seconds", "600", "time between two comparisons of the tiers"),
    ("tier2.url", "", "s3://, gs://, az:// or file:///; without it nothing is archived"),
    ("tier2.endpoint", "", "address of an S3-compatible store"),
    ("tier2.region", "", "S3 region"),
    ("tier2.path_style", "true with an endpoint", "put the bucket in the path of the URL"),
    ("tier2.ca_file", "", "CA certificates to trust in addition to the system's"),
    ("tier2.access_key_id", "", "S3 access key; empty: credentials of the environment"),
    ("tier2.secret_access_key", "", "S3 secret"),
    ("tier2.session_token", "", "S3 session token"),
    ("tier2.service_account_file", "", "Google Cloud service account"),
    ("tier2.account", "", "Azure storage account"),
    ("tier2.account_key", "", "Azure access key"),
    ("tier2.storage_class", "", "storage class of new objects"),
    ("tier2.encryption", "", "server-side encryption (S3)"),
    ("tier2.kms_key_id", "", "KMS key for server-side encryption"),
    (
        "tier2.checksum",
        "sha256",
        "how an upload is verified (S3): \"sha256\" by the checksum header; \"none\", for stores that refuse that, by reading it again",
    ),
    ("tier2.upload_memory", "67108864", "most memory for all uploads together, in bytes"),
    ("tier2.connect_timeout_seconds", "5", "timeout of a connection attempt"),
    (
        "tier2.request_timeout_seconds",
        "60",
        "timeout of a request while no byte of it or of its answer moves; one that makes progress may take any time",
    ),
    ("tier2.retry_timeout_seconds", "30", "how long to retry a request within one attempt"),
    ("admin.listen", "127.0.0.1:7424", "address:port for /livez, /readyz and /metrics"),
    ("telemetry.enabled", "true", "false turns OpenTelemetry off"),
    ("telemetry.service_name", "klio-server", "service.name"),
    ("telemetry.trace_endpoint", "", "OTLP endpoint for traces"),
    ("telemetry.export_logs", "false", "send logs over OTLP too"),
    ("telemetry.logs_endpoint", "", "OTLP endpoint for logs"),
    ("telemetry.log_level", "info", "log filter in the form of RUST_LOG"),
    ("telemetry.log_format", "text", "text or json"),
];

fn default_listen() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 7423))
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("read configuration {place}: {}", .problems.join("; "))]
pub struct ConfigError {
    place: String,
    problems: Vec<String>,
}

impl ConfigError {
    /// Whether the key for encryption at rest is missing: this problem has its own exit status.
    pub fn is_about_keys(&self) -> bool {
        self.problems.iter().any(|problem| problem.starts_with(encryption::SECTION))
    }
}

impl Config {
    /// Reads a file and the process environment.
    ///
    /// # Errors
    /// All problems at once.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let fail = |problem: String| ConfigError {
            place: path.display().to_string(),
            problems: vec![problem],
        };
        let text = std::fs::read_to_string(path)
            .map_err(|e| fail(format!("{e}; hint: klio-server init DIR writes one")))?;
        let environment: Vec<(String, String)> = std::env::vars_os()
            .filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)))
            .collect();
        let mut config = Self::parse(&text, &environment).map_err(fail)?;
        // Made absolute, so that a child process with another working directory means the same directories.
        config.file = std::path::absolute(path).map_err(|e| fail(e.to_string()))?;
        let directory = config.file.parent().unwrap_or(Path::new("/")).to_owned();
        config.resolve(&directory);
        let problems = config.validate();
        if problems.is_empty() {
            return Ok(config);
        }
        Err(ConfigError { place: path.display().to_string(), problems })
    }

    /// Pure: uses only the file's text and the given environment.
    pub fn parse(text: &str, environment: &[(String, String)]) -> Result<Self, String> {
        let mut table: Table = text.parse().map_err(|e: toml::de::Error| e.to_string())?;
        for (name, value) in environment {
            if name.starts_with("KLIO_") && !NOT_SETTINGS.contains(&name.as_str()) {
                overlay(&mut table, name, value);
            }
        }
        Value::Table(table).try_into().map_err(|e: toml::de::Error| e.message().to_owned())
    }

    /// The keys for encryption at rest, read from the identity file.
    ///
    /// # Errors
    /// The identity file is missing or is not an identity, or a recipient is invalid.
    pub fn at_rest(&self) -> Result<AtRest, klio_storage::Error> {
        self.encryption.at_rest()
    }

    /// Makes relative paths relative to the file, not to the working directory.
    fn resolve(&mut self, base: &Path) {
        let fix = |path: &mut PathBuf| {
            if path.is_relative() {
                *path = base.join(&*path);
            }
        };
        fix(&mut self.data_dir);
        if let Some(tls) = &mut self.tls {
            fix(&mut tls.cert);
            fix(&mut tls.key);
            fix(&mut tls.client_ca);
        }
        if let Some(identity) = &mut self.encryption.identity_file {
            fix(identity);
        }
        let QueueConfig { executable, ca_file, credentials_file, .. } = &mut self.queue;
        [executable, ca_file, credentials_file].into_iter().flatten().for_each(fix);
        if let Some(tier2) = &mut self.tier2 {
            [&mut tier2.ca_file, &mut tier2.service_account_file]
                .into_iter()
                .flatten()
                .for_each(fix);
        }
    }

    /// All problems that can be found without using network or disk.
    pub fn validate(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if self.tls.is_none() && !self.unsafe_plaintext {
            problems.push(
                "[tls]: expected cert, key and client_ca; hint: klio-server init writes them"
                    .into(),
            );
        }
        if self.tls.is_some() && self.unsafe_plaintext {
            problems.push("unsafe_plaintext: expected false beside a [tls] section".into());
        }
        if self.data_dir.as_os_str().is_empty() {
            problems.push("data_dir: expected a directory, found nothing".into());
        }
        problems.extend(self.encryption.validate());
        let window = self.wal.window_bytes.bytes();
        if !(1 << 20..=1 << 30).contains(&window) {
            problems.push(format!("wal.window_bytes: expected 1 MiB to 1 GiB, found {window}"));
        }
        if !(1..=64).contains(&self.wal.seal_workers) {
            let found = self.wal.seal_workers;
            problems.push(format!("wal.seal_workers: expected 1 to 64, found {found}"));
        }
        problems.extend(self.base.validate());
        problems.extend(self.retention.validate());
        problems.extend(self.maintenance.validate());
        problems.extend(self.verify.validate());
        problems.extend(self.auth.validate());
        if let Some(tier2) = &self.tier2 {
            problems.extend(tier2.validate().into_iter().map(|p| format!("[tier2] {p}")));
        }
        problems.extend(self.quota.validate());
        problems.extend(self.queue.validate());
        problems.extend(self.consumer.validate());
        problems
    }
}

impl Config {
    /// `[auth]` of a configuration file, if the whole file can be used.
    ///
    /// # Errors
    /// All problems of the file, as text.
    pub fn load_rules(file: &Path) -> Result<AuthConfig, String> {
        Self::load(file).map(|config| config.auth).map_err(|error| error.to_string())
    }

    /// The files that contain secrets, as far as the configuration names them.
    pub fn secret_files(&self) -> Vec<PathBuf> {
        let mut paths = vec![self.file.clone()];
        paths.extend(self.tls.as_ref().map(|tls| tls.key.clone()));
        paths.extend(self.encryption.identity_file.clone());
        paths.extend(self.queue.credentials_file.clone());
        paths.extend(self.tier2.as_ref().and_then(|tier2| tier2.service_account_file.clone()));
        // The key that signs client bundles, if `klio-server init` created it.
        paths.extend(self.file.parent().map(|directory| directory.join(pki::CA_KEY)));
        paths
    }

    /// The settings for maintenance.
    pub fn maintenance_settings(&self) -> maintenance::Settings {
        maintenance::Settings {
            retention: self.retention.clone(),
            maintenance: self.maintenance.clone(),
            verify: self.verify.clone(),
        }
    }
}

impl TelemetryConfig {
    /// The same settings as variables, which the telemetry crate reads before the environment.
    pub fn overrides(&self) -> BTreeMap<String, String> {
        let mut set = BTreeMap::new();
        let mut put = |name: &str, value: Option<String>| {
            if let Some(value) = value {
                set.insert(name.to_owned(), value);
            }
        };
        put("OTEL_SDK_DISABLED", self.enabled.filter(|on| !on).map(|_| "true".into()));
        put("OTEL_SERVICE_NAME", self.service_name.clone());
        put("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", self.trace_endpoint.clone());
        put("OTEL_TRACES_EXPORTER", self.trace_endpoint.as_ref().map(|_| "otlp".into()));
        put("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", self.logs_endpoint.clone());
        put("OTEL_LOGS_EXPORTER", self.export_logs.filter(|on| *on).map(|_| "otlp".into()));
        // A bad value is a warning, like any other problem of telemetry (P9), so nothing is checked here.
        put("KLIO_LOG_FORMAT", self.log_format.clone());
        put("RUST_LOG", self.log_level.clone());
        set
    }
}

/// A variable of the environment that is not a setting.
pub fn environment(name: &str) -> Option<String> {
    std::env::var_os(name)?.into_string().ok()
}

/// `KLIO_A__B` sets `b` in `[a]`; `KLIO_A` sets `a`.
fn overlay(table: &mut Table, variable: &str, text: &str) {
    let path = variable.trim_start_matches("KLIO_").to_lowercase();
    let mut parts: Vec<&str> = path.split("__").collect();
    if parts.first().is_some_and(|first| SIDECAR_SECTIONS.contains(first)) {
        return;
    }
    let Some(last) = parts.pop() else { return };
    let mut target = table;
    for part in parts {
        let entry = target.entry(part).or_insert_with(|| Value::Table(Table::new()));
        if !entry.is_table() {
            *entry = Value::Table(Table::new());
        }
        let Value::Table(inner) = entry else { return };
        target = inner;
    }
    let mut line = String::new();
    let _ = write!(line, "x = {text}");
    let value = line.parse::<Table>().ok().and_then(|mut t| t.remove("x"));
    target.insert(last.to_owned(), value.unwrap_or_else(|| Value::String(text.to_owned())));
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMAL: &str = "data_dir = \"/d\"\nunsafe_plaintext = true\n";

    fn env(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect()
    }

    /// Regression test: a server that was started with a relative path refused its own child process.
    #[test]
    fn a_relative_path_to_the_file_gives_absolute_directories() {
        let directory = tempfile::tempdir_in(".").unwrap();
        let path = Path::new(directory.path().file_name().unwrap()).join("klio-server.toml");
        let text = "data_dir = \"data\"\nunsafe_plaintext = true\n[encryption]\noff = true\n";
        std::fs::write(&path, text).unwrap();
        let config = Config::load(&path).unwrap();
        assert!(config.data_dir.is_absolute(), "{}", config.data_dir.display());
        assert!(config.data_dir.ends_with(path.with_file_name("data")));
    }

    #[test]
    fn an_empty_or_absurd_file_is_refused_by_name() {
        let missing = Config::parse("", &[]).unwrap_err();
        assert!(missing.contains("data_dir"), "{missing}");
        let unknown = Config::parse(&format!("{MINIMAL}colour = \"red\""), &[]).unwrap_err();
        assert!(unknown.contains("colour"), "{unknown}");
        for absurd in ["\0", "[[[", "data_dir = 7", "listen = \"nowhere\"\ndata_dir = \"/d\""] {
            assert!(Config::parse(absurd, &[]).is_err(), "{absurd:?}");
        }
    }

    #[test]
    fn every_problem_is_reported_at_once() {
        let text = "data_dir = \"\"\n[wal]\nwindow_bytes = 5\nseal_workers = 0\n[[auth.map]]\ncommon_name = \"x\"\n";
        let problems = Config::parse(text, &[]).unwrap().validate();
        for name in
            ["[tls]", "[encryption]", "data_dir", "window_bytes", "seal_workers", "auth.map"]
        {
            assert!(problems.iter().any(|p| p.contains(name)), "{name}: {problems:?}");
        }
    }

    #[test]
    fn relative_paths_are_relative_to_the_file() {
        let text = "data_dir = \"data\"\nunsafe_plaintext = true\n\
            [queue]\nexecutable = \"bin/nats\"\nca_file = \"ca\"\ncredentials_file = \"/abs/creds\"\n\
            [tier2]\nurl = \"gs://b\"\nca_file = \"t2ca\"\nservice_account_file = \"keys/sa.json\"\n";
        let mut config = Config::parse(text, &[]).unwrap();
        config.resolve(Path::new("/etc/klio"));
        let (queue, tier2) = (&config.queue, config.tier2.as_ref().unwrap());
        let path = |text: &str| Some(PathBuf::from(text));
        assert_eq!(config.data_dir, Path::new("/etc/klio/data"));
        assert_eq!(queue.executable, path("/etc/klio/bin/nats"));
        assert_eq!(queue.ca_file, path("/etc/klio/ca"));
        assert_eq!(queue.credentials_file, path("/abs/creds"));
        assert_eq!(tier2.ca_file, path("/etc/klio/t2ca"));
        assert_eq!(tier2.service_account_file, path("/etc/klio/keys/sa.json"));
    }

    #[test]
    fn the_environment_wins_over_the_file() {
        let environment = env(&[
            ("KLIO_DATA_DIR", "/e"),
            ("KLIO_WAL__SEAL_WORKERS", "5"),
            ("KLIO_TELEMETRY__SERVICE_NAME", "other"),
            ("KLIO_CONFIG", "ignored"),
            ("KLIO_POSTGRES__DSN", "of klio in the same shell"),
            ("KLIO_CLUSTER", "of klio in the same shell"),
            ("OTHER", "x"),
        ]);
        let config = Config::parse(MINIMAL, &environment).unwrap();
        assert_eq!(config.data_dir, Path::new("/e"));
        assert_eq!(config.wal.seal_workers, 5);
        assert_eq!(config.telemetry.overrides()["OTEL_SERVICE_NAME"], "other");
        assert!(Config::parse(MINIMAL, &env(&[("KLIO_WAL__COLOUR", "1")])).is_err());
    }
}
