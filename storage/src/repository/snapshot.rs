//! Archives a source: chunks, trees and index files, but no snapshot (`assemble` makes that).
//!
//! REPO3: rustic omits what it cannot read, logs a warning, and returns Ok. So every reader is wrapped: the first error
//! is recorded and ends the listing, and at the end rustic's counts of archived entries must match the listing.
//!
//! Unchanged files are not read again: those whose type, size, mtime and ctime match the parent. A file that changed
//! less than `YOUNG` before the listing began could change again within the same tick of the clock that stamps files.
//! Its ctime is therefore stored as a value that no file has, so that the next backup reads it again. P1 for restored
//! data depends on this: PostgreSQL may write a page twice within a tick, and the WAL of the second write may be older
//! than the next backup's start.

use super::{
    EntryKind, Open, Progress, Repository, SnapshotId, Source, SourceEntries, SourceEntry,
    backend::{Snapshots, Trace},
    index::retried,
    reader::sum,
};
use crate::{Error, Kind, Op, tier2::Sha256Sum};
use rustic_core::{
    BackupOptions, ErrorKind, IndexedIdsStatus, ParentOptions, ProgressBars, ProgressType,
    ReadSource, ReadSourceEntry, ReadSourceOpen, RusticError, RusticProgress, RusticResult,
    SnapshotGroupCriterion,
    jiff::Timestamp,
    repofile::{Metadata, Node, NodeType, SnapshotFile},
};
use std::{
    io::{self, Read},
    path::{Component, Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// How long a file must have been unchanged before the listing began to be skipped by the next backup: the coarsest
/// timestamp resolution of file systems in use (FAT and some network file systems: 2 s).
pub const YOUNG: Duration = Duration::from_secs(2);

/// The result of one `snapshot`, to be passed to `assemble`. Dropping it loses only work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    pub(super) tree: Sha256Sum,
    pub(super) parent: Option<SnapshotId>,
    /// Number of files and links.
    pub files: u64,
    /// Number of these that were not read because the parent has them unchanged.
    pub files_unchanged: u64,
    /// Number of directories without the root.
    pub directories: u64,
    /// Total size of the files in bytes.
    pub bytes: u64,
    /// Bytes of new content, before compression.
    pub added_bytes: u64,
    /// Bytes that the new content took in the repository, including trees.
    pub stored_bytes: u64,
    /// Number of files that vanished between listing and opening.
    pub files_vanished: u64,
    /// Number of files whose size differed from the listing: they were truncated, or padded with zeros.
    pub files_resized: u64,
}

/// The state that the threads of one archive run share.
struct Run {
    trace: Arc<Trace>,
    progress: Arc<dyn Progress>,
    files: AtomicU64,
    directories: AtomicU64,
    bytes: AtomicU64,
    vanished: AtomicU64,
    resized: AtomicU64,
}

impl Run {
    fn new(trace: Arc<Trace>, progress: Arc<dyn Progress>) -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            trace,
            progress,
            files: zero(),
            directories: zero(),
            bytes: zero(),
            vanished: zero(),
            resized: zero(),
        }
    }
}

fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::AcqRel);
}

fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Acquire)
}

impl Repository {
    /// Archives `source`. Files that the parent has unchanged are not read; a missing parent is ignored.
    ///
    /// # Errors
    /// The first error of any entry, file or write. Nothing was saved then that a reader would take for a backup.
    pub fn snapshot(
        &self,
        source: &dyn Source,
        parent: Option<&SnapshotId>,
        progress: Arc<dyn Progress>,
    ) -> Result<Part, Error> {
        let (repository, trace) = self.indexed_for(&progress)?;
        // Asked for before the entries, because a source may look at files when its entries are requested.
        let began = source.listing_began();
        let run = Arc::new(Run::new(Arc::clone(&trace), progress));
        let listing =
            Listing { entries: Mutex::new(Some(source.entries())), began, run: Arc::clone(&run) };
        let options = BackupOptions::default().no_scan(true).parent_opts(parents(parent));
        let result =
            repository.archive(&options, &listing, SnapshotFile::default(), &[PathBuf::from("/")]);
        if let Some(error) = trace.take_error() {
            return Err(error);
        }
        let archived = result.map_err(|e| self.fail(Op::Write, e))?;
        let part = part(&archived, parent.copied(), &run)?;
        self.require_all(&part, &archived, &run)?;
        Ok(part)
    }

    fn indexed_for(
        &self,
        progress: &Arc<dyn Progress>,
    ) -> Result<(rustic_core::Repository<IndexedIdsStatus>, Arc<Trace>), Error> {
        retried(|| {
            let (backend, trace) = self.backend(Snapshots::Withhold, Some(Arc::clone(progress)));
            let opened = self.open_rustic(backend, Bars(Arc::clone(progress)))?;
            let indexed = opened.to_indexed_ids().map_err(|e| self.fail(Op::Read, e))?;
            Ok((indexed, trace))
        })
    }

