//! `klio backup`: takes a base backup now, and shows its progress.
//!
//! Progress is a bar on a terminal and a line every few seconds elsewhere, both on standard error; the result goes to
//! standard output. The exit status distinguishes a backup that failed from one that was taken but could not be
//! verified or cleaned up after (TAKE5).

use super::{
    args::BackupArgs,
    conninfo,
    display::{self, Moved, View},
    exit, print, say, text,
};
use crate::{
    backup::{After, Backup, Done, Metrics, Order, Progress, Seen},
    config::Config,
    error::{Error, Failure},
    server_link::ServerLink,
};
use klio_storage::{
    catalog::{BackupRecord, MaintenanceOutcome, VerifyOutcome},
    layout::ClusterName,
};
use klio_telemetry::Telemetry;
use serde_json::{Value, json};
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

const STOPPING: &str = "stopping: PostgreSQL leaves backup mode; what was sent stays on the server for the next backup";

pub(super) async fn run(
    config: &Config,
    args: &BackupArgs,
    telemetry: &Telemetry,
) -> Result<u8, Error> {
    let stop = CancellationToken::new();
    let backup =
        backup(config, Metrics::new(&telemetry.meter(), config.cluster()?.as_str()), &stop)?;
    let order = order(args)?;
    let shown = display::show(args.quiet, || view(&backup.progress.seen()));
    let done = display::watched(&stop, STOPPING, shown, backup.run(&order)).await?;
    if args.json {
        print(&format!("{:#}\n", to_json(&done)));
    } else if !args.quiet {
        print(&summary(&done));
    }
    complain(&done);
    Ok(status(&done))
}

/// Everything that a backup needs, from the configuration.
pub(super) fn backup(
    config: &Config,
    metrics: Metrics,
    stop: &CancellationToken,
) -> Result<Backup, Error> {
    Ok(Backup {
        cluster: config.cluster()?,
        info: Arc::new(conninfo(config)?),
        link: ServerLink::new(&config.server)?,
        settings: config.backup.clone(),
        data_directory: config.postgres.data_directory.clone(),
        metrics,
        progress: Progress::new(),
        writer_id: uuid::Uuid::new_v4().to_string(),
        slot: super::slot::name(config)?,
        stop: stop.clone(),
    })
}

fn order(args: &BackupArgs) -> Result<Order, Error> {
    let name = args.name.as_deref().map(str::parse).transpose();
    let name = name.map_err(|e| Error::new(Failure::Config, format!("read --name: {e}")))?;
    Ok(Order {
        name,
        label: args.label.clone(),
        keep: args.keep,
        typed: true,
        full_read: args.full_read,
    })
}

/// The exit status, which tells a backup that was taken from one that was not (TAKE5).
fn status(done: &Done) -> u8 {
    if done.verified.failed() {
        exit::UNVERIFIED
    } else if done.maintained.failed() {
        exit::UNMAINTAINED
    } else if done.record.pages.bad > 0 {
        exit::PROBLEM
    } else {
        exit::OK
    }
}

/// Prints what is wrong with a backup that was taken.
fn complain(done: &Done) {
    let name = &done.record.name;
    match &done.verified {
        After::Failed(error) => {
            say(&format!("klio backup: {name} was taken, but could not be verified: {error}"));
        }
        After::Ran(outcome) if !outcome.ok => {
            say(&format!("klio backup: {name} was taken, but its verification found damage:"));
            outcome
                .damaged
                .iter()
                .take(20)
                .for_each(|d| say(&format!("  {} {}: {}", d.tier, d.key, d.problem)));
        }
        After::Ran(outcome) if !outcome.repaired.is_empty() => {
            say(&format!(
                "klio backup: {name} was taken, and its verification repaired what was damaged in one tier:"
            ));
            let repaired = outcome.repaired.iter().take(20);
            repaired.for_each(|d| say(&format!("  {} {}: {}", d.tier, d.key, d.problem)));
        }
        After::Ran(_) | After::Off => {}
    }
    if let After::Failed(error) = &done.maintained {
        say(&format!(
            "klio backup: {name} was taken, but the maintenance after it failed: {error}"
        ));
    }
    let pages = &done.record.pages;
    if pages.bad > 0 {
        say(&format!(
            "klio backup: {name} was taken, but {} pages have wrong checksums in PostgreSQL's files:",
            pages.bad
        ));
        pages.examples.iter().take(20).for_each(|p| {
            say(&format!(
                "  {} block {}: expected {:04x}, found {:04x}",
                p.file, p.block, p.expected, p.found
            ));
        });
    }
}

