//! Sealed files that rot on this disk: found when they are read, set aside, and treated as missing until their WAL is
//! here again.
//!
//! - A reader that finds a file damaged reports it with [`WalStore::doubt`]. The file is read again here, and only if
//!   it is really damaged is it set aside, under a name that is never taken for WAL, so that reading, uploading and
//!   eviction never use it again. It is kept (P6).
//! - It is recorded first (`damage.rs`): after a crash at any point the file is either in its place or recorded as
//!   missing.
//! - A complete segment leaves an empty placeholder among the journals: a hole, which is rebuilt from what PostgreSQL
//!   or tier 2 has (`refill.rs`). No position moves.
//! - The partial last segment of a timeline can only be sent again by its PostgreSQL, from its beginning: the position
//!   goes back to there. If the timeline is over, or the stream skipped the WAL behind it, only tier 2 may have it.

use super::{
    WalStore,
    cluster::{Cluster, Line, State, Unsealed, lock},
    decode,
    frame::JournalHeader,
    kept::DamagedWal,
    types::Pinned,
};
use crate::{
    Error, Kind, Op,
    disk::{Stat, durable},
    layout::{self, ClusterName, Form, WalFile},
    record::Unknown,
};
use klio_pg::{Lsn, SEGMENT_HEADER_BYTES, SegmentHeader, SegmentName, TimelineId};
use std::{io, path::Path, sync::Arc};

const READ_BYTES: usize = 256 << 10;
/// What a disk or a file system answers for data that it cannot read: EIO, EBADMSG and EUCLEAN (a checksum of the file
/// system is wrong), ENODATA (a bad sector).
const OF_THE_MEDIUM: [i32; 4] = [5, 74, 117, 61];

/// A file that should be a sealed one.
#[derive(Clone, Copy)]
pub(super) struct Sealed<'a> {
    pub(super) file: WalFile,
    pub(super) path: &'a Path,
    pub(super) form: Form,
}

impl WalStore {
    /// Checks a sealed file that was found damaged, and sets it aside if it is. True when this makes WAL missing.
    ///
    /// # Errors
    /// `NotFound` for an unknown cluster, `Denied` without the key, or an I/O error of the disk.
    pub fn doubt(&self, name: &ClusterName, file: WalFile) -> Result<bool, Error> {
        let cluster = self.need(name, Op::Read)?;
        cluster.doubt(file)
    }
}

impl Cluster {
    /// As [`WalStore::doubt`]. Call it without any lock but `op`.
    pub(super) fn doubt(&self, file: WalFile) -> Result<bool, Error> {
        let (WalFile::Segment(segment) | WalFile::Partial(segment)) = file else {
            return Ok(false);
        };
        let pinned = self.pinned()?;
        let Some(start) = segment.start_lsn(pinned.segment_size) else { return Ok(false) };
        let mut missed = false;
        for form in Form::BOTH {
            let path = self.path_in(file, form);
            let Some(before) = self.stat_if_there(&path)? else { continue };
            let known = lock(&self.state).sealed_end_in(file, start, &pinned);
            let Some(good) = self.good_bytes_if_damaged(file, form, known, &pinned)? else {
                self.is_good_again(file, start, &pinned)?;
                continue;
            };
            missed |= self.put_rotten_aside((file, form, before), start.advance(good), &pinned)?;
        }
        Ok(missed)
    }

    fn stat_if_there(&self, path: &Path) -> Result<Option<Stat>, Error> {
        match self.disk().stat(path) {
            Ok(stat) => Ok(Some(stat)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io(Op::Read, path, e)),
        }
    }

    fn is_there(&self, path: &Path) -> Result<bool, Error> {
        self.stat_if_there(path).map(|stat| stat.is_some())
    }

    /// The number of good bytes of a sealed file, if it is damaged; a file that cannot be read twice in a row counts as
    /// damaged. `known` is where the WAL in it is known to end.
    fn good_bytes_if_damaged(
        &self,
        file: WalFile,
        form: Form,
        known: Option<Lsn>,
        pinned: &Pinned,
    ) -> Result<Option<u64>, Error> {
        let path = self.path_in(file, form);
        for last in [false, true] {
            let sealed = Sealed { file, path: &path, form };
            let (good, outcome) = self.read_sealed(sealed, known, pinned);
            match outcome {
                Ok(()) => return Ok(None),
                Err(e) if e.kind == Kind::Corrupt => return Ok(Some(good)),
                // Only an error of the medium counts as damage: a process that has, say, run out of file handles lost
                // nothing.
                Err(e) if e.kind == Kind::Io && !self.is_lost_on_the_medium(&path)? => {
                    return Err(e);
                }
                Err(e) if e.kind == Kind::Io && last => return Ok(Some(good)),
                Err(e) if e.kind == Kind::Io => {}
                Err(e) => return Err(e),
            }
        }
        Ok(None)
    }

