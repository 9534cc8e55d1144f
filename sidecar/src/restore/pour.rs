//! Writes a snapshot's files, many at once.
//!
//! One thread reads the trees and creates directories; workers write pieces of files, so that one large file
//! keeps all of them busy. The queue between them is bounded (RESTORE5). The reader checks every chunk (RESTORE4);
//! with `delta`, a chunk that the file already has is recognised by the same SHA-256 and not fetched at all, and of
//! a chunk that is fetched only the pages that differ are written.

use super::{
    MARKER,
    delta::{Leftovers, remove},
    local,
    missing::Chunks,
    of_storage,
    place::{Meaning, Places},
    strip::{self, Blocks, Strip},
};
use crate::error::{Error, Failure};
use klio_pg::Lsn;
use klio_proto::Code;
use klio_storage::repository::{ChunkId, Entry, StoredKind};
use std::{
    collections::BTreeSet,
    fs::{self, File, FileTimes, OpenOptions, Permissions},
    io,
    ops::Range,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{
            AtomicU64, AtomicUsize,
            Ordering::{AcqRel, Relaxed},
        },
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
    time::SystemTime,
};
use tokio_util::sync::CancellationToken;

/// Chunks in one piece of work: 9 MiB with chunks of 72 KiB.
const PIECE_CHUNKS: usize = 128;
/// Pieces that may wait in the queue, per worker.
const QUEUE: usize = 16;

/// How far a restore is: updated by the restore, read by progress displays.
#[derive(Debug, Default)]
pub struct Progress {
    phase: Mutex<&'static str>,
    bytes: AtomicU64,
    files: AtomicU64,
    written: AtomicU64,
    total_bytes: AtomicU64,
    total_files: AtomicU64,
    replay: Mutex<Option<Replay>>,
}

/// How far PostgreSQL is with a recovery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Replay {
    /// Where replay began.
    pub from: Lsn,
    /// The last position that was replayed.
    pub at: Lsn,
    /// Where replay will end.
    pub to: Lsn,
}

/// A snapshot of [`Progress`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seen {
    /// What is being done, as text for the user.
    pub phase: &'static str,
    /// Bytes of files that were written or found to be there already.
    pub bytes: u64,
    /// Files that are complete.
    pub files: u64,
    /// Bytes that were written: with `delta` less than `bytes`, by what was there already.
    pub written: u64,
    /// Bytes of all files of the restore.
    pub total_bytes: u64,
    /// Number of all files of the restore.
    pub total_files: u64,
    /// Progress of recovery, while a drill recovers.
    pub replay: Option<Replay>,
}

impl Progress {
    pub fn seen(&self) -> Seen {
        Seen {
            phase: *self.phase.lock().unwrap_or_else(PoisonError::into_inner),
            bytes: self.bytes.load(Relaxed),
            files: self.files.load(Relaxed),
            written: self.written.load(Relaxed),
            total_bytes: self.total_bytes.load(Relaxed),
            total_files: self.total_files.load(Relaxed),
            replay: *self.replay.lock().unwrap_or_else(PoisonError::into_inner),
        }
    }

    pub(super) fn enter(&self, phase: &'static str) {
        *self.phase.lock().unwrap_or_else(PoisonError::into_inner) = phase;
        tracing::debug!(phase, "restore");
    }

    pub(super) fn replayed(&self, replay: Option<Replay>) {
        *self.replay.lock().unwrap_or_else(PoisonError::into_inner) = replay;
    }

    pub(super) fn expect(&self, files: u64, bytes: u64) {
        self.total_files.store(files, Relaxed);
        self.total_bytes.store(bytes, Relaxed);
    }
}

/// What to write, and where.
pub struct Pour {
    pub(super) chunks: Chunks,
    pub places: Places,
    /// Links that become directories of the copy's own.
    pub directories: BTreeSet<PathBuf>,
    /// Whether files may be there already (`--delta`).
    pub delta: bool,
    /// Number of workers.
    pub threads: usize,
    pub progress: Arc<Progress>,
    /// Cancelled to end the restore early.
    pub stop: CancellationToken,
}

