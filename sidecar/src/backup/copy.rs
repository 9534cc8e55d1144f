//! Runs the blocking work of a backup on its own threads and watches it from the async side.
//!
//! While files are copied, the SQL session is checked from time to time: is it still alive, and is a standby still a
//! standby? A backup whose session is gone is lost, and hours of copying would be wasted. To end the backup early,
//! `stop` is cancelled, which ends the engine's source, its readers and its files.

use super::{reservation::Reservation, session::Session};
use crate::{
    error::{Error, Failure},
    server_link::GrpcFiles,
};
use klio_proto::Code;
use std::time::Duration;
use tokio::{task::JoinHandle, time::MissedTickBehavior};
use tokio_util::sync::CancellationToken;

/// Interval of the checks of the session.
const LOOK: Duration = Duration::from_secs(10);

/// The error when the user or `klio stream` stopped the backup.
pub(super) fn stopped() -> Error {
    Error::new(Failure::Stopped, "take backup: stopped before it was done")
        .hint("nothing was committed; the next backup reuses what was sent")
}

/// What can end a backup early.
#[derive(Debug)]
pub(super) struct Ends<'a> {
    /// Cancelled by the user or when `klio stream` stops.
    pub user: &'a CancellationToken,
    /// Its child token; ends the engine.
    pub engine: &'a CancellationToken,
    /// Lost when the server withdraws it.
    pub reservation: &'a mut Reservation,
}

impl Ends<'_> {
    /// Waits for `work`, unless the backup has to end.
    pub async fn unless<T>(
        &mut self,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        tokio::select! {
            biased;
            () = self.user.cancelled() => Err(stopped()),
            result = work => result,
            error = self.reservation.lost() => Err(error),
        }
    }

    /// Waits for the engine. Checks the session meanwhile, if there is one.
    pub async fn watch<T>(
        &mut self,
        mut work: JoinHandle<Result<T, klio_storage::Error>>,
        mut session: Option<(&mut Session, bool)>,
        files: &GrpcFiles,
    ) -> Result<T, Error> {
        let mut tick = tokio::time::interval(LOOK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let reason = loop {
            tokio::select! {
                biased;
                done = &mut work => return finished(done, files),
                () = self.user.cancelled() => break stopped(),
                error = self.reservation.lost() => break error,
                _ = tick.tick() => {}
            }
            // Outside of the select, because a query that is cancelled half way makes the session unusable.
            if let Some((session, in_recovery)) = &mut session
                && let Err(error) = session.ping(*in_recovery).await
            {
                break error;
            }
        };
        self.engine.cancel();
        // The engine notices it at its next file, message or chunk.
        let _ = work.await;
        Err(reason)
    }
}

/// The engine's own error, or the server's error if the engine failed because of it.
fn finished<T>(
    done: Result<Result<T, klio_storage::Error>, tokio::task::JoinError>,
    files: &GrpcFiles,
) -> Result<T, Error> {
    match done {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(engine(&error, files)),
        Err(error) => {
            Err(Error::new(Failure::Code(Code::Internal), format!("back up files: {error}")))
        }
    }
}

/// Converts an error of the engine for the user.
pub(super) fn engine(error: &klio_storage::Error, files: &GrpcFiles) -> Error {
    if let Some(failure) = files.failure() {
        return failure;
    }
    let failure = match error.kind {
        klio_storage::Kind::Corrupt => Failure::Code(Code::Corrupt),
        _ => Failure::Local,
    };
    Error::of_storage(failure, error)
}
