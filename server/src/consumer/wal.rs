//! One cluster's WAL: uploads the files of its jobs, records them, and acknowledges the jobs.

use super::{
    Attempt, Parts,
    worker::{Process, Turns, pause, read_job},
};
use crate::{
    queue::{Job, Queue, job::subjects_of},
    rot,
};
use async_nats::jetstream::{AckKind, Message};
use futures::{FutureExt, future::BoxFuture};
use klio_storage::{
    Error, Kind, crash_point,
    layout::{ClusterName, Form, WalFile},
    tier2::{Outcome, Sha256Sum, Source, Uploaded, Wrapping},
};
use std::sync::Arc;
use tokio::sync::Semaphore;
use tracing::Instrument;

/// The uploads of one cluster's WAL.
pub(super) struct WalWork {
    parts: Parts,
    cluster: ClusterName,
    turns: Turns,
}

impl Process for WalWork {
    fn cluster(&self) -> &ClusterName {
        &self.cluster
    }

    fn queue(&self) -> &Queue {
        &self.parts.queue
    }

    fn consumer(&self) -> (String, &'static str, String) {
        let what = "WAL files of one cluster on their way to tier 2";
        (format!("wal-{}", self.cluster), what, subjects_of(&self.cluster))
    }

    fn waits(&self) -> bool {
        self.parts.archives.waits(&self.cluster)
    }

    fn stands(&self, why: Option<String>) {
        self.parts.archives.stands(&self.cluster, why);
    }

    fn process<'a>(&'a self, message: &'a Message, delivered: i64) -> BoxFuture<'a, AckKind> {
        self.process_job(message, delivered).boxed()
    }
}

impl WalWork {
    pub(super) fn new(parts: Parts, cluster: ClusterName, slots: Arc<Semaphore>) -> Self {
        Self { parts, cluster, turns: Turns::new(slots) }
    }

    async fn process_job(&self, message: &Message, delivered: i64) -> AckKind {
        let problem = |why| self.parts.archives.problem(&self.cluster, None, why);
        let decoded = Job::decode(&message.payload);
        let job = match read_job(&self.cluster, decoded, |job| &job.cluster, problem) {
            Ok(job) => job,
            Err(answer) => return answer,
        };
        let span = tracing::info_span!(
            "offload",
            otel.kind = "consumer",
            otel.status_code = tracing::field::Empty,
            error.type = tracing::field::Empty,
            messaging.system = "nats",
            cluster = %job.cluster,
            timeline = job.file.timeline().get(),
            segment = %job.file,
            bytes = job.size,
            delivered,
            outcome = tracing::field::Empty,
        );
        klio_telemetry::propagate::adopt(&span, &|key| {
            message.headers.as_ref()?.get(key).map(|value| value.as_str().to_owned())
        });
        self.offload(&job, delivered).instrument(span).await
    }

    async fn offload(&self, job: &Job, delivered: i64) -> AckKind {
        let moving = async {
            let under_way = self.parts.archives.moving(&self.cluster, job.file);
            under_way.progress.watch(self.upload(job)).await
        };
        let Some(result) = self.turns.take(moving).await else {
            return AckKind::Nak(None);
        };
        let (attempt, result) = match result {
            Ok(uploaded) => match self.record(job, uploaded).await {
                Ok(attempt) => (attempt, Ok(())),
                Err(error) => (Attempt::Transient, Err(error)),
            },
            Err(error) => (attempt_of(&error), Err(error)),
        };
        self.turns.failed(result.is_err() && is_of_the_store(attempt));
        let span = tracing::Span::current();
        span.record("outcome", attempt.as_str());
        let Err(error) = result else { return AckKind::Ack };
        if attempt == Attempt::Missing && self.parts.files.expired(&self.cluster, job.file) {
            tracing::debug!(cluster = %self.cluster, file = %job.file, "file expired before it was uploaded");
            return AckKind::Ack;
        }
        self.parts.observer.attempted(&self.cluster, attempt, 0);
        span.record("otel.status_code", "ERROR");
        span.record("error.type", attempt.as_str());
        if attempt == Attempt::Corrupt && self.put_aside(job.file).await {
            // The segment that replaces it is queued when it is sealed; a comparison takes it from tier 2 if tier 2
            // has it.
            self.parts.queue.want(&self.cluster);
            return AckKind::Ack;
        }
        let pause = pause(delivered, attempt);
        tracing::warn!(
            cluster = %self.cluster, file = %job.file, %error, attempt = delivered,
            pause_seconds = pause.as_secs_f64(), "upload failed; trying again after a pause"
        );
        let text = format!("archive {}: {error}", job.file);
        self.parts.archives.problem(&self.cluster, Some(job.file), text);
        AckKind::Nak(Some(pause))
    }

