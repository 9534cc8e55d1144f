//! Pages that differ from the stored ones only in the location in a `CREATE TABLESPACE` record.
//!
//! When a restore relocates tablespaces, it removes the location from that record in the copy's WAL (`klio
//! wal-tablespaces`), and PostgreSQL keeps such WAL: the copy's first segment begins with it. The history is still the
//! same. To count as equal, each differing page must match, by its digest, the stored page after this edit of records
//! that are stored there, and every other page must be equal. Any other difference means another history. The record
//! may begin before the compared range or end after it, possibly in another segment, so one more page is read on each
//! side.
//!
//! Work is bounded (P13): the digests select a few pages, and if more pages than that differ, this edit is not the
//! cause.

use klio_pg::{Edit, Found, Landmark, Lsn, PAGE_BYTES, SegmentSize, tablespace_in_place};
use klio_storage::wal::overlap::{DIGEST_BYTES, PageDigests};
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

/// Tablespaces are created one at a time and rarely, whereas a divergence changes every page behind it.
const PAGES_MAX: usize = 64;
/// The most such records on one page; each may or may not have been edited, so all combinations are tried.
const RECORDS_MAX: usize = 4;

/// The range that has to be read to explain pages of `range`: a record that touches it reaches at most one page beyond
/// it on either side.
pub(super) fn around(range: &Range<Lsn>) -> Range<Lsn> {
    Lsn::new(range.start.as_u64().saturating_sub(PAGE_BYTES))..range.end.advance(PAGE_BYTES)
}

/// The stored bytes that are needed for the decision.
#[derive(Debug, Clone)]
pub(super) struct Kept {
    /// End of the compared range. Only the part of the last page before it was compared.
    end: u64,
    /// The differing pages by their start, with the digest of the other side.
    differing: BTreeMap<u64, Vec<u8>>,
    /// Those pages and their neighbours, because a record may begin on the page before.
    wanted: BTreeSet<u64>,
    pages: BTreeMap<u64, Vec<u8>>,
    made: Vec<Lsn>,
}

impl Kept {
    /// `None` when too many pages differ.
    pub(super) fn of(range: Range<Lsn>, ours: &[u8], theirs: &[u8]) -> Option<Self> {
        let pairs = ours.chunks_exact(DIGEST_BYTES).zip(theirs.chunks_exact(DIGEST_BYTES));
        let pages = (range.start.as_u64()..).step_by(PAGE_BYTES as usize);
        let differing = pairs.zip(pages).filter(|((ours, theirs), _)| ours != theirs);
        let differing: BTreeMap<u64, Vec<u8>> = differing
            .take(PAGES_MAX + 1)
            .map(|((_, theirs), page)| (page, theirs.to_vec()))
            .collect();
        if differing.len() > PAGES_MAX {
            return None;
        }
        let around = |page: &u64| [page.saturating_sub(PAGE_BYTES), *page, page + PAGE_BYTES];
        let wanted = differing.keys().flat_map(around).collect();
        let end = range.end.as_u64();
        Some(Self { end, differing, wanted, pages: BTreeMap::new(), made: Vec::new() })
    }

    /// Takes the next stored bytes, which begin at `position`.
    pub(super) fn push(&mut self, position: Lsn, mut piece: &[u8]) {
        let mut at = position.as_u64();
        while !piece.is_empty() {
            let offset = at % PAGE_BYTES;
            let take =
                usize::try_from(PAGE_BYTES - offset).map_or(piece.len(), |n| n.min(piece.len()));
            if self.wanted.contains(&(at - offset)) {
                self.pages.entry(at - offset).or_default().extend_from_slice(&piece[..take]);
            }
            (at, piece) = (at + take as u64, &piece[take..]);
        }
    }

    /// Takes a record found in the stored bytes.
    pub(super) fn see(&mut self, found: &Found) {
        let page = found.lsn.as_u64() - found.lsn.as_u64() % PAGE_BYTES;
        let made =
            matches!(&found.landmark, Landmark::TablespaceCreated { path, .. } if !path.is_empty());
        if made && self.wanted.contains(&page) {
            self.made.push(found.lsn);
        }
    }

