//! Proof that restores are right: rounds of a random workload, random faults, backups at random moments and restores to random
//! targets, each compared with the oracle of [`crate::workload`] and checked with `pg_amcheck` and `pg_checksums`.
//!
//! A round is made from its seed alone, so that it can be run again; what cannot be repeated is how processes interleave.
//! What must stay true: a round panics on any doubt. It ends what it started, in every case.

mod chaos;
mod copy;
mod history;
mod hostile;
mod moves;
mod plan;
mod restore;
mod rig;
mod stock;

pub use moves::{Move, Moves};
pub use plan::{Finding, Plan};
pub use restore::{Map, Restored, Restorer, Source, verify};
pub use rig::{Mapping, Rig};

use history::{Decision, Kept, Older};

use crate::workload::{Oracle, Target};
use klio_pg::Lsn;
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use std::{fmt, path::PathBuf, time::Instant};

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
    let mut kept = None;
    if plan.moves.decide(&mut rng, Move::SetBack, 0.3) && plan.generations > 0 {
        kept = Some(Kept::of_primary(&mut rig, &base).await);
    }
    rig.connect().await;
    let mut older: Vec<Older> = Vec::new();
    let mut number = 0;
    loop {
        let mut load = rig.load(base.clone(), rng.random(), number).await;
        let early = rng.random_bool(0.5);
        if early && decide(&mut rig, &mut rng, &mut report).await == Some(Decision::Retire) {
            load.stop().await;
            break;
        }
        let first = chaos::run(&mut rig, &mut load, &mut rng, plan, &mut report).await;
        if decide(&mut rig, &mut rng, &mut report).await == Some(Decision::Retire) {
            rig.end_copy(&mut rng, &mut report).await;
            load.stop().await;
            break;
        }
        rig.end_copy(&mut rng, &mut report).await;
        let lost = rng.random_bool(0.5);
        let oracle = rig.end(load, lost).await;
        report.transactions += oracle.transactions.len();
        if std::mem::take(&mut rig.drilled) {
            rig.check_primary(&oracle).await;
        }
        let more = number < plan.generations && plan.restores > 0;
        let twins = kept.is_none() && more && plan.moves.decide(&mut rng, Move::Twins, 0.15);
        let found = restores(&mut rig, &oracle, first, twins, &mut rng, plan, &mut report).await;
        history::require_decided(&rig.site).await;
        let goes_on = rng.random_bool(0.3) || twins;
        if !more {
            break;
        }
        number += 1;
        match (kept.take(), found) {
            (Some(kept), found) => {
                if let Some(mut found) = found {
                    found.restored.stop().await;
                }
                let end = rig.reach().await.flushed;
                older.push(Older { generation: rig.generation(), oracle, first, end });
                report.faults.push(Move::SetBack.to_string());
                base = rig.set_back(kept).await;
                report.restores.push("-- is set back --".to_owned());
            }
            (None, Some(found)) if goes_on && found.in_place => {
                base = rig.go_on(found.restored).await;
                if let Some(directory) = found.twin {
                    report.faults.push(Move::Twins.to_string());
                    kept = Some(Kept::twin(directory, base.clone()));
                }
                rig.connect().await;
                report.restores.push("-- goes on --".to_owned());
            }
            _ => break,
        }
    }
    // What came after a history took nothing from it. Nothing runs any more whose tablespaces are at the same places.
    for one in &older {
        report.restores.extend(one.require(&mut rig, &mut rng).await);
    }
    report.seconds = begun.elapsed().as_secs_f64();
    report
}

/// A person decides about a history that waits for it, if there is one.
async fn decide(rig: &mut Rig, rng: &mut StdRng, report: &mut Report) -> Option<Decision> {
    let decision = if rng.random_bool(0.7) { Decision::Follow } else { Decision::Retire };
    rig.undecided?;
    rig.decide(decision).await;
    report.faults.push(format!("{decision:?}"));
    Some(decision)
}

/// A restored cluster that runs.
struct Found {
    restored: restore::Restored,
    /// Its tablespaces are where the primary's were, so it can take its place.
    in_place: bool,
    twin: Option<PathBuf>,
}

/// Restores to several targets, the last from the server if there is still one; returns the last one, running.
async fn restores(
    rig: &mut Rig,
    oracle: &Oracle,
    first: Lsn,
    twins: bool,
    rng: &mut StdRng,
    plan: &Plan,
    report: &mut Report,
) -> Option<Found> {
    let reach = rig.reach().await;
    let mut newest: Option<Found> = None;
    for number in 0..plan.restores {
        let source = match rng.random_range(0..100) {
            // The last one may go on, so it comes from where a primary would.
            _ if number + 1 == plan.restores => Source::Server,
            0..45 => Source::Bucket,
            45..60 if rig.stock() => Source::Stock,
            _ => Source::Server,
        };
        let end = match source {
            Source::Server => reach.flushed,
            Source::Bucket | Source::Stock => reach.archived,
        };
        let targets = targets(oracle, first, end, source == Source::Server, rng);
        let Some((target, position)) = targets.choose(rng).cloned() else { continue };
        let twin = twins && number + 1 == plan.restores;
        let mapped = plan.moves.decide(rng, Move::Tablespaces, 0.1) && rng.random_bool(0.7);
        let mapping = match rng.random_bool(0.3) {
            _ if source == Source::Stock => Mapping::None,
            _ if mapped && !twin => Mapping::All,
            true => Mapping::Movable,
            false => Mapping::None,
        };
        let delta = source != Source::Stock && mapping != Mapping::All && rng.random_bool(0.4);
        let mut previous = newest.take();
        let delta =
            if delta { previous.take_if(|old| old.in_place).map(|old| old.restored) } else { None };
        // Their tablespaces lie at the same places, so the old one ends before the new one is written.
        if let Some(old) = &mut previous {
            old.restored.stop().await;
        }
        let what = format!(
            "{target:?} {source:?}{}{}",
            if delta.is_some() { " delta" } else { "" },
            if mapping == Mapping::All { " mapped" } else { "" }
        );
        let what = what.replace("Target::", "");
        eprintln!("  restore {what}");
        let before = (mapping == Mapping::All).then(|| rig.state_of_places());
        let (mut restored, twin) =
            rig.restore(&target, position, source, delta, mapping, twin).await;
        verify(&mut restored, oracle, &target, &what).await;
        if let Some(before) = before {
            assert!(rig.state_of_places() == before, "{what} touched a place that it was to leave");
        }
        report.restores.push(what);
        newest = Some(Found { restored, in_place: mapping != Mapping::All, twin });
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
