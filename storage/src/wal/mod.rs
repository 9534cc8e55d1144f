//! Tier 1: WAL on local disk.
//!
//! - WAL1  flushed <= written, and both only grow; only a flush makes a [`FlushedLsn`] (P1).
//! - WAL2  a sealed segment has its full size, its checksums, and never changes.
//! - WAL3  at most one writer per cluster and timeline; a second is refused, unless the first was fenced (P8).
//! - WAL6  if two PostgreSQLs write on two timelines at once, both are stored side by side, and neither is followed
//!   against a person's decision (`timelines.json`).
//! - WAL4  a file that holds acknowledged bytes is only ever replaced by a synced copy of them, or by the sealed file
//!   (P2).
//! - WAL5  a problem of one cluster does not affect the others (P8).
//!
//! All calls block; none needs memory in proportion to a segment's size.
//!
//! | below `<root>/<cluster>/` | what |
//! |---|---|
//! | `cluster.json` | what was pinned at first contact (`record.rs`) |
//! | `gaps.json` | WAL that is recorded as lost (`record.rs`) |
//! | `timelines.json` | timelines of which more than one is written (`timelines`) |
//! | `horizon.json` | WAL that was removed on purpose (`horizon.rs`) |
//! | `damaged-wal.json` | WAL that was acknowledged and is damaged here (`damage.rs`) |
//! | `wal_levels.json` | where WAL was written with `wal_level = minimal` (`levels.rs`) |
//! | `taken_over.json` | WAL that only tier 2 had when the stream went on behind it (`takeover.rs`) |
//! | `open.key.age` | the key of encrypted journals (`cipher.rs`) |
//! | `wal/<timeline>.history[.age]` | the history file as PostgreSQL wrote it |
//! | `wal/<timeline>/<segment>.open` | journal of a segment that is not sealed (`frame.rs`) |
//! | `wal/<timeline>/<segment>.open.damaged-<n>` | a journal that lost acknowledged WAL, kept as it was found (`damage.rs`) |
//! | `wal/<timeline>/<segment>….zst[.age].damaged-<n>` | a sealed file that rotted, kept as it was found (`rotten.rs`) |
//! | `wal/<timeline>/<segment>.zst[.age]` | sealed: standard zstd, exactly the segment (`seal.rs`) |
//! | `wal/<timeline>/<segment>.partial.zst[.age]` | the same for a segment that ended early |
//! | `wal/spare/` | files to recycle; emptied at start |
//! | `*.tmp` | unfinished; removed at start |

mod admit;
mod cipher;
mod cluster;
mod damage;
pub mod decode;
mod find;
mod frame;
mod horizon;
mod journal;
mod kept;
mod keys;
mod levels;
mod mend;
pub mod overlap;
mod reader;
mod record;
mod recover;
mod refill;
mod resume;
mod rotten;
mod scratch;
mod seal;
mod seam;
mod stored;
mod takeover;
mod timelines;
mod types;
mod unreadable;
mod unsealed;
mod writer;

#[cfg(test)]
mod tests;

pub use decode::SealedDecoder;
pub use find::{Encoding, Found, open_stored};
pub use kept::{DamagedWal, Horizon, LevelChange, Removed, TakenOver, join_levels};
pub use keys::{Locked, check_keys, locked};
pub use mend::Mend;
pub use reader::OpenSegment;
#[cfg(test)]
pub(crate) use record::store_pinned;
pub use refill::{Hole, Refill};
pub use seam::{Broken, Seam};
pub use types::{
    Gap, GapDeclaration, OpenError, OpenRefusal, OpenRequest, Pinned, Position, Sealed, StoredFile,
    WalOptions,
};
pub use writer::{FlushedLsn, Flusher, Preparation, Writer};

use crate::{
    Error, Kind, Op,
    crypt::{AtRest, payload_error},
    disk::{Disk, durable},
    layout::{ClusterName, Form, WalFile},
};
use cluster::{Cluster, Shared, Unsealed, lock};
use journal::{Frames, Journal};
use klio_pg::{Lsn, SegmentName, TimelineHistory, TimelineId};
use scratch::ScratchPool;
use std::{
    collections::BTreeMap,
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, RwLock},
};
use stored::{DiskReader, StoredAt};

/// The oldest supported PostgreSQL version.
const OLDEST_POSTGRES: u32 = 150_000;

/// The WAL of all clusters below one directory. Clones share the same state.
#[derive(Debug, Clone)]
pub struct WalStore(Arc<Store>);

