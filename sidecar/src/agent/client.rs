//! The agent as `wal-fetch` uses it: find or start an agent, ask it for the file, and move the file to its place.
//!
//! Blocking, and without async runtime, TLS or telemetry export, because PostgreSQL starts `wal-fetch` for each
//! segment. Every problem becomes [`Outcome::Unusable`], after which the caller fetches directly (AGENT1).

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

/// How long a new agent may take before it listens.
const START_PATIENCE: Duration = Duration::from_secs(3);
const START_LOOK_EVERY: Duration = Duration::from_millis(2);
/// An agent that works sends a line every second; one that is stopped or stuck does not.
pub(crate) const SILENCE_MAX: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub(crate) struct Errand<'a> {
    pub spool: &'a Path,
    pub fingerprint: &'a str,
    pub file: WalFile,
    pub path: &'a Path,
    pub deadline: Instant,
    /// How long the agent may send nothing.
    pub silence_max: Duration,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The file was moved to the requested path.
    Placed,
    /// The file definitely does not exist (P7).
    Absent(String),
    /// The agent did not provide the file; the text says why and is empty when this is no problem.
    Unusable(String),
}

/// Asks the agent, which `start` starts if there is none.
pub(crate) fn ask(errand: &Errand<'_>, start: impl Fn() -> io::Result<Child>) -> Outcome {
    for _ in 0..2 {
        match attempt(errand, &start) {
            // The agent has other settings and is exiting; the next one will have ours.
            Ok(None) => {}
            Ok(Some(outcome)) => return outcome,
            Err(error) => return Outcome::Unusable(error.to_string()),
        }
    }
    Outcome::Unusable("an agent with other settings does not exit".into())
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
            return Err(io::Error::other("the agent did not deliver the file within --timeout"));
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
                // AGENT3: PostgreSQL was killed and perhaps started again, and the new one did not ask for this file.
                if rustix::process::getppid() != parent {
                    return Err(io::Error::other(
                        "the PostgreSQL process that asked for the file is gone",
                    ));
                }
                place(&errand.spool.join(name), bytes, errand.path)?;
                return Ok(Some(Outcome::Placed));
            }
            None => return Err(io::Error::other("the agent closed the connection")),
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
    // Make sure that no other user could have created the socket.
    spool::prepare(directory).map_err(|error| io::Error::other(error.message))?;
    let socket = spool::socket_in(directory);
    let dial = || short_path(&socket).and_then(|short| UnixStream::connect(short.path()));
    if let Ok(stream) = dial() {
        return Ok(stream);
    }
    let mut agent = start().inspect_err(|_| {
        // No agent will remove it.
        let _ = fs::remove_dir(directory);
    })?;
    let patience = deadline.min(Instant::now() + START_PATIENCE);
    loop {
        match dial() {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() >= patience => return Err(error),
            // The agent could not start or was killed, so waiting is pointless.
            Err(error) if !matches!(agent.try_wait(), Ok(None)) => return Err(error),
            Err(_) => std::thread::sleep(START_LOOK_EVERY),
        }
    }
}

/// Starts an agent that is detached from us: it reads nothing of ours and writes its output to its spool.
pub(crate) fn start(directory: &Path, arguments: &[std::ffi::OsString]) -> io::Result<Child> {
    if cfg!(test) {
        // The running program is a test, not klio.
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
