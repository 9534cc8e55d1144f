//! Scheduled backups inside `klio stream`, on a separate thread with a separate runtime.
//!
//! Commits in PostgreSQL may wait for the streaming thread, so nothing of a backup runs there. This thread and the
//! threads that it starts handle the backup's connections, encryption and files, at a lower priority. One backup runs
//! at a time. The schedule depends on the newest backup that the server knows, so two sidecars with the same schedule
//! (of a primary and its standby) take one backup, not two. Without a schedule the thread only keeps the gauges up to
//! date.

use super::{After, Backup, Order, Planner, Progress, take};
use crate::{
    backoff::Backoff,
    error::{Error, Failure},
    schedule::Schedule,
    server_link::BaseLink,
};
use jiff::Timestamp;
use klio_proto::Code;
use klio_storage::{catalog::BackupRecord, layout::ClusterName};
use rand::{SeedableRng, rngs::StdRng};
use std::time::Duration;
use tokio::sync::oneshot;

/// The longest sleep between two looks at the schedule, because clocks are set and machines sleep.
const LOOK: Duration = Duration::from_secs(30);
/// How often the server is asked for backups that others took.
const REFRESH: Duration = Duration::from_secs(300);
/// Lower than the priority of streaming and of PostgreSQL; nice values range from -20 to 19.
const NICE: i32 = 10;

#[derive(Debug)]
pub struct Daemon {
    ended: oneshot::Receiver<()>,
}

impl Daemon {
    /// Starts the thread. Cancelling `backup.stop` ends it.
    ///
    /// # Errors
    /// An invalid schedule, or the thread cannot be started.
    pub fn start(backup: Backup) -> Result<Self, Error> {
        let schedule = match backup.settings.schedule.as_str() {
            "" => None,
            text => Some(Schedule::parse(text).map_err(|problem| {
                Error::new(Failure::Config, format!("backup.schedule: {problem}"))
            })?),
        };
        let (end, ended) = oneshot::channel();
        let run = move || {
            // Failure is ignored: the backup works without the lower priority.
            let _ = rustix::process::nice(NICE);
            let built = tokio::runtime::Builder::new_current_thread().enable_all().build();
            match built {
                Ok(runtime) => runtime.block_on(Loop::new(backup, Timestamp::now).run(schedule)),
                Err(error) => {
                    tracing::error!(%error, "cannot start the runtime for scheduled backups")
                }
            }
            let _ = end.send(());
        };
        std::thread::Builder::new()
            .name("klio-backup".into())
            .spawn(run)
            .map_err(|e| Error::new(Failure::Local, format!("start backup thread: {e}")))?;
        Ok(Self { ended })
    }

    /// Waits until the thread has ended; call it after cancelling `backup.stop`.
    pub async fn ended(self) {
        let _ = self.ended.await;
    }
}

struct Loop<C> {
    backup: Backup,
    base: BaseLink,
    clock: C,
    rng: StdRng,
    /// The history that PostgreSQL continued when it was asked last.
    place: ClusterName,
}

impl<C: Fn() -> Timestamp> Loop<C> {
    fn new(backup: Backup, clock: C) -> Self {
        let base = BaseLink::new(backup.link.clone(), backup.stop.child_token());
        let place = backup.cluster.clone();
        Self { backup, base, clock, rng: StdRng::from_os_rng(), place }
    }

    async fn run(mut self, schedule: Option<Schedule>) {
        let Some(newest) = self.first().await else { return };
        let Some(schedule) = schedule else { return self.watch().await };
        let settings = &self.backup.settings;
        let backoff = Backoff::new(settings.retry_min, settings.retry_max);
        let newest = newest.as_ref().and_then(begun);
        let mut planner = Planner::new(schedule, settings.jitter, backoff, newest, &mut self.rng);
        let mut refreshed = (self.clock)();
        loop {
            let now = (self.clock)();
            let due = planner.due(now);
            self.backup.metrics.next(due.map(|due| due.as_millisecond() as f64 / 1e3));
            if due.is_some_and(|due| due <= now) {
                if !self.attempt(&mut planner).await {
                    return;
                }
                refreshed = (self.clock)();
                continue;
            }
            if !self.sleep(planner.pause(now, LOOK)).await {
                return;
            }
            let age = Duration::try_from((self.clock)().duration_since(refreshed));
            if age.is_ok_and(|age| age < REFRESH) {
                continue;
            }
            refreshed = (self.clock)();
            self.refresh(&mut planner).await;
        }
    }