#[derive(Debug)]
struct Store {
    shared: Arc<Shared>,
    clusters: RwLock<BTreeMap<ClusterName, Arc<Cluster>>>,
    /// Held while a cluster is created at first contact.
    creating: Mutex<()>,
}

fn not_found(op: Op, place: impl std::fmt::Display) -> Error {
    Error::new(Kind::NotFound, op, place, "expected a file, found none")
}

impl WalStore {
    /// Locks the directory, reads what is there and repairs what a crash left behind. A cluster that cannot be read
    /// does not stop the others: see [`WalStore::problems`].
    ///
    /// # Errors
    /// `Conflict` when another process uses the directory; otherwise I/O errors of the directory itself.
    pub fn open(disk: Arc<dyn Disk>, root: PathBuf, options: WalOptions) -> Result<Self, Error> {
        durable::create_dir(disk.as_ref(), &root)?;
        let lock_path = root.join("LOCK");
        let guard = disk.lock(&lock_path).map_err(|e| match e.kind() {
            io::ErrorKind::WouldBlock => {
                let detail =
                    "expected to be the only server in this directory, found another that holds its lock";
                Error::new(Kind::Conflict, Op::Open, root.display(), detail)
            }
            _ => Error::io(Op::Open, &lock_path, e),
        })?;
        let entries = disk.list(&root).map_err(|e| Error::io(Op::List, &root, e))?;
        let pool = ScratchPool::new(options.contexts);
        let shared = Arc::new(Shared { disk, root, options, pool, _lock: guard });
        let mut clusters = BTreeMap::new();
        for entry in entries.into_iter().filter(|entry| entry.is_dir) {
            let Ok(name) = ClusterName::parse_generation(&entry.name) else { continue };
            let cluster = Arc::new(Cluster::new(name.clone(), shared.clone()));
            let recovered = cluster.load().and_then(|()| cluster.prove_all());
            if let Err(error) = recovered {
                tracing::error!(cluster = %name, %error, "cannot open the cluster's WAL for writing");
            }
            clusters.insert(name, cluster);
        }
        let clusters = RwLock::new(clusters);
        Ok(Self(Arc::new(Store { shared, clusters, creating: Mutex::new(()) })))
    }

    fn disk(&self) -> &dyn Disk {
        self.0.shared.disk.as_ref()
    }

