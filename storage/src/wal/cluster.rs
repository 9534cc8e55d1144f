//! The in-memory state of one cluster's WAL. Its size does not depend on the number of sealed segments.
//!
//! Locks are taken in this order and never in another: `op`, a slot's `sync`, its `core`, a journal's `work`, `files`,
//! `making_key`, `noting`, `state`. `state` is held briefly, never across a write or a sync.

use super::{
    admit::Held,
    cipher::{DataKey, JournalKeys},
    frame::JournalHeader,
    journal::{self, Journal},
    kept::{AllTakenOver, DamagedWal, Horizons, LevelChange},
    scratch::ScratchPool,
    types::{Gap, Pinned, Position, WalOptions},
    writer::Slot,
};
use crate::{
    Error, Kind, Op,
    disk::{Disk, DiskLock, durable},
    layout::{self, ClusterName, WalFile},
    timelines::{Standing, Timelines},
};
use klio_pg::{Lsn, SegmentName, TimelineHistory, TimelineId};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

pub(super) use super::unsealed::{Unsealed, lock};

/// What all clusters of a store share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) disk: Arc<dyn Disk>,
    pub(super) root: PathBuf,
    pub(super) options: WalOptions,
    pub(super) pool: ScratchPool,
    /// Keeps other processes out of `root` while this value lives.
    pub(super) _lock: Box<dyn DiskLock>,
}

#[derive(Debug, Default)]
pub(super) struct Line {
    pub(super) history: Option<TimelineHistory>,
    /// First byte and one past the last byte in sealed files.
    pub(super) sealed: Option<(Lsn, Lsn)>,
    /// By start LSN.
    pub(super) journals: BTreeMap<Lsn, Arc<Unsealed>>,
}

impl Line {
    pub(super) fn extend_sealed(&mut self, from: Lsn, to: Lsn) {
        let (first, last) = self.sealed.unwrap_or((from, to));
        self.sealed = Some((first.min(from), last.max(to)));
    }

    fn held_journals(&self) -> impl Iterator<Item = &Arc<Unsealed>> {
        self.journals.values().filter(|journal| !journal.is_empty())
    }

    pub(super) fn has_wal(&self) -> bool {
        self.sealed.is_some() || self.held_journals().next().is_some()
    }

    /// One past the last byte that is known to be on the medium.
    fn known_end(&self) -> Option<Lsn> {
        let last = self.held_journals().last().map(|journal| journal.known());
        self.sealed.map(|sealed| sealed.1).into_iter().chain(last).max()
    }

    fn start(&self) -> Option<Lsn> {
        let first = self.held_journals().next().map(|journal| journal.start);
        self.sealed.map(|sealed| sealed.0).into_iter().chain(first).min()
    }

    /// One past the last byte of WAL.
    fn end(&self) -> Option<Lsn> {
        let last = self.held_journals().last().map(|journal| journal.durable());
        self.sealed.map(|sealed| sealed.1).into_iter().chain(last).max()
    }
}

/// An empty journal that was created ahead of need.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) start: Lsn,
    pub(super) journal: Journal,
}

/// The mutable part of [`Cluster`].
#[derive(Debug, Default)]
pub(super) struct State {
    /// Set when reading the cluster's directory failed; the next use tries again.
    pub(super) broken: Option<(Kind, String)>,
    pub(super) pinned: Option<Pinned>,
    /// The keys that journals are read and written with.
    pub(super) keys: JournalKeys,
    /// The data key was written by this process, so it is known to be durable.
    pub(super) key_proven: bool,
    /// The small JSON files were written (or rewritten) by this process, so they are known to be durable.
    pub(super) records_proven: bool,
    pub(super) lines: BTreeMap<TimelineId, Line>,
    pub(super) gaps: Vec<Gap>,
    /// WAL that was removed on purpose.
    pub(super) horizons: Horizons,
    /// WAL that only tier 2 had when the stream continued behind it.
    pub(super) taken_over: AllTakenOver,
    /// Where `wal_level = minimal` began and ended.
    pub(super) levels: Vec<LevelChange>,
    pub(super) spares: Vec<PathBuf>,
    pub(super) spares_made: u64,
    /// By timeline, because each has its own stream.
    pub(super) prepared: BTreeMap<TimelineId, Prepared>,
    /// At most one for each timeline (WAL3).
    pub(super) writers: BTreeMap<TimelineId, Arc<Slot>>,
    /// The timeline whose writer is being opened. It must not be treated as ended meanwhile.
    pub(super) opening: Option<TimelineId>,
    /// No more WAL is expected on any timeline: the cluster's name now belongs to another history, or a person decided
    /// against this one.
    pub(super) over: bool,
    /// Which timelines are in conflict, and what was decided about them.
    pub(super) marks: Timelines,
    /// WAL that was acknowledged and is no longer readable here (`damage.rs`).
    pub(super) damaged: Vec<DamagedWal>,
    /// Current problems, by path.
    pub(super) problems: BTreeMap<String, String>,
}

