//! End to end: a directory of sealed files, a real nats-server, a real S3 endpoint.

use super::{
    ArchiveState, Archives, Attempt, ConsumerConfig, Observer, Parts, Tier1Files,
    directory::Directory, start,
};
use crate::{
    base::{self, BaseStore},
    queue::tests::{TestQueue, eventually, pid},
    registry::Registry,
};
use klio_pg::{Lsn, SegmentSize, TimelineId};
use klio_storage::{
    crypt::AtRest,
    disk::RealDisk,
    layout::{ClusterName, WalFile},
    repository::Settings,
    tier2::{Outcome, Secret, Tier2, Tier2Config, Uploaded},
    wal::{Gap, Pinned, Position, WalOptions, WalStore},
};
use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex},
};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

mod changing;
mod lost;
#[path = "../../../storage/src/tier2/tests/s3.rs"]
pub(crate) mod s3;
use s3::{BUCKET, Fault, S3};

const SEGMENT: u64 = 1 << 20;

#[derive(Default)]
struct Counts(Mutex<BTreeMap<(String, Attempt), (u64, u64)>>);

impl Observer for Counts {
    fn attempted(&self, cluster: &ClusterName, attempt: Attempt, bytes: u64) {
        let mut counts = self.0.lock().unwrap();
        let entry = counts.entry((cluster.to_string(), attempt)).or_default();
        entry.0 += 1;
        entry.1 += bytes;
    }
}

impl Counts {
    fn of(&self, cluster: &str, attempt: Attempt) -> u64 {
        self.0.lock().unwrap().get(&(cluster.to_owned(), attempt)).map_or(0, |c| c.0)
    }
}

fn name(text: &str) -> ClusterName {
    text.parse().unwrap()
}

fn segment(number: u64) -> WalFile {
    segment_of(1, number)
}

fn segment_of(timeline: u32, number: u64) -> WalFile {
    format!("{timeline:08X}00000000{number:08X}").parse().unwrap()
}

/// The middle of a segment is written as `.5`.
fn lsn(segments: f64) -> Lsn {
    Lsn::new((segments * SEGMENT as f64) as u64)
}

fn gap(timeline: u32, from: f64, to: f64) -> Gap {
    let timeline = TimelineId::new(timeline).unwrap();
    Gap {
        timeline,
        from: lsn(from),
        to: lsn(to),
        reason: "lost".into(),
        recorded_unix: 1.0,
        unknown: Default::default(),
    }
}

fn position(timeline: u32, start: f64, sealed: f64, flushed: f64) -> Position {
    Position {
        timeline: TimelineId::new(timeline).unwrap(),
        start: lsn(start),
        sealed: lsn(sealed),
        flushed: lsn(flushed),
        has_history: timeline > 1,
    }
}

fn encode(plain: &[u8]) -> Vec<u8> {
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    encoder.include_checksum(true).unwrap();
    std::io::Write::write_all(&mut encoder, plain).unwrap();
    encoder.finish().unwrap()
}

/// Writes a sealed file to tier 1, with content that only this file has.
fn seal(root: &Path, cluster: &str, file: WalFile) {
    let path = root.join(file.key(&name(cluster)));
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let line = format!("{cluster} {file} ");
    let plain: Vec<u8> = line.bytes().cycle().take(SEGMENT as usize).collect();
    let content = match file {
        WalFile::Segment(_) => encode(&plain),
        WalFile::Partial(_) => encode(&plain[..70_000]),
        WalFile::History(_) => b"1\t0/300000\tno recovery target specified\n".to_vec(),
    };
    std::fs::write(path, content).unwrap();
}

fn seal_many(root: &Path, cluster: &str, numbers: std::ops::Range<u64>) {
    numbers.for_each(|number| seal(root, cluster, segment(number)));
}

/// A consumer under test.
struct Test {
    files: Directory,
    archives: Archives,
    counts: Arc<Counts>,
    cancel: CancellationToken,
    tasks: JoinSet<()>,
}

