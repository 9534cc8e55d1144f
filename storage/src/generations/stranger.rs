//! Tells refused histories apart, of which no WAL is stored (P11).
//!
//! - A history is identified by its system identifier, by where it left the WAL that is held, and by a digest of what was
//!   seen of it from there on. Another system identifier identifies it alone.
//! - A decision covers only a history that is proven to be the one that was decided about: its WAL is what was seen then.
//! - While nobody has decided, a history of which nothing proves that it is another one keeps the number.

use super::{Generation, State};
use crate::record::Unknown;
use klio_pg::{Lsn, TimelineId};
use serde::{Deserialize, Serialize};

/// Where a history left the WAL that is held, and what was seen of it from there on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Left {
    /// The generation whose WAL it left.
    pub generation: u32,
    pub timeline: TimelineId,
    /// Where that timeline left its parent; 0/0 without one.
    pub begins: Lsn,
    /// From here up to `at` its WAL is that of the generation.
    pub from: Lsn,
    /// The first page that differs, or the page where its WAL ends.
    pub at: Lsn,
    /// One past what was seen of it from `at` on: whole pages, or else a part of one.
    pub to: Lsn,
    /// The SHA-256 of the digests of those pages, hexadecimal.
    pub digest: String,
    /// Fields that a newer version wrote.
    #[serde(flatten)]
    pub unknown: Unknown,
}

impl Left {
    fn is_at(&self, other: &Self) -> bool {
        let place = |left: &Self| (left.generation, left.timeline, left.begins, left.at);
        place(self) == place(other)
    }

    /// Whether both saw the same WAL.
    fn is(&self, other: &Self) -> bool {
        self.is_at(other) && (self.to, &self.digest) == (other.to, &other.digest)
    }

    /// Whether they cannot be one history: the timeline begins in different places, or one of them has the WAL of the
    /// generation where the other has left it.
    fn is_another(&self, other: &Self) -> bool {
        if self.timeline != other.timeline {
            return false;
        }
        let [first, last] = if self.at <= other.at { [self, other] } else { [other, self] };
        self.begins != other.begins
            || self.generation == other.generation && last.from <= first.at && first.at < last.at
    }
}

/// A PostgreSQL that continues none of the histories that are received.
#[derive(Debug, Clone, Default)]
pub struct Stranger {
    /// Where the histories diverge, and both sides, in words.
    pub reason: String,
    pub system_identifier: u64,
    /// Whether the current generation has another system identifier.
    pub other_system: bool,
    /// Where it left the current generation; `None` if that was not seen.
    pub left: Option<Left>,
    /// Refused histories, by number, and whether its WAL is what was seen of them.
    pub seen: Vec<(u32, bool)>,
}

/// What is known about a stranger and a refused history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Relation {
    Same,
    Another,
    /// Nothing proves either.
    Open,
}

impl Stranger {
    /// Of the refused histories the one that this is; before anybody decided, also one that it may be.
    pub(super) fn find<'a>(&self, all: &'a mut [Generation]) -> Option<&'a mut Generation> {
        let system = self.system_identifier.to_string();
        let rank = |g: &Generation| match self.relation(g) {
            Relation::Same => Some(0),
            Relation::Open if g.state == State::Refused => Some(if self.is_at(g) { 1 } else { 2 }),
            Relation::Open | Relation::Another => None,
        };
        let refused = all.iter_mut().filter(|g| !g.taken && g.system_identifier == system);
        let ranked = refused.filter_map(|g| rank(g).map(|rank| (rank, g)));
        ranked.min_by_key(|(rank, _)| *rank).map(|(_, found)| found)
    }

    fn is_at(&self, known: &Generation) -> bool {
        matches!((&known.left, &self.left), (Some(known), Some(found)) if known.is_at(found))
    }

    fn relation(&self, known: &Generation) -> Relation {
        if let Some((_, same)) = self.seen.iter().find(|(number, _)| *number == known.number) {
            return if *same { Relation::Same } else { Relation::Another };
        }
        match (&known.left, &self.left) {
            (None, None) if self.other_system => Relation::Same,
            (Some(known), Some(found)) if known.is(found) => Relation::Same,
            (Some(known), Some(found)) if known.is_another(found) => Relation::Another,
            _ => Relation::Open,
        }
    }
}

impl Generation {
    /// Takes over what was seen of a refused history, if it is more than what is known.
    pub(super) fn see(&mut self, found: Option<Left>) {
        let Some(found) = found else { return };
        let known = self.left.as_ref();
        if known.is_none_or(|known| known.is_at(&found) && known.to < found.to) {
            self.left = Some(found);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Generations, UNDECIDED_MAX},
        *,
    };
    use crate::record;

    const PAGE: u64 = 8192;

    /// What was seen up to the end of page `to`, or if that is page `at`, of a part of it.
    fn left(from: u64, at: u64, to: u64, digest: &str) -> Option<Left> {
        let end = if to == at { at * PAGE + 100 } else { to * PAGE };
        Some(Left {
            generation: 1,
            timeline: TimelineId::new(1).unwrap(),
            begins: Lsn::ZERO,
            from: Lsn::new(from * PAGE),
            at: Lsn::new(at * PAGE),
            to: Lsn::new(end),
            digest: digest.into(),
            unknown: Unknown::default(),
        })
    }

