//! Finds out at start what is on disk, and makes it durable before it is relied on.
//!
//! - The longest valid prefix of a journal is used. A torn or unsynced tail behind it is dropped by copying the prefix
//!   into a new file, never by truncating.
//! - Of each timeline's journals, all but the last were synced before the next one got its first frame. The last one is
//!   only *visible*: the page cache may show bytes that a failed fsync never wrote. So it is copied and synced before
//!   its end counts as durable (P3); until then only what a frame reports as flushed counts. A copy that fails (usually
//!   because the disk is full) is tried again when a writer is opened.
//! - A damaged tail or a damaged header is set aside before anything replaces it (`damage.rs`). A bad frame or header
//!   never causes a journal to be removed.
//! - If a journal and its sealed file both exist, the journal is authoritative, because the rename of the sealed file
//!   may not be durable: the journal is sealed again. If the journal's content does not match its name, its file had
//!   already been recycled, which only happens once the sealed file is durable: the journal's name is removed.
//! - Names are synced before they are relied on: the program may have died between creating a name and syncing the
//!   directory.

use super::{
    cluster::{Cluster, Line, State, Unsealed, lock},
    damage, decode,
    frame::JournalHeader,
    horizon,
    journal::{self, Frames, Tail},
    kept::{self, Harm},
    record,
    rotten::Sealed,
    stored::StoredAt,
    takeover,
    types::Pinned,
    unreadable,
};
use crate::{
    Error, Kind, Op,
    disk::{Entry, durable, read_small},
    layout::{self, WalFile},
};
use klio_pg::{Lsn, SegmentName, TimelineHistory, TimelineId};
use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::Path,
    sync::Arc,
};

/// PostgreSQL writes one line per ancestor; this is enough for many thousands of them.
pub(super) const HISTORY_LIMIT_BYTES: u64 = 1 << 20;

impl Cluster {
    /// Reads the directory if that has not succeeded yet. Call it with `op` held.
    pub(super) fn ensure_loaded(&self) -> Result<(), Error> {
        let broken = lock(&self.state).broken.is_some();
        if broken { self.load() } else { Ok(()) }
    }

    /// Reads the directory. On failure the cluster stays broken and records why.
    pub(super) fn load(&self) -> Result<(), Error> {
        let loaded = match self.scan() {
            Ok((state, rotten)) => {
                let pinned = state.pinned;
                *lock(&self.state) = state;
                match pinned {
                    Some(pinned) => self.settle_rotten(&rotten, &pinned),
                    None => Ok(()),
                }
            }
            Err(e) => Err(e),
        };
        loaded.inspect_err(|e| lock(&self.state).broken = Some((e.kind, e.to_string())))
    }

    /// Makes every journal durable that is only visible. Call it with `op` held. Journals of a timeline with an active
    /// writer are left alone: they were made durable before the writer was opened.
    pub(super) fn prove_all(&self) -> Result<(), Error> {
        let unproven: Vec<Arc<Unsealed>> = {
            let state = lock(&self.state);
            let all = state.lines.values().flat_map(|line| line.journals.values());
            let free = |journal: &&Arc<Unsealed>| !state.writers.contains_key(&journal.timeline);
            all.filter(free).filter(|journal| !journal.is_proven()).cloned().collect()
        };
        for entry in unproven {
            let outcome = self.prove(&entry);
            self.note(&entry.path, &outcome);
            outcome?;
        }
        Ok(())
    }

    /// Writes the small files that were found at start once more before the first writer relies on them, because their
    /// renames may not be durable. Call it with `op` held.
    pub(super) fn prove_records(&self) -> Result<(), Error> {
        let timelines = {
            let state = lock(&self.state);
            if state.records_proven {
                return Ok(());
            }
            let with_history = state.lines.iter().filter(|(_, line)| line.history.is_some());
            with_history.map(|(timeline, _)| *timeline).collect::<Vec<TimelineId>>()
        };
        let disk = self.disk();
        for name in ["cluster.json", "gaps.json", layout::TIMELINES] {
            crate::record::prove(disk, &self.directory().join(name))?;
        }
        for timeline in timelines {
            let Some(stored) = self.stored(WalFile::History(timeline))? else { continue };
            let content = read_small(disk, &stored.path, 2 * HISTORY_LIMIT_BYTES)
                .map_err(|e| Error::io(Op::Read, &stored.path, e))?;
            durable::overwrite(disk, &stored.path, &content)?;
        }
        lock(&self.state).records_proven = true;
        Ok(())
    }

