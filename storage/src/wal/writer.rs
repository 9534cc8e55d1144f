//! Receives one cluster's WAL on one timeline. Each timeline has a writer of its own; they share nothing but the disk.
//!
//! - WAL1: flushed <= written, and both only grow. Only a flush makes a [`FlushedLsn`] (P1).
//! - Every byte is checked before any byte of the same append is written.
//! - A batch never spans segments: a finished segment is synced before bytes of the next are written.
//! - After a failed write or sync nothing more is written or acknowledged (P3): close, and open again.
//! - No space for more is no failure: nothing changes, and the same append may be tried again.
//! - After `fence` nothing more is written: the fence waits for what is under way, then takes the journal away (WAL3).
//!
//! Memory of an idle writer: this struct and an open file.

use super::{
    cluster::{Cluster, Unsealed, lock},
    frame::FRAME_RAW_MAX,
    journal::{self, Frames, Journal},
    reader::decode_frame,
    types::Pinned,
};
use crate::{Error, Kind, Op, disk::FileHandle, layout::WalFile};
use klio_pg::{
    LevelScan, Lsn, PAGE_BYTES, PageChecker, PageExpectation, TimelineHistory, TimelineId,
};
use std::{
    fmt, io,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};
use zstd::zstd_safe::DCtx;

/// A page's longest header.
const PAGE_HEADER_MAX: u64 = 40;
/// Files grow to a multiple of this.
const BLOCK: u64 = 4096;

/// One past the last byte that is durable. Made only by a flush that succeeded, or by recovery, which syncs too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlushedLsn(Lsn);

impl FlushedLsn {
    /// The position.
    pub const fn lsn(self) -> Lsn {
        self.0
    }
}

impl fmt::Display for FlushedLsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a writer, its flusher and the store share.
#[derive(Debug)]
pub(super) struct Slot {
    timeline: TimelineId,
    fenced: AtomicBool,
    flushed: AtomicU64,
    /// Held through every sync of the journal. Two syncs of one file at once would be fatal: an error is reported to
    /// one of them only, and the other would acknowledge what was lost.
    sync: Mutex<()>,
    core: Mutex<Option<Core>>,
}

#[derive(Debug)]
struct Core {
    journal: Journal,
    entry: Arc<Unsealed>,
    written: Lsn,
    flushed: FlushedLsn,
    poisoned: Option<String>,
    finished: Vec<WalFile>,
    /// The older timelines' partial segments were reported as finished.
    announced: bool,
    /// The journal says of all of it that it is durable.
    closed: bool,
}

impl Core {
    /// What a failed write or sync leaves behind: nothing can be said about the file any more.
    fn poison(&mut self, op: Op, cause: io::Error) -> Error {
        let path = self.journal.path.as_path();
        let error = Error::io(op, path, cause);
        self.poisoned = Some(error.to_string());
        if error.kind == Kind::Full {
            return error.hint("free some space; the writer must be opened again");
        }
        let detail = format!("{}; nothing more is written to this file", error.detail);
        Error::new(Kind::Poisoned, op, path.display(), detail).with_source(error)
    }

    /// After a successful sync of everything up to `to`.
    fn advance(&mut self, cluster: &Cluster, to: Lsn) {
        self.flushed = self.flushed.max(FlushedLsn(to));
        self.entry.set_durable(self.flushed.0);
        if self.entry.is_full() {
            let size = self.journal.header.segment_size;
            self.finished.push(WalFile::Segment(self.entry.segment(size)));
        }
        if !self.announced {
            self.announced = true;
            let partial = |file: &WalFile| matches!(file, WalFile::Partial(_));
            self.finished.extend(lock(&cluster.state).finished().into_iter().filter(partial));
        }
    }

