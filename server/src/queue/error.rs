//! Why the queue cannot be used: for the start, the log and /readyz. The queue is a hint (P4), so none
//! of these ever reaches receiving.

use std::path::PathBuf;

/// A queue that does not work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No executable.
    #[error(
        "find nats-server: looked for {}; hint: set queue.executable, put it beside klio-server or on PATH, or run make tools",
        .0.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ")
    )]
    NoExecutable(Vec<PathBuf>),
    /// Too old, or no nats-server at all.
    #[error("check {path}: expected nats-server 2.12 or newer, found {found:?}", path = .path.display())]
    Version {
        /// The executable.
        path: PathBuf,
        /// What it said of itself.
        found: String,
    },
    /// It runs, with other settings than we wrote.
    #[error("refuse nats-server: expected {expected}, found {found}")]
    Refused {
        /// What it must report.
        expected: &'static str,
        /// What it reported.
        found: String,
    },
    /// File work around the child.
    #[error("{what} {}: {source}", .path.display())]
    File {
        /// A verb.
        what: &'static str,
        /// On this.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The child ended or never became ready.
    #[error("run nats-server: {0}")]
    Child(String),
    /// Connection or protocol.
    #[error("{what}: {detail}")]
    Nats {
        /// What was tried.
        what: &'static str,
        /// What came back.
        detail: String,
    },
    /// A consumer asked for it.
    #[error("use the queue's store: it does not give the jobs that it has")]
    Store,
    /// A setting.
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