impl State {
    /// Where the stream of a timeline resumes; `None` when nothing of it is known.
    pub(super) fn resume_at(&self, timeline: TimelineId) -> Option<Lsn> {
        let end = self.lines.get(&timeline).and_then(Line::end);
        self.behind_gaps(timeline, end.or_else(|| self.lost_from(timeline)))
    }

    fn behind_gaps(&self, timeline: TimelineId, end: Option<Lsn>) -> Option<Lsn> {
        let gap = self.gaps.iter().filter(|g| g.timeline == timeline).map(|g| g.to);
        let taken = self.taken_over.get(&timeline).map(|taken| taken.end);
        gap.chain(end).chain(taken).max()
    }

    /// The timelines with WAL on tier 1, or with WAL in tier 2 that the stream continued behind.
    fn with_wal(&self) -> impl Iterator<Item = TimelineId> {
        let held = self.lines.keys().copied().filter(|timeline| self.has_wal(*timeline));
        held.chain(self.taken_over.keys().copied())
    }

    /// The newest timeline with WAL that was neither retired nor left undecided.
    pub(super) fn followed(&self) -> Option<TimelineId> {
        self.marks.followed(self.with_wal())
    }

    /// Every timeline with a file, a gap or a taken-over stretch.
    fn timelines(&self) -> BTreeSet<TimelineId> {
        let gaps = self.gaps.iter().map(|g| g.timeline);
        self.lines.keys().chain(self.taken_over.keys()).copied().chain(gaps).collect()
    }

    /// Whether no more WAL of a timeline is expected. An undecided timeline may continue at any time.
    pub(super) fn has_come_to_its_end(&self, timeline: TimelineId) -> bool {
        let older = || self.followed().is_some_and(|followed| followed > timeline);
        let written = self.writers.contains_key(&timeline) || self.opening == Some(timeline);
        let ended = || match self.marks.standing(timeline) {
            Some(Standing::Retired) => true,
            Some(Standing::Undecided) => false,
            Some(Standing::Followed) | None => older(),
        };
        !written && (self.over || ended())
    }

    /// The timelines with WAL or a gap, as input for `admit.rs`.
    pub(super) fn held(&self) -> Vec<Held> {
        let held = |timeline| {
            let position = self.resume_at(timeline)?;
            let has_wal = self.has_wal(timeline) || self.taken_over.contains_key(&timeline);
            Some(Held { timeline, has_wal, position })
        };
        self.timelines().into_iter().filter_map(held).collect()
    }

    pub(super) fn positions(&self) -> Vec<Position> {
        let none = Line::default();
        let position = |timeline: TimelineId| {
            let line = self.lines.get(&timeline).unwrap_or(&none);
            let lost_from = self.lost_from(timeline);
            let flushed = self.behind_gaps(timeline, line.known_end().or(lost_from))?;
            // WAL that exists only in tier 2 still counts, so that the start does not jump when tier 1 evicts it.
            let first = line.start().or(lost_from);
            let taken = self.taken_over.get(&timeline).map(|taken| taken.start);
            let own = first.into_iter().chain(taken).min()?;
            let kept = self.horizons.get(&timeline).map(|horizon| horizon.held_from);
            let start = match (kept, first) {
                // Retention may have removed WAL that was taken over, too.
                (Some(kept), Some(first)) => kept.min(first),
                (Some(kept), None) => kept,
                (None, _) => own,
            };
            let unsealed = line.held_journals().next().map(|journal| journal.start);
            let sealed = unsealed.unwrap_or(flushed);
            let has_history = line.history.is_some();
            Some(Position { timeline, start, flushed, sealed, has_history })
        };
        self.timelines().into_iter().filter_map(position).collect()
    }

