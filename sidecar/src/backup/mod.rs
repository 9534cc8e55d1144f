//! Base backups of the local PostgreSQL. [`Backup::run`] reads as the list of its phases.
//!
//! TAKE1  PostgreSQL is in backup mode for as long as one SQL session lives and no longer, however the backup ends.
//! TAKE2  The server commits the record last. Until then there is no backup and nothing to clean up: packs that were
//!        sent stay in the repository, and the next backup reuses them.
//! TAKE3  pg_control is read after everything else; backup_label comes from pg_backup_stop.
//! TAKE4  A committed backup can be restored: all WAL from its start to its stop is durable on the server.
//! TAKE5  A failure after the commit (in verification or maintenance) never invalidates the backup.
//! TAKE6  A backup belongs to the history that its WAL belongs to. Which one PostgreSQL continues is determined by
//!        content, before the first file and again before the commit (P11).

mod after;
mod copy;
mod daemon;
mod exclude;
mod metrics;
mod pages;
mod place;
mod planner;
mod progress;
mod reservation;
mod session;
mod take;
mod wal;
mod walk;

pub use after::After;
pub use daemon::Daemon;
pub use exclude::LOST_AND_FOUND;
pub use metrics::{CATALOGUE, Metrics};
pub use planner::Planner;
pub use progress::{Progress, Seen};

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

/// The means and settings to back up one cluster.
#[derive(Debug)]
pub struct Backup {
    /// The cluster's name on the server.
    pub cluster: ClusterName,
    /// How to connect to PostgreSQL.
    pub info: Arc<ConnInfo>,
    /// How to connect to the server.
    pub link: ServerLink,
    /// The `[backup]` section.
    pub settings: config::Backup,
    /// `postgres.data_directory`; if empty, PostgreSQL is asked.
    pub data_directory: PathBuf,
    pub metrics: Metrics,
    /// Shared with the display.
    pub progress: Arc<Progress>,
    /// Random per process: the server remembers under it which WAL was compared.
    pub writer_id: String,
    /// The slot of `klio stream`. A backup neither creates nor advances it.
    pub slot: SlotName,
    /// Cancelled to end the backup.
    pub stop: CancellationToken,
}

/// What the user requests for one backup.
#[derive(Debug, Clone, Default)]
pub struct Order {
    /// The backup's name; if `None`, the server creates one.
    pub name: Option<BackupName>,
    /// Free text that is shown in listings.
    pub label: Option<String>,
    /// The backup never expires by policy.
    pub keep: bool,
    /// A user waits for it, so `backup.checkpoint = "auto"` means fast.
    pub typed: bool,
    /// Read every file, even those that look unchanged since the newest backup.
    pub full_read: bool,
}

/// A committed backup.
#[derive(Debug, Clone)]
pub struct Done {
    /// The cluster with the number of the generation that it belongs to; without the number if that is not known.
    pub cluster: ClusterName,
    /// The record that was committed.
    pub record: BackupRecord,
    /// Result of the verification on the server.
    pub verified: After<VerifyOutcome>,
    /// Result of the maintenance on the server.
    pub maintained: After<MaintenanceOutcome>,
}

impl Backup {
    /// Takes a backup and has the server verify it and run maintenance.
    ///
    /// # Errors
    /// No backup was taken. Failures of the later steps are in [`Done`] (TAKE5).
    pub async fn run(&self, order: &Order) -> Result<Done, Error> {
        self.run_in(order, &self.span()).await
    }

    /// A span for [`Backup::run_in`]. What is logged about the backup belongs in it.
    pub fn span(&self) -> Span {
        tracing::info_span!(
            "backup",
            cluster = %self.cluster,
            backup.name = Empty,
            otel.status_code = Empty,
            error.r#type = Empty,
        )
    }

    /// Like [`Backup::run`], in a span from [`Backup::span`].
    ///
    /// # Errors
    /// As for [`Backup::run`].
    pub async fn run_in(&self, order: &Order, span: &Span) -> Result<Done, Error> {
        self.metrics.begins(now_unix());
        let result = self.phases(order, span).instrument(span.clone()).await;
        if let Err(error) = &result {
            mark(span, error);
        }
        self.metrics.ends(now_unix(), &result);
        result
    }

    /// The same backup settings for one history of the cluster.
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

    /// TAKE6: the history that PostgreSQL continues. `from` is the oldest WAL to compare.
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
            // A role without REPLICATION can take a backup too; the server refuses it if there are several histories.
            Err(error) if matches!(error.failure, Failure::Postgres | Failure::PostgresRefused) => {
                // If PostgreSQL cannot be reached at all, report that instead of the failed comparison.
                drop(session::Session::open(Arc::clone(&self.info)).await?);
                tracing::warn!(
                    "{}; the backup is taken without proving which history PostgreSQL continues; hint: ALTER ROLE ... REPLICATION, and a replication line in pg_hba.conf",
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
        Ok(Done { cluster: cluster.clone(), record, verified, maintained })
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

/// A phase's span; a macro, because `tracing` needs the name at compile time.
macro_rules! step {
    ($name:literal) => {
        tracing::info_span!($name, otel.status_code = Empty, error.r#type = Empty)
    };
}
use step;

/// Records an error on its span without logging it: the caller that handles the error logs it.
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

/// Records the result of a step that cannot invalidate the backup.
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

/// Seconds since the Unix epoch, by this machine's clock.
fn now_unix() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs_f64()
}
