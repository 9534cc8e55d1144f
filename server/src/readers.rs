//! Who is reading WAL for a restore or a recovery: retention does not expire WAL that they may still need (P6).
//!
//! | reader | WAL that stays | for how long |
//! |---|---|---|
//! | a restore that registered | all WAL; once its backup is known, WAL from that backup's start on | while it runs,
//! at most [`HOLD_MAX`]; if the backup is known [`LATELY`] longer, because PostgreSQL is started afterwards, by hand |
//! | a client that fetches WAL | from the oldest segment that was fetched within [`LATELY`] on | until [`HOLD_MAX`]
//! after that oldest segment last changed: a client that fetches the same segment for ever is not a recovery |
//!
//! A position counts on every timeline, because LSNs never decrease along a path of timelines. The data is in memory
//! and small: after a restart the server learns of a recovery with its next fetch. It does not affect eviction from
//! tier 1, because WAL in tier 2 is read from there.

use klio_pg::Lsn;
use klio_storage::layout::ClusterName;
use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// How long a fetch counts. A recovery fetches the next segments within minutes, and after a crash it goes back to its
/// last restart point, which is checkpoint_timeout away, usually 5 minutes.
const LATELY: Duration = Duration::from_secs(3600);
/// The most time for which WAL is held. Tens of terabytes can be restored within it, and an abandoned restore does not
/// hold WAL any longer.
const HOLD_MAX: Duration = Duration::from_secs(3 * 86_400);
/// Fetches within this time are recorded as one, so that memory is limited to [`LATELY`] divided by it.
const STEP: Duration = Duration::from_secs(300);

/// A monotonic clock, injected so that tests have their own.
pub type Ticks = Arc<dyn Fn() -> Instant + Send + Sync>;

/// WAL that is still needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hold {
    /// The first position that is needed, on every timeline.
    pub from: Lsn,
    /// Who needs it, as text.
    pub why: String,
}

/// All readers. Cheap to clone.
#[derive(Clone)]
pub struct Readers {
    clusters: Arc<Mutex<BTreeMap<ClusterName, Reading>>>,
    ticks: Ticks,
}

impl std::fmt::Debug for Readers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Readers")
    }
}

impl Default for Readers {
    fn default() -> Self {
        Self::new(Arc::new(Instant::now))
    }
}

/// A restore that is running; dropping it ends it.
#[derive(Debug)]
pub struct Restoring {
    readers: Readers,
    cluster: ClusterName,
    id: u64,
}

impl Restoring {
    /// Sets the start of its backup: nothing below is needed.
    pub fn needs_from(&self, start: Lsn) {
        self.readers.with(&self.cluster, |reading, _| {
            if let Some(restore) = reading.restores.get_mut(&self.id) {
                restore.from = Some(start);
            }
        });
    }
}

impl Drop for Restoring {
    fn drop(&mut self) {
        self.readers.with(&self.cluster, |reading, now| reading.ended(self.id, now));
    }
}

impl Readers {
    pub fn new(ticks: Ticks) -> Self {
        Self { clusters: Arc::default(), ticks }
    }

    /// Registers a restore whose backup is not known yet.
    pub fn restore(&self, cluster: &ClusterName) -> Restoring {
        let id = self.with(cluster, |reading, now| {
            reading.began += 1;
            let restore = Restore { from: None, began: now, ended: None };
            reading.restores.insert(reading.began, restore);
            reading.began
        });
        Restoring { readers: self.clone(), cluster: cluster.clone(), id }
    }

    /// Records that the segment which starts here was sent to somebody.
    pub fn fetched(&self, cluster: &ClusterName, start: Lsn) {
        self.with(cluster, |reading, now| reading.fetches.add(start, now));
    }

    /// The WAL that must not expire now.
    pub fn hold(&self, cluster: &ClusterName) -> Option<Hold> {
        self.with(cluster, Reading::hold)
    }

