//! Fills a hole in the middle of a timeline: rebuilds the journal of a segment that lost acknowledged WAL from what
//! PostgreSQL still has.
//!
//! - The new file replaces the damaged one only when it is complete and synced, begins with exactly the bytes that are
//!   still good, every page belongs there, and the WAL behind it continues its last record (P11). Until then no
//!   existing data changes; a crash leaves a `.tmp` file, which is removed at start.
//! - The damaged file is kept as it was found (P6).
//! - No position moves: the acknowledged WAL continues behind the hole, and the stream keeps running (P2).
//!
//! Memory: one frame, and a digest for each page of one segment.

use super::{
    Seam, WalStore,
    cluster::{Cluster, State, Unsealed, lock},
    frame::JournalHeader,
    journal::{self, Frames, Journal},
    overlap::{self, PageDigests},
    reader::decode_frame,
    resume::Filling,
    types::Pinned,
};
use crate::{
    Error, Kind, Op,
    disk::durable,
    layout::{ClusterName, WalFile},
};
use klio_pg::{
    LevelScan, Lsn, PageChecker, PageExpectation, RecordWalker, SegmentName, TimelineId,
    WalParameters,
};
use std::{
    path::PathBuf,
    sync::{Arc, atomic::Ordering},
};
use zstd::zstd_safe::DCtx;

/// A segment that lost acknowledged WAL although more WAL follows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hole {
    pub timeline: TimelineId,
    /// The segment's first byte.
    pub start: Lsn,
    /// One past the segment's last byte.
    pub end: Lsn,
}

/// A segment that is being rebuilt. Dropping it discards what was received.
#[derive(Debug)]
pub struct Refill {
    store: WalStore,
    cluster: Arc<Cluster>,
    entry: Arc<Unsealed>,
    file: WalFile,
    next: Option<SegmentName>,
    tmp: PathBuf,
    filling: Option<Filling>,
    at: Lsn,
    checker: PageChecker,
    walker: Option<RecordWalker>,
    levels: LevelScan,
    changes: Vec<(Lsn, WalParameters)>,
    /// How far the damaged journal is good, and the page digests up to there.
    good: (Lsn, Vec<u8>),
    seen: Option<PageDigests>,
}

impl WalStore {
    /// The segments that can be rebuilt if PostgreSQL still has their WAL.
    pub fn holes(&self, name: &ClusterName) -> Vec<Hole> {
        let Some(cluster) = self.find(name) else { return Vec::new() };
        let state = lock(&cluster.state);
        let journals = state.lines.values().flat_map(|line| line.journals.values());
        let holes = journals.filter(|journal| state.is_hole(journal));
        holes.map(|j| Hole { timeline: j.timeline, start: j.start, end: j.end }).collect()
    }

    /// Begins to rebuild the segment at `start`.
    ///
    /// # Errors
    /// `NotFound` when it is not (or no longer) a hole, `Conflict` when it is already being rebuilt, or an I/O error of
    /// the disk.
    pub fn refill(
        &self,
        name: &ClusterName,
        timeline: TimelineId,
        start: Lsn,
    ) -> Result<Refill, Error> {
        let no_hole = || {
            let detail = format!("expected a damaged segment at {start}, found none");
            Error::new(Kind::NotFound, Op::Open, name, detail)
        };
        let cluster = self.find(name).ok_or_else(no_hole)?;
        let pinned = cluster.pinned()?;
        let (entry, history) = {
            let state = lock(&cluster.state);
            let entry = state.lines.get(&timeline).and_then(|line| line.journals.get(&start));
            let entry = entry.filter(|entry| state.is_hole(entry)).ok_or_else(no_hole)?;
            (Arc::clone(entry), state.history(timeline).ok_or_else(no_hole)?)
        };
        if entry.refilled.swap(true, Ordering::AcqRel) {
            let detail =
                "expected a segment that nobody is rebuilding, found one that is being rebuilt";
            return Err(Error::new(Kind::Conflict, Op::Open, entry.path.display(), detail));
        }
        let give_up = |error| {
            entry.refilled.store(false, Ordering::Release);
            error
        };
        let tmp = durable::tmp_path(&entry.path.with_extension("refill"));
        let good = good_part(&cluster, &entry).map_err(give_up)?;
        let journal = begin(&cluster, &entry, &pinned, &tmp).map_err(give_up)?;
        let (size, major) = (pinned.segment_size, pinned.postgres_version / 10_000);
        let expect = PageExpectation {
            system_identifier: pinned.system_identifier,
            segment_size: size,
            postgres_major: major,
            history,
        };
        Ok(Refill {
            file: WalFile::Segment(entry.segment(size)),
            next: Some(SegmentName::containing(timeline, entry.end, size)),
            store: self.clone(),
            filling: Some(Filling::new(journal, start)),
            at: start,
            checker: PageChecker::new(expect, start),
            walker: Some(RecordWalker::new(size, major, start)),
            levels: LevelScan::new(size),
            changes: Vec::new(),
            seen: Some(PageDigests::new(start)),
            cluster,
            entry,
            tmp,
            good,
        })
    }
}