    /// Writes a frame that says of all of the journal that it is durable, unless the journal says so; true when it has to be
    /// synced. It only makes damage easier to find: without space it is left out.
    fn close(&mut self) -> Result<bool, Error> {
        if self.closed || self.written != self.flushed.0 {
            return Ok(false);
        }
        self.closed = true;
        if self.entry.is_full() || self.entry.is_empty() {
            return Ok(false);
        }
        let frame = self.journal.closing_frame(self.written);
        match self.reserve(frame.len() as u64, 0) {
            Ok(()) => {}
            Err(e) if e.kind == Kind::Full => return Ok(false),
            Err(e) => return Err(e),
        }
        if let Err(e) = self.journal.file.write_all_at(&frame, self.journal.offset) {
            return Err(self.poison(Op::Write, e));
        }
        self.journal.offset += frame.len() as u64;
        Ok(true)
    }

    fn close_durably(&mut self) -> Result<(), Error> {
        if self.close()? {
            self.journal.file.sync_data().map_err(|e| self.poison(Op::Sync, e))?;
        }
        Ok(())
    }

    /// Makes room for `bytes` more at the end of the file. No space is no failure: the file is as it was.
    fn reserve(&mut self, bytes: u64, ahead: u64) -> Result<(), Error> {
        let need = (self.journal.offset + bytes).next_multiple_of(BLOCK);
        let from = self.journal.allocated;
        if self.journal.offset + bytes <= from {
            return Ok(());
        }
        let wish = need.max((from + ahead).next_multiple_of(BLOCK));
        for to in [wish, need] {
            match journal::write_zeros(&self.journal.file, from, to) {
                Ok(()) => {
                    self.journal.allocated = to;
                    return Ok(());
                }
                Err(e) if is_full(&e) && to > need => {}
                Err(e) if is_full(&e) => {
                    let error = Error::io(Op::Write, &self.journal.path, e);
                    return Err(error.hint("free some space; the same append may be tried again"));
                }
                Err(e) => return Err(self.poison(Op::Write, e)),
            }
        }
        Ok(())
    }
}

fn is_full(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// The journal, as long as the writer may use it.
fn live<'a>(
    slot: &Slot,
    guard: &'a mut MutexGuard<'_, Option<Core>>,
    op: Op,
) -> Result<&'a mut Core, Error> {
    let Some(core) = guard.as_mut() else {
        let place = format!("WAL of timeline {:?}", slot.timeline);
        let detail = "expected to be the only writer, found that another took over";
        return Err(Error::new(Kind::Conflict, op, place, detail));
    };
    if let Some(cause) = &core.poisoned {
        let detail = format!("an earlier failure was final: {cause}");
        let error = Error::new(Kind::Poisoned, op, core.journal.path.display(), detail);
        return Err(error.hint("close the writer and open it again"));
    }
    Ok(core)
}

impl Slot {
    fn flushed(&self) -> FlushedLsn {
        FlushedLsn(Lsn::new(self.flushed.load(Ordering::Acquire)))
    }

    /// One sync for all that was appended before it began.
    fn flush(&self, cluster: &Cluster) -> Result<FlushedLsn, Error> {
        let _one = lock(&self.sync);
        let (file, upto): (FileHandle, Lsn) = {
            let mut guard = lock(&self.core);
            let core = live(self, &mut guard, Op::Sync)?;
            if core.written == core.flushed.0 {
                return Ok(core.flushed);
            }
            (core.journal.file.clone(), core.written)
        };
        let outcome = file.sync_data();
        let mut guard = lock(&self.core);
        let core = live(self, &mut guard, Op::Sync)?;
        match outcome {
            Ok(()) => core.advance(cluster, upto),
            Err(e) => return Err(core.poison(Op::Sync, e)),
        }
        self.flushed.store(core.flushed.0.as_u64(), Ordering::Release);
        Ok(core.flushed)
    }

    /// Has the journal say, durably, that all of it is durable.
    fn rest(&self) -> Result<(), Error> {
        let _one = lock(&self.sync);
        let file: FileHandle = {
            let mut guard = lock(&self.core);
            let core = live(self, &mut guard, Op::Write)?;
            if !core.close()? {
                return Ok(());
            }
            core.journal.file.clone()
        };
        file.sync_data().map_err(|e| match live(self, &mut lock(&self.core), Op::Sync) {
            Ok(core) => core.poison(Op::Sync, e),
            Err(earlier) => earlier,
        })
    }

