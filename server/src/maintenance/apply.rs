//! Applies a retention plan, one cluster at a time.
//!
//! Records are removed first, from both tiers and durably, so that a backup without a record is the only possible half
//! state. Then follow snapshots, packs and tier 1's copies, in a child process, and then WAL. A crash may come after
//! any step: the next run finds what is left over, and every backup that has a record can be restored.

use super::{
    Inner,
    child::Tell,
    protocol::{PruneJob, PruneResult, Step},
    turns::Turn,
};
use crate::{base::Removal, errors};
use klio_proto::Code;
use klio_storage::{
    Error,
    catalog::{BackupRecord, MaintenanceOutcome, RetentionPlan, outcomes, retention::Hold},
    crash_point,
    disk::durable,
    layout::{BackupName, BaseObject, ClusterName},
    record,
    repository::SnapshotId,
};
use std::{collections::BTreeSet, time::Duration};
use tonic::Status;

/// How long a snapshot must have had no record, in every listing during that time, before it is forgotten.
const ORPHAN_SECONDS: f64 = 3.0 * 86_400.0;
/// How often the state of a running backup is checked.
const LOOK_EVERY: Duration = Duration::from_millis(200);

impl Inner {
    /// Plans and applies. It waits for a running backup before it takes the turn, so that the turn is never held idle.
    pub(super) async fn apply(
        &self,
        cluster: &ClusterName,
        tell: Tell<'_>,
    ) -> Result<MaintenanceOutcome, Status> {
        let mut outcome = MaintenanceOutcome::default();
        let (_turn, alone) = self.turn_beside_no_backup(cluster, tell).await;
        let began = tokio::time::Instant::now();
        let result = match alone {
            Ok(_alone) => self.apply_plan(cluster, &mut outcome, tell).await,
            Err(running) => {
                let text = format!("backup {running} is running; nothing was removed meanwhile");
                outcome.held_back.push(text);
                outcome.alarm = self.metrics.is_alarmed(cluster);
                outcome.alarms = Some(self.metrics.alarms(cluster));
                Ok(())
            }
        };
        outcome.finished_unix = self.base.now_unix();
        outcome.duration_seconds = began.elapsed().as_secs_f64();
        self.metrics.maintained(cluster, result.is_ok(), &outcome);
        result?;
        self.keep_run(cluster, &outcome).await;
        for reason in &outcome.held_back {
            tracing::warn!(%cluster, reason, "maintenance held back");
        }
        tracing::info!(
            %cluster, expired = outcome.expired.len(), evicted = outcome.evicted.len(),
            wal_tier1 = outcome.wal_removed_tier1, wal_tier2 = outcome.wal_removed_tier2,
            freed_tier1_bytes = outcome.freed_tier1_bytes, freed_tier2_bytes = outcome.freed_tier2_bytes,
            "maintenance done"
        );
        Ok(outcome)
    }

    async fn keep_run(&self, cluster: &ClusterName, outcome: &MaintenanceOutcome) {
        let (base, path) = (self.base.clone(), super::last_run_path(&self.base, cluster));
        let outcome = outcome.clone();
        let kept = tokio::task::spawn_blocking(move || {
            record::store(base.disk().as_ref(), &path, &outcome)
        });
        if let Ok(Err(error)) = kept.await {
            tracing::warn!(%cluster, %error, "cannot store the result of maintenance");
        }
    }

    /// MAINT1: takes the turn, together with either a guarantee that no backup runs, or the name of the one that still
    /// runs after the waiting time. While it waits for a backup it holds nothing, neither the turn nor new backups.
    async fn turn_beside_no_backup(
        &self,
        cluster: &ClusterName,
        tell: Tell<'_>,
    ) -> (Turn, Result<Removal, BackupName>) {
        let until = tokio::time::Instant::now() + self.settings.maintenance.wait_for_backup();
        loop {
            while let Some(running) = self.base.reservations().running(cluster).backup
                && tokio::time::Instant::now() < until
            {
                tell(Step { phase: format!("wait for backup {running}"), ..Step::default() });
                tokio::time::sleep(LOOK_EVERY).await;
            }
            tell(Step { phase: "wait for other maintenance".into(), ..Step::default() });
            let turn = self.turns.take(cluster).await;
            let alone = self.base.reservations().removal(cluster);
            // A backup that began while the turn was waited for is waited for as well.
            if alone.is_ok() || tokio::time::Instant::now() >= until {
                return (turn, alone);
            }
        }
    }

    async fn apply_plan(
        &self,
        cluster: &ClusterName,
        outcome: &mut MaintenanceOutcome,
        tell: Tell<'_>,
    ) -> Result<(), Status> {
        tell(Step { phase: "plan".into(), ..Step::default() });
        let plan = self.plan(cluster).await?;
        outcome.alarm = !plan.alarms.is_empty();
        outcome.alarms = Some(plan.alarms.clone());
        self.metrics.alarmed(cluster, &plan.alarms);
        for alarm in &plan.alarms {
            tracing::error!(%cluster, alarm, "retention is paused; nothing is removed for good");
        }
        outcome.held_back.clone_from(&plan.alarms);
        if plan.hold == Hold::All {
            return Ok(());
        }
        // P6: if the damage record cannot be read, nothing is removed.
        self.known_damage(cluster).await?;
        let records = self.base.backups(cluster).await?.backups;
        let records: Vec<BackupRecord> = records.into_iter().map(|b| b.record).collect();
        let expired: BTreeSet<BackupName> = plan.expired().into_iter().collect();
        for name in &expired {
            tell(Step { phase: format!("expire backup {name}"), ..Step::default() });
            self.remove_record(cluster, name).await?;
            outcome.expired.push(name.clone());
            self.metrics.forgotten(cluster, name);
        }
        if !expired.is_empty() {
            crash_point!("expire.tier1");
        }
        let job = self.prune_job(cluster, &plan, &records, &expired);
        let pruned = self.prune(cluster, job, tell).await?;
        outcome.evicted.extend(evicted(&plan, &pruned));
        outcome.packs_marked = pruned.packs_marked;
        outcome.packs_removed = pruned.packs_removed;
        outcome.freed_tier1_bytes += pruned.freed_tier1_bytes;
        outcome.freed_tier2_bytes += pruned.freed_tier2_bytes;
        outcome.held_back.extend(pruned.held_back);
        tell(Step { phase: "expire WAL".into(), ..Step::default() });
        self.expire_wal(cluster, &plan, outcome).await?;
        // Lists again, so that gauges and listings follow what is left.
        self.base.backups(cluster).await.map(drop)
    }

