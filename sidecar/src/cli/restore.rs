//! `klio restore`: plans a restore, shows the plan, carries it out, and says what to do next.
//!
//! The plan goes to standard output, progress and notes to standard error.

use super::{
    args::{Cli, RestoreArgs, TargetArgs},
    display::{self, Moved, View},
    exit, print, say, text,
};
use crate::{
    config::Config,
    conninfo::Written,
    error::{Error, Failure},
    restore::{
        Decision, Done, Invocation, Order, Planned, Recovery, Restore, Seen, Source, Standby, Wish,
        explain_time, parse_time, shell, show_time,
    },
    server_link::Which,
};
use klio_pg::TimelineId;
use klio_storage::{
    catalog::{Stop, Target, TimelineChoice},
    layout::ClusterName,
};
use serde_json::{Value, json};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};
use tokio_util::sync::CancellationToken;

pub(super) async fn run(config: &Config, cli: &Cli, args: &RestoreArgs) -> Result<u8, Error> {
    let order = order(args)?;
    let stop = CancellationToken::new();
    let source = Source::open(config, &stop)?.settle(config).await?;
    let invocation = invocation(config, cli, args.source.from.is_some(), source.told())?;
    let restore = Restore { source, progress: Arc::default(), stop: stop.clone(), invocation };
    let shown = display::show(args.quiet || args.dry_run, || view(&restore.progress.seen()));
    let work = display::watched(&stop, "stopping", shown, async {
        let planned = restore.plan(&order).await?;
        let which = restore.source.which();
        let plan = which.tag(to_json(&planned, &order));
        if !args.json && !args.quiet {
            print(&describe(&planned, &order, which));
        }
        planned.notes.iter().for_each(|note| say(&format!("note: {note}")));
        if args.dry_run {
            return Ok((plan, None, major(&planned)));
        }
        let (major, start) = (major(&planned), start(&planned, &order));
        restore.carry_out(planned).await.map(|done| (plan, Some((done, start)), major))
    });
    let (plan, done, major) = work.await.map_err(|error| {
        display::or_stopped(&stop, error, "continue in an unfinished directory with --delta")
    })?;
    if args.json {
        print(&format!(
            "{:#}\n",
            json!({ "plan": plan, "done": done.map(|(done, _)| done_json(done)) })
        ));
    } else if let (Some((done, start)), false) = (done, args.quiet) {
        print(&summary(&done, &order, major, &start));
    }
    Ok(exit::OK)
}

fn major(planned: &Planned) -> u32 {
    planned.decision.plan.backup.postgres_version / 10_000
}

fn wrong(message: impl std::fmt::Display) -> Error {
    Error::new(Failure::Config, message)
}

fn order(args: &RestoreArgs) -> Result<Order, Error> {
    let standby = standby(args)?;
    let target = target(&args.target)?;
    let timeline = timeline(args.target_timeline.as_deref())?;
    let backup = args.backup.as_deref().map(str::parse).transpose();
    let backup = backup.map_err(|error| wrong(format!("read --backup: {error}")))?;
    let action = args.target_action;
    let maps: Result<Vec<(String, PathBuf)>, Error> =
        args.tablespace_map.iter().map(|map| tablespace(map)).collect();
    Ok(Order {
        wish: Wish {
            exclusive: exclusive(args, &target)?,
            full_xid: args.target.target_xid.filter(|xid| *xid > u64::from(u32::MAX)),
            timeline_typed: args.target_timeline.is_some(),
            target,
            timeline,
            backup,
            stop_at_end: standby.is_none(),
        },
        to: absolute(&args.to)?,
        maps: maps?,
        action,
        standby,
        delta: args.delta,
        beside: None,
        harmless: args.harmless,
        alone: false,
    })
}

/// Reads the options for a standby. A standby has no target and may have to take over, so other options are refused.
fn standby(args: &RestoreArgs) -> Result<Option<Standby>, Error> {
    if !args.standby {
        return match (&args.primary_conninfo, &args.primary_slot_name) {
            (None, None) => Ok(None),
            (Some(_), _) => Err(wrong("read --primary-conninfo: expected --standby with it")),
            (_, Some(_)) => Err(wrong("read --primary-slot-name: expected --standby with it")),
        };
    }
    let target = &args.target;
    let follows = args.target_timeline.as_deref().is_none_or(|timeline| timeline == "latest");
    let no_end =
        "a standby has no target, it follows its primary: leave out this option or --standby";
    for (is_set, flag, why) in [
        (target.target_time.is_some(), "--target-time", no_end),
        (target.target_lsn.is_some(), "--target-lsn", no_end),
        (target.target_name.is_some(), "--target-name", no_end),
        (target.target_xid.is_some(), "--target-xid", no_end),
        (target.target_immediate, "--target-immediate", no_end),
        (args.target_action.is_some(), "--target-action", no_end),
        (args.exclusive, "--exclusive", no_end),
        (
            !follows,
            "--target-timeline",
            "a standby follows the newest timeline: leave out this option",
        ),
        (
            args.harmless,
            "--harmless",
            "a standby acts on its primary, and may have to take over: for a harmless copy, restore without --standby",
        ),
    ] {
        if is_set {
            return Err(wrong(format!("read {flag}: expected none with --standby")).hint(why));
        }
    }
    let primary = args.primary_conninfo.as_deref().map(Written::parse).transpose();
    let primary = primary.map_err(|error| wrong(format!("read --primary-conninfo: {error}")))?;
    let slot = args.primary_slot_name.as_deref().map(str::parse).transpose();
    let slot = slot.map_err(|error| wrong(format!("read --primary-slot-name: {error}")))?;
    if slot.is_some() && primary.is_none() {
        return Err(wrong("read --primary-slot-name: expected --primary-conninfo with it"));
    }
    Ok(Some(Standby { primary, slot }))
}