    /// Takes the journal from the writer; waits for what it is doing.
    pub(super) fn release(self: &Arc<Self>, cluster: &Cluster) {
        self.fenced.store(true, Ordering::Release);
        let _one = lock(&self.sync);
        let core = lock(&self.core).take();
        if let Some(mut core) = core {
            let whole = core.poisoned.is_none() && core.written == core.flushed.0;
            if !whole || core.close_durably().is_err() {
                core.entry.set_proven(false);
            }
            core.entry.set_used(core.journal.offset);
        }
        let mut state = lock(&cluster.state);
        if state.writers.get(&self.timeline).is_some_and(|slot| Arc::ptr_eq(slot, self)) {
            state.writers.remove(&self.timeline);
        }
    }
}

/// The one live writer of a cluster's timeline. Dropping it closes it; unflushed bytes are then given up.
#[derive(Debug)]
pub struct Writer {
    cluster: Arc<Cluster>,
    slot: Arc<Slot>,
    expect: PageExpectation,
    checker: Option<PageChecker>,
    /// Sees where WAL begins that no recovery passes.
    levels: LevelScan,
    written: Lsn,
    /// One past the last byte of the current segment.
    segment_end: Lsn,
}

/// Syncs for a [`Writer`] from another thread, so that it can append meanwhile.
#[derive(Debug, Clone)]
pub struct Flusher {
    cluster: Arc<Cluster>,
    slot: Arc<Slot>,
}

impl Flusher {
    /// As [`Writer::flush`].
    ///
    /// # Errors
    /// As [`Writer::flush`].
    pub fn flush(&self) -> Result<FlushedLsn, Error> {
        let flushed = self.slot.flush(&self.cluster)?;
        self.cluster.heal();
        Ok(flushed)
    }

    /// For a stream that rests: has the journal say, durably, that all of it is durable, so that damage to the last batch is told
    /// from a torn tail. Changes nothing while bytes wait for their flush.
    ///
    /// # Errors
    /// As [`Writer::flush`].
    pub fn rest(&self) -> Result<(), Error> {
        self.slot.rest()
    }
}

/// The making of the next segment's journal: run it on any thread. Nothing depends on it but speed.
#[derive(Debug)]
pub struct Preparation {
    cluster: Arc<Cluster>,
    timeline: TimelineId,
    start: Lsn,
    preallocate: u64,
}

impl Preparation {
    /// Makes the file, durably.
    ///
    /// # Errors
    /// Of the disk; the writer makes it by itself when it comes there.
    pub fn run(self) -> Result<(), Error> {
        self.cluster.prepare(self.timeline, self.start, self.preallocate)
    }
}

impl Writer {
    pub(super) fn start(
        cluster: Arc<Cluster>,
        journal: Journal,
        entry: Arc<Unsealed>,
        pinned: Pinned,
        history: TimelineHistory,
    ) -> Self {
        let at = entry.durable();
        let finished = lock(&cluster.state).finished();
        let finished = finished.into_iter().filter(|f| matches!(f, WalFile::Partial(_))).collect();
        let slot = Arc::new(Slot {
            timeline: entry.timeline,
            fenced: AtomicBool::new(false),
            flushed: AtomicU64::new(at.as_u64()),
            sync: Mutex::new(()),
            core: Mutex::new(None),
        });
        let segment_end = entry.end;
        *lock(&slot.core) = Some(Core {
            journal,
            entry,
            written: at,
            flushed: FlushedLsn(at),
            poisoned: None,
            finished,
            announced: false,
            closed: false,
        });
        lock(&cluster.state).writers.insert(slot.timeline, slot.clone());
        let expect = PageExpectation {
            system_identifier: pinned.system_identifier,
            segment_size: pinned.segment_size,
            postgres_major: pinned.postgres_version / 10_000,
            history,
        };
        let levels = LevelScan::new(pinned.segment_size);
        Self { cluster, slot, expect, checker: None, levels, written: at, segment_end }
    }

    /// The timeline it writes.
    pub fn timeline(&self) -> TimelineId {
        self.slot.timeline
    }

    /// Where the next append must begin: one past the last byte written, durable or not.
    pub const fn position(&self) -> Lsn {
        self.written
    }

