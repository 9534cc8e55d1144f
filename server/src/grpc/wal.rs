//! The WAL service: translates requests, calls the receiver, and translates the answers back.

use super::fetch;
use crate::{
    access::{
        auth::{Auth, permit},
        roles::Rpc,
    },
    base::{BaseStore, Line, decided},
    errors::blocking,
    fetch::Source,
    queue,
    receive::{Inbound, OnDivergence, Pieces, Receiver, Verdict, refill},
};
use bytes::Bytes;
use futures::{Stream, StreamExt};
use klio_pg::Lsn;
use klio_proto::{
    Code,
    v1::{self, compare_request, receive_request, refill_request, wal_server::Wal},
    wal::{
        BeginGenerationRequest, CompareBegin, Open, PositionRequest, PutHistoryRequest, RefillBegin,
    },
};
use klio_storage::{
    catalog::Run,
    generations::{Generation, Generations, State, Stranger},
    layout::{ClusterName, WalFile},
    wal::Hole,
};
use klio_telemetry::visible;
use std::{pin::Pin, time::Duration};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};
use tracing::Instrument;

/// A client that opens a stream and sends nothing for this long is disconnected.
const OPEN_TIMEOUT: Duration = Duration::from_secs(20);
/// The longest pause between two messages of a comparison, because PostgreSQL may have to read a segment in between.
const COMPARE_TIMEOUT: Duration = Duration::from_secs(60);
const REFILLING: &str = "refill a damaged segment";
/// How many acknowledgements may wait for the network. A client that does not read them delays only itself.
const RESPONSES_MAX: usize = 16;

/// The messages of a client, with a time limit for each.
struct Messages<T>(Streaming<T>);

impl<T> Messages<T> {
    async fn message(&mut self, doing: &str) -> Result<Option<T>, Status> {
        let next = tokio::time::timeout(COMPARE_TIMEOUT, self.0.message()).await;
        next.map_err(|_| {
            let seconds = COMPARE_TIMEOUT.as_secs();
            Code::Invalid.status(format!("{doing}: expected a message within {seconds} s"))
        })?
    }
}

impl Inbound for Messages<v1::CompareRequest> {
    async fn next(&mut self) -> Result<Option<v1::CompareRequest>, Status> {
        self.message("compare WAL").await
    }
}

impl Pieces for Messages<v1::RefillRequest> {
    async fn next(&mut self) -> Result<Option<Bytes>, Status> {
        match self.message(REFILLING).await?.map(|message| message.kind) {
            None => Ok(None),
            Some(Some(refill_request::Kind::Data(data))) => Ok(Some(data)),
            Some(_) => Err(Code::Invalid.status(format!("{REFILLING}: expected data"))),
        }
    }
}

