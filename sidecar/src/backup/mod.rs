//! Base backups of the PostgreSQL beside us: [`Backup::run`] reads as the list of its phases.
//!
//! TAKE1  PostgreSQL is in backup mode for as long as one SQL session lives, and no longer, however we end;
//! TAKE2  the record is committed last, by the server: until then there is no backup, and nothing to clean up.
//!     What was sent is in the repository, and the next backup uses it;
//! TAKE3  pg_control is read after everything else, backup_label comes from pg_backup_stop;
//! TAKE6  it belongs to the history that its WAL belongs to: which one PostgreSQL continues is found by content before the first
//!     file and again before the record is committed (P11);
//! TAKE4  committed is restorable: all WAL from start to stop is durable on the server;
//! TAKE5  a failure of what follows (verification, maintenance) never unmakes a backup.

mod after;
mod copy;
mod daemon;
mod exclude;
mod metrics;
mod pages;
mod place;
mod progress;
mod reservation;
mod schedule;
mod session;
mod take;
mod wal;
mod walk;

pub use after::After;
pub use daemon::Daemon;
pub use exclude::LOST_AND_FOUND;
pub use metrics::{CATALOGUE, Metrics};
pub use progress::{Progress, Seen};
pub use schedule::{Planner, Schedule};

use crate::{
    config::{self, Checkpoint},
    conninfo::ConnInfo,
    error::{Error, Failure},
    replication::SlotName,
    server_link::{BaseLink, ServerLink},
    streamer::{self, Postgres},
};
use klio_pg::Lsn;
use klio_storage::{
    catalog::{BackupRecord, MaintenanceOutcome, VerifyOutcome},
    layout::{BackupName, ClusterName},
};
use klio_telemetry::redact::redact;
use opentelemetry::KeyValue;
use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, Span, field::Empty};
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// What a backup of this cluster needs.
#[derive(Debug)]
pub struct Backup {
    /// The cluster's name on the server.
    pub cluster: ClusterName,
    /// Where PostgreSQL is.
    pub info: Arc<ConnInfo>,
    /// Where the server is.
    pub link: ServerLink,
    /// `[backup]`
    pub settings: config::Backup,
    /// `postgres.data_directory`; empty: PostgreSQL is asked.
    pub data_directory: PathBuf,
    /// Instruments.
    pub metrics: Metrics,
    /// For whoever watches.
    pub progress: Arc<Progress>,
    /// Random: the server knows by it what was compared.
    pub writer_id: String,
    /// That of klio stream: it is not made and not moved.
    pub slot: SlotName,
    /// Ends it.
    pub stop: CancellationToken,
}

/// What a user can say about one backup.
#[derive(Debug, Clone, Default)]
pub struct Order {
    /// Its name; the server makes one.
    pub name: Option<BackupName>,
    /// In words.
    pub label: Option<String>,
    /// Never expires by policy.
    pub keep: bool,
    /// Somebody waits for it, so `backup.checkpoint = "auto"` means fast.
    pub typed: bool,
    /// Read every file, also those that look unchanged.
    pub full_read: bool,
}

/// A backup that exists.
#[derive(Debug, Clone)]
pub struct Done {
    /// As committed.
    pub record: BackupRecord,
    /// Of the server.
    pub verified: After<VerifyOutcome>,
    /// Of the server.
    pub maintained: After<MaintenanceOutcome>,
}

impl Backup {
    /// Takes a backup, has it verified, and has the server tidy up.
    ///
    /// # Errors
    /// No backup was taken. What fails after it was is in [`Done`] (TAKE5).
    pub async fn run(&self, order: &Order) -> Result<Done, Error> {
        self.run_in(order, &self.span()).await
    }

    /// For [`Backup::run_in`]: what is logged about the backup belongs there.
    pub fn span(&self) -> Span {
        tracing::info_span!(
            "backup",
            cluster = %self.cluster,
            backup.name = Empty,
            otel.status_code = Empty,
            error.r#type = Empty,
        )
    }

    /// The same, in a span of [`Backup::span`].
    ///
    /// # Errors
    /// As [`Backup::run`].
    pub async fn run_in(&self, order: &Order, span: &Span) -> Result<Done, Error> {
        self.metrics.begins(now_unix());
        let result = self.phases(order, span).instrument(span.clone()).await;
        if let Err(error) = &result {
            mark(span, error);
        }
        self.metrics.ends(now_unix(), &result);
        result
    }

