//! Recovery through `klio wal-fetch` and its resident agent: from a server and from the bucket, with everything killed.
//!
//! P7: whatever happens, recovery goes on, waits or stops; it never ends before the last record.

use klio_tests::{
    install_crypto,
    postgres::{Postgres, Session, Stop},
    process::Running,
    programs,
    proof::{Restorer, Source},
    s3::S3,
    scratch::Scratch,
    site::{PATIENCE, Site},
    wait::{eventually, eventually_now},
};
use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

/// Of WAL, one segment each; more than one window of read-ahead.
const MEGABYTES: u64 = 40;
/// A row that the last segment holds.
const LAST: &str = "the last row";

/// A primary that is streamed and archived.
struct Rig {
    scratch: Scratch,
    s3: S3,
    site: Site,
    primary: Postgres,
    _stream: Running,
}

impl Rig {
    async fn new(encrypted: bool) -> Self {
        install_crypto();
        let s3 = S3::new();
        let mut site = Site::new().await.tier2(&s3);
        if !encrypted {
            site.set("KLIO_ENCRYPTION__OFF", "true");
        }
        site.start().await;
        let primary = Postgres::builder().segment_mib(1).set("wal_keep_size", "1GB").start().await;
        let stream = site.stream(&primary);
        eventually("a position", PATIENCE, || site.lsn("flushed_lsn")).await;
        primary.execute("CREATE TABLE t (n bigserial, x text)").await;
        Self { scratch: Scratch::new("agent"), s3, site, primary, _stream: stream }
    }

    /// A copy that is going to recover from there.
    async fn copy(&self, source: Source, signal: &str, more: &str) -> Postgres {
        let hands = Restorer::new(&self.site, &self.s3, source, &self.scratch);
        let command = hands.command(&["wal-fetch".to_owned()]);
        let words = std::iter::once(programs::klio().into_os_string())
            .chain(command.get_args().map(Into::into))
            .map(|word| word.to_string_lossy().into_owned());
        let words: Vec<String> = words.collect();
        let settings = format!(
            "restore_command = '{} {more} %f \"%p\"'\nrecovery_target_timeline = 'latest'\n\
             archive_mode = off\n",
            words.join(" ")
        );
        self.primary.recovery_copy(signal, &settings).await
    }

    /// Writes WAL, and waits until both tiers have all of it.
    async fn load(&self) {
        self.primary
            .execute("INSERT INTO t (x) SELECT md5(n::text) FROM generate_series(1, 20000) n")
            .await;
        self.primary.write_wal(MEGABYTES << 20).await;
        self.primary.execute(&format!("INSERT INTO t (x) VALUES ('{LAST}')")).await;
        let size = self.primary.segment_size().await;
        let end = self.primary.switch_wal().await;
        self.primary.write_wal(1).await;
        self.site.wait_archived(end.segment_start(size)).await;
    }

    async fn sum(pg: &Postgres) -> String {
        pg.value("SELECT count(*) || ' ' || md5(string_agg(n || x, ',' ORDER BY n)) FROM t").await
    }

    /// Everything is there, and nothing of the agent is left.
    async fn check(&self, restored: &Postgres) {
        assert_eq!(Self::sum(restored).await, Self::sum(&self.primary).await);
        assert_eq!(
            restored.value(&format!("SELECT count(*) FROM t WHERE x = '{LAST}'")).await,
            "1"
        );
        let spool = restored.pg_wal().join(".klio");
        eventually_now("the spool to be removed", PATIENCE, || (!spool.exists()).then_some(()))
            .await;
        let log = restored.log();
        assert!(!log.contains("invalid magic number"), "{log}");
    }
}

/// Processes of the agent that serves this data directory, the serving ones.
fn agents(data_dir: &Path) -> Vec<i32> {
    let directory = fs::read_dir("/proc").expect("read /proc");
    let pids = directory.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid: &i32| {
        let process = PathBuf::from(format!("/proc/{pid}"));
        let line = fs::read(process.join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        line.contains("wal-agent")
            && line.contains("--serve")
            && fs::read_link(process.join("cwd")).is_ok_and(|cwd| cwd == data_dir)
    })
    .collect()
}

fn kill9(pid: i32) {
    if let Some(pid) = rustix::process::Pid::from_raw(pid) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}

/// Peak resident memory in bytes.
fn peak(pid: i32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
}

fn restored_segments(pg: &Postgres) -> usize {
    pg.log().matches("restored log file").count()
}

