//! `klio list`: base backups, and for each timeline what can be restored, with every hole and its reason.

use super::super::{exit, print, say, table, text};
use crate::{
    config::Config,
    error::{Error, Failure},
    restore::{Catalog, Known, Scratch, Source, Wal, show_time},
};
use klio_storage::catalog::{Hole, Line, Stop, Survey, Window};
use klio_telemetry::visible;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use tokio_util::sync::CancellationToken;

/// The time of the last commit in each window, by timeline and end. Windows whose WAL could not be read are missing.
type Ends = BTreeMap<(u32, u64), i64>;

pub(in crate::cli) async fn run(config: &Config, as_json: bool) -> Result<u8, Error> {
    let source = Source::open(config, &CancellationToken::new())?.settle(config).await?;
    let catalog = source.catalog().await?;
    // What is listed as restorable is what klio restore would choose without `--backup` (RESTORE6).
    let survey = Survey::new(&catalog.holdings, catalog.sound());
    let lines = survey.lines();
    let ends = ends(&source, &survey, &lines).await?;
    let out = if as_json {
        format!("{:#}\n", source.which().tag(to_json(&catalog, &survey, &lines, &ends)))
    } else {
        source.which().line() + &to_text(&catalog, &survey, &lines, &ends)
    };
    print(&out);
    if catalog.backups.is_empty()
        && let Some(elsewhere) = source.elsewhere().await
    {
        say(&elsewhere);
    }
    let problems = !catalog.problems.is_empty() || !survey.problems().is_empty();
    Ok(if problems { exit::PROBLEM } else { exit::OK })
}

/// Reads the last commit of each window. WAL that cannot be read does not fail the listing; a stop by the user does.
async fn ends(source: &Source, survey: &Survey, lines: &[Line]) -> Result<Ends, Error> {
    let mut ends = Ends::new();
    for line in lines {
        let Some(path) = survey.path(line.timeline) else { continue };
        for window in &line.windows {
            let newest = survey.backups().iter().rfind(|b| window.backups.contains(&b.name));
            let Some(backup) = newest else { continue };
            let scratch = Scratch::new(None)?;
            let postgres_major = backup.postgres_version / 10_000;
            let wal = Wal { source, scratch: &scratch, path, postgres_major };
            match wal.tail(backup.stop_lsn, window.reach.end).await {
                Ok(tail) => {
                    let time = tail.last_ending.as_ref().and_then(|f| f.landmark.unix_micros());
                    let key = (line.timeline.get(), window.reach.end.as_u64());
                    ends.extend(time.map(|time| (key, time)));
                }
                Err(error) if error.failure == Failure::Stopped => return Err(error),
                Err(error) => {
                    tracing::warn!(%error, end = %window.reach.end, "cannot read the time of the last commit");
                }
            }
        }
    }
    Ok(ends)
}

fn tiers(known: &Known) -> &'static str {
    match (known.tier1, known.tier2) {
        (true, true) => "1, 2",
        (true, false) => "1",
        (false, true) => "2",
        (false, false) => "incomplete",
    }
}

fn verified(known: &Known) -> String {
    match &known.verified {
        None => "no".into(),
        Some(outcome) if outcome.ok => {
            format!("{} ({:.0} %)", text::time(outcome.finished_unix), outcome.read_percent)
        }
        Some(_) => "DAMAGED".into(),
    }
}

fn drilled(known: &Known) -> String {
    match &known.drilled {
        None => "no".into(),
        Some(outcome) if outcome.ok => text::time(outcome.finished_unix),
        Some(_) => "FAILED".into(),
    }
}

