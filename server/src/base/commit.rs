//! Commits a finished backup.
//!
//! BASE3: the record is written if and only if (1) the snapshot and everything it needs is in the repository, and (2)
//! all WAL from the backup's start to its stop is durable and contiguous, over every timeline on the way. A file in
//! the repository is whole: it has the bytes of its name or is absent (REPO1 and REPO2), and a pack must have the size
//! that the index says, because disks may cut files short. The record is written atomically and last, so a crash
//! leaves the whole record or none. Committing the same record again gives the same answer.

use super::{BaseStore, reserve::Caller, run};
use klio_pg::SegmentSize;
use klio_proto::Code;
use klio_storage::{
    Error,
    catalog::BackupRecord,
    crash_point,
    disk::durable,
    layout::{BaseFile, BaseKind, BaseObject, ClusterName},
    record,
    repository::SnapshotId,
};
use std::collections::BTreeMap;
use tonic::Status;

/// How many missing files a refusal names.
const NAMED_MAX: usize = 3;

impl BaseStore {
    /// Checks a record and writes it.
    ///
    /// # Errors
    /// `INVALID` for a record that cannot be right, `INCOMPLETE` when something it needs is not stored, `BUSY` when
    /// another backup has the reservation, `UNAVAILABLE` when none has.
    pub async fn commit(
        &self,
        cluster: &ClusterName,
        document: &[u8],
        caller: &Caller,
    ) -> Result<(), Status> {
        let record: BackupRecord = serde_json::from_slice(document)
            .map_err(|e| Code::Invalid.status(format!("commit a backup of {cluster}: {e}")))?;
        // Before anything is compared, so that a repeated record is corrected in the same way.
        let record = in_order(cluster, record);
        let part = self.cluster(cluster);
        let _one = part.committing.lock().await;
        if self.is_committed(cluster, &record).await? {
            return Ok(());
        }
        self.reservations().may_commit(cluster, &record.name, caller)?;
        let snapshot = self.check_fields(cluster, &record)?;
        self.check_wal(cluster, &record).await?;
        self.check_snapshot(cluster, &record, snapshot).await?;
        // Checked again: the reservation may have ended, and a prune may have begun, while all that was read.
        self.reservations().may_commit(cluster, &record.name, caller)?;
        let record = BackupRecord { committed_unix: self.now_unix(), ..record };
        self.write_record(cluster, record).await
    }

    /// Whether exactly this record exists.
    async fn is_committed(
        &self,
        cluster: &ClusterName,
        record: &BackupRecord,
    ) -> Result<bool, Status> {
        let (this, name, wanted) = (self.clone(), cluster.clone(), record.name.clone());
        let there = run(move || this.record_on_disk(&name, &wanted)).await?;
        let same = there.map(|there| {
            let committed_unix = record.committed_unix;
            BackupRecord { committed_unix, ..there } == *record
        });
        let in_tier2 =
            || self.archives().records(cluster).is_some_and(|r| r.contains(&record.name));
        match same {
            Some(true) => Ok(true),
            None if !in_tier2() => Ok(false),
            _ => Err(refuse(Code::Invalid, cluster, record, "another backup has that name")),
        }
    }

    fn check_fields(
        &self,
        cluster: &ClusterName,
        record: &BackupRecord,
    ) -> Result<SnapshotId, Status> {
        let bad = |detail: String| Err(refuse(Code::Invalid, cluster, record, detail));
        let Some(pinned) = self.wal().pinned(cluster) else {
            return bad("expected a cluster that was identified first, found none".into());
        };
        if record.system_identifier != pinned.system_identifier.to_string() {
            let (expected, found) = (pinned.system_identifier, &record.system_identifier);
            let detail = format!("expected system identifier {expected}, found {found}");
            return Err(refuse(Code::WrongSystem, cluster, record, detail));
        }
        if SegmentSize::new(record.segment_size) != Ok(pinned.segment_size) {
            let (expected, found) = (pinned.segment_size.bytes(), record.segment_size);
            return bad(format!("expected a WAL segment size of {expected}, found {found}"));
        }
        if record.stop_lsn <= record.start_lsn || record.stop_timeline < record.start_timeline {
            return bad(format!(
                "expected a stop after the start at {} on timeline {:?}, found {} on {:?}",
                record.start_lsn, record.start_timeline, record.stop_lsn, record.stop_timeline
            ));
        }
        let times = [record.started_postgres_unix, record.stopped_postgres_unix, record.begun_unix];
        if times.iter().any(|time| !time.is_finite() || *time <= 0.0) {
            return bad(format!("expected times after 1970, found {times:?}"));
        }
        record.snapshot.parse().or_else(|e| bad(format!("snapshot: {e}")))
    }

    async fn check_wal(&self, cluster: &ClusterName, record: &BackupRecord) -> Result<(), Status> {
        let (timeline, start, stop) = (record.stop_timeline, record.start_lsn, record.stop_lsn);
        let mut missing = None;
        // Usually tier 1 alone is enough; then what is known of tier 2 is used; then the bucket is asked.
        for tier2 in [
            super::holdings::Tier2Use::Not,
            super::holdings::Tier2Use::Cached,
            super::holdings::Tier2Use::Fresh,
        ] {
            let holdings = self.holdings_with(cluster, tier2).await?;
            let history = holdings.history(timeline).map_err(|e| crate::errors::status(&e))?;
            if record.start_timeline != timeline && history.end_of(record.start_timeline).is_none()
            {
                missing = Some(format!(
                    "timeline {:?} is not known to come from {:?}: its history is not held",
                    timeline, record.start_timeline
                ));
                continue;
            }
            match holdings.first_missing(timeline, start, stop) {
                Ok(None) => return Ok(()),
                Ok(Some((line, run))) => {
                    missing = Some(format!(
                        "WAL of timeline {line:?} from {} to {} is not held",
                        run.start, run.end
                    ));
                }
                Err(error) => return Err(crate::errors::status(&error)),
            }
        }
        Err(refuse(Code::Incomplete, cluster, record, missing.unwrap_or_default()))
    }

