//! Shows how far long work in this program is: as a bar on a terminal, as a line every few seconds elsewhere, both on
//! standard error. A signal ends the work early.
//!
//! This only observes: no decision depends on what is shown.

use super::{say, stream, text};
use crate::error::{Error, Failure};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};
use tokio_util::sync::CancellationToken;

/// Pause between two updates, on a terminal (`BAR`) and elsewhere (`LINE`).
const BAR: Duration = Duration::from_millis(200);
const LINE: Duration = Duration::from_secs(5);

/// The state of the work at one moment.
pub(super) struct View {
    /// What is being done, as text for the user.
    pub phase: &'static str,
    /// For a phase that moves files, once their size is known.
    pub moved: Option<Moved>,
}

/// How much has been moved.
pub(super) struct Moved {
    pub bytes: u64,
    pub total_bytes: u64,
    /// For example `512 of 985 files`, and other counts.
    pub files: String,
}

/// Runs work with a display beside it. A signal prints `stopping` and cancels `stop`.
pub(super) async fn watched<T>(
    stop: &CancellationToken,
    stopping: &str,
    shown: impl Future<Output = ()>,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let mut signals = stream::signals()?;
    tokio::pin!(shown, work);
    loop {
        tokio::select! {
            biased;
            result = &mut work => return result,
            () = stream::signalled(&mut signals), if !stop.is_cancelled() => {
                say(stopping);
                stop.cancel();
            }
            () = &mut shown => {}
        }
    }
}

/// Replaces the error of work that was stopped: whatever failed after the stop, failed because of it.
pub(super) fn or_stopped(stop: &CancellationToken, error: Error, hint: &str) -> Error {
    if stop.is_cancelled() {
        Error::new(Failure::Stopped, "stopped before it was done").hint(hint)
    } else {
        error
    }
}

/// Shows the progress until the future is dropped; it never ends by itself.
pub(super) async fn show(quiet: bool, look: impl Fn() -> View) {
    if quiet {
        return std::future::pending().await;
    }
    if std::io::stderr().is_terminal() { bar(look).await } else { lines(look).await }
}

/// Clears the bar when it is dropped.
struct Cleared(ProgressBar);

impl Drop for Cleared {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

async fn bar(look: impl Fn() -> View) {
    let bar = Cleared(ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr()));
    let spin = ProgressStyle::with_template("{spinner} {msg} ({elapsed})");
    let full = ProgressStyle::with_template(
        "{msg} [{wide_bar}] {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}",
    );
    let (Ok(spin), Ok(full)) = (spin, full) else { return std::future::pending().await };
    let mut tick = tokio::time::interval(BAR);
    loop {
        tick.tick().await;
        let View { phase, moved } = look();
        match moved {
            Some(moved) => {
                bar.0.set_style(full.clone());
                bar.0.set_length(moved.total_bytes.max(moved.bytes));
                bar.0.set_position(moved.bytes);
                bar.0.set_message(moved.files);
            }
            None => {
                bar.0.set_style(spin.clone());
                bar.0.set_message(phase);
                bar.0.tick();
            }
        }
    }
}

async fn lines(look: impl Fn() -> View) {
    let begun = Instant::now();
    let mut tick = tokio::time::interval(LINE);
    tick.tick().await;
    loop {
        tick.tick().await;
        say(&line(&look(), begun.elapsed().as_secs_f64()));
    }
}

/// For example `copying: 1.2 GiB of 3.1 GiB (38 %), 512 of 985 files, 410.2 MiB/s, about 4.5 s left`.
pub(super) fn line(view: &View, seconds: f64) -> String {
    let Some(moved) = &view.moved else {
        return format!("{} after {}", view.phase, text::duration(seconds));
    };
    let rate = moved.bytes as f64 / seconds.max(0.001);
    let left = moved.total_bytes.saturating_sub(moved.bytes) as f64;
    let percent = 100.0 * moved.bytes as f64 / moved.total_bytes.max(1) as f64;
    format!(
        "{}: {} of {} ({:.0} %), {}, {}/s, about {} left",
        view.phase,
        text::size(moved.bytes),
        text::size(moved.total_bytes),
        percent.min(100.0),
        moved.files,
        text::size(rate as u64),
        text::duration(left / rate.max(1.0)),
    )
}
