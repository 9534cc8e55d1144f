//! What replay will meet on the way to the target, read before anything is written: tablespaces that are created,
//! settings that recovery needs, prepared transactions, and commit times that are out of order.
//!
//! For this, all WAL between the backup and the target is read once, several segments at a time (RESTORE5).

use super::{
    show_time,
    target::Recovery,
    wal::{Break, Wal},
};
use crate::error::{Error, Failure};
use klio_pg::{Edit, Found, Landmark, Lsn, Prepared, TABLESPACE_RECORD_SPAN, WalParameters};
use klio_proto::Code;
use klio_storage::catalog::Plan;
use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    os::unix::ffi::OsStringExt,
    path::PathBuf,
};

/// How many bytes of WAL are read from the start of the record at which recovery ends. That record must be read whole, and no
/// record that matters here is longer. Later records are not replayed.
const RECORD: u64 = 1 << 16;
/// How far behind the end of a recovery to a time to look for transactions that ended before the target time.
const LOOK_BEHIND: u64 = 256 << 20;

/// A tablespace that replay creates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Made {
    pub oid: u32,
    /// Where the tablespace was in the original.
    pub location: PathBuf,
    /// The position of its `CREATE TABLESPACE` record.
    pub at: Lsn,
}

/// What replay will find in the WAL between the backup and the recovery target.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Way {
    /// Tablespaces in the order of their records, without those inside the data directory.
    pub made: Vec<Made>,
    /// The highest value of each setting that recovery depends on.
    pub needed: BTreeMap<&'static str, u32>,
    /// Notes for the user.
    pub notes: Vec<String>,
    /// Transactions that were prepared on the way and did not end on it, by xid, with their names.
    pub prepared: BTreeMap<u32, String>,
    /// Prepared transactions that ended on the way, whether they were prepared on it or before.
    ended: BTreeSet<u32>,
}

/// At most this many prepared transactions are named in a note.
const NAMED_MAX: usize = 10;

impl Way {
    /// The note about transactions that are still prepared at the target, including those that the backup has in
    /// `pg_twophase`; `None` if there are none.
    pub fn left_prepared(&self, stored: &[Prepared]) -> Option<String> {
        let old = stored.iter().filter(|old| !self.ended.contains(&old.xid));
        let mut all: BTreeMap<u32, &str> = old.map(|old| (old.xid, old.name.as_str())).collect();
        all.extend(self.prepared.iter().map(|(xid, name)| (*xid, name.as_str())));
        if all.is_empty() {
            return None;
        }
        let named = all.iter().take(NAMED_MAX).map(|(xid, name)| format!("{name:?} (xid {xid})"));
        let named = named.collect::<Vec<_>>().join(", ");
        let more = all.len().saturating_sub(NAMED_MAX);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        Some(format!(
            "transactions that are still prepared at the target: {named}{more}; in the restored cluster they hold their \
             locks until COMMIT PREPARED or ROLLBACK PREPARED (pg_prepared_xacts)"
        ))
    }

    fn transaction(&mut self, found: &Found) {
        match &found.landmark {
            Landmark::Prepared(Prepared { xid, name }) => {
                self.ended.remove(xid);
                self.prepared.insert(*xid, name.clone());
            }
            Landmark::Commit { xid, .. } | Landmark::Abort { xid, .. } if found.of_prepared => {
                self.prepared.remove(xid);
                self.ended.insert(*xid);
            }
            _ => {}
        }
    }

    fn raise(&mut self, to: &WalParameters) {
        for (name, number) in [
            ("max_connections", to.max_connections),
            ("max_worker_processes", to.max_worker_processes),
            ("max_wal_senders", to.max_wal_senders),
            ("max_prepared_transactions", to.max_prepared_transactions),
            ("max_locks_per_transaction", to.max_locks_per_transaction),
        ] {
            let known = self.needed.entry(name).or_default();
            *known = number.max(*known);
        }
    }

