//! `klio restore`: from a base backup and a target to a directory that PostgreSQL recovers by itself.
//!
//! RESTORE1  nothing in the target directory is touched before the target is known to be reachable (`target`) and
//!     the directory to be fit (`check`);
//! RESTORE2  a directory that is not whole cannot be started: pg_control is written last, and a marker file stays
//!     until then;
//! RESTORE3  a directory in which PostgreSQL runs, or may run, is never written to;
//! RESTORE4  every byte written has the SHA-256 that names its chunk; all is on disk when this ends well;
//! RESTORE5  memory is bounded: chunks in flight, one window cache, one directory's names;
//! RESTORE6  a backup that is known to be damaged is taken only by its name.
//!
//! Recovery itself is PostgreSQL's, through `klio wal-fetch` (P7).

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

/// In the target directory while it is not whole.
pub const MARKER: &str = "klio-restore.unfinished";

/// In the target directory: what `klio wal-tablespaces` changes in the copy's WAL.
pub const EDITS: &str = "klio-restore.tablespaces";

/// What the user asked for while it ran.
pub(crate) fn stopped() -> Error {
    Error::new(Failure::Stopped, "restore: stopped before it was done")
}

/// What a blocking thread gave.
pub(crate) fn joined<T>(
    result: Result<Result<T, klio_storage::Error>, tokio::task::JoinError>,
) -> Result<T, Error> {
    match result {
        Ok(result) => result.map_err(|error| of_storage(&error)),
        Err(error) => Err(Error::new(Failure::Code(Code::Internal), format!("restore: {error}"))),
    }
}
