//! `klio wal-fetch %f "%p"`, the command in restore_command.
//!
//! "No such file" is answered in two cases only: a source said NOT_FOUND definitively, or the stored file is the
//! beginning of a segment of which PostgreSQL itself has as much (own.rs). Every other failure is retried until the
//! timeout and then stops recovery (P7). For a standby, it is tried once, for some seconds, and PostgreSQL asks again
//! (asker.rs). PATH appears complete and with the exact size, or not at all.
//!
//! PostgreSQL's own %p is not fsynced: before it keeps a file, PostgreSQL fsyncs it in durable_rename()
//! (KeepFileRestoredFromArchive() in src/backend/access/transam/xlogarchive.c), and after a crash it deletes what is
//! left under that name and asks again (RestoreArchivedFile(), same file). Any other PATH is fsynced, and is fetched
//! without the read-ahead agent.

use super::{
    args::{Cli, WalFetchArgs},
    exit,
};
use crate::{
    agent::client::Outcome,
    config::Config,
    error::{Error, Failure, local},
    wal_source::{self, Expected, Fetch, Target},
};
use klio_proto::Code;
use klio_storage::layout::WalFile;
use std::{
    ffi::{OsStr, OsString},
    path::Path,
    sync::Arc,
    time::Instant,
};

mod asker;
mod own;
mod quick;
mod resident;

pub(super) use asker::Asker;
use asker::Patience;
use resident::Resident;

const NO_AGENT: &str = "--no-agent";
const ANSWER_WITHIN: &str = "--answer-within";

/// The fast path of almost every call: asks the agent, without parsing options or starting telemetry. `Err` has the
/// arguments for the normal path.
pub(super) fn quickly(arguments: &[OsString], asker: Asker) -> Result<u8, Vec<OsString>> {
    let mut longer = arguments.to_vec();
    let Some(request) = quick::Request::read(arguments) else { return Err(longer) };
    let Some(resident) = request.resident() else { return Err(longer) };
    let patience = asker.patience(request.timeout, None);
    match resident.ask(request.file, &request.path, &patience) {
        Outcome::Placed => match own::is_enough(request.file, &request.path) {
            Ok(false) => Ok(exit::OK),
            Ok(true) => {
                super::say(&format!("klio wal-fetch: {}", own::message(request.file)));
                Ok(Code::NotFound.exit())
            }
            Err(_) => Err(longer),
        },
        Outcome::Absent(message) => {
            super::say(&format!("klio wal-fetch: {message}"));
            Ok(Code::NotFound.exit())
        }
        Outcome::Unusable(why) => {
            if !why.is_empty() {
                super::say(&format!("klio wal-fetch: read-ahead agent: {why}; fetching directly"));
            }
            longer.push(NO_AGENT.into());
            if asker != Asker::Once {
                // The time that is left, because both paths together must stay within it.
                let left = patience.deadline.saturating_duration_since(Instant::now());
                longer.extend([ANSWER_WITHIN.into(), format!("{}ms", left.as_millis()).into()]);
            }
            Err(longer)
        }
    }
}

pub(super) async fn run(
    config: &Config,
    cli: &Cli,
    args: &WalFetchArgs,
    asker: Asker,
) -> Result<u8, Error> {
    let file: WalFile = args.name.parse().map_err(|error| {
        Error::new(Failure::Config, format!("read file name: {error}"))
            .hint("restore_command = 'klio wal-fetch %f \"%p\"'")
    })?;
    let patience = asker.patience(args.timeout, args.answer_within);
    if !args.no_agent
        && let Some(resident) =
            Resident::of(config, cli.global.config.as_deref(), &cli.flags(), &args.path)
    {
        // This blocks the thread, which has nothing else to do.
        match resident.ask(file, &args.path, &patience) {
            Outcome::Placed => return placed(file, &args.path),
            Outcome::Absent(message) => {
                return Err(Error::new(Failure::Code(Code::NotFound), message));
            }
            Outcome::Unusable(why) if why.is_empty() => {}
            Outcome::Unusable(why) => {
                tracing::warn!("read-ahead agent: {why}; fetching directly");
            }
        }
    }
    directly(config, file, &args.path, &patience).await?;
    placed(file, &args.path)
}

/// The file is in place. PostgreSQL uses it, unless its own copy is the longer one.
fn placed(file: WalFile, path: &Path) -> Result<u8, Error> {
    match own::is_enough(file, path) {
        Ok(false) => Ok(exit::OK),
        Ok(true) => Err(Error::new(Failure::Code(Code::NotFound), own::message(file))),
        Err(error) => Err(local("compare PostgreSQL's own copy with", path, &error)),
    }
}

async fn directly(
    config: &Config,
    file: WalFile,
    path: &Path,
    patience: &Patience,
) -> Result<(), Error> {
    let expected = data_dir(path).map(Expected::of_data_dir).unwrap_or_default();
    let fetch = Fetch { source: wal_source::open(config)?, file, expected };
    let target = Arc::new(Target::beside(path)?);
    match patience.asker {
        Asker::Once => fetch.until(&target, patience.deadline.into()).await?,
        Asker::Standby | Asker::Content => {
            let (begun, longest) = (patience.deadline.into(), patience.longest.into());
            fetch.promptly(&target, begun, asker::STANDBY_QUIET_MAX, longest).await?
        }
    };
    target.commit(path, !is_postgresql_s(path))
}

/// Whether PostgreSQL asked for this file in recovery: it restores under these names.
fn is_postgresql_s(path: &Path) -> bool {
    matches!(path.file_name().and_then(OsStr::to_str), Some("RECOVERYXLOG" | "RECOVERYHISTORY"))
}

/// The data directory of `<data>/pg_wal/RECOVERYXLOG`. PostgreSQL runs the command in its data directory.
fn data_dir(path: &Path) -> Option<&Path> {
    let directory =
        path.parent().filter(|directory| directory.file_name() == Some(OsStr::new("pg_wal")))?;
    if !is_postgresql_s(path) {
        return None;
    }
    directory.parent().map(|data| if data.as_os_str().is_empty() { Path::new(".") } else { data })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn postgresql_s_own_names_are_told_from_others() {
        for (path, data) in [
            ("pg_wal/RECOVERYXLOG", Some(".")),
            ("/srv/pg/pg_wal/RECOVERYHISTORY", Some("/srv/pg")),
            ("/tmp/RECOVERYXLOG", None),
            ("/srv/pg/pg_wal/000000010000000000000001", None),
        ] {
            assert_eq!(data_dir(Path::new(path)), data.map(Path::new), "{path}");
        }
    }
}
