//! The instruments of verification, drills and maintenance.
//!
//! Damage counts for as long as it is known: it is taken from the newest outcome of each existing backup, not from the
//! last run, which may have checked less. Times come from clocks that may jump. A result that is reported now counts
//! as the newest, whatever its time says. Among the stored results of earlier runs of the server, one that is dated in
//! the future counts as older than the others.

use crate::metrics::{Reading, Tallies, ZEROS};
use klio_storage::{
    catalog::{Coverage, Damage, DrillOutcome, KnownDamage, MaintenanceOutcome, VerifyOutcome},
    layout::{BackupName, ClusterName},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, MutexGuard, PoisonError},
};

/// What is in memory about a cluster.
#[derive(Debug, Clone, Default)]
struct Last {
    verified: Option<f64>,
    /// Per backup, the damage that its newest verification found and could not repair.
    damaged: BTreeMap<BackupName, Vec<Damage>>,
    /// Damage that belongs to no single backup.
    others: Vec<Damage>,
    drilled: Option<DrillOutcome>,
    maintained: Option<f64>,
    /// Verifications have read all data since this time (Unix seconds).
    all_read_since: Option<f64>,
    /// Whether the clock cannot be believed.
    doubt: Option<bool>,
    /// Why the last plan removed less than the policies say; `None` while that is unknown.
    alarms: Option<Vec<String>>,
}

impl Last {
    fn is_alarmed(&self) -> bool {
        self.alarms.as_ref().is_some_and(|alarms| !alarms.is_empty())
    }

    fn damage(&self) -> usize {
        self.damaged.values().flatten().chain(&self.others).collect::<BTreeSet<_>>().len()
    }
}

/// Whether a stored time counts as newer than another one.
fn is_newer(time: f64, than: f64, now_unix: f64) -> bool {
    (time <= now_unix, time) >= (than <= now_unix, than)
}

/// Counters, and the last results.
#[derive(Default)]
pub struct MaintenanceMetrics {
    tallies: Tallies,
    last: Mutex<BTreeMap<ClusterName, Last>>,
}

impl MaintenanceMetrics {
    fn last(&self) -> MutexGuard<'_, BTreeMap<ClusterName, Last>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a verification that ended. Damage counts as found even if it was repaired.
    pub(super) fn verified(&self, cluster: &ClusterName, outcome: &VerifyOutcome) {
        let name = match outcome.damaged.is_empty() && outcome.repaired.is_empty() {
            true => "klio.consumer.backup_verification_success",
            false => "klio.consumer.backup_verification_failure",
        };
        self.tallies.add(cluster, name, "", 1);
        self.last().entry(cluster.clone()).or_default().verified = Some(outcome.finished_unix);
    }

    /// Replaces the damage that is recorded for the backups of this outcome.
    pub(super) fn kept(&self, cluster: &ClusterName, outcome: &VerifyOutcome) {
        let mut last = self.last();
        let entry = last.entry(cluster.clone()).or_default();
        for name in &outcome.backups {
            entry.damaged.insert(name.clone(), outcome.damaged.clone());
        }
    }

    /// Records since when all data was read.
    pub(super) fn covered(&self, cluster: &ClusterName, coverage: &Coverage) {
        self.last().entry(cluster.clone()).or_default().all_read_since =
            coverage.all_read_since_unix;
    }

    /// Since when all data was read; `None` when part of it was not.
    pub fn all_read_since(&self, cluster: &ClusterName) -> Option<f64> {
        self.last().get(cluster)?.all_read_since
    }

    /// Records whether the clock cannot be believed; returns true when it was believed before.
    pub(super) fn doubted(&self, cluster: &ClusterName, doubt: bool) -> bool {
        let mut last = self.last();
        let before = last.entry(cluster.clone()).or_default().doubt.replace(doubt);
        doubt && before != Some(true)
    }

