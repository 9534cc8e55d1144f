//! What happens to a cluster besides crashes: each move by its name, so that one of them can be forced (`make soak MOVES=set-back`).
//!
//! What must stay true: without force each of them happens in some rounds by the round's seed; with force no other one happens.

use rand::{Rng, rngs::StdRng, seq::IndexedRandom};
use std::{fmt, str::FromStr};

/// A move of a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Move {
    /// An earlier state of the primary's volume is put back, and it writes on.
    SetBack,
    /// Two copies of one state are promoted to one number, one after the other.
    Twins,
    /// Tier 1 is lost with all that only it had; a new one begins from the bucket.
    LostTier1,
    /// A tablespace is made after the backup; a drill runs beside the live primary, and a restore has maps for everything.
    Tablespaces,
    /// The cluster's files include a leftover recovery target.
    Included,
    /// The server's clock jumps, with a backup meanwhile.
    Clock,
    /// The cluster's own certificate uploads garbage and lies.
    Hostile,
    /// A restored copy is promoted beside the living primary and streams by mistake.
    Copy,
}

impl Move {
    /// All of them.
    pub const ALL: [Move; 8] = [
        Move::SetBack,
        Move::Twins,
        Move::LostTier1,
        Move::Tablespaces,
        Move::Included,
        Move::Clock,
        Move::Hostile,
        Move::Copy,
    ];

    /// Its name on a command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Move::SetBack => "set-back",
            Move::Twins => "twins",
            Move::LostTier1 => "lost-tier1",
            Move::Tablespaces => "tablespaces",
            Move::Included => "included-target",
            Move::Clock => "clock",
            Move::Hostile => "hostile",
            Move::Copy => "copy",
        }
    }
}

impl fmt::Display for Move {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Move {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|one| one.name() == text);
        let names = || Self::ALL.map(Self::name).join(", ");
        found.ok_or_else(|| format!("moves: expected any of {}, found {text:?}", names()))
    }
}

/// Which moves a round may make.
#[derive(Debug, Clone, Default)]
pub struct Moves {
    forced: Vec<Move>,
}

impl Moves {
    /// These and no others; any when there are none.
    #[must_use]
    pub fn forced(forced: Vec<Move>) -> Self {
        Self { forced }
    }

    /// Whether this one is made now. The generator goes on the same way whatever is forced.
    pub fn decide(&self, rng: &mut StdRng, what: Move, chance: f64) -> bool {
        let by_chance = rng.random_bool(chance);
        if self.forced.is_empty() { by_chance } else { self.forced.contains(&what) }
    }

    /// One of these that is made now, if any.
    pub fn among(&self, rng: &mut StdRng, these: &[Move], chance: f64) -> Option<Move> {
        let now = rng.random_bool(if self.forced.is_empty() { chance } else { 0.5 });
        let forced = |one: &&Move| self.forced.is_empty() || self.forced.contains(one);
        let allowed: Vec<Move> = these.iter().filter(forced).copied().collect();
        let chosen = allowed.choose(rng).copied();
        chosen.filter(|_| now)
    }
}

/// As `make soak` takes it; nothing when nothing is forced.
impl fmt::Display for Moves {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.forced.iter().map(|one| one.name()).collect();
        if names.is_empty() { Ok(()) } else { write!(f, " MOVES={}", names.join(",")) }
    }
}

/// `set-back,clock`.
impl FromStr for Moves {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let names = text.split([',', ' ']).filter(|name| !name.is_empty());
        names.map(str::parse).collect::<Result<_, _>>().map(Self::forced)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn moves_have_names_and_force_keeps_others_away() {
        for one in Move::ALL {
            assert_eq!(one.name().parse::<Move>(), Ok(one));
        }
        assert!("set-backs".parse::<Moves>().is_err());
        let moves: Moves = "clock,hostile".parse().unwrap();
        let mut rng = StdRng::seed_from_u64(1);
        for _ in 0..50 {
            assert!(moves.decide(&mut rng, Move::Clock, 0.0));
            assert!(!moves.decide(&mut rng, Move::Twins, 1.0));
            let chosen = moves.among(&mut rng, &Move::ALL, 0.1);
            assert!(chosen.is_none_or(|one| matches!(one, Move::Clock | Move::Hostile)));
        }
    }
}
