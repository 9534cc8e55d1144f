//! Decides which of the cluster's histories this PostgreSQL continues (P11). The decision is made from WAL content at
//! every connection and never remembered.
//!
//! - A generation whose bytes are proven to be PostgreSQL's is chosen. If none is proven and there is only one open
//!   generation which does not differ, the stream continues it unproven, because nothing else is possible. With
//!   several open ones, or when all differ, a new generation begins.
//! - A generation that a person has closed receives nothing; the error names who closed it.
//! - A generation of which tier 1 holds nothing may be new, or tier 1 was lost. If PostgreSQL continues none of the
//!   others, tier 2 is asked for it. Nothing new begins while tier 2 does not answer, because PostgreSQL may continue
//!   what is there.

use super::{
    Metrics, Options,
    ends::{Histories, Memory, Stream},
    overlap::{Compared, Side},
    plan::{Facts, Held, Plan},
    source::{Identity, Primary, Session},
};
use crate::{
    config,
    error::{Error, Failure},
    server_link::{ServerLink, Traced, numbered},
};
use klio_pg::{Lsn, TimelineHistory, TimelineId};
use klio_proto::{
    Code,
    v1::{self, wal_client::WalClient},
};
use klio_storage::layout::ClusterName;
use opentelemetry::metrics::{MeterProvider, noop::NoopMeterProvider};
use std::time::Duration;

/// How long a stream that can go on waits for what tier 2 holds of other generations.
const PATIENCE: Duration = Duration::from_secs(3);

/// A generation as the server describes it.
#[derive(Debug, Clone)]
pub(super) struct Candidate {
    /// `None` for a server that has no generations.
    pub number: Option<u32>,
    pub state: String,
    pub same_system: bool,
    pub held: Vec<Held>,
    pub decided: String,
    /// Why the server does not know what is stored of it; empty if it knows.
    pub unclear: String,
    /// The server accepts several timelines of a cluster side by side.
    pub beside: bool,
}

impl Candidate {
    fn is_open(&self) -> bool {
        matches!(self.state.as_str(), "current" | "undecided")
    }

    fn is_current(&self) -> bool {
        self.state == "current"
    }

    /// Whether tier 1 holds nothing of it, and tier 2 may: what was refused was never received.
    fn may_be_in_tier2(&self) -> bool {
        self.number.is_some() && self.held.is_empty() && self.state != "refused"
    }
}

/// The generation and the position to stream to.
#[derive(Debug, Clone)]
pub(super) struct Chosen {
    /// The cluster's name with the generation, in the form sent to the server.
    pub place: String,
    pub number: Option<u32>,
    pub facts: Facts,
    pub plan: Plan,
}

/// When the server asks tier 2 how far a generation reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tier2 {
    /// If tier 1 holds nothing of the whole cluster.
    IfTier1IsEmpty,
    /// If tier 1 holds nothing of the generation.
    IfEmpty,
    Always,
}

/// What is the same for all generations.
pub(super) struct Ground<'a> {
    pub identity: Identity,
    pub history: TimelineHistory,
    pub slot_restart: Option<Lsn>,
    pub histories: &'a mut Histories,
    pub server: &'a mut WalClient<Traced>,
    pub memory: &'a Memory,
    /// How the server was asked for the candidates.
    pub tier2: Tier2,
    /// The server accepts several timelines of a cluster side by side.
    pub beside: bool,
}

/// The result of comparing one generation.
enum Found {
    /// No difference was found; `proven` when the compared WAL contained a whole record.
    Same { proven: bool, chosen: Result<Chosen, Error> },
    /// The generation's WAL differs: it is another history.
    Another,
    /// Nothing could be compared, for this reason.
    Refused(Error),
}

/// The result of comparing all generations.
#[derive(Default)]
struct Surveyed {
    /// The generation whose bytes are PostgreSQL's.
    proven: Option<(Candidate, Result<Chosen, Error>)>,
    /// An open one without a difference, which is not proven either.
    unproven: Option<Chosen>,
    /// An open one that holds no WAL yet.
    fresh: Option<Candidate>,
    /// Why the current one cannot be used.
    refusal: Option<Error>,
    /// Why it is not known yet whether PostgreSQL continues one that tier 1 cannot show.
    unclear: Option<Error>,
}