/// What was done, and what is left for the end.
#[derive(Debug)]
pub struct Poured {
    /// `global/pg_control`, which is written last.
    pub control: Option<Entry>,
    /// Files and directories that were removed.
    pub removed: u64,
}

/// A file that several workers write together.
struct Whole {
    path: PathBuf,
    entry: Entry,
    chunk_bytes: u64,
    file: Mutex<Option<Arc<File>>>,
    /// Number of pieces that are not written yet.
    left: AtomicUsize,
}

struct Piece {
    file: Arc<Whole>,
    first: usize,
}

impl Whole {
    fn size(&self) -> u64 {
        match self.entry.kind {
            StoredKind::File { size, .. } => size,
            _ => 0,
        }
    }
    fn chunks(&self) -> &[ChunkId] {
        match &self.entry.kind {
            StoredKind::File { chunks, .. } => chunks,
            _ => &[],
        }
    }
    /// The offset of a chunk; for the number after the last chunk, the end of the file.
    fn place(&self, number: usize) -> u64 {
        self.size().min(number as u64 * self.chunk_bytes)
    }

    fn length(&self, number: usize) -> u64 {
        self.place(number + 1) - self.place(number)
    }

    /// The first worker opens the file. Bytes beyond the new size are cut off at once, so that whatever is then read stays.
    fn open(&self, delta: bool) -> io::Result<Arc<File>> {
        let mut slot = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = slot.as_ref() {
            return Ok(Arc::clone(file));
        }
        let mut options = OpenOptions::new();
        options.read(delta).write(true).mode(0o600).custom_flags(NO_FOLLOW);
        let file = match delta {
            true => options.create(true).truncate(false).open(&self.path)?,
            false => options.create_new(true).open(&self.path)?,
        };
        // From here on a later worker gets this same file, instead of failing because it exists already.
        let file = Arc::new(file);
        *slot = Some(Arc::clone(&file));
        match delta {
            true if file.metadata()?.len() != self.size() => file.set_len(self.size())?,
            true => {}
            false => strip::reserve(&file, self.size())?,
        }
        // With `delta` the old file may well be in the page cache, since PostgreSQL used it recently.
        if !delta {
            strip::go_direct(&file, self.size())?;
        }
        Ok(file)
    }
}

/// O_NOFOLLOW, so that a link in an old directory cannot lead a write outside of it.
const NO_FOLLOW: i32 = rustix::fs::OFlags::NOFOLLOW.bits() as i32;

impl Pour {
    /// Writes everything except pg_control.
    ///
    /// # Errors
    /// The first failure; the directories are then incomplete (RESTORE2).
    pub fn run(&self) -> Result<Poured, Error> {
        let failure: Mutex<Option<Error>> = Mutex::new(None);
        let halt = self.stop.child_token();
        let fail = |error: Error| {
            failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            halt.cancel();
        };
        let span = tracing::Span::current();
        let work = |pieces: &Mutex<Receiver<Piece>>| {
            let _span = span.enter();
            let (mut buffer, mut strip) = (Blocks::default(), Strip::default());
            while let Some(piece) = next(pieces) {
                // Receives also after a failure: otherwise the feeding thread would wait for ever.
                if !halt.is_cancelled()
                    && let Err(error) = self.write(&piece, &mut strip, &mut buffer, &halt)
                {
                    fail(error);
                }
            }
        };
        let poured = crew(self.threads, work, |sender| self.feed(sender, &halt));
        if let Some(error) = failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        let (control, directories, removed) = poured?;
        if self.stop.is_cancelled() {
            return Err(super::stopped());
        }
        // Times are set at the end, the deepest directories first, because every change in a directory changes its time.
        for (path, entry) in directories.iter().rev() {
            let place = File::open(path).map_err(|error| local("open", path, &error))?;
            dress(&place, entry).map_err(|error| local("set mode and time of", path, &error))?;
        }
        Ok(Poured { control, removed })
    }

