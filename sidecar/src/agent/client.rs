//! What `wal-fetch` does with an agent: find or start it, ask, and put the file in its place.
//!
//! Blocking, and without runtime, TLS or telemetry: PostgreSQL starts this once a segment. Every doubt is
//! [`Outcome::Unusable`], after which the caller fetches directly (AGENT1).

use super::{
    spool,
    wire::{LINE_BYTES_MAX, Line, Question, short_path},
};
use klio_storage::layout::WalFile;
use std::{
    fs,
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// How long a new agent may take until it listens.
const START_PATIENCE: Duration = Duration::from_secs(3);
const START_LOOK_EVERY: Duration = Duration::from_millis(2);
/// An agent says every second that it is at work; one that is stopped or stuck does not.
pub(crate) const SILENCE_MAX: Duration = Duration::from_secs(5);

/// What is wanted.
#[derive(Debug)]
pub(crate) struct Errand<'a> {
    pub spool: &'a Path,
    pub fingerprint: &'a str,
    pub file: WalFile,
    pub path: &'a Path,
    pub deadline: Instant,
    /// How long an agent may say nothing.
    pub silence_max: Duration,
}

/// How it went.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// PATH is there.
    Placed,
    /// Definitively not there (P7).
    Absent(String),
    /// The agent is of no use for this one, and why; empty when that is as it should be.
    Unusable(String),
}

/// Asks the agent, and starts one with `start` when none is there.
pub(crate) fn ask(errand: &Errand<'_>, start: impl Fn() -> io::Result<Child>) -> Outcome {
    for _ in 0..2 {
        match attempt(errand, &start) {
            // It leaves: the next one has our settings.
            Ok(None) => {}
            Ok(Some(outcome)) => return outcome,
            Err(error) => return Outcome::Unusable(error.to_string()),
        }
    }
    Outcome::Unusable("an agent with other settings does not leave".into())
}

fn attempt(
    errand: &Errand<'_>,
    start: &impl Fn() -> io::Result<Child>,
) -> io::Result<Option<Outcome>> {
    let parent = rustix::process::getppid();
    let mut stream = connect(errand.spool, errand.deadline, start)?;
    stream.set_write_timeout(Some(errand.silence_max))?;
    let fingerprint = errand.fingerprint.to_owned();
    let mut traceparent = String::new();
    klio_telemetry::propagate::inject(&mut |key, value| {
        if key == "traceparent" {
            traceparent = value;
        }
    });
    let question = Question { fingerprint, file: errand.file, traceparent };
    stream.write_all(question.line().as_bytes())?;
    let mut lines = BufReader::new(&stream);
    loop {
        let left = errand.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::other("not done within --timeout"));
        }
        stream.set_read_timeout(Some(left.min(errand.silence_max)))?;
        let mut line = String::new();
        (&mut lines).take(LINE_BYTES_MAX as u64).read_line(&mut line)?;
        match Line::parse(&line) {
            Some(Line::Wait) => {}
            Some(Line::Other) => return Ok(None),
            Some(Line::Absent(text)) => return Ok(Some(Outcome::Absent(text))),
            Some(Line::Failed(text)) => return Ok(Some(Outcome::Unusable(text))),
            Some(Line::File { name, bytes }) => {
                // PostgreSQL was killed and perhaps started again: it did not ask for this one (AGENT3).
                if rustix::process::getppid() != parent {
                    return Err(io::Error::other("who asked for it is gone"));
                }
                place(&errand.spool.join(name), bytes, errand.path)?;
                return Ok(Some(Outcome::Placed));
            }
            None => return Err(io::Error::other("it hung up")),
        }
    }
}

fn place(from: &Path, bytes: u64, to: &Path) -> io::Result<()> {
    let found = fs::symlink_metadata(from)?.len();
    if found != bytes {
        let message = format!("expected {bytes} bytes in {}, found {found}", from.display());
        return Err(io::Error::other(message));
    }
    fs::rename(from, to)
}

fn connect(
    directory: &Path,
    deadline: Instant,
    start: &impl Fn() -> io::Result<Child>,
) -> io::Result<UnixStream> {
    // Nobody may have put a socket there for us.
    spool::prepare(directory).map_err(|error| io::Error::other(error.message))?;
    let socket = spool::socket_in(directory);
    let dial = || short_path(&socket).and_then(|short| UnixStream::connect(short.path()));
    if let Ok(stream) = dial() {
        return Ok(stream);
    }
    let mut agent = start().inspect_err(|_| {
        // Nobody is going to remove it.
        let _ = fs::remove_dir(directory);
    })?;
    let patience = deadline.min(Instant::now() + START_PATIENCE);
    loop {
        match dial() {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() >= patience => return Err(error),
            // It could not begin, or was killed: waiting brings nothing.
            Err(error) if !matches!(agent.try_wait(), Ok(None)) => return Err(error),
            Err(_) => std::thread::sleep(START_LOOK_EVERY),
        }
    }
}

/// Starts an agent, away from us: it reads nothing of ours and writes into its spool only.
pub(crate) fn start(directory: &Path, arguments: &[std::ffi::OsString]) -> io::Result<Child> {
    if cfg!(test) {
        // The program that runs is not klio.
        return Err(io::Error::other("no agents in unit tests"));
    }
    let log = spool::new_log(directory)?;
    Command::new(std::env::current_exe()?)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
}