    fn find(&self, name: &ClusterName) -> Option<Arc<Cluster>> {
        self.0.clusters.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    fn need(&self, name: &ClusterName, op: Op) -> Result<Arc<Cluster>, Error> {
        self.find(name).ok_or_else(|| {
            let detail = "expected a pinned cluster, found none of that name";
            Error::new(Kind::NotFound, op, name, detail)
        })
    }

    /// The encryption of files at rest.
    pub fn at_rest(&self) -> &AtRest {
        &self.0.shared.options.at_rest
    }

    pub fn root(&self) -> &Path {
        &self.0.shared.root
    }

    /// All clusters, readable or not.
    pub fn clusters(&self) -> Vec<ClusterName> {
        self.0.clusters.read().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
    }

    /// The identity that was pinned at first contact.
    pub fn pinned(&self, name: &ClusterName) -> Option<Pinned> {
        lock(&self.find(name)?.state).pinned
    }

    /// Free and total bytes of the file system.
    ///
    /// # Errors
    /// An I/O error of the disk.
    pub fn free_space(&self) -> Result<(u64, u64), Error> {
        self.disk().space(self.root()).map_err(|e| Error::io(Op::Read, self.root(), e))
    }

    /// The current problems of a cluster's files, one sentence each.
    pub fn problems(&self, name: &ClusterName) -> Vec<String> {
        let Some(cluster) = self.find(name) else { return Vec::new() };
        let state = lock(&cluster.state);
        let broken = state.broken.iter().map(|(_, text)| text.clone());
        let sentence = |d: &DamagedWal| d.sentence(state.who_brings(d));
        let damaged = state.damaged.iter().filter(|d| d.is_loss()).map(sentence);
        broken.chain(state.problems.values().cloned()).chain(damaged).collect()
    }

    /// WAL that was acknowledged, is damaged on this disk, and has not been received again yet.
    pub fn damaged(&self, name: &ClusterName) -> Vec<DamagedWal> {
        let Some(cluster) = self.find(name) else { return Vec::new() };
        let state = lock(&cluster.state);
        state.damaged.iter().filter(|d| d.is_loss()).cloned().collect()
    }

    /// The number of journals that lost acknowledged WAL: those of [`WalStore::damaged`], and those that end early
    /// although more WAL follows.
    pub fn damaged_journals(&self, name: &ClusterName) -> u64 {
        let Some(cluster) = self.find(name) else { return 0 };
        let state = lock(&cluster.state);
        let journals = state.lines.values().flat_map(|line| line.journals.values());
        // For a sealed file the entry in `damaged` counts.
        let cut = journals
            .filter(|journal| !journal.is_missing())
            .filter(|journal| state.has_lost_bytes(journal) || state.is_hole(journal));
        let cut = cut.count();
        (cut + state.damaged.iter().filter(|d| d.is_loss()).count()) as u64
    }

    /// Pins a name to a PostgreSQL at first contact, durably; later calls check that it is the same one (P8). A new
    /// version of the same system replaces the recorded one.
    ///
    /// # Errors
    /// `Conflict` for another system or segment size, `Invalid` before PostgreSQL 15.
    pub fn pin(&self, name: &ClusterName, pinned: Pinned) -> Result<(), Error> {
        if pinned.postgres_version < OLDEST_POSTGRES {
            let found = pinned.postgres_version;
            let detail =
                format!("expected PostgreSQL version {OLDEST_POSTGRES} or newer, found {found}");
            return Err(Error::new(Kind::Invalid, Op::Create, name, detail));
        }
        let cluster = self.find_or_create(name)?;
        let _one = lock(&cluster.op);
        cluster.ensure_loaded()?;
        let before = lock(&cluster.state).pinned;
        match before {
            Some(before) if before == pinned => return Ok(()),
            Some(before) => check_same(name, &before, &pinned)?,
            None => {}
        }
        let path = cluster.directory().join("cluster.json");
        record::store_pinned(self.disk(), &path, &pinned)?;
        lock(&cluster.state).pinned = Some(pinned);
        Ok(())
    }

    /// Knows a cluster that only records are stored of: the bucket has its WAL, or another history is its current one.
    ///
    /// # Errors
    /// An I/O error of the disk.
    pub fn add(&self, name: &ClusterName) -> Result<(), Error> {
        self.find_or_create(name).map(drop)
    }

    fn find_or_create(&self, name: &ClusterName) -> Result<Arc<Cluster>, Error> {
        let _one = lock(&self.0.creating);
        if let Some(cluster) = self.find(name) {
            return Ok(cluster);
        }
        let cluster = Arc::new(Cluster::new(name.clone(), self.0.shared.clone()));
        durable::create_dir(self.disk(), &cluster.directory())?;
        let mut clusters = self.0.clusters.write().unwrap_or_else(PoisonError::into_inner);
        clusters.insert(name.clone(), cluster.clone());
        Ok(cluster)
    }

    /// The position of each timeline with WAL, oldest first.
    pub fn positions(&self, name: &ClusterName) -> Vec<Position> {
        self.find(name).map(|cluster| lock(&cluster.state).positions()).unwrap_or_default()
    }

    /// The durable bytes that are not in a sealed file yet: for each journal its timeline, its first byte and one past
    /// its last. Between two journals there may be a recorded gap.
    pub fn open_runs(&self, name: &ClusterName) -> Vec<(TimelineId, Lsn, Lsn)> {
        self.find(name).map(|cluster| lock(&cluster.state).open_runs()).unwrap_or_default()
    }

    /// The recorded gaps, in the order in which they were declared.
    pub fn gaps(&self, name: &ClusterName) -> Vec<Gap> {
        self.find(name).map(|cluster| lock(&cluster.state).gaps.clone()).unwrap_or_default()
    }

    /// Stores a timeline's history file, durably. Repeating it with the same content succeeds.
    ///
    /// # Errors
    /// `Invalid` when PostgreSQL would refuse the file, `Conflict` when another one is stored.
    pub fn put_history(
        &self,
        name: &ClusterName,
        timeline: TimelineId,
        content: &[u8],
    ) -> Result<(), Error> {
        let cluster = self.need(name, Op::Create)?;
        let path = cluster.path_of(WalFile::History(timeline));
        let invalid =
            |detail: String| Error::new(Kind::Invalid, Op::Create, path.display(), detail);
        if timeline.get() == 1 || content.len() as u64 > recover::HISTORY_LIMIT_BYTES {
            return Err(invalid(
                "expected the history of a timeline from 2 up, at most 1 MiB".into(),
            ));
        }
        let history =
            TimelineHistory::parse(timeline, content).map_err(|e| invalid(e.to_string()))?;
        if history.entries().is_empty() {
            return Err(invalid("expected at least one ancestor, found none".into()));
        }
        let _one = lock(&cluster.op);
        cluster.ensure_loaded()?;
        cluster.pinned()?;
        let there = match cluster.stored(WalFile::History(timeline))? {
            Some(StoredAt { path, form, .. }) => {
                Some(cluster.read_plain(&path, form, recover::HISTORY_LIMIT_BYTES)?)
            }
            None => None,
        };
        if there.as_ref().is_some_and(|there| there != content) {
            let detail = "expected the content that is stored, found another";
            return Err(Error::new(Kind::Conflict, Op::Create, path.display(), detail)
                .hint("two servers were promoted to the same timeline"));
        }
        let known = {
            let state = lock(&cluster.state);
            let line = state.lines.get(&timeline);
            state.records_proven && line.is_some_and(|line| line.history.is_some())
        };
        // The file can be visible without being durable: an earlier call may have failed at the last step.
        if there.is_some() && known {
            return Ok(());
        }
        durable::create_dir(self.disk(), &cluster.wal_directory())?;
        cluster.write_stored(WalFile::History(timeline), |sink, tmp| {
            sink.write_all(content).map_err(|e| Error::io(Op::Write, tmp, e))
        })?;
        lock(&cluster.state).lines.entry(timeline).or_default().history = Some(history);
        Ok(())
    }

    /// A timeline's ancestors; empty for timeline 1.
    ///
    /// # Errors
    /// `NotFound` when its history file is not stored.
    pub fn history(
        &self,
        name: &ClusterName,
        timeline: TimelineId,
    ) -> Result<TimelineHistory, Error> {
        let cluster = self.need(name, Op::Read)?;
        let path = cluster.path_of(WalFile::History(timeline));
        let state = lock(&cluster.state);
        state.history(timeline).ok_or_else(|| not_found(Op::Read, path.display()))
    }

    /// Ends the writers of a cluster: waits for their current writes and syncs, after which every call of these writers
    /// fails. True when there was one.
    pub fn fence(&self, name: &ClusterName) -> bool {
        let Some(cluster) = self.find(name) else { return false };
        let slots: Vec<_> = lock(&cluster.state).writers.values().cloned().collect();
        slots.iter().for_each(|slot| slot.release(&cluster));
        !slots.is_empty()
    }

    /// Whether a writer could be opened, as far as that can be decided before an existing one is ended: no writer is
    /// ended for one that would be refused. `lives_on` is the timeline of the client's PostgreSQL, which may be a
    /// descendant; `taken` is the WAL that would be taken over first. Whether an older timeline is stale is left to the
    /// caller, which asks its PostgreSQL. Writes nothing.
    ///
    /// # Errors
    /// As [`WalStore::open_writer`], without `WriterPresent` and `Stale`.
    pub fn check_writer(
        &self,
        name: &ClusterName,
        request: &OpenRequest,
        lives_on: TimelineId,
        taken: &[TakenOver],
    ) -> Result<(), OpenError> {
        let refuse = |refusal| OpenError::Refused { cluster: name.to_string(), refusal };
        let cluster = self.find(name).ok_or_else(|| refuse(OpenRefusal::NotPinned))?;
        let _one = lock(&cluster.op);
        cluster.ensure_loaded()?;
        let state = lock(&cluster.state);
        match admit::may_stream(&state.marks, state.followed(), lives_on) {
            // A stale PostgreSQL can still prove that it writes.
            Ok(()) | Err(OpenRefusal::Stale { .. }) => {}
            Err(refusal) => return Err(refuse(refusal)),
        }
        placed(&state, request, taken).map(drop).map_err(refuse)
    }

    /// Opens the writer of a timeline. The rules are those of [`OpenRefusal`]; a gap is recorded before anything else
    /// is done.
    ///
    /// # Errors
    /// `Refused` with the cause; or `Failed`, of which `Full` and `Io` may be temporary: try again.
    pub fn open_writer(
        &self,
        name: &ClusterName,
        request: &OpenRequest,
    ) -> Result<Writer, OpenError> {
        self.open_writer_of(name, request, request.timeline)
    }

    /// The same for a PostgreSQL that is on another timeline than the ancestor which it has to stream first.
    ///
    /// # Errors
    /// As [`WalStore::open_writer`].
    pub fn open_writer_of(
        &self,
        name: &ClusterName,
        request: &OpenRequest,
        lives_on: TimelineId,
    ) -> Result<Writer, OpenError> {
        let refuse = |refusal| OpenError::Refused { cluster: name.to_string(), refusal };
        let cluster = self.find(name).ok_or_else(|| refuse(OpenRefusal::NotPinned))?;
        let _one = lock(&cluster.op);
        cluster.ensure_loaded()?;
        if lock(&cluster.state).writers.contains_key(&request.timeline) {
            return Err(refuse(OpenRefusal::WriterPresent { timeline: request.timeline }));
        }
        cluster.prove_all()?;
        cluster.prove_records()?;
        let (pinned, history, admission) = cluster.admit(request, lives_on).map_err(refuse)?;
        cluster.keep_judgement()?;
        let _opening = Opening::begin(&cluster, request.timeline);
        if let Some(gap) = admission {
            cluster.record_gap(gap)?;
        }
        let (journal, entry) = cluster.journal_at(request.timeline, request.start, &pinned)?;
        Ok(Writer::start(cluster.clone(), journal, entry, pinned, history))
    }

    /// Sets whether the cluster is over, so that no more WAL is expected. Its last segments are then finished as they
    /// are; WAL that still arrives continues behind them.
    pub fn set_over(&self, name: &ClusterName, over: bool) {
        if let Some(cluster) = self.find(name) {
            lock(&cluster.state).over = over;
        }
    }

    /// The journals that are finished but not sealed: full segments, and partial ones of ended timelines or before
    /// gaps.
    pub fn unsealed(&self, name: &ClusterName) -> Vec<WalFile> {
        self.find(name).map(|cluster| lock(&cluster.state).finished()).unwrap_or_default()
    }

    /// Unix time since which the oldest finished journal has been waiting to be sealed; `None` when none is waiting.
    pub fn unsealed_since(&self, name: &ClusterName) -> Option<f64> {
        let waiting = {
            let cluster = self.find(name)?;
            let state = lock(&cluster.state);
            let size = state.pinned?.segment_size;
            let finished = state.finished();
            let held = state.lines.values().flat_map(|line| line.journals.values());
            let waits = |journal: &&Arc<Unsealed>| {
                let segment = journal.segment(size);
                finished.contains(&WalFile::Segment(segment))
                    || finished.contains(&WalFile::Partial(segment))
            };
            held.filter(waits).map(|journal| journal.path.clone()).collect::<Vec<_>>()
        };
        self.times(&waiting).min_by(f64::total_cmp)
    }

    fn times(&self, files: &[PathBuf]) -> impl Iterator<Item = f64> {
        files.iter().filter_map(|path| self.disk().stat(path).ok()).map(|stat| stat.modified_unix)
    }

    /// Turns a finished journal into its sealed file, durably, and releases the journal. Repeating it for a sealed file
    /// gives the same answer. It takes as long as reading and hashing the file: run it off the receiving path.
    ///
    /// # Errors
    /// `Invalid` when the journal is not finished, `NotFound` when there is none, `Full` (try again), `Corrupt`.
    pub fn seal(&self, name: &ClusterName, file: WalFile) -> Result<Sealed, Error> {
        self.need(name, Op::Seal)?.seal(file)
    }

    /// The finished files on disk: sealed and partial segments, history files.
    ///
    /// # Errors
    /// An I/O error of the disk.
    pub fn list(&self, name: &ClusterName) -> Result<Vec<StoredFile>, Error> {
        let cluster = self.need(name, Op::List)?;
        let wal = cluster.wal_directory();
        let mut found = Vec::new();
        for entry in self.names(&wal)? {
            if !entry.is_dir {
                self.add_stored(&cluster, &entry.name, &mut found)?;
            } else if entry.name.parse::<TimelineId>().is_ok() {
                for file in self.names(&wal.join(&entry.name))? {
                    self.add_stored(
                        &cluster,
                        &format!("{}/{}", entry.name, file.name),
                        &mut found,
                    )?;
                }
            }
        }
        // A file can exist in both forms for a moment; the configured form wins.
        let form = cluster.form();
        found.sort_by_key(|stored| (stored.file, stored.form != form));
        found.dedup_by_key(|stored| stored.file);
        Ok(found)
    }

    fn names(&self, directory: &Path) -> Result<Vec<crate::disk::Entry>, Error> {
        match self.disk().list(directory) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            other => other.map_err(|e| Error::io(Op::List, directory, e)),
        }
    }