    fn prune_job(
        &self,
        cluster: &ClusterName,
        plan: &RetentionPlan,
        records: &[BackupRecord],
        expired: &BTreeSet<BackupName>,
    ) -> PruneJob {
        let snapshot = |record: &BackupRecord| -> Option<SnapshotId> {
            record.snapshot.parse().inspect_err(|error| {
                tracing::error!(%cluster, backup = %record.name, %error, "backup record without a snapshot");
            }).ok()
        };
        let recorded: Vec<SnapshotId> = records
            .iter()
            .filter(|record| !expired.contains(&record.name))
            .filter_map(&snapshot)
            .collect();
        let gone = records.iter().filter(|record| expired.contains(&record.name));
        // If two records have the same snapshot, it stays as long as one of them stays.
        let forget = gone.filter_map(&snapshot).filter(|id| !recorded.contains(id)).collect();
        let keeps = |record: &&BackupRecord| {
            plan.backups.iter().any(|b| b.name == record.name && b.tier1.keep)
        };
        let near = records.iter().filter(keeps).filter_map(&snapshot).collect();
        let evicts = plan.has_tier2 && !plan.evicted().is_empty();
        PruneJob {
            forget,
            recorded,
            now_unix: self.base.now_unix(),
            orphan_seconds: ORPHAN_SECONDS,
            // Unneeded packs and snapshots without a record are removed by the same clock, so the same hold applies.
            prune: plan.hold == Hold::Nothing,
            keep_marked_seconds: self.settings.maintenance.keep_marked_seconds,
            near: evicts.then_some(near),
            ..PruneJob::default()
        }
    }

    /// Removes the record of a backup, which ends the backup's existence. Tier 2 comes first, because read-only
    /// credentials are refused there before anything is removed. The removal is durable, so that the record does not
    /// come back without its snapshot.
    async fn remove_record(&self, cluster: &ClusterName, name: &BackupName) -> Result<(), Status> {
        let object = BaseObject::Record(name.clone());
        if let Some(tier2) = self.base.tier2() {
            let removed = tier2.remove(&object.key(cluster)).await;
            removed
                .map_err(|e| Code::StorageFailed.status(format!("expire backup {name}: {e}")))?;
            self.base.archives().removed(cluster, &object);
        }
        crash_point!("expire.tier2");
        let (base, cluster, name) = (self.base.clone(), cluster.clone(), name.clone());
        let removed = tokio::task::spawn_blocking(move || -> Result<(), Error> {
            let disk = base.disk().as_ref();
            let path = base.path(&cluster, &object);
            durable::remove_if_there(disk, &path)?;
            if let Some(directory) = path.parent().filter(|directory| disk.list(directory).is_ok())
            {
                durable::sync_dir(disk, directory)?;
            }
            outcomes::remove(disk, base.root(), &cluster, &name)
        });
        let removed = removed.await.map_err(|e| Code::Internal.status(format!("expire: {e}")))?;
        removed.map_err(|e| errors::status(&e))
    }
}

/// The backups whose copy on tier 1 was evicted; none when the child did not get that far.
fn evicted(plan: &RetentionPlan, pruned: &PruneResult) -> Vec<BackupName> {
    if !pruned.evicted {
        return Vec::new();
    }
    let gone = plan.backups.iter().filter(|b| b.tier1.present && !b.tier1.keep && b.tier2.keep);
    gone.map(|b| b.name.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use klio_storage::catalog::retention::{BackupPlan, Decision, Policies};

    #[test]
    fn backups_are_named_as_evicted_only_when_the_child_came_to_that() {
        let decision = |present, keep| Decision { present, keep, reasons: vec![] };
        let backup = |name: &str, tier1| BackupPlan {
            name: name.parse().unwrap(),
            committed_unix: 1.0,
            tier1,
            tier2: decision(true, true),
        };
        let plan = RetentionPlan {
            as_of_unix: 2.0,
            policies: Policies::default(),
            has_tier2: true,
            alarms: vec![],
            hold: Hold::Nothing,
            backups: vec![
                backup("gone-before", decision(false, false)),
                backup("goes", decision(true, false)),
                backup("stays", decision(true, true)),
            ],
            wal: vec![],
        };
        let early = PruneResult { held_back: vec!["why".into()], ..PruneResult::default() };
        assert_eq!(evicted(&plan, &early), []);
        let done = PruneResult { evicted: true, ..PruneResult::default() };
        assert_eq!(evicted(&plan, &done), ["goes".parse().unwrap()]);
    }
}