    fn prove(&self, entry: &Unsealed) -> Result<(), Error> {
        let _one = lock(&entry.work);
        self.keep_aside(entry)?;
        if entry.is_empty() {
            // There is nothing to keep. The removal is made durable, so that a crash cannot bring back frames that were never acknowledged.
            durable::remove_if_there(self.disk(), &entry.path)?;
            lock(&self.state).forget(entry);
            return durable::sync_dir(self.disk(), durable::parent(&entry.path));
        }
        // It may have been sealed in the meantime: then it is durable, and its file may already have another use.
        if lock(&self.state).holds(entry) {
            let (keys, next_id) = (self.writing_keys()?, &*self.shared.options.next_id);
            let before = self.disk().stat(&entry.path);
            let copy =
                journal::copy_up_to(self.disk(), &entry.path, entry.durable(), &keys, next_id)?;
            entry.set_used(copy.offset);
            // Only the file's modification time says when its last byte arrived. It is only displayed, so ignore a
            // failure.
            let kept = before.and_then(|b| self.disk().set_modified(&entry.path, b.modified_unix));
            drop(kept);
        }
        entry.set_known(entry.durable());
        entry.set_proven(true);
        Ok(())
    }

    /// Reads the directory: the state, and the sealed files that cannot be read.
    fn scan(&self) -> Result<(State, Vec<WalFile>), Error> {
        let (disk, directory) = (self.disk(), self.directory());
        let mut state = State::default();
        remove_tmp(self, &directory)?;
        durable::sync_dir(disk, &self.shared.root)?;
        durable::sync_dir(disk, &directory)?;
        state.pinned = record::load_pinned(disk, &directory.join("cluster.json"))?;
        lock(&self.state).pinned = state.pinned;
        state.keys = self.load_keys()?;
        lock(&self.state).keys = state.keys.clone();
        state.gaps = record::load_gaps(disk, &directory.join("gaps.json"))?;
        state.marks = record::load_timelines(disk, &directory.join(layout::TIMELINES))?;
        match horizon::load(disk, self) {
            Ok(horizons) => state.horizons = horizons,
            // Receiving does not need it, and retention removes nothing while there is a problem (P6).
            Err(e) => drop(state.problems.insert(e.place.clone(), e.to_string())),
        }
        // Receiving needs neither file. Unreadable ones are kept, and their content is reported as unknown.
        state.damaged = unreadable::load(self, &mut state, damage::FILE, unreadable::union)?;
        state.levels =
            unreadable::load(self, &mut state, crate::layout::LEVELS, kept::join_levels)?;
        // This one is required: without it a hole would look like a loss, or a stream would resume at the wrong
        // position.
        state.taken_over = takeover::load(disk, self)?;
        let entries = list(self, &self.wal_directory())?;
        let Some(pinned) = state.pinned else {
            let detail = "expected cluster.json beside WAL, found none";
            let fail = || Error::new(Kind::Corrupt, Op::Open, directory.display(), detail);
            return if entries.is_empty() { Ok((state, Vec::new())) } else { Err(fail()) };
        };
        if !entries.is_empty() {
            remove_tmp(self, &self.wal_directory())?;
            durable::sync_dir(disk, &self.wal_directory())?;
        }
        for spare in list(self, &self.spare_directory())? {
            durable::remove_if_there(disk, &self.spare_directory().join(&spare.name))?;
        }
        let mut rotten = Vec::new();
        for entry in entries {
            self.scan_entry(&entry, &pinned, &mut state, &mut rotten)?;
        }
        state.leave_placeholders(self, &pinned);
        state.forget_healed();
        Ok((state, rotten))
    }

    fn scan_entry(
        &self,
        entry: &Entry,
        pinned: &Pinned,
        state: &mut State,
        rotten: &mut Vec<WalFile>,
    ) -> Result<(), Error> {
        if entry.is_dir {
            let Ok(timeline) = entry.name.parse::<TimelineId>() else { return Ok(()) };
            return self.scan_line(timeline, pinned, state, rotten);
        }
        let Some((WalFile::History(timeline), form)) = WalFile::parse_stored(&entry.name) else {
            return Ok(());
        };
        let path = self.path_in(WalFile::History(timeline), form);
        let content = self.read_plain(&path, form, HISTORY_LIMIT_BYTES)?;
        let history = TimelineHistory::parse(timeline, &content)
            .map_err(|e| Error::new(Kind::Corrupt, Op::Read, path.display(), e))?;
        state.lines.entry(timeline).or_default().history = Some(history);
        Ok(())
    }

