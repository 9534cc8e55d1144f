//! How many parts go to the store at once.
//!
//! On a slow link many at once only make each one slower, and what is lost with a cut larger: a part that crawls or that the link
//! loses halves their number, down to one; each quick one adds one. Files of one request take no lane, so that one cluster's
//! trouble with a large file does not hold up the WAL of others; when they crawl there are fewer lanes all the same. Memory is
//! bounded elsewhere (`upload_memory`); a lane is taken first, so that whoever holds memory never waits here.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Before anything is known.
const AT_FIRST: usize = 4;
/// More than the files that a consumer uploads at once have: on a fast link memory is the only bound.
const AT_MOST: usize = 32;

/// Shared by all uploads to a store.
#[derive(Debug, Clone)]
pub(super) struct Lanes(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    open: Arc<Semaphore>,
    width: Mutex<Width>,
    /// A part that took longer than this crawled.
    crawl: Duration,
}

/// Pure: how many there are, and how many more are still in use.
#[derive(Debug, PartialEq, Eq)]
struct Width {
    now: usize,
    /// To be closed when they are given back.
    owed: usize,
}

/// The right to send one part. Says how it went, or says nothing when it is dropped.
#[derive(Debug)]
pub(super) struct Lane {
    of: Lanes,
    permit: Option<OwnedSemaphorePermit>,
}

impl Lanes {
    /// Where a request has this much patience.
    pub(super) fn new(patience: Duration) -> Self {
        let width = Mutex::new(Width { now: AT_FIRST, owed: 0 });
        Self(Arc::new(Shared { open: Arc::new(Semaphore::new(AT_FIRST)), width, crawl: patience }))
    }

    /// Waits for its turn (the semaphore is fair). Cancel-safe.
    pub(super) async fn take(&self) -> Option<Lane> {
        let permit = Arc::clone(&self.0.open).acquire_owned().await.ok()?;
        Some(Lane { of: self.clone(), permit: Some(permit) })
    }

    /// Something went that takes no lane, in so long a time.
    pub(super) fn went(&self, within: Duration) {
        if within > self.0.crawl {
            self.narrow();
        }
    }

    /// How many there are now.
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

    /// The link or the store lost it.
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

    /// Takes as many as there are.
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