/// How far a damaged journal can be read, and the digests of its pages up to there.
fn good_part(cluster: &Cluster, entry: &Unsealed) -> Result<(Lsn, Vec<u8>), Error> {
    if entry.is_missing() {
        return Ok((entry.start, Vec::new()));
    }
    let mut digests = PageDigests::new(entry.start);
    let mut frames = match Frames::open(cluster.disk(), &entry.path, &cluster.keys()) {
        Ok(frames) if frames.header().start == entry.start => frames,
        Ok(_) => return Ok((entry.start, Vec::new())),
        Err(e) if e.kind == Kind::Corrupt => return Ok((entry.start, Vec::new())),
        Err(e) => return Err(e),
    };
    let (mut context, mut buffer) = (DCtx::create(), Vec::new());
    while let Some(frame) = frames.next()? {
        digests.push(decode_frame(&mut context, &frame, &mut buffer)?);
    }
    Ok((digests.position(), digests.finish()))
}

/// Creates an empty journal of the same segment, beside the damaged one.
fn begin(
    cluster: &Cluster,
    entry: &Unsealed,
    pinned: &Pinned,
    tmp: &std::path::Path,
) -> Result<Journal, Error> {
    let keys = cluster.writing_keys()?;
    let mut header = JournalHeader::new(pinned, entry.timeline, entry.start);
    let cipher = keys.begin(&mut header, &*cluster.shared.options.next_id)?;
    journal::create(cluster.disk(), tmp, header, cipher, None, 0)
}

impl Refill {
    /// Appends the next bytes of the segment.
    ///
    /// # Errors
    /// `Invalid` for WAL that does not belong here, or an I/O error of the disk. Existing data is unchanged.
    pub fn push(&mut self, data: &[u8]) -> Result<(), Error> {
        let room = self.entry.end.bytes_since(self.at);
        if data.len() as u64 > room {
            return Err(self.refuse(format!("at most {room} bytes more"), data.len()));
        }
        self.checker.check(data).map_err(|e| {
            Error::new(Kind::Invalid, Op::Append, &self.cluster.name, &e).with_source(e)
        })?;
        let changes = &mut self.changes;
        self.levels.push(self.at, data, &mut |lsn, parameters| changes.push((lsn, parameters)));
        if let Some(walker) = &mut self.walker {
            walker.push(data, &mut |_| {});
        }
        if let (Some(seen), true) = (&mut self.seen, self.at < self.good.0) {
            let known = self.good.0.bytes_since(self.at).min(data.len() as u64);
            seen.push(&data[..known as usize]);
        }
        if let Some(filling) = &mut self.filling {
            filling.take(&self.cluster, data)?;
        }
        self.at = self.at.advance(data.len() as u64);
        Ok(())
    }

    /// Replaces the damaged journal by the complete segment, durably, and returns the file that can be sealed now.
    ///
    /// # Errors
    /// `Invalid` when the segment is incomplete, `Conflict` when its WAL differs from the WAL that was held, or an I/O
    /// error of the disk.
    pub fn finish(mut self) -> Result<WalFile, Error> {
        let end = self.entry.end;
        let Some(filling) = self.filling.take().filter(|_| self.at == end) else {
            return Err(self.refuse(format!("WAL up to {end}"), self.at));
        };
        self.check_beginning()?;
        self.check_end()?;
        let journal = filling.finish(&self.cluster, end)?;
        if !self.changes.is_empty() {
            self.cluster.note_levels(self.entry.timeline, &self.changes)?;
        }
        self.cluster.put_in_place(&self.entry, journal)?;
        Ok(self.file)
    }

    fn refuse(&self, expected: String, found: impl std::fmt::Display) -> Error {
        let detail = format!("expected {expected}, found {found}");
        Error::new(Kind::Invalid, Op::Append, self.entry.path.display(), detail)
    }

    /// Checks that the bytes which are still good are the same in the new file.
    fn check_beginning(&mut self) -> Result<(), Error> {
        let seen = self.seen.take().map(PageDigests::finish).unwrap_or_default();
        match overlap::first_difference(self.entry.start, &self.good.1, &seen) {
            None => Ok(()),
            Some(page) => Err(self.another(page, "the bytes that are still good".into())),
        }
    }

