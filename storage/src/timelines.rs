//! `<cluster>/timelines.json`: timelines that were written at the same time as another one, and what a person decided
//! about them.
//!
//! - MARK1  A mark is durable before the first byte that is received because of it is acknowledged.
//! - MARK2  Only a person's decision removes or changes a mark: never time, never a restart.
//! - MARK3  Undecided and retired timelines are stored like any other WAL (P2), and are followed only by those who name
//!   them.
//!
//! In the format of `crate::record`, the same in both tiers. A timeline without a mark is an ordinary one: the newest
//! timeline with WAL is the one that is followed.
//!
//! | field | what |
//! |---|---|
//! | `timeline` | the marked timeline |
//! | `standing` | `undecided`, `retired` or `followed` |
//! | `against` | the other timeline of the conflict |
//! | `reason` | what was found, in words |
//! | `marked_unix` | when it was found, in seconds since 1970, by the server's clock |
//! | `decided_unix`, `decided_by` | when and by whom it was decided; absent until then |
//! | `earlier` | earlier values of the mark, oldest first; they show which of two records continues the other |
//!
//! Pure: the store and the server write the file.

use crate::{
    Error,
    record::{self, Unknown},
};
use klio_pg::{Lsn, TimelineHistory, TimelineId};
use serde::{Deserialize, Serialize};
use std::fmt;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Standing {
    /// Its PostgreSQL and that of another timeline both write. A person has to decide.
    Undecided,
    /// A person decided against it: no more of its WAL is received.
    Retired,
    /// A person decided for it.
    Followed,
}

impl Standing {
    pub const fn as_str(self) -> &'static str {
        match self {
            Standing::Undecided => "undecided",
            Standing::Retired => "retired",
            Standing::Followed => "followed",
        }
    }
}

impl fmt::Display for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What is recorded about one timeline.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Mark {
    pub timeline: TimelineId,
    pub standing: Standing,
    /// The other timeline of the conflict.
    pub against: TimelineId,
    /// What was found, as a sentence.
    pub reason: String,
    /// When it was found, Unix seconds.
    pub marked_unix: f64,
    /// When a person decided, Unix seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decided_unix: Option<f64>,
    /// The name in the certificate of whoever decided.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decided_by: Option<String>,
    /// Earlier values, oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub earlier: Vec<Earlier>,
    /// Fields that a newer version wrote.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// An earlier value of a mark.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Earlier {
    pub standing: Standing,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decided_unix: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decided_by: Option<String>,
    /// Fields that a newer version wrote.
    #[serde(flatten)]
    pub unknown: Unknown,
}

impl Mark {
    fn now(&self) -> Earlier {
        let Self { standing, decided_unix, decided_by, .. } = self;
        let (standing, decided_unix) = (*standing, *decided_unix);
        let unknown = Unknown::default();
        Earlier { standing, decided_unix, decided_by: decided_by.clone(), unknown }
    }

    /// Whether it contains all decisions of another mark for the same timeline, in the same order.
    fn goes_on_from(&self, other: &Self) -> bool {
        let decisions = |mark: &Self| -> Vec<Earlier> {
            let all = mark.earlier.iter().cloned().chain([mark.now()]);
            all.filter(|said| said.decided_unix.is_some()).collect()
        };
        decisions(self).starts_with(&decisions(other))
    }
}

/// What a standby is shown of a timeline's history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ForStandbys {
    /// The history itself.
    AsItIs,
    /// [`PASSED_OVER`]: a newer timeline is followed, which the standby would otherwise not find.
    PassedOver,
    /// Nothing, because the standby would follow it.
    Hidden,
}

/// Shown instead of the history of an undecided or retired timeline. PostgreSQL looks for history files number by
/// number up to the first missing one (`findNewestTimeLine()` in timeline.c) and takes the newest, so with a missing
/// file it would never reach the followed timeline. If this is the newest file that it sees, because nobody answered
/// for the next number, the content describes a timeline that left its ancestor before the position of any standby,
/// which no standby follows (`rescanLatestTimeLine()` in xlogrecovery.c).
pub const PASSED_OVER: &str = "1\t0/1\tdecided against: a standby passes it over\n";

