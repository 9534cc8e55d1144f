//! What the database held at any point that can be recovered to.
//!
//! Two independent sources make it: what the workload's transactions do, and the order in which PostgreSQL's WAL says that they
//! ended; the mark that each of them puts into WAL joins the two, never an id, which a crash may give away again. The rules for where a recovery ends are those of `recoveryStopsBefore` and `recoveryStopsAfter` in PostgreSQL's
//! `xlogrecovery.c` (all targets inclusive):
//! time: before the first end of a transaction that is later; LSN: after the first record that begins at or after it;
//! name: after its record; xid: after the record that ends it.

use super::{
    model::{Effect, Model, Prepared},
    wal::{Kind, Record},
};
use klio_pg::Lsn;
use std::collections::BTreeMap;

/// Where to recover to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// `2026-11-21 05:27:12.123456`, in UTC.
    Time(String),
    /// A position, of a record or not.
    Lsn(Lsn),
    /// A restore point.
    Name(String),
    /// A transaction.
    Xid(u32),
    /// As soon as the backup is consistent.
    Immediate,
    /// Everything there is.
    Latest,
}

impl Target {
    /// The arguments of `klio restore`.
    #[must_use]
    pub fn args(&self) -> Vec<String> {
        let pair = |flag: &str, value: String| vec![flag.to_owned(), value];
        match self {
            Target::Time(time) => pair("--target-time", format!("{time}+00")),
            Target::Lsn(lsn) => pair("--target-lsn", lsn.to_string()),
            Target::Name(name) => pair("--target-name", name.clone()),
            Target::Xid(xid) => pair("--target-xid", xid.to_string()),
            Target::Immediate => vec!["--target-immediate".to_owned()],
            Target::Latest => vec!["--latest".to_owned()],
        }
    }
}

/// A transaction of the workload.
#[derive(Debug, Clone)]
pub struct Transaction {
    /// What it does once committed.
    pub effects: Vec<Effect>,
    /// Its COMMIT was answered: with synchronous replication it must never be missing (P1).
    pub acknowledged: bool,
}

/// A recorded run.
#[derive(Debug, Clone)]
pub struct Oracle {
    /// Before the first record.
    pub base: Model,
    /// By mark.
    pub transactions: BTreeMap<i64, Transaction>,
    /// In the order of WAL.
    pub records: Vec<Record>,
    /// Everything before it is known to be durable elsewhere.
    pub safe: Lsn,
}

impl Oracle {
    /// What a recovery to this target must show, when PostgreSQL says "redo done at `redone`": where the last record that it
    /// read begins. That is the last one it replayed, but for a time: there it is the one that it stopped before.
    ///
    /// # Errors
    /// PostgreSQL stopped somewhere else than where it should have.
    pub fn expect_at(&self, target: &Target, redone: Lsn) -> Result<Model, String> {
        let (least, most) = self.bounds(target)?;
        let before = matches!(target, Target::Time(_));
        let replayed = self
            .records
            .partition_point(|record| record.start < redone || (record.start == redone && !before));
        if (least..=most).contains(&replayed) {
            Ok(self.after(replayed))
        } else {
            Err(format!(
                "recovery to {target:?} replayed {replayed} records of interest (last at {redone}), expected {least} to {most}: {:?}",
                self.records
                    .get(replayed.saturating_sub(1)..(replayed + 2).min(self.records.len()))
            ))
        }
    }

    /// How many of the records must be replayed: at least, at most.
    fn bounds(&self, target: &Target) -> Result<(usize, usize), String> {
        let all = self.records.len();
        let exactly = |place: Option<usize>| {
            place.map(|n| (n, n)).ok_or_else(|| format!("the WAL has no {target:?}"))
        };
        match target {
            Target::Time(until) => {
                exactly(self.records.iter().position(
                    |record| matches!(&record.kind, Kind::End { time, .. } if time > until),
                ))
            }
            // The one record after it may be one of interest or not.
            Target::Lsn(lsn) => {
                let before = self.records.partition_point(|record| record.start < *lsn);
                let at = self.records.get(before).is_some_and(|record| record.start == *lsn);
                Ok((before + usize::from(at), (before + 1).min(all)))
            }
            Target::Name(name) => exactly(
                self.after_first(|kind| matches!(kind, Kind::RestorePoint(found) if found == name)),
            ),
            Target::Xid(wanted) => exactly(
                self.after_first(|kind| matches!(kind, Kind::End { xid, .. } if xid == wanted)),
            ),
            Target::Immediate => Ok((0, all)),
            Target::Latest => Ok((self.acknowledged(), all)),
        }
    }

