//! A klio.v1 server in memory for tests. It stores WAL and misbehaves as its [`Script`] says.
//!
//! It checks by itself that every byte has the right position and that the client respects the window. It listens on
//! 127.0.0.1, and ends when dropped.

use klio_pg::Lsn;
use klio_proto::{
    Code,
    v1::{
        self,
        catalog_server::{Catalog, CatalogServer},
        compare_request, receive_request, receive_response, refill_request, wal_server,
    },
};
use klio_storage::wal::overlap::PageDigests;
use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};
use tokio::sync::{Notify, mpsc};
use tokio_stream::{
    Stream,
    wrappers::{ReceiverStream, TcpListenerStream},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tonic::{Request, Response, Status, Streaming};

/// The byte at a position: what the fake PostgreSQL sends and the fake server expects.
pub(crate) fn byte_at(lsn: u64) -> u8 {
    (lsn ^ (lsn >> 8) ^ (lsn >> 16)) as u8
}

/// The WAL of one timeline.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HeldWal {
    pub start: u64,
    pub received: u64,
    pub flushed: u64,
}

/// The server's state, and its instructions.
#[derive(Debug, Default)]
pub(crate) struct Script {
    pub timelines: BTreeMap<u32, HeldWal>,
    pub histories: BTreeMap<u32, Vec<u8>>,
    pub opens: Vec<v1::Open>,
    pub positions_asked: usize,
    /// What `Position` answers as `beside`: each timeline is received for itself.
    pub beside: bool,
    /// The nonce to ask for before the stream is opened, and while it is open; each is used once.
    pub prove_at_open: Option<u64>,
    pub prove_while_open: Option<u64>,
    pub proofs: Vec<v1::Alive>,
    /// How many of the position requests asked for tier 2.
    pub tier2_asked: usize,
    /// The ranges that positions report as missing.
    pub missing: Vec<v1::Stretch>,
    /// The ranges that positions report as damaged; and for each refill its start and how many of its bytes were right.
    pub damaged: Vec<v1::Stretch>,
    pub refilled: Vec<(u64, u64)>,
    /// Errors for the next `Receive` calls; if empty, they succeed.
    pub refuse_opens: Vec<Code>,
    pub window: u64,
    /// Acknowledges nothing while this is set.
    pub hold_acks: bool,
    /// The stream breaks once, when this position is reached.
    pub break_after: Option<u64>,
    pub max_outstanding: u64,
    /// The highest flushed position that any acknowledgement carried.
    pub max_acked: u64,
    /// The answers of `Fetch`, by file name.
    pub files: BTreeMap<String, Vec<v1::FetchResponse>>,
    pub fetch_error: Option<Code>,
    pub fetches: usize,
    /// The cluster that each fetch named.
    pub fetched_of: Vec<String>,
    /// The generation that is followed; `None` behaves as an older server, which knows none.
    pub current: Option<u32>,
    /// The comparisons that clients asked for.
    pub compares: Vec<v1::CompareBegin>,
    /// Behaves as an older server, which has no comparison.
    pub compares_nothing: bool,
    /// The generations that positions report.
    pub generations: Vec<v1::GenerationPosition>,
    /// The same if tier 2 is asked as well; `None` says that it does not answer.
    pub in_tier2: Option<Vec<v1::GenerationPosition>>,
    /// The code of that, if it is another than UNAVAILABLE.
    pub tier2_fails: Option<Code>,
    /// How many of the position requests asked tier 2 for the generations that are empty on tier 1.
    pub empty_asked: usize,
    /// Behaves as an older server, which does not know that question.
    pub asks_no_empty: bool,
    /// Clusters whose stored WAL cannot be read.
    pub unreadable: Vec<String>,
    /// Clusters for which every comparison finds another history.
    pub others: Vec<String>,
    /// The number of the next generation; with `None` it is refused.
    pub begins: Option<u32>,
    pub empty_appends: usize,
    /// How many of the empty appends say how far PostgreSQL is.
    pub told: usize,
    pub wrong: Vec<String>,
}

impl Script {
    /// Adds WAL that the server has from the start.
    pub fn hold(&mut self, timeline: u32, held: HeldWal) {
        self.timelines.insert(timeline, held);
    }
}