    fn scan_line(
        &self,
        timeline: TimelineId,
        pinned: &Pinned,
        state: &mut State,
        rotten: &mut Vec<WalFile>,
    ) -> Result<(), Error> {
        let directory = self.wal_directory().join(timeline.to_string());
        remove_tmp(self, &directory)?;
        durable::sync_dir(self.disk(), &directory)?;
        let (mut sealed, mut partial, mut open) =
            <(BTreeSet<_>, BTreeSet<_>, BTreeSet<_>)>::default();
        for entry in list(self, &directory)? {
            let place = |name: SegmentName| {
                name.start_lsn(pinned.segment_size).filter(|_| name.timeline() == timeline)
            };
            let stem = entry.name.strip_suffix(".open").and_then(|stem| stem.parse().ok());
            if let Some(start) = stem.and_then(place) {
                open.insert(start);
            }
            match WalFile::parse_stored(&format!("{timeline}/{}", entry.name)) {
                Some((WalFile::Segment(name), _)) => sealed.extend(place(name)),
                Some((WalFile::Partial(name), _)) => partial.extend(place(name)),
                _ => {}
            }
        }
        let mut line = state.lines.remove(&timeline).unwrap_or_default();
        let size = pinned.segment_size.bytes();
        if let (Some(first), Some(last)) = (sealed.first(), sealed.last()) {
            line.sealed = Some((*first, last.advance(size)));
        }
        let mut lengths = BTreeMap::new();
        for start in partial {
            let looks = open.contains(&start) || line.sealed.is_none_or(|sealed| sealed.1 <= start);
            let length = match looks {
                false => 0,
                true => match self.plain_size(timeline, start, pinned) {
                    Ok(length) => length,
                    // The file does not count as WAL, but it does not make the rest unusable.
                    Err(e) if e.kind == Kind::Corrupt => {
                        tracing::error!(cluster = %self.name, error = %e, "cannot read a sealed file");
                        let name = SegmentName::containing(timeline, start, pinned.segment_size);
                        rotten.push(WalFile::Partial(name));
                        continue;
                    }
                    Err(e) => return Err(e),
                },
            };
            // If there is a journal, that says how far the WAL reaches.
            let counts = if open.contains(&start) { 0 } else { length };
            line.extend_sealed(start, start.advance(counts));
            lengths.insert(start, length);
        }
        let mut empty = Vec::new();
        // The last one first: whether more WAL follows decides what a short journal means.
        for start in open.into_iter().rev() {
            let redundant =
                sealed.contains(&start).then_some(size).or_else(|| lengths.get(&start).copied());
            let beside = redundant.map(|bytes| {
                let end = start.advance(bytes);
                Beside { end, goes_on_behind: state.went_on_behind(timeline, end) }
            });
            if self.scan_journal(timeline, start, pinned, beside, &mut line)? {
                empty.push(start);
            }
        }
        // Behind the last journal with WAL there may be one whose first frame is damaged, so neither is proven. Sealed
        // files were synced earlier.
        let sealed_to = line.sealed.map_or(Lsn::ZERO, |(_, end)| end);
        for last in line.journals.values().rev().take_while(|last| last.start >= sealed_to) {
            last.set_proven(false);
            if !last.is_empty() {
                break;
            }
        }
        let harms = harms_of(&line);
        state.lines.insert(timeline, line);
        harms.into_iter().for_each(|harm| state.found_harm(timeline, harm));
        self.settle_empty(timeline, &empty, state)
    }

    fn plain_size(&self, timeline: TimelineId, start: Lsn, pinned: &Pinned) -> Result<u64, Error> {
        let file = WalFile::Partial(SegmentName::containing(timeline, start, pinned.segment_size));
        let Some(stored) = self.stored(file)? else { return Ok(0) };
        let sealed = Sealed { file, path: &stored.path, form: stored.form };
        let (length, read) = self.read_sealed(sealed, None, pinned);
        read.map(|()| length)
    }

    /// The number of plain bytes of a sealed file. Decodes all of it, and so verifies it.
    pub(super) fn plain_size_of(&self, stored: &StoredAt, limit: u64) -> Result<u64, Error> {
        let mut reader = self.open_plain(&stored.path, stored.form)?;
        decode::decode_reader(&mut reader, limit, &mut |_| Ok(()))
            .map_err(|e| e.at(stored.path.display()))
    }

