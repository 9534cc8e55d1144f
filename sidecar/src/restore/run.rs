//! From an order to a restored directory: plan, check, write the files, finish.

use super::{
    Scratch, check,
    check::Room,
    finish::{self, Last},
    included::Configuration,
    links,
    missing::Chunks,
    neutral::{self, Neutral},
    place::{Maps, Meaning, Places},
    pour::{Pour, Progress},
    settings::{Action, Invocation, Settings},
    source::{Catalog, Known, Source},
    standby::{self, Standby},
    stored::{self, Stored},
    target::{Decider, Decision, Verdict, Wish, check_epoch},
    wal::Wal,
    way::{self, Way},
};
use crate::error::{Error, Failure};
use klio_pg::{Edit, TimelineId};
use klio_proto::Code;
use klio_storage::{
    catalog::{BackupRecord, Survey, Target},
    crash_point,
    layout::WalFile,
    repository::{Reader, Repository, StoredKind},
};
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, Span, field::Empty};

/// Pause between two requests to the server while it is not certain whether PostgreSQL wrote more.
const ASK_MIN: Duration = Duration::from_millis(200);
const ASK_MAX: Duration = Duration::from_secs(3);

/// What the user asked for.
#[derive(Debug, Clone)]
pub struct Order {
    pub wish: Wish,
    /// The absolute path of the data directory to create.
    pub to: PathBuf,
    pub maps: Vec<(String, PathBuf)>,
    /// What PostgreSQL does at the target; `None` means PostgreSQL's own default, `pause`, or `promote` for the latest state.
    pub action: Option<Action>,
    /// The copy goes on as a standby; there is no target and no action then.
    pub standby: Option<Standby>,
    /// Reuse the files that are in the directory already (`--delta`).
    pub delta: bool,
    /// The directory below which all tablespaces without a map go (a drill).
    pub beside: Option<PathBuf>,
    /// The copy must not act on the outside world (P12).
    pub harmless: bool,
    /// The copy runs with settings of its own only (a drill); the cluster's own configuration files are ignored.
    pub alone: bool,
}

/// Plans and carries out restores.
pub struct Restore {
    pub source: Source,
    pub progress: Arc<Progress>,
    /// Cancelled to end the restore early.
    pub stop: CancellationToken,
    /// How to call this program in restore_command.
    pub invocation: Invocation,
}

/// What will be done. Everything is checked, and nothing has been touched (RESTORE1).
#[derive(Debug)]
pub struct Planned {
    pub decision: Decision,
    pub places: Places,
    /// Needed and free space of each file system.
    pub room: Vec<Room>,
    /// What is written after the backup's files.
    pub last: Last,
    /// Number of files that the restored directories will have.
    pub files: u64,
    /// Bytes of these files.
    pub bytes: u64,
    /// Notes for the user.
    pub notes: Vec<String>,
    /// Whether the cluster has its postgresql.conf in the data directory.
    pub has_conf: bool,
    directories: BTreeSet<PathBuf>,
    delta: bool,
    chunks: Chunks,
}

impl Planned {
    /// The same plan with another way to call `wal-fetch`.
    #[must_use]
    pub fn fetching(mut self, invocation: &Invocation) -> Self {
        let edited = !self.last.edits.is_empty();
        self.last.settings.restore_command = invocation.restore_command(edited);
        self
    }

    /// The recovery settings for PostgreSQL.
    pub const fn settings(&self) -> &Settings {
        &self.last.settings
    }
}

/// What was done.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Done {
    /// Number of files of the backup that are now in place.
    pub files: u64,
    /// Bytes of these files.
    pub bytes: u64,
    /// Bytes that were written; with `delta` fewer than `bytes`.
    pub written: u64,
    pub removed: u64,
    /// Duration in seconds.
    pub seconds: f64,
}

/// The size of a snapshot, compared with what is in the directories now.
#[derive(Debug)]
struct Measured {
    files: u64,
    bytes: u64,
    /// How many bytes more than now each place needs.
    growth: Vec<(PathBuf, u64)>,
    stored: Stored,
}