    /// Checks that everything the snapshot needs is in the repository.
    async fn check_snapshot(
        &self,
        cluster: &ClusterName,
        record: &BackupRecord,
        snapshot: SnapshotId,
    ) -> Result<(), Status> {
        let incomplete = |detail: String| refuse(Code::Incomplete, cluster, record, detail);
        let needed = self.needs(cluster, snapshot).await.map_err(|error| match Code::of(&error) {
            Code::NotFound | Code::Corrupt => {
                tracing::warn!(%cluster, backup = %record.name, %error, "a backup is not complete");
                incomplete(format!("the snapshot cannot be read: {}", error.message()))
            }
            _ => error,
        })?;
        let mut missing = Vec::new();
        for kind in BaseKind::ALL {
            if !needed.keys().any(|file| file.kind == kind) {
                continue;
            }
            let held = self.list_files(cluster, kind).await?;
            let wanted = needed.iter().filter(|(file, _)| file.kind == kind);
            missing.extend(wanted.filter_map(|(file, size)| lacks(*file, *size, &held)));
        }
        if missing.is_empty() {
            return Ok(());
        }
        // The files may have been evicted from tier 1, and tier 2 could not be asked.
        if self.tier2().is_some() && !self.knows_tier2(cluster) {
            return Err(Code::Unavailable.status(format!(
                "commit backup {} of {cluster}: {} files are missing or not whole on tier 1, and tier 2 did not answer",
                record.name,
                missing.len()
            )));
        }
        let named = missing.iter().take(NAMED_MAX).map(String::as_str).collect::<Vec<_>>();
        let count = missing.len();
        Err(incomplete(format!("{count} files are missing or not whole: {}", named.join(", "))))
    }

    async fn write_record(&self, cluster: &ClusterName, body: BackupRecord) -> Result<(), Status> {
        let (this, name) = (self.clone(), cluster.clone());
        run(move || {
            let object = BaseObject::Record(body.name.clone());
            let path = this.path(&name, &object);
            if let Some(directory) = path.parent() {
                durable::create_dir(this.disk().as_ref(), directory)?;
            }
            let bytes = record::encode(&body, path.display())?;
            crash_point!("commit.checked");
            durable::overwrite(this.disk().as_ref(), &path, &bytes)?;
            crash_point!("commit.written");
            tracing::info!(cluster = %name, backup = %body.name, start = %body.start_lsn, stop = %body.stop_lsn, bytes = body.size_bytes, stored = body.stored_bytes, "a backup is complete");
            this.announce(&name, object, bytes.len() as u64);
            this.remember_record(&name, &body);
            Ok::<_, Error>(())
        })
        .await
    }
}

/// If the clock was set back while the backup ran, hours of copying are not thrown away: LSNs give the order. The stop
/// time is set to the start time at least. A restore to an earlier time then uses an older backup, because a backup is
/// used only for times after its stop.
fn in_order(cluster: &ClusterName, mut record: BackupRecord) -> BackupRecord {
    let (started, stopped) = (record.started_postgres_unix, record.stopped_postgres_unix);
    if stopped < started {
        tracing::warn!(
            %cluster, backup = %record.name, started, stopped,
            "PostgreSQL's clock was set back while the backup was taken; its stop counts as its start"
        );
        record.stopped_postgres_unix = started;
    }
    if record.duration_seconds < 0.0 {
        tracing::warn!(
            %cluster, backup = %record.name, seconds = record.duration_seconds,
            "the clock of klio's machine was set back while the backup was taken; its duration is not known"
        );
        record.duration_seconds = 0.0;
    }
    record
}

/// What is wrong with a needed file: it is not stored, or has another size than it must have.
fn lacks(file: BaseFile, expected: Option<u64>, held: &BTreeMap<BaseFile, u64>) -> Option<String> {
    match (held.get(&file), expected) {
        (None | Some(0), _) => Some(file.relative()),
        (Some(found), Some(expected)) if *found != expected => {
            Some(format!("{} (expected {expected} bytes, found {found})", file.relative()))
        }
        _ => None,
    }
}

fn refuse(
    code: Code,
    cluster: &ClusterName,
    record: &BackupRecord,
    detail: impl std::fmt::Display,
) -> Status {
    code.status(format!("commit backup {} of {cluster}: {detail}", record.name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use klio_pg::{Lsn, TimelineId};
    use klio_storage::testing::backup_record;

    fn record(started: f64, stopped: f64, seconds: f64) -> BackupRecord {
        let (name, timeline) = ("b".parse().unwrap(), TimelineId::new(1).unwrap());
        BackupRecord {
            started_postgres_unix: started,
            stopped_postgres_unix: stopped,
            duration_seconds: seconds,
            ..backup_record(name, timeline, Lsn::new(100), Lsn::new(200))
        }
    }

    #[test]
    fn a_clock_that_was_set_back_spoils_no_backup() {
        let cluster = "pg".parse().unwrap();
        let good = record(100.0, 160.0, 60.0);
        assert_eq!(in_order(&cluster, good.clone()), good);
        let once = in_order(&cluster, record(100.0, 40.0, -60.0));
        assert_eq!(once, record(100.0, 100.0, 0.0));
        assert_eq!(in_order(&cluster, once.clone()), once);
    }
}