pub(crate) struct FakeServer {
    pub address: String,
    shared: Arc<Shared>,
    _task: AbortOnDropHandle<()>,
    stop: CancellationToken,
}

#[derive(Debug)]
struct Shared {
    script: Mutex<Script>,
    changed: Notify,
}

impl FakeServer {
    pub async fn start() -> Self {
        Self::serve("http", tonic::transport::Server::builder()).await
    }

    /// With TLS, as the real server.
    pub async fn start_tls(tls: tonic::transport::ServerTlsConfig) -> Self {
        Self::serve("https", tonic::transport::Server::builder().tls_config(tls).unwrap()).await
    }

    async fn serve(scheme: &str, mut server: tonic::transport::Server) -> Self {
        let script = Mutex::new(Script { window: 1 << 20, ..Script::default() });
        let shared = Arc::new(Shared { script, changed: Notify::new() });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("{scheme}://{}", listener.local_addr().unwrap());
        let stop = CancellationToken::new();
        let (service, stopped) = (Service(Arc::clone(&shared)), stop.clone());
        let catalog = CatalogServer::new(Service(Arc::clone(&shared)));
        let mut set = tokio::task::JoinSet::new();
        set.spawn(async move {
            server
                .add_service(wal_server::WalServer::new(service))
                .add_service(catalog)
                .serve_with_incoming_shutdown(
                    TcpListenerStream::new(listener),
                    stopped.cancelled_owned(),
                )
                .await
                .unwrap();
        });
        #[allow(clippy::disallowed_methods, reason = "owned by the handle below")]
        let task = AbortOnDropHandle::new(tokio::spawn(async move {
            while set.join_next().await.is_some() {}
        }));
        Self { address, shared, _task: task, stop }
    }

    pub fn script(&self) -> MutexGuard<'_, Script> {
        self.shared.script.lock().unwrap()
    }

    /// Changes the instructions and wakes the tasks that wait for them.
    pub fn change(&self, change: impl FnOnce(&mut Script)) {
        change(&mut self.script());
        self.shared.changed.notify_waiters();
    }

    /// Waits until the condition is true; panics with the state if it never is.
    pub async fn until(&self, what: &str, is: impl Fn(&Script) -> bool) {
        let wait = async {
            while !is(&self.script()) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        if tokio::time::timeout(Duration::from_secs(20), wait).await.is_err() {
            panic!("{what} did not happen: {:?}", self.script());
        }
    }
}

