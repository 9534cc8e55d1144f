//! The commands of `klio-server`, one verb per file.

pub mod backup;
pub mod client;
pub mod exit;
pub mod init;
pub mod key;
pub mod keygen;
pub mod reference;
pub mod repository;
pub mod run;
pub mod telemetry;

use clap::{Parser, Subcommand};
use std::path::{Path, PathBuf};

/// Receive PostgreSQL WAL and base backups, keep them durable on disk, and archive them to object storage
#[derive(Debug, Parser)]
#[command(
    name = "klio-server",
    version,
    after_help = exit::help()
)]
pub struct Cli {
    /// Log debug messages, with trace ids
    #[arg(long, global = true)]
    pub debug: bool,
    #[command(subcommand)]
    pub command: Command,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Write a commented configuration, a local CA, the server's certificate and a first client bundle
    Init(init::Args),
    /// Create an age identity for encryption at rest and print its public recipient
    Keygen(keygen::Args),
    /// Show or change the keys of encryption at rest
    #[command(subcommand)]
    Key(key::Verb),
    /// Correct or remove a backup's record after a clock was wrong
    #[command(subcommand)]
    Backup(backup::Verb),
    /// Run the server in the foreground until SIGTERM or SIGINT
    Run(RunArgs),
    /// Issue a client bundle: certificate, key and configuration for one klio
    Client(client::Args),
    /// Work on a repository for the server, with a job on standard input
    #[command(hide = true)]
    Repository(RunArgs),
    /// Print a generated table of the documentation
    #[command(hide = true)]
    Reference(reference::Args),
}

/// Arguments of `run`.
#[derive(Debug, clap::Args)]
pub struct RunArgs {
    /// Configuration file
    #[arg(short, long, env = "KLIO_CONFIG", default_value = "klio-server.toml")]
    pub config: PathBuf,
}

impl Command {
    /// The configuration file of a verb that reads one.
    pub fn config(&self) -> Option<&Path> {
        match self {
            Command::Key(key::Verb::Show(args)) => Some(&args.config),
            Command::Key(key::Verb::Rotate(args) | key::Verb::Rewrap(args)) => Some(&args.config),
            Command::Backup(verb) => Some(&verb.which().config),
            Command::Run(args) | Command::Repository(args) => Some(&args.config),
            Command::Client(args) => Some(&args.config),
            Command::Init(_) | Command::Keygen(_) | Command::Reference(_) => None,
        }
    }
}

/// An error with its causes. A cause that the text before it contains already is left out.
pub fn chain(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Regression test: `init` in a directory of another user said "Permission denied" twice.
    #[test]
    fn a_cause_is_said_once() {
        let denied = || std::io::Error::from(std::io::ErrorKind::PermissionDenied);
        let file =
            crate::access::pki::Error::File { verb: "write", path: "/x".into(), source: denied() };
        let once = chain(&anyhow::Error::from(file));
        assert_eq!(once.matches("permission denied").count(), 1, "{once}");
        let context = anyhow::Error::from(denied()).context("create directory /x");
        assert_eq!(chain(&context), "create directory /x: permission denied");
    }
}
