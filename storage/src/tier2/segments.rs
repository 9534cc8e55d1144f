//! What tier 2 has of a segment and behind it, from which a restore can tell the end of the archive from a hole (P7).
//! And the newest timeline in tier 2, from which a server that lost its disk recognizes an old primary (P8).

use super::{Tier2, fault::classify};
use crate::{
    Error, Kind, Op,
    crypt::AtRest,
    layout::{BaseObject, ClusterName, Form, WalFile},
    record,
    wal::Pinned,
};
use futures::TryStreamExt;
use klio_pg::{SegmentName, SegmentSize, TimelineHistory, TimelineId};
use object_store::path::Path;
use std::collections::BTreeSet;

/// PostgreSQL's history files have one line per ancestor.
const HISTORY_LIMIT_BYTES: u64 = 1 << 20;

/// The files of a segment, and whether there is WAL of its timeline behind it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WalAt {
    /// The complete segment and the partial one, in each form in which they exist.
    pub held: Vec<(WalFile, Form)>,
    /// Whether a later segment of the same timeline exists.
    pub later: bool,
}

impl Tier2 {
    /// Looks for a segment with one listing. An empty `held` is definitive.
    ///
    /// # Errors
    /// An error of the store; a missing bucket is an error, an empty one is not.
    pub async fn wal_at(&self, cluster: &ClusterName, name: SegmentName) -> Result<WalAt, Error> {
        let base = format!("{cluster}/wal");
        let directory = format!("{base}/{}", name.timeline());
        self.require_directory(Op::List, &directory)?;
        let offset = Path::from(format!("{directory}/{name}"));
        let fail = |error| classify(Op::List, &self.place(&directory), error);
        let place = Path::from(directory.as_str());
        let mut listing = self.store.list_with_offset(Some(&place), &offset);
        let mut found = WalAt::default();
        while let Some(meta) = listing.try_next().await.map_err(fail)? {
            let relative = meta.location.as_ref().strip_prefix(&base);
            let relative = relative.and_then(|rest| rest.strip_prefix('/'));
            let stored = relative.and_then(WalFile::parse_stored);
            let Some((file @ (WalFile::Segment(held) | WalFile::Partial(held)), form)) = stored
            else {
                continue;
            };
            if held == name {
                found.held.push((file, form));
            } else if held > name {
                found.later = true;
                // Only a local directory is listed in no particular order.
                if self.directory.is_none() {
                    break;
                }
            }
        }
        Ok(found)
    }

    /// Every timeline with WAL or a history file, found with one listing, however much WAL there is. An empty answer is
    /// definitive. A history file alone counts: if the server's disk was lost before the timeline's first segment was
    /// full, there is nothing else of it.
    ///
    /// # Errors
    /// An error of the store; a missing bucket is an error, an empty one is not.
    pub async fn timelines(&self, cluster: &ClusterName) -> Result<BTreeSet<TimelineId>, Error> {
        let prefix = format!("{cluster}/wal");
        self.require_directory(Op::List, &prefix)?;
        let place = Path::from(prefix.as_str());
        let listed = self.store.list_with_delimiter(Some(&place)).await;
        let listed = listed.map_err(|error| classify(Op::List, &self.place(&prefix), error))?;
        let directories = listed.common_prefixes.iter().filter_map(|p| p.filename()?.parse().ok());
        let history = |name: &str| match WalFile::parse_stored(name)? {
            (WalFile::History(timeline), _) => Some(timeline),
            _ => None,
        };
        let files = listed.objects.iter().filter_map(|meta| history(meta.location.filename()?));
        Ok(directories.chain(files).collect())
    }

