//! The retention policies that a person configures.

use serde::{Deserialize, Serialize};

/// What to keep in a tier. A backup is kept if any of these rules selects it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    /// This many of the newest backups.
    pub last: u32,
    /// The newest backup of each of the last so many hours that have one.
    pub hourly: u32,
    /// The same for days (UTC).
    pub daily: u32,
    /// The same for weeks, which begin on Monday.
    pub weekly: u32,
    /// The same for months.
    pub monthly: u32,
    /// The same for years.
    pub yearly: u32,
    /// Keep what is needed to recover any point in time in this many days before the newest backup.
    pub recovery_window_days: u32,
}

/// Changes to some settings of a policy; `None` leaves a setting unchanged.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PolicyPatch {
    pub last: Option<u32>,
    pub hourly: Option<u32>,
    pub daily: Option<u32>,
    pub weekly: Option<u32>,
    pub monthly: Option<u32>,
    pub yearly: Option<u32>,
    pub recovery_window_days: Option<u32>,
}

/// A policy for each tier.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policies {
    /// Applies to the copies on the server's disk, for fast restores.
    pub tier1: Policy,
    /// Applies to which backups exist at all.
    pub tier2: Policy,
    /// A younger backup displaces nothing (P13). 0 in a plan of an older server.
    #[serde(default)]
    pub minimum_age_seconds: u64,
}

/// A week: long enough for a person to notice that something is wrong with the current backups.
pub const MINIMUM_AGE_SECONDS: u64 = 7 * 86_400;

/// Safe defaults: any point in a month can be recovered, two backups are kept whatever their age,
/// and the newest is on tier 1.
impl Default for Policies {
    fn default() -> Self {
        Self {
            tier1: Policy { last: 1, ..Policy::default() },
            tier2: Policy { last: 2, recovery_window_days: 30, ..Policy::default() },
            minimum_age_seconds: MINIMUM_AGE_SECONDS,
        }
    }
}

impl Policy {
    /// Whether it selects at least one backup.
    pub fn names_something(&self) -> bool {
        *self != Policy::default()
    }

    /// This policy with the changes of a patch.
    #[must_use]
    pub fn with(&self, patch: &PolicyPatch) -> Self {
        Self {
            last: patch.last.unwrap_or(self.last),
            hourly: patch.hourly.unwrap_or(self.hourly),
            daily: patch.daily.unwrap_or(self.daily),
            weekly: patch.weekly.unwrap_or(self.weekly),
            monthly: patch.monthly.unwrap_or(self.monthly),
            yearly: patch.yearly.unwrap_or(self.yearly),
            recovery_window_days: patch.recovery_window_days.unwrap_or(self.recovery_window_days),
        }
    }
}
