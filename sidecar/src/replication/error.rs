//! Errors of a replication connection, classified by what a caller does about them.
//!
//! PostgreSQL translates its messages (`lc_messages`). So kinds are derived from the SQLSTATE and from the name of
//! the C function that raised the error, which are never translated; English text is only a fallback. Errors contain
//! no passwords, only what servers sent and what was expected.

use crate::error::Failure;
use std::fmt;

/// What a caller may do differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// Unreachable, starting up, shutting down, or no host with the wanted role: try again later.
    Connect,
    /// Certificates or the TLS handshake.
    Tls,
    /// The login was refused, or `pg_hba.conf` has no line for it.
    Auth,
    /// The login succeeded, but the role lacks a permission.
    Permission,
    /// The requested WAL was removed, which is a gap. Never skip it silently (P2).
    WalRemoved,
    /// Another connection streams from the slot.
    SlotInUse,
    SlotMissing,
    SlotExists,
    /// The server has less WAL than we do: an old primary came back, or a standby lags.
    StartAheadOfServer,
    /// The server's history does not contain that timeline, or not up to that position.
    TimelineMissing,
    /// The server violates the protocol.
    Protocol,
    /// The connection broke or the server sent nothing for too long: connect again.
    Io,
    /// Any other error from the server; see [`Error::server`].
    Server,
}

/// A failed operation on a replication connection.
#[derive(Debug, thiserror::Error)]
#[error("{op}: {message}")]
pub struct Error {
    kind: ErrorKind,
    op: String,
    message: String,
    server: Option<Box<ServerError>>,
    #[source]
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// An ErrorResponse (<https://www.postgresql.org/docs/current/protocol-error-fields.html>).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ServerError {
    /// `ERROR`, `FATAL` or `PANIC`, not translated.
    pub severity: String,
    /// Five characters, not translated.
    pub sqlstate: String,
    /// In the server's language.
    pub message: String,
    pub detail: Option<String>,
    /// The server's own advice.
    pub hint: Option<String>,
    /// Name of the C function that raised the error.
    pub routine: String,
}

impl Error {
    pub(super) fn new(kind: ErrorKind, op: impl Into<String>, message: impl Into<String>) -> Self {
        Self { kind, op: op.into(), message: message.into(), server: None, source: None }
    }

    pub(super) fn protocol(op: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Protocol, op, message)
    }

    /// Includes the source's text in the message, because the chain of sources is not always printed.
    pub(super) fn caused(
        kind: ErrorKind,
        op: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        let source = source.into();
        let message = source.to_string();
        Self { kind, op: op.into(), message, server: None, source: Some(source) }
    }

    pub(super) fn from_server(op: impl Into<String>, server: ServerError) -> Self {
        Self {
            kind: server.kind(),
            op: op.into(),
            message: server.to_string(),
            server: Some(Box::new(server)),
            source: None,
        }
    }

    /// Adds the place to the operation.
    pub(super) fn at(mut self, place: &dyn fmt::Display) -> Self {
        self.op = format!("{} ({place})", self.op);
        self
    }

    pub const fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The error that the server sent, if it comes from the server.
    pub fn server(&self) -> Option<&ServerError> {
        self.server.as_deref()
    }

    /// Advice for the user.
    pub fn hint(&self) -> Option<&str> {
        if let Some(hint) = self.server().and_then(|s| s.hint.as_deref()) {
            return Some(hint);
        }
        match self.kind {
            ErrorKind::Auth => Some(
                "check the user, its password (PGPASSWORD, password=, ~/.pgpass) and a line for \
                 database \"replication\" in pg_hba.conf",
            ),
            ErrorKind::Permission => Some("ALTER ROLE ... REPLICATION"),
            ErrorKind::WalRemoved => Some(
                "take a new base backup; a slot or a larger max_slot_wal_keep_size prevents this",
            ),
            ErrorKind::SlotInUse => Some("stop the other receiver, or use another slot name"),
            ErrorKind::StartAheadOfServer => Some(
                "check whether this is an old primary that came back: it has less WAL than Klio",
            ),
            ErrorKind::Connect => {
                Some("is PostgreSQL running, and are host and port in postgres.dsn right?")
            }
            ErrorKind::Tls => Some("check sslmode, sslrootcert and PostgreSQL's certificate"),
            ErrorKind::Protocol => Some(
                "check that postgres.dsn leads to PostgreSQL itself, not to a connection pooler",
            ),
            ErrorKind::Server if self.server().is_some_and(|s| s.sqlstate == "53300") => Some(
                "raise max_wal_senders (it needs wal_level = replica) or max_connections, and \
                 restart PostgreSQL",
            ),
            ErrorKind::Io | ErrorKind::Server => Some("look at PostgreSQL's log"),
            ErrorKind::SlotMissing | ErrorKind::SlotExists | ErrorKind::TimelineMissing => None,
        }
    }
}

impl ServerError {
    /// Parses the fields of an ErrorResponse or NoticeResponse; bytes that are not UTF-8 are replaced.
    pub(super) fn parse(body: &[u8]) -> ServerError {
        let mut error = ServerError::default();
        for field in body.split(|b| *b == 0) {
            let Some((code, value)) = field.split_first() else { break };
            let value = String::from_utf8_lossy(value).into_owned();
            match code {
                b'V' => error.severity = value,
                b'S' if error.severity.is_empty() => error.severity = value,
                b'C' => error.sqlstate = value,
                b'M' => error.message = value,
                b'D' => error.detail = Some(value),
                b'H' => error.hint = Some(value),
                b'R' => error.routine = value,
                _ => {}
            }
        }
        error
    }

