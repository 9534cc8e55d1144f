//! One session: from connecting both ends to the end of one stream.
//!
//! Three things are remembered from earlier sessions: that PostgreSQL has removed WAL, that the server holds more of a
//! generation than it said, and which generations turned out to be another history. Everything else is asked anew; the server says where to continue (P2). The slot is checked
//! before the plan is made, so that PostgreSQL retains the WAL that the plan needs.

use super::{
    choice::{Chosen, Ground, Tier2},
    ends::{Histories, Memory, Stream},
    flow::Flow,
    plan::{Facts, Plan, Refusal},
    prove,
    pump::{Ended, Proof, Pump},
    refill::Refilling,
    source::{Identity, Primary, Session},
    trace::SegmentTrace,
};
use crate::{
    config::OnGap,
    error::{Error, Failure},
    server_link::{Connection, Traced},
};
use klio_pg::{Lsn, TimelineId};
use klio_proto::{
    Code,
    v1::{self, wal_client::WalClient},
};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;

/// Messages queued between the pump and the HTTP/2 task: two keep that task busy while the next one is built.
const MESSAGES_IN_FLIGHT: usize = 2;
/// Generous, because the server may wait for a fenced session to end before it opens this one.
const OPEN_TIMEOUT: Duration = Duration::from_secs(30);

struct Prepared<W> {
    wal: W,
    requests: mpsc::Sender<v1::ReceiveRequest>,
    answers: Streaming<v1::ReceiveResponse>,
    flow: Flow,
    trace: SegmentTrace,
    timeline: TimelineId,
    /// PostgreSQL's end of WAL at the start: an idle PostgreSQL sends no keepalive for half a minute.
    end: Lsn,
    /// The generation that the WAL goes to.
    number: Option<u32>,
    refilling: Refilling,
}

/// The fields that every call to the server carries.
#[derive(Clone, Copy)]
struct Told<'a> {
    /// The cluster's name with the generation, in the form sent to the server.
    place: &'a str,
    identity: Identity,
}