pub(crate) fn tier2(s3: &S3) -> Tier2 {
    let mut config = Tier2Config::new(format!("s3://{BUCKET}"));
    let (id, secret) = s3.credentials();
    config.endpoint = Some(s3.endpoint.clone());
    config.access_key_id = Some(id.into());
    config.secret_access_key = Some(Secret::new(secret));
    config.request_timeout_seconds = 5;
    config.retry_timeout_seconds = 1;
    Tier2::open(&config).unwrap()
}

/// The base store over a tier 1 in `root`.
pub(crate) fn base_store(root: &Path, queue: &TestQueue, tier2: Option<Tier2>) -> BaseStore {
    let store = WalStore::open(Arc::new(RealDisk), root.to_owned(), WalOptions::default()).unwrap();
    BaseStore::open(base::Parts {
        store,
        disk: Arc::new(RealDisk),
        tier2,
        at_rest: AtRest::Off,
        settings: Settings::default(),
        queue: queue.queue.clone(),
        registry: Arc::new(Registry::default()),
        clock: Arc::new(|| 1.0),
    })
}

/// A PostgreSQL with this system identifier.
pub(crate) fn pinned(system_identifier: u64) -> Pinned {
    let segment_size = SegmentSize::new(SEGMENT as u32).unwrap();
    Pinned { system_identifier, segment_size, postgres_version: 170_000 }
}

impl Test {
    fn start(root: &Path, queue: &TestQueue, s3: &S3) -> Self {
        Self::start_with(root, queue, s3, None, 5)
    }

    fn start_with(
        root: &Path,
        queue: &TestQueue,
        s3: &S3,
        base: Option<BaseStore>,
        reconcile_interval_seconds: u32,
    ) -> Self {
        let directory = Directory::new(root, SegmentSize::new(SEGMENT as u32).unwrap());
        let files: Arc<dyn Tier1Files> = Arc::new(directory.clone());
        let archives = Archives::new(Arc::clone(&files));
        let counts = Arc::new(Counts::default());
        let parts = Parts {
            queue: queue.queue.clone(),
            tier2: tier2(s3),
            files,
            archives: archives.clone(),
            base,
            observer: counts.clone(),
        };
        let config = ConsumerConfig { reconcile_interval_seconds, ..ConsumerConfig::default() };
        let cancel = CancellationToken::new();
        let tasks = start(&config, parts, cancel.clone());
        Self { files: directory, archives, counts, cancel, tasks }
    }

    fn state(&self, cluster: &str) -> ArchiveState {
        self.archives.state(&name(cluster))
    }

    async fn archived(&self, cluster: &str, number: u64) {
        let what = format!("{cluster} is archived up to segment {number}");
        eventually(&what, || self.state(cluster).archived_lsn == Lsn::new(number * SEGMENT)).await;
    }

    /// Waits until there is no lag, as an idle cluster must show.
    async fn idle(&self, cluster: &str) {
        eventually(&format!("nothing of {cluster} waits"), || {
            let state = self.state(cluster);
            (state.unarchived_files, state.oldest_unarchived_unix) == (0, None)
        })
        .await;
    }

    async fn stop(mut self) {
        self.cancel.cancel();
        while self.tasks.join_next().await.is_some() {}
    }
}

