//! Opens a session: checks the caller's claim against the stored WAL, and takes the one place of the cluster's
//! timeline.
//!
//! Order: pinned system, other timelines (`conflict`), position and history, place (ends an earlier session), WAL that
//! only tier 2 has, writer. A caller that will be refused must not end another session, so everything that can be
//! checked is checked before the place is taken. Until all checks but the last have passed, only the name's system and
//! a conflict are written. Which PostgreSQL the name belongs to, over both tiers, is decided in `base` (P8).

use super::{
    compare::{Comparer, Continuity},
    conflict::{self, Settled},
};
use crate::{
    base::{BaseStore, lost_with_tier1},
    errors,
    registry::{Claim, Claimed, Registry},
};
use klio_pg::{SegmentSize, TimelineId};
use klio_proto::{
    Code,
    wal::{AlivePostgres, Open},
};
use klio_storage::{
    layout::ClusterName,
    wal::{GapDeclaration, OpenError, OpenRefusal, OpenRequest, Seam, TakenOver, WalStore, Writer},
};
use std::sync::Arc;
use tonic::Status;

/// How often sessions that arrived while others were asked are asked as well. The client waits meanwhile.
const ROUNDS_MAX: usize = 2;

/// A session that is ready to begin.
pub struct Opened {
    pub claimed: Claimed,
    pub writer: Writer,
    pub segment_size: SegmentSize,
    /// Checks the first new record, where no comparison proved that it continues the stored WAL (P11).
    pub seam: Option<Seam>,
    /// Why nothing proved it; recorded with the first byte.
    pub unproven: Option<String>,
}

/// The client that wants to stream.
pub struct Caller<F> {
    /// Certificate name and address, for messages.
    pub who: String,
    /// Asks the client's PostgreSQL whether it writes now.
    pub prove: F,
}

/// Opens `cluster` for the caller `who`.
///
/// # Errors
/// `WRONG_SYSTEM`, `DIVERGED`, `STALE_TIMELINE`, `RETIRED_TIMELINE`, `WRITER_CONFLICT`, `BAD_POSITION`; an I/O
/// error of the disk; `UNAVAILABLE` when the bucket has to be asked at first contact and does not answer.
pub async fn open(
    base: &BaseStore,
    comparer: &Comparer,
    registry: &Arc<Registry>,
    cluster: &ClusterName,
    caller: Caller<impl Future<Output = Option<AlivePostgres>>>,
    open: Open,
    now_unix: f64,
) -> Result<Opened, Status> {
    let Caller { who, prove } = caller;
    let segment_size = open.system.segment_size;
    base.pin(cluster, open.system).await?;
    base.adopt_timelines(cluster).await?;
    let (timeline, lives_on) = (open.timeline, open.lives_on);
    let mut claim =
        Claim { writer_id: open.writer_id.clone(), who, timeline, lives_on, aside: false };
    let standing = conflict::look(base, registry, cluster, &claim, prove).await?;
    let bid = Bid { base, cluster, open: &open, now_unix };
    let taken = bid.check().await?;
    // Nothing is stored of it, so that it need not be the PostgreSQL for which the generation was begun (P11).
    let first = taken.is_empty() && base.wal().positions(cluster).is_empty();
    let reason = match first {
        true => comparer.why_apart(&open.writer_id, cluster).await?,
        false => None,
    };
    // The writer is opened only if the stored WAL still ends where the seam begins, so nothing can be appended behind
    // it unchecked.
    let Continuity { seam, unproven } = comparer.continuity(cluster, &open, &taken).await?;
    let mut settled = conflict::settle(base, registry, cluster, &claim, standing, now_unix).await?;
    let mut rounds = 0;
    let claimed = loop {
        let Settled { aside, displaced } = settled;
        claim.aside = aside;
        if let Some(claimed) = registry.claim(cluster, claim.clone(), &displaced).await? {
            break claimed;
        }
        rounds += 1;
        if rounds == ROUNDS_MAX {
            let message = format!("open cluster {cluster}: older sessions come and go");
            return Err(Code::WriterConflict.status(message));
        }
        settled = conflict::ask_rivals(base, registry, cluster, &claim, now_unix).await?;
    };
    // Checked again: a newer timeline may have arrived while others were asked, and a person may have closed this history.
    // Whoever decides ends the sessions that are claimed by then, so after the claim no decision is missed (P11).
    base.check_open_here(cluster)?;
    base.check_timeline_here(cluster, lives_on)?;
    if let Some(reason) = reason {
        base.note_stream(cluster, reason).await?;
    }
    // Nobody else appends to the timeline from here on.
    let writer = bid.begin(!taken.is_empty()).await?;
    Ok(Opened { claimed, writer, segment_size, seam, unproven })
}

