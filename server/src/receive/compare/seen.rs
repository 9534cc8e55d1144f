//! What a comparison sees of a history that differs: what its number is found by if it is refused (P11).
//!
//! Nothing of a refused history is stored, so its next comparison has to show the same WAL again. All that is kept in
//! memory is one hash for each refused history.

use klio_pg::{Lsn, PAGE_BYTES, TimelineId};
use klio_proto::wal::CompareBegin;
use klio_storage::{
    generations::{Generation, Left},
    layout::ClusterName,
    record::Unknown,
    wal::overlap::DIGEST_BYTES,
};
use sha2::{Digest, Sha256};

/// How much WAL from the place where a history left identifies it. Even WAL that repeats the same work has the time of
/// each commit.
const IDENTIFYING_BYTES: u64 = 1 << 20;

const fn page_of(at: Lsn) -> Lsn {
    Lsn::new(at.as_u64() - at.as_u64() % PAGE_BYTES)
}

/// Hashes the digests of the pages that begin in a range, as they pass.
#[derive(Debug, Clone)]
struct Run {
    from: Lsn,
    to: Lsn,
    next: Lsn,
    hasher: Sha256,
}

impl Run {
    fn new(from: Lsn, to: Lsn) -> Self {
        Self { from, to, next: from, hasher: Sha256::new() }
    }

    /// Takes the digests of the pages from `at` on.
    fn push(&mut self, at: Lsn, digests: &[u8]) {
        let mut page = at;
        for digest in digests.chunks_exact(DIGEST_BYTES) {
            if page == self.next && page < self.to {
                self.hasher.update(digest);
                self.next = page.advance(PAGE_BYTES);
            }
            page = page.advance(PAGE_BYTES);
        }
    }

