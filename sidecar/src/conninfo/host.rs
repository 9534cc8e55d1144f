//! One server to try: a directory of unix sockets, or a host name with an optional fixed address.

use std::{fmt, net::IpAddr, path::PathBuf};

/// Directories of unix sockets that are tried if no host is given: Debian's, then PostgreSQL's default.
pub(super) const DEFAULT_SOCKET_DIRS: [&str; 2] = ["/var/run/postgresql", "/tmp"];

/// One place to connect to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    pub target: HostTarget,
    /// TCP port, or the number in the socket's file name.
    pub port: u16,
}

/// How to reach a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostTarget {
    /// The socket `DIR/.s.PGSQL.PORT`.
    Unix(PathBuf),
    /// A host name or address.
    Tcp {
        /// The name that the server's certificate and the password file are checked against.
        name: String,
        /// `hostaddr`: the address to connect to, instead of resolving `name`.
        addr: Option<IpAddr>,
    },
}

impl Host {
    /// The host's name in the password file: `localhost` for a default socket directory.
    pub fn passfile_name(&self) -> String {
        match &self.target {
            HostTarget::Unix(dir) => {
                let dir = dir.to_string_lossy();
                let default = DEFAULT_SOCKET_DIRS.contains(&dir.as_ref());
                if default { "localhost".into() } else { dir.into_owned() }
            }
            HostTarget::Tcp { name, .. } => name.clone(),
        }
    }

    /// The path of the socket; `None` for TCP.
    pub fn socket_path(&self) -> Option<PathBuf> {
        match &self.target {
            HostTarget::Unix(dir) => Some(dir.join(format!(".s.PGSQL.{}", self.port))),
            HostTarget::Tcp { .. } => None,
        }
    }
}

/// The server as people write it: `db1:5432`, `[::1]:5432`, `/var/run/postgresql/.s.PGSQL.5432`.
impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.target {
            HostTarget::Unix(dir) => write!(f, "{}/.s.PGSQL.{}", dir.display(), self.port),
            HostTarget::Tcp { name, addr } => {
                let colon = name.contains(':');
                let (open, close) = if colon { ("[", "]") } else { ("", "") };
                write!(f, "{open}{name}{close}:{}", self.port)?;
                match addr {
                    Some(addr) if addr.to_string() != *name => write!(f, " ({addr})"),
                    _ => Ok(()),
                }
            }
        }
    }
}