fn same_in_both_tiers(root: &Path, s3: &S3, cluster: &str, file: WalFile) -> bool {
    let key = file.key(&name(cluster));
    let object = std::fs::read(s3.object(&key));
    object.is_ok_and(|object| object == std::fs::read(root.join(key)).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_finished_reaches_the_bucket_byte_for_byte() {
    let (root, directory, s3) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), S3::start().await);
    let partial: WalFile = "000000010000000000000009.partial".parse().unwrap();
    let history: WalFile = "00000002.history".parse().unwrap();
    seal_many(root.path(), "pg-1", 3..9);
    seal(root.path(), "pg-1", partial);
    seal(root.path(), "pg-1", history);
    let queue = TestQueue::up(directory.path()).await;
    let test = Test::start(root.path(), &queue, &s3);
    test.archived("pg-1", 9).await;
    eventually("nothing waits", || test.state("pg-1").unarchived_files == 0).await;
    for file in (3..9).map(segment).chain([partial, history]) {
        assert!(same_in_both_tiers(root.path(), &s3, "pg-1", file), "{file}");
    }
    let state = test.state("pg-1");
    assert_eq!(state.totals.files, 8);
    assert_eq!(state.oldest_unarchived_unix, None);
    assert!(state.latest_archived_unix.unwrap() > 1.7e9);
    assert_eq!(state.problems, Vec::<String>::new());
    eventually("eight are counted", || test.counts.of("pg-1", Attempt::Stored) == 8).await;
    // New files come through the queue, not from the reconciler.
    let publisher =
        crate::queue::Publisher::new(queue.queue.clone(), Some(test.archives.listener()));
    seal(root.path(), "pg-1", segment(9));
    publisher.publish_path(&name("pg-1"), segment(9), 1);
    assert_eq!(test.state("pg-1").unarchived_files, 1);
    test.archived("pg-1", 10).await;
    test.stop().await;
    queue.stop().await;
}

/// Gauges show the true last times after a restart, even with the bucket out of reach.
#[tokio::test(flavor = "multi_thread")]
async fn a_restart_knows_what_was_archived_without_asking_the_bucket() {
    let (root, directory, s3) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), S3::start().await);
    seal_many(root.path(), "pg-1", 3..6);
    let queue = TestQueue::up(directory.path()).await;
    let test = Test::start(root.path(), &queue, &s3);
    test.archived("pg-1", 6).await;
    // It is counted after it was recorded on disk.
    eventually("three are counted", || test.counts.of("pg-1", Attempt::Stored) == 3).await;
    let before = test.state("pg-1");
    test.stop().await;
    s3.on_request(|_| Some(Fault::Status(503, "SlowDown")));
    let test = Test::start(root.path(), &queue, &s3);
    // At once: there must be no moment without a state.
    let after = test.state("pg-1");
    assert_eq!(after.archived_lsn, before.archived_lsn);
    assert_eq!(after.latest_archived_unix, before.latest_archived_unix);
    assert_eq!(after.totals, before.totals);
    eventually("the trouble is named", || !test.state("pg-1").problems.is_empty()).await;
    // An idle cluster has no lag, even at this moment.
    assert_eq!(
        test.state("pg-1"),
        ArchiveState { problems: test.state("pg-1").problems, ..before }
    );
    test.stop().await;
    // A file that was finished and not archived before a restart counts as waiting since it was finished.
    seal(root.path(), "pg-1", segment(6));
    let finished = root.path().join(segment(6).key(&name("pg-1")));
    let long_ago = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_700_000_000);
    std::fs::File::options().write(true).open(finished).unwrap().set_modified(long_ago).unwrap();
    let test = Test::start(root.path(), &queue, &s3);
    eventually("it waits", || test.state("pg-1").unarchived_files == 1).await;
    assert_eq!(test.state("pg-1").oldest_unarchived_unix, Some(1.7e9));
    assert_eq!(test.state("pg-1").archived_lsn, before.archived_lsn);
    s3.heal();
    test.archived("pg-1", 7).await;
    test.idle("pg-1").await;
    test.stop().await;
    queue.stop().await;
}