impl<P: Primary> Stream<'_, P> {
    /// Chooses a generation, or begins a new one. Returns the connection.
    pub async fn choose(
        &self,
        postgres: P::Session,
        candidates: &[Candidate],
        ground: &mut Ground<'_>,
    ) -> Result<(P::Session, Chosen), Error> {
        let (postgres, surveyed) = self.survey(postgres, candidates, ground).await?;
        let Surveyed { proven, unproven, fresh, refusal, unclear } = surveyed;
        match proven {
            Some((candidate, chosen)) if candidate.is_open() => return Ok((postgres, chosen?)),
            Some((candidate, _)) => return Err(closed(&candidate)),
            None => {}
        }
        if let Some(error) = refusal {
            return Err(error);
        }
        if let Some(chosen) = unproven.filter(|_| !several(candidates)) {
            return Ok((postgres, chosen));
        }
        if let Some(error) = unclear {
            return Err(error);
        }
        let number = match fresh {
            Some(candidate) => candidate.number,
            None => Some(self.begin_generation(ground).await?),
        };
        let facts = self.facts(Vec::new(), ground);
        let plan = self.decide(&facts, ground.identity, ground.memory).await?;
        Ok((postgres, Chosen { place: self.place(number), number, facts, plan }))
    }

    /// Finds the generation that PostgreSQL continues without changing anything. A backup uses it; its comparison
    /// begins at `from`, where the backup began. `None` when the server knows no generations.
    pub async fn find(&self, from: Option<Lsn>) -> Result<Option<u32>, Error> {
        let mut postgres = self.primary.connect().await?;
        let identity = postgres.identify().await?;
        let mut server = self.link.connect().await?.wal();
        let tier2 = Tier2::IfTier1IsEmpty;
        let candidates = self.candidates(&mut server, identity, tier2).await?;
        let mut histories = Histories::default();
        let history = histories.path(&mut postgres, identity.timeline).await?;
        let (memory, histories, server) = (&Memory::default(), &mut histories, &mut server);
        let beside = candidates.iter().any(|candidate| candidate.beside);
        let mut ground = Ground {
            identity,
            history,
            slot_restart: from,
            histories,
            server,
            memory,
            tier2,
            beside,
        };
        let (_, surveyed) = self.survey(postgres, &candidates, &mut ground).await?;
        match surveyed.proven {
            Some((candidate, _)) if candidate.is_open() => return Ok(candidate.number),
            Some((candidate, _)) => return Err(closed(&candidate)),
            None => {}
        }
        let alone = !several(&candidates);
        if let Some(chosen) = surveyed.unproven.filter(|_| alone) {
            return Ok(chosen.number);
        }
        if let Some(error) = surveyed.unclear {
            return Err(error);
        }
        match surveyed.fresh.filter(|_| alone) {
            Some(candidate) => Ok(candidate.number),
            None => Err(surveyed.refusal.unwrap_or_else(none_of_them)),
        }
    }

    /// Compares what tier 1 holds of each generation, and if PostgreSQL continues none of it, what tier 2 holds of the
    /// others.
    async fn survey(
        &self,
        mut postgres: P::Session,
        candidates: &[Candidate],
        ground: &mut Ground<'_>,
    ) -> Result<(P::Session, Surveyed), Error> {
        let mut surveyed = Surveyed::default();
        let memory = ground.memory;
        let possible = |candidate: &Candidate| {
            candidate.same_system && !memory.diverged.contains(&candidate.number)
        };
        for candidate in candidates.iter().filter(|candidate| possible(candidate)) {
            postgres = self.weigh(postgres, candidate, ground, &mut surveyed).await?;
            if surveyed.proven.is_some() {
                return Ok((postgres, surveyed));
            }
        }
        let in_doubt = |candidate: &Candidate| possible(candidate) && candidate.may_be_in_tier2();
        if ground.tier2 == Tier2::Always || !candidates.iter().any(in_doubt) {
            return Ok((postgres, surveyed));
        }
        let alone = surveyed.unproven.is_some() && !several(candidates);
        let found = match self.ask_tier2(ground, alone).await {
            // Whatever went wrong, a stream that can go on does not depend on the answer (P4).
            Err(error) if alone || error.failure == Failure::Code(Code::Unavailable) => {
                surveyed.unclear = Some(error);
                return Ok((postgres, surveyed));
            }
            found => found?,
        };
        surveyed.fresh = None;
        let asked = candidates.iter().filter(|candidate| candidate.held.is_empty());
        let asked: Vec<Option<u32>> = asked.map(|candidate| candidate.number).collect();
        let again =
            |candidate: &&Candidate| asked.contains(&candidate.number) && possible(candidate);
        for candidate in found.iter().filter(again) {
            postgres = self.weigh(postgres, candidate, ground, &mut surveyed).await?;
            if surveyed.proven.is_some() {
                break;
            }
        }
        Ok((postgres, surveyed))
    }

    /// What both tiers hold of the generations of which tier 1 holds nothing. A stream that can go on without the answer
    /// does not wait for it long (P4).
    async fn ask_tier2(
        &self,
        ground: &mut Ground<'_>,
        can_go_on: bool,
    ) -> Result<Vec<Candidate>, Error> {
        let question = self.candidates(ground.server, ground.identity, Tier2::IfEmpty);
        if !can_go_on {
            return question.await;
        }
        tokio::time::timeout(PATIENCE, question).await.unwrap_or_else(|_| {
            let message =
                format!("ask the server what tier 2 holds: no answer within {PATIENCE:?}");
            Err(Error::new(Failure::Code(Code::Unavailable), message))
        })
    }

    /// Adds what one generation is for this PostgreSQL.
    async fn weigh(
        &self,
        postgres: P::Session,
        candidate: &Candidate,
        ground: &mut Ground<'_>,
        surveyed: &mut Surveyed,
    ) -> Result<P::Session, Error> {
        if !candidate.unclear.is_empty() {
            surveyed.unclear = Some(unreadable(candidate));
            return Ok(postgres);
        }
        if candidate.held.is_empty() {
            if surveyed.fresh.is_none() && candidate.is_open() {
                surveyed.fresh = Some(candidate.clone());
            }
            return Ok(postgres);
        }
        let (postgres, found) = self.look(postgres, candidate, ground).await?;
        match found {
            Found::Same { proven: true, chosen } => {
                surveyed.proven = Some((candidate.clone(), chosen));
            }
            Found::Same { chosen: Ok(chosen), .. } if candidate.is_open() => {
                surveyed.unproven.get_or_insert(chosen);
            }
            Found::Same { chosen: Err(error), .. } | Found::Refused(error)
                if candidate.is_current() =>
            {
                surveyed.refusal = Some(error);
            }
            Found::Same { chosen: Err(error), .. } | Found::Refused(error)
                if !candidate.is_open() && error.retryable() =>
            {
                surveyed.unclear = Some(error);
            }
            Found::Same { .. } | Found::Another | Found::Refused(_) => {}
        }
        Ok(postgres)
    }

    /// The cluster's name with the generation, in the form sent to the server.
    fn place(&self, number: Option<u32>) -> String {
        let cluster = &self.options.cluster;
        number.map_or_else(|| cluster.to_string(), |number| format!("{cluster}@{number}"))
    }

    fn facts(&self, held: Vec<Held>, ground: &Ground<'_>) -> Facts {
        Facts {
            held,
            history: ground.history.clone(),
            postgres_end: ground.identity.end,
            slot_restart: ground.slot_restart,
            segment_size: ground.identity.segment_size,
            beside: ground.beside,
        }
    }

    async fn look(
        &self,
        mut postgres: P::Session,
        candidate: &Candidate,
        ground: &mut Ground<'_>,
    ) -> Result<(P::Session, Found), Error> {
        let mut facts = self.facts(candidate.held.clone(), ground);
        if facts.is_behind() && !ground.identity.in_recovery {
            // PostgreSQL's end was asked for before the server's position; another writer may have advanced the
            // server meanwhile.
            ground.identity = postgres.identify().await?;
            facts.postgres_end = ground.identity.end;
        }
        let plan = self.decide(&facts, ground.identity, ground.memory).await;
        // Nothing continues a closed one, so that no plan is needed to compare it.
        let compares = plan.is_ok() || facts.is_behind() || !candidate.is_open();
        let overlap = facts.overlap().filter(|_| compares);
        let place = self.place(candidate.number);
        let chosen = |plan| Chosen { place: place.clone(), number: candidate.number, facts, plan };
        let Some(overlap) = overlap else {
            let found = match plan {
                Ok(plan) => Found::Same { proven: false, chosen: Ok(chosen(plan)) },
                Err(error) => Found::Refused(error),
            };
            return Ok((postgres, found));
        };
        let on_it = |plan: &&Plan| plan.timeline == overlap.timeline;
        // A plan that fills a hole below the end sends no new WAL.
        let next = plan.as_ref().ok().filter(on_it).map(|plan| plan.start);
        let next = next.filter(|next| *next >= overlap.end);
        let history = match overlap.timeline.get() {
            1 => None,
            _ => ground.histories.get(&mut postgres, overlap.timeline).await?,
        };
        let mut side = Side {
            place: &place,
            identity: ground.identity,
            history,
            next,
            server: &mut *ground.server,
        };
        let (postgres, compared) = match self.compare(postgres, &overlap, &mut side).await {
            Err(error)
                if !candidate.is_open() && error.failure == Failure::Code(Code::Unavailable) =>
            {
                return Ok((self.again(ground.identity).await?, Found::Refused(error)));
            }
            compared => compared?,
        };
        let found = match compared {
            Compared::Diverged(detail) => {
                tracing::warn!(place, detail, "PostgreSQL does not continue this history");
                Found::Another
            }
            compared => {
                let proven = matches!(compared, Compared::Proven);
                Found::Same { proven, chosen: plan.map(chosen) }
            }
        };
        Ok((postgres, found))
    }

    async fn begin_generation(&self, ground: &mut Ground<'_>) -> Result<u32, Error> {
        let request = v1::BeginGenerationRequest {
            cluster: self.options.cluster.to_string(),
            system_identifier: ground.identity.system_identifier,
            segment_size: ground.identity.segment_size.as_u32(),
            postgres_version: ground.identity.version,
            writer_id: self.writer_id.to_owned(),
        };
        let answer = ground.server.begin_generation(request).await;
        let number = answer
            .map_err(|status| Error::from_status("begin a generation of the cluster", &status))?
            .into_inner()
            .number;
        tracing::error!(
            generation = number,
            "this PostgreSQL's history differs from the one on the server: receiving it as an undecided generation; a person has to decide (klio generation list)"
        );
        Ok(number)
    }

    /// What the server holds of each generation.
    pub async fn candidates(
        &self,
        server: &mut WalClient<Traced>,
        identity: Identity,
        tier2: Tier2,
    ) -> Result<Vec<Candidate>, Error> {
        let request = v1::PositionRequest {
            cluster: self.options.cluster.to_string(),
            system_identifier: identity.system_identifier,
            segment_size: identity.segment_size.as_u32(),
            postgres_version: identity.version,
            knows_generations: true,
            with_tier2: tier2 == Tier2::Always,
            empty_in_tier2: tier2 == Tier2::IfEmpty,
        };
        let answer = server
            .position(request)
            .await
            .map_err(|status| Error::from_status("ask the server for its position", &status))?
            .into_inner();
        if answer.generations.is_empty() {
            return Ok(vec![Candidate {
                number: None,
                state: "current".into(),
                same_system: true,
                held: held(&answer.timelines)?,
                decided: String::new(),
                unclear: String::new(),
                beside: answer.beside,
            }]);
        }
        let beside = answer.beside;
        let read = |g: v1::GenerationPosition| {
            let held = held(&g.timelines)?;
            let (number, state) = (Some(g.number), g.state);
            let (same_system, decided, unclear) = (g.same_system, g.decided, g.unclear);
            Ok(Candidate { number, state, same_system, held, decided, unclear, beside })
        };
        answer.generations.into_iter().map(read).collect()
    }
}

