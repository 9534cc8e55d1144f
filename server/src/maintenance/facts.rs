//! Gathers what a retention plan follows from.
//!
//! P6: whatever cannot be read becomes a problem in words, and a problem empties the plan.

use super::Inner;
use klio_pg::{SegmentSize, TimelineHistory};
use klio_storage::{
    catalog::{
        Holdings, RetentionPlan,
        retention::{self, Facts, KnownBackup, KnownTimeline},
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

    async fn facts(&self, cluster: &ClusterName) -> Result<Facts, Status> {
        let listed = self.base.backups(cluster).await?;
        let holdings = self.base.holdings(cluster).await?;
        let mut problems = listed.problems;
        problems.extend(self.base.wal().problems(cluster));
        let known = |backup: crate::base::ListedBackup| KnownBackup {
            damaged: backup.verified.as_ref().is_some_and(|verified| !verified.ok),
            tier1: backup.tier1,
            tier2: backup.tier2,
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
            timelines,
            segment_size,
            has_tier2: self.base.tier2().is_some(),
        })
    }
}

fn timelines(holdings: &Holdings, problems: &mut Vec<String>) -> Vec<KnownTimeline> {
    let mut known = Vec::new();
    for line in &holdings.timelines {
        let Some(end) = line.runs.iter().map(|run| run.end).max() else { continue };
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