/// P4. Guards against a bug of other projects, where nothing finds what is missing.
#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_queue_directory_loses_nothing() {
    let (root, directory, s3) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), S3::start().await);
    let queue_directory = directory.path().join("queue");
    seal_many(root.path(), "pg-1", 3..8);
    seal_many(root.path(), "pg-2", 3..8);
    // The bucket is down, so all jobs stay in the queue.
    s3.on_request(|parts| (parts.method == "PUT").then_some(Fault::Status(503, "SlowDown")));
    let queue = TestQueue::up(&queue_directory).await;
    let test = Test::start(root.path(), &queue, &s3);
    eventually("jobs are queued", || queue.queue.stats().messages == 10).await;
    test.stop().await;
    queue.stop().await;
    std::fs::remove_dir_all(&queue_directory).unwrap();
    s3.heal();
    let queue = TestQueue::up(&queue_directory).await;
    let test = Test::start(root.path(), &queue, &s3);
    for cluster in ["pg-1", "pg-2"] {
        test.archived(cluster, 8).await;
        test.idle(cluster).await;
    }
    test.stop().await;
    queue.stop().await;
}

/// Guards against the design of other projects: one task in flight for all clusters, and a dead letter after ten
/// attempts.
#[tokio::test(flavor = "multi_thread")]
async fn one_broken_cluster_does_not_hold_up_another() {
    let (root, directory, s3) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), S3::start().await);
    seal_many(root.path(), "broken", 0..30);
    seal_many(root.path(), "well", 3..30);
    // The worst case: requests of one cluster hang until they time out.
    s3.on_request(|parts| {
        (parts.method == "PUT" && parts.uri.path().contains("/broken/")).then_some(Fault::Hang)
    });
    let queue = TestQueue::up(directory.path()).await;
    let test = Test::start(root.path(), &queue, &s3);
    test.archived("well", 30).await;
    eventually("the trouble is named", || {
        test.state("broken").problems.iter().any(|p| p.contains("archive "))
    })
    .await;
    assert_eq!(test.state("broken").archived_lsn, Lsn::ZERO);
    assert_eq!(test.state("well").problems, Vec::<String>::new());
    s3.heal();
    test.archived("broken", 30).await;
    eventually("no trouble is left", || test.state("broken").problems.is_empty()).await;
    test.stop().await;
    queue.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_and_a_missing_file_hold_the_frontier_and_nothing_else() {
    let (root, directory, s3) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), S3::start().await);
    seal_many(root.path(), "pg-1", 3..20);
    let path = |number| root.path().join(segment(number).key(&name("pg-1")));
    let whole = std::fs::read(path(5)).unwrap();
    std::fs::write(path(5), &whole[..whole.len() / 2]).unwrap();
    let queue = TestQueue::up(directory.path()).await;
    let test = Test::start(root.path(), &queue, &s3);
    let publisher = crate::queue::Publisher::new(queue.queue.clone(), None);
    publisher.publish_path(&name("pg-1"), segment(99), 1); // in neither tier
    let count = |test: &Test| test.counts.of("pg-1", Attempt::Stored);
    eventually("all the others are stored", || count(&test) == 16).await;
    assert_eq!(test.state("pg-1").archived_lsn, Lsn::new(5 * SEGMENT));
    eventually("both are named", || {
        let problems = test.state("pg-1").problems.join("\n");
        problems.contains("000000010000000000000005")
            && problems.contains("000000010000000000000063")
    })
    .await;
    assert!(test.counts.of("pg-1", Attempt::Corrupt) > 0);
    assert!(!s3.object(&segment(5).key(&name("pg-1"))).exists());
    std::fs::write(path(5), &whole).unwrap();
    test.archived("pg-1", 20).await;
    test.stop().await;
    queue.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_nats_server_in_the_middle_changes_nothing() {
    let (root, directory, s3) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), S3::start().await);
    seal_many(root.path(), "pg-1", 0..60);
    let queue = TestQueue::up(directory.path()).await;
    let test = Test::start(root.path(), &queue, &s3);
    for at in [5, 20, 40] {
        eventually("some are stored", || test.counts.of("pg-1", Attempt::Stored) >= at).await;
        if let Some(pid) = pid(directory.path()) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
    test.archived("pg-1", 60).await;
    for file in (0..60).map(segment) {
        assert!(same_in_both_tiers(root.path(), &s3, "pg-1", file), "{file}");
    }
    test.stop().await;
    queue.stop().await;
}

