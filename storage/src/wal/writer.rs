//! Receives one cluster's WAL on one timeline. Each timeline has its own writer; they share only the disk.
//!
//! - WAL1: flushed <= written, and both only grow. Only a flush makes a [`FlushedLsn`] (P1).
//! - All bytes of an append are checked before any of them is written.
//! - A batch never spans segments: a full segment is synced before bytes of the next one are written.
//! - After a failed write or sync nothing more is written or acknowledged (P3): the writer has to be closed and opened
//!   again.
//! - A full disk is not such a failure: nothing changes, and the same append may be tried again.
//! - After `fence` nothing more is written: the fence waits for the current operation and then takes the journal away
//!   (WAL3).
//!
//! Memory of an idle writer: this struct and an open file.

use super::{
    cluster::{Cluster, Unsealed, lock},
    frame::FRAME_RAW_MAX,
    journal::{self, Frames, Journal},
    reader::decode_frame,
    types::Pinned,
};
use crate::{Error, Kind, Op, crash_point, disk::FileHandle, layout::WalFile};
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

/// The longest header of a page.
const PAGE_HEADER_MAX: u64 = 40;
/// Files grow to a multiple of this.
const BLOCK: u64 = 4096;

/// One past the last durable byte. Only a successful flush makes it, or recovery, which syncs as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlushedLsn(Lsn);

impl FlushedLsn {
    pub const fn lsn(self) -> Lsn {
        self.0
    }
}

impl fmt::Display for FlushedLsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The state that a writer, its flusher and the store share.
#[derive(Debug)]
pub(super) struct Slot {
    timeline: TimelineId,
    fenced: AtomicBool,
    flushed: AtomicU64,
    /// Held during every sync of the journal. Two concurrent syncs of one file would be fatal: an error is reported to
    /// only one of them, and the other would acknowledge lost bytes.
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
    /// The partial segments of older timelines were reported as finished.
    announced: bool,
    /// The journal ends with a closing frame, which says that all of it is durable.
    closed: bool,
}

impl Core {
    /// Poisons the writer after a failed write or sync: the state of the file is unknown from then on.
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

    /// Called after a successful sync of everything up to `to`.
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

    /// Writes a closing frame, which says that the whole journal is durable, unless there is one. True when it has to
    /// be synced. It only makes damage easier to detect, so it is omitted when the disk is full.
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

    /// Extends the file by `bytes`. A full disk leaves the file unchanged and does not poison the writer.
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

/// The journal, unless the writer was fenced or poisoned.
fn live<'a>(
    slot: &Slot,
    guard: &'a mut MutexGuard<'_, Option<Core>>,
    op: Op,
) -> Result<&'a mut Core, Error> {
    let Some(core) = guard.as_mut() else {
        let place = format!("WAL of timeline {:?}", slot.timeline);
        let detail = "expected to be the only writer, found that another one took over";
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

    /// One sync for everything that was appended before it began.
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
        crash_point!("wal.synced");
        let mut guard = lock(&self.core);
        let core = live(self, &mut guard, Op::Sync)?;
        match outcome {
            Ok(()) => core.advance(cluster, upto),
            Err(e) => return Err(core.poison(Op::Sync, e)),
        }
        self.flushed.store(core.flushed.0.as_u64(), Ordering::Release);
        Ok(core.flushed)
    }

    /// Writes and syncs a closing frame.
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

    /// Takes the journal away from the writer, after waiting for its current operation.
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

/// The only active writer of a cluster's timeline. Dropping it closes it; unflushed bytes are discarded.
#[derive(Debug)]
pub struct Writer {
    cluster: Arc<Cluster>,
    slot: Arc<Slot>,
    expect: PageExpectation,
    checker: Option<PageChecker>,
    /// Detects where WAL begins that recovery cannot pass.
    levels: LevelScan,
    written: Lsn,
    /// One past the last byte of the current segment.
    segment_end: Lsn,
}

/// Syncs for a [`Writer`] from another thread, while the writer appends.
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

    /// For a stream that pauses: records in the journal, durably, that all of it is durable, so that later damage to
    /// the last batch can be told from a torn tail. Does nothing while bytes wait for their flush.
    ///
    /// # Errors
    /// As [`Writer::flush`].
    pub fn rest(&self) -> Result<(), Error> {
        self.slot.rest()
    }
}

/// Creates the journal of the next segment; run it on any thread. Only speed depends on it.
#[derive(Debug)]
pub struct Preparation {
    cluster: Arc<Cluster>,
    timeline: TimelineId,
    start: Lsn,
    preallocate: u64,
}

