//! The catalog service: what a cluster has, and its status.

use super::{generations::Histories, timelines};
use crate::access::{auth::Auth, roles::Rpc};
use crate::{
    errors,
    status::{ClusterView, StatusBoard, now_unix},
};
use klio_pg::{SegmentSize, TimelineId};
use klio_proto::{
    Code,
    v1::{self, catalog_server::Catalog},
};
use klio_storage::{
    layout::{ClusterName, WalFile},
    tier2::Tier2,
    wal::Gap,
};
use klio_telemetry::visible;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Instant,
};
use tonic::{Request, Response, Status};

#[derive(Clone)]
pub struct CatalogService {
    pub auth: Auth,
    /// The histories of clusters.
    pub histories: Histories,
    /// The status of all clusters.
    pub board: Arc<StatusBoard>,
    /// Tier 2, for listings of the bucket.
    pub tier2: Option<Tier2>,
}

/// Runs blocking reads on a blocking thread.
async fn read<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Status> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| Code::Internal.status(format!("read catalog: {e}")))
}

#[tonic::async_trait]
impl Catalog for CatalogService {
    async fn status(
        &self,
        request: Request<v1::StatusRequest>,
    ) -> Result<Response<v1::StatusResponse>, Status> {
        let identity = self.auth.identify(&request)?;
        let only = match request.get_ref().cluster.as_str() {
            "" => None,
            name => {
                let named = crate::access::auth::permit(&identity, name, Rpc::Status)?;
                Some(match named.number() {
                    Some(_) => self.place(named).await?,
                    None => self.board.shown_for(&named),
                })
            }
        };
        let board = self.board.clone();
        // A closed history is not listed itself, because nobody may stream it; the current one reports it.
        let of = only.clone();
        let views = read(move || {
            let mut views = board.clusters();
            views.retain(|view| of.as_ref() == Some(&view.name) || !board.is_closed(&view.name));
            views
        })
        .await?;
        let wanted = |view: &ClusterView| {
            identity.sees(&view.name) && only.as_ref().is_none_or(|name| *name == view.name)
        };
        let clusters = views.iter().filter(|v| wanted(v)).map(|v| self.status_of(v)).collect();
        let queue = self.board.queue.stats();
        let queue = v1::QueueStatus {
            connected: queue.connected,
            messages: queue.messages,
            bytes: queue.bytes,
        };
        Ok(Response::new(v1::StatusResponse { clusters, queue: Some(queue) }))
    }

    async fn list_wal(
        &self,
        request: Request<v1::ListWalRequest>,
    ) -> Result<Response<v1::ListWalResponse>, Status> {
        let (_, named) = self.auth.require(&request, &request.get_ref().cluster, Rpc::ListWal)?;
        let cluster = self.histories.base.resolve(named).await?;
        let here = self.board.store.pinned(&cluster);
        let local = match here {
            Some(_) => self.local(&cluster).await?,
            None => Vec::new(),
        };
        // A tier 1 that was lost knows nothing of a generation that nobody streams to.
        let known = match here {
            Some(_) => here,
            None => self.histories.base.pinned_in_tier2(&cluster).await?,
        };
        let Some(pinned) = known else {
            return Err(Code::NotFound.status(format!("cluster {cluster} has no WAL here")));
        };
        let remote = self.remote(&cluster).await?;
        let mut ranges = ranges("tier1", &local, pinned.segment_size);
        ranges.extend(self::ranges("tier2", &remote, pinned.segment_size));
        let histories: BTreeSet<u32> = local
            .iter()
            .chain(&remote)
            .filter_map(|(file, _)| match file {
                WalFile::History(timeline) => Some(timeline.get()),
                _ => None,
            })
            .collect();
        let gaps = self.board.store.gaps(&cluster).iter().map(gap_of).collect();
        let histories = histories.into_iter().collect();
        Ok(Response::new(v1::ListWalResponse { ranges, gaps, histories }))
    }

    async fn list_generations(
        &self,
        request: Request<v1::ListGenerationsRequest>,
    ) -> Result<Response<v1::ListGenerationsResponse>, Status> {
        let (_, named) =
            self.auth.require(&request, &request.get_ref().cluster, Rpc::ListGenerations)?;
        let generations = match request.get_ref().outline {
            true => self.histories.outlines(&named.base()).await?,
            false => self.histories.list(&named.base()).await?,
        };
        Ok(Response::new(v1::ListGenerationsResponse { generations }))
    }

