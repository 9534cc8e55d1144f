//! The record of a cluster's timelines, over both tiers, so that a new server, or one that lost its disk, knows all
//! findings and decisions before it accepts a byte.
//!
//! The current record is on tier 1. It is uploaded like `cluster.json`, and read from the bucket if tier 1 has none.

use super::{
    BaseStore, Line, identity,
    learned::{APART_HINT, PATIENCE_TO_STREAM},
    run, tier2_status,
};
use crate::errors;
use klio_pg::TimelineId;
use klio_proto::Code;
use klio_storage::{
    Error, Kind, Op,
    catalog::{DecisionError, ForStandbys, Mark, PASSED_OVER, Standing, Timelines},
    layout::{BaseObject, ClusterName, WalFile},
    record,
    tier2::Tier2,
    wal::Position,
};
use std::collections::BTreeSet;
use tonic::Status;

impl BaseStore {
    /// Joins the bucket's record, once after each start, because this tier 1 may be new or may have been set back. If
    /// tier 1 holds WAL and the bucket does not answer, a stream continues with what tier 1 knows (P4).
    ///
    /// # Errors
    /// `UNAVAILABLE` when the bucket has to be asked and does not answer; an I/O error of the disk.
    pub async fn adopt_timelines(&self, cluster: &ClusterName) -> Result<(), Status> {
        let wal = self.wal();
        let is_new = wal.timelines(cluster).is_empty() && wal.positions(cluster).is_empty();
        match self.learn_timelines(cluster, is_new).await {
            Err(error) if !is_new => {
                tracing::warn!(%cluster, %error, "cannot take over the bucket's record of the cluster's timelines");
                Ok(())
            }
            other => other,
        }
    }

    async fn learn_timelines(&self, cluster: &ClusterName, must: bool) -> Result<(), Status> {
        let of = (cluster, &BaseObject::Timelines);
        // The decisions count also while a history cannot be read, which is asked for again then (P4).
        let join = async |theirs: Timelines, until| {
            let joined = self.join_timelines(cluster, theirs.clone()).await;
            let regained = self.regain_histories(cluster, &theirs);
            let regained = tokio::time::timeout_at(until, regained).await.unwrap_or_else(|_| {
                let detail = "expected the histories of timelines that were set aside, found no answer in time";
                Err(Error::new(Kind::Transient, Op::Read, cluster, detail))
            });
            joined.and(regained)
        };
        self.learn(&self.0.timelines, of, must, Timelines::decode, join).await
    }

    /// Takes over the histories of the timelines that are set aside: by its history another timeline of the same number
    /// is known, also if none of its WAL is here. One that cannot be read now keeps none of the others away.
    async fn regain_histories(
        &self,
        cluster: &ClusterName,
        marks: &Timelines,
    ) -> Result<(), Error> {
        let aside = marks.marks().iter().map(|mark| mark.timeline);
        let aside = aside.filter(|timeline| timeline.get() > 1 && marks.is_aside(*timeline));
        let mut regained = Ok(());
        for timeline in aside.filter(|timeline| self.wal().history(cluster, *timeline).is_err()) {
            match self.regain_history(cluster, timeline).await {
                Ok(()) => {}
                Err(error)
                    if matches!(error.kind, Kind::Corrupt | Kind::Denied | Kind::Invalid) =>
                {
                    let timeline = timeline.get();
                    tracing::warn!(%cluster, timeline, %error, "cannot read the history of a timeline that was set aside");
                }
                Err(error) => regained = Err(error),
            }
        }
        regained
    }

    async fn regain_history(
        &self,
        cluster: &ClusterName,
        timeline: TimelineId,
    ) -> Result<(), Error> {
        let Some(content) = self.read_history_in_tier2(cluster, timeline).await? else {
            return Ok(());
        };
        let (store, name) = (self.wal().clone(), cluster.clone());
        let kept =
            tokio::task::spawn_blocking(move || store.put_history(&name, timeline, &content));
        kept.await.map_err(|e| Error::new(Kind::Io, Op::Write, cluster, e))?
    }

