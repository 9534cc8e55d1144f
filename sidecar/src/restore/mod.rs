//! `klio restore`: turns a base backup and a target into a directory that PostgreSQL recovers by itself.
//!
//! RESTORE1  nothing in the target directory is touched before the target is known to be reachable (`target`) and
//!     the directory has passed its checks (`check`);
//! RESTORE2  an incomplete directory cannot be started: pg_control is written last, and a marker file stays until
//!     then;
//! RESTORE3  a directory in which PostgreSQL runs, or may run, is never written to;
//! RESTORE4  every chunk written has the SHA-256 that names it; a restore reports success only after everything was
//!     synced;
//! RESTORE5  memory is bounded: the chunks in flight, one window cache, and the names of the directories that are
//!     open;
//! RESTORE6  a backup that is known to be damaged is restored only if it was named explicitly.
//!
//! Recovery itself is done by PostgreSQL, which gets its WAL through `klio wal-fetch` (P7).

mod check;
mod conf;
mod delta;
pub mod drill;
mod finish;
mod included;
mod links;
mod lived;
mod missing;
mod neutral;
mod place;
mod pour;
mod run;
mod scratch;
mod settings;
mod source;
mod standby;
mod stored;
mod strip;
mod target;
mod time;
mod wal;
mod way;

pub use check::Room;
pub use pour::{Progress, Replay, Seen};
pub use run::{Done, Order, Planned, Restore};
pub use scratch::Scratch;
pub use settings::{Action, Invocation, shell};
pub use source::{Catalog, Known, Source};
pub use standby::Standby;
pub use target::{Decision, Recovery, Wish};
pub use time::{explain_time, parse_time, show_time};
pub use wal::{Tail, Wal};

use crate::{
    bucket::of_storage,
    error::{Error, Failure, local},
};
use klio_proto::Code;

/// Name of the marker file that is in the target directory while the restore is incomplete.
pub const MARKER: &str = "klio-restore.unfinished";

/// Name of the file in the target directory that lists what `klio wal-tablespaces` changes in the copy's WAL.
pub const EDITS: &str = "klio-restore.tablespaces";

/// The error of a restore that the user stopped.
pub(crate) fn stopped() -> Error {
    Error::new(Failure::Stopped, "restore: stopped before it was done")
}

/// Turns the result of a blocking thread, which may also have panicked, into one of this crate.
pub(crate) fn joined<T>(
    result: Result<Result<T, klio_storage::Error>, tokio::task::JoinError>,
) -> Result<T, Error> {
    match result {
        Ok(result) => result.map_err(|error| of_storage(&error)),
        Err(error) => Err(Error::new(Failure::Code(Code::Internal), format!("restore: {error}"))),
    }
}