impl Drop for FakeServer {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

struct Service(Arc<Shared>);

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl wal_server::Wal for Service {
    async fn position(
        &self,
        request: Request<v1::PositionRequest>,
    ) -> Result<Response<v1::PositionResponse>, Status> {
        let mut script = self.0.script.lock().unwrap();
        script.positions_asked += 1;
        let asked = request.into_inner();
        script.tier2_asked += usize::from(asked.with_tier2);
        script.empty_asked += usize::from(asked.empty_in_tier2);
        let in_tier2 = asked.with_tier2 || asked.empty_in_tier2 && !script.asks_no_empty;
        let timelines = script
            .timelines
            .iter()
            .map(|(timeline, held)| v1::TimelinePosition {
                timeline: *timeline,
                start_lsn: held.start,
                flushed_lsn: held.flushed,
                has_history: script.histories.contains_key(timeline),
                missing: script.missing.clone(),
                damaged: script.damaged.clone(),
            })
            .collect();
        let generations = match in_tier2 && !script.generations.is_empty() {
            true => script
                .in_tier2
                .clone()
                .ok_or_else(|| script.tier2_fails.unwrap_or(Code::Unavailable).status("as told"))?,
            false => script.generations.clone(),
        };
        Ok(Response::new(v1::PositionResponse { timelines, generations, beside: script.beside }))
    }

    async fn begin_generation(
        &self,
        _: Request<v1::BeginGenerationRequest>,
    ) -> Result<Response<v1::BeginGenerationResponse>, Status> {
        match self.0.script.lock().unwrap().begins {
            Some(number) => Ok(Response::new(v1::BeginGenerationResponse { number })),
            None => Err(Code::Diverged.status("as told")),
        }
    }

    async fn put_history(
        &self,
        request: Request<v1::PutHistoryRequest>,
    ) -> Result<Response<v1::PutHistoryResponse>, Status> {
        let request = request.into_inner();
        let mut script = self.0.script.lock().unwrap();
        script.histories.insert(request.timeline, request.content.to_vec());
        Ok(Response::new(v1::PutHistoryResponse {}))
    }

    async fn compare(
        &self,
        request: Request<Streaming<v1::CompareRequest>>,
    ) -> Result<Response<v1::CompareResponse>, Status> {
        let mut messages = request.into_inner();
        let Some(v1::CompareRequest { kind: Some(compare_request::Kind::Begin(begin)) }) =
            messages.message().await?
        else {
            return Err(Code::Invalid.status("expected begin"));
        };
        let mut digests = Vec::new();
        while let Some(message) = messages.message().await? {
            if let Some(compare_request::Kind::Digests(data)) = message.kind {
                digests.extend_from_slice(&data);
            }
        }
        let mut script = self.0.script.lock().unwrap();
        if script.unreadable.contains(&begin.cluster) {
            return Err(Code::Unavailable.status("cannot be read now"));
        }
        if script.compares_nothing {
            return Err(Status::unimplemented("as a server of before"));
        }
        let (start, end) = (begin.start_lsn, begin.end_lsn);
        let behind = (1..begin.held_lsn).contains(&begin.postgres_end_lsn);
        let other = script.others.contains(&begin.cluster);
        script.compares.push(begin);
        let mut ours = PageDigests::new(Lsn::new(start));
        ours.push(&(start..end).map(byte_at).collect::<Vec<_>>());
        // An empty range has no difference, even if it is inside a page.
        let alike = start == end || ours.finish() == digests;
        let same = alike && !behind && !other;
        let verdict =
            if same { v1::CompareVerdict::Same } else { v1::CompareVerdict::Diverged }.into();
        let (at_lsn, detail) = (start, "as told".to_owned());
        Ok(Response::new(v1::CompareResponse { verdict, proven: end > start, at_lsn, detail }))
    }

    async fn refill(
        &self,
        request: Request<Streaming<v1::RefillRequest>>,
    ) -> Result<Response<v1::RefillResponse>, Status> {
        let mut messages = request.into_inner();
        let Some(v1::RefillRequest { kind: Some(refill_request::Kind::Begin(begin)) }) =
            messages.message().await?
        else {
            return Err(Code::Invalid.status("expected begin"));
        };
        let mut right = 0;
        while let Some(message) = messages.message().await? {
            if let Some(refill_request::Kind::Data(data)) = message.kind {
                let from = begin.start_lsn + right;
                let same = data.iter().zip(from..).take_while(|(byte, at)| **byte == byte_at(*at));
                right += same.count() as u64;
            }
        }
        let mut script = self.0.script.lock().unwrap();
        script.damaged.retain(|damaged| damaged.from_lsn != begin.start_lsn);
        script.refilled.push((begin.start_lsn, right));
        Ok(Response::new(v1::RefillResponse {}))
    }

    type ReceiveStream = Answers<v1::ReceiveResponse>;
    async fn receive(
        &self,
        request: Request<Streaming<v1::ReceiveRequest>>,
    ) -> Result<Response<Self::ReceiveStream>, Status> {
        let mut messages = request.into_inner();
        let Some(v1::ReceiveRequest { kind: Some(receive_request::Kind::Open(open)) }) =
            messages.message().await?
        else {
            return Err(Code::Invalid.status("expected open"));
        };
        let (timeline, window) = (open.timeline, self.begin(open)?);
        let (answers, queue) = mpsc::channel(16);
        let shared = Arc::clone(&self.0);
        let start_lsn = shared.script.lock().unwrap().timelines[&timeline].flushed;
        let opened = v1::Opened { start_lsn, window_bytes: window };
        let asked = shared.script.lock().unwrap().prove_at_open.take();
        #[allow(clippy::disallowed_methods, reason = "ends with its connection")]
        tokio::spawn(async move {
            if let Some(nonce) = asked {
                let prove = receive_response::Kind::Prove(v1::Prove { nonce });
                let _ = answers.send(Ok(answer(prove))).await;
                let Ok(Some(v1::ReceiveRequest {
                    kind: Some(receive_request::Kind::Alive(alive)),
                })) = messages.message().await
                else {
                    return;
                };
                shared.script.lock().unwrap().proofs.push(alive);
            }
            let opened = answer(receive_response::Kind::Opened(opened));
            let _ = answers.send(Ok(opened)).await;
            if let Err(status) = session(&shared, timeline, messages, &answers).await {
                let _ = answers.send(Err(status)).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(queue))))
    }

    type FetchStream = Answers<v1::FetchResponse>;
    async fn fetch(
        &self,
        request: Request<v1::FetchRequest>,
    ) -> Result<Response<Self::FetchStream>, Status> {
        let mut script = self.0.script.lock().unwrap();
        script.fetches += 1;
        if let Some(code) = script.fetch_error {
            return Err(code.status("as told"));
        }
        let v1::FetchRequest { cluster, name, .. } = request.into_inner();
        script.fetched_of.push(cluster);
        let file = script.files.get(&name);
        let file = file.ok_or_else(|| Code::NotFound.status(format!("no {name}")))?;
        Ok(Response::new(Box::pin(tokio_stream::iter(file.clone().into_iter().map(Ok)))))
    }
}

const NOT_HERE: &str = "the test's server does not answer this";

#[tonic::async_trait]
impl Catalog for Service {
    async fn list_generations(
        &self,
        _: Request<v1::ListGenerationsRequest>,
    ) -> Result<Response<v1::ListGenerationsResponse>, Status> {
        let Some(current) = self.0.script.lock().unwrap().current else {
            return Err(Status::unimplemented("as a server of before"));
        };
        let generation = |number| {
            let state = if number == current { "current" } else { "older" }.to_owned();
            v1::Generation { number, state, ..v1::Generation::default() }
        };
        let generations = (1..=current).map(generation).collect();
        Ok(Response::new(v1::ListGenerationsResponse { generations }))
    }
    async fn status(
        &self,
        _: Request<v1::StatusRequest>,
    ) -> Result<Response<v1::StatusResponse>, Status> {
        Err(Status::unimplemented(NOT_HERE))
    }
    async fn list_wal(
        &self,
        _: Request<v1::ListWalRequest>,
    ) -> Result<Response<v1::ListWalResponse>, Status> {
        Err(Status::unimplemented(NOT_HERE))
    }
    async fn decide_generation(
        &self,
        _: Request<v1::DecideGenerationRequest>,
    ) -> Result<Response<v1::DecideGenerationResponse>, Status> {
        Err(Status::unimplemented(NOT_HERE))
    }
    async fn check(
        &self,
        _: Request<v1::CheckRequest>,
    ) -> Result<Response<v1::CheckResponse>, Status> {
        Err(Status::unimplemented(NOT_HERE))
    }
    async fn timelines(
        &self,
        _: Request<v1::TimelinesRequest>,
    ) -> Result<Response<v1::TimelinesResponse>, Status> {
        Err(Status::unimplemented(NOT_HERE))
    }
    async fn decide_timeline(
        &self,
        _: Request<v1::DecideTimelineRequest>,
    ) -> Result<Response<v1::DecideTimelineResponse>, Status> {
        Err(Status::unimplemented(NOT_HERE))
    }
}

impl Service {
    fn begin(&self, open: v1::Open) -> Result<u64, Status> {
        let mut script = self.0.script.lock().unwrap();
        if !script.refuse_opens.is_empty() {
            let code = script.refuse_opens.remove(0);
            script.opens.push(open);
            return Err(code.status("as told"));
        }
        let held = script.timelines.get(&open.timeline).copied();
        let fills = script.missing.iter().any(|m| m.from_lsn == open.start_lsn);
        let gap = open.gap.is_some() || fills;
        if held.is_some_and(|held| held.flushed != open.start_lsn) && !gap {
            let text = format!("start {} is not {held:?}", open.start_lsn);
            script.wrong.push(text.clone());
            return Err(Code::BadPosition.status(text));
        }
        let start = open.start_lsn;
        let entry = script.timelines.entry(open.timeline);
        let held = entry.or_insert(HeldWal { start, received: start, flushed: start });
        held.received = start;
        held.flushed = start;
        script.opens.push(open);
        Ok(script.window)
    }
}

async fn session(
    shared: &Shared,
    timeline: u32,
    mut messages: Streaming<v1::ReceiveRequest>,
    answers: &mpsc::Sender<Result<v1::ReceiveResponse, Status>>,
) -> Result<(), Status> {
    loop {
        let changed = shared.changed.notified();
        tokio::select! {
            message = messages.message() => match message? {
                Some(v1::ReceiveRequest { kind: Some(receive_request::Kind::Append(append)) }) => {
                    take(&mut shared.script.lock().unwrap(), timeline, &append)?;
                }
                Some(v1::ReceiveRequest { kind: Some(receive_request::Kind::Alive(alive)) }) => {
                    shared.script.lock().unwrap().proofs.push(alive);
                }
                Some(_) => return Err(Code::Invalid.status("expected append")),
                None => {
                    // The client has half-closed the stream: flush all, acknowledge and end. `hold_acks` still applies.
                    loop {
                        let changed = shared.changed.notified();
                        if !shared.script.lock().unwrap().hold_acks {
                            break;
                        }
                        let _ = tokio::time::timeout(Duration::from_millis(20), changed).await;
                    }
                    acknowledge(shared, timeline, answers).await;
                    return Ok(());
                }
            },
            () = changed => {}
        }
        let asked = shared.script.lock().unwrap().prove_while_open.take();
        if let Some(nonce) = asked {
            let prove = receive_response::Kind::Prove(v1::Prove { nonce });
            let _ = answers.send(Ok(answer(prove))).await;
        }
        acknowledge(shared, timeline, answers).await;
    }
}

fn take(script: &mut Script, timeline: u32, append: &v1::Append) -> Result<(), Status> {
    let window = script.window;
    let held = script.timelines.get_mut(&timeline).unwrap();
    let mut wrong = Vec::new();
    if append.start_lsn != held.received {
        wrong.push(format!("append at {}, expected {}", append.start_lsn, held.received));
    }
    let good = append.data.iter().zip(append.start_lsn..).all(|(b, at)| *b == byte_at(at));
    if !good {
        wrong.push(format!("bytes at {} are not PostgreSQL's", append.start_lsn));
    }
    held.received = append.start_lsn + append.data.len() as u64;
    let outstanding = held.received - held.flushed;
    if outstanding > window {
        wrong.push(format!("{outstanding} bytes outstanding, window {window}"));
    }
    let received = held.received;
    script.empty_appends += usize::from(append.data.is_empty());
    script.told += usize::from(append.data.is_empty() && append.wal_end_lsn > 0);
    script.max_outstanding = script.max_outstanding.max(outstanding);
    script.wrong.extend(wrong);
    if script.break_after.is_some_and(|limit| received >= limit) {
        script.break_after = None;
        return Err(Code::StorageFailed.status("as told"));
    }
    Ok(())
}

async fn acknowledge(
    shared: &Shared,
    timeline: u32,
    answers: &mpsc::Sender<Result<v1::ReceiveResponse, Status>>,
) {
    let ack = {
        let mut script = shared.script.lock().unwrap();
        let hold = script.hold_acks;
        let held = script.timelines.get_mut(&timeline).unwrap();
        if !hold {
            held.flushed = held.received;
        }
        let ack = v1::Ack { received_lsn: held.received, flushed_lsn: held.flushed };
        script.max_acked = script.max_acked.max(ack.flushed_lsn);
        ack
    };
    let _ = answers.send(Ok(answer(receive_response::Kind::Ack(ack)))).await;
}

fn answer(kind: receive_response::Kind) -> v1::ReceiveResponse {
    v1::ReceiveResponse { kind: Some(kind) }
}

pub(crate) fn lsn(n: u64) -> Lsn {
    Lsn::new(n)
}
