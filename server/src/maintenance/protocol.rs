//! The messages between the server and its child process: one JSON line in, JSON lines out.
//!
//! The child reads its configuration itself, so that no secret passes through arguments, environment or pipes. It
//! refuses to work if that configuration differs from the server's. Its standard input stays open for as long as it
//! may work: when that ends, for whatever reason, the child ends.

use klio_pg::{Lsn, TimelineId};
use klio_storage::{
    catalog::{BackupRecord, Damage, coverage::Advance},
    layout::{BackupName, ClusterName},
    repository::SnapshotId,
    tier2::Sha256Sum,
    wal::LevelChange,
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeSet, path::PathBuf};

/// The work for a child process.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Job {
    pub cluster: ClusterName,
    /// The server's data directory; must be the one in the configuration.
    pub data_dir: PathBuf,
    /// The server's bucket; must be the one in the configuration.
    pub tier2_url: Option<String>,
    /// W3C trace context of the caller; empty when there is none.
    #[serde(default)]
    pub traceparent: String,
    pub work: Work,
}

/// The kinds of work.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Work {
    /// Remove what no backup needs.
    Prune(PruneJob),
    /// Read what is stored and check it.
    Verify(VerifyJob),
}

/// What to remove.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct PruneJob {
    /// Snapshots whose records were removed.
    pub forget: Vec<SnapshotId>,
    /// Snapshots that have a record. Any other snapshot belongs to a backup that was never committed; it is marked,
    /// and forgotten when it has been marked for `orphan_seconds`.
    pub recorded: Vec<SnapshotId>,
    /// The server's clock, Unix seconds.
    pub now_unix: f64,
    pub orphan_seconds: f64,
    /// Also look for snapshots and packs that nothing needs, and remove them for good.
    pub prune: bool,
    /// How many seconds a pack stays after it was marked.
    pub keep_marked_seconds: u64,
    /// Keys of packs that are known to be damaged and have no good copy in either tier.
    #[serde(default)]
    pub damaged: BTreeSet<String>,
    /// Tier 1 keeps the packs of these snapshots; all others are evicted once they are proven in tier 2. `None` means
    /// that tier 1 keeps all.
    pub near: Option<Vec<SnapshotId>>,
}

/// What was removed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PruneResult {
    /// Packs that were marked in this run.
    pub packs_marked: u64,
    /// Packs that were removed for good.
    pub packs_removed: u64,
    /// Whether eviction from tier 1 ran to its end; false if it was not begun.
    pub evicted: bool,
    /// Packs that were evicted from tier 1.
    pub packs_evicted: u64,
    /// Bytes freed on tier 1.
    pub freed_tier1_bytes: u64,
    /// Bytes freed in tier 2.
    pub freed_tier2_bytes: u64,
    /// Why less was removed than planned.
    pub held_back: Vec<String>,
    /// Packs that are not good. They were opened because another pack has the same chunks.
    #[serde(default)]
    pub bad: Vec<Damage>,
}

/// A backup to verify.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VerifyBackup {
    pub record: BackupRecord,
    /// Whether its record is on tier 1.
    pub tier1: bool,
    /// Whether it is in tier 2, as far as is known.
    pub tier2: bool,
}

/// The WAL of a timeline that tier 2 must have.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Archived {
    pub timeline: TimelineId,
    /// The first position.
    pub from: Lsn,
    /// The end position. Recorded gaps in between are allowed.
    pub to: Lsn,
}

/// What to read.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VerifyJob {
    /// The backups to verify.
    pub backups: Vec<VerifyBackup>,
    /// The other backups; damage that is found may concern them, too.
    #[serde(default)]
    pub others: Vec<VerifyBackup>,
    /// Whether `backups` are all there are; then every file is checked, whoever needs it.
    pub all: bool,
    /// Keys that an earlier verification found damaged; they are read whatever the percentage.
    #[serde(default)]
    pub again: BTreeSet<String>,
    /// The percentage of packs that is read, 0 to 100. Below 100 it is counted over all packs, in the order of their
    /// names.
    pub read_percent: f64,
    /// The last pack that the previous run read; this run continues after it.
    #[serde(default)]
    pub read_after: Option<Sha256Sum>,
    /// Whether to read this percentage of the WAL after the backups, too. WAL from start to stop of a backup is always
    /// read.
    pub wal: bool,
    /// The WAL that must be in tier 2.
    pub archived: Vec<Archived>,
    /// 0 when nothing is pinned.
    pub segment_size: u32,
    /// The pinned system identifier.
    pub system_identifier: u64,
}

/// Damage, and the backups that need the damaged file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    pub damage: Damage,
    /// The backups that need it.
    pub backups: Vec<BackupName>,
    /// Whether it was read, and no tier has a good copy.
    #[serde(default)]
    pub lost: bool,
}

/// The result of a verification.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyResult {
    /// Damage that could not be repaired.
    pub damaged: Vec<Finding>,
    /// Damage that was repaired.
    pub repaired: Vec<Finding>,
    /// Of the packs in `again`, those that are good now or no longer exist.
    #[serde(default)]
    pub disproved: BTreeSet<String>,
    /// Bytes read in both tiers.
    pub read_bytes: u64,
    /// Files read in both tiers.
    pub files: u64,
    /// How far the packs were read; empty when the run did not get to them.
    #[serde(default)]
    pub advance: Advance,
    /// Changes of `wal_level` that were found, where all of the WAL was read.
    #[serde(default)]
    pub levels: Vec<LevelChange>,
}

/// Progress.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// What is being done, as text.
    pub phase: String,
    pub done_bytes: u64,
    /// 0 when it is not known.
    pub total_bytes: u64,
    pub done_files: u64,
    /// 0 when it is not known.
    pub total_files: u64,
}

/// A line that the child prints.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line {
    /// Progress of the work.
    Progress(Step),
    /// An object below `<cluster>/` was written to both tiers.
    Written {
        /// Its key below `<cluster>/`.
        object: String,
        size: u64,
    },
    /// An object was removed from tier 2.
    Removed {
        /// Its key below `<cluster>/`.
        object: String,
    },
    /// The last line, of `Work::Prune`.
    Pruned(PruneResult),
    /// The last line, of `Work::Verify`.
    Verified(VerifyResult),
    /// The last line: the work failed.
    Failed { error: String },
}
