//! What `--target-*` says, and what PostgreSQL is told: between the two, WAL is asked.
//!
//! PostgreSQL stops at a time only before a commit or an abort that is later, and ends with FATAL when there
//! is none (`recoveryStopsBefore`, `xlogrecovery.c`). So a time is looked up first, and refused with the last
//! one that can be reached, before anything is touched. A time after the last commit is that commit's
//! state when the server says that PostgreSQL had written no more until then; then the last record is
//! the target; a time so fresh that this is not certain is waited for. All times are in PostgreSQL's clock, a standby's backups included: what its clock said is
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

/// `recovery_target_*` of the restored cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Recovery {
    /// None: to the end of WAL, which any break would be (P7).
    End,
    /// `recovery_target = 'immediate'`
    Immediate,
    /// `recovery_target_time`, microseconds since 1970.
    Time(i64),
    /// `recovery_target_lsn`
    Lsn(Lsn),
    /// `recovery_target_name`
    Name(String),
    /// `recovery_target_xid`
    Xid(u32),
}

/// What was asked for.
#[derive(Debug, Clone)]
pub struct Wish {
    /// Where to end.
    pub target: Target,
    /// Along which timeline.
    pub timeline: TimelineChoice,
    /// Somebody said which timeline: a moment of another one is not meant.
    pub timeline_typed: bool,
    /// Before the target, not behind it: `recovery_target_inclusive = off`.
    pub exclusive: bool,
    /// Of a transaction target, as `pg_current_xact_id()` counts; `None` where the epoch was not said.
    pub full_xid: Option<u64>,
    /// From which backup.
    pub backup: Option<BackupName>,
    /// The end of WAL has to be a target (P7), so that a break in WAL is none: always, but for what goes on as a standby.
    pub stop_at_end: bool,
}

/// What will be done.
#[derive(Debug, Clone)]
pub struct Decision {
    /// Backup and way.
    pub plan: Plan,
    /// PostgreSQL's part.
    pub recovery: Recovery,
    /// Whether what is at the target belongs to the result.
    pub inclusive: bool,
    /// What the reader should know.
    pub notes: Vec<String>,
}

/// Text for a refusal: nothing was touched.
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

/// What comes of a wish.
#[derive(Debug)]
pub enum Verdict {
    /// This.
    Decided(Box<Decision>),
    /// Nothing yet: whether PostgreSQL wrote more before the target is not certain for so long.
    Wait(Duration),
}

/// PostgreSQL is silent for up to wal_sender_timeout (60 s) before a dead connection to it is noticed; until then
/// the server may take it for idle. Also covers clocks that differ a little.
const SURE_AFTER: Duration = Duration::from_secs(75);

/// The server has not heard everything that PostgreSQL wrote, or nobody streams to it.
const MAY_COME: &str = "klio status shows whether klio stream is connected and how far behind it is: what is still on its way can be \
                        reached when it has come; nothing was touched";

/// Decides.
pub struct Decider<'a> {
    /// Where WAL is read.
    pub source: &'a Source,
    /// What there is.
    pub survey: &'a Survey,
    /// For fetched WAL.
    pub scratch: &'a Scratch,
}

impl Decider<'_> {
    /// From a wish to a decision.
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

    /// The end of what a plan reaches, its last record above all.
    async fn end_of(&self, plan: &Plan) -> Result<Tail, Error> {
        self.wal(plan).tail(plan.backup.start_lsn, plan.reach.end).await
    }

    /// What is before a record is reached in front of it, and at the end of WAL behind the last one.
    async fn lsn(&self, plans: Vec<Plan>, wanted: Lsn, exclusive: bool) -> Result<Decision, Error> {
        let decided = self.first(plans, Recovery::Lsn(wanted))?;
        let tail = self.end_of(&decided.plan).await?;
        if tail.last_record.is_some_and(|last| wanted <= last) {
            return Ok(Decision { inclusive: !exclusive, ..decided });
        }
        // PostgreSQL stops after a record that begins there or later, and none does.
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
                // Whoever names a timeline needs nothing of the others, and is told what is not known.
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
                    "no transaction ended after the target: the end of WAL is the state at that time"
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
                "no transaction after backup {} can be reached, which ended at {}",
                plan.backup.name,
                show_time((plan.backup.stopped_postgres_unix * 1e6) as i64)
            ),
        };
        let problem =
            format!("{} cannot be reached: {reached}, in PostgreSQL's clock", show_time(wanted));
        let (problem, hole) = match &plan.reach.stop {
            Stop::Hole(hole) => (format!("{problem}; {hole}"), Some(hole.clone())),
            Stop::End { .. } => (problem, None),
        };
        let in_flight = hole.is_none() && idle_until.is_none();
        let refused = refused(&self.survey.refusal(problem, hole));
        Err(if in_flight { refused.hint(MAY_COME) } else { refused })
    }

    /// Searches WAL from the newest backup on, then before it.
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
                // Before this backup is consistent: an older one has to replay it.
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

/// The last record as a target; one from before the backup's end is where it becomes consistent.
fn end_as_target(plan: &Plan, tail: &Tail) -> Recovery {
    match tail.last_record.filter(|last| *last >= plan.backup.stop_lsn) {
        Some(last) => Recovery::Lsn(last),
        None => Recovery::Immediate,
    }
}

/// Whether a transaction with its epoch is one that WAL behind a backup can hold: PostgreSQL keeps ids within two billions
/// of the next one, which the backup's pg_control tells.
///
/// # Errors
/// The id belongs to another epoch.
pub fn check_epoch(full_xid: u64, next_xid: u64) -> Result<(), Error> {
    const WINDOW: u64 = 1 << 31;
    if full_xid.abs_diff(next_xid) < WINDOW {
        return Ok(());
    }
    let message = format!(
        "transaction {full_xid} (epoch {}) is not in reach of this backup, at which {next_xid} (epoch {}) came next",
        full_xid >> 32,
        next_xid >> 32
    );
    Err(Error::new(Failure::Unreachable, message).hint(
        "--target-xid takes what pg_current_xact_id() gave, or xmin as it is shown in rows, which has no epoch; nothing was touched",
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
