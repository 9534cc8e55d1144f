//! Takes a backup (the span `backup_run`): from the first connection to the committed record.

use super::{
    Backup, Order,
    copy::{self, Ends},
    now_unix,
    pages::PageCheck,
    place::{self, Place},
    progress::Feed,
    reservation::Reservation,
    session::{Facts, Session, Started, Stopped},
    wal::{self, Needed},
    walk::{self, Tablespace, Tree},
};
use crate::{
    config::OnBadPages,
    error::{Error, Failure},
    server_link::{BaseLink, GrpcFiles},
};
use klio_pg::{BackupLabel, Lsn, TABLESPACE_MAP_FILE};
use klio_proto::{Code, v1};
use klio_storage::{
    catalog::{BackupRecord, PagesRecord, TablespaceRecord},
    crash_point,
    layout::ClusterName,
    record::Unknown,
    repository::{Adopted, Part, Repository, Secret, SnapshotId, SnapshotMeta, SnapshotSummary},
};
use std::{
    sync::Arc,
    time::{Duration, UNIX_EPOCH},
};
use tokio::{runtime::Handle, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use tracing::Span;

/// State that the phases share.
struct Run<'a> {
    backup: &'a Backup,
    order: &'a Order,
    begun_unix: f64,
    facts: Facts,
    place: Place,
    base: BaseLink,
    files: GrpcFiles,
    repository: Repository,
    /// The newest backup's snapshot; files that look the same as in it are not read.
    parent: Option<SnapshotId>,
    /// Cancelled to end the engine.
    engine: CancellationToken,
}

/// The result of copying the data directory.
struct Copied {
    started: Started,
    parts: Vec<Part>,
    tablespaces: Vec<Tablespace>,
    check: Option<Arc<PageCheck>>,
}

pub(super) async fn take(
    backup: &Backup,
    order: &Order,
    span: &Span,
) -> Result<BackupRecord, Error> {
    let begun_unix = now_unix();
    backup.progress.enter("connecting");
    let (mut session, facts) = Session::open(Arc::clone(&backup.info)).await?;
    let engine = backup.stop.child_token();
    let prepared = async {
        let place = place::find(&backup.data_directory, &facts)?;
        // Checked before anything is sent; tablespaces that are created meanwhile are checked later.
        place::tablespaces(&place, &session.tablespaces().await?)?;
        let link = &backup.link;
        let base = BaseLink::new(link.clone(), engine.clone());
        let reservation = Reservation::take(link, &backup.cluster, order.name.as_ref()).await?;
        crash_point!("backup.reserved");
        span.record("backup.name", reservation.name.as_str());
        tracing::debug!(backup = %reservation.name, cluster = %backup.cluster, "backup begins");
        let files =
            GrpcFiles::new(link.clone(), backup.cluster.clone(), Handle::current(), engine.clone());
        let repository = open_repository(backup, &facts, &base, &files).await?;
        let parent = if order.full_read { None } else { newest_snapshot(backup, &base).await? };
        let run = Run {
            backup,
            order,
            begun_unix,
            facts,
            place,
            base,
            files,
            repository,
            parent,
            engine: engine.clone(),
        };
        Ok::<_, Error>((run, reservation))
    };
    let prepared = tokio::select! {
        biased;
        () = backup.stop.cancelled() => Err(copy::stopped()),
        prepared = prepared => prepared,
    };
    let (run, mut reservation) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => {
            session.close().await;
            return Err(error);
        }
    };
    let name = reservation.name.clone();
    let mut ends = Ends { user: &backup.stop, engine: &engine, reservation: &mut reservation };
    let copied = run.copy(&mut session, name.as_str(), &mut ends).await;
    let stopped = match copied {
        Ok(copied) => {
            crash_point!("backup.copied");
            backup.progress.enter("ending backup mode");
            session.stop(&run.facts).await.map(|stopped| (copied, stopped))
        }
        Err(error) => Err(error),
    };
    // TAKE1: PostgreSQL is out of backup mode when this returns, whatever the result is.
    let (copied, stopped) = match stopped {
        Ok(both) => {
            session.close().await;
            both
        }
        Err(error) => {
            session.abandon().await;
            return Err(error);
        }
    };
    crash_point!("backup.stopped");
    let snapshot = run.assemble(&name, &copied, &stopped, &mut ends).await?;
    crash_point!("backup.assembled");
    let record = run.record(name, &copied, &stopped, &snapshot)?;
    let needed = run.needed(record.start_lsn, record.stop_lsn, record.stop_timeline);
    backup.progress.enter("waiting for WAL");
    let patience = backup.settings.wal_timeout;
    ends.unless(wal::wait(&run.base, &backup.cluster, needed, patience)).await?;
    ends.unless(run.prove(record.start_lsn)).await?;
    crash_point!("backup.covered");
    let record = run.commit(record, &mut ends).await?;
    crash_point!("backup.committed");
    // Only now may the server run maintenance.
    drop(reservation);
    Ok(record)
}

