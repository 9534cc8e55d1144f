//! Every setting of `klio.toml` in one table: its name, its default and what it does.
//!
//! The environment is read through this table, and `klio help config` prints it. A setting that is missing here could
//! not be set from the environment, so a test compares the table with the struct.

/// How a value from the environment or an option becomes a TOML value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Text, taken as it is.
    Text,
    /// `true` or `false`.
    Flag,
}

/// One setting.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    /// `section.name`, or `name` at the top.
    pub path: &'static str,
    /// How to read it from the environment.
    pub kind: Kind,
    /// The value if it is not set; empty if there is no default.
    pub default: &'static str,
    /// One sentence about what it does.
    pub doc: &'static str,
}

impl Key {
    /// The environment variable: `server.address` is `KLIO_SERVER__ADDRESS`.
    pub fn variable(&self) -> String {
        format!("KLIO_{}", self.path.replace('.', "__").to_uppercase())
    }
}

const fn text(path: &'static str, default: &'static str, doc: &'static str) -> Key {
    Key { path, kind: Kind::Text, default, doc }
}

const fn flag(path: &'static str, default: &'static str, doc: &'static str) -> Key {
    Key { path, kind: Kind::Flag, default, doc }
}

/// All settings.
pub const KEYS: &[Key] = &[
    text("cluster", "", "name of this PostgreSQL cluster on the server"),
    text(
        "generation",
        "",
        "generation (history) of the cluster to read, by its number; empty: the current one; not used where the cluster's name has a number (NAME@2)",
    ),
    text("server.address", "", "https://host:port of klio-server"),
    text(
        "server.ca",
        "ca.crt",
        "PEM file with the authority that issued the server's certificate; a relative path starts at the configuration file's directory",
    ),
    text("server.cert", "client.crt", "client certificate, PEM; read again for each connection"),
    text("server.key", "client.key", "private key of the client certificate"),
    flag("server.unsafe_plaintext", "false", "do not use TLS; for tests on one machine only"),
    text("server.connect_timeout", "10s", "timeout of one attempt to connect"),
    text("postgres.dsn", "", "libpq connection string or URL; PG* variables and .pgpass apply too"),
    text("postgres.slot", "klio", "physical replication slot"),
    flag("postgres.create_slot", "true", "create the slot when it is missing"),
    text("postgres.data_directory", "", "data directory of PostgreSQL; empty: ask PostgreSQL"),
    text("stream.on_gap", "record", "when PostgreSQL has removed WAL: record the gap, or stop"),
    text(
        "stream.batch_size",
        "512KiB",
        "largest amount of WAL in one message; memory use grows with it",
    ),
    text(
        "stream.status_interval",
        "10s",
        "interval of status messages to PostgreSQL and the server when idle",
    ),
    text("stream.retry_min", "100ms", "first pause after a lost connection"),
    text("stream.retry_max", "15s", "longest pause between attempts"),
    text(
        "stream.stop_timeout",
        "10s",
        "how long to wait for the last acknowledgement when stopping",
    ),
    text(
        "restore.from",
        "",
        "bucket to restore from instead of the server: s3://, gs://, az://, file:///",
    ),
    text("restore.identity", "", "file with the age identity, if the bucket is encrypted"),
    text(
        "restore.read_ahead",
        "512MiB",
        "most WAL fetched before PostgreSQL asks for it; 0B: no read-ahead agent",
    ),
    text(
        "restore.spool_dir",
        "",
        "directory for WAL that was read ahead; default: .klio beside %p, in pg_wal",
    ),
    text(
        "restore.agent_idle",
        "60s",
        "the read-ahead agent exits when PostgreSQL asked for nothing during this time",
    ),
    text("tier2.url", "", "ignored by klio; use restore.from"),
    text("tier2.endpoint", "", "with restore.from: address of an S3-compatible store"),
    text("tier2.region", "", "with restore.from: S3 region"),
    flag("tier2.path_style", "", "bucket in the path; default: true with an endpoint"),
    text("tier2.ca_file", "", "CA certificates to trust in addition to the system's"),
    text("tier2.access_key_id", "", "S3 access key; empty: credentials of the environment"),
    text("tier2.secret_access_key", "", "S3 secret"),
    text("tier2.session_token", "", "S3 session token"),
    text("tier2.service_account_file", "", "Google Cloud service account"),
    text("tier2.account", "", "Azure storage account"),
    text("tier2.account_key", "", "Azure access key"),
    text(
        "backup.schedule",
        "",
        "schedule of the backups that klio stream takes, for example 0 2 * * * Europe/Berlin",
    ),
    text("backup.jitter", "0s", "random delay of a scheduled backup, at most"),
    text("backup.retry_min", "60s", "first pause after a scheduled backup failed"),
    text("backup.retry_max", "1h", "longest pause between attempts of a scheduled backup"),
    text(
        "backup.checkpoint",
        "auto",
        "fast, spread, or auto: fast when typed, spread when scheduled",
    ),
    text("backup.on_bad_pages", "record", "on pages with wrong checksums: record them, or fail"),
    text(
        "backup.wal_timeout",
        "60s",
        "how long to wait for WAL that the backup needs while none of it arrives at the server",
    ),
    flag("backup.verify", "true", "have the server verify each backup when it is committed"),
    text(
        "backup.verify_read_percent",
        "1",
        "percentage of its data that is read and checked then, 0 to 100",
    ),
    flag("backup.maintenance", "true", "have the server apply the retention policy afterwards"),
    text(
        "drill.dir",
        "",
        "directory in which klio drill restores; default: the system's temporary directory",
    ),
    text("drill.run_as", "postgres", "user to run PostgreSQL as when klio runs as root"),
    text(
        "drill.bin_dir",
        "",
        "directory of PostgreSQL's programs; default: found by pg_config, PATH or in the usual places",
    ),
    text("drill.user", "postgres", "superuser role for the checks"),
    text("admin.listen", "", "address:port for /livez, /readyz and /metrics; empty: do not listen"),
    flag("telemetry.enabled", "true", "false turns OpenTelemetry off, whatever OTEL_* says"),
    text("telemetry.service_name", "", "service.name; default: OTEL_SERVICE_NAME, else klio"),
    text("telemetry.trace_endpoint", "", "OTLP endpoint for traces; takes precedence over OTEL_*"),
    flag("telemetry.export_logs", "false", "send logs over OTLP too"),
    text("telemetry.logs_endpoint", "", "OTLP endpoint for logs"),
    text("telemetry.log_level", "", "log filter; default: RUST_LOG, else info"),
    text("telemetry.log_format", "", "text or json; default: KLIO_LOG_FORMAT, else text"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_spelled_with_double_underscores() {
        let names: Vec<String> = KEYS.iter().map(Key::variable).collect();
        assert!(names.contains(&"KLIO_CLUSTER".into()));
        assert!(names.contains(&"KLIO_SERVER__UNSAFE_PLAINTEXT".into()));
    }
}