    /// Checks that the WAL behind the segment continues its last record.
    fn check_end(&mut self) -> Result<(), Error> {
        let end = self.entry.end;
        let seam = self.walker.take().and_then(|walker| Seam::continues(walker, end));
        let (Some(mut seam), Some(next)) = (seam, self.next) else { return Ok(()) };
        let found = match self.store.read(&self.cluster.name, WalFile::Segment(next)) {
            Ok(found) => found,
            // The next segment is a hole as well, or damaged: the check is made when that one is filled.
            Err(e) if matches!(e.kind, Kind::NotFound | Kind::Corrupt) => return Ok(()),
            Err(e) => return Err(e),
        };
        let mut broken = None;
        let mut seen = false;
        self.store.plain_pieces(found, &mut |piece| {
            if !seen {
                match seam.push(piece) {
                    Ok(done) => seen = done,
                    Err(found) => (broken, seen) = (Some(found), true),
                }
            }
            Ok(())
        })?;
        match broken {
            None => Ok(()),
            Some(found) => Err(self.another(found.at, found.to_string())),
        }
    }

    fn another(&self, at: Lsn, expected: String) -> Error {
        let detail = format!("expected {expected}, found other WAL at {at}");
        Error::new(Kind::Conflict, Op::Append, self.entry.path.display(), detail).hint(
            "check which PostgreSQL sent this: it is another history, and nothing was changed",
        )
    }
}

impl Drop for Refill {
    fn drop(&mut self) {
        self.entry.refilled.store(false, Ordering::Release);
        if let Err(error) = durable::remove_if_there(self.cluster.disk(), &self.tmp) {
            tracing::warn!(%error, "cannot remove an unfinished copy of a segment; it stays until the next start");
        }
    }
}

impl State {
    /// Whether only the beginning of the segment was held when its sealed file was lost.
    fn has_only_begun(&self, missing: &Unsealed) -> bool {
        let is_it = |d: &&super::DamagedWal| d.sealed && d.timeline == missing.timeline;
        let mut own = self.damaged.iter().filter(is_it);
        !own.any(|d| d.from <= missing.start && missing.end <= d.to)
    }

    /// Whether a journal lost WAL that the complete segment from PostgreSQL would restore.
    pub(super) fn is_hole(&self, journal: &Unsealed) -> bool {
        let (timeline, start, end) = (journal.timeline, journal.start, journal.end);
        let rotten = journal.is_full() && journal.harm().is_some();
        let in_gap = |g: &super::Gap| g.timeline == timeline && g.from < end && start < g.to;
        let taken = self.taken_over.get(&timeline).is_some_and(|taken| start < taken.end);
        let whole = |missing: &Unsealed| !self.has_only_begun(missing);
        (rotten || self.has_lost_bytes(journal))
            && (!journal.is_missing() || whole(journal))
            && !taken
            && self.removed(timeline, start).is_none()
            && !self.gaps.iter().any(in_gap)
    }
}

impl Cluster {
    /// Keeps the damaged journal aside and gives its name to the new one.
    fn put_in_place(&self, entry: &Arc<Unsealed>, journal: Journal) -> Result<(), Error> {
        let _one = lock(&entry.work);
        let is_hole = {
            let state = lock(&self.state);
            state.holds(entry) && state.is_hole(entry)
        };
        if !is_hole {
            let detail = "expected a damaged segment, found that it was repaired in the meantime";
            return Err(Error::new(Kind::NotFound, Op::Rename, entry.path.display(), detail));
        }
        if !entry.is_missing() {
            let aside = durable::parent(&entry.path).join(self.free_name(entry)?);
            self.copy_file(&entry.path, &aside)?;
        }
        durable::rename(self.disk(), &journal.path, &entry.path)?;
        let fresh = Unsealed::new(&journal.header, entry.path.clone(), entry.end, true);
        fresh.set_used(journal.offset);
        let mut state = lock(&self.state);
        state.problems.remove(&entry.path.display().to_string());
        if state.holds(entry)
            && let Some(line) = state.lines.get_mut(&entry.timeline)
        {
            line.journals.insert(entry.start, Arc::new(fresh));
        }
        drop(state);
        let (timeline, from, to) = (entry.timeline, entry.start, entry.end);
        tracing::info!(cluster = %self.name, %timeline, %from, %to, "rebuilt a damaged segment from another copy");
        self.heal();
        Ok(())
    }
}