impl Run<'_> {
    /// Enters backup mode and copies every file.
    async fn copy(
        &self,
        session: &mut Session,
        name: &str,
        ends: &mut Ends<'_>,
    ) -> Result<Copied, Error> {
        let progress = &self.backup.progress;
        let fast = self.backup.fast(self.order);
        progress.enter(if fast { "checkpoint" } else { "checkpoint (spread)" });
        let label = format!("klio {name}");
        let started = ends.unless(session.start(&label, fast)).await?;
        crash_point!("backup.started");
        // Checked early, not after hours of copying: is WAL being streamed at all?
        let needed =
            self.needed(started.start_lsn, started.start_lsn.advance(1), self.facts.timeline);
        let patience = self.backup.settings.wal_timeout;
        ends.unless(wal::wait(&self.base, &self.backup.cluster, needed, patience)).await?;
        let oids = session.tablespaces().await?;
        let tablespaces = place::tablespaces(&self.place, &oids)?;
        let control = &self.place.control;
        let check = control.checksums.then(|| {
            let (block, segment) = (control.block_size, control.relation_segment_blocks);
            Arc::new(PageCheck::new(started.start_lsn, block, segment))
        });
        let tree = Tree {
            data: self.place.data.clone(),
            tablespaces: tablespaces.clone(),
            directory: control.tablespace_directory(self.facts.version.major()),
            check: check.clone(),
            stop: self.engine.clone(),
        };
        if self.order.typed {
            progress.enter("measuring");
            self.measure(tree.clone());
        }
        progress.enter("copying");
        let standby = self.facts.in_recovery;
        let work =
            self.archive(move |repository, parent, feed| repository.snapshot(&tree, parent, feed));
        let all = ends.watch(work, Some((&mut *session, standby)), &self.files).await?;
        self.judge_pages(check.as_ref().map_or(0, |check| check.bad()))?;
        // TAKE3
        let data = self.place.data.clone();
        let work = self.archive(move |repository, _, feed| {
            repository.snapshot(&walk::control_file(&data)?, None, feed)
        });
        let control = ends.watch(work, Some((session, standby)), &self.files).await?;
        report(&all);
        Ok(Copied { started, parts: vec![all, control], tablespaces, check })
    }

    /// Counts files and bytes for the display, on a thread beside the copying. Until it is done, the display shows no
    /// total.
    fn measure(&self, tree: Tree) {
        let progress = Arc::clone(&self.backup.progress);
        drop(tokio::task::spawn_blocking(move || {
            if let Ok((files, bytes)) = tree.measure() {
                progress.expect(files, bytes);
            }
        }));
    }

    /// Runs `work` with the engine on a blocking thread.
    fn archive<F>(&self, work: F) -> JoinHandle<Result<Part, klio_storage::Error>>
    where
        F: FnOnce(
                &Repository,
                Option<&SnapshotId>,
                Arc<dyn klio_storage::repository::Progress>,
            ) -> Result<Part, klio_storage::Error>
            + Send
            + 'static,
    {
        let (repository, parent) = (self.repository.clone(), self.parent);
        let feed = Arc::new(Feed(Arc::clone(&self.backup.progress)));
        let span = Span::current();
        tokio::task::spawn_blocking(move || {
            span.in_scope(|| work(&repository, parent.as_ref(), feed))
        })
    }

    fn judge_pages(&self, bad: u64) -> Result<(), Error> {
        if bad == 0 || self.backup.settings.on_bad_pages == OnBadPages::Record {
            return Ok(());
        }
        let message = format!(
            "check pages: expected right checksums, found {bad} wrong ones, and backup.on_bad_pages is fail"
        );
        Err(Error::new(Failure::Code(Code::Corrupt), message)
            .hint("the log names the pages; backup.on_bad_pages = record takes the backup anyway"))
    }

    /// Adds the label files, and joins all parts into one snapshot.
    async fn assemble(
        &self,
        name: &klio_storage::layout::BackupName,
        copied: &Copied,
        stopped: &Stopped,
        ends: &mut Ends<'_>,
    ) -> Result<SnapshotSummary, Error> {
        self.backup.progress.enter("assembling");
        let mut texts = vec![(BackupLabel::FILE, stopped.backup_label.clone())];
        if !stopped.tablespace_map.is_empty() {
            texts.push((TABLESPACE_MAP_FILE, stopped.tablespace_map.clone()));
        }
        let meta = SnapshotMeta {
            cluster: place_of(&self.backup.cluster),
            backup: name.clone(),
            began: UNIX_EPOCH + Duration::from_secs_f64(self.begun_unix),
        };
        let data = self.place.data.clone();
        let (repository, mut parts) = (self.repository.clone(), copied.parts.clone());
        let feed = Arc::new(Feed(Arc::clone(&self.backup.progress)));
        let span = Span::current();
        let work = tokio::task::spawn_blocking(move || {
            span.in_scope(|| {
                let labels = walk::label_files(&data, texts)?;
                parts.push(repository.snapshot(&labels, None, feed)?);
                repository.assemble(&parts, &meta)
            })
        });
        ends.watch(work, None, &self.files).await
    }

    const fn needed(&self, from: Lsn, to: Lsn, timeline: klio_pg::TimelineId) -> Needed {
        Needed { timeline, from, to, standby: self.facts.in_recovery }
    }

    fn record(
        &self,
        name: klio_storage::layout::BackupName,
        copied: &Copied,
        stopped: &Stopped,
        snapshot: &SnapshotSummary,
    ) -> Result<BackupRecord, Error> {
        let label = BackupLabel::parse(&stopped.backup_label)
            .map_err(|error| Error::new(Failure::Postgres, error))?;
        let pages = copied
            .check
            .as_ref()
            .map_or_else(PagesRecord::default, |check| check.finish(stopped.stop_lsn));
        self.judge_pages(pages.bad)?;
        let tablespaces = copied.tablespaces.iter().map(|tablespace| TablespaceRecord {
            oid: tablespace.oid,
            location: tablespace.location.display().to_string(),
            unknown: Unknown::default(),
        });
        Ok(BackupRecord {
            name,
            system_identifier: self.facts.system_identifier.to_string(),
            postgres_version: self.facts.version.number(),
            segment_size: self.facts.segment_size.as_u32(),
            start_timeline: label.start_timeline,
            start_lsn: label.start_lsn,
            stop_timeline: stopped.timeline,
            stop_lsn: stopped.stop_lsn,
            started_postgres_unix: copied.started.at_unix,
            stopped_postgres_unix: stopped.at_unix,
            begun_unix: self.begun_unix,
            // Set by the server.
            committed_unix: 0.0,
            duration_seconds: 0.0,
            from_standby: self.facts.in_recovery,
            snapshot: snapshot.id.to_string(),
            backup_label: stopped.backup_label.clone(),
            tablespace_map: stopped.tablespace_map.clone(),
            tablespaces: tablespaces.collect(),
            size_bytes: snapshot.bytes,
            files: snapshot.files,
            directories: snapshot.directories,
            added_bytes: snapshot.added_bytes,
            stored_bytes: snapshot.stored_bytes,
            pages,
            label: self.order.label.clone(),
            keep: self.order.keep,
            redated_unix: None,
            klio_version: env!("CARGO_PKG_VERSION").to_owned(),
            unknown: Unknown::default(),
        })
    }

    /// TAKE6: proves that the files belong to the history that the backup is committed to.
    async fn prove(&self, from: Lsn) -> Result<(), Error> {
        if self.backup.writer_id.is_empty() {
            return Ok(());
        }
        let found = self.backup.history(Some(from)).await?;
        if place_of(&found) == place_of(&self.backup.cluster) {
            return Ok(());
        }
        let expected = &self.backup.cluster;
        let message = format!(
            "commit backup: expected PostgreSQL to continue {expected} as at the start, found {found}"
        );
        Err(Error::new(Failure::Code(Code::Diverged), message)
            .hint("PostgreSQL was restored or replaced during the backup; take the backup again"))
    }

    /// TAKE2. The same record may be sent several times; the server commits it once.
    async fn commit(
        &self,
        record: BackupRecord,
        ends: &mut Ends<'_>,
    ) -> Result<BackupRecord, Error> {
        const DOING: &str = "commit backup";
        self.backup.progress.enter("committing");
        let record = BackupRecord { duration_seconds: now_unix() - self.begun_unix, ..record };
        let json = serde_json::to_vec(&record)
            .map_err(|e| Error::new(Failure::Code(Code::Internal), format!("{DOING}: {e}")))?;
        let cluster = self.backup.cluster.to_string();
        let request = v1::CommitBackupRequest {
            cluster,
            record: json.into(),
            writer_id: self.backup.writer_id.clone(),
        };
        let send = self
            .base
            .call(DOING, async |mut client| client.commit_backup(request.clone()).await.map(drop));
        ends.unless(send).await?;
        tracing::debug!(backup = %record.name, snapshot = record.snapshot, "backup committed");
        Ok(BackupRecord { committed_unix: now_unix(), ..record })
    }
}

