//! The PostgreSQL of a drill: private, and without any effect outside of its directory.

use super::{Scratch, programs::Programs, trace};
use crate::{
    conninfo::ConnInfo,
    error::{Error, Failure, local},
    replication::Client,
};
use klio_pg::Lsn;
use rustix::process::{Pid, Signal, kill_process};
use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};
use tokio::process::Child;
use tracing::{Instrument, Span};

/// Pause between two looks at its state.
const LOOK: Duration = Duration::from_millis(100);
/// Limit for the shutdown, which writes a checkpoint.
const STOP: Duration = Duration::from_secs(300);
/// Limit for a query. It may be long because a dead session is noticed in any case: PostgreSQL's process ends then.
const QUERY: Duration = Duration::from_secs(24 * 3600);
/// The line in PostgreSQL's log that says it accepts connections.
const READY: &str = "database system is ready to accept";
/// Parts of log lines that say why PostgreSQL ended (`ENDS`) or paused (`PAUSES`).
const ENDS: [&str; 4] = ["FATAL:", "PANIC:", "ERROR:", "klio wal-fetch:"];
const PAUSES: [&str; 4] = ["WARNING:", "DETAIL:", "HINT:", "paus"];
/// At most this many log lines are quoted in a problem.
const LOG_LINES: usize = 5;

/// The state of recovery.
enum Standing {
    Replaying(Lsn),
    Paused(Lsn),
    Over,
}

/// A running PostgreSQL, killed when dropped.
pub struct Server<'a> {
    programs: &'a Programs,
    child: Child,
    /// The span of the process, from start to end.
    span: Span,
    socket: PathBuf,
    log: PathBuf,
    role: String,
    /// Settings for each session.
    options: String,
}

fn problem(message: String) -> Error {
    Error::new(Failure::Postgres, message)
}