/// Two records that each lack a decision of the other.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected one record to continue the other, found timeline {0:?} decided in two ways")]
pub struct DecidedApart(TimelineId);

/// Who decides, and when.
#[derive(Debug, Clone, PartialEq)]
pub struct Decision {
    /// The name in the certificate.
    pub by: String,
    /// Unix seconds.
    pub at_unix: f64,
}

/// Why a decision cannot be carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecisionError {
    /// There is neither a record nor any WAL of this timeline.
    #[error("expected a timeline with WAL, found none of timeline {0:?}")]
    Unknown(TimelineId),
    /// It is followed already.
    #[error("timeline {0:?} is followed already, and no other is undecided")]
    Followed(TimelineId),
    /// One timeline must be followed.
    #[error("timeline {0:?} is the followed one: follow another timeline instead")]
    RetiresFollowed(TimelineId),
    /// It is retired already.
    #[error("timeline {0:?} is retired already")]
    Retired(TimelineId),
}

/// All marks of a cluster, at most one per timeline, ascending.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Timelines(Vec<Mark>);

impl Timelines {
    /// From the stored marks. If there are two for one timeline, the later one counts.
    pub fn new(marks: Vec<Mark>) -> Self {
        let mut all = Self::default();
        marks.into_iter().for_each(|mark| all.set(mark));
        all
    }

