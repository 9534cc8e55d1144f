//! The WAL that is stored for a cluster, in both tiers and the open segment.
//!
//! History files and partial segments never change, so they are read once. Partial segments have to be read because a
//! listing does not say where they end, and their content was acknowledged and counts to the last byte (P2). Tier 2's
//! listing is cached for a while, because it only gains files that tier 1 also has. Code that removes WAL from tier 1
//! calls [`BaseStore::forget_wal_listing`], and code that finds something missing lists again. WAL in a recorded gap
//! never counts as stored, even while it waits to be sealed.

use super::{BaseStore, lock, run, tier2_status};
use crate::errors;
use klio_pg::{Lsn, TimelineId};
use klio_proto::Code;
use klio_storage::{
    Error, Kind, Op,
    catalog::{
        Holdings, KnownGap,
        holdings::{HeldFile, OpenWal, Parts},
    },
    layout::{BaseObject, ClusterName, Form, WalFile},
    record,
    tier2::{StoredObject, Tier2},
    wal::{Found, LevelChange, WalStore, join_levels},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tonic::Status;

/// The age of a cached listing. A client that waits for WAL asks every second, and a bucket with a million segments
/// must not be listed each time.
const LISTING_AGE: Duration = Duration::from_secs(60);
/// A bucket that could not be listed is not asked again for this long.
const FAILED_AGE: Duration = Duration::from_secs(15);
/// PostgreSQL's own history files have one line per ancestor.
const HISTORY_LIMIT_BYTES: u64 = 1 << 20;

/// Data that was read and does not change, or not soon.
#[derive(Default)]
pub(super) struct HistoryCache {
    histories: Mutex<BTreeMap<(ClusterName, TimelineId), String>>,
    /// Uncompressed sizes of tier 2's partial segments. The object's size is part of the key, so a replaced object is
    /// read again.
    partials: Mutex<BTreeMap<(ClusterName, WalFile, u64), u64>>,
    listings: Mutex<BTreeMap<ClusterName, Listing>>,
    /// Tier 2's `wal_levels.json`, and when it was requested.
    levels: Mutex<BTreeMap<ClusterName, (Instant, Vec<LevelChange>)>>,
    /// When the bucket last could not be listed.
    failed: Mutex<BTreeMap<ClusterName, Instant>>,
}

/// A listing and the time at which it began.
type Listing = (Instant, Arc<Vec<HeldFile>>);

/// How current the view of tier 2 has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tier2Use {
    /// Tier 2 is not asked.
    Not,
    /// The last known listing, however old. Used while the bucket does not answer.
    Known,
    /// A listing of the last minute is enough.
    Cached,
    /// List the bucket now.
    Fresh,
}

impl BaseStore {
    /// The stored WAL of a cluster, as far as it can be known. While the bucket does not answer, this is tier 1 and
    /// the last known listing of tier 2. It is for backups and restores, which must not stop when the bucket is down
    /// (P4); never use it to decide what may be removed.
    ///
    /// # Errors
    /// `UNAVAILABLE` when tier 1 has nothing of the cluster and tier 2 does not answer.
    pub async fn holdings_known(&self, cluster: &ClusterName) -> Result<Holdings, Status> {
        let on_tier1 = self.wal().pinned(cluster).is_some();
        let lately = |at: &Instant| at.elapsed() < FAILED_AGE;
        if on_tier1 && lock(&self.0.histories.failed).get(cluster).is_some_and(lately) {
            return self.holdings_with(cluster, Tier2Use::Known).await;
        }
        match self.holdings(cluster).await {
            Err(status) if on_tier1 && Code::of(&status) == Code::Unavailable => {
                lock(&self.0.histories.failed).insert(cluster.clone(), Instant::now());
                self.holdings_with(cluster, Tier2Use::Known).await
            }
            answer => answer,
        }
    }

    /// The stored WAL of a cluster, in both tiers.
    ///
    /// # Errors
    /// `UNAVAILABLE` when tier 2 does not answer.
    pub async fn holdings(&self, cluster: &ClusterName) -> Result<Holdings, Status> {
        self.holdings_with(cluster, Tier2Use::Cached).await
    }