async fn open_repository(
    backup: &Backup,
    facts: &Facts,
    base: &BaseLink,
    files: &GrpcFiles,
) -> Result<Repository, Error> {
    const DOING: &str = "open repository";
    backup.progress.enter("opening repository");
    let request = v1::OpenRepositoryRequest {
        cluster: backup.cluster.to_string(),
        system_identifier: facts.system_identifier,
        segment_size: facts.segment_size.as_u32(),
        postgres_version: facts.version.number(),
        unproven: backup.writer_id.is_empty(),
    };
    let answer = base
        .call(DOING, async |mut client| {
            Ok(client.open_repository(request.clone()).await?.into_inner())
        })
        .await?;
    // The parser's error would contain a part of the secret.
    let secret: Secret = serde_json::from_slice(&answer.secret).map_err(|_| {
        let message = format!("{DOING}: expected the repository's secret, found something else");
        Error::new(Failure::Code(Code::Invalid), message)
    })?;
    let shared = files.clone();
    let open = move || {
        let mut repository = Repository::open(Arc::new(shared), &secret)?;
        let Adopted { packs, bytes, absent } = repository.adopt()?;
        if absent > 0 {
            tracing::warn!(
                packs = absent,
                "some packs are missing or damaged; sending their content again (costs space only); hint: klio verify repairs what the other tier has and lists the backups that stay damaged"
            );
        }
        if packs > 0 {
            tracing::info!(packs, bytes, "reusing the packs of an unfinished backup");
        }
        Ok(repository.compressing(answer.compression_level))
    };
    let span = Span::current();
    let opened = tokio::task::spawn_blocking(move || span.in_scope(open)).await;
    match opened {
        Ok(Ok(repository)) => Ok(repository),
        Ok(Err(error)) => Err(copy::engine(&error, files).during(DOING)),
        Err(error) => Err(Error::new(Failure::Code(Code::Internal), format!("{DOING}: {error}"))),
    }
}