    /// Parses the bytes of a `timelines.json` from either tier. `place` is for the error.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn decode(bytes: &[u8], place: &str) -> Result<Self, Error> {
        record::decode::<Vec<Mark>>(bytes, place).map(Self::new)
    }

    /// Every mark, ascending.
    pub fn marks(&self) -> &[Mark] {
        &self.0
    }

    /// Whether there are no marks: nothing was ever in conflict.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The mark of a timeline.
    pub fn mark(&self, timeline: TimelineId) -> Option<&Mark> {
        self.0.iter().find(|mark| mark.timeline == timeline)
    }

    /// The standing of a timeline that has a mark.
    pub fn standing(&self, timeline: TimelineId) -> Option<Standing> {
        self.mark(timeline).map(|mark| mark.standing)
    }

    /// The marks that a person has to decide about.
    pub fn undecided(&self) -> impl Iterator<Item = &Mark> {
        self.0.iter().filter(|mark| mark.standing == Standing::Undecided)
    }

    /// Whether a timeline is set aside (undecided or retired): it is followed only by those who name it.
    pub fn is_aside(&self, timeline: TimelineId) -> bool {
        matches!(self.standing(timeline), Some(Standing::Undecided | Standing::Retired))
    }

    /// The followed timeline among those in `held`.
    pub fn followed(&self, held: impl IntoIterator<Item = TimelineId>) -> Option<TimelineId> {
        held.into_iter().filter(|timeline| !self.is_aside(*timeline)).max()
    }

    /// What a standby gets when it asks for a timeline's history, given that it follows the newest one it sees. It
    /// always sees the path to the followed timeline.
    pub fn for_standbys(
        &self,
        timeline: TimelineId,
        followed: Option<&TimelineHistory>,
    ) -> ForStandbys {
        let on_the_way = |history: &TimelineHistory| {
            history.timeline() == timeline
                || history.entries().iter().any(|entry| entry.timeline == timeline)
        };
        match followed {
            _ if !self.is_aside(timeline) => ForStandbys::AsItIs,
            Some(followed) if on_the_way(followed) => ForStandbys::AsItIs,
            Some(followed) if followed.timeline() > timeline => ForStandbys::PassedOver,
            _ => ForStandbys::Hidden,
        }
    }

    /// The mark that a new timeline inherits. It inherits one if it left a timeline that is set aside, also through
    /// others, at a point that the followed timeline does not share. A timeline with its own mark inherits nothing: a
    /// person's decision about it counts even if none of its WAL is here, as on a new server (MARK2).
    pub fn inherits(
        &self,
        history: &TimelineHistory,
        followed: Option<&TimelineHistory>,
    ) -> Option<&Mark> {
        if self.mark(history.timeline()).is_some() {
            return None;
        }
        // The nearest ancestor with a mark determines the standing of everything behind it.
        let mut way = history.entries().iter().rev();
        let (parent, mark) = way.find_map(|entry| Some((entry, self.mark(entry.timeline)?)))?;
        let shared = |followed: &TimelineHistory| {
            let passes = |(timeline, end): (TimelineId, Lsn)| {
                timeline == parent.timeline && parent.end <= end
            };
            followed.entries().iter().any(|entry| passes((entry.timeline, entry.end)))
        };
        (self.is_aside(mark.timeline) && !followed.is_some_and(shared)).then_some(mark)
    }

    /// The timelines on the path to a timeline that is set aside which would be followed without a mark of their own:
    /// its PostgreSQL was promoted more than once, and the WAL of each of these timelines is received.
    pub fn unmarked_on_the_way(
        &self,
        history: &TimelineHistory,
        followed: Option<TimelineId>,
    ) -> Vec<TimelineId> {
        let way = || history.entries().iter().map(|entry| entry.timeline);
        let from = followed.or_else(|| way().find(|timeline| self.is_aside(*timeline)));
        way()
            .filter(|timeline| self.mark(*timeline).is_none())
            .filter(|timeline| from.is_some_and(|from| *timeline > from))
            .collect()
    }

    /// Records a mark and keeps the value of an earlier one in `earlier`.
    pub fn put(&mut self, mark: Mark) {
        let known = self.mark(mark.timeline).filter(|known| known.now() != mark.now());
        let earlier = known.map(|known| [&known.earlier[..], &[known.now()]].concat());
        self.set(Mark { earlier: earlier.unwrap_or_else(|| mark.earlier.clone()), ..mark });
    }

    /// Merges both records: for each timeline, the mark that contains all decisions of the other.
    ///
    /// # Errors
    /// When neither mark contains all decisions of the other.
    pub fn joined(&self, other: &Self) -> Result<Self, DecidedApart> {
        let mut all = self.clone();
        for theirs in &other.0 {
            match self.mark(theirs.timeline) {
                Some(ours) if ours.goes_on_from(theirs) => {}
                Some(ours) if !theirs.goes_on_from(ours) => {
                    return Err(DecidedApart(theirs.timeline));
                }
                _ => all.set(theirs.clone()),
            }
        }
        Ok(all)
    }

    fn set(&mut self, mark: Mark) {
        self.0.retain(|other| other.timeline != mark.timeline);
        self.0.push(mark);
        self.0.sort_by_key(|mark| mark.timeline);
    }

    /// The marks after a person has decided for a timeline: undecided timelines, the followed one and newer ones become
    /// retired. Ancestors of the timeline are unchanged, unless one of them was in conflict with it.
    ///
    /// # Errors
    /// The reason why it cannot be followed.
    pub fn follow(
        &self,
        timeline: TimelineId,
        held: &[TimelineId],
        decision: &Decision,
    ) -> Result<Self, DecisionError> {
        // On a new server there is no WAL of the timelines that were decided about; without the mark, a retired one
        // could never be followed again.
        if !held.contains(&timeline) && self.mark(timeline).is_none() {
            return Err(DecisionError::Unknown(timeline));
        }
        let before = self.followed(held.iter().copied());
        if before == Some(timeline) && self.undecided().next().is_none() {
            return Err(DecisionError::Followed(timeline));
        }
        let mut after = self.clone();
        for other in held.iter().copied().filter(|other| *other != timeline) {
            let standing = self.standing(other);
            let loses = standing == Some(Standing::Undecided)
                || (standing != Some(Standing::Retired)
                    && (before == Some(other) || other > timeline));
            if loses {
                after.put(self.decided(other, Standing::Retired, timeline, decision));
            }
        }
        let against = self.mark(timeline).map(|mark| mark.against).or(before);
        let against = against.filter(|against| *against != timeline).or_else(|| {
            self.undecided().map(|mark| mark.timeline).find(|other| *other != timeline)
        });
        let against = against.unwrap_or(timeline);
        after.put(self.decided(timeline, Standing::Followed, against, decision));
        Ok(after)
    }

    /// The marks after a person has decided against a timeline.
    ///
    /// # Errors
    /// The reason why it cannot be retired.
    pub fn retire(
        &self,
        timeline: TimelineId,
        held: &[TimelineId],
        decision: &Decision,
    ) -> Result<Self, DecisionError> {
        if !held.contains(&timeline) && self.mark(timeline).is_none() {
            return Err(DecisionError::Unknown(timeline));
        }
        if self.standing(timeline) == Some(Standing::Retired) {
            return Err(DecisionError::Retired(timeline));
        }
        let followed = self.followed(held.iter().copied());
        if followed == Some(timeline) {
            return Err(DecisionError::RetiresFollowed(timeline));
        }
        let mut after = self.clone();
        let against = self.mark(timeline).map(|mark| mark.against).or(followed);
        let against = against.unwrap_or(timeline);
        after.put(self.decided(timeline, Standing::Retired, against, decision));
        Ok(after)
    }

    fn decided(
        &self,
        timeline: TimelineId,
        standing: Standing,
        against: TimelineId,
        decision: &Decision,
    ) -> Mark {
        let known = self.mark(timeline);
        let default = match standing {
            Standing::Retired => format!("timeline {} is followed instead", against.get()),
            _ => "followed by decision".to_owned(),
        };
        Mark {
            timeline,
            standing,
            against,
            reason: known.map_or(default, |mark| mark.reason.clone()),
            marked_unix: known.map_or(decision.at_unix, |mark| mark.marked_unix),
            decided_unix: Some(decision.at_unix),
            decided_by: Some(decision.by.clone()),
            earlier: known.map(|mark| mark.earlier.clone()).unwrap_or_default(),
            unknown: known.map(|mark| mark.unknown.clone()).unwrap_or_default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tli(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    fn undecided(timeline: u32, against: u32) -> Mark {
        Mark {
            timeline: tli(timeline),
            standing: Standing::Undecided,
            against: tli(against),
            reason: "both write".into(),
            marked_unix: 5.25,
            decided_unix: None,
            decided_by: None,
            earlier: Vec::new(),
            unknown: Unknown::default(),
        }
    }

    fn decision() -> Decision {
        Decision { by: "ann".into(), at_unix: 9.5 }
    }

    fn history(timeline: u32, entries: &[(u32, u64)]) -> TimelineHistory {
        let text: String =
            entries.iter().map(|(t, at)| format!("{t}\t{}\tx\n", Lsn::new(*at))).collect();
        TimelineHistory::parse(tli(timeline), text.as_bytes()).unwrap()
    }

    /// A tier 1 that was reset to an earlier state, or two servers that both decided.
    #[test]
    fn joined_records_lose_no_decision_and_two_decisions_are_told() {
        let held = [tli(1), tli(2), tli(3)];
        let old = Timelines::new(vec![undecided(3, 2)]);
        let decided = old.retire(tli(3), &held, &decision()).unwrap();
        assert_eq!(old.joined(&decided), Ok(decided.clone()));
        assert_eq!(decided.joined(&old), Ok(decided.clone()));
        let again = Decision { by: "ann".into(), at_unix: 3.0 };
        let again = decided.follow(tli(3), &held, &again).unwrap();
        assert_eq!(decided.joined(&again), Ok(again.clone()), "whatever the clock said");
        let other = Decision { by: "bob".into(), at_unix: 99.0 };
        let other = old.follow(tli(3), &held, &other).unwrap();
        assert_eq!(other.joined(&decided), Err(DecidedApart(tli(3))));
        assert_eq!(decided.joined(&other), Err(DecidedApart(tli(3))));
        // Found again by a server that did not know the decision.
        let found =
            Timelines::new(vec![Mark { marked_unix: 70.0, ..undecided(3, 1) }, undecided(4, 3)]);
        let joined = found.joined(&decided).unwrap();
        assert_eq!(joined.standing(tli(3)), Some(Standing::Retired));
        assert_eq!(joined.standing(tli(4)), Some(Standing::Undecided));
    }

    #[test]
    fn the_newest_timeline_that_is_not_aside_is_followed() {
        let held = [tli(1), tli(2), tli(3)];
        assert_eq!(Timelines::default().followed(held), Some(tli(3)));
        let marks = Timelines::new(vec![undecided(3, 2)]);
        assert_eq!(marks.followed(held), Some(tli(2)));
        assert_eq!(Timelines::new(vec![undecided(1, 2)]).followed([tli(1)]), None);
    }

    #[test]
    fn a_copy_that_is_retired_leaves_production_followed() {
        let held = [tli(1), tli(2)];
        let marks = Timelines::new(vec![undecided(2, 1)]);
        let after = marks.retire(tli(2), &held, &decision()).unwrap();
        assert_eq!(after.followed(held), Some(tli(1)));
        assert_eq!(after.standing(tli(2)), Some(Standing::Retired));
        assert_eq!(after.undecided().count(), 0);
        let mark = after.mark(tli(2)).unwrap();
        assert_eq!((mark.decided_by.as_deref(), mark.marked_unix), (Some("ann"), 5.25));
        assert_eq!(after.retire(tli(2), &held, &decision()), Err(DecisionError::Retired(tli(2))));
        assert_eq!(
            after.retire(tli(1), &held, &decision()),
            Err(DecisionError::RetiresFollowed(tli(1)))
        );
        // A retired timeline can still be followed later.
        let back = after.follow(tli(2), &held, &decision()).unwrap();
        assert_eq!(back.followed(held), Some(tli(2)));
        assert_eq!(back.standing(tli(1)), Some(Standing::Retired));
    }

    #[test]
    fn what_is_followed_by_decision_retires_the_other_side() {
        let held = [tli(1), tli(2), tli(3)];
        let marks = Timelines::new(vec![undecided(3, 2)]);
        let after = marks.follow(tli(3), &held, &decision()).unwrap();
        assert_eq!(after.followed(held), Some(tli(3)));
        assert_eq!(after.standing(tli(2)), Some(Standing::Retired));
        assert_eq!(after.standing(tli(1)), None, "an ended ancestor");
        // The other way round: the newer one was followed, and the older one came back.
        let marks = Timelines::new(vec![undecided(1, 3)]);
        let after = marks.follow(tli(1), &held, &decision()).unwrap();
        assert_eq!(after.followed(held), Some(tli(1)));
        assert_eq!(after.standing(tli(2)), Some(Standing::Retired));
        assert_eq!(after.standing(tli(3)), Some(Standing::Retired));
    }

    #[test]
    fn following_what_is_followed_retires_what_is_undecided() {
        let held = [tli(1), tli(2)];
        let marks = Timelines::new(vec![undecided(2, 1)]);
        let after = marks.follow(tli(1), &held, &decision()).unwrap();
        assert_eq!(after.followed(held), Some(tli(1)));
        assert_eq!(after.standing(tli(2)), Some(Standing::Retired));
        let again = after.follow(tli(1), &held, &decision());
        assert_eq!(again, Err(DecisionError::Followed(tli(1))));
        let unknown = after.follow(tli(7), &held, &decision());
        assert_eq!(unknown, Err(DecisionError::Unknown(tli(7))));
    }

    /// A standby follows whatever history it is shown, and looks no further than the first missing one.
    #[test]
    fn standbys_see_the_way_to_the_followed_timeline_and_nothing_aside() {
        let marks = Timelines::new(vec![undecided(2, 1), undecided(4, 3)]);
        let three = history(3, &[(1, 100), (2, 200)]);
        let (other, five) = (history(3, &[(1, 300)]), history(5, &[(1, 300), (3, 400)]));
        let seen = |timeline, followed| marks.for_standbys(tli(timeline), followed);
        assert_eq!(seen(2, Some(&three)), ForStandbys::AsItIs);
        assert_eq!(seen(3, Some(&three)), ForStandbys::AsItIs);
        assert_eq!(seen(4, Some(&three)), ForStandbys::Hidden);
        assert_eq!(seen(2, None), ForStandbys::Hidden);
        // The followed timeline left the first timeline as well.
        assert_eq!(seen(2, Some(&other)), ForStandbys::PassedOver);
        assert_eq!(seen(4, Some(&five)), ForStandbys::PassedOver);
    }

    #[test]
    fn what_is_passed_over_left_its_ancestor_before_any_standby() {
        let passed = TimelineHistory::parse(tli(2), PASSED_OVER.as_bytes()).unwrap();
        assert_eq!(passed.switch_point(), Some(Lsn::new(1)));
    }

    #[test]
    fn a_child_of_what_is_aside_is_aside_too_unless_it_left_before_the_conflict() {
        let marks = Timelines::new(vec![undecided(2, 1)]);
        let one = TimelineHistory::root(tli(1));
        assert!(marks.inherits(&history(3, &[(1, 100), (2, 200)]), Some(&one)).is_some());
        assert!(marks.inherits(&history(3, &[(1, 100)]), Some(&one)).is_none());
        // The old primary, 1, is retired in favor of 2, which left it at 100.
        let retired = marks.follow(tli(2), &[tli(1), tli(2)], &decision()).unwrap();
        let two = history(2, &[(1, 100)]);
        assert!(retired.inherits(&history(3, &[(1, 90)]), Some(&two)).is_none());
        assert!(retired.inherits(&history(3, &[(1, 110)]), Some(&two)).is_some());
        assert!(retired.inherits(&history(3, &[(1, 100), (2, 200)]), Some(&two)).is_none());
        // A decision also applies where none of the WAL is here yet, and to timelines that came from it.
        assert!(retired.inherits(&two, None).is_none());
        assert!(retired.inherits(&history(3, &[(1, 100), (2, 200)]), None).is_none());
        // Promoted more than once, through an unknown timeline.
        assert!(marks.inherits(&history(4, &[(1, 100), (2, 200), (3, 300)]), Some(&one)).is_some());
    }

    #[test]
    fn what_lies_between_is_left_aside_with_the_timeline_that_comes_over_it() {
        let none = Timelines::default();
        let three = history(3, &[(1, 100), (2, 200)]);
        assert_eq!(none.unmarked_on_the_way(&three, Some(tli(1))), [tli(2)]);
        assert_eq!(none.unmarked_on_the_way(&three, Some(tli(2))), []);
        assert_eq!(none.unmarked_on_the_way(&three, None), []);
        let marks = Timelines::new(vec![undecided(2, 1)]);
        let five = history(5, &[(1, 100), (2, 200), (4, 300)]);
        assert_eq!(marks.unmarked_on_the_way(&five, Some(tli(1))), [tli(4)]);
        assert_eq!(marks.unmarked_on_the_way(&five, None), [tli(4)]);
    }

    #[test]
    fn what_is_on_record_can_be_decided_again_where_nothing_of_it_is_held() {
        let marks = Timelines::new(vec![undecided(2, 1)]);
        let retired = marks.retire(tli(2), &[tli(1), tli(2)], &decision()).unwrap();
        let followed = retired.follow(tli(2), &[], &decision()).unwrap();
        assert_eq!(followed.standing(tli(2)), Some(Standing::Followed));
        let unknown = retired.follow(tli(3), &[], &decision());
        assert_eq!(unknown, Err(DecisionError::Unknown(tli(3))));
    }

    #[test]
    fn what_a_later_version_knows_of_a_timeline_survives_a_decision() {
        let body = serde_json::json!([{
            "timeline": 2, "standing": "undecided", "against": 1, "reason": "both write",
            "marked_unix": 5.25, "seen_by": "a later version"
        }]);
        let marks = Timelines::decode(&record::encode(&body, "x").unwrap(), "x").unwrap();
        let after = marks.retire(tli(2), &[tli(1), tli(2)], &decision()).unwrap();
        let bytes = record::encode(&after.marks(), "x").unwrap();
        assert!(String::from_utf8(bytes).unwrap().contains("a later version"));
    }

    #[test]
    fn marks_round_trip() {
        let marks = Timelines::new(vec![undecided(2, 1)]);
        let after = marks.follow(tli(2), &[tli(1), tli(2)], &decision()).unwrap();
        for marks in [marks, after] {
            let bytes = record::encode(&marks.marks(), "x").unwrap();
            assert_eq!(Timelines::decode(&bytes, "x").unwrap(), marks);
        }
    }
}