    /// Records the damage that belongs to no single backup.
    pub(super) fn known(&self, cluster: &ClusterName, known: &KnownDamage) {
        self.last().entry(cluster.clone()).or_default().others.clone_from(&known.others);
    }

    /// Forgets the damage of a backup that was removed.
    pub(super) fn forgotten(&self, cluster: &ClusterName, name: &BackupName) {
        if let Some(last) = self.last().get_mut(cluster) {
            last.damaged.remove(name);
        }
    }

    /// Forgets the damage of all backups except these, because a crash may have left the outcome of an expired one.
    pub(super) fn retain(&self, cluster: &ClusterName, there: &BTreeSet<&BackupName>) {
        if let Some(last) = self.last().get_mut(cluster) {
            last.damaged.retain(|name, _| there.contains(name));
        }
    }

    /// Takes a stored verification of an earlier run of the server.
    pub(super) fn seen_verified(
        &self,
        cluster: &ClusterName,
        outcome: &VerifyOutcome,
        now_unix: f64,
    ) {
        self.kept(cluster, outcome);
        let mut last = self.last();
        let entry = last.entry(cluster.clone()).or_default();
        if entry.verified.is_none_or(|time| is_newer(outcome.finished_unix, time, now_unix)) {
            entry.verified = Some(outcome.finished_unix);
        }
    }

    /// Records a drill that was reported.
    pub(super) fn drilled(&self, cluster: &ClusterName, outcome: &DrillOutcome) {
        self.last().entry(cluster.clone()).or_default().drilled = Some(outcome.clone());
    }

    /// Takes a stored drill of an earlier run of the server.
    pub(super) fn seen_drilled(
        &self,
        cluster: &ClusterName,
        outcome: &DrillOutcome,
        now_unix: f64,
    ) {
        let mut last = self.last();
        let entry = last.entry(cluster.clone()).or_default();
        let newer =
            |known: &DrillOutcome| is_newer(outcome.finished_unix, known.finished_unix, now_unix);
        if entry.drilled.as_ref().is_none_or(newer) {
            entry.drilled = Some(outcome.clone());
        }
    }

    /// Counts a run of maintenance that ended.
    pub(super) fn maintained(&self, cluster: &ClusterName, ok: bool, outcome: &MaintenanceOutcome) {
        let word = match (ok, outcome.held_back.is_empty()) {
            (false, _) => "failed",
            (true, true) => "done",
            (true, false) => "held_back",
        };
        let add = |name, word, n| self.tallies.add(cluster, name, word, n);
        add("klio.maintenance.runs", word, 1);
        add("klio.maintenance.expired", "", outcome.expired.len() as u64);
        let tiers = [
            ("tier1", outcome.freed_tier1_bytes, outcome.wal_removed_tier1),
            ("tier2", outcome.freed_tier2_bytes, outcome.wal_removed_tier2),
        ];
        for (tier, bytes, files) in tiers {
            add("klio.maintenance.freed_size", tier, bytes);
            add("klio.maintenance.wal_removed", tier, files);
        }
        if ok {
            let mut last = self.last();
            last.entry(cluster.clone()).or_default().maintained = Some(outcome.finished_unix);
        }
    }

    /// Takes the stored result of an earlier run of the server.
    pub(super) fn seen_maintained(&self, cluster: &ClusterName, outcome: &MaintenanceOutcome) {
        let mut last = self.last();
        let entry = last.entry(cluster.clone()).or_default();
        entry.maintained = Some(outcome.finished_unix);
        // An earlier version did not separate the reasons of an alarm from other reasons to hold back.
        let reasons = || outcome.alarms.clone().unwrap_or_else(|| outcome.held_back.clone());
        entry.alarms = Some(if outcome.alarm { reasons() } else { Vec::new() });
    }

    /// Unix time of the last run; `None` when there was none.
    pub(super) fn latest_maintenance(&self, cluster: &ClusterName) -> Option<f64> {
        self.last().get(cluster)?.maintained
    }