impl Preparation {
    /// Creates the file, durably.
    ///
    /// # Errors
    /// An I/O error of the disk; the writer then creates the file itself when it needs it.
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

    pub fn timeline(&self) -> TimelineId {
        self.slot.timeline
    }

    /// Where the next append must begin: one past the last written byte, durable or not.
    pub const fn position(&self) -> Lsn {
        self.written
    }

    /// One past the last durable byte.
    pub fn flushed(&self) -> FlushedLsn {
        self.slot.flushed()
    }

    /// Whether another writer took over; if so, every further call fails.
    pub fn is_fenced(&self) -> bool {
        self.slot.fenced.load(Ordering::Acquire)
    }

    /// A handle that syncs from another thread while this one appends.
    pub fn flusher(&self) -> Flusher {
        Flusher { cluster: self.cluster.clone(), slot: self.slot.clone() }
    }

    /// Checks and writes the next bytes and returns one past the last of them. They are durable only after a flush.
    ///
    /// # Errors
    /// - `Invalid`: the bytes do not continue at [`Writer::position`], or the WAL does not belong here. Nothing was
    ///   written.
    /// - `Full`: no space. The bytes below [`Writer::position`] are written; the rest may be tried again from there.
    ///   Acknowledged bytes are not touched. (If the disk had reported space and then had none, later calls are
    ///   `Poisoned`.)
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
            // Recorded before the bytes are acknowledged. It does not matter that they are not durable yet: if they are
            // lost, they are sent again.
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
        // The last segment of the address space is refused, because its end has no LSN.
        let room = self.expect.segment_size.bytes();
        match start.checked_add(data.len() as u64).and_then(|end| end.checked_add(room)) {
            Some(_) => Ok(()),
            None => {
                let detail = format!("expected an end below the last LSN, found {start} and on");
                Err(Error::new(Kind::Invalid, Op::Append, &self.cluster.name, detail))
            }
        }
    }

    /// Appends bytes that lie within one segment.
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
                crash_point!("wal.appended");
            }
            Ok(())
        })
    }

    /// Syncs the full segment, then continues in the journal of the next one.
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
    /// - `Poisoned`: the sync failed; the state of the bytes it covered is unknown, and nothing more is acknowledged
    ///   (P3).
    /// - `Full`: as `Poisoned`, because the disk is full.
    /// - `Conflict`: another writer took over.
    pub fn flush(&mut self) -> Result<FlushedLsn, Error> {
        self.flusher().flush()
    }

    /// The files completed since the last call, ready to be sealed, including partial segments that ended with a gap or
    /// with the start of this timeline. (`WalStore::unsealed` lists all of them at any time.)
    pub fn take_finished(&mut self) -> Vec<WalFile> {
        lock(&self.slot.core)
            .as_mut()
            .map(|core| std::mem::take(&mut core.finished))
            .unwrap_or_default()
    }

    /// The next journal to create ahead of need, once more than half of this segment is written.
    pub fn preparation(&self) -> Option<Preparation> {
        let half = self.expect.segment_size.bytes() / 2;
        let done = half * 2 - self.segment_end.bytes_since(self.written);
        let timeline = self.slot.timeline;
        if done <= half || lock(&self.cluster.state).prepared.contains_key(&timeline) {
            return None;
        }
        let guard = lock(&self.slot.core);
        let used = guard.as_ref()?.journal.offset;
        // The next segment is assumed to compress about as well as this one.
        let guess = used * (half * 2) / done.max(1);
        Some(Preparation {
            cluster: self.cluster.clone(),
            timeline: self.slot.timeline,
            start: self.segment_end,
            preallocate: guess.max(self.cluster.shared.options.preallocate).next_multiple_of(BLOCK),
        })
    }

    /// A checker for the bytes from the current position on. If the position is inside a page header, the checker first
    /// reads the first part of the header again from disk.
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
        let head = read_range(frames, page, self.written)?;
        let mut checker = PageChecker::new(self.expect.clone(), page);
        checker
            .check(&head)
            .map_err(|e| Error::new(Kind::Corrupt, Op::Read, path.display(), &e).with_source(e))?;
        Ok(checker)
    }
}

/// Reads the decoded WAL of a journal from `from` to `to`.
fn read_range(mut frames: Frames, from: Lsn, to: Lsn) -> Result<Vec<u8>, Error> {
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
