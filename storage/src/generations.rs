//! The histories of a cluster, and which of them its name stands for (P11): `<cluster>/generations.json` in both tiers,
//! in the form of `record.rs`. Pure.
//!
//! - Each generation is a complete cluster of its own in both tiers: the first below `<cluster>`, another one below
//!   `<cluster>@<number>`. Without a record there is one, the first.
//! - Numbers are never used twice. Exactly one generation is current; only a person changes which.
//! - What was found once is never forgotten by time or a restart: an undecided generation, a refused history. A refused
//!   one has a number, too, so that a person can decide about it the same way; nothing of it is held.
//! - Two records of one cluster are one when one goes on where the other ends: it has all its generations and all its decisions.
//!   Anything else is shown to a person (`Apart`), and no decision is lost.

use crate::{layout::ClusterName, record::Unknown};
use klio_pg::{Lsn, TimelineId};
use serde::{Deserialize, Serialize};

/// Undecided generations that are received at the same time. More is a machine that makes copies, not a person's mistake.
pub const UNDECIDED_MAX: usize = 8;
/// Places remembered of each kind; the oldest go.
const REMEMBERED_MAX: usize = 32;

/// What a person has decided about a history.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// The name stands for it.
    Current,
    /// Received and kept; nobody has said yet what it is.
    Undecided,
    /// The name stood for it once. It stays restorable, and takes no more WAL.
    Older,
    /// A person said that it is not this cluster. It takes no more WAL.
    Retired,
    /// Not received, because the settings say so; nobody has decided yet.
    Refused,
}

impl State {
    /// The word for people.
    pub const fn word(self) -> &'static str {
        match self {
            State::Current => "current",
            State::Undecided => "undecided",
            State::Older => "older",
            State::Retired => "retired",
            State::Refused => "refused",
        }
    }

    /// Whether a PostgreSQL may stream into it.
    pub const fn is_open(self) -> bool {
        matches!(self, State::Current | State::Undecided)
    }
}

/// One history of a cluster.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Generation {
    /// From 1 up, in the order they were found.
    pub number: u32,
    /// What a person decided.
    pub state: State,
    /// When it was found, Unix seconds; 0 for the first.
    pub since_unix: f64,
    /// Of its PostgreSQL, as a decimal number: JSON numbers lose its last digits. Empty where it is not known.
    pub system_identifier: String,
    /// Why it is one: where the histories part, and both sides. Empty for the first.
    pub reason: String,
    /// Whether its WAL was ever taken: nothing of a refused one is held.
    #[serde(default = "yes")]
    pub taken: bool,
    /// Who decided last; empty when nobody has.
    pub decided_by: String,
    /// When, Unix seconds.
    pub decided_unix: f64,
    /// Of later versions.
    #[serde(flatten)]
    pub unknown: Unknown,
}

impl Generation {
    /// Whether both are of one finding: a number can be given to another one by a server that did not know the first.
    fn is_same_history(&self, other: &Self) -> bool {
        let [one, two] = [self, other].map(|g| (g.reason.as_str(), g.system_identifier.as_str()));
        one == two && (self.since_unix - other.since_unix).abs() < 1.0
    }

    /// Whether it is of this PostgreSQL, as far as is known.
    pub fn is_of(&self, system_identifier: u64) -> bool {
        self.system_identifier.is_empty() || self.system_identifier == system_identifier.to_string()
    }
}

/// A decision of a person.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Decided {
    /// About this generation.
    pub number: u32,
    /// What it became.
    pub state: State,
    /// Who.
    pub by: String,
    /// When, Unix seconds.
    pub at_unix: f64,
    /// Of later versions.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// Two records of one cluster of which neither goes on where the other ends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected one record to go on where the other ends, found that {0}")]
pub struct Apart(String);

