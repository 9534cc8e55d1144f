//! One reading for all instruments of a scrape.
//!
//! Every instrument has a callback of its own. The first one that asks makes a reading, and the others of the same
//! scrape get the same one. So the work grows with the number of clusters, not with instruments times clusters, and
//! the values of a page are consistent.

use super::Reading;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Two readers that collect at the same time share a reading, instead of making one for each instrument.
const YOUNG: Duration = Duration::from_millis(200);
/// No scrape takes this long; an older reading belongs to a scrape that was abandoned.
const OLD: Duration = Duration::from_secs(30);

/// Values by instrument.
pub type Table = Arc<BTreeMap<&'static str, Vec<Reading>>>;

/// The last reading, and which instruments have used it.
#[derive(Debug, Default)]
pub struct Snapshots(Mutex<Option<Snapshot>>);

#[derive(Debug)]
struct Snapshot {
    at: Instant,
    table: Table,
    served: BTreeSet<&'static str>,
}

impl Snapshots {
    /// The values for an instrument: of a reading that it has not used yet, or that is very recent.
    pub fn get(&self, instrument: &'static str, read: impl FnOnce() -> Vec<Reading>) -> Table {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(snapshot) = last.as_mut() {
            let age = snapshot.at.elapsed();
            if age < YOUNG || (age < OLD && !snapshot.served.contains(instrument)) {
                snapshot.served.insert(instrument);
                return snapshot.table.clone();
            }
        }
        let mut table: BTreeMap<&'static str, Vec<Reading>> = BTreeMap::new();
        for reading in read() {
            table.entry(reading.name).or_default().push(reading);
        }
        let table = Arc::new(table);
        *last = Some(Snapshot {
            at: Instant::now(),
            table: table.clone(),
            served: BTreeSet::from([instrument]),
        });
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scrape_reads_once_and_the_next_one_reads_again() {
        let snapshots = Snapshots::default();
        let reads = std::cell::Cell::new(0);
        let ask = |name| {
            drop(snapshots.get(name, || {
                reads.set(reads.get() + 1);
                Vec::new()
            }));
        };
        ask("a");
        // A scrape whose reading took long is still one scrape.
        std::thread::sleep(YOUNG * 2);
        ask("b");
        ask("c");
        assert_eq!(reads.get(), 1);
        ask("a");
        ask("b");
        assert_eq!(reads.get(), 2);
    }
}
