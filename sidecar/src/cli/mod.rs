//! The command line: parses it, loads the configuration, starts telemetry, runs one command and returns its exit status.
//!
//! No business decisions are made here. `wal-fetch` ends with a status below 126 only for success and a definitive
//! "not found", even if it panics or its usage is wrong (P7). For a standby, no status is above 125.

mod args;
mod backup;
mod check;
mod check_postgres;
mod check_server;
mod display;
mod drill;
pub mod exit;
mod generation;
mod help;
mod list;
mod reference;
mod restore;
mod retention;
mod slot;
mod status;
mod stream;
mod table;
mod telemetry;
#[cfg(test)]
mod tests;
mod text;
mod timeline;
mod verify;
mod wal_agent;
mod wal_fetch;
mod wal_tablespaces;
mod work;

use crate::{
    config::{Config, Needs},
    conninfo::ConnInfo,
    error::{Error, Failure},
    server_link::{self, Connection, ServerLink, Which},
};
use args::{Cli, Command, ListArgs, ListCommand, SlotCommand};
use clap::Parser;
use klio_telemetry::visible;
use std::{ffi::OsString, io::Write, time::Duration};
use tracing::Instrument;
use wal_fetch::Asker;

/// How long the program waits at the end for telemetry to be sent.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(3);
/// The same for `wal-fetch`, which PostgreSQL runs once per segment: a dead collector must not slow down recovery (P9).
const FETCH_FLUSH_TIMEOUT: Duration = Duration::from_millis(500);

/// Runs the program with these arguments and returns its exit status.
pub fn main(arguments: Vec<OsString>) -> u8 {
    // Whatever the other arguments are, PostgreSQL started these two commands.
    let editing = arguments.get(1).is_some_and(|verb| verb == wal_tablespaces::VERB);
    let fetching = editing || arguments.iter().any(|a| a == "wal-fetch");
    let asker = Asker::of(&arguments);
    let outcome = std::panic::catch_unwind(|| match arguments.get(1) {
        Some(verb) if verb == "wal-agent" && wal_agent::is_outer(&arguments) => {
            wal_agent::supervise(&arguments)
        }
        _ if editing => wal_tablespaces::run(&arguments[2..]),
        _ if fetching => {
            wal_fetch::quickly(&arguments, asker).unwrap_or_else(|longer| run(longer, asker))
        }
        _ => run(arguments, asker),
    });
    outcome.unwrap_or(if fetching {
        exit::of_trouble(asker)
    } else {
        klio_proto::Code::Internal.exit()
    })
}

fn run(arguments: Vec<OsString>, asker: Asker) -> u8 {
    // Fails only if a provider is installed already; that one stays.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let cli = match Cli::try_parse_from(&arguments) {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return match error.use_stderr() {
                true => exit::of_usage(&arguments, asker),
                false => exit::OK,
            };
        }
    };
    // A command that fails because of its configuration is traced as well, so the error is not returned here.
    let (config, problem) = match Config::load(cli.global.config.as_deref(), &cli.flags()) {
        Ok(config) => {
            let problem = config.validate(needs(&cli.command)).err();
            (config, problem)
        }
        Err(error) => (Config::default(), Some(error)),
    };
    let problem = match &cli.command {
        // These commands do not depend on the configuration.
        Command::Help { .. } | Command::Reference { .. } => None,
        _ => problem,
    };
    let result = execute(&cli, &config, problem, &arguments, asker);
    match result {
        Ok(status) => status,
        Err(error) => {
            let (status, error) = match &cli.command {
                Command::WalFetch(args) => {
                    (exit::of_wal_fetch(&error, asker), asker.explain(&args.name, error))
                }
                _ => (exit::of(&error), error),
            };
            say(&format!("klio {}: {error}", cli.command.name()));
            status
        }
    }
}

/// Prints a message. A closed stderr must not cause a panic. Much of the text comes from elsewhere, so control
/// characters are made visible.
fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{}", visible::lines(text));
}

/// Prints a result, as [`say`] does. It is not an error if the reader is gone (`klio status | head`).
fn print(text: &str) {
    let _ = std::io::stdout().write_all(visible::lines(text).as_bytes());
}

/// Prints a result of the server as JSON, with the generation that it is about.
fn print_json(which: &Which, result: &impl serde::Serialize) -> Result<(), Error> {
    let document = serde_json::to_value(result).map_err(|e| Error::new(Failure::Local, e))?;
    print(&format!("{:#}\n", which.tag(document)));
    Ok(())
}

/// Says which other generations have base backups, where this one has none.
async fn say_elsewhere(connection: &Connection, which: &Which) {
    match server_link::elsewhere(connection, which).await {
        Ok(elsewhere) => elsewhere.iter().for_each(|text| say(text)),
        Err(error) => {
            tracing::warn!(%error, "cannot find out whether other generations have base backups");
        }
    }
}

