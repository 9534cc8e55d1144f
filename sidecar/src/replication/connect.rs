//! From a [`ConnInfo`] to a logged-in connection: hosts, addresses, TLS, login, server role.
//!
//! Hosts and their addresses are tried in order, as in libpq. One that cannot be reached, is starting up or has the
//! wrong role is skipped; one that refuses the login ends the search.

use super::{
    auth::{self, Login},
    error::{Error, ErrorKind},
    tls,
    transport::{TLS_READ_BYTES, Transport},
    wire::Wire,
};
use crate::conninfo::{ConnInfo, Host, HostTarget, SslMode, TargetSessionAttrs};
use bytes::BytesMut;
use rand::seq::SliceRandom;
use rustls::pki_types::ServerName;
use socket2::{SockRef, TcpKeepalive};
use std::{io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpStream, UnixStream},
};

const OP: &str = "connect to PostgreSQL";
/// The default of wal_receiver_timeout: a server that sends nothing for longer counts as dead.
pub(super) const DEFAULT_PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// `replication=true`.
    Replication,
    Sql,
}

#[derive(Debug, Clone)]
enum Endpoint {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

/// Whether to request TLS in one attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encryption {
    Never,
    IfOffered,
    Always,
}

/// Connects to the first suitable host; returns the connection and the host.
pub(super) async fn open(info: &ConnInfo, purpose: Purpose) -> Result<(Wire, Host), Error> {
    let mut hosts: Vec<&Host> = info.hosts.iter().collect();
    if info.shuffle_hosts {
        hosts.shuffle(&mut rand::rng());
    }
    match info.target_session_attrs {
        TargetSessionAttrs::PreferStandby => {
            match first_fitting(info, &hosts, TargetSessionAttrs::Standby, purpose).await {
                Err(e) if e.kind() == ErrorKind::Connect => {
                    first_fitting(info, &hosts, TargetSessionAttrs::Any, purpose).await
                }
                done => done,
            }
        }
        wanted => first_fitting(info, &hosts, wanted, purpose).await,
    }
}

async fn first_fitting(
    info: &ConnInfo,
    hosts: &[&Host],
    wanted: TargetSessionAttrs,
    purpose: Purpose,
) -> Result<(Wire, Host), Error> {
    let mut failures = Vec::new();
    for host in hosts {
        match one_host(info, host, wanted, purpose).await {
            Ok(wire) => return Ok((wire, (*host).clone())),
            Err(e) if passes_over(e.kind()) => failures.push(e),
            Err(e) => return Err(e),
        }
    }
    match (failures.pop(), failures.is_empty()) {
        (Some(only), true) => Err(only),
        (last, _) => {
            let kind = last.as_ref().map_or(ErrorKind::Connect, Error::kind);
            failures.extend(last);
            let each: Vec<_> = failures.iter().map(ToString::to_string).collect();
            Err(Error::new(kind, "connect to any of the hosts", each.join("; ")))
        }
    }
}

fn passes_over(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::Connect | ErrorKind::Io | ErrorKind::Tls)
}

async fn one_host(
    info: &ConnInfo,
    host: &Host,
    wanted: TargetSessionAttrs,
    purpose: Purpose,
) -> Result<Wire, Error> {
    let mut last = None;
    let endpoints = resolve(info, host).await.map_err(|e| e.at(host))?;
    for endpoint in endpoints {
        match one_endpoint(info, host, &endpoint, purpose).await.map_err(|e| e.at(host)) {
            Ok(wire) => {
                return match role_mismatch(&wire, wanted) {
                    None => Ok(wire),
                    Some(message) => {
                        wire.close().await;
                        Err(Error::new(ErrorKind::Connect, OP, message).at(host))
                    }
                };
            }
            Err(e) if passes_over(e.kind()) => last = Some(e),
            Err(e) => return Err(e),
        }
    }
    let nothing = || Error::new(ErrorKind::Connect, OP, "expected an address, found none").at(host);
    Err(last.unwrap_or_else(nothing))
}

async fn resolve(info: &ConnInfo, host: &Host) -> Result<Vec<Endpoint>, Error> {
    let (name, addr) = match (&host.target, host.socket_path()) {
        (HostTarget::Tcp { name, addr }, _) => (name, addr),
        (HostTarget::Unix(_), path) => return Ok(path.into_iter().map(Endpoint::Unix).collect()),
    };
    if let Some(addr) = addr {
        return Ok(vec![Endpoint::Tcp(SocketAddr::new(*addr, host.port))]);
    }
    let lookup = limited(info.connect_timeout, tokio::net::lookup_host((&**name, host.port)));
    let found = lookup.await.map_err(|e| Error::caused(ErrorKind::Connect, OP, e))?;
    Ok(found.map(Endpoint::Tcp).collect())
}

