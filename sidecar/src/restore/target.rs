//! From `--target-*` to what PostgreSQL is told to recover to. The decision needs a look at WAL.
//!
//! PostgreSQL stops at a time only before a commit or abort that is later, and ends with FATAL if there is none
//! (`recoveryStopsBefore`, `xlogrecovery.c`). So the time is looked up in WAL before anything is touched, and if it
//! cannot be reached, the restore is refused with the last time that can. A time after the last commit is reached by
//! restoring the state after that commit, with the last record as the target, but only if the server says that
//! PostgreSQL wrote nothing more until that time. If the time is so recent that this is not certain yet, the restore waits.
//!
//! All times are times of PostgreSQL's clock, also for backups that were taken from a standby: what the clock said is
//! checked against the commits before the backup's end.

use super::{
    Scratch, lived, show_time,
    source::Source,
    wal::{Tail, Wal},
};
use crate::error::{Error, Failure};
use klio_pg::{Landmark, Lsn};
use klio_proto::Code;
use klio_storage::{
    catalog::{Plan, Refusal, Stop, Survey, Target, TimelineChoice},
    layout::BackupName,
};
use std::time::Duration;

/// The `recovery_target*` setting of the restored cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Recovery {
    /// No target: to the end of WAL. Used for a standby only, because any break in WAL would look like the end (P7).
    End,
    /// `recovery_target = 'immediate'`
    Immediate,
    /// `recovery_target_time`, in microseconds since 1970.
    Time(i64),
    /// `recovery_target_lsn`
    Lsn(Lsn),
    /// `recovery_target_name`
    Name(String),
    /// `recovery_target_xid`
    Xid(u32),
}

/// What the user asked for.
#[derive(Debug, Clone)]
pub struct Wish {
    /// Where recovery ends.
    pub target: Target,
    /// The timeline to recover along.
    pub timeline: TimelineChoice,
    /// The user named the timeline, so other timelines that lived at the target time are not meant.
    pub timeline_typed: bool,
    /// Stop before the target instead of after it: `recovery_target_inclusive = off`.
    pub exclusive: bool,
    /// For a transaction target: the 64-bit id as `pg_current_xact_id()` returns it; `None` if it was given without its epoch.
    pub full_xid: Option<u64>,
    /// The backup to restore; `None` leaves the choice to the plan.
    pub backup: Option<BackupName>,
    /// Make the end of WAL a target, so that a break in WAL is not taken for the end (P7). False only for a standby.
    pub stop_at_end: bool,
}

/// What will be done.
#[derive(Debug, Clone)]
pub struct Decision {
    /// The backup and the path of timelines.
    pub plan: Plan,
    /// The target for PostgreSQL.
    pub recovery: Recovery,
    /// Whether the record at the target is part of the result.
    pub inclusive: bool,
    /// Notes for the user.
    pub notes: Vec<String>,
}

/// The error for a target that cannot be reached; nothing was touched.
pub fn refused(refusal: &Refusal) -> Error {
    let hint = match &refusal.hole {
        Some(hole) => format!(
            "--target-time or --target-lsn before {} can be reached; nothing was touched",
            hole.from
        ),
        None => "klio list shows what can be recovered; nothing was touched".to_owned(),
    };
    Error::new(Failure::Unreachable, refusal).hint(hint)
}

/// The result of deciding.
#[derive(Debug)]
pub enum Verdict {
    Decided(Box<Decision>),
    /// Not yet decided: this long it will not be certain whether PostgreSQL wrote more before the target.
    Wait(Duration),
}

/// A dead connection to PostgreSQL is noticed only after up to wal_sender_timeout (60 s). Until then the server may
/// take PostgreSQL for idle. The rest is for clocks that differ a little.
const SURE_AFTER: Duration = Duration::from_secs(75);

/// Hint for a server that has not yet received everything that PostgreSQL wrote, or to which nobody streams.
const MAY_COME: &str = "klio status shows whether klio stream is connected and how far behind it is: try again when the missing WAL \
                        has arrived; nothing was touched";

