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
    receive::{Progress, Registry},
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
        let mut problems = self.store.problems(name);
        problems.extend(archive.iter().flat_map(|a| a.problems.clone()));
        problems.extend(self.base_problems(name));
        problems.extend(self.undecided(name));
        let used = self.quotas.used(name);
        problems.extend(used.and_then(|used| used.problem()));
        problems.extend(self.maintenance.iter().flat_map(|m| m.problems(name)));
        let progress = state.progress();
        problems.extend(self.base.iter().flat_map(|base| base.clock_doubts()));
        let timelines = self.store.timelines(name);
        problems.extend(timelines.undecided().map(undecided));
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
            problems: once(problems),
            quota_used: used.map(|used| used.ratio()),
            all_read_since_unix: self.maintenance.as_ref().and_then(|m| m.all_read_since(name)),
            name: name.clone(),
        }
    }

    /// The values for an instrument; all instruments of a scrape get the same reading.
    pub fn table(&self, instrument: &'static str) -> Table {
        self.snapshots.get(instrument, || self.read())
    }

    /// The clusters whose directory exists and that are not closed. A cluster whose directory was removed by hand
    /// disappears, whatever is in memory about it.
    fn present(&self) -> BTreeSet<ClusterName> {
        let there = |name: &ClusterName| {
            self.store.root().join(name.as_str()).is_dir() && !self.is_closed(name)
        };
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
        let own = all.get(name.number().unwrap_or(1));
        own.is_some_and(|own| !own.state.is_open()) && self.shown(name, &all) != *name
    }

    /// Problems of the cluster's base backups, and of the objects that all its generations share.
    fn base_problems(&self, name: &ClusterName) -> Vec<String> {
        let Some(base) = &self.base else { return Vec::new() };
        let mut problems = base.archives().state(name).problems;
        if name.base() != *name {
            problems.extend(base.archives().state(&name.base()).problems);
        }
        problems
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
            let (number, state, reason) = (g.number, g.state.word(), &g.reason);
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
mod tests {
    use super::*;

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