    fn stranger(left: Option<Left>, seen: &[(u32, bool)]) -> Stranger {
        let (reason, seen) = ("set back".to_owned(), seen.to_vec());
        Stranger { reason, system_identifier: 7, other_system: false, left, seen }
    }

    fn refuse(all: &mut Generations, found: Stranger) -> (u32, State) {
        let made = all.begin(found, 1.0, false).unwrap();
        (made.number, made.state)
    }

    /// Regression test: all refused histories of one system had one number, so the decision about a clone covered the
    /// production that was set back later.
    #[test]
    fn a_decision_about_a_refused_history_covers_no_other() {
        let mut all = Generations::default();
        let clone = || stranger(left(0, 5, 7, "clone"), &[]);
        assert_eq!(refuse(&mut all, clone()), (2, State::Refused));
        all.retire(2, "ops", 2.0).unwrap();
        assert_eq!(refuse(&mut all, clone()), (2, State::Retired), "the same again");
        let grown = stranger(left(0, 5, 9, "clone and more"), &[(2, true)]);
        assert_eq!(refuse(&mut all, grown), (2, State::Retired), "it has what was seen then");
        assert_eq!(all.get(2).unwrap().left, left(0, 5, 7, "clone"), "a decision is not extended");
        // Set back to where the clone was made, too.
        let production = || stranger(left(0, 5, 7, "production"), &[(2, false)]);
        assert_eq!(refuse(&mut all, production()), (3, State::Refused));
        assert_eq!(refuse(&mut all, production()), (3, State::Refused));
        // Nothing proves what these are: a person decides again.
        for (left, number) in [(left(20, 20, 22, "after its slot was made again"), 3), (None, 3)] {
            assert_eq!(refuse(&mut all, stranger(left, &[])), (number, State::Refused));
        }
        all.retire(3, "ops", 3.0).unwrap();
        assert_eq!(refuse(&mut all, stranger(None, &[])), (4, State::Refused));
        all.retire(4, "ops", 3.0).unwrap();
        assert_eq!(refuse(&mut all, stranger(None, &[])), (5, State::Refused));
    }

    #[test]
    fn a_history_that_writes_on_keeps_its_number_also_when_it_is_retired_later() {
        let mut all = Generations::default();
        // First it has nothing of its own, then the beginning of a page, then whole pages.
        for (to, digest) in [(5, "nothing"), (5, "some"), (6, "a page"), (9, "pages")] {
            let seen: &[_] = if to == 9 { &[(2, true)] } else { &[] };
            assert_eq!(refuse(&mut all, stranger(left(0, 5, to, digest), seen)).0, 2, "{digest}");
        }
        assert_eq!(all.get(2).unwrap().left, left(0, 5, 9, "pages"));
        all.retire(2, "ops", 2.0).unwrap();
        let again = stranger(left(0, 5, 9, "pages"), &[(2, true)]);
        assert_eq!(refuse(&mut all, again), (2, State::Retired));
    }

    #[test]
    fn histories_that_left_in_different_places_have_different_numbers() {
        let mut all = Generations::default();
        assert_eq!(refuse(&mut all, stranger(left(0, 9, 9, "later"), &[])).0, 2);
        assert_eq!(refuse(&mut all, stranger(left(0, 5, 5, "earlier"), &[])).0, 3);
        let on = |begins: u64| {
            let timeline = TimelineId::new(2).unwrap();
            let at = left(20, 20, 22, "promoted").unwrap();
            let left = Left { timeline, begins: Lsn::new(begins), ..at };
            stranger(Some(left), &[(2, false), (3, false)])
        };
        assert_eq!(refuse(&mut all, on(100)).0, 4);
        assert_eq!(refuse(&mut all, on(200)).0, 5, "another timeline of the same number");
        assert_eq!(refuse(&mut all, on(100)).0, 4);
    }

    #[test]
    fn refused_histories_are_bounded_as_undecided_ones_are() {
        let mut all = Generations::default();
        let nth = |n: u64| stranger(left(0, n, n + 2, "its own"), &[]);
        for n in 1..=UNDECIDED_MAX as u64 {
            assert_eq!(u64::from(refuse(&mut all, nth(n)).0), n + 1);
        }
        assert!(all.begin(nth(50), 1.0, false).is_err());
        assert_eq!(refuse(&mut all, nth(3)).0, 4, "those that are known are still found");
    }

    #[test]
    fn another_system_is_one_history_and_a_record_without_what_was_seen_is_read() {
        let mut all = Generations::default();
        let other = || Stranger { other_system: true, ..stranger(None, &[]) };
        assert_eq!(refuse(&mut all, other()), (2, State::Refused));
        all.retire(2, "ops", 2.0).unwrap();
        assert_eq!(refuse(&mut all, other()), (2, State::Retired));
        // What an earlier version wrote does not say where a history left.
        let bytes = record::encode(&all, "x").unwrap();
        assert!(!String::from_utf8(bytes.clone()).unwrap().contains("\"left\""));
        let mut all = record::decode::<Generations>(&bytes, "x").unwrap();
        assert_eq!(refuse(&mut all, other()), (2, State::Retired));
        let found = || stranger(left(0, 5, 7, "a clone"), &[]);
        assert_eq!(refuse(&mut all, found()), (3, State::Refused), "2 may be another one");
        let bytes = record::encode(&all, "x").unwrap();
        let mut all = record::decode::<Generations>(&bytes, "x").unwrap();
        assert_eq!(refuse(&mut all, found()), (3, State::Refused));
    }
}