impl<P: Primary> Stream<'_, P> {
    /// Streams until one end ends the stream or `stop` is cancelled.
    pub async fn run(&self, memory: &mut Memory, stop: &CancellationToken) -> Result<Ended, Error> {
        let prepared = tokio::select! {
            biased;
            () = stop.cancelled() => return Ok(Ended::Stopped),
            prepared = self.prepare(memory) => prepared?,
        };
        let Prepared { wal, requests, answers, flow, trace, timeline, end, number, refilling } =
            prepared;
        let (received, flushed) = flow.report();
        self.metrics.state.set_positions(received, flushed);
        self.metrics.state.set_connected(true);
        let mut pump = Pump {
            wal: Some(wal),
            failure: None,
            requests: Some(requests),
            answers,
            flow,
            batch_bytes: self.options.batch_bytes,
            status_interval: self.options.status_interval,
            stop_timeout: self.options.stop_timeout,
            metrics: self.metrics,
            trace,
            end,
            proof: Proof::new(prove::prover(self.primary)),
        };
        // Refilling runs beside the stream, which does not wait for it.
        let result = tokio::select! {
            biased;
            result = pump.run(stop) => result,
            never = self.refill(refilling) => match never {},
        };
        self.metrics.state.set_connected(false);
        if matches!(&result, Err(error) if error.failure == Failure::WalRemoved) {
            memory.removed = Some((timeline, pump.flow.sent()));
        }
        match result {
            // Found in the first new record, because nothing before it could be compared. The next session chooses
            // again.
            Err(error) if error.failure == Failure::Code(Code::Diverged) && number.is_some() => {
                memory.diverged.push(number);
                Err(Error::new(Failure::Postgres, error.message))
            }
            result => result,
        }
    }

    async fn prepare(
        &self,
        memory: &mut Memory,
    ) -> Result<Prepared<<P::Session as Session>::Wal>, Error> {
        let mut postgres = self.primary.connect().await?;
        let identity = postgres.identify().await?;
        let connection = self.link.connect().await?;
        self.metrics.state.set_expiry(connection.expiry);
        let mut server = connection.wal();
        let tier2 = match memory.removed.is_some() || memory.misplaced {
            true => Tier2::Always,
            false => Tier2::IfTier1IsEmpty,
        };
        let candidates = self.candidates(&mut server, identity, tier2).await?;
        let slot_restart = postgres.slot().await?;
        let acknowledged = postgres.acknowledged(slot_restart);
        let mut histories = Histories::default();
        let history = histories.path(&mut postgres, identity.timeline).await?;
        let mut ground = Ground {
            identity,
            history,
            slot_restart,
            histories: &mut histories,
            server: &mut server,
            memory,
            tier2,
            beside: candidates.iter().any(|candidate| candidate.beside),
        };
        let chosen;
        (postgres, chosen) = self.choose(postgres, &candidates, &mut ground).await?;
        let identity = ground.identity;
        let Chosen { place, number, facts, plan } = chosen;
        self.tell_gap(&plan);
        let told = Told { place: &place, identity };
        self.put_histories(&mut postgres, &mut server, &facts, told, histories).await?;
        // Depending on the cause, PostgreSQL reports removed WAL here or at the first read.
        let wal = postgres.start(plan.timeline, plan.start).await.inspect_err(|error| {
            if error.failure == Failure::WalRemoved {
                memory.removed = Some((plan.timeline, plan.start));
            }
        })?;
        let opened = self.open(&connection, told, plan, acknowledged).await;
        let (requests, answers, window) = opened.inspect_err(|error| {
            let refused = error.failure == Failure::Code(Code::BadPosition);
            memory.misplaced |= refused && facts.held.is_empty();
        })?;
        (memory.removed, memory.misplaced) = (None, false);
        if let Some(gap) = plan.gap {
            self.metrics.on_gap(gap.to.bytes_since(gap.from));
        }
        tracing::info!(
            place,
            timeline = plan.timeline.get(),
            start = %plan.start,
            postgres_end = %identity.end,
            "streaming WAL"
        );
        let cluster = self.options.cluster.to_string();
        let trace = SegmentTrace::new(cluster, plan.timeline, identity.segment_size);
        let flow = Flow::new(plan.start, plan.durable, window);
        let (timeline, end) = (plan.timeline, identity.end);
        let refilling = Refilling { server, place, identity, number, facts };
        Ok(Prepared { wal, requests, answers, flow, trace, timeline, end, number, refilling })
    }

    /// Makes the plan. It is changed when the last session found its WAL removed, or when PostgreSQL has WAL that the
    /// server lacks.
    pub async fn decide(
        &self,
        facts: &Facts,
        identity: Identity,
        memory: &Memory,
    ) -> Result<Plan, Error> {
        let refuse = |refusal| refused(refusal, identity);
        let mut plan = facts.plan().map_err(refuse)?;
        for earlier in facts.earlier(&plan) {
            if self.has(earlier.timeline, earlier.start).await? {
                return Ok(earlier);
            }
        }
        if memory.removed == Some((plan.timeline, plan.start)) {
            let sure = facts.sure(&plan).map_err(refuse)?;
            plan = facts.after_removal(plan, self.oldest(facts, &plan, sure).await?);
        }
        let Some(gap) = plan.gap else { return Ok(plan) };
        let message = format!(
            "PostgreSQL has removed WAL from {} to {} before the server received it",
            gap.from, gap.to
        );
        if self.options.on_gap == OnGap::Stop {
            return Err(Error::new(Failure::Code(Code::Gap), message).hint(
                "take a new base backup; stream.on_gap = \"record\" records the gap and continues",
            ));
        }
        Ok(plan)
    }

    async fn has(&self, timeline: TimelineId, at: Lsn) -> Result<bool, Error> {
        self.primary.connect().await?.has(timeline, at).await
    }

    /// The oldest segment after `plan.start`, whose WAL is gone, that PostgreSQL still has. Searched up to `sure`,
    /// because PostgreSQL often has more WAL than the slot retains, and it removes the oldest first.
    async fn oldest(&self, facts: &Facts, plan: &Plan, sure: Lsn) -> Result<Lsn, Error> {
        let (mut removed, mut there) = (plan.start, sure);
        while let Some(middle) = facts.between(removed, there) {
            match self.has(facts.timeline_of(plan, middle), middle).await? {
                true => there = middle,
                false => removed = middle,
            }
        }
        Ok(there)
    }

    fn tell_gap(&self, plan: &Plan) {
        let Some(gap) = plan.gap else { return };
        tracing::error!(from = %gap.from, to = %gap.to, bytes = gap.to.bytes_since(gap.from),
            "PostgreSQL removed WAL before the server received it; recording a gap and continuing; recovery across the gap is impossible: take a new base backup");
    }

    /// Sends the server the history file of every timeline on the path before any of their WAL.
    async fn put_histories(
        &self,
        postgres: &mut P::Session,
        server: &mut WalClient<Traced>,
        facts: &Facts,
        told: Told<'_>,
        mut histories: Histories,
    ) -> Result<(), Error> {
        for timeline in facts.histories_wanted() {
            let Some(content) = histories.get(postgres, timeline).await? else {
                tracing::warn!(
                    timeline = timeline.get(),
                    "PostgreSQL has no history file of the timeline"
                );
                continue;
            };
            let request = v1::PutHistoryRequest {
                cluster: told.place.to_owned(),
                system_identifier: told.identity.system_identifier,
                timeline: timeline.get(),
                content,
                segment_size: told.identity.segment_size.as_u32(),
                postgres_version: told.identity.version,
            };
            server.put_history(request).await.map_err(|status| {
                Error::from_status(&format!("store history of timeline {timeline:?}"), &status)
            })?;
        }
        Ok(())
    }

    async fn open(
        &self,
        connection: &Connection,
        told: Told<'_>,
        plan: Plan,
        acknowledged: Option<Lsn>,
    ) -> Result<(mpsc::Sender<v1::ReceiveRequest>, Streaming<v1::ReceiveResponse>, u64), Error>
    {
        const DOING: &str = "open stream";
        let (requests, queue) = mpsc::channel(MESSAGES_IN_FLIGHT);
        // The slot says nothing about an ancestor's WAL.
        let acknowledged = acknowledged.filter(|_| plan.timeline == told.identity.timeline);
        let open = v1::Open {
            cluster: told.place.to_owned(),
            system_identifier: told.identity.system_identifier,
            segment_size: told.identity.segment_size.as_u32(),
            postgres_version: told.identity.version,
            timeline: plan.timeline.get(),
            start_lsn: plan.start.as_u64(),
            writer_id: self.writer_id.to_owned(),
            gap: plan.gap.map(|gap| v1::Gap {
                from_lsn: gap.from.as_u64(),
                to_lsn: gap.to.as_u64(),
                reason: "PostgreSQL removed the WAL before it was received".into(),
            }),
            slot_restart_lsn: acknowledged.unwrap_or(Lsn::ZERO).as_u64(),
            postgres_timeline: told.identity.timeline.get(),
            can_prove: true,
        };
        let first = v1::ReceiveRequest { kind: Some(v1::receive_request::Kind::Open(open)) };
        // The channel is new and empty, so this cannot fail.
        let _ = requests.try_send(first);
        let exchange = async {
            let mut server = connection.wal();
            let mut answers = server.receive(ReceiverStream::new(queue)).await?.into_inner();
            loop {
                let first = answers.message().await?;
                // Another timeline is being followed, and the server asks whether this PostgreSQL writes.
                let kind = first.as_ref().and_then(|message| message.kind.as_ref());
                let Some(v1::receive_response::Kind::Prove(asked)) = kind else {
                    return Ok::<_, tonic::Status>((answers, first));
                };
                let alive = prove::ask(self.primary, asked.nonce).await;
                let kind = Some(v1::receive_request::Kind::Alive(alive));
                // If the stream has ended, the answer side says why.
                let _ = requests.send(v1::ReceiveRequest { kind }).await;
            }
        };
        let (answers, first) = tokio::time::timeout(OPEN_TIMEOUT, exchange)
            .await
            .map_err(|_| {
                let message = format!("{DOING}: no answer within {OPEN_TIMEOUT:?}");
                Error::new(Failure::Code(Code::Unavailable), message)
            })?
            .map_err(|status| Error::from_status(DOING, &status))?;
        match first.and_then(|message| message.kind) {
            Some(v1::receive_response::Kind::Opened(opened))
                if opened.start_lsn == plan.start.as_u64() && opened.window_bytes > 0 =>
            {
                Ok((requests, answers, opened.window_bytes))
            }
            found => {
                let expected = plan.start;
                let message =
                    format!("{DOING}: expected a stream from {expected}, found {found:?}");
                Err(Error::new(Failure::Code(Code::BadPosition), message))
            }
        }
    }
}

fn refused(refusal: Refusal, identity: Identity) -> Error {
    let message = format!("plan stream: {refusal}");
    match refusal {
        Refusal::Stale { .. } => Error::new(Failure::Code(Code::StaleTimeline), message),
        Refusal::Behind { .. } if identity.in_recovery => Error::new(Failure::Postgres, message)
            .hint("this standby lags behind; streaming begins when it has caught up"),
        Refusal::Behind { .. } => Error::new(Failure::PostgresRefused, message).hint(
            "this primary lost WAL that it had sent: it was restored from a copy, or runs without fsync; \
             give the restored cluster a new name, or rebuild it",
        ),
        Refusal::NothingLeft { .. } => Error::new(Failure::Postgres, message)
            .hint("streaming continues with the next segment; the gap is recorded then"),
    }
}