    async fn decide_generation(
        &self,
        request: Request<v1::DecideGenerationRequest>,
    ) -> Result<Response<v1::DecideGenerationResponse>, Status> {
        let (identity, named) =
            self.auth.require(&request, &request.get_ref().cluster, Rpc::DecideGeneration)?;
        let asked = request.into_inner();
        let effects = self.histories.decide(&identity, &named.base(), &asked).await?;
        Ok(Response::new(v1::DecideGenerationResponse { effects }))
    }

    async fn check(
        &self,
        request: Request<v1::CheckRequest>,
    ) -> Result<Response<v1::CheckResponse>, Status> {
        let (identity, _) = self.auth.require(&request, &request.get_ref().cluster, Rpc::Check)?;
        let board = self.board.clone();
        let (space, problems) = read(move || (board.store.free_space(), board.readiness())).await?;
        let (free, total) = space.unwrap_or((0, 0));
        Ok(Response::new(v1::CheckResponse {
            server_version: env!("CARGO_PKG_VERSION").into(),
            identity: identity.name,
            server_time: now_unix(),
            client_certificate_expires: identity.expires_unix as f64,
            tier1_free_bytes: free,
            tier1_total_bytes: total,
            tier2_configured: self.tier2.is_some(),
            queue_ready: self.board.queue.stats().connected,
            ready: problems.is_empty(),
            problems,
        }))
    }

    async fn timelines(
        &self,
        request: Request<v1::TimelinesRequest>,
    ) -> Result<Response<v1::TimelinesResponse>, Status> {
        let (_, named) = self.auth.require(&request, &request.get_ref().cluster, Rpc::Timelines)?;
        let cluster = self.histories.base.resolve(named).await?;
        Ok(Response::new(self.timelines_of(&cluster).await?))
    }

    async fn decide_timeline(
        &self,
        request: Request<v1::DecideTimelineRequest>,
    ) -> Result<Response<v1::DecideTimelineResponse>, Status> {
        let (identity, named) =
            self.auth.require(&request, &request.get_ref().cluster, Rpc::DecideTimeline)?;
        let cluster = self.histories.base.resolve(named).await?;
        Ok(Response::new(self.decide(&identity, &cluster, request.get_ref()).await?))
    }
}

impl CatalogService {
    /// The status of a cluster; for the current generation also all generations.
    fn status_of(&self, view: &ClusterView) -> v1::ClusterStatus {
        let mut status = status_of(view);
        status.other_timelines = self.other_timelines(&view.name);
        let Ok(all) = self.histories.base.generations_here(&view.name) else { return status };
        let own = view.name.generation();
        if self.board.shown_for(&view.name) == view.name {
            let outline = |g| self.histories.outline(&view.name, g);
            status.generations = all.generations.iter().map(outline).collect();
        }
        let unproven = all.unproven.iter().filter(|u| u.generation == own);
        status.unproven = unproven
            .map(|u| v1::Unproven {
                timeline: u.timeline.get(),
                at_lsn: u.at.as_u64(),
                reason: u.reason.clone(),
                recorded_time: u.recorded_unix,
            })
            .collect();
        status
    }

    /// The timelines that are being streamed or are undecided, except the one that is followed.
    fn other_timelines(&self, cluster: &ClusterName) -> Vec<v1::TimelineRecord> {
        let Some(base) = &self.board.base else { return Vec::new() };
        let others = base.other_timelines(cluster);
        let marks = self.board.store.timelines(cluster);
        let mut records = timelines::records(&self.board, cluster, &marks);
        records.retain(|r| TimelineId::new(r.timeline).is_some_and(|t| others.contains(&t)));
        records
    }

    /// The directory of a generation that is named by its number. The bucket is asked only about a number that is not
    /// known here.
    async fn place(&self, named: ClusterName) -> Result<ClusterName, Status> {
        match self.histories.base.resolve_here(&named) {
            Ok(place) => Ok(place),
            Err(_) => self.histories.base.resolve(named).await,
        }
    }

    async fn local(&self, cluster: &ClusterName) -> Result<Vec<(WalFile, u64)>, Status> {
        let (store, name) = (self.board.store.clone(), cluster.clone());
        let files = read(move || store.list(&name)).await?.map_err(|e| errors::status(&e))?;
        Ok(files.into_iter().map(|f| (f.file, f.size)).collect())
    }

