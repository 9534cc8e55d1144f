//! Pauses between attempts: doubling, with jitter, back to the shortest after progress.
//!
//! Jitter keeps a thousand sidecars from reconnecting to a restarted server at the same moment.

use rand::Rng;
use std::time::Duration;

#[derive(Debug, Clone)]
pub struct Backoff {
    min: Duration,
    max: Duration,
    next: Duration,
}

impl Backoff {
    /// The pauses start at `min` and double up to `max`.
    pub const fn new(min: Duration, max: Duration) -> Self {
        Self { min, max, next: min }
    }

    /// The next pause: a random duration between half of the nominal pause and all of it.
    pub fn pause(&mut self, rng: &mut impl Rng) -> Duration {
        let nominal = self.next;
        self.next = (nominal * 2).min(self.max);
        nominal.mul_f64(rng.random_range(0.5..=1.0))
    }

    /// Starts again with the shortest pause, after progress.
    pub const fn reset(&mut self) {
        self.next = self.min;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{SeedableRng, rngs::StdRng};

    #[test]
    fn pauses_grow_to_the_limit_and_progress_resets_them() {
        let (min, max) = (Duration::from_millis(100), Duration::from_secs(15));
        let (mut backoff, mut rng) = (Backoff::new(min, max), StdRng::seed_from_u64(1));
        let first = backoff.pause(&mut rng);
        assert!(first >= min / 2 && first <= min, "{first:?}");
        let last = (0..20).map(|_| backoff.pause(&mut rng)).last().unwrap();
        assert!(last >= max / 2 && last <= max, "{last:?}");
        backoff.reset();
        assert!(backoff.pause(&mut rng) <= min);
    }
}
