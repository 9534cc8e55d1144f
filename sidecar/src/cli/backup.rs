//! `klio backup`: takes a base backup now, and shows how it goes.
//!
//! A bar on a terminal, a line every few seconds elsewhere, both on standard error; the result on standard
//! output. The exit status tells a backup that failed from one that was taken and then could not be
//! verified or tidied up after (B5).

use super::{args::BackupArgs, conninfo, exit, print, say, stream, text};
use crate::{
    backup::{After, Backup, Done, Metrics, Order, Progress, Seen},
    config::Config,
    error::{Error, Failure},
    server_link::ServerLink,
};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use klio_storage::catalog::{BackupRecord, MaintenanceOutcome, VerifyOutcome};
use klio_telemetry::Telemetry;
use serde_json::{Value, json};
use std::{
    io::IsTerminal,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio_util::sync::CancellationToken;

/// Between two looks, by where they are shown.
const BAR: Duration = Duration::from_millis(200);
const LINE: Duration = Duration::from_secs(5);

/// Runs it.
pub(super) async fn run(
    config: &Config,
    args: &BackupArgs,
    telemetry: &Telemetry,
) -> Result<u8, Error> {
    let stop = CancellationToken::new();
    let backup =
        backup(config, Metrics::new(&telemetry.meter(), config.cluster()?.as_str()), &stop)?;
    let order = order(args)?;
    let done = watched(&backup, &order, &stop, args.quiet).await?;
    if args.json {
        print(&format!("{:#}\n", to_json(&done)));
    } else if !args.quiet {
        print(&summary(&done));
    }
    complain(&done);
    Ok(status(&done))
}

/// Takes it, shows it, and stops it on a signal. Nothing is shown any more when this returns.
async fn watched(
    backup: &Backup,
    order: &Order,
    stop: &CancellationToken,
    quiet: bool,
) -> Result<Done, Error> {
    let mut signals = stream::signals()?;
    let shown = show(&backup.progress, quiet);
    tokio::pin!(shown);
    let work = backup.run(order);
    tokio::pin!(work);
    loop {
        tokio::select! {
            biased;
            result = &mut work => return result,
            () = stream::signalled(&mut signals), if !stop.is_cancelled() => {
                say("stopping: PostgreSQL leaves backup mode, and what was sent stays for the next backup");
                stop.cancel();
            }
            () = &mut shown => {}
        }
    }
}

/// What a backup needs, from the configuration.
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

/// B5: a backup that was taken is told from one that was not.
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

/// What is wrong with a backup that was taken, for a person.
fn complain(done: &Done) {
    let name = &done.record.name;
    match &done.verified {
        After::Failed(error) => {
            say(&format!("klio backup: {name} was taken, and could not be verified: {error}"));
        }
        After::Ran(outcome) if !outcome.ok => {
            say(&format!("klio backup: {name} was taken, and its verification found damage:"));
            outcome
                .damaged
                .iter()
                .take(20)
                .for_each(|d| say(&format!("  {} {}: {}", d.tier, d.key, d.problem)));
        }
        After::Ran(_) | After::Off => {}
    }
    if let After::Failed(error) = &done.maintained {
        say(&format!("klio backup: {name} was taken, and maintenance after it failed: {error}"));
    }
    let pages = &done.record.pages;
    if pages.bad > 0 {
        say(&format!(
            "klio backup: {name} was taken, with {} pages whose checksums are wrong in PostgreSQL's files:",
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

/// Shows progress until it is dropped.
async fn show(progress: &Progress, quiet: bool) {
    if quiet {
        return std::future::pending().await;
    }
    if std::io::stderr().is_terminal() { bar(progress).await } else { lines(progress).await }
}

/// Clears the bar when it goes.
struct Cleared(ProgressBar);

impl Drop for Cleared {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

async fn bar(progress: &Progress) {
    let bar = Cleared(ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr()));
    let spin = ProgressStyle::with_template("{spinner} {msg} ({elapsed})");
    let full = ProgressStyle::with_template(
        "{msg} [{wide_bar}] {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}",
    );
    let (Ok(spin), Ok(full)) = (spin, full) else { return std::future::pending().await };
    let mut tick = tokio::time::interval(BAR);
    loop {
        tick.tick().await;
        let seen = progress.seen();
        if seen.phase == "copying" && seen.total_bytes > 0 {
            bar.0.set_style(full.clone());
            bar.0.set_length(seen.total_bytes.max(seen.bytes));
            bar.0.set_position(seen.bytes);
            bar.0.set_message(files(&seen));
        } else {
            bar.0.set_style(spin.clone());
            bar.0.set_message(seen.phase);
            bar.0.tick();
        }
    }
}

async fn lines(progress: &Progress) {
    let begun = Instant::now();
    let mut tick = tokio::time::interval(LINE);
    tick.tick().await;
    loop {
        tick.tick().await;
        say(&line(&progress.seen(), begun.elapsed().as_secs_f64()));
    }
}

/// `copying: 1.2 GiB of 3.1 GiB (38 %), 512 of 985 files, 410.2 MiB/s, about 4.5 s left, 41.0 MiB stored`
fn line(seen: &Seen, seconds: f64) -> String {
    if seen.phase != "copying" || seen.total_bytes == 0 {
        return format!("{} after {}", seen.phase, text::duration(seconds));
    }
    let rate = seen.bytes as f64 / seconds.max(0.001);
    let left = seen.total_bytes.saturating_sub(seen.bytes) as f64;
    let percent = 100.0 * seen.bytes as f64 / seen.total_bytes.max(1) as f64;
    format!(
        "copying: {} of {} ({:.0} %), {}, {}/s, about {} left",
        text::size(seen.bytes),
        text::size(seen.total_bytes),
        percent.min(100.0),
        files(seen),
        text::size(rate as u64),
        text::duration(left / rate.max(1.0)),
    )
}

/// `512 of 985 files, 41.0 MiB stored`
fn files(seen: &Seen) -> String {
    let stored = text::size(seen.stored);
    format!("{} of {} files, {stored} stored", seen.files, seen.total_files.max(seen.files))
}

/// What a person wants to know at the end.
fn summary(done: &Done) -> String {
    let record = &done.record;
    let share = 100.0 * record.added_bytes as f64 / (record.size_bytes as f64).max(1.0);
    let mut out = format!(
        "backup {} done in {}\n  size         {} in {} files, {} directories\n  new          {} ({share:.1} %), stored as {}\n  WAL          {} to {} on timeline {}, durable on the server\n",
        record.name,
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
            if outcome.ok { "good" } else { "DAMAGED" },
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
        let expected = "copying: 512.0 MiB of 1.0 GiB (50 %), 5 of 10 files, 1.0 MiB stored, 256.0 MiB/s, about 2.0 s left";
        assert_eq!(line(&seen, 2.0), expected);
        let waiting = Seen { phase: "checkpoint", ..Seen::default() };
        assert_eq!(line(&waiting, 2.0), "checkpoint after 2.0 s");
    }
}
