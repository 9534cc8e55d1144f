//! The WAL service: translates requests, calls the receiver, and translates the answers back.

use super::{
    auth::{Auth, permit},
    fetch,
    roles::Rpc,
};
use crate::{
    base::{Line, decided},
    config::OnDivergence,
    fetch::Source,
    queue,
    receive::{Inbound, Pieces, Receiver, Verdict, open::blocking, refill},
};
use bytes::Bytes;
use futures::{Stream, StreamExt};
use klio_proto::{
    Code,
    v1::{self, compare_request, receive_request, refill_request, wal_server::Wal},
    wal::{
        BeginGenerationRequest, CompareBegin, Open, PositionRequest, PutHistoryRequest,
        RefillBegin, System,
    },
};
use klio_storage::{
    catalog::Run,
    generations::{Generations, State, Stranger},
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

impl WalService {
    /// How far each timeline of one generation reaches.
    async fn positions(
        &self,
        cluster: &ClusterName,
        with_tier2: bool,
    ) -> Result<Vec<v1::TimelinePosition>, Status> {
        let mut lines = self.receiver.base.positions(cluster, with_tier2).await?;
        lines.extend(self.receiver.base.retired_lines(cluster, &lines));
        let holes = self.receiver.store.holes(cluster);
        Ok(lines.iter().map(|line| position_of(line, &holes)).collect())
    }

    /// Every generation, in the order in which a PostgreSQL looks for its own.
    async fn generation_positions(
        &self,
        named: &ClusterName,
        system: System,
        with_tier2: bool,
    ) -> Result<Vec<v1::GenerationPosition>, Status> {
        let base = &self.receiver.base;
        let mut found = Vec::new();
        let generations = base.generations(named).await?;
        let holds = |number| {
            let place = Generations::place(named, number);
            !self.receiver.store.positions(&place).is_empty()
        };
        // If no generation holds anything, tier 1 was lost or this is the first contact, so the bucket is asked. An
        // empty generation beside others does not need the bucket (P4).
        let with_tier2 = with_tier2 || !generations.all().iter().any(|g| holds(g.number));
        for generation in generations.by_rank() {
            let place = Generations::place(named, generation.number);
            // If the identity is recorded already, a bucket that is down does not matter (P4).
            let is_of = generation.is_of(system.system_identifier);
            let same_system = is_of
                && match base.check_system(&place, system).await {
                    Ok(()) => true,
                    Err(other) if Code::of(&other) == Code::WrongSystem => false,
                    Err(_) if !generation.system_identifier.is_empty() => true,
                    Err(trouble) => return Err(trouble),
                };
            let timelines = match same_system {
                true => self.positions(&place, with_tier2).await?,
                false => Vec::new(),
            };
            found.push(v1::GenerationPosition {
                number: generation.number,
                state: generation.state.word().into(),
                same_system,
                timelines,
                decided: decided(&generation),
            });
        }
        Ok(found)
    }
}

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
            let generations =
                self.generation_positions(&named, asked.system, asked.with_tier2).await?;
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
        let timelines = self.positions(&cluster, with_tier2).await?;
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

fn position_of(line: &Line, holes: &[Hole]) -> v1::TimelinePosition {
    let own = holes.iter().filter(|hole| hole.timeline == line.timeline);
    let damaged =
        |hole: &Hole| v1::Stretch { from_lsn: hole.start.as_u64(), to_lsn: hole.end.as_u64() };
    let missing =
        |run: &Run| v1::Stretch { from_lsn: run.start.as_u64(), to_lsn: run.end.as_u64() };
    v1::TimelinePosition {
        timeline: line.timeline.get(),
        start_lsn: line.start.as_u64(),
        flushed_lsn: line.flushed.as_u64(),
        has_history: line.has_history,
        missing: line.missing.iter().map(missing).collect(),
        damaged: own.map(damaged).collect(),
    }
}
