//! The single task that tracks which segments lie in the spool and which are being fetched.
//!
//! A request is answered from the spool, by a fetch that is already running, or by a new fetch; then the window after
//! it is filled. A prefetched file is stored only if it is a whole segment (AGENT2). Ends when the channel of
//! requests is closed.

use super::{ahead::Ahead, spool::Files};
use crate::{
    error::{Error, Failure},
    wal_source::{self, Expected, Fetch, Received, Target, WalSource},
};
use klio_pg::SegmentName;
use klio_proto::Code;
use klio_storage::layout::WalFile;
use opentelemetry::trace::{SpanContext, TraceContextExt};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::Arc,
};
use tokio::{
    sync::{mpsc, oneshot},
    task::{self, AbortHandle, JoinSet},
};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, Span};
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// Bounds (AGENT4).
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Most bytes that prefetched files may take on disk, finished or not.
    pub bytes_max: u64,
    /// How many fetches ahead run at a time. A fetch waits for the network and then for a core. More than this did
    /// not make S3 on loopback faster, and each fetch takes some MiB of memory.
    pub parallel: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { bytes_max: 512 << 20, parallel: 6 }
    }
}

/// How many requested fetches run at a time. A standby gives up after some seconds and asks again, while its first
/// request still waits for a server that does not answer (AGENT4).
const ASKING_MAX: usize = 8;

/// A caller's request.
#[derive(Debug)]
pub(super) struct Ask {
    pub file: WalFile,
    /// W3C trace context of the caller; empty if it has none.
    pub traceparent: String,
    pub reply: oneshot::Sender<Reply>,
}

#[derive(Debug)]
pub(super) enum Reply {
    File(Handed),
    /// The file definitely does not exist (P7).
    Absent(String),
    /// Why the caller has to fetch the file itself.
    Failed(String),
}

/// A file in the spool. Dropping this removes it, unless the caller has renamed it.
#[derive(Debug)]
pub(super) struct Handed {
    pub path: PathBuf,
    pub size: u64,
    /// Span of the fetch that brought it.
    fetched: SpanContext,
}

impl Drop for Handed {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// The result of a fetch; `None` when the file exists but may still change.
type Fetched = Result<Option<(Received, Handed)>, Error>;

enum Done {
    Ahead(SegmentName, Fetched),
    Asked(Ask, Fetched),
}

pub(super) struct Engine {
    fetch: Fetching,
    limits: Limits,
    ahead: Ahead,
    /// Whole segments in the spool.
    ready: BTreeMap<SegmentName, Handed>,
    /// Prefetches in progress; nobody had requested the segment when they began.
    coming: BTreeMap<SegmentName, AbortHandle>,
    /// Requests that wait for one of these prefetches.
    waiting: BTreeMap<SegmentName, Ask>,
    tasks: JoinSet<Done>,
    /// Those of `tasks` that fetch for a request.
    asking: BTreeSet<task::Id>,
    /// Cancelled to end the agent when its settings do not work; a new agent reads them again.
    leave: CancellationToken,
}

#[derive(Clone)]
struct Fetching {
    source: Arc<dyn WalSource>,
    expected: Expected,
    files: Files,
}

impl Fetching {
    /// Runs a fetch in a span below the caller's, or in a trace of its own for a prefetch.
    async fn run(self, file: WalFile, final_only: bool, traceparent: &str) -> Fetched {
        // Not below the agent's own span, which lasts as long as the recovery: each fetch is a trace of its own.
        let span = wal_source::span(file);
        adopt(&span, traceparent);
        let fetched = self.fetch(file, final_only).instrument(span.clone()).await;
        let received =
            fetched.as_ref().map(|fetched| fetched.as_ref().map(|(received, _)| received));
        wal_source::ended(&span, received);
        fetched
    }

    async fn fetch(self, file: WalFile, final_only: bool) -> Fetched {
        let path = self.files.unused();
        let target = Arc::new(Target::create(path.clone())?);
        let fetch = Fetch { source: self.source, file, expected: self.expected };
        let mut received = fetch.once(&target, final_only).await;
        // The first call after a connection was lost fails. Retry once; the caller waits longer than this.
        if received.as_ref().is_err_and(|e| e.failure == Failure::Code(Code::Unavailable)) {
            received = fetch.once(&target, final_only).await;
        }
        let Some(received) = received? else { return Ok(None) };
        let whole = self.files.unused();
        target.commit(&whole, false)?;
        let fetched = Span::current().context().span().span_context().clone();
        Ok(Some((received, Handed { path: whole, size: received.size, fetched })))
    }
}

fn adopt(span: &Span, traceparent: &str) {
    klio_telemetry::propagate::adopt(span, &|key| {
        (key == "traceparent").then(|| traceparent.to_owned())
    });
}

/// Shows that a caller received a prefetched file: a span in the caller's trace that links to the fetch's span.
fn handed_over(ask: &Ask, handed: &Handed) {
    let span =
        tracing::info_span!(parent: None, "wal.hand_over", file = %ask.file, bytes = handed.size);
    adopt(&span, &ask.traceparent);
    span.add_link(handed.fetched.clone());
}

impl Engine {
    pub fn new(
        source: Arc<dyn WalSource>,
        expected: Expected,
        files: Files,
        limits: Limits,
        leave: CancellationToken,
    ) -> Self {
        Self {
            fetch: Fetching { source, expected, files },
            limits,
            ahead: Ahead::new(limits.bytes_max),
            ready: BTreeMap::new(),
            coming: BTreeMap::new(),
            waiting: BTreeMap::new(),
            tasks: JoinSet::new(),
            asking: BTreeSet::new(),
            leave,
        }
    }

