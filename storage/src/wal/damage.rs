//! `<cluster>/damaged-wal.json`: WAL that was acknowledged and can no longer be read from this disk, until it is
//! received again.
//!
//! | field | what |
//! |---|---|
//! | `timeline` | the timeline of that WAL |
//! | `from` | where the good WAL ends; the position went back to here |
//! | `to` | one past the last byte known to have been acknowledged; equal to `from` where no loss is proven |
//! | `kept` | the damaged file as it was found, relative to `wal/<timeline>/`; absent if nothing is left of it |
//! | `sealed` | true for a sealed file (`rotten.rs`); absent for a journal |
//!
//! A list, in the format of `crate::record`. It is written before the file that it describes is touched.
//!
//! - A torn tail after a crash and rot look alike. Rot is proven by a later frame that says more was flushed
//!   (`frame.rs`), or by the client's slot, which is the position up to which PostgreSQL was told that WAL is flushed.
//!   Until the client has connected, a torn tail is kept as well, without a message; if the slot does not contradict it,
//!   it is removed.
//! - A file that is proven to be damaged is kept as it was found, and this program never removes it or writes to it
//!   (P6).
//! - At the end of a timeline the stream itself sends the WAL again, because the position goes back. In the middle of a
//!   timeline the position stays, and the segment is rebuilt beside the stream (`refill.rs`). Where neither is
//!   possible, the reported problem says what to do.
//! - An entry is removed when its bytes are received again, are part of a recorded gap, or have expired. After that
//!   only the damaged file is left.

use super::{
    OpenRequest,
    cluster::{Cluster, Line, State, Unsealed, lock},
    kept::{DamagedWal, Harm, Who},
    types::Gap,
};
use crate::{
    Error, Kind, Op,
    disk::{durable, read_full},
    layout,
    record::{self, Unknown},
};
use klio_pg::{Lsn, SegmentSize, TimelineId};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

pub(super) const FILE: &str = "damaged-wal.json";
/// The largest number of segments that can be acknowledged but unsealed, and so be lost together with their journals.
/// Sealing lags behind by a few segments only, even when tier 2 is full. A slot that is farther ahead therefore cannot
/// be explained by lost journals.
const SLOT_SEGMENTS_MAX: u64 = 256;
const COPY_BYTES: usize = 256 << 10;

fn path(cluster: &Cluster) -> PathBuf {
    cluster.directory().join(FILE)
}

impl State {
    /// Adds a loss that recovery has just found. It is reported at once, even if it cannot be recorded on disk now.
    pub(super) fn found_harm(&mut self, timeline: TimelineId, harm: Harm) {
        if harm.to > harm.from && !self.damaged.iter().any(|known| known.is_of(timeline, harm)) {
            let (from, to) = (harm.from, harm.to);
            tracing::error!(%timeline, %from, %to, "acknowledged WAL is damaged on this disk; the stream position goes back (see klio status)");
            let unknown = Unknown::default();
            self.damaged.push(DamagedWal {
                timeline,
                from,
                to,
                kept: None,
                sealed: false,
                unknown,
            });
        }
    }

    /// Where the stream resumes on a timeline of which only lost WAL is known.
    pub(super) fn lost_from(&self, timeline: TimelineId) -> Option<Lsn> {
        let lost = self.damaged.iter().filter(|d| d.timeline == timeline && d.is_loss());
        lost.map(|d| d.from).min()
    }

    /// Whether any WAL of a timeline was acknowledged, even if it is lost.
    pub(super) fn has_wal(&self, timeline: TimelineId) -> bool {
        self.lines.get(&timeline).is_some_and(Line::has_wal) || self.lost_from(timeline).is_some()
    }

    /// Whether acknowledged WAL of the segment that begins at `start` is lost.
    pub(super) fn is_lost(&self, timeline: TimelineId, start: Lsn, end: Lsn) -> bool {
        let touches = |d: &&DamagedWal| d.is_loss() && d.from < end && start < d.to;
        self.damaged.iter().filter(|d| d.timeline == timeline).any(|d| touches(&d))
    }

    /// Whether an entry is resolved: its WAL is here again, is a recorded gap, or was removed on purpose.
    fn is_over(&self, entry: &DamagedWal) -> bool {
        let held = self.resume_at(entry.timeline).is_some_and(|at| at >= entry.to)
            && self.placeholder_of(entry).is_none();
        let horizon = self.horizons.get(&entry.timeline);
        // Tier 1 no longer needs it: it was proven in tier 2, or it has expired.
        let removed = horizon
            .is_some_and(|h| h.held_from >= entry.to || (entry.sealed && h.local_from >= entry.to));
        entry.is_loss() && (held || removed)
    }

    /// The placeholder of a rotten sealed file in the middle of the timeline.
    fn placeholder_of(&self, entry: &DamagedWal) -> Option<&Unsealed> {
        let mut journals = self.lines.get(&entry.timeline)?.journals.values();
        let touches = |j: &&Arc<Unsealed>| j.start < entry.to && entry.from < j.end;
        journals.find(|j| j.is_missing() && touches(j)).map(AsRef::as_ref)
    }