/// The snapshot of the newest backup. Problems that the server lists beside the backups are ignored.
async fn newest_snapshot(backup: &Backup, base: &BaseLink) -> Result<Option<SnapshotId>, Error> {
    let newest = newest(backup, base).await?;
    Ok(newest.and_then(|record| record.snapshot.parse().ok()))
}

/// The newest backup's record, if there is one that can be read.
pub(super) async fn newest(
    backup: &Backup,
    base: &BaseLink,
) -> Result<Option<BackupRecord>, Error> {
    let request = v1::ListBackupsRequest { cluster: backup.cluster.to_string() };
    let answer = base
        .call("list backups", async |mut client| {
            Ok(client.list_backups(request.clone()).await?.into_inner())
        })
        .await;
    match answer {
        Ok(answer) => {
            let records =
                answer.backups.iter().filter_map(|b| serde_json::from_slice(&b.record).ok());
            Ok(records.max_by(|a: &BackupRecord, b: &BackupRecord| {
                a.committed_unix.total_cmp(&b.committed_unix)
            }))
        }
        Err(error) if error.failure == Failure::Code(Code::NotFound) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The directory of a generation: that of the first one has the plain name, also where it was named by its number.
pub(super) fn place_of(cluster: &ClusterName) -> ClusterName {
    cluster.with_generation(cluster.generation())
}

fn report(part: &Part) {
    if part.files_vanished + part.files_resized > 0 {
        tracing::info!(
            vanished = part.files_vanished,
            resized = part.files_resized,
            "files were dropped, extended or truncated during the backup; WAL replay restores them"
        );
    }
}