    /// REPO3: everything that was listed was archived.
    fn require_all(&self, part: &Part, archived: &SnapshotFile, run: &Run) -> Result<(), Error> {
        let summary = archived.summary.as_ref();
        let found = summary.map_or((0, 0, 0), |s| {
            (s.total_files_processed, s.total_dirs_processed, s.total_bytes_processed)
        });
        // rustic counts the root.
        let expected = (part.files, part.directories + 1, part.bytes);
        if found == expected && get(&run.files) == part.files + part.files_vanished {
            return Ok(());
        }
        let detail = format!(
            "expected (files, directories, bytes) {expected:?}, archived {found:?}: something was omitted"
        );
        Err(Error::new(Kind::Io, Op::Write, self.place(), detail))
    }
}

fn parents(parent: Option<&SnapshotId>) -> ParentOptions {
    match parent {
        // The caller chose the parent, so its host and paths do not matter.
        Some(id) => ParentOptions::default()
            .parents(vec![id.to_string()])
            .group_by(SnapshotGroupCriterion::new()),
        None => ParentOptions::default().force(true),
    }
}

fn part(archived: &SnapshotFile, parent: Option<SnapshotId>, run: &Run) -> Result<Part, Error> {
    let vanished = get(&run.vanished);
    let summary = archived.summary.clone().unwrap_or_default();
    Ok(Part {
        tree: sum(&archived.tree.to_hex())?,
        parent: parent.filter(|_| archived.parent.is_some()),
        files: get(&run.files).saturating_sub(vanished),
        files_unchanged: summary.files_unmodified,
        directories: get(&run.directories),
        bytes: get(&run.bytes),
        added_bytes: summary.data_added_files,
        stored_bytes: summary.data_added_packed,
        files_vanished: vanished,
        files_resized: get(&run.resized),
    })
}

/// The source, as rustic sees it.
struct Listing {
    entries: Mutex<Option<SourceEntries>>,
    began: SystemTime,
    run: Arc<Run>,
}

impl ReadSource for Listing {
    type Open = Opener;
    type Iter = Walk;

    fn size(&self) -> RusticResult<Option<u64>> {
        Ok(None)
    }

    fn entries(&self) -> Walk {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner).take();
        Walk {
            entries: entries.unwrap_or_else(|| Box::new(std::iter::empty())),
            // Files modified later than this are young, including those with a time in the future.
            young_after: self.began.checked_sub(YOUNG).unwrap_or(UNIX_EPOCH),
            no_ctime: no_ctime(),
            previous: None,
            directory: PathBuf::new(),
            run: Arc::clone(&self.run),
        }
    }
}

/// A ctime that no file has and no other backup uses: some nanosecond in the 73 years before 1970.
fn no_ctime() -> Timestamp {
    let before = Duration::from_nanos(1 + (rand::random::<u64>() >> 3));
    let time = UNIX_EPOCH.checked_sub(before).and_then(|time| Timestamp::try_from(time).ok());
    time.unwrap_or(Timestamp::MIN)
}

/// Checks the listing on the way.
struct Walk {
    entries: SourceEntries,
    young_after: SystemTime,
    no_ctime: Timestamp,
    previous: Option<PathBuf>,
    /// The innermost open directory.
    directory: PathBuf,
    run: Arc<Run>,
}

impl Iterator for Walk {
    type Item = RusticResult<ReadSourceEntry<Opener>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.run.trace.failed() {
            return None;
        }
        match self.entries.next()?.and_then(|entry| self.admit(entry)) {
            Ok(entry) => Some(Ok(entry)),
            Err(error) => {
                self.run.trace.fail(error);
                None
            }
        }
    }
}

impl Walk {
    fn admit(&mut self, entry: SourceEntry) -> Result<ReadSourceEntry<Opener>, Error> {
        self.require_order(&entry.path)?;
        self.count_directories(&entry);
        let meta = self.metadata(&entry)?;
        let name = entry.path.file_name().unwrap_or_default();
        let (node_type, open) = match entry.kind {
            EntryKind::Dir => (NodeType::Dir, None),
            EntryKind::Symlink(target) => {
                add(&self.run.files, 1);
                (NodeType::from_link(&target), None)
            }
            EntryKind::File { size, open } => {
                add(&self.run.files, 1);
                add(&self.run.bytes, size);
                let done = Done(Arc::clone(&self.run));
                (NodeType::File, Some(Opener { path: entry.path.clone(), size, open, done }))
            }
        };
        let node = Node::new_node(name, node_type, meta);
        Ok(ReadSourceEntry { path: entry.path, node, open })
    }

