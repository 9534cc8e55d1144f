//! `klio drill` proves that a backup can be restored by restoring it.
//!
//! A drill restores to a scratch directory, recovers to the end of the stored WAL, promotes, checks, runs a query and
//! stops. The end is a recovery target, so that ending too early is an error. Nothing can be reached from outside:
//! there is a socket in a private directory, and no TCP, archiving, logical replication workers or preloaded
//! libraries. Whatever happens, PostgreSQL is stopped and the directory removed.

mod copy;
mod programs;
mod server;
mod trace;

use super::{Action, Invocation, Known, Order, Replay, Restore, Scratch, Wish};
use crate::{
    config::Config,
    error::{Error, Failure},
};
use klio_pg::Lsn;
use klio_proto::Code;
use klio_storage::{
    catalog::{DrillOutcome, Target, TimelineChoice},
    layout::BackupName,
    record::Unknown,
};
use programs::Programs;
use server::Server;
use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

/// What a drill does.
#[derive(Debug, Clone, Default)]
pub struct Exercise {
    /// The backup; `None` for the newest.
    pub backup: Option<BackupName>,
    /// SQL to run at the end.
    pub query: Option<String>,
    /// The database for the query.
    pub database: String,
    /// The directory below which the scratch directory is created.
    pub dir: Option<PathBuf>,
    /// Limit for the whole drill.
    pub limit: Duration,
}

/// How a drill went.
#[derive(Debug, Clone)]
pub struct Report {
    /// The result for the server.
    pub outcome: DrillOutcome,
    /// The rows of the query, as text.
    pub rows: Vec<Vec<Option<String>>>,
}

/// Runs a drill. Problems of the backup are part of the report.
///
/// # Errors
/// What prevented the drill, and a stop by the user.
pub async fn run(restore: &Restore, config: &Config, what: &Exercise) -> Result<Report, Error> {
    let catalog = restore.source.catalog().await?;
    let known = match choose(&catalog.backups, what.backup.as_ref()) {
        Ok(known) => known,
        Err(error) => return Err(restore.source.located(error).await),
    };
    let record = known.record.clone();
    let run_as = programs::run_as(&config.drill.run_as)?;
    let programs = Programs::find(config, record.postgres_version / 10_000, run_as)?;
    let configured = Some(config.drill.dir.clone()).filter(|dir| !dir.as_os_str().is_empty());
    let scratch = Scratch::new(what.dir.clone().or(configured).as_deref())?;
    programs.give(scratch.path())?;
    let invocation = copy::readable(&restore.invocation, config, &scratch, &programs)?;
    let mut report = Report {
        outcome: DrillOutcome {
            backup: record.name.clone(),
            ok: false,
            finished_unix: 0.0,
            restore_seconds: 0.0,
            recovery_seconds: 0.0,
            check_seconds: 0.0,
            recovered_lsn: None,
            problems: Vec::new(),
            unknown: Unknown::default(),
        },
        rows: Vec::new(),
    };
    let order = Order {
        wish: Wish {
            target: Target::Latest,
            timeline: TimelineChoice::Latest,
            timeline_typed: true,
            exclusive: false,
            full_xid: None,
            backup: Some(record.name.clone()),
            stop_at_end: true,
        },
        to: scratch.join("data"),
        maps: Vec::new(),
        // Tablespaces that are created after the backup also go there, so that nothing outside is touched (P12).
        beside: Some(scratch.path().to_owned()),
        action: Some(Action::Promote),
        standby: None,
        delta: false,
        harmless: true,
        alone: true,
    };
    let steps = Steps { restore, programs: &programs, scratch: &scratch, what, config };
    let result = tokio::select! {
        biased;
        () = restore.stop.cancelled() => Err(super::stopped()),
        () = tokio::time::sleep(what.limit) => {
            // Also stops the threads that still write files.
            restore.stop.cancel();
            report.outcome.problems.push(steps.too_long());
            Ok(())
        }
        result = steps.all(&catalog, &order, invocation, &mut report) => result,
    };
    match result {
        Err(error) if error.failure == Failure::Stopped || restore.stop.is_cancelled() => {
            return Err(super::stopped());
        }
        Err(error) if is_of_the_backup(&error) => report.outcome.problems.push(error.message),
        Err(error) => return Err(error),
        Ok(()) => {}
    }
    report.outcome.ok = report.outcome.problems.is_empty();
    report.outcome.finished_unix = jiff::Timestamp::now().as_microsecond() as f64 / 1e6;
    Ok(report)
}

