//! The histories of a cluster, and which of them its name refers to (P11): `<cluster>/generations.json` in both tiers,
//! in the format of `record.rs`. Pure.
//!
//! - Each generation is a complete cluster of its own in both tiers: the first in `<cluster>`, each further one in
//!   `<cluster>@<number>`. Without a record there is only the first.
//! - Numbers are never used twice. Exactly one generation is current, and only a person changes which.
//! - An undecided generation or a refused history is never forgotten by time or a restart. A refused one has a number,
//!   too, so that a person can decide about it in the same way, although none of its WAL is stored (`stranger`).
//! - Two records of one cluster are merged if one continues the other, which means that it has all generations and all
//!   decisions of the other. Otherwise both are shown to a person (`Apart`), and no decision is lost.

use crate::{layout::ClusterName, record::Unknown};
use klio_pg::{Lsn, TimelineId};
use serde::{Deserialize, Serialize};

mod stranger;

pub use stranger::{Left, Stranger};

/// The largest number of undecided generations and refused histories at the same time. More are caused by a machine that
/// makes copies, not by a person's mistake.
pub const UNDECIDED_MAX: usize = 8;
/// The largest number of unproven positions that are recorded; the oldest are dropped.
const REMEMBERED_MAX: usize = 32;

/// The state of a history, as a person decided it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// The cluster's name refers to it.
    Current,
    /// Its WAL is received and stored; nobody has decided yet what it is.
    Undecided,
    /// The cluster's name referred to it earlier. It can still be restored, and receives no more WAL.
    Older,
    /// A person said that it is not this cluster. It receives no more WAL.
    Retired,
    /// Not received, because of the settings; nobody has decided yet.
    Refused,
}

impl State {
    /// The word shown to people.
    pub const fn word(self) -> &'static str {
        match self {
            State::Current => "current",
            State::Undecided => "undecided",
            State::Older => "older",
            State::Retired => "retired",
            State::Refused => "refused",
        }
    }

    /// Whether a PostgreSQL may stream to it.
    pub const fn is_open(self) -> bool {
        matches!(self, State::Current | State::Undecided)
    }
}

/// One history of a cluster.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Generation {
    /// From 1, in the order in which they were found.
    pub number: u32,
    pub state: State,
    /// When it was found, Unix seconds; 0 for the first.
    pub since_unix: f64,
    /// The system identifier as a decimal string, because JSON numbers lose its last digits. Empty if it is not known.
    pub system_identifier: String,
    /// Why it is a separate history: where the histories diverge, and both sides. Empty for the first. It never changes,
    /// because it tells two histories with the same number apart.
    pub reason: String,
    /// The same for the PostgreSQL that streams into it, if that is another one than the one for which it was begun;
    /// empty otherwise.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason_of_stream: String,
    /// Whether its WAL was ever received: there is no WAL of a refused one.
    #[serde(default = "yes")]
    pub taken: bool,
    /// Where it left the WAL that was held, of a history that was refused; `None` if that was not seen, or by an earlier
    /// version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left: Option<Left>,
    /// Who decided last; empty if nobody has.
    pub decided_by: String,
    /// When that was, Unix seconds.
    pub decided_unix: f64,
    /// Fields that a newer version wrote.
    #[serde(flatten)]
    pub unknown: Unknown,
}

impl Generation {
    /// Whether both describe the same history: a server that did not know the first one may have given its number to
    /// another.
    fn is_same_history(&self, other: &Self) -> bool {
        let [one, two] = [self, other].map(|g| (g.reason.as_str(), g.system_identifier.as_str()));
        one == two && (self.since_unix - other.since_unix).abs() < 1.0
    }

    /// Why it is a separate history, for people.
    pub fn why(&self) -> &str {
        if self.reason_of_stream.is_empty() { &self.reason } else { &self.reason_of_stream }
    }

    /// Whether it belongs to this PostgreSQL, as far as is known.
    pub fn is_of(&self, system_identifier: u64) -> bool {
        self.system_identifier.is_empty() || self.system_identifier == system_identifier.to_string()
    }
}

/// A decision of a person.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Decided {
    /// The generation that was decided about.
    pub number: u32,
    /// The new state.
    pub state: State,
    /// The name of whoever decided.
    pub by: String,
    /// Unix seconds.
    pub at_unix: f64,
    /// Fields that a newer version wrote.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// Two records of one cluster, neither of which continues the other.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected one record to continue the other, found that {0}")]
