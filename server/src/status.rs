//! The state of every cluster, in one place: for `klio status`, the gauges and /readyz.
//!
//! Nothing is decided here, and a scrape does not read the bucket. The sources are the store (durable facts), the
//! registry (live sessions), the archive (tier 2), and the queue's cached numbers.

use crate::{
    base::BaseStore,
    consumer::{ArchiveState, Archives},
    maintenance::MaintenanceMetrics,
    metrics::{Metrics, Reading, Snapshots, Table},
    queue::Queue,
    quota::Quotas,
    registry::{Progress, Registry},
};
use klio_pg::{Lsn, TimelineId};
use klio_storage::{
    catalog::{
        Mark, Run,
        holdings::{MINIMAL, minimal},
    },
    generations::{Generation, Generations},
    layout::{ClusterName, WalFile},
    wal::{Gap, LevelChange, Pinned, Position, WalStore},
};
use std::{
    collections::BTreeSet,
    io::Write,
    path::Path,
    sync::Arc,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

/// What is measured of a history that a person has closed: nothing more is expected of it, but what is stored of it has
/// to be safe.
const OF_CLOSED: [&str; 14] = [
    "klio.wal.seal_failures",
    "klio.wal.seal_lag_size",
    "klio.wal.seal_lag_time",
    "klio.wal.archived_lsn",
    "klio.wal.archive_lag_size",
    "klio.wal.archive_lag_time",
    "klio.wal.damaged_journals",
    "klio.consumer.offloads",
    "klio.consumer.stalled_time",
    "klio.base.snapshots",
    "klio.base.unarchived_files",
    "klio.base.archive_lag_time",
    "klio.verify.damaged",
    "klio.maintenance.alarm",
];

/// Everything about one cluster.
#[derive(Debug, Clone)]
pub struct ClusterView {
    pub name: ClusterName,
    /// What was pinned at first contact.
    pub pinned: Option<Pinned>,
    /// The timeline that is followed: the newest one that is neither undecided nor retired.
    pub timeline: Option<TimelineId>,
    /// The end of durable WAL on tier 1, of that timeline.
    pub flushed: Lsn,
    /// The end of sealed WAL, of that timeline.
    pub sealed: Lsn,
    /// Whether a sidecar is streaming.
    pub connected: bool,
    /// The positions of the last session.
    pub progress: Progress,
    /// Everything that PostgreSQL had at this time is durable; `None` when no such time is known.
    pub durable_as_of_unix: Option<f64>,
    /// The state of tier 2; `None` without tier 2.
    pub archive: Option<ArchiveState>,
    /// Recorded gaps.
    pub gaps: Vec<Gap>,
    /// Stored WAL that no recovery can replay.
    pub unpassed: Vec<Gap>,
    /// Unix time of the newest WAL file on tier 1.
    pub latest_written: Option<f64>,
    /// The number of timelines that wait for a person's decision.
    pub undecided_timelines: u64,
    /// Problems, as texts.
    pub problems: Vec<String>,
    /// The used share of the quota, if there is one.
    pub quota_used: Option<f64>,
    /// Since when all data of base backups was read, in Unix seconds.
    pub all_read_since_unix: Option<f64>,
}

impl ClusterView {
    /// The end of contiguous WAL in tier 2, of the newest timeline; 0/0 when there is none.
    pub fn archived(&self) -> Lsn {
        self.archive.as_ref().map_or(Lsn::ZERO, |a| a.archived_lsn)
    }

    /// Finished bytes that tier 2 does not have; 0 on an idle cluster. Bytes of a recorded gap do not count.
    pub fn archive_lag_bytes(&self) -> u64 {
        let Some(archive) = self.archive.as_ref().filter(|a| a.timeline == self.timeline) else {
            return 0;
        };
        let (from, to) = (archive.archived_lsn, self.sealed);
        let overlap = |gap: &Gap| gap.to.min(to).bytes_since(gap.from.max(from));
        to.bytes_since(from).saturating_sub(self.gaps.iter().map(overlap).sum())
    }

    /// Age of the oldest finished file that tier 2 does not have, in seconds.
    pub fn archive_lag_seconds(&self, now_unix: f64) -> f64 {
        let oldest = self.archive.as_ref().and_then(|a| a.oldest_unarchived_unix);
        oldest.map_or(0.0, |since| (now_unix - since).max(0.0))
    }
}

/// A conflict that waits for a person's decision, as a problem.
fn undecided(mark: &Mark) -> String {
    format!(
        "timeline {} is undecided: {}; all of it is received; klio timeline list shows both sides, klio timeline follow or retire decides",
        mark.timeline.get(),
        mark.reason
    )
}

/// Stretches of `wal_level = minimal`: a recovery cannot replay them, although every byte is stored.
fn unpassed(levels: &[LevelChange], positions: &[Position]) -> Vec<Gap> {
    let of = |p: &Position| {
        let held = Run { start: p.start, end: p.flushed };
        let gap = |run: Run| Gap {
            timeline: p.timeline,
            from: run.start,
            to: run.end,
            reason: MINIMAL.to_owned(),
            recorded_unix: 0.0,
            unknown: Default::default(),
        };
        minimal(levels, p.timeline, &[held]).into_iter().map(gap).collect::<Vec<_>>()
    };
    positions.iter().flat_map(of).collect()
}

/// Writes and syncs a byte, which fails on a full or read-only disk. The file is created anew and removed, because a
/// full disk would accept a byte into the space of an existing file.
fn probe(root: &Path) -> std::io::Result<()> {
    let path = root.join(".probe");
    let write = || {
        let mut file = std::fs::File::create(&path)?;
        file.write_all(b"k")?;
        file.sync_data()
    };
    let written = write();
    match std::fs::remove_file(&path) {
        // Two probes ran at the same time.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => written,
        removed => written.and(removed),
    }
}

/// The current time, in Unix seconds.
pub fn now_unix() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// Reads all sources of the status.
pub struct StatusBoard {
    pub store: WalStore,
    /// The live sessions.
    pub registry: Arc<Registry>,
    /// The times of the last writes.
    pub metrics: Arc<Metrics>,
    /// Tier 2; `None` when it is not configured.
    pub archives: Option<Archives>,
    /// Verification, drills and maintenance.
    pub maintenance: Option<Arc<MaintenanceMetrics>>,
    pub base: Option<BaseStore>,
    /// The used quotas.
    pub quotas: Quotas,
    pub queue: Queue,
    /// When the server's certificate expires, in Unix seconds; `None` with plaintext.
    pub certificate_expiry: Box<dyn Fn() -> Option<i64> + Send + Sync>,
    /// The last reading for all instruments.
    pub snapshots: Snapshots,
}

impl StatusBoard {
    /// The current state of every cluster.
    pub fn clusters(&self) -> Vec<ClusterView> {
        self.store.clusters().iter().map(|name| self.cluster(name)).collect()
    }

    /// The current state of one cluster.
    pub fn cluster(&self, name: &ClusterName) -> ClusterView {
        let positions = self.store.positions(name);
        // Undecided and retired timelines do not count for the cluster's state.
        let followed = self.store.followed(name);
        let newest = positions.iter().find(|p| Some(p.timeline) == followed);
        let state = self.registry.cluster(name);
        let archive = self.archives.as_ref().map(|archives| archives.state(name));
        let mut problems = self.problems_of_data(name, archive.as_ref());
        if name.base() != *name {
            problems.extend(self.problems_of_objects(&name.base()));
        }
        problems.extend(self.undecided(name));
        let used = self.quotas.used(name);
        problems.extend(used.and_then(|used| used.problem()));
        let progress = state.progress();
        problems.extend(self.base.iter().flat_map(|base| base.clock_doubts()));
        let timelines = self.store.timelines(name);
        problems.extend(timelines.undecided().map(undecided));
        let mut problems = once(problems);
        let of_closed = self.problems_of_closed(name, &problems);
        problems.extend(of_closed);
        ClusterView {
            pinned: self.store.pinned(name),
            timeline: newest.map(|p| p.timeline),
            flushed: newest.map_or(Lsn::ZERO, |p| p.flushed),
            sealed: newest.map_or(Lsn::ZERO, |p| p.sealed),
            connected: state.connected(),
            durable_as_of_unix: self.durable_as_of(name, &progress, now_unix()),
            progress,
            archive,
            gaps: self.store.gaps(name),
            unpassed: unpassed(&self.store.levels(name), &positions),
            latest_written: self.metrics.latest_written(name),
            undecided_timelines: timelines.undecided().count() as u64,
            problems,
            quota_used: used.map(|used| used.ratio()),
            all_read_since_unix: self.maintenance.as_ref().and_then(|m| m.all_read_since(name)),
            name: name.clone(),
        }
    }

    /// The values for an instrument; all instruments of a scrape get the same reading.
    pub fn table(&self, instrument: &'static str) -> Table {
        self.snapshots.get(instrument, || self.read())
    }

    /// The clusters whose directory exists. A cluster whose directory was removed by hand disappears, whatever is in
    /// memory about it.
    fn present(&self) -> BTreeSet<ClusterName> {
        let there = |name: &ClusterName| self.store.root().join(name.as_str()).is_dir();
        self.store.clusters().into_iter().filter(there).collect()
    }

    /// The history under which a cluster is shown: the current generation. While this server has nothing of that, the
    /// first one is shown.
    fn shown(&self, name: &ClusterName, all: &Generations) -> ClusterName {
        let current = Generations::place(name, all.current());
        if self.store.pinned(&current).is_some() { current } else { name.base() }
    }

    /// The same for a name with or without a number, as far as this server knows without asking the bucket.
    pub fn shown_for(&self, name: &ClusterName) -> ClusterName {
        let all = self.base.as_ref().and_then(|base| base.generations_here(name).ok());
        all.map_or_else(|| name.clone(), |all| self.shown(name, &all))
    }

    /// Whether a person has closed this history of its cluster, so that nothing is expected of it.
    pub fn is_closed(&self, name: &ClusterName) -> bool {
        let all = self.base.as_ref().and_then(|base| base.generations_here(name).ok());
        let Some(all) = all else { return false };
        let own = all.get(name.generation());
        own.is_some_and(|own| !own.state.is_open()) && self.shown(name, &all) != *name
    }

    /// Problems of what is stored of a history.
    fn problems_of_data(&self, name: &ClusterName, archive: Option<&ArchiveState>) -> Vec<String> {
        let mut problems = self.store.problems(name);
        problems.extend(archive.iter().flat_map(|a| a.problems.clone()));
        problems.extend(self.problems_of_objects(name));
        problems.extend(self.maintenance.iter().flat_map(|m| m.problems(name)));
        problems
    }

    /// Problems of a history's base backups, and in the directory of the first one of the objects that all share.
    fn problems_of_objects(&self, name: &ClusterName) -> Vec<String> {
        let base = self.base.as_ref();
        base.map_or_else(Vec::new, |base| base.archives().state(name).problems)
    }

    /// Problems of the closed histories of a cluster, except those that are `told` already. They stay restorable, but
    /// are not shown themselves, so that the one that is shown reports them.
    fn problems_of_closed(&self, name: &ClusterName, told: &[String]) -> Vec<String> {
        let all = self.base.as_ref().and_then(|base| base.generations_here(name).ok());
        let Some(all) = all.filter(|all| self.shown(name, all) == *name) else { return Vec::new() };
        let mut found = Vec::new();
        for generation in all.all().iter().filter(|generation| !generation.state.is_open()) {
            let (number, state) = (generation.number, generation.state.word());
            let place = Generations::place(name, number);
            if place == *name {
                continue;
            }
            let archive = self.archives.as_ref().map(|archives| archives.state(&place));
            let mut problems = once(self.problems_of_data(&place, archive.as_ref()));
            problems.retain(|problem| !told.contains(problem));
            found.extend(problems.iter().map(|p| format!("generation {number} ({state}): {p}")));
        }
        found
    }

    /// The histories that wait for a person's decision; reported for the current one only.
    fn undecided(&self, name: &ClusterName) -> Vec<String> {
        let all = match self.base.as_ref().map(|base| base.generations_here(name)) {
            None => return Vec::new(),
            Some(Ok(all)) => all,
            Some(Err(error)) => return vec![error.to_string()],
        };
        if self.shown(name, &all) != *name {
            return Vec::new();
        }
        let tell = |g: &Generation| {
            let (number, state, reason) = (g.number, g.state.word(), g.why());
            format!(
                "another history of this cluster is {state} as generation {number}: {reason}; klio generation follow {number} or klio generation retire {number} decides"
            )
        };
        all.undecided().map(tell).collect()
    }

    /// Every value of every observed instrument.
    fn read(&self) -> Vec<Reading> {
        let now_unix = now_unix();
        let present = self.present();
        let mut out = Vec::new();
        self.metrics.read(&present, self.archives.is_some(), &mut out);
        if let Some(base) = &self.base {
            base.read(&present, &mut out);
        }
        if let Some(maintenance) = &self.maintenance {
            maintenance.read(&present, now_unix, &mut out);
        }
        for view in present.iter().map(|name| self.cluster(name)) {
            self.read_cluster(&view, now_unix, &mut out);
        }
        let closed: BTreeSet<_> = present.iter().filter(|name| self.is_closed(name)).collect();
        let is_closed =
            |of: &Reading| of.cluster.as_ref().is_some_and(|name| closed.contains(name));
        out.retain(|reading| !is_closed(reading) || OF_CLOSED.contains(&reading.name));
        let queue = self.queue.stats();
        let mut put = |name, value| out.push(Reading::plain(name, value));
        if let Some(oldest) = queue.oldest_unix {
            put("klio.queue.messages", queue.messages as f64);
            put("klio.queue.bytes", queue.bytes as f64);
            let age = if oldest > 0 { now_unix - oldest as f64 } else { 0.0 };
            put("klio.queue.oldest_age", age.max(0.0));
        }
        put("klio.queue.connected", f64::from(u8::from(queue.connected)));
        if let Ok((free, total)) = self.store.free_space() {
            put("klio.tier1.free_size", free as f64);
            put("klio.tier1.total_size", total as f64);
        }
        if let Some(expiry) = (self.certificate_expiry)() {
            put("klio.tls.certificate_expiry_time", expiry as f64);
        }
        out
    }

    fn read_cluster(&self, view: &ClusterView, now_unix: f64, out: &mut Vec<Reading>) {
        let now = Instant::now();
        let mut put = |name, value| out.push(Reading::of(name, &view.name, value));
        put("klio.wal.connected", f64::from(u8::from(view.connected)));
        put("klio.wal.received_lsn", view.progress.received.max(view.flushed).as_u64() as f64);
        put("klio.wal.flushed_lsn", view.flushed.as_u64() as f64);
        put("klio.wal.sealed_lsn", view.sealed.as_u64() as f64);
        if view.connected {
            put("klio.wal.receive_lag_size", view.progress.receive_lag_bytes() as f64);
            put("klio.wal.receive_lag_time", view.progress.receive_lag_seconds(now));
            put("klio.wal.flush_lag_size", view.progress.lag_bytes() as f64);
            put("klio.wal.flush_lag_time", view.progress.lag_seconds(now));
        } else if let Some(since) = view.durable_as_of_unix {
            // It is unknown how far PostgreSQL has gone on; a 0 would say that it has not.
            put("klio.wal.flush_lag_time", (now_unix - since).max(0.0));
        }
        put("klio.wal.seal_lag_size", self.seal_lag_bytes(view) as f64);
        let waits = self.store.unsealed_since(&view.name);
        put("klio.wal.seal_lag_time", waits.map_or(0.0, |since| (now_unix - since).max(0.0)));
        put("klio.wal.gaps", (view.gaps.len() + view.unpassed.len()) as f64);
        let undecided = self.undecided(&view.name).len();
        put("klio.cluster.undecided_generations", undecided as f64);
        let damaged = self.store.damaged_journals(&view.name);
        put("klio.wal.damaged_journals", damaged as f64);
        put("klio.cluster.undecided_timelines", view.undecided_timelines as f64);
        if let Some(unix) = view.latest_written {
            put("klio.wal.latest_written_time", unix);
        }
        put("klio.quota.used_ratio", view.quota_used.unwrap_or(0.0));
        if let Some(archive) = &view.archive {
            put("klio.wal.archived_lsn", archive.archived_lsn.as_u64() as f64);
            put("klio.wal.archive_lag_size", view.archive_lag_bytes() as f64);
            put("klio.wal.archive_lag_time", view.archive_lag_seconds(now_unix));
            put("klio.consumer.stalled_time", archive.stalled_seconds);
            if let Some(unix) = archive.latest_archived_unix {
                put("klio.consumer.latest_written_time", unix);
            }
        }
        if let Some(base) = &self.base {
            let frontiers = view.archive.as_ref().map_or(&[][..], |archive| &archive.frontiers);
            base.read_window(&view.name, frontiers, view.durable_as_of_unix, out);
        }
    }

    /// The time up to which all of PostgreSQL's WAL is durable. Before the first stream, this is the recorded time
    /// from before the start.
    fn durable_as_of(&self, name: &ClusterName, progress: &Progress, now_unix: f64) -> Option<f64> {
        match progress.durable_as_of {
            Some(at) => Some(now_unix - at.elapsed().as_secs_f64()),
            None => self.metrics.held_at_start(name),
        }
    }

    /// The size of segments that are finished and not sealed: 0 on an idle cluster, however full its last segment is.
    fn seal_lag_bytes(&self, view: &ClusterView) -> u64 {
        let Some(size) = view.pinned.map(|pinned| pinned.segment_size) else { return 0 };
        let positions = self.store.positions(&view.name);
        let bytes = |file| match file {
            WalFile::Segment(_) => size.bytes(),
            // A partial segment ends where its timeline does.
            WalFile::Partial(name) => {
                let line = positions.iter().find(|p| p.timeline == name.timeline());
                let end = line.map_or(Lsn::ZERO, |p| p.flushed);
                name.start_lsn(size).map_or(0, |start| end.bytes_since(start).min(size.bytes()))
            }
            WalFile::History(_) => 0,
        };
        self.store.unsealed(&view.name).into_iter().map(bytes).sum()
    }

    /// Why the server is not ready; empty when it is. Writes a byte to tier 1.
    pub fn readiness(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if let Err(error) = probe(self.store.root()) {
            problems.push(format!("tier 1 is not writable: {error}"));
        }
        if !self.queue.stats().connected {
            problems.push("queue: not connected; WAL is received, archiving waits".into());
        }
        problems
    }
}
/// Reports one failure of the bucket once, not for every file and listing that it stops.
fn once(problems: Vec<String>) -> Vec<String> {
    let mut told: Vec<(String, String, usize)> = Vec::new();
    for problem in problems {
        let cause = cause_of(&problem).unwrap_or_else(|| problem.clone());
        match told.iter_mut().find(|(known, ..)| *known == cause) {
            Some((.., more)) => *more += 1,
            None => told.push((cause, problem, 0)),
        }
    }
    let text = |(_, text, more): (String, String, usize)| match more {
        0 => text,
        _ => format!("{text} (and {more} more for the same reason)"),
    };
    told.into_iter().map(text).collect()
}

/// Why a file cannot be uploaded or a listing fails, without the name and place that differ for each.
fn cause_of(problem: &str) -> Option<String> {
    let (what, error) = match problem.strip_prefix("archive ") {
        Some(rest) => rest.split_once(": ")?,
        None => ("", problem.strip_prefix("compare the tiers: ")?),
    };
    let (_, why) = error.split_once(": ")?;
    Some(if what.is_empty() { why.to_owned() } else { why.replace(what, "") })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{base, queue::tests::TestQueue, quota::QuotaConfig};
    use klio_pg::SegmentSize;
    use klio_storage::{
        crypt::AtRest, disk::RealDisk, layout::BaseObject, record, repository::Settings,
        tier2::Tier2, wal::WalOptions,
    };

    /// A tier 1 that knows these places.
    pub(crate) fn store(root: &Path, places: &[&str]) -> WalStore {
        let store =
            WalStore::open(Arc::new(RealDisk), root.to_owned(), WalOptions::default()).unwrap();
        let segment_size = SegmentSize::new(1 << 20).unwrap();
        let pinned = Pinned { system_identifier: 7, segment_size, postgres_version: 170_000 };
        for place in places {
            store.pin(&ClusterName::parse_generation(place).unwrap(), pinned).unwrap();
        }
        store
    }

    /// A server of `main`, of which generation 2 is followed.
    pub(crate) fn followed(store: WalStore, tier2: Option<Tier2>, queue: &Queue) -> StatusBoard {
        let (mut all, main) = (Generations::default(), "main".parse().unwrap());
        all.begin(base::stranger("set back", 7), 1.0, true).unwrap();
        all.follow(2, "ops", 2.0).unwrap();
        let path = store.root().join(BaseObject::Generations.key(&main));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        record::store(&RealDisk, &path, &all).unwrap();
        let registry = Arc::new(Registry::default());
        let base = BaseStore::open(base::Parts {
            store: store.clone(),
            disk: Arc::new(RealDisk),
            tier2,
            at_rest: AtRest::Off,
            settings: Settings::default(),
            queue: queue.clone(),
            registry: registry.clone(),
            clock: Arc::new(now_unix),
        });
        StatusBoard {
            store,
            registry,
            metrics: Arc::new(Metrics::new(&opentelemetry::global::meter("test"))),
            archives: None,
            maintenance: Some(Arc::new(MaintenanceMetrics::default())),
            base: Some(base),
            quotas: Quotas::new(QuotaConfig::default(), None),
            queue: queue.clone(),
            certificate_expiry: Box::new(|| None),
            snapshots: Snapshots::default(),
        }
    }

    /// Regression test: the decision to follow another generation ended every alarm of the former one, whose data may
    /// not be safe.
    #[tokio::test(flavor = "multi_thread")]
    async fn what_is_stored_of_a_closed_generation_is_watched_until_it_is_gone() {
        let (root, directory) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let queue = TestQueue::start(directory.path()).await;
        let board = followed(store(root.path(), &["main", "main@2"]), None, &queue.queue);
        let (first, second) = ("main".parse().unwrap(), board.shown_for(&"main".parse().unwrap()));
        assert!(second.as_str() == "main@2" && board.is_closed(&first));
        let alarms = |texts: &[&str]| {
            let texts: Vec<String> = texts.iter().map(|text| (*text).to_owned()).collect();
            board.maintenance.iter().for_each(|m| m.alarmed(&first, &texts));
        };
        alarms(&[]);
        assert_eq!(board.cluster(&second).problems, [""; 0]);
        alarms(&["the record of b1 cannot be read"]);
        let told = "generation 1 (older): retention: the record of b1 cannot be read";
        assert_eq!(board.cluster(&second).problems, [told]);
        let read = board.read();
        let value = |cluster: &ClusterName, name: &str| {
            let of = |r: &&Reading| r.cluster.as_ref() == Some(cluster) && r.name == name;
            read.iter().find(of).map(|reading| reading.value)
        };
        assert_eq!(value(&first, "klio.maintenance.alarm"), Some(1.0));
        for (name, of_current) in [("klio.wal.connected", 0.0), ("klio.wal.flushed_lsn", 0.0)] {
            assert_eq!((value(&first, name), value(&second, name)), (None, Some(of_current)));
        }
        let known = |name: &str| crate::metrics::CATALOGUE.iter().any(|row| row.name == name);
        assert!(OF_CLOSED.iter().all(|name| known(name)), "{OF_CLOSED:?}");
        queue.stop().await;
    }

    #[test]
    fn one_failure_of_the_bucket_is_told_once() {
        let archive =
            |file: &str, why: &str| format!("archive {file}: upload s3://b/pg/{file}: {why}");
        let down = "connection refused; hint: is the store up?";
        let problems = vec![
            format!("compare the tiers: list s3://b/pg/wal: {down}"),
            archive("0001", down),
            archive("0002", down),
            archive("0003", "other content is there"),
            "nothing to do with it".to_owned(),
        ];
        let told = once(problems.clone());
        assert_eq!(told.len(), 3, "{told:?}");
        assert!(
            told[0].starts_with(&problems[0])
                && told[0].ends_with("(and 2 more for the same reason)")
        );
        assert_eq!(told[1..], problems[3..]);
    }
}
