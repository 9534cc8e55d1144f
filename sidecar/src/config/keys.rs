//! Every setting of `klio.toml` in one table: how it is called, and what it does.
//!
//! The environment is read through this table, and `klio help config` prints it, so a setting that is
//! missing here cannot be set from the environment; a test compares it with the struct.

/// How a value from the environment becomes a TOML value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Taken as it is.
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
    /// What holds when it is not set; empty when there is no default.
    pub default: &'static str,
    /// One sentence.
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

/// The table.
pub const KEYS: &[Key] = &[
    text("cluster", "", "name of this PostgreSQL cluster on the server"),
    text(
        "generation",
        "",
        "one of the histories of the cluster by its number, for reading; empty: the current one",
    ),
    text("server.address", "", "https://host:port of klio-server"),
    text("server.ca", "ca.crt", "authority of the server's certificate; relative to the file"),
    text("server.cert", "client.crt", "client certificate; read anew on each connection"),
    text("server.key", "client.key", "its private key"),
    flag("server.unsafe_plaintext", "false", "no TLS at all: for tests on one machine only"),
    text("server.connect_timeout", "10s", "how long one attempt to connect may take"),
    text("postgres.dsn", "", "libpq connection string or URL; PG* variables and .pgpass apply too"),
    text("postgres.slot", "klio", "physical replication slot"),
    flag("postgres.create_slot", "true", "create the slot when it is missing"),
    text("postgres.data_directory", "", "where the data directory is; empty: PostgreSQL is asked"),
    text("stream.on_gap", "record", "when PostgreSQL has removed WAL: record the gap, or stop"),
    text("stream.batch_size", "512KiB", "most WAL in one message; memory grows with it"),
    text("stream.status_interval", "10s", "how often PostgreSQL and server hear of us when idle"),
    text("stream.retry_min", "100ms", "first pause after a lost connection"),
    text("stream.retry_max", "15s", "longest pause between attempts"),
    text("stream.stop_timeout", "10s", "how long a stop waits for the last acknowledgement"),
    text(
        "restore.from",
        "",
        "bucket to restore from instead of the server: s3://, gs://, az://, file:///",
    ),
    text("restore.identity", "", "age identity file, where the bucket is encrypted"),
    text("restore.read_ahead", "512MiB", "most WAL fetched before PostgreSQL asks; 0B: no agent"),
    text("restore.spool_dir", "", "where that waits; default: .klio beside %p, in pg_wal"),
    text(
        "restore.agent_idle",
        "60s",
        "the read-ahead agent ends when nothing was asked for so long",
    ),
    text("tier2.url", "", "of a shell that has the server's settings; restore.from decides"),
    text("tier2.endpoint", "", "with restore.from: address of an S3-compatible store"),
    text("tier2.region", "", "with restore.from: S3 region"),
    flag("tier2.path_style", "", "bucket in the path; default: true with an endpoint"),
    text("tier2.ca_file", "", "authorities to trust beside the system's"),
    text("tier2.access_key_id", "", "S3 access key; without: ambient credentials"),
    text("tier2.secret_access_key", "", "S3 secret"),
    text("tier2.session_token", "", "S3 session token"),
    text("tier2.service_account_file", "", "Google Cloud service account"),
    text("tier2.account", "", "Azure storage account"),
    text("tier2.account_key", "", "Azure access key"),
    text(
        "backup.schedule",
        "",
        "when klio stream takes backups, for example 0 2 * * * Europe/Berlin",
    ),
    text("backup.jitter", "0s", "a scheduled backup begins up to this much later, by chance"),
    text("backup.retry_min", "60s", "first pause after a scheduled backup failed"),
    text("backup.retry_max", "1h", "longest pause"),
    text(
        "backup.checkpoint",
        "auto",
        "fast, spread, or auto: fast when typed, spread when scheduled",
    ),
    text("backup.on_bad_pages", "record", "pages with wrong checksums: record them, or fail"),
    text("backup.wal_timeout", "60s", "how long WAL it needs may make no progress to the server"),
    flag("backup.verify", "true", "have the server verify each backup when it is committed"),
    text("backup.verify_read_percent", "1", "share of its data that is then read back, 0 to 100"),
    flag("backup.maintenance", "true", "have the server apply the retention policy afterwards"),
    text("drill.dir", "", "where klio drill restores; default: the temporary directory"),
    text("drill.run_as", "postgres", "as root: the user who runs PostgreSQL, which refuses root"),
    text("drill.bin_dir", "", "PostgreSQL's programs; default: pg_config, PATH, the usual places"),
    text("drill.user", "postgres", "role for the checks: a superuser of the cluster"),
    text("admin.listen", "", "address:port for /livez, /readyz and /metrics; empty: none"),
    flag("telemetry.enabled", "true", "false turns OpenTelemetry off, whatever OTEL_* says"),
    text("telemetry.service_name", "", "service.name; else OTEL_SERVICE_NAME, else klio"),
    text("telemetry.trace_endpoint", "", "OTLP endpoint for traces; over OTEL_*"),
    flag("telemetry.export_logs", "false", "send logs over OTLP too"),
    text("telemetry.logs_endpoint", "", "OTLP endpoint for logs"),
    text("telemetry.log_level", "", "log filter; else RUST_LOG, else info"),
    text("telemetry.log_format", "", "text or json; else KLIO_LOG_FORMAT, else text"),
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
