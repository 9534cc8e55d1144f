//! Removes WAL that no retained backup needs.
//!
//! For each timeline, oldest first: the horizon is recorded; then each file on tier 1 is proven in tier 2 by reading
//! it there, and evicted (P5); then expired WAL is removed from tier 2. Only WAL below the contiguous archived
//! frontier is removed, never the last file of a timeline, and never a history. It stops at the first object that
//! cannot be removed from tier 2, so that no hole appears behind one that is left. WAL that a restore or a recovery
//! may still read is evicted from tier 1, but not expired (`readers`).

use super::Inner;
use crate::{
    errors,
    readers::{Hold, Readers},
};
use klio_pg::{Lsn, SegmentName, SegmentSize, TimelineId};
use klio_proto::Code;
use klio_storage::{
    Error,
    catalog::{MaintenanceOutcome, RetentionPlan, retention::WalPlan},
    crash_point,
    layout::{ClusterName, Form, WalFile},
    tier2::{Source, Tier2, Wrapping},
    wal::{Horizon, StoredFile, WalStore},
};
use tonic::Status;

/// How many files an outcome names; the others are counted.
const NAMED_MAX: usize = 10;

impl Inner {
    pub(super) async fn expire_wal(
        &self,
        cluster: &ClusterName,
        plan: &RetentionPlan,
        outcome: &mut MaintenanceOutcome,
    ) -> Result<(), Status> {
        let Some(size) = self.base.wal().pinned(cluster).map(|p| p.segment_size) else {
            return Ok(());
        };
        for line in &plan.wal {
            self.expire_line(cluster, size, line, outcome).await?;
        }
        self.base.forget_wal_listing(cluster);
        Ok(())
    }

    async fn expire_line(
        &self,
        cluster: &ClusterName,
        size: SegmentSize,
        line: &WalPlan,
        outcome: &mut MaintenanceOutcome,
    ) -> Result<(), Status> {
        let Some(below) = line.tier1_below else { return Ok(()) };
        let Some(tier2) = self.base.tier2() else {
            let Some(gone) = line.tier2_below else { return Ok(()) };
            let gone = self.unread(cluster, line.timeline, gone, outcome);
            self.raise(cluster, line.timeline, gone, gone).await?;
            for file in self.removable(cluster, line.timeline).await? {
                self.remove(cluster, file.file, outcome).await?;
            }
            return Ok(());
        };
        if self.held_from(cluster, line.timeline).is_none() {
            // The timeline is from a tier 1 that was lost, so there is nothing to prove here and no place for a
            // horizon.
            let Some(gone) = line.tier2_below else { return Ok(()) };
            let far = Far { timeline: line.timeline, below: gone, readers: self.base.readers() };
            expire_told(tier2, cluster, size, far, outcome).await;
            return Ok(());
        }
        let frontier = self.frontier(cluster, line.timeline);
        let Some(archived) = frontier else { return Ok(()) };
        // P5: only below what is archived without a hole.
        let near = below.min(archived);
        let Some(horizon) = self.raise(cluster, line.timeline, near, Lsn::ZERO).await? else {
            return Ok(());
        };
        let mut kept = 0;
        for file in self.removable(cluster, line.timeline).await? {
            if let Err(error) = self.prove(tier2, cluster, &file).await {
                kept += 1;
                if kept <= NAMED_MAX {
                    let text = format!(
                        "{} stays on tier 1, because it is not proven in tier 2: {error}",
                        file.file
                    );
                    outcome.held_back.push(text);
                }
                continue;
            }
            self.remove(cluster, file.file, outcome).await?;
        }
        if kept > NAMED_MAX {
            outcome.held_back.push(format!("and {} more WAL files", kept - NAMED_MAX));
        }
        let gone = line.tier2_below.map_or(Lsn::ZERO, |below| below.min(horizon.local_from));
        if kept > 0 || gone == Lsn::ZERO {
            return Ok(());
        }
        let gone = self.unread(cluster, line.timeline, gone, outcome);
        if self.raise(cluster, line.timeline, Lsn::ZERO, gone).await?.is_some() {
            let far = Far { timeline: line.timeline, below: gone, readers: self.base.readers() };
            expire_told(tier2, cluster, size, far, outcome).await;
        }
        Ok(())
    }

    /// The part of expired WAL that nobody reads now. If another part stays, the reason is reported.
    fn unread(
        &self,
        cluster: &ClusterName,
        timeline: TimelineId,
        gone: Lsn,
        outcome: &mut MaintenanceOutcome,
    ) -> Lsn {
        let hold = self.base.readers().hold(cluster).filter(|hold| hold.from < gone);
        let Some(Hold { from, why }) = hold else { return gone };
        if self.held_from(cluster, timeline).is_some_and(|held| held < gone) {
            outcome.held_back.push(stays(timeline, gone, &why));
        }
        from
    }

    /// The first byte of a timeline that tier 1 holds or has evicted.
    fn held_from(&self, cluster: &ClusterName, timeline: TimelineId) -> Option<Lsn> {
        let positions = self.base.wal().positions(cluster);
        positions.into_iter().find(|p| p.timeline == timeline).map(|p| p.start)
    }

    /// How far a timeline is archived without a hole.
    fn frontier(&self, cluster: &ClusterName, timeline: TimelineId) -> Option<Lsn> {
        let state = self.archives.as_ref()?.state(cluster);
        state.frontiers.iter().find(|f| f.timeline == timeline).map(|f| f.archived)
    }

