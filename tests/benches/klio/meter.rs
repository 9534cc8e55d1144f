//! CPU time and memory of processes, from /proc.
//!
//! A process that has ended but was not waited for still tells its CPU time; so what is measured is read first and reaped later.

use klio_tests::process::Running;
use std::{collections::BTreeMap, fs};

/// What /proc/PID/stat says.
#[derive(Debug, Clone, Copy)]
pub struct Reading {
    /// It has ended and waits to be reaped.
    pub ended: bool,
    /// User and system time of all its threads so far.
    pub cpu_seconds: f64,
}

/// Reads a process; `None` when there is no such process.
pub fn read(pid: u32) -> Option<Reading> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // proc(5): the name may hold blanks; after it come field 3 (state), ... 14 (utime), 15 (stime).
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    #[expect(clippy::cast_precision_loss, reason = "a run takes less than 2^52 ticks")]
    let total = (ticks(14)? + ticks(15)?) as f64;
    #[expect(clippy::cast_precision_loss, reason = "100 ticks a second")]
    let per_second = rustix::param::clock_ticks_per_second() as f64;
    Some(Reading { ended: *fields.first()? == "Z", cpu_seconds: total / per_second })
}

/// A line of /proc/PID/status in bytes: `VmRSS` (now) or `VmHWM` (the most so far).
pub fn memory(pid: u32, name: &str) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// The child of a server that is its queue.
pub fn child(of: &Running, name: &str) -> Option<u32> {
    let tasks = fs::read_dir(format!("/proc/{}/task", of.pid())).ok()?;
    tasks.flatten().find_map(|task| {
        let children = fs::read_to_string(task.path().join("children")).ok()?;
        children.split_whitespace().find_map(|pid| {
            let comm = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
            (comm.trim() == name).then(|| pid.parse().ok())?
        })
    })
}

/// CPU time by role, counted from where each process was when it was added.
#[derive(Debug, Default)]
pub struct Meter {
    watched: BTreeMap<&'static str, Watched>,
}

#[derive(Debug)]
struct Watched {
    pid: u32,
    from: f64,
    last: f64,
    peak: u64,
}

impl Meter {
    /// Watches a process that has just been started: everything it uses counts.
    pub fn watch_new(&mut self, role: &'static str, pid: u32) {
        self.watched.entry(role).or_insert(Watched { pid, from: 0.0, last: 0.0, peak: 0 });
    }

    /// Watches a process that runs already: what it uses from now on counts.
    pub fn watch(&mut self, role: &'static str, pid: u32) {
        let now = read(pid).map_or(0.0, |r| r.cpu_seconds);
        self.watched.entry(role).or_insert(Watched { pid, from: now, last: now, peak: 0 });
    }

    /// Reads all of them; a process that is gone keeps its last reading.
    pub fn sample(&mut self) {
        for watched in self.watched.values_mut() {
            if let Some(reading) = read(watched.pid) {
                watched.last = reading.cpu_seconds;
            }
            watched.peak = watched.peak.max(memory(watched.pid, "VmHWM").unwrap_or(0));
        }
    }

    /// CPU seconds by role.
    pub fn cpu(&self) -> BTreeMap<&'static str, f64> {
        self.watched.iter().map(|(role, w)| (*role, w.last - w.from)).collect()
    }

    /// Peak resident bytes by role.
    pub fn peaks(&self) -> BTreeMap<&'static str, u64> {
        self.watched.iter().map(|(role, w)| (*role, w.peak)).collect()
    }
}