/// P4 and P5: an object that vanished from the bucket is found and uploaded again.
#[tokio::test(flavor = "multi_thread")]
async fn an_object_that_vanished_is_written_again() {
    let (root, directory, s3) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), S3::start().await);
    seal_many(root.path(), "pg-1", 3..6);
    let queue = TestQueue::up(directory.path()).await;
    let test = Test::start(root.path(), &queue, &s3);
    test.archived("pg-1", 6).await;
    std::fs::remove_file(s3.object(&segment(4).key(&name("pg-1")))).unwrap();
    eventually("it is back", || same_in_both_tiers(root.path(), &s3, "pg-1", segment(4))).await;
    test.archived("pg-1", 6).await;
    test.stop().await;
    queue.stop().await;
}

/// OBJECT4 for the consumer: what somebody else wrote under our key stays, and the problem names it.
#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_object_is_a_named_conflict_and_stays() {
    let (root, directory, s3) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), S3::start().await);
    seal_many(root.path(), "pg-1", 3..6);
    let object = s3.object(&segment(4).key(&name("pg-1")));
    std::fs::create_dir_all(object.parent().unwrap()).unwrap();
    let foreign = encode(b"another cluster's");
    std::fs::write(&object, &foreign).unwrap();
    let queue = TestQueue::up(directory.path()).await;
    let test = Test::start(root.path(), &queue, &s3);
    eventually("the conflict is named", || {
        test.state("pg-1").problems.iter().any(|p| p.contains("already exists"))
    })
    .await;
    test.archived("pg-1", 4).await;
    assert_eq!(std::fs::read(&object).unwrap(), foreign);
    test.stop().await;
    queue.stop().await;
}

/// Regression test: the frontier stopped at a gap, and the lag alarm never ended.
#[tokio::test(flavor = "multi_thread")]
async fn a_recorded_gap_is_no_lag_but_the_partial_before_it_is() {
    let (root, directory, s3) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), S3::start().await);
    let partial: WalFile = "000000010000000000000006.partial".parse().unwrap();
    seal_many(root.path(), "pg-1", 3..6);
    s3.on_request(|parts| {
        let hit = parts.method == "PUT" && parts.uri.path().contains("partial");
        hit.then_some(Fault::Status(503, "SlowDown"))
    });
    let queue = TestQueue::up(directory.path()).await;
    let test = Test::start(root.path(), &queue, &s3);
    test.archived("pg-1", 6).await;
    // A gap that is recorded while the consumer runs, with nothing behind it yet.
    test.files.record_gap(gap(1, 6.5, 9.0));
    assert_eq!(test.state("pg-1").archived_lsn, lsn(6.0));
    let publisher =
        crate::queue::Publisher::new(queue.queue.clone(), Some(test.archives.listener()));
    let finish = |file| {
        seal(root.path(), "pg-1", file);
        publisher.publish_path(&name("pg-1"), file, 1);
    };
    [partial, segment(9), segment(10)].into_iter().for_each(finish);
    eventually("all but the partial are stored", || test.state("pg-1").unarchived_files == 1).await;
    assert_eq!(test.state("pg-1").archived_lsn, lsn(6.0));
    s3.heal();
    test.archived("pg-1", 11).await;
    test.idle("pg-1").await;
    finish(segment(11));
    test.archived("pg-1", 12).await;
    // A gap at the end of the stored WAL is passed at once, because nothing may follow for days.
    test.files.record_gap(gap(1, 12.0, 20.0));
    assert_eq!(test.state("pg-1").archived_lsn, lsn(20.0));
    test.stop().await;
    // The same must hold after a restart, which compares both tiers.
    let test = Test::start(root.path(), &queue, &s3);
    for gap in [gap(1, 6.5, 9.0), gap(1, 12.0, 20.0)] {
        test.files.record_gap(gap);
    }
    eventually("the tiers are compared", || test.state("pg-1").totals.files == 7).await;
    test.archived("pg-1", 20).await;
    test.idle("pg-1").await;
    test.stop().await;
    queue.stop().await;
}

