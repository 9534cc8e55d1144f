//! One record for each base backup: `<cluster>/backups/<name>.json`, in the format of `crate::record`.
//!
//! The server writes it last and atomically, when everything that it names is durable: a backup without a record does
//! not exist. It is not changed afterwards; what is learnt later (verification, drills, tier 2) is stored in other
//! files. Times are Unix seconds: of PostgreSQL's clock where the field's name says `postgres`, because recovery
//! targets refer to that clock, otherwise of the server's clock.

use crate::{layout::BackupName, record::Unknown};
use klio_pg::{Lsn, TimelineId};
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BackupRecord {
    pub name: BackupName,
    /// Of the cluster that was backed up; a string, because many JSON readers round large numbers.
    pub system_identifier: String,
    /// `server_version_num`, for example 150018.
    pub postgres_version: u32,
    /// In bytes.
    pub segment_size: u32,
    /// The timeline it began on, from backup_label's START TIMELINE.
    pub start_timeline: TimelineId,
    /// backup_label's START WAL LOCATION: WAL is needed from here on.
    pub start_lsn: Lsn,
    /// The timeline it ended on.
    pub stop_timeline: TimelineId,
    /// WAL is needed up to here; before that the restored cluster is not consistent.
    pub stop_lsn: Lsn,
    /// When pg_backup_start returned.
    pub started_postgres_unix: f64,
    /// When pg_backup_stop returned: the earliest time that can be recovered to.
    pub stopped_postgres_unix: f64,
    /// When the backup began, in the clock of the machine that took it.
    pub begun_unix: f64,
    /// When the record was committed, in the server's clock; set by the server.
    pub committed_unix: f64,
    /// Seconds from the beginning to the commit.
    pub duration_seconds: f64,
    /// Whether it was taken from a standby.
    pub from_standby: bool,
    /// The id of the snapshot in the repository: 64 hexadecimal digits.
    pub snapshot: String,
    /// The output of pg_backup_stop; also a file in the snapshot.
    pub backup_label: String,
    /// The output of pg_backup_stop; empty without tablespaces.
    #[serde(default)]
    pub tablespace_map: String,
    /// Tablespaces other than the default ones.
    #[serde(default)]
    pub tablespaces: Vec<TablespaceRecord>,
    /// Bytes of all files, before deduplication and compression.
    pub size_bytes: u64,
    pub files: u64,
    pub directories: u64,
    /// Bytes of new content, before compression.
    pub added_bytes: u64,
    /// Bytes that were added to the repository.
    pub stored_bytes: u64,
    /// The result of checking page checksums.
    pub pages: PagesRecord,
    /// Free text from the user.
    #[serde(default)]
    pub label: Option<String>,
    /// The backup never expires by policy.
    #[serde(default)]
    pub keep: bool,
    /// When a person corrected the time in `committed_unix` because the server's clock had been wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub redated_unix: Option<f64>,
    /// Version of the klio that took it.
    pub klio_version: String,
    /// Fields that a newer version wrote.
    #[serde(flatten)]
    pub unknown: Unknown,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TablespaceRecord {
    /// The tablespace's OID; its directory in the snapshot is `tablespaces/<oid>/`.
    pub oid: u32,
    /// Its original path.
    pub location: String,
    /// Fields that a newer version wrote.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// The result of checking page checksums while reading.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PagesRecord {
    /// Whether the cluster has data checksums.
    pub enabled: bool,
    /// Number of pages that were checked.
    pub checked: u64,
    /// Number of pages whose checksum was still wrong after they were read again.
    pub bad: u64,
    /// The first hundred of them.
    #[serde(default)]
    pub examples: Vec<BadPage>,
    /// Fields that a newer version wrote.
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
    /// The computed checksum.
    pub expected: u16,
    /// The checksum in the page.
    pub found: u16,
}

/// Result of a verification.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VerifyOutcome {
    /// The backups that were verified.
    pub backups: Vec<BackupName>,
    /// Nothing is damaged, or everything that was has been repaired.
    pub ok: bool,
    /// In the server's clock.
    pub finished_unix: f64,
    pub duration_seconds: f64,
    /// Percentage of the data that was read, 0 to 100.
    pub read_percent: f64,
    /// All data of the repository was read since then, in this run or in earlier ones, Unix seconds; `None` until a
    /// full pass has been completed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub all_read_since_unix: Option<f64>,
    /// Bytes read in both tiers.
    pub read_bytes: u64,
    /// Files checked in both tiers.
    pub files: u64,
    /// Files that are damaged or missing and could not be repaired.
    pub damaged: Vec<Damage>,
    /// Files that were damaged or missing in one tier and have been repaired.
    pub repaired: Vec<Damage>,
}

/// A stored file that is damaged or missing.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Damage {
    /// `tier1` or `tier2`.
    pub tier: String,
    pub key: String,
    /// What was expected and what was found.
    pub problem: String,
}

/// Result of a restore drill.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DrillOutcome {
    pub backup: BackupName,
    /// Whether everything that was requested was done and no problem was found.
    pub ok: bool,
    /// In the clock of the machine that ran the drill, but never later than the server's clock when the result arrived.
    pub finished_unix: f64,
    /// Seconds until all files were restored.
    pub restore_seconds: f64,
    /// Seconds from starting PostgreSQL until it was consistent and had replayed all WAL.
    pub recovery_seconds: f64,
    /// Seconds for pg_amcheck and the query.
    pub check_seconds: f64,
    /// Where recovery ended.
    pub recovered_lsn: Option<Lsn>,
    /// The problems that were found.
    pub problems: Vec<String>,
    /// Fields that a newer version wrote.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// Result of maintenance.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct MaintenanceOutcome {
    /// In the server's clock.
    pub finished_unix: f64,
    pub duration_seconds: f64,
    /// Backups that were removed from every tier.
    pub expired: Vec<BackupName>,
    /// Backups whose copy on tier 1 was evicted.
    pub evicted: Vec<BackupName>,
    /// Bytes freed in tier 1.
    pub freed_tier1_bytes: u64,
    /// Bytes freed in tier 2.
    pub freed_tier2_bytes: u64,
    /// WAL files removed from tier 1.
    pub wal_removed_tier1: u64,
    /// WAL files removed from tier 2.
    pub wal_removed_tier2: u64,
    /// Packs that are marked for removal by a later run.
    pub packs_marked: u64,
    /// Packs that were removed.
    pub packs_removed: u64,
    /// Reasons why less was done than planned.
    pub held_back: Vec<String>,
    /// Whether the plan had to be empty, for one of `alarms`. In a run that made no plan, this is the value of the last
    /// run that did.
    #[serde(default)]
    pub alarm: bool,
    /// The reasons for `alarm`. Absent in an outcome of an earlier version, where they come first in `held_back`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alarms: Option<Vec<String>>,
}