impl<'a> Server<'a> {
    /// Starts PostgreSQL and returns without waiting for it.
    ///
    /// # Errors
    /// PostgreSQL cannot be started.
    pub async fn start(
        programs: &'a Programs,
        data: &Path,
        scratch: &Scratch,
        role: &str,
        major: u32,
    ) -> Result<Self, Error> {
        let socket = scratch.join("s");
        let file = |name: &str| scratch.join(name);
        let (conf, hba, ident) =
            (file("postgresql.conf"), file("pg_hba.conf"), file("pg_ident.conf"));
        let log = file("postgresql.log");
        let write = |path: &Path, text: &str| {
            fs::write(path, text).map_err(|error| local("write", path, &error))?;
            programs.give(path)
        };
        fs::create_dir(&socket).map_err(|error| local("make", &socket, &error))?;
        programs.give(&socket)?;
        // The socket is in a directory that only this user can enter, so everybody who reaches it is trusted.
        write(&hba, "local all all trust\n")?;
        write(&ident, "")?;
        // An empty file replaces the cluster's own, with its limits, includes and libraries. What recovery needs is
        // in postgresql.auto.conf, which has nothing else either.
        write(&conf, "")?;
        let out = File::create(&log).map_err(|error| local("make", &log, &error))?;
        let err = out.try_clone().map_err(|error| local("make", &log, &error))?;
        let postgres = programs.path("postgres").ok_or_else(|| {
            problem("start PostgreSQL: expected the program postgres, found none".into())
        })?;
        let span = trace::span("postgres");
        let mut command = span.in_scope(|| programs.command(&postgres));
        command.arg("-D").arg(data);
        let path = |path: &Path| path.display().to_string();
        for (name, value) in [
            ("config_file", path(&conf)),
            ("data_directory", path(data)),
            ("hba_file", path(&hba)),
            ("ident_file", path(&ident)),
            ("external_pid_file", String::new()),
            ("listen_addresses", String::new()),
            ("unix_socket_directories", path(&socket)),
            ("port", "5432".to_owned()),
            ("ssl", "off".to_owned()),
            // Nothing may leave this directory.
            ("archive_mode", "off".to_owned()),
            ("logging_collector", "off".to_owned()),
            ("log_destination", "stderr".to_owned()),
            ("log_min_messages", "log".to_owned()),
            ("hot_standby", "on".to_owned()),
            // A cluster may have in-place tablespaces; PostgreSQL panics over them without this setting.
            ("allow_in_place_tablespaces", "on".to_owned()),
            // The copy is thrown away, and has to fit beside everything else that runs on this machine.
            ("fsync", "off".to_owned()),
            ("shared_buffers", "128MB".to_owned()),
            ("huge_pages", "off".to_owned()),
            ("autovacuum", "off".to_owned()),
        ] {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        if major >= 17 {
            // A login trigger would otherwise run before the first query.
            command.args(["-c", "event_triggers=off"]);
        }
        command.stdin(Stdio::null()).stdout(out).stderr(err);
        let child = command.spawn().map_err(|error| local("start", &postgres, &error))?;
        let role = role.to_owned();
        Ok(Self { programs, child, span, socket, log, role, options: session_options(major) })
    }

    /// PostgreSQL's log so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// The last log lines of these kinds, without the errors of connections that came too early or too late.
    fn last_log_lines(&self, kinds: &[&str]) -> String {
        let log = self.log();
        let bad = log.lines().filter(|line| {
            kinds.iter().any(|word| line.contains(word))
                && !line.contains("the database system is ")
        });
        let bad: Vec<&str> = bad.collect();
        bad[bad.len().saturating_sub(LOG_LINES)..].join("; ")
    }

    /// Waits until recovery has ended and PostgreSQL is a primary; `replayed` is told how far it is.
    ///
    /// # Errors
    /// PostgreSQL ended, or it paused and waits for a person.
    pub async fn recovered(&mut self, replayed: impl Fn(Lsn)) -> Result<(), Error> {
        loop {
            if let Ok(Some(status)) = self.child.try_wait() {
                let words = self.last_log_lines(&ENDS);
                return Err(problem(format!("PostgreSQL ended in recovery ({status}): {words}")));
            }
            let log = self.log();
            // Earlier connections would each add a FATAL line to its log.
            if log.contains(READY) {
                match self.standing().await {
                    Ok(Standing::Over) => return Ok(()),
                    Ok(Standing::Paused(at)) => {
                        let words = self.last_log_lines(&PAUSES);
                        return Err(problem(format!(
                            "PostgreSQL paused recovery at {at}: {words}"
                        )));
                    }
                    Ok(Standing::Replaying(at)) => replayed(at),
                    // It will answer soon, or its log says why it does not.
                    Err(_) => {}
                }
            }
            if let Some(line) =
                log.lines().find(|l| l.contains("role \"") && l.contains("does not exist"))
            {
                return Err(problem(format!(
                    "{line}: set drill.user to a superuser of the cluster"
                )));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn standing(&self) -> Result<Standing, Error> {
        let mut client = match self.client("postgres").await {
            Ok(client) => client,
            // The cluster may not have a database postgres.
            Err(_) => self.client("template1").await?,
        };
        let sql = "SELECT pg_is_in_recovery(), \
                   CASE WHEN pg_is_in_recovery() THEN pg_get_wal_replay_pause_state() END, \
                   pg_last_wal_replay_lsn()";
        let rows = client.query(sql).await.map_err(|error| problem(error.to_string()))?;
        let cell = |n| rows.first().and_then(|row| row.text(n));
        let at = cell(2).and_then(|lsn| lsn.parse().ok()).unwrap_or(Lsn::ZERO);
        Ok(match (cell(0), cell(1)) {
            (Some("f"), _) => Standing::Over,
            (_, Some("paused")) => Standing::Paused(at),
            _ => Standing::Replaying(at),
        })
    }

    async fn client(&self, database: &str) -> Result<Client, Error> {
        let quote = |text: &str| text.replace('\\', r"\\").replace('\'', r"\'");
        let text = format!(
            "host='{}' port=5432 user='{}' dbname='{}' options='{}' sslmode=disable connect_timeout=10",
            quote(&self.socket.display().to_string()),
            quote(&self.role),
            quote(database),
            quote(&self.options)
        );
        let info = ConnInfo::parse(&text, &|_| None).map_err(|error| problem(error.to_string()))?;
        Client::connect_sql(&info).await.map_err(|error| problem(error.to_string()))
    }

    /// Runs SQL.
    ///
    /// # Errors
    /// PostgreSQL's error.
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

    /// Runs pg_amcheck and returns the problems that it finds.
    pub async fn amcheck(&self) -> Vec<String> {
        let Some(program) = self.programs.path("pg_amcheck") else {
            return vec!["pg_amcheck is not installed: tables and indexes were not checked".into()];
        };
        let mut command = self.programs.command(&program);
        command.args(["--all", "--install-missing", "--no-strict-names", "--username", &self.role]);
        command.arg("--host").arg(&self.socket).args(["--port", "5432"]);
        command.env("PGOPTIONS", &self.options);
        ran(command, "pg_amcheck").await
    }

    /// Stops PostgreSQL and returns the problems with that.
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
                vec![format!(
                    "PostgreSQL failed while it stopped ({status}): {}",
                    self.last_log_lines(&ENDS)
                )]
            }
            Ok(Err(error)) => vec![format!("wait for PostgreSQL to stop: {error}")],
            Err(_) => vec![format!("PostgreSQL did not stop within {STOP:?}")],
        }
    }
}

impl Drop for Server<'_> {
    fn drop(&mut self) {
        // The server processes would notice the postmaster's death by themselves; killing the process group is faster.
        let pid = self.child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        if let Some(pid) = pid {
            let _ = rustix::process::kill_process_group(pid, Signal::KILL);
        }
    }
}

/// Runs pg_checksums and returns the problems that it finds. Without a pg_checksums of exactly this version there are
/// none, since it only adds to the other checks: another version misreads pg_control and tablespaces, which would say
/// nothing about the backup.
pub async fn checksums(programs: &Programs, data: &Path) -> Vec<String> {
    let Some(program) = programs.beside("pg_checksums") else { return Vec::new() };
    let mut command = programs.command(&program);
    command.arg("--check").arg("-D").arg(data);
    ran(command, "pg_checksums").await
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

/// Session settings that override those of roles and databases (`ALTER ROLE … SET`): no time limits, nothing that
/// makes a good backup look bad, and nothing that makes a bad one look good.
fn session_options(major: u32) -> String {
    let mut options: Vec<&str> = vec![
        "statement_timeout=0",
        "lock_timeout=0",
        "idle_in_transaction_session_timeout=0",
        "idle_session_timeout=0",
        "temp_file_limit=-1",
        "default_transaction_read_only=off",
        "session_preload_libraries=",
        "local_preload_libraries=",
        "session_replication_role=origin",
        "role=none",
        "ignore_checksum_failure=off",
        "zero_damaged_pages=off",
        "ignore_system_indexes=off",
    ];
    if major >= 17 {
        options.push("transaction_timeout=0");
    }
    options.iter().map(|option| format!("-c {option}")).collect::<Vec<_>>().join(" ")
}