    fn with<T>(&self, cluster: &ClusterName, act: impl FnOnce(&mut Reading, Instant) -> T) -> T {
        let now = (self.ticks)();
        // Nothing panics while it holds the lock; if something did, the plain values inside would stay usable.
        let mut clusters: MutexGuard<'_, _> =
            self.clusters.lock().unwrap_or_else(PoisonError::into_inner);
        let reading = clusters.entry(cluster.clone()).or_default();
        reading.forget(now);
        let result = act(reading, now);
        if reading.restores.is_empty() && reading.fetches.steps.is_empty() {
            clusters.remove(cluster);
        }
        result
    }
}

struct Restore {
    /// The start of its backup; `None` while that is unknown.
    from: Option<Lsn>,
    began: Instant,
    ended: Option<Instant>,
}

/// The readers of one cluster.
#[derive(Default)]
struct Reading {
    restores: BTreeMap<u64, Restore>,
    began: u64,
    fetches: Fetches,
}

impl Reading {
    fn forget(&mut self, now: Instant) {
        let since = |then| now.saturating_duration_since(then);
        self.restores.retain(|_, restore| restore.ended.is_none_or(|ended| since(ended) < LATELY));
        self.fetches.settle(now);
    }

    fn ended(&mut self, id: u64, now: Instant) {
        match self.restores.get_mut(&id) {
            Some(restore) if restore.from.is_some() => restore.ended = Some(now),
            // Without a known backup, a restore that has ended would hold all WAL, and hourly drills would do so for
            // ever.
            _ => drop(self.restores.remove(&id)),
        }
    }

    fn hold(&mut self, now: Instant) -> Option<Hold> {
        let counts = |r: &&Restore| now.saturating_duration_since(r.began) < HOLD_MAX;
        let restores = self.restores.values().filter(counts);
        let restore = restores.map(|restore| restore.from.unwrap_or(Lsn::ZERO)).min();
        let fetch = self.fetches.oldest(now);
        let from = restore.into_iter().chain(fetch).min()?;
        let restore = restore.map(|from| match from {
            Lsn::ZERO => "a restore is running".to_owned(),
            from => {
                format!("a restore is running, or has just ended, and needs WAL from {from} on")
            }
        });
        let minutes = LATELY.as_secs() / 60;
        let fetch =
            fetch.map(|from| format!("WAL from {from} on was fetched within {minutes} minutes"));
        let why = restore.into_iter().chain(fetch).collect::<Vec<_>>().join("; ");
        Some(Hold { from, why })
    }
}

/// For each step with a fetch, the oldest segment fetched in it.
#[derive(Default)]
struct Fetches {
    steps: VecDeque<(Instant, Lsn)>,
    /// The oldest segment of all steps, and when it became the oldest.
    oldest: Option<(Lsn, Instant)>,
}

impl Fetches {
    fn add(&mut self, start: Lsn, now: Instant) {
        match self.steps.back_mut() {
            Some((began, oldest)) if now.saturating_duration_since(*began) < STEP => {
                *oldest = start.min(*oldest);
            }
            _ => self.steps.push_back((now, start)),
        }
        self.settle(now);
    }

    fn settle(&mut self, now: Instant) {
        // The last fetch of a step may be as recent as the step's end.
        self.steps.retain(|(began, _)| now.saturating_duration_since(*began) < LATELY + STEP);
        let oldest = self.steps.iter().map(|(_, start)| *start).min();
        self.oldest = match (oldest, self.oldest) {
            (Some(oldest), Some(before)) if before.0 == oldest => Some(before),
            (oldest, _) => oldest.map(|oldest| (oldest, now)),
        };
    }