pub struct Apart(String);

/// A position where nothing proved that new WAL continues the old.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Unproven {
    pub generation: u32,
    pub timeline: TimelineId,
    /// Where the new WAL begins.
    pub at: Lsn,
    /// Why nothing could be compared.
    pub reason: String,
    /// Unix seconds.
    pub recorded_unix: f64,
    /// Fields that a newer version wrote.
    #[serde(flatten)]
    pub unknown: Unknown,
}

const fn yes() -> bool {
    true
}

/// Everything that is recorded about the histories of one cluster.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Generations {
    /// Grows with each change: the record with the higher version is the later one.
    #[serde(default)]
    pub version: u64,
    /// All generations, oldest first; empty while there is only the first.
    #[serde(default)]
    pub generations: Vec<Generation>,
    /// Newest last.
    #[serde(default)]
    pub unproven: Vec<Unproven>,
    /// Every decision, oldest first. Older versions did not record any.
    #[serde(default)]
    pub decisions: Vec<Decided>,
    /// Fields that a newer version wrote.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// Why a change was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// There is no such number.
    #[error("expected one of generations {known}, found {found}")]
    Unknown { known: String, found: u32 },
    /// Too many at the same time.
    #[error(
        "expected at most {UNDECIDED_MAX} undecided generations, found that many: decide about them first"
    )]
    TooMany,
    /// The cluster's name refers to it.
    #[error("generation {0} is the current one: follow another one first")]
    IsCurrent(u32),
    /// Another decision was made since the person looked.
    #[error(
        "expected generation {expected} to be the current one still, found {found}: somebody else has just decided; look again before you decide"
    )]
    Moved { expected: u32, found: u32 },
    /// It has that state already.
    #[error("generation {0} is {1} already")]
    Already(u32, &'static str),
}

impl Generations {
    /// Every generation, including the first one if it was never recorded.
    pub fn all(&self) -> Vec<Generation> {
        if self.generations.is_empty() { vec![first()] } else { self.generations.clone() }
    }

    /// The number of the generation that the cluster's name refers to.
    pub fn current(&self) -> u32 {
        self.generations.iter().find(|g| g.state == State::Current).map_or(1, |g| g.number)
    }

    pub fn get(&self, number: u32) -> Option<Generation> {
        self.all().into_iter().find(|g| g.number == number)
    }

    /// The generations in the order in which a PostgreSQL looks for the one that it continues: first those that it may
    /// stream to, then the others, newest first.
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

    /// The generations that nobody has decided about.
    pub fn undecided(&self) -> impl Iterator<Item = &Generation> {
        self.generations.iter().filter(|g| matches!(g.state, State::Undecided | State::Refused))
    }

    /// Whether a person has to decide something.
    pub fn is_undecided(&self) -> bool {
        self.undecided().next().is_some()
    }

    /// Resolves a name to a directory: `<name>@<number>` is that generation, a plain name the current one.
    ///
    /// # Errors
    /// `Unknown`.
    pub fn resolve(&self, named: &ClusterName) -> Result<ClusterName, Refusal> {
        let number = named.number().unwrap_or_else(|| self.current());
        match self.get(number) {
            Some(_) => Ok(Self::place(named, number)),
            None => Err(self.unknown(number)),
        }
    }

    fn unknown(&self, found: u32) -> Refusal {
        let known: Vec<String> = self.all().iter().map(|g| g.number.to_string()).collect();
        Refusal::Unknown { known: known.join(", "), found }
    }

    /// The directory and key prefix of a generation.
    pub fn place(cluster: &ClusterName, number: u32) -> ClusterName {
        cluster.with_generation(number)
    }

