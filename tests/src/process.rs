//! A program that runs for a test, with its output in a log file.
//!
//! It is the leader of its own process group. Dropping it kills the group, every descendant, and descendants that outlived a
//! [`Running::kill9`]; if the test is panicking, the end of the log is printed.

use crate::{guard, wait};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use std::{
    fs::{self, OpenOptions},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

mod tree;
pub use tree::{Descendant, descendants};

/// How much of a log a failing test shows.
const LOG_LINES_SHOWN: usize = 80;

/// A running program.
#[derive(Debug)]
pub struct Running {
    name: String,
    child: Child,
    log: PathBuf,
    exit: Option<ExitStatus>,
    orphans: Vec<Descendant>,
}

impl Running {
    /// Starts it; standard output and error are appended to `log`.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn spawn(name: &str, mut command: Command, log: &Path) -> Self {
        let open = || {
            OpenOptions::new()
                .create(true)
                .append(true)
                .open(log)
                .unwrap_or_else(|e| panic!("open log {}: {e}", log.display()))
        };
        let child = command
            .stdin(Stdio::null())
            .stdout(open())
            .stderr(open())
            .process_group(0)
            .spawn()
            .unwrap_or_else(|e| panic!("start {name}: {e}: {command:?}"));
        guard::watch(child.id());
        let (name, log) = (name.to_owned(), log.to_owned());
        Self { name, child, log, exit: None, orphans: Vec::new() }
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn os_pid(&self) -> Option<Pid> {
        i32::try_from(self.pid()).ok().and_then(Pid::from_raw)
    }

    /// Its exit status, if it has ended.
    ///
    /// # Panics
    /// When the system does not tell.
    pub fn exit(&mut self) -> Option<ExitStatus> {
        if self.exit.is_none() {
            self.exit = self.child.try_wait().expect("ask for the state of a child");
        }
        self.exit
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        self.exit().is_none()
    }

    /// Sends it (not its children) a signal; nothing happens when it has ended.
    pub fn signal(&mut self, signal: Signal) {
        if self.is_running()
            && let Some(pid) = self.os_pid()
        {
            let _ = kill_process(pid, signal);
        }
    }

    /// SIGKILL to the program alone, as a crash would hit it; returns when it is dead. Its children are left to
    /// themselves until this value is dropped.
    pub fn kill9(&mut self) {
        self.orphans.extend(tree::descendants(self.pid()));
        self.signal(Signal::KILL);
        self.reap();
    }

    /// SIGKILL to the program and all its descendants, as a power cut: none of them notices the death of another first.
    /// (Backends of PostgreSQL that see their postmaster die still abort their transactions, and unlink files without WAL.)
    pub fn kill9_tree(&mut self) {
        self.pause();
        let descendants = tree::descendants(self.pid());
        descendants.iter().for_each(Descendant::kill9);
        self.kill9();
        // Whoever starts it again must find it gone; killed, they end within moments.
        for _ in 0..500 {
            if !descendants.iter().any(Descendant::is_running) {
                break;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        if let Some(group) = self.os_pid() {
            let _ = kill_process_group(group, Signal::KILL);
        }
        self.orphans.drain(..).for_each(|o| o.kill9());
    }

    fn reap(&mut self) {
        if self.exit.is_none() {
            self.exit = self.child.wait().ok();
        }
    }

    /// SIGTERM, then waits for the end.
    ///
    /// # Panics
    /// When it still runs after `deadline`.
    pub async fn terminate(&mut self, deadline: Duration) -> ExitStatus {
        self.signal(Signal::TERM);
        self.wait_exit(deadline).await
    }

    /// Waits for the end.
    ///
    /// # Panics
    /// When it still runs after `deadline`.
    pub async fn wait_exit(&mut self, deadline: Duration) -> ExitStatus {
        let what = format!("end of {}", self.name);
        wait::eventually_now(&what, deadline, || self.exit()).await
    }

    /// Stops it without its notice (SIGSTOP), as a machine that hangs.
    pub fn pause(&mut self) {
        self.signal(Signal::STOP);
    }

    /// Lets it go on after [`Running::pause`].
    pub fn resume(&mut self) {
        self.signal(Signal::CONT);
    }

    /// The log file.
    #[must_use]
    pub fn log_path(&self) -> &Path {
        &self.log
    }

    /// What it has written so far, including earlier runs with the same log file.
    #[must_use]
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Waits until the log holds a line with this text and returns the line.
    ///
    /// # Panics
    /// When it does not within `deadline`, or the program ends without.
    pub async fn wait_log(&mut self, text: &str, deadline: Duration) -> String {
        self.wait_log_after(0, text, deadline).await
    }

    /// The same for what is written after the first `offset` bytes (the length of an earlier [`Running::log`]).
    ///
    /// # Panics
    /// As [`Running::wait_log`].
    pub async fn wait_log_after(&mut self, offset: u64, text: &str, deadline: Duration) -> String {
        let what = format!("{text:?} in the log of {}", self.name);
        wait::eventually_now(&what, deadline, || {
            // First the state, then the log: the last words of a program that has just ended count.
            let ended = self.exit();
            let log = fs::read(&self.log).unwrap_or_default();
            let fresh = log.get(usize::try_from(offset).unwrap_or(usize::MAX)..).unwrap_or(&[]);
            let fresh = String::from_utf8_lossy(fresh);
            let line = fresh.lines().find(|l| l.contains(text)).map(str::to_owned);
            assert!(
                line.is_some() || ended.is_none(),
                "wait for {text:?}: {} ended with {ended:?}",
                self.name
            );
            line
        })
        .await
    }

    /// Highest resident memory so far, in bytes; `None` when it has ended.
    #[must_use]
    pub fn peak_memory_bytes(&self) -> Option<u64> {
        tree::peak_memory_bytes(self.pid())
    }

    /// User and system CPU time so far, in seconds; `None` when it has ended.
    #[must_use]
    pub fn cpu_seconds(&self) -> Option<f64> {
        tree::cpu_seconds(self.pid())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill9_tree();
        guard::release(self.pid());
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            let from = lines.len().saturating_sub(LOG_LINES_SHOWN);
            let tail = lines.get(from..).unwrap_or(&[]).join("\n");
            eprintln!("---- end of the log of {} ({:?})\n{tail}\n----", self.name, self.exit);
        }
    }
}
