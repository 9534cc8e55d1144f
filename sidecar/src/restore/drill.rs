//! `klio drill`: proves that a backup restores, by doing it.
//!
//! Restore to a scratch directory, recover to the end of what is held (as a target, so that an end that
//! comes too early is an error), promote, check, query, stop. Nothing of it is reachable from outside: a
//! socket in a directory of our own, no TCP, no archiving, no logical workers, no preloaded libraries.
//! Whatever happens, PostgreSQL ends and the directory goes.

mod copy;
mod programs;
mod server;
mod trace;

use super::{Action, Invocation, Known, Order, Restore, Scratch, Wish, settings::Settings};
use crate::{
    config::Config,
    error::{Error, Failure},
};
use klio_pg::Lsn;
use klio_storage::{
    catalog::{DrillOutcome, Target, TimelineChoice},
    layout::BackupName,
    record::Unknown,
};
use programs::Programs;
use server::Server;
use std::{path::PathBuf, time::Instant};

/// What is to be practised.
#[derive(Debug, Clone, Default)]
pub struct Exercise {
    /// Which backup; `None`: the newest.
    pub backup: Option<BackupName>,
    /// Run at the end.
    pub query: Option<String>,
    /// In which database.
    pub database: String,
    /// Below which directory.
    pub dir: Option<PathBuf>,
}

/// How it went.
#[derive(Debug, Clone)]
pub struct Report {
    /// For the server.
    pub outcome: DrillOutcome,
    /// What the query gave, as text.
    pub rows: Vec<Vec<Option<String>>>,
}

/// Runs a drill. What is wrong with the backup is in the report; an error is something else.
///
/// # Errors
/// What kept the drill from beginning; a stop.
pub async fn run(restore: &Restore, config: &Config, what: &Exercise) -> Result<Report, Error> {
    let catalog = restore.source.catalog().await?;
    let known = choose(&catalog.backups, what.backup.as_ref())?;
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
    let maps = record.tablespaces.iter().map(|tablespace| {
        let oid = tablespace.oid;
        (oid.to_string(), scratch.join(&format!("tablespace-{oid}")))
    });
    let order = Order {
        wish: Wish {
            target: Target::Latest,
            timeline: TimelineChoice::Latest,
            backup: Some(record.name.clone()),
            stop_at_end: true,
        },
        to: scratch.join("data"),
        maps: maps.collect(),
        action: Some(Action::Promote),
        delta: false,
    };
    let steps = Steps { restore, programs: &programs, scratch: &scratch, what, config };
    let result = tokio::select! {
        biased;
        () = restore.stop.cancelled() => Err(super::stopped()),
        result = steps.all(&catalog, &order, invocation, &mut report) => result,
    };
    match result {
        Err(error) if error.failure == Failure::Stopped || restore.stop.is_cancelled() => {
            return Err(super::stopped());
        }
        Err(error) => report.outcome.problems.push(error.message),
        Ok(()) => {}
    }
    report.outcome.ok = report.outcome.problems.is_empty();
    report.outcome.finished_unix = jiff::Timestamp::now().as_microsecond() as f64 / 1e6;
    Ok(report)
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
    async fn all(
        &self,
        catalog: &super::Catalog,
        order: &Order,
        invocation: Invocation,
        report: &mut Report,
    ) -> Result<(), Error> {
        let begun = Instant::now();
        let mut planned = self.restore.plan_from(catalog, order).await?;
        let restore_command = invocation.restore_command();
        planned.settings = Settings { restore_command, ..planned.settings };
        let has_checksums = planned.decision.plan.backup.pages.enabled;
        self.restore.carry_out(planned).await?;
        let programs = self.programs.clone();
        let root = self.scratch.path().to_owned();
        let given = tokio::task::spawn_blocking(move || programs.give_all(&root)).await;
        given.map_err(|e| Error::new(Failure::Local, format!("give the files away: {e}")))??;
        report.outcome.restore_seconds = begun.elapsed().as_secs_f64();

        self.restore.progress.enter("recovering");
        let begun = Instant::now();
        let data = order.to.as_path();
        let role = &self.config.drill.user;
        let mut server = Server::start(self.programs, data, self.scratch, role).await?;
        let recovered = server.recovered().await;
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

/// From PostgreSQL's log, `redo done at 0/3000148`.
fn redo_done(log: &str) -> Option<Lsn> {
    let (_, rest) = log.rsplit_once("redo done at ")?;
    rest.split_whitespace().next()?.parse().ok()
}
