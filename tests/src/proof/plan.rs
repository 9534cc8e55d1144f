//! How much a round does, and which targets there are.

use super::Moves;
use crate::workload::{Kind, Record, Target};
use klio_pg::Lsn;
use rand::{Rng, rngs::StdRng, seq::IndexedRandom};
use std::time::Duration;

/// How much a round does.
#[derive(Debug, Clone)]
pub struct Plan {
    /// How long the workload runs at least.
    pub load: Duration,
    /// Kill and disturb programs meanwhile.
    pub chaos: bool,
    /// Restores of each generation.
    pub restores: usize,
    /// How often a restored cluster may go on and be restored again, or another history begin.
    pub generations: u32,
    /// Which moves may be made.
    pub moves: Moves,
}

impl Plan {
    /// A round of `make soak`.
    #[must_use]
    pub fn soak() -> Self {
        Self {
            load: Duration::from_secs(6),
            chaos: true,
            restores: 4,
            generations: 2,
            moves: Moves::default(),
        }
    }

    /// The same with these moves and no others.
    #[must_use]
    pub fn with(self, moves: Moves) -> Self {
        Self { moves, ..self }
    }

    /// A round of `make test`.
    #[must_use]
    pub fn test() -> Self {
        Self {
            load: Duration::from_secs(3),
            chaos: true,
            restores: 2,
            generations: 1,
            moves: Moves::default(),
        }
    }
}

/// What a check of a restored cluster found.
pub type Finding = String;

/// Targets of every kind among `records[from..to]`, with their position or an earlier one; an end of a transaction that is later must follow within `to`.
pub fn candidates(
    records: &[Record],
    from: usize,
    to: usize,
    rng: &mut StdRng,
) -> Vec<(Target, Lsn)> {
    let Some(inner) = records.get(from..to).filter(|inner| inner.len() > 60) else {
        return Vec::new();
    };
    let mut targets = Vec::new();
    let ends: Vec<(u32, &str, Lsn)> = inner
        .iter()
        .filter_map(|record| match &record.kind {
            Kind::End { xid, committed: true, time } if *xid > 0 => {
                Some((*xid, time.as_str(), record.start))
            }
            _ => None,
        })
        .collect();
    let latest = ends.iter().map(|(_, time, _)| *time).max().unwrap_or_default();
    let early: Vec<_> = ends.iter().filter(|(_, time, _)| *time < latest).collect();
    if let Some((_, time, start)) = early.choose(rng) {
        // To the microsecond of a commit, or to the millisecond before it.
        let digits = if rng.random_bool(0.7) { 26 } else { 23 };
        let time = format!("{:0<26}", &time[..digits]);
        let earliest = ends.iter().map(|(_, time, _)| *time).min().unwrap_or_default();
        let time = if time.as_str() < earliest { earliest.to_owned() } else { time };
        targets.push((Target::Time(time), *start));
    }
    if let Some((xid, _, start)) = ends.choose(rng) {
        targets.push((Target::Xid(*xid), *start));
        let lsn = if rng.random_bool(0.5) { *start } else { start.advance(1) };
        targets.push((Target::Lsn(lsn), *start));
    }
    let points: Vec<(&String, Lsn)> = inner
        .iter()
        .filter_map(|record| match &record.kind {
            Kind::RestorePoint(name) => Some((name, record.start)),
            _ => None,
        })
        .collect();
    targets.extend(points.choose(rng).map(|(name, start)| (Target::Name((*name).clone()), *start)));
    targets
}
