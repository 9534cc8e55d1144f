//! Fetches one file from a source into a target: in one attempt, in one attempt with short timeouts, or in attempts
//! until a deadline.
//!
//! P7: only a source's own `NotFound` is returned as such. If a copy is damaged, the other copy is requested once,
//! from the other tier or in the other form; if that fails, the damage is the error.

use super::{
    Answer, WalSource,
    place::{self, Filling, Target},
    prompt::Prompt,
};
use crate::{
    backoff::Backoff,
    error::{Error, Failure},
};
use bytes::Bytes;
use futures::StreamExt;
use klio_pg::{ControlFile, SegmentSize};
use klio_proto::Code;
use klio_storage::layout::WalFile;
use rand::{SeedableRng, rngs::StdRng};
use std::{path::Path, sync::Arc, time::Duration};
use tokio::{sync::mpsc, time::Instant};
use tracing::{Instrument, Span, field::Empty};

/// Pieces in memory between the connection and the disk; a source sends up to 1 MiB in each.
const PIECES_IN_FLIGHT: usize = 4;

/// What the WAL is checked against.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Expected {
    /// That of the data directory which the WAL is for; `None` if unknown.
    pub system_identifier: Option<u64>,
    /// Whether the reader is a PostgreSQL with a recovery target, which fails by itself if it does not reach the
    /// target.
    pub has_target: bool,
}

impl Expected {
    /// Reads the data directory's pg_control and configuration; what cannot be read is unknown.
    pub fn of_data_dir(directory: &Path) -> Self {
        let bytes = std::fs::read(directory.join("global/pg_control")).unwrap_or_default();
        let control = ControlFile::parse(&bytes).ok();
        let has_target = ["postgresql.conf", "postgresql.auto.conf"].iter().any(|name| {
            sets_target(&std::fs::read_to_string(directory.join(name)).unwrap_or_default())
        });
        Self { system_identifier: control.map(|control| control.system_identifier), has_target }
    }
}

/// Whether a configuration file sets a recovery target. An included file that unsets it is not noticed; PostgreSQL
/// then gets what it asks for.
fn sets_target(text: &str) -> bool {
    text.lines().any(|line| {
        let line = line.trim_start().to_ascii_lowercase();
        let Some(rest) = line.strip_prefix("recovery_target") else { return false };
        let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
        let (name, value) = rest.split_at(end);
        let value = value.trim_matches(|c: char| c.is_whitespace() || c == '=');
        let is_end = matches!(name, "" | "_lsn" | "_time" | "_xid" | "_name");
        is_end && !value.is_empty() && !value.starts_with("''")
    })
}

/// A file that was received whole and checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Received {
    /// Bytes of the file.
    pub size: u64,
    /// Whether the file will never change.
    pub is_final: bool,
    /// The segment size according to the file's header.
    pub segment: Option<SegmentSize>,
}

#[derive(Clone)]
pub struct Fetch {
    pub source: Arc<dyn WalSource>,
    pub file: WalFile,
    /// What it is checked against.
    pub expected: Expected,
}

impl Fetch {
    /// Makes one attempt, or two if the first copy is damaged. `None` if `final_only` and the file may still change.
    ///
    /// # Errors
    /// `NotFound` is definitive.
    pub async fn once(
        &self,
        target: &Arc<Target>,
        final_only: bool,
    ) -> Result<Option<Received>, Error> {
        let doing = |error: Error| error.during(format!("fetch {}", self.file));
        match self.attempt(target, final_only, false).await.map_err(doing) {
            Err(error) if error.failure == Failure::Code(Code::Corrupt) => {
                tracing::warn!("{}; asking for the other copy", error.message);
                // If there is no other copy, the damage is the error.
                self.attempt(target, final_only, true).await.map_err(|_| error)
            }
            answer => answer,
        }
    }

    /// Tries until it succeeds, fails with a permanent error, or `deadline` passes.
    ///
    /// # Errors
    /// `NotFound` is definitive.
    pub async fn until(&self, target: &Arc<Target>, deadline: Instant) -> Result<Received, Error> {
        let span = span(self.file);
        let result = self.persist(target, deadline).instrument(span.clone()).await;
        ended(&span, result.as_ref().map(Some));
        result
    }

    /// Makes one attempt with short timeouts, for a caller that asks again by itself. The first bytes must arrive
    /// before `begun`, each pause after that is at most `quiet_max`, and the whole must end before `longest`.
    ///
    /// # Errors
    /// `NotFound` is definitive.
    pub async fn promptly(
        self,
        target: &Arc<Target>,
        begun: Instant,
        quiet_max: Duration,
        longest: Instant,
    ) -> Result<Received, Error> {
        let source = Arc::new(Prompt { inner: self.source, begun, quiet_max });
        let fetch = Self { source, ..self };
        let span = span(fetch.file);
        let once = tokio::time::timeout_at(longest, fetch.once(target, false));
        let result = match once.instrument(span.clone()).await {
            Ok(Ok(Some(received))) => Ok(received),
            Ok(Err(error)) => Err(error),
            Ok(Ok(None)) | Err(_) => Err(fetch.too_long()),
        };
        ended(&span, result.as_ref().map(Some));
        result
    }