async fn limited<T>(
    limit: Option<Duration>,
    work: impl Future<Output = io::Result<T>>,
) -> io::Result<T> {
    let Some(limit) = limit else { return work.await };
    tokio::time::timeout(limit, work).await.unwrap_or_else(|_| {
        let message = format!("expected an answer within {} s, found none", limit.as_secs());
        Err(io::Error::new(io::ErrorKind::TimedOut, message))
    })
}

/// The attempts to make for an `sslmode`, in order.
const fn plan(mode: SslMode) -> &'static [Encryption] {
    use Encryption::{Always, IfOffered, Never};
    match mode {
        SslMode::Disable => &[Never],
        SslMode::Allow => &[Never, Always],
        SslMode::Prefer => &[IfOffered, Never],
        SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => &[Always],
    }
}

async fn one_endpoint(
    info: &ConnInfo,
    host: &Host,
    endpoint: &Endpoint,
    purpose: Purpose,
) -> Result<Wire, Error> {
    // As in libpq, a unix socket is never encrypted.
    let plan = match endpoint {
        Endpoint::Unix(_) => &[Encryption::Never],
        Endpoint::Tcp(_) => plan(info.tls.mode),
    };
    let mut last = None;
    for encryption in plan {
        let attempt = attempt(info, host, endpoint, *encryption, purpose);
        let done = match info.connect_timeout {
            None => attempt.await,
            Some(limit) => tokio::time::timeout(limit, attempt).await.unwrap_or_else(|_| {
                let message = format!("expected a login within {} s, found none", limit.as_secs());
                Err(Error::new(ErrorKind::Connect, OP, message))
            }),
        };
        match done {
            Ok(wire) => return Ok(wire),
            // pg_hba.conf has no line for this kind of connection; it may have one for the other.
            Err(e) if e.kind() == ErrorKind::Tls || is_no_such_line(&e) => last = last.or(Some(e)),
            Err(e) => return Err(e),
        }
    }
    Err(last.unwrap_or_else(|| {
        Error::new(ErrorKind::Connect, OP, "expected a way to connect, found none")
    }))
}

fn is_no_such_line(e: &Error) -> bool {
    e.server().is_some_and(|s| s.sqlstate == "28000")
}

async fn attempt(
    info: &ConnInfo,
    host: &Host,
    endpoint: &Endpoint,
    encryption: Encryption,
    purpose: Purpose,
) -> Result<Wire, Error> {
    let refused = |e| Error::caused(ErrorKind::Connect, OP, e);
    let (transport, end_point) = match endpoint {
        Endpoint::Unix(path) => {
            (Transport::Unix(UnixStream::connect(path).await.map_err(refused)?), None)
        }
        Endpoint::Tcp(addr) => {
            let stream = TcpStream::connect(addr).await.map_err(refused)?;
            tune(&stream, info).map_err(refused)?;
            negotiate(info, host, stream, encryption).await?
        }
    };
    let database = match purpose {
        // The name that pg_hba.conf and the password file use.
        Purpose::Replication => "replication",
        Purpose::Sql => info.sql_database(),
    };
    let login = Login {
        user: &info.user,
        password: password(info, host, database).await?,
        channel_binding: info.channel_binding,
        require_auth: &info.require_auth,
        end_point,
    };
    let mut parameters = vec![
        ("user", info.user.as_str()),
        ("database", database),
        ("application_name", info.application_name.as_str()),
        ("client_encoding", "UTF8"),
    ];
    if purpose == Purpose::Replication {
        parameters.push(("replication", "true"));
    }
    if let Some(options) = &info.options {
        parameters.push(("options", options));
    }
    let mut wire = Wire::new(transport, DEFAULT_PATIENCE);
    auth::log_in(&mut wire, &parameters, &login).await?;
    Ok(wire)
}

async fn password(
    info: &ConnInfo,
    host: &Host,
    database: &str,
) -> Result<Option<crate::conninfo::Password>, Error> {
    let (info, host, database) = (info.clone(), host.clone(), database.to_owned());
    blocking("read the password file", move || Ok(info.password_for(&host, &database))).await
}

async fn blocking<T: Send + 'static>(
    op: &str,
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(e) => Err(Error::caused(ErrorKind::Io, op, e)),
    }
}

