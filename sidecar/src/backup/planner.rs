//! Computes when a scheduled backup is due. Pure: the time is an argument.
//!
//! The next run is computed from the beginning of the newest backup. Runs that were missed are made up for by a single
//! backup, a cluster without any backup gets one at once, and a failure is retried with growing pauses.

use crate::{backoff::Backoff, schedule::Schedule};
use jiff::Timestamp;
use rand::Rng;
use std::time::Duration;

/// Decides when the task in `klio stream` takes the next backup.
#[derive(Debug)]
pub struct Planner {
    schedule: Schedule,
    jitter: Duration,
    backoff: Backoff,
    /// When the newest backup began.
    newest: Option<Timestamp>,
    /// When to try again after a failure.
    retry: Option<Timestamp>,
    /// The random delay of the next run; drawn once for each run, so that it does not change with each look.
    delay: Duration,
}

impl Planner {
    /// `newest` is when the newest backup began, if there is any.
    pub fn new(
        schedule: Schedule,
        jitter: Duration,
        backoff: Backoff,
        newest: Option<Timestamp>,
        rng: &mut impl Rng,
    ) -> Self {
        let delay = draw(jitter, rng);
        Self { schedule, jitter, backoff, newest, retry: None, delay }
    }

    /// When the next backup is due, which may be in the past; `None` if never.
    pub fn due(&self, now: Timestamp) -> Option<Timestamp> {
        if let Some(retry) = self.retry {
            return Some(retry);
        }
        let Some(newest) = self.newest else { return Some(now) };
        // A beginning in the future comes from another machine's clock; do not wait for it.
        self.schedule.next(newest.min(now))?.checked_add(self.delay).ok()
    }

    /// How long to sleep; at most `most`, because clocks are set and machines sleep.
    pub fn pause(&self, now: Timestamp, most: Duration) -> Duration {
        let due = self.due(now).map(|due| Duration::try_from(due.duration_since(now)));
        match due {
            None => most,
            Some(pause) => pause.unwrap_or(Duration::ZERO).min(most),
        }
    }

    /// Records that a backup that began at `begun` was taken.
    pub fn succeeded(&mut self, begun: Timestamp, rng: &mut impl Rng) {
        self.moved(Some(begun), rng);
    }

    /// Records the newest backup, whoever took it. One that is older than the newest known changes nothing.
    pub fn saw(&mut self, begun: Option<Timestamp>, rng: &mut impl Rng) {
        if let Some(begun) = begun.filter(|begun| Some(*begun) > self.newest) {
            self.succeeded(begun, rng);
        }
    }

    /// Records that PostgreSQL continues another history: only that history's backups count, and without any it gets
    /// one at once.
    pub fn moved(&mut self, begun: Option<Timestamp>, rng: &mut impl Rng) {
        self.newest = begun;
        self.retry = None;
        self.backoff.reset();
        self.delay = draw(self.jitter, rng);
    }

    /// Records a failure; returns the pause until the next attempt.
    pub fn failed(&mut self, now: Timestamp, rng: &mut impl Rng) -> Duration {
        let pause = self.backoff.pause(rng);
        self.retry = now.checked_add(pause).ok();
        pause
    }
}

