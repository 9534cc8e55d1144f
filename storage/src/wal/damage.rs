//! `<cluster>/damaged-wal.json`: WAL that was acknowledged and is not on this disk any more, until it is held again.
//!
//! | field | what |
//! |---|---|
//! | `timeline` | which |
//! | `from` | where the good WAL ends: the position went back to here |
//! | `to` | up to here it is known to have been acknowledged; equal to `from` where nothing proves a loss |
//! | `kept` | the file as it was found, below `wal/<timeline>/`; absent where nothing is left of it |
//! | `sealed` | true of a sealed file (`rotten.rs`); absent of a journal |
//!
//! A list, in the shape of `crate::record`. Written before the file it speaks of is touched.
//!
//! - A torn tail after a crash and rot look alike. A later frame that says more was flushed proves rot (`frame.rs`), and so
//!   does the client's slot: what PostgreSQL was told was flushed. Until the client has come, a torn tail is kept, too, in
//!   silence; when its slot says nothing else, it goes.
//! - What is proven to be damaged is kept as it was found, and never removed or written to by this program (P6).
//! - At the end of a timeline the stream itself brings it again, as the position goes back. In the middle the position stays, and
//!   the segment is made anew beside the stream (`refill.rs`). Where neither can be, the problem says what helps.
//! - An entry goes when the bytes are held again, or are a recorded gap, or retention has let go of them. Then only the kept
//!   file is left.

use super::{
    OpenRequest,
    cluster::{Cluster, Line, State, Unsealed, lock},
    types::Gap,
};
use crate::{
    Error, Kind, Op,
    disk::{durable, read_full},
    layout,
    record::{self, Unknown},
};
use klio_pg::{Lsn, SegmentSize, TimelineId};
use serde::{Deserialize, Serialize};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

pub(super) const FILE: &str = "damaged-wal.json";
/// So many segments can have been acknowledged and not be sealed, and then be lost with their journals: sealing lags behind by
/// some segments, and with a full tier 2 by no more. A slot that is farther ahead says something else than lost journals.
const SLOT_SEGMENTS_MAX: u64 = 256;
/// What helps where nothing brings the WAL again.
pub(super) const NOT_ASKED: &str = "PostgreSQL is not asked for this again: take a base backup now (klio backup), from which on everything can be restored, and check the disk";
/// And where it is in the middle of what is held, and PostgreSQL may have its segment still (`refill.rs`).
pub(super) const ASKED: &str = "klio stream asks PostgreSQL for it as long as that has it; if this stays, take a base backup now (klio backup), from which on everything can be restored, and check the disk";
const COPY_BYTES: usize = 256 << 10;

/// WAL that was acknowledged and is damaged here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DamagedWal {
    /// Which timeline.
    pub timeline: TimelineId,
    /// Where the good WAL ends.
    pub from: Lsn,
    /// One past the last byte that is known to have been acknowledged.
    pub to: Lsn,
    /// The damaged file's name in its timeline's directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept: Option<String>,
    /// It was a sealed file.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub sealed: bool,
    /// What a newer version says besides.
    #[serde(flatten)]
    pub unknown: Unknown,
}

impl DamagedWal {
    /// Whether a loss is proven.
    pub(super) fn is_loss(&self) -> bool {
        self.to > self.from
    }

    fn is_of(&self, timeline: TimelineId, harm: Harm) -> bool {
        (self.timeline, self.from, self.to) == (timeline, harm.from, harm.to)
    }

    /// For a person.
    pub(super) fn sentence(&self, who: Who) -> String {
        let Self { timeline, from, to, kept, sealed, .. } = self;
        let what = if *sealed { "the file" } else { "the journal" };
        let kept = match kept {
            Some(kept) => format!("{what} is kept as wal/{timeline}/{kept}"),
            None => "nothing is left of it".into(),
        };
        let next = match who {
            Who::Stream => "PostgreSQL is asked for it again; hint: check the disk".to_owned(),
            Who::Refill => format!("it is taken from tier 2 if that has it; hint: {ASKED}"),
            Who::Tier2 => format!("only tier 2 may have it; hint: {NOT_ASKED}"),
            Who::Nobody => format!("its timeline is over; hint: {NOT_ASKED}"),
        };
        format!(
            "damaged on tier 1: WAL of timeline {timeline} from {from} to {to} was acknowledged and cannot be read; {kept}; {next}"
        )
    }
}

