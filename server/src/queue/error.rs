//! Why the queue cannot be used: for startup, the log and /readyz. The queue is a hint (P4), so these errors never
//! affect receiving.

use std::path::PathBuf;

/// An error of the queue.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No executable was found.
    #[error(
        "find nats-server: looked for {}; hint: set queue.executable, put it beside klio-server or on PATH, or run make tools",
        .0.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ")
    )]
    NoExecutable(Vec<PathBuf>),
    /// The executable is too old, or not nats-server at all.
    #[error("check {path}: expected nats-server 2.12 or newer, found {found:?}", path = .path.display())]
    Version {
        path: PathBuf,
        /// What it reported as its version.
        found: String,
    },
    /// It runs with other settings than we wrote.
    #[error("refuse nats-server: expected {expected}, found {found}")]
    Refused {
        /// What it must report.
        expected: &'static str,
        found: String,
    },
    /// A file of the child could not be written or read.
    #[error("{what} {}: {source}", .path.display())]
    File {
        /// A verb for the message.
        what: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    /// The child ended or never became ready.
    #[error("run nats-server: {0}")]
    Child(String),
    /// The connection or the protocol failed.
    #[error("{what}: {detail}")]
    Nats {
        /// What was tried.
        what: &'static str,
        detail: String,
    },
    /// A consumer asked for the store to be replaced.
    #[error("use the queue's store: it does not deliver the jobs that it has")]
    Store,
    /// A setting is wrong.
    #[error("configure queue: {0}")]
    Config(String),
}

impl Error {
    pub(super) fn nats(what: &'static str) -> impl Fn(&dyn std::fmt::Display) -> Self {
        move |error| Self::Nats { what, detail: error.to_string() }
    }
    pub(super) fn file(
        what: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { what, path, source }
    }
}
