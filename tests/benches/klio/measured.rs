//! A command that is run to its end, with wall time, CPU time and peak memory.
//!
//! CPU time is that of the process and of the children it has waited for (pgBackRest copies in children). Peak memory is that of
//! the process, or of its largest child if that had more.

use crate::meter;
use klio_tests::process::{Running, descendants};
use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

/// Between two looks.
const SAMPLE: Duration = Duration::from_millis(10);
/// Nothing measured here takes this long.
const DEADLINE: Duration = Duration::from_secs(900);

/// What a run took.
#[derive(Debug, Clone, Copy, Default)]
pub struct Measured {
    /// From start to end.
    pub seconds: f64,
    /// User and system time.
    pub cpu_seconds: f64,
    /// Most resident bytes of any one of its processes.
    pub peak_bytes: u64,
}

/// Runs it; it must succeed.
pub async fn run(name: &str, command: Command, log: &Path) -> Measured {
    let begun = Instant::now();
    let mut running = Running::spawn(name, command, log);
    let mut peaks: BTreeMap<u32, u64> = BTreeMap::new();
    let mut look = |pid: u32| {
        let peak = meter::memory(pid, "VmHWM").unwrap_or(0);
        let known = peaks.entry(pid).or_default();
        *known = peak.max(*known);
    };
    loop {
        look(running.pid());
        descendants(running.pid()).iter().for_each(|child| look(child.pid()));
        // An ended process that was not waited for still tells its CPU time.
        if meter::read(running.pid()).is_none_or(|reading| reading.ended) {
            break;
        }
        assert!(begun.elapsed() < DEADLINE, "{name} does not end:\n{}", running.log());
        tokio::time::sleep(SAMPLE).await;
    }
    let seconds = begun.elapsed().as_secs_f64();
    let cpu_seconds = cpu(running.pid());
    let status = running.wait_exit(DEADLINE).await;
    assert!(status.success(), "{name}: {status}:\n{}", running.log());
    let peak_bytes = peaks.values().copied().max().unwrap_or_default();
    Measured { seconds, cpu_seconds, peak_bytes }
}

/// proc(5): fields 14 to 17 of /proc/PID/stat are own and waited-for children's user and system time.
fn cpu(pid: u32) -> f64 {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields: Vec<&str> = text
        .rsplit_once(')')
        .map(|(_, rest)| rest.split_whitespace().collect())
        .unwrap_or_default();
    let ticks: u64 = (14..18).filter_map(|n| fields.get(n - 3)?.parse::<u64>().ok()).sum();
    #[expect(clippy::cast_precision_loss, reason = "a run takes less than 2^52 ticks")]
    let seconds = ticks as f64 / rustix::param::clock_ticks_per_second() as f64;
    seconds
}

/// Bytes of all files below a directory.
pub fn stored_bytes(directory: &Path) -> u64 {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(meta) if meta.is_dir() => stored_bytes(&entry.path()),
            Ok(meta) => meta.len(),
            Err(_) => 0,
        })
        .sum()
}
