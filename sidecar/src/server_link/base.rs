//! Calls to the service `Base`, with retries.
//!
//! Transient errors are retried with growing pauses until the patience ends, over a new connection if the old one may
//! be lost. Only for calls that may be repeated, which are all of `Base` except those with long answers.

use super::{Connection, ServerLink, Traced};
use crate::{
    backoff::Backoff,
    error::{Error, Failure},
};
use klio_proto::{Code, v1::base_client::BaseClient};
use rand::{SeedableRng, rngs::StdRng};
use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::Status;

/// How long one call is retried: long enough for a server to restart, so that a backup of hours survives it.
const PATIENCE: Duration = Duration::from_secs(120);
/// A server that does not answer a call for this long counts as dead. Generous, for a pack and its fsync on a slow
/// disk.
const CALL_TIMEOUT: Duration = Duration::from_secs(300);

/// A link to one server, with one connection at a time.
#[derive(Debug)]
pub struct BaseLink {
    link: ServerLink,
    stop: CancellationToken,
    patience: Duration,
    /// `None` until the first use and after each transient error.
    connection: Mutex<Option<Connection>>,
}

impl BaseLink {
    /// Opens no connection yet; cancelling `stop` ends every call at once.
    pub fn new(link: ServerLink, stop: CancellationToken) -> Self {
        Self { link, stop, patience: PATIENCE, connection: Mutex::default() }
    }

    /// The same link with another patience.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// The server's address as configured.
    pub fn address(&self) -> &str {
        self.link.address()
    }

    /// Runs a call until it succeeds, fails with a permanent error, or the patience ends.
    ///
    /// # Errors
    /// The last error; its text begins with `doing`.
    pub async fn call<T, F>(&self, doing: &str, call: F) -> Result<T, Error>
    where
        F: AsyncFn(BaseClient<Traced>) -> Result<T, Status>,
    {
        tokio::select! {
            biased;
            () = self.stop.cancelled() => Err(stopped(doing)),
            result = self.persist(doing, &call) => result,
        }
    }

    async fn persist<T, F>(&self, doing: &str, call: &F) -> Result<T, Error>
    where
        F: AsyncFn(BaseClient<Traced>) -> Result<T, Status>,
    {
        let deadline = Instant::now() + self.patience;
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(5));
        let mut rng = StdRng::from_os_rng();
        let mut told = false;
        loop {
            let error = match self.once(doing, call).await {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            let pause = backoff.pause(&mut rng);
            if !error.retryable() || Instant::now() + pause >= deadline {
                return Err(error);
            }
            // Warn only once; the last error is returned to the caller.
            if !std::mem::replace(&mut told, true) {
                let patience = self.patience;
                tracing::warn!(
                    hint = error.hint,
                    "{}; trying again for {patience:?}",
                    error.message
                );
            } else {
                tracing::debug!(hint = error.hint, "{}; trying again", error.message);
            }
            tokio::time::sleep(pause).await;
        }
    }

    async fn once<T, F>(&self, doing: &str, call: &F) -> Result<T, Error>
    where
        F: AsyncFn(BaseClient<Traced>) -> Result<T, Status>,
    {
        let client = self.connection().await.map_err(|error| error.during(doing))?.base();
        let result = match tokio::time::timeout(CALL_TIMEOUT, call(client)).await {
            Ok(result) => result,
            Err(_) => Err(Code::Unavailable.status(format!("no answer within {CALL_TIMEOUT:?}"))),
        };
        result.map_err(|status| {
            let error = Error::from_status(doing, &status);
            if error.retryable() {
                // Whatever the cause is, a new connection does no harm.
                *self.slot() = None;
            }
            error
        })
    }

    /// The connection; opened in one attempt if there is none.
    ///
    /// # Errors
    /// As for [`ServerLink::connect`].
    pub async fn connection(&self) -> Result<Connection, Error> {
        if let Some(open) = self.slot().clone() {
            return Ok(open);
        }
        let opened = self.link.connect().await?;
        *self.slot() = Some(opened.clone());
        Ok(opened)
    }

    fn slot(&self) -> MutexGuard<'_, Option<Connection>> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The error of every call after `stop` was cancelled.
fn stopped(doing: &str) -> Error {
    Error::new(Failure::Code(Code::Unavailable), format!("{doing}: stopped"))
}