/// Decides how to reach a target.
pub struct Decider<'a> {
    pub source: &'a Source,
    /// The backups and timelines to choose from.
    pub survey: &'a Survey,
    /// Directory for fetched WAL.
    pub scratch: &'a Scratch,
}

impl Decider<'_> {
    /// Decides how to do what the user asked for.
    ///
    /// # Errors
    /// `Unreachable`, with what can be reached; WAL that cannot be read.
    pub async fn decide(&self, wish: &Wish) -> Result<Verdict, Error> {
        let plans = self.survey.plans(&wish.target, wish.timeline, wish.backup.as_ref());
        let plans = plans.map_err(|refusal| refused(&refusal))?;
        let exclusive = wish.exclusive;
        let decided = match &wish.target {
            Target::Latest => self.latest(plans, wish.stop_at_end).await,
            Target::Immediate => self.first(plans, Recovery::Immediate),
            Target::Lsn(lsn) => self.lsn(plans, *lsn, exclusive).await,
            Target::Time { unix_micros } => return self.time(plans, *unix_micros, wish).await,
            Target::Name(name) => {
                let what = format!("a restore point {name:?}");
                self.find(plans, &what, Recovery::Name(name.clone()), &mut |landmark| {
                    matches!(landmark, Landmark::RestorePoint { name: found, .. } if found == name)
                })
                .await
            }
            Target::Xid(wanted) => {
                let what = format!("the end of transaction {wanted}");
                let mut fits = |landmark: &Landmark| matches!(landmark, Landmark::Commit { xid, .. } | Landmark::Abort { xid, .. } if xid == wanted);
                let found = self.find(plans, &what, Recovery::Xid(*wanted), &mut fits).await;
                found.map(|decision| Decision { inclusive: !exclusive, ..decision })
            }
        };
        decided.map(|decision| Verdict::Decided(Box::new(decision)))
    }

    fn wal<'a>(&'a self, plan: &'a Plan) -> Wal<'a> {
        Wal {
            source: self.source,
            scratch: self.scratch,
            path: &plan.path,
            postgres_major: plan.backup.postgres_version / 10_000,
        }
    }

    fn first(&self, plans: Vec<Plan>, recovery: Recovery) -> Result<Decision, Error> {
        let plan = plans.into_iter().next();
        let plan = plan.ok_or_else(|| Error::new(Failure::Code(Code::Internal), "no plan"))?;
        Ok(decision(plan, recovery))
    }

    async fn latest(&self, plans: Vec<Plan>, stop_at_end: bool) -> Result<Decision, Error> {
        let decided = self.first(plans, Recovery::End)?;
        if !stop_at_end {
            return Ok(decided);
        }
        let tail = self.end_of(&decided.plan).await?.whole()?;
        let recovery = end_as_target(&decided.plan, &tail);
        Ok(Decision { recovery, ..decided })
    }

    /// The end of the WAL that a plan reaches; of interest is mostly its last record.
    async fn end_of(&self, plan: &Plan) -> Result<Tail, Error> {
        self.wal(plan).tail(plan.backup.start_lsn, plan.reach.end).await
    }

    /// Decides about an LSN. If no record begins at or after it, the target is the last record.
    async fn lsn(&self, plans: Vec<Plan>, wanted: Lsn, exclusive: bool) -> Result<Decision, Error> {
        let decided = self.first(plans, Recovery::Lsn(wanted))?;
        let tail = self.end_of(&decided.plan).await?;
        if tail.last_record.is_some_and(|last| wanted <= last) {
            return Ok(Decision { inclusive: !exclusive, ..decided });
        }
        // PostgreSQL stops only after a record that begins at the target or later, and there is none.
        let recovery = end_as_target(&decided.plan, &tail.whole()?);
        Ok(Decision { recovery, ..decided })
    }

    async fn time(&self, plans: Vec<Plan>, wanted: i64, wish: &Wish) -> Result<Verdict, Error> {
        let is_behind = |time: i64| time > wanted || (wish.exclusive && time == wanted);
        let mut clock = None;
        for plan in plans {
            let wal = self.wal(&plan);
            let before = wal.tail(plan.backup.start_lsn, plan.backup.stop_lsn).await?.whole()?;
            let before = before.last_ending.and_then(|found| found.landmark.unix_micros());
            if let Some(later) = before.filter(|before| is_behind(*before)) {
                clock.get_or_insert_with(|| {
                    format!(
                        "{} is before the end of backup {}: a transaction in it ended at {}",
                        show_time(wanted),
                        plan.backup.name,
                        show_time(later)
                    )
                });
                continue;
            }
            let elsewhere = lived::elsewhere(self.source, self.scratch, self.survey, &plan, wanted);
            let (lived, unknown) = match elsewhere.await {
                Ok(lived) => (lived, None),
                // A user who named the timeline needs nothing of the others, so this is not an error but a note.
                Err(error) if wish.timeline_typed => (Vec::new(), Some(lived::not_known(&error))),
                Err(error) => return Err(lived::needed(error)),
            };
            let chosen = plan.path.timeline();
            if let Some(only) = lived.iter().find(|other| !other.beside)
                && !wish.timeline_typed
            {
                return Err(only.refusal(chosen, wanted));
            }
            let mut verdict = self.time_with(plan, wanted, wish.exclusive).await?;
            if let Verdict::Decided(decision) = &mut verdict {
                decision.notes.extend(lived.iter().map(|other| other.note(chosen, wanted)));
                decision.notes.extend(unknown);
            }
            return Ok(verdict);
        }
        let problem = clock.unwrap_or_else(|| "no backup ended before the target".to_owned());
        Err(refused(&self.survey.refusal(problem, None)))
    }

    async fn time_with(&self, plan: Plan, wanted: i64, exclusive: bool) -> Result<Verdict, Error> {
        let tail = self.wal(&plan).tail(plan.backup.stop_lsn, plan.reach.end).await?;
        let last = tail.last_ending.as_ref();
        let last = last.and_then(|found| Some((found.landmark.unix_micros()?, found.lsn)));
        if last.is_some_and(|(time, _)| time > wanted || (exclusive && time == wanted)) {
            let inclusive = !exclusive;
            return Ok(decided(Decision { inclusive, ..decision(plan, Recovery::Time(wanted)) }));
        }
        tail.whole()?;
        let exact = last.is_some_and(|(time, _)| time == wanted);
        let idle_until = match &plan.reach.stop {
            Stop::End { idle_until_unix: Some(until) } => Some((until * 1e6) as i64),
            _ => None,
        };
        let idle = idle_until.is_some_and(|until| wanted <= until);
        if exact || idle {
            let sure_from = wanted.saturating_add(SURE_AFTER.as_micros() as i64);
            if let Some(missing) = idle_until.map(|until| sure_from - until).filter(|m| *m > 0)
                && !exact
            {
                return Ok(Verdict::Wait(Duration::from_micros(missing.unsigned_abs())));
            }
            let tail = self.end_of(&plan).await?.whole()?;
            let recovery = end_as_target(&plan, &tail);
            let mut decision = decision(plan, recovery);
            if !exact {
                decision.notes.push(
                    "no transaction ended after the target, so the end of WAL is the state at that time"
                        .to_owned(),
                );
            }
            return Ok(decided(decision));
        }
        let reached = match last {
            Some((time, lsn)) => {
                format!(
                    "the last transaction that can be reached ended at {} ({lsn})",
                    show_time(time)
                )
            }
            None => format!(
                "no transaction after the end of backup {} at {} can be reached",
                plan.backup.name,
                show_time((plan.backup.stopped_postgres_unix * 1e6) as i64)
            ),
        };
        let problem =
            format!("{} cannot be reached: {reached} (by PostgreSQL's clock)", show_time(wanted));
        let (problem, hole) = match &plan.reach.stop {
            Stop::Hole(hole) => (format!("{problem}; {hole}"), Some(hole.clone())),
            Stop::End { .. } => (problem, None),
        };
        let in_flight = hole.is_none() && idle_until.is_none();
        let refused = refused(&self.survey.refusal(problem, hole));
        Err(if in_flight { refused.hint(MAY_COME) } else { refused })
    }

    /// Searches WAL from the newest backup on, then from each older backup up to where the search began before.
    async fn find(
        &self,
        plans: Vec<Plan>,
        what: &str,
        recovery: Recovery,
        fits: &mut dyn FnMut(&Landmark) -> bool,
    ) -> Result<Decision, Error> {
        let mut searched: Option<Lsn> = None;
        let (mut oldest, mut hole) = (None, None);
        for plan in plans {
            let to = searched.map_or(plan.reach.end, |from| from.min(plan.reach.end));
            let from = plan.backup.start_lsn;
            tracing::info!(backup = %plan.backup.name, %from, %to, "searching WAL for {what}");
            let found = self.wal(&plan).find(from, to, &mut |found| fits(&found.landmark)).await?;
            match found {
                Some(found) if found.lsn >= plan.backup.stop_lsn => {
                    let mut decided = decision(plan, recovery);
                    let time = found.landmark.unix_micros().map(show_time);
                    let time = time.map(|time| format!(" of {time}")).unwrap_or_default();
                    decided.notes.push(format!("{what} is at {}{time}", found.lsn));
                    return Ok(decided);
                }
                // The record is before the point where this backup is consistent: only an older backup can replay up to it.
                Some(found) => searched = Some(found.end),
                None => searched = Some(from),
            }
            if let Stop::Hole(at) = &plan.reach.stop {
                hole = Some(at.clone());
            }
            oldest = Some((plan.backup.name.clone(), plan.backup.stop_lsn));
        }
        let from = oldest.map_or_else(String::new, |(name, lsn)| {
            format!(" after {lsn}, where backup {name} ended")
        });
        let mut problem = format!("{what} is not in the WAL that can be reached{from}");
        if let Some(hole) = &hole {
            problem = format!("{problem}; {hole}");
        }
        Err(refused(&self.survey.refusal(problem, hole)))
    }
}

