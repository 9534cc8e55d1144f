//! Finds a WAL file for a restore: tier 1, then tier 2.
//!
//! P7: `NOT_FOUND` means that both tiers were asked and definitively have no such file. If a tier could not be asked,
//! the answer is `UNAVAILABLE`, which is retried and never ends a recovery.

use crate::{errors, readers::Readers, rot};
use klio_pg::{Lsn, TimelineId};
use klio_proto::Code;
use klio_storage::{
    Error, Kind, Op,
    crypt::{AtRest, Keys},
    layout::{ClusterName, Form, WalFile},
    tier2::{Download, Tier2},
    wal::{Found, Position, Removed, WalStore},
};
use std::time::Duration;
use tonic::Status;

/// The place where a file was found.
pub enum Located {
    /// On this server's disk.
    Tier1 {
        found: Found,
        /// wal_segment_size in bytes.
        segment_size: u32,
    },
    /// In the bucket. `file` is the file that was found, because a partial segment may be sent for a segment.
    Tier2 {
        file: WalFile,
        download: Download,
        /// The keys that decrypt its bytes, if they are encrypted.
        keys: Option<Keys>,
        /// wal_segment_size in bytes; 0 when the cluster is not pinned here.
        segment_size: u32,
    },
}

impl Located {
    /// Whether the file is only the beginning of a segment.
    pub fn beginning(&self) -> Beginning {
        match self {
            Located::Tier1 { found: Found::Open(_), .. }
            | Located::Tier1 { found: Found::Stored { file: WalFile::Partial(_), .. }, .. } => {
                Beginning::Tier1
            }
            Located::Tier2 { file: WalFile::Partial(_), .. } => Beginning::Tier2,
            _ => Beginning::Not,
        }
    }
}

/// How long the bucket may take to say whether it has more of a segment. A standby waits only a few seconds for the
/// answer.
const LOOK_TIMEOUT: Duration = Duration::from_secs(2);

/// Whether the file that was found is only the beginning of a segment, and in which tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beginning {
    /// It is a whole file.
    Not,
    /// The beginning is on tier 1.
    Tier1,
    /// The beginning is in tier 2.
    Tier2,
}

/// Reads both tiers; cheap to clone.
#[derive(Clone)]
pub struct Source {
    pub store: WalStore,
    pub tier2: Option<Tier2>,
    /// Is told which WAL was fetched, so that retention keeps what comes next.
    pub readers: Readers,
}

impl Source {
    /// Finds a file.
    ///
    /// # Errors
    /// `NOT_FOUND` is definitive; `UNAVAILABLE` when a tier could not be asked.
    pub async fn find(&self, cluster: &ClusterName, file: WalFile) -> Result<Located, Status> {
        let found = self.find_quietly(cluster, file).await?;
        if let (WalFile::Segment(name) | WalFile::Partial(name), Some(pinned)) =
            (file, self.store.pinned(cluster))
            && let Some(start) = name.start_lsn(pinned.segment_size)
        {
            self.readers.fetched(cluster, start);
        }
        Ok(found)
    }

    /// The same; no reader is recorded.
    async fn find_quietly(&self, cluster: &ClusterName, file: WalFile) -> Result<Located, Status> {
        if let Some(found) = self.look(cluster, file).await? {
            return Ok(found);
        }
        let absent = Code::NotFound.status(format!("cluster {cluster} has no {file}"));
        let why = self.why_absent(cluster, file, absent).await;
        if Code::of(&why) == Code::NotFound {
            return Err(why);
        }
        // The tiers are asked one after the other, and WAL arrives meanwhile: what has arrived since then would be taken
        // for lost. Only what is missing at a second look is lost.
        self.look(cluster, file).await?.ok_or(why)
    }

