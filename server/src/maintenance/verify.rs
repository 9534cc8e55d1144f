//! Proves what is stored, and keeps the result beside each backup.

use super::{
    Inner,
    child::Tell,
    protocol::{Archived, Finding, Step, VerifyBackup, VerifyJob, VerifyResult},
};
use crate::{base::ListedBackup, errors};
use klio_proto::Code;
use klio_storage::{
    catalog::{Damage, Holdings, VerifyOutcome, outcomes},
    layout::{BackupName, BaseObject, ClusterName},
};
use tonic::Status;

/// What to verify.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// `None`: every backup.
    pub backup: Option<BackupName>,
    /// Share of packs that is read, 0 to 100.
    pub read_percent: f64,
    /// The same share of the WAL behind the backups.
    pub wal: bool,
}

impl Inner {
    pub(super) async fn verify(
        &self,
        cluster: &ClusterName,
        request: &Request,
        tell: Tell<'_>,
    ) -> Result<VerifyOutcome, Status> {
        tell(Step { phase: "wait for other maintenance".into(), ..Step::default() });
        let _turn = self.turn.lock().await;
        let began = tokio::time::Instant::now();
        let listed = self.base.backups(cluster).await?;
        let chosen = choose(cluster, listed.backups, request)?;
        let holdings = self.base.holdings(cluster).await?;
        let job = self.job(cluster, &chosen, request);
        let result = self.read_back(cluster, job, tell).await?;
        // Asked again: a record that could not be read may be good by now.
        let problems = self.base.backups(cluster).await?.problems;
        let result = complete(cluster, result, &chosen, &holdings, &problems);
        let seconds = began.elapsed().as_secs_f64();
        let outcome =
            |backups: Vec<BackupName>, damaged: Vec<Damage>, repaired: Vec<Damage>| VerifyOutcome {
                backups,
                ok: damaged.is_empty(),
                finished_unix: self.base.now_unix(),
                duration_seconds: seconds,
                read_percent: request.read_percent,
                read_bytes: result.read_bytes,
                files: result.files,
                damaged,
                repaired,
            };
        for backup in &chosen {
            let name = &backup.record.name;
            let own = |findings: &[Finding]| -> Vec<Damage> {
                let own = findings.iter().filter(|f| f.backups.contains(name));
                own.map(|f| f.damage.clone()).collect()
            };
            let own = outcome(vec![name.clone()], own(&result.damaged), own(&result.repaired));
            self.keep_outcome(cluster, own).await?;
        }
        let all = |findings: &[Finding]| findings.iter().map(|f| f.damage.clone()).collect();
        let names = chosen.iter().map(|b| b.record.name.clone()).collect();
        let outcome = outcome(names, all(&result.damaged), all(&result.repaired));
        self.metrics.verified(cluster, &outcome);
        for damage in &outcome.damaged {
            tracing::error!(%cluster, tier = damage.tier, key = damage.key, problem = damage.problem, "damaged");
        }
        for damage in &outcome.repaired {
            tracing::warn!(%cluster, tier = damage.tier, key = damage.key, problem = damage.problem, "was damaged; repaired from the other tier");
        }
        Ok(outcome)
    }

    fn job(&self, cluster: &ClusterName, chosen: &[ListedBackup], request: &Request) -> VerifyJob {
        let pinned = self.base.wal().pinned(cluster);
        let on_disk = |name: &BackupName| {
            let path = self.base.path(cluster, &BaseObject::Record(name.clone()));
            self.base.disk().stat(&path).is_ok()
        };
        let backup = |b: &ListedBackup| VerifyBackup {
            tier1: on_disk(&b.record.name),
            tier2: b.tier2,
            record: b.record.clone(),
        };
        VerifyJob {
            backups: chosen.iter().map(backup).collect(),
            all: request.backup.is_none(),
            read_percent: request.read_percent,
            wal: request.wal,
            archived: self.archived(cluster),
            segment_size: pinned.map_or(0, |p| p.segment_size.as_u32()),
            system_identifier: pinned.map_or(0, |p| p.system_identifier),
        }
    }

    /// What tier 2 must hold: what is archived without a hole, but what was let go and recorded gaps.
    fn archived(&self, cluster: &ClusterName) -> Vec<Archived> {
        let Some(archives) = &self.archives else { return Vec::new() };
        let (horizons, gaps) = (self.base.wal().horizons(cluster), self.base.wal().gaps(cluster));
        let mut owed = Vec::new();
        for frontier in archives.state(cluster).frontiers {
            let horizon = horizons.iter().find(|h| h.timeline == frontier.timeline);
            let mut from = horizon.map_or(frontier.start, |h| h.held_from.max(frontier.start));
            let own = gaps.iter().filter(|gap| gap.timeline == frontier.timeline);
            for gap in own {
                let to = gap.from.min(frontier.archived);
                owed.push(Archived { timeline: frontier.timeline, from, to });
                from = from.max(gap.to);
            }
            owed.push(Archived { timeline: frontier.timeline, from, to: frontier.archived });
        }
        owed
    }

    async fn keep_outcome(
        &self,
        cluster: &ClusterName,
        outcome: VerifyOutcome,
    ) -> Result<(), Status> {
        let (base, cluster) = (self.base.clone(), cluster.clone());
        let kept = tokio::task::spawn_blocking(move || {
            outcomes::store_verified(base.disk().as_ref(), base.root(), &cluster, &outcome)
        });
        let kept =
            kept.await.map_err(|e| Code::Internal.status(format!("keep the outcome: {e}")))?;
        kept.map_err(|e| errors::status(&e))
    }
}

fn choose(
    cluster: &ClusterName,
    backups: Vec<ListedBackup>,
    request: &Request,
) -> Result<Vec<ListedBackup>, Status> {
    let Some(wanted) = &request.backup else { return Ok(backups) };
    let chosen: Vec<ListedBackup> =
        backups.into_iter().filter(|b| b.record.name == *wanted).collect();
    match chosen.is_empty() {
        true => Err(Code::NotFound.status(format!("cluster {cluster} has no backup {wanted}"))),
        false => Ok(chosen),
    }
}

/// Adds what only the server can say: records that cannot be read, and WAL that is missing.
fn complete(
    cluster: &ClusterName,
    mut result: VerifyResult,
    chosen: &[ListedBackup],
    holdings: &Holdings,
    problems: &[String],
) -> VerifyResult {
    for problem in problems {
        let damage = Damage {
            tier: "both".into(),
            key: format!("{cluster}/backups"),
            problem: problem.clone(),
        };
        result.damaged.push(Finding { damage, backups: Vec::new() });
    }
    for backup in chosen {
        let record = &backup.record;
        let missing =
            holdings.first_missing(record.stop_timeline, record.start_lsn, record.stop_lsn);
        let problem = match missing {
            Ok(None) => continue,
            Ok(Some((timeline, run))) => {
                format!("WAL of timeline {timeline:?} from {} to {} is missing", run.start, run.end)
            }
            Err(error) => error.to_string(),
        };
        let damage = Damage { tier: "both".into(), key: format!("{cluster}/wal"), problem };
        result.damaged.push(Finding { damage, backups: vec![record.name.clone()] });
    }
    result
}
