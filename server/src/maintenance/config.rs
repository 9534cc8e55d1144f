//! `[retention]`, `[maintenance]` and `[verify]`.

use klio_storage::{
    catalog::retention::{Policies, PolicyPatch},
    layout::ClusterName,
};
use std::{collections::BTreeMap, time::Duration};

/// The longest time that a setting here accepts, in seconds: a year.
const SECONDS_MAX: u64 = 366 * 86_400;

/// `[retention]`: which backups and WAL are retained. A section replaces only the rules that it names. The other rules
/// come from the defaults, and for `[retention.clusters.NAME]` from `[retention]`.
#[derive(Debug, Clone, Default, PartialEq, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RetentionConfig {
    /// Rules for copies on this server's disk.
    pub tier1: PolicyPatch,
    /// Rules for backups in tier 2; they decide which backups exist at all.
    pub tier2: PolicyPatch,
    /// How old a backup must be before older ones expire because of it.
    pub minimum_age: Option<MinimumAge>,
    /// Rules for single clusters.
    pub clusters: BTreeMap<ClusterName, ClusterRetention>,
}

/// A time as `7d`, `12h`, `30m`, `90s`, or a number of seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MinimumAge(Duration);

impl std::str::FromStr for MinimumAge {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("expected a time such as \"7d\", \"12h\" or \"90s\", found {text:?}");
        let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
        let factor = match &text[digits.len()..] {
            "" | "s" => 1,
            "m" => 60,
            "h" => 3600,
            "d" => 86_400,
            _ => return Err(bad()),
        };
        let seconds = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(factor));
        let seconds = seconds.filter(|seconds| *seconds <= 10 * SECONDS_MAX).ok_or_else(bad)?;
        Ok(Self(Duration::from_secs(seconds)))
    }
}

impl<'de> serde::Deserialize<'de> for MinimumAge {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(serde::Deserialize)]
        #[serde(untagged)]
        enum Form {
            Seconds(u64),
            Text(String),
        }
        let text = match <Form as serde::Deserialize>::deserialize(deserializer)? {
            Form::Seconds(seconds) => seconds.to_string(),
            Form::Text(text) => text,
        };
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// `[retention.clusters.NAME]`
#[derive(Debug, Clone, Default, PartialEq, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClusterRetention {
    /// As in `[retention]`.
    pub tier1: PolicyPatch,
    /// As in `[retention]`.
    pub tier2: PolicyPatch,
    /// As in `[retention]`.
    pub minimum_age: Option<MinimumAge>,
}

impl RetentionConfig {
    /// The policies of a generation: those of the section that names it (`NAME@1` for the first), or else its
    /// cluster's.
    pub fn of(&self, place: &ClusterName) -> Policies {
        let (base, number) = (place.base(), place.generation());
        let named = |name: &ClusterName| name.number() == Some(number) && name.base() == base;
        let own = self.clusters.iter().find(|(name, _)| named(name)).map(|(_, own)| own);
        self.with(own.or_else(|| self.clusters.get(&base)))
    }

    fn with(&self, own: Option<&ClusterRetention>) -> Policies {
        let default = Policies::default();
        let age =
            |own: &Option<MinimumAge>, otherwise| own.map_or(otherwise, |age| age.0.as_secs());
        let all = Policies {
            tier1: default.tier1.with(&self.tier1),
            tier2: default.tier2.with(&self.tier2),
            minimum_age_seconds: age(&self.minimum_age, default.minimum_age_seconds),
        };
        match own {
            Some(own) => Policies {
                tier1: all.tier1.with(&own.tier1),
                tier2: all.tier2.with(&own.tier2),
                minimum_age_seconds: age(&own.minimum_age, all.minimum_age_seconds),
            },
            None => all,
        }
    }

    pub fn validate(&self) -> Vec<String> {
        let mut names = vec![("[retention]".to_owned(), self.with(None))];
        for (name, own) in &self.clusters {
            names.push((format!("[retention.clusters.{name}]"), self.with(Some(own))));
        }
        let bad = names.into_iter().filter(|(_, policies)| !policies.tier2.names_something());
        bad.map(|(section, _)| {
            format!("{section} tier2: expected at least one rule that keeps a backup, found none")
        })
        .collect()
    }
}

/// `[maintenance]`
#[derive(Debug, Clone, PartialEq, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MaintenanceConfig {
    /// Apply retention automatically: after backups and periodically.
    pub enabled: bool,
    /// Seconds between two runs for a cluster.
    pub interval_seconds: u64,
    /// How many seconds a pack stays after it was marked as not needed.
    pub keep_marked_seconds: u64,
    /// How many seconds to wait for a running backup before giving up.
    pub wait_for_backup_seconds: u64,
}

impl Default for MaintenanceConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            interval_seconds: 86_400,
            // Longer than a backup or a restore usually takes, and a little less than a day.
            keep_marked_seconds: 23 * 3600,
            wait_for_backup_seconds: 600,
        }
    }
}