    fn oldest(&self, now: Instant) -> Option<Lsn> {
        let (start, since) = self.oldest?;
        (now.saturating_duration_since(since) < HOLD_MAX).then_some(start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    const SEGMENT: u64 = 1 << 24;

    fn lsn(segments: u64) -> Lsn {
        Lsn::new(segments * SEGMENT)
    }

    fn cluster() -> ClusterName {
        "pg".parse().unwrap()
    }

    /// Readers, and a function that advances their clock.
    fn readers() -> (Readers, impl Fn(Duration)) {
        let (start, passed) = (Instant::now(), Arc::new(AtomicU64::new(0)));
        let read = passed.clone();
        let ticks = move || start + Duration::from_secs(read.load(Ordering::Relaxed));
        let wait = move |more: Duration| {
            passed.fetch_add(more.as_secs(), Ordering::Relaxed);
        };
        (Readers::new(Arc::new(ticks)), wait)
    }

    fn from(readers: &Readers) -> Option<Lsn> {
        readers.hold(&cluster()).map(|hold| hold.from)
    }

    #[test]
    fn a_restore_keeps_all_until_its_backup_is_known_and_that_for_an_hour_after_its_end() {
        let (readers, wait) = readers();
        let restore = readers.restore(&cluster());
        assert_eq!(from(&readers), Some(Lsn::ZERO));
        assert_eq!(readers.hold(&"other".parse().unwrap()), None);
        restore.needs_from(lsn(5));
        let later = readers.restore(&cluster());
        later.needs_from(lsn(9));
        assert_eq!(from(&readers), Some(lsn(5)));
        drop(restore);
        wait(LATELY / 2);
        let hold = readers.hold(&cluster()).unwrap();
        assert!(hold.from == lsn(5) && hold.why.contains("a restore"), "{hold:?}");
        wait(LATELY / 2);
        assert_eq!(from(&readers), Some(lsn(9)));
        drop(later);
        wait(LATELY);
        assert_eq!(from(&readers), None);
        assert!(readers.clusters.lock().unwrap().is_empty(), "nothing is left behind");
    }

    #[test]
    fn a_restore_of_an_unknown_backup_keeps_nothing_once_it_has_ended() {
        let (readers, _) = readers();
        drop(readers.restore(&cluster()));
        assert_eq!(from(&readers), None);
    }

    #[test]
    fn a_restore_that_hangs_does_not_keep_wal_for_ever() {
        let (readers, wait) = readers();
        let forgotten = readers.restore(&cluster());
        wait(HOLD_MAX - STEP);
        assert_eq!(from(&readers), Some(Lsn::ZERO));
        wait(STEP);
        assert_eq!(from(&readers), None);
        let second = readers.restore(&cluster());
        second.needs_from(lsn(7));
        assert_eq!(from(&readers), Some(lsn(7)));
        drop((forgotten, second));
    }

    #[test]
    fn a_recovery_keeps_what_it_fetched_within_the_hour_and_what_is_behind_it() {
        let (readers, wait) = readers();
        for segment in 3..2000 {
            readers.fetched(&cluster(), lsn(segment));
            wait(Duration::from_secs(60));
            let kept = readers.hold(&cluster()).unwrap();
            // An hour is sixty segments here, and the step in which they are counted adds a few.
            let most = segment.saturating_sub(66).max(3);
            let least = segment.saturating_sub(59).max(3);
            assert!((lsn(most)..=lsn(least)).contains(&kept.from), "at {segment}: {kept:?}");
            assert!(kept.why.contains("fetched"), "{kept:?}");
        }
        let steps = readers.clusters.lock().unwrap()[&cluster()].fetches.steps.len();
        assert!(steps <= 14, "{steps}");
        // Segments are read ahead in any order, and after a crash from further back.
        for segment in [2010, 2008, 1990] {
            readers.fetched(&cluster(), lsn(segment));
        }
        wait(LATELY);
        assert_eq!(from(&readers), Some(lsn(1990)));
        wait(STEP);
        assert_eq!(from(&readers), None);
    }

    #[test]
    fn who_fetches_the_same_for_ever_keeps_it_for_days_and_not_longer() {
        let (readers, wait) = readers();
        let mut passed = Duration::ZERO;
        while passed < HOLD_MAX + LATELY {
            readers.fetched(&cluster(), lsn(4));
            readers.fetched(&cluster(), lsn(5));
            assert_eq!(from(&readers).is_some(), passed < HOLD_MAX, "{passed:?}");
            wait(STEP);
            passed += STEP;
        }
        // The recovery continues, so it counts again.
        wait(LATELY + STEP);
        readers.fetched(&cluster(), lsn(5));
        assert_eq!(from(&readers), Some(lsn(5)));
    }
}