    #[allow(clippy::type_complexity)]
    fn feed(
        &self,
        sender: &SyncSender<Piece>,
        halt: &CancellationToken,
    ) -> Result<(Option<Entry>, Vec<(PathBuf, Entry)>, u64), Error> {
        let mut leftovers = Leftovers::default();
        let (mut control, mut directories) = (None, Vec::new());
        for entry in self.chunks.reader.entries().map_err(|e| of_storage(&e))? {
            if halt.is_cancelled() {
                return Err(super::stopped());
            }
            let entry = entry.map_err(|e| of_storage(&e))?;
            let path = match self.places.meaning(&entry.path) {
                Meaning::At(path) => path,
                Meaning::Control => {
                    control = Some(entry);
                    continue;
                }
                Meaning::Nothing => continue,
            };
            let failed = |error: io::Error| local("write", &path, &error);
            let own_directory = self.directories.contains(&path);
            let is_dir = own_directory || entry.kind == StoredKind::Dir;
            if self.delta {
                leftovers.pass(&path, is_dir).map_err(failed)?;
                if path == self.places.data {
                    leftovers.keep(&path.join(MARKER));
                } else if own_directory {
                    keep_all(&mut leftovers, &path).map_err(failed)?;
                } else if self.places.tablespaces.values().any(|place| *place == path) {
                    // Keep directories of other PostgreSQL versions in the same tablespace, as pg_upgrade leaves them.
                    keep_all(&mut leftovers, &path).map_err(failed)?;
                }
            }
            match &entry.kind {
                StoredKind::Dir => {
                    self.make_dir(&path).map_err(failed)?;
                    directories.push((path, entry));
                }
                StoredKind::Symlink(_) if own_directory => {
                    self.make_dir(&path).and_then(|()| give(&path, &entry)).map_err(failed)?;
                }
                StoredKind::Symlink(to) => {
                    if self.delta {
                        remove(&path).map_err(failed)?;
                    }
                    std::os::unix::fs::symlink(to, &path).map_err(failed)?;
                }
                StoredKind::File { .. } => self.hand_out(sender, path, entry)?,
            }
        }
        leftovers.finish().map_err(|error| local("clean", &self.places.data, &error))?;
        Ok((control, directories, leftovers.removed))
    }

    fn make_dir(&self, path: &Path) -> io::Result<()> {
        let is_wal = path == self.places.data.join("pg_wal");
        let is_root = self.places.all().any(|place| place == path);
        match fs::symlink_metadata(path) {
            Ok(meta) if meta.is_dir() => return Ok(()),
            // The user chose the roots, and pg_wal may lie on another disk, so both may be links.
            Ok(meta) if meta.is_symlink() && (is_wal || is_root) && path.is_dir() => return Ok(()),
            Ok(_) => remove(path)?,
            Err(_) => {}
        }
        fs::DirBuilder::new().recursive(is_root).mode(0o700).create(path)
    }

    fn hand_out(
        &self,
        sender: &SyncSender<Piece>,
        path: PathBuf,
        entry: Entry,
    ) -> Result<(), Error> {
        if self.delta {
            let there = fs::symlink_metadata(&path);
            if there.is_ok_and(|meta| !meta.is_file()) {
                remove(&path).map_err(|error| local("remove", &path, &error))?;
            }
        }
        let StoredKind::File { chunks, .. } = &entry.kind else { return Ok(()) };
        let chunk_bytes = match chunks.first() {
            Some(first) => self.chunks.reader.chunk_length(first).map_err(|e| of_storage(&e))?,
            None => 0,
        };
        let pieces = chunks.len().div_ceil(PIECE_CHUNKS).max(1);
        let (file, left) = (Mutex::new(None), AtomicUsize::new(pieces));
        let whole = Arc::new(Whole { path, entry, chunk_bytes, file, left });
        for piece in 0..pieces {
            let piece = Piece { file: Arc::clone(&whole), first: piece * PIECE_CHUNKS };
            // Sending can only fail after all workers have panicked.
            if sender.send(piece).is_err() {
                return Err(Error::new(
                    Failure::Code(Code::Internal),
                    "restore: no worker is left",
                ));
            }
        }
        Ok(())
    }

