//! Whether new WAL continues the WAL that is held, where no byte of the two overlaps (P11). Pure.
//!
//! - The records are walked from the held WAL into the new WAL. A record that was cut at the seam must continue, and
//!   the first new record must point back to the last held one. A record that PostgreSQL abandoned after a crash does
//!   not count as a break.
//! - Behind a gap the first new record must point into the gap or to the last record before it.
//! - WAL that cannot be walked proves nothing and is never taken for a break.

use klio_pg::{Lsn, RecordWalker, SegmentSize};

/// Looks at the WAL up to the first new record.
#[derive(Debug)]
pub struct Seam {
    walker: RecordWalker,
    rule: Rule,
}

#[derive(Debug)]
enum Rule {
    /// The walker has seen the held WAL, whose complete records end at `end`.
    Continues { last: Lsn, end: Option<Lsn> },
    /// There is a gap in between; the last record before it began at `last`.
    Behind { last: Lsn },
}

/// The new WAL was written by another history.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("new WAL at {at} does not continue the WAL held here: expected {expected}, found {found}")]
pub struct Broken {
    /// Where the difference was found.
    pub at: Lsn,
    expected: String,
    found: String,
}

impl Seam {
    /// Starts from a walker that has seen all held WAL up to `next`, where the new WAL begins. `None` when it saw no
    /// complete record: then nothing can be checked.
    pub fn continues(walker: RecordWalker, next: Lsn) -> Option<Self> {
        let last = walker.last_record()?;
        let good = walker.ended().is_none() && walker.position() == next;
        let end = walker.records_end();
        good.then_some(Self { walker, rule: Rule::Continues { last, end } })
    }

    /// Starts behind a gap, with the same walker, if there is one, and the segment start where WAL begins again. A
    /// record with a null back-pointer, as after pg_resetwal, does not follow any held record.
    pub fn behind(held: Option<&RecordWalker>, size: SegmentSize, major: u32, next: Lsn) -> Self {
        let last = held.and_then(RecordWalker::last_record).unwrap_or(Lsn::new(1));
        Self { walker: RecordWalker::new(size, major, next), rule: Rule::Behind { last } }
    }