    /// Adds a generation for a new history: undecided if its WAL is `taken`, otherwise refused. A history that was
    /// refused before keeps its number, and a person's decision about it stays valid.
    ///
    /// # Errors
    /// `TooMany`.
    pub fn begin(
        &mut self,
        found: Stranger,
        now_unix: f64,
        taken: bool,
    ) -> Result<Generation, Refusal> {
        if let Some(known) = found.find(&mut self.generations) {
            if known.state == State::Refused {
                known.see(found.left);
                if taken {
                    (known.state, known.taken) = (State::Undecided, true);
                }
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
            system_identifier: found.system_identifier.to_string(),
            reason: found.reason,
            reason_of_stream: String::new(),
            taken,
            left: found.left.filter(|_| !taken),
            decided_by: String::new(),
            decided_unix: 0.0,
            unknown: Unknown::default(),
        };
        self.generations.push(made.clone());
        Ok(made)
    }

    /// The first WAL of an undecided generation comes from a PostgreSQL that is separate for this reason: it may be another
    /// one than the one for which the generation was begun. `false` if that is known.
    pub fn streams(&mut self, number: u32, reason: &str) -> bool {
        let undecided = |g: &&mut Generation| g.number == number && g.state == State::Undecided;
        let Some(found) = self.generations.iter_mut().find(undecided) else { return false };
        if found.why() == reason {
            return false;
        }
        found.reason_of_stream = reason.to_owned();
        true
    }

    /// Makes the cluster's name refer to `number`; the former generation becomes older.
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

    /// Retires `number`: it receives no more WAL, permanently.
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

    /// Records an unproven position. `false` if it was recorded already.
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

    /// Merges both records: the later one, with the unproven positions of both. The result has a higher version than
    /// either if each has something that the other lacks.
    ///
    /// # Errors
    /// When neither continues the other.
    pub fn joined(&self, other: &Self) -> Result<Self, Apart> {
        let (ours, theirs) = (self.lacks(other), other.lacks(self));
        let mut all = match (ours, theirs) {
            (None, None) if other.version > self.version => other.clone(),
            (None, _) => self.clone(),
            (Some(_), None) => other.clone(),
            (Some(ours), Some(theirs)) => {
                return Err(Apart(format!(
                    "the first lacks {ours}, and the second lacks {theirs}"
                )));
            }
        };
        let mut more: Vec<Unproven> =
            self.unproven.iter().chain(&other.unproven).cloned().collect();
        more.sort_by(|a, b| a.recorded_unix.total_cmp(&b.recorded_unix));
        all.unproven.clear();
        for found in more {
            all.note_unproven(found);
        }
        for generation in all.generations.iter_mut().filter(|g| g.reason_of_stream.is_empty()) {
            let known =
                [self, other].into_iter().filter_map(|record| record.get(generation.number));
            let known = known.map(|g| g.reason_of_stream).find(|reason| !reason.is_empty());
            generation.reason_of_stream = known.unwrap_or_default();
        }
        let later = [self, other].into_iter().max_by_key(|record| record.version);
        all.version = later.map_or(0, |later| later.version);
        if later.is_none_or(|later| *later != all) && *self != all && *other != all {
            all.version += 1;
        }
        Ok(all)
    }

    /// What `other` has and this record lacks, in words; `None` if it has everything.
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
                return Some(format!("generation {number} ({})", theirs.why()));
            };
            if !theirs.is_same_history(&ours) {
                return Some(format!("generation {number} as another history ({})", theirs.reason));
            }
            let decided = more.iter().any(|made| made.number == number)
                || ours.state == theirs.state
                || (theirs.state, ours.state) == (State::Refused, State::Undecided)
                // Before decisions were recorded, the later state counted.
                || self.decisions.is_empty() && self.version > other.version
                    && ours.decided_unix > theirs.decided_unix;
            let what = || format!("that generation {number} is {}", theirs.state.word());
            (!decided).then(what)
        })
    }

    fn check(&self, number: u32, wanted: State) -> Result<(), Refusal> {
        match self.get(number) {
            Some(found) if found.state == wanted => Err(Refusal::Already(number, wanted.word())),
            Some(_) => Ok(()),
            None => Err(self.unknown(number)),
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
        reason_of_stream: String::new(),
        taken: true,
        left: None,
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

    fn stranger(reason: &str, system_identifier: u64) -> Stranger {
        Stranger { reason: reason.into(), system_identifier, ..Stranger::default() }
    }

    fn begin(all: &mut Generations, system: u64, taken: bool) -> Result<(u32, State), Refusal> {
        let made = all.begin(stranger("set back", system), 1.0, taken);
        made.map(|made| (made.number, made.state))
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
    fn a_name_is_the_current_generation_and_a_number_is_itself_if_there_is_one() {
        let mut all = Generations::default();
        begin(&mut all, 7, true).unwrap();
        all.follow(2, "ops", 2.0).unwrap();
        for (named, place) in [("main", "main@2"), ("main@1", "main"), ("main@2", "main@2")] {
            let found = all.resolve(&ClusterName::parse_generation(named).unwrap());
            assert_eq!(found.map(String::from), Ok(place.to_owned()), "{named}");
        }
        let none = all.resolve(&ClusterName::parse_generation("main@9").unwrap()).unwrap_err();
        assert_eq!(none.to_string(), "expected one of generations 1, 2, found 9");
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

    /// Regression test: a generation that was begun and got no WAL was given to the next PostgreSQL that differed, and
    /// people read why the first one differs.
    #[test]
    fn people_read_why_the_postgresql_differs_that_streams() {
        let mut all = Generations::default();
        begin(&mut all, 7, true).unwrap();
        let begun = Generations { version: 1, ..all.clone() };
        assert!(!all.streams(2, "set back") && !all.streams(1, "a clone"));
        assert!(all.streams(2, "a clone") && !all.streams(2, "a clone"));
        all.version = 2;
        assert_eq!(all.get(2).unwrap().why(), "a clone");
        // It is the same history for two records, and none of them loses the reason.
        let mut decided = Generations { version: 3, ..begun.clone() };
        decided.retire(2, "ops", 2.0).unwrap();
        for (one, two) in [(&all, &begun), (&begun, &all), (&all, &decided), (&decided, &all)] {
            assert_eq!(one.joined(two).unwrap().get(2).unwrap().why(), "a clone");
        }
        decided.streams(2, "another");
        assert_eq!(decided.get(2).unwrap().why(), "set back", "decided is decided");
    }

    #[test]
    fn a_refused_history_stays_refused_until_a_person_decides() {
        let mut all = Generations::default();
        let upgraded = || Stranger { other_system: true, ..stranger("upgraded", 7) };
        let begin = |all: &mut Generations, taken| {
            all.begin(upgraded(), 1.0, taken).map(|made| (made.number, made.state))
        };
        for _ in 0..20 {
            assert_eq!(begin(&mut all, false), Ok((2, State::Refused)));
        }
        assert!(all.is_undecided());
        all.retire(2, "ops", 2.0).unwrap();
        assert_eq!(begin(&mut all, false), Ok((2, State::Retired)));
        assert_eq!(begin(&mut all, true), Ok((2, State::Retired)), "decided is decided");
        assert!(!all.is_undecided());
        all.follow(2, "ops", 3.0).unwrap();
        assert_eq!(all.get(2).map(|g| (g.state, g.taken)), Some((State::Current, true)));
    }

    fn noted(at: u64) -> Unproven {
        let (timeline, at) = (TimelineId::new(1).unwrap(), Lsn::new(at));
        let (reason, unknown) = ("removed".into(), Unknown::default());
        Unproven { generation: 1, timeline, at, reason, recorded_unix: at.as_u64() as f64, unknown }
    }

    /// Tier 1 was reset to before a decision, or both tiers continued independently.
    #[test]
    fn of_two_records_the_one_that_has_all_of_the_other_counts_and_no_decision_is_lost() {
        let mut old = Generations { version: 1, ..Generations::default() };
        begin(&mut old, 7, true).unwrap();
        let mut later = Generations { version: 2, ..old.clone() };
        later.retire(2, "ann", 9.0).unwrap();
        assert_eq!(old.joined(&later), Ok(later.clone()));
        assert_eq!(later.joined(&old), Ok(later.clone()));
        // Many small changes give a higher version but no decision: the record with the decision still wins.
        let mut stale = Generations { version: 40, ..old.clone() };
        assert!(stale.note_unproven(noted(5)));
        let joined = stale.joined(&later).unwrap();
        assert_eq!((joined.get(2).map(|g| g.state), joined.version), (Some(State::Retired), 41));
        assert_eq!(joined.unproven.len(), 1);
        assert_eq!(joined.joined(&stale), Ok(joined.clone()));
        assert_eq!(joined.joined(&later), Ok(joined));
        // Both decided, differently: a person has to look.
        let mut other = Generations { version: 90, ..old.clone() };
        other.follow(2, "bob", 50.0).unwrap();
        for (one, two) in [(&other, &later), (&later, &other)] {
            let apart = one.joined(two).unwrap_err().to_string();
            assert!(apart.contains("ann's decision") && apart.contains("bob's"), "{apart}");
        }
        // The same number for another history.
        let mut twin = Generations { version: 7, ..Generations::default() };
        twin.begin(stranger("a copy", 8), 1.0, true).unwrap();
        assert!(twin.joined(&old).unwrap_err().to_string().contains("another history"));
        // A generation that was decided about before decisions were recorded.
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