/// The refusal of a timeline that a person has retired.
pub(super) fn retired(cluster: &ClusterName, timeline: TimelineId) -> Status {
    Code::RetiredTimeline
        .status(format!("stream cluster {cluster}: timeline {} was retired", timeline.get()))
}

/// A request to continue the WAL that both tiers hold.
struct Bid<'a> {
    base: &'a BaseStore,
    cluster: &'a ClusterName,
    open: &'a Open,
    now_unix: f64,
}

/// Why no writer was opened.
enum Refused {
    /// By what tier 1 knows, the stream would skip or overwrite WAL.
    Position(Status),
    Other(Status),
}

impl From<Refused> for Status {
    fn from(refused: Refused) -> Self {
        let (Refused::Position(status) | Refused::Other(status)) = refused;
        status
    }
}

impl Bid<'_> {
    /// Checks that a writer may be opened once the returned lines have been taken over from tier 2. Writes nothing.
    async fn check(&self) -> Result<Vec<TakenOver>, Status> {
        let mut taken = Vec::new();
        if self.lacks() {
            taken = self.base.to_take_over(self.cluster, self.open).await?.lines;
        }
        match self.check_behind(&taken).await {
            // Tier 2 may hold a timeline that tier 1 does not have at all, because tier 1's disk was set back.
            Err(Refused::Position(status)) if taken.is_empty() => {
                taken = self.base.to_take_over(self.cluster, self.open).await?.lines;
                if taken.is_empty() {
                    return Err(status);
                }
                self.check_behind(&taken).await?;
            }
            other => other?,
        }
        Ok(taken)
    }

    /// Opens the writer. `takes` says whether tier 2 holds more of this timeline than tier 1.
    async fn begin(&self, takes: bool) -> Result<Writer, Status> {
        let taken_over = takes && self.take_over().await?;
        match self.open_writer(taken_over).await {
            Err(Refused::Position(status)) if !taken_over => {
                if !self.take_over().await? {
                    return Err(status);
                }
                Ok(self.open_writer(true).await?)
            }
            other => Ok(other?),
        }
    }

    /// Whether tier 1 holds less than the stream continues: nothing at all, or WAL that ends before the stream begins.
    fn lacks(&self) -> bool {
        let open = self.open;
        let positions = self.base.wal().positions(self.cluster);
        let held = positions.iter().find(|p| p.timeline == open.timeline).map(|p| p.flushed);
        let from = open.gap.as_ref().map_or(open.start, |gap| gap.from);
        positions.is_empty() || held.is_some_and(|held| held < from)
    }

    async fn take_over(&self) -> Result<bool, Status> {
        self.base.take_over(self.cluster, self.open, self.now_unix).await
    }

    async fn check_behind(&self, taken: &[TakenOver]) -> Result<(), Refused> {
        let (request, taken) = (self.request(false), taken.to_vec());
        self.ask(move |store, name, lives_on| store.check_writer(name, &request, lives_on, &taken))
            .await
    }

    async fn open_writer(&self, taken_over: bool) -> Result<Writer, Refused> {
        let request = self.request(taken_over || self.begins_lost());
        self.ask(move |store, name, lives_on| store.open_writer_of(name, &request, lives_on)).await
    }

    /// Whether a declared gap begins exactly where the WAL taken over from tier 2 ends, with nothing received since.
    fn begins_lost(&self) -> bool {
        let open = self.open;
        let from = open.gap.as_ref().map(|gap| gap.from);
        let taken = self.base.wal().taken_over(self.cluster);
        taken.iter().any(|taken| taken.timeline == open.timeline && Some(taken.end) == from)
    }

    /// `lost` says that the missing WAL had been acknowledged by a tier 1 that no longer exists.
    fn request(&self, lost: bool) -> OpenRequest {
        let open = self.open;
        let gap = open.gap.as_ref().map(|gap| {
            let reason = match lost {
                true => lost_with_tier1(&gap.reason),
                false => gap.reason.clone(),
            };
            GapDeclaration { from: gap.from, to: gap.to, reason }
        });
        let (timeline, start, slot_restart) = (open.timeline, open.start, open.slot_restart);
        OpenRequest { timeline, start, gap, now_unix: self.now_unix, slot_restart }
    }

    /// Runs a question to the store on a blocking thread.
    async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&WalStore, &ClusterName, TimelineId) -> Result<T, OpenError>
        + Send
        + 'static,
    ) -> Result<T, Refused> {
        let (at, name, lives_on) =
            (self.base.wal().clone(), self.cluster.clone(), self.open.lives_on);
        let asked = tokio::task::spawn_blocking(move || question(&at, &name, lives_on)).await;
        let failed = |e| Refused::Other(Code::Internal.status(format!("open writer: {e}")));
        asked.map_err(failed)?.map_err(|error| match &error {
            OpenError::Refused { refusal, .. } => match refusal_code(refusal) {
                Code::BadPosition => Refused::Position(Code::BadPosition.status(&error)),
                code => Refused::Other(code.status(&error)),
            },
            OpenError::Failed(error) => Refused::Other(errors::status(error)),
        })
    }
}

