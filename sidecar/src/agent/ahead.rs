//! Decides what to read ahead. Pure.
//!
//! The window follows the segment that was delivered last, on the same timeline. It starts small and doubles with
//! each segment that follows its predecessor, so that fetching a single segment costs little.

use klio_pg::{SegmentName, SegmentSize};

/// Number of segments in the first window.
const FIRST: u64 = 4;

/// PostgreSQL's position, and how far to read ahead.
#[derive(Debug, Clone)]
pub(super) struct Ahead {
    bytes_max: u64,
    /// Known once a segment was delivered.
    size: Option<SegmentSize>,
    last: Option<SegmentName>,
    /// How many times in a row the next segment was delivered.
    run: u32,
    /// The first segment that could not be fetched; reset by each request.
    end: Option<SegmentName>,
}

impl Ahead {
    /// Prefetches at most `bytes_max`, but at least one segment.
    pub fn new(bytes_max: u64) -> Self {
        Self { bytes_max, size: None, last: None, run: 0, end: None }
    }

    /// Records a request: a segment that did not exist may exist by now.
    pub fn asked(&mut self) {
        self.end = None;
    }

    /// Records that a segment was delivered; PostgreSQL continues after it.
    pub fn delivered(&mut self, name: SegmentName, size: SegmentSize) {
        let follows = self.last.and_then(|last| last.next(size)) == Some(name);
        self.run = if follows { (self.run + 1).min(32) } else { 0 };
        (self.last, self.size) = (Some(name), Some(size));
    }

    /// Records that a segment could not be fetched: nothing from it on is tried until the next request.
    pub fn ends_at(&mut self, name: SegmentName) {
        self.end = Some(self.end.map_or(name, |end| end.min(name)));
    }

    /// Segment size in bytes, once known.
    pub fn segment_size(&self) -> Option<SegmentSize> {
        self.size
    }

    fn most(&self, size: SegmentSize) -> u64 {
        (self.bytes_max / size.bytes()).max(1)
    }

    fn following(&self, count: u64) -> impl Iterator<Item = SegmentName> {
        let (mut at, size) = (self.last, self.size);
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        std::iter::from_fn(move || {
            at = at.and_then(|name| name.next(size?));
            at
        })
        .take(count)
    }

    /// What to prefetch, nearest first; at most `room` bytes of it.
    pub fn wanted(&self, room: u64) -> Vec<SegmentName> {
        let Some(size) = self.size else { return Vec::new() };
        let window = FIRST.saturating_mul(1 << self.run.min(20));
        let count = window.min(self.most(size)).min(room / size.bytes());
        self.following(count).take_while(|name| self.end.is_none_or(|end| *name < end)).collect()
    }

    /// Whether a prefetched segment is still useful.
    pub fn keeps(&self, name: SegmentName) -> bool {
        let most = self.size.map_or(0, |size| self.most(size));
        self.following(most).any(|wanted| wanted == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal_source::testing::segment;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;
    const ROOM: u64 = 1 << 40;

    fn size() -> SegmentSize {
        SegmentSize::new(1 << 20).unwrap()
    }

    #[test]
    fn the_window_grows_with_a_run_and_starts_small_after_a_jump() {
        let mut ahead = Ahead::new(16 * MIB);
        assert_eq!(ahead.wanted(ROOM), []);
        let mut counts = Vec::new();
        for number in [5, 6, 7, 8, 3, 4] {
            ahead.delivered(segment(1, number), size());
            let wanted = ahead.wanted(ROOM);
            assert_eq!(wanted.first(), Some(&segment(1, number + 1)));
            counts.push(wanted.len());
        }
        assert_eq!(counts, [4, 8, 16, 16, 4, 8]);
    }

    #[test]
    fn nothing_behind_the_end_is_wanted_until_something_is_asked_for() {
        let mut ahead = Ahead::new(16 * MIB);
        ahead.delivered(segment(1, 5), size());
        ahead.ends_at(segment(1, 8));
        ahead.ends_at(segment(1, 7));
        ahead.ends_at(segment(1, 9));
        assert_eq!(ahead.wanted(ROOM), [segment(1, 6)]);
        ahead.asked();
        assert_eq!(ahead.wanted(ROOM).len(), 4);
    }

    #[test]
    fn another_timeline_keeps_nothing_of_the_old() {
        let mut ahead = Ahead::new(16 * MIB);
        ahead.delivered(segment(1, 5), size());
        assert!(ahead.keeps(segment(1, 6)) && !ahead.keeps(segment(2, 6)));
        ahead.delivered(segment(2, 6), size());
        assert!(!ahead.keeps(segment(1, 7)) && ahead.keeps(segment(2, 7)));
        assert!(!ahead.keeps(segment(2, 6)));
    }

    #[test]
    fn a_full_disk_leaves_no_room() {
        let mut ahead = Ahead::new(16 * MIB);
        ahead.delivered(segment(1, 5), size());
        assert_eq!(ahead.wanted(2 * MIB + 5).len(), 2);
        assert_eq!(ahead.wanted(MIB - 1), []);
    }

    proptest! {
        #[test]
        fn what_is_wanted_never_exceeds_the_bound(
            most in 1u64..40, steps in prop::collection::vec((1u32..3, 0u32..9000), 1..30)
        ) {
            let mut ahead = Ahead::new(most * MIB);
            for (timeline, number) in steps {
                ahead.delivered(segment(timeline, number), size());
                let wanted = ahead.wanted(ROOM);
                prop_assert!(wanted.len() as u64 <= most);
                prop_assert!(wanted.iter().all(|name| ahead.keeps(*name)));
            }
        }
    }
}
