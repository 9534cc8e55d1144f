//! How fast the way to the store is, as far as requests have shown.
//!
//! What a socket, or a proxy on the way, has taken is not yet at the store: after the last byte of a body was taken, its answer
//! may need as long as those buffers take to empty. Pure: whoever measures says so.

use std::time::Duration;

/// Where nothing is known yet. An assumption, not a limit: it is corrected by the first body, whether it arrives or not.
const ASSUMED: f64 = (64 << 10) as f64;
/// Slower than this is not assumed: a store that does not answer at all would be waited for longer and longer.
const SLOWEST: f64 = (4 << 10) as f64;
/// What lies unseen in buffers: Linux lets a socket grow to 4 MiB (tcp_wmem).
const UNSEEN_MAX: u64 = 4 << 20;
/// The longest that is waited by an assumption alone.
const ASSUMED_MAX: Duration = Duration::from_secs(600);
/// Of a smaller body the time says how far the store is, not how fast the link.
const TELLING_BYTES: u64 = 64 << 10;

/// Bytes per second of one request beside the others of its time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace(f64);

impl Default for Pace {
    fn default() -> Self {
        Self(ASSUMED)
    }
}

impl Pace {
    /// How long what is still unseen of a body may take to arrive, when all of it was taken after `taken_in`: as long again, in
    /// buffers of half its size; twice that, to be sure. A small body is taken at once, and then only earlier ones say something.
    pub(super) fn to_arrive(self, bytes: u64, taken_in: Duration) -> Duration {
        let assumed = Duration::from_secs_f64(2.0 * bytes.min(UNSEEN_MAX) as f64 / self.0);
        assumed.min(ASSUMED_MAX).max(taken_in * 2)
    }

    /// A body was answered.
    pub(super) fn answered(&mut self, bytes: u64, within: Duration) {
        if bytes >= TELLING_BYTES {
            self.0 = (bytes as f64 / within.as_secs_f64().max(1e-6)).max(SLOWEST);
        }
    }

    /// A body was not answered: the next one is waited for about twice as long.
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

    /// 2 MiB over 4 KiB/s, swallowed by buffers at once: there is nothing to see but that no answer comes.
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