    /// The values that recovery needs: the higher of those on the way and those in pg_control.
    pub fn needed(&self, control: &[(&'static str, u32)]) -> Vec<(&'static str, u32)> {
        let higher = |name| self.needed.get(name).copied().unwrap_or_default();
        control.iter().map(|(name, number)| (*name, (*number).max(higher(name)))).collect()
    }

    /// The changes to the copy's WAL that make replay create these tablespaces where their links lead.
    ///
    /// # Errors
    /// WAL that cannot be read, or that has changed since it was read for the plan.
    pub async fn edits(
        &self,
        wal: &Wal<'_>,
        places: &BTreeMap<u32, PathBuf>,
    ) -> Result<Vec<Edit>, Error> {
        let mut edits = Vec::new();
        let elsewhere = |made: &&Made| places.get(&made.oid).is_some_and(|to| *to != made.location);
        for made in self.made.iter().filter(elsewhere) {
            let bytes = wal.bytes(made.at, TABLESPACE_RECORD_SPAN).await?;
            let size = wal.path.segment_size();
            let found = klio_pg::tablespace_in_place(size, made.at, &bytes).ok_or_else(|| {
                let message = format!(
                    "read WAL at {}: expected CREATE TABLESPACE, found another record",
                    made.at
                );
                Error::new(Failure::Code(Code::Corrupt), message)
            })?;
            edits.extend(found);
        }
        Ok(edits)
    }
}

/// The state of the walk along the way.
struct Walk<'a> {
    recovery: &'a Recovery,
    /// Whether the record at the target is replayed.
    inclusive: bool,
    /// Records that begin after this position are not replayed, with the exception in [`Walk::is_beyond`].
    last: Lsn,
    way: Way,
    /// The record at which a recovery to a time, a name or a transaction ends.
    end: Option<Found>,
    /// For a recovery to a time: how many transactions behind the end of recovery ended at or before that time, and the
    /// position of the last of them.
    late: Option<(u64, Lsn)>,
}

impl Walk<'_> {
    /// Takes in the next record; true if nothing after it matters.
    fn see(&mut self, found: Found) -> bool {
        if self.is_beyond(&found) {
            return true;
        }
        if let Some(end) = &self.end {
            if let (Recovery::Time(wanted), true) = (self.recovery, found.landmark.stops_by_time())
                && found.landmark.unix_micros().is_some_and(|time| !self.is_behind(time, *wanted))
            {
                let (number, _) = self.late.unwrap_or((0, found.lsn));
                self.late = Some((number + 1, found.lsn));
            }
            return found.lsn > end.lsn.advance(LOOK_BEHIND);
        }
        match &found.landmark {
            Landmark::Parameters(parameters) => self.way.raise(parameters),
            Landmark::TablespaceCreated { oid, path } if !path.is_empty() => {
                let location = PathBuf::from(OsString::from_vec(path.clone()));
                self.way.made.push(Made { oid: *oid, location, at: found.lsn });
            }
            _ => {}
        }
        let ends = self.ends_with(&found.landmark);
        if self.is_replayed(&found, ends) {
            self.way.transaction(&found);
        }
        if !ends {
            return false;
        }
        self.end = Some(found);
        !matches!(self.recovery, Recovery::Time(_))
    }

    /// Whether recovery certainly ends before this record. With an inclusive LSN, PostgreSQL stops after the first
    /// record that begins at the LSN or later (`recoveryStopsAfter`). So a record that begins behind the LSN is still
    /// replayed if its predecessor begins before the LSN.
    fn is_beyond(&self, found: &Found) -> bool {
        let ends_there = self.inclusive && matches!(self.recovery, Recovery::Lsn(_));
        found.lsn > self.last && !(ends_there && found.prev < self.last)
    }

    /// Whether this record is replayed. A recovery to a time stops before the record `ends` refers to, one to a name
    /// stops after it, and for the others `inclusive` decides.
    fn is_replayed(&self, found: &Found, ends: bool) -> bool {
        match self.recovery {
            Recovery::Time(_) => !ends,
            Recovery::Xid(_) => !ends || self.inclusive,
            Recovery::Lsn(lsn) => found.lsn < *lsn || self.inclusive,
            Recovery::End | Recovery::Immediate | Recovery::Name(_) => true,
        }
    }

    /// Whether a recovery to `wanted` stops before a record of this time. An exclusive one also leaves out the exact time.
    const fn is_behind(&self, time: i64, wanted: i64) -> bool {
        time > wanted || (time == wanted && !self.inclusive)
    }

    fn ends_with(&self, landmark: &Landmark) -> bool {
        match (self.recovery, landmark) {
            (Recovery::Time(wanted), landmark) => {
                landmark.stops_by_time()
                    && landmark.unix_micros().is_some_and(|time| self.is_behind(time, *wanted))
            }
            (Recovery::Name(wanted), Landmark::RestorePoint { name, .. }) => name == wanted,
            (Recovery::Xid(wanted), Landmark::Commit { xid, .. } | Landmark::Abort { xid, .. }) => {
                xid == wanted
            }
            _ => false,
        }
    }