    /// Whether the local file is damaged. If so, it is set aside and counts as missing (`rotten.rs` of storage).
    async fn put_aside(&self, file: WalFile) -> bool {
        let (files, cluster) = (Arc::clone(&self.parts.files), self.cluster.clone());
        rot::put_aside(&self.cluster, file, move || files.doubt(&cluster, file)).await
    }

    async fn upload(&self, job: &Job) -> Result<Uploaded, Error> {
        let (form, _) = self.local(job.file).await;
        let key = job.file.key_in(&self.cluster, form);
        let source = self.source(job, form);
        match self.parts.tier2.upload(&source, &key).await {
            // It is not on tier 1 any more; the job is done if tier 2 has it.
            Err(error) if error.kind == Kind::NotFound => {
                for form in Form::BOTH {
                    let key = job.file.key_in(&self.cluster, form);
                    if let Some(size) = self.parts.tier2.size_of(&key).await? {
                        return Ok(Uploaded {
                            size,
                            sha256: job.sha256.unwrap_or(Sha256Sum::new([0; 32])),
                            outcome: Outcome::AlreadyThere,
                        });
                    }
                }
                Err(error.hint("restore the file to tier 1, as it is in neither tier"))
            }
            result => result,
        }
    }

    /// The form in which tier 1 has a file, and its size; if it has none, the form of new files.
    async fn local(&self, file: WalFile) -> (Form, Option<u64>) {
        let files = &self.parts.files;
        let ours = if files.at_rest().is_on() { Form::Age } else { Form::Plain };
        for form in [ours, ours.other()] {
            let path = files.path(&self.cluster, file, form);
            if let Ok(metadata) = tokio::fs::metadata(path).await {
                return (form, Some(metadata.len()));
            }
        }
        (ours, None)
    }

    fn source(&self, job: &Job, form: Form) -> Source {
        let files = &self.parts.files;
        let segment = matches!(job.file, WalFile::Segment(_));
        let size = segment.then(|| files.segment_size(&self.cluster)).flatten();
        Source {
            path: files.path(&self.cluster, job.file, form),
            sha256: job.sha256,
            zstd: !matches!(job.file, WalFile::History(_)),
            plaintext_bytes: size.map(|size| size.bytes()),
            grows: matches!(job.file, WalFile::Partial(_)),
            wrapping: Wrapping {
                age: form == Form::Age,
                other_key: Some(job.file.key_in(&self.cluster, form.other())),
                at_rest: files.at_rest(),
            },
        }
    }

    /// Records the upload (ARCHIVE1) before the job is acknowledged (JOB1).
    async fn record(&self, job: &Job, uploaded: Uploaded) -> Result<Attempt, Error> {
        crash_point!("wal.uploaded");
        let (_, local_size) = self.local(job.file).await;
        let archives = &self.parts.archives;
        archives.record(&self.cluster, job.file, local_size, uploaded).await?;
        crash_point!("wal.recorded");
        let (attempt, bytes) = match uploaded.outcome {
            Outcome::Stored => (Attempt::Stored, uploaded.size),
            Outcome::AlreadyThere => (Attempt::AlreadyThere, 0),
        };
        self.parts.observer.attempted(&self.cluster, attempt, bytes);
        tracing::debug!(cluster = %self.cluster, file = %job.file, outcome = attempt.as_str(), "file uploaded");
        Ok(attempt)
    }
}

pub(super) const fn attempt_of(error: &Error) -> Attempt {
    match error.kind {
        Kind::NotFound => Attempt::Missing,
        Kind::Corrupt | Kind::Newer => Attempt::Corrupt,
        Kind::Conflict => Attempt::Conflict,
        Kind::Denied => Attempt::Denied,
        Kind::Invalid => Attempt::Invalid,
        Kind::Full | Kind::Poisoned | Kind::Transient | Kind::Io => Attempt::Transient,
    }
}

/// Whether the object store failed. An error of one file says nothing about the next one.
pub(super) const fn is_of_the_store(attempt: Attempt) -> bool {
    matches!(attempt, Attempt::Denied | Attempt::Invalid | Attempt::Transient)
}
