//! `klio-server`: reads the command line and hands over.

use anyhow::Context;
use clap::Parser;
use klio_server::cli::{
    Cli, Command, backup, client, exit, init, key, keygen, reference, run, telemetry,
};
use klio_server::{
    cli::chain, config::ConfigError, encryption::KeyProblem, maintenance::worker, status::now_unix,
};
use std::{process::ExitCode, time::Duration};

fn main() -> ExitCode {
    // Before anything that could build a TLS client or server: they need a provider.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let cli = Cli::parse();
    match dispatch(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // As klio shows it: the hint on a line of its own.
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
        Command::Repository(args) => worker::run(&cli.command, &args.config, cli.debug, &runtime),
        command => {
            runtime.block_on(telemetry::traced(command, cli.debug, command.config(), verb(command)))
        }
    };
    // P9: what was to be done is done; a collector's name that DNS does not answer for holds a thread no longer than this.
    runtime.shutdown_timeout(Duration::from_secs(1));
    done
}

/// A verb that is over soon.
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
        // They have a life of their own: see `dispatch`.
        Command::Run(_) | Command::Repository(_) => Ok(()),
    }
}

/// Half the cores: the other half writes, syncs and compresses on blocking threads. On two cores a
/// commit's way through one worker is shorter than through two (measured: docs/benchmarks.md).
fn workers() -> usize {
    std::thread::available_parallelism().map_or(1, |cores| (cores.get() / 2).max(1))
}
