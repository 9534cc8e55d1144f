//! The SQL session that holds a backup.
//!
//! PostgreSQL is in backup mode for as long as this session lives, and leaves it by itself when the session
//! ends, for whatever reason (<https://www.postgresql.org/docs/current/continuous-archiving.html#BACKUP-LOWLEVEL-BASE-BACKUP>):
//! so there is nothing to clean up but the connection, and dropping a [`Session`] always suffices. One that is
//! still waiting for its checkpoint is cancelled through a second connection, or it would wait to the end.
//! So it has to be a session of PostgreSQL's own: behind a connection pooler it would outlive us in backup mode, and the
//! backup could be ended in another one. One is told by its process number, and refused before anything is set.
//! Not cancel-safe: after a call was dropped half way, nothing but [`Session::abandon`] may follow.

use crate::{
    conninfo::ConnInfo,
    error::{Error, Failure},
    replication::{Client, Row, ServerVersion},
    streamer::sort,
};
use klio_pg::{Lsn, SegmentSize, TimelineId};
use std::{fmt, path::PathBuf, sync::Arc, time::Duration};

/// A spread checkpoint takes most of checkpoint_timeout, which is a day at most.
const PATIENCE: Duration = Duration::from_secs(25 * 3600);
/// For everything else.
const SHORT_PATIENCE: Duration = Duration::from_secs(60);

/// What PostgreSQL says about itself.
#[derive(Debug, Clone)]
pub struct Facts {
    /// `server_version_num`.
    pub version: ServerVersion,
    /// As pg_control has it.
    pub system_identifier: u64,
    /// Of WAL.
    pub segment_size: SegmentSize,
    /// Of the latest checkpoint.
    pub timeline: TimelineId,
    /// It is a standby.
    pub in_recovery: bool,
    /// Where its data directory is; `None` when we may not know.
    pub data_directory: Option<PathBuf>,
}

/// What pg_backup_start said.
#[derive(Debug, Clone, Copy)]
pub struct Started {
    /// WAL is needed from here on.
    pub start_lsn: Lsn,
    /// PostgreSQL's clock.
    pub at_unix: f64,
}

/// What pg_backup_stop said.
#[derive(Debug, Clone)]
pub struct Stopped {
    /// WAL is needed up to here.
    pub stop_lsn: Lsn,
    /// The timeline of that.
    pub timeline: TimelineId,
    /// For `backup_label`.
    pub backup_label: String,
    /// For `tablespace_map`; empty without tablespaces.
    pub tablespace_map: String,
    /// PostgreSQL's clock.
    pub at_unix: f64,
}

/// A connection that holds, or will hold, a backup.
pub struct Session {
    client: Client,
    info: Arc<ConnInfo>,
    pid: u32,
    starting: bool,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Session({}, pid {})", self.client.host(), self.pid)
    }
}

impl Session {
    /// Connects and asks what there is to know.
    ///
    /// # Errors
    /// PostgreSQL cannot be reached, refuses, or is too old.
    pub async fn open(info: Arc<ConnInfo>) -> Result<(Self, Facts), Error> {
        let mut client = Client::connect_sql(&info).await.map_err(|e| sort(&e))?;
        client.set_patience(SHORT_PATIENCE);
        own_session(&mut client).await?;
        let version = client.server_version().await.map_err(|e| sort(&e))?;
        if version.major() < 15 {
            let message =
                format!("back up PostgreSQL: expected version 15 or newer, found {version}");
            return Err(Error::new(Failure::PostgresRefused, message));
        }
        let segment_size = client.segment_size().await.map_err(|e| sort(&e))?;
        // A backup must not be cut short by limits that are meant for queries.
        // pg_control still names the old timeline between a promotion and the end of its checkpoint.
        let sql = "SET statement_timeout = 0; SET lock_timeout = 0; \
                   SET idle_session_timeout = 0; SET client_min_messages = error; \
                   SET application_name = 'klio backup'; SELECT pg_backend_pid(), \
                   (SELECT system_identifier FROM pg_control_system()), \
                   CASE WHEN pg_is_in_recovery() \
                    THEN (SELECT timeline_id FROM pg_control_checkpoint()) \
                    ELSE ('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::int \
                   END, pg_is_in_recovery()";
        let row = one(&mut client, "ask what PostgreSQL this is", sql).await?;
        let facts = Facts {
            version,
            segment_size,
            system_identifier: number(&row, 1, "a system identifier")?,
            timeline: timeline(&row, 2)?,
            in_recovery: row.text(3) == Some("t"),
            // Superusers and members of pg_read_all_settings may know it.
            data_directory: client.show("data_directory").await.ok().map(PathBuf::from),
        };
        let pid = number(&row, 0, "a process id")? as u32;
        Ok((Self { client, info, pid, starting: false }, facts))
    }

