//! One error for the crate, with a coarse kind: a new kind exists only where a caller acts differently.
//!
//! Text names the place, what was expected and what was found; `hint` is for the person who reads it.

use std::{fmt, io, path::Path};

/// What a caller can do about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Nothing of that name exists. Definitive: a restore may conclude the end of WAL from it (P7).
    NotFound,
    /// Somebody else holds it, or something different is already there.
    Conflict,
    /// The caller asked for something that cannot be right; trying again will not help.
    Invalid,
    /// Stored bytes are not what was stored. Never returned for a torn tail after a crash.
    Corrupt,
    /// Written by a newer Klio in a format that this one does not know. Nothing is wrong with it; it is left as it is.
    Newer,
    /// No space left; goes away when space returns.
    Full,
    /// A write or an fsync failed: the handle is poisoned (P3); reopen to recover.
    Poisoned,
    /// Trouble that may pass: network, throttling, interrupted I/O.
    Transient,
    /// Credentials or permissions.
    Denied,
    /// Any other I/O failure.
    Io,
}

impl Kind {
    /// Every kind.
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

    /// A word of a closed set for `error.type`.
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

/// What was being done.
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
    /// What the caller can do.
    pub kind: Kind,
    /// What was being done.
    pub op: Op,
    /// The file, object or thing it was done to.
    pub place: String,
    /// What was expected and found.
    pub detail: String,
    /// For the reader, where there is something to do.
    pub hint: Option<&'static str>,
    #[source]
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error without a cause below it.
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

    /// From an I/O error on a path; the kind follows from the error number.
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

    /// Names the place, where the one who failed did not know it.
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