    /// Trees must be sorted, and rustic closes a directory for good when the listing leaves it.
    fn require_order(&mut self, path: &Path) -> Result<(), Error> {
        let bad = |detail: String| Err(Error::new(Kind::Invalid, Op::List, path.display(), detail));
        let normal = |c| matches!(c, Component::Normal(_));
        if path.as_os_str().is_empty() || !path.components().all(normal) {
            return bad("expected a path below the root of the snapshot".to_owned());
        }
        if let Some(previous) = &self.previous
            && path <= previous.as_path()
        {
            return bad(format!("listed after {}: expected sorted names", previous.display()));
        }
        self.previous = Some(path.to_owned());
        Ok(())
    }

    /// Counts directories as rustic does, which creates those that were not listed.
    fn count_directories(&mut self, entry: &SourceEntry) {
        let is_dir = matches!(entry.kind, EntryKind::Dir);
        let inside = if is_dir { Some(entry.path.as_path()) } else { entry.path.parent() };
        let inside = inside.unwrap_or(Path::new(""));
        let common =
            self.directory.components().zip(inside.components()).take_while(|(a, b)| a == b);
        let new = inside.components().count() - common.count();
        add(&self.run.directories, new as u64);
        self.directory = inside.to_owned();
    }

    fn metadata(&self, entry: &SourceEntry) -> Result<Metadata, Error> {
        let time = |time| {
            Timestamp::try_from(time)
                .map_err(|e| Error::new(Kind::Invalid, Op::List, entry.path.display(), e))
        };
        let young = entry.mtime.max(entry.ctime) > self.young_after;
        let size = match entry.kind {
            EntryKind::File { size, .. } => size,
            _ => 0,
        };
        Ok(Metadata {
            mode: Some(entry.mode),
            mtime: Some(time(entry.mtime)?),
            ctime: Some(if young { self.no_ctime } else { time(entry.ctime)? }),
            uid: Some(entry.uid),
            gid: Some(entry.gid),
            size,
            ..Metadata::default()
        })
    }
}

/// Reports a file as done when the last reference to it is dropped.
struct Done(Arc<Run>);

impl Drop for Done {
    fn drop(&mut self) {
        self.0.progress.file_done();
    }
}

/// Opens a file when its turn comes.
struct Opener {
    path: PathBuf,
    size: u64,
    open: Open,
    done: Done,
}

impl ReadSourceOpen for Opener {
    type Reader = Exactly;

    fn open(self) -> RusticResult<Exactly> {
        let Self { path, size, open, done } = self;
        let run = Arc::clone(&done.0);
        if run.trace.failed() {
            return Err(stop());
        }
        match open() {
            Ok(file) => Ok(Exactly { file: Some(file), left: size, path, done }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                add(&run.vanished, 1);
                run.bytes.fetch_sub(size, Ordering::AcqRel);
                run.progress.bytes(size);
                Err(stop())
            }
            Err(error) => {
                run.trace.fail(Error::io(Op::Open, &path, error));
                Err(stop())
            }
        }
    }
}

/// The error for rustic, which logs it and omits the file.
fn stop() -> Box<RusticError> {
    RusticError::new(ErrorKind::InputOutput, "left out")
}

/// Returns exactly as many bytes as were listed.
struct Exactly {
    /// `None` once the file has ended early: zeros follow.
    file: Option<Box<dyn Read + Send>>,
    left: u64,
    path: PathBuf,
    done: Done,
}

impl Read for Exactly {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.done.0.trace.failed() {
            return Err(io::Error::other("stopped"));
        }
        let want = usize::try_from(self.left).unwrap_or(usize::MAX).min(buf.len());
        if want == 0 {
            return Ok(0);
        }
        let got = self.fill(&mut buf[..want])?;
        self.left -= got as u64;
        Ok(got)
    }
}

impl Exactly {
    fn fill(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let Some(file) = &mut self.file else {
            buf.fill(0);
            return Ok(buf.len());
        };
        match file.read(buf) {
            Ok(0) => {
                add(&self.done.0.resized, 1);
                self.file = None;
                buf.fill(0);
                Ok(buf.len())
            }
            Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                let copy = io::Error::new(error.kind(), error.to_string());
                self.done.0.trace.fail(Error::io(Op::Read, &self.path, copy));
                Err(error)
            }
            result => result,
        }
    }
}

/// Forwards rustic's byte count.
struct Bars(Arc<dyn Progress>);

impl std::fmt::Debug for Bars {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Bars")
    }
}

impl ProgressBars for Bars {
    fn progress(&self, kind: ProgressType, _prefix: &str) -> rustic_core::Progress {
        match kind {
            ProgressType::Bytes => rustic_core::Progress::new(Self(Arc::clone(&self.0))),
            _ => rustic_core::Progress::hidden(),
        }
    }
}

impl RusticProgress for Bars {
    fn is_hidden(&self) -> bool {
        false
    }
    fn set_length(&self, _len: u64) {}
    fn set_title(&self, _title: &str) {}
    fn inc(&self, inc: u64) {
        self.0.bytes(inc);
    }
    fn finish(&self) {}
}
