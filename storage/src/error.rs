//! The error type of the crate, with a coarse kind: there is a separate kind only where a caller acts differently.
//!
//! The text names the place, what was expected and what was found; `hint` is for the person who reads it.

use std::{fmt, io, path::Path};

/// What a caller can do about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Nothing of that name exists. This is definitive: a restore may conclude the end of WAL from it (P7).
    NotFound,
    /// Somebody else holds it, or something different is already there.
    Conflict,
    /// The caller asked for something impossible; trying again does not help.
    Invalid,
    /// Stored bytes are not those that were written. Never returned for a torn tail after a crash.
    Corrupt,
    /// A newer Klio wrote it in a format that this one does not know. It is not damaged, and is left unchanged.
    Newer,
    /// No space left; succeeds once there is space again.
    Full,
    /// A write or an fsync failed, and the handle is poisoned (P3); reopen to recover.
    Poisoned,
    /// A problem that may be temporary: network, throttling, interrupted I/O.
    Transient,
    /// Missing credentials or permissions.
    Denied,
    /// Any other I/O failure.
    Io,
}

impl Kind {
    pub const ALL: [Kind; 10] = [
        Kind::NotFound,
        Kind::Conflict,
        Kind::Invalid,
        Kind::Corrupt,
        Kind::Newer,
        Kind::Full,
        Kind::Poisoned,
        Kind::Transient,
        Kind::Denied,
        Kind::Io,
    ];

    /// The value of the attribute `error.type`, out of a fixed set.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::NotFound => "missing",
            Kind::Conflict => "conflict",
            Kind::Invalid => "invalid",
            Kind::Corrupt => "corrupt",
            Kind::Newer => "newer",
            Kind::Full => "full",
            Kind::Poisoned => "poisoned",
            Kind::Transient => "transient",
            Kind::Denied => "denied",
            Kind::Io => "io",
        }
    }
}

/// The operation that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Op {
    Open,
    Create,
    Read,
    Write,
    Sync,
    Rename,
    Remove,
    List,
    Seal,
    Recover,
    Append,
    Upload,
    Download,
    Decode,
    Configure,
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = match self {
            Op::Open => "open",
            Op::Create => "create",
            Op::Read => "read",
            Op::Write => "write",
            Op::Sync => "fsync",
            Op::Rename => "rename",
            Op::Remove => "remove",
            Op::List => "list",
            Op::Seal => "seal",
            Op::Recover => "recover",
            Op::Append => "append to",
            Op::Upload => "upload",
            Op::Download => "download",
            Op::Decode => "decode",
            Op::Configure => "configure",
        };
        f.write_str(word)
    }
}

/// A failure of the storage crate.
#[derive(Debug, thiserror::Error)]
#[error("{op} {place}: {detail}{}", self.hint.map(|h| format!("; hint: {h}")).unwrap_or_default())]
pub struct Error {
    pub kind: Kind,
    pub op: Op,
    /// The file, object or thing that the operation was applied to.
    pub place: String,
    /// What was expected and found.
    pub detail: String,
    /// Advice for the reader, if there is something to do.
    pub hint: Option<&'static str>,
    #[source]
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error without an underlying cause.
    pub fn new(kind: Kind, op: Op, place: impl fmt::Display, detail: impl fmt::Display) -> Self {
        Self {
            kind,
            op,
            place: place.to_string(),
            detail: detail.to_string(),
            hint: None,
            source: None,
        }
    }

    /// An error from an I/O error on a path; the error number determines the kind.
    pub fn io(op: Op, path: &Path, source: io::Error) -> Self {
        let kind = match source.kind() {
            io::ErrorKind::NotFound => Kind::NotFound,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Kind::Full,
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Kind::Denied,
            io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock => Kind::Transient,
            _ => Kind::Io,
        };
        Self::new(kind, op, path.display(), &source).with_source(source)
    }

    /// Adds advice for the reader.
    #[must_use]
    pub fn hint(mut self, hint: &'static str) -> Self {
        self.hint = Some(hint);
        self
    }

    /// Replaces the place, for a caller that knows it better than the code that failed.
    #[must_use]
    pub fn at(mut self, place: impl fmt::Display) -> Self {
        self.place = place.to_string();
        self
    }

    /// Adds the cause.
    #[must_use]
    pub fn with_source(mut self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.source = Some(Box::new(source));
        self
    }
}
