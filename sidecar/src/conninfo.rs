//! How to reach PostgreSQL: libpq connection strings, `PG*` variables and password files.
//!
//! Pure: text and an environment lookup in, [`ConnInfo`] out. The only files read are the password
//! file (by [`ConnInfo::password_for`], when a connection is made, so a rotated password is seen), a
//! service file where a service is named and, through [`os_user`], the system's list of users.
//! Precedence: connection string, then environment, then default; an empty value is "not given".
//! A keyword that libpq knows and Klio cannot honour is refused by name, never ignored.
//! A password never appears in `Debug`, `Display` or an error
//! (<https://www.postgresql.org/docs/current/libpq-connect.html>).

mod auth;
mod build;
mod host;
mod keyword;
mod passfile;
mod password;
mod service;
mod show;
#[cfg(test)]
mod tests;
mod text;
mod written;

use std::{
    collections::BTreeSet,
    path::PathBuf,
    sync::{Mutex, PoisonError},
    time::Duration,
};

pub use auth::RequireAuth;
pub use build::os_user;
pub use host::{Host, HostTarget};
pub use passfile::{PassFile, PassFileWarning};
pub use password::Password;
pub use written::Written;

/// Environment lookup: the value of a variable, if set.
pub type Env<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Where PostgreSQL is, as whom to log in, and how to protect the connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnInfo {
    /// Candidates, in the order to try them; at least one.
    pub hosts: Vec<Host>,
    /// `load_balance_hosts=random`: try the candidates in random order.
    pub shuffle_hosts: bool,
    /// The role.
    pub user: String,
    /// The password given in the string or by `PGPASSWORD`; the password file comes after it.
    pub password: Option<Password>,
    /// The password file: `passfile`, `PGPASSFILE` or `~/.pgpass`.
    pub passfile: Option<PathBuf>,
    /// The database of SQL connections; `None` means the one named like the user. A physical
    /// replication connection has none.
    pub dbname: Option<String>,
    /// What `pg_stat_replication.application_name` and `synchronous_standby_names` see.
    pub application_name: String,
    /// Server settings for the session, as in `-c name=value`.
    pub options: Option<String>,
    /// For each address tried, from the first packet to "ready". `None` (given as 0) waits as long
    /// as the operating system does.
    pub connect_timeout: Option<Duration>,
    /// Encryption and who is trusted.
    pub tls: TlsSettings,
    /// Binding of SCRAM to the TLS channel.
    pub channel_binding: ChannelBinding,
    /// Which ways of logging in are acceptable.
    pub require_auth: RequireAuth,
    /// Which of several hosts will do.
    pub target_session_attrs: TargetSessionAttrs,
    /// TCP keepalives; `None` when switched off.
    pub keepalive: Option<Keepalive>,
    /// `tcp_user_timeout`; `None` leaves it to the operating system.
    pub tcp_user_timeout: Option<Duration>,
}

/// `sslmode`, with libpq's meanings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SslMode {
    /// Never encrypt.
    Disable,
    /// Plain first; encrypted when the server refuses plain.
    Allow,
    /// Encrypted when the server can; else plain. The default.
    Prefer,
    /// Encrypted, or no connection. The server is not verified, unless a root certificate is there.
    Require,
    /// The server's certificate must come from a trusted authority.
    VerifyCa,
    /// And it must be for the host connected to.
    VerifyFull,
}

/// Whom to trust.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RootCert {
    /// Nobody is known; `verify-ca` and `verify-full` fail.
    None,
    /// `sslrootcert=system`: the operating system's authorities.
    System,
    /// PEM certificates in this file, which must exist.
    File(PathBuf),
    /// libpq's `~/.postgresql/root.crt`, which counts only if it exists.
    DefaultFile(PathBuf),
}

/// A file to present, with libpq's default places.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientFile {
    /// Where it is.
    pub path: PathBuf,
    /// Whether someone asked for it, so that its absence is an error.
    pub explicit: bool,
}

/// The `ssl*` keywords. Files are read at each connection, so a renewed certificate is seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsSettings {
    /// How much protection.
    pub mode: SslMode,
    /// Whom to trust.
    pub root: RootCert,
    /// Our certificate chain, PEM.
    pub cert: Option<ClientFile>,
    /// Our private key, PEM, unencrypted.
    pub key: Option<ClientFile>,
    /// `sslnegotiation=direct`: TLS from the first byte, as PostgreSQL 17 can.
    pub direct: bool,
    /// Whether to name the host in the TLS handshake.
    pub sni: bool,
    /// TLS 1.3 only (`ssl_min_protocol_version=TLSv1.3`). TLS 1.2 is the floor in any case.
    pub tls13_only: bool,
    /// TLS 1.2 only (`ssl_max_protocol_version=TLSv1.2`).
    pub tls12_only: bool,
}