    /// The durable range of every journal.
    pub(super) fn open_runs(&self) -> Vec<(TimelineId, Lsn, Lsn)> {
        let journals = self.lines.values().flat_map(Line::held_journals);
        journals.map(|journal| (journal.timeline, journal.start, journal.durable())).collect()
    }

    /// Whether this journal will get no more WAL although its segment is not full.
    pub(super) fn has_ended(&self, journal: &Unsealed) -> bool {
        let over = self.has_come_to_its_end(journal.timeline) && !self.has_lost_bytes(journal);
        over || self.went_on_behind(journal.timeline, journal.durable())
    }

    /// Whether the stream skipped the WAL at `at` for a recorded reason: a gap, or WAL that tier 2 has.
    pub(super) fn went_on_behind(&self, timeline: TimelineId, at: Lsn) -> bool {
        let skipped = |g: &Gap| g.timeline == timeline && g.from == at && g.to > at;
        self.is_taken_over(timeline, at) || self.gaps.iter().any(skipped)
    }

    /// Whether a journal ends early although more WAL follows and no gap is recorded: synced bytes were lost. The rest
    /// of the file is left unchanged.
    pub(super) fn has_lost_bytes(&self, journal: &Unsealed) -> bool {
        if journal.is_missing() {
            return true;
        }
        let Some(line) = self.lines.get(&journal.timeline) else { return false };
        let followed = line.held_journals().any(|other| other.start > journal.start)
            || line.sealed.is_some_and(|sealed| sealed.1 > journal.end);
        let declared = self.went_on_behind(journal.timeline, journal.durable());
        followed && !journal.is_full() && !declared
    }

    /// Whether a segment's first byte was durable here and is not part of a recorded gap.
    pub(super) fn has_held(&self, file: WalFile) -> bool {
        let WalFile::Segment(segment) = file else { return false };
        let timeline = segment.timeline();
        let start = self.pinned.and_then(|p| segment.start_lsn(p.segment_size));
        let (Some(start), Some(line)) = (start, self.lines.get(&timeline)) else { return false };
        let within = line.start().is_some_and(|first| first <= start)
            && line.end().is_some_and(|end| start < end);
        let in_gap = |g: &Gap| g.timeline == timeline && g.from <= start && start < g.to;
        within && self.removed(timeline, start).is_none() && !self.gaps.iter().any(in_gap)
    }

    /// Whether a segment must have been received completely: there is WAL behind it, and no record explains why it
    /// should be missing.
    pub(super) fn was_written(&self, timeline: TimelineId, start: Lsn, end: Lsn) -> bool {
        let in_gap = |g: &Gap| g.timeline == timeline && g.from <= start && start < g.to;
        let behind = self.lines.get(&timeline).is_some_and(|line| line.goes_on_behind(end));
        behind && self.removed(timeline, start).is_none() && !self.gaps.iter().any(in_gap)
    }

    /// Whether acknowledged WAL of this segment is damaged here.
    pub(super) fn has_lost(&self, file: WalFile) -> bool {
        let (WalFile::Segment(segment) | WalFile::Partial(segment)) = file else { return false };
        let size = self.pinned.map(|p| p.segment_size);
        let start = size.and_then(|size| segment.start_lsn(size));
        let (Some(size), Some(start)) = (size, start) else { return false };
        self.is_lost(segment.timeline(), start, start.advance(size.bytes()))
    }

    /// The journals that are ready to be sealed, except damaged ones: those are rebuilt first (`refill.rs`).
    pub(super) fn finished(&self) -> Vec<WalFile> {
        let Some(size) = self.pinned.map(|p| p.segment_size) else { return Vec::new() };
        let file = |journal: &Arc<Unsealed>| match journal {
            j if j.is_full() && j.harm().is_some() => None,
            j if j.is_full() => Some(WalFile::Segment(j.segment(size))),
            j if self.has_ended(j) => Some(WalFile::Partial(j.segment(size))),
            _ => None,
        };
        self.lines.values().flat_map(Line::held_journals).filter_map(file).collect()
    }