/// What the progress display shows.
fn view(seen: &Seen) -> View {
    let moved = (seen.phase == "copying" && seen.total_bytes > 0).then(|| Moved {
        bytes: seen.bytes,
        total_bytes: seen.total_bytes,
        files: files(seen),
    });
    View { phase: seen.phase, moved }
}

/// For example `512 of 985 files, 41.0 MiB stored (3 % of their size)`. The other bytes were stored already, were
/// saved by compression, or are not sent yet.
fn files(seen: &Seen) -> String {
    let stored = text::size(seen.stored);
    let share = 100.0 * seen.stored as f64 / seen.bytes.max(1) as f64;
    format!(
        "{} of {} files, {stored} stored ({:.0} % of their size)",
        seen.files,
        seen.total_files.max(seen.files),
        share.min(100.0)
    )
}

/// The result as text.
fn summary(done: &Done) -> String {
    let record = &done.record;
    let share = 100.0 * record.added_bytes as f64 / (record.size_bytes as f64).max(1.0);
    let mut out = format!(
        "backup {}{} done in {}\n  size         {} in {} files, {} directories\n  new          {} ({share:.1} %), stored as {}\n  WAL          {} to {} on timeline {}, durable on the server\n",
        record.name,
        later_generation(&done.cluster),
        text::duration(record.duration_seconds),
        text::size(record.size_bytes),
        record.files,
        record.directories,
        text::size(record.added_bytes),
        text::size(record.stored_bytes),
        record.start_lsn,
        record.stop_lsn,
        record.stop_timeline.get(),
    );
    out += &format!("  pages        {}\n", pages(record));
    out += &format!("  verified     {}\n", verified(&done.verified));
    out += &format!("  maintenance  {}\n", maintained(&done.maintained));
    out
}

/// The first generation is not mentioned, which most clusters have alone.
fn later_generation(cluster: &ClusterName) -> String {
    let (number, base) = (cluster.generation(), cluster.base());
    if number > 1 { format!(" of generation {number} of {base}") } else { String::new() }
}

fn pages(record: &BackupRecord) -> String {
    let pages = &record.pages;
    match (pages.enabled, pages.bad) {
        (false, _) => "not checked: the cluster has no data checksums".into(),
        (true, 0) => format!("{} checked in the files that were read, none bad", pages.checked),
        (true, bad) => format!("{} checked in the files that were read, {bad} BAD", pages.checked),
    }
}

fn verified(after: &After<VerifyOutcome>) -> String {
    match after {
        After::Off => "no".into(),
        After::Failed(error) => format!("failed: {}", error.message),
        After::Ran(outcome) => format!(
            "{}, {} files, {} % of the data read, in {}",
            match (outcome.ok, outcome.repaired.len()) {
                (true, 0) => "good".to_owned(),
                (true, repaired) => format!("good, after {repaired} repairs from the other tier"),
                (false, _) => "DAMAGED".to_owned(),
            },
            outcome.files,
            outcome.read_percent,
            text::duration(outcome.duration_seconds)
        ),
    }
}

fn maintained(after: &After<MaintenanceOutcome>) -> String {
    match after {
        After::Off => "no".into(),
        After::Failed(error) => format!("failed: {}", error.message),
        After::Ran(outcome) => {
            let freed = outcome.freed_tier1_bytes + outcome.freed_tier2_bytes;
            let held = match outcome.held_back.len() {
                0 => String::new(),
                count => {
                    format!(", held back for {count} reasons: {}", outcome.held_back.join("; "))
                }
            };
            format!("{} backups expired, {} freed{held}", outcome.expired.len(), text::size(freed))
        }
    }
}

fn to_json(done: &Done) -> Value {
    json!({
        "backup": done.record,
        "generation": done.cluster.number(),
        "verify": after_json(&done.verified),
        "maintenance": after_json(&done.maintained),
    })
}

fn after_json<T: serde::Serialize>(after: &After<T>) -> Value {
    match after {
        After::Off => Value::Null,
        After::Ran(outcome) => json!({ "outcome": outcome }),
        After::Failed(error) => {
            json!({ "error": error.message, "type": error.failure.name(), "hint": error.hint })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_how_far_and_how_long() {
        let seen = Seen {
            phase: "copying",
            bytes: 512 << 20,
            files: 5,
            stored: 1 << 20,
            total_bytes: 1 << 30,
            total_files: 10,
        };
        let expected = "copying: 512.0 MiB of 1.0 GiB (50 %), 5 of 10 files, 1.0 MiB stored (0 % of their size), 256.0 MiB/s, about 2.0 s left";
        assert_eq!(display::line(&view(&seen), 2.0), expected);
        let waiting = Seen { phase: "checkpoint", ..Seen::default() };
        assert_eq!(display::line(&view(&waiting), 2.0), "checkpoint after 2.0 s");
    }
}
