//! What exists: facts derived from both tiers, stored so that they survive a restart.
//!
//! The deciding parts are pure. What is written is either a cache that both tiers can rebuild (P4), or
//! a record that is never changed.

pub mod archive;
pub mod archive_file;
pub mod backup;
pub mod coverage;
pub mod damage;
pub mod holdings;
pub mod outcomes;
pub mod recovery;
pub mod retention;

pub use crate::timelines::{
    Decision, DecisionError, ForStandbys, Mark, PASSED_OVER, Standing, Timelines,
};
pub use archive::{Archive, Frontier, Totals};
pub use backup::{
    BackupRecord, BadPage, Damage, DrillOutcome, MaintenanceOutcome, PagesRecord, TablespaceRecord,
    VerifyOutcome,
};
pub use coverage::Coverage;
pub use damage::KnownDamage;
pub use holdings::{Holdings, KnownGap, Run, TimelineHoldings};
pub use recovery::{
    Hole, Line, Path, Plan, Reach, Refusal, Stop, Survey, Target, TimelineChoice, Window,
};
pub use retention::{Policies, Policy, RetentionPlan};