fn tune(stream: &TcpStream, info: &ConnInfo) -> io::Result<()> {
    // Status updates are small, and commits wait for them.
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    if let Some(limit) = info.tcp_user_timeout {
        socket.set_tcp_user_timeout(Some(limit))?;
    }
    let Some(wanted) = info.keepalive else { return Ok(()) };
    let mut keepalive = TcpKeepalive::new();
    if let Some(idle) = wanted.idle {
        keepalive = keepalive.with_time(idle);
    }
    if let Some(interval) = wanted.interval {
        keepalive = keepalive.with_interval(interval);
    }
    if let Some(count) = wanted.count {
        keepalive = keepalive.with_retries(count);
    }
    socket.set_tcp_keepalive(&keepalive)
}

type Negotiated = (Transport, Option<Vec<u8>>);

/// Requests TLS if wanted. Exactly one byte is read unencrypted, so that data injected by an attacker after it cannot
/// be taken for the server's (CVE-2021-23222).
async fn negotiate(
    info: &ConnInfo,
    host: &Host,
    mut stream: TcpStream,
    encryption: Encryption,
) -> Result<Negotiated, Error> {
    if encryption == Encryption::Never {
        return Ok((Transport::Tcp(stream), None));
    }
    if info.tls.direct {
        return handshake(info, host, stream).await;
    }
    let broken = |e| Error::caused(ErrorKind::Connect, "ask for TLS", e);
    let mut request = BytesMut::new();
    postgres_protocol::message::frontend::ssl_request(&mut request);
    stream.write_all(&request).await.map_err(broken)?;
    match stream.read_u8().await.map_err(broken)? {
        b'S' => handshake(info, host, stream).await,
        b'N' if encryption == Encryption::IfOffered => Ok((Transport::Tcp(stream), None)),
        b'N' => Err(Error::new(
            ErrorKind::Tls,
            "ask for TLS",
            format!("sslmode={}: expected TLS, found a server without it", info.tls.mode),
        )),
        // An error sent before TLS is not authenticated, so its text is not shown (CVE-2024-10977).
        byte => Err(Error::new(
            ErrorKind::Connect,
            "ask for TLS",
            format!("expected 'S' or 'N', found {:?}", char::from(byte)),
        )),
    }
}

async fn handshake(info: &ConnInfo, host: &Host, stream: TcpStream) -> Result<Negotiated, Error> {
    const OP: &str = "negotiate TLS";
    let settings = info.tls.clone();
    let config = blocking("prepare TLS", move || tls::client_config(&settings)).await?;
    let peer = stream.peer_addr().map_err(|e| Error::caused(ErrorKind::Connect, OP, e))?;
    let name = server_name(info, host, peer)?;
    let stream = BufReader::with_capacity(TLS_READ_BYTES, stream);
    let connected = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await;
    let stream = connected.map_err(|e| Error::caused(ErrorKind::Tls, OP, e))?;
    let cert = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let end_point = cert.and_then(tls::end_point);
    Ok((Transport::Tls(Box::new(stream)), end_point))
}

/// The name to verify: the host's name, or, when names are not verified, any that can be parsed.
fn server_name(
    info: &ConnInfo,
    host: &Host,
    peer: SocketAddr,
) -> Result<ServerName<'static>, Error> {
    let name = match &host.target {
        HostTarget::Tcp { name, .. } => name.clone(),
        HostTarget::Unix(_) => peer.ip().to_string(),
    };
    match ServerName::try_from(name.clone()) {
        Ok(name) => Ok(name),
        Err(_) if info.tls.mode != SslMode::VerifyFull => {
            Ok(ServerName::IpAddress(peer.ip().into()))
        }
        Err(_) => Err(Error::new(
            ErrorKind::Tls,
            "negotiate TLS",
            format!("expected a host name that a certificate can hold, found {name:?}"),
        )),
    }
}

/// How the server's role differs from the wanted one; `None` if it fits. Servers report both settings since version
/// 14.
fn role_mismatch(wire: &Wire, wanted: TargetSessionAttrs) -> Option<String> {
    let on = |name: &str| wire.parameter(name) == Some("on");
    let standby = on("in_hot_standby");
    let read_only = standby || on("default_transaction_read_only");
    let (fits, expected) = match wanted {
        TargetSessionAttrs::Any | TargetSessionAttrs::PreferStandby => (true, ""),
        TargetSessionAttrs::ReadWrite => (!read_only, "a server that accepts writes"),
        TargetSessionAttrs::ReadOnly => (read_only, "a read-only server"),
        TargetSessionAttrs::Primary => (!standby, "a primary"),
        TargetSessionAttrs::Standby => (standby, "a standby"),
    };
    let found = match (standby, read_only) {
        (true, _) => "a standby",
        (false, true) => "a read-only primary",
        (false, false) => "a primary",
    };
    (!fits).then(|| format!("expected {expected}, found {found}"))
}