impl Restore {
    /// Plans and checks a restore. Waits while it is not certain yet what PostgreSQL wrote until the target time.
    ///
    /// # Errors
    /// The reason why the restore cannot be done; nothing was touched.
    pub async fn plan(&self, order: &Order) -> Result<Planned, Error> {
        loop {
            self.progress.enter("listing backups and WAL");
            let catalog = self.source.catalog().await?;
            let (survey, verdict) = self.decide(&catalog, order).await?;
            let left = match verdict {
                Verdict::Decided(decision) => {
                    return self.prepare(&catalog, &survey, order, *decision).await;
                }
                Verdict::Wait(left) => left,
            };
            self.progress.enter(
                "waiting until it is certain that PostgreSQL wrote nothing more before the target",
            );
            tracing::info!(
                ?left,
                "waiting until it is certain that PostgreSQL wrote nothing more before the target"
            );
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return Err(super::stopped()),
                () = tokio::time::sleep(left.clamp(ASK_MIN, ASK_MAX)) => {}
            }
        }
    }

    /// Plans and checks a restore from a catalog that was read before.
    ///
    /// # Errors
    /// As [`Restore::plan`]; `Unavailable` where that would wait.
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

    /// RESTORE6: takes an undamaged backup if one leads to the target; a damaged one only if the user named it.
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
        let verdict = match self.ask(&all, order).await {
            Err(error) if error.failure == Failure::Unreachable => {
                return Err(self.source.located(error).await);
            }
            verdict => verdict?,
        };
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
        check::directory(&order.to, record, order.delta)?;
        let (way, places, edits) = self.way(order, &decision).await?;
        if order.standby.is_some() {
            standby::refuse_edits(&edits)?;
        }
        let histories = self.histories(&decision).await?;
        check::places(&places, record, order.delta)?;
        self.progress.enter("reading the backup's list of files");
        let (repository, server) = self.source.repository(order.delta).await?;
        let reader = open(repository, record).await?;
        let (measuring, at, delta) = (reader.clone(), places.clone(), order.delta);
        let measured = tokio::task::spawn_blocking(move || measure(&measuring, &at, delta)).await;
        let measured = super::joined(measured)?;
        let room = check::room(&measured.growth)?;
        let timeline = decision.plan.path.timeline();
        let action = order.action.unwrap_or(match order.wish.target {
            Target::Latest => Action::Promote,
            _ => Action::Pause,
        });
        let Measured { files, bytes, stored, .. } = measured;
        let (at, wanted) = (places.clone(), order.clone());
        let (on_the_way, full_xid) = (way.clone(), order.wish.full_xid);
        let surroundings = stored::blocking(move || {
            if let Some(full_xid) = full_xid {
                check_epoch(full_xid, stored.control()?.next_xid)?;
            }
            surroundings(&stored, &at, &on_the_way, action, &wanted)
        })
        .await?;
        let Surroundings { neutral, directories, has_conf } = surroundings;
        let settings = Settings {
            major: record.postgres_version / 10_000,
            restore_command: self.invocation.restore_command(!edits.is_empty()),
            recovery: decision.recovery.clone(),
            inclusive: decision.inclusive,
            timeline: decision.plan.path.has_history.then_some(timeline),
            action,
            standby: order.standby.clone(),
            left_set: neutral.left_set,
            corrected: neutral.corrected.clone(),
            harmless: order.harmless || order.alone,
            alone: order.alone,
        };
        let mut notes = decision.notes.clone();
        notes.extend(way.notes);
        notes.extend(neutral.notes.iter().cloned());
        notes.extend(self.notes(record, has_conf, survey, catalog));
        Ok(Planned {
            decision,
            places,
            room,
            last: Last { settings, neutral, edits, histories },
            files,
            bytes,
            notes,
            has_conf,
            directories,
            delta: order.delta,
            // A full restore reads neighbouring chunks, for which the windows of the reader are better.
            chunks: Chunks { reader, server: server.filter(|_| order.delta) },
        })
    }

    /// Reads the WAL on the way to the target, and decides from it where each file goes.
    async fn way(
        &self,
        order: &Order,
        decision: &Decision,
    ) -> Result<(Way, Places, Vec<Edit>), Error> {
        self.progress.enter("reading WAL");
        let plan = &decision.plan;
        let scratch = Scratch::new(None)?;
        let wal = Wal {
            source: &self.source,
            scratch: &scratch,
            path: &plan.path,
            postgres_major: plan.backup.postgres_version / 10_000,
        };
        let way = way::look(&wal, plan, (&decision.recovery, decision.inclusive)).await?;
        let maps = Maps { named: &order.maps, beside: order.beside.as_deref() };
        let places = Places::new(order.to.clone(), &plan.backup, &way.made, maps)?;
        let linked = places.linked().map(|(oid, place)| (oid, place.to_owned())).collect();
        let edits = way.edits(&wal, &linked).await?;
        Ok((way, places, edits))
    }

    /// The history files of the timelines that recovery passes, and of the numbers between them. PostgreSQL finds the
    /// newest timeline by counting up from the backup's, and stops at the first number without a history file; a
    /// retired timeline would leave such a number.
    async fn histories(&self, decision: &Decision) -> Result<Vec<(String, Vec<u8>)>, Error> {
        let (path, backup) = (&decision.plan.path, decision.plan.backup.start_timeline);
        let between = (backup.get()..=path.timeline().get()).filter_map(TimelineId::new);
        let all: BTreeSet<TimelineId> = path.timelines().chain(between).collect();
        let scratch = Scratch::new(None)?;
        let mut histories = Vec::new();
        for timeline in all.into_iter().filter(|timeline| timeline.get() > 1) {
            let file = WalFile::History(timeline);
            let fetched = match self.source.fetch(file, &scratch).await {
                Err(error) if error.failure == Failure::Code(Code::NotFound) => continue,
                other => other?,
            };
            let content =
                fs::read(&fetched).map_err(|error| super::local("read", &fetched, &error))?;
            histories.push((file.to_string(), content));
        }
        Ok(histories)
    }

    fn notes(
        &self,
        record: &BackupRecord,
        has_conf: bool,
        survey: &Survey,
        catalog: &Catalog,
    ) -> Vec<String> {
        let mut notes = doubts(record, catalog);
        if !has_conf {
            notes.push(
                "postgresql.conf is not in the data directory that was backed up (Debian keeps it in \
                 /etc/postgresql, with pg_hba.conf and pg_ident.conf), so its content is unknown. Remove recovery targets from \
                 the original's file, then start with it by the command below, which overrides data_directory. A copy of it \
                 in this directory must not set data_directory, hba_file, ident_file or external_pid_file of the original"
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

    /// Carries out a plan.
    ///
    /// # Errors
    /// The first failure; the directory is then incomplete, and its marker file says so (RESTORE2).
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

/// RESTORE6: a damaged backup is used only if the user names it.
fn refuse_damaged(catalog: &Catalog, record: &BackupRecord) -> Result<(), Error> {
    let known = catalog.known(&record.name);
    let Some(why) = known.and_then(Known::doubt) else {
        return Ok(());
    };
    let message = format!("{why}; no other backup leads to the target");
    Err(Error::new(Failure::Unreachable, message).hint(format!(
        "klio list shows what can be restored, klio verify shows what is damaged; --backup {} restores from it anyway \
         and stops at the damage; nothing was touched",
        record.name
    )))
}

/// What is known against the chosen backup, and against newer ones that were not chosen.
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
        files: 0,
        bytes: 0,
        growth: places.all().map(|place| (place.to_owned(), 0)).collect(),
        stored: Stored::new(reader.clone()),
    };
    for entry in reader.entries()? {
        let entry = entry?;
        measured.stored.see(&entry);
        let StoredKind::File { size, .. } = entry.kind else { continue };
        let path = match places.meaning(&entry.path) {
            Meaning::At(path) => path,
            Meaning::Control => places.data.join("global/pg_control"),
            Meaning::Nothing => continue,
        };
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

/// What surrounds the data of a copy (configuration, links, WAL on the way), and what is done about it.
struct Surroundings {
    neutral: Neutral,
    directories: BTreeSet<PathBuf>,
    has_conf: bool,
}

fn surroundings(
    stored: &Stored,
    places: &Places,
    way: &Way,
    action: Action,
    order: &Order,
) -> Result<Surroundings, Error> {
    let control = stored.control()?;
    let conf = match order.alone {
        true => Configuration::default(),
        false => Configuration::read(&places.data, stored)?,
    };
    let links = links::links(&stored.links, places, &conf.directories, order.delta)?;
    let mut neutral = neutral::neutral(
        &conf,
        neutral::Asked {
            data: &places.data,
            action,
            standby: order.standby.as_ref(),
            harmless: order.harmless || order.alone,
            subscriptions: stored.subscriptions()?,
            needed: &way.needed(&control.needed),
            rules: ["pg_hba.conf", "pg_ident.conf"].map(|file| stored.has(file)),
        },
    )?;
    neutral.notes.extend(links.notes);
    // A standby replays beyond the target, to where these transactions end.
    if order.standby.is_none() {
        neutral.notes.extend(way.left_prepared(&stored.prepared()?));
    }
    Ok(Surroundings { neutral, directories: links.directories, has_conf: conf.found })
}

fn carry_out(
    planned: Planned,
    progress: Arc<Progress>,
    stop: CancellationToken,
) -> Result<Done, Error> {
    let Planned { decision, places, last, files, bytes, .. } = planned;
    let name = &decision.plan.backup.name;
    // Checked again, because PostgreSQL may have been started while the plan was made (RESTORE3).
    check::places(&places, &decision.plan.backup, planned.delta)?;
    finish::begin(&places, name.as_str())?;
    crash_point!("restore.marked");
    progress.expect(files, bytes);
    progress.enter("restoring");
    // Twice the number of cores, because about half of the workers wait for the network or the disk.
    let threads = std::thread::available_parallelism().map_or(2, usize::from) * 2;
    let pour = Pour {
        chunks: planned.chunks,
        places: places.clone(),
        directories: planned.directories,
        delta: planned.delta,
        threads,
        progress: Arc::clone(&progress),
        stop,
    };
    let poured = pour.run()?;
    crash_point!("restore.copied");
    progress.enter("writing to disk");
    let control = poured.control.ok_or_else(|| {
        Error::new(Failure::Code(Code::Corrupt), format!("backup {name} has no pg_control"))
    })?;
    finish::finish(&places, &pour.chunks.reader, &control, &last)?;
    crash_point!("restore.done");
    let written = progress.seen().written;
    Ok(Done { files, bytes, written, removed: poured.removed, seconds: 0.0 })
}