fn exclusive(args: &RestoreArgs, target: &Target) -> Result<bool, Error> {
    let fits = matches!(target, Target::Time { .. } | Target::Lsn(_) | Target::Xid(_));
    match args.exclusive && !fits {
        false => Ok(args.exclusive),
        true => Err(wrong(
            "read --exclusive: expected --target-time, --target-lsn or --target-xid with it",
        )),
    }
}

/// Makes a path absolute, without a trailing slash and without `.`. Links are not resolved, as the user may want them.
pub(super) fn absolute(path: &Path) -> Result<PathBuf, Error> {
    let path = std::path::absolute(path)
        .map_err(|error| Error::new(Failure::Local, format!("{}: {error}", path.display())))?;
    Ok(path.components().collect())
}

fn tablespace(map: &str) -> Result<(String, PathBuf), Error> {
    // The old location may contain an equals sign, so the last one separates.
    let (old, new) =
        map.rsplit_once('=').filter(|(old, new)| !old.is_empty() && !new.is_empty()).ok_or_else(
            || wrong(format!("read --tablespace-map: expected OLD=NEW, found {map:?}")),
        )?;
    let old = old.strip_suffix('/').filter(|old| !old.is_empty()).unwrap_or(old);
    Ok((old.to_owned(), absolute(Path::new(new))?))
}

fn target(args: &TargetArgs) -> Result<Target, Error> {
    if let Some(time) = &args.target_time {
        let unix_micros =
            parse_time(time).map_err(|problem| wrong(format!("read --target-time: {problem}")))?;
        return Ok(Target::Time { unix_micros });
    }
    if let Some(lsn) = &args.target_lsn {
        let lsn = lsn.parse().map_err(|error| wrong(format!("read --target-lsn: {error}")))?;
        return Ok(Target::Lsn(lsn));
    }
    if let Some(name) = &args.target_name {
        if name.is_empty() {
            return Err(wrong("read --target-name: expected a name, found none"));
        }
        return Ok(Target::Name(name.clone()));
    }
    Ok(match args.target_xid {
        // PostgreSQL's recovery_target_xid has no epoch; the epoch is compared with that of the backup.
        Some(xid) => Target::Xid(xid as u32),
        None if args.target_immediate => Target::Immediate,
        None => Target::Latest,
    })
}

fn timeline(text: Option<&str>) -> Result<TimelineChoice, Error> {
    match text {
        None | Some("latest") => Ok(TimelineChoice::Latest),
        Some("current") => Ok(TimelineChoice::Current),
        Some(number) => {
            let hex = number.strip_prefix("0x");
            let parsed =
                hex.map_or_else(|| number.parse().ok(), |h| u32::from_str_radix(h, 16).ok());
            let timeline = parsed.and_then(TimelineId::new);
            timeline.map(TimelineChoice::Number).ok_or_else(|| {
                wrong(format!(
                    "read --target-timeline: expected a number, latest or current, found {number:?}"
                ))
            })
        }
    }
}

/// How restore_command calls wal-fetch: with the same configuration file, and with the options that override it.
pub(super) fn invocation(
    config: &Config,
    cli: &Cli,
    from_typed: bool,
    cluster: &ClusterName,
) -> Result<Invocation, Error> {
    let program = std::env::current_exe()
        .map_err(|error| Error::new(Failure::Local, format!("find this program: {error}")))?;
    let mut arguments = Vec::new();
    let mut add = |flag: &str, value: String| arguments.extend([flag.to_owned(), value]);
    match &config.file {
        Some(file) => add("--config", absolute(file)?.display().to_string()),
        None => say(
            "note: no configuration file was used, so PostgreSQL needs the same KLIO_ variables for restore_command",
        ),
    }
    add("--cluster", cluster.to_string());
    if let Some(server) = &cli.global.server {
        add("--server", server.clone());
    }
    let restore = &config.restore;
    if !restore.from.is_empty() || from_typed {
        add("--from", restore.from.clone());
        if !restore.identity.as_os_str().is_empty() {
            add("--identity", absolute(&restore.identity)?.display().to_string());
        }
    }
    Ok(Invocation { program, arguments })
}

