//! Gathers the facts from which a retention plan is computed.
//!
//! P6: a fact that cannot be read becomes a problem, and a problem empties the plan.

use super::Inner;
use crate::base::ListedBackup;
use klio_pg::{SegmentSize, TimelineHistory};
use klio_storage::{
    catalog::{
        BackupRecord, Holdings, RetentionPlan, Standing, Survey,
        retention::{self, Facts, KnownBackup, KnownTimeline, TIMES_DIFFER_SECONDS},
    },
    layout::ClusterName,
};
use tonic::Status;

/// PostgreSQL's default. It has no effect, because a cluster without a pinned system has nothing to decide on.
const SEGMENT_BYTES: u32 = 16 << 20;

impl Inner {
    /// The plan for the current time.
    pub(super) async fn plan(&self, cluster: &ClusterName) -> Result<RetentionPlan, Status> {
        let facts = self.facts(cluster).await?;
        let policies = self.settings.retention.of(cluster);
        Ok(retention::plan(&facts, &policies, self.base.now_unix()))
    }

    /// The reasons why the clock cannot be believed.
    pub(super) fn clock_doubts(&self, cluster: &ClusterName) -> Vec<String> {
        let (now_unix, mut doubts) = (self.base.now_unix(), self.base.clock_doubts());
        // The last run ended before now, so its time must not be in the future.
        if let Some(last) = self.metrics.latest_maintenance(cluster)
            && last > now_unix + TIMES_DIFFER_SECONDS
        {
            doubts.push(format!(
                "the server's clock says {now_unix:.0}, and the last maintenance ended at {last:.0}; nothing is removed meanwhile; hint: correct the clock; the next run checks it again"
            ));
        }
        doubts
    }

    async fn facts(&self, cluster: &ClusterName) -> Result<Facts, Status> {
        let listed = self.base.backups(cluster).await?;
        // Asked now, so that WAL that has just arrived counts.
        let holdings = self.holdings_now(cluster).await?;
        let mut problems = listed.problems;
        if problems.is_empty() {
            let names = listed.backups.iter().map(|backup| &backup.record.name);
            self.metrics.retain(cluster, &names.collect());
        }
        problems.extend(self.base.wal().problems(cluster));
        let held = Survey::new(&holdings, Vec::new());
        let far = Survey::new(&self.base.holdings_of_tier2(cluster).await?, Vec::new());
        let known = |backup: ListedBackup| KnownBackup {
            damaged: backup.verified.as_ref().is_some_and(|verified| !verified.ok),
            tier1: backup.tier1,
            tier2: backup.tier2 && !is_on_its_way(&backup.record, &held, &far),
            together: backup.together,
            record: backup.record,
        };
        let timelines = timelines(&holdings, &mut problems);
        let size =
            SegmentSize::new(holdings.segment_size).or_else(|_| SegmentSize::new(SEGMENT_BYTES));
        let segment_size = size.map_err(|e| klio_proto::Code::Internal.status(e))?;
        Ok(Facts {
            backups: listed.backups.into_iter().map(known).collect(),
            problems,
            clock: self.clock_doubts(cluster),
            timelines,
            segment_size,
            has_tier2: self.base.tier2().is_some(),
        })
    }
}

/// Whether WAL that the backup needs is stored and not yet in tier 2. Without it tier 2 alone cannot restore the
/// backup, so no older backup may be removed in favour of it.
fn is_on_its_way(record: &BackupRecord, held: &Survey, far: &Survey) -> bool {
    held.broken(record).is_none() && far.broken(record).is_some()
}

fn timelines(holdings: &Holdings, problems: &mut Vec<String>) -> Vec<KnownTimeline> {
    let mut known = Vec::new();
    for line in &holdings.timelines {
        let Some(end) = line.runs.iter().map(|run| run.end).max() else { continue };
        // A person may still decide for an undecided timeline, so nothing of it is removed (P6).
        if holdings.standing(line.timeline) == Some(Standing::Undecided) {
            continue;
        }
        let history = line.history.as_ref().map(|text| {
            TimelineHistory::parse(line.timeline, text.as_bytes()).map_err(|e| e.to_string())
        });
        let history = history.transpose().unwrap_or_else(|problem| {
            problems.push(problem);
            None
        });
        known.push(KnownTimeline { timeline: line.timeline, history, end });
    }
    known
}

#[cfg(test)]
mod tests {
    use super::{super::verify::tests::backup, *};
    use klio_pg::{Lsn, TimelineId};
    use klio_storage::catalog::{Run, TimelineHoldings};

    const SEGMENT: u64 = 1 << 20;

    /// The WAL from segment 1 up to this one.
    fn held_up_to(segment: u64) -> Survey {
        let run = Run { start: Lsn::new(SEGMENT), end: Lsn::new(segment * SEGMENT) };
        let line = TimelineHoldings {
            timeline: TimelineId::new(1).unwrap(),
            history: None,
            caught_up: false,
            runs: vec![run],
        };
        let (segment_size, timelines) = (SEGMENT as u32, vec![line]);
        Survey::new(&Holdings { segment_size, timelines, ..Holdings::default() }, Vec::new())
    }

    #[test]
    fn a_backup_is_on_its_way_until_tier_2_has_its_wal() {
        let record = backup("b", 2, 5);
        let way = |held, far| is_on_its_way(&record, &held_up_to(held), &held_up_to(far));
        assert!(way(5, 4) && way(9, 2));
        assert!(!way(5, 5) && !way(9, 6));
        // WAL that no tier has is not on its way; verification reports it as lost.
        assert!(!way(4, 4));
    }
}