    /// The reason why a missing segment must have existed: there is later WAL of its timeline, or a timeline that
    /// branched off behind it. `None`: nothing is known to follow it. Without `size` only the segment's own timeline is
    /// considered.
    ///
    /// # Errors
    /// An error of the store; `Denied` or `Corrupt` for history files.
    pub async fn hole_at(
        &self,
        cluster: &ClusterName,
        name: SegmentName,
        size: Option<SegmentSize>,
        at_rest: &AtRest,
    ) -> Result<Option<String>, Error> {
        if self.wal_at(cluster, name).await?.later {
            return Ok(Some("later WAL of its timeline is".to_owned()));
        }
        let Some(start) = size.and_then(|size| name.start_lsn(size)) else { return Ok(None) };
        for (timeline, form) in self.histories(cluster).await? {
            if timeline <= name.timeline() {
                continue;
            }
            let Some(history) = self.read_history(cluster, timeline, form, at_rest).await? else {
                continue;
            };
            if history.end_of(name.timeline()).is_some_and(|end| start < end) {
                return Ok(Some(format!("timeline {timeline:?} branched off behind it")));
            }
        }
        Ok(None)
    }

    /// The existing history files, ascending, each in one form.
    async fn histories(&self, cluster: &ClusterName) -> Result<Vec<(TimelineId, Form)>, Error> {
        let prefix = format!("{cluster}/wal");
        self.require_directory(Op::List, &prefix)?;
        let place = Path::from(prefix.as_str());
        let listed = self.store.list_with_delimiter(Some(&place)).await;
        let listed = listed.map_err(|error| classify(Op::List, &self.place(&prefix), error))?;
        let history = |name: &str| match WalFile::parse_stored(name)? {
            (WalFile::History(timeline), form) => Some((timeline, form)),
            _ => None,
        };
        let names = listed.objects.iter().filter_map(|meta| meta.location.filename());
        let mut found: Vec<_> = names.filter_map(history).collect();
        found.sort_by_key(|(timeline, form)| (*timeline, *form == Form::Age));
        found.dedup_by_key(|(timeline, _)| *timeline);
        Ok(found)
    }

    async fn read_history(
        &self,
        cluster: &ClusterName,
        timeline: TimelineId,
        form: Form,
        at_rest: &AtRest,
    ) -> Result<Option<TimelineHistory>, Error> {
        let key = WalFile::History(timeline).key_in(cluster, form);
        let Some(bytes) = self.read_small(&key, HISTORY_LIMIT_BYTES).await? else {
            return Ok(None);
        };
        let corrupt = |e| Error::new(Kind::Corrupt, Op::Read, self.place(&key), e);
        let parsed = match form {
            Form::Plain => TimelineHistory::parse(timeline, &bytes),
            Form::Age => TimelineHistory::parse(timeline, &at_rest.need(&key)?.unwrap(&bytes)?),
        };
        parsed.map(Some).map_err(corrupt)
    }

    /// The segment size in the bucket's `cluster.json`; `None` when there is none.
    ///
    /// # Errors
    /// An error of the store; `Corrupt`.
    pub async fn segment_size_of(
        &self,
        cluster: &ClusterName,
    ) -> Result<Option<SegmentSize>, Error> {
        let key = BaseObject::Cluster.key(cluster);
        let bytes = self.read_small(&key, record::LIMIT_BYTES).await?;
        let pinned = bytes.map(|bytes| Pinned::decode(&bytes, &key)).transpose()?;
        Ok(pinned.map(|pinned| pinned.segment_size))
    }

    /// Whether there is any WAL of this cluster.
    ///
    /// # Errors
    /// An error of the store.
    pub async fn has_wal(&self, cluster: &ClusterName) -> Result<bool, Error> {
        let prefix = format!("{cluster}/wal");
        self.require_directory(Op::List, &prefix)?;
        let place = Path::from(prefix.as_str());
        let first = self.store.list(Some(&place)).try_next().await;
        first
            .map(|first| first.is_some())
            .map_err(|error| classify(Op::List, &self.place(&prefix), error))
    }
}

#[cfg(test)]
mod tests {
    use super::{super::Tier2Config, *};