    /// pg_backup_start: waits for the checkpoint. `fast` writes it at once.
    ///
    /// # Errors
    /// As PostgreSQL says; most of all that the role may not.
    pub async fn start(&mut self, label: &str, fast: bool) -> Result<Started, Error> {
        self.starting = true;
        self.client.set_patience(PATIENCE);
        let sql = format!(
            "SELECT pg_backup_start({}, {fast}), extract(epoch FROM clock_timestamp()), pg_backend_pid()",
            quote(label)
        );
        let row = one(&mut self.client, "begin backup", &sql).await?;
        self.client.set_patience(SHORT_PATIENCE);
        self.starting = false;
        self.is_the_same(&row, 2)?;
        let at_unix = number_f64(&row, 1)?;
        Ok(Started { start_lsn: lsn(&row, 0)?, at_unix })
    }

    /// Looks whether session and role are still what they were.
    ///
    /// # Errors
    /// The connection is gone, or the standby was promoted.
    pub async fn ping(&mut self, was_in_recovery: bool) -> Result<(), Error> {
        let row =
            one(&mut self.client, "look after the backup", "SELECT pg_is_in_recovery()").await?;
        if was_in_recovery && row.text(0) != Some("t") {
            return Err(promoted());
        }
        Ok(())
    }

    /// pg_backup_stop. Waiting for WAL is ours: it does not go through archive_command.
    ///
    /// # Errors
    /// As PostgreSQL says; a standby that was promoted meanwhile, for one.
    pub async fn stop(&mut self, facts: &Facts) -> Result<Stopped, Error> {
        let op = "end backup";
        let before = self.followed_timeline(facts).await?;
        let sql = "SELECT lsn, labelfile, spcmapfile, extract(epoch FROM clock_timestamp()), pg_backend_pid() \
                   FROM pg_backup_stop(false)";
        let stopped = one(&mut self.client, op, sql).await;
        let row = match stopped {
            // pg_backup_stop: "the standby was promoted during online backup".
            Err(_) if facts.in_recovery && self.ping(true).await.is_err() => return Err(promoted()),
            other => other?,
        };
        self.is_the_same(&row, 4)?;
        let timeline = the_same(before, self.followed_timeline(facts).await?)?;
        // A map that is no text would be taken for none.
        let text = |column, expected| {
            let text = row.text(column).map(str::to_owned);
            text.ok_or_else(|| wrong(expected, None))
        };
        Ok(Stopped {
            stop_lsn: lsn(&row, 0)?,
            timeline,
            backup_label: text(1, "a backup label in UTF-8")?,
            tablespace_map: text(2, "a tablespace map in UTF-8")?,
            at_unix: number_f64(&row, 3)?,
        })
    }

    /// Whether the session that began the backup answers.
    fn is_the_same(&self, row: &Row, column: usize) -> Result<(), Error> {
        let pid = number(row, column, "a process id")?;
        if pid == u64::from(self.pid) {
            return Ok(());
        }
        Err(pooled(
            &format!("session {} answered instead of {}", pid, self.pid),
            self.client.host(),
        ))
    }

    /// The timeline that PostgreSQL is on: a standby may have followed its primary to another one.
    async fn followed_timeline(&mut self, facts: &Facts) -> Result<TimelineId, Error> {
        if !facts.in_recovery {
            return Ok(facts.timeline);
        }
        let sql = "SELECT coalesce(nullif(min_recovery_end_timeline, 0), \
                   (SELECT timeline_id FROM pg_control_checkpoint())) FROM pg_control_recovery()";
        timeline(&one(&mut self.client, "ask for the timeline", sql).await?, 0)
    }

    /// Tablespaces besides the default ones.
    ///
    /// # Errors
    /// A broken connection.
    pub async fn tablespaces(&mut self) -> Result<Vec<u32>, Error> {
        let sql = "SELECT oid FROM pg_tablespace WHERE spcname NOT IN ('pg_default', 'pg_global')";
        let rows = self.client.query(sql).await.map_err(|e| refused("list tablespaces", &e))?;
        rows.iter().map(|row| number(row, 0, "an OID").map(|oid| oid as u32)).collect()
    }

    /// Ends the session in good order, and with it the backup, if one is still running.
    pub async fn close(self) {
        self.client.close().await;
    }