    pub(super) fn journal(&self, segment: SegmentName) -> Option<Arc<Unsealed>> {
        let start = segment.start_lsn(self.pinned?.segment_size)?;
        self.lines.get(&segment.timeline())?.journals.get(&start).cloned()
    }
}

#[derive(Debug)]
pub(super) struct Cluster {
    pub(super) name: ClusterName,
    pub(super) shared: Arc<Shared>,
    /// Held while a writer is opened, the cluster is pinned, or its files are loaded.
    pub(super) op: Mutex<()>,
    /// Held while a journal file is created or removed.
    pub(super) files: Mutex<()>,
    /// Held while a data key is created.
    making_key: Mutex<()>,
    /// Held while `wal_levels.json` or `damaged-wal.json` is changed.
    pub(super) noting: Mutex<()>,
    pub(super) state: Mutex<State>,
}

impl Cluster {
    pub(super) fn new(name: ClusterName, shared: Arc<Shared>) -> Self {
        Self {
            name,
            shared,
            op: Mutex::new(()),
            files: Mutex::new(()),
            making_key: Mutex::new(()),
            noting: Mutex::new(()),
            state: Mutex::new(State::default()),
        }
    }

    pub(super) fn disk(&self) -> &dyn Disk {
        self.shared.disk.as_ref()
    }
    pub(super) fn directory(&self) -> PathBuf {
        self.shared.root.join(self.name.as_str())
    }
    pub(super) fn wal_directory(&self) -> PathBuf {
        self.directory().join("wal")
    }
    pub(super) fn open_path(&self, segment: SegmentName) -> PathBuf {
        self.wal_directory().join(segment.timeline().to_string()).join(format!("{segment}.open"))
    }
    pub(super) fn spare_directory(&self) -> PathBuf {
        self.wal_directory().join("spare")
    }

    /// The keys of the cluster's journals.
    pub(super) fn keys(&self) -> JournalKeys {
        lock(&self.state).keys.clone()
    }

    /// Reads the keys from disk.
    pub(super) fn load_keys(&self) -> Result<JournalKeys, Error> {
        let at_rest = &self.shared.options.at_rest;
        let path = self.directory().join(layout::OPEN_KEY);
        let data = match at_rest.reading() {
            Some(keys) => DataKey::load(self.disk(), &path, keys)?.map(Arc::new),
            None => None,
        };
        Ok(JournalKeys { data, writing: at_rest.is_on() })
    }

    /// The keys for writing new journals. The first call creates the data key, or writes the existing one again so that
    /// it is durable: every journal written afterwards depends on it.
    pub(super) fn writing_keys(&self) -> Result<JournalKeys, Error> {
        let at_rest = &self.shared.options.at_rest;
        let Some(keys) = at_rest.writing() else { return Ok(self.keys()) };
        let _one = lock(&self.making_key);
        if lock(&self.state).key_proven {
            return Ok(self.keys());
        }
        let path = self.directory().join(layout::OPEN_KEY);
        let key = match DataKey::load(self.disk(), &path, keys)? {
            Some(key) => {
                // The file can be visible without being durable: the program may have died before it synced the
                // directory.
                key.store(self.disk(), &path, keys)?;
                key
            }
            None => DataKey::create(self.disk(), &path, keys)?,
        };
        let mut state = lock(&self.state);
        state.keys = JournalKeys { data: Some(Arc::new(key)), writing: true };
        state.key_proven = true;
        Ok(state.keys.clone())
    }

    /// Records what is wrong with a path, or clears it after a success.
    pub(super) fn note<T>(&self, place: &Path, outcome: &Result<T, Error>) {
        let mut state = lock(&self.state);
        match outcome {
            Ok(_) => state.problems.remove(&place.display().to_string()),
            Err(e) => state.problems.insert(place.display().to_string(), e.to_string()),
        };
    }

    /// The settings that every journal of this cluster carries.
    pub(super) fn pinned(&self) -> Result<Pinned, Error> {
        lock(&self.state).pinned.ok_or_else(|| {
            let detail = "expected a pinned cluster, found none";
            Error::new(Kind::NotFound, Op::Open, &self.name, detail)
        })
    }