    fn after_first(&self, wanted: impl Fn(&Kind) -> bool) -> Option<usize> {
        self.records.iter().position(|record| wanted(&record.kind)).map(|place| place + 1)
    }

    /// How many records there are up to the last transaction that ended before `safe` or whose COMMIT was answered.
    #[must_use]
    pub fn acknowledged(&self) -> usize {
        let mut running = BTreeMap::new();
        let mut count = 0;
        for (place, record) in self.records.iter().enumerate() {
            match &record.kind {
                Kind::Mark { xid, mark } => drop(running.insert(*xid, *mark)),
                Kind::End { xid, .. } => {
                    let own = running.remove(xid).and_then(|mark| self.transactions.get(&mark));
                    if record.start < self.safe || own.is_some_and(|t| t.acknowledged) {
                        count = place + 1;
                    }
                }
                _ => {}
            }
        }
        count
    }

    /// What the primary itself holds after a crash at its end.
    #[must_use]
    pub fn at_end(&self) -> Model {
        self.after(self.records.len())
    }

    /// What is there after so many records.
    fn after(&self, count: usize) -> Model {
        let mut model = self.base.clone();
        let mut global: BTreeMap<u32, Vec<&Kind>> = BTreeMap::new();
        // What transactions do that have not ended; of one that a crash ended it stays, as nobody gets its id again once
        // WAL names it.
        let mut running: BTreeMap<u32, &[Effect]> = BTreeMap::new();
        for record in &self.records[..count] {
            match &record.kind {
                Kind::Mark { xid, mark } => {
                    let own = self.transactions.get(mark).map(|t| t.effects.as_slice());
                    running.insert(*xid, own.unwrap_or_default());
                }
                Kind::End { xid, committed, .. } => {
                    let own = running.remove(xid).map(<[Effect]>::to_vec);
                    // It may have been prepared before the first record.
                    let own = model.take_prepared(*xid).or(own).unwrap_or_default();
                    let shared = global.remove(xid).unwrap_or_default();
                    if *committed {
                        own.iter().for_each(|effect| model.apply(effect));
                        shared.into_iter().for_each(|kind| apply_global(&mut model, kind));
                    }
                }
                Kind::Prepare { xid, gid } => {
                    let effects = running.remove(xid).unwrap_or_default().to_vec();
                    model.prepared.insert(gid.clone(), Prepared { xid: *xid, effects });
                }
                Kind::Tablespace { xid, .. } | Kind::Database { xid, .. } => {
                    global.entry(*xid).or_default().push(&record.kind);
                }
                Kind::RestorePoint(_) => {}
            }
        }
        model.recovered()
    }
}