/// Right after a promotion nothing of the new timeline is sealed.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_timeline_is_archived_no_further_than_what_it_came_from() {
    let (root, directory, s3) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), S3::start().await);
    let partial: WalFile = "000000010000000000000006.partial".parse().unwrap();
    seal_many(root.path(), "pg-1", 3..5);
    let queue = TestQueue::up(directory.path()).await;
    let test = Test::start(root.path(), &queue, &s3);
    test.archived("pg-1", 5).await;
    s3.on_request(|parts| (parts.method == "PUT").then_some(Fault::Status(503, "SlowDown")));
    let publisher =
        crate::queue::Publisher::new(queue.queue.clone(), Some(test.archives.listener()));
    let finish = |file| {
        seal(root.path(), "pg-1", file);
        publisher.publish_path(&name("pg-1"), file, 1);
    };
    let newest = |archived| {
        let state = test.state("pg-1");
        (state.timeline, state.archived_lsn) == (TimelineId::new(2), lsn(archived))
    };
    // Segment 5 is full and not sealed, and the first half of 6 arrived on both timelines.
    test.files.set_positions(&[position(1, 3.0, 5.0, 6.5), position(2, 6.0, 6.0, 6.6)]);
    assert!(newest(5.0), "{:?}", test.state("pg-1"));
    // Everything is sealed and nothing is archived.
    [segment(5), partial, "00000002.history".parse().unwrap()].into_iter().for_each(finish);
    test.files.set_positions(&[position(1, 3.0, 6.5, 6.5), position(2, 6.0, 6.0, 6.7)]);
    assert!(newest(5.0), "{:?}", test.state("pg-1"));
    s3.heal();
    eventually("all of timeline 1 is archived", || newest(6.0)).await;
    test.idle("pg-1").await;
    finish(segment_of(2, 6));
    eventually("timeline 2 goes on", || newest(7.0)).await;
    // Timeline 3 begins behind a gap, so the WAL of timeline 2 before it is in the past for ever.
    test.files.record_gap(gap(3, 7.2, 9.0));
    let held = [(2, 6.0, 7.2), (3, 9.0, 9.0)].map(|(t, from, to)| position(t, from, to, to));
    test.files.set_positions(&held);
    finish("000000020000000000000007.partial".parse().unwrap());
    test.idle("pg-1").await;
    let state = test.state("pg-1");
    assert_eq!((state.timeline, state.archived_lsn), (TimelineId::new(3), lsn(9.0)));
    test.stop().await;
    queue.stop().await;
}

/// A comparison may archive a file before the sealer announces it, and the queue may drop the job as a duplicate. Then
/// nothing would report that it is done.
#[test]
fn a_file_announced_after_it_was_archived_does_not_wait() {
    let root = tempfile::tempdir().unwrap();
    let size = SegmentSize::new(SEGMENT as u32).unwrap();
    let archives = Archives::new(Arc::new(Directory::new(root.path(), size)));
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    for file in [segment(3), "000000010000000000000004.partial".parse().unwrap()] {
        seal(root.path(), "pg-1", file);
        archives.load(&name("pg-1"));
        assert_eq!(archives.state(&name("pg-1")).unarchived_files, 1);
        let sha256 = klio_storage::tier2::Sha256Sum::new([0; 32]);
        let uploaded = Uploaded { size: 9, sha256, outcome: Outcome::Stored };
        runtime.block_on(archives.record(&name("pg-1"), file, None, uploaded)).unwrap();
        assert_eq!(archives.state(&name("pg-1")).unarchived_files, 0);
        let job = crate::queue::Job { cluster: name("pg-1"), file, size: 9, sha256: None };
        archives.listener()(&job);
        assert_eq!(archives.state(&name("pg-1")).unarchived_files, 0);
    }
}

