//! Decides what may go. Pure: the same catalogue, policy and time give the same plan.
//!
//! - In doubt it keeps (P6): one unreadable record empties the plan and raises an alarm; a backup of an odd time stays and
//!   takes nobody's place. A clock in doubt, of the server or of a record, raises the alarm and lets nothing go for good; what
//!   tier 2 has still leaves tier 1, since that does not rest on a clock, and one wrong clock must not fill the disk of all.
//! - A backup that is not proven in tier 2 stays in tier 1, and takes no place in tier 2's counts, so that
//!   it pushes out none that is. What tier 1 keeps, tier 2 keeps too.
//! - A backup that cannot be given back whole, not even by both tiers together, as when the bucket that holds it
//!   was taken out of the configuration, counts for no rule, and while there is one nothing goes: it may come back.
//!   Nobody is told to take away a record that tier 2 does not have yet.
//! - A backup that is younger than the minimum age displaces nothing, and stays itself: whoever can take backups cannot
//!   push out the good ones with new ones before a person has had the time to see it (P13).
//! - A time that jumps against what is known is such a doubt, too: a record whose two clocks differ by more than a day
//!   (`clock.rs`), and whatever the server knows of its own clock.
//! - The newest backup without known damage always stays, and so does the newest that is old enough to displace others. A damaged one takes no place from a good one.
//! - Time alone expires little: a recovery window ends at the newest backup that is old enough, not now. When backups stop,
//!   so does expiring, a minimum age later.
//! - WAL goes only below the start of every kept backup that can lead to its timeline, and never what is
//!   newer than the newest backup. LSNs never fall along a path of timelines, so a kept backup needs
//!   nothing below its start on any of them.
//!
//! The plan says what may go; P5 is proven by those who remove, at the moment they do.

mod clock;
mod days;
mod policy;
mod rules;
mod wal;

#[cfg(test)]
mod tests;

pub use clock::TIMES_DIFFER_SECONDS;
pub use policy::{MINIMUM_AGE_SECONDS, Policies, Policy, PolicyPatch};

use super::BackupRecord;
use crate::layout::BackupName;
use klio_pg::{Lsn, SegmentSize, TimelineHistory, TimelineId};
use serde::{Deserialize, Serialize};

/// A backup as the catalogue knows it.
#[derive(Debug, Clone, PartialEq)]
pub struct KnownBackup {
    /// Its record.
    pub record: BackupRecord,
    /// Everything it needs is on tier 1.
    pub tier1: bool,
    /// Everything it needs was proven in tier 2.
    pub tier2: bool,
    /// Every file it needs is on tier 1 or proven in tier 2: the next backup after tier 1 let packs go is of this
    /// kind until its record is in tier 2.
    pub together: bool,
    /// A verification found damage in it that could not be repaired.
    pub damaged: bool,
}

impl KnownBackup {
    /// A tier, or both together, can give it back whole.
    pub const fn is_within_reach(&self) -> bool {
        self.tier1 || self.tier2 || self.together
    }
}

/// A timeline with WAL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownTimeline {
    /// Which.
    pub timeline: TimelineId,
    /// Its ancestors; `None` when its history file is not held or not readable. Timeline 1 has none.
    pub history: Option<TimelineHistory>,
    /// One past the last byte held.
    pub end: Lsn,
}

/// Everything a plan follows from, but the policy and the time.
#[derive(Debug, Clone, PartialEq)]
pub struct Facts {
    /// In any order.
    pub backups: Vec<KnownBackup>,
    /// What could not be read, in words.
    pub problems: Vec<String>,
    /// Why the server's clock cannot be believed, in words.
    pub clock: Vec<String>,
    /// In any order.
    pub timelines: Vec<KnownTimeline>,
    /// Of the WAL.
    pub segment_size: SegmentSize,
    /// There is a bucket. Without one tier 1 keeps what either policy asks for.
    pub has_tier2: bool,
}

/// What may go, and why the rest stays.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RetentionPlan {
    /// The time it was made for, Unix seconds.
    pub as_of_unix: f64,
    /// The policies it follows.
    pub policies: Policies,
    /// There is a bucket.
    pub has_tier2: bool,
    /// Why less may go than the policies let; empty when all is well.
    pub alarms: Vec<String>,
    /// What the alarms hold back. A plan of a server of before has alarms only where they hold all.
    #[serde(default)]
    pub hold: Hold,
    /// Every backup, oldest first.
    pub backups: Vec<BackupPlan>,
    /// Every timeline, ascending.
    pub wal: Vec<WalPlan>,
}

/// How much of a plan a doubt takes away.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Hold {
    /// Nothing: there is no doubt.
    #[default]
    Nothing,
    /// What would go for good. What tier 2 has leaves tier 1 as ever.
    ForGood,
    /// All.
    All,
}

/// What becomes of a backup.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BackupPlan {
    /// Which.
    pub name: BackupName,
    /// When it was committed, Unix seconds.
    pub committed_unix: f64,
    /// Its own copy on tier 1.
    pub tier1: Decision,
    /// In tier 2; without a bucket the same as `tier1`. One that neither keeps is gone.
    pub tier2: Decision,
}

/// What becomes of a backup in a tier.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// It is there now.
    pub present: bool,
    /// It stays, if it is there.
    pub keep: bool,
    /// Why.
    pub reasons: Vec<String>,
}