/// The recovery target as text for the user.
pub(super) fn recovery(recovery: &Recovery, inclusive: bool) -> String {
    let before = if inclusive { "" } else { "before " };
    let end = match recovery {
        Recovery::End => "the end of WAL".into(),
        Recovery::Immediate => "as soon as it is consistent".into(),
        Recovery::Time(time) => format!("{} in PostgreSQL's clock", show_time(*time)),
        Recovery::Lsn(lsn) => format!("the record at {lsn}"),
        Recovery::Name(name) => format!("restore point {name:?}"),
        Recovery::Xid(xid) => format!("transaction {xid}"),
    };
    format!("{before}{end}")
}

fn describe(planned: &Planned, order: &Order, which: &Which) -> String {
    let Decision { plan, recovery: target, inclusive, .. } = &planned.decision;
    let record = &plan.backup;
    let settings = planned.settings();
    let target = match &settings.standby {
        Some(standby) => standby.describe(),
        None => format!("{}, then {}", recovery(target, *inclusive), settings.action.name()),
    };
    let newest = if settings.standby.is_some() { ", and whichever comes after it" } else { "" };
    let mut out = format!(
        "restore to {}\n  backup       {} of {}, ended at {} ({}), timeline {}\n  target       {target}\n  timeline     {}{newest}\n  WAL          from {}, stored to {}{}\n  size         {} in {} files\n",
        planned.places.data.display(),
        record.name,
        text::time(record.started_postgres_unix),
        text::time(record.stopped_postgres_unix),
        record.stop_lsn,
        record.stop_timeline.get(),
        plan.path.timeline().get(),
        record.start_lsn,
        plan.reach.end,
        if matches!(plan.reach.stop, Stop::Hole(_)) { ", where a hole begins" } else { "" },
        text::size(planned.bytes),
        planned.files,
    );
    if let Some(said) = which.said() {
        out += &format!("  history      {said}\n");
    }
    if let Target::Time { unix_micros } = order.wish.target {
        out += &format!("  asked for    {}\n", explain_time(unix_micros));
    }
    for (oid, place) in planned.places.linked() {
        out += &format!("  tablespace   {oid} to {}\n", place.display());
    }
    out
}

fn to_json(planned: &Planned, order: &Order) -> Value {
    let plan = &planned.decision.plan;
    let tablespaces: Vec<Value> = planned
        .places
        .linked()
        .map(|(oid, place)| json!({ "oid": oid, "location": place }))
        .collect();
    let settings = planned.settings();
    let shown = settings.shown().into_iter().map(|(name, value)| (name.into(), value.into()));
    let shown: serde_json::Map<String, Value> = shown.collect();
    let hole = match &plan.reach.stop {
        Stop::Hole(hole) => json!(hole),
        Stop::End { .. } => Value::Null,
    };
    json!({
        "to": planned.places.data,
        "tablespaces": tablespaces,
        "backup": plan.backup.name,
        "timeline": plan.path.timeline(),
        "wal_from": plan.backup.start_lsn,
        "wal_to": plan.reach.end,
        "hole": hole,
        "target": if settings.standby.is_some() { Value::Null } else { json!(recovery(&planned.decision.recovery, planned.decision.inclusive)) },
        "asked_time": match order.wish.target {
            Target::Time { unix_micros } => json!(show_time(unix_micros)),
            _ => Value::Null,
        },
        "action": match settings.standby {
            Some(_) => Value::Null,
            None => json!(settings.action),
        },
        "standby": settings.standby.is_some(),
        "settings": shown,
        "files": planned.files,
        "bytes": planned.bytes,
        "notes": planned.notes,
    })
}

fn done_json(done: Done) -> Value {
    json!({
        "files": done.files,
        "bytes": done.bytes,
        "written_bytes": done.written,
        "removed": done.removed,
        "seconds": done.seconds,
    })
}

/// The command that starts PostgreSQL. If the configuration is outside of the data directory, options override those
/// settings in it that lead to the original's data (P12).
fn start(planned: &Planned, order: &Order) -> String {
    let data = shell(&order.to.display().to_string());
    if planned.has_conf {
        return format!("pg_ctl -D {data} start");
    }
    let conf = format!("/etc/postgresql/{}/main/postgresql.conf", major(planned));
    let options = format!("-c config_file={conf} -c data_directory={data} -c external_pid_file=");
    format!("pg_ctl -D {data} -o {} start", shell(&options))
}

