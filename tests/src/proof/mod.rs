//! Proof that restores are right: rounds of a random workload, random faults, backups at random moments and restores to random
//! targets, each compared with the oracle of [`crate::workload`] and checked with `pg_amcheck` and `pg_checksums`.
//!
//! A round is made from its seed alone, so that it can be run again; what cannot be repeated is how processes interleave.
//! What must stay true: a round panics on any doubt. It ends what it started, in every case.

mod chaos;
mod plan;
mod restore;
mod rig;
mod stock;

pub use plan::{Finding, Plan};
pub use restore::{Restorer, Source, verify};
pub use rig::Rig;

use crate::workload::{Oracle, Target};
use klio_pg::Lsn;
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use std::{fmt, time::Instant};

/// What a round did.
#[derive(Debug, Default)]
pub struct Report {
    /// How it was set up.
    pub setup: String,
    /// Transactions noted.
    pub transactions: usize,
    /// Backups that were finished, and that were not (because something was killed).
    pub backups: (usize, usize),
    /// Faults, in order.
    pub faults: Vec<String>,
    /// Restores, in order.
    pub restores: Vec<String>,
    /// Wall time.
    pub seconds: f64,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:.1} s, {}; {} transactions; backups {}+{} broken off; faults: {}; restores: {}",
            self.seconds,
            self.setup,
            self.transactions,
            self.backups.0,
            self.backups.1,
            if self.faults.is_empty() { "none".to_owned() } else { self.faults.join(" ") },
            self.restores.join(", ")
        )
    }
}

/// One round.
///
/// # Panics
/// When a restore is wrong, refused, or anything else is not as it must be.
pub async fn round(seed: u64, plan: &Plan) -> Report {
    let begun = Instant::now();
    crate::install_crypto();
    let mut rng = StdRng::seed_from_u64(seed);
    let mut report = Report::default();
    let mut rig = Rig::new(&mut rng, plan, seed).await;
    report.setup = rig.describe();
    let mut base = rig.setup().await;
    let mut generation = 0;
    loop {
        let mut load = rig.load(base, rng.random(), generation).await;
        let first = chaos::run(&mut rig, &mut load, &mut rng, plan, &mut report).await;
        let lost = rng.random_bool(0.5);
        let oracle = rig.end(load, lost).await;
        report.transactions += oracle.transactions.len();
        let last = rng.random_bool(0.3) && generation < plan.generations && plan.restores > 0;
        let found = restores(&mut rig, &oracle, first, &mut rng, plan, &mut report).await;
        match found {
            Some(next) if last => {
                base = rig.go_on(next).await;
                generation += 1;
                report.restores.push("-- goes on --".to_owned());
            }
            _ => break,
        }
    }
    report.seconds = begun.elapsed().as_secs_f64();
    report
}

/// Restores to several targets, the last from the server if there is still one; returns the last one, running.
async fn restores(
    rig: &mut Rig,
    oracle: &Oracle,
    first: Lsn,
    rng: &mut StdRng,
    plan: &Plan,
    report: &mut Report,
) -> Option<restore::Restored> {
    let reach = rig.reach().await;
    let mut newest: Option<restore::Restored> = None;
    for number in 0..plan.restores {
        let source = match rng.random_range(0..100) {
            // The last one may go on, so it comes from where a primary would.
            _ if number + 1 == plan.restores => Source::Server,
            0..45 => Source::Bucket,
            45..60 => Source::Stock,
            _ => Source::Server,
        };
        let end = match source {
            Source::Server => reach.flushed,
            Source::Bucket | Source::Stock => reach.archived,
        };
        let targets = targets(oracle, first, end, source == Source::Server, rng);
        let Some((target, position)) = targets.choose(rng).cloned() else { continue };
        let delta = source != Source::Stock && rng.random_bool(0.4);
        let mut previous = newest.take();
        let delta = if delta { previous.take() } else { None };
        // Their tablespaces lie at the same places, so the old one ends before the new one is written.
        if let Some(old) = &mut previous {
            old.stop().await;
        }
        let what = format!("{target:?} {source:?}{}", if delta.is_some() { " delta" } else { "" });
        let what = what.replace("Target::", "");
        eprintln!("  restore {what}");
        let mut restored = rig.restore(&target, position, source, delta, rng).await;
        verify(&mut restored, oracle, &target, &what).await;
        report.restores.push(what);
        newest = Some(restored);
    }
    newest
}

/// Targets that can be reached, one of each kind: behind `first`, with everything they need before `end`.
fn targets(
    oracle: &Oracle,
    first: Lsn,
    end: Lsn,
    latest: bool,
    rng: &mut StdRng,
) -> Vec<(Target, Lsn)> {
    let records = &oracle.records;
    // A record is whole where the next one begins; a few are left out at both ends, because a commit's time is taken a
    // moment before its place in WAL is.
    let from = records.partition_point(|record| record.start <= first) + 40;
    let to = records.partition_point(|record| record.start < end).saturating_sub(4);
    let mut targets = plan::candidates(records, from, to, rng);
    // PostgreSQL was killed before it had finished the segment in which the backup ended, and the bucket gets no other.
    if end < first {
        return Vec::new();
    }
    targets.push((Target::Immediate, end));
    if latest {
        targets.push((Target::Latest, end));
    }
    targets
}