    fn add_stored(
        &self,
        cluster: &Cluster,
        relative: &str,
        found: &mut Vec<StoredFile>,
    ) -> Result<(), Error> {
        let Some((file, form)) = WalFile::parse_stored(relative) else { return Ok(()) };
        let path = cluster.path_in(file, form);
        match self.disk().stat(&path) {
            Ok(stat) => {
                let (size, modified_unix) = (stat.size, stat.modified_unix);
                found.push(StoredFile { file, form, size, modified_unix });
                Ok(())
            }
            // The file was removed between the two calls.
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(Error::io(Op::List, &path, e)),
        }
    }

    /// Finds where a WAL file can be read. For an incomplete segment the answer is the existing part.
    ///
    /// # Errors
    /// `NotFound` only when there is definitely no such file (P7); `Corrupt` when that cannot be decided.
    pub fn read(&self, name: &ClusterName, file: WalFile) -> Result<Found, Error> {
        let cluster = self.need(name, Op::Read)?;
        let (held, lost) = {
            let state = lock(&cluster.state);
            (state.has_held(file), state.has_lost(file))
        };
        // A segment can be sealed between looking up its journal and opening it; the next attempt then finds the sealed
        // file.
        for _ in 0..3 {
            if let Some(found) = self.read_once(&cluster, file)? {
                return Ok(found);
            }
        }
        match &lock(&cluster.state).broken {
            // The file was durable and no gap is recorded: it is lost, not absent.
            None if held || lost => {
                let detail = "expected a WAL file that was received, found none";
                Err(Error::new(Kind::Corrupt, Op::Read, cluster.path_of(file).display(), detail))
            }
            None => Err(not_found(Op::Read, cluster.path_of(file).display())),
            Some((kind, text)) => {
                let kind = if *kind == Kind::NotFound { Kind::Corrupt } else { *kind };
                Err(Error::new(kind, Op::Read, file, format!("the cluster cannot be read: {text}")))
            }
        }
    }