#[derive(Clone)]
pub struct WalService {
    pub auth: Auth,
    pub receiver: Receiver,
    pub source: Source,
    /// Receives jobs for history files.
    pub queue: queue::Publisher,
    pub tasks: TaskTracker,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Wal for WalService {
    type ReceiveStream = Answers<v1::ReceiveResponse>;
    type FetchStream = Answers<v1::FetchResponse>;

    async fn position(
        &self,
        request: Request<v1::PositionRequest>,
    ) -> Result<Response<v1::PositionResponse>, Status> {
        let (_, named) = self.auth.require(&request, &request.get_ref().cluster, Rpc::Position)?;
        let asked = PositionRequest::try_from(request.into_inner())?;
        if asked.knows_generations && named.number().is_none() {
            let generations = generation_positions(&self.receiver.base, &named, &asked).await?;
            let current = generations.iter().find(|g| g.state == State::Current.word());
            let timelines = current.map(|g| g.timelines.clone()).unwrap_or_default();
            return Ok(Response::new(v1::PositionResponse {
                timelines,
                generations,
                beside: true,
            }));
        }
        let cluster = self.receiver.base.resolve_open(named).await?;
        // Refuses another system before the sidecar goes any further; writes nothing at first contact.
        self.receiver.base.check_system(&cluster, asked.system).await?;
        let with_tier2 = asked.with_tier2 || self.receiver.store.positions(&cluster).is_empty();
        let timelines = positions(&self.receiver.base, &cluster, with_tier2, false).await?;
        Ok(Response::new(v1::PositionResponse { timelines, generations: Vec::new(), beside: true }))
    }

    async fn begin_generation(
        &self,
        request: Request<v1::BeginGenerationRequest>,
    ) -> Result<Response<v1::BeginGenerationResponse>, Status> {
        let (_, named) =
            self.auth.require(&request, &request.get_ref().cluster, Rpc::BeginGeneration)?;
        let asked = BeginGenerationRequest::try_from(request.into_inner())?;
        let base = &self.receiver.base;
        let current = base.resolve(named.base()).await?;
        let refuses = self.receiver.options.on_divergence == OnDivergence::Refuse;
        let system_identifier = asked.system.system_identifier;
        let other_system = |other: &Status| Stranger {
            reason: other.message().to_owned(),
            system_identifier,
            other_system: true,
            ..Stranger::default()
        };
        let stranger = match base.check_system(&current, asked.system).await {
            Err(other) if Code::of(&other) == Code::WrongSystem && refuses => {
                // P11: recorded until a person decides, whatever the settings are after the next start.
                return match base.begin_generation(&current, other_system(&other), false).await {
                    Err(refused) if Code::of(&refused) != Code::Diverged => Err(refused),
                    _ => Err(other),
                };
            }
            Err(other) if Code::of(&other) == Code::WrongSystem => other_system(&other),
            Err(trouble) => return Err(trouble),
            Ok(()) => {
                let comparer = &self.receiver.comparer;
                comparer.why_another(&asked.writer_id, &current, system_identifier)?
            }
        };
        let number = base.begin_generation(&current, stranger, !refuses).await?;
        Ok(Response::new(v1::BeginGenerationResponse { number }))
    }

    async fn put_history(
        &self,
        request: Request<v1::PutHistoryRequest>,
    ) -> Result<Response<v1::PutHistoryResponse>, Status> {
        let (_, named) =
            self.auth.require(&request, &request.get_ref().cluster, Rpc::PutHistory)?;
        let cluster = self.receiver.base.resolve_open(named).await?;
        let PutHistoryRequest { system, timeline, content, .. } =
            PutHistoryRequest::try_from(request.into_inner())?;
        let (store, name) = (self.receiver.store.clone(), cluster.clone());
        // The first contact may be with a cluster that was promoted long ago, whose history comes before its WAL.
        self.receiver.base.pin(&cluster, system).await?;
        let size = content.len() as u64;
        if store.history(&cluster, timeline).is_err() {
            self.receiver.base.check_history(&cluster, timeline, &content).await?;
        }
        let new = store.history(&cluster, timeline).is_err();
        blocking(move || store.put_history(&name, timeline, &content)).await?;
        if new {
            self.receiver.metrics.written(&cluster, size);
            self.queue.publish_path(&cluster, WalFile::History(timeline), size);
        }
        Ok(Response::new(v1::PutHistoryResponse {}))
    }

    async fn compare(
        &self,
        request: Request<Streaming<v1::CompareRequest>>,
    ) -> Result<Response<v1::CompareResponse>, Status> {
        let identity = self.auth.identify(&request)?;
        let mut inbound = Messages(request.into_inner());
        let first = inbound.next().await?;
        let Some(compare_request::Kind::Begin(begin)) = first.and_then(|m| m.kind) else {
            return Err(Code::Invalid.status("compare WAL: expected a begin message first"));
        };
        let named = permit(&identity, &begin.cluster, Rpc::Compare)?;
        let cluster = self.receiver.base.resolve(named).await?;
        let begin = CompareBegin::try_from(begin)?;
        let verdict = self.receiver.comparer.compare(&cluster, begin, inbound).await?;
        Ok(Response::new(match verdict {
            Verdict::Same { proven } => v1::CompareResponse {
                verdict: v1::CompareVerdict::Same.into(),
                proven,
                ..v1::CompareResponse::default()
            },
            Verdict::Diverged { at, detail } => v1::CompareResponse {
                verdict: v1::CompareVerdict::Diverged.into(),
                proven: false,
                at_lsn: at.as_u64(),
                detail,
            },
        }))
    }

    async fn refill(
        &self,
        request: Request<Streaming<v1::RefillRequest>>,
    ) -> Result<Response<v1::RefillResponse>, Status> {
        let identity = self.auth.identify(&request)?;
        let mut inbound = Messages(request.into_inner());
        let first = inbound.message(REFILLING).await?;
        let Some(refill_request::Kind::Begin(begin)) = first.and_then(|m| m.kind) else {
            return Err(
                Code::Invalid.status(format!("{REFILLING}: expected a begin message first"))
            );
        };
        let named = permit(&identity, &begin.cluster, Rpc::Refill)?;
        let cluster = self.receiver.base.resolve_open(named).await?;
        let begin = RefillBegin::try_from(begin)?;
        refill::take(&self.receiver, &cluster, begin, inbound).await?;
        Ok(Response::new(v1::RefillResponse {}))
    }

    async fn receive(
        &self,
        request: Request<Streaming<v1::ReceiveRequest>>,
    ) -> Result<Response<Self::ReceiveStream>, Status> {
        let identity = self.auth.identify(&request)?;
        let peer = request.remote_addr().map_or_else(|| "?".into(), |a| a.to_string());
        let who = format!("{} from {peer}", identity.name);
        let mut inbound = request.into_inner();
        let first = tokio::time::timeout(OPEN_TIMEOUT, inbound.message());
        let first = first.await.map_err(|_| {
            Code::Invalid.status(format!(
                "open stream: expected an open message within {} s",
                OPEN_TIMEOUT.as_secs()
            ))
        })??;
        let Some(receive_request::Kind::Open(open)) = first.and_then(|m| m.kind) else {
            return Err(Code::Invalid.status("open stream: expected an open message first"));
        };
        let named = permit(&identity, &open.cluster, Rpc::Receive)?;
        let cluster = self.receiver.base.resolve_open(named).await?;
        let mut open = Open::try_from(open)?;
        if let Some(gap) = &mut open.gap {
            // The reason is stored for years and shown to others, so it must be one line without terminal control
            // characters.
            gap.reason = visible::line(&gap.reason).into_owned();
        }
        let (responses, outbound) = mpsc::channel(RESPONSES_MAX);
        let receiver = self.receiver.clone();
        let session = receiver.serve(identity, cluster, open, who, inbound, responses);
        self.tasks.spawn(self.receiver.metrics.polls().watch(session).in_current_span());
        Ok(Response::new(ReceiverStream::new(outbound).boxed()))
    }

    async fn fetch(
        &self,
        request: Request<v1::FetchRequest>,
    ) -> Result<Response<Self::FetchStream>, Status> {
        let (_, named) = self.auth.require(&request, &request.get_ref().cluster, Rpc::Fetch)?;
        let cluster = self.receiver.base.resolve(named).await?;
        let file: WalFile = request
            .get_ref()
            .name
            .parse()
            .map_err(|e| Code::Invalid.status(format!("fetch WAL: {e}")))?;
        if request.get_ref().for_standby
            && let Some(history) = self.receiver.base.instead_for_standbys(&cluster, file).await?
        {
            return Ok(Response::new(fetch::history(history)));
        }
        let found = if request.get_ref().tier2_only {
            self.source.find_other_copy(&cluster, file).await?
        } else {
            self.source.find(&cluster, file).await?
        };
        let before_hole = self.source.before_hole(&cluster, file, found.beginning()).await;
        Ok(Response::new(fetch::stream(found, before_hole, &self.tasks)))
    }
}

/// How far each timeline of one generation reaches. Nothing continues a `closed` one: what is stored of it is
/// compared to its last byte.
async fn positions(
    base: &BaseStore,
    cluster: &ClusterName,
    with_tier2: bool,
    closed: bool,
) -> Result<Vec<v1::TimelinePosition>, Status> {
    let mut lines = base.positions(cluster, with_tier2).await?;
    // A generation of which tier 1 holds nothing is as empty as before: the bucket may have its WAL.
    if with_tier2 || !lines.is_empty() {
        lines.extend(base.retired_lines(cluster, &lines));
    }
    let holes = base.wal().holes(cluster);
    let reaches = |line: &Line| if closed { line.end } else { line.flushed };
    let position = |line| position_of(line, reaches(line), &holes);
    Ok(lines.iter().map(position).collect())
}

/// Every generation, in the order in which a PostgreSQL looks for its own.
async fn generation_positions(
    base: &BaseStore,
    named: &ClusterName,
    asked: &PositionRequest,
) -> Result<Vec<v1::GenerationPosition>, Status> {
    let mut found = Vec::new();
    let generations = base.generations(named).await?;
    let holds = |number| {
        let place = Generations::place(named, number);
        !base.wal().positions(&place).is_empty()
    };
    // If no generation holds anything, tier 1 was lost or this is the first contact, so the bucket is asked. An
    // empty generation beside others is new or was lost with tier 1: the bucket is asked for it only if the caller
    // continues none of the others, so that no other one waits for the bucket (P4).
    let with_tier2 = asked.with_tier2 || !generations.all().iter().any(|g| holds(g.number));
    for generation in generations.by_rank() {
        let place = Generations::place(named, generation.number);
        let in_tier2 = with_tier2 || asked.empty_in_tier2 && !holds(generation.number);
        let stored = stored_of(base, &place, &generation, asked, in_tier2).await;
        let (timelines, unclear) = match stored {
            Ok(timelines) => (timelines, String::new()),
            Err(silent) if Code::of(&silent) == Code::Unavailable => return Err(silent),
            // A record that cannot be read holds up only who may continue this generation (P4).
            Err(trouble) => {
                let error = trouble.message();
                tracing::error!(cluster = %place, error, "it is not known what is stored of this generation");
                (Some(Vec::new()), error.to_owned())
            }
        };
        found.push(v1::GenerationPosition {
            number: generation.number,
            state: generation.state.word().into(),
            same_system: timelines.is_some(),
            timelines: timelines.unwrap_or_default(),
            decided: decided(&generation),
            unclear,
        });
    }
    Ok(found)
}

/// What is stored of one generation; `None` if it is another PostgreSQL's.
async fn stored_of(
    base: &BaseStore,
    place: &ClusterName,
    generation: &Generation,
    asked: &PositionRequest,
    in_tier2: bool,
) -> Result<Option<Vec<v1::TimelinePosition>>, Status> {
    if !generation.is_of(asked.system.system_identifier) {
        return Ok(None);
    }
    match base.check_system(place, asked.system).await {
        Ok(()) => {}
        Err(other) if Code::of(&other) == Code::WrongSystem => return Ok(None),
        // If the identity is recorded already, or is asked for later, a bucket that is down does not matter (P4).
        Err(_) if !generation.system_identifier.is_empty() || !in_tier2 => {}
        Err(trouble) => return Err(trouble),
    }
    let closed = !generation.state.is_open();
    // There is no WAL of one that was never received.
    positions(base, place, in_tier2 && generation.taken, closed).await.map(Some)
}

fn position_of(line: &Line, reaches: Lsn, holes: &[Hole]) -> v1::TimelinePosition {
    let own = holes.iter().filter(|hole| hole.timeline == line.timeline);
    let damaged =
        |hole: &Hole| v1::Stretch { from_lsn: hole.start.as_u64(), to_lsn: hole.end.as_u64() };
    let missing =
        |run: &Run| v1::Stretch { from_lsn: run.start.as_u64(), to_lsn: run.end.as_u64() };
    v1::TimelinePosition {
        timeline: line.timeline.get(),
        start_lsn: line.start.as_u64(),
        flushed_lsn: reaches.as_u64(),
        has_history: line.has_history,
        missing: line.missing.iter().map(missing).collect(),
        damaged: own.map(damaged).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        base::stranger,
        consumer::tests::{base_store, s3, tier2},
        queue::tests::TestQueue,
        status::tests::store,
    };
    use klio_storage::{disk::RealDisk, layout::BaseObject, record};
    use std::{fs, path::Path};

    const MIB: u64 = 1 << 20;

    fn put(root: &Path, cluster: &str, file: &str, bytes: u64) {
        let cluster = ClusterName::parse_generation(cluster).unwrap();
        let path = root.join(file.parse::<WalFile>().unwrap().key(&cluster));
        let plain = &vec![1; bytes as usize][..];
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, zstd::encode_all(plain, 1).unwrap()).unwrap();
    }