    /// Whether such records explain every difference.
    pub(super) fn is_explained(&self, size: SegmentSize) -> bool {
        let edits: Vec<Vec<Edit>> =
            self.made.iter().filter_map(|at| self.edits(size, *at)).collect();
        self.differing.iter().all(|(page, theirs)| self.fits(*page, theirs, &edits))
    }

    fn edits(&self, size: SegmentSize, at: Lsn) -> Option<Vec<Edit>> {
        let offset = at.as_u64() % PAGE_BYTES;
        let first = at.as_u64() - offset;
        let mut bytes = self.pages.get(&first)?.get(usize::try_from(offset).ok()?..)?.to_vec();
        bytes.extend(self.pages.get(&(first + PAGE_BYTES)).into_iter().flatten());
        tablespace_in_place(size, at, &bytes)
    }

    fn fits(&self, page: u64, theirs: &[u8], edits: &[Vec<Edit>]) -> bool {
        let Some(held) = self.pages.get(&page) else { return false };
        let cut = usize::try_from(self.end.saturating_sub(page)).unwrap_or(usize::MAX);
        let held = &held[..held.len().min(cut)];
        let here = |edit: &&Edit| (page..page + held.len() as u64).contains(&edit.at.as_u64());
        let records: Vec<Vec<&Edit>> = edits
            .iter()
            .map(|record| record.iter().filter(here).collect::<Vec<_>>())
            .filter(|record| !record.is_empty())
            .collect();
        if records.len() > RECORDS_MAX {
            return false;
        }
        (1..1_u32 << records.len()).any(|choice| {
            let mut edited = held.to_vec();
            let chosen = records.iter().enumerate().filter(|(n, _)| choice & (1 << n) != 0);
            for edit in chosen.flat_map(|(_, record)| record) {
                edited[(edit.at.as_u64() - page) as usize] = edit.new;
            }
            let mut digests = PageDigests::new(Lsn::new(page));
            digests.push(&edited);
            digests.finish() == theirs
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use klio_pg::edit_segment;

    const START: u64 = 2 << 20;
    const PAGES: usize = 100;

    fn size() -> SegmentSize {
        SegmentSize::new(1 << 20).unwrap()
    }

    fn crc32c(bytes: &[u8]) -> u32 {
        let step = |crc: u32, _| if crc & 1 == 1 { (crc >> 1) ^ 0x82F6_3B78 } else { crc >> 1 };
        !bytes.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
    }

    /// Pages with a `CREATE TABLESPACE` at each of these places; the bytes there are page headers.
    fn held(places: &[u64]) -> (Vec<u8>, Vec<Found>) {
        let mut wal = vec![0x11; PAGES * PAGE_BYTES as usize];
        let mut found = Vec::new();
        for at in places {
            let main = [&16_400_u32.to_le_bytes()[..], b"/srv/x\0"].concat();
            let mut record = [&[0; 24][..], &[255, main.len() as u8], &main].concat();
            record[0] = record.len() as u8;
            record[17] = 5;
            let sum = crc32c(&[&record[24..], &record[..20]].concat());
            record[20..24].copy_from_slice(&sum.to_le_bytes());
            let mut place = *at;
            for byte in record {
                if place.is_multiple_of(PAGE_BYTES) {
                    place += 24;
                }
                wal[place as usize] = byte;
                place += 1;
            }
            let landmark = Landmark::TablespaceCreated { oid: 16_400, path: b"/srv/x".to_vec() };
            let lsn = Lsn::new(START + at);
            found.push(Found {
                lsn,
                end: lsn.advance(40),
                prev: Lsn::ZERO,
                landmark,
                of_prepared: false,
            });
        }
        (wal, found)
    }

    fn edited(wal: &[u8], at: u64) -> Vec<u8> {
        let edits = tablespace_in_place(size(), Lsn::new(START + at), &wal[at as usize..]).unwrap();
        let mut copy = wal.to_vec();
        edit_segment(&edits, Lsn::new(START), &mut copy).unwrap();
        copy
    }

    fn is_same(held: &[u8], found: &[Found], theirs: &[u8]) -> bool {
        is_same_in(held, found, theirs, 0..PAGES as u64 * PAGE_BYTES)
    }

    /// Only a part is compared, as it happens with one segment.
    fn is_same_in(held: &[u8], found: &[Found], theirs: &[u8], part: Range<u64>) -> bool {
        let range = Lsn::new(START + part.start)..Lsn::new(START + part.end);
        let digests = |wal: &[u8]| {
            let mut digests = PageDigests::new(range.start);
            digests.push(&wal[part.start as usize..part.end as usize]);
            digests.finish()
        };
        let Some(mut kept) = Kept::of(range.clone(), &digests(held), &digests(theirs)) else {
            return false;
        };
        let whole = around(&range);
        let mut at = whole.start.max(Lsn::new(START));
        let end = whole.end.as_u64().min(START + held.len() as u64);
        for piece in held[(at.as_u64() - START) as usize..(end - START) as usize].chunks(5000) {
            kept.push(at, piece);
            at = at.advance(piece.len() as u64);
        }
        let is_whole = |f: &&Found| f.lsn >= whole.start && f.end.as_u64() <= end;
        found.iter().filter(is_whole).for_each(|found| kept.see(found));
        kept.is_explained(size())
    }

    #[test]
    fn a_record_across_the_end_of_what_is_compared_is_explained_from_both_sides() {
        for back in [8, 16, 24, 32] {
            let border = 8 * PAGE_BYTES;
            let at = border - back;
            let (wal, found) = held(&[at]);
            let copy = edited(&wal, at);
            assert!(is_same_in(&wal, &found, &copy, 0..border), "{back}");
            assert!(is_same_in(&wal, &found, &copy, border..PAGES as u64 * PAGE_BYTES), "{back}");
            let mut spoilt = copy.clone();
            spoilt[border as usize + 100] ^= 1;
            assert!(
                !is_same_in(&wal, &found, &spoilt, border..PAGES as u64 * PAGE_BYTES),
                "{back}"
            );
        }
    }

    #[test]
    fn what_is_held_behind_the_last_compared_byte_changes_nothing() {
        let (wal, found) = held(&[800]);
        let copy = edited(&wal, 800);
        assert!(is_same_in(&wal, &found, &copy, 0..3000));
        let mut spoilt = copy;
        spoilt[2999] ^= 1;
        assert!(!is_same_in(&wal, &found, &spoilt, 0..3000));
    }

    #[test]
    fn a_tablespace_s_place_is_no_other_history_wherever_its_record_lies() {
        for back in [8, 16, 24, 32, 4000] {
            let at = 7 * PAGE_BYTES - back;
            let (wal, found) = held(&[at, 20 * PAGE_BYTES + 80]);
            assert!(is_same(&wal, &found, &edited(&wal, at)), "{back}");
            let both = edited(&edited(&wal, at), 20 * PAGE_BYTES + 80);
            assert!(is_same(&wal, &found, &both), "{back}");
        }
        // Only one of two records on a page was edited, either of them.
        let (wal, found) = held(&[800, 1600]);
        assert!(is_same(&wal, &found, &edited(&wal, 800)));
        assert!(is_same(&wal, &found, &edited(&wal, 1600)));
    }

    #[test]
    fn whatever_else_differs_is_another_history() {
        let (wal, found) = held(&[800]);
        let copy = edited(&wal, 800);
        let spoilt = |place: usize| {
            let mut copy = copy.clone();
            copy[place] ^= 1;
            copy
        };
        for place in [0, 799, 820, 826, 830, 831, 5000, 50 * PAGE_BYTES as usize] {
            assert!(!is_same(&wal, &found, &spoilt(place)), "{place}");
        }
        // These are not equal: the edit the other way round, and a page without such a record.
        assert!(!is_same(&copy, &found, &wal));
        assert!(!is_same(&wal, &[], &copy));
        let elsewhere =
            |byte: u8| [wal[..PAGE_BYTES as usize].to_vec(), vec![byte; 99 * 8192]].concat();
        assert!(!is_same(&wal, &found, &elsewhere(0x12)));
    }
}
