//! What a live session holds: its writer and its place. They are released in that order, however the session ends.
//!
//! If a place were freed while its writer is still open, the next session would get the place and then be refused by
//! the store. So everything that has the writer, including a task that writes, also holds the place.

use crate::registry::Place;
use klio_storage::wal::Writer;
use std::sync::Arc;

/// Fields are dropped in the order of declaration: the writer is closed before the place is free.
pub(super) struct Slot<W = Writer, P = Place> {
    /// `None` while a task has it.
    pub(super) writer: Option<W>,
    pub(super) place: Arc<P>,
}

/// The writer while a task has it.
pub(super) struct Lent<W = Writer, P = Place> {
    pub(super) writer: W,
    /// Held until the writer is returned or dropped.
    _place: Arc<P>,
}

impl<W, P> Slot<W, P> {
    pub(super) fn new(writer: W, place: P) -> Self {
        Self { writer: Some(writer), place: Arc::new(place) }
    }

    /// Lends the writer to a task, unless one has it already.
    pub(super) fn lend(&mut self) -> Option<Lent<W, P>> {
        let writer = self.writer.take()?;
        Some(Lent { writer, _place: Arc::clone(&self.place) })
    }

    pub(super) fn take_home(&mut self, lent: Lent<W, P>) {
        self.writer = Some(lent.writer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    type Log = Arc<Mutex<Vec<&'static str>>>;

    struct Probe(&'static str, Log);

    impl Drop for Probe {
        fn drop(&mut self) {
            self.1.lock().unwrap().push(self.0);
        }
    }

    fn slot(log: &Log) -> Slot<Probe, Probe> {
        Slot::new(Probe("writer", log.clone()), Probe("place", log.clone()))
    }

    #[test]
    fn a_session_that_panics_closes_its_writer_before_its_place_is_free() {
        let log = Log::default();
        let held = slot(&log);
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
            let _held = held;
            panic!("as a session may");
        }));
        assert!(panicked.is_err());
        assert_eq!(*log.lock().unwrap(), ["writer", "place"]);
    }

    #[test]
    fn a_task_that_still_writes_keeps_the_place_of_a_session_that_is_gone() {
        let log = Log::default();
        let mut held = slot(&log);
        let lent = held.lend().unwrap();
        assert!(held.lend().is_none());
        drop(held);
        assert!(log.lock().unwrap().is_empty());
        drop(lent);
        assert_eq!(*log.lock().unwrap(), ["writer", "place"]);
    }

    #[test]
    fn a_writer_that_came_home_is_lent_again() {
        let log = Log::default();
        let mut held = slot(&log);
        let lent = held.lend().unwrap();
        held.take_home(lent);
        assert!(held.writer.is_some());
    }
}