    /// The same for one history of the cluster.
    fn of(&self, cluster: ClusterName) -> Self {
        Self {
            cluster,
            info: Arc::clone(&self.info),
            link: self.link.clone(),
            settings: self.settings.clone(),
            data_directory: self.data_directory.clone(),
            metrics: self.metrics.clone(),
            progress: Arc::clone(&self.progress),
            writer_id: self.writer_id.clone(),
            slot: self.slot.clone(),
            stop: self.stop.clone(),
        }
    }

    /// TAKE6. The history that PostgreSQL continues, as far back as `from`.
    async fn history(&self, from: Option<Lsn>) -> Result<ClusterName, Error> {
        let primary = Postgres::new(Arc::clone(&self.info), self.slot.clone(), false);
        streamer::history_of(&primary, &self.link, &self.cluster, &self.writer_id, from).await
    }

    async fn phases(&self, order: &Order, backup: &Span) -> Result<Done, Error> {
        let found = tokio::select! {
            biased;
            () = self.stop.cancelled() => Err(copy::stopped()),
            found = self.history(None) => found,
        };
        match found {
            Ok(cluster) => self.of(cluster).phases_there(order, backup).await,
            // A role without REPLICATION can take a backup; the server refuses it where there are several histories.
            Err(error) if matches!(error.failure, Failure::Postgres | Failure::PostgresRefused) => {
                // One that cannot be reached at all is that, and not one whose history is not shown.
                drop(session::Session::open(Arc::clone(&self.info)).await?);
                tracing::warn!(
                    "{}; the backup is taken without showing which history it is of; hint: ALTER ROLE ... REPLICATION, and a line for replication in pg_hba.conf",
                    error.message
                );
                let unproven = Self { writer_id: String::new(), ..self.of(self.cluster.clone()) };
                unproven.phases_there(order, backup).await
            }
            Err(error) => Err(error),
        }
    }

    async fn phases_there(&self, order: &Order, backup: &Span) -> Result<Done, Error> {
        let span = step!("backup_run");
        let record = take::take(self, order, backup).instrument(span.clone()).await;
        let record = record.inspect_err(|error| mark(&span, error))?;
        drop(span);
        let (cluster, progress) = (&self.cluster, &*self.progress);
        let base = BaseLink::new(self.link.clone(), self.stop.child_token());
        let verified = if self.settings.verify {
            let (span, percent) = (step!("backup_verify"), self.settings.verify_read_percent);
            let verify = after::verify(&base, cluster, &record.name, percent, progress);
            let verified = self.unless_stopped(verify).instrument(span.clone()).await;
            finish(&span, &verified, verified.failed());
            verified
        } else {
            After::Off
        };
        let maintained = if self.settings.maintenance {
            let span = step!("backup_maintenance");
            let maintain = after::maintain(&base, cluster, progress);
            let maintained = self.unless_stopped(maintain).instrument(span.clone()).await;
            finish(&span, &maintained, maintained.failed());
            maintained
        } else {
            After::Off
        };
        progress.enter("done");
        Ok(Done { record, verified, maintained })
    }

    async fn unless_stopped<T>(&self, work: impl Future<Output = After<T>>) -> After<T> {
        tokio::select! {
            biased;
            () = self.stop.cancelled() => After::Failed(copy::stopped()),
            after = work => after,
        }
    }

    fn fast(&self, order: &Order) -> bool {
        match self.settings.checkpoint {
            Checkpoint::Fast => true,
            Checkpoint::Spread => false,
            Checkpoint::Auto => order.typed,
        }
    }
}

/// A phase's span; `tracing` wants its name at compile time.
macro_rules! step {
    ($name:literal) => {
        tracing::info_span!($name, otel.status_code = Empty, error.r#type = Empty)
    };
}
use step;

/// Records an error on its span, without a log line: who ends the error says it.
fn mark(span: &Span, error: &Error) {
    span.record("otel.status_code", "ERROR");
    span.record("error.type", error.failure.name());
    span.add_event(
        "exception",
        vec![
            KeyValue::new("exception.type", error.failure.name()),
            KeyValue::new("exception.message", redact(&error.message).into_owned()),
        ],
    );
}

/// The end of a step that cannot unmake the backup.
fn finish<T>(span: &Span, after: &After<T>, failed: bool) {
    match after {
        After::Failed(error) => mark(span, error),
        After::Ran(_) if failed => {
            span.record("otel.status_code", "ERROR");
            span.record("error.type", klio_proto::Code::Corrupt.name());
        }
        After::Ran(_) | After::Off => {}
    }
}

/// Seconds since the epoch, by our clock.
fn now_unix() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs_f64()
}
