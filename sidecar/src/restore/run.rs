//! From an order to a restored directory: plan, check, pour, finish.

use super::{
    Scratch, check,
    check::Room,
    finish,
    missing::Chunks,
    place::{Meaning, Places},
    pour::{Pour, Progress},
    settings::{Action, Invocation, Settings},
    source::{Catalog, Known, Source},
    target::{Decider, Decision, Verdict, Wish},
};
use crate::error::{Error, Failure};
use klio_proto::Code;
use klio_storage::{
    catalog::{BackupRecord, Survey, Target},
    repository::{Reader, Repository, StoredKind},
};
use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, Span, field::Empty};

/// Between two questions to the server, while it is not certain whether more was written.
const ASK_MIN: Duration = Duration::from_millis(200);
const ASK_MAX: Duration = Duration::from_secs(3);

/// What was asked for.
#[derive(Debug, Clone)]
pub struct Order {
    /// Target, timeline, backup.
    pub wish: Wish,
    /// The data directory to be; absolute.
    pub to: PathBuf,
    /// `--tablespace-map OLD=NEW`.
    pub maps: Vec<(String, PathBuf)>,
    /// What PostgreSQL does at the target; by default what PostgreSQL does by default, `pause`.
    pub action: Option<Action>,
    /// Use what is there.
    pub delta: bool,
}

/// Restores.
pub struct Restore {
    /// From where.
    pub source: Source,
    /// Moved as it goes.
    pub progress: Arc<Progress>,
    /// Ends it early.
    pub stop: CancellationToken,
    /// For restore_command.
    pub invocation: Invocation,
}

/// What will be done: everything is checked, nothing is touched (D1).
#[derive(Debug)]
pub struct Planned {
    /// Backup, way, target.
    pub decision: Decision,
    /// Where the files go.
    pub places: Places,
    /// Of the file systems.
    pub room: Vec<Room>,
    /// What PostgreSQL is told.
    pub settings: Settings,
    /// Files to be there in the end.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// What the reader should know.
    pub notes: Vec<String>,
    delta: bool,
    chunks: Chunks,
}

/// What was done.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Done {
    /// Files that are there.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes that were written.
    pub written: u64,
    /// Files and directories that were removed.
    pub removed: u64,
    /// Seconds.
    pub seconds: f64,
}

/// Of a snapshot, against what is in the places.
#[derive(Debug, Default)]
struct Measured {
    files: u64,
    bytes: u64,
    /// More bytes than there are now, by place.
    growth: Vec<(PathBuf, u64)>,
    has_conf: bool,
    has_control: bool,
}