fn draw(jitter: Duration, rng: &mut impl Rng) -> Duration {
    jitter.mul_f64(rng.random_range(0.0..=1.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{SeedableRng, rngs::StdRng};

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn planner(newest: Option<&str>) -> Planner {
        let backoff = Backoff::new(Duration::from_secs(60), Duration::from_secs(3600));
        let schedule = Schedule::parse("0 2 * * * Europe/Berlin").unwrap();
        let rng = &mut StdRng::seed_from_u64(1);
        Planner::new(schedule, Duration::ZERO, backoff, newest.map(at), rng)
    }

    /// The primary was restored: the earlier backups belong to another history.
    #[test]
    fn a_new_history_gets_a_backup_at_once() {
        let mut rng = StdRng::seed_from_u64(1);
        let (mut planner, now) =
            (planner(Some("2026-11-20T01:00:00Z")), at("2026-11-20T12:00:00Z"));
        assert!(planner.due(now).is_some_and(|due| due > now));
        planner.moved(None, &mut rng);
        assert_eq!(planner.due(now), Some(now));
        planner.succeeded(now, &mut rng);
        assert!(planner.due(now).is_some_and(|due| due > now));
        planner.moved(Some(at("2026-11-18T01:00:00Z")), &mut rng);
        assert!(planner.due(now).is_some_and(|due| due < now), "an older one is overdue");
    }

    #[test]
    fn runs_that_were_missed_are_made_up_for_once() {
        let mut planner = planner(Some("2026-11-10T01:00:05Z"));
        let now = at("2026-11-20T12:00:00Z");
        assert!(planner.due(now).unwrap() < now);
        assert_eq!(planner.pause(now, Duration::from_secs(30)), Duration::ZERO);
        planner.succeeded(now, &mut StdRng::seed_from_u64(1));
        assert_eq!(planner.due(now), Some(at("2026-11-21T01:00:00Z")));
        assert_eq!(planner.pause(now, Duration::from_secs(30)), Duration::from_secs(30));
    }

    #[test]
    fn a_cluster_without_a_backup_gets_one_at_once() {
        let now = at("2026-11-20T12:00:00Z");
        assert_eq!(planner(None).due(now), Some(now));
    }

    #[test]
    fn a_newest_backup_of_the_future_holds_nothing_up() {
        let now = at("2026-11-20T12:00:00Z");
        assert_eq!(
            planner(Some("2036-01-01T00:00:00Z")).due(now),
            Some(at("2026-11-21T01:00:00Z"))
        );
    }

    #[test]
    fn a_failure_is_tried_again_with_growing_pauses_and_success_ends_that() {
        let (mut planner, mut rng) = (planner(None), StdRng::seed_from_u64(7));
        let now = at("2026-11-20T12:00:00Z");
        let pauses: Vec<Duration> = (0..9).map(|_| planner.failed(now, &mut rng)).collect();
        assert!(pauses[0] <= Duration::from_secs(60), "{pauses:?}");
        assert!(pauses[8] >= Duration::from_secs(1800), "{pauses:?}");
        assert_eq!(planner.due(now), now.checked_add(pauses[8]).ok());
        planner.succeeded(now, &mut rng);
        assert_eq!(planner.due(now), Some(at("2026-11-21T01:00:00Z")));
        assert!(planner.failed(now, &mut rng) <= Duration::from_secs(60));
    }

    #[test]
    fn a_backup_that_somebody_else_took_counts() {
        let (mut planner, mut rng) =
            (planner(Some("2026-11-19T01:00:05Z")), StdRng::seed_from_u64(7));
        let now = at("2026-11-20T12:00:00Z");
        planner.failed(now, &mut rng);
        planner.saw(Some(at("2026-11-01T00:00:00Z")), &mut rng);
        planner.saw(None, &mut rng);
        assert!(planner.due(now).unwrap() < at("2026-11-20T13:00:00Z"));
        planner.saw(Some(at("2026-11-20T11:00:00Z")), &mut rng);
        assert_eq!(planner.due(now), Some(at("2026-11-21T01:00:00Z")));
    }

    #[test]
    fn jitter_is_drawn_once_for_a_run_and_stays_within_its_bound() {
        let backoff = Backoff::new(Duration::from_secs(60), Duration::from_secs(3600));
        let schedule = Schedule::parse("0 2 * * *").unwrap();
        let jitter = Duration::from_secs(600);
        let rng = &mut StdRng::seed_from_u64(3);
        let newest = Some(at("2026-11-20T12:00:00Z"));
        let planner = Planner::new(schedule, jitter, backoff, newest, rng);
        let due = planner.due(at("2026-11-20T13:00:00Z")).unwrap();
        assert_eq!(planner.due(at("2026-11-20T14:00:00Z")), Some(due));
        assert!(due > at("2026-11-21T02:00:00Z") && due <= at("2026-11-21T02:10:00Z"), "{due}");
    }
}