impl MaintenanceConfig {
    pub fn validate(&self) -> Vec<String> {
        let all = [
            ("interval_seconds", self.interval_seconds, 1),
            ("keep_marked_seconds", self.keep_marked_seconds, 0),
            ("wait_for_backup_seconds", self.wait_for_backup_seconds, 0),
        ];
        let bad = all.iter().filter(|(_, value, least)| !(*least..=SECONDS_MAX).contains(value));
        bad.map(|(name, value, least)| {
            format!("maintenance.{name}: expected {least} to {SECONDS_MAX}, found {value}")
        })
        .collect()
    }

    /// The time between two runs.
    pub const fn interval(&self) -> Duration {
        Duration::from_secs(self.interval_seconds)
    }

    /// How long to wait for a running backup.
    pub const fn wait_for_backup(&self) -> Duration {
        Duration::from_secs(self.wait_for_backup_seconds)
    }
}

/// `[verify]`
#[derive(Debug, Clone, PartialEq, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VerifyConfig {
    /// Verify what reached tier 2 after each backup.
    pub after_backup: bool,
    /// The percentage of its packs that is read then, 0 to 100; everything else of the backup is always read.
    pub read_percent: f64,
}

impl Default for VerifyConfig {
    fn default() -> Self {
        Self { after_backup: true, read_percent: 10.0 }
    }
}

impl VerifyConfig {
    pub fn validate(&self) -> Vec<String> {
        match (0.0..=100.0).contains(&self.read_percent) {
            true => Vec::new(),
            false => {
                vec![format!("verify.read_percent: expected 0 to 100, found {}", self.read_percent)]
            }
        }
    }
}

/// The settings of the three sections.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// What is retained.
    pub retention: RetentionConfig,
    /// When retention is applied.
    pub maintenance: MaintenanceConfig,
    /// What is verified.
    pub verify: VerifyConfig,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> RetentionConfig {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn a_cluster_overrides_what_it_names_and_nothing_else() {
        let config = read("tier2.daily = 7\nclusters.big.tier2.recovery_window_days = 3\n");
        assert!(config.validate().is_empty());
        let (all, big) = (config.of(&"other".parse().unwrap()), config.of(&"big".parse().unwrap()));
        assert_eq!((all.tier2.daily, all.tier2.last, all.tier2.recovery_window_days), (7, 2, 30));
        assert_eq!((big.tier2.daily, big.tier2.last, big.tier2.recovery_window_days), (7, 2, 3));
        assert_eq!(big.tier1, Policies::default().tier1);
    }

    /// Regression test: the rules of `main@1` were accepted and never used, because its place is `main`.
    #[test]
    fn each_generation_has_its_own_section_or_its_clusters() {
        let config = read(concat!(
            "clusters.main.tier2.daily = 5\n",
            "clusters.\"main@1\".tier2.daily = 365\n",
            "clusters.\"main@2\".tier2.daily = 9\n",
            "clusters.\"other@1\".tier2.daily = 8\n",
        ));
        let places = [
            ("main", 365),
            ("main@1", 365),
            ("main@2", 9),
            ("main@3", 5),
            ("other", 8),
            ("other@2", Policies::default().tier2.daily),
        ];
        for (place, daily) in places {
            let place = ClusterName::parse_generation(place).unwrap();
            assert_eq!(config.of(&place).tier2.daily, daily, "{place}");
        }
        let nothing = "tier2 = { last = 0, recovery_window_days = 0 }";
        let hidden = read(&format!("clusters.pg.{nothing}\nclusters.\"pg@1\".tier2.last = 1"));
        let problems = hidden.validate();
        assert!(problems.len() == 1 && problems[0].contains("clusters.pg]"), "{problems:?}");
    }

    #[test]
    fn the_minimum_age_is_a_week_and_can_be_said_in_several_ways() {
        let of = |text: &str| read(text).of(&"pg".parse().unwrap()).minimum_age_seconds;
        assert_eq!(of(""), 7 * 86_400);
        for text in ["minimum_age = \"12h\"", "minimum_age = 43200", "minimum_age = \"720m\""] {
            assert_eq!(of(text), 43_200, "{text}");
        }
        assert_eq!(of("minimum_age = \"7d\"\nclusters.pg.minimum_age = 0"), 0);
        for bad in ["\"7w\"", "\"d\"", "\"-1d\"", "\"99999999d\"", "true", "\"\""] {
            let text = format!("minimum_age = {bad}");
            assert!(toml::from_str::<RetentionConfig>(&text).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_policy_that_keeps_nothing_is_refused() {
        let nothing = "tier2 = { last = 0, recovery_window_days = 0 }";
        let problems = read(nothing).validate();
        assert!(problems[0].contains("[retention] tier2"), "{problems:?}");
        let own = read(&format!("clusters.pg.{nothing}")).validate();
        assert!(own.len() == 1 && own[0].contains("[retention.clusters.pg]"), "{own:?}");
        assert!(toml::from_str::<RetentionConfig>("tier2.dayly = 1").is_err());
    }
}