    pub(super) fn create_journal(
        &self,
        timeline: TimelineId,
        start: Lsn,
        preallocate: u64,
    ) -> Result<Journal, Error> {
        let pinned = self.pinned()?;
        let keys = self.writing_keys()?;
        let mut header = JournalHeader::new(&pinned, timeline, start);
        let cipher = keys.begin(&mut header, &*self.shared.options.next_id)?;
        let path = self.open_path(header.segment());
        let spare = {
            let mut state = lock(&self.state);
            if state.lines.get(&timeline).is_some_and(|line| line.journals.contains_key(&start)) {
                // The journal may contain acknowledged WAL (P1).
                let detail = "expected no journal of this segment, found one in use";
                return Err(Error::new(Kind::Conflict, Op::Create, path.display(), detail));
            }
            state.spares.pop()
        };
        journal::create(self.disk(), &path, header, cipher, spare.as_deref(), preallocate)
    }

    /// Removes a journal that was prepared for another position.
    fn discard(&self, prepared: Prepared) {
        let path = prepared.journal.path.clone();
        drop(prepared);
        if let Err(error) = durable::remove_if_there(self.disk(), &path) {
            tracing::warn!(%error, "cannot remove a prepared journal; it stays until the next start");
        }
    }

    /// Returns a journal for the segment at `start`, which has none: the prepared one if it fits, otherwise a new one.
    /// It is registered before the lock is released; otherwise a late `prepare` would find no journal and create it a
    /// second time (P1).
    pub(super) fn next_journal(
        &self,
        timeline: TimelineId,
        start: Lsn,
    ) -> Result<(Journal, Arc<Unsealed>), Error> {
        let _one = lock(&self.files);
        let prepared = lock(&self.state).prepared.remove(&timeline);
        let journal = match prepared {
            Some(prepared) if prepared.start == start => prepared.journal,
            other => {
                other.into_iter().for_each(|other| self.discard(other));
                self.create_journal(timeline, start, self.shared.options.preallocate)?
            }
        };
        let entry = Arc::new(Unsealed::new(&journal.header, journal.path.clone(), start, true));
        let mut state = lock(&self.state);
        state.lines.entry(timeline).or_default().journals.insert(start, Arc::clone(&entry));
        Ok((journal, entry))
    }

    /// Creates the journal at `start` ahead of need, unless it exists or is no longer needed.
    pub(super) fn prepare(
        &self,
        timeline: TimelineId,
        start: Lsn,
        preallocate: u64,
    ) -> Result<(), Error> {
        let _one = lock(&self.files);
        if !lock(&self.state).wants_prepared(timeline, start) {
            return Ok(());
        }
        let journal = self.create_journal(timeline, start, preallocate)?;
        lock(&self.state).prepared.insert(timeline, Prepared { start, journal });
        Ok(())
    }

    /// Keeps the file of a sealed journal as a spare, or removes it.
    pub(super) fn recycle(&self, path: &Path, may_keep: bool) {
        let spare = {
            let mut state = lock(&self.state);
            let keep = may_keep && state.spares.len() < self.shared.options.spares;
            state.spares_made += 1;
            keep.then(|| self.spare_directory().join(format!("{}.spare", state.spares_made)))
        };
        let disk = self.disk();
        // Neither operation has to be durable: if the file reappears, recovery sees that its segment is sealed.
        let outcome = match &spare {
            Some(spare) => durable::create_dir(disk, &self.spare_directory()).and_then(|()| {
                disk.rename(path, spare).map_err(|e| Error::io(Op::Rename, path, e))
            }),
            None => durable::remove_if_there(disk, path),
        };
        match (outcome, spare) {
            (Ok(()), Some(spare)) => lock(&self.state).spares.push(spare),
            (Ok(()), None) => {}
            (Err(error), _) => {
                tracing::warn!(%error, "cannot recycle the journal of a sealed segment; it stays until the next start");
            }
        }
    }
}

impl State {
    fn wants_prepared(&self, timeline: TimelineId, start: Lsn) -> bool {
        let Some(line) = self.lines.get(&timeline) else { return false };
        let last = line.journals.values().next_back();
        !self.prepared.contains_key(&timeline)
            && self.writers.contains_key(&timeline)
            && last.is_some_and(|journal| journal.end == start)
            // The segment may have been received and sealed in the meantime, before the one below it was.
            && line.sealed.is_none_or(|(_, end)| end <= start)
    }
}
