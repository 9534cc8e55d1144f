//! How to connect to PostgreSQL: libpq connection strings, `PG*` variables and password files.
//!
//! A [`ConnInfo`] is made from text and an environment lookup. The only files read are the password file (by
//! [`ConnInfo::password_for`], for each connection, so that a changed password is used), a service file if a service
//! is named and, through [`os_user`], the system's list of users. The connection string takes precedence over the
//! environment, and the environment over the default; an empty value counts as not given. A keyword that libpq knows
//! but Klio cannot honour is refused by name, never ignored. A password never appears in `Debug`, `Display` or an
//! error (<https://www.postgresql.org/docs/current/libpq-connect.html>).

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

/// Where PostgreSQL is, which user to log in as, and how to protect the connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnInfo {
    /// Candidates in the order in which they are tried; at least one.
    pub hosts: Vec<Host>,
    /// `load_balance_hosts=random`: try the candidates in random order.
    pub shuffle_hosts: bool,
    pub user: String,
    /// The password from the string or from `PGPASSWORD`, which takes precedence over the password file.
    pub password: Option<Password>,
    /// The password file: `passfile`, `PGPASSFILE` or `~/.pgpass`.
    pub passfile: Option<PathBuf>,
    /// The database of SQL connections; `None` for the one with the user's name. Physical replication connections
    /// have no database.
    pub dbname: Option<String>,
    /// The name in `pg_stat_replication.application_name`, which `synchronous_standby_names` refers to.
    pub application_name: String,
    /// Server settings for the session, such as `-c name=value`.
    pub options: Option<String>,
    /// Limit for each address, from the first packet until the session is ready. `None` (given as 0) waits as long as
    /// the operating system does.
    pub connect_timeout: Option<Duration>,
    /// Encryption, and which server certificates are trusted.
    pub tls: TlsSettings,
    /// Whether SCRAM is bound to the TLS channel.
    pub channel_binding: ChannelBinding,
    /// The accepted authentication methods.
    pub require_auth: RequireAuth,
    /// Which of several hosts is acceptable.
    pub target_session_attrs: TargetSessionAttrs,
    /// TCP keepalives; `None` if they are switched off.
    pub keepalive: Option<Keepalive>,
    /// `tcp_user_timeout`; `None` leaves it to the operating system.
    pub tcp_user_timeout: Option<Duration>,
}

/// `sslmode`, with libpq's meanings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SslMode {
    /// Never encrypt.
    Disable,
    /// First without encryption; encrypted if the server refuses that.
    Allow,
    /// Encrypted if the server supports it, otherwise not. The default.
    Prefer,
    /// Only encrypted. The server is not verified, unless there is a root certificate.
    Require,
    /// The server's certificate must come from a trusted authority.
    VerifyCa,
    /// The certificate must also be valid for the host name.
    VerifyFull,
}

/// Which certificate authorities are trusted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RootCert {
    /// None; `verify-ca` and `verify-full` fail.
    None,
    /// `sslrootcert=system`: those of the operating system.
    System,
    /// The PEM certificates in this file, which must exist.
    File(PathBuf),
    /// libpq's `~/.postgresql/root.crt`, if it exists.
    DefaultFile(PathBuf),
}

/// A certificate or key file of the client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientFile {
    pub path: PathBuf,
    /// Whether the user named the file, so that its absence is an error.
    pub explicit: bool,
}

/// The `ssl*` keywords. Files are read for each connection, so that a renewed certificate is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsSettings {
    pub mode: SslMode,
    pub root: RootCert,
    /// Our certificate chain, PEM.
    pub cert: Option<ClientFile>,
    /// Our private key, PEM, unencrypted.
    pub key: Option<ClientFile>,
    /// `sslnegotiation=direct`: TLS from the first byte, which PostgreSQL supports since 17.
    pub direct: bool,
    /// Whether the TLS handshake names the host (SNI).
    pub sni: bool,
    /// TLS 1.3 only (`ssl_min_protocol_version=TLSv1.3`). Versions below 1.2 are never used.
    pub tls13_only: bool,
    /// TLS 1.2 only (`ssl_max_protocol_version=TLSv1.2`).
    pub tls12_only: bool,
}

/// `channel_binding`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChannelBinding {
    /// Never.
    Disable,
    /// If the server offers it. The default.
    Prefer,
    /// Required.
    Require,
}

/// `target_session_attrs`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TargetSessionAttrs {
    /// The first host that answers. The default.
    Any,
    /// One that accepts writes by default.
    ReadWrite,
    /// One that does not accept writes by default.
    ReadOnly,
    /// One that is not in recovery.
    Primary,
    /// One that is in recovery.
    Standby,
    /// A standby if there is one, otherwise any.
    PreferStandby,
}

/// TCP keepalives; `None` leaves the value to the operating system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Keepalive {
    /// Idle time before the first probe.
    pub idle: Option<Duration>,
    /// Time between probes.
    pub interval: Option<Duration>,
    /// Number of lost probes after which the connection ends.
    pub count: Option<u32>,
}

/// Why a connection string or a `PG*` variable cannot be used. Contains no secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConnInfoError {
    /// The text is neither a keyword string nor a URI.
    #[error("read connection string, character {at}: {problem}")]
    Syntax {
        /// Number of characters before the problem.
        at: usize,
        problem: String,
    },
    /// libpq has no such keyword.
    #[error("read connection string: unknown keyword {0:?}")]
    UnknownKeyword(String),
    /// libpq knows this keyword, but Klio does not support it.
    #[error("{place}: {keyword} is not supported: {why}")]
    Unsupported {
        /// The connection string, a variable or a service.
        place: String,
        keyword: &'static str,
        /// The reason, and what to do instead.
        why: &'static str,
    },
    /// A value that is not allowed.
    #[error("{place}: {keyword}: expected {expected}, found {found:?}")]
    Value {
        /// The connection string, a variable or a service.
        place: String,
        keyword: &'static str,
        expected: String,
        found: String,
    },
    /// Values that contradict each other.
    #[error("read connection string: {0}")]
    Conflict(String),
    /// A service that cannot be found or read.
    #[error("{0}")]
    Service(String),
    /// No user name was given, and the operating system has none.
    #[error(
        "find the user name: none given and the operating system names none\nhint: add user=NAME or set PGUSER"
    )]
    NoUser,
}

/// Warnings that were logged already: a daemon connects every few seconds, with the same file.
static WARNED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

impl ConnInfo {
    /// Reads `text` (`host=db user=klio …` or `postgresql://klio@db/…`; may be empty), with values from `env` for
    /// what is not in it.
    ///
    /// # Errors
    /// Bad syntax, an unknown or unsupported keyword, a value that is not allowed, a service that cannot be read, no user.
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

    /// The password for `host`: the one that was given, or else that of the password file, which is read each time.
    /// `database` is the name to look up: `replication` for a physical replication connection. A file that cannot be
    /// used is skipped, with one warning in the log for as long as the problem stays the same.
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
