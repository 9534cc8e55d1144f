//! Decides what may be removed. Pure: the same catalog, policy and time give the same plan.
//!
//! - In doubt it keeps (P6): one unreadable record empties the plan and raises an alarm. A backup with an impossible
//!   time is kept and does not count for any rule. If a clock, of the server or of a record, is in doubt, an alarm is
//!   raised and nothing is removed for good; eviction of what tier 2 has continues, because it does not depend on a
//!   clock, and one wrong clock must not fill the disk that all clusters share.
//! - A backup that is not proven in tier 2 stays in tier 1 and does not count for tier 2's rules, so that it cannot
//!   push out one that is proven. What tier 1 keeps, tier 2 keeps too.
//! - A backup that cannot be restored completely, not even from both tiers together (for example because its bucket was
//!   removed from the configuration), counts for no rule, and while there is one nothing is removed: it may come back.
//!   Nobody is advised to remove a record that tier 2 does not have yet.
//! - A backup younger than the minimum age displaces nothing, and is kept itself: somebody who can take backups cannot
//!   push out the good ones with new ones before a person has had time to notice (P13).
//! - A time that contradicts other facts is such a doubt, too: a record whose two clocks differ by more than a day
//!   (`clock.rs`), and whatever the server knows about its own clock.
//! - The newest backup without known damage is always kept, and so is the newest that is old enough to displace others.
//!   A damaged one never takes the place of a good one.
//! - Time alone expires little: a recovery window ends at the newest backup that is old enough, not now. When backups
//!   stop, expiry stops as well, one minimum age later.
//! - WAL is removed only below the start of every kept backup that can lead to its timeline, and never if it is newer
//!   than the newest backup. LSNs never decrease along a path of timelines, so a kept backup needs nothing below its
//!   start on any of them.
//!
//! The plan says what may be removed; whoever removes it proves P5 at that moment.

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

/// A backup and where it is stored.
#[derive(Debug, Clone, PartialEq)]
pub struct KnownBackup {
    pub record: BackupRecord,
    /// Whether everything it needs is on tier 1.
    pub tier1: bool,
    /// Whether everything it needs was proven in tier 2.
    pub tier2: bool,
    /// Whether every file it needs is on tier 1 or proven in tier 2. After tier 1 has evicted packs, the next backup is
    /// of this kind until its record is in tier 2.
    pub together: bool,
    /// Whether a verification found damage in it that could not be repaired.
    pub damaged: bool,
}

impl KnownBackup {
    /// Whether it can be restored completely, from one tier or from both together.
    pub const fn is_within_reach(&self) -> bool {
        self.tier1 || self.tier2 || self.together
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownTimeline {
    pub timeline: TimelineId,
    /// Its ancestors; `None` when its history file is missing or unreadable. Timeline 1 has none.
    pub history: Option<TimelineHistory>,
    /// One past the last byte of its WAL.
    pub end: Lsn,
}

/// Everything that a plan depends on, apart from the policy and the time.
#[derive(Debug, Clone, PartialEq)]
pub struct Facts {
    /// In any order.
    pub backups: Vec<KnownBackup>,
    /// What could not be read, one sentence each.
    pub problems: Vec<String>,
    /// Why the server's clock cannot be trusted, one sentence each.
    pub clock: Vec<String>,
    /// In any order.
    pub timelines: Vec<KnownTimeline>,
    pub segment_size: SegmentSize,
    /// Whether there is a bucket. Without one, tier 1 keeps what either policy asks for.
    pub has_tier2: bool,
}

/// What may be removed, and why the rest is kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RetentionPlan {
    /// The time for which it was made, Unix seconds.
    pub as_of_unix: f64,
    /// The policies that it follows.
    pub policies: Policies,
    /// Whether there is a bucket.
    pub has_tier2: bool,
    /// Why less may be removed than the policies allow; empty if nothing is in doubt.
    pub alarms: Vec<String>,
    /// How much the alarms hold back. An older server sends alarms only if they hold back everything.
    #[serde(default)]
    pub hold: Hold,
    /// Every backup, oldest first.
    pub backups: Vec<BackupPlan>,
    /// Every timeline, ascending.
    pub wal: Vec<WalPlan>,
}

/// How much of a plan is held back because of a doubt.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Hold {
    /// Nothing: there is no doubt.
    #[default]
    Nothing,
    /// Everything that would be removed for good. WAL and backups in tier 2 are still evicted from tier 1.
    ForGood,
    /// Everything.
    All,
}