    /// Generation 1 is the current one; 2, of which tier 1 has WAL, is undecided, 3 is retired, and 4 was never received.
    fn known(root: &Path) {
        let (mut all, main) = (Generations::default(), "main".parse().unwrap());
        all.begin(stranger("a clone", 7), 1.0, true).unwrap();
        all.begin(stranger("another clone", 7), 1.0, true).unwrap();
        all.retire(3, "ops", 2.0).unwrap();
        all.begin(stranger("never received", 7), 1.0, false).unwrap();
        let path = root.join(BaseObject::Generations.key(&main));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        record::store(&RealDisk, &path, &all).unwrap();
    }

    /// P11, regression test: after a lost tier 1 with several generations, only those that had streamed again were known.
    #[tokio::test(flavor = "multi_thread")]
    async fn what_tier_1_lost_of_a_generation_is_looked_for_in_tier_2_when_somebody_needs_it() {
        let [near, directory] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let (queue, s3) = (TestQueue::start(directory.path()).await, s3::S3::start().await);
        let far = s3.object("");
        drop(store(&far, &["main", "main@3"]));
        put(&far, "main", "000000010000000000000001", MIB);
        put(&far, "main@3", "000000010000000000000001", MIB);
        put(&far, "main@3", "000000010000000000000002.partial", 70_000);
        known(near.path());
        drop(store(near.path(), &["main@2"]));
        put(near.path(), "main@2", "000000010000000000000003", MIB);
        let base = base_store(near.path(), &queue, Some(tier2(&s3)));
        let ask = async |empty_in_tier2: bool| {
            let asked = v1::PositionRequest {
                cluster: "main".into(),
                system_identifier: 7,
                segment_size: MIB as u32,
                postgres_version: 170_000,
                knows_generations: true,
                with_tier2: false,
                empty_in_tier2,
            };
            let asked = PositionRequest::try_from(asked).unwrap();
            let found = generation_positions(&base, &"main".parse().unwrap(), &asked).await?;
            let ends = |g: &v1::GenerationPosition| {
                (g.number, g.timelines.iter().map(|t| t.flushed_lsn).collect::<Vec<_>>())
            };
            Ok::<_, Status>(found.iter().map(ends).collect::<Vec<_>>())
        };
        let near_alone = vec![(1, vec![]), (2, vec![4 * MIB]), (4, vec![]), (3, vec![])];
        assert_eq!(ask(false).await.unwrap(), near_alone);
        // Nothing continues a closed one, so that it is compared to its last byte.
        let closed = 2 * MIB + 70_000;
        let both = vec![(1, vec![2 * MIB]), (2, vec![4 * MIB]), (4, vec![]), (3, vec![closed])];
        assert_eq!(ask(true).await.unwrap(), both);
        // A bucket that does not answer holds up only who needs it (P4).
        s3.on_request(|_| Some(s3::Fault::Status(503, "SlowDown")));
        assert_eq!(ask(false).await.unwrap(), near_alone);
        let refused = ask(true).await.unwrap_err();
        assert_eq!(Code::of(&refused), Code::Unavailable, "{refused}");
        queue.stop().await;
    }