    /// Refuses a history that is new to tier 1 if tier 2 has another one under its name, because the number was taken
    /// before: two histories would be spliced (P11). The bucket's answer is waited for only if tier 1 cannot know what
    /// was taken, because it holds no WAL of the cluster, or lacks the history of a timeline that was set aside; a
    /// failover does not wait for it otherwise (P4).
    ///
    /// # Errors
    /// `WRITER_CONFLICT`, which goes away when the PostgreSQL is compared with what was taken over here;
    /// `UNAVAILABLE`; an I/O error of the disk.
    pub async fn check_history(
        &self,
        cluster: &ClusterName,
        timeline: TimelineId,
        content: &[u8],
    ) -> Result<(), Status> {
        self.adopt_timelines(cluster).await?;
        let wal = self.wal();
        let must = wal.positions(cluster).is_empty() || wal.timelines(cluster).is_aside(timeline);
        match self.history_asked_of_tier2(cluster, timeline).await {
            Ok(Some(theirs)) if theirs != content => {
                let key = WalFile::History(timeline).key(cluster);
                let detail = "expected the content that tier 2 has, found another";
                let error = Error::new(Kind::Conflict, Op::Create, key, detail);
                let error = error.hint("two servers were promoted to the same timeline");
                Err(errors::status(&error))
            }
            Ok(_) => Ok(()),
            Err(silent) if must && Code::of(&silent) == Code::Unavailable => Err(silent),
            Err(error) => {
                let (timeline, error) = (timeline.get(), error.message());
                tracing::warn!(%cluster, timeline, error, "cannot compare a new timeline's history with tier 2");
                Ok(())
            }
        }
    }

    /// Tier 2's copy of a history; the answer is not waited for long (P4).
    ///
    /// # Errors
    /// `UNAVAILABLE` when the bucket does not answer; `CORRUPT` and its like for a copy that cannot be read.
    pub async fn history_asked_of_tier2(
        &self,
        cluster: &ClusterName,
        timeline: TimelineId,
    ) -> Result<Option<Vec<u8>>, Status> {
        let read = self.read_history_in_tier2(cluster, timeline);
        let seconds = PATIENCE_TO_STREAM.as_secs();
        let read = tokio::time::timeout(PATIENCE_TO_STREAM, read).await.unwrap_or_else(|_| {
            let detail = format!("no answer within {seconds} s");
            Err(Error::new(
                Kind::Transient,
                Op::Read,
                WalFile::History(timeline).key(cluster),
                detail,
            ))
        });
        read.map_err(|error| match error.kind {
            Kind::Corrupt | Kind::Denied | Kind::Newer => errors::status(&error),
            _ => tier2_status("read a history", cluster, &error),
        })
    }

    /// The retired timelines of which no WAL is left here, ending where they began. Standbys do not see a retired
    /// timeline, so the next failover takes its number again: PostgreSQL's history has to be compared with its.
    pub fn retired_lines(&self, cluster: &ClusterName, held: &[Line]) -> Vec<Line> {
        let marks = self.wal().timelines(cluster);
        let retired = marks.marks().iter().filter(|mark| mark.standing == Standing::Retired);
        let gone = retired
            .map(|mark| mark.timeline)
            .filter(|timeline| held.iter().all(|line| line.timeline != *timeline));
        let line = |timeline| {
            let began = self.wal().history(cluster, timeline).ok()?.switch_point()?;
            let (start, flushed, sealed) = (began, began, began);
            Some(Line::from(&Position { timeline, start, flushed, sealed, has_history: true }))
        };
        gone.filter_map(line).collect()
    }

    /// Joins the bucket's record with tier 1's.
    ///
    /// # Errors
    /// `Conflict` when neither record contains all decisions of the other; then nothing is changed. An I/O error of
    /// the disk.
    pub async fn join_timelines(
        &self,
        cluster: &ClusterName,
        theirs: Timelines,
    ) -> Result<(), Error> {
        let (store, name) = (self.wal().clone(), cluster.clone());
        let joined = tokio::task::spawn_blocking(move || {
            store.change_timelines(&name, |ours| ours.joined(&theirs).map(Some))
        });
        let joined = joined.await.map_err(|e| Error::new(Kind::Io, Op::Write, cluster, e))??;
        let changed = joined.map_err(|apart| {
            let key = BaseObject::Timelines.key(cluster);
            Error::new(Kind::Conflict, Op::Read, key, apart).hint(APART_HINT)
        })?;
        if changed {
            tracing::warn!(%cluster, "took over decisions about timelines that only tier 2 had on record");
            self.timelines_changed(cluster);
        }
        Ok(())
    }

    /// The record, from tier 1 if it knows the cluster, else from the bucket.
    ///
    /// # Errors
    /// `UNAVAILABLE` or `CORRUPT`, from the bucket.
    pub async fn timelines(&self, cluster: &ClusterName) -> Result<Timelines, Status> {
        let here = self.wal().timelines(cluster);
        let Some(tier2) = self.tier2() else { return Ok(here) };
        if !here.is_empty() || self.wal().followed(cluster).is_some() {
            return Ok(here);
        }
        let theirs =
            read(tier2, cluster).await.map_err(|error| match identity::is_unreadable(&error) {
                true => errors::status(&error),
                false => tier2_status("read the record of timelines", cluster, &error),
            })?;
        Ok(theirs.unwrap_or_default())
    }

