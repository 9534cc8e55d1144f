//! Pauses between attempts: doubling, jittered, forgotten after progress.
//!
//! Jitter keeps a thousand sidecars from coming back to a restarted server in the same moment.

use rand::Rng;
use std::time::Duration;

/// The pauses of one retry loop.
#[derive(Debug, Clone)]
pub struct Backoff {
    min: Duration,
    max: Duration,
    next: Duration,
}

impl Backoff {
    /// From `min`, doubling up to `max`.
    pub const fn new(min: Duration, max: Duration) -> Self {
        Self { min, max, next: min }
    }

    /// The next pause: half of the nominal one, plus up to another half by chance.
    pub fn pause(&mut self, rng: &mut impl Rng) -> Duration {
        let nominal = self.next;
        self.next = (nominal * 2).min(self.max);
        nominal.mul_f64(rng.random_range(0.5..=1.0))
    }

    /// Something worked: begin with the shortest again.
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