/// The decision about a backup.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BackupPlan {
    pub name: BackupName,
    /// When it was committed, Unix seconds.
    pub committed_unix: f64,
    /// The decision about its copy on tier 1.
    pub tier1: Decision,
    /// The decision about its copy in tier 2; without a bucket the same as `tier1`. A backup that neither tier keeps
    /// expires.
    pub tier2: Decision,
}

/// The decision about a backup in one tier.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// Whether it is there now.
    pub present: bool,
    /// Whether it is kept, if it is there.
    pub keep: bool,
    pub reasons: Vec<String>,
}

/// The decision about a timeline's WAL.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalPlan {
    pub timeline: TimelineId,
    /// On tier 1, segments that end at or below this may be removed; `None`: none may.
    pub tier1_below: Option<Lsn>,
    pub tier1_reason: String,
    /// In tier 2 (without a bucket: for good), segments that end at or below this may be removed.
    pub tier2_below: Option<Lsn>,
    pub tier2_reason: String,
}

impl RetentionPlan {
    /// Names of the backups that no tier keeps any longer.
    pub fn expired(&self) -> Vec<BackupName> {
        let gone = |b: &&BackupPlan| !b.tier1.keep && !b.tier2.keep;
        self.backups.iter().filter(gone).map(|b| b.name.clone()).collect()
    }

    /// Names of the backups that tier 2 keeps and tier 1 may evict.
    pub fn evicted(&self) -> Vec<BackupName> {
        let gone = |b: &&BackupPlan| !b.tier1.keep && b.tier2.keep;
        self.backups.iter().filter(gone).map(|b| b.name.clone()).collect()
    }

    /// Whether nothing may be removed.
    pub fn is_empty(&self) -> bool {
        let wal = |w: &WalPlan| w.tier1_below.is_none() && w.tier2_below.is_none();
        self.backups.iter().all(|b| b.tier1.keep && b.tier2.keep) && self.wal.iter().all(wal)
    }
}

/// Makes the plan for a point in time, in Unix seconds of the server's clock.
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

const IN_DOUBT: &str = "something is in doubt, so nothing is removed";

fn stay(decision: &mut Decision) {
    if !decision.keep {
        *decision = Decision { keep: true, reasons: vec![IN_DOUBT.into()], ..*decision };
    }
}

/// The alarm about backups that cannot be restored, if there are any: nobody knows whether they are lost or only stored
/// elsewhere.
fn out_of_reach(facts: &Facts, backups: &[&KnownBackup]) -> Option<String> {
    let lost: Vec<&str> =
        backups.iter().filter(|b| !b.is_within_reach()).map(|b| b.record.name.as_str()).collect();
    let (first, more) = (lost.first()?, lost.len() - 1);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    // With a bucket, each of them is a backup whose record has not been uploaded yet.
    let (why, hint) = match facts.has_tier2 {
        true => (
            "tier 1 lacks a part of it, and tier 2 does not have it",
            "; klio verify shows what is missing".to_owned(),
        ),
        false => (
            "tier 1 lacks a part of it, and the configuration has no [tier2]",
            format!(
                "; for a backup that is lost for good, remove its record from tier 1: <cluster>/backups/{first}.json"
            ),
        ),
    };
    Some(format!(
        "backup {first}{more}: {why}; nothing is removed meanwhile; hint: put the bucket that has the missing part back into [tier2]{hint}"
    ))
}

/// P6: reasons why no plan can be made.
fn unclear(facts: &Facts, backups: &[&KnownBackup]) -> Vec<String> {
    let unreadable =
        |problem: &String| format!("{problem}; hint: while it cannot be read, nothing is removed");
    facts.problems.iter().map(unreadable).chain(out_of_reach(facts, backups)).collect()
}

/// P6: reasons why no time can be trusted.
fn clock_alarms(facts: &Facts, backups: &[&KnownBackup], now_unix: f64) -> Vec<String> {
    let mut alarms = facts.clock.clone();
    alarms.extend(clock::doubts(backups));
    let newest = backups.iter().map(|b| &b.record).rfind(|r| rules::has_time(r));
    // The comparison treats NaN as a doubt as well.
    let behind = |r: &&BackupRecord| {
        now_unix.partial_cmp(&r.committed_unix).is_none_or(std::cmp::Ordering::is_lt)
    };
    if let Some(newest) = newest.filter(behind) {
        alarms.push(format!(
            "the clock says {now_unix:.0}, but backup {} was committed at {:.0}; hint: correct the server's clock; if it was wrong when the backup was committed, correct the record with klio-server backup redate",
            newest.name, newest.committed_unix
        ));
    }
    alarms
}