    /// Asks tier 1, then tier 2; `None` if neither has the file, whether or not it should be there. No reader is
    /// recorded.
    pub(crate) async fn look(
        &self,
        cluster: &ClusterName,
        file: WalFile,
    ) -> Result<Option<Located>, Status> {
        let (store, name) = (self.store.clone(), cluster.clone());
        let read = tokio::task::spawn_blocking(move || store.read(&name, file)).await;
        let read = read.map_err(|e| Code::Internal.status(format!("read tier 1: {e}")))?;
        let trouble = match read {
            Ok(found) => {
                let here = Located::Tier1 { found, segment_size: self.segment_size(cluster) };
                let whole = self.whole_in_tier2(cluster, file, here.beginning()).await;
                return Ok(Some(whole.unwrap_or(here)));
            }
            Err(error) if error.kind == Kind::NotFound => None,
            // The copy is damaged or unreadable; the other tier may have a good one.
            Err(error) => {
                tracing::error!(%cluster, %file, %error, "tier 1 copy is not readable; asking tier 2");
                if error.kind == Kind::Corrupt {
                    self.doubt(cluster, file).await;
                }
                Some(errors::status(&error))
            }
        };
        match (self.find_in_tier2(cluster, file).await, trouble) {
            // Tier 1 has the file and cannot read it, so it is not absent, whatever tier 2 says (P7).
            (Err(absent), Some(trouble)) if Code::of(&absent) == Code::NotFound => Err(trouble),
            (Err(absent), None) if Code::of(&absent) == Code::NotFound => Ok(None),
            (answer, _) => answer.map(Some),
        }
    }

    /// The whole segment from tier 2, if tier 1 has only its beginning. This happens when tier 1 was set back and the
    /// stream has continued behind it, or has not come back yet. Filled up with zeros, the beginning would look like
    /// the end of WAL (P7). While the timeline is being received, its newest segment is nowhere else, so the bucket is
    /// not asked. Otherwise a slow bucket does not hold up what is here (P4).
    async fn whole_in_tier2(
        &self,
        cluster: &ClusterName,
        file: WalFile,
        here: Beginning,
    ) -> Option<Located> {
        let (WalFile::Segment(name), Beginning::Tier1) = (file, here) else {
            return None;
        };
        let size = self.store.pinned(cluster)?.segment_size;
        let end = name.start_lsn(size)?.advance(size.bytes());
        let positions = self.store.positions(cluster);
        let is_behind = positions.iter().any(|p| p.timeline == name.timeline() && p.flushed >= end);
        if !is_behind && self.store.is_written(cluster, name.timeline()) {
            return None;
        }
        let asked = self.find_in_tier2(cluster, file);
        let there = match is_behind {
            true => asked.await.ok()?,
            false => tokio::time::timeout(LOOK_TIMEOUT, asked).await.ok()?.ok()?,
        };
        (there.beginning() == Beginning::Not).then_some(there)
    }

    /// Whether the file is the beginning of a segment whose rest was lost while WAL of its timeline continues behind
    /// it. Filled up to a segment, it would look like the end of WAL (P7). In doubt the answer is yes.
    pub async fn before_hole(
        &self,
        cluster: &ClusterName,
        file: WalFile,
        found: Beginning,
    ) -> bool {
        let (WalFile::Segment(name) | WalFile::Partial(name)) = file else { return false };
        if found == Beginning::Not {
            return false;
        }
        if let Some(pinned) = self.store.pinned(cluster)
            && let Some(start) = name.start_lsn(pinned.segment_size)
        {
            let end = start.advance(pinned.segment_size.bytes());
            let inside = |timeline, lsn| timeline == name.timeline() && start <= lsn && lsn < end;
            let gaps = self.store.gaps(cluster);
            let lost = self.store.damaged(cluster);
            if gaps.iter().any(|gap| inside(gap.timeline, gap.from))
                // If a sealed file was damaged on tier 1, tier 2 has all of it.
                || lost.iter().any(|lost| {
                    inside(lost.timeline, lost.from) && !(lost.sealed && found == Beginning::Tier2)
                })
            {
                return true;
            }
        }
        match (&self.tier2, found) {
            (Some(tier2), Beginning::Tier2) => {
                tier2.wal_at(cluster, name).await.map_or(true, |at| at.later)
            }
            _ => false,
        }
    }