    fn read_once(&self, cluster: &Cluster, file: WalFile) -> Result<Option<Found>, Error> {
        let (entry, size) = {
            let state = lock(&cluster.state);
            let entry = match file {
                WalFile::Segment(segment) => state.journal(segment),
                WalFile::Partial(segment) => state.journal(segment).filter(|j| !j.is_full()),
                WalFile::History(_) => None,
            };
            // Unless a person has put a good copy in the place of a rotten file.
            let lost = |entry: &&Arc<Unsealed>| !entry.is_missing() && state.has_lost_bytes(entry);
            if let Some(entry) = entry.as_ref().filter(lost) {
                // If it were returned as a partial segment, it would look like the end of WAL (P7).
                let detail = format!(
                    "expected WAL up to {}, found it intact up to {}",
                    entry.end,
                    entry.durable()
                );
                return Err(Error::new(Kind::Corrupt, Op::Read, entry.path.display(), detail));
            }
            (entry.filter(|j| !j.is_empty()), state.pinned.map(|p| p.segment_size.bytes()))
        };
        if let Some(entry) = entry {
            match OpenSegment::open(self.disk(), entry, &cluster.keys()) {
                Ok(open) => return Ok(Some(Found::Open(Box::new(open)))),
                Err(e) if e.kind == Kind::NotFound => {}
                Err(e) => return Err(e),
            }
        }
        let candidates: &[WalFile] = match file {
            WalFile::Segment(segment) => &[file, WalFile::Partial(segment)],
            _ => &[file],
        };
        for candidate in candidates {
            let Some(stored) = cluster.stored(*candidate)? else { continue };
            let keys = match stored.form {
                Form::Plain => None,
                Form::Age => {
                    Some(cluster.shared.options.at_rest.need(stored.path.display())?.clone())
                }
            };
            let limit = size.unwrap_or(1 << 30);
            let (plain_size, encoding) = match candidate {
                WalFile::History(_) => {
                    let limit = recover::HISTORY_LIMIT_BYTES;
                    let content = cluster.read_plain(&stored.path, stored.form, limit)?;
                    (content.len() as u64, Encoding::Plain)
                }
                WalFile::Segment(_) if size.is_some() => (limit, Encoding::Zstd),
                _ => (cluster.plain_size_of(&stored, limit)?, Encoding::Zstd),
            };
            let (file, path, size) = (*candidate, stored.path, stored.stat.size);
            return Ok(Some(Found::Stored { file, path, size, plain_size, encoding, keys }));
        }
        Ok(None)
    }