    /// The WAL in tier 2 alone, by its last listing.
    ///
    /// # Errors
    /// `UNAVAILABLE` when tier 2 does not answer.
    pub async fn holdings_of_tier2(&self, cluster: &ClusterName) -> Result<Holdings, Status> {
        let (store, name) = (self.wal().clone(), cluster.clone());
        let mut parts = run(move || tier1_parts(&store, &name)).await?;
        let ends: BTreeMap<WalFile, _> = parts.tier1.drain(..).map(|h| (h.file, h.end)).collect();
        parts.open.clear();
        let listed = self.wal_in_tier2(cluster, Tier2Use::Cached).await?;
        let with_end = |held: &HeldFile| HeldFile {
            end: held.end.or_else(|| ends.get(&held.file).copied().flatten()),
            ..*held
        };
        parts.tier2 = listed.iter().map(with_end).collect();
        let far = self.levels_in_tier2(cluster, Tier2Use::Cached).await?;
        parts.levels = join_levels(&parts.levels, &far);
        self.with_histories(cluster, parts).await
    }

    /// WAL was removed from tier 1, so the cached listing of tier 2 may be too old to count on.
    pub fn forget_wal_listing(&self, cluster: &ClusterName) {
        lock(&self.0.histories.listings).remove(cluster);
    }

    pub(super) async fn holdings_with(
        &self,
        cluster: &ClusterName,
        tier2: Tier2Use,
    ) -> Result<Holdings, Status> {
        let parts = self.parts_with(cluster, tier2).await?;
        self.with_histories(cluster, parts).await
    }

    /// Everything except the histories.
    pub(super) async fn parts_with(
        &self,
        cluster: &ClusterName,
        tier2: Tier2Use,
    ) -> Result<Parts, Status> {
        let (store, name) = (self.wal().clone(), cluster.clone());
        let mut parts = run(move || tier1_parts(&store, &name)).await?;
        if tier2 != Tier2Use::Not {
            parts.tier2 = self.wal_in_tier2(cluster, tier2).await?.to_vec();
            let far = self.levels_in_tier2(cluster, tier2).await?;
            parts.levels = join_levels(&parts.levels, &far);
            if parts.segment_size.is_none()
                && let Some(pinned) = self.pinned_in_tier2(cluster).await?
            {
                parts.marks = self.timelines(cluster).await?;
                parts.segment_size = Some(pinned.segment_size);
                parts.system_identifier = Some(pinned.system_identifier);
            }
        }
        Ok(parts)
    }

    async fn with_histories(
        &self,
        cluster: &ClusterName,
        mut parts: Parts,
    ) -> Result<Holdings, Status> {
        let histories: BTreeSet<TimelineId> = parts
            .tier1
            .iter()
            .chain(&parts.tier2)
            .filter_map(|held| match held.file {
                WalFile::History(timeline) => Some(timeline),
                _ => None,
            })
            .collect();
        for timeline in histories {
            let text = self.history_text(cluster, timeline).await?;
            parts.histories.insert(timeline, text);
        }
        parts.caught_up = self.caught_up(cluster);
        parts.as_of_unix = self.now_unix();
        Ok(Holdings::from_parts(parts))
    }

    /// The timeline that is streamed, if everything that PostgreSQL has is durable here.
    fn caught_up(&self, cluster: &ClusterName) -> Option<TimelineId> {
        let state = self.0.parts.registry.cluster(cluster);
        let progress = state.progress();
        progress.timeline.filter(|_| progress.is_caught_up() && state.connected())
    }

    async fn wal_in_tier2(
        &self,
        cluster: &ClusterName,
        how: Tier2Use,
    ) -> Result<Arc<Vec<HeldFile>>, Status> {
        let Some(tier2) = self.tier2() else { return Ok(Arc::default()) };
        if how == Tier2Use::Cached
            && let Some((at, known)) = lock(&self.0.histories.listings).get(cluster)
            && at.elapsed() < LISTING_AGE
        {
            return Ok(known.clone());
        }
        if how == Tier2Use::Known {
            let known =
                lock(&self.0.histories.listings).get(cluster).map(|(_, known)| known.clone());
            return Ok(known.unwrap_or_default());
        }
        let at = Instant::now();
        let listed = tier2.list_wal(cluster).await;
        let listed = listed.map_err(|e| tier2_status("list WAL", cluster, &e))?;
        let mut files = Vec::with_capacity(listed.len());
        for object in listed {
            let end = self.partial_end(tier2, cluster, &object).await?;
            files.push(HeldFile { file: object.file, end });
        }
        let files = Arc::new(files);
        lock(&self.0.histories.listings).insert(cluster.clone(), (at, files.clone()));
        Ok(files)
    }