    /// Whether reading the stored file fails with an error of the medium.
    fn is_lost_on_the_medium(&self, path: &Path) -> Result<bool, Error> {
        let file = self.disk().open(path, false).map_err(|e| Error::io(Op::Open, path, e))?;
        let (mut piece, mut at) = (vec![0; READ_BYTES], 0);
        loop {
            match file.read_at(&mut piece, at) {
                Ok(0) => return Ok(false),
                Ok(count) => at += count as u64,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.raw_os_error().is_some_and(|code| OF_THE_MEDIUM.contains(&code)) => {
                    return Ok(true);
                }
                Err(e) => return Err(Error::io(Op::Read, path, e)),
            }
        }
    }

    /// Reads all of it: how many good bytes it yields, and whether they are all. Of another segment's or another
    /// PostgreSQL's WAL none is good.
    pub(super) fn read_sealed(
        &self,
        Sealed { file, path, form }: Sealed<'_>,
        known: Option<Lsn>,
        pinned: &Pinned,
    ) -> (u64, Result<(), Error>) {
        let limit = pinned.segment_size.bytes();
        let (mut good, mut first) = (0, Vec::with_capacity(SEGMENT_HEADER_BYTES));
        let read = self.open_plain(path, form).and_then(|mut reader| {
            decode::decode_reader(&mut reader, limit, &mut |piece| {
                let missing = SEGMENT_HEADER_BYTES.saturating_sub(first.len()).min(piece.len());
                first.extend_from_slice(&piece[..missing]);
                good += piece.len() as u64;
                Ok(())
            })
            .map_err(|error| error.at(path.display()))
        });
        let (WalFile::Segment(name) | WalFile::Partial(name)) = file else {
            return (good, read.map(drop));
        };
        let corrupt = |detail: String| Error::new(Kind::Corrupt, Op::Read, path.display(), detail);
        if let (Ok(_) | Err(Error { kind: Kind::Corrupt, .. }), Err(other)) =
            (&read, begins_as(&first, name, pinned))
        {
            return (0, Err(corrupt(other)));
        }
        let checked = read.and_then(|found| {
            let expected = match (file, known, name.start_lsn(pinned.segment_size)) {
                (WalFile::Segment(_), ..) => limit,
                (_, Some(end), Some(start)) => end.bytes_since(start),
                _ => found,
            };
            match found < expected {
                true => Err(corrupt(format!("expected {expected} bytes of WAL, found {found}"))),
                false => Ok(()),
            }
        });
        // If a segment has its full length but is wrong, none of its bytes are trusted.
        let kept = if checked.is_err() && good >= limit { 0 } else { good };
        (kept, checked)
    }

    /// Sets a damaged file aside. True when its WAL is missing now, because there is no other copy here.
    fn put_rotten_aside(
        &self,
        (file, form, read): (WalFile, Form, Stat),
        good: Lsn,
        pinned: &Pinned,
    ) -> Result<bool, Error> {
        // Held so that nobody creates or removes a journal of the segment meanwhile.
        let _one = lock(&self.files);
        let path = self.path_in(file, form);
        let same = |now: Stat| (now.size, now.modified_unix) == (read.size, read.modified_unix);
        // The file was sealed again or removed since it was read.
        if !self.stat_if_there(&path)?.is_some_and(same) {
            return Ok(false);
        }
        let other = self.is_there(&self.path_in(file, form.other()))?;
        let missed = match other {
            true => None,
            false => lock(&self.state).missed(file, good, pinned),
        };
        let kept = match missed {
            Some(missed) => self.put_missed_on_record(file.timeline(), missed, &path)?,
            None => self.free_aside(&path, file.timeline())?,
        };
        durable::rename(self.disk(), &path, &durable::parent(&path).join(&kept))?;
        let Some((from, to)) = missed else {
            tracing::warn!(cluster = %self.name, %file, kept, "set aside a damaged WAL file; another copy of its WAL is here");
            return Ok(false);
        };
        tracing::error!(cluster = %self.name, %file, %from, %to, kept, "acknowledged WAL is damaged on this disk; set the file aside (see klio status)");
        lock(&self.state).leave_placeholder(self, file, pinned);
        Ok(true)
    }

    /// Handles a good copy that a person put in the place of a missing segment.
    fn is_good_again(&self, file: WalFile, start: Lsn, pinned: &Pinned) -> Result<(), Error> {
        let WalFile::Segment(segment) = file else { return Ok(()) };
        {
            let mut state = lock(&self.state);
            if !state.journal(segment).is_some_and(|journal| journal.is_missing()) {
                return Ok(());
            }
            state.found_again(file, start, start.advance(pinned.segment_size.bytes()));
        }
        tracing::info!(cluster = %self.name, %file, "found a good copy in the place of a damaged file");
        self.store_damaged()
    }