fn decided(decision: Decision) -> Verdict {
    Verdict::Decided(Box::new(decision))
}

fn decision(plan: Plan, recovery: Recovery) -> Decision {
    let notes = plan.notes.clone();
    Decision { plan, recovery, inclusive: true, notes }
}

/// The last record as a target. If it is before the backup's end, the target is the point where the backup is consistent.
fn end_as_target(plan: &Plan, tail: &Tail) -> Recovery {
    match tail.last_record.filter(|last| *last >= plan.backup.stop_lsn) {
        Some(last) => Recovery::Lsn(last),
        None => Recovery::Immediate,
    }
}

/// Whether WAL after a backup can contain this 64-bit transaction id: PostgreSQL only uses ids within two billion of
/// the next one, which is in the backup's pg_control.
///
/// # Errors
/// The id belongs to another epoch.
pub fn check_epoch(full_xid: u64, next_xid: u64) -> Result<(), Error> {
    const WINDOW: u64 = 1 << 31;
    if full_xid.abs_diff(next_xid) < WINDOW {
        return Ok(());
    }
    let message = format!(
        "transaction {full_xid} (epoch {}) is too far from this backup, whose next transaction was {next_xid} (epoch {})",
        full_xid >> 32,
        next_xid >> 32
    );
    Err(Error::new(Failure::Unreachable, message).hint(
        "--target-xid takes an id from pg_current_xact_id(), or a row's xmin, which has no epoch; nothing was touched",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transaction_of_another_epoch_is_refused() {
        const EPOCH: u64 = 1 << 32;
        for (full, next) in
            [(EPOCH + 700, EPOCH + 650), (EPOCH + 3, EPOCH - 5), (2 * EPOCH - 9, 2 * EPOCH)]
        {
            assert!(check_epoch(full, next).is_ok(), "{full} {next}");
        }
        for (full, next) in [(EPOCH + 700, 750), (EPOCH + 700, 2 * EPOCH + 750)] {
            let error = check_epoch(full, next).unwrap_err();
            assert_eq!(error.failure, Failure::Unreachable);
            assert!(error.message.contains("epoch 1"), "{error}");
        }
    }
}
