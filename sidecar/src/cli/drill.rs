//! `klio drill`: runs a drill and prints its result.
//!
//! The exit status is 0 only if no problem was found and the server has recorded the result.

use super::{
    args::{Cli, DrillArgs},
    display, exit, print, restore, say, text,
};
use crate::{
    config::Config,
    error::{Error, Failure},
    restore::{
        Restore, Source,
        drill::{self, Exercise, Report},
    },
    server_link::Which,
};
use serde_json::json;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

pub(super) async fn run(config: &Config, cli: &Cli, args: &DrillArgs) -> Result<u8, Error> {
    let backup = args.backup.as_deref().map(str::parse).transpose();
    let backup =
        backup.map_err(|error| Error::new(Failure::Config, format!("read --backup: {error}")))?;
    let exercise = Exercise {
        backup,
        query: args.query.clone(),
        database: args.database.clone(),
        dir: args.in_dir.as_deref().map(restore::absolute).transpose()?,
        limit: args.timeout,
    };
    let stop = CancellationToken::new();
    let source = Source::open(config, &stop)?.settle(config).await?;
    let typed = args.source.from.is_some();
    let invocation = restore::invocation(config, cli, typed, source.told())?;
    // A token of its own, because a drill that exceeds its time limit cancels it, and the server is told nevertheless.
    let engine = Restore { source, progress: Arc::default(), stop: stop.child_token(), invocation };
    let shown = display::show(args.quiet, || restore::view(&engine.progress.seen()));
    let work = drill::run(&engine, config, &exercise);
    let report = display::watched(&stop, "stopping", shown, work).await;
    let report = report.map_err(|error| display::or_stopped(&stop, error, ""))?;
    let recorded = engine.source.record_drill(&report.outcome).await;
    if args.json {
        let document = json!({ "drill": report.outcome, "rows": report.rows });
        print(&format!("{:#}\n", engine.source.which().tag(document)));
    } else if !args.quiet || !report.outcome.ok {
        print(&describe(&report, engine.source.which()));
    }
    if let Err(error) = &recorded {
        say(&format!("klio drill: the result could not be recorded on the server: {error}"));
    }
    Ok(if report.outcome.ok && recorded.is_ok() { exit::OK } else { exit::PROBLEM })
}

fn describe(report: &Report, which: &Which) -> String {
    let outcome = &report.outcome;
    let recovered = outcome.recovered_lsn.map_or_else(|| "-".into(), |lsn| lsn.to_string());
    let mut out = format!(
        "drill of backup {}{}: {}\n  restored     in {}\n  recovered    to {recovered} in {}\n  checked      in {}\n",
        outcome.backup,
        which.said().map_or_else(String::new, |said| format!(" of {said}")),
        if outcome.ok { "good" } else { "FAILED" },
        text::duration(outcome.restore_seconds),
        text::duration(outcome.recovery_seconds),
        text::duration(outcome.check_seconds),
    );
    for row in &report.rows {
        let cells: Vec<&str> = row.iter().map(|cell| cell.as_deref().unwrap_or("")).collect();
        out += &format!("  query        {}\n", cells.join(" | "));
    }
    for problem in &outcome.problems {
        out += &format!("  problem      {problem}\n");
    }
    out
}