    pub(super) fn who_brings(&self, entry: &DamagedWal) -> Who {
        match self.placeholder_of(entry) {
            Some(place) if self.is_hole(place) => Who::Refill,
            Some(_) => Who::Tier2,
            None if self.has_come_to_its_end(entry.timeline) => Who::Nobody,
            None => Who::Stream,
        }
    }

    /// Drops entries that are resolved. True when there was one.
    pub(super) fn forget_healed(&mut self) -> bool {
        let over: Vec<bool> = self.damaged.iter().map(|entry| self.is_over(entry)).collect();
        let mut over_now = over.iter();
        self.damaged.retain(|_| !over_now.next().is_some_and(|over| *over));
        over.contains(&true)
    }
}

impl Cluster {
    /// Replaces the file by the entries in memory.
    pub(super) fn store_damaged(&self) -> Result<(), Error> {
        let _one = lock(&self.noting);
        let known = lock(&self.state).damaged.clone();
        let path = path(self);
        if known.is_empty() {
            return durable::remove_if_there(self.disk(), &path);
        }
        record::store(self.disk(), &path, &known)
    }

    /// Records a journal's damage and copies the journal aside unchanged. Call it with the journal's `work` held,
    /// before the journal is copied or removed.
    pub(super) fn keep_aside(&self, entry: &Unsealed) -> Result<(), Error> {
        let Some(harm) = entry.harm() else { return Ok(()) };
        let aside = self.put_on_record(entry, harm)?;
        if self.disk().stat(&aside).is_err() {
            self.copy_file(&entry.path, &aside)?;
        }
        entry.set_harm(None);
        Ok(())
    }

    /// Records the damage and returns the path for the damaged journal. If the same damage was recorded before a crash,
    /// its path is used again.
    fn put_on_record(&self, entry: &Unsealed, harm: Harm) -> Result<PathBuf, Error> {
        let directory = durable::parent(&entry.path);
        let timeline = entry.timeline;
        let known = {
            let state = lock(&self.state);
            let known = state.damaged.iter().find(|known| known.is_of(timeline, harm));
            known.and_then(|known| known.kept.clone())
        };
        if let Some(kept) = known {
            return Ok(directory.join(kept));
        }
        let kept = self.free_name(entry)?;
        {
            let mut state = lock(&self.state);
            state.damaged.retain(|known| !known.is_of(timeline, harm));
            let (from, to, unknown) = (harm.from, harm.to, Unknown::default());
            let kept = Some(kept.clone());
            state.damaged.push(DamagedWal { timeline, from, to, kept, sealed: false, unknown });
        }
        self.store_damaged()?;
        Ok(directory.join(kept))
    }

    /// A file name that is used neither on disk nor in the record.
    pub(super) fn free_name(&self, entry: &Unsealed) -> Result<String, Error> {
        let segment = entry.segment(self.pinned()?.segment_size);
        let directory = durable::parent(&entry.path);
        let taken: Vec<String> = {
            let state = lock(&self.state);
            state.damaged.iter().filter_map(|known| known.kept.clone()).collect()
        };
        for number in 1..=u32::MAX {
            let name = layout::damaged_journal(segment, number);
            match self.disk().stat(&directory.join(&name)) {
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                Ok(_) => continue,
                Err(e) => return Err(Error::io(Op::Recover, directory, e)),
            }
            if !taken.contains(&name) {
                return Ok(name);
            }
        }
        let detail = "expected an unused name for a damaged journal, found none";
        Err(Error::new(Kind::Conflict, Op::Recover, directory.display(), detail))
    }

    /// Copies a file durably: the copy is complete or absent.
    pub(super) fn copy_file(&self, from: &Path, to: &Path) -> Result<(), Error> {
        let disk = self.disk();
        let tmp = durable::tmp_path(to);
        durable::remove_if_there(disk, &tmp)?;
        let source = disk.open(from, false).map_err(|e| Error::io(Op::Open, from, e))?;
        let target = disk.create_new(&tmp).map_err(|e| Error::io(Op::Create, &tmp, e))?;
        let copy = || {
            let (mut piece, mut at) = (vec![0; COPY_BYTES], 0);
            loop {
                let count = read_full(source.as_ref(), &mut piece, at)
                    .map_err(|e| Error::io(Op::Read, from, e))?;
                if count == 0 {
                    break;
                }
                target
                    .write_all_at(&piece[..count], at)
                    .map_err(|e| Error::io(Op::Write, &tmp, e))?;
                at += count as u64;
            }
            target.sync_all().map_err(|e| Error::io(Op::Sync, &tmp, e))?;
            durable::rename(disk, &tmp, to)
        };
        copy().inspect_err(|_| {
            // The first error is the one to report; recovery at the next start removes the rest.
            let _ = disk.remove(&tmp);
        })
    }

