//! Decides where to stream from. Pure: the same facts give the same plan.
//!
//! - Streaming continues at exactly the durable position of the newest timeline that the server holds on PostgreSQL's
//!   path (P2). An ancestor is completed before its descendant begins.
//! - The next timeline is taken from the timeline history, never by adding one. It begins at the start of the segment
//!   that contains the switch point, as in pg_receivewal.
//! - The server decides whether an old timeline may be streamed beside a newer one (P8). A server of an earlier
//!   version never allows it.
//! - WAL is skipped only as a declared gap, and only WAL that PostgreSQL was found to have removed.

use klio_pg::{Lsn, SegmentSize, TimelineHistory, TimelineId};

/// What the server holds of one timeline.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    pub timeline: TimelineId,
    /// One past the last durable byte.
    pub flushed: Lsn,
    /// Whether the server has the timeline's history file.
    pub has_history: bool,
    /// The first byte of each missing range below `flushed`, which PostgreSQL may still have; ascending.
    pub missing: Vec<Lsn>,
    /// Segments whose acknowledged WAL was lost on the server: first byte and end of each.
    pub damaged: Vec<(Lsn, Lsn)>,
}

/// A segment that the server lost and wants to be sent again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    pub timeline: TimelineId,
    /// Its first byte.
    pub start: Lsn,
    /// One past its last byte.
    pub end: Lsn,
}

/// What both ends reported before streaming begins.
#[derive(Debug, Clone)]
pub struct Facts {
    /// What the server holds, in any order.
    pub held: Vec<Held>,
    /// The path to PostgreSQL's current timeline.
    pub history: TimelineHistory,
    /// End of the WAL that PostgreSQL can send now.
    pub postgres_end: Lsn,
    /// The oldest WAL that the slot retains.
    pub slot_restart: Option<Lsn>,
    /// The same on both ends.
    pub segment_size: SegmentSize,
    /// The server accepts several timelines of a cluster side by side.
    pub beside: bool,
}

/// WAL that neither PostgreSQL nor the server has any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
    /// First missing byte.
    pub from: Lsn,
    /// First byte after the gap.
    pub to: Lsn,
}

/// Where to stream from next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    pub timeline: TimelineId,
    pub start: Lsn,
    /// What the server holds durably of this timeline; it may be reported to PostgreSQL at once.
    pub durable: Option<Lsn>,
    /// The gap to declare when the stream is opened.
    pub gap: Option<Gap>,
}

/// A slot that is further behind than this does not belong to Klio, and comparing all its WAL would take too long.
const OVERLAP_BYTES_MAX: u64 = 8 << 30;
/// How many segments before the newest one are tried when it contains no whole record.
const SEGMENTS_BEFORE: u64 = 3;

/// WAL that both ends have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overlap {
    pub timeline: TimelineId,
    /// One past its last byte.
    pub end: Lsn,
    /// The server's durable position.
    pub held: Lsn,
    /// Whether PostgreSQL is on this timeline.
    pub is_current: bool,
    /// Where the comparison may begin, in the order to try: first at the oldest WAL that the slot retains, because a
    /// copied slot still has the position of the time of the copy; then at the newest segment and those before it.
    pub starts: Vec<Lsn>,
}

/// Why there is no plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The server holds a newer timeline than PostgreSQL's and does not accept both (P8).
    #[error(
        "server holds timeline {held:?}, newer than PostgreSQL's timeline {postgres:?}: this is an old primary"
    )]
    Stale {
        /// The newest timeline that the server holds.
        held: TimelineId,
        /// PostgreSQL's timeline.
        postgres: TimelineId,
    },
    /// PostgreSQL has less WAL than it had sent before.
    #[error(
        "server holds timeline {timeline:?} up to {server}, PostgreSQL has it only up to {postgres}"
    )]
    Behind {
        timeline: TimelineId,
        /// Durable on the server.
        server: Lsn,
        /// End of WAL on PostgreSQL.
        postgres: Lsn,
    },
    /// WAL was removed, and PostgreSQL has nothing newer yet.
    #[error("PostgreSQL has no WAL from {from} on timeline {timeline:?}, and none after it yet")]
    NothingLeft {
        timeline: TimelineId,
        /// First missing byte.
        from: Lsn,
    },
}