/// A place where nothing showed that new WAL continues the old.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Unproven {
    /// In this generation.
    pub generation: u32,
    /// On this timeline.
    pub timeline: TimelineId,
    /// New WAL begins here.
    pub at: Lsn,
    /// Why nothing could be compared.
    pub reason: String,
    /// When, Unix seconds.
    pub recorded_unix: f64,
    /// Of later versions.
    #[serde(flatten)]
    pub unknown: Unknown,
}

const fn yes() -> bool {
    true
}

/// Everything that is known about the histories of one cluster.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Generations {
    /// Grows with each change: of two records the higher one is the later one.
    #[serde(default)]
    pub version: u64,
    /// All of them, oldest first; empty while there is only the first.
    #[serde(default)]
    pub generations: Vec<Generation>,
    /// Newest last.
    #[serde(default)]
    pub unproven: Vec<Unproven>,
    /// Every decision, oldest first. Records of before have none, also where something was decided.
    #[serde(default)]
    pub decisions: Vec<Decided>,
    /// Of later versions.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// Why a change was not made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No such number.
    #[error("expected one of generations {known}, found {found}")]
    Unknown {
        /// What there is.
        known: String,
        /// What was named.
        found: u32,
    },
    /// Too many at once.
    #[error(
        "expected at most {UNDECIDED_MAX} undecided generations, found that many already: decide about them first"
    )]
    TooMany,
    /// The name stands for it.
    #[error("generation {0} is the one the name stands for: follow another one first")]
    IsCurrent(u32),
    /// There is nothing to do.
    #[error("generation {0} is {1} already")]
    Already(u32, &'static str),
}

impl Generations {
    /// Every generation, the first included when it was never written down.
    pub fn all(&self) -> Vec<Generation> {
        if self.generations.is_empty() { vec![first()] } else { self.generations.clone() }
    }

    /// The number the name stands for.
    pub fn current(&self) -> u32 {
        self.generations.iter().find(|g| g.state == State::Current).map_or(1, |g| g.number)
    }

    /// One of them.
    pub fn get(&self, number: u32) -> Option<Generation> {
        self.all().into_iter().find(|g| g.number == number)
    }

    /// In the order in which a PostgreSQL looks for the one it continues: those that may be streamed into, then the others,
    /// newest first.
    pub fn by_rank(&self) -> Vec<Generation> {
        let mut all = self.all();
        all.sort_by_key(|g| {
            let rank = match g.state {
                State::Current => 0,
                State::Undecided => 1,
                State::Older | State::Retired | State::Refused => 2,
            };
            (rank, std::cmp::Reverse(g.number))
        });
        all
    }

    /// Those that nobody has decided about.
    pub fn undecided(&self) -> impl Iterator<Item = &Generation> {
        self.generations.iter().filter(|g| matches!(g.state, State::Undecided | State::Refused))
    }

    /// Whether a person has to decide something.
    pub fn is_undecided(&self) -> bool {
        self.undecided().next().is_some()
    }

    /// The directory and key prefix of a generation.
    pub fn place(cluster: &ClusterName, number: u32) -> ClusterName {
        cluster.generation(number)
    }

    /// A generation for a history that is none of these: undecided when its WAL is `taken`, else refused. One that was
    /// refused before stays the same one, and what a person decided about it holds.
    ///
    /// # Errors
    /// `TooMany`.
    pub fn begin(
        &mut self,
        reason: String,
        system_identifier: u64,
        now_unix: f64,
        taken: bool,
    ) -> Result<Generation, Refusal> {
        let system_identifier = system_identifier.to_string();
        let known = |g: &&mut Generation| !g.taken && g.system_identifier == system_identifier;
        if let Some(known) = self.generations.iter_mut().find(known) {
            if taken && known.state == State::Refused {
                (known.state, known.taken) = (State::Undecided, true);
            }
            return Ok(known.clone());
        }
        if self.undecided().count() >= UNDECIDED_MAX {
            return Err(Refusal::TooMany);
        }
        self.write_down();
        let number = self.generations.iter().map(|g| g.number).max().unwrap_or(1) + 1;
        let made = Generation {
            number,
            state: if taken { State::Undecided } else { State::Refused },
            since_unix: now_unix,
            system_identifier,
            reason,
            taken,
            decided_by: String::new(),
            decided_unix: 0.0,
            unknown: Unknown::default(),
        };
        self.generations.push(made.clone());
        Ok(made)
    }

