//! The only error type of this crate: what failed, where, and how a caller reacts.
//!
//! There is a [`Failure`] for every case that a caller treats differently: try again or end, and with which exit
//! status. The message says where, what was expected and what was found; the hint says what the reader can do.

use klio_proto::{Code, code::CODE_KEY};
use std::{fmt, io, path::Path};

/// The kind of an error, as far as a caller acts on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// An error code of the server, or of a rule of the protocol.
    Code(Code),
    /// The server cannot be reached, or the TLS handshake failed. Certificates are renewed and networks recover, so a
    /// daemon tries again.
    Link,
    /// The server refused our certificate in the handshake. A renewed file is used without a restart, so a daemon tries again.
    Certificate,
    /// PostgreSQL cannot be reached or does not accept connections now, but may later.
    Postgres,
    /// PostgreSQL refused, and will refuse until somebody changes something.
    PostgresRefused,
    /// PostgreSQL no longer has the WAL that was asked for.
    WalRemoved,
    /// A setting is wrong or missing.
    Config,
    /// A local file cannot be read or written.
    Local,
    /// A signal, or the end of the daemon.
    Stopped,
    /// The target cannot be reached from what is stored; nothing was touched.
    Unreachable,
}

impl Failure {
    /// Whether the same attempt can succeed later without a change to this program's configuration.
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

    /// The name for `error.type` and for metrics, from a fixed set.
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
    /// The kind that a caller acts on.
    pub failure: Failure,
    /// Where, what was expected and what was found.
    pub message: String,
    /// What the reader can do; may be empty.
    pub hint: String,
}

impl Error {
    /// An error with the default hint of its kind, if there is one.
    pub fn new(failure: Failure, message: impl fmt::Display) -> Self {
        let hint = match failure {
            Failure::Code(code) => code.hint().to_owned(),
            _ => String::new(),
        };
        Self { failure, message: message.to_string(), hint }
    }

    /// The same error with another hint.
    #[must_use]
    pub fn hint(mut self, hint: impl fmt::Display) -> Self {
        self.hint = hint.to_string();
        self
    }

    /// The same error with "`doing`: " before its message.
    #[must_use]
    pub fn during(mut self, doing: impl fmt::Display) -> Self {
        self.message = format!("{doing}: {}", self.message);
        self
    }

    /// An error that the server answered.
    pub fn from_status(doing: &str, status: &tonic::Status) -> Self {
        let mut error =
            Self::new(Failure::Code(Code::of(status)), format!("{doing}: {}", status_text(status)));
        if error.message.contains("hint: ") {
            // The server's message contains a hint for its reason, which is better than the general one.
            error.hint = String::new();
        } else if error.failure == Failure::Code(Code::Unavailable) && answered(status) {
            let hint = if error.message.contains("tier 2") { BUCKET } else { ANSWERED };
            error.hint = hint.to_owned();
        }
        error
    }

    /// An error of the storage crate, with its hint.
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

/// Limit for the text of a server: twice the longest that a correct server sends.
const STATUS_CHARS_MAX: usize = 4096;

/// Hints for failures that the server reported, which means that it is running and reachable.
const ANSWERED: &str = "the server answered but cannot do this now: see klio status and its log";
const BUCKET: &str = "check the bucket: klio status and the server's log say what is wrong with it";

/// Whether klio-server itself sent this status, and not the connection to it.
fn answered(status: &tonic::Status) -> bool {
    status.metadata().contains_key(CODE_KEY)
}

/// The status as text. tonic hides the cause of a transport failure in the source chain; a person needs the last cause.
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
    // The other side wrote this text, so it is made one line of limited length.
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

    /// The server's text cannot move the cursor or begin a new line.
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

    /// A bucket that does not respond used to give the hint "is klio-server running?".
    #[test]
    fn a_server_that_answers_is_not_asked_whether_it_runs() {
        let said = |text| Error::from_status("ask", &Code::Unavailable.status(text)).to_string();
        assert!(said("tier 2 did not answer").contains("check the bucket"));
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