/// The history of `cluster` that this PostgreSQL continues, for a backup of it: the cluster's name with the number of its
/// generation, the first one too, so that a generation that appears or is followed during the backup changes nothing
/// (P11). Without a number if the server knows no generations. The server remembers the comparison under `writer_id`.
///
/// # Errors
/// `DIVERGED` when PostgreSQL continues none of the histories; errors of PostgreSQL and of the server.
pub async fn history_of<P: Primary>(
    primary: &P,
    link: &ServerLink,
    cluster: &ClusterName,
    writer_id: &str,
    from: Option<Lsn>,
) -> Result<ClusterName, Error> {
    let options = Options::new(cluster.base(), &config::Stream::default());
    let metrics = Metrics::new(&NoopMeterProvider::new().meter("klio"), cluster.as_str());
    let stream = Stream { primary, link, options: &options, metrics: &metrics, writer_id };
    let Some(number) = stream.find(from).await? else { return Ok(cluster.clone()) };
    numbered(cluster, number)
}

fn held(timelines: &[v1::TimelinePosition]) -> Result<Vec<Held>, Error> {
    let read = |p: &v1::TimelinePosition| {
        let timeline = TimelineId::new(p.timeline)?;
        let flushed = Lsn::new(p.flushed_lsn);
        let missing = p.missing.iter().map(|m| Lsn::new(m.from_lsn)).collect();
        let damaged = p.damaged.iter().map(|d| (Lsn::new(d.from_lsn), Lsn::new(d.to_lsn)));
        let damaged = damaged.collect();
        Some(Held { timeline, flushed, has_history: p.has_history, missing, damaged })
    };
    timelines.iter().map(read).collect::<Option<Vec<_>>>().ok_or_else(|| {
        let message = "ask the server for its position: expected timelines from 1 up, found 0";
        Error::new(Failure::Code(Code::Invalid), message)
    })
}