    /// One past the last byte known to be durable.
    pub fn flushed(&self) -> FlushedLsn {
        self.slot.flushed()
    }

    /// Whether another writer took over: every further call fails.
    pub fn is_fenced(&self) -> bool {
        self.slot.fenced.load(Ordering::Acquire)
    }

    /// A handle that syncs from another thread while this one appends.
    pub fn flusher(&self) -> Flusher {
        Flusher { cluster: self.cluster.clone(), slot: self.slot.clone() }
    }

    /// Checks and writes the next bytes; they are durable only after a flush. Gives one past the last of them.
    ///
    /// # Errors
    /// - `Invalid`: bytes that do not continue at [`Writer::position`], or WAL that does not belong here. Nothing was written.
    /// - `Full`: no space. What lies below [`Writer::position`] is written, the rest may be tried again from there.
    ///   Nothing acknowledged is touched. (When the disk claimed to have space and then had none, later calls are `Poisoned`.)
    /// - `Poisoned`: close the writer and open it again.
    /// - `Conflict`: another writer took over.
    pub fn append(&mut self, start: Lsn, data: &[u8]) -> Result<Lsn, Error> {
        live(&self.slot, &mut lock(&self.slot.core), Op::Append)?;
        self.check_continues(start, data)?;
        if data.is_empty() {
            return Ok(self.written);
        }
        let mut checker = match self.checker.take() {
            Some(checker) => checker,
            None => self.checker_here()?,
        };
        checker.check(data).map_err(|e| {
            Error::new(Kind::Invalid, Op::Append, &self.cluster.name, &e).with_source(e)
        })?;
        let mut changes = Vec::new();
        self.levels.push(start, data, &mut |lsn, parameters| changes.push((lsn, parameters)));
        if !changes.is_empty() {
            // Before the bytes are acknowledged, and though they are not yet durable: they come again.
            self.cluster.note_levels(self.slot.timeline, &changes)?;
        }
        let mut rest = data;
        while !rest.is_empty() {
            if self.written == self.segment_end {
                self.rotate()?;
            }
            let room = self.segment_end.bytes_since(self.written).min(rest.len() as u64);
            let (part, later) = rest.split_at(room as usize);
            self.append_part(part)?;
            rest = later;
        }
        self.checker = Some(checker);
        Ok(self.written)
    }

    fn check_continues(&self, start: Lsn, data: &[u8]) -> Result<(), Error> {
        let expected = self.written;
        if start != expected {
            let detail = format!("expected WAL from {expected} on, found {start}");
            return Err(Error::new(Kind::Invalid, Op::Append, &self.cluster.name, detail));
        }
        // The last segment of the address space is refused: its end has no LSN.
        let room = self.expect.segment_size.bytes();
        match start.checked_add(data.len() as u64).and_then(|end| end.checked_add(room)) {
            Some(_) => Ok(()),
            None => {
                let detail = format!("expected an end below the last LSN, found {start} and on");
                Err(Error::new(Kind::Invalid, Op::Append, &self.cluster.name, detail))
            }
        }
    }

    /// Within one segment.
    fn append_part(&mut self, part: &[u8]) -> Result<(), Error> {
        let Self { cluster, slot, written, .. } = self;
        let mut guard = lock(&slot.core);
        let core = live(slot, &mut guard, Op::Append)?;
        let ahead = cluster.shared.options.preallocate;
        cluster.shared.pool.with(|scratch| {
            for raw in part.chunks(FRAME_RAW_MAX) {
                let Journal { header, cipher, offset, .. } = &core.journal;
                let places = (core.written, core.flushed.0);
                let frame = scratch.frame(header, cipher.as_deref(), *offset, places, raw);
                core.closed = false;
                core.reserve(frame.len() as u64, ahead)?;
                if let Err(e) = core.journal.file.write_all_at(frame, core.journal.offset) {
                    return Err(core.poison(Op::Write, e));
                }
                core.journal.offset += frame.len() as u64;
                core.written = core.written.advance(raw.len() as u64);
                *written = core.written;
            }
            Ok(())
        })
    }