    /// The name stands for `number` from now on; the former one becomes older.
    ///
    /// # Errors
    /// `Unknown`, `Already`.
    pub fn follow(&mut self, number: u32, by: &str, now_unix: f64) -> Result<(), Refusal> {
        self.check(number, State::Current)?;
        let former = self.current();
        self.decide(former, State::Older, by, now_unix);
        self.decide(number, State::Current, by, now_unix);
        Ok(())
    }

    /// `number` takes no more WAL, for good.
    ///
    /// # Errors
    /// `Unknown`, `IsCurrent`, `Already`.
    pub fn retire(&mut self, number: u32, by: &str, now_unix: f64) -> Result<(), Refusal> {
        self.check(number, State::Retired)?;
        if number == self.current() {
            return Err(Refusal::IsCurrent(number));
        }
        self.decide(number, State::Retired, by, now_unix);
        Ok(())
    }

    /// Remembers a place that could not be proven. `false` when it was known.
    pub fn note_unproven(&mut self, found: Unproven) -> bool {
        let same = |known: &Unproven| {
            (known.generation, known.timeline, known.at)
                == (found.generation, found.timeline, found.at)
        };
        if self.unproven.iter().any(same) {
            return false;
        }
        self.unproven.push(found);
        let over = self.unproven.len().saturating_sub(REMEMBERED_MAX);
        self.unproven.drain(..over);
        true
    }

    /// The two as one: the later one, with the unproven places of both. `Ok` is later than either where both have something
    /// that the other lacks.
    ///
    /// # Errors
    /// Where neither has all of the other.
    pub fn joined(&self, other: &Self) -> Result<Self, Apart> {
        let (ours, theirs) = (self.lacks(other), other.lacks(self));
        let mut all = match (ours, theirs) {
            (None, None) if other.version > self.version => other.clone(),
            (None, _) => self.clone(),
            (Some(_), None) => other.clone(),
            (Some(ours), Some(theirs)) => {
                return Err(Apart(format!("the first lacks {ours}, and the second {theirs}")));
            }
        };
        let mut more: Vec<Unproven> =
            self.unproven.iter().chain(&other.unproven).cloned().collect();
        more.sort_by(|a, b| a.recorded_unix.total_cmp(&b.recorded_unix));
        all.unproven.clear();
        for found in more {
            all.note_unproven(found);
        }
        let later = [self, other].into_iter().max_by_key(|record| record.version);
        all.version = later.map_or(0, |later| later.version);
        if later.is_none_or(|later| *later != all) && *self != all && *other != all {
            all.version += 1;
        }
        Ok(all)
    }

    /// What of `other` this one does not have, in words; `None` when it has all of it.
    fn lacks(&self, other: &Self) -> Option<String> {
        let Some(more) = self.decisions.strip_prefix(other.decisions.as_slice()) else {
            let decision = other.decisions.iter().find(|made| !self.decisions.contains(made));
            return Some(decision.map_or("the order of the decisions".to_owned(), |made| {
                let Decided { number, state, by, .. } = made;
                format!("{by}'s decision that generation {number} is {}", state.word())
            }));
        };
        other.generations.iter().find_map(|theirs| {
            let number = theirs.number;
            let Some(ours) = self.get(number) else {
                return Some(format!("generation {number} ({})", theirs.reason));
            };
            if !theirs.is_same_history(&ours) {
                return Some(format!("generation {number} as another history ({})", theirs.reason));
            }
            let decided = more.iter().any(|made| made.number == number)
                || ours.state == theirs.state
                || (theirs.state, ours.state) == (State::Refused, State::Undecided)
                // Before decisions were kept, the later one counted.
                || self.decisions.is_empty() && self.version > other.version
                    && ours.decided_unix > theirs.decided_unix;
            let what = || format!("that generation {number} is {}", theirs.state.word());
            (!decided).then(what)
        })
    }