    /// P5, at this moment: the object is read, and its content is that of the file.
    async fn prove(
        &self,
        tier2: &Tier2,
        cluster: &ClusterName,
        file: &StoredFile,
    ) -> Result<(), Error> {
        let key = file.file.key_in(cluster, file.form);
        let source = Source {
            path: self.base.root().join(&key),
            sha256: None,
            zstd: !matches!(file.file, WalFile::History(_)),
            plaintext_bytes: None,
            grows: matches!(file.file, WalFile::Partial(_)),
            wrapping: Wrapping {
                age: file.form == Form::Age,
                other_key: Some(file.file.key_in(cluster, file.form.other())),
                at_rest: self.base.at_rest().clone(),
            },
        };
        tier2.prove(&source, &key).await.map(drop)
    }

    /// Raises the horizon, durably, but only if there is something to remove. `None`: nothing is stored.
    async fn raise(
        &self,
        cluster: &ClusterName,
        timeline: TimelineId,
        local: Lsn,
        held: Lsn,
    ) -> Result<Option<Horizon>, Status> {
        let store = self.base.wal();
        let known = store.horizons(cluster).into_iter().find(|h| h.timeline == timeline);
        let raised = known.as_ref().filter(|h| local <= h.local_from && held <= h.held_from);
        if let Some(known) = raised {
            return Ok(Some(known.clone()));
        }
        let position = store.positions(cluster).into_iter().find(|p| p.timeline == timeline);
        if position.is_none_or(|p| known.is_none() && local.max(held) <= p.start) {
            return Ok(None);
        }
        self.blocking(cluster, move |store, name| store.raise_horizon(name, timeline, local, held))
            .await
            .map(Some)
    }

    async fn removable(
        &self,
        cluster: &ClusterName,
        timeline: TimelineId,
    ) -> Result<Vec<StoredFile>, Status> {
        self.blocking(cluster, move |store, name| store.removable(name, timeline)).await
    }

    async fn remove(
        &self,
        cluster: &ClusterName,
        file: WalFile,
        outcome: &mut MaintenanceOutcome,
    ) -> Result<(), Status> {
        let bytes = self.blocking(cluster, move |store, name| store.remove(name, file)).await?;
        crash_point!("wal.evicted");
        outcome.wal_removed_tier1 += 1;
        outcome.freed_tier1_bytes += bytes;
        Ok(())
    }

    async fn blocking<T: Send + 'static>(
        &self,
        cluster: &ClusterName,
        work: impl FnOnce(&WalStore, &ClusterName) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Status> {
        let (store, name) = (self.base.wal().clone(), cluster.clone());
        let done = tokio::task::spawn_blocking(move || work(&store, &name)).await;
        let done = done.map_err(|e| Code::Internal.status(format!("work on tier 1: {e}")))?;
        done.map_err(|e| errors::status(&e))
    }
}

/// The WAL that may be removed from tier 2.
struct Far<'a> {
    timeline: TimelineId,
    /// Only segments that end at or below this position.
    below: Lsn,
    /// Except what somebody reads. This is checked before each removal, because there may be thousands.
    readers: &'a Readers,
}

fn stays(timeline: TimelineId, below: Lsn, why: &str) -> String {
    format!("WAL of timeline {timeline:?} below {below} stays: {why}")
}

/// The same as [`expire_far`], with an error reported in the outcome.
async fn expire_told(
    tier2: &Tier2,
    cluster: &ClusterName,
    size: SegmentSize,
    far: Far<'_>,
    outcome: &mut MaintenanceOutcome,
) {
    if let Err(error) = expire_far(tier2, cluster, size, far, outcome).await {
        tracing::error!(%cluster, %error, "cannot remove expired WAL from tier 2");
        outcome.held_back.push(format!("remove WAL from tier 2: {error}"));
    }
}

/// Removes from tier 2 what lies below the plan's position, oldest first, except the timeline's last object.
///
/// P6: the position is the plan's, not the horizon's. On a new server, whose tier 1 began in the middle, the horizon
/// begins there as well, and every older backup needs the WAL below it.
async fn expire_far(
    tier2: &Tier2,
    cluster: &ClusterName,
    size: SegmentSize,
    Far { timeline, below, readers }: Far<'_>,
    outcome: &mut MaintenanceOutcome,
) -> Result<(), Error> {
    let prefix = format!("{cluster}/wal");
    let mut objects: Vec<(SegmentName, String, u64)> = Vec::new();
    for object in tier2.list_prefix(&format!("{prefix}/{timeline}")).await? {
        let relative = object.key.strip_prefix(&prefix).map(|r| r.trim_start_matches('/'));
        if let Some((WalFile::Segment(name) | WalFile::Partial(name), _)) =
            relative.and_then(WalFile::parse_stored)
        {
            objects.push((name, object.key, object.size));
        }
    }
    objects.sort();
    let last = objects.last().map(|(name, ..)| *name);
    for (name, key, bytes) in objects {
        let end = name.start_lsn(size).map(|start| start.advance(size.bytes()));
        let Some(end) = end.filter(|end| Some(name) != last && *end <= below) else { continue };
        if let Some(hold) = readers.hold(cluster).filter(|hold| end > hold.from) {
            outcome.held_back.push(stays(timeline, below, &hold.why));
            break;
        }
        tier2.remove(&key).await?;
        crash_point!("wal.expired");
        outcome.wal_removed_tier2 += 1;
        outcome.freed_tier2_bytes += bytes;
    }
    Ok(())
}