/// Whether the error says something about the backup. Any other error (a full disk, no server, a wrong setting) only
/// means that there was no drill.
fn is_of_the_backup(error: &Error) -> bool {
    match error.failure {
        Failure::Unreachable | Failure::Postgres | Failure::PostgresRefused => true,
        Failure::Code(code) => matches!(code, Code::Corrupt | Code::NotFound),
        _ => false,
    }
}

fn choose<'a>(backups: &'a [Known], name: Option<&BackupName>) -> Result<&'a Known, Error> {
    let found = match name {
        Some(name) => backups.iter().find(|known| known.record.name == *name),
        None => backups.last(),
    };
    found.ok_or_else(|| {
        let what =
            name.map_or_else(|| "base backup".to_owned(), |name| format!("base backup {name}"));
        Error::new(Failure::Unreachable, format!("there is no {what}"))
            .hint("klio list shows what there is")
    })
}

struct Steps<'a> {
    restore: &'a Restore,
    programs: &'a Programs,
    scratch: &'a Scratch,
    what: &'a Exercise,
    config: &'a Config,
}

impl Steps<'_> {
    /// The problem for a drill that exceeded its time limit.
    fn too_long(&self) -> String {
        let seen = self.restore.progress.seen();
        let at = seen.replay.map_or_else(String::new, |replay| {
            format!(", replayed to {} of {}", replay.at, replay.to)
        });
        let limit = self.what.limit;
        format!("the drill did not end within {limit:?} (--timeout): it was {}{at}", seen.phase)
    }

    async fn all(
        &self,
        catalog: &super::Catalog,
        order: &Order,
        invocation: Invocation,
        report: &mut Report,
    ) -> Result<(), Error> {
        let begun = Instant::now();
        let planned = self.restore.plan_from(catalog, order).await?.fetching(&invocation);
        let backup = &planned.decision.plan.backup;
        let (major, from, to) =
            (backup.postgres_version / 10_000, backup.start_lsn, planned.decision.plan.reach.end);
        let has_checksums = planned.decision.plan.backup.pages.enabled;
        self.restore.carry_out(planned).await?;
        let programs = self.programs.clone();
        let root = self.scratch.path().to_owned();
        let given = tokio::task::spawn_blocking(move || programs.give_all(&root)).await;
        given.map_err(|e| {
            Error::new(Failure::Local, format!("change the owner of the files: {e}"))
        })??;
        report.outcome.restore_seconds = begun.elapsed().as_secs_f64();

        self.restore.progress.enter("recovering");
        let begun = Instant::now();
        let data = order.to.as_path();
        let role = &self.config.drill.user;
        let mut server = Server::start(self.programs, data, self.scratch, role, major).await?;
        let progress = &self.restore.progress;
        let recovered = server
            .recovered(|at| progress.replayed(Some(Replay { from, at: at.max(from), to })))
            .await;
        progress.replayed(None);
        report.outcome.recovery_seconds = begun.elapsed().as_secs_f64();
        report.outcome.recovered_lsn = redo_done(&server.log());
        recovered?;

        self.restore.progress.enter("checking");
        let begun = Instant::now();
        let problems = &mut report.outcome.problems;
        problems.extend(server.amcheck().await);
        if let Some(sql) = &self.what.query {
            match server.query(&self.what.database, sql).await {
                Ok(rows) => report.rows = rows,
                Err(error) => problems.push(format!("query: {}", error.message)),
            }
        }
        problems.extend(server.stop().await);
        if has_checksums {
            problems.extend(server::checksums(self.programs, data).await);
        }
        report.outcome.check_seconds = begun.elapsed().as_secs_f64();
        Ok(())
    }
}

/// Reads the LSN from `redo done at 0/3000148` in PostgreSQL's log.
fn redo_done(log: &str) -> Option<Lsn> {
    let (_, rest) = log.rsplit_once("redo done at ")?;
    rest.split_whitespace().next()?.parse().ok()
}
