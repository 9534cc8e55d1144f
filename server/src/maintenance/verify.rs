//! Proves what is stored, and keeps the result beside each backup.

use super::{
    Inner,
    child::Tell,
    protocol::{Archived, Finding, Step, VerifyBackup, VerifyJob, VerifyResult},
};
use crate::{base::ListedBackup, errors};
use klio_pg::SegmentSize;
use klio_proto::Code;
use klio_storage::{
    catalog::{
        BackupRecord, Damage, Holdings, VerifyOutcome, outcomes,
        recovery::{Hole, Path},
    },
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
        let holdings = self.holdings_now(cluster).await?;
        let lost = self.lost(cluster, &chosen, &holdings, request).await?;
        let job = self.job(cluster, &chosen, request);
        let result = self.read_back(cluster, job, tell).await?;
        // Asked again: a record that could not be read may be good by now.
        let problems = self.base.backups(cluster).await?.problems;
        let mut result = complete(cluster, result, &chosen, &holdings, &problems);
        result.damaged.extend(lost.into_iter().map(|hole| of_no_backup(cluster, &hole)));
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

    /// Both tiers as they are listed now.
    pub(super) async fn holdings_now(&self, cluster: &ClusterName) -> Result<Holdings, Status> {
        self.base.forget_wal_listing(cluster);
        self.base.holdings(cluster).await
    }

    /// WAL behind the backups that neither tier has, where it was asked for. What is sealed between two listings is
    /// in none of them for a moment: it must be missing twice.
    async fn lost(
        &self,
        cluster: &ClusterName,
        chosen: &[ListedBackup],
        holdings: &Holdings,
        request: &Request,
    ) -> Result<Vec<Hole>, Status> {
        let records = || chosen.iter().map(|backup| &backup.record);
        let mut lost = if request.wal { lost(holdings, records()) } else { Vec::new() };
        if !lost.is_empty() {
            let again = self::lost(&self.holdings_now(cluster).await?, records());
            lost.retain(|hole| again.contains(hole));
        }
        Ok(lost)
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

/// What is missing behind these backups, on every timeline that they lead to, and is not on record as a gap or as
/// expired. Also below where this tier 1 begins: a server that was put in place of a lost one has the rest in tier 2.
fn lost<'a>(
    holdings: &Holdings,
    backups: impl Iterator<Item = &'a BackupRecord> + Clone,
) -> Vec<Hole> {
    let Ok(size) = SegmentSize::new(holdings.segment_size) else { return Vec::new() };
    let mut all: Vec<Hole> = Vec::new();
    for line in &holdings.timelines {
        // A history that cannot be read is found where it is read back.
        let Ok(path) = Path::new(holdings, line.timeline, size) else { continue };
        // What is missing between its start and its stop is told of the backup itself.
        let Some(from) = backups.clone().filter(|b| path.serves(b)).map(|b| b.stop_lsn).min()
        else {
            continue;
        };
        all.extend(path.lost(from));
    }
    all.sort_by_key(|hole| (hole.timeline, hole.from, hole.to));
    all.dedup_by_key(|hole| (hole.timeline, hole.from, hole.to));
    all
}

/// Every backup can be restored to its own end all the same.
fn of_no_backup(cluster: &ClusterName, hole: &Hole) -> Finding {
    let key = format!("{cluster}/wal");
    let damage = Damage { tier: "both".into(), key, problem: hole.to_string() };
    Finding { damage, backups: Vec::new() }
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

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use klio_pg::{Lsn, TimelineId};
    use klio_storage::{
        catalog::{KnownGap, Run, TimelineHoldings},
        testing::backup_record,
    };

    const SEGMENT: u64 = 1 << 20;

    fn lsn(segments: u64) -> Lsn {
        Lsn::new(segments * SEGMENT)
    }

    fn tli(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    /// From one segment to another.
    pub fn backup(name: &str, start: u64, stop: u64) -> BackupRecord {
        backup_record(name.parse().unwrap(), tli(1), lsn(start), lsn(stop))
    }

    fn line(timeline: u32, history: Option<&str>, runs: &[(u64, u64)]) -> TimelineHoldings {
        TimelineHoldings {
            timeline: tli(timeline),
            history: history.map(str::to_owned),
            runs: runs.iter().map(|(from, to)| Run { start: lsn(*from), end: lsn(*to) }).collect(),
            caught_up: false,
        }
    }

    fn found(holdings: &Holdings, backups: &[BackupRecord]) -> Vec<(u32, Lsn, Lsn)> {
        let lost = lost(holdings, backups.iter());
        lost.into_iter().map(|hole| (hole.timeline.get(), hole.from, hole.to)).collect()
    }

    /// A new tier 1 may begin at segment 20: what only tier 2 has counts like the rest.
    #[test]
    fn wal_that_both_tiers_lost_behind_a_backup_is_found_wherever_tier_1_begins() {
        let mut holdings = Holdings {
            segment_size: SEGMENT as u32,
            timelines: vec![line(1, None, &[(1, 8), (9, 12), (13, 30)])],
            ..Holdings::default()
        };
        let old = [backup("a", 2, 3), backup("b", 10, 11)];
        assert_eq!(found(&holdings, &old), [(1, lsn(8), lsn(9)), (1, lsn(12), lsn(13))]);
        // What is in front of the oldest backup nobody needs.
        assert_eq!(found(&holdings, &old[1..]), [(1, lsn(12), lsn(13))]);
        assert_eq!(found(&holdings, &[]), []);
        // What is on record is no news.
        let gap = KnownGap { timeline: tli(1), from: lsn(8), to: lsn(9), reason: "x".into() };
        holdings.gaps.push(gap);
        assert_eq!(found(&holdings, &old), [(1, lsn(12), lsn(13))]);
        // Told once, though two timelines come from there.
        let history = |number: u32| format!("1\t{}\tx\n", lsn(20 + u64::from(number)));
        for number in [2, 3] {
            let runs = [(20 + u64::from(number), 40)];
            holdings.timelines.push(line(number, Some(&history(number)), &runs));
        }
        assert_eq!(found(&holdings, &old), [(1, lsn(12), lsn(13))]);
    }
}