    /// Changes of `wal_level` that tier 2 knows: no recovery can replay across them. A tier 1 that was lost knew them,
    /// too.
    pub(super) async fn levels_in_tier2(
        &self,
        cluster: &ClusterName,
        how: Tier2Use,
    ) -> Result<Vec<LevelChange>, Status> {
        let Some(tier2) = self.tier2() else { return Ok(Vec::new()) };
        let known = lock(&self.0.histories.levels).get(cluster).cloned();
        match (how, known) {
            (Tier2Use::Not, _) | (Tier2Use::Known, None) => return Ok(Vec::new()),
            (Tier2Use::Known, Some((_, known))) => return Ok(known),
            (Tier2Use::Cached, Some((at, known))) if at.elapsed() < LISTING_AGE => {
                return Ok(known);
            }
            _ => {}
        }
        let (at, key) = (Instant::now(), BaseObject::WalLevels.key(cluster));
        let bytes = tier2.read_small(&key, record::LIMIT_BYTES).await;
        let bytes = bytes.map_err(|e| tier2_status("read wal_levels.json", cluster, &e))?;
        let levels = match bytes {
            Some(bytes) => LevelChange::decode_all(&bytes, &key).map_err(|e| errors::status(&e))?,
            None => Vec::new(),
        };
        lock(&self.0.histories.levels).insert(cluster.clone(), (at, levels.clone()));
        Ok(levels)
    }

    /// One past the last byte of a partial segment in tier 2; `None` for other files and for a damaged one.
    async fn partial_end(
        &self,
        tier2: &Tier2,
        cluster: &ClusterName,
        object: &StoredObject,
    ) -> Result<Option<Lsn>, Status> {
        let WalFile::Partial(name) = object.file else { return Ok(None) };
        let size = match self.wal().pinned(cluster) {
            Some(pinned) => Some(pinned),
            None => self.pinned_in_tier2(cluster).await?,
        };
        let Some(size) = size.map(|pinned| pinned.segment_size) else { return Ok(None) };
        let Some(start) = name.start_lsn(size) else { return Ok(None) };
        let id = (cluster.clone(), object.file, object.size);
        if let Some(bytes) = lock(&self.0.histories.partials).get(&id).copied() {
            return Ok(Some(start.advance(bytes)));
        }
        let key = object.file.key_in(cluster, object.form);
        match tier2.plain_size(&key, object.form, self.at_rest(), size.bytes()).await {
            Ok(bytes) => {
                lock(&self.0.histories.partials).insert(id, bytes);
                Ok(Some(start.advance(bytes)))
            }
            // It was removed since it was listed, or nobody can read it, so it does not count.
            Err(error) if matches!(error.kind, Kind::NotFound | Kind::Corrupt | Kind::Denied) => {
                tracing::warn!(%cluster, %error, "a partial segment of tier 2 cannot be read");
                Ok(None)
            }
            Err(error) => Err(tier2_status("read a partial segment", cluster, &error)),
        }
    }

    /// A history file's content, from either tier.
    async fn history_text(
        &self,
        cluster: &ClusterName,
        timeline: TimelineId,
    ) -> Result<String, Status> {
        let id = (cluster.clone(), timeline);
        if let Some(known) = lock(&self.0.histories.histories).get(&id) {
            return Ok(known.clone());
        }
        let (store, name) = (self.wal().clone(), cluster.clone());
        let local = run(move || match store.read(&name, WalFile::History(timeline)) {
            Ok(found) => store.plain_bytes(found).map(Some),
            Err(error) if error.kind == Kind::NotFound => Ok(None),
            Err(error) => Err(error),
        })
        .await;
        let bytes = match local {
            Ok(Some(bytes)) => bytes,
            // It is absent or unreadable on tier 1; the other tier may have it.
            Ok(None) | Err(_) => self.history_in_tier2(cluster, timeline).await?,
        };
        let text = String::from_utf8_lossy(&bytes).into_owned();
        lock(&self.0.histories.histories).insert(id, text.clone());
        Ok(text)
    }

    async fn history_in_tier2(
        &self,
        cluster: &ClusterName,
        timeline: TimelineId,
    ) -> Result<Vec<u8>, Status> {
        let file = WalFile::History(timeline);
        let read = self.read_history_in_tier2(cluster, timeline).await;
        let failed = |error: Error| match error.kind {
            Kind::Corrupt | Kind::Denied => errors::status(&error),
            _ => tier2_status("read a history", cluster, &error),
        };
        if let Some(content) = read.map_err(failed)? {
            return Ok(content);
        }
        Err(errors::status(&Error::new(
            Kind::Corrupt,
            Op::Read,
            file.key(cluster),
            "expected a history file that was listed, found none in either tier",
        )))
    }

