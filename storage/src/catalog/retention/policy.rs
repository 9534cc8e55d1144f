//! What a person asks to be kept.

use serde::{Deserialize, Serialize};

/// What to keep in a tier. A backup stays when any of these names it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    /// The newest so many.
    pub last: u32,
    /// The newest of each of the newest so many hours that have one.
    pub hourly: u32,
    /// Of days (UTC).
    pub daily: u32,
    /// Of weeks, which begin on Monday.
    pub weekly: u32,
    /// Of months.
    pub monthly: u32,
    /// Of years.
    pub yearly: u32,
    /// Every moment of so many days before the newest backup can be recovered to.
    pub recovery_window_days: u32,
}

/// Some settings of a policy; the rest stays as it was.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PolicyPatch {
    /// As in [`Policy`].
    pub last: Option<u32>,
    /// As in [`Policy`].
    pub hourly: Option<u32>,
    /// As in [`Policy`].
    pub daily: Option<u32>,
    /// As in [`Policy`].
    pub weekly: Option<u32>,
    /// As in [`Policy`].
    pub monthly: Option<u32>,
    /// As in [`Policy`].
    pub yearly: Option<u32>,
    /// As in [`Policy`].
    pub recovery_window_days: Option<u32>,
}

/// A policy for each tier.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policies {
    /// Copies on the server's disk, for fast restores.
    pub tier1: Policy,
    /// What exists at all.
    pub tier2: Policy,
    /// A backup that is younger displaces nothing (P13). 0 in a plan of an older server.
    #[serde(default)]
    pub minimum_age_seconds: u64,
}

/// A week: long enough for a person to see that something is wrong with what is backed up now.
pub const MINIMUM_AGE_SECONDS: u64 = 7 * 86_400;

/// Safe: a month can be recovered, two backups stay whatever their age, and the newest is near.
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
    /// It names at least one backup.
    pub fn names_something(&self) -> bool {
        *self != Policy::default()
    }

    /// This policy with the settings of a patch.
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