    /// Records what [`State::judge`] found, once the client is admitted. Call it with `op` held and every journal
    /// proven. Damage that the slot did not confirm was a torn tail.
    pub(super) fn keep_judgement(&self) -> Result<(), Error> {
        let torn = {
            let mut state = lock(&self.state);
            let torn = |d: &DamagedWal| !d.is_loss();
            let gone: Vec<DamagedWal> = state.damaged.iter().filter(|d| torn(d)).cloned().collect();
            state.damaged.retain(|d| !torn(d));
            gone
        };
        // Written every time, because an earlier attempt may have failed.
        if torn.is_empty() && lock(&self.state).damaged.is_empty() {
            return Ok(());
        }
        self.store_damaged()?;
        for entry in torn {
            let directory = self.wal_directory().join(entry.timeline.to_string());
            if let Some(kept) = entry.kept {
                durable::remove_if_there(self.disk(), &directory.join(kept))?;
            }
        }
        Ok(())
    }

    /// Records a declared gap. Where its WAL was once held, the gap's reason says so. The rest of a damaged entry is
    /// still requested.
    pub(super) fn record_gap(&self, mut gap: Gap) -> Result<(), Error> {
        let (explained, to) = (self.explain(&mut gap), gap.to);
        let mut gaps = lock(&self.state).gaps.clone();
        gaps.push(gap);
        super::record::store_gaps(self.disk(), &self.directory().join("gaps.json"), &gaps)?;
        let any = !explained.is_empty();
        {
            let mut state = lock(&self.state);
            state.gaps = gaps;
            state.damaged.retain(|d| !explained.contains(d));
            let rest = explained.into_iter().map(|d| DamagedWal { from: d.from.max(to), ..d });
            state.damaged.extend(rest.filter(DamagedWal::is_loss));
        }
        if any { self.store_damaged() } else { Ok(()) }
    }

    /// Adds the cause to the gap's reason and returns the damaged entries that the gap touches.
    fn explain(&self, gap: &mut Gap) -> Vec<DamagedWal> {
        let touched = |d: &&DamagedWal| {
            d.is_loss() && d.timeline == gap.timeline && d.from < gap.to && gap.from < d.to
        };
        let found: Vec<DamagedWal> =
            lock(&self.state).damaged.iter().filter(touched).cloned().collect();
        if !found.is_empty() {
            gap.reason = format!("damaged on tier 1: {}", gap.reason);
        }
        found
    }

    /// Called after a flush: WAL that is held again is no longer missing.
    pub(super) fn heal(&self) {
        {
            let mut state = lock(&self.state);
            if state.damaged.is_empty() || !state.forget_healed() {
                return;
            }
        }
        tracing::info!(cluster = %self.name, "WAL that was damaged on this disk has been received again");
        // The next start finds again that it is resolved.
        if let Err(error) = self.store_damaged() {
            tracing::warn!(cluster = %self.name, %error, "cannot record that damaged WAL has been received again");
        }
    }
}

impl State {
    /// Uses the client's slot position from its open request: PostgreSQL was told that everything below `slot` was
    /// flushed. Records the part of that which is not yet known to be lost. This is only the client's claim, so it
    /// takes effect when the client is admitted, and only as far as journals can have been lost; beyond that the client
    /// sends the WAL or declares a gap.
    pub(super) fn judge(&mut self, request: &OpenRequest, size: SegmentSize) {
        let Some(slot) = request.slot_restart else { return };
        let timeline = request.timeline;
        let of_it = |d: &&DamagedWal| d.timeline == timeline;
        let torn = self.damaged.iter().filter(of_it).map(|d| d.from).min();
        let Some(from) = self.resume_at(timeline).or(torn) else { return };
        let known = || self.damaged.iter().filter(of_it).filter(|d| d.from >= from);
        // The end of the loss that is already known, without a hole.
        let mut upto = from;
        while let Some(next) = known().filter(|d| d.from <= upto).map(|d| d.to).max()
            && next > upto
        {
            upto = next;
        }
        if slot <= upto {
            return;
        }
        let most = upto.advance(SLOT_SEGMENTS_MAX.saturating_mul(size.bytes()));
        if slot > most {
            tracing::error!(%timeline, held = %upto, %slot, "ignoring the client's slot position: it is implausibly far ahead of the WAL held here");
            return;
        }
        tracing::error!(%timeline, from = %upto, to = %slot, "acknowledged WAL is missing on this disk; asking PostgreSQL for it again");
        let there = self.damaged.iter_mut().find(|d| d.timeline == timeline && d.to == upto);
        match there {
            Some(entry) => entry.to = slot,
            None => {
                let unknown = Unknown::default();
                self.damaged.push(DamagedWal {
                    timeline,
                    from: upto,
                    to: slot,
                    kept: None,
                    sealed: false,
                    unknown,
                });
            }
        }
    }
}
