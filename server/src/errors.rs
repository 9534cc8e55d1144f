//! Translates storage errors for callers. Internal paths and texts appear only in the server's log.

use klio_proto::Code;
use klio_storage::{Error, Kind};
use tonic::Status;

/// The code that a caller receives for a storage error.
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

/// The status for the caller. Details that the caller may not see are logged here, because the error goes no further.
pub fn status(error: &Error) -> Status {
    let code = code(error);
    match error.kind {
        // These errors concern the caller's own request, so it needs the text.
        Kind::Conflict | Kind::Invalid | Kind::Newer | Kind::NotFound => code.status(error),
        _ => {
            tracing::error!(code = code.name(), %error, "storage failed");
            code.status(format!("{} failed on the server's storage", error.op))
        }
    }
}

/// Why tier 2 cannot be used, in a form that a caller may see: without the place and the store's own text, but with
/// our hint.
pub fn of_tier2(error: &Error) -> String {
    let what = match error.kind {
        Kind::Denied => "tier 2 refuses the server's credentials",
        Kind::Invalid => "tier 2 refuses the request",
        Kind::Full => "tier 2 is full",
        Kind::Corrupt => "an object in tier 2 is damaged",
        _ => "tier 2 did not answer",
    };
    match error.hint {
        Some(hint) => format!("{what}; hint: {hint}"),
        None => what.to_owned(),
    }
}

/// The status for a failed append. If the WAL does not belong where it was sent, the client has to know what is wrong
/// with it.
pub fn append_status(error: &Error) -> Status {
    match error.kind {
        Kind::Invalid => Code::BadWal.status(error),
        _ => status(error),
    }
}

/// Runs blocking work of the store and translates its error.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, klio_storage::Error> + Send + 'static,
) -> Result<T, Status> {
    // What it logs and queues belongs to the caller's trace.
    let span = tracing::Span::current();
    match tokio::task::spawn_blocking(move || span.in_scope(work)).await {
        Ok(result) => result.map_err(|error| status(&error)),
        Err(error) => Err(Code::Internal.status(format!("storage task: {error}"))),
    }
}