    /// Serves requests until the channel is closed.
    pub async fn run(mut self, mut asks: mpsc::Receiver<Ask>) {
        loop {
            tokio::select! {
                ask = asks.recv() => match ask {
                    Some(ask) => self.asked(ask),
                    None => return,
                },
                Some(done) = self.tasks.join_next_with_id() => match done {
                    Ok((_, Done::Ahead(name, fetched))) => self.came(name, fetched),
                    Ok((id, Done::Asked(ask, fetched))) => {
                        self.asking.remove(&id);
                        self.answer(ask, fetched);
                    }
                    // Aborted, or a bug; a waiting caller notices that its request was dropped.
                    Err(error) => {
                        self.asking.remove(&error.id());
                        self.coming.retain(|_, task| task.id() != error.id());
                    }
                },
            }
        }
    }

    fn asked(&mut self, ask: Ask) {
        self.ahead.asked();
        if let WalFile::Segment(name) = ask.file {
            if let Some(handed) = self.ready.remove(&name) {
                handed_over(&ask, &handed);
                self.deliver(name, ask, handed);
                return self.fill();
            }
            if self.coming.contains_key(&name) && !self.waiting.contains_key(&name) {
                self.waiting.insert(name, ask);
                return;
            }
        }
        self.fetch_now(ask);
    }

    fn fetch_now(&mut self, ask: Ask) {
        if self.asking.len() >= ASKING_MAX {
            let busy = "too many earlier requests are still being fetched";
            return drop(ask.reply.send(Reply::Failed(busy.into())));
        }
        let fetch = self.fetch.clone();
        let task = self.tasks.spawn(async move {
            let fetched = fetch.run(ask.file, false, &ask.traceparent).await;
            Done::Asked(ask, fetched)
        });
        self.asking.insert(task.id());
    }

    /// Hands a whole segment over; puts it back into the spool if the caller has gone.
    fn deliver(&mut self, name: SegmentName, ask: Ask, handed: Handed) {
        if let Some(size) = u32::try_from(handed.size).ok().and_then(|s| s.try_into().ok()) {
            self.ahead.delivered(name, size);
        }
        if let Err(Reply::File(handed)) = ask.reply.send(Reply::File(handed)) {
            self.ready.insert(name, handed);
        }
        self.ready.retain(|held, _| *held == name || self.ahead.keeps(*held));
        for (held, task) in &self.coming {
            if !self.ahead.keeps(*held) && !self.waiting.contains_key(held) {
                task.abort();
            }
        }
        let (ahead, waiting) = (&self.ahead, &self.waiting);
        self.coming.retain(|held, _| ahead.keeps(*held) || waiting.contains_key(held));
    }

    /// A prefetch has ended.
    fn came(&mut self, name: SegmentName, fetched: Fetched) {
        self.coming.remove(&name);
        let waiting = self.waiting.remove(&name);
        match (fetched, waiting) {
            (Ok(Some((_, handed))), Some(ask)) => {
                handed_over(&ask, &handed);
                self.deliver(name, ask, handed);
            }
            (Ok(Some((_, handed))), None) => {
                if self.ahead.keeps(name) {
                    self.ready.insert(name, handed);
                }
            }
            // The prefetch began before the request, so its failure says nothing: only a new fetch does (AGENT2).
            (_, Some(ask)) => self.fetch_now(ask),
            (failed, None) => {
                self.ahead.ends_at(name);
                if let Err(error) = failed {
                    self.in_trouble(&error);
                }
            }
        }
        self.fill();
    }

    fn answer(&mut self, ask: Ask, fetched: Fetched) {
        match (ask.file, fetched) {
            (WalFile::Segment(name), Ok(Some((received, handed)))) if received.is_final => {
                self.deliver(name, ask, handed);
                self.fill();
            }
            (_, Ok(Some((_, handed)))) => drop(ask.reply.send(Reply::File(handed))),
            (_, Ok(None)) => {
                drop(ask.reply.send(Reply::Failed("the segment is not complete".into())))
            }
            (_, Err(error)) if error.failure == Failure::Code(Code::NotFound) => {
                drop(ask.reply.send(Reply::Absent(error.message)));
            }
            (_, Err(error)) => {
                self.in_trouble(&error);
                drop(ask.reply.send(Reply::Failed(error.message)));
            }
        }
    }

    fn in_trouble(&mut self, error: &Error) {
        match error.failure {
            Failure::Code(Code::NotFound) => {}
            // Most often a full disk, and PostgreSQL needs the space more.
            Failure::Local => {
                tracing::warn!("{}; dropping the prefetched WAL", error.message);
                self.ready.clear();
            }
            failure if !failure.retryable() => {
                tracing::warn!("{}; the agent is exiting", error.message);
                self.leave.cancel();
            }
            _ => tracing::info!("{}", error.message),
        }
    }

    /// Starts prefetching what the window lacks.
    fn fill(&mut self) {
        let Some(size) = self.ahead.segment_size() else { return };
        // What is in the spool already counts as room.
        let held = (self.ready.len() + self.coming.len()) as u64 * size.bytes();
        let room = self.fetch.files.room().saturating_add(held);
        for name in self.ahead.wanted(room) {
            if self.coming.len() >= self.limits.parallel {
                return;
            }
            if self.ready.contains_key(&name) || self.coming.contains_key(&name) {
                continue;
            }
            let fetch = self.fetch.clone();
            let task = self.tasks.spawn(async move {
                Done::Ahead(name, fetch.run(WalFile::Segment(name), true, "").await)
            });
            self.coming.insert(name, task);
        }
    }
}