    /// P7: a timeline that branched off behind a segment shows that the segment existed.
    #[tokio::test]
    async fn a_promotion_behind_a_missing_segment_makes_it_a_hole() {
        let directory = tempfile::tempdir().unwrap();
        let wal = directory.path().join("pg/wal");
        std::fs::create_dir_all(wal.join("00000001")).unwrap();
        std::fs::write(wal.join("00000001/000000010000000000000001.zst"), "x").unwrap();
        std::fs::write(wal.join("00000002.history"), "1\t0/3800000\tx\n").unwrap();
        let url = format!("file://{}", directory.path().display());
        let tier2 = Tier2::open(&Tier2Config::new(url)).unwrap();
        let cluster: ClusterName = "pg".parse().unwrap();
        let hole = async |number: u32, size: Option<u32>| {
            let name: SegmentName = format!("0000000100000000{number:08X}").parse().unwrap();
            let size = size.map(|size| SegmentSize::new(size).unwrap());
            tier2.hole_at(&cluster, name, size, &AtRest::Off).await.unwrap().is_some()
        };
        // Branched off at 3.5: segment 3 existed, 4 never did.
        assert!(hole(2, Some(16 << 20)).await && hole(3, Some(16 << 20)).await);
        assert!(!hole(4, Some(16 << 20)).await && !hole(3, None).await);
        // A history that cannot be read gives an error, not an answer.
        std::fs::write(wal.join("00000003.history"), "?").unwrap();
        let name = "000000010000000000000004".parse().unwrap();
        let size = SegmentSize::new(16 << 20).ok();
        assert!(tier2.hole_at(&cluster, name, size, &AtRest::Off).await.is_err());
    }

    #[tokio::test]
    async fn a_hole_differs_from_the_end() {
        let directory = tempfile::tempdir().unwrap();
        let timeline = directory.path().join("pg/wal/00000001");
        std::fs::create_dir_all(&timeline).unwrap();
        for name in ["000000010000000000000001.zst", "000000010000000000000003.zst.age"] {
            std::fs::write(timeline.join(name), "x").unwrap();
        }
        std::fs::write(timeline.join("000000010000000000000004.partial.zst"), "x").unwrap();
        let url = format!("file://{}", directory.path().display());
        let tier2 = Tier2::open(&Tier2Config::new(url)).unwrap();
        let cluster: ClusterName = "pg".parse().unwrap();
        let at = async |number: u32| {
            let name: SegmentName = format!("0000000100000000{number:08X}").parse().unwrap();
            let at = tier2.wal_at(&cluster, name).await.unwrap();
            let held: Vec<String> = at.held.iter().map(|(f, form)| f.relative_in(*form)).collect();
            (held.join(" "), at.later)
        };
        assert_eq!(at(1).await, ("00000001/000000010000000000000001.zst".into(), true));
        assert_eq!(at(2).await, (String::new(), true));
        assert_eq!(at(3).await, ("00000001/000000010000000000000003.zst.age".into(), true));
        let partial = "00000001/000000010000000000000004.partial.zst";
        assert_eq!(at(4).await, (partial.into(), false));
        assert_eq!(at(5).await, (String::new(), false));
        assert!(tier2.has_wal(&cluster).await.unwrap());
        let newest = async |name: &str| {
            tier2.timelines(&name.parse().unwrap()).await.map(|all| all.into_iter().next_back())
        };
        assert_eq!(newest("pg").await.unwrap(), TimelineId::new(1));
        assert_eq!(newest("other").await.unwrap(), None);
        std::fs::create_dir(directory.path().join("pg/wal/spare")).unwrap();
        std::fs::write(directory.path().join("pg/wal/0000000A.history.age"), "x").unwrap();
        assert_eq!(newest("pg").await.unwrap(), TimelineId::new(10));
        assert!(!tier2.has_wal(&"other".parse().unwrap()).await.unwrap());
        std::fs::remove_dir_all(directory.path()).unwrap();
        assert!(tier2.wal_at(&cluster, "000000010000000000000005".parse().unwrap()).await.is_err());
        assert!(newest("pg").await.is_err());
    }
}