    /// P4, regression test: one damaged record in the bucket failed the answer about all generations, and no other
    /// generation was maintained.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_generation_whose_records_cannot_be_read_holds_up_no_other() {
        let [near, directory] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let (queue, s3) = (TestQueue::start(directory.path()).await, s3::S3::start().await);
        let (far, main) = (s3.object(""), "main".parse::<ClusterName>().unwrap());
        drop(store(&far, &["main", "main@3"]));
        put(&far, "main@3", "000000010000000000000001", MIB);
        fs::write(far.join(BaseObject::Cluster.key(&main)), "{}").unwrap();
        known(near.path());
        drop(store(near.path(), &["main@2"]));
        let base = base_store(near.path(), &queue, Some(tier2(&s3)));
        let asked = v1::PositionRequest {
            cluster: "main".into(),
            system_identifier: 7,
            segment_size: MIB as u32,
            postgres_version: 170_000,
            knows_generations: true,
            with_tier2: false,
            empty_in_tier2: true,
        };
        let asked = PositionRequest::try_from(asked).unwrap();
        let found = generation_positions(&base, &main, &asked).await.unwrap();
        let of = |number| found.iter().find(|g| g.number == number).unwrap();
        assert!(of(1).same_system && of(1).timelines.is_empty());
        assert!(!of(1).unclear.is_empty());
        assert_eq!((of(3).timelines.len(), of(3).unclear.as_str()), (1, ""));
        base.regain_generations(&main).await.unwrap();
        assert!(base.wal().pinned(&main).is_none());
        assert!(base.wal().pinned(&main.with_generation(3)).is_some());
        queue.stop().await;
    }
}