impl Restore {
    /// Plans and checks.
    ///
    /// # Errors
    /// Why it cannot be done; nothing was touched.
    pub async fn plan(&self, order: &Order) -> Result<Planned, Error> {
        loop {
            self.progress.enter("looking for what is there");
            let catalog = self.source.catalog().await?;
            let (survey, verdict) = self.decide(&catalog, order).await?;
            let left = match verdict {
                Verdict::Decided(decision) => {
                    return self.prepare(&catalog, &survey, order, *decision).await;
                }
                Verdict::Wait(left) => left,
            };
            self.progress
                .enter("waiting until it is certain that PostgreSQL wrote nothing more by then");
            tracing::info!(
                ?left,
                "no transaction after the target has come yet; waiting to be sure"
            );
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return Err(super::stopped()),
                () = tokio::time::sleep(left.clamp(ASK_MIN, ASK_MAX)) => {}
            }
        }
    }

    /// The same, from what is known already.
    ///
    /// # Errors
    /// As [`Restore::plan`].
    pub async fn plan_from(&self, catalog: &Catalog, order: &Order) -> Result<Planned, Error> {
        let (survey, verdict) = self.decide(catalog, order).await?;
        match verdict {
            Verdict::Decided(decision) => self.prepare(catalog, &survey, order, *decision).await,
            Verdict::Wait(_) => Err(Error::new(
                Failure::Code(Code::Unavailable),
                "it is not certain yet what PostgreSQL wrote by that time",
            )),
        }
    }

    /// D6: from a sound backup, if one leads to the target; from a damaged one only by its name.
    async fn decide(&self, catalog: &Catalog, order: &Order) -> Result<(Survey, Verdict), Error> {
        let sound = catalog.sound();
        let by_name = order.wish.backup.is_some();
        if !by_name && sound.len() < catalog.backups.len() {
            let sound = Survey::new(&catalog.holdings, sound);
            match self.ask(&sound, order).await {
                Err(error) if error.failure == Failure::Unreachable => {}
                decided => return decided.map(|verdict| (sound, verdict)),
            }
        }
        let all = Survey::new(&catalog.holdings, catalog.records());
        let verdict = self.ask(&all, order).await?;
        if let Verdict::Decided(decision) = &verdict
            && !by_name
        {
            refuse_damaged(catalog, &decision.plan.backup)?;
        }
        Ok((all, verdict))
    }

    async fn ask(&self, survey: &Survey, order: &Order) -> Result<Verdict, Error> {
        let scratch = Scratch::new(None)?;
        self.progress.enter("reading WAL");
        let decider = Decider { source: &self.source, survey, scratch: &scratch };
        decider.decide(&order.wish).await
    }

    async fn prepare(
        &self,
        catalog: &Catalog,
        survey: &Survey,
        order: &Order,
        decision: Decision,
    ) -> Result<Planned, Error> {
        let record = &decision.plan.backup;
        let places = Places::new(order.to.clone(), record, &order.maps)?;
        check::places(&places, record, order.delta)?;
        self.progress.enter("reading the backup's list of files");
        let (repository, server) = self.source.repository(order.delta).await?;
        let reader = open(repository, record).await?;
        let (measuring, at, delta) = (reader.clone(), places.clone(), order.delta);
        let measured = tokio::task::spawn_blocking(move || measure(&measuring, &at, delta)).await;
        let measured = super::joined(measured)?;
        if !measured.has_control {
            let message = format!("backup {} has no pg_control", record.name);
            return Err(Error::new(Failure::Code(Code::Corrupt), message));
        }
        let room = check::room(&measured.growth)?;
        let timeline = decision.plan.path.timeline();
        let action = order.action.unwrap_or(match order.wish.target {
            Target::Latest => Action::Promote,
            _ => Action::Pause,
        });
        let settings = Settings {
            restore_command: self.invocation.restore_command(),
            recovery: decision.recovery.clone(),
            timeline: decision.plan.path.has_history.then_some(timeline),
            action,
        };
        let mut notes = decision.notes.clone();
        notes.extend(self.notes(record, &measured, survey, catalog));
        let Measured { files, bytes, .. } = measured;
        Ok(Planned {
            decision,
            places,
            room,
            settings,
            files,
            bytes,
            notes,
            delta: order.delta,
            // A whole restore reads what lies side by side, which windows are made for.
            chunks: Chunks { reader, server: server.filter(|_| order.delta) },
        })
    }

    fn notes(
        &self,
        record: &BackupRecord,
        measured: &Measured,
        survey: &Survey,
        catalog: &Catalog,
    ) -> Vec<String> {
        let mut notes = doubts(record, catalog);
        if !measured.has_conf {
            notes.push(
                "postgresql.conf is not in the data directory that was backed up (Debian keeps it in \
                 /etc/postgresql, with pg_hba.conf and pg_ident.conf): bring it back from elsewhere, and start \
                 PostgreSQL with -c config_file=..."
                    .to_owned(),
            );
        }
        if record.pages.bad > 0 {
            notes.push(format!(
                "{} pages had wrong checksums when backup {} was taken",
                record.pages.bad, record.name
            ));
        }
        if self.source.is_bucket() {
            notes.push(
                "restore_command reads the bucket: PostgreSQL needs the same configuration file, identity and \
                 credentials until recovery has ended"
                    .to_owned(),
            );
        }
        notes.extend(survey.problems().iter().chain(&catalog.problems).cloned());
        notes
    }

    /// Does what was planned.
    ///
    /// # Errors
    /// The first failure; the directory is not whole then, and says so (D2).
    pub async fn carry_out(&self, planned: Planned) -> Result<Done, Error> {
        let span = tracing::info_span!(
            "restore",
            otel.status_code = Empty,
            error.type = Empty,
            files = planned.files,
            bytes = planned.bytes,
            written_bytes = Empty,
        );
        let result = self.pour(planned).instrument(span.clone()).await;
        match &result {
            Ok(done) => drop(span.record("written_bytes", done.written)),
            Err(error) => {
                span.record("otel.status_code", "ERROR");
                span.record("error.type", error.failure.name());
            }
        }
        result
    }

    async fn pour(&self, planned: Planned) -> Result<Done, Error> {
        let begun = Instant::now();
        let _reserved = self.source.reserve(&planned.decision.plan.backup.name).await;
        let (progress, stop) = (Arc::clone(&self.progress), self.stop.clone());
        let span = Span::current();
        let work = move || span.in_scope(|| carry_out(planned, progress, stop));
        let work = tokio::task::spawn_blocking(work).await;
        let mut done = work.unwrap_or_else(|error| {
            Err(Error::new(Failure::Code(Code::Internal), format!("restore: {error}")))
        })?;
        done.seconds = begun.elapsed().as_secs_f64();
        Ok(done)
    }
}