    /// Syncs the full segment, then goes on in the next one's journal.
    fn rotate(&mut self) -> Result<(), Error> {
        self.flush()?;
        let _one = lock(&self.slot.sync);
        let mut guard = lock(&self.slot.core);
        let core = live(&self.slot, &mut guard, Op::Append)?;
        let (journal, entry) = self.cluster.next_journal(self.slot.timeline, self.segment_end)?;
        self.segment_end = journal.header.end();
        core.entry.set_used(core.journal.offset);
        core.journal = journal;
        core.entry = entry;
        core.closed = false;
        Ok(())
    }

    /// Makes everything appended so far durable, with one sync.
    ///
    /// # Errors
    /// - `Poisoned`: the sync failed; what it covered is unknown, nothing more is acknowledged (P3).
    /// - `Full`: as `Poisoned`, for want of space.
    /// - `Conflict`: another writer took over.
    pub fn flush(&mut self) -> Result<FlushedLsn, Error> {
        self.flusher().flush()
    }

    /// Files completed since the last call, ready to be sealed: also the partial segments that the start of this
    /// timeline or a gap ended. (All of them can be asked for at any time: `WalStore::unsealed`.)
    pub fn take_finished(&mut self) -> Vec<WalFile> {
        lock(&self.slot.core)
            .as_mut()
            .map(|core| std::mem::take(&mut core.finished))
            .unwrap_or_default()
    }

    /// The next journal to make ahead of need, once more than half of this segment is written.
    pub fn preparation(&self) -> Option<Preparation> {
        let half = self.expect.segment_size.bytes() / 2;
        let done = half * 2 - self.segment_end.bytes_since(self.written);
        let timeline = self.slot.timeline;
        if done <= half || lock(&self.cluster.state).prepared.contains_key(&timeline) {
            return None;
        }
        let guard = lock(&self.slot.core);
        let used = guard.as_ref()?.journal.offset;
        // As this segment compresses, so will the next, about.
        let guess = used * (half * 2) / done.max(1);
        Some(Preparation {
            cluster: self.cluster.clone(),
            timeline: self.slot.timeline,
            start: self.segment_end,
            preallocate: guess.max(self.cluster.shared.options.preallocate).next_multiple_of(BLOCK),
        })
    }

    /// A checker for the bytes from here on. Where a page's header is cut in two by this position, it sees the first
    /// part, which is on disk, again.
    fn checker_here(&self) -> Result<PageChecker, Error> {
        let offset = self.written.as_u64() % PAGE_BYTES;
        if offset == 0 || offset >= PAGE_HEADER_MAX {
            return Ok(PageChecker::new(self.expect.clone(), self.written));
        }
        let page = Lsn::new(self.written.as_u64() - offset);
        let (file, path) = {
            let mut guard = lock(&self.slot.core);
            let core = live(&self.slot, &mut guard, Op::Append)?;
            (core.journal.file.clone(), core.journal.path.clone())
        };
        let keys = self.cluster.keys();
        let frames = Frames::of(file, &path, &keys)?;
        let head = read_back(frames, page, self.written)?;
        let mut checker = PageChecker::new(self.expect.clone(), page);
        checker
            .check(&head)
            .map_err(|e| Error::new(Kind::Corrupt, Op::Read, path.display(), &e).with_source(e))?;
        Ok(checker)
    }
}

/// The bytes from `from` to `to` of a journal.
fn read_back(mut frames: Frames, from: Lsn, to: Lsn) -> Result<Vec<u8>, Error> {
    let mut context = DCtx::create();
    let (mut found, mut buffer) = (Vec::new(), Vec::new());
    while frames.position() < to {
        let Some(frame) = frames.next()? else { return Err(frames.lost(to)) };
        let (start, end) = (frame.header.start, frame.header.end());
        if end > from {
            let plain = decode_frame(&mut context, &frame, &mut buffer)?;
            let skip = from.bytes_since(start) as usize;
            let keep = plain.len() - end.bytes_since(to) as usize;
            found.extend_from_slice(&plain[skip..keep]);
        }
    }
    Ok(found)
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.slot.release(&self.cluster);
    }
}
