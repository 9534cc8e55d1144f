//! How far each timeline of a cluster is archived without a hole. Pure.
//!
//! A1  the frontier of a timeline is the end of the last segment of the unbroken run of archived
//!     segments that begins with the first segment held on that timeline in either tier: never the
//!     latest upload (P5).
//! A2  recording an upload never moves a frontier back. Only `hold` may, when tier 1 turns out to hold
//!     an earlier segment than was known, and `rebuild`, from listings of both tiers.
//! A3  partial segments and history files are counted and never move a frontier.
//!
//! Only the part beyond the frontier is kept segment by segment, so memory does not grow with what is
//! archived.

use crate::layout::WalFile;
use klio_pg::{Lsn, SegmentName, SegmentSize, TimelineId};
use std::collections::{BTreeMap, BTreeSet};

/// What is known to be archived of one cluster.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Archive {
    segment_size: SegmentSize,
    timelines: BTreeMap<u32, Run>,
    totals: Totals,
    latest_archived_unix: Option<u64>,
    /// Objects whose size is not the local file's although their plaintext is the same: proven once,
    /// not to be compared again. Name to object size.
    other_sizes: BTreeMap<String, u64>,
}

/// What tier 2 holds of a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Totals {
    /// WAL files of all kinds.
    pub files: u64,
    /// Their bytes in the store.
    pub bytes: u64,
}

/// How far one timeline is archived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frontier {
    /// The timeline.
    pub timeline: TimelineId,
    /// Start of the first segment held.
    pub start: Lsn,
    /// Every segment from `start` up to here is archived.
    pub archived: Lsn,
}

/// Segments of one timeline as numbers (position divided by segment size).
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Run {
    /// The first segment held in either tier.
    start: u64,
    /// The first segment that is not archived.
    end: u64,
    /// Archived beyond a hole.
    beyond: BTreeSet<u64>,
}

impl Run {
    fn begin(start: u64) -> Self {
        Self { start, end: start, beyond: BTreeSet::new() }
    }

    fn archive(&mut self, number: u64) {
        if number >= self.end {
            self.beyond.insert(number);
        }
        while self.beyond.remove(&self.end) {
            self.end += 1;
        }
    }
}

impl Archive {
    /// Nothing known yet.
    pub const fn new(segment_size: SegmentSize) -> Self {
        Self {
            segment_size,
            timelines: BTreeMap::new(),
            totals: Totals { files: 0, bytes: 0 },
            latest_archived_unix: None,
            other_sizes: BTreeMap::new(),
        }
    }

    /// From listings of both tiers. `held` is tier 1; `archived` is what tier 2 was proven to hold,
    /// with the sizes and times of the objects. Keeps what only earlier uploads could tell.
    pub fn rebuild(
        &self,
        held: impl IntoIterator<Item = WalFile>,
        archived: impl IntoIterator<Item = (WalFile, u64, u64)>,
    ) -> Self {
        let mut next = Self::new(self.segment_size);
        next.latest_archived_unix = self.latest_archived_unix;
        let archived: Vec<_> = archived.into_iter().collect();
        next.hold(archived.iter().map(|(file, ..)| *file));
        next.hold(held);
        for (file, size, modified_unix) in archived {
            if let Some(known) = self.other_sizes.get_key_value(&file.to_string())
                && *known.1 == size
            {
                next.other_sizes.insert(known.0.clone(), size);
            }
            next.record(file, size, Some(modified_unix));
        }
        next
    }

    /// Files that tier 1 holds: the first segment of a timeline is where its run begins. One before
    /// the known beginning is not archived as far as we know, so the frontier goes back to it (A1).
    pub fn hold(&mut self, files: impl IntoIterator<Item = WalFile>) {
        let mut first: BTreeMap<u32, u64> = BTreeMap::new();
        for file in files {
            if let Some((timeline, number)) = self.number(file) {
                let entry = first.entry(timeline).or_insert(number);
                *entry = number.min(*entry);
            }
        }
        for (timeline, number) in first {
            let run = self.timelines.entry(timeline).or_insert_with(|| Run::begin(number));
            if number < run.start {
                run.beyond.extend(run.start..run.end);
                run.start = number;
                run.end = number;
            }
        }
    }