fn summary(done: &Done, order: &Order, major: u32, start: &str) -> String {
    let rate = done.bytes as f64 / done.seconds.max(0.001);
    let removed =
        if done.removed > 0 { format!(", {} removed", done.removed) } else { String::new() };
    let next = match order.standby {
        Some(_) => "which becomes a standby and stays one until pg_ctl promote",
        None => "which recovers by itself",
    };
    let slot = order.standby.as_ref().and_then(|standby| standby.slot.as_ref());
    let slot = slot.map_or_else(String::new, |slot| {
        format!(
            "the slot must exist on the primary: select pg_create_physical_replication_slot('{slot}')\n"
        )
    });
    format!(
        "restored {} in {} files in {} ({}/s); {} written{removed}\nnext: start PostgreSQL {major}, {next}:\n  {start}\n{slot}",
        text::size(done.bytes),
        done.files,
        text::duration(done.seconds),
        text::size(rate as u64),
        text::size(done.written),
    )
}

/// What the progress display shows.
pub(super) fn view(seen: &Seen) -> View {
    let moved = (seen.phase == "restoring" && seen.total_bytes > 0).then(|| Moved {
        bytes: seen.bytes,
        total_bytes: seen.total_bytes,
        files: format!("{} of {} files", seen.files, seen.total_files),
    });
    let replay = seen.replay.map(|replay| Moved {
        bytes: replay.at.bytes_since(replay.from),
        total_bytes: replay.to.bytes_since(replay.from),
        files: format!("replayed to {} of {}", replay.at, replay.to),
    });
    View { phase: seen.phase, moved: moved.or(replay) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_standby_takes_no_end_and_its_primary_is_checked() {
        use super::super::args::Command;
        use clap::Parser;
        let order = |more: &[&str]| {
            let words = [&["klio", "restore", "--to", "/new"], more].concat();
            match Cli::try_parse_from(words).unwrap().command {
                Command::Restore(args) => order(&args),
                other => panic!("{other:?}"),
            }
        };
        for (more, said) in [
            (&["--target-time", "2026-01-01 00:00:00Z"][..], "--target-time"),
            (&["--target-lsn", "0/1"], "--target-lsn"),
            (&["--target-name", "x"], "--target-name"),
            (&["--target-xid", "700"], "--target-xid"),
            (&["--target-immediate"], "--target-immediate"),
            (&["--target-action", "promote"], "--target-action"),
            (&["--target-timeline", "2"], "--target-timeline"),
            (&["--exclusive"], "--exclusive"),
            (&["--harmless"], "--harmless"),
            (&["--primary-conninfo", "host=a pasword=geheim"], "\"pasword\""),
            (&["--primary-conninfo", ""], "--primary-conninfo"),
            (
                &["--primary-conninfo", "host=a", "--primary-slot-name", "No'"],
                "--primary-slot-name",
            ),
            (&["--primary-slot-name", "s"], "--primary-conninfo"),
        ] {
            let error = order(&[&["--standby"], more].concat()).unwrap_err();
            assert_eq!(error.failure, Failure::Config, "{more:?}");
            assert!(error.message.contains(said), "{more:?}: {error}");
            assert!(!error.to_string().contains("geheim"), "{error}");
        }
        for more in [["--primary-conninfo", "host=a"], ["--primary-slot-name", "s"]] {
            assert!(order(&more).unwrap_err().message.contains("--standby"), "{more:?}");
        }
        let made = order(&["--standby", "--latest", "--target-timeline", "latest"]).unwrap();
        assert_eq!((made.standby, made.wish.stop_at_end), (Some(Standby::default()), false));
        assert!(order(&[]).unwrap().wish.stop_at_end);
    }

    #[test]
    fn what_is_typed_is_read_or_refused_with_the_flag_s_name() {
        assert_eq!(
            timeline(Some("3")).unwrap(),
            TimelineChoice::Number(TimelineId::new(3).unwrap())
        );
        assert_eq!(timeline(None).unwrap(), TimelineChoice::Latest);
        assert!(timeline(Some("0")).unwrap_err().message.contains("--target-timeline"));
        assert_eq!(tablespace("/a=b/=/new").unwrap(), ("/a=b".into(), "/new".into()));
        for bad in ["", "/a", "/a=", "=/b"] {
            assert!(tablespace(bad).is_err(), "{bad:?}");
        }
        let args = TargetArgs { target_lsn: Some("x".into()), ..TargetArgs::default() };
        assert!(target(&args).unwrap_err().message.contains("--target-lsn"));
        let args = TargetArgs { target_name: Some(String::new()), ..TargetArgs::default() };
        assert!(target(&args).unwrap_err().message.contains("--target-name"));
        assert_eq!(target(&TargetArgs::default()).unwrap(), Target::Latest);
    }
}