    /// Records the loss and returns the name for the file. If a failed attempt has recorded it already, that name is
    /// used.
    fn put_missed_on_record(
        &self,
        timeline: TimelineId,
        (from, to): (Lsn, Lsn),
        path: &Path,
    ) -> Result<String, Error> {
        let is_it =
            |d: &&DamagedWal| d.sealed && (d.timeline, d.from, d.to) == (timeline, from, to);
        let known = lock(&self.state).damaged.iter().find(is_it).map(|d| d.kept.clone());
        let kept = match known {
            Some(Some(kept)) if !self.is_there(&durable::parent(path).join(&kept))? => kept,
            // Another file has rotted in its place.
            Some(_) => self.free_aside(path, timeline)?,
            None => {
                let (kept, unknown) = (self.free_aside(path, timeline)?, Unknown::default());
                let entry = DamagedWal {
                    timeline,
                    from,
                    to,
                    kept: Some(kept.clone()),
                    sealed: true,
                    unknown,
                };
                lock(&self.state).damaged.push(entry);
                kept
            }
        };
        self.store_damaged()?;
        Ok(kept)
    }

    /// A file name that is used neither on disk nor in the record.
    fn free_aside(&self, path: &Path, timeline: TimelineId) -> Result<String, Error> {
        let taken: Vec<String> = {
            let state = lock(&self.state);
            let own = state.damaged.iter().filter(|known| known.timeline == timeline);
            own.filter_map(|known| known.kept.clone()).collect()
        };
        let stored = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
        for number in 1..=u32::MAX {
            let name = layout::damaged_sealed(&stored, number);
            if !taken.contains(&name) && !self.is_there(&durable::parent(path).join(&name))? {
                return Ok(name);
            }
        }
        let detail = "expected an unused name for a damaged file, found none";
        Err(Error::new(Kind::Conflict, Op::Recover, path.display(), detail))
    }

    /// Sets aside, at start, the sealed files that could not be read.
    ///
    /// # Errors
    /// When one of them is still in its place: its WAL does not count yet, and nobody may continue as if it did not
    /// exist.
    pub(super) fn settle_rotten(&self, rotten: &[WalFile], pinned: &Pinned) -> Result<(), Error> {
        for file in rotten {
            self.doubt(*file)?;
            if let (Some(stored), WalFile::Partial(_)) = (self.stored(*file)?, file) {
                self.plain_size_of(&stored, pinned.segment_size.bytes())?;
                let detail = "expected the damaged file to be set aside, found it readable now: it is read again";
                return Err(Error::new(
                    Kind::Transient,
                    Op::Recover,
                    stored.path.display(),
                    detail,
                ));
            }
        }
        Ok(())
    }
}

/// Checks that WAL begins like the segment of that name, of this PostgreSQL. A few bytes prove nothing.
fn begins_as(first: &[u8], name: SegmentName, pinned: &Pinned) -> Result<(), String> {
    let Ok(header) = <[u8; SEGMENT_HEADER_BYTES]>::try_from(first) else { return Ok(()) };
    let header = SegmentHeader::parse(&header).map_err(|e| e.to_string())?;
    header.belongs_to(name).map_err(|e| e.to_string())?;
    let (found, expected) = (header.system_identifier, pinned.system_identifier);
    match found == expected {
        true => Ok(()),
        false => Err(format!("expected WAL of PostgreSQL {expected}, found that of {found}")),
    }
}

impl State {
    /// Where a partial segment is known to end, according to the state of its timeline.
    fn sealed_end_in(&self, file: WalFile, start: Lsn, pinned: &Pinned) -> Option<Lsn> {
        let WalFile::Partial(segment) = file else { return None };
        let end = start.advance(pinned.segment_size.bytes());
        let sealed = self.lines.get(&segment.timeline())?.sealed?;
        Some(sealed.1).filter(|last| start < *last && *last < end)
    }

    /// The range that is missing without this file, which was good up to `good`; `None` when a journal has all of it.
    fn missed(&self, file: WalFile, good: Lsn, pinned: &Pinned) -> Option<(Lsn, Lsn)> {
        let (WalFile::Segment(segment) | WalFile::Partial(segment)) = file else { return None };
        let (size, timeline) = (pinned.segment_size, segment.timeline());
        let start = segment.start_lsn(size)?;
        let end = start.advance(size.bytes());
        let to = match file {
            WalFile::Segment(_) => end,
            _ => self.last_known(timeline, start, end).max(good).max(start.advance(1)),
        };
        let journal = self.journal(segment).filter(|journal| !journal.is_missing());
        let from = journal.map_or(start, |journal| journal.durable());
        (from < to).then_some((from, to))
    }

