//! Decides when the agent is no longer needed: after an idle time, when recovery is over, or when PostgreSQL is gone.

use super::serve::Activity;
use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::{sync::watch, time::Instant};

/// Interval of the checks, and so the delay between the end of recovery and the removal of the spool.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// PostgreSQL removes both when recovery ends (<https://www.postgresql.org/docs/current/runtime-config-wal.html>,
/// "Archive Recovery").
const SIGNALS: [&str; 2] = ["recovery.signal", "standby.signal"];

pub(super) struct Life {
    recovery: Option<Recovery>,
    idle: Duration,
    activity: Activity,
}

/// The recovery that the agent serves.
struct Recovery {
    data_dir: PathBuf,
    signalled: bool,
    postmaster: Option<i32>,
}

impl Recovery {
    fn of(data_dir: PathBuf) -> Self {
        let (signalled, postmaster) = (signalled(&data_dir), postmaster(&data_dir));
        Self { data_dir, signalled, postmaster }
    }

    /// Why the recovery is over; `None` while it runs.
    fn is_over(&self) -> Option<&'static str> {
        if self.signalled && !signalled(&self.data_dir) {
            return Some("recovery has ended");
        }
        let gone = self.postmaster.is_some_and(|pid| {
            let alive = rustix::process::Pid::from_raw(pid)
                .is_some_and(|pid| rustix::process::test_kill_process(pid).is_ok());
            !alive || postmaster(&self.data_dir) != Some(pid)
        });
        gone.then_some("PostgreSQL has ended")
    }
}

/// Whether this data directory is in archive recovery, or will be when PostgreSQL starts.
pub fn signalled(data_dir: &Path) -> bool {
    SIGNALS.iter().any(|name| data_dir.join(name).exists())
}

/// The postmaster's pid, from the first line of postmaster.pid.
fn postmaster(data_dir: &Path) -> Option<i32> {
    let text = fs::read_to_string(data_dir.join("postmaster.pid")).ok()?;
    text.lines().next()?.trim().parse().ok().filter(|pid| *pid > 0)
}

impl Life {
    pub fn new(data_dir: Option<PathBuf>, idle: Duration) -> Self {
        let activity = Arc::new(watch::Sender::new(Instant::now()));
        Self { recovery: data_dir.map(Recovery::of), idle, activity }
    }

    /// Must be updated with every request.
    pub fn activity(&self) -> Activity {
        Arc::clone(&self.activity)
    }

    /// Returns when the agent is no longer needed, with the reason. Cancel-safe.
    pub async fn ended(&self) -> &'static str {
        loop {
            tokio::time::sleep(LOOK_EVERY.min(self.idle)).await;
            if self.activity.borrow().elapsed() >= self.idle {
                return "no WAL was requested";
            }
            if let Some(why) = self.recovery.as_ref().and_then(Recovery::is_over) {
                return why;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recovery_is_over_when_its_signal_or_its_postmaster_is_gone() {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path();
        fs::write(data.join("standby.signal"), "").unwrap();
        fs::write(data.join("postmaster.pid"), format!("{}\n/data\n", std::process::id())).unwrap();
        let recovery = Recovery::of(data.to_owned());
        assert_eq!(recovery.is_over(), None);
        fs::remove_file(data.join("standby.signal")).unwrap();
        assert_eq!(recovery.is_over(), Some("recovery has ended"));
        fs::write(data.join("recovery.signal"), "").unwrap();
        assert_eq!(recovery.is_over(), None);
        // PostgreSQL was restarted: the new postmaster starts an agent of its own.
        fs::write(data.join("postmaster.pid"), "1\n/data\n").unwrap();
        assert_eq!(recovery.is_over(), Some("PostgreSQL has ended"));
    }

    #[test]
    fn without_a_recovery_in_sight_only_idleness_ends_it() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(Recovery::of(directory.path().to_owned()).is_over(), None);
    }
}