    /// The decoded content of a file that [`WalStore::read`] found, all at once: for history files, tests and small
    /// tools.
    ///
    /// # Errors
    /// `Corrupt` when it cannot be decoded, or I/O errors.
    pub fn plain_bytes(&self, found: Found) -> Result<Vec<u8>, Error> {
        let mut plain = Vec::new();
        self.plain_pieces(found, &mut |piece| {
            plain.extend_from_slice(piece);
            Ok(())
        })?;
        Ok(plain)
    }

    /// The same, piece by piece.
    ///
    /// # Errors
    /// As [`WalStore::plain_bytes`], or an error of `put`.
    pub fn plain_pieces(
        &self,
        found: Found,
        put: &mut dyn FnMut(&[u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        match found {
            Found::Open(mut open) => {
                while let Some(chunk) = open.next_chunk()? {
                    put(chunk)?;
                }
            }
            Found::Stored { path, plain_size, encoding, keys, .. } => {
                let failed = |e| Error::io(Op::Read, &path, e);
                let file = self.disk().open(&path, false).map_err(failed)?;
                let reader = DiskReader { file, at: 0 };
                let mut reader: Box<dyn io::Read> = match &keys {
                    None => Box::new(reader),
                    Some(keys) => Box::new(keys.decrypt(reader).map_err(|e| e.at(path.display()))?),
                };
                if encoding == Encoding::Plain {
                    let mut plain = Vec::new();
                    let read = reader.read_to_end(&mut plain);
                    read.map_err(|e| payload_error(path.display(), &e))?;
                    return put(&plain);
                }
                let count = decode::decode_reader(&mut reader, plain_size, put)
                    .map_err(|e| e.at(path.display()))?;
                if count != plain_size {
                    let detail = format!("expected {plain_size} bytes, found {count}");
                    return Err(Error::new(Kind::Corrupt, Op::Decode, path.display(), detail));
                }
            }
        }
        Ok(())
    }
}

fn check_same(name: &ClusterName, before: &Pinned, found: &Pinned) -> Result<(), Error> {
    let differs = |what: &str, expected: String, found: String| {
        let detail = format!("expected {what} {expected}, found {found}");
        Err(Error::new(Kind::Conflict, Op::Open, name, detail)
            .hint("this is another PostgreSQL: give it a cluster name of its own"))
    };
    let (id, size) = (|p: &Pinned| p.system_identifier.to_string(), |p: &Pinned| p.segment_size);
    if before.system_identifier != found.system_identifier {
        return differs("system identifier", id(before), id(found));
    }
    if before.segment_size != found.segment_size {
        let bytes = |p: &Pinned| size(p).bytes().to_string();
        return differs("WAL segment size", bytes(before), bytes(found));
    }
    Ok(())
}

/// What a writer begins with if it may begin there, once `taken` is recorded.
fn placed(
    state: &cluster::State,
    request: &OpenRequest,
    taken: &[TakenOver],
) -> Result<(Pinned, TimelineHistory, admit::Admission), OpenRefusal> {
    let pinned = state.pinned.ok_or(OpenRefusal::NotPinned)?;
    let history = state.history(request.timeline);
    let (size, mut held) = (pinned.segment_size, state.held());
    admit::take_over(&mut held, taken);
    let admission = admit::admit(size, &held, &state.gaps, history.as_ref(), request)?;
    let history = history.ok_or(OpenRefusal::NoHistory(request.timeline))?;
    Ok((pinned, history, admission))
}

impl Cluster {
    /// What a writer begins with. The client's slot is taken into account for the start position, and forgotten if the
    /// client is refused.
    fn admit(
        &self,
        request: &OpenRequest,
        lives_on: TimelineId,
    ) -> Result<(Pinned, TimelineHistory, admit::Admission), OpenRefusal> {
        let mut state = lock(&self.state);
        admit::may_stream(&state.marks, state.followed(), lives_on)?;
        let before = state.damaged.clone();
        let pinned = state.pinned.ok_or(OpenRefusal::NotPinned)?;
        state.judge(request, pinned.segment_size);
        let admitted = placed(&state, request, &[]);
        if admitted.is_err() {
            state.damaged = before;
        }
        admitted
    }
}

impl cluster::State {
    pub(super) fn history(&self, timeline: TimelineId) -> Option<TimelineHistory> {
        let stored = self.lines.get(&timeline).and_then(|line| line.history.clone());
        let root = (timeline.get() == 1).then(|| TimelineHistory::root(timeline));
        stored.or(root)
    }
}

/// Keeps a timeline from being treated as ended while its writer is opened.
struct Opening<'a>(&'a Cluster);

impl<'a> Opening<'a> {
    /// Call it with `op` held, and hold `op` until this value is dropped.
    fn begin(cluster: &'a Cluster, timeline: TimelineId) -> Self {
        lock(&cluster.state).opening = Some(timeline);
        Self(cluster)
    }
}

impl Drop for Opening<'_> {
    fn drop(&mut self) {
        lock(&self.0.state).opening = None;
    }
}