/// `channel_binding`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChannelBinding {
    /// Do not use it.
    Disable,
    /// Use it when the server offers it. The default.
    Prefer,
    /// No connection without it.
    Require,
}

/// `target_session_attrs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TargetSessionAttrs {
    /// The first that answers. The default.
    Any,
    /// One that accepts writes by default.
    ReadWrite,
    /// One that does not.
    ReadOnly,
    /// One that is not in recovery.
    Primary,
    /// One that is.
    Standby,
    /// A standby, or else any.
    PreferStandby,
}

/// TCP keepalives; `None` leaves a value to the operating system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Keepalive {
    /// Silence before the first probe.
    pub idle: Option<Duration>,
    /// Between probes.
    pub interval: Option<Duration>,
    /// Lost probes that end the connection.
    pub count: Option<u32>,
}

/// Why a connection string or a `PG*` variable is not usable. Holds no secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConnInfoError {
    /// The text is not of either form.
    #[error("read connection string, character {at}: {problem}")]
    Syntax {
        /// Characters before the problem.
        at: usize,
        /// Expected and found.
        problem: String,
    },
    /// No such keyword.
    #[error("read connection string: unknown keyword {0:?}")]
    UnknownKeyword(String),
    /// libpq has it, Klio does not.
    #[error("{place}: {keyword} is not supported: {why}")]
    Unsupported {
        /// Connection string or variable.
        place: String,
        /// The keyword.
        keyword: &'static str,
        /// And what to do instead.
        why: &'static str,
    },
    /// A value outside its range.
    #[error("{place}: {keyword}: expected {expected}, found {found:?}")]
    Value {
        /// Connection string or variable.
        place: String,
        /// The keyword.
        keyword: &'static str,
        /// What would do.
        expected: String,
        /// What was there.
        found: String,
    },
    /// Values that contradict each other.
    #[error("read connection string: {0}")]
    Conflict(String),
    /// A service that cannot be found or read.
    #[error("{0}")]
    Service(String),
    /// Nothing says who we are.
    #[error(
        "find the user name: none given and the operating system names none\nhint: add user=NAME or set PGUSER"
    )]
    NoUser,
}

/// What was said of password files already: a daemon connects every few seconds, with the same file.
static WARNED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

impl ConnInfo {
    /// Reads `text` (`host=db user=klio …` or `postgresql://klio@db/…`; may be empty) over `env`.
    ///
    /// # Errors
    /// Bad syntax, an unknown or unsupported keyword, a value out of range.
    pub fn parse(text: &str, env: Env<'_>) -> Result<ConnInfo, ConnInfoError> {
        Self::parse_as(text, env, os_user().as_deref())
    }

    /// As [`ConnInfo::parse`], with the operating system's user given instead of looked up.
    ///
    /// # Errors
    /// As [`ConnInfo::parse`].
    pub fn parse_as(
        text: &str,
        env: Env<'_>,
        os_user: Option<&str>,
    ) -> Result<ConnInfo, ConnInfoError> {
        build::build(text::tokenise(text)?, env, os_user)
    }

    /// The password for `host`: the one given, else the password file's. Reads the file each time.
    /// `database` is the name to look up: `replication` for a physical replication connection.
    /// A file that cannot be used is skipped, with one warning in the log for as long as it stays the same.
    pub fn password_for(&self, host: &Host, database: &str) -> Option<Password> {
        if let Some(password) = &self.password {
            return Some(password.clone());
        }
        let path = self.passfile.as_deref()?;
        match PassFile::load(path) {
            Ok(file) => {
                file?.lookup(&host.passfile_name(), host.port, database, &self.user).cloned()
            }
            Err(warning) => {
                let text = format!("{}: {warning}", path.display());
                let mut said = WARNED.lock().unwrap_or_else(PoisonError::into_inner);
                if said.insert(text) {
                    tracing::warn!(path = %path.display(), "password file ignored: {warning}");
                }
                None
            }
        }
    }

    /// The database that SQL connections open.
    pub fn sql_database(&self) -> &str {
        self.dbname.as_deref().unwrap_or(&self.user)
    }
}