    fn too_long(&self) -> Error {
        let message = format!("fetch {}: not done within --timeout", self.file);
        Error::new(Failure::Code(Code::Unavailable), message)
    }

    async fn persist(&self, target: &Arc<Target>, deadline: Instant) -> Result<Received, Error> {
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(5));
        let mut rng = StdRng::from_os_rng();
        loop {
            let error = match tokio::time::timeout_at(deadline, self.once(target, false)).await {
                Ok(Ok(Some(received))) => return Ok(received),
                Ok(Err(error)) => error,
                Ok(Ok(None)) | Err(_) => return Err(self.too_long()),
            };
            let pause = backoff.pause(&mut rng);
            if !worth_retrying(&error) || Instant::now() + pause >= deadline {
                return Err(error);
            }
            tracing::warn!(hint = error.hint, "{}; trying again", error.message);
            tokio::time::sleep(pause).await;
        }
    }

    async fn attempt(
        &self,
        target: &Arc<Target>,
        final_only: bool,
        other_copy: bool,
    ) -> Result<Option<Received>, Error> {
        let Answer { shape, keys, pieces } = self.source.ask(self.file, other_copy).await?;
        if final_only && !shape.is_final() {
            return Ok(None);
        }
        if shape.before_hole && !self.expected.has_target {
            // PostgreSQL would take the padding for the end of WAL (P7).
            let message = format!(
                "{} ends early: the WAL after it was lost, but later WAL of its timeline exists",
                self.file
            );
            return Err(Error::new(Failure::Code(Code::Gap), message).hint(
                "recover to a target before the gap (klio list shows it), or from a later base backup",
            ));
        }
        let filling = Filling { file: self.file, shape, keys, expected: self.expected };
        let (sender, queue) = mpsc::channel::<Bytes>(PIECES_IN_FLIGHT);
        let target = Arc::clone(target);
        let writer = tokio::task::spawn_blocking(move || place::fill(&target, &filling, queue));
        let broken = pass_on(pieces, sender).await;
        let written = writer
            .await
            .unwrap_or_else(|error| Err(Error::new(Failure::Local, format!("write: {error}"))));
        match broken {
            Some(error) => Err(error),
            None => written.map(Some),
        }
    }
}

/// The span for one file, for all attempts together.
pub fn span(file: WalFile) -> Span {
    tracing::info_span!(
        "wal.fetch",
        otel.status_code = Empty,
        error.type = Empty,
        %file,
        bytes = Empty,
    )
}

/// Records the result on the span. "Not found" is an answer, not a failure.
pub fn ended(span: &Span, result: Result<Option<&Received>, &Error>) {
    match result {
        Ok(received) => {
            received.map(|received| span.record("bytes", received.size));
        }
        Err(error) => {
            span.record("error.type", error.failure.name());
            if error.failure != Failure::Code(Code::NotFound) {
                span.record("otel.status_code", "ERROR");
            }
        }
    }
}

/// Passes all pieces on; returns the error that interrupted the source, if any.
async fn pass_on(
    mut pieces: futures::stream::BoxStream<'static, Result<Bytes, Error>>,
    sender: mpsc::Sender<Bytes>,
) -> Option<Error> {
    while let Some(piece) = pieces.next().await {
        match piece {
            // An empty piece would be the end marker.
            Ok(data) if data.is_empty() => {}
            // The writer has failed and reports its own error.
            Ok(data) => {
                if sender.send(data).await.is_err() {
                    return None;
                }
            }
            Err(error) => return Some(error),
        }
    }
    // The empty piece marks the end; a queue that is merely closed does not.
    let _ = sender.send(Bytes::new()).await;
    None
}

/// Every transient error except `Local`, because trying again does not fix the disk of the data directory.
fn worth_retrying(error: &Error) -> bool {
    error.failure != Failure::Local && error.failure.retryable()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_target_that_is_set_ends_a_recovery_by_itself() {
        for (text, expected) in [
            ("", false),
            ("recovery_target_timeline = 'latest'", false),
            ("recovery_target_action = 'promote'\nrecovery_target_inclusive = on", false),
            ("#recovery_target_lsn = '0/1'", false),
            ("recovery_target_lsn = ''", false),
            ("recovery_target_lsn = '0/1'", true),
            ("  Recovery_Target_Time='2026-01-01'", true),
            ("recovery_target 'immediate'", true),
            ("recovery_target_time'2026-01-01'", true),
            ("recovery_target_xid = ''\nrecovery_target_name = 'x'", true),
        ] {
            assert_eq!(sets_target(text), expected, "{text}");
        }
    }
}