    /// Whether the last plan raised an alarm, as far as is known.
    pub(super) fn is_alarmed(&self, cluster: &ClusterName) -> bool {
        self.last().get(cluster).is_some_and(Last::is_alarmed)
    }

    /// The alarms of the last plan.
    pub(super) fn alarms(&self, cluster: &ClusterName) -> Vec<String> {
        self.last().get(cluster).and_then(|last| last.alarms.clone()).unwrap_or_default()
    }

    /// Records why a plan removes less than the policies say; empty when there is no reason.
    pub(crate) fn alarmed(&self, cluster: &ClusterName, alarms: &[String]) {
        self.last().entry(cluster.clone()).or_default().alarms = Some(alarms.to_vec());
    }

    /// Problems that last until a drill, a verification or maintenance succeeds, as texts.
    pub fn problems(&self, cluster: &ClusterName) -> Vec<String> {
        let last = self.last();
        let Some(last) = last.get(cluster) else { return Vec::new() };
        let mut problems = Vec::new();
        if let Some(drill) = last.drilled.as_ref().filter(|drill| !drill.ok) {
            let first = drill.problems.first().map_or("", String::as_str);
            let first = first.lines().next().unwrap_or_default();
            problems.push(format!("the newest drill failed, of backup {}: {first}", drill.backup));
        }
        problems.extend(last.alarms.iter().flatten().map(|alarm| format!("retention: {alarm}")));
        let damage = last.damage();
        if damage > 0 {
            problems.push(format!(
                "verification found {damage} damaged files that could not be repaired: klio list and klio verify name them"
            ));
        }
        problems
    }