    /// Checks the next bytes; `true` when there is nothing more to check.
    ///
    /// # Errors
    /// The first sign of another history.
    pub fn push(&mut self, data: &[u8]) -> Result<bool, Broken> {
        self.walker.push(data, &mut |_| {});
        match &self.rule {
            Rule::Continues { last, end } => {
                if self.walker.records_end() > *end || self.walker.last_record() != Some(*last) {
                    return Ok(true);
                }
                match self.walker.ended() {
                    None => Ok(false),
                    Some(found) => Err(Broken {
                        at: self.walker.position(),
                        expected: format!("a record that follows the one at {last}"),
                        found: found.to_owned(),
                    }),
                }
            }
            Rule::Behind { last } => match self.walker.first_prev() {
                Some(prev) if prev < *last => Err(Broken {
                    at: self.walker.position(),
                    expected: format!("a record that follows one at {last} or later"),
                    found: format!("one that follows {prev}"),
                }),
                Some(_) => Ok(true),
                None => Ok(self.walker.ended().is_some()),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use klio_pg::PAGE_BYTES;
    use proptest::prelude::*;

    const SEGMENT: u64 = 1 << 20;
    const BASE: u64 = 3 * SEGMENT;

    fn size() -> SegmentSize {
        SegmentSize::new(SEGMENT as u32).unwrap()
    }

    /// WAL with records of these body lengths, laid out as PostgreSQL does it, and where each record begins.
    struct Wal {
        bytes: Vec<u8>,
        starts: Vec<u64>,
    }

    impl Wal {
        fn new(from: u64, previous: u64, bodies: &[u16], mark: u8) -> Self {
            let mut wal = Self { bytes: Vec::new(), starts: Vec::new() };
            let mut previous = previous;
            wal.page(from, 0);
            for length in bodies {
                wal.bytes.resize(wal.bytes.len().next_multiple_of(8), 0);
                if (from + wal.bytes.len() as u64).is_multiple_of(PAGE_BYTES) {
                    wal.page(from, 0);
                }
                let start = from + wal.bytes.len() as u64;
                let record = record(previous, &vec![mark; usize::from(*length)]);
                for (n, byte) in record.iter().enumerate() {
                    if (from + wal.bytes.len() as u64).is_multiple_of(PAGE_BYTES) {
                        wal.page(from, (record.len() - n) as u32);
                    }
                    wal.bytes.push(*byte);
                }
                wal.starts.push(start);
                previous = start;
            }
            wal
        }

        fn page(&mut self, from: u64, left: u32) {
            let at = from + self.bytes.len() as u64;
            let long = at.is_multiple_of(SEGMENT);
            let flags = u16::from(long) << 1 | u16::from(left > 0);
            self.bytes.extend(0xD110u16.to_le_bytes());
            self.bytes.extend(flags.to_le_bytes());
            self.bytes.extend(1u32.to_le_bytes());
            self.bytes.extend(at.to_le_bytes());
            self.bytes.extend(left.to_le_bytes());
            self.bytes.extend(vec![0; if long { 20 } else { 4 }]);
        }
    }

    fn record(previous: u64, body: &[u8]) -> Vec<u8> {
        let mut record = Vec::new();
        record.extend((24 + body.len() as u32).to_le_bytes());
        record.extend(9u32.to_le_bytes());
        record.extend(previous.to_le_bytes());
        record.extend([0, 10, 0, 0]);
        let crc = crc32c::crc32c_append(crc32c::crc32c(body), &record);
        record.extend(crc.to_le_bytes());
        record.extend(body);
        record
    }

    fn walked(bytes: &[u8]) -> RecordWalker {
        let mut walker = RecordWalker::new(size(), 15, Lsn::new(BASE));
        walker.push(bytes, &mut |_| {});
        walker
    }

    fn through(mut seam: Seam, bytes: &[u8], step: usize) -> Result<bool, Broken> {
        let mut done = false;
        for piece in bytes.chunks(step) {
            done = seam.push(piece)?;
            if done {
                break;
            }
        }
        Ok(done)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn the_same_history_goes_on_wherever_it_was_cut(
            bodies in prop::collection::vec(1u16..30_000, 3..8), cut in any::<prop::sample::Index>(), step in 1usize..9000,
        ) {
            let wal = Wal::new(BASE, 0, &bodies, 1);
            let at = cut.index(wal.bytes.len());
            let next = Lsn::new(BASE + at as u64);
            if let Some(seam) = Seam::continues(walked(&wal.bytes[..at]), next) {
                prop_assert!(through(seam, &wal.bytes[at..], step).is_ok());
            }
        }

        /// The new WAL begins at the same position and is valid in itself.
        #[test]
        fn records_of_another_history_are_found_at_the_first_one(
            held in prop::collection::vec(1u16..3000, 2..8), other in prop::collection::vec(1u16..3000, 8..20),
        ) {
            let (ours, theirs) = (Wal::new(BASE, 0, &held, 1), Wal::new(BASE, 0, &other, 2));
            let at = ours.bytes.len();
            let near = |start: &u64| start.abs_diff(BASE + at as u64) <= 48;
            prop_assume!(theirs.bytes.len() > at + 8192 && !theirs.starts.iter().any(near));
            let seam = Seam::continues(walked(&ours.bytes), Lsn::new(BASE + at as u64)).unwrap();
            prop_assert!(through(seam, &theirs.bytes[at..], 4096).is_err());
        }
    }

    #[test]
    fn the_first_record_behind_a_gap_points_into_it_or_to_what_is_held() {
        let held = walked(&Wal::new(BASE, 0, &[100, 200], 1).bytes);
        let last = held.last_record().unwrap().as_u64();
        let next = BASE + 4 * SEGMENT;
        for (previous, good) in [(last, true), (next - 500, true), (last - 8, false), (0, false)] {
            let seam = Seam::behind(Some(&held), size(), 15, Lsn::new(next));
            let found = through(seam, &Wal::new(next, previous, &[50], 1).bytes, 1000);
            assert_eq!(found.is_ok(), good, "xl_prev {previous:x}: {found:?}");
        }
        for (previous, good) in [(0, false), (8, true)] {
            let seam = Seam::behind(None, size(), 15, Lsn::new(next));
            let found = through(seam, &Wal::new(next, previous, &[50], 1).bytes, 1000);
            assert_eq!(found.is_ok(), good, "nothing whole is held: {found:?}");
        }
    }

    #[test]
    fn what_cannot_be_walked_says_nothing() {
        assert!(Seam::continues(walked(&[7; 9000]), Lsn::new(BASE + 9000)).is_none());
        let whole = Wal::new(BASE, 0, &[100, 200], 1);
        let elsewhere = Lsn::new(BASE + whole.bytes.len() as u64 + 8);
        assert!(Seam::continues(walked(&whole.bytes), elsewhere).is_none());
    }
}