/// Whether more than one generation is open to streaming.
fn several(candidates: &[Candidate]) -> bool {
    candidates.iter().filter(|candidate| candidate.is_open()).count() > 1
}

fn none_of_them() -> Error {
    let message = "compare WAL with the server's: this PostgreSQL continues none of the histories that the server holds";
    Error::new(Failure::Code(Code::Diverged), message)
        .hint("start klio stream on this machine first: what it sends becomes a generation")
}

/// A generation of which it is not known whether PostgreSQL continues it. It is asked for again, because a person may
/// repair what cannot be read.
fn unreadable(candidate: &Candidate) -> Error {
    let (number, state, why) =
        (candidate.number.unwrap_or(1), &candidate.state, &candidate.unclear);
    let message = format!(
        "compare WAL with the server's: this PostgreSQL may continue generation {number} of the cluster, which is {state}, and it cannot be read: {why}"
    );
    Error::new(Failure::Code(Code::Unavailable), message)
        .hint("repair its records in the bucket: klio-server's log names them")
}

fn closed(candidate: &Candidate) -> Error {
    let number = candidate.number.unwrap_or(1);
    let (state, decided) = (&candidate.state, &candidate.decided);
    let message = format!(
        "compare WAL with the server's: this PostgreSQL continues generation {number} of the cluster, which is {state}{decided}"
    );
    Error::new(Failure::Code(Code::Diverged), message).hint(format!(
        "if this is the right cluster, have an administrator run klio generation follow {number}; otherwise stop klio stream here"
    ))
}
