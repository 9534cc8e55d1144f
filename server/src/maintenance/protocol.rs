//! What server and child say to each other: one JSON line in, JSON lines out.
//!
//! The child reads its configuration itself, so that no secret passes through arguments, environment or
//! pipes. It refuses when what it reads is not what the server runs with. Its standard input stays open
//! for as long as it may work: the end of it, for whatever reason, ends the child.

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

/// What to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Job {
    /// Whose.
    pub cluster: ClusterName,
    /// The server's; must be that of the configuration.
    pub data_dir: PathBuf,
    /// The server's bucket; must be that of the configuration.
    pub tier2_url: Option<String>,
    /// W3C trace context of who asked; empty when there is none.
    #[serde(default)]
    pub traceparent: String,
    /// The work.
    pub work: Work,
}

/// The kinds of work.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Work {
    /// Removes what no backup needs.
    Prune(PruneJob),
    /// Reads what is stored.
    Verify(VerifyJob),
}

/// What to remove.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct PruneJob {
    /// Snapshots whose records are gone.
    pub forget: Vec<SnapshotId>,
    /// Snapshots that have a record. Any other is of a backup that never came to be; it is marked, and forgotten when it has
    /// borne the mark for `orphan_seconds`.
    pub recorded: Vec<SnapshotId>,
    /// The server's clock, Unix seconds.
    pub now_unix: f64,
    /// Seconds.
    pub orphan_seconds: f64,
    /// Look for snapshots and packs that nobody needs, which go for good.
    pub prune: bool,
    /// Seconds for which a pack stays after it was marked.
    pub keep_marked_seconds: u64,
    /// Keys of packs that are known to be damaged, with a good copy in no tier.
    #[serde(default)]
    pub damaged: BTreeSet<String>,
    /// Tier 1 keeps the packs of these; the others go from it when they are proven in tier 2. `None`:
    /// tier 1 keeps all.
    pub near: Option<Vec<SnapshotId>>,
}

/// What was removed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PruneResult {
    /// Packs marked now.
    pub packs_marked: u64,
    /// Packs that went for good.
    pub packs_removed: u64,
    /// What tier 1 need not keep was gone through to its end; false when nothing of the kind was begun.
    pub evicted: bool,
    /// Packs that tier 1 let go.
    pub packs_evicted: u64,
    /// Bytes freed on tier 1.
    pub freed_tier1_bytes: u64,
    /// Bytes freed in tier 2.
    pub freed_tier2_bytes: u64,
    /// Why less was done.
    pub held_back: Vec<String>,
    /// Packs that were opened because another one holds the same, and that are not good.
    #[serde(default)]
    pub bad: Vec<Damage>,
}

/// A backup to verify.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VerifyBackup {
    /// Its record.
    pub record: BackupRecord,
    /// Its record is on tier 1.
    pub tier1: bool,
    /// It is in tier 2, as far as is known.
    pub tier2: bool,
}

/// What tier 2 must hold of a timeline.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Archived {
    /// Which.
    pub timeline: TimelineId,
    /// From here on.
    pub from: Lsn,
    /// Up to here, but recorded gaps.
    pub to: Lsn,
}

/// What to read.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VerifyJob {
    /// These.
    pub backups: Vec<VerifyBackup>,
    /// Those that were not asked for: damage that is found may be theirs, too.
    #[serde(default)]
    pub others: Vec<VerifyBackup>,
    /// They are all there are: then every file is looked at, whoever needs it.
    pub all: bool,
    /// Keys that an earlier verification found damaged: these are read whatever the share.
    #[serde(default)]
    pub again: BTreeSet<String>,
    /// Share of packs that is read, 0 to 100. Below 100 it is of all packs, in the order of their names.
    pub read_percent: f64,
    /// The pack that the last run read last: this one goes on behind it.
    #[serde(default)]
    pub read_after: Option<Sha256Sum>,
    /// Read this share of the WAL behind the backups, too. WAL from start to stop of a backup is always read.
    pub wal: bool,
    /// What must be in tier 2.
    pub archived: Vec<Archived>,
    /// 0 when nothing is pinned.
    pub segment_size: u32,
    /// As pinned.
    pub system_identifier: u64,
}

/// Something that is not as it was stored, and whose backups need it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What.
    pub damage: Damage,
    /// Which backups need it.
    pub backups: Vec<BackupName>,
    /// It was read, and no tier has a good copy.
    #[serde(default)]
    pub lost: bool,
}

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyResult {
    /// Not good, and could not be made good.
    pub damaged: Vec<Finding>,
    /// Good again.
    pub repaired: Vec<Finding>,
    /// Of the packs that were to be read again, those that are good or gone now.
    #[serde(default)]
    pub disproved: BTreeSet<String>,
    /// In both tiers.
    pub read_bytes: u64,
    /// In both tiers.
    pub files: u64,
    /// How far the packs were read; nothing where they were not come to.
    #[serde(default)]
    pub advance: Advance,
    /// What the WAL says of its level, where all of it was read.
    #[serde(default)]
    pub levels: Vec<LevelChange>,
}

/// How far it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// What is being done, in words.
    pub phase: String,
    /// So far.
    pub done_bytes: u64,
    /// In all; 0 where it is not known.
    pub total_bytes: u64,
    /// So far.
    pub done_files: u64,
    /// In all; 0 where it is not known.
    pub total_files: u64,
}

/// A line of the child.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line {
    /// It goes on.
    Progress(Step),
    /// An object below `<cluster>/` was written to both tiers.
    Written {
        /// Its key below `<cluster>/`.
        object: String,
        /// Bytes.
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
    /// The last line: it could not go on.
    Failed {
        /// Why.
        error: String,
    },
}
