//! The SQL session that holds a backup.
//!
//! PostgreSQL is in backup mode for as long as this session lives, and leaves backup mode by itself when the session
//! ends for any reason
//! (<https://www.postgresql.org/docs/current/continuous-archiving.html#BACKUP-LOWLEVEL-BASE-BACKUP>). So only the
//! connection has to be cleaned up, and dropping a [`Session`] always suffices. A session that still waits for its
//! checkpoint is terminated through a second connection, because it would otherwise wait until the checkpoint is
//! done.
//!
//! The session must be PostgreSQL's own. Behind a connection pooler it would stay in backup mode after we are gone,
//! and pg_backup_stop could reach another session. A pooler is recognised by the process number and refused before
//! anything starts.
//!
//! Not cancel-safe: after a call was dropped half way, only [`Session::abandon`] may follow.

use crate::{
    conninfo::ConnInfo,
    error::{Error, Failure},
    replication::{Client, Row, ServerVersion},
};
use klio_pg::{Lsn, SegmentSize, TimelineId};
use std::{fmt, path::PathBuf, sync::Arc, time::Duration};

/// A spread checkpoint takes most of checkpoint_timeout, which is one day at most.
const PATIENCE: Duration = Duration::from_secs(25 * 3600);
/// Timeout of all other queries.
const SHORT_PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Clone)]
pub struct Facts {
    /// `server_version_num`.
    pub version: ServerVersion,
    /// As in pg_control.
    pub system_identifier: u64,
    /// Size of a WAL segment.
    pub segment_size: SegmentSize,
    /// On a primary, the timeline that WAL is written to; on a standby, the timeline of the latest checkpoint.
    pub timeline: TimelineId,
    /// Whether it is a standby.
    pub in_recovery: bool,
    /// Path of the data directory; `None` if the role may not see it.
    pub data_directory: Option<PathBuf>,
}

/// The result of pg_backup_start.
#[derive(Debug, Clone, Copy)]
pub struct Started {
    /// WAL is needed from here.
    pub start_lsn: Lsn,
    /// Unix time by PostgreSQL's clock.
    pub at_unix: f64,
}

