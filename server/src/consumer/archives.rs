//! The archive state of every cluster. It is updated by uploads, seals and comparisons, and read by gauges and `klio
//! status`.
//!
//! ARCHIVE1  an upload is recorded in `archive.json`, durably, before its job is acknowledged.
//! ARCHIVE2  an upload recorded while a comparison lists the bucket is not lost when the comparison's result is
//!     stored.
//! ARCHIVE3  reading the state never waits for a disk or a network.

use super::{ArchiveState, StoredFile, Tier1Files, now_unix};
use crate::queue::{Job, Listener};
use klio_storage::{
    Error, Kind, Op,
    catalog::{Archive, BackupRecord, Frontier, Totals, archive_file},
    layout::{ClusterName, WalFile},
    tier2::{Moved, Outcome, Progress, StoredObject, Uploaded},
    wal::Position,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use tokio::sync::Notify;

/// The most problems listed for one cluster; more would not help anybody.
const PROBLEMS_SHOWN: usize = 10;

/// Problems are stored by file name. The queue's own problem is stored under this key, which no file has as its name.
const QUEUE: &str = "queue";
/// If files wait and nothing was archived for this long, that is reported as a problem.
const STALLED_SECONDS: f64 = 45.0;
/// How long an upload may hold that report back without moving a byte: over a slow link, what the connection has taken
/// needs time to arrive.
const STANDS_AFTER: Duration = Duration::from_secs(600);
/// If nothing was archived for this long although bytes of an upload move, that is reported as slow.
const SLOW_AFTER: Duration = Duration::from_secs(600);

/// A cheap handle on the state of all clusters.
#[derive(Clone)]
pub struct Archives {
    files: Arc<dyn Tier1Files>,
    clusters: Arc<Mutex<BTreeMap<ClusterName, Arc<Cluster>>>>,
    appeared: Arc<Notify>,
}

#[derive(Default)]
struct Cluster {
    state: Mutex<State>,
    /// Locked while writing. Holds the version on disk, so that uploads that end together share one write.
    written: tokio::sync::Mutex<u64>,
}

#[derive(Default)]
struct State {
    /// `None` while the segment size is unknown.
    archive: Option<Archive>,
    /// Counts changes of `archive`.
    version: u64,
    /// Finished files that are not known to be in tier 2, and since when they wait, in Unix seconds.
    pending: BTreeMap<WalFile, u64>,
    /// Problems by file; the empty name stands for the cluster as a whole.
    problems: BTreeMap<String, String>,
    /// Files proven since the running comparison began (ARCHIVE2).
    since: Option<BTreeSet<WalFile>>,
    /// When a file was last archived, or when the first one began to wait.
    progress: Option<Instant>,
    /// The uploads under way.
    moving: Vec<(WalFile, Progress)>,
}

/// An upload that is under way; dropping it ends it.
pub(super) struct Moving {
    cluster: Arc<Cluster>,
    pub(super) progress: Progress,
}

impl Drop for Moving {
    fn drop(&mut self) {
        lock(&self.cluster.state).moving.retain(|(_, upload)| !upload.is(&self.progress));
    }
}

/// The result of a comparison.
pub(super) struct Compared {
    /// Finished files that tier 2 does not have.
    pub(super) missing: Vec<StoredFile>,
}

impl Archives {
    /// Creates the state for this tier 1. Reads one small file for each cluster, so that what earlier runs archived is
    /// known from the start; blocking. Which files wait is known once a cluster is loaded.
    pub fn new(files: Arc<dyn Tier1Files>) -> Self {
        let this = Self { files, clusters: Arc::default(), appeared: Arc::default() };
        for name in this.files.clusters().unwrap_or_default() {
            lock(&this.cluster(&name).state).archive = this.known(&name);
        }
        this
    }

    /// The recorded archive of an earlier run, if it has the same segment size. Blocking.
    fn known(&self, name: &ClusterName) -> Option<Archive> {
        let size = self.files.segment_size(name);
        let known = archive_file::read(&self.files.archive_path(name)).unwrap_or_else(|error| {
            tracing::warn!(cluster = %name, %error, "cannot read archive.json; rebuilding it by comparing both tiers");
            None
        });
        known.filter(|archive| Some(archive.segment_size()) == size)
    }

    /// A listener that is called for each finished file.
    pub fn listener(&self) -> Listener {
        let this = self.clone();
        Arc::new(move |job| this.sealed(job))
    }

    /// Resolves when a cluster seals its first file, so that archiving begins at once. Cancel-safe.
    pub(super) async fn appeared(&self) {
        self.appeared.notified().await;
    }

    /// The archive state of a cluster: what is in tier 2, and what failed last.
    pub fn state(&self, name: &ClusterName) -> ArchiveState {
        let (gaps, positions) = (self.files.gaps(name), self.files.positions(name));
        let cluster = self.cluster(name);
        let mut state = lock(&cluster.state);
        let now = Instant::now();
        let (stalled_seconds, slow) = (state.stalled_seconds(now), state.slow(now));
        let state = &*state;
        let archive = state.archive.as_ref();
        let frontiers = archive.map(|archive| archive.frontiers(&gaps)).unwrap_or_default();
        // Undecided and retired timelines are archived like the rest, but do not count for the cluster's position.
        let counts = |timeline| !self.files.is_aside(name, timeline);
        let shown: Vec<_> = frontiers.iter().filter(|f| counts(f.timeline)).copied().collect();
        let held: Vec<_> = positions.into_iter().filter(|p| counts(p.timeline)).collect();
        let newest = archive.and_then(|archive| state.newest(archive, &shown, &held));
        let mut problems: Vec<String> =
            state.problems.values().take(PROBLEMS_SHOWN).cloned().collect();
        if state.problems.len() > PROBLEMS_SHOWN {
            problems.push(format!("and {} more", state.problems.len() - PROBLEMS_SHOWN));
        }
        problems.extend(slow);
        if stalled_seconds > STALLED_SECONDS && problems.is_empty() {
            let waiting = state.pending.len();
            problems.push(format!(
                "archiving has stopped: nothing was archived for {stalled_seconds:.0} s while {waiting} files wait"
            ));
        }
        ArchiveState {
            stalled_seconds,
            archived_lsn: newest.map(|f| f.archived).unwrap_or_default(),
            timeline: newest.map(|f| f.timeline),
            latest_archived_unix: archive.and_then(Archive::latest_archived_unix).map(|t| t as f64),
            oldest_unarchived_unix: state.pending.values().min().map(|t| *t as f64),
            unarchived_files: state.pending.len() as u64,
            totals: archive.map_or_else(Totals::default, Archive::totals),
            problems,
            frontiers,
        }
    }

    /// Finished WAL that this backup needs and that is not known to be in tier 2, as text. A segment that PostgreSQL
    /// has not finished is not waited for: that of an idle standby may stay open for days.
    pub(super) fn owed_to(&self, name: &ClusterName, backup: &BackupRecord) -> Option<String> {
        let size = self.files.segment_size(name)?;
        let timelines = backup.start_timeline..=backup.stop_timeline;
        let unsealed = self.files.positions(name).into_iter().find(|position| {
            let finished = position.flushed.segment_start(size);
            timelines.contains(&position.timeline)
                && position.sealed < finished.min(backup.stop_lsn)
                && backup.start_lsn < finished
        });
        if let Some(position) = unsealed {
            return Some(format!("WAL from {} on is not sealed", position.sealed));
        }
        let cluster = self.cluster(name);
        let state = lock(&cluster.state);
        let needed = |file: &&WalFile| {
            let start = state.archive.as_ref().and_then(|archive| archive.start_of(**file));
            timelines.contains(&file.timeline())
                && start.is_none_or(|start| {
                    start < backup.stop_lsn && backup.start_lsn < start.advance(size.bytes())
                })
        };
        state.pending.keys().find(needed).map(|file| format!("{file} is not in tier 2"))
    }

    /// Whether finished files wait for upload.
    pub(super) fn waits(&self, name: &ClusterName) -> bool {
        !lock(&self.cluster(name).state).pending.is_empty()
    }

    /// Records that archiving has stopped, and why; `None` when it continues.
    pub(super) fn stands(&self, name: &ClusterName, why: Option<String>) {
        let cluster = self.cluster(name);
        let mut state = lock(&cluster.state);
        match why {
            Some(why) => drop(state.problems.insert(QUEUE.into(), why)),
            None => drop(state.problems.remove(QUEUE)),
        }
    }

    /// Watches an upload that begins; it ends when the result is dropped.
    pub(super) fn moving(&self, name: &ClusterName, file: WalFile) -> Moving {
        let (cluster, progress) = (self.cluster(name), Progress::default());
        lock(&cluster.state).moving.push((file, progress.clone()));
        Moving { cluster, progress }
    }

    /// Records a finished file, unless tier 2 has it already.
    fn sealed(&self, job: &Job) {
        let cluster = self.cluster(&job.cluster);
        let mut state = lock(&cluster.state);
        if state.archive.is_none() {
            self.appeared.notify_one();
        }
        if let Some(archive) = &mut state.archive {
            archive.hold([job.file]);
            // A comparison was faster. The queue may discard this job as a duplicate, and then nothing would ever
            // remove the file from `pending`.
            if archive.has(job.file) {
                return;
            }
        }
        state.pending.entry(job.file).or_insert_with(now_unix);
    }

    /// Reads what an earlier run recorded, and which files on tier 1 wait beyond that. Blocking.
    pub(super) fn load(&self, name: &ClusterName) {
        let cluster = self.cluster(name);
        let size = self.files.segment_size(name);
        let known = match lock(&cluster.state).archive {
            Some(_) => None,
            None => self.known(name),
        };
        let held = self.files.list(name).unwrap_or_default();
        let mut state = lock(&cluster.state);
        if state.archive.is_none() {
            state.archive = known;
        }
        state.prepare(size, held.iter().map(|f| f.file));
        state.wait_for(&held);
    }

    /// Records a proven object, durably (ARCHIVE1).
    pub(super) async fn record(
        &self,
        name: &ClusterName,
        file: WalFile,
        local_size: Option<u64>,
        uploaded: Uploaded,
    ) -> Result<(), Error> {
        let cluster = self.cluster(name);
        let version = {
            let mut state = lock(&cluster.state);
            state.pending.remove(&file);
            state.problems.remove(&file.to_string());
            state.problems.remove("");
            state.problems.remove(QUEUE);
            state.progress = Some(Instant::now());
            if let Some(since) = &mut state.since {
                since.insert(file);
            }
            let Some(archive) = &mut state.archive else { return Ok(()) };
            let written = (uploaded.outcome == Outcome::Stored).then(now_unix);
            archive.record(file, uploaded.size, written);
            if local_size.is_some_and(|local| local != uploaded.size) {
                archive.accept_size(file, uploaded.size);
            }
            state.version += 1;
            state.version
        };
        self.write(name, &cluster, version).await
    }

    /// Makes `version` or a later version durable.
    async fn write(
        &self,
        name: &ClusterName,
        cluster: &Cluster,
        version: u64,
    ) -> Result<(), Error> {
        let mut written = cluster.written.lock().await;
        if *written >= version {
            return Ok(());
        }
        let (archive, version) = {
            let state = lock(&cluster.state);
            (state.archive.clone(), state.version)
        };
        let Some(archive) = archive else { return Ok(()) };
        let path = self.files.archive_path(name);
        let place = path.display().to_string();
        let task = tokio::task::spawn_blocking(move || archive_file::write(&path, &archive));
        task.await.map_err(|error| Error::new(Kind::Io, Op::Write, place, error))??;
        *written = version;
        Ok(())
    }

    /// Called before the bucket is listed (ARCHIVE2).
    pub(super) fn begin_comparing(&self, name: &ClusterName) {
        lock(&self.cluster(name).state).since = Some(BTreeSet::new());
    }

    /// Stores the result of a comparison, and returns what is missing.
    pub(super) async fn compared(
        &self,
        name: &ClusterName,
        held: &[StoredFile],
        stored: &[StoredObject],
    ) -> Result<Compared, Error> {
        let cluster = self.cluster(name);
        let size = self.files.segment_size(name);
        let (missing, version) = {
            let mut state = lock(&cluster.state);
            state.prepare(size, held.iter().map(|f| f.file));
            let since = state.since.take().unwrap_or_default();
            let missing = state.apply(held, stored, &since);
            state.version += 1;
            (missing, state.version)
        };
        self.write(name, &cluster, version).await?;
        Ok(Compared { missing })
    }

    /// Records a problem of a file, or of the cluster as a whole.
    pub(super) fn problem(&self, name: &ClusterName, file: Option<WalFile>, text: String) {
        let key = file.map(|f| f.to_string()).unwrap_or_default();
        lock(&self.cluster(name).state).problems.insert(key, text);
    }

    /// Clears the problem of the cluster as a whole.
    pub(super) fn no_problem(&self, name: &ClusterName) {
        lock(&self.cluster(name).state).problems.remove("");
    }

    fn cluster(&self, name: &ClusterName) -> Arc<Cluster> {
        let mut clusters = lock(&self.clusters);
        if let Some(cluster) = clusters.get(name) {
            return Arc::clone(cluster);
        }
        Arc::clone(clusters.entry(name.clone()).or_default())
    }
}

impl State {
    /// See [`ArchiveState::stalled_seconds`]. Uses a monotonic clock, so what waited before this run counts as waiting
    /// since its start.
    fn stalled_seconds(&mut self, now: Instant) -> f64 {
        let stalled = self.waiting(now);
        if self.advances(now, stalled) { 0.0 } else { stalled.as_secs_f64() }
    }

    /// How long files have waited with none of them archived.
    fn waiting(&mut self, now: Instant) -> Duration {
        if self.pending.is_empty() {
            self.progress = None;
            return Duration::ZERO;
        }
        now.saturating_duration_since(*self.progress.get_or_insert(now))
    }

    /// Whether an upload under way has begun or moved a byte not long ago.
    fn advances(&self, now: Instant, stalled: Duration) -> bool {
        let still = |last| now.saturating_duration_since(last).min(stalled);
        let still = self.moved().last.map_or(stalled, still);
        self.hopeful().next().is_some() && still < STANDS_AFTER
    }

    /// The uploads under way whose bytes prove something: after a failure the same ones may be sent again and again.
    fn hopeful(&self) -> impl Iterator<Item = &Progress> {
        let failed = |file: &WalFile| {
            ["", QUEUE, &file.to_string()].iter().any(|key| self.problems.contains_key(*key))
        };
        self.moving.iter().filter(move |(file, _)| !failed(file)).map(|(_, progress)| progress)
    }

    /// All of them together.
    fn moved(&self) -> Moved {
        let all = self.hopeful().map(Progress::moved);
        all.fold(Moved::default(), |sum, one| Moved {
            bytes: sum.bytes + one.bytes,
            last: sum.last.max(one.last),
        })
    }

    /// What to say about an upload that takes long and advances.
    fn slow(&mut self, now: Instant) -> Option<String> {
        let stalled = self.waiting(now);
        let Moved { bytes, last } = self.moved();
        let last = last.filter(|_| stalled >= SLOW_AFTER && self.advances(now, stalled))?;
        Some(format!(
            "archiving is slow: nothing was archived for {} s while {} files wait, but an upload advances: {bytes} bytes so far, the last of them {} s ago",
            stalled.as_secs(),
            self.pending.len(),
            now.saturating_duration_since(last).as_secs()
        ))
    }

    /// How far the newest timeline is archived. If nothing of it is sealed yet, its archived end is its start. A
    /// timeline also needs the WAL that it descends from, so unarchived WAL of an older timeline that lies before the
    /// start of this one counts as the end.
    fn newest(
        &self,
        archive: &Archive,
        frontiers: &[Frontier],
        positions: &[Position],
    ) -> Option<Frontier> {
        let last = frontiers.last().copied();
        let begun = positions.iter().max_by_key(|p| p.timeline).map(|position| Frontier {
            timeline: position.timeline,
            start: position.start,
            archived: position.start,
        });
        let unsealed = begun.filter(|f| last.is_none_or(|last| last.timeline < f.timeline));
        let mut newest = unsealed.or(last)?;
        let older = self.pending.keys().filter(|file| file.timeline() < newest.timeline);
        let waiting = older.filter_map(|file| archive.start_of(*file));
        // A timeline that has ended stays before it for ever, so only WAL that is not sealed yet counts.
        let older =
            positions.iter().filter(|p| p.timeline < newest.timeline && p.sealed < p.flushed);
        let oldest = older.map(|position| position.sealed).chain(waiting).min();
        if let Some(oldest) = oldest.filter(|oldest| *oldest < newest.start) {
            newest.archived = oldest;
        }
        Some(newest)
    }

    /// Adds finished files that are not known to be archived, with the time at which they were finished.
    fn wait_for(&mut self, held: &[StoredFile]) {
        for file in held {
            if !self.archive.as_ref().is_some_and(|archive| archive.has(file.file)) {
                self.pending.entry(file.file).or_insert(file.modified_unix);
            }
        }
    }

    fn prepare(
        &mut self,
        size: Option<klio_pg::SegmentSize>,
        held: impl IntoIterator<Item = WalFile>,
    ) {
        if self.archive.is_none() {
            self.archive = size.map(Archive::new);
        }
        if let Some(archive) = &mut self.archive {
            archive.hold(held);
        }
    }

    fn apply(
        &mut self,
        held: &[StoredFile],
        stored: &[StoredObject],
        since: &BTreeSet<WalFile>,
    ) -> Vec<StoredFile> {
        let local: BTreeMap<WalFile, u64> = held.iter().map(|f| (f.file, f.size)).collect();
        let accepts = |file, size| {
            // An object of another size is not proven to be ours; the upload compares the contents.
            let local = local.get(&file).copied().unwrap_or(size);
            match &self.archive {
                Some(archive) => archive.accepts(file, local, size),
                None => local == size,
            }
        };
        // If a file is there in both forms, the proven one counts.
        let mut objects: BTreeMap<WalFile, &StoredObject> = BTreeMap::new();
        for object in stored {
            let there = objects.entry(object.file).or_insert(object);
            if !accepts(there.file, there.size) {
                *there = object;
            }
        }
        let proven: BTreeSet<WalFile> = objects
            .values()
            .filter(|object| accepts(object.file, object.size))
            .map(|object| object.file)
            .chain(since.iter().copied())
            .collect();
        let mut missing: Vec<StoredFile> =
            held.iter().filter(|f| !proven.contains(&f.file)).copied().collect();
        missing.sort_by_key(|f| f.file);
        // A file that was sealed after tier 1 was listed stays pending. A file that is neither on tier 1 nor missing
        // has been handled.
        let newest = held.iter().map(|f| f.modified_unix).max().unwrap_or(0);
        self.pending.retain(|file, unix| {
            !proven.contains(file) && (local.contains_key(file) || *unix >= newest)
        });
        for file in &missing {
            self.pending.insert(file.file, file.modified_unix);
        }
        if let Some(archive) = &self.archive {
            let facts = proven.iter().map(|file| match objects.get(file) {
                Some(object) => (*file, object.size, object.modified_unix),
                None => (*file, local.get(file).copied().unwrap_or(0), now_unix()),
            });
            let held = local.keys().chain(self.pending.keys()).copied();
            self.archive = Some(archive.rebuild(held, facts));
        }
        let pending = &self.pending;
        self.problems.retain(|name, _| match name.parse() {
            Ok(file) => pending.contains_key(&file) || !local.contains_key(&file),
            Err(_) => true,
        });
        missing
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic cannot leave a state half changed, because none can happen between two related changes.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Regression test: every upload of more than ten minutes was reported as archiving that has stopped.
    #[test]
    fn an_upload_that_advances_is_slow_and_one_that_does_not_has_stopped() {
        let (begun, upload) = (Instant::now(), Progress::default());
        let after = |seconds| begun + Duration::from_secs(seconds);
        let mut state = State::default();
        let file: WalFile = "000000010000000000000001".parse().unwrap();
        state.pending.insert(file, 0);
        assert_eq!(state.stalled_seconds(begun), 0.0);
        assert_eq!(state.stalled_seconds(after(90)), 90.0, "nothing is under way");
        state.moving.push((file, upload.clone()));
        // Another file that failed says nothing about this one.
        state.problems.insert("000000010000000000000002".into(), "damaged".into());
        assert_eq!(state.stalled_seconds(after(599)), 0.0);
        assert_eq!(state.stalled_seconds(after(700)), 700.0, "it has not moved a byte");
        upload.add(5000, after(800));
        assert_eq!(state.stalled_seconds(after(1300)), 0.0);
        let told = state.slow(after(1300)).unwrap();
        for part in ["slow", "1300 s", "1 files", "5000 bytes", "500 s ago"] {
            assert!(told.contains(part), "{part}: {told}");
        }
        assert_eq!((state.stalled_seconds(after(1500)), state.slow(after(1500))), (1500.0, None));
        // It failed before: what moves now may be what moved then.
        upload.add(5000, after(1500));
        state.problems.insert(file.to_string(), "refused".into());
        assert_eq!((state.stalled_seconds(after(1501)), state.slow(after(1501))), (1501.0, None));
    }
}