impl Facts {
    /// Where to stream from next.
    ///
    /// # Errors
    /// See [`Refusal`].
    pub fn plan(&self) -> Result<Plan, Refusal> {
        let own = self.history.timeline();
        // A server that accepts several timelines side by side does not mind newer ones off our path.
        let counts = |h: &&Held| !self.beside || self.is_on_path(h.timeline);
        let newest = self.held.iter().filter(counts).map(|h| h.timeline).max();
        if let Some(held) = newest.filter(|newest| *newest > own) {
            return Err(Refusal::Stale { held, postgres: own });
        }
        let on_path = self.held.iter().filter(|h| self.is_on_path(h.timeline));
        match (on_path.max_by_key(|h| h.timeline), newest) {
            (Some(last), Some(newest)) => self.after(last, newest),
            (None, newest) => Ok(self.first_contact(newest)),
            (Some(_), None) => Ok(self.first_contact(None)),
        }
    }

    /// Earlier starts than that of `plan` which fill holes on the server, if PostgreSQL still has the WAL; oldest
    /// first.
    pub fn earlier(&self, plan: &Plan) -> Vec<Plan> {
        let line = self.held.iter().find(|held| held.timeline == plan.timeline);
        let missing = line.map_or(&[][..], |line| &line.missing);
        let earlier = missing.iter().map(|lsn| self.segment(*lsn)).filter(|lsn| *lsn < plan.start);
        let at = |start| Plan { start, durable: Some(start), gap: None, ..*plan };
        earlier.map(at).collect()
    }

    /// The damaged segments in `held` that lie on PostgreSQL's path. The newest comes first, because PostgreSQL
    /// removes the oldest first.
    pub fn wanted(&self, held: &[Held]) -> Vec<Wanted> {
        let mut wanted: Vec<Wanted> = Vec::new();
        for line in held.iter().filter(|line| self.is_on_path(line.timeline)) {
            let timeline = line.timeline;
            let ended = self.history.end_of(timeline);
            let whole = |end: Lsn| end <= line.flushed && ended.is_none_or(|ended| end <= ended);
            let own = line.damaged.iter().filter(|(start, end)| start < end && whole(*end));
            wanted.extend(own.map(|(start, end)| Wanted { timeline, start: *start, end: *end }));
        }
        wanted.sort_by_key(|wanted| std::cmp::Reverse((wanted.start, wanted.timeline)));
        wanted
    }

    /// WAL that PostgreSQL certainly has, given that it no longer has the WAL at `plan.start`. It may have older WAL
    /// as well, which the caller looks for between the two positions.
    ///
    /// # Errors
    /// [`Refusal::NothingLeft`]: PostgreSQL has no newer WAL yet.
    pub fn sure(&self, plan: &Plan) -> Result<Lsn, Refusal> {
        let slot = self.slot_restart.map(|lsn| self.segment(lsn));
        [slot, Some(self.segment(self.postgres_end))]
            .into_iter()
            .flatten()
            .find(|lsn| *lsn > plan.start)
            .ok_or(Refusal::NothingLeft { timeline: plan.timeline, from: plan.start })
    }

    /// The timeline on which PostgreSQL has the segment at `lsn`, but not older than the one of `plan`.
    pub fn timeline_of(&self, plan: &Plan, lsn: Lsn) -> TimelineId {
        self.history.timeline_at(lsn).max(plan.timeline)
    }

    /// The segment in the middle of `(removed, there]`; `None` when no segment lies between them.
    pub fn between(&self, removed: Lsn, there: Lsn) -> Option<Lsn> {
        let (from, to) = (self.segment(removed), self.segment(there));
        let segments = to.bytes_since(from) / self.segment_size.bytes();
        (segments > 1).then(|| from.advance(segments / 2 * self.segment_size.bytes()))
    }

    /// The plan after PostgreSQL answered that the WAL at `plan.start` was removed. `oldest` is the start of the
    /// oldest segment that it still has.
    pub fn after_removal(&self, plan: Plan, oldest: Lsn) -> Plan {
        let timeline = self.timeline_of(&plan, oldest);
        // At first contact nothing has been acknowledged, so there is no gap to declare.
        let from = plan.gap.map_or(plan.start, |gap| gap.from);
        let gap = (!self.held.is_empty()).then_some(Gap { from, to: oldest });
        let durable = plan.durable.filter(|_| timeline == plan.timeline);
        Plan { timeline, start: oldest, durable, gap }
    }