/// What brings damaged WAL again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Who {
    /// The stream of its timeline, which goes on where the good WAL ends.
    Stream,
    /// Beside the stream.
    Refill,
    /// PostgreSQL has it no more.
    Tier2,
    /// Its timeline is over.
    Nobody,
}

/// What was found behind the good frames of a journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Harm {
    /// Where the good WAL ends.
    pub(super) from: Lsn,
    /// As in [`DamagedWal`].
    pub(super) to: Lsn,
}

fn path(cluster: &Cluster) -> PathBuf {
    cluster.directory().join(FILE)
}

impl State {
    /// A loss that start has just found: shown at once, whether it can be put on record now or not.
    pub(super) fn found_harm(&mut self, timeline: TimelineId, harm: Harm) {
        if harm.to > harm.from && !self.damaged.iter().any(|known| known.is_of(timeline, harm)) {
            let (from, to) = (harm.from, harm.to);
            tracing::error!(%timeline, %from, %to, "acknowledged WAL is damaged on this disk: the position goes back; klio status says what helps");
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

    /// Where the stream of a timeline goes on of which nothing is left but what was lost.
    pub(super) fn lost_from(&self, timeline: TimelineId) -> Option<Lsn> {
        let lost = self.damaged.iter().filter(|d| d.timeline == timeline && d.is_loss());
        lost.map(|d| d.from).min()
    }

    /// Whether any WAL of a timeline was acknowledged, even if it is lost.
    pub(super) fn has_wal(&self, timeline: TimelineId) -> bool {
        self.lines.get(&timeline).is_some_and(Line::has_wal) || self.lost_from(timeline).is_some()
    }

    /// Whether WAL of a segment that begins at `start` was acknowledged, and is lost.
    pub(super) fn is_lost(&self, timeline: TimelineId, start: Lsn, end: Lsn) -> bool {
        let touches = |d: &&DamagedWal| d.is_loss() && d.from < end && start < d.to;
        self.damaged.iter().filter(|d| d.timeline == timeline).any(|d| touches(&d))
    }

    /// What is over: held again, a recorded gap, or removed on purpose.
    fn is_over(&self, entry: &DamagedWal) -> bool {
        let held = self.resume_at(entry.timeline).is_some_and(|at| at >= entry.to)
            && self.place_of(entry).is_none();
        let horizon = self.horizons.get(&entry.timeline);
        // Tier 1 may lack it: it was proven in tier 2, or let go for good.
        let let_go = horizon
            .is_some_and(|h| h.held_from >= entry.to || (entry.sealed && h.local_from >= entry.to));
        entry.is_loss() && (held || let_go)
    }

    /// The place that a sealed file left in the middle of what is held.
    fn place_of(&self, entry: &DamagedWal) -> Option<&Unsealed> {
        let mut journals = self.lines.get(&entry.timeline)?.journals.values();
        let touches = |j: &&Arc<Unsealed>| j.start < entry.to && entry.from < j.end;
        journals.find(|j| j.is_missing() && touches(j)).map(AsRef::as_ref)
    }

    pub(super) fn who_brings(&self, entry: &DamagedWal) -> Who {
        match self.place_of(entry) {
            Some(place) if self.is_hole(place) => Who::Refill,
            Some(_) => Who::Tier2,
            None if self.has_come_to_its_end(entry.timeline) => Who::Nobody,
            None => Who::Stream,
        }
    }

    /// Forgets what is over. True when there was any.
    pub(super) fn forget_healed(&mut self) -> bool {
        let over: Vec<bool> = self.damaged.iter().map(|entry| self.is_over(entry)).collect();
        let mut over_now = over.iter();
        self.damaged.retain(|_| !over_now.next().is_some_and(|over| *over));
        over.contains(&true)
    }
}

impl Cluster {
    /// Replaces the file by what is known now.
    pub(super) fn store_damaged(&self) -> Result<(), Error> {
        let _one = lock(&self.noting);
        let known = lock(&self.state).damaged.clone();
        let path = path(self);
        if known.is_empty() {
            return durable::remove_if_there(self.disk(), &path);
        }
        record::store(self.disk(), &path, &known)
    }

    /// Puts a journal's harm on record and the journal as it is aside. Call with its `work` held, before it is copied or
    /// removed.
    pub(super) fn keep_aside(&self, entry: &Unsealed) -> Result<(), Error> {
        let Some(harm) = entry.harm() else { return Ok(()) };
        let aside = self.put_on_record(entry, harm)?;
        if self.disk().stat(&aside).is_err() {
            self.copy_file(&entry.path, &aside)?;
        }
        entry.set_harm(None);
        Ok(())
    }

    /// Where the journal is kept. The same harm found again, after a crash, has its place already.
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

    /// A name that nothing has: not on disk, and not on record.
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
        let detail = "expected a free name for a damaged journal, found none";
        Err(Error::new(Kind::Conflict, Op::Recover, directory.display(), detail))
    }

    /// Copies a file, durably: it is whole or absent.
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
            // The first error is the one to report; start removes what is left.
            let _ = disk.remove(&tmp);
        })
    }

    /// Puts on record what [`State::judge`] has found, once the client is admitted. Call with `op` held and every journal
    /// proven. What nothing contradicts now was a torn tail.
    pub(super) fn keep_judgement(&self) -> Result<(), Error> {
        let torn = {
            let mut state = lock(&self.state);
            let torn = |d: &DamagedWal| !d.is_loss();
            let gone: Vec<DamagedWal> = state.damaged.iter().filter(|d| torn(d)).cloned().collect();
            state.damaged.retain(|d| !torn(d));
            gone
        };
        // Written every time: an earlier one may not have been put on record.
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

    /// Puts a declared gap on record; where the WAL was here once, the gap says so. The rest of an entry stays to be asked for.
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

    /// The entries that it touches.
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

    /// After a flush: what is held again is no longer missed.
    pub(super) fn heal(&self) {
        {
            let mut state = lock(&self.state);
            if state.damaged.is_empty() || !state.forget_healed() {
                return;
            }
        }
        tracing::info!(cluster = %self.name, "WAL that was damaged on this disk is held again");
        // It is found to be over again at the next start.
        if let Err(error) = self.store_damaged() {
            tracing::warn!(cluster = %self.name, %error, "that damaged WAL is held again is not on record");
        }
    }
}

impl State {
    /// What a client says when it opens: its slot is at `slot`, so PostgreSQL was told that all below it was flushed. Adds what
    /// that proves beyond what is known to be lost. It is only the client's word: it counts when the client is admitted, and
    /// only as far as journals can have been lost; beyond that the client brings the WAL, or declares a gap.
    pub(super) fn judge(&mut self, request: &OpenRequest, size: SegmentSize) {
        let Some(slot) = request.slot_restart else { return };
        let timeline = request.timeline;
        let of_it = |d: &&DamagedWal| d.timeline == timeline;
        let torn = self.damaged.iter().filter(of_it).map(|d| d.from).min();
        let Some(from) = self.resume_at(timeline).or(torn) else { return };
        let known = || self.damaged.iter().filter(of_it).filter(|d| d.from >= from);
        // As far as it is known already without a hole.
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
            tracing::error!(%timeline, held = %upto, %slot, "a client says that its slot is far beyond all that is held here: it is not believed; what PostgreSQL has is received, and what it has no more becomes a gap");
            return;
        }
        tracing::error!(%timeline, from = %upto, to = %slot, "PostgreSQL was told that WAL was flushed which this disk does not have: the position went back, and PostgreSQL is asked for it again");
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
