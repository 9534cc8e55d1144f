//! The one error of this crate: what failed, where, and what a caller does about it.
//!
//! A [`Failure`] exists only where a caller acts differently: retry or end, and with which exit status.
//! The message names place, expected and found; the hint says what the reader can do.

use klio_proto::{Code, code::CODE_KEY};
use std::{fmt, io, path::Path};

/// What went wrong, as far as a caller acts on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// The server said so, or a rule of the protocol does.
    Code(Code),
    /// The server cannot be reached, or the TLS handshake fails. Certificates can be renewed and
    /// networks come back, so a daemon tries again.
    Link,
    /// The server refuses our certificate in the handshake. A renewed file is used without a restart, so a
    /// daemon tries again.
    Certificate,
    /// PostgreSQL cannot be reached or does not serve now; it may later.
    Postgres,
    /// PostgreSQL refuses, and will until somebody changes something.
    PostgresRefused,
    /// The WAL asked for is no longer there.
    WalRemoved,
    /// A setting is wrong or missing.
    Config,
    /// A local file cannot be read or written.
    Local,
    /// A signal, or the end of the daemon.
    Stopped,
    /// What was asked for cannot be recovered; nothing was touched.
    Unreachable,
}

impl Failure {
    /// Whether the same can succeed later without anybody changing the configuration of this program.
    pub const fn retryable(self) -> bool {
        match self {
            Failure::Code(code) => code.retryable(),
            Failure::Link
            | Failure::Certificate
            | Failure::Postgres
            | Failure::WalRemoved
            | Failure::Local => true,
            Failure::PostgresRefused
            | Failure::Config
            | Failure::Stopped
            | Failure::Unreachable => false,
        }
    }

    /// Every one.
    pub fn all() -> impl Iterator<Item = Self> {
        let others = [
            Failure::Link,
            Failure::Certificate,
            Failure::Postgres,
            Failure::PostgresRefused,
            Failure::WalRemoved,
            Failure::Config,
            Failure::Local,
            Failure::Stopped,
            Failure::Unreachable,
        ];
        let codes = Code::ALL.iter().map(|code| Failure::Code(*code));
        codes.chain(others)
    }

    /// A word of a closed set for `error.type` and for metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Failure::Code(code) => code.name(),
            Failure::Link => "LINK",
            Failure::Certificate => "CERTIFICATE",
            Failure::Postgres => "POSTGRES",
            Failure::PostgresRefused => "POSTGRES_REFUSED",
            Failure::WalRemoved => "WAL_REMOVED",
            Failure::Config => "CONFIG",
            Failure::Local => "LOCAL",
            Failure::Stopped => "STOPPED",
            Failure::Unreachable => "UNREACHABLE",
        }
    }
}

/// An error for people and for retry loops.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// What a caller acts on.
    pub failure: Failure,
    /// Place, expected and found.
    pub message: String,
    /// What the reader can do; empty when there is nothing to say.
    pub hint: String,
}

impl Error {
    /// An error without a hint.
    pub fn new(failure: Failure, message: impl fmt::Display) -> Self {
        let hint = match failure {
            Failure::Code(code) => code.hint().to_owned(),
            _ => String::new(),
        };
        Self { failure, message: message.to_string(), hint }
    }

    /// The same with a hint.
    #[must_use]
    pub fn hint(mut self, hint: impl fmt::Display) -> Self {
        self.hint = hint.to_string();
        self
    }

    /// The same with what was being done in front.
    #[must_use]
    pub fn during(mut self, doing: impl fmt::Display) -> Self {
        self.message = format!("{doing}: {}", self.message);
        self
    }