    /// The newest backup at start; `None` if we are stopped before the server has answered.
    async fn first(&mut self) -> Option<Option<BackupRecord>> {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
        loop {
            match self.newest().await {
                Ok(newest) => return Some(newest),
                Err(error) if self.backup.stop.is_cancelled() => {
                    tracing::debug!("{}", error.message);
                    return None;
                }
                Err(error) => tracing::warn!(
                    hint = error.hint,
                    "cannot list the existing backups: {}",
                    error.message
                ),
            }
            let pause = backoff.pause(&mut self.rng);
            if !self.sleep(pause).await {
                return None;
            }
        }
    }

    /// Keeps the gauges up to date.
    async fn watch(&mut self) {
        while self.sleep(REFRESH).await {
            if let Err(error) = self.newest().await {
                tracing::debug!("{}", error.message);
            }
        }
    }

    /// The newest backup of the history that PostgreSQL continues; backups of another history do not lead to the WAL
    /// that it writes now. If the history cannot be determined, the previous one is assumed.
    async fn newest(&mut self) -> Result<Option<BackupRecord>, Error> {
        let place = self.backup.history(None).await.unwrap_or_else(|error| {
            tracing::debug!("{}", error.message);
            self.place.clone()
        });
        let newest = take::newest(&self.backup.of(place.clone()), &self.base).await?;
        // Only after success: otherwise the next call would not notice that the history changed.
        self.place = place;
        if let Some(record) = &newest {
            self.backup.metrics.known(record);
        }
        Ok(newest)
    }

    /// Takes backups into account that somebody else took.
    async fn refresh(&mut self, planner: &mut Planner) {
        let before = self.place.clone();
        match self.newest().await {
            Ok(newest) if take::place_of(&self.place) != take::place_of(&before) => {
                planner.moved(newest.as_ref().and_then(begun), &mut self.rng);
            }
            Ok(newest) => planner.saw(newest.as_ref().and_then(begun), &mut self.rng),
            Err(error) => tracing::debug!("{}", error.message),
        }
    }

    /// Takes the backup that is due, unless somebody else did; `false` if we are stopped.
    async fn attempt(&mut self, planner: &mut Planner) -> bool {
        self.refresh(planner).await;
        let begun = (self.clock)();
        if planner.due(begun).is_none_or(|due| due > begun) {
            return true;
        }
        self.backup.progress = Progress::new();
        let span = self.backup.span();
        span.in_scope(|| tracing::info!("scheduled backup started"));
        let result = self.backup.run_in(&Order::default(), &span).await;
        if self.backup.stop.is_cancelled() {
            return false;
        }
        // Logged inside the span, so that the result carries the backup's trace id.
        let _in_span = span.enter();
        match result {
            Ok(done) => {
                planner.succeeded(begun, &mut self.rng);
                let record = &done.record;
                tracing::info!(
                    backup = %record.name,
                    seconds = record.duration_seconds,
                    size_bytes = record.size_bytes,
                    stored_bytes = record.stored_bytes,
                    "scheduled backup taken"
                );
                report("verification", done.verified.failed(), after_error(&done.verified));
                report("maintenance", done.maintained.failed(), after_error(&done.maintained));
                if record.pages.bad > 0 {
                    tracing::error!(backup = %record.name, pages = record.pages.bad, "the backup has pages with wrong checksums");
                }
            }
            Err(error) => {
                let pause = planner.failed((self.clock)(), &mut self.rng);
                let pause = pause.as_secs_f64().round();
                if error.failure == Failure::Code(Code::Busy) {
                    tracing::info!(
                        pause,
                        "another backup of the cluster is running; trying again after the pause"
                    );
                } else {
                    tracing::error!(
                        error.type = error.failure.name(),
                        hint = error.hint,
                        pause,
                        "scheduled backup failed, trying again after the pause: {}",
                        error.message
                    );
                }
            }
        }
        true
    }

    /// `false` if we are stopped.
    async fn sleep(&self, pause: Duration) -> bool {
        tokio::select! {
            biased;
            () = self.backup.stop.cancelled() => false,
            () = tokio::time::sleep(pause) => true,
        }
    }
}

/// TAKE5: reports a failure after the backup was taken.
fn report(what: &str, failed: bool, error: Option<&Error>) {
    match error {
        Some(error) => tracing::error!(
            error.type = error.failure.name(),
            hint = error.hint,
            "the backup was taken, but its {what} failed: {}",
            error.message
        ),
        None if failed => tracing::error!("the backup was taken, but its {what} found damage"),
        None => {}
    }
}

const fn after_error<T>(after: &After<T>) -> Option<&Error> {
    match after {
        After::Failed(error) => Some(error),
        After::Off | After::Ran(_) => None,
    }
}

fn begun(record: &BackupRecord) -> Option<Timestamp> {
    Timestamp::from_millisecond((record.begun_unix * 1e3) as i64).ok()
}
