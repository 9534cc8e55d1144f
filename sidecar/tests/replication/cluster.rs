//! A temporary PostgreSQL for these tests, with its own directory and a free port; removed on drop.
//!
//! PostgreSQL refuses to run as root, so as root everything runs as user `postgres`.

use klio_pg::{Lsn, SegmentName, SegmentSize, TimelineId};
use klio_sidecar::{
    conninfo::ConnInfo,
    replication::{Client, Error},
};
use rustix::process::{Pid, Signal, kill_process};
use std::{
    fs,
    net::TcpListener,
    os::unix::{
        fs::{PermissionsExt, chown},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

const BIN: &str = "/usr/lib/postgresql/15/bin";

pub struct Cluster {
    pub dir: tempfile::TempDir,
    pub port: u16,
    settings: Vec<String>,
    child: Option<Child>,
}

/// The user that PostgreSQL runs as, if not ours.
fn postgres_ids() -> Option<(u32, u32)> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let passwd = fs::read_to_string("/etc/passwd").unwrap();
    let line = passwd.lines().find(|l| l.starts_with("postgres:")).expect("user postgres");
    let ids: Vec<u32> = line.split(':').skip(2).take(2).map(|n| n.parse().unwrap()).collect();
    Some((ids[0], ids[1]))
}

pub fn own(path: &Path) {
    if let Some((uid, gid)) = postgres_ids() {
        chown(path, Some(uid), Some(gid)).unwrap();
    }
}

pub fn write_owned(path: &Path, content: &str, mode: u32) {
    fs::write(path, content).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    own(path);
}

fn program(name: &str, dir: &Path) -> Command {
    let mut command = Command::new(format!("{BIN}/{name}"));
    command.current_dir(dir).env("LC_ALL", "C").stdin(Stdio::null());
    if let Some((uid, gid)) = postgres_ids() {
        command.uid(uid).gid(gid);
    }
    command
}

fn run(mut command: Command) {
    let out = command.output().unwrap();
    assert!(out.status.success(), "{command:?}: {}", String::from_utf8_lossy(&out.stderr));
}

fn new_dir() -> tempfile::TempDir {
    let dir = tempfile::Builder::new().prefix("klio-repl-").tempdir_in("/tmp").unwrap();
    own(dir.path());
    dir
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

impl Cluster {
    /// A new cluster with 1 MiB segments and trust authentication on the unix socket, running.
    pub async fn start(settings: &[&str]) -> Cluster {
        let mut cluster = Cluster::init(settings, 1);
        cluster.launch().await;
        cluster
    }

    /// A new cluster that is not started yet.
    pub fn init(settings: &[&str], segment_mib: u32) -> Cluster {
        let dir = new_dir();
        let mut initdb = program("initdb", dir.path());
        initdb.args(["-D", "data", "-U", "postgres", "-A", "trust", "-N", "--no-locale"]);
        initdb.arg("-E").arg("UTF8").arg(format!("--wal-segsize={segment_mib}"));
        run(initdb);
        let settings = settings.iter().map(|s| (*s).to_owned()).collect();
        Cluster { dir, port: free_port(), settings, child: None }
    }

    /// A running hot standby of this one.
    pub async fn standby(&self) -> Cluster {
        let dir = new_dir();
        let mut copy = program("pg_basebackup", dir.path());
        copy.args(["-D", "data", "-U", "postgres", "-R", "-X", "stream", "-c", "fast", "-N"]);
        copy.arg("-h").arg(self.dir.path()).arg("-p").arg(self.port.to_string());
        run(copy);
        let mut standby =
            Cluster { dir, port: free_port(), settings: self.settings.clone(), child: None };
        standby.launch().await;
        standby
    }

    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    pub fn hba(&self, lines: &str) {
        let all = format!("local all all trust\nlocal replication all trust\n{lines}\n");
        write_owned(&self.data().join("pg_hba.conf"), &all, 0o600);
    }

    pub async fn launch(&mut self) {
        let log = fs::File::create(self.dir.path().join("log")).unwrap();
        let mut server = program("postgres", self.dir.path());
        server.args(["-D", "data", "-k"]).arg(self.dir.path());
        server.arg("-p").arg(self.port.to_string());
        let base = ["listen_addresses=127.0.0.1", "fsync=off", "shared_buffers=16MB"];
        for setting in base.into_iter().chain(self.settings.iter().map(String::as_str)) {
            server.arg("-c").arg(setting);
        }
        server.stdout(Stdio::null()).stderr(log);
        self.child = Some(server.spawn().unwrap());
        let (info, mut tries) = (self.info(""), 0);
        while let Err(e) = Client::connect_sql(&info).await {
            tries += 1;
            let log = || fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            assert!(tries < 1500, "server does not start: {e}\n{}", log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub fn signal(&self, signal: Signal) {
        if let Some(child) = &self.child {
            kill_process(Pid::from_child(child), signal).unwrap();
        }
    }

    pub fn wait_stopped(&mut self) {
        self.child.take().unwrap().wait().unwrap();
    }

    /// A connection string for the superuser over the unix socket, with `more` appended.
    pub fn info(&self, more: &str) -> ConnInfo {
        let dir = self.dir.path().display();
        info(&format!("host={dir} port={} user=postgres dbname=postgres {more}", self.port))
    }

    pub async fn client(&self) -> Client {
        Client::connect(&self.info("")).await.unwrap()
    }

    /// The first column of the first row, if any.
    pub async fn sql(&self, sql: &str) -> Option<String> {
        let mut client = Client::connect_sql(&self.info("")).await.unwrap();
        let rows = client.query(sql).await.unwrap();
        client.close().await;
        rows.last().and_then(|row| row.text(0).map(str::to_owned))
    }

    pub async fn lsn(&self, sql: &str) -> Lsn {
        self.sql(sql).await.unwrap().parse().unwrap()
    }

    /// Writes about `mib` MiB of WAL and ends the segment; returns the LSN where the next one begins.
    pub async fn fill(&self, mib: u32) -> Lsn {
        self.sql(&format!(
            "SELECT pg_logical_emit_message(false, 'x', repeat(md5(g::text), 3200)) \
             FROM generate_series(1, {mib} * 10) g"
        ))
        .await;
        let end = self.lsn("SELECT pg_switch_wal()").await;
        let size = mib1();
        let end = match end.offset_in(size) {
            0 => end,
            _ => end.segment_start(size).advance(size.bytes()),
        };
        // The switch is streamed only after it was flushed.
        self.sql("CHECKPOINT").await;
        end
    }

    /// PostgreSQL's own bytes of the segment that contains `lsn`.
    pub fn segment(&self, timeline: u32, lsn: Lsn) -> Vec<u8> {
        let timeline = TimelineId::new(timeline).unwrap();
        let name = SegmentName::containing(timeline, lsn, mib1()).to_string();
        fs::read(self.data().join("pg_wal").join(name)).unwrap()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.signal(Signal::QUIT);
        if let Some(mut child) = self.child.take() {
            let _ = child.wait();
        }
    }
}

pub fn mib1() -> SegmentSize {
    SegmentSize::new(1 << 20).unwrap()
}

pub fn info(text: &str) -> ConnInfo {
    ConnInfo::parse_as(text, &|_| None, None).unwrap()
}

/// Waits for a condition; fails after 30 s.
pub async fn eventually<T, F: Future<Output = Option<T>>>(
    what: &str,
    mut check: impl FnMut() -> F,
) -> T {
    let begun = Instant::now();
    loop {
        if let Some(value) = check().await {
            return value;
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "never happened: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub async fn refused(info: &ConnInfo) -> Error {
    match Client::connect(info).await {
        Ok(client) => panic!("expected a refusal, found {client:?}"),
        Err(e) => e,
    }
}
