//! Estimates how fast the path to the store is, from observed requests.
//!
//! Bytes that a socket or a proxy has taken have not reached the store yet. After the last byte of a body was taken,
//! its answer may need as long as those buffers take to empty. Pure: the caller measures.

use std::time::Duration;

/// The initial estimate of the link's speed, in bytes per second. It is an assumption, not a limit: the first request body
/// corrects it, even if that body fails to arrive.
const ASSUMED: f64 = (64 << 10) as f64;
/// The lowest estimate. Without it, a store that never answers would be waited for longer and longer.
const SLOWEST: f64 = (4 << 10) as f64;
/// The most that buffers can hide: Linux lets a socket buffer grow to 4 MiB (tcp_wmem).
const UNSEEN_MAX: u64 = 4 << 20;
/// The longest wait that is based on the estimate alone.
const ASSUMED_MAX: Duration = Duration::from_secs(600);
/// For a smaller body, the time shows the distance of the store, not the speed of the link.
const TELLING_BYTES: u64 = 64 << 10;

/// Bytes per second of one request, with the other requests that run at the same time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace(f64);

impl Default for Pace {
    fn default() -> Self {
        Self(ASSUMED)
    }
}

impl Pace {
    /// How long the buffered rest of a body may take to arrive if all of it was taken after `taken_in`: with buffers of
    /// half the body's size it takes as long again, and twice that is the allowance. A small body is taken at once, so
    /// only the estimate from earlier ones helps.
    pub(super) fn to_arrive(self, bytes: u64, taken_in: Duration) -> Duration {
        let assumed = Duration::from_secs_f64(2.0 * bytes.min(UNSEEN_MAX) as f64 / self.0);
        assumed.min(ASSUMED_MAX).max(taken_in * 2)
    }

    /// Records a body that was answered.
    pub(super) fn answered(&mut self, bytes: u64, within: Duration) {
        if bytes >= TELLING_BYTES {
            self.0 = (bytes as f64 / within.as_secs_f64().max(1e-6)).max(SLOWEST);
        }
    }

    /// Records a body that was not answered: the next one is given about twice as long.
    pub(super) fn unanswered(&mut self, bytes: u64, within: Duration) {
        if bytes < TELLING_BYTES {
            return;
        }
        let at_most = bytes.min(UNSEEN_MAX) as f64 / within.as_secs_f64().max(1e-6);
        self.0 = self.0.min(at_most).max(SLOWEST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    fn seconds(pace: Pace, bytes: u64) -> u64 {
        pace.to_arrive(bytes, Duration::ZERO).as_secs()
    }

    #[test]
    fn a_fast_link_adds_nothing_and_a_question_never_does() {
        let mut pace = Pace::default();
        pace.answered(8 << 20, Duration::from_millis(200));
        assert_eq!(seconds(pace, 8 << 20), 0);
        pace.unanswered(0, MINUTE);
        pace.unanswered(2000, MINUTE);
        assert_eq!(seconds(pace, 8 << 20), 0, "of a question that nobody answers nothing follows");
        for pace in [pace, Pace::default(), Pace(SLOWEST)] {
            assert_eq!(seconds(pace, 0), 0);
            assert!(seconds(pace, 2000) <= 1, "a small record");
        }
    }

    /// 2 MiB over 4 KiB/s, taken by buffers at once: the only sign of slowness is that no answer arrives.
    #[test]
    fn a_body_that_no_patience_was_enough_for_gets_through_in_the_end() {
        let (mut pace, bytes, needed) = (Pace::default(), 2 << 20, Duration::from_secs(512));
        let mut waits = Vec::new();
        loop {
            let wait = MINUTE + pace.to_arrive(bytes, Duration::ZERO);
            waits.push(wait.as_secs());
            if wait >= needed {
                break;
            }
            pace.unanswered(bytes, wait);
            assert!(waits.len() < 5, "{waits:?}");
        }
        pace.answered(bytes, needed);
        assert!(
            MINUTE + pace.to_arrive(bytes, Duration::ZERO) >= needed,
            "and the next one at once"
        );
    }

    #[test]
    fn what_was_taken_slowly_arrives_slowly_and_a_store_that_hangs_is_not_waited_for_for_ever() {
        let taken_in = Duration::from_secs(340);
        assert_eq!(Pace::default().to_arrive(8 << 20, taken_in), taken_in * 2);
        let mut pace = Pace::default();
        for _ in 0..100 {
            let wait = MINUTE + pace.to_arrive(8 << 20, Duration::ZERO);
            pace.unanswered(8 << 20, wait);
        }
        assert_eq!(pace.to_arrive(8 << 20, Duration::ZERO), ASSUMED_MAX);
    }
}