/// D6: whoever wants what is left of a damaged backup says its name.
fn refuse_damaged(catalog: &Catalog, record: &BackupRecord) -> Result<(), Error> {
    let known = catalog.known(&record.name);
    let Some(why) = known.and_then(Known::doubt) else {
        return Ok(());
    };
    let message = format!("{why}; no other backup leads to the target");
    Err(Error::new(Failure::Unreachable, message).hint(format!(
        "klio list shows what can be recovered, klio verify what is damaged; --backup {} tries it, and ends where the \
         damage is met; nothing was touched",
        record.name
    )))
}

/// What is known against the backup of choice, and against newer ones that were passed over.
fn doubts(record: &BackupRecord, catalog: &Catalog) -> Vec<String> {
    let newer = |known: &&Known| {
        known.record.name == record.name
            || known.record.stopped_postgres_unix > record.stopped_postgres_unix
    };
    catalog.backups.iter().filter(newer).filter_map(Known::doubt).collect()
}

async fn open(repository: Repository, record: &BackupRecord) -> Result<Reader, Error> {
    let snapshot = record.snapshot.parse().map_err(|error| {
        Error::new(Failure::Code(Code::Corrupt), format!("read backup {}: {error}", record.name))
    })?;
    super::joined(tokio::task::spawn_blocking(move || repository.reader(&snapshot)).await)
}

fn measure(reader: &Reader, places: &Places, delta: bool) -> Result<Measured, klio_storage::Error> {
    let mut measured = Measured {
        growth: places.all().map(|place| (place.to_owned(), 0)).collect(),
        ..Measured::default()
    };
    for entry in reader.entries()? {
        let entry = entry?;
        let StoredKind::File { size, .. } = entry.kind else { continue };
        let path = match places.meaning(&entry.path) {
            Meaning::At(path) => path,
            Meaning::Control => {
                measured.has_control = true;
                places.data.join("global/pg_control")
            }
            Meaning::Nothing => continue,
        };
        measured.has_conf |= path == places.data.join("postgresql.conf");
        measured.files += 1;
        measured.bytes += size;
        let there =
            if delta { fs::symlink_metadata(&path).map_or(0, |meta| meta.len()) } else { 0 };
        let place = |place: &Path| path.starts_with(place);
        if let Some((_, growth)) = measured.growth.iter_mut().find(|(at, _)| place(at)) {
            *growth += size.saturating_sub(there);
        }
    }
    Ok(measured)
}

fn carry_out(
    planned: Planned,
    progress: Arc<Progress>,
    stop: CancellationToken,
) -> Result<Done, Error> {
    let Planned { decision, places, settings, files, bytes, delta, chunks, .. } = planned;
    let name = &decision.plan.backup.name;
    // Once more, as planning may have taken a while (D3).
    check::places(&places, &decision.plan.backup, delta)?;
    finish::begin(&places, name.as_str())?;
    progress.expect(files, bytes);
    progress.enter("restoring");
    // Twice the cores: half of them wait for the network or the disk.
    let threads = std::thread::available_parallelism().map_or(2, usize::from) * 2;
    let pour = Pour {
        chunks,
        places: places.clone(),
        delta,
        threads,
        progress: Arc::clone(&progress),
        stop,
    };
    let poured = pour.run()?;
    progress.enter("writing to disk");
    let control = poured.control.ok_or_else(|| {
        Error::new(Failure::Code(Code::Corrupt), format!("backup {name} has no pg_control"))
    })?;
    finish::finish(&places, &pour.chunks.reader, &control, &settings)?;
    let written = progress.seen().written;
    Ok(Done { files, bytes, written, removed: poured.removed, seconds: 0.0 })
}