fn apply_global(model: &mut Model, kind: &Kind) {
    match kind {
        Kind::Tablespace { oid, name: Some(name), .. } => {
            model.tablespaces.insert(*oid, name.clone());
        }
        Kind::Tablespace { oid, name: None, .. } => drop(model.tablespaces.remove(oid)),
        Kind::Database { oid, made: true, .. } => drop(model.databases.insert(*oid)),
        Kind::Database { oid, made: false, .. } => drop(model.databases.remove(oid)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::model::Text;

    fn large(id: u32) -> Transaction {
        let effects = vec![Effect::Large(id, Text { seed: 1, pieces: 1 })];
        Transaction { effects, acknowledged: id < 3 }
    }

    /// Transactions 1 to 4, marked a little before they end, end at 10, 20, 30, 40, in seconds 1, 2, 2, 4; the third is rolled back.
    fn oracle() -> Oracle {
        let end = |xid: u32, second: u32| Record {
            start: Lsn::new(u64::from(xid) * 10),
            kind: Kind::End { xid, committed: xid != 3, time: format!("00:00:0{second}") },
        };
        let mut records = vec![end(1, 1), end(2, 2), end(3, 2), end(4, 4)];
        let point = Record { start: Lsn::new(25), kind: Kind::RestorePoint("point".into()) };
        records.insert(2, point);
        records.extend((1..5).map(|xid| mark(u64::from(xid) * 10 - 8, xid)));
        records.sort_by_key(|record| record.start);
        let transactions = (1..5).map(|xid| (i64::from(xid) + 100, large(xid))).collect();
        Oracle { base: Model::default(), transactions, records, safe: Lsn::ZERO }
    }

    fn mark(start: u64, xid: u32) -> Record {
        let kind = Kind::Mark { xid, mark: i64::from(xid) + 100 };
        Record { start: Lsn::new(start), kind }
    }

    fn at(target: &Target, redone: u64) -> Result<Vec<u32>, String> {
        let model = oracle().expect_at(target, Lsn::new(redone))?;
        Ok(model.large.into_keys().collect())
    }

    #[test]
    fn a_time_includes_what_ended_at_it_and_nothing_later() {
        let time = |second| Target::Time(format!("00:00:0{second}"));
        assert_eq!(at(&time(1), 20).unwrap(), [1]);
        assert_eq!(at(&time(2), 40).unwrap(), [1, 2]);
        assert!(at(&time(2), 30).is_err(), "it stopped before the transaction that ended at 30");
        assert!(at(&time(4), 50).is_err(), "nothing later: PostgreSQL does not reach it");
    }

    #[test]
    fn a_position_includes_the_record_that_begins_there() {
        assert_eq!(at(&Target::Lsn(Lsn::new(20)), 20).unwrap(), [1, 2]);
        assert_eq!(at(&Target::Lsn(Lsn::new(15)), 17).unwrap(), [1]);
        assert_eq!(at(&Target::Lsn(Lsn::new(15)), 20).unwrap(), [1, 2]);
        assert!(at(&Target::Lsn(Lsn::new(15)), 25).is_err());
    }

    #[test]
    fn what_a_crash_undid_is_not_done_by_whoever_gets_its_id_again() {
        let mut oracle = oracle();
        // Transaction 2 was lost with its mark; then PostgreSQL's own work (ANALYZE, a new tablespace) got the id.
        oracle.records.retain(|record| *record != mark(12, 2));
        let model = oracle.expect_at(&Target::Xid(4), Lsn::new(40)).unwrap();
        assert_eq!(model.large.into_keys().collect::<Vec<_>>(), [1, 4]);
        assert_eq!(oracle.acknowledged(), 2, "its answer never came");
    }

    #[test]
    fn what_was_prepared_before_is_done_when_it_is_committed() {
        let mut oracle = oracle();
        let prepared = |xid, id| Prepared { xid, effects: large(id).effects };
        let both = [("a".to_owned(), prepared(7, 70)), ("b".to_owned(), prepared(8, 80))];
        oracle.base.prepared = both.into();
        let time = "00:00:05".to_owned();
        let kind = Kind::End { xid: 7, committed: true, time };
        oracle.records.push(Record { start: Lsn::new(50), kind });
        let model = oracle.expect_at(&Target::Xid(7), Lsn::new(50)).unwrap();
        assert_eq!(model.large.into_keys().collect::<Vec<_>>(), [1, 2, 4, 70]);
        assert_eq!(model.prepared.into_keys().collect::<Vec<_>>(), ["b"]);
    }

    #[test]
    fn names_and_transactions_end_right_behind_their_record() {
        assert_eq!(at(&Target::Name("point".into()), 25).unwrap(), [1, 2]);
        assert_eq!(at(&Target::Xid(4), 40).unwrap(), [1, 2, 4]);
        assert!(at(&Target::Xid(1), 20).is_err());
    }

    #[test]
    fn the_latest_point_holds_every_acknowledged_commit() {
        assert!(at(&Target::Latest, 10).is_err(), "transaction 2 was acknowledged");
        assert_eq!(at(&Target::Latest, 20).unwrap(), [1, 2]);
        assert_eq!(at(&Target::Latest, 40).unwrap(), [1, 2, 4]);
    }
}