    /// After these, the server closes the connection.
    pub(super) fn is_fatal(&self) -> bool {
        self.severity == "FATAL" || self.severity == "PANIC"
    }

    fn kind(&self) -> ErrorKind {
        let says = |text: &str| self.message.contains(text);
        match (self.sqlstate.as_str(), self.routine.as_str()) {
            ("28000" | "28P01", _) => ErrorKind::Auth,
            ("42501", _) => ErrorKind::Permission,
            ("42704", _) if says("slot") || self.routine.contains("Slot") => ErrorKind::SlotMissing,
            ("42710", _) => ErrorKind::SlotExists,
            ("55006", _) => ErrorKind::SlotInUse,
            // For invalidated slots: StartReplication up to version 17, ReplicationSlotAcquire from 18 on.
            ("55000", "ReplicationSlotAcquire") => ErrorKind::WalRemoved,
            ("55000", _) if says("can no longer") => ErrorKind::WalRemoved,
            // CheckXLogRemoved derives its SQLSTATE from whatever errno is set: XX000 was observed.
            (_, "CheckXLogRemoved") | ("58P01", "WalSndSegmentOpen") => ErrorKind::WalRemoved,
            (_, _) if says("has already been removed") => ErrorKind::WalRemoved,
            ("58P01", "SendTimeLineHistory") => ErrorKind::TimelineMissing,
            (_, "tliSwitchPoint") => ErrorKind::TimelineMissing,
            // Of the two errors of this kind, only "not in this server's history" has a detail.
            ("XX000", "StartReplication") if self.detail.is_some() => ErrorKind::TimelineMissing,
            ("XX000", "StartReplication") => ErrorKind::StartAheadOfServer,
            ("XX000", _) if says("ahead of the WAL flush position") => {
                ErrorKind::StartAheadOfServer
            }
            ("57P01" | "57P02" | "57P03", _) => ErrorKind::Connect,
            _ => ErrorKind::Server,
        }
    }
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "server said {} {}: {}", self.severity, self.sqlstate, self.message)?;
        match &self.detail {
            Some(detail) => write!(f, " ({detail})"),
            None => Ok(()),
        }
    }
}

/// What the rest of the program does about an error of PostgreSQL. Everything but removed WAL is retried: a password is
/// corrected, a slot becomes free or a standby catches up without anybody restarting this program.
impl From<&Error> for crate::error::Error {
    fn from(error: &Error) -> Self {
        let failure = match error.kind() {
            ErrorKind::WalRemoved => Failure::WalRemoved,
            _ => Failure::Postgres,
        };
        Self::new(failure, error).hint(error.hint().unwrap_or_default())
    }
}

impl From<Error> for crate::error::Error {
    fn from(error: Error) -> Self {
        Self::from(&error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(fields: &[&str]) -> ErrorKind {
        let mut body = fields.join("\0").into_bytes();
        body.extend([0, 0]);
        ServerError::parse(&body).kind()
    }

    #[test]
    fn kinds_do_not_depend_on_the_servers_language() {
        let cases: &[(&[&str], ErrorKind)] = &[
            (&["C58P01", "Mdas WAL-Segment ist weg", "RWalSndSegmentOpen"], ErrorKind::WalRemoved),
            (&["CXX000", "Mx", "RCheckXLogRemoved"], ErrorKind::WalRemoved),
            (&["C58P01", "Mx", "RSendTimeLineHistory"], ErrorKind::TimelineMissing),
            (&["CXX000", "Mx", "RStartReplication"], ErrorKind::StartAheadOfServer),
            (&["CXX000", "Mx", "Dy", "RStartReplication"], ErrorKind::TimelineMissing),
            (&["CXX000", "Mx", "RtliSwitchPoint"], ErrorKind::TimelineMissing),
            (&["C55000", "Mx", "RReplicationSlotAcquire"], ErrorKind::WalRemoved),
            (&["C55006", "Mx", "RReplicationSlotAcquire"], ErrorKind::SlotInUse),
            (&["C42704", "Mx", "RReplicationSlotAcquire"], ErrorKind::SlotMissing),
            (&["C42501", "Mx", "RInitPostgres"], ErrorKind::Permission),
            (&["C28P01", "Mx", "Rauth_failed"], ErrorKind::Auth),
            (&["C42601", "Msyntax", "Rscanner_yyerror"], ErrorKind::Server),
        ];
        for (fields, expected) in cases {
            assert_eq!(kind(fields), *expected, "{fields:?}");
        }
    }

    #[test]
    fn fields_are_kept_and_the_untranslated_severity_wins() {
        let body = b"SFEHLER\0VERROR\0C55006\0Mbusy\0Dby 7\0Hwait\0RReplicationSlotAcquire\0\0";
        let error = Error::from_server("start", ServerError::parse(body));
        assert_eq!(error.to_string(), "start: server said ERROR 55006: busy (by 7)");
        assert_eq!(error.hint(), Some("wait"));
        assert_eq!(error.server().map(|s| s.severity.as_str()), Some("ERROR"));
    }
}
