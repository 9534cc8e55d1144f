//! Limits how many parts are sent to the store at the same time.
//!
//! On a slow link, many concurrent parts only slow each other down, and more is lost when the link breaks. A part that
//! is slow or lost halves the number, down to one; each fast one adds one. Files that fit into one request take no
//! lane, so that one cluster's problem with a large file does not hold up the WAL of others; but if they are slow, the
//! number is reduced as well. Memory is limited elsewhere (`upload_memory`); a lane is taken before memory, so that
//! whoever holds memory never waits here.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The number before anything is measured.
const AT_FIRST: usize = 4;
/// More than the files that a consumer uploads at the same time have: on a fast link only memory is the limit.
const AT_MOST: usize = 32;

/// Shared by all uploads to a store.
#[derive(Debug, Clone)]
pub(super) struct Lanes(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    open: Arc<Semaphore>,
    width: Mutex<Width>,
    /// A part that took longer than this was slow.
    crawl: Duration,
}

/// The number of lanes, and how many surplus ones are still in use. Pure.
#[derive(Debug, PartialEq, Eq)]
struct Width {
    now: usize,
    /// Lanes to close when they are returned.
    owed: usize,
}

/// The right to send one part. Its owner reports the outcome, or drops it without a report.
#[derive(Debug)]
pub(super) struct Lane {
    of: Lanes,
    permit: Option<OwnedSemaphorePermit>,
}

impl Lanes {
    /// `patience` is how long a request may go without progress.
    pub(super) fn new(patience: Duration) -> Self {
        let width = Mutex::new(Width { now: AT_FIRST, owed: 0 });
        Self(Arc::new(Shared { open: Arc::new(Semaphore::new(AT_FIRST)), width, crawl: patience }))
    }

    /// Waits for a free lane (the semaphore is fair). Cancel-safe.
    pub(super) async fn take(&self) -> Option<Lane> {
        let permit = Arc::clone(&self.0.open).acquire_owned().await.ok()?;
        Some(Lane { of: self.clone(), permit: Some(permit) })
    }

    /// Reports a request that took no lane, with its duration.
    pub(super) fn went(&self, within: Duration) {
        if within > self.0.crawl {
            self.narrow();
        }
    }

    /// The current number of lanes.
    pub(super) fn width(&self) -> usize {
        self.lock().now
    }

    fn lock(&self) -> MutexGuard<'_, Width> {
        self.0.width.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn widen(&self) {
        let mut width = self.lock();
        if width.now == AT_MOST {
            return;
        }
        width.now += 1;
        match width.owed {
            0 => self.0.open.add_permits(1),
            _ => width.owed -= 1,
        }
    }

    fn narrow(&self) {
        let mut width = self.lock();
        let half = (width.now / 2).max(1);
        let fewer = width.now - half;
        width.now = half;
        width.owed += fewer - self.0.open.forget_permits(fewer);
    }
}

impl Lane {
    /// The part arrived.
    pub(super) fn arrived(&self, within: Duration) {
        if within > self.of.0.crawl {
            self.of.narrow();
        } else if within < self.of.0.crawl / 4 {
            self.of.widen();
        }
    }

    /// The link or the store lost the part.
    pub(super) fn lost(&self) {
        self.of.narrow();
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        let Some(permit) = self.permit.take() else { return };
        let mut width = self.of.lock();
        if width.owed > 0 {
            width.owed -= 1;
            permit.forget();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    const PATIENCE: Duration = Duration::from_secs(60);

    /// Takes all available lanes.
    fn all(lanes: &Lanes) -> Vec<Lane> {
        std::iter::from_fn(|| lanes.take().now_or_never().flatten()).collect()
    }

    #[test]
    fn what_crawls_or_is_lost_leaves_one_in_the_end_and_never_none() {
        let lanes = Lanes::new(PATIENCE);
        let held = all(&lanes);
        assert_eq!(held.len(), AT_FIRST);
        held[0].arrived(PATIENCE * 2);
        held[1].lost();
        lanes.went(PATIENCE / 2);
        assert_eq!(lanes.width(), 1);
        lanes.went(PATIENCE * 2);
        assert_eq!(lanes.width(), 1);
        assert!(lanes.take().now_or_never().is_none(), "those under way are still under way");
        drop(held);
        assert_eq!(all(&lanes).len(), 1);
    }

    #[test]
    fn quick_parts_make_it_wide_again_and_middling_ones_leave_it() {
        let lanes = Lanes::new(PATIENCE);
        let lane = lanes.take().now_or_never().flatten().unwrap();
        lane.lost();
        lane.lost();
        lane.lost();
        lane.arrived(PATIENCE / 2);
        assert_eq!(lanes.width(), 1);
        for expected in 2..=AT_MOST + 3 {
            lane.arrived(Duration::from_secs(1));
            assert_eq!(lanes.width(), expected.min(AT_MOST));
        }
        drop(lane);
        assert_eq!(all(&lanes).len(), AT_MOST, "as many as are said");
    }

    #[test]
    fn narrowed_and_widened_while_all_are_in_use_the_number_stays_right() {
        let lanes = Lanes::new(PATIENCE);
        let held = all(&lanes);
        held[0].lost();
        held[1].arrived(Duration::ZERO);
        assert_eq!(lanes.width(), 3);
        drop(held);
        assert_eq!(all(&lanes).len(), 3);
    }
}
