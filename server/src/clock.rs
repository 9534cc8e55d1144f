//! Detects that the server's own clock cannot be believed, by comparison with other clocks (P6: in doubt, keep).
//!
//! - A clock that does not advance like the time since the machine started was set by a step. Small steps come from
//!   NTP.
//! - The bucket sends its time with every answer.
//!
//! After a step the clock is in doubt until the bucket's clock agrees with it, or until somebody who has checked it
//! restarts klio-server. Only removal by age depends on this.

use klio_storage::{catalog::retention::TIMES_DIFFER_SECONDS, tier2::HeardDate};
use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Steps up to this size come from NTP after a start, or from a leap second.
const STEP_SECONDS: f64 = 3600.0;
/// The bucket's time counts for this long after it was received.
const HEARD_LATELY: Duration = Duration::from_secs(7200);

/// Compares the clock with the time since boot, from its creation on.
#[derive(Debug)]
pub struct ClockWatch(Mutex<Anchor>);

#[derive(Debug, Clone, Copy)]
struct Anchor {
    wall_unix: f64,
    since_boot: Duration,
}

/// A reading of all clocks.
#[derive(Debug, Clone, Copy)]
pub struct Reading {
    /// The server's clock, in Unix seconds.
    pub wall_unix: f64,
    /// Time since the machine started, including the time that it slept.
    pub since_boot: Duration,
    /// The bucket's time.
    pub bucket: Option<HeardDate>,
    /// The monotonic clock by which `bucket` was received.
    pub now: Instant,
}

/// Time since the machine started, including the time that it slept.
pub fn since_boot() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
}

impl ClockWatch {
    /// Starts at this moment.
    pub fn new(wall_unix: f64, since_boot: Duration) -> Self {
        Self(Mutex::new(Anchor { wall_unix, since_boot }))
    }

    /// The reasons for doubt, as texts; empty when there are none.
    pub fn doubts(&self, reading: &Reading) -> Vec<String> {
        let mut anchor = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let lately =
            |heard: &HeardDate| reading.now.saturating_duration_since(heard.heard) < HEARD_LATELY;
        let bucket = reading.bucket.filter(lately);
        let ahead = bucket.map(|heard| heard.ahead_of(reading.wall_unix, reading.now));
        if let Some(ahead) = ahead.filter(|ahead| ahead.abs() > TIMES_DIFFER_SECONDS) {
            return vec![format!(
                "the server's clock says {:.0}, and the bucket's is {:.1} days {}; nothing is removed meanwhile; hint: correct the wrong clock, then run klio retention plan",
                reading.wall_unix,
                ahead.abs() / 86_400.0,
                if ahead > 0.0 { "ahead of it" } else { "behind it" },
            )];
        }
        let passed = reading.since_boot.saturating_sub(anchor.since_boot).as_secs_f64();
        let step = reading.wall_unix - anchor.wall_unix - passed;
        if step.abs() <= STEP_SECONDS {
            return Vec::new();
        }
        if bucket.is_some() {
            // The bucket's clock agrees with the current time of the server's.
            *anchor = Anchor { wall_unix: reading.wall_unix, since_boot: reading.since_boot };
            return Vec::new();
        }
        vec![format!(
            "the server's clock was set {} by {:.1} hours while klio-server ran; nothing is removed meanwhile; hint: check that the clock is right now, then restart klio-server",
            if step > 0.0 { "forward" } else { "back" },
            step.abs() / 3600.0
        )]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: f64 = 86_400.0;

    fn reading(passed: f64, step: f64, bucket_ahead: Option<f64>) -> Reading {
        let now = Instant::now();
        Reading {
            wall_unix: 1e9 + passed + step,
            since_boot: Duration::from_secs_f64(1000.0 + passed),
            bucket: bucket_ahead
                .map(|ahead| HeardDate { date_unix: 1e9 + passed + step + ahead, heard: now }),
            now,
        }
    }

    fn watch() -> ClockWatch {
        ClockWatch::new(1e9, Duration::from_secs(1000))
    }

    #[test]
    fn a_clock_that_goes_as_time_does_is_believed() {
        let watch = watch();
        for (passed, step) in [(0.0, 0.0), (900.0 * DAY, 0.0), (5.0, 1800.0), (5.0, -1800.0)] {
            assert_eq!(watch.doubts(&reading(passed, step, None)), [""; 0], "{passed} {step}");
        }
    }

    /// Regression test: a clock that was 400 days ahead for a while caused good backups to expire.
    #[test]
    fn a_step_is_a_doubt_until_the_bucket_agrees() {
        for (step, word) in [(400.0 * DAY, "forward by 9600.0 hours"), (-2.0 * DAY, "back by 48.0")]
        {
            let watch = watch();
            for passed in [10.0, 20.0 * DAY] {
                let doubts = watch.doubts(&reading(passed, step, None));
                assert!(doubts.len() == 1 && doubts[0].contains(word), "{doubts:?}");
            }
            // The clock was corrected, so no doubt is left.
            assert_eq!(watch.doubts(&reading(30.0, 0.0, None)), [""; 0]);
            assert_eq!(watch.doubts(&reading(40.0, step, Some(3.0))), [""; 0]);
            assert_eq!(watch.doubts(&reading(50.0, step, None)), [""; 0]);
            assert_eq!(watch.doubts(&reading(60.0, 0.0, None)).len(), 1, "a step back is one, too");
        }
    }

    #[test]
    fn the_buckets_clock_is_asked_also_where_the_server_started_with_a_wrong_one() {
        let doubts = watch().doubts(&reading(10.0, 0.0, Some(-400.0 * DAY)));
        assert!(doubts[0].contains("400.0 days behind it"), "{doubts:?}");
        let mut old = reading(10.0, 0.0, Some(-400.0 * DAY));
        old.now += HEARD_LATELY;
        assert_eq!(watch().doubts(&old), [""; 0], "what was said long ago says nothing of now");
    }
}