impl Cluster {
    /// The journal that contains the byte at `start`, opened for appending, or newly created.
    fn journal_at(
        &self,
        timeline: TimelineId,
        start: Lsn,
        pinned: &Pinned,
    ) -> Result<(Journal, Arc<Unsealed>), Error> {
        let segment = SegmentName::containing(timeline, start, pinned.segment_size);
        self.remove_unused(segment, pinned)?;
        // Not in the condition of the `if let`: that would keep the state locked while the journal is reopened.
        let open = lock(&self.state).journal(segment);
        if let Some(entry) = open {
            // The journal may just be being sealed because its timeline had ended; the stream then continues behind the
            // sealed part.
            let _one = lock(&entry.work);
            if lock(&self.state).holds(&entry) {
                return Ok((self.reopen(&entry, start)?, Arc::clone(&entry)));
            }
        }
        if start.offset_in(pinned.segment_size) != 0 {
            if let Some(resumed) = self.resume_partial(segment, start, pinned)? {
                return Ok(resumed);
            }
            let detail = format!(
                "expected the journal of a segment received up to {start}, found it sealed"
            );
            return Err(Error::new(Kind::Conflict, Op::Open, segment, detail));
        }
        durable::create_dir(self.disk(), &self.wal_directory())?;
        durable::create_dir(self.disk(), &self.wal_directory().join(timeline.to_string()))?;
        self.next_journal(timeline, start)
    }