    /// The hash, if all pages have passed.
    fn digest(&self) -> Option<String> {
        let hash = self.hasher.clone().finalize();
        (self.next >= self.to).then(|| hash.iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

/// What passes during one comparison.
#[derive(Debug)]
pub(super) struct Seen {
    generation: u32,
    timeline: TimelineId,
    begins: Lsn,
    end: Lsn,
    /// From here on the WAL was found to be equal.
    from: Lsn,
    /// The refused histories whose WAL this comparison shows, by number, and the hashes on record.
    known: Vec<(u32, Run, String)>,
    /// The page where PostgreSQL's WAL ends.
    last: Run,
    /// From the page where the histories diverge on.
    own: Option<Run>,
}

impl Seen {
    pub(super) fn new(cluster: &ClusterName, begin: &CompareBegin, all: &[Generation]) -> Self {
        let shows = |left: &Left| {
            let whole = left.to == page_of(left.to) && left.to <= begin.end;
            left.timeline == begin.timeline
                && begin.start <= left.at
                && (whole && left.at < left.to || left.to == begin.end)
        };
        let refused = all.iter().filter(|g| !g.taken).filter_map(|g| Some((g, g.left.as_ref()?)));
        let known = refused
            .filter(|(_, left)| shows(left))
            .map(|(g, left)| (g.number, Run::new(left.at, left.to), left.digest.clone()));
        let begins = begin.history.as_ref().and_then(|history| history.switch_point());
        Self {
            generation: cluster.number().unwrap_or(1),
            timeline: begin.timeline,
            begins: begins.unwrap_or(Lsn::ZERO),
            end: begin.end,
            from: begin.start,
            known: known.collect(),
            last: Run::new(page_of(begin.end), begin.end),
            own: None,
        }
    }

    /// PostgreSQL's digests of the pages from `at` on.
    pub(super) fn pass(&mut self, at: Lsn, theirs: &[u8]) {
        let runs = self.known.iter_mut().map(|(_, run, _)| run);
        for run in runs.chain([&mut self.last]).chain(&mut self.own) {
            run.push(at, theirs);
        }
    }

    /// WAL before `at` was not compared.
    pub(super) fn skip_to(&mut self, at: Lsn) {
        self.from = at;
    }

    /// The histories diverge on `page`; `theirs` are the digests of the pages from `at` on that passed last.
    pub(super) fn leave(&mut self, page: Lsn, at: Lsn, theirs: &[u8]) {
        let most = page.advance(IDENTIFYING_BYTES);
        let whole = page_of(self.end).min(most);
        let mut own = Run::new(page, if whole > page { whole } else { self.end });
        own.push(at, theirs);
        self.own = Some(own);
    }

    /// PostgreSQL has nothing behind the end of the comparison.
    pub(super) fn leave_at_end(&mut self) {
        self.own = Some(self.last.clone());
    }

    /// The page where a timeline begins that is held with another beginning, if this comparison shows it.
    pub(super) fn leave_at_beginning(&mut self, start: Lsn) {
        let page = page_of(self.begins).max(start);
        if page < self.end {
            self.from = page;
            self.leave(page, start, &[]);
        }
    }

    /// How far digests are still wanted.
    pub(super) fn wanted(&self) -> Lsn {
        let runs = self.known.iter().map(|(_, run, _)| run).chain(&self.own);
        runs.map(|run| run.to).max().unwrap_or(Lsn::ZERO)
    }

    pub(super) fn left(&self) -> Option<Left> {
        let own = self.own.as_ref()?;
        Some(Left {
            generation: self.generation,
            timeline: self.timeline,
            begins: self.begins,
            from: self.from.min(own.from),
            at: own.from,
            to: own.to,
            digest: own.digest()?,
            unknown: Unknown::default(),
        })
    }

    /// The refused histories whose WAL was shown, and whether it is that on record.
    pub(super) fn refused(&self) -> Vec<(u32, bool)> {
        let answer =
            |(number, run, digest): &(u32, Run, String)| Some((*number, run.digest()? == *digest));
        self.known.iter().filter_map(answer).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use klio_proto::v1;
    use klio_storage::{
        generations::{Generations, State, Stranger},
        wal::overlap::{PageDigests, first_difference},
    };

    const START: u64 = 4 << 20;

    fn begin(end: u64) -> CompareBegin {
        let begin = v1::CompareBegin {
            cluster: "main".into(),
            system_identifier: 7,
            segment_size: 1 << 20,
            postgres_version: 170_000,
            writer_id: "w".into(),
            timeline: 1,
            start_lsn: START,
            end_lsn: end,
            next_lsn: end,
            held_lsn: end,
            ..v1::CompareBegin::default()
        };
        CompareBegin::try_from(begin).unwrap()
    }

    fn digests(wal: &[u8], end: u64) -> Vec<u8> {
        let mut digests = PageDigests::new(Lsn::new(START));
        digests.push(&wal[..(end - START) as usize]);
        digests.finish()
    }

    /// WAL that is the same up to `parts`, and `history`'s own from there on.
    fn wal(parts: u64, history: u8) -> Vec<u8> {
        let byte = |n: u64| if n < parts { (n % 251) as u8 } else { history };
        (0..2 << 20).map(byte).collect()
    }

    /// Compares with the WAL that is held, and has the result refused.
    fn refuse(all: &mut Generations, wal: &[u8], end: u64) -> (u32, State) {
        let held = digests(&self::wal(u64::MAX, 0), START + (2 << 20));
        let theirs = digests(wal, end);
        let begin = begin(end);
        let mut seen = Seen::new(&"main".parse().unwrap(), &begin, &all.all());
        seen.pass(begin.start, &theirs);
        match first_difference(begin.start, &held, &theirs) {
            Some(page) => seen.leave(page, begin.start, &theirs),
            None => seen.leave_at_end(),
        }
        let (left, seen) = (seen.left(), seen.refused());
        let reason = "set back".into();
        let found = Stranger { reason, system_identifier: 7, other_system: false, left, seen };
        let made = all.begin(found, 1.0, false).unwrap();
        (made.number, made.state)
    }

    #[test]
    fn a_refused_history_is_found_by_its_own_wal_however_much_of_it_there_is() {
        let mut all = Generations::default();
        let (parts, page) = (100_000, 100_000 / PAGE_BYTES * PAGE_BYTES);
        // Where it was set back to, in the same page, and far behind it.
        for end in [parts, parts + 50, page + PAGE_BYTES + 9, 300_000, 2 << 20] {
            assert_eq!(refuse(&mut all, &wal(parts, 1), START + end), (2, State::Refused), "{end}");
        }
        all.retire(2, "ops", 2.0).unwrap();
        assert_eq!(refuse(&mut all, &wal(parts, 1), START + (2 << 20)).0, 2);
        // Another one was set back to the same place, and one to another.
        for end in [300_000, 2 << 20] {
            assert_eq!(refuse(&mut all, &wal(parts, 2), START + end), (3, State::Refused), "{end}");
        }
        assert_eq!(refuse(&mut all, &wal(20_000, 1), START + 60_000), (4, State::Refused));
        assert_eq!(refuse(&mut all, &wal(parts, 1), START + (2 << 20)), (2, State::Retired));
    }
}