    /// An object that is proven; `written_unix` is when it was written, where that is known. Recording
    /// a segment again changes nothing.
    pub fn record(&mut self, file: WalFile, size: u64, written_unix: Option<u64>) {
        self.latest_archived_unix = self.latest_archived_unix.max(written_unix);
        if let WalFile::Segment(name) = file
            && self.has(name)
        {
            return;
        }
        self.totals.files += 1;
        self.totals.bytes += size;
        if let Some((timeline, number)) = self.number(file) {
            self.timelines.entry(timeline).or_insert_with(|| Run::begin(number)).archive(number);
        }
    }

    /// Remembers that an object of another size than the local file's was proven to hold the same.
    pub fn accept_size(&mut self, file: WalFile, size: u64) {
        self.other_sizes.insert(file.to_string(), size);
    }

    /// Whether an object of `size` is known to stand for a local file of `local_size`.
    pub fn accepts(&self, file: WalFile, local_size: u64, size: u64) -> bool {
        local_size == size || self.other_sizes.get(&file.to_string()) == Some(&size)
    }

    /// Whether a segment is archived, as far as is known; partials and histories are not tracked.
    pub fn has(&self, segment: SegmentName) -> bool {
        self.number(WalFile::Segment(segment)).is_some_and(|(timeline, number)| {
            self.timelines.get(&timeline).is_some_and(|run| {
                (run.start..run.end).contains(&number) || run.beyond.contains(&number)
            })
        })
    }

    /// The frontier of each timeline, ascending.
    pub fn frontiers(&self) -> Vec<Frontier> {
        let lsn = |number: u64| Lsn::new(number.saturating_mul(self.segment_size.bytes()));
        let frontier = |(timeline, run): (&u32, &Run)| {
            Some(Frontier {
                timeline: TimelineId::new(*timeline)?,
                start: lsn(run.start),
                archived: lsn(run.end),
            })
        };
        self.timelines.iter().filter_map(frontier).collect()
    }

    /// What tier 2 holds.
    pub const fn totals(&self) -> Totals {
        self.totals
    }

    /// Unix time in seconds of the newest upload.
    pub const fn latest_archived_unix(&self) -> Option<u64> {
        self.latest_archived_unix
    }

    /// The segment size it counts with.
    pub const fn segment_size(&self) -> SegmentSize {
        self.segment_size
    }

