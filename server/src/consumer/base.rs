//! One cluster's base backups: uploads the objects of its jobs, proves them, and acknowledges the jobs.
//!
//! COPY1  a record is uploaded only when everything its backup needs is proven in tier 2: packs, index files,
//!     snapshot, config, keys, secret, `cluster.json`, and all finished WAL between its start and its stop. A record
//!     in the bucket therefore says that its backup can be restored from the bucket alone. The exception is the backup
//!     of an idle standby, whose last segment PostgreSQL has not finished;
//! COPY2  a repository file is uploaded only if it has the bytes of its name, so that damage on tier 1 does not
//!     spread;
//! COPY3  a file that maintenance removed from tier 1 before its turn is no longer work to do;
//! COPY4  an object that changed during its job gets another job after the queue has removed the first one, because
//!     the queue accepts no second job before that.

use super::{
    Attempt, Parts,
    reconcile::publish,
    wal::{attempt_of, is_of_the_store},
    worker::{Process, Turns, pause, read_job},
};
use crate::{
    base::BaseStore,
    queue::{BaseJob, Queue, job::base_subjects_of},
};
use async_nats::jetstream::{AckKind, Message};
use bytes::Bytes;
use futures::{FutureExt, future::BoxFuture};
use klio_proto::Code;
use klio_storage::{
    Error, Kind, Op,
    catalog::{BackupRecord, Timelines},
    crash_point,
    disk::read_small,
    generations::Generations,
    layout::{BackupName, BaseFile, BaseKind, BaseObject, ClusterName},
    record,
    repository::{decode_secret, secret_objects},
    tier2::{Outcome, Source, Wrapping},
    wal::{LevelChange, Pinned},
};
use std::{collections::BTreeMap, io, sync::Arc, time::Duration};
use tokio::sync::Semaphore;
use tracing::Instrument;

/// The longest pause of a record that waits for its packs: they are being uploaded.
const WAIT_MAX: Duration = Duration::from_secs(5);

/// The uploads of one cluster's base backups.
pub(super) struct BaseWork {
    parts: Parts,
    base: BaseStore,
    cluster: ClusterName,
    turns: Turns,
}

/// How a job ended.
enum Done {
    /// The object is proven to have this size; `written` bytes were uploaded.
    Proven { size: u64, written: u64, attempt: Attempt },
    /// There is nothing left to do (COPY3).
    Moot,
    /// Another object has to be in tier 2 first (COPY1).
    Waiting(String),
}

/// A record, and what it waits for.
struct Needed {
    record: BackupRecord,
    /// Objects that are not known to be in tier 2.
    missing: Vec<BaseObject>,
}

impl Process for BaseWork {
    fn cluster(&self) -> &ClusterName {
        &self.cluster
    }

    fn queue(&self) -> &Queue {
        &self.parts.queue
    }

    fn consumer(&self) -> (String, &'static str, String) {
        let what = "base backups of one cluster on their way to tier 2";
        (format!("base-{}", self.cluster), what, base_subjects_of(&self.cluster))
    }

    fn waits(&self) -> bool {
        self.base.archives().state(&self.cluster).unarchived_files > 0
    }

    fn stands(&self, why: Option<String>) {
        self.base.archives().stands(&self.cluster, why);
    }

    fn changes(&self) -> bool {
        true
    }

    /// COPY4: queues the object again if it changed during its job.
    fn removed_from_queue(&self, message: &Message) {
        let Ok(job) = BaseJob::decode(&message.payload) else { return };
        if self.base.archives().is_anew(&self.cluster, &job.object) {
            self.base.announce(&self.cluster, job.object, job.size);
        }
    }

    fn process<'a>(&'a self, message: &'a Message, delivered: i64) -> BoxFuture<'a, AckKind> {
        self.process_job(message, delivered).boxed()
    }
}