fn to_text(catalog: &Catalog, survey: &Survey, lines: &[Line], ends: &Ends) -> String {
    let row = |known: &Known| {
        let r = &known.record;
        vec![
            r.name.to_string(),
            text::time(r.started_postgres_unix),
            text::time(r.stopped_postgres_unix),
            text::duration(r.duration_seconds),
            text::size(r.size_bytes),
            text::size(r.stored_bytes),
            r.start_lsn.to_string(),
            r.stop_lsn.to_string(),
            r.stop_timeline.get().to_string(),
            verified(known),
            drilled(known),
            tiers(known).to_owned(),
        ]
    };
    let rows: Vec<Vec<String>> = catalog.backups.iter().map(row).collect();
    let header = [
        "BACKUP", "START", "END", "DURATION", "SIZE", "STORED", "FROM", "TO", "TIMELINE",
        "VERIFIED", "DRILLED", "TIER",
    ];
    let mut out =
        if rows.is_empty() { "no base backups\n".into() } else { table::render(&header, &rows) };
    for known in &catalog.backups {
        let record = &known.record;
        if let Some(doubt) = known.doubt() {
            out += &format!("{doubt}: klio restore uses another backup if it can\n");
        }
        if let Some(hole) = survey.broken(record) {
            out += &format!("backup {} cannot be restored: {hole}\n", record.name);
        }
        if record.pages.bad > 0 {
            out += &format!(
                "backup {}: {} pages with wrong checksums\n",
                record.name, record.pages.bad
            );
        }
    }
    out += "\nrecoverable (times in PostgreSQL's clock):\n";
    lines.iter().for_each(|line| out += &line_text(line, ends));
    if lines.iter().all(|line| line.windows.is_empty()) {
        out += "  nothing\n";
    }
    for problem in catalog.problems.iter().chain(survey.problems()) {
        out += &format!("problem: {}\n", visible::line(problem));
    }
    out
}

fn line_text(line: &Line, ends: &Ends) -> String {
    let parent = line.parent.map_or_else(String::new, |(timeline, at)| {
        format!(" (branched off timeline {} at {at})", timeline.get())
    });
    let aside = line.aside.map_or_else(String::new, |standing| {
        format!(
            ", {standing}: restored only with --target-timeline {}; klio timeline list",
            line.timeline.get()
        )
    });
    let mut out = format!("  timeline {}{parent}{aside}\n", line.timeline.get());
    for window in &line.windows {
        let names: Vec<&str> = window.backups.iter().map(|name| name.as_str()).collect();
        out += &format!(
            "    from {} ({}) to {} ({}), with {}\n",
            text::time(window.from_unix),
            window.from,
            until(line, window, ends).unwrap_or_else(|| "an unknown time".into()),
            window.reach.end,
            names.join(", ")
        );
    }
    for Hole { timeline, from, to, reason } in &line.holes {
        let (number, reason) = (timeline.get(), visible::line(reason));
        out += &format!("    hole from {from} to {to} on timeline {number}: {reason}\n");
    }
    for run in &line.unserved {
        out += &format!(
            "    WAL from {} to {} is stored, but no backup leads to it\n",
            run.start, run.end
        );
    }
    if line.windows.is_empty() && line.unserved.is_empty() {
        out += "    nothing\n";
    }
    out
}

/// The latest time that can be restored, as text.
fn until(line: &Line, window: &Window, ends: &Ends) -> Option<String> {
    until_micros(line, window, ends).map(|micros| match window.reach.stop {
        Stop::End { idle_until_unix: Some(_) } => format!("now, {}", show_time(micros)),
        _ => show_time(micros),
    })
}

fn until_micros(line: &Line, window: &Window, ends: &Ends) -> Option<i64> {
    if let Stop::End { idle_until_unix: Some(unix) } = window.reach.stop {
        return Some((unix * 1e6) as i64);
    }
    ends.get(&(line.timeline.get(), window.reach.end.as_u64())).copied()
}

fn to_json(catalog: &Catalog, survey: &Survey, lines: &[Line], ends: &Ends) -> Value {
    let backups: Vec<Value> = catalog
        .backups
        .iter()
        .map(|known| {
            json!({
                "backup": known.record,
                "tier1": known.tier1,
                "tier2": known.tier2,
                "verified": known.verified,
                "drilled": known.drilled,
                "broken": survey.broken(&known.record),
            })
        })
        .collect();
    let window = |line: &Line, window: &Window| {
        json!({
            "backups": window.backups,
            "from_lsn": window.from,
            "from_unix": window.from_unix,
            "to_lsn": window.reach.end,
            "to_unix": until_micros(line, window, ends).map(|micros| micros as f64 / 1e6),
            "idle": matches!(window.reach.stop, Stop::End { idle_until_unix: Some(_) }),
        })
    };
    let timelines: Vec<Value> = lines
        .iter()
        .map(|line| {
            let windows: Vec<Value> = line.windows.iter().map(|w| window(line, w)).collect();
            json!({
                "timeline": line.timeline,
                "parent": line.parent.map(|(t, at)| json!({ "timeline": t, "lsn": at })),
                "standing": line.aside,
                "windows": windows,
                "holes": line.holes,
                "unserved": line.unserved,
            })
        })
        .collect();
    let problems: Vec<&String> = catalog.problems.iter().chain(survey.problems()).collect();
    json!({ "backups": backups, "timelines": timelines, "problems": problems })
}
