//! The blocking work of a backup on threads of its own, watched from the async side.
//!
//! While files are copied the SQL session is asked from time to time whether it is still there, and whether
//! a standby is still one: a backup whose session is gone is lost, and hours of copying would be, too.
//! A reason to end reaches the engine through `stop`: its source, its readers and its files all end with it.

use super::{reservation::Reservation, session::Session};
use crate::{
    error::{Error, Failure},
    server_link::GrpcFiles,
};
use klio_proto::Code;
use std::time::Duration;
use tokio::{task::JoinHandle, time::MissedTickBehavior};
use tokio_util::sync::CancellationToken;

/// Between two looks at the session.
const LOOK: Duration = Duration::from_secs(10);

/// What the user asked for while it ran.
pub(super) fn stopped() -> Error {
    Error::new(Failure::Stopped, "take backup: stopped before it was done")
        .hint("nothing was committed; the next backup uses what was sent")
}

/// What ends a backup early.
#[derive(Debug)]
pub(super) struct Ends<'a> {
    /// The user, or the daemon that stops.
    pub user: &'a CancellationToken,
    /// A child of it: ends the engine.
    pub engine: &'a CancellationToken,
    /// The server's word.
    pub reservation: &'a mut Reservation,
}

impl Ends<'_> {
    /// Waits for something, unless the backup has to end.
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

    /// Waits for the engine; looks after the session meanwhile, where there is one.
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
            // Outside of the select: a look that is dropped half way spoils the session.
            if let Some((session, in_recovery)) = &mut session
                && let Err(error) = session.ping(*in_recovery).await
            {
                break error;
            }
        };
        self.engine.cancel();
        // The engine sees it at its next file, message or chunk.
        let _ = work.await;
        Err(reason)
    }
}

/// The engine's own error, in the server's words where it was the server's.
fn finished<T>(
    done: Result<Result<T, klio_storage::Error>, tokio::task::JoinError>,
    files: &GrpcFiles,
) -> Result<T, Error> {
    match done {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(engine(&error, files)),
        Err(error) => {
            Err(Error::new(Failure::Code(Code::Internal), format!("archive files: {error}")))
        }
    }
}

/// From the engine to a person.
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