    /// The copy of tier 2, for a caller that received a damaged copy of tier 1.
    ///
    /// # Errors
    /// Never `NOT_FOUND`, because the damaged file exists.
    pub async fn find_other_copy(
        &self,
        cluster: &ClusterName,
        file: WalFile,
    ) -> Result<Located, Status> {
        tracing::error!(%cluster, %file, "tier 1 copy is damaged; serving the copy of tier 2");
        self.doubt(cluster, file).await;
        match self.find_in_tier2(cluster, file).await {
            // It expired in the meantime, or the caller never received a copy.
            Err(absent)
                if Code::of(&absent) == Code::NotFound
                    && self.store.removed(cluster, file) == Some(Removed::Expired) =>
            {
                Err(Code::Gap.status(format!("{file} has expired: no retained backup needs it")))
            }
            Err(absent) if Code::of(&absent) == Code::NotFound => Err(Code::Corrupt.status(
                format!("{file} is damaged on tier 1, and tier 2 has no other copy of it"),
            )),
            answer => answer,
        }
    }

    /// Has tier 1 check its copy, and the partial segment that may be sent instead of it.
    async fn doubt(&self, cluster: &ClusterName, file: WalFile) {
        let partial = match file {
            WalFile::Segment(name) => Some(WalFile::Partial(name)),
            _ => None,
        };
        for file in [Some(file), partial].into_iter().flatten() {
            let (store, name) = (self.store.clone(), cluster.clone());
            rot::put_aside(cluster, file, move || store.doubt(&name, file)).await;
        }
    }

    /// Turns "not found" into another error where it would end a recovery by mistake: WAL was lost and more follows,
    /// or there is nothing at all of the cluster (P7).
    async fn why_absent(&self, cluster: &ClusterName, file: WalFile, absent: Status) -> Status {
        let Some(pinned) = self.store.pinned(cluster) else {
            let stored = match &self.tier2 {
                Some(tier2) => tier2.list_wal(cluster).await.map(|files| files.len()),
                None => Ok(0),
            };
            return match stored {
                Ok(0) => {
                    Code::Invalid.status(format!("this server has no WAL of a cluster {cluster}"))
                }
                Ok(_) => self.hole_in_tier2(cluster, file).await.unwrap_or(absent),
                Err(error) => {
                    Code::Unavailable.status(format!("read {file}: {}", errors::of_tier2(&error)))
                }
            };
        };
        let WalFile::Segment(name) = file else { return absent };
        let Some(start) = name.start_lsn(pinned.segment_size) else { return absent };
        let gaps = self.store.gaps(cluster);
        if let Some(gap) =
            gaps.iter().find(|g| g.timeline == name.timeline() && g.from <= start && start < g.to)
        {
            return Code::Gap.status(format!(
                "{file} was lost: WAL from {} to {} is recorded as a gap: {}",
                gap.from, gap.to, gap.reason
            ));
        }
        match self.store.removed(cluster, file) {
            Some(Removed::Expired) => {
                return Code::Gap
                    .status(format!("{file} has expired: no retained backup needs it"));
            }
            // It was proven there before tier 1 evicted it, so it is lost and not absent.
            Some(Removed::Tier2Only) => {
                return Code::Corrupt
                    .status(format!("{file} was in tier 2, but is not there any more"));
            }
            None => {}
        }
        if self.received(cluster, name.timeline(), start) {
            return Code::Corrupt.status(format!("{file} was received, but is not there any more"));
        }
        if let Some(behind) = self.behind(cluster, name.timeline(), start) {
            return Code::Gap.status(format!(
                "{file} is in neither tier, but WAL behind it is: timeline {behind:?}"
            ));
        }
        self.hole_in_tier2(cluster, file).await.unwrap_or(absent)
    }

    /// A timeline with WAL on tier 1 that lies behind this position on a path through it. Such WAL, of a tier 1 that
    /// begins in the middle or after a promotion, shows that the file existed.
    fn behind(
        &self,
        cluster: &ClusterName,
        timeline: TimelineId,
        start: Lsn,
    ) -> Option<TimelineId> {
        let positions = self.store.positions(cluster);
        let passes = |other: TimelineId| {
            let history = self.store.history(cluster, other).ok();
            history.and_then(|h| h.end_of(timeline)).is_some_and(|end| start < end)
        };
        let behind = |p: &&Position| p.timeline == timeline && p.flushed > start;
        let found = positions.iter().find(|p| behind(p) || passes(p.timeline));
        found.map(|p| p.timeline)
    }

    /// Whether the byte at `lsn` was acknowledged on this timeline.
    fn received(&self, cluster: &ClusterName, timeline: TimelineId, lsn: Lsn) -> bool {
        let positions = self.store.positions(cluster);
        positions.iter().any(|p| p.timeline == timeline && p.start <= lsn && lsn < p.flushed)
    }

