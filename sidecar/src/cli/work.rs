//! Waits for long work on the server: shows its progress and returns its outcome.
//!
//! Progress is a bar on a terminal, and a line every few seconds elsewhere, both on standard error. A signal ends the
//! command, and with it the work.

use super::{say, stream, text};
use crate::error::{Error, Failure};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use klio_proto::{Code, v1::Progress};
use klio_telemetry::visible;
use serde::de::DeserializeOwned;
use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};
use tonic::Streaming;

/// Pause between two lines if there is no terminal.
const LINE: Duration = Duration::from_secs(5);

/// What the server sends: a step of the work, or the outcome as JSON.
pub(super) enum Answer {
    Step(Progress),
    Outcome(bytes::Bytes),
}

/// Shows the steps and returns the outcome.
pub(super) async fn follow<T, A>(
    doing: &str,
    mut answers: Streaming<A>,
    quiet: bool,
    read: impl Fn(A) -> Option<Answer>,
) -> Result<T, Error>
where
    T: DeserializeOwned,
{
    let mut shown = Shown::new(quiet);
    let mut signals = stream::signals()?;
    loop {
        let answer = tokio::select! {
            answer = answers.message() => answer,
            () = stream::signalled(&mut signals) => {
                return Err(Error::new(Failure::Stopped, format!("{doing}: stopped")));
            }
        };
        let answer = answer.map_err(|status| Error::from_status(doing, &status))?;
        let Some(answer) = answer else {
            let text = format!("{doing}: the server ended the call without an outcome");
            return Err(Error::new(Failure::Code(Code::Unavailable), text));
        };
        match read(answer) {
            None => {}
            Some(Answer::Step(step)) => shown.step(&step),
            Some(Answer::Outcome(bytes)) => {
                return serde_json::from_slice(&bytes).map_err(|e| {
                    Error::new(Failure::Code(Code::Invalid), format!("{doing}: {e}"))
                });
            }
        }
    }
}

/// The progress display.
enum Shown {
    Nothing,
    Bar(ProgressBar),
    Lines { next: Instant, phase: String },
}

impl Shown {
    fn new(quiet: bool) -> Self {
        if quiet {
            return Shown::Nothing;
        }
        if std::io::stderr().is_terminal() {
            return Shown::Bar(ProgressBar::with_draw_target(
                Some(0),
                ProgressDrawTarget::stderr(),
            ));
        }
        Shown::Lines { next: Instant::now(), phase: String::new() }
    }

    fn step(&mut self, step: &Progress) {
        match self {
            Shown::Nothing => {}
            Shown::Bar(bar) => {
                let template = match step.total_bytes {
                    0 => "{spinner} {msg} ({elapsed})",
                    _ => "{msg} [{wide_bar}] {bytes}/{total_bytes} {eta}",
                };
                if let Ok(style) = ProgressStyle::with_template(template) {
                    bar.set_style(style);
                }
                bar.set_length(step.total_bytes);
                bar.set_position(step.done_bytes);
                bar.set_message(visible::line(&step.phase).into_owned());
                bar.tick();
            }
            Shown::Lines { next, phase } => {
                let now = Instant::now();
                if *phase != step.phase || now >= *next {
                    say(&line(step));
                    phase.clone_from(&step.phase);
                    *next = now + LINE;
                }
            }
        }
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        if let Shown::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}

fn line(step: &Progress) -> String {
    match step.total_files {
        0 => visible::line(&step.phase).into_owned(),
        files => format!(
            "{}: {} of {}, {} of {files} files",
            visible::line(&step.phase),
            text::size(step.done_bytes),
            text::size(step.total_bytes),
            step.done_files,
        ),
    }
}