    /// Removes journals that never got a byte and at whose position the stream no longer continues.
    fn remove_unused(&self, wanted: SegmentName, pinned: &Pinned) -> Result<(), Error> {
        let unused: Vec<Arc<Unsealed>> = {
            let state = lock(&self.state);
            let all = state.lines.values().flat_map(|line| line.journals.values());
            // The empty journal of another timeline's active writer is in use.
            let free = |j: &&Arc<Unsealed>| !state.writers.contains_key(&j.timeline);
            let unused =
                |j: &&Arc<Unsealed>| j.is_empty() && j.segment(pinned.segment_size) != wanted;
            let lost = |j: &&Arc<Unsealed>| j.harm().is_some() || state.has_lost_bytes(j);
            all.filter(free).filter(unused).filter(|j| !lost(j)).cloned().collect()
        };
        for entry in unused {
            durable::remove_if_there(self.disk(), &entry.path)?;
            lock(&self.state).forget(&entry);
        }
        Ok(())
    }

    fn reopen(&self, entry: &Unsealed, start: Lsn) -> Result<Journal, Error> {
        let path = &entry.path;
        let file = self.disk().open(path, true).map_err(|e| Error::io(Op::Open, path, e))?;
        let allocated = file.size().map_err(|e| Error::io(Op::Open, path, e))?;
        let keys = self.keys();
        let mut frames = Frames::of(file.clone(), path, &keys)?;
        frames.skip_to(start)?;
        if frames.position() != start {
            return Err(frames.lost(start));
        }
        frames.skip_closing()?;
        if frames.offset() != entry.used() {
            // The bytes behind the WAL are not those that were written. No offset is written twice under one key, so
            // copy the journal.
            let (keys, next_id) = (self.writing_keys()?, &*self.shared.options.next_id);
            let copy = journal::copy_up_to(self.disk(), path, start, &keys, next_id)?;
            entry.set_used(copy.offset);
            return Ok(copy);
        }
        let (header, cipher, offset) = (*frames.header(), frames.cipher(), frames.offset());
        Ok(Journal { file, path: path.clone(), header, cipher, offset, allocated })
    }
}
