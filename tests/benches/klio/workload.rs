//! A durable PostgreSQL whose slot `base` holds the WAL of one `pgbench -i`: made once, drained many times.
//!
//! Each run drains a copy of the slot, so that every run gets the same bytes from the same page cache. Everything older
//! runs left dirty is on disk before the next begins.

use klio_pg::{Lsn, SegmentSize};
use klio_tests::{postgres::Postgres, wait::eventually};
use std::{cell::Cell, time::Duration};

/// The WAL to drain.
pub struct Workload {
    /// Where it is.
    pub pg: Postgres,
    /// First byte: the start of a segment.
    pub start: Lsn,
    /// One past the last byte: the end of a segment. PostgreSQL has some more bytes.
    pub end: Lsn,
    /// Segment size.
    pub segment: SegmentSize,
    copies: Cell<u32>,
}

impl Workload {
    /// Makes the WAL of `pgbench -i -s SCALE`.
    pub async fn new(scale: u32) -> Self {
        let pg = Postgres::builder()
            .durable()
            .set("shared_buffers", "256MB")
            .set("max_wal_size", "32GB")
            .set("checkpoint_timeout", "1h")
            .set("autovacuum", "off")
            .start()
            .await;
        eprintln!("making the WAL of pgbench -i -s {scale}");
        pg.execute("CHECKPOINT; SELECT pg_create_physical_replication_slot('base', true)").await;
        let segment = pg.segment_size().await;
        let restart = pg.value("SELECT restart_lsn FROM pg_replication_slots").await;
        let restart: Lsn = restart.parse().expect("restart_lsn is an LSN");
        pg.pgbench(&["-i", "-q", "-s", &scale.to_string()]).await;
        let end = pg.switch_wal().await.segment_start(segment);
        // Something after the end, so that pg_receivewal sees that it has reached it.
        pg.execute("CHECKPOINT").await;
        pg.write_wal(1).await;
        let load =
            Self { pg, start: restart.segment_start(segment), end, segment, copies: Cell::new(0) };
        eprintln!("{:.0} MB of WAL, {} segments", load.megabytes(), load.segments());
        load
    }

    /// Millions of bytes.
    pub fn megabytes(&self) -> f64 {
        megabytes(self.end.bytes_since(self.start))
    }

    /// How many segments it fills.
    pub fn segments(&self) -> u64 {
        self.end.bytes_since(self.start) / self.segment.bytes()
    }

    /// A new copy of the slot, with a quiet disk.
    pub async fn slot(&self) -> String {
        let number = self.copies.get() + 1;
        self.copies.set(number);
        let slot = format!("run{number}");
        self.pg
            .execute(&format!("SELECT pg_copy_physical_replication_slot('base', '{slot}')"))
            .await;
        settle_disk().await;
        slot
    }

    /// Drops a copy once its walsender is gone.
    pub async fn drop_slot(&self, slot: &str) {
        let sql = format!(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots \
             WHERE slot_name = '{slot}' AND NOT active"
        );
        eventually("the slot to be dropped", Duration::from_secs(60), || async {
            let session = self.pg.session().await;
            session.rows(&sql).await.is_ok_and(|rows| rows.len() == 1)
        })
        .await;
    }
}

/// Bytes in millions.
pub fn megabytes(bytes: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "gigabytes")]
    let bytes = bytes as f64;
    bytes / 1e6
}

/// Waits until nothing is left to be written, so that no run pays for the one before.
pub async fn settle_disk() {
    let synced = tokio::task::spawn_blocking(rustix::fs::sync).await;
    synced.expect("sync does not panic");
}