    /// Ends it whatever it is doing.
    pub async fn abandon(self) {
        let Self { client, info, pid, starting } = self;
        drop(client);
        if !starting {
            return;
        }
        // A backend that waits for a checkpoint does not notice that we are gone.
        let cancel = async {
            let mut client = Client::connect_sql(&info).await.ok()?;
            client.query(&format!("SELECT pg_terminate_backend({pid})")).await.ok()?;
            client.close().await;
            Some(())
        };
        let done = tokio::time::timeout(Duration::from_secs(5), cancel).await;
        if !matches!(done, Ok(Some(()))) {
            tracing::warn!(pid, "the PostgreSQL session that waits for a checkpoint ends after it");
        }
    }
}

/// The login names the process that serves us (BackendKeyData); a pooler names one of its own making.
async fn own_session(client: &mut Client) -> Result<(), Error> {
    let row = one(client, "ask which session this is", "SELECT pg_backend_pid()").await?;
    let pid = number(&row, 0, "a process id")?;
    let told = client.peer_pid().map(u64::from);
    match told.filter(|told| *told != pid) {
        None => Ok(()),
        Some(told) => Err(pooled(
            &format!("the login was answered by process {told}, a query by {pid}"),
            client.host(),
        )),
    }
}

fn pooled(why: &str, host: &crate::conninfo::Host) -> Error {
    let message = format!(
        "back up PostgreSQL: expected a session of its own, found a connection pooler such as PgBouncer at {host} ({why})"
    );
    Error::new(Failure::Config, message)
        .hint("postgres.dsn must lead to PostgreSQL itself, best over its unix socket; the pooler stays for everybody else")
}

/// pg_backup_stop does not say the timeline of the position that it gives: it is known where it was the same before and
/// after. A record with the wrong one would be of a backup that no way leads through.
fn the_same(before: TimelineId, after: TimelineId) -> Result<TimelineId, Error> {
    if before == after {
        return Ok(after);
    }
    let message = format!(
        "back up a standby: it followed its primary from timeline {} to {} in the moment in which the backup ended",
        before.get(),
        after.get()
    );
    Err(Error::new(Failure::Postgres, message)
        .hint("take the backup again; what was sent is used again"))
}

fn promoted() -> Error {
    let message = "back up a standby: it was promoted while the backup ran";
    Error::new(Failure::Postgres, message)
        .hint("take the backup again; what was sent is used again")
}

/// What a backup does about an error of PostgreSQL.
fn refused(doing: &str, error: &crate::replication::Error) -> Error {
    let sorted = sort(error).during(doing);
    match error.server().map(|s| s.sqlstate.as_str()) {
        Some("42501") => Error { failure: Failure::PostgresRefused, ..sorted }.hint(
            "GRANT EXECUTE ON FUNCTION pg_backup_start(text, boolean), pg_backup_stop(boolean) TO the role, \
             in the database that klio connects to",
        ),
        Some("55000") => Error { failure: Failure::PostgresRefused, ..sorted }
            .hint("backups need wal_level = replica, and on a standby full_page_writes = on at the primary"),
        _ => sorted,
    }
}

async fn one(client: &mut Client, doing: &str, sql: &str) -> Result<Row, Error> {
    let rows = client.query(sql).await.map_err(|e| refused(doing, &e))?;
    rows.into_iter().next_back().ok_or_else(|| {
        Error::new(Failure::Postgres, format!("{doing}: expected a row, found none"))
    })
}

fn wrong(expected: &str, found: Option<&str>) -> Error {
    Error::new(Failure::Postgres, format!("ask PostgreSQL: expected {expected}, found {found:?}"))
}

/// System identifiers are signed in SQL.
fn number(row: &Row, column: usize, expected: &str) -> Result<u64, Error> {
    let text = row.text(column);
    text.and_then(|t| t.parse::<i64>().ok()).map(|n| n as u64).ok_or_else(|| wrong(expected, text))
}

fn number_f64(row: &Row, column: usize) -> Result<f64, Error> {
    let text = row.text(column);
    text.and_then(|t| t.parse().ok()).ok_or_else(|| wrong("a time", text))
}

fn lsn(row: &Row, column: usize) -> Result<Lsn, Error> {
    let text = row.text(column);
    text.and_then(|t| t.parse().ok()).ok_or_else(|| wrong("an LSN", text))
}

fn timeline(row: &Row, column: usize) -> Result<TimelineId, Error> {
    let number = number(row, column, "a timeline")?;
    TimelineId::new(number as u32).ok_or_else(|| wrong("a timeline", row.text(column)))
}

/// A string literal that means the same whatever standard_conforming_strings is.
fn quote(text: &str) -> String {
    format!("E'{}'", text.replace('\\', "\\\\").replace('\'', "''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_cannot_leave_its_literal() {
        assert_eq!(quote(r"it's \ here"), r"E'it''s \\ here'");
    }
}