    /// How far a partial segment is known to have reached.
    fn last_known(&self, timeline: TimelineId, start: Lsn, end: Lsn) -> Lsn {
        let sealed = self.lines.get(&timeline).and_then(|line| line.sealed).map(|sealed| sealed.1);
        let gaps = self.gaps.iter().filter(|gap| gap.timeline == timeline).map(|gap| gap.from);
        let inside = sealed.into_iter().chain(gaps).filter(|lsn| start < *lsn && *lsn <= end);
        inside.max().unwrap_or(start)
    }

    /// Leaves a placeholder for a file that was set aside.
    fn leave_placeholder(&mut self, cluster: &Cluster, file: WalFile, pinned: &Pinned) {
        let (WalFile::Segment(segment) | WalFile::Partial(segment)) = file else { return };
        let Some(start) = segment.start_lsn(pinned.segment_size) else { return };
        let end = start.advance(pinned.segment_size.bytes());
        let Some(line) = self.lines.get_mut(&segment.timeline()) else { return };
        if line.journals.contains_key(&start) {
            return;
        }
        if matches!(file, WalFile::Segment(_)) || line.goes_on_behind(end) {
            line.journals.insert(start, place(cluster, segment.timeline(), start, pinned));
        } else if let Some((first, last)) = line.sealed
            && start < last
        {
            // Its PostgreSQL sends it again from its beginning.
            line.sealed = (first < start).then_some((first, start));
        }
    }

    /// The start of a partial segment that is missing, if this many bytes cover all that was held of it.
    pub(super) fn missed_begin(&self, file: WalFile, bytes: u64) -> Option<Lsn> {
        let WalFile::Partial(segment) = file else { return None };
        let (timeline, start) = (segment.timeline(), segment.start_lsn(self.pinned?.segment_size)?);
        let is_it = |d: &&DamagedWal| d.sealed && d.timeline == timeline && d.from == start;
        let missed = self.damaged.iter().find(is_it)?;
        let written = self.writers.contains_key(&timeline) || self.opening == Some(timeline);
        let journal = self.journal(segment).is_some_and(|journal| !journal.is_missing());
        (!written && !journal && missed.to <= start.advance(bytes)).then_some(start)
    }

    /// Removes the entry and the placeholder of a file that is in its place again.
    pub(super) fn found_again(&mut self, file: WalFile, start: Lsn, end: Lsn) {
        let timeline = file.timeline();
        self.damaged.retain(|d| !(d.sealed && d.timeline == timeline && d.from == start));
        if let Some(line) = self.lines.get_mut(&timeline) {
            if line.journals.get(&start).is_some_and(|journal| journal.is_missing()) {
                line.journals.remove(&start);
            }
            line.extend_sealed(start, end);
        }
    }

    /// At start: adds the placeholders of segments whose sealed files were set aside. There is none at the end of a
    /// timeline: the stream sends that WAL again.
    pub(super) fn leave_placeholders(&mut self, cluster: &Cluster, pinned: &Pinned) {
        let size = pinned.segment_size;
        let lost: Vec<(TimelineId, Lsn)> = self
            .damaged
            .iter()
            .filter(|d| d.sealed && d.is_loss())
            .map(|d| (d.timeline, d.from.segment_start(size)))
            .collect();
        for (timeline, start) in lost {
            let name = SegmentName::containing(timeline, start, size);
            // It was recorded, and then the machine stopped before the file was set aside. If it is still damaged, that
            // will be found again.
            let there = [WalFile::Segment(name), WalFile::Partial(name)]
                .into_iter()
                .any(|file| matches!(cluster.stored(file), Ok(Some(_))));
            let Some(line) = self.lines.get_mut(&timeline).filter(|_| !there) else { continue };
            if !line.journals.contains_key(&start)
                && line.goes_on_behind(start.advance(size.bytes()))
            {
                line.journals.insert(start, place(cluster, timeline, start, pinned));
            }
        }
    }
}

impl Line {
    /// Whether there is any WAL from `end` on.
    pub(super) fn goes_on_behind(&self, end: Lsn) -> bool {
        self.sealed.is_some_and(|sealed| sealed.1 > end)
            || self.journals.values().any(|journal| journal.start >= end && !journal.is_empty())
    }
}

/// The placeholder of a missing segment; no journal file belongs to it.
fn place(cluster: &Cluster, timeline: TimelineId, start: Lsn, pinned: &Pinned) -> Arc<Unsealed> {
    let header = JournalHeader::new(pinned, timeline, start);
    let path = cluster.open_path(header.segment());
    let entry = Unsealed::new(&header, path, start, true);
    entry.set_missing();
    Arc::new(entry)
}