    fn done(mut self, broken: Option<Break>) -> Result<Way, Error> {
        if let Some(broken) = broken.filter(|broken| self.end.is_none() && broken.at <= self.last) {
            return Err(broken.refusal());
        }
        if let (Some(end), Some((number, last)), Recovery::Time(wanted)) =
            (&self.end, self.late, self.recovery)
        {
            self.way.notes.push(format!(
                "commit times are out of order (a clock was wrong for a while): the transaction at {} ended at {}, after the \
                 target, and {number} later ones ended at or before {}; recovery stops before {} and leaves them out; \
                 --target-lsn {last} includes them all",
                end.lsn,
                end.landmark.unix_micros().map_or_else(String::new, show_time),
                show_time(*wanted),
                end.lsn,
            ));
        }
        Ok(self.way)
    }
}

/// Reads the way to the target.
///
/// # Errors
/// WAL that cannot be read; records that break off before the target.
pub async fn look(
    wal: &Wal<'_>,
    plan: &Plan,
    (recovery, inclusive): (&Recovery, bool),
) -> Result<Way, Error> {
    let end = plan.reach.end;
    let last = match recovery {
        Recovery::Lsn(lsn) => *lsn,
        Recovery::Immediate => plan.backup.stop_lsn,
        _ => end,
    };
    let to = match recovery {
        // The record at the target may be long.
        Recovery::Lsn(lsn) if inclusive && *lsn < end => wal.past_record(*lsn, end).await?,
        _ if last == end => end,
        _ => end.min(last.advance(RECORD)),
    };
    let mut walk = Walk { recovery, inclusive, last, way: Way::default(), end: None, late: None };
    let broken = wal.scan(plan.backup.start_lsn, to, &mut |found| walk.see(found)).await?;
    walk.done(broken)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(lsn: u64, landmark: Landmark) -> Found {
        // A record begins at each multiple of ten.
        let (lsn, end, prev) = (Lsn::new(lsn), Lsn::new(lsn + 50), Lsn::new(lsn - 10));
        Found { lsn, end, prev, landmark, of_prepared: false }
    }
    fn commit(lsn: u64, unix_micros: i64) -> Found {
        found(lsn, Landmark::Commit { xid: 700, unix_micros })
    }
    fn made(lsn: u64, oid: u32) -> Found {
        found(lsn, Landmark::TablespaceCreated { oid, path: b"/live".to_vec() })
    }
    fn way(recovery: &Recovery, last: u64, all: &[Found]) -> Way {
        way_to((recovery, true), last, all)
    }
    fn way_to((recovery, inclusive): (&Recovery, bool), last: u64, all: &[Found]) -> Way {
        let last = Lsn::new(last);
        let mut walk =
            Walk { recovery, inclusive, last, way: Way::default(), end: None, late: None };
        let _ = all.iter().any(|found| walk.see(found.clone()));
        walk.done(None).unwrap()
    }

    #[test]
    fn only_what_is_replayed_counts() {
        let all = [made(10, 1), commit(20, 100), made(30, 2), commit(40, 300), made(50, 3)];
        let oids = |recovery, last| {
            let way = way(&recovery, last, &all);
            way.made.iter().map(|made| made.oid).collect::<Vec<_>>()
        };
        assert_eq!(oids(Recovery::Lsn(Lsn::new(30)), 30), [1, 2]);
        assert_eq!(oids(Recovery::Time(200), 1000), [1, 2]);
        assert_eq!(oids(Recovery::Time(50), 1000), [1]);
        assert_eq!(oids(Recovery::Xid(700), 1000), [1]);
        assert_eq!(oids(Recovery::Immediate, 15), [1]);
        assert_eq!(oids(Recovery::End, 1000), [1, 2, 3]);
    }

    /// Observed with PostgreSQL: it replayed CREATE TABLESPACE although the target lay behind the start of the record before.
    #[test]
    fn an_inclusive_lsn_between_two_records_ends_after_the_next_one() {
        let all = [made(10, 1), made(20, 2), made(30, 3)];
        let oids = |lsn, inclusive| {
            let way = way_to((&Recovery::Lsn(Lsn::new(lsn)), inclusive), lsn, &all);
            way.made.iter().map(|made| made.oid).collect::<Vec<_>>()
        };
        for (lsn, expected) in [(9, vec![1]), (10, vec![1]), (11, vec![1, 2]), (20, vec![1, 2])] {
            assert_eq!(oids(lsn, true), expected, "{lsn}");
        }
        assert_eq!(oids(11, false), [1]);
        assert_eq!(oids(29, true), [1, 2, 3]);
    }

    #[test]
    fn what_is_prepared_at_the_end_is_known_from_the_backup_and_from_wal() {
        let prepared = |lsn, xid, name: &str| {
            let name = name.to_owned();
            found(lsn, Landmark::Prepared(Prepared { xid, name }))
        };
        let ended = |lsn, xid| {
            let landmark = Landmark::Commit { xid, unix_micros: 100 };
            Found { of_prepared: true, ..found(lsn, landmark) }
        };
        let all = [prepared(10, 5, "a"), prepared(20, 6, "b"), ended(30, 5), ended(40, 3)];
        let old = [3, 4].map(|xid| Prepared { xid, name: format!("old {xid}") });
        let named = |recovery: Recovery, last, inclusive| {
            let way = way_to((&recovery, inclusive), last, &all);
            way.left_prepared(&old).unwrap_or_default()
        };
        let has = |text: &str, expected: &[&str]| {
            for name in ["\"a\"", "\"b\"", "old 3", "old 4"] {
                assert_eq!(text.contains(name), expected.contains(&name), "{name}: {text}");
            }
        };
        has(&named(Recovery::End, 1000, true), &["\"b\"", "old 4"]);
        has(&named(Recovery::Lsn(Lsn::new(30)), 30, true), &["\"b\"", "old 3", "old 4"]);
        has(&named(Recovery::Lsn(Lsn::new(30)), 30, false), &["\"a\"", "\"b\"", "old 3", "old 4"]);
        has(&named(Recovery::Xid(5), 1000, true), &["\"b\"", "old 3", "old 4"]);
        has(&named(Recovery::Xid(5), 1000, false), &["\"a\"", "\"b\"", "old 3", "old 4"]);
        has(&named(Recovery::Time(50), 1000, true), &["\"a\"", "\"b\"", "old 3", "old 4"]);
        // The target is exactly the time of the transactions that end there.
        has(&named(Recovery::Time(100), 1000, true), &["\"b\"", "old 4"]);
        has(&named(Recovery::Time(100), 1000, false), &["\"a\"", "\"b\"", "old 3", "old 4"]);
        assert_eq!(Way::default().left_prepared(&[]), None);
    }

    #[test]
    fn commit_times_that_go_back_are_told_when_they_leave_something_out() {
        let all =
            [commit(20, 100), commit(30, 3600), commit(40, 120), commit(50, 130), commit(60, 200)];
        let notes = way(&Recovery::Time(150), 1000, &all).notes;
        assert!(notes[0].contains("0/1E") && notes[0].contains("and 2 later ones"), "{notes:?}");
        assert!(notes[0].contains("--target-lsn 0/32"), "{notes:?}");
        assert!(way(&Recovery::Time(4000), 1000, &all).notes.is_empty());
        assert!(way(&Recovery::Time(110), 1000, &all).notes.is_empty());
        assert!(
            way(&Recovery::Time(150), 1000, &[commit(20, 100), commit(30, 160)]).notes.is_empty()
        );
    }

    #[test]
    fn a_break_on_the_way_is_refused_and_one_behind_it_is_not() {
        let of = |at: u64, recovery: &Recovery, last: u64, all: &[Found]| {
            let mut walk = Walk {
                recovery,
                inclusive: true,
                last: Lsn::new(last),
                way: Way::default(),
                end: None,
                late: None,
            };
            let _ = all.iter().any(|found| walk.see(found.clone()));
            walk.done(Some(Break { at: Lsn::new(at), why: "zeros", to: Lsn::new(999) })).is_ok()
        };
        assert!(!of(500, &Recovery::End, 1000, &[]));
        assert!(!of(500, &Recovery::Lsn(Lsn::new(500)), 500, &[]));
        assert!(of(500, &Recovery::Lsn(Lsn::new(499)), 499, &[]));
        assert!(of(500, &Recovery::Time(150), 1000, &[commit(20, 160)]));
    }
}
