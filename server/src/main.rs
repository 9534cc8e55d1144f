//! `klio-server`: reads the command line and hands over.

use anyhow::Context;
use clap::Parser;
use klio_server::cli::{Cli, Command, client, init, key, keygen, reference, run};
use klio_server::{config::ConfigError, encryption::KeyProblem};
use std::process::ExitCode;

fn main() -> ExitCode {
    // Before anything that could build a TLS client or server: they need a provider.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let cli = Cli::parse();
    match dispatch(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("klio-server: {error:#}");
            if is_about_keys(&error) { ExitCode::from(NO_KEY) } else { ExitCode::FAILURE }
        }
    }
}

/// Exit status when the keys for encryption at rest are missing or wrong.
const NO_KEY: u8 = 3;

fn is_about_keys(error: &anyhow::Error) -> bool {
    let config = error.downcast_ref::<ConfigError>();
    error.downcast_ref::<KeyProblem>().is_some() || config.is_some_and(ConfigError::is_about_keys)
}

fn dispatch(cli: &Cli) -> anyhow::Result<()> {
    match &cli.command {
        Command::Init(args) => init::run(args),
        Command::Keygen(args) => keygen::run(args),
        Command::Key(verb) => tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("start the runtime")?
            .block_on(key::run(verb)),
        Command::Client(args) => client::run(args),
        Command::Reference(args) => {
            reference::run(args);
            Ok(())
        }
        Command::Repository(args) => klio_server::maintenance::worker::run(&args.config),
        Command::Run(args) => {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(workers())
                .enable_all()
                .build()
                .context("start the runtime")?;
            runtime.block_on(run::run(args, cli.debug))
        }
    }
}

/// Half the cores: the other half writes, syncs and compresses on blocking threads. On two cores a
/// commit's way through one worker is shorter than through two (measured: docs/benchmarks.md).
fn workers() -> usize {
    std::thread::available_parallelism().map_or(1, |cores| (cores.get() / 2).max(1))
}