impl BaseWork {
    /// `None` where no base backups are served.
    pub(super) fn new(parts: Parts, cluster: ClusterName, slots: Arc<Semaphore>) -> Option<Self> {
        let base = parts.base.clone()?;
        Some(Self { parts, base, cluster, turns: Turns::new(slots) })
    }

    async fn process_job(&self, message: &Message, delivered: i64) -> AckKind {
        let problem = |why| self.base.archives().problem(&self.cluster, None, why);
        let decoded = BaseJob::decode(&message.payload);
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
            object = %job.object,
            bytes = job.size,
            delivered,
            outcome = tracing::field::Empty,
        );
        klio_telemetry::propagate::adopt(&span, &|key| {
            message.headers.as_ref()?.get(key).map(|value| value.as_str().to_owned())
        });
        self.offload(&job, delivered).instrument(span).await
    }

    async fn offload(&self, job: &BaseJob, delivered: i64) -> AckKind {
        let (archives, observer) = (self.base.archives(), &self.parts.observer);
        let work = async {
            archives.begins(&self.cluster, &job.object);
            self.work(&job.object).await
        };
        let Some(result) = self.turns.take(work).await else {
            return AckKind::Nak(None);
        };
        let span = tracing::Span::current();
        let failed = result.as_ref().err().map(attempt_of).is_some_and(is_of_the_store);
        self.turns.failed(failed);
        match result {
            Ok(Done::Proven { size, written, attempt }) => {
                crash_point!("base.uploaded");
                archives.proven(&self.cluster, job.object.clone(), size);
                observer.attempted_base(&self.cluster, attempt, written);
                span.record("outcome", attempt.as_str());
                if let BaseObject::Record(name) = &job.object {
                    tracing::info!(cluster = %self.cluster, backup = %name, "a backup is in tier 2");
                }
                AckKind::Ack
            }
            Ok(Done::Moot) => {
                tracing::debug!(cluster = %self.cluster, object = %job.object, "object was removed before it was uploaded");
                archives.moot(&self.cluster, &job.object);
                span.record("outcome", "moot");
                AckKind::Ack
            }
            Ok(Done::Waiting(reason)) => {
                tracing::debug!(cluster = %self.cluster, object = %job.object, reason, "upload waits for other objects");
                observer.attempted_base(&self.cluster, Attempt::Waiting, 0);
                span.record("outcome", Attempt::Waiting.as_str());
                AckKind::Nak(Some(pause(delivered, Attempt::Waiting).min(WAIT_MAX)))
            }
            Err(error) => self.failed(job, delivered, &error, &span),
        }
    }

    fn failed(
        &self,
        job: &BaseJob,
        delivered: i64,
        error: &Error,
        span: &tracing::Span,
    ) -> AckKind {
        let attempt = attempt_of(error);
        self.parts.observer.attempted_base(&self.cluster, attempt, 0);
        span.record("outcome", attempt.as_str());
        span.record("otel.status_code", "ERROR");
        span.record("error.type", attempt.as_str());
        let pause = pause(delivered, attempt);
        tracing::warn!(
            cluster = %self.cluster, object = %job.object, %error, attempt = delivered,
            pause_seconds = pause.as_secs_f64(), "upload failed; trying again after a pause"
        );
        let text = format!("archive {}: {error}", job.object);
        self.base.archives().problem(&self.cluster, Some(&job.object), text);
        AckKind::Nak(Some(pause))
    }

    async fn work(&self, object: &BaseObject) -> Result<Done, Error> {
        match object {
            BaseObject::File(file) => {
                let sha256 = (file.kind != BaseKind::Config).then_some(file.id);
                self.upload(object, sha256).await
            }
            BaseObject::Record(name) => self.record(object, name).await,
            BaseObject::WalLevels
            | BaseObject::Generations
            | BaseObject::Timelines
            | BaseObject::Cluster
            | BaseObject::Secret { .. } => {
                let theirs = self.read_record(object).await?;
                if let Some(theirs) = &theirs {
                    self.join(object, theirs).await?;
                }
                self.keep_current(object, theirs).await
            }
        }
    }

    /// COPY1: uploads a record after everything that its backup needs.
    async fn record(&self, object: &BaseObject, name: &BackupName) -> Result<Done, Error> {
        let Some(Needed { record, missing }) = self.missing_for(name).await? else {
            return Ok(Done::Moot);
        };
        if !missing.is_empty() {
            return self.wait_for(missing).await;
        }
        match self.parts.archives.owed_to(&self.cluster, &record) {
            Some(owed) => Ok(Done::Waiting(owed)),
            None => self.upload(object, None).await,
        }
    }

    async fn upload(
        &self,
        object: &BaseObject,
        sha256: Option<klio_storage::tier2::Sha256Sum>,
    ) -> Result<Done, Error> {
        let key = object.key(&self.cluster);
        let path = self.base.path(&self.cluster, object);
        let source = Source {
            path,
            sha256,
            zstd: false,
            plaintext_bytes: None,
            grows: false,
            wrapping: Wrapping::default(),
        };
        match self.parts.tier2.upload(&source, &key).await {
            Ok(uploaded) => {
                let (attempt, written) = match uploaded.outcome {
                    Outcome::Stored => (Attempt::Stored, uploaded.size),
                    Outcome::AlreadyThere => (Attempt::AlreadyThere, 0),
                };
                Ok(Done::Proven { size: uploaded.size, written, attempt })
            }
            // COPY3. An object that is in tier 2 only was proven by the code that removed it from tier 1.
            Err(error) if error.kind == Kind::NotFound => Ok(Done::Moot),
            Err(error) => Err(error),
        }
    }

    /// What a record's backup needs and tier 2 is not known to have; `None` when the record no longer exists.
    async fn missing_for(&self, name: &BackupName) -> Result<Option<Needed>, Error> {
        let base = &self.base;
        let (disk, cluster, wanted) = (base.clone(), self.cluster.clone(), name.clone());
        let read =
            tokio::task::spawn_blocking(move || disk.record_on_disk(&cluster, &wanted)).await;
        let read = read.map_err(|e| Error::new(Kind::Io, Op::Read, name, e))??;
        let Some(record) = read else { return Ok(None) };
        let snapshot =
            record.snapshot.parse().map_err(|e| Error::new(Kind::Corrupt, Op::Read, name, e))?;
        let needed = base.needs(&self.cluster, snapshot).await.map_err(|status| {
            let kind = match Code::of(&status) {
                Code::Corrupt | Code::NotFound => Kind::Corrupt,
                _ => Kind::Transient,
            };
            Error::new(
                kind,
                Op::Read,
                format!("the repository for backup {name}"),
                status.message(),
            )
        })?;
        let known = base.list_tier2(&self.cluster).await?;
        let held = base.objects_of_tier1(&self.cluster).await?;
        let sizes: BTreeMap<_, _> = held.into_iter().collect();
        // Both forms may exist, from earlier and later settings; the one that tier 1 reads first counts.
        let [secret, other] = secret_objects(base.at_rest());
        let secret = if sizes.contains_key(&secret) { secret } else { other };
        let fixed = needed.keys().copied().map(BaseObject::File);
        let all = fixed.chain([BaseObject::Cluster, secret]);
        let missing: Vec<_> = all.filter(|object| !is_proven(object, &known, &sizes)).collect();
        match missing.iter().find(|object| !sizes.contains_key(object)) {
            None => Ok(Some(Needed { record, missing })),
            Some(lost) => {
                let detail = format!("expected {lost} in a tier, found it in neither");
                Err(Error::new(Kind::Corrupt, Op::Upload, format!("the record of {name}"), detail))
            }
        }
    }

    /// Queues what a record waits for, because its jobs may have been lost. A job that is queued already is not queued
    /// twice.
    async fn wait_for(&self, missing: Vec<BaseObject>) -> Result<Done, Error> {
        let reason = match missing.as_slice() {
            [one] => format!("{one} is not in tier 2"),
            many => format!("{} objects are not in tier 2", many.len()),
        };
        for object in missing {
            self.base.announce(&self.cluster, object, 0);
        }
        Ok(Done::Waiting(reason))
    }

    /// Uploads one of the few objects whose content may change; the current content is tier 1's.
    async fn keep_current(
        &self,
        object: &BaseObject,
        theirs: Option<Bytes>,
    ) -> Result<Done, Error> {
        let path = self.base.path(&self.cluster, object);
        let (disk, at) = (self.base.disk().clone(), path.clone());
        let read = tokio::task::spawn_blocking(move || {
            match read_small(disk.as_ref(), &at, record::LIMIT_BYTES) {
                Ok(bytes) => Ok(Some(Bytes::from(bytes))),
                Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(e) => Err(Error::io(Op::Read, &at, e)),
            }
        });
        let ours = read.await.map_err(|e| Error::new(Kind::Io, Op::Read, path.display(), e))??;
        let Some(ours) = ours else { return Ok(Done::Moot) };
        let key = object.key(&self.cluster);
        let size = ours.len() as u64;
        match theirs {
            Some(theirs) if theirs == ours => {
                return Ok(Done::Proven { size, written: 0, attempt: Attempt::AlreadyThere });
            }
            Some(theirs) if !self.may_replace(object, &ours, &theirs)? => {
                let detail = "the object in tier 2 is of another cluster or repository";
                return Err(Error::new(Kind::Conflict, Op::Upload, key, detail).hint(
                    "two clusters may share this prefix; compare both files, nothing was changed",
                ));
            }
            Some(_) => {
                self.parts.tier2.replace(&key, ours.clone()).await?;
                let back = self.read_record(object).await?;
                if back.as_ref() != Some(&ours) {
                    let detail = "expected the bytes that were just written, found others";
                    return Err(Error::new(Kind::Transient, Op::Upload, key, detail));
                }
            }
            None => return self.upload(object, None).await,
        }
        Ok(Done::Proven { size, written: size, attempt: Attempt::Stored })
    }

    /// Tier 2's copy of a record.
    async fn read_record(&self, object: &BaseObject) -> Result<Option<Bytes>, Error> {
        self.parts.tier2.read_small(&object.key(&self.cluster), record::LIMIT_BYTES).await
    }

    /// Takes over what only tier 2 knows, so that tier 1's file contains all of it; tier 1 may have been set back. If
    /// each knows decisions that the other does not, nothing is changed and an error is returned.
    async fn join(&self, object: &BaseObject, theirs: &[u8]) -> Result<(), Error> {
        let key = object.key(&self.cluster);
        match object {
            BaseObject::Timelines => {
                let theirs = Timelines::decode(theirs, &key)?;
                self.base.join_timelines(&self.cluster, theirs).await
            }
            BaseObject::Generations => {
                self.base.join_generations(&self.cluster, record::decode(theirs, &key)?).await
            }
            BaseObject::WalLevels => {
                let theirs = LevelChange::decode_all(theirs, &key)?;
                let (store, cluster) = (self.base.wal().clone(), self.cluster.clone());
                let added =
                    tokio::task::spawn_blocking(move || store.add_levels(&cluster, &theirs));
                let added = added.await;
                added.map_err(|e| Error::new(Kind::Io, Op::Write, key, e))?.map(drop)
            }
            _ => Ok(()),
        }
    }

    /// Whether tier 1's content is a later form of tier 2's: the same secret encrypted differently, or another version
    /// of the same PostgreSQL.
    fn may_replace(&self, object: &BaseObject, ours: &[u8], theirs: &[u8]) -> Result<bool, Error> {
        let place = object.relative();
        match object {
            BaseObject::Cluster => {
                let (ours, theirs) =
                    (Pinned::decode(ours, &place)?, Pinned::decode(theirs, &place)?);
                Ok(ours.system_identifier == theirs.system_identifier)
            }
            BaseObject::Generations => {
                let ours: Generations = record::decode(ours, &place)?;
                let theirs: Generations = record::decode(theirs, &place)?;
                Ok(ours.joined(&theirs).is_ok_and(|joined| joined == ours))
            }
            // They were joined a moment ago, and entries are never removed.
            BaseObject::Timelines => {
                let ours = Timelines::decode(ours, &place)?;
                let theirs = Timelines::decode(theirs, &place)?;
                Ok(ours.joined(&theirs).is_ok_and(|joined| joined == ours))
            }
            BaseObject::Secret { encrypted } => {
                let at_rest = self.base.at_rest();
                let ours = decode_secret(ours, *encrypted, at_rest, &place)?;
                let theirs = decode_secret(theirs, *encrypted, at_rest, &place)?;
                Ok(ours.master_key == theirs.master_key)
            }
            // They were joined a moment ago, so ours contains all of theirs.
            BaseObject::WalLevels => Ok(true),
            BaseObject::File(_) | BaseObject::Record(_) => Ok(false),
        }
    }
}

