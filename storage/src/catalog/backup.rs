//! One record for each base backup: `<cluster>/backups/<name>.json`, in the shape of `crate::record`.
//!
//! Written last and atomically, by the server, when everything it names is durable: a backup without a
//! record does not exist. Never changed afterwards; what is learnt later (verification, drills, tier 2)
//! is kept beside it. Times are Unix seconds: of PostgreSQL's clock where the name says `postgres`,
//! because recovery targets are in that clock, else of the server's.

use crate::{layout::BackupName, record::Unknown};
use klio_pg::{Lsn, TimelineId};
use serde::{Deserialize, Serialize};

/// A base backup.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BackupRecord {
    /// Its name.
    pub name: BackupName,
    /// Of the cluster that was backed up; text, as many JSON readers round large numbers.
    pub system_identifier: String,
    /// `server_version_num`, for example 150018.
    pub postgres_version: u32,
    /// Bytes.
    pub segment_size: u32,
    /// The timeline it began on, from backup_label's START TIMELINE.
    pub start_timeline: TimelineId,
    /// backup_label's START WAL LOCATION: WAL is needed from here on.
    pub start_lsn: Lsn,
    /// The timeline it ended on.
    pub stop_timeline: TimelineId,
    /// WAL is needed up to here, or the backup is not consistent.
    pub stop_lsn: Lsn,
    /// When pg_backup_start returned.
    pub started_postgres_unix: f64,
    /// When pg_backup_stop returned: the earliest time that can be recovered to.
    pub stopped_postgres_unix: f64,
    /// When the work began, in the clock of the machine that did it.
    pub begun_unix: f64,
    /// When the record was committed, in the server's clock; set by the server.
    pub committed_unix: f64,
    /// Seconds from beginning to commit.
    pub duration_seconds: f64,
    /// Taken from a standby.
    pub from_standby: bool,
    /// The snapshot in the repository: 64 hexadecimal digits.
    pub snapshot: String,
    /// What pg_backup_stop gave; also a file of the snapshot.
    pub backup_label: String,
    /// What pg_backup_stop gave; empty without tablespaces.
    #[serde(default)]
    pub tablespace_map: String,
    /// Besides the default ones.
    #[serde(default)]
    pub tablespaces: Vec<TablespaceRecord>,
    /// Bytes of all files, before deduplication and compression.
    pub size_bytes: u64,
    /// Files in it.
    pub files: u64,
    /// Directories in it.
    pub directories: u64,
    /// Bytes that were new, before compression.
    pub added_bytes: u64,
    /// Bytes that were added to the repository.
    pub stored_bytes: u64,
    /// How page checksums went.
    pub pages: PagesRecord,
    /// What the user called it.
    #[serde(default)]
    pub label: Option<String>,
    /// Never expires by policy.
    #[serde(default)]
    pub keep: bool,
    /// When a person gave it the time that is in `committed_unix`: the server's clock had been wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub redated_unix: Option<f64>,
    /// Version of the klio that took it.
    pub klio_version: String,
    /// What a newer version says besides.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// A tablespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TablespaceRecord {
    /// Its OID; `tablespaces/<oid>/` in the snapshot.
    pub oid: u32,
    /// Where it lay.
    pub location: String,
    /// What a newer version says besides.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// Page checksums seen while reading.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PagesRecord {
    /// The cluster has data checksums.
    pub enabled: bool,
    /// Pages that were checked.
    pub checked: u64,
    /// Pages whose checksum is wrong, and which were read again: how many.
    pub bad: u64,
    /// The first hundred of them.
    #[serde(default)]
    pub examples: Vec<BadPage>,
    /// What a newer version says besides.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// A page whose checksum is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BadPage {
    /// Relative to the data directory.
    pub file: String,
    /// Block number in the relation's fork.
    pub block: u64,
    /// As computed.
    pub expected: u16,
    /// As found in the page.
    pub found: u16,
}

/// Result of a verification.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VerifyOutcome {
    /// The backups that were looked at.
    pub backups: Vec<BackupName>,
    /// Nothing is damaged, or all that was is good again.
    pub ok: bool,
    /// Server's clock.
    pub finished_unix: f64,
    /// Seconds.
    pub duration_seconds: f64,
    /// Share of the data that was read, 0 to 100.
    pub read_percent: f64,
    /// All data of the repository was read since then, in this run or in the ones before it, Unix seconds; `None` while that
    /// was never come to its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub all_read_since_unix: Option<f64>,
    /// Bytes read in both tiers.
    pub read_bytes: u64,
    /// Files looked at in both tiers.
    pub files: u64,
    /// What is damaged or missing and could not be repaired.
    pub damaged: Vec<Damage>,
    /// What was damaged or missing in one tier and is good again.
    pub repaired: Vec<Damage>,
}

/// A stored file that is not what was stored.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Damage {
    /// `tier1` or `tier2`.
    pub tier: String,
    /// Its key.
    pub key: String,
    /// What was expected and found.
    pub problem: String,
}

/// Result of a restore drill.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DrillOutcome {
    /// Which backup was restored.
    pub backup: BackupName,
    /// Everything asked for was done and found good.
    pub ok: bool,
    /// Clock of the machine that did it, but never later than the server's when it was told.
    pub finished_unix: f64,
    /// Seconds until all files were there.
    pub restore_seconds: f64,
    /// Seconds from starting PostgreSQL until it was consistent and at its end of WAL.
    pub recovery_seconds: f64,
    /// Seconds of pg_amcheck and the query.
    pub check_seconds: f64,
    /// Where recovery ended.
    pub recovered_lsn: Option<Lsn>,
    /// What was wrong.
    pub problems: Vec<String>,
    /// What a newer version says besides.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// Result of maintenance.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct MaintenanceOutcome {
    /// Server's clock.
    pub finished_unix: f64,
    /// Seconds.
    pub duration_seconds: f64,
    /// Backups that are gone, from every tier.
    pub expired: Vec<BackupName>,
    /// Backups of which tier 1 no longer keeps its own copy.
    pub evicted: Vec<BackupName>,
    /// Bytes freed in tier 1.
    pub freed_tier1_bytes: u64,
    /// Bytes freed in tier 2.
    pub freed_tier2_bytes: u64,
    /// WAL files removed from tier 1.
    pub wal_removed_tier1: u64,
    /// WAL files removed from tier 2.
    pub wal_removed_tier2: u64,
    /// Packs that are marked, and go at a later run.
    pub packs_marked: u64,
    /// Packs that went.
    pub packs_removed: u64,
    /// Why less was done than the plan says.
    pub held_back: Vec<String>,
    /// The plan had to be empty, for one of these reasons. Of a run that made no plan: the last one that did.
    #[serde(default)]
    pub alarm: bool,
    /// Those reasons. Absent in an outcome of an earlier version: then what was held back has them first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alarms: Option<Vec<String>>,
}
