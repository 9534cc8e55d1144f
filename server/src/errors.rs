//! Translates storage errors for callers. Internal paths and text stay in the server's log.

use klio_proto::Code;
use klio_storage::{Error, Kind};
use tonic::Status;

/// The code a caller gets for a storage error.
pub fn code(error: &Error) -> Code {
    match error.kind {
        Kind::NotFound => Code::NotFound,
        Kind::Conflict => Code::WriterConflict,
        Kind::Invalid | Kind::Newer => Code::Invalid,
        Kind::Corrupt => Code::Corrupt,
        Kind::Full => Code::DiskFull,
        Kind::Poisoned | Kind::Io => Code::StorageFailed,
        Kind::Transient => Code::Unavailable,
        Kind::Denied => Code::StorageFailed,
    }
}

/// A status for the caller; what it may not see is logged here, where the error ends.
pub fn status(error: &Error) -> Status {
    let code = code(error);
    match error.kind {
        // These speak of the caller's own request: it needs the text.
        Kind::Conflict | Kind::Invalid | Kind::Newer | Kind::NotFound => code.status(error),
        _ => {
            tracing::error!(code = code.name(), %error, "storage failed");
            code.status(format!("{} failed on the server's storage", error.op))
        }
    }
}

/// Why tier 2 cannot be used, in words that a caller may see: no place, no text of the store, and the hint, which is ours.
pub fn of_tier2(error: &Error) -> String {
    let what = match error.kind {
        Kind::Denied => "tier 2 refuses the server's credentials",
        Kind::Invalid => "tier 2 refuses the request",
        Kind::Full => "tier 2 is full",
        Kind::Corrupt => "what tier 2 holds is damaged",
        _ => "tier 2 did not answer",
    };
    match error.hint {
        Some(hint) => format!("{what}; hint: {hint}"),
        None => what.to_owned(),
    }
}

/// For a failed append: WAL that does not belong where it was sent is the client's affair, and it needs
/// to be told what is wrong with it.
pub fn append_status(error: &Error) -> Status {
    match error.kind {
        Kind::Invalid => Code::BadWal.status(error),
        _ => status(error),
    }
}