    /// All values of these clusters.
    pub fn read(&self, clusters: &BTreeSet<ClusterName>, now_unix: f64, out: &mut Vec<Reading>) {
        let zeros = ZEROS.iter().filter(|(name, _)| !name.starts_with("klio.wal."));
        self.tallies.read(clusters, &zeros.copied().collect::<Vec<_>>(), out);
        for (cluster, last) in self.last().iter().filter(|(name, _)| clusters.contains(name)) {
            let mut put = |name, value| out.push(Reading::of(name, cluster, value));
            if last.alarms.is_some() {
                put("klio.maintenance.alarm", f64::from(u8::from(last.is_alarmed())));
            }
            if let Some(time) = last.maintained {
                put("klio.maintenance.latest_time", time);
            }
            if let Some(time) = last.verified {
                put("klio.verify.latest_age", (now_unix - time).max(0.0));
            }
            if let Some(doubt) = last.doubt {
                put("klio.maintenance.clock_doubt", f64::from(u8::from(doubt)));
            }
            if let Some(time) = last.all_read_since {
                put("klio.verify.coverage_age", (now_unix - time).max(0.0));
            }
            if last.verified.is_some() || last.damage() > 0 {
                put("klio.verify.damaged", last.damage() as f64);
            }
            if let Some(drill) = &last.drilled {
                put("klio.drill.latest_age", (now_unix - drill.finished_unix).max(0.0));
                put("klio.drill.latest_success", f64::from(u8::from(drill.ok)));
                put("klio.drill.restore_duration", drill.restore_seconds);
                put("klio.drill.recovery_duration", drill.recovery_seconds);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alarm(outcome: &MaintenanceOutcome) -> bool {
        let (metrics, cluster) = (MaintenanceMetrics::default(), "pg".parse().unwrap());
        metrics.seen_maintained(&cluster, outcome);
        metrics.is_alarmed(&cluster)
    }

    fn verified(name: &str, finished_unix: f64, damaged: &[&str]) -> VerifyOutcome {
        let damage = |key: &&str| Damage {
            tier: "tier1".into(),
            key: (*key).into(),
            problem: "expected A, found B".into(),
        };
        VerifyOutcome {
            backups: vec![name.parse().unwrap()],
            ok: damaged.is_empty(),
            finished_unix,
            duration_seconds: 1.0,
            read_percent: 1.0,
            all_read_since_unix: None,
            read_bytes: 0,
            files: 0,
            damaged: damaged.iter().map(damage).collect(),
            repaired: vec![],
        }
    }

    fn drill(finished_unix: f64, ok: bool) -> DrillOutcome {
        DrillOutcome {
            backup: "b".parse().unwrap(),
            ok,
            finished_unix,
            restore_seconds: 1.0,
            recovery_seconds: 1.0,
            check_seconds: 1.0,
            recovered_lsn: None,
            problems: vec![],
            unknown: Default::default(),
        }
    }

    fn value(metrics: &MaintenanceMetrics, name: &str) -> Option<f64> {
        let mut out = Vec::new();
        metrics.read(&BTreeSet::from(["pg".parse().unwrap()]), 1000.0, &mut out);
        out.iter().find(|reading| reading.name == name).map(|reading| reading.value)
    }

    #[test]
    fn a_failed_drill_and_known_damage_are_problems_until_they_are_not() {
        let (metrics, pg) = (MaintenanceMetrics::default(), "pg".parse().unwrap());
        assert!(metrics.problems(&pg).is_empty());
        let problems = vec!["PostgreSQL ended\nlog".to_owned()];
        metrics.drilled(&pg, &DrillOutcome { problems, ..drill(10.0, false) });
        metrics.kept(&pg, &verified("b", 20.0, &["x", "y"]));
        let found = metrics.problems(&pg);
        assert!(found[0].ends_with("of backup b: PostgreSQL ended"), "{found:?}");
        assert!(found[1].contains("2 damaged files"), "{found:?}");
        metrics.drilled(&pg, &drill(30.0, true));
        metrics.kept(&pg, &verified("b", 40.0, &[]));
        assert!(metrics.problems(&pg).is_empty());
    }

    #[test]
    fn damage_of_one_backup_is_not_hidden_by_a_look_at_another() {
        let (metrics, pg) = (MaintenanceMetrics::default(), "pg".parse().unwrap());
        let damaged = || value(&metrics, "klio.verify.damaged");
        assert_eq!(damaged(), None);
        let run = |outcome: &VerifyOutcome| {
            metrics.kept(&pg, outcome);
            metrics.verified(&pg, outcome);
        };
        run(&verified("old", 10.0, &["x", "y"]));
        run(&verified("new", 20.0, &[]));
        assert_eq!(damaged(), Some(2.0));
        // A file that two backups need counts once.
        run(&verified("new", 30.0, &["x"]));
        assert_eq!(damaged(), Some(2.0));
        let others = verified("none", 30.0, &["pg/wal"]).damaged;
        metrics.known(&pg, &KnownDamage { packs: vec![], others, ..KnownDamage::default() });
        assert_eq!(damaged(), Some(3.0));
        metrics.known(&pg, &KnownDamage::default());
        let new = "new".parse().unwrap();
        metrics.forgotten(&pg, &"old".parse().unwrap());
        assert_eq!(damaged(), Some(1.0), "the old backup expired");
        run(&verified("crashed", 30.0, &["z"]));
        metrics.retain(&pg, &BTreeSet::from([&new]));
        assert_eq!(damaged(), Some(1.0));
        run(&verified("new", 40.0, &[]));
        assert_eq!(damaged(), Some(0.0));
    }

    /// The current time is 1000.
    #[test]
    fn an_outcome_of_the_future_hides_no_other() {
        let pg = "pg".parse().unwrap();
        for order in [[0, 1], [1, 0]] {
            let metrics = MaintenanceMetrics::default();
            for which in order {
                let outcome = [drill(5000.0, true), drill(900.0, false)][which].clone();
                metrics.seen_drilled(&pg, &outcome, 1000.0);
                let time = outcome.finished_unix;
                metrics.seen_verified(&pg, &verified("b", time, &[]), 1000.0);
            }
            assert_eq!(value(&metrics, "klio.drill.latest_success"), Some(0.0));
            assert_eq!(value(&metrics, "klio.verify.latest_age"), Some(100.0));
        }
        // The server's clock was ahead before, and is not any more.
        let metrics = MaintenanceMetrics::default();
        for outcome in [drill(5000.0, true), drill(900.0, false)] {
            metrics.drilled(&pg, &outcome);
            metrics.verified(&pg, &verified("b", outcome.finished_unix, &[]));
        }
        assert_eq!(value(&metrics, "klio.drill.latest_success"), Some(0.0));
        assert_eq!(value(&metrics, "klio.verify.latest_age"), Some(100.0));
    }

    #[test]
    fn a_doubt_of_the_clock_is_news_once_and_shown_while_it_stands() {
        let (metrics, pg) = (MaintenanceMetrics::default(), "pg".parse().unwrap());
        let shown = || value(&metrics, "klio.maintenance.clock_doubt");
        assert_eq!(shown(), None);
        for (doubt, news, value) in
            [(false, false, 0.0), (true, true, 1.0), (true, false, 1.0), (false, false, 0.0)]
        {
            assert_eq!(metrics.doubted(&pg, doubt), news);
            assert_eq!(shown(), Some(value));
        }
    }

    #[test]
    fn how_far_the_data_was_read_is_shown_as_an_age() {
        let (metrics, pg) = (MaintenanceMetrics::default(), "pg".parse().unwrap());
        metrics.covered(&pg, &Coverage::default());
        assert_eq!(value(&metrics, "klio.verify.coverage_age"), None);
        let coverage = Coverage { all_read_since_unix: Some(100.0), ..Coverage::default() };
        metrics.covered(&pg, &coverage);
        assert_eq!(value(&metrics, "klio.verify.coverage_age"), Some(900.0));
    }

    #[test]
    fn after_a_restart_only_an_alarm_is_an_alarm() {
        let held_back = vec!["backup b1 is running; nothing was removed meanwhile".to_owned()];
        let mut outcome = MaintenanceOutcome { held_back, ..MaintenanceOutcome::default() };
        assert!(!alarm(&outcome));
        outcome.alarm = true;
        assert!(alarm(&outcome));
        let (metrics, pg) = (MaintenanceMetrics::default(), "pg".parse().unwrap());
        metrics.alarmed(&pg, &["backup b: clocks".to_owned()]);
        assert_eq!(metrics.problems(&pg), ["retention: backup b: clocks"]);
        metrics.alarmed(&pg, &[]);
        assert_eq!(metrics.problems(&pg), [""; 0]);
    }

    /// Regression test: after each restart, a reason that had only held something back became an alarm.
    #[test]
    fn after_a_restart_an_alarm_has_its_own_reasons_only() {
        let (metrics, pg) = (MaintenanceMetrics::default(), "pg".parse().unwrap());
        let mut outcome = MaintenanceOutcome {
            alarm: true,
            alarms: Some(vec!["backup b: clocks".to_owned()]),
            held_back: vec!["backup b: clocks".to_owned(), "backup c is running".to_owned()],
            ..MaintenanceOutcome::default()
        };
        metrics.seen_maintained(&pg, &outcome);
        assert_eq!(metrics.problems(&pg), ["retention: backup b: clocks"]);
        outcome.alarms = None;
        metrics.seen_maintained(&pg, &outcome);
        assert_eq!(metrics.problems(&pg).len(), 2, "of an earlier version, in doubt all");
    }

    #[test]
    fn an_outcome_of_an_older_klio_is_read_and_is_no_alarm() {
        let mut json = serde_json::to_value(MaintenanceOutcome::default()).unwrap();
        json.as_object_mut().unwrap().remove("alarm").unwrap();
        assert!(!alarm(&serde_json::from_value(json).unwrap()));
    }
}
