//! What the database held at any point that can be recovered to.
//!
//! Two independent sources make it: what the workload's transactions do, and the order in which PostgreSQL's WAL says that they
//! ended. The rules for where a recovery ends are those of `recoveryStopsBefore` and `recoveryStopsAfter` in PostgreSQL's
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
    /// By transaction id.
    pub transactions: BTreeMap<u32, Transaction>,
    /// In the order of WAL.
    pub records: Vec<Record>,
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

    /// Everything before `safe` is known to be durable elsewhere.
    pub fn acknowledge_until(&mut self, safe: Lsn) {
        for record in self.records.iter().filter(|record| record.start < safe) {
            if let Kind::End { xid, .. } = record.kind
                && let Some(transaction) = self.transactions.get_mut(&xid)
            {
                transaction.acknowledged = true;
            }
        }
    }

    /// How many records there are up to the last transaction whose COMMIT was answered.
    #[must_use]
    pub fn acknowledged(&self) -> usize {
        let acknowledged = |record: &Record| match record.kind {
            Kind::End { xid, .. } => self.transactions.get(&xid).is_some_and(|t| t.acknowledged),
            _ => false,
        };
        self.records.iter().rposition(acknowledged).map_or(0, |place| place + 1)
    }

    /// What is there after so many records.
    fn after(&self, count: usize) -> Model {
        let mut model = self.base.clone();
        let mut global: BTreeMap<u32, Vec<&Kind>> = BTreeMap::new();
        for record in &self.records[..count] {
            match &record.kind {
                Kind::End { xid, committed, .. } => {
                    model.prepared.retain(|_, prepared| prepared.xid != *xid);
                    let shared = global.remove(xid).unwrap_or_default();
                    if *committed {
                        let own = self.transactions.get(xid);
                        own.into_iter().flat_map(|t| &t.effects).for_each(|e| model.apply(e));
                        shared.into_iter().for_each(|kind| apply_global(&mut model, kind));
                    }
                }
                Kind::Prepare { xid, gid } => {
                    let own = self.transactions.get(xid);
                    let effects = own.map(|t| t.effects.clone()).unwrap_or_default();
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

    /// Transactions 1 to 4 end at 10, 20, 30, 40, in seconds 1, 2, 2, 4; the third is rolled back.
    fn oracle() -> Oracle {
        let end = |xid: u32, second: u32| Record {
            start: Lsn::new(u64::from(xid) * 10),
            kind: Kind::End { xid, committed: xid != 3, time: format!("00:00:0{second}") },
        };
        let mut records = vec![end(1, 1), end(2, 2), end(3, 2), end(4, 4)];
        let point = Record { start: Lsn::new(25), kind: Kind::RestorePoint("point".into()) };
        records.insert(2, point);
        let transactions = (1..5).map(|xid| (xid, large(xid))).collect();
        Oracle { base: Model::default(), transactions, records }
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