    /// Records a conflict durably, and logs it once.
    ///
    /// # Errors
    /// An I/O error of the disk; then nothing may be received on the basis of the mark.
    pub async fn mark_timeline(&self, cluster: &ClusterName, mark: Mark) -> Result<(), Status> {
        let (store, name, marked) = (self.wal().clone(), cluster.clone(), mark.clone());
        if run(move || store.mark(&name, marked)).await? {
            tracing::error!(%cluster, timeline = mark.timeline.get(), reason = mark.reason,
                "two PostgreSQLs write: both are received, and a person has to decide (klio timeline list)");
            self.timelines_changed(cluster);
        }
        Ok(())
    }

    /// Carries out a decision, or with `dry_run` only determines its effect. Returns the marks before and after.
    ///
    /// # Errors
    /// An I/O error of the disk. The inner error says why the decision cannot be carried out.
    pub async fn decide_timeline(
        &self,
        cluster: &ClusterName,
        dry_run: bool,
        decide: impl FnOnce(&Timelines, &[TimelineId]) -> Result<Timelines, DecisionError>
        + Send
        + 'static,
    ) -> Result<Result<(Timelines, Timelines), DecisionError>, Status> {
        // The record is joined with the bucket's first, so that no decision is made on one that was set back.
        self.learn_timelines(cluster, true).await?;
        let (store, name) = (self.wal().clone(), cluster.clone());
        let decided = run(move || {
            let held: Vec<TimelineId> =
                store.positions(&name).iter().map(|position| position.timeline).collect();
            let mut both = (Timelines::default(), Timelines::default());
            let changed = store.change_timelines(&name, |marks| {
                both = (marks.clone(), decide(marks, &held)?);
                Ok((!dry_run).then(|| both.1.clone()))
            })?;
            Ok(changed.map(|_| both))
        })
        .await?;
        if decided.is_ok() && !dry_run {
            self.timelines_changed(cluster);
        }
        Ok(decided)
    }

    /// Tells the live sessions, and queues the record for tier 2.
    fn timelines_changed(&self, cluster: &ClusterName) {
        let wal = self.wal();
        let state = self.0.parts.registry.cluster(cluster);
        state.decided(&wal.timelines(cluster), wal.followed(cluster));
        self.announce(cluster, BaseObject::Timelines, 0);
    }

    /// What a standby receives instead of a file. It must not see the history of an undecided or retired timeline,
    /// because it would follow it.
    ///
    /// # Errors
    /// `NOT_FOUND`; the errors of [`BaseStore::timelines`].
    pub async fn instead_for_standbys(
        &self,
        cluster: &ClusterName,
        file: WalFile,
    ) -> Result<Option<&'static str>, Status> {
        let WalFile::History(timeline) = file else { return Ok(None) };
        let marks = self.timelines(cluster).await?;
        let Some(mark) = marks.mark(timeline).filter(|_| marks.is_aside(timeline)) else {
            return Ok(None);
        };
        let followed = self.followed_timeline(cluster).await?;
        let history = followed.and_then(|(t, _)| self.wal().history(cluster, t).ok());
        match marks.for_standbys(timeline, history.as_ref()) {
            ForStandbys::AsItIs => Ok(None),
            ForStandbys::PassedOver => Ok(Some(PASSED_OVER)),
            ForStandbys::Hidden => Err(Code::NotFound.status(format!(
                "fetch {file} of {cluster}: timeline {} is {}, and is not shown to standbys",
                timeline.get(),
                mark.standing
            ))),
        }
    }

    /// The timelines that are being streamed or are undecided, except the one that is followed.
    pub fn other_timelines(&self, cluster: &ClusterName) -> BTreeSet<TimelineId> {
        let wal = self.wal();
        let followed = wal.followed(cluster);
        let marks = wal.timelines(cluster);
        let undecided: Vec<TimelineId> = marks.undecided().map(|mark| mark.timeline).collect();
        let written = wal.positions(cluster).into_iter().map(|position| position.timeline);
        let written = written.filter(|timeline| wal.is_written(cluster, *timeline));
        written.chain(undecided).filter(|timeline| Some(*timeline) != followed).collect()
    }
}

