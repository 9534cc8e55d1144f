//! `klio-server`: reads the command line and runs the command.

use anyhow::Context;
use clap::Parser;
use klio_server::cli::{
    Cli, Command, backup, client, exit, init, key, keygen, reference, repository, run, telemetry,
};
use klio_server::{cli::chain, config::ConfigError, encryption::KeyProblem, status::now_unix};
use std::{process::ExitCode, time::Duration};

fn main() -> ExitCode {
    // Needed before any TLS client or server is built.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let cli = Cli::parse();
    match dispatch(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Like klio, prints the hint on a line of its own.
            let text = chain(&error).replacen("; hint: ", "\nhint: ", 1);
            eprintln!("klio-server: {}", klio_telemetry::visible::lines(&text));
            ExitCode::from(if is_about_keys(&error) { exit::NO_KEY } else { exit::FAILED })
        }
    }
}

fn is_about_keys(error: &anyhow::Error) -> bool {
    let config = error.downcast_ref::<ConfigError>();
    error.downcast_ref::<KeyProblem>().is_some() || config.is_some_and(ConfigError::is_about_keys)
}

fn dispatch(cli: &Cli) -> anyhow::Result<()> {
    let threads = match &cli.command {
        Command::Run(_) => workers(),
        _ => 1,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .enable_all()
        .build()
        .context("start the runtime")?;
    let done = match &cli.command {
        Command::Run(args) => runtime.block_on(run::run(&cli.command, args, cli.debug)),
        Command::Repository(args) => {
            repository::run(&cli.command, &args.config, cli.debug, &runtime)
        }
        command => {
            runtime.block_on(telemetry::traced(command, cli.debug, command.config(), verb(command)))
        }
    };
    // P9: the work is done. A DNS lookup of the collector's name that gets no answer may delay the exit by this much.
    runtime.shutdown_timeout(Duration::from_secs(1));
    done
}

/// Runs a short verb.
async fn verb(command: &Command) -> anyhow::Result<()> {
    match command {
        Command::Init(args) => init::run(args),
        Command::Keygen(args) => keygen::run(args),
        Command::Key(verb) => key::run(verb).await,
        Command::Backup(verb) => backup::run(verb, now_unix()).await,
        Command::Client(args) => client::run(args),
        Command::Reference(args) => {
            reference::run(args);
            Ok(())
        }
        // These have their own entry points, see `dispatch`.
        Command::Run(_) | Command::Repository(_) => Ok(()),
    }
}

/// Half the cores: the other half writes, syncs and compresses on blocking threads. On two cores a commit takes a
/// shorter way through one worker than through two (measured: docs/benchmarks.md).
fn workers() -> usize {
    std::thread::available_parallelism().map_or(1, |cores| (cores.get() / 2).max(1))
}