fn refusal_code(refusal: &OpenRefusal) -> Code {
    match refusal {
        OpenRefusal::NotPinned | OpenRefusal::NoHistory(_) => Code::Invalid,
        OpenRefusal::Stale { .. } => Code::StaleTimeline,
        OpenRefusal::Retired { .. } => Code::RetiredTimeline,
        OpenRefusal::WriterPresent { .. } => Code::WriterConflict,
        OpenRefusal::WrongStart { .. }
        | OpenRefusal::NotSegmentStart { .. }
        | OpenRefusal::Missing { .. }
        | OpenRefusal::BadGap { .. } => Code::BadPosition,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{base::stranger, consumer::tests::base_store, queue::tests::TestQueue};
    use klio_proto::v1;

    fn request() -> Open {
        let open = v1::Open {
            cluster: "main".into(),
            system_identifier: 7,
            segment_size: 1 << 20,
            postgres_version: 170_000,
            timeline: 1,
            start_lsn: 3 << 20,
            writer_id: "w".into(),
            ..v1::Open::default()
        };
        Open::try_from(open).unwrap()
    }

    /// Opening takes seconds, and its name was resolved before.
    #[tokio::test(flavor = "multi_thread")]
    async fn no_stream_is_opened_into_a_history_that_was_closed_meanwhile() {
        let (root, directory) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let queue = TestQueue::start(directory.path()).await;
        let base = base_store(root.path(), &queue, None);
        let (comparer, registry) = (Comparer::new(base.clone()), Arc::new(Registry::default()));
        let main: ClusterName = "main".parse().unwrap();
        base.begin_generation(&main, stranger("set back", 7), true).await.unwrap();
        let attempt = async || {
            let caller = Caller { who: "klio@main".into(), prove: std::future::ready(None) };
            super::open(&base, &comparer, &registry, &main, caller, request(), 1.0).await
        };
        assert!(attempt().await.is_ok());
        base.change_generations(&main, |all| all.follow(2, "ops", 1.0)).await.unwrap();
        let refused = attempt().await.err().unwrap();
        assert_eq!(Code::of(&refused), Code::Diverged, "{refused}");
        assert!(refused.message().contains("older"), "{refused}");
        queue.stop().await;
    }

    /// Regression test: a generation that was begun and got no WAL was given to the next PostgreSQL that differed, and
    /// people read why the first one differs.
    #[tokio::test(flavor = "multi_thread")]
    async fn people_decide_about_the_postgresql_that_streams_and_not_about_the_one_that_began() {
        let (root, directory) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let queue = TestQueue::start(directory.path()).await;
        let base = base_store(root.path(), &queue, None);
        let (comparer, registry) = (Comparer::new(base.clone()), Arc::new(Registry::default()));
        let main: ClusterName = "main".parse().unwrap();
        base.begin_generation(&main, stranger("the first", 7), true).await.unwrap();
        let second = main.with_generation(2);
        comparer.found("w", &main, "the one that streams");
        let caller = Caller { who: "klio@main".into(), prove: std::future::ready(None) };
        let opened = super::open(&base, &comparer, &registry, &second, caller, request(), 1.0);
        assert!(opened.await.is_ok());
        let found = base.generations(&main).await.unwrap().get(2).unwrap();
        assert_eq!(found.why(), "the one that streams");
        queue.stop().await;
    }
}
