//! PostgreSQL replaying WAL through a restore_command: what a recovery spends between the base backup and its target.
//!
//! Every way replays the same WAL into a copy of the same data directory, with fsync. The time is PostgreSQL's own, from its
//! first to its last record ("redo done"). `cp` of plain segments is what a restore_command can be at best: replay is the rest.
//! Before that, the same segments are fetched one after the other without replay.

use crate::{
    options::Options,
    peer::Peer,
    stats::Series,
    table,
    workload::{megabytes, settle_disk},
};
use klio_tests::{
    postgres::{Postgres, Session, Stop, install},
    process::Running,
    programs,
    proof::{Restorer, Source},
    s3::S3,
    scratch::Scratch,
    site::{PATIENCE, Site},
    wait::eventually,
};
use std::{
    collections::VecDeque,
    fs,
    path::Path,
    time::{Duration, Instant},
};

/// Replay of 2 GB takes half a minute.
const RECOVERY: Duration = Duration::from_secs(900);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Cp,
    Server,
    Bucket,
    Peer,
}

const WAYS: [Way; 4] = [Way::Cp, Way::Server, Way::Bucket, Way::Peer];

impl Way {
    fn name(self) -> &'static str {
        match self {
            Self::Cp => "cp, plain files",
            Self::Server => "klio wal-fetch, server (tier 1)",
            Self::Bucket => "klio wal-fetch, bucket (loopback S3, encrypted)",
            Self::Peer => "pgbackrest archive-get, async",
        }
    }
}

/// Everything that a copy may recover from.
struct Rig {
    scratch: Scratch,
    /// What a restorer has at hand, for the server and for the bucket.
    hands: [Scratch; 2],
    s3: S3,
    site: Site,
    primary: Postgres,
    peer: Peer,
    _stream: Running,
}

impl Rig {
    async fn new() -> Self {
        let s3 = S3::new();
        let mut site = Site::new().await.tier2(&s3);
        site.start().await;
        let primary = Postgres::builder()
            .durable()
            .set("shared_buffers", "256MB")
            .set("max_wal_size", "32GB")
            .set("checkpoint_timeout", "1h")
            .set("autovacuum", "off")
            .set("archive_mode", "on")
            .set("wal_keep_size", "32GB")
            .start()
            .await;
        let peer = Peer::new(&primary, "archive-async=y\narchive-get-queue-max=512MiB").await;
        let stream = site.stream(&primary);
        eventually("a position", PATIENCE, || site.lsn("flushed_lsn")).await;
        let scratch = Scratch::new("replay");
        fs::create_dir_all(scratch.join("plain")).expect("make a directory");
        let hands = [Scratch::new("hands"), Scratch::new("hands")];
        Self { scratch, hands, s3, site, primary, peer, _stream: stream }
    }

    fn command(&self, way: Way) -> String {
        let klio = |source, scratch| {
            let hands = Restorer::new(&self.site, &self.s3, source, scratch);
            let command = hands.command(&["wal-fetch".to_owned()]);
            let args = command.get_args().map(|word| word.to_string_lossy().into_owned());
            format!("{} {}", programs::klio().display(), args.collect::<Vec<_>>().join(" "))
        };
        match way {
            Way::Cp => format!("cp {}/%f \"%p\"", self.scratch.join("plain").display()),
            Way::Server => format!("{} %f \"%p\"", klio(Source::Server, &self.hands[0])),
            Way::Bucket => format!("{} %f \"%p\"", klio(Source::Bucket, &self.hands[1])),
            Way::Peer => format!("{} archive-get %f \"%p\"", self.peer.line()),
        }
    }

    /// The restore_command.
    fn line(&self, way: Way) -> String {
        // The directory has its name when the copy is made; the shell knows it as its own.
        self.command(way).replace("archive-get", "--pg1-path=\"$PWD\" archive-get")
    }

    async fn copy(&self, way: Way) -> Postgres {
        let command = self.line(way);
        let settings =
            format!("restore_command = '{command}'\narchive_mode = off\nhot_standby = off\n");
        self.primary.recovery_copy("recovery.signal", &settings).await
    }

    /// Makes the WAL and waits until every archive has all of it.
    async fn load(&self, scale: u32) {
        eprintln!("making the WAL of pgbench -i -s {scale}");
        self.primary.pgbench(&["-i", "-q", "-s", &scale.to_string()]).await;
        let size = self.primary.segment_size().await;
        let end = self.primary.switch_wal().await;
        self.primary.write_wal(1).await;
        self.site.wait_archived(end.segment_start(size)).await;
        let last = self.primary.segment_of(klio_pg::Lsn::new(end.as_u64() - 1)).await;
        eventually("pgBackRest to have archived it", RECOVERY, || async {
            let sql = "SELECT last_archived_wal FROM pg_stat_archiver";
            let archived = self.primary.value(sql).await;
            (archived >= last.to_string()).then_some(())
        })
        .await;
        for entry in fs::read_dir(self.primary.pg_wal()).expect("read pg_wal").flatten() {
            let name = entry.file_name();
            if name.len() == 24 && *name.to_string_lossy() <= *last.to_string() {
                let to = self.scratch.join("plain").join(&name);
                fs::copy(entry.path(), to).expect("copy a segment");
            }
        }
        readable(&self.scratch.join("plain"));
    }
}