    async fn remote(&self, cluster: &ClusterName) -> Result<Vec<(WalFile, u64)>, Status> {
        let Some(tier2) = &self.tier2 else { return Ok(Vec::new()) };
        let listed = tier2.list_wal(cluster).await.map_err(|error| {
            tracing::warn!(%cluster, %error, "cannot list WAL in tier 2");
            Code::Unavailable.status(format!("list WAL: {}", errors::of_tier2(&error)))
        })?;
        Ok(listed.into_iter().map(|o| (o.file, o.size)).collect())
    }
}

fn gap_of(gap: &Gap) -> v1::GapRecord {
    v1::GapRecord {
        timeline: gap.timeline.get(),
        from_lsn: gap.from.as_u64(),
        to_lsn: gap.to.as_u64(),
        // Cleaned here as well, because an earlier version stored the reason unchanged.
        reason: visible::line(&gap.reason).into_owned(),
        recorded_time: gap.recorded_unix,
    }
}

fn status_of(view: &ClusterView) -> v1::ClusterStatus {
    let flush_lag = view.connected.then(|| v1::Lag {
        bytes: view.progress.lag_bytes(),
        seconds: view.progress.lag_seconds(Instant::now()),
    });
    let archive_lag =
        v1::Lag { bytes: view.archive_lag_bytes(), seconds: view.archive_lag_seconds(now_unix()) };
    v1::ClusterStatus {
        cluster: view.name.to_string(),
        system_identifier: view.pinned.as_ref().map_or(0, |p| p.system_identifier),
        segment_size: view.pinned.as_ref().map_or(0, |p| p.segment_size.as_u32()),
        postgres_version: view.pinned.as_ref().map_or(0, |p| p.postgres_version),
        connected: view.connected,
        timeline: view.timeline.map_or(0, TimelineId::get),
        received_lsn: view.progress.received.max(view.flushed).as_u64(),
        flushed_lsn: view.flushed.as_u64(),
        sealed_lsn: view.sealed.as_u64(),
        archived_lsn: view.archived().as_u64(),
        wal_end_lsn: view.progress.wal_end.as_u64(),
        flush_lag,
        archive_lag: Some(archive_lag),
        latest_written_time: view.latest_written.unwrap_or(0.0),
        latest_archived_time: view
            .archive
            .as_ref()
            .and_then(|a| a.latest_archived_unix)
            .unwrap_or(0.0),
        gaps: view.gaps.iter().chain(&view.unpassed).map(gap_of).collect(),
        problems: view.problems.iter().map(|text| visible::line(text).into_owned()).collect(),
        tier2_configured: view.archive.is_some(),
        generations: Vec::new(),
        unproven: Vec::new(),
        durable_as_of_time: view.durable_as_of_unix.unwrap_or(0.0),
        other_timelines: Vec::new(),
        all_read_since_time: view.all_read_since_unix.unwrap_or(0.0),
    }
}

