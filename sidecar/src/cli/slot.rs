//! `klio slot show` and `klio slot drop`. A slot that nobody uses any more fills PostgreSQL's disk.

use super::{conninfo, exit, print, table, text};
use crate::{
    config::Config,
    error::{Error, Failure},
    replication::{Client, SlotName},
};

/// What pg_replication_slots says about one slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SlotRow {
    pub active: bool,
    /// `reserved`, `extended`, `unreserved` or `lost`; empty if the slot keeps no WAL.
    pub wal_status: String,
    pub restart_lsn: Option<String>,
    pub retained_bytes: Option<u64>,
}

pub(super) fn name(config: &Config) -> Result<SlotName, Error> {
    let slot = &config.postgres.slot;
    slot.parse().map_err(|error| Error::new(Failure::Config, format!("postgres.slot: {error}")))
}

pub(super) async fn read(client: &mut Client, slot: &SlotName) -> Result<Option<SlotRow>, Error> {
    // Slot names cannot contain characters that need quoting.
    let sql = format!(
        "SELECT active, coalesce(wal_status, ''), restart_lsn, pg_wal_lsn_diff(CASE WHEN \
         pg_is_in_recovery() THEN coalesce(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn()) \
         ELSE pg_current_wal_lsn() END, restart_lsn)::bigint \
         FROM pg_replication_slots WHERE slot_name = '{slot}'"
    );
    let rows = client.query(&sql).await?;
    Ok(rows.first().map(|row| SlotRow {
        active: row.text(0) == Some("t"),
        wal_status: row.text(1).unwrap_or_default().to_owned(),
        restart_lsn: row.text(2).map(str::to_owned),
        retained_bytes: row.text(3).and_then(|t| t.parse::<i64>().ok()).map(|n| n.max(0) as u64),
    }))
}

/// `klio slot show`
pub(super) async fn show(config: &Config) -> Result<u8, Error> {
    let slot = name(config)?;
    let mut client = Client::connect_sql(&conninfo(config)?).await?;
    let found = read(&mut client, &slot).await?;
    client.close().await;
    let Some(row) = found else {
        return Err(Error::new(
            Failure::PostgresRefused,
            format!("read slot {slot}: it does not exist"),
        )
        .hint("klio stream creates it"));
    };
    let cells = vec![vec![
        slot.to_string(),
        if row.active { "streaming" } else { "idle" }.into(),
        if row.wal_status.is_empty() { "keeps nothing".into() } else { row.wal_status },
        row.restart_lsn.unwrap_or_else(|| "-".into()),
        row.retained_bytes.map_or_else(|| "-".into(), text::size),
    ]];
    print(&table::render(&["SLOT", "STATE", "WAL", "RESTART LSN", "RETAINED"], &cells));
    Ok(exit::OK)
}

/// `klio slot drop`
pub(super) async fn drop_slot(config: &Config) -> Result<u8, Error> {
    let slot = name(config)?;
    let mut client = Client::connect(&conninfo(config)?).await?;
    client.drop_slot(&slot).await?;
    client.close().await;
    print(&format!("slot {slot} dropped: PostgreSQL keeps no WAL for Klio any more\n"));
    Ok(exit::OK)
}