    fn write(
        &self,
        piece: &Piece,
        strip: &mut Strip,
        buffer: &mut Blocks,
        halt: &CancellationToken,
    ) -> Result<(), Error> {
        let whole = &piece.file;
        let failed = |error: io::Error| local("write", &whole.path, &error);
        let file = whole.open(self.delta).map_err(failed)?;
        let end = whole.chunks().len().min(piece.first + PIECE_CHUNKS);
        let missing = match self.delta {
            true => self.missing(whole, &file, piece.first..end, buffer, halt)?,
            false => (piece.first..end).collect(),
        };
        strip.start_over();
        self.chunks.fetch(whole.chunks(), &missing, |number, chunk| {
            if halt.is_cancelled() {
                return Err(super::stopped());
            }
            let (offset, length) = (whole.place(number), whole.length(number));
            if chunk.len() as u64 != length {
                return Err(wrong_length(&whole.path, offset, length, chunk.len()));
            }
            let written = match self.delta {
                true => strip.add_what_differs(&file, offset, chunk, buffer),
                false => strip.add(&file, offset, chunk).map(|()| length),
            };
            self.progress.written.fetch_add(written.map_err(failed)?, Relaxed);
            self.progress.bytes.fetch_add(length, Relaxed);
            Ok(())
        })?;
        strip.write(&file).map_err(failed)?;
        if whole.left.fetch_sub(1, AcqRel) == 1 {
            *whole.file.lock().unwrap_or_else(PoisonError::into_inner) = None;
            dress(&file, &whole.entry).map_err(failed)?;
            self.progress.files.fetch_add(1, Relaxed);
        }
        Ok(())
    }

    /// The chunks, out of the given ones, that the file does not have. Reads about a mebibyte at a time.
    fn missing(
        &self,
        whole: &Whole,
        file: &File,
        chunks: Range<usize>,
        buffer: &mut Blocks,
        halt: &CancellationToken,
    ) -> Result<Vec<usize>, Error> {
        let together = usize::try_from(strip::FULL as u64 / whole.chunk_bytes.max(1)).unwrap_or(1);
        let mut missing = Vec::new();
        for first in chunks.clone().step_by(together.max(1)) {
            if halt.is_cancelled() {
                return Err(super::stopped());
            }
            let last = chunks.end.min(first + together.max(1));
            let begin = whole.place(first);
            let length = usize::try_from(whole.place(last) - begin).unwrap_or(0);
            let there = buffer.read(file, begin, length);
            let there = there.map_err(|error| local("read", &whole.path, &error))?;
            for number in first..last {
                let there = there.get((whole.place(number) - begin) as usize..).unwrap_or_default();
                if is_there(there, whole.length(number), &whole.chunks()[number]) {
                    self.progress.bytes.fetch_add(whole.length(number), Relaxed);
                } else {
                    missing.push(number);
                }
            }
        }
        Ok(missing)
    }
}