/// Name and trace id of each ended span.
#[derive(Debug, Clone, Default)]
struct Spans(Arc<Mutex<Vec<(String, String)>>>);

impl opentelemetry_sdk::trace::SpanProcessor for Spans {
    fn on_start(&self, _: &mut opentelemetry_sdk::trace::Span, _: &opentelemetry::Context) {}
    fn on_end(&self, span: opentelemetry_sdk::trace::SpanData) {
        let trace = span.span_context.trace_id().to_string();
        self.0.lock().unwrap().push((span.name.to_string(), trace));
    }
    fn force_flush(&self) -> opentelemetry_sdk::error::OTelSdkResult {
        Ok(())
    }
    fn shutdown_with_timeout(
        &self,
        _: std::time::Duration,
    ) -> opentelemetry_sdk::error::OTelSdkResult {
        Ok(())
    }
}

/// One trace follows a segment from the sealer to the bucket, across the queue.
#[tokio::test]
async fn one_trace_follows_a_segment_to_the_bucket() {
    use opentelemetry::trace::TracerProvider;
    use tracing_subscriber::layer::SubscriberExt;
    let spans = Spans::default();
    let provider = opentelemetry_sdk::trace::SdkTracerProvider::builder()
        .with_span_processor(spans.clone())
        .build();
    let tracing = tracing_opentelemetry::layer().with_tracer(provider.tracer("test"));
    // With one subscriber alive, tracing asks the thread that meets a span first whether anybody wants it, and that
    // may be another test's thread. With two it asks the subscribers.
    let _second = tracing::Dispatch::new(tracing_subscriber::registry());
    // This runtime has one thread, so everything of ours runs under this subscriber.
    let _guard = tracing::subscriber::set_default(tracing_subscriber::registry().with(tracing));
    opentelemetry::global::set_text_map_propagator(
        opentelemetry_sdk::propagation::TraceContextPropagator::new(),
    );
    let (root, directory, s3) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), S3::start().await);
    std::fs::create_dir_all(root.path().join("pg-1/wal")).unwrap();
    let queue = TestQueue::up(directory.path()).await;
    let test = Test::start(root.path(), &queue, &s3);
    eventually("the cluster is followed", || test.state("pg-1").problems.is_empty()).await;
    seal(root.path(), "pg-1", segment(3));
    tracing::info_span!("wal.seal").in_scope(|| {
        let publisher = crate::queue::Publisher::new(queue.queue.clone(), None);
        publisher.publish_path(&name("pg-1"), segment(3), 1);
    });
    let traces = |of: &str| -> Vec<String> {
        let spans = spans.0.lock().unwrap();
        spans.iter().filter(|(name, _)| name == of).map(|(_, trace)| trace.clone()).collect()
    };
    eventually("it is offloaded", || !traces("offload").is_empty()).await;
    let sealed = traces("wal.seal");
    assert_eq!(sealed.len(), 1);
    for name in ["wal.publish", "offload", "tier2.request"] {
        assert!(traces(name).contains(&sealed[0]), "{name}: {sealed:?} in {:?}", spans.0.lock());
    }
    test.stop().await;
    queue.stop().await;
}

/// Every file of the embedded server's store, without its directories.
fn files_below(directory: &Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        match entry.path().is_dir() {
            true => found.extend(files_below(&entry.path())),
            false => found.push(entry.path()),
        }
    }
    found.sort();
    found
}

fn copy_directory(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().flatten() {
        let target = to.join(entry.file_name());
        match entry.path().is_dir() {
            true => copy_directory(&entry.path(), &target),
            false => drop(std::fs::copy(entry.path(), target).unwrap()),
        }
    }
}

type Damage = fn(&Path);

