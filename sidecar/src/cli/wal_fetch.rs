//! `klio wal-fetch %f "%p"`: what restore_command runs.
//!
//! P7: only a source's definitive NOT_FOUND is "no such file"; everything else is tried again until the
//! timeout and then stops recovery. PATH appears complete and of the exact size, or not at all.
//!
//! PostgreSQL's own %p is not fsynced: a file that it keeps goes through durable_rename(), which fsyncs it first
//! (KeepFileRestoredFromArchive() in src/backend/access/transam/xlogarchive.c), and after a crash it deletes what is
//! left under that name and asks again (RestoreArchivedFile(), same file). Any other PATH is fsynced.

use super::{args::WalFetchArgs, exit};
use crate::{
    config::Config,
    error::{Error, Failure},
    wal_source::{self, Expected, Fetch, Target},
};
use klio_storage::layout::WalFile;
use std::{ffi::OsStr, path::Path, sync::Arc};
use tokio::time::Instant;

/// Runs it.
pub(super) async fn run(config: &Config, args: &WalFetchArgs) -> Result<u8, Error> {
    let file: WalFile = args.name.parse().map_err(|error| {
        Error::new(Failure::Config, format!("read file name: {error}"))
            .hint("restore_command = 'klio wal-fetch %f \"%p\"'")
    })?;
    directly(config, file, &args.path, Instant::now() + args.timeout).await?;
    Ok(exit::OK)
}

/// Fetches without an agent.
async fn directly(
    config: &Config,
    file: WalFile,
    path: &Path,
    deadline: Instant,
) -> Result<(), Error> {
    let expected = data_dir(path).map(Expected::of_data_dir).unwrap_or_default();
    let fetch = Fetch { source: wal_source::open(config)?, file, expected };
    let target = Arc::new(Target::beside(path)?);
    fetch.until(&target, deadline).await?;
    target.commit(path, !is_postgresql_s(path))
}

/// Whether PostgreSQL asked for this in recovery: these are its names for what it restores.
fn is_postgresql_s(path: &Path) -> bool {
    matches!(path.file_name().and_then(OsStr::to_str), Some("RECOVERYXLOG" | "RECOVERYHISTORY"))
}

/// The data directory of `<data>/pg_wal/RECOVERYXLOG`; PostgreSQL runs the command in it.
fn data_dir(path: &Path) -> Option<&Path> {
    let folder = path.parent().filter(|folder| folder.file_name() == Some(OsStr::new("pg_wal")))?;
    if !is_postgresql_s(path) {
        return None;
    }
    folder.parent().map(|data| if data.as_os_str().is_empty() { Path::new(".") } else { data })
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
