//! Gathers what a retention plan follows from.
//!
//! P6: whatever cannot be read becomes a problem in words, and a problem empties the plan.

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

/// PostgreSQL's default; nothing is decided by it where nothing is pinned.
const SEGMENT_BYTES: u32 = 16 << 20;

impl Inner {
    /// The plan for now.
    pub(super) async fn plan(&self, cluster: &ClusterName) -> Result<RetentionPlan, Status> {
        let facts = self.facts(cluster).await?;
        let policies = self.settings.retention.of(cluster);
        Ok(retention::plan(&facts, &policies, self.base.now_unix()))
    }

    /// Why the clock cannot be believed.
    pub(super) fn clock_doubts(&self, cluster: &ClusterName) -> Vec<String> {
        let (now_unix, mut doubts) = (self.base.now_unix(), self.base.clock_doubts());
        // What was done last was done before now.
        if let Some(last) = self.metrics.latest_maintenance(cluster)
            && last > now_unix + TIMES_DIFFER_SECONDS
        {
            doubts.push(format!(
                "the server's clock says {now_unix:.0}, and the last maintenance ended at {last:.0}; nothing is removed meanwhile; hint: set the clock right; the next run believes it when it is"
            ));
        }
        doubts
    }

    async fn facts(&self, cluster: &ClusterName) -> Result<Facts, Status> {
        let listed = self.base.backups(cluster).await?;
        // What arrived a moment ago counts.
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

/// Whether WAL that the backup needs is held, and not in tier 2 yet: without it tier 2 alone gives nothing back, so
/// nothing older may go in the backup's favour.
fn is_on_its_way(record: &BackupRecord, held: &Survey, far: &Survey) -> bool {
    held.broken(record).is_none() && far.broken(record).is_some()
}

fn timelines(holdings: &Holdings, problems: &mut Vec<String>) -> Vec<KnownTimeline> {
    let mut known = Vec::new();
    for line in &holdings.timelines {
        let Some(end) = line.runs.iter().map(|run| run.end).max() else { continue };
        // A person may decide for it: nothing of it goes (P6).
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

    /// What is held from segment 1 up to this one.
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
        // What nobody has is not on its way: verification says that it is lost.
        assert!(!way(4, 4));
    }
}