    /// The error for a file that tier 2 does not have, if tier 2 has later WAL of its timeline or of a descendant, so
    /// that this is not the end of WAL.
    async fn hole_in_tier2(&self, cluster: &ClusterName, file: WalFile) -> Option<Status> {
        let (WalFile::Segment(name), Some(tier2)) = (file, &self.tier2) else { return None };
        let size = match self.store.pinned(cluster) {
            Some(pinned) => Some(pinned.segment_size),
            None => tier2.segment_size_of(cluster).await.ok().flatten(),
        };
        match tier2.hole_at(cluster, name, size, self.store.at_rest()).await {
            Ok(Some(why)) => {
                Some(Code::Unavailable.status(format!("{file} is not in tier 2, but {why}")))
            }
            Ok(None) => None,
            Err(error) => {
                tracing::warn!(%cluster, %file, %error, "cannot ask tier 2 for a WAL file");
                Some(Code::Unavailable.status(format!("read {file}: {}", errors::of_tier2(&error))))
            }
        }
    }

    fn segment_size(&self, cluster: &ClusterName) -> u32 {
        self.store.pinned(cluster).map_or(0, |p| p.segment_size.as_u32())
    }

    async fn find_in_tier2(&self, cluster: &ClusterName, file: WalFile) -> Result<Located, Status> {
        let missing = || Code::NotFound.status(format!("cluster {cluster} has no {file}"));
        let Some(tier2) = &self.tier2 else { return Err(missing()) };
        let segment_size = self.segment_size(cluster);
        // PostgreSQL asks for a segment, but of an ended timeline only the partial segment may exist.
        let partial = match file {
            WalFile::Segment(name) => Some(WalFile::Partial(name)),
            _ => None,
        };
        let at_rest = self.store.at_rest();
        let ours = if at_rest.is_on() { Form::Age } else { Form::Plain };
        let files = [Some(file), partial].into_iter().flatten();
        for (file, form) in files.flat_map(|f| [(f, ours), (f, ours.other())]) {
            let key = file.key_in(cluster, form);
            let keys = match form {
                Form::Plain => None,
                Form::Age => at_rest.reading().cloned(),
            };
            match tier2.download(&key).await {
                Ok(_) if form == Form::Age && keys.is_none() => {
                    return Err(errors::status(&no_keys(at_rest, &key)));
                }
                Ok(download) => {
                    return Ok(Located::Tier2 { file, download, keys, segment_size });
                }
                Err(error) if error.kind == Kind::NotFound => {}
                Err(error) => {
                    tracing::warn!(%cluster, %file, %error, "cannot ask tier 2 for a WAL file");
                    let why = errors::of_tier2(&error);
                    return Err(Code::Unavailable.status(format!("read {file}: {why}")));
                }
            }
        }
        Err(missing())
    }
}