    fn number(&self, file: WalFile) -> Option<(u32, u64)> {
        let WalFile::Segment(name) = file else { return None };
        let start = name.start_lsn(self.segment_size)?;
        Some((name.timeline().get(), start.as_u64() / self.segment_size.bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn size() -> SegmentSize {
        SegmentSize::new(16 << 20).unwrap()
    }

    fn segment(timeline: u32, number: u64) -> WalFile {
        let lsn = Lsn::new(number * size().bytes());
        WalFile::Segment(SegmentName::containing(TimelineId::new(timeline).unwrap(), lsn, size()))
    }

    fn archived(archive: &Archive, timeline: u32) -> u64 {
        let all = archive.frontiers();
        let one = all.iter().find(|f| f.timeline.get() == timeline).unwrap();
        one.archived.as_u64() / size().bytes()
    }

    /// Peers' bug: tier-1 deletion bounded by the latest uploaded segment.
    #[test]
    fn the_bound_is_the_contiguous_frontier_not_the_latest_upload() {
        let mut archive = Archive::new(size());
        archive.hold((3..10).map(|n| segment(1, n)));
        for number in [3, 4, 9, 7] {
            archive.record(segment(1, number), 1, Some(100));
        }
        assert_eq!(archived(&archive, 1), 5);
        assert!(archive.has("000000010000000000000009".parse().unwrap()));
        assert!(!archive.has("000000010000000000000005".parse().unwrap()));
        archive.record(segment(1, 5), 1, Some(100));
        assert_eq!(archived(&archive, 1), 6);
        archive.record(segment(1, 6), 1, Some(100));
        assert_eq!(archived(&archive, 1), 8);
        archive.record(segment(1, 8), 1, Some(100));
        assert_eq!(archived(&archive, 1), 10);
    }

    /// Two seal workers may finish in the other order.
    #[test]
    fn an_earlier_segment_that_shows_up_late_holds_the_frontier() {
        let mut archive = Archive::new(size());
        archive.hold([segment(1, 5)]);
        archive.record(segment(1, 5), 1, None);
        assert_eq!(archived(&archive, 1), 6);
        archive.hold([segment(1, 4)]);
        assert_eq!(archived(&archive, 1), 4);
        archive.record(segment(1, 4), 1, None);
        assert_eq!(archived(&archive, 1), 6);
    }

    #[test]
    fn the_same_segment_counts_once() {
        let mut archive = Archive::new(size());
        for time in [Some(5), None, Some(3)] {
            archive.record(segment(1, 1), 10, time);
        }
        assert_eq!(archive.totals(), Totals { files: 1, bytes: 10 });
        assert_eq!(archive.latest_archived_unix(), Some(5));
    }

    #[test]
    fn timelines_do_not_help_each_other() {
        let mut archive = Archive::new(size());
        archive.hold([segment(1, 3), segment(1, 4), segment(2, 4)]);
        archive.record(segment(2, 4), 1, Some(5));
        assert_eq!(archived(&archive, 1), 3);
        assert_eq!(archived(&archive, 2), 5);
    }

    #[test]
    fn what_tier1_no_longer_holds_still_counts_from_the_bucket() {
        let archive = Archive::new(size())
            .rebuild((5..8).map(|n| segment(1, n)), (2..6).map(|n| (segment(1, n), 10, n)));
        assert_eq!(archived(&archive, 1), 6);
        assert_eq!(archive.frontiers()[0].start, Lsn::new(2 * size().bytes()));
        assert_eq!(archive.totals(), Totals { files: 4, bytes: 40 });
        assert_eq!(archive.latest_archived_unix(), Some(5));
    }

    #[test]
    fn a_rebuild_shows_an_object_that_vanished() {
        let mut archive = Archive::new(size());
        archive.hold((0..4).map(|n| segment(1, n)));
        (0..4).for_each(|n| archive.record(segment(1, n), 1, Some(n)));
        let rebuilt = archive
            .rebuild((0..4).map(|n| segment(1, n)), [0, 1, 3].map(|n| (segment(1, n), 1, n)));
        assert_eq!(archived(&rebuilt, 1), 2);
    }

    #[test]
    fn partials_and_histories_count_but_move_nothing() {
        let mut archive = Archive::new(size());
        archive.record("000000010000000000000003.partial".parse().unwrap(), 7, Some(1));
        archive.record("00000002.history".parse().unwrap(), 3, None);
        assert!(archive.frontiers().is_empty());
        assert_eq!(archive.totals(), Totals { files: 2, bytes: 10 });
    }

    #[test]
    fn an_accepted_size_survives_a_rebuild_while_the_object_keeps_it() {
        let mut archive = Archive::new(size());
        archive.accept_size(segment(1, 1), 50);
        assert!(archive.accepts(segment(1, 1), 60, 50));
        let same = archive.rebuild([segment(1, 1)], [(segment(1, 1), 50, 1)]);
        assert!(same.accepts(segment(1, 1), 60, 50));
        let changed = archive.rebuild([segment(1, 1)], [(segment(1, 1), 51, 1)]);
        assert!(!changed.accepts(segment(1, 1), 60, 50));
    }

    proptest! {
        /// A1 and A2 in any order of uploads, against the plain definition.
        #[test]
        fn any_order_of_uploads_gives_the_frontier_of_the_definition(
            held in prop::collection::btree_set(0u64..40, 1..30),
            order in prop::collection::vec(0usize..64, 0..40),
        ) {
            let held: Vec<u64> = held.into_iter().collect();
            let mut archive = Archive::new(size());
            archive.hold(held.iter().map(|n| segment(1, *n)));
            let mut done = BTreeSet::new();
            let mut last = archived(&archive, 1);
            for index in order {
                let number = held[index % held.len()];
                done.insert(number);
                archive.record(segment(1, number), 1, None);
                let expected = (held[0]..).find(|n| !done.contains(n)).unwrap();
                prop_assert_eq!(archived(&archive, 1), expected);
                prop_assert!(expected >= last);
                last = expected;
            }
            let rebuilt = archive.rebuild(
                held.iter().map(|n| segment(1, *n)),
                done.iter().map(|n| (segment(1, *n), 1, 1)),
            );
            prop_assert_eq!(rebuilt.frontiers(), archive.frontiers());
        }
    }
}