/// PostgreSQL's user runs cp.
fn readable(directory: &Path) {
    use std::os::unix::fs::PermissionsExt;
    let open = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("set permissions");
    };
    open(directory.parent().expect("a scratch directory"), 0o755);
    open(directory, 0o755);
    for entry in fs::read_dir(directory).expect("read a directory").flatten() {
        open(&entry.path(), 0o644);
    }
}

impl Rig {
    /// Fetches every segment as PostgreSQL does, without replaying any: how much there is to hide behind replay. Seconds.
    async fn fetch(&self, way: Way, copy: &Postgres) -> f64 {
        settle_disk().await;
        let mut names: Vec<String> = fs::read_dir(self.scratch.join("plain"))
            .expect("read a directory")
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        let line = self.line(way);
        let place = copy.pg_wal().join("RECOVERYXLOG");
        let mut seconds = 0.0;
        for name in &names {
            let line = line.replace("%f", name).replace("%p", "pg_wal/RECOVERYXLOG");
            let mut command = install::command("/bin/sh".as_ref());
            command.args(["-c", &line]).current_dir(copy.data_dir());
            let begun = Instant::now();
            let outcome = programs::run(command).await;
            seconds += begun.elapsed().as_secs_f64();
            assert_eq!(outcome.code, Some(0), "{}: {name}: {}", way.name(), outcome.stderr);
            fs::remove_file(&place).expect("what was fetched is there");
        }
        seconds
    }
}

/// Recovers a copy; seconds of redo, and how many segments.
async fn recover(mut copy: Postgres, rows: &str) -> (f64, usize) {
    settle_disk().await;
    copy.launch();
    let conninfo = copy.conninfo();
    eventually("recovery to end", RECOVERY, || {
        let running = copy.running().is_some_and(Running::is_running);
        assert!(running, "PostgreSQL ended in recovery:\n{}", copy.log());
        let conninfo = conninfo.clone();
        async move {
            let session = Session::connect(&conninfo).await.ok()?;
            let rows = session.rows("SELECT pg_is_in_recovery()").await.ok()?;
            (rows[0][0] == "f").then_some(())
        }
    })
    .await;
    assert_eq!(copy.value("SELECT count(*) FROM pgbench_accounts").await, rows);
    let log = copy.log();
    let (_, redo) = log.split_once("redo done at").expect("redo was done");
    let (_, elapsed) = redo.split_once("elapsed: ").expect("PostgreSQL says how long");
    let seconds = elapsed.split_whitespace().next().and_then(|s| s.parse().ok());
    copy.stop(Stop::Fast).await;
    (seconds.expect("seconds"), log.matches("restored log file").count())
}

/// Runs and prints it.
pub async fn run(options: &Options) {
    let rig = Rig::new().await;
    let mut copies: [VecDeque<Postgres>; 4] = Default::default();
    for _ in 0..options.rounds() {
        for (number, way) in WAYS.into_iter().enumerate() {
            copies[number].push_back(rig.copy(way).await);
        }
    }
    let mut fetchers = Vec::new();
    for way in WAYS {
        fetchers.push(rig.copy(way).await);
    }
    rig.load(options.scale()).await;
    let mut fetching: [Series; 4] = Default::default();
    for round in 0..options.rounds() {
        for turn in 0..WAYS.len() {
            let number = (round + turn) % WAYS.len();
            let taken = rig.fetch(WAYS[number], &fetchers[number]).await;
            eprintln!("fetch round {}: {}: {taken:.2} s", round + 1, WAYS[number].name());
            fetching[number].push(taken);
        }
    }
    let rows = (100_000 * u64::from(options.scale())).to_string();
    let mut seconds: [Series; 4] = Default::default();
    let mut segments = 0;
    for round in 0..options.rounds() {
        for turn in 0..WAYS.len() {
            let number = (round + turn) % WAYS.len();
            let copy = copies[number].pop_front().expect("one for each round");
            let (taken, count) = recover(copy, &rows).await;
            segments = count;
            eprintln!("replay round {}: {}: {taken:.2} s", round + 1, WAYS[number].name());
            seconds[number].push(taken);
        }
    }
    let stored = fs::read_dir(rig.scratch.join("plain")).expect("read a directory").count();
    print("fetch without replay", "seconds", &fetching, stored, options);
    print("replay", "seconds of redo", &seconds, segments, options);
}

fn print(what: &str, unit: &str, seconds: &[Series; 4], segments: usize, options: &Options) {
    let bytes = megabytes(u64::try_from(segments).unwrap_or(0) * (16 << 20));
    let rows: Vec<Vec<String>> = WAYS
        .iter()
        .zip(seconds)
        .map(|(way, taken)| {
            let cp = seconds[0].median();
            vec![
                way.name().to_owned(),
                taken.show(1),
                taken.map(|s| bytes / s).show(0),
                format!("{:.2}", taken.median() / cp),
            ]
        })
        .collect();
    let title = format!("{what}: {segments} segments, {} rounds", options.rounds());
    table::print(&title, &["", unit, "MB/s", "against cp"], &rows);
}