/// Tier 2's record; `None` when there is none.
async fn read(tier2: &Tier2, cluster: &ClusterName) -> Result<Option<Timelines>, Error> {
    let key = BaseObject::Timelines.key(cluster);
    let bytes = tier2.read_small(&key, record::LIMIT_BYTES).await?;
    bytes.map(|bytes| Timelines::decode(&bytes, &key)).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        consumer::tests::{base_store, pinned, s3, tier2},
        queue::tests::TestQueue,
    };
    use std::{
        fs,
        path::Path,
        time::{Duration, Instant},
    };

    const HISTORY: &str = "1\t0/3000000\tno recovery target specified\n";

    fn put(path: &Path, bytes: &[u8]) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    /// The bucket of `main` after timeline 2 was retired.
    fn retired(s3: &s3::S3, main: &ClusterName) -> TimelineId {
        let retired = serde_json::json!([{
            "timeline": 2, "standing": "retired", "against": 1, "reason": "", "marked_unix": 1.0,
            "decided_unix": 2.0, "decided_by": "ops",
        }]);
        let two = TimelineId::new(2).unwrap();
        let marks = record::encode(&retired, "timelines").unwrap();
        put(&s3.object(&BaseObject::Timelines.key(main)), &marks);
        put(&s3.object(&WalFile::History(two).key(main)), HISTORY.as_bytes());
        two
    }

    /// P4, regression test: a history that the bucket did not give held up a stream for minutes, and the decisions were
    /// not taken over.
    #[tokio::test(flavor = "multi_thread")]
    async fn decisions_are_taken_over_although_a_history_does_not_come() {
        let (root, directory) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (queue, s3) = (TestQueue::start(directory.path()).await, s3::S3::start().await);
        let main: ClusterName = "main".parse().unwrap();
        let two = retired(&s3, &main);
        let base = base_store(root.path(), &queue, Some(tier2(&s3)));
        base.wal().pin(&main, pinned(7)).unwrap();
        let hangs = |request: &http::request::Parts| request.uri.path().contains(".history");
        s3.on_request(move |request| hangs(request).then_some(s3::Fault::Hang));
        let began = Instant::now();
        assert!(base.learn_timelines(&main, false).await.is_err());
        assert!(began.elapsed() < Duration::from_millis(4500), "{:?}", began.elapsed());
        assert_eq!(base.wal().timelines(&main).standing(two), Some(Standing::Retired));
        assert!(base.wal().history(&main, two).is_err());
        // It is asked for again.
        s3.heal();
        base.learn_timelines(&main, true).await.unwrap();
        assert!(base.wal().history(&main, two).is_ok());
        queue.stop().await;
    }

    /// P11, regression test: after a lost tier 1 the history of a failover that took the number of a retired timeline was
    /// stored in place of the retired one's.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_history_under_a_number_that_was_taken_is_refused() {
        let (root, directory) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (queue, s3) = (TestQueue::start(directory.path()).await, s3::S3::start().await);
        let main: ClusterName = "main".parse().unwrap();
        let two = retired(&s3, &main);
        let base = base_store(root.path(), &queue, Some(tier2(&s3)));
        base.wal().pin(&main, pinned(7)).unwrap();
        s3.on_request(|_| Some(s3::Fault::Status(503, "SlowDown")));
        let other = HISTORY.replace('3', "5");
        let check = async |content: &str| base.check_history(&main, two, content.as_bytes()).await;
        // Tier 1 knows nothing of the cluster, so that the bucket has to be asked.
        assert_eq!(Code::of(&check(&other).await.unwrap_err()), Code::Unavailable);
        s3.heal();
        let refused = check(&other).await.unwrap_err();
        assert_eq!(Code::of(&refused), Code::WriterConflict, "{refused}");
        check(HISTORY).await.unwrap();
        // By what was taken over PostgreSQL's is found to be another history when it comes again.
        assert_eq!(base.retired_lines(&main, &[]).len(), 1);
        queue.stop().await;
    }

    /// P4: where tier 1 holds WAL, a failover does not wait for a bucket that does not answer.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_new_timeline_goes_on_without_the_bucket() {
        let (root, directory) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (queue, s3) = (TestQueue::start(directory.path()).await, s3::S3::start().await);
        let main: ClusterName = "main".parse().unwrap();
        drop(crate::status::tests::store(root.path(), &["main"]));
        let segment: WalFile = "000000010000000000000001".parse().unwrap();
        let bytes = zstd::encode_all(&vec![1; 1 << 20][..], 1).unwrap();
        put(&root.path().join(segment.key(&main)), &bytes);
        let base = base_store(root.path(), &queue, Some(tier2(&s3)));
        s3.on_request(|_| Some(s3::Fault::Status(503, "SlowDown")));
        let two = TimelineId::new(2).unwrap();
        base.check_history(&main, two, HISTORY.as_bytes()).await.unwrap();
        queue.stop().await;
    }
}