    /// From an answer of the server.
    pub fn from_status(doing: &str, status: &tonic::Status) -> Self {
        let mut error =
            Self::new(Failure::Code(Code::of(status)), format!("{doing}: {}", status_text(status)));
        if error.message.contains("hint: ") {
            // One that the server gave with its reason is better.
            error.hint = String::new();
        } else if error.failure == Failure::Code(Code::Unavailable) && answered(status) {
            let hint = if error.message.contains("tier 2") { BUCKET } else { ANSWERED };
            error.hint = hint.to_owned();
        }
        error
    }

    /// From the storage crate, with its hint.
    pub fn of_storage(failure: Failure, error: &klio_storage::Error) -> Self {
        let message = format!("{} {}: {}", error.op, error.place, error.detail);
        Self { failure, message, hint: error.hint.unwrap_or_default().to_owned() }
    }

    /// Whether trying again can help.
    pub const fn retryable(&self) -> bool {
        self.failure.retryable()
    }
}

/// A failure of the local file system.
pub(crate) fn local(doing: &str, path: &Path, error: &io::Error) -> Error {
    Error::new(Failure::Local, format!("{doing} {}: {error}", path.display()))
}

/// Twice what an honest server says at most.
const STATUS_CHARS_MAX: usize = 4096;

/// For trouble that a server tells of: it runs, and is reachable.
const ANSWERED: &str = "the server answered and cannot do it now: klio status and its log say why";
const BUCKET: &str =
    "look at the bucket: klio status and the server's log say what is wrong with it";

/// Whether a klio-server said this, and not the way to it.
fn answered(status: &tonic::Status) -> bool {
    status.metadata().contains_key(CODE_KEY)
}

/// tonic hides the cause of a transport failure in the source chain; a person needs the last of it.
fn status_text(status: &tonic::Status) -> String {
    let mut cause = std::error::Error::source(status);
    let mut last = None;
    while let Some(error) = cause {
        last = Some(error.to_string());
        cause = error.source();
    }
    let text = match last {
        Some(last) if !status.message().contains(&last) => format!("{}: {last}", status.message()),
        _ => status.message().to_owned(),
    };
    // Written by the other side: one line, of a bounded length.
    let end = text.char_indices().nth(STATUS_CHARS_MAX).map_or(text.len(), |(at, _)| at);
    klio_telemetry::visible::line(&text[..end]).into_owned()
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if self.hint.is_empty() { Ok(()) } else { write!(f, "\nhint: {}", self.hint) }
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a server says moves no cursor and begins no line.
    #[test]
    fn what_the_server_says_is_one_line_of_bounded_length() {
        let text = format!("x\x1b[2K\nhint: run this{}", "y".repeat(10_000));
        let error = Error::from_status("ask", &tonic::Status::internal(text));
        assert!(error.message.starts_with("ask: x\\u001b[2K\\nhint"), "{}", error.message);
        assert!(error.message.len() < 5000);
    }

    #[test]
    fn the_server_s_code_decides_whether_to_retry() {
        for code in Code::ALL {
            let error = Error::from_status("open stream", &code.status("text"));
            assert_eq!(error.retryable(), code.retryable(), "{code:?}");
            assert!(error.to_string().contains("hint: "), "{error}");
        }
    }

    /// A bucket that is down was "is klio-server running?".
    #[test]
    fn a_server_that_answers_is_not_asked_whether_it_runs() {
        let said = |text| Error::from_status("ask", &Code::Unavailable.status(text)).to_string();
        assert!(said("tier 2 did not answer").contains("look at the bucket"));
        assert!(said("the server is stopping").contains("the server answered"));
        let own = said("tier 2 refuses the server's credentials; hint: check them");
        assert_eq!(own.matches("hint: ").count(), 1, "{own}");
        let role = "the role tenant allows less; hint: docs/access.md has the table";
        let role = Error::from_status("ask", &Code::Forbidden.status(role)).to_string();
        assert_eq!(role.matches("hint: ").count(), 1, "{role}");
        let way = Error::from_status("ask", &tonic::Status::unavailable("connection refused"));
        assert!(way.hint.contains("is klio-server running"), "{way}");
    }
}