/// COPY1: whether an object is in tier 2, with tier 1's size if tier 1 has it.
fn is_proven(
    object: &BaseObject,
    known: &BTreeMap<BaseObject, u64>,
    sizes: &BTreeMap<BaseObject, u64>,
) -> bool {
    let Some(size) = known.get(object) else { return false };
    !object.is_fixed() || sizes.get(object).is_none_or(|held| held == size)
}

/// Compares both tiers and queues what tier 2 does not have.
pub(super) async fn reconcile(parts: &Parts, cluster: &ClusterName) -> Result<(), Error> {
    let Some(base) = &parts.base else { return Ok(()) };
    let archives = base.archives();
    // Retention begins after this comparison, and must know the decisions about timelines.
    if base.wal().pinned(cluster).is_some() && base.wal().positions(cluster).is_empty() {
        let adopted = base.adopt_timelines(cluster).await;
        adopted.map_err(|e| Error::new(Kind::Transient, Op::Read, cluster, e.message()))?;
    }
    let missing = {
        let _turn = archives.begin_comparing(cluster).await;
        let held = base.objects_of_tier1(cluster).await?;
        let stored = base.objects_of_tier2(cluster).await?;
        let mut missing = archives.compared(cluster, &held, &stored, base.now_unix());
        // The size of changing objects says nothing about their content, so they are compared again each time, and
        // written only if they differ.
        let again = held.into_iter().filter(|(object, _)| !object.is_fixed());
        let again: Vec<_> =
            again.filter(|(object, _)| !missing.iter().any(|(m, _)| m == object)).collect();
        missing.extend(again);
        missing.sort_by_key(|(object, _)| rank(object));
        missing
    };
    archives.no_problem(cluster);
    if let Err(error) = base.backups(cluster).await {
        tracing::debug!(%cluster, %error, "cannot list backups");
    }
    let job = |(object, size)| BaseJob { cluster: cluster.clone(), object, size };
    publish(parts, cluster, missing.into_iter().map(job)).await
}

/// The order of uploads: first what opens the repository, records last.
const fn rank(object: &BaseObject) -> u8 {
    match object {
        BaseObject::Cluster
        | BaseObject::Generations
        | BaseObject::Timelines
        | BaseObject::WalLevels => 0,
        BaseObject::Secret { .. } => 1,
        BaseObject::File(BaseFile { kind: BaseKind::Config | BaseKind::Key, .. }) => 2,
        BaseObject::File(BaseFile { kind: BaseKind::Data, .. }) => 3,
        BaseObject::File(BaseFile { kind: BaseKind::Index, .. }) => 4,
        BaseObject::File(_) => 5,
        BaseObject::Record(_) => 6,
    }
}
