//! Questions and orders in SQL.

use super::{DEADLINE, Postgres, Session};
use crate::wait;
use klio_pg::{Lsn, SegmentName, SegmentSize, TimelineId};

impl Postgres {
    /// A new connection over the unix socket.
    ///
    /// # Panics
    /// When PostgreSQL does not accept it.
    pub async fn session(&self) -> Session {
        Session::connect(&self.conninfo())
            .await
            .unwrap_or_else(|e| panic!("connect to PostgreSQL {}: {e:?}", self.major))
    }

    /// Runs SQL on a connection of its own and returns all rows as text.
    ///
    /// # Panics
    /// When it fails.
    pub async fn rows(&self, sql: &str) -> Vec<Vec<String>> {
        let session = self.session().await;
        session.rows(sql).await.unwrap_or_else(|e| panic!("run {sql}: {e:?}"))
    }

    /// Runs SQL and returns the first column of the first row.
    ///
    /// # Panics
    /// When it fails or returns no row.
    pub async fn value(&self, sql: &str) -> String {
        let rows = self.rows(sql).await;
        let value = rows.into_iter().next().and_then(|row| row.into_iter().next());
        value.unwrap_or_else(|| panic!("run {sql}: no row"))
    }

    /// Runs SQL for its effect.
    ///
    /// # Panics
    /// When it fails.
    pub async fn execute(&self, sql: &str) {
        self.rows(sql).await;
    }

    async fn lsn(&self, sql: &str) -> Lsn {
        let value = self.value(sql).await;
        value.parse().unwrap_or_else(|e| panic!("run {sql}: expected an LSN, found {value}: {e}"))
    }

    /// End of WAL written so far, flushed or not.
    ///
    /// # Panics
    /// On a standby.
    pub async fn insert_lsn(&self) -> Lsn {
        self.lsn("SELECT pg_current_wal_insert_lsn()").await
    }

    /// End of WAL flushed so far.
    ///
    /// # Panics
    /// On a standby.
    pub async fn flush_lsn(&self) -> Lsn {
        self.lsn("SELECT pg_current_wal_flush_lsn()").await
    }

    /// Ends the current segment (writing a record first, so that there is something to end) and returns the LSN at its end.
    ///
    /// # Panics
    /// On a standby.
    pub async fn switch_wal(&self) -> Lsn {
        self.lsn("SELECT pg_logical_emit_message(false, 'klio', 'switch'); SELECT pg_switch_wal()")
            .await;
        self.flush_lsn().await
    }

    /// Writes about this many bytes of incompressible WAL, in messages of up to 64 KiB, and returns the flushed LSN.
    ///
    /// # Panics
    /// On a standby.
    pub async fn write_wal(&self, bytes: u64) -> Lsn {
        const MESSAGE: u64 = 64 * 1024;
        // 2048 times 32 bytes of md5 text: 64 KiB.
        self.execute(&format!(
            "SELECT pg_logical_emit_message(false, 'klio', (SELECT string_agg(md5(random()::text), '') \
             FROM generate_series(1, 2048 + 0 * n))) FROM generate_series(1, {}) n; \
             SELECT pg_logical_emit_message(true, 'klio', 'flush')",
            bytes.div_ceil(MESSAGE)
        ))
        .await;
        self.flush_lsn().await
    }

    /// WAL segment size.
    ///
    /// # Panics
    /// When it is none.
    pub async fn segment_size(&self) -> SegmentSize {
        let value = self.value("SELECT bytes_per_wal_segment FROM pg_control_init()").await;
        let bytes: u32 = value.parse().expect("a segment size is a number");
        SegmentSize::new(bytes).expect("PostgreSQL's segment size is a valid one")
    }

    /// The segment that holds the byte at this LSN (on the boundary `pg_walfile_name` names the one before).
    pub async fn segment_of(&self, lsn: Lsn) -> SegmentName {
        SegmentName::containing(self.timeline().await, lsn, self.segment_size().await)
    }

    /// System identifier.
    ///
    /// # Panics
    /// When it is no number.
    pub async fn system_identifier(&self) -> u64 {
        let value = self.value("SELECT system_identifier FROM pg_control_system()").await;
        value.parse().expect("a system identifier is a number")
    }

    /// Timeline, as of the last checkpoint.
    ///
    /// # Panics
    /// When it is no timeline.
    pub async fn timeline(&self) -> TimelineId {
        let value = self.value("SELECT timeline_id FROM pg_control_checkpoint()").await;
        let number: u32 = value.parse().expect("a timeline is a number");
        TimelineId::new(number).expect("a timeline begins at 1")
    }

    /// As `ALTER SYSTEM SET`, for one that does not run.
    pub fn set_in_file(&self, name: &str, value: &str) {
        let line = format!("{name} = '{}'\n", value.replace('\'', "''"));
        super::builder::append(&self.data_dir().join("postgresql.auto.conf"), &line);
    }

    /// `ALTER SYSTEM SET` and reload.
    ///
    /// # Panics
    /// When the setting is refused.
    pub async fn set(&self, name: &str, value: &str) {
        let session = self.session().await;
        let value = value.replace('\'', "''");
        // Two calls: ALTER SYSTEM does not run in the implicit transaction of several statements.
        for sql in
            [format!("ALTER SYSTEM SET {name} = '{value}'"), "SELECT pg_reload_conf()".into()]
        {
            session.rows(&sql).await.unwrap_or_else(|e| panic!("run {sql}: {e:?}"));
        }
    }

    /// Waits until SQL that returns one boolean returns true.
    ///
    /// # Panics
    /// When it does not within a minute.
    pub async fn wait_true(&self, sql: &str) {
        wait::eventually(sql, DEADLINE, || async { self.value(sql).await == "t" }).await;
    }
}