    /// Tier 2's copy of a history file, decrypted; `None` if there is none.
    pub(super) async fn read_history_in_tier2(
        &self,
        cluster: &ClusterName,
        timeline: TimelineId,
    ) -> Result<Option<Vec<u8>>, Error> {
        let Some(tier2) = self.tier2() else { return Ok(None) };
        for form in Form::BOTH {
            let key = WalFile::History(timeline).key_in(cluster, form);
            let Some(bytes) = tier2.read_small(&key, HISTORY_LIMIT_BYTES).await? else { continue };
            return match form {
                Form::Plain => Ok(Some(bytes.to_vec())),
                Form::Age => {
                    let plain = self.at_rest().need(&key).and_then(|keys| keys.unwrap(&bytes));
                    plain.map(|plain| Some(plain.to_vec()))
                }
            };
        }
        Ok(None)
    }
}

/// What tier 1 holds. Blocking.
fn tier1_parts(store: &WalStore, cluster: &ClusterName) -> Result<Parts, Error> {
    let pinned = store.pinned(cluster);
    // Read before the files, so that a journal that is sealed in between is counted twice and not missed.
    let open = store.open_runs(cluster);
    let open = open.into_iter().map(|(timeline, start, end)| OpenWal { timeline, start, end });
    let open = open.collect();
    let listed = match store.list(cluster) {
        Ok(listed) => listed,
        Err(error) if error.kind == Kind::NotFound => Vec::new(),
        Err(error) => return Err(error),
    };
    let mut tier1 = Vec::with_capacity(listed.len());
    for stored in listed {
        let end = match stored.file {
            WalFile::Partial(name) => pinned
                .and_then(|p| name.start_lsn(p.segment_size))
                .and_then(|start| Some(start.advance(partial_bytes(store, cluster, stored.file)?))),
            _ => None,
        };
        tier1.push(HeldFile { file: stored.file, end });
    }
    let gaps = store.gaps(cluster);
    let damaged = store.damaged(cluster).into_iter().map(|d| KnownGap {
        timeline: d.timeline,
        from: d.from,
        to: d.to,
        reason: "damaged on tier 1; klio status shows what to do".into(),
    });
    let known = |g: klio_storage::wal::Gap| KnownGap {
        timeline: g.timeline,
        from: g.from,
        to: g.to,
        reason: g.reason,
    };
    Ok(Parts {
        segment_size: pinned.map(|p| p.segment_size),
        system_identifier: pinned.map(|p| p.system_identifier),
        tier1,
        open,
        levels: store.levels(cluster),
        gaps: gaps.iter().cloned().map(known).chain(expired(store, cluster)).collect(),
        damaged: damaged.collect(),
        marks: store.timelines(cluster),
        ..Parts::default()
    })
}

/// WAL that retention expired for good: it existed, and is not a loss. A horizon that was written only for WAL that is
/// in tier 2 expires nothing, and neither does the horizon of a tier 1 whose WAL began in the middle.
fn expired(store: &WalStore, cluster: &ClusterName) -> impl Iterator<Item = KnownGap> {
    store.horizons(cluster).into_iter().filter(|h| h.first < h.held_from).map(|h| KnownGap {
        timeline: h.timeline,
        // Also below the first byte of this tier 1, because tier 2 may have had more.
        from: Lsn::ZERO,
        to: h.held_from,
        reason: "expired by retention".into(),
    })
}