/// Waits until it answers as a primary; `each` runs meanwhile.
async fn promoted(pg: &mut Postgres, mut each: impl FnMut(&Postgres)) {
    let conninfo = pg.conninfo();
    eventually("recovery to end", PATIENCE, || {
        each(pg);
        let running = pg.running().is_some_and(Running::is_running);
        assert!(running, "PostgreSQL ended in recovery:\n{}", pg.log());
        let conninfo = conninfo.clone();
        async move {
            let session = Session::connect(&conninfo).await.ok()?;
            let rows = session.rows("SELECT pg_is_in_recovery()").await.ok()?;
            (rows[0][0] == "f").then_some(())
        }
    })
    .await;
}

async fn recovers_from(source: Source, encrypted: bool) {
    let rig = Rig::new(encrypted).await;
    let mut copy = rig.copy(source, "recovery.signal", "").await;
    rig.load().await;
    copy.launch();
    let data_dir = copy.data_dir();
    let (mut seen, mut memory) = (false, 0);
    promoted(&mut copy, |_| {
        for pid in agents(&data_dir) {
            seen = true;
            memory = memory.max(peak(pid).unwrap_or(0));
        }
    })
    .await;
    let log = copy.log();
    assert!(restored_segments(&copy) as u64 >= MEGABYTES, "{log}");
    assert!(seen, "no agent was seen:\n{log}");
    // A fetch may go past an agent that is slow to start. Not all of them do.
    let past = log.matches("fetching directly").count();
    assert!(past < restored_segments(&copy), "{past} fetches went past the agent:\n{log}");
    // Klio's part of it: 6 fetches ahead of some MiB each, whatever the window.
    assert!(memory < 128 << 20, "an agent took {memory} bytes");
    rig.check(&copy).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn recovery_from_the_server_gets_all() {
    recovers_from(Source::Server, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn recovery_from_the_encrypted_bucket_gets_all() {
    recovers_from(Source::Bucket, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn recovery_from_a_plain_bucket_gets_all() {
    recovers_from(Source::Bucket, false).await;
}

/// AGENT1.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_killed_again_and_again_is_never_noticed() {
    let rig = Rig::new(true).await;
    let mut copy = rig.copy(Source::Server, "recovery.signal", "").await;
    rig.load().await;
    copy.launch();
    let data_dir = copy.data_dir();
    let mut killed = std::collections::BTreeSet::new();
    promoted(&mut copy, |_| {
        for pid in agents(&data_dir) {
            kill9(pid);
            killed.insert(pid);
        }
    })
    .await;
    assert!(killed.len() >= 2, "killed {killed:?}");
    rig.check(&copy).await;
}

/// P7: in other tools a network error looked like the end of WAL.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_killed_in_recovery_never_ends_it() {
    let mut rig = Rig::new(true).await;
    let mut copy = rig.copy(Source::Server, "recovery.signal", "--timeout 3s").await;
    rig.load().await;
    copy.launch();
    eventually_now("some segments to be replayed", PATIENCE, || {
        (restored_segments(&copy) >= 5).then_some(())
    })
    .await;
    rig.site.kill9();
    // It has read some ahead; then it must stop, not end recovery.
    eventually_now("PostgreSQL to stop", PATIENCE, || {
        let running = copy.running().is_some_and(Running::is_running);
        (!running).then_some(())
    })
    .await;
    let log = copy.log();
    assert!(!log.contains("archive recovery complete"), "{log}");
    assert!(!copy.pg_wal().join("00000002.history").exists(), "{log}");
    copy.stop(Stop::Fast).await;
    rig.site.start().await;
    copy.launch();
    promoted(&mut copy, |_| {}).await;
    rig.check(&copy).await;
}

/// P7: WAL that is missing in the middle is not the end of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_hole_in_the_bucket_stops_recovery() {
    let rig = Rig::new(true).await;
    let mut copy = rig.copy(Source::Bucket, "recovery.signal", "--timeout 2s").await;
    rig.load().await;
    let directory = rig.s3.bucket_dir().join("klio/main/wal/00000001");
    let mut objects: Vec<_> = fs::read_dir(&directory).expect("the archive").flatten().collect();
    objects.sort_by_key(fs::DirEntry::file_name);
    let hole = &objects[objects.len() / 2];
    fs::remove_file(hole.path()).expect("make a hole");
    copy.launch();
    eventually_now("PostgreSQL to stop", PATIENCE, || {
        let running = copy.running().is_some_and(Running::is_running);
        (!running).then_some(())
    })
    .await;
    let log = copy.log();
    assert!(log.contains("FATAL") && log.contains("later WAL of its timeline is"), "{log}");
    assert!(!copy.pg_wal().join("00000002.history").exists(), "{log}");
}

/// Adds to a copy's postgresql.conf.
fn configure(copy: &Postgres, settings: &str) {
    use std::io::Write;
    fs::OpenOptions::new()
        .append(true)
        .open(copy.data_dir().join("postgresql.conf"))
        .and_then(|mut file| file.write_all(settings.as_bytes()))
        .expect("write settings");
}

/// Waits until it was told once more than before that the archive cannot be asked.
async fn told_to_ask_again(standby: &mut Postgres) {
    let told = |pg: &Postgres| pg.log().matches("asks again by itself").count();
    let before = told(standby);
    eventually_now("the standby to be told to ask again", PATIENCE, || {
        let running = standby.running().is_some_and(Running::is_running);
        assert!(running, "the standby ended:\n{}", standby.log());
        (told(standby) > before).then_some(())
    })
    .await;
}

/// P7's exception: the archive's trouble must not take away the last PostgreSQL there is. With both signal files it
/// is a standby, by PostgreSQL's own rule.
#[tokio::test(flavor = "multi_thread")]
async fn a_standby_starts_and_is_promoted_while_its_primary_and_the_archive_are_away() {
    let mut rig = Rig::new(true).await;
    let mut standby = rig.copy(Source::Server, "standby.signal", "").await;
    fs::write(standby.data_dir().join("recovery.signal"), "").expect("write recovery.signal");
    let primary = rig.primary.conninfo();
    configure(
        &standby,
        &format!("wal_retrieve_retry_interval = '200ms'\nprimary_conninfo = '{primary}'\n"),
    );
    standby.start().await;
    standby
        .wait_true("SELECT count(*) = 1 FROM pg_stat_wal_receiver WHERE status = 'streaming'")
        .await;
    rig.site.kill9();
    rig.primary.execute(&format!("INSERT INTO t (x) VALUES ('{LAST}')")).await;
    standby.wait_true(&format!("SELECT count(*) = 1 FROM t WHERE x = '{LAST}'")).await;
    rig.primary.kill9();
    told_to_ask_again(&mut standby).await;
    standby.restart().await;
    told_to_ask_again(&mut standby).await;
    assert!(standby.log().contains("promoted now, this standby lacks"), "{}", standby.log());
    standby.promote().await;
    assert_eq!(standby.value("SELECT pg_is_in_recovery()").await, "f");
    assert_eq!(standby.value(&format!("SELECT count(*) FROM t WHERE x = '{LAST}'")).await, "1");
}

/// P7's exception.
#[tokio::test(flavor = "multi_thread")]
async fn a_standby_goes_on_from_the_archive_when_the_server_is_back() {
    let mut rig = Rig::new(true).await;
    let mut standby = rig.copy(Source::Server, "standby.signal", "").await;
    configure(&standby, "wal_retrieve_retry_interval = '200ms'\n");
    standby.start().await;
    rig.site.kill9();
    told_to_ask_again(&mut standby).await;
    rig.primary.execute(&format!("INSERT INTO t (x) VALUES ('{LAST}')")).await;
    rig.site.start().await;
    standby.wait_true(&format!("SELECT count(*) = 1 FROM t WHERE x = '{LAST}'")).await;
}

/// The agent must not remember that something is not there yet.
#[tokio::test(flavor = "multi_thread")]
async fn a_standby_that_polls_sees_new_wal() {
    let rig = Rig::new(true).await;
    let more = "--timeout 5s";
    let mut standby = rig.copy(Source::Server, "standby.signal", more).await;
    configure(&standby, "wal_retrieve_retry_interval = '200ms'\n");
    rig.load().await;
    standby.start().await;
    standby.wait_true(&format!("SELECT count(*) = 1 FROM t WHERE x = '{LAST}'")).await;
    for round in 0..3 {
        let row = format!("round {round}");
        rig.primary.execute(&format!("INSERT INTO t (x) VALUES ('{row}')")).await;
        // The unfinished segment is given as well: no switch is needed.
        standby.wait_true(&format!("SELECT count(*) = 1 FROM t WHERE x = '{row}'")).await;
    }
    assert_eq!(agents(&standby.data_dir()).len(), 1, "one agent serves all of it");
    standby.promote().await;
    let spool = standby.pg_wal().join(".klio");
    eventually_now("the spool to be removed", Duration::from_secs(20), || {
        (!spool.exists()).then_some(())
    })
    .await;
}