/// The result of pg_backup_stop.
#[derive(Debug, Clone)]
pub struct Stopped {
    /// WAL is needed up to here.
    pub stop_lsn: Lsn,
    /// The timeline of `stop_lsn`.
    pub timeline: TimelineId,
    /// Content of `backup_label`.
    pub backup_label: String,
    /// Content of `tablespace_map`; empty without tablespaces.
    pub tablespace_map: String,
    /// Unix time by PostgreSQL's clock.
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
    /// Connects and queries [`Facts`].
    ///
    /// # Errors
    /// PostgreSQL cannot be reached, refuses, is too old, or there is a connection pooler in between.
    pub async fn open(info: Arc<ConnInfo>) -> Result<(Self, Facts), Error> {
        let mut client = Client::connect_sql(&info).await?;
        client.set_patience(SHORT_PATIENCE);
        own_session(&mut client).await?;
        let version = client.server_version().await?;
        if version.major() < 15 {
            let message =
                format!("back up PostgreSQL: expected version 15 or newer, found {version}");
            return Err(Error::new(Failure::PostgresRefused, message));
        }
        let segment_size = client.segment_size().await?;
        // A backup must not be interrupted by timeouts that are meant for queries. On a primary the timeline is taken
        // from the current WAL position, because pg_control still names the old one between a promotion and the end
        // of its checkpoint.
        let sql = "SET statement_timeout = 0; SET lock_timeout = 0; \
                   SET idle_session_timeout = 0; SET client_min_messages = error; \
                   SET application_name = 'klio backup'; SELECT pg_backend_pid(), \
                   (SELECT system_identifier FROM pg_control_system()), \
                   CASE WHEN pg_is_in_recovery() \
                    THEN (SELECT timeline_id FROM pg_control_checkpoint()) \
                    ELSE ('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::int \
                   END, pg_is_in_recovery()";
        let row = one(&mut client, "identify PostgreSQL", sql).await?;
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

    /// Calls pg_backup_start, which waits for a checkpoint; with `fast` the checkpoint is written at once.
    ///
    /// # Errors
    /// PostgreSQL's error, most often missing permissions of the role.
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

    /// Checks that the session is alive and a standby is still a standby.
    ///
    /// # Errors
    /// The connection is gone, or the standby was promoted.
    pub async fn ping(&mut self, was_in_recovery: bool) -> Result<(), Error> {
        let row =
            one(&mut self.client, "check the backup session", "SELECT pg_is_in_recovery()").await?;
        if was_in_recovery && row.text(0) != Some("t") {
            return Err(promoted());
        }
        Ok(())
    }

    /// Calls pg_backup_stop without waiting for WAL: Klio waits for it itself, because it does not use
    /// archive_command.
    ///
    /// # Errors
    /// PostgreSQL's error, for example because a standby was promoted meanwhile.
    pub async fn stop(&mut self, facts: &Facts) -> Result<Stopped, Error> {
        let op = "end backup";
        let before = self.followed_timeline(facts).await?;
        let sql = "SELECT lsn, labelfile, spcmapfile, extract(epoch FROM clock_timestamp()), pg_backend_pid() \
                   FROM pg_backup_stop(false)";
        let stopped = one(&mut self.client, op, sql).await;
        let row = match stopped {
            // pg_backup_stop fails with "the standby was promoted during online backup".
            Err(_) if facts.in_recovery && self.ping(true).await.is_err() => return Err(promoted()),
            other => other?,
        };
        self.is_the_same(&row, 4)?;
        let timeline = the_same(before, self.followed_timeline(facts).await?)?;
        // A map that is not UTF-8 would look like no map.
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

    /// Checks that the session that began the backup answers.
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

    /// The timeline that PostgreSQL is on now: a standby may have followed its primary to another one.
    async fn followed_timeline(&mut self, facts: &Facts) -> Result<TimelineId, Error> {
        if !facts.in_recovery {
            return Ok(facts.timeline);
        }
        let sql = "SELECT coalesce(nullif(min_recovery_end_timeline, 0), \
                   (SELECT timeline_id FROM pg_control_checkpoint())) FROM pg_control_recovery()";
        timeline(&one(&mut self.client, "ask for the timeline", sql).await?, 0)
    }

    /// The OIDs of the tablespaces other than pg_default and pg_global.
    ///
    /// # Errors
    /// The query failed.
    pub async fn tablespaces(&mut self) -> Result<Vec<u32>, Error> {
        let sql = "SELECT oid FROM pg_tablespace WHERE spcname NOT IN ('pg_default', 'pg_global')";
        let rows = self.client.query(sql).await.map_err(|e| refused("list tablespaces", &e))?;
        rows.iter().map(|row| number(row, 0, "an OID").map(|oid| oid as u32)).collect()
    }

    /// Closes the session cleanly, which also ends a backup that is still running.
    pub async fn close(self) {
        self.client.close().await;
    }

    /// Ends the session whatever it is doing.
    pub async fn abandon(self) {
        let Self { client, info, pid, starting } = self;
        drop(client);
        if !starting {
            return;
        }
        // A backend that waits for a checkpoint does not notice a closed connection.
        let cancel = async {
            let mut client = Client::connect_sql(&info).await.ok()?;
            client.query(&format!("SELECT pg_terminate_backend({pid})")).await.ok()?;
            client.close().await;
            Some(())
        };
        let done = tokio::time::timeout(Duration::from_secs(5), cancel).await;
        if !matches!(done, Ok(Some(()))) {
            tracing::warn!(
                pid,
                "cannot terminate the PostgreSQL session; it ends after its checkpoint"
            );
        }
    }
}

/// Compares the process number from the login (BackendKeyData) with that of the backend: a pooler sends a number of
/// its own.
async fn own_session(client: &mut Client) -> Result<(), Error> {
    let row = one(client, "identify the session", "SELECT pg_backend_pid()").await?;
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
        .hint("point postgres.dsn at PostgreSQL itself, preferably its unix socket; other clients can keep using the pooler")
}

/// pg_backup_stop does not return the timeline of the position that it returns. The timeline is certain only if it
/// was the same before and after. With a wrong timeline in its record, a backup could never be restored.
fn the_same(before: TimelineId, after: TimelineId) -> Result<TimelineId, Error> {
    if before == after {
        return Ok(after);
    }
    let message = format!(
        "back up a standby: it followed its primary from timeline {} to {} just when the backup ended",
        before.get(),
        after.get()
    );
    Err(Error::new(Failure::Postgres, message)
        .hint("take the backup again; it reuses what was sent"))
}

fn promoted() -> Error {
    let message = "back up a standby: it was promoted while the backup ran";
    Error::new(Failure::Postgres, message).hint("take the backup again; it reuses what was sent")
}

/// Turns an error of PostgreSQL into one with a hint for backups.
fn refused(doing: &str, error: &crate::replication::Error) -> Error {
    let sorted = Error::from(error).during(doing);
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

/// System identifiers are signed integers in SQL.
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

/// A string literal that is valid whatever standard_conforming_strings is.
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