/// The kinds of damage to a file; the last two also apply to a directory.
const DAMAGES: [(&str, Damage); 6] = [
    ("zeros", |file| change(file, |old| vec![0; old.len()])),
    ("garbage", |file| {
        change(file, |old| (0..old.len()).map(|at| (at * 131 + 7) as u8).collect());
    }),
    ("cut", |file| change(file, |old| old[..old.len() / 2].to_vec())),
    // Like a medium that returns an error: a directory cannot be read as a file.
    ("unreadable", |file| {
        std::fs::remove_file(file).unwrap();
        std::fs::create_dir_all(file.join("in its place")).unwrap();
    }),
    ("gone", |file| {
        if file.is_dir() {
            std::fs::remove_dir_all(file).unwrap();
        } else {
            std::fs::remove_file(file).unwrap();
        }
    }),
    ("no directory", |place| {
        if place.is_dir() {
            std::fs::remove_dir_all(place).unwrap();
        } else {
            std::fs::remove_file(place).unwrap();
            std::fs::create_dir(place).unwrap();
            return;
        }
        std::fs::write(place, "a file in its place").unwrap();
    }),
];

fn change(file: &Path, how: impl Fn(&[u8]) -> Vec<u8>) {
    std::fs::write(file, how(&std::fs::read(file).unwrap())).unwrap();
}

fn directories_below(directory: &Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            found.push(entry.path());
            found.extend(directories_below(&entry.path()));
        }
    }
    found.sort();
    found
}

/// P4: zeros in a consumer's state stopped archiving for ever (nats-server 4758, 6333).
#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_damaged_in_the_queues_files_archiving_goes_on() {
    let (root, directory, s3) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), S3::start().await);
    let template = directory.path().join("template");
    seal_many(root.path(), "pg-1", 3..6);
    let queue = TestQueue::up(&template).await;
    let test = Test::start(root.path(), &queue, &s3);
    test.archived("pg-1", 6).await;
    // The bucket is down, so jobs are in the store, and some of them are delivered.
    s3.on_request(|parts| (parts.method == "PUT").then_some(Fault::Status(503, "SlowDown")));
    seal_many(root.path(), "pg-1", 6..9);
    test.archives.load(&name("pg-1"));
    queue.queue.want(&name("pg-1"));
    eventually("three jobs are given out", || {
        queue.queue.stats().messages == 3 && !test.state("pg-1").problems.is_empty()
    })
    .await;
    test.stop().await;
    queue.stop().await;
    let store = template.join("jetstream");
    let files = files_below(&store);
    assert!(files.iter().any(|file| file.ends_with("o.dat")), "{files:?}");
    let directories = directories_below(&store);
    assert!(directories.len() > 3, "{directories:?}");
    let mut next = 9;
    for file in files.into_iter().chain(directories) {
        let relative = file.strip_prefix(&store).unwrap();
        let damages = if file.is_dir() { &DAMAGES[4..] } else { &DAMAGES[..] };
        for (how, damage) in damages {
            let place = directory.path().join("damaged");
            let _ = std::fs::remove_dir_all(&place);
            copy_directory(&template, &place);
            let victim = place.join("jetstream").join(relative);
            damage(&victim);
            s3.heal();
            // One file waits from before, and one is finished while it runs.
            seal(root.path(), "pg-1", segment(next));
            let queue = TestQueue::start(&place).await;
            let test = Test::start(root.path(), &queue, &s3);
            let publisher =
                crate::queue::Publisher::new(queue.queue.clone(), Some(test.archives.listener()));
            seal(root.path(), "pg-1", segment(next + 1));
            publisher.publish_path(&name("pg-1"), segment(next + 1), 1);
            let what = format!("archiving goes on with {} {how}", relative.display());
            eventually(&what, || test.state("pg-1").archived_lsn == lsn((next + 2) as f64)).await;
            eventually(&format!("{what}: no problem"), || test.state("pg-1").problems.is_empty())
                .await;
            test.stop().await;
            queue.stop().await;
            next += 2;
        }
    }
}
