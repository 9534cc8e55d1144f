//! The marks of a cluster's timelines on tier 1: held in memory with the other state, and changed durably, one change
//! at a time.

use super::{
    WalStore,
    cluster::{Cluster, lock},
    record,
};
use crate::{
    Error, Op,
    disk::durable,
    layout::{ClusterName, TIMELINES},
    timelines::{Mark, Timelines},
};
use klio_pg::TimelineId;

impl WalStore {
    /// Which timelines are in conflict, and what was decided about them.
    pub fn timelines(&self, name: &ClusterName) -> Timelines {
        self.find(name).map(|cluster| lock(&cluster.state).marks.clone()).unwrap_or_default()
    }

    /// The newest timeline with WAL on tier 1 that was neither retired nor left undecided.
    pub fn followed(&self, name: &ClusterName) -> Option<TimelineId> {
        lock(&self.find(name)?.state).followed()
    }

    /// Whether a timeline has an active writer.
    pub fn is_written(&self, name: &ClusterName, timeline: TimelineId) -> bool {
        self.find(name).is_some_and(|c| lock(&c.state).writers.contains_key(&timeline))
    }

    /// Records a conflict durably (MARK1). An existing record of the timeline stays (MARK2). True when it is new.
    ///
    /// # Errors
    /// `NotFound` for a cluster that was never pinned; an I/O error of the disk, and then nothing has changed.
    pub fn mark(&self, name: &ClusterName, mark: Mark) -> Result<bool, Error> {
        self.change_timelines(name, |marks| {
            if marks.is_aside(mark.timeline) {
                return Ok::<_, std::convert::Infallible>(None);
            }
            let mut changed = marks.clone();
            changed.put(mark);
            Ok(Some(changed))
        })
        .map(|outcome| match outcome {
            Ok(changed) => changed,
            Err(never) => match never {},
        })
    }

    /// Replaces the marks by the result of `change`, durably; `None` changes nothing. Returns whether something
    /// changed, or the error of `change`.
    ///
    /// # Errors
    /// `NotFound` for a cluster that was never pinned; an I/O error of the disk, and then nothing has changed.
    pub fn change_timelines<E>(
        &self,
        name: &ClusterName,
        change: impl FnOnce(&Timelines) -> Result<Option<Timelines>, E>,
    ) -> Result<Result<bool, E>, Error> {
        let cluster = self.need(name, Op::Write)?;
        let _one = lock(&cluster.op);
        cluster.ensure_loaded()?;
        cluster.pinned()?;
        let before = lock(&cluster.state).marks.clone();
        match change(&before) {
            Ok(Some(after)) if after != before => cluster.store_timelines(after).map(|()| Ok(true)),
            Ok(_) => Ok(Ok(false)),
            Err(why) => Ok(Err(why)),
        }
    }
}

impl Cluster {
    /// Call it with `op` held.
    fn store_timelines(&self, marks: Timelines) -> Result<(), Error> {
        durable::create_dir(self.disk(), &self.directory())?;
        record::store_timelines(self.disk(), &self.directory().join(TIMELINES), &marks)?;
        lock(&self.state).marks = marks;
        Ok(())
    }
}
