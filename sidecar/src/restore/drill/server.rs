//! The PostgreSQL of a drill: private, without any effect outside of its directory.

use super::{Scratch, programs::Programs, trace};
use crate::{
    conninfo::ConnInfo,
    error::{Error, Failure, local},
    replication::Client,
};
use rustix::process::{Pid, Signal, kill_process};
use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};
use tokio::process::Child;
use tracing::{Instrument, Span};

/// Between two looks.
const LOOK: Duration = Duration::from_millis(100);
/// A fast shutdown writes a checkpoint.
const STOP: Duration = Duration::from_secs(300);
/// A query of a drill may take a while; a dead session is noticed all the same, as the process ends.
const QUERY: Duration = Duration::from_secs(24 * 3600);
/// Lines of PostgreSQL's log in a problem.
const LOG_LINES: usize = 5;

/// A running PostgreSQL; killed when dropped.
pub struct Server<'a> {
    programs: &'a Programs,
    child: Child,
    /// As long as it runs.
    span: Span,
    socket: PathBuf,
    log: PathBuf,
    role: String,
}

fn problem(message: String) -> Error {
    Error::new(Failure::Postgres, message)
}

impl<'a> Server<'a> {
    /// Starts it; returns at once.
    ///
    /// # Errors
    /// As it cannot be started.
    pub async fn start(
        programs: &'a Programs,
        data: &Path,
        scratch: &Scratch,
        role: &str,
    ) -> Result<Self, Error> {
        let socket = scratch.join("s");
        let hba = scratch.join("pg_hba.conf");
        let ident = scratch.join("pg_ident.conf");
        let (log, conf) = (scratch.join("postgresql.log"), data.join("postgresql.conf"));
        let write = |path: &Path, text: &str| {
            fs::write(path, text).map_err(|error| local("write", path, &error))?;
            programs.give(path)
        };
        fs::create_dir(&socket).map_err(|error| local("make", &socket, &error))?;
        programs.give(&socket)?;
        // Only who may enter the directory gets to the socket.
        write(&hba, "local all all trust\n")?;
        write(&ident, "")?;
        if !conf.exists() {
            write(&conf, &limits(programs, data).await)?;
        }
        let out = File::create(&log).map_err(|error| local("make", &log, &error))?;
        let err = out.try_clone().map_err(|error| local("make", &log, &error))?;
        let postgres = programs
            .path("postgres")
            .ok_or_else(|| problem("start PostgreSQL: no program postgres".into()))?;
        let span = trace::span("postgres");
        let mut command = span.in_scope(|| programs.command(&postgres));
        command.arg("-D").arg(data);
        let path = |path: &Path| path.display().to_string();
        for (name, value) in [
            ("data_directory", path(data)),
            ("hba_file", path(&hba)),
            ("ident_file", path(&ident)),
            ("external_pid_file", String::new()),
            ("listen_addresses", String::new()),
            ("unix_socket_directories", path(&socket)),
            ("port", "5432".to_owned()),
            ("ssl", "off".to_owned()),
            // Nothing leaves this directory.
            ("archive_mode", "off".to_owned()),
            ("synchronous_standby_names", String::new()),
            ("primary_conninfo", String::new()),
            ("max_logical_replication_workers", "0".to_owned()),
            ("shared_preload_libraries", String::new()),
            ("session_preload_libraries", String::new()),
            ("local_preload_libraries", String::new()),
            ("logging_collector", "off".to_owned()),
            ("log_destination", "stderr".to_owned()),
            ("log_min_messages", "log".to_owned()),
            ("hot_standby", "on".to_owned()),
            // It is thrown away, and must fit beside what else runs here.
            ("fsync", "off".to_owned()),
            ("shared_buffers", "128MB".to_owned()),
            ("huge_pages", "off".to_owned()),
            ("autovacuum", "off".to_owned()),
        ] {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        command.stdin(Stdio::null()).stdout(out).stderr(err);
        let child = command.spawn().map_err(|error| local("start", &postgres, &error))?;
        Ok(Self { programs, child, span, socket, log, role: role.to_owned() })
    }

    /// Its log so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// What a person needs of it.
    fn last_words(&self) -> String {
        let log = self.log();
        let bad = log.lines().filter(|line| {
            ["FATAL:", "PANIC:", "ERROR:", "klio"].iter().any(|word| line.contains(word))
        });
        let bad: Vec<&str> = bad.collect();
        bad[bad.len().saturating_sub(LOG_LINES)..].join("; ")
    }

    /// Waits until recovery has ended and it is a primary.
    ///
    /// # Errors
    /// Its end.
    pub async fn recovered(&mut self) -> Result<(), Error> {
        loop {
            if let Ok(Some(status)) = self.child.try_wait() {
                let words = self.last_words();
                return Err(problem(format!("PostgreSQL ended in recovery ({status}): {words}")));
            }
            if let Ok(mut client) = self.client("postgres").await
                && let Ok(rows) = client.query("SELECT pg_is_in_recovery()").await
                && rows.first().and_then(|row| row.text(0)) == Some("f")
            {
                return Ok(());
            }
            if let Some(line) =
                self.log().lines().find(|l| l.contains("role \"") && l.contains("does not exist"))
            {
                return Err(problem(format!(
                    "{line}: drill.user names a superuser of the cluster"
                )));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn client(&self, database: &str) -> Result<Client, Error> {
        let quote = |text: &str| text.replace('\\', r"\\").replace('\'', r"\'");
        let text = format!(
            "host='{}' port=5432 user='{}' dbname='{}' sslmode=disable connect_timeout=10",
            quote(&self.socket.display().to_string()),
            quote(&self.role),
            quote(database)
        );
        let info = ConnInfo::parse(&text, &|_| None).map_err(|error| problem(error.to_string()))?;
        Client::connect_sql(&info).await.map_err(|error| problem(error.to_string()))
    }

    /// Runs SQL.
    ///
    /// # Errors
    /// What PostgreSQL says.
    pub async fn query(
        &mut self,
        database: &str,
        sql: &str,
    ) -> Result<Vec<Vec<Option<String>>>, Error> {
        let mut client = self.client(database).await?;
        client.set_patience(QUERY);
        let rows = client.query(sql).await.map_err(|error| problem(error.to_string()))?;
        let cell = |row: &crate::replication::Row, n| row.text(n).map(str::to_owned);
        Ok(rows.iter().map(|row| (0..row.len()).map(|n| cell(row, n)).collect()).collect())
    }

    /// Problems that pg_amcheck finds.
    pub async fn amcheck(&self) -> Vec<String> {
        let Some(program) = self.programs.path("pg_amcheck") else {
            return vec!["pg_amcheck is not installed: tables and indexes were not checked".into()];
        };
        let mut command = self.programs.command(&program);
        command.args(["--all", "--install-missing", "--no-strict-names", "--username", &self.role]);
        command.arg("--host").arg(&self.socket).args(["--port", "5432"]);
        ran(command, "pg_amcheck").await
    }

    /// Stops it; what is wrong with that.
    pub async fn stop(&mut self) -> Vec<String> {
        let pid = self.child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        if let Some(pid) = pid {
            let _ = kill_process(pid, Signal::INT);
        }
        let ended = tokio::time::timeout(STOP, self.child.wait()).await;
        trace::ended(&self.span, ended.as_ref().ok().and_then(|e| e.as_ref().ok().copied()));
        match ended {
            Ok(Ok(status)) if status.success() => Vec::new(),
            Ok(Ok(status)) => {
                vec![format!("PostgreSQL did not stop well ({status}): {}", self.last_words())]
            }
            Ok(Err(error)) => vec![format!("wait for PostgreSQL's end: {error}")],
            Err(_) => vec![format!("PostgreSQL did not stop within {STOP:?}")],
        }
    }
}

impl Drop for Server<'_> {
    fn drop(&mut self) {
        // Its children notice the postmaster's death by themselves; SIGQUIT tells them at once.
        let pid = self.child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        if let Some(pid) = pid {
            let _ = rustix::process::kill_process_group(pid, Signal::KILL);
        }
    }
}

/// Problems that pg_checksums finds; none where it is not installed, as it only adds to the other checks.
pub async fn checksums(programs: &Programs, data: &Path) -> Vec<String> {
    let Some(program) = programs.path("pg_checksums") else { return Vec::new() };
    let mut command = programs.command(&program);
    command.arg("--check").arg("-D").arg(data);
    let problems = ran(command, "pg_checksums").await;
    // Another version's program refuses; that says nothing about the files.
    problems.into_iter().filter(|text| !text.contains("not compatible")).collect()
}

async fn ran(mut command: tokio::process::Command, name: &str) -> Vec<String> {
    let span = trace::span(name);
    let output = command.stdin(Stdio::null()).output().instrument(span.clone()).await;
    trace::ended(&span, output.as_ref().ok().map(|output| output.status));
    match output {
        Ok(output) if output.status.success() => Vec::new(),
        Ok(output) => {
            let text = [output.stdout, output.stderr].concat();
            let text = String::from_utf8_lossy(&text).into_owned();
            let lines: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
            let first = lines[..lines.len().min(2 * LOG_LINES)].join("; ");
            vec![format!("{name} ended with {}: {first}", output.status)]
        }
        Err(error) => vec![format!("start {name}: {error}")],
    }
}

/// A configuration for a data directory without one (Debian keeps it elsewhere): what recovery insists on
/// is in pg_control.
async fn limits(programs: &Programs, data: &Path) -> String {
    let Some(program) = programs.path("pg_controldata") else { return String::new() };
    let span = trace::span("pg_controldata");
    let output = programs.command(&program).arg(data).output().instrument(span.clone()).await;
    trace::ended(&span, output.as_ref().ok().map(|output| output.status));
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    let mut conf = String::new();
    for line in text.lines() {
        let Some((name, value)) = line.split_once(" setting:") else { continue };
        let known = [
            "max_connections",
            "max_worker_processes",
            "max_wal_senders",
            "max_prepared_xacts",
            "max_locks_per_xact",
        ];
        if known.contains(&name) {
            let name = name.replace("_xacts", "_transactions").replace("_xact", "_transaction");
            conf += &format!("{name} = {}\n", value.trim());
        }
    }
    conf
}