/// What becomes of a timeline's WAL.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalPlan {
    /// Which.
    pub timeline: TimelineId,
    /// On tier 1: segments that end at or below this may go; `None`: nothing may.
    pub tier1_below: Option<Lsn>,
    /// Why.
    pub tier1_reason: String,
    /// In tier 2 (without a bucket: for good): segments that end at or below this may go.
    pub tier2_below: Option<Lsn>,
    /// Why.
    pub tier2_reason: String,
}

impl RetentionPlan {
    /// Names of the backups that no tier keeps any more.
    pub fn expired(&self) -> Vec<BackupName> {
        let gone = |b: &&BackupPlan| !b.tier1.keep && !b.tier2.keep;
        self.backups.iter().filter(gone).map(|b| b.name.clone()).collect()
    }

    /// Names of the backups that tier 2 keeps and of which tier 1 need not have a copy.
    pub fn evicted(&self) -> Vec<BackupName> {
        let gone = |b: &&BackupPlan| !b.tier1.keep && b.tier2.keep;
        self.backups.iter().filter(gone).map(|b| b.name.clone()).collect()
    }

    /// Nothing may go.
    pub fn is_empty(&self) -> bool {
        let wal = |w: &WalPlan| w.tier1_below.is_none() && w.tier2_below.is_none();
        self.backups.iter().all(|b| b.tier1.keep && b.tier2.keep) && self.wal.iter().all(wal)
    }
}

/// Makes the plan for a moment, in Unix seconds of the server's clock.
pub fn plan(facts: &Facts, policies: &Policies, now_unix: f64) -> RetentionPlan {
    let mut backups: Vec<&KnownBackup> = facts.backups.iter().collect();
    backups.sort_by(|a, b| rules::order(&a.record).total_cmp(&rules::order(&b.record)));
    let (unclear, clocks) = (unclear(facts, &backups), clock_alarms(facts, &backups, now_unix));
    let hold = match (unclear.is_empty(), clocks.is_empty()) {
        (false, _) => Hold::All,
        (true, false) => Hold::ForGood,
        (true, true) => Hold::Nothing,
    };
    let mut decided = rules::decide(&backups, facts, policies, now_unix);
    for (plan, backup) in decided.iter_mut().zip(&backups) {
        let near = hold == Hold::All || !facts.has_tier2 || clock::is_in_doubt(&backup.record);
        if hold > Hold::Nothing {
            stay(&mut plan.tier2);
        }
        if hold > Hold::Nothing && near {
            stay(&mut plan.tier1);
        }
    }
    let horizons =
        || wal::horizons(&backups, &decided, facts, &|b| rules::is_aged(b, policies, now_unix));
    let wal = match hold {
        Hold::Nothing => horizons(),
        Hold::ForGood => wal::only_near(horizons(), facts, IN_DOUBT),
        Hold::All => wal::nothing(facts, IN_DOUBT),
    };
    let alarms = unclear.into_iter().chain(clocks).collect();
    let (policies, has_tier2) = (policies.clone(), facts.has_tier2);
    RetentionPlan { as_of_unix: now_unix, policies, has_tier2, alarms, hold, backups: decided, wal }
}

const IN_DOUBT: &str = "something is in doubt, so nothing goes";

fn stay(decision: &mut Decision) {
    if !decision.keep {
        *decision = Decision { keep: true, reasons: vec![IN_DOUBT.into()], ..*decision };
    }
}

/// Backups that cannot be given back: of which nobody knows whether they are lost or only elsewhere.
fn out_of_reach(facts: &Facts, backups: &[&KnownBackup]) -> Option<String> {
    let lost: Vec<&str> =
        backups.iter().filter(|b| !b.is_within_reach()).map(|b| b.record.name.as_str()).collect();
    let (first, more) = (lost.first()?, lost.len() - 1);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    // With a bucket, every one of them is a backup whose record is still to go there.
    let (why, hint) = match facts.has_tier2 {
        true => (
            "tier 1 lacks a part of it, and tier 2 does not have it",
            "; klio verify says what is missing".to_owned(),
        ),
        false => (
            "tier 1 lacks a part of it, and the configuration has no [tier2]",
            format!(
                "; a backup that is lost for good: take its record out of tier 1, <cluster>/backups/{first}.json"
            ),
        ),
    };
    Some(format!(
        "backup {first}{more}: {why}; nothing is removed meanwhile; hint: put the bucket that holds it back into [tier2]{hint}"
    ))
}

/// P6: what makes a plan impossible.
fn unclear(facts: &Facts, backups: &[&KnownBackup]) -> Vec<String> {
    let unreadable =
        |problem: &String| format!("{problem}; hint: while it cannot be read, nothing is removed");
    facts.problems.iter().map(unreadable).chain(out_of_reach(facts, backups)).collect()
}

/// P6: why no time can be believed.
fn clock_alarms(facts: &Facts, backups: &[&KnownBackup], now_unix: f64) -> Vec<String> {
    let mut alarms = facts.clock.clone();
    alarms.extend(clock::doubts(backups));
    let newest = backups.iter().map(|b| &b.record).rfind(|r| rules::has_time(r));
    // A time that is no number is in doubt as well.
    let behind = |r: &&BackupRecord| {
        now_unix.partial_cmp(&r.committed_unix).is_none_or(std::cmp::Ordering::is_lt)
    };
    if let Some(newest) = newest.filter(behind) {
        alarms.push(format!(
            "the clock says {now_unix:.0}, and backup {} was committed at {:.0}; hint: set the server's clock right; where it was wrong when the backup was committed, klio-server backup redate gives the record the right time",
            newest.name, newest.committed_unix
        ));
    }
    alarms
}
