//! What /proc tells about processes: descendants, memory, CPU time.
//!
//! A process is known by its id and its start time together, so that a reused id is never killed.

use rustix::process::{Pid, Signal, kill_process};
use std::fs;

/// A process that descends from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descendant {
    pid: u32,
    start: u64,
}

impl Descendant {
    /// SIGKILL, if it is still the same process.
    pub fn kill9(&self) {
        let same = stat(self.pid).is_some_and(|s| s.start == self.start);
        if let (true, Some(pid)) = (same, i32::try_from(self.pid).ok().and_then(Pid::from_raw)) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether it still runs (a zombie does not).
    #[must_use]
    pub fn is_running(&self) -> bool {
        stat(self.pid).is_some_and(|s| s.start == self.start && s.state != "Z")
    }
}

struct Stat {
    state: String,
    parent: u32,
    ticks: u64,
    start: u64,
}

/// proc(5): the name may hold blanks, so fields are counted after the last parenthesis; `state` is field 3 there.
fn stat(pid: u32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    Some(Stat {
        state: (*fields.first()?).to_owned(),
        parent: u32::try_from(number(4)?).ok()?,
        ticks: number(14)? + number(15)?,
        start: number(22)?,
    })
}

/// All descendants of a process, parents before children.
#[must_use]
pub fn descendants(root: u32) -> Vec<Descendant> {
    let all: Vec<(u32, Stat)> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter_map(|pid| Some((pid, stat(pid)?)))
        .collect();
    let mut found: Vec<Descendant> = Vec::new();
    let mut parents = vec![root];
    while let Some(parent) = parents.pop() {
        for (pid, stat) in all.iter().filter(|(_, s)| s.parent == parent) {
            found.push(Descendant { pid: *pid, start: stat.start });
            parents.push(*pid);
        }
    }
    found
}

/// `VmHWM` of /proc/PID/status.
pub(super) fn peak_memory_bytes(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

pub(super) fn cpu_seconds(pid: u32) -> Option<f64> {
    let ticks = stat(pid)?.ticks;
    #[expect(clippy::cast_precision_loss, reason = "a test runs for less than 2^52 ticks")]
    Some(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}