    /// Whether PostgreSQL has less of its current timeline than the server.
    pub fn is_behind(&self) -> bool {
        matches!(self.plan(), Err(Refusal::Behind { .. }))
    }

    /// The WAL that both ends have, which is compared before streaming continues: on the newest timeline of
    /// PostgreSQL's path that the server holds. `None` when the server holds none of that path.
    pub fn overlap(&self) -> Option<Overlap> {
        let on_path = self.held.iter().filter(|h| self.is_on_path(h.timeline));
        let Held { timeline, flushed, .. } = *on_path.max_by_key(|h| h.timeline)?;
        let ended = self.history.end_of(timeline);
        let end = flushed.min(ended.unwrap_or(self.postgres_end));
        let last = Lsn::new(end.as_u64().checked_sub(1)?);
        let first = self.slot_restart.map_or(last, |slot| slot.min(last));
        let nearest = self.segment(last);
        let furthest = Lsn::new(end.as_u64().saturating_sub(OVERLAP_BYTES_MAX));
        let mut starts = vec![self.segment(first.max(furthest)), nearest];
        let before = |n: u64| nearest.as_u64().checked_sub(n * self.segment_size.bytes());
        starts.extend((1..=SEGMENTS_BEFORE).filter_map(before).map(Lsn::new));
        starts.dedup();
        Some(Overlap { timeline, end, held: flushed, is_current: ended.is_none(), starts })
    }

    /// The timelines on PostgreSQL's path whose history files the server lacks, without the root, which has none.
    /// PostgreSQL's current timeline is included even while an ancestor is being completed: a server that lost its
    /// disk can then recognise an old primary by it.
    pub fn histories_wanted(&self) -> Vec<TimelineId> {
        let held = |t: TimelineId| self.held.iter().any(|h| h.timeline == t && h.has_history);
        let root = self.path().next();
        self.path().filter(|t| Some(*t) != root && !held(*t)).collect()
    }

    fn after(&self, last: &Held, newest: TimelineId) -> Result<Plan, Refusal> {
        let Held { timeline, flushed, .. } = *last;
        let Some(end) = self.history.end_of(timeline) else {
            if flushed > self.postgres_end {
                let (server, postgres) = (flushed, self.postgres_end);
                return Err(Refusal::Behind { timeline, server, postgres });
            }
            return Ok(Plan { timeline, start: flushed, durable: Some(flushed), gap: None });
        };
        // A newer timeline off our path forbids going back to this one.
        if flushed < end && timeline == newest {
            return Ok(Plan { timeline, start: flushed, durable: Some(flushed), gap: None });
        }
        let after = timeline.max(newest);
        let next = self.path().find(|t| *t > after).unwrap_or(self.history.timeline());
        let start = self.begin_of(next);
        let gap = (flushed < start).then_some(Gap { from: flushed, to: start });
        Ok(Plan { timeline: next, start, durable: None, gap })
    }

    fn first_contact(&self, newest: Option<TimelineId>) -> Plan {
        let origin = self.slot_restart.unwrap_or(self.postgres_end);
        let timeline = self.history.timeline_at(origin);
        let allowed = self.path().find(|t| newest.is_none_or(|newest| *t > newest));
        match allowed {
            Some(first) if first > timeline => {
                Plan { timeline: first, start: self.begin_of(first), durable: None, gap: None }
            }
            _ => Plan { timeline, start: self.segment(origin), durable: None, gap: None },
        }
    }

    /// The first byte of a timeline's own first segment.
    fn begin_of(&self, timeline: TimelineId) -> Lsn {
        let entries = self.history.entries();
        let parent = entries.iter().take_while(|e| e.timeline < timeline).last();
        parent.map_or(Lsn::ZERO, |parent| self.segment(parent.end))
    }

    fn path(&self) -> impl Iterator<Item = TimelineId> + '_ {
        let ancestors = self.history.entries().iter().map(|e| e.timeline);
        ancestors.chain([self.history.timeline()])
    }

    fn is_on_path(&self, timeline: TimelineId) -> bool {
        self.path().any(|t| t == timeline)
    }

    fn segment(&self, lsn: Lsn) -> Lsn {
        lsn.segment_start(self.segment_size)
    }
}

#[cfg(test)]
mod tests;
