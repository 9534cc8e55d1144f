//! Writes to disk what a restore has poured so far, while it goes on pouring.
//!
//! The kernel alone would begin late, and the restore would wait for most of its bytes at its end. What must stay true:
//! this only makes the end shorter (`finish` syncs everything, D4), but an error it meets ends the restore, because the
//! kernel may tell of it only once.

use super::{finish::sync_all, place::Places};
use crate::error::Error;
use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
    mpsc::{Receiver, SyncSender, sync_channel},
};

/// Bytes between two beginnings.
const EVERY: u64 = 256 << 20;

/// The workers' side.
#[derive(Debug, Clone)]
pub(super) struct Settler {
    begin: SyncSender<()>,
    next: Arc<AtomicU64>,
}

/// The side that syncs.
#[derive(Debug)]
pub(super) struct Settling {
    begin: Receiver<()>,
}

impl Settler {
    /// Both sides.
    pub(super) fn new() -> (Self, Settling) {
        let (sender, receiver) = sync_channel(1);
        let settler = Self { begin: sender, next: Arc::new(AtomicU64::new(EVERY)) };
        (settler, Settling { begin: receiver })
    }

    /// So many bytes have been written in all. Never waits: when one sync lasts, the next takes more.
    pub(super) fn poured(&self, written: u64) {
        let next = self.next.load(Relaxed);
        let claimed = written >= next
            && self.next.compare_exchange(next, written + EVERY, Relaxed, Relaxed).is_ok();
        if claimed {
            // Full or gone: one is waiting already, or has failed and said so.
            let _ = self.begin.try_send(());
        }
    }
}

impl Settling {
    /// Until every `Settler` is gone.
    pub(super) fn run(&self, places: &Places) -> Result<(), Error> {
        while self.begin.recv().is_ok() {
            places.all().try_for_each(sync_all)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn every_so_many_bytes_one_sync_is_asked_for_and_never_waited_for() {
        let (settler, settling) = Settler::new();
        let asked = || settling.begin.try_iter().count();
        settler.poured(EVERY - 1);
        assert_eq!(asked(), 0);
        settler.poured(EVERY);
        settler.clone().poured(EVERY + 5);
        assert_eq!(asked(), 1);
        settler.poured(2 * EVERY);
        settler.poured(3 * EVERY);
        settler.poured(9 * EVERY);
        assert_eq!(asked(), 1, "more than one waits");
    }

    #[test]
    fn a_failed_sync_is_an_error_that_names_the_place() {
        let scratch = tempfile::tempdir().unwrap();
        let data = scratch.path().join("gone");
        let (settler, settling) = Settler::new();
        settler.poured(EVERY);
        drop(settler);
        let places = Places { data: data.clone(), tablespaces: BTreeMap::new() };
        let error = settling.run(&places).unwrap_err();
        assert!(error.to_string().contains(&data.display().to_string()), "{error}");
    }
}