    /// `beside` is the sealed file of the same segment. True when the journal has no intact frame.
    fn scan_journal(
        &self,
        timeline: TimelineId,
        start: Lsn,
        pinned: &Pinned,
        beside: Option<Beside>,
        line: &mut Line,
    ) -> Result<bool, Error> {
        let name = SegmentName::containing(timeline, start, pinned.segment_size);
        let path = self.open_path(name);
        let frames = Frames::open(self.disk(), &path, &self.keys()).and_then(|mut frames| {
            frames.skip_to(frames.header().end())?;
            let header = frames.header();
            let good = header.segment() == name
                && header.segment_size == pinned.segment_size
                && header.system_identifier == pinned.system_identifier;
            if good {
                return Ok(frames);
            }
            let detail =
                format!("expected the journal of {name}, found that of {}", header.segment());
            Err(Error::new(Kind::Corrupt, Op::Open, path.display(), detail))
        });
        let mut frames = match (frames, beside) {
            (Ok(frames), None) => frames,
            (Ok(frames), Some(beside)) if frames.position() >= beside.end => frames,
            (Err(e), Some(_)) if e.kind != Kind::Corrupt => return Err(e),
            (frames, Some(beside)) => {
                line.extend_sealed(start, beside.end);
                let shorter = Shorter { timeline, start, sealed: beside, frames: frames.ok() };
                return self.scan_shorter(shorter, pinned, line).map(|()| false);
            }
            (Err(e), None) if e.kind == Kind::Corrupt => {
                tracing::error!(cluster = %self.name, error = %e, "cannot read a journal; setting it aside unchanged");
                line.journals.insert(start, Arc::new(self.unreadable(timeline, start, pinned)?));
                return Ok(false);
            }
            (Err(e), None) => return Err(e),
        };
        let end = frames.position();
        let harm = match frames.tail()? {
            Tail::Clean => None,
            Tail::Torn => Some(Harm { from: end, to: end }),
            Tail::Lost(to) => Some(Harm { from: end, to }),
        };
        if end == start && harm.is_none() {
            return Ok(true);
        }
        let entry = Unsealed::new(frames.header(), path, end, true);
        entry.set_known(frames.flushed().min(end));
        entry.set_harm(harm);
        // If it is as long as its sealed file, both have the same content. It is sealed again, because the rename may
        // not be durable.
        line.journals.insert(start, Arc::new(entry));
        Ok(false)
    }

    /// Handles a journal that is shorter than its sealed file: either it was being filled from that file (`resume.rs`)
    /// when the machine stopped, or the medium lost the beginning of WAL that was acknowledged behind it. The sealed
    /// bytes are good in both cases.
    fn scan_shorter(
        &self,
        shorter: Shorter,
        pinned: &Pinned,
        line: &mut Line,
    ) -> Result<(), Error> {
        let Shorter { timeline, start, sealed, frames } = shorter;
        let header = match &frames {
            Some(frames) => *frames.header(),
            None => JournalHeader::new(pinned, timeline, start),
        };
        let (path, end) = (self.open_path(header.segment()), header.end());
        let entry = |durable, proven| Unsealed::new(&header, path.clone(), durable, proven);
        let Beside { end: sealed, goes_on_behind } = sealed;
        let more = line.journals.values().any(|j| j.start > start && !j.is_empty())
            || line.sealed.is_some_and(|(_, last)| last > end);
        if sealed < end && more && !goes_on_behind {
            // The segment was complete once: the missing bytes are a hole, and the file is kept as it is.
            line.journals.insert(start, Arc::new(entry(sealed, true)));
            return Ok(());
        }
        let to = match frames {
            Some(mut frames) => match frames.tail()? {
                Tail::Clean => None,
                Tail::Torn => Some(sealed),
                Tail::Lost(to) => Some(to.max(sealed)),
            },
            // A recycled file has the header of another journal, or half of one, and no flushed frames behind the
            // sealed bytes. It may have frames that were never acknowledged.
            None => {
                let flushed = journal::evidence(self.disk(), &path, start, end)?.flushed;
                Some(flushed).filter(|flushed| *flushed > sealed)
            }
        };
        let Some(to) = to.filter(|_| sealed < end && !goes_on_behind) else {
            return durable::remove_if_there(self.disk(), &path);
        };
        // The journal is set aside before it is replaced. The stream continues behind the sealed bytes.
        let entry = entry(start, false);
        entry.set_harm(Some(Harm { from: sealed, to }));
        line.journals.insert(start, Arc::new(entry));
        Ok(())
    }