const fn needs(command: &Command) -> Needs {
    match command {
        Command::Stream(_) | Command::Backup(_) | Command::Check(_) => {
            Needs { server: true, cluster: true, postgres: true, source: false }
        }
        Command::Slot(_) => Needs { server: false, cluster: false, postgres: true, source: false },
        Command::Status(args) => {
            Needs { server: true, cluster: !args.all, postgres: false, source: false }
        }
        Command::List(ListArgs { what: Some(ListCommand::Wal { .. }), .. })
        | Command::Verify(_)
        | Command::Generation(_)
        | Command::Retention(_)
        | Command::Timeline(_) => {
            Needs { server: true, cluster: true, postgres: false, source: false }
        }
        Command::WalFetch(_)
        | Command::WalAgent(_)
        | Command::List(_)
        | Command::Restore(_)
        | Command::Drill(_) => {
            Needs { server: false, cluster: true, postgres: false, source: true }
        }
        Command::Reference { .. } | Command::Help { .. } => {
            Needs { server: false, cluster: false, postgres: false, source: false }
        }
    }
}

fn execute(
    cli: &Cli,
    config: &Config,
    problem: Option<Error>,
    arguments: &[OsString],
    asker: Asker,
) -> Result<u8, Error> {
    // One thread, because each commit passes through this program twice, and every switch between threads would add
    // tens of microseconds (docs/benchmarks.md). Telemetry has threads of its own.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::new(Failure::Local, format!("start runtime: {error}")))?;
    let result = runtime.block_on(async {
        let telemetry = klio_telemetry::start(telemetry::options(cli, config))
            .map_err(|error| Error::new(Failure::Config, error))?;
        let span = telemetry::root_span(&cli.command, arguments);
        let trace = span.in_scope(klio_telemetry::current_trace_id);
        let result = match problem {
            Some(problem) => Err(problem),
            None => {
                let work = verb(cli, config, &telemetry, asker);
                telemetry::to_its_end(&cli.command, work).instrument(span.clone()).await
            }
        };
        telemetry::record(&span, &result);
        drop(span);
        let patience = match cli.command {
            Command::WalFetch(_) => FETCH_FLUSH_TIMEOUT,
            _ => FLUSH_TIMEOUT,
        };
        let delivery = telemetry.shutdown(patience).await;
        telemetry::epilogue(trace, delivery);
        result
    });
    // A DNS lookup or a disk that hangs may block a thread for any time, but must not keep the program from ending (P9).
    runtime.shutdown_background();
    result
}

async fn verb(
    cli: &Cli,
    config: &Config,
    telemetry: &klio_telemetry::Telemetry,
    asker: Asker,
) -> Result<u8, Error> {
    match &cli.command {
        Command::Stream(_) => stream::run(config, telemetry).await,
        Command::Backup(args) => backup::run(config, args, telemetry).await,
        Command::Check(args) => check::run(config, args.json).await,
        Command::Status(args) => status::run(config, args).await,
        Command::List(ListArgs { what: Some(ListCommand::Wal { json }), .. }) => {
            list::wal(config, *json).await
        }
        Command::List(ListArgs { what: Some(ListCommand::Backups(args)), .. })
        | Command::List(ListArgs { what: None, backups: args }) => {
            list::backups::run(config, args.json).await
        }
        Command::Restore(args) => restore::run(config, cli, args).await,
        Command::Drill(args) => drill::run(config, cli, args).await,
        Command::Verify(args) => verify::run(config, args).await,
        Command::Retention(command) => retention::run(config, command).await,
        Command::Generation(command) => generation::run(config, command).await,
        Command::Timeline(command) => timeline::run(config, command).await,
        Command::WalFetch(args) => wal_fetch::run(config, cli, args, asker).await,
        Command::WalAgent(args) => wal_agent::run(config, args).await,
        Command::Slot(SlotCommand::Show(_)) => slot::show(config).await,
        Command::Slot(SlotCommand::Drop(_)) => slot::drop_slot(config).await,
        Command::Reference { table } => Ok(reference::run(*table)),
        Command::Help { topic } => Ok(help::print(topic.as_deref())),
    }
}

/// Opens one connection to the server.
async fn connect(config: &Config) -> Result<Connection, Error> {
    ServerLink::new(&config.server)?.connect().await
}

/// The connection settings of PostgreSQL, with `PG*` variables and the password file.
fn conninfo(config: &Config) -> Result<ConnInfo, Error> {
    ConnInfo::parse(config.postgres.dsn.expose(), &crate::config::environment).map_err(|error| {
        Error::new(Failure::Config, error).hint("postgres.dsn is a libpq connection string or URL")
    })
}