/// The size of the WAL in a partial segment; `None` when it cannot be read, in which case it does not count.
fn partial_bytes(store: &WalStore, cluster: &ClusterName, file: WalFile) -> Option<u64> {
    match store.read(cluster, file) {
        Ok(Found::Stored { plain_size, .. }) => Some(plain_size),
        Ok(Found::Open(open)) => Some(open.plain_size()),
        Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use klio_pg::TimelineHistory;
    use klio_storage::{
        catalog::recovery::Path,
        disk::{Disk, SimDisk},
        testing::SimulatedWal,
        wal::{GapDeclaration, OpenRequest, WalOptions},
    };

    const SEGMENT: u64 = 1 << 20;

    fn lsn(segments: u64) -> Lsn {
        Lsn::new(segments * SEGMENT)
    }

    /// Segments 1 to 9 of timeline 1, or what is left of them.
    fn store(cluster: &ClusterName) -> WalStore {
        let disk = Arc::new(SimDisk::new(3));
        disk.create_dir(std::path::Path::new("/tier1")).unwrap();
        let store = WalStore::open(disk, "/tier1".into(), WalOptions::default()).unwrap();
        let (wal, timeline) = (SimulatedWal::small(7), TimelineId::new(1).unwrap());
        store.pin(cluster, wal.pinned()).unwrap();
        let request =
            OpenRequest { timeline, start: lsn(1), gap: None, now_unix: 0.0, slot_restart: None };
        let mut writer = store.open_writer(cluster, &request).unwrap();
        for number in 1..10 {
            let (from, to) = (lsn(number), lsn(number + 1));
            let bytes = wal.bytes(&TimelineHistory::root(timeline), from, to);
            writer.append(from, &bytes).unwrap();
            writer.flush().unwrap();
        }
        drop(writer);
        for file in store.unsealed(cluster) {
            store.seal(cluster, file).unwrap();
        }
        store
    }

    /// The reason reported when tier 2's last object of a timeline, which stays for ever, lies in front of what
    /// retention expired.
    fn reason(store: &WalStore, cluster: &ClusterName) -> String {
        let mut parts = tier1_parts(store, cluster).unwrap();
        parts.tier1.retain(|held| {
            !matches!(held.file, WalFile::Segment(name) if name.start_lsn(store.pinned(cluster).unwrap().segment_size).unwrap() < lsn(5))
        });
        let first: WalFile = "000000010000000000000001".parse().unwrap();
        parts.tier2.push(first.into());
        let size = parts.segment_size.unwrap();
        let path = Path::new(&Holdings::from_parts(parts), TimelineId::new(1).unwrap(), size);
        let holes = path.unwrap().holes(lsn(1));
        assert_eq!((holes.len(), holes[0].from, holes[0].to), (1, lsn(2), lsn(5)));
        holes[0].reason.clone()
    }

    /// WAL in a recorded gap never counts as stored, even before the partial segment in front of it is sealed.
    /// Otherwise a backup whose WAL is lost could be committed.
    #[test]
    fn a_recorded_gap_is_never_held_and_what_came_before_it_is_to_its_last_byte() {
        let cluster: ClusterName = "pg".parse().unwrap();
        let (store, timeline) = (store(&cluster), TimelineId::new(1).unwrap());
        let (wal, acknowledged) = (SimulatedWal::small(7), lsn(10).advance(5000 * 8));
        let history = TimelineHistory::root(timeline);
        let write = |gap: Option<GapDeclaration>, from: Lsn, to: Lsn| {
            let request =
                OpenRequest { timeline, start: from, gap, now_unix: 0.0, slot_restart: None };
            let mut writer = store.open_writer(&cluster, &request).unwrap();
            writer.append(from, &wal.bytes(&history, from, to)).unwrap();
            writer.flush().unwrap();
        };
        write(None, lsn(10), acknowledged);
        let gap = GapDeclaration { from: acknowledged, to: lsn(13), reason: "lost".into() };
        write(Some(gap), lsn(13), lsn(14).advance(8192));
        let runs = || {
            let parts = tier1_parts(&store, &cluster).unwrap();
            let runs = Holdings::from_parts(parts).timelines[0].runs.clone();
            runs.iter().map(|run| (run.start, run.end)).collect::<Vec<_>>()
        };
        let expected = [(lsn(1), acknowledged), (lsn(13), lsn(14).advance(8192))];
        assert_eq!(runs(), expected);
        for file in store.unsealed(&cluster) {
            store.seal(&cluster, file).unwrap();
            assert_eq!(runs(), expected, "{file} is sealed");
        }
    }

    #[test]
    fn wal_that_retention_let_go_is_told_as_expired_and_not_as_lost() {
        let cluster: ClusterName = "pg".parse().unwrap();
        let (store, timeline) = (store(&cluster), TimelineId::new(1).unwrap());
        assert_eq!(reason(&store, &cluster), "never received, or lost");
        // WAL that was only evicted from tier 1 must be in tier 2.
        store.raise_horizon(&cluster, timeline, lsn(5), Lsn::ZERO).unwrap();
        assert_eq!(reason(&store, &cluster), "never received, or lost");
        store.raise_horizon(&cluster, timeline, lsn(5), lsn(5)).unwrap();
        assert_eq!(reason(&store, &cluster), "expired by retention");
    }
}