fn no_keys(at_rest: &AtRest, key: &str) -> Error {
    let fallback = || Error::new(Kind::Denied, Op::Read, key, "expected a key for it, found none");
    at_rest.need(key).err().unwrap_or_else(fallback)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::consumer::tests::s3::S3;
    use klio_storage::{
        disk::RealDisk,
        testing::SimulatedWal,
        tier2::Tier2Config,
        wal::{OpenRequest, WalOptions},
    };
    use std::{path::Path, sync::Arc};

    /// Creates in `dir` a tier 1 with WAL of timeline 1 of cluster `pg`, and the directory of an empty bucket.
    pub(crate) fn held(dir: &Path, start: Lsn, end: Lsn) -> (WalStore, ClusterName, Vec<u8>) {
        let root = dir.join("tier1");
        std::fs::create_dir_all(&root).unwrap();
        std::fs::create_dir_all(dir.join("bucket/pg/wal/00000001")).unwrap();
        let store = WalStore::open(Arc::new(RealDisk), root, WalOptions::default()).unwrap();
        let (cluster, wal): (ClusterName, _) = ("pg".parse().unwrap(), SimulatedWal::small(7));
        store.pin(&cluster, wal.pinned()).unwrap();
        let timeline = TimelineId::new(1).unwrap();
        let request = OpenRequest { timeline, start, gap: None, now_unix: 0.0, slot_restart: None };
        let mut writer = store.open_writer(&cluster, &request).unwrap();
        let bytes = wal.bytes(&klio_pg::TimelineHistory::root(timeline), start, end);
        writer.append(start, &bytes).unwrap();
        writer.flush().unwrap();
        drop(writer);
        (store, cluster, bytes)
    }

    /// P7: a damaged file of tier 1 that tier 2 does not have yet is not "no such file".
    #[tokio::test]
    async fn what_tier_1_has_and_cannot_give_is_never_not_found() {
        let dir = tempfile::tempdir().unwrap();
        let (root, bucket) = (dir.path().join("tier1"), dir.path().join("bucket"));
        let (store, cluster, _) = held(dir.path(), Lsn::new(1 << 20), Lsn::new((2 << 20) + 8192));
        let held: WalFile = "000000010000000000000001".parse().unwrap();
        let absent: WalFile = "000000010000000000000009".parse().unwrap();
        let journal = root.join("pg/wal/00000001").join(format!("{held}.open"));
        std::fs::write(&journal, b"not a journal").unwrap();
        let url = format!("file://{}", bucket.display());
        let config = Tier2Config::new(url);
        for tier2 in [None, Some(Tier2::open(&config).unwrap())] {
            let source = Source { store: store.clone(), tier2, readers: Readers::default() };
            let code = |answer: Result<Located, Status>| Code::of(&answer.err().unwrap());
            assert_eq!(code(source.find(&cluster, held).await), Code::Corrupt);
            assert_eq!(code(source.find(&cluster, absent).await), Code::NotFound);
            assert_eq!(code(source.find_other_copy(&cluster, absent).await), Code::Corrupt);
        }
        // The file does not exist at all, although it was acknowledged.
        std::fs::remove_file(&journal).unwrap();
        let source = Source { store, tier2: None, readers: Readers::default() };
        let code = Code::of(&source.find(&cluster, held).await.err().unwrap());
        assert_eq!(code, Code::Corrupt);
    }

    /// Filled up to a segment, the WAL before a gap would look like the end of WAL.
    #[tokio::test]
    async fn a_partial_segment_says_whether_it_is_before_a_hole() {
        let dir = tempfile::tempdir().unwrap();
        let store =
            WalStore::open(Arc::new(RealDisk), dir.path().join("tier1"), WalOptions::default())
                .unwrap();
        let (cluster, wal): (ClusterName, _) = ("pg".parse().unwrap(), SimulatedWal::small(7));
        store.pin(&cluster, wal.pinned()).unwrap();
        let timeline = TimelineId::new(1).unwrap();
        let root = klio_pg::TimelineHistory::root(timeline);
        let stream = |from: u64, to: u64, gap| {
            let (start, end) = (Lsn::new(from), Lsn::new(to));
            let request = OpenRequest { timeline, start, gap, now_unix: 0.0, slot_restart: None };
            let mut writer = store.open_writer(&cluster, &request).unwrap();
            writer.append(start, &wal.bytes(&root, start, end)).unwrap();
            writer.flush().unwrap();
        };
        let source = Source { store: store.clone(), tier2: None, readers: Readers::default() };
        let file: WalFile = "000000010000000000000001".parse().unwrap();
        let before_hole = async || {
            let found = source.find(&cluster, file).await.ok().unwrap();
            source.before_hole(&cluster, file, found.beginning()).await
        };
        stream(1 << 20, (1 << 20) + 8192, None);
        assert!(!before_hole().await, "it is the end");
        let (from, to) = (Lsn::new((1 << 20) + 8192), Lsn::new(3 << 20));
        let gap = klio_storage::wal::GapDeclaration { from, to, reason: "lost".into() };
        stream(3 << 20, (3 << 20) + 8192, Some(gap));
        assert!(before_hole().await, "as a journal");
        store.seal(&cluster, "000000010000000000000001.partial".parse().unwrap()).unwrap();
        assert!(before_hole().await, "as a sealed one");
    }

    /// P7: WAL that was acknowledged and is gone, and a hole in tier 2, are not the end of the archive.
    #[tokio::test]
    async fn wal_that_is_missing_in_the_middle_is_never_not_found() {
        let dir = tempfile::tempdir().unwrap();
        let (root, bucket) = (dir.path().join("tier1"), dir.path().join("bucket"));
        std::fs::create_dir_all(&root).unwrap();
        let directory = bucket.join("pg/wal/00000001");
        std::fs::create_dir_all(&directory).unwrap();
        let store =
            WalStore::open(Arc::new(RealDisk), root.clone(), WalOptions::default()).unwrap();
        let (cluster, wal): (ClusterName, _) = ("pg".parse().unwrap(), SimulatedWal::small(7));
        store.pin(&cluster, wal.pinned()).unwrap();
        let timeline = TimelineId::new(1).unwrap();
        let (start, end) = (Lsn::new(1 << 20), Lsn::new((4 << 20) + 8192));
        let request = OpenRequest { timeline, start, gap: None, now_unix: 0.0, slot_restart: None };
        let mut writer = store.open_writer(&cluster, &request).unwrap();
        let bytes = wal.bytes(&klio_pg::TimelineHistory::root(timeline), start, end);
        writer.append(start, &bytes).unwrap();
        writer.flush().unwrap();
        let file =
            |number: u32| -> WalFile { format!("0000000100000000{number:08X}").parse().unwrap() };
        for unsealed in store.unsealed(&cluster) {
            store.seal(&cluster, unsealed).unwrap();
        }
        let url = format!("file://{}", bucket.display());
        let tier2 = Tier2::open(&Tier2Config::new(url)).unwrap();
        let readers = Readers::default();
        let source = Source { store: store.clone(), tier2: Some(tier2), readers: readers.clone() };
        let code =
            async |number| Code::of(&source.find(&cluster, file(number)).await.err().unwrap());
        for entry in std::fs::read_dir(root.join("pg/wal/00000001")).unwrap().flatten() {
            if entry.file_name().to_string_lossy().contains(&file(2).to_string()) {
                std::fs::remove_file(entry.path()).unwrap();
            }
        }
        assert_eq!(code(2).await, Code::Corrupt);
        assert_eq!(code(5).await, Code::NotFound);
        // P7: below the beginning of this tier 1 there is WAL behind it, and the start of its cluster is not an end
        // either.
        assert_eq!(code(0).await, Code::Gap);
        // WAL that was not fetched is not held; WAL that was fetched stays (P6).
        assert_eq!(readers.hold(&cluster), None);
        assert!(source.find(&cluster, file(3)).await.is_ok());
        assert_eq!(readers.hold(&cluster).map(|hold| hold.from), Some(Lsn::new(3 << 20)));
        std::fs::write(directory.join(format!("{}.zst", file(7))), "x").unwrap();
        assert_eq!(code(5).await, Code::Unavailable);
        assert_eq!(code(8).await, Code::NotFound);
    }

    /// A replay that has caught up asks for WAL which arrives while the bucket is still being asked.
    #[tokio::test(flavor = "multi_thread")]
    async fn wal_that_arrives_while_the_tiers_are_asked_is_not_lost() {
        let dir = tempfile::tempdir().unwrap();
        let (store, cluster, _) = held(dir.path(), Lsn::new(1 << 20), Lsn::new(2 << 20));
        let s3 = S3::start().await;
        let (wal, timeline) = (SimulatedWal::small(7), TimelineId::new(1).unwrap());
        let (writing, name) = (store.clone(), cluster.clone());
        let mut arrived = false;
        s3.on_request(move |_| {
            if !std::mem::replace(&mut arrived, true) {
                let (start, end) = (Lsn::new(2 << 20), Lsn::new((3 << 20) + 8192));
                let request =
                    OpenRequest { timeline, start, gap: None, now_unix: 0.0, slot_restart: None };
                let mut writer = writing.open_writer(&name, &request).unwrap();
                let root = klio_pg::TimelineHistory::root(timeline);
                writer.append(start, &wal.bytes(&root, start, end)).unwrap();
                writer.flush().unwrap();
            }
            None
        });
        let tier2 = Some(crate::consumer::tests::tier2(&s3));
        let source = Source { store, tier2, readers: Readers::default() };
        let file: WalFile = "000000010000000000000002".parse().unwrap();
        let found = source.find(&cluster, file).await;
        assert!(matches!(found, Ok(Located::Tier1 { .. })), "{:?}", found.err());
    }
}