/// Contiguous runs of segments, by timeline. A partial segment ends its run.
fn ranges(tier: &str, files: &[(WalFile, u64)], size: SegmentSize) -> Vec<v1::WalRange> {
    let mut by_start = BTreeMap::new();
    for (file, stored) in files {
        let (WalFile::Segment(name) | WalFile::Partial(name)) = file else { continue };
        if let Some(start) = name.start_lsn(size) {
            let partial = matches!(file, WalFile::Partial(_));
            by_start.insert((name.timeline(), start, partial), *stored);
        }
    }
    let mut ranges: Vec<v1::WalRange> = Vec::new();
    for ((timeline, start, partial), stored) in by_start {
        if partial {
            continue; // Counted where its bytes end, which only tier 1's positions know.
        }
        let end = start.advance(size.bytes()).as_u64();
        match ranges.last_mut() {
            Some(last) if last.timeline == timeline.get() && last.end_lsn == start.as_u64() => {
                last.end_lsn = end;
                last.segments += 1;
                last.stored_bytes += stored;
            }
            _ => ranges.push(v1::WalRange {
                timeline: timeline.get(),
                tier: tier.into(),
                start_lsn: start.as_u64(),
                end_lsn: end,
                segments: 1,
                stored_bytes: stored,
            }),
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        queue::tests::TestQueue,
        status::tests::{followed, store},
    };
    use klio_storage::tier2::Tier2Config;
    use std::{fs, path::Path};

    /// A server in place of a lost one, to which only the followed generation streams.
    fn service(near: &Path, far: &Path, queue: &TestQueue) -> CatalogService {
        drop(store(far, &["main"]));
        let wal = far.join("main/wal/00000001");
        fs::create_dir_all(&wal).unwrap();
        fs::write(wal.join("000000010000000000000001.zst"), b"x").unwrap();
        let tier2 = Tier2::open(&Tier2Config::new(format!("file://{}", far.display()))).unwrap();
        let board = followed(store(near, &["main@2"]), Some(tier2.clone()), &queue.queue);
        let (base, registry) = (board.base.clone().unwrap(), board.registry.clone());
        let (_, rules) = tokio::sync::watch::channel(Arc::default());
        CatalogService {
            auth: Auth::new(None, rules),
            histories: Histories { base, registry },
            board: Arc::new(board),
            tier2: Some(tier2),
        }
    }

    /// Regression test: there was "no WAL here" of a generation that only the bucket has, and a number that does not
    /// exist was a cluster to which nothing had streamed yet.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_generation_that_only_the_bucket_has_is_listed_and_one_that_nobody_has_is_refused() {
        let [near, far, directory] = [(); 3].map(|()| tempfile::tempdir().unwrap());
        let queue = TestQueue::start(directory.path()).await;
        let service = service(near.path(), far.path(), &queue);
        let list = async |cluster: &str| {
            let asked = v1::ListWalRequest { cluster: cluster.into() };
            service.list_wal(Request::new(asked)).await.map(Response::into_inner)
        };
        let ranges = list("main@1").await.unwrap().ranges;
        let found: Vec<_> = ranges.iter().map(|r| (r.tier.as_str(), r.segments)).collect();
        assert_eq!(found, [("tier2", 1)]);
        let asked = v1::StatusRequest { cluster: "main@9".into() };
        for refused in [
            service.status(Request::new(asked)).await.map(|_| ()).unwrap_err(),
            list("main@9").await.unwrap_err(),
        ] {
            assert_eq!(Code::of(&refused), Code::Invalid, "{refused}");
            assert!(refused.message().contains("one of generations 1, 2, found 9"), "{refused}");
        }
        queue.stop().await;
    }

    /// Regression test: without an answer of the bucket no client could find out which generation its cluster's name
    /// means, if one of them has no backup.
    #[tokio::test(flavor = "multi_thread")]
    async fn the_current_generation_is_told_without_the_bucket() {
        let [near, far, directory] = [(); 3].map(|()| tempfile::tempdir().unwrap());
        let queue = TestQueue::start(directory.path()).await;
        let service = service(near.path(), far.path(), &queue);
        std::fs::remove_dir_all(far.path()).unwrap();
        let list = async |outline| {
            let asked = v1::ListGenerationsRequest { cluster: "main".into(), outline };
            service.list_generations(Request::new(asked)).await.map(Response::into_inner)
        };
        let found = list(true).await.unwrap().generations;
        let found: Vec<_> = found.iter().map(|g| (g.number, g.state.as_str())).collect();
        assert_eq!(found, [(1, "older"), (2, "current")]);
        assert_eq!(Code::of(&list(false).await.unwrap_err()), Code::Unavailable);
        queue.stop().await;
    }

    #[test]
    fn a_missing_segment_splits_a_range() {
        let size = SegmentSize::new(16 << 20).unwrap();
        let file = |name: &str| (name.parse::<WalFile>().unwrap(), 10);
        let files = [
            file("000000010000000000000001"),
            file("000000010000000000000002"),
            file("000000010000000000000004"),
            file("000000020000000000000004"),
            file("000000010000000000000005.partial"),
            file("00000002.history"),
        ];
        let found: Vec<_> = ranges("tier1", &files, size)
            .into_iter()
            .map(|r| (r.timeline, r.start_lsn >> 24, r.end_lsn >> 24, r.segments, r.stored_bytes))
            .collect();
        assert_eq!(found, [(1, 1, 3, 2, 20), (1, 4, 5, 1, 10), (2, 4, 5, 1, 10)]);
    }
}