    /// The entry of a journal whose header cannot be read.
    fn unreadable(
        &self,
        timeline: TimelineId,
        start: Lsn,
        pinned: &Pinned,
    ) -> Result<Unsealed, Error> {
        let header = JournalHeader::new(pinned, timeline, start);
        let path = self.open_path(header.segment());
        let found = journal::evidence(self.disk(), &path, start, header.end())?;
        let to = found.upto.max(found.flushed);
        let entry = Unsealed::new(&header, path, start, true);
        entry.set_harm(Some(Harm { from: start, to }));
        Ok(entry)
    }

    /// Handles journals without a single intact frame: nothing was ever synced into them, unless more WAL follows.
    fn settle_empty(
        &self,
        timeline: TimelineId,
        empty: &[Lsn],
        state: &mut State,
    ) -> Result<(), Error> {
        let Some(size) = state.pinned.map(|p| p.segment_size) else { return Ok(()) };
        for start in empty {
            let name = SegmentName::containing(timeline, *start, size);
            let path = self.open_path(name);
            if !state.was_written(timeline, *start, start.advance(size.bytes())) {
                durable::remove_if_there(self.disk(), &path)?;
                continue;
            }
            // In doubt, keep the file (P6) for a person to look at. It counts as a hole, like a journal whose first
            // frame is damaged.
            let (Some(pinned), Some(line)) = (state.pinned, state.lines.get_mut(&timeline)) else {
                continue;
            };
            let header = JournalHeader::new(&pinned, timeline, *start);
            line.journals.insert(*start, Arc::new(Unsealed::new(&header, path, *start, true)));
        }
        Self::check_holes(timeline, state);
        Ok(())
    }

    /// Reports journals that lost synced bytes: they end early although more WAL follows and no gap is recorded.
    fn check_holes(timeline: TimelineId, state: &mut State) {
        let Some(line) = state.lines.get(&timeline) else { return };
        let lost: Vec<_> =
            line.journals.values().filter(|j| state.has_lost_bytes(j)).cloned().collect();
        for journal in lost {
            let place = journal.path.display().to_string();
            let (end, at) = (journal.end, journal.durable());
            let detail = format!("expected WAL up to {end}, found it intact up to {at}");
            let error = Error::new(Kind::Corrupt, Op::Recover, &place, detail);
            let helps = if state.is_hole(&journal) { kept::ASKED } else { kept::NOT_ASKED };
            state.problems.insert(place, error.hint(helps).to_string());
        }
    }
}

/// A journal that is shorter than its sealed file.
struct Shorter {
    timeline: TimelineId,
    start: Lsn,
    sealed: Beside,
    /// `None` when the header cannot be read.
    frames: Option<Frames>,
}

/// The sealed file of a journal's segment.
#[derive(Clone, Copy)]
struct Beside {
    /// One past its last byte.
    end: Lsn,
    /// The stream continued further on, with a record of what it skipped: nothing was ever acknowledged right behind
    /// this file.
    goes_on_behind: bool,
}

impl State {
    /// Whether this entry is still the one registered for its segment.
    pub(super) fn holds(&self, entry: &Unsealed) -> bool {
        let line = self.lines.get(&entry.timeline);
        let there = line.and_then(|line| line.journals.get(&entry.start));
        there.is_some_and(|there| std::ptr::eq(there.as_ref(), entry))
    }

    pub(super) fn forget(&mut self, entry: &Unsealed) {
        if let Some(line) = self.lines.get_mut(&entry.timeline) {
            line.journals.remove(&entry.start);
        }
    }
}

/// The losses of the journals at a timeline's end. If WAL in a later journal was flushed, all of the earlier one had
/// been.
fn harms_of(line: &Line) -> Vec<Harm> {
    let (mut harms, mut later) = (Vec::new(), false);
    for journal in line.journals.values().rev().filter(|journal| !journal.is_proven()) {
        if later && !journal.is_full() {
            let from = journal.durable();
            journal.set_harm(Some(Harm { from, to: journal.end }));
        }
        let harm = journal.harm();
        later |= harm.is_some_and(|harm| harm.to > harm.from);
        harms.extend(harm);
    }
    harms
}

fn list(cluster: &Cluster, directory: &Path) -> Result<Vec<Entry>, Error> {
    match cluster.disk().list(directory) {
        Ok(entries) => Ok(entries),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(Error::io(Op::List, directory, e)),
    }
}

fn remove_tmp(cluster: &Cluster, directory: &Path) -> Result<(), Error> {
    for entry in list(cluster, directory)? {
        if !entry.is_dir && entry.name.ends_with(durable::TMP_SUFFIX) {
            durable::remove_if_there(cluster.disk(), &directory.join(&entry.name))?;
        }
    }
    Ok(())
}