    fn check(&self, number: u32, wanted: State) -> Result<(), Refusal> {
        let all = self.all();
        match all.iter().find(|g| g.number == number) {
            Some(found) if found.state == wanted => Err(Refusal::Already(number, wanted.word())),
            Some(_) => Ok(()),
            None => {
                let known: Vec<String> = all.iter().map(|g| g.number.to_string()).collect();
                Err(Refusal::Unknown { known: known.join(", "), found: number })
            }
        }
    }

    fn decide(&mut self, number: u32, state: State, by: &str, now_unix: f64) {
        self.write_down();
        if let Some(found) = self.generations.iter_mut().find(|g| g.number == number) {
            found.state = state;
            found.taken |= state == State::Current;
            found.decided_by = by.to_owned();
            found.decided_unix = now_unix;
            let (by, at_unix, unknown) = (by.to_owned(), now_unix, Unknown::default());
            self.decisions.push(Decided { number, state, by, at_unix, unknown });
        }
    }

    fn write_down(&mut self) {
        if self.generations.is_empty() {
            self.generations.push(first());
        }
    }
}

fn first() -> Generation {
    Generation {
        number: 1,
        state: State::Current,
        since_unix: 0.0,
        system_identifier: String::new(),
        reason: String::new(),
        taken: true,
        decided_by: String::new(),
        decided_unix: 0.0,
        unknown: Unknown::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record;
    use proptest::prelude::*;

    fn begin(all: &mut Generations, system: u64, taken: bool) -> Result<(u32, State), Refusal> {
        all.begin("set back".into(), system, 1.0, taken).map(|made| (made.number, made.state))
    }

    #[test]
    fn without_a_record_there_is_the_first_generation() {
        let none = Generations::default();
        assert_eq!((none.current(), none.all().len(), none.is_undecided()), (1, 1, false));
    }

    #[test]
    fn the_name_follows_a_new_generation_and_the_former_stays() {
        let mut all = Generations::default();
        assert_eq!(begin(&mut all, 7, true), Ok((2, State::Undecided)));
        assert_eq!((all.current(), all.is_undecided()), (1, true));
        all.follow(2, "ops", 2.0).unwrap();
        assert_eq!((all.current(), all.is_undecided()), (2, false));
        assert_eq!(all.get(1).map(|g| g.state), Some(State::Older));
        assert!(matches!(all.follow(2, "ops", 3.0), Err(Refusal::Already(2, "current"))));
        assert!(matches!(all.retire(2, "ops", 3.0), Err(Refusal::IsCurrent(2))));
        assert!(matches!(all.follow(9, "ops", 3.0), Err(Refusal::Unknown { .. })));
        all.follow(1, "ops", 4.0).unwrap();
        assert_eq!(all.current(), 1);
    }

    #[test]
    fn undecided_generations_are_bounded() {
        let mut all = Generations::default();
        for number in 2..2 + UNDECIDED_MAX as u32 {
            assert_eq!(begin(&mut all, 7, true), Ok((number, State::Undecided)));
        }
        assert_eq!(begin(&mut all, 7, true), Err(Refusal::TooMany));
        all.retire(3, "ops", 2.0).unwrap();
        let next = 2 + UNDECIDED_MAX as u32;
        assert_eq!(begin(&mut all, 7, true), Ok((next, State::Undecided)), "no number twice");
    }

    #[test]
    fn a_refused_history_stays_refused_until_a_person_decides() {
        let mut all = Generations::default();
        for _ in 0..20 {
            assert_eq!(begin(&mut all, 7, false), Ok((2, State::Refused)));
        }
        assert!(all.is_undecided());
        all.retire(2, "ops", 2.0).unwrap();
        assert_eq!(begin(&mut all, 7, false), Ok((2, State::Retired)));
        assert_eq!(begin(&mut all, 7, true), Ok((2, State::Retired)), "decided is decided");
        assert!(!all.is_undecided());
        all.follow(2, "ops", 3.0).unwrap();
        assert_eq!(all.get(2).map(|g| (g.state, g.taken)), Some((State::Current, true)));
    }

    fn noted(at: u64) -> Unproven {
        let (timeline, at) = (TimelineId::new(1).unwrap(), Lsn::new(at));
        let (reason, unknown) = ("removed".into(), Unknown::default());
        Unproven { generation: 1, timeline, at, reason, recorded_unix: at.as_u64() as f64, unknown }
    }

    /// Tier 1 was set back to before a decision, or both tiers went on apart.
    #[test]
    fn of_two_records_the_one_that_has_all_of_the_other_counts_and_no_decision_is_lost() {
        let mut old = Generations { version: 1, ..Generations::default() };
        begin(&mut old, 7, true).unwrap();
        let mut later = Generations { version: 2, ..old.clone() };
        later.retire(2, "ann", 9.0).unwrap();
        assert_eq!(old.joined(&later), Ok(later.clone()));
        assert_eq!(later.joined(&old), Ok(later.clone()));
        // Many small changes make a higher version, and no decision: it still gives way to the one that has it.
        let mut stale = Generations { version: 40, ..old.clone() };
        assert!(stale.note_unproven(noted(5)));
        let joined = stale.joined(&later).unwrap();
        assert_eq!((joined.get(2).map(|g| g.state), joined.version), (Some(State::Retired), 41));
        assert_eq!(joined.unproven.len(), 1);
        assert_eq!(joined.joined(&stale), Ok(joined.clone()));
        assert_eq!(joined.joined(&later), Ok(joined));
        // Both decided, and not the same: a person has to look.
        let mut other = Generations { version: 90, ..old.clone() };
        other.follow(2, "bob", 50.0).unwrap();
        for (one, two) in [(&other, &later), (&later, &other)] {
            let apart = one.joined(two).unwrap_err().to_string();
            assert!(apart.contains("ann's decision") && apart.contains("bob's"), "{apart}");
        }
        // The same number for another history.
        let mut twin = Generations { version: 7, ..Generations::default() };
        twin.begin("a copy".into(), 8, 1.0, true).unwrap();
        assert!(twin.joined(&old).unwrap_err().to_string().contains("another history"));
        // One that was decided before decisions were kept.
        let before = Generations { decisions: vec![], ..later.clone() };
        assert_eq!(old.joined(&before), Ok(before.clone()));
        assert_eq!(before.joined(&old), Ok(before));
    }

    proptest! {
        #[test]
        fn exactly_one_is_current_whatever_is_decided(steps in prop::collection::vec((0u8..3, 1u32..6), 0..40)) {
            let mut all = Generations::default();
            let current = |all: &Generations| {
                all.all().iter().filter(|g| g.state == State::Current).count()
            };
            for (step, number) in steps {
                let _ = match step {
                    0 => begin(&mut all, 7, number % 2 == 0).map(|_| ()),
                    1 => all.follow(number, "ops", 1.0),
                    _ => all.retire(number, "ops", 1.0),
                };
                prop_assert_eq!(current(&all), 1);
                let numbers: std::collections::BTreeSet<u32> = all.all().iter().map(|g| g.number).collect();
                prop_assert_eq!(numbers.len(), all.all().len());
                let bytes = record::encode(&all, "x").unwrap();
                prop_assert_eq!(record::decode::<Generations>(&bytes, "x").unwrap(), all.clone());
            }
        }
    }
}