fn keep_all(leftovers: &mut Leftovers, directory: &Path) -> io::Result<()> {
    match fs::read_dir(directory) {
        Ok(names) => names.into_iter().try_for_each(|entry| {
            leftovers.keep(&entry?.path());
            Ok(())
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Starts the workers and runs `feed` on this thread. The workers hold the only receivers, so that when the last one
/// is gone `feed` gets an error instead of waiting for ever. A worker's panic becomes a panic here.
fn crew<T: Send, R>(
    threads: usize,
    work: impl Fn(&Mutex<Receiver<T>>) + Sync,
    feed: impl FnOnce(&SyncSender<T>) -> R,
) -> R {
    let (sender, receiver) = sync_channel::<T>(QUEUE * threads);
    let receiver = Arc::new(Mutex::new(receiver));
    thread::scope(|scope| {
        let work = &work;
        for receiver in vec![receiver; threads] {
            scope.spawn(move || work(&receiver));
        }
        let fed = feed(&sender);
        drop(sender);
        fed
    })
}

fn next<T>(receiver: &Mutex<Receiver<T>>) -> Option<T> {
    receiver.lock().unwrap_or_else(PoisonError::into_inner).recv().ok()
}

fn wrong_length(path: &Path, offset: u64, expected: u64, found: usize) -> Error {
    let place = path.display();
    let message = format!("write {place} at {offset}: expected {expected} bytes, found {found}");
    Error::new(Failure::Code(Code::Corrupt), message)
}

/// Whether the bytes that were read from the file, if any, begin with this chunk.
fn is_there(read: &[u8], length: u64, id: &ChunkId) -> bool {
    let read = usize::try_from(length).ok().and_then(|length| read.get(..length));
    read.is_some_and(|bytes| !bytes.is_empty() && ChunkId::of(bytes) == *id)
}

/// Sets the owner, if this process is root.
fn give(path: &Path, entry: &Entry) -> io::Result<()> {
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(path, Some(entry.uid), Some(entry.gid))?;
    }
    Ok(())
}

/// Sets mode, owner (if this process is root) and time.
pub fn dress(file: &File, entry: &Entry) -> io::Result<()> {
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::fchown(file, Some(entry.uid), Some(entry.gid))?;
    }
    file.set_permissions(Permissions::from_mode(entry.mode & 0o7777))?;
    let mtime: SystemTime = entry.mtime;
    file.set_times(FileTimes::new().set_modified(mtime))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_feeder_does_not_wait_for_workers_that_are_gone() {
        let ended = std::panic::catch_unwind(|| {
            let work = |pieces: &Mutex<Receiver<u32>>| {
                let piece = next(pieces).unwrap();
                panic!("piece {piece}");
            };
            crew(2, work, |sender| (0..).find(|piece| sender.send(*piece).is_err()))
        });
        assert!(ended.is_err());
        let sum = AtomicU64::new(0);
        let add = |pieces: &Mutex<Receiver<u64>>| {
            while let Some(piece) = next(pieces) {
                sum.fetch_add(piece, Relaxed);
            }
        };
        crew(3, add, |sender| (0..1000).for_each(|piece| sender.send(piece).unwrap()));
        assert_eq!(sum.into_inner(), 499_500);
    }

    #[test]
    fn a_tablespace_keeps_the_directories_of_other_versions_and_loses_its_own_leftovers() {
        let scratch = tempfile::tempdir().unwrap();
        let place = scratch.path().join("place");
        let [old, own] = ["PG_14_202107181", "PG_15_202209061"].map(|name| place.join(name));
        for directory in [&old, &own] {
            fs::create_dir_all(directory.join("5")).unwrap();
            fs::write(directory.join("5/16384"), "rows").unwrap();
        }
        fs::write(own.join("5/16385"), "of a table that the backup has not").unwrap();
        let mut leftovers = Leftovers::default();
        leftovers.pass(&place, true).unwrap();
        keep_all(&mut leftovers, &place).unwrap();
        for (path, is_dir) in
            [(own.clone(), true), (own.join("5"), true), (own.join("5/16384"), false)]
        {
            leftovers.pass(&path, is_dir).unwrap();
        }
        leftovers.finish().unwrap();
        assert_eq!(fs::read_to_string(old.join("5/16384")).unwrap(), "rows");
        assert!(own.join("5/16384").exists() && !own.join("5/16385").exists());
        assert_eq!(leftovers.removed, 1);
    }

    #[test]
    fn a_tablespace_that_is_not_there_yet_has_nothing_to_keep() {
        let scratch = tempfile::tempdir().unwrap();
        let mut leftovers = Leftovers::default();
        keep_all(&mut leftovers, &scratch.path().join("none")).unwrap();
        assert!(
            keep_all(&mut leftovers, &{
                let file = scratch.path().join("file");
                fs::write(&file, "").unwrap();
                file
            })
            .is_err()
        );
    }
}
