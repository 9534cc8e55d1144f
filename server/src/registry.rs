//! Which sessions stream which cluster, and how far each has come.
//!
//! - At most one session is live per cluster and timeline (P8). The same writer may come back at once. A newer
//!   timeline wins over an older one whose PostgreSQL does not prove that it writes; if it does prove it, both stay
//!   (`open` decides).
//! - A claim that is refused ends no session.
//! - Positions only describe; the store decides. They outlive the session, for status and metrics. A cluster's
//!   positions are those of the timeline that is followed.

use klio_pg::{Lsn, TimelineId};
use klio_proto::{Code, wal::AlivePostgres};
use klio_storage::{
    catalog::{Standing, Timelines},
    layout::ClusterName,
};
use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tonic::Status;

/// How long a cancelled session may take to release its place: it finishes at most one write and fsync.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(15);
/// How long a PostgreSQL may take to prove that it writes. A newer timeline waits for that, so it is short.
pub(crate) const PROOF_TIMEOUT: Duration = Duration::from_secs(10);

/// Nothing panics while it holds one of these locks; if something did, the plain values inside would stay usable.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A question to a live session: what does your PostgreSQL say now? It is dropped without an answer when there is
/// none.
pub(crate) type Question = oneshot::Sender<AlivePostgres>;

struct Live {
    id: u64,
    writer_id: String,
    who: String,
    lives_on: TimelineId,
    /// Whether its timeline is undecided.
    aside: bool,
    cancel: CancellationToken,
    questions: mpsc::Sender<Question>,
}

/// A live session, as another claim sees it.
#[derive(Debug, Clone)]
pub(crate) struct Rival {
    pub(crate) id: u64,
    /// Certificate name and address, for messages.
    pub(crate) who: String,
    /// The timeline of its PostgreSQL.
    pub(crate) lives_on: TimelineId,
    questions: mpsc::Sender<Question>,
}

impl Rival {
    /// What its PostgreSQL says now; `None` when no answer came in time, or when it cannot be asked.
    pub(crate) async fn ask(&self) -> Option<AlivePostgres> {
        let (question, answer) = oneshot::channel();
        let asked = async {
            self.questions.send(question).await.ok()?;
            answer.await.ok()
        };
        tokio::time::timeout(PROOF_TIMEOUT, asked).await.ok().flatten()
    }
}

/// One cluster's live sessions and last known positions.
#[derive(Default)]
pub struct ClusterState {
    /// By the timeline that is streamed.
    live: Mutex<BTreeMap<TimelineId, Live>>,
    released: Notify,
    lines: Mutex<Lines>,
}

/// Positions by timeline.
#[derive(Default)]
struct Lines {
    /// The timeline that is followed, once a session of it has begun.
    current: Option<TimelineId>,
    progress: BTreeMap<Option<TimelineId>, Progress>,
}

/// Positions as the last session left them.
#[derive(Debug, Clone, Copy, Default)]
pub struct Progress {
    /// The timeline last streamed.
    pub timeline: Option<TimelineId>,
    /// Received and checked, but not necessarily durable.
    pub received: Lsn,
    /// Durable on tier 1.
    pub flushed: Lsn,
    /// PostgreSQL's end of WAL as last reported; 0/0 when unknown.
    pub wal_end: Lsn,
    /// When PostgreSQL reported it: an fsync may stall for long after that, while PostgreSQL goes on.
    wal_end_told: Option<Instant>,
    /// WAL that PostgreSQL has and that has not arrived.
    pub not_received: Behind,
    /// WAL that PostgreSQL has and that is not durable here.
    pub not_flushed: Behind,
    /// Everything that PostgreSQL had at this moment is durable.
    pub durable_as_of: Option<Instant>,
    /// Raw WAL bytes received since the server started.
    pub received_bytes: u64,
}

/// How long we have been behind PostgreSQL.
///
/// A busy PostgreSQL is ahead of us at any moment, so the time since both were last equal says nothing. What counts is
/// the age of a position that PostgreSQL had reached and we still have not.
#[derive(Debug, Clone, Copy, Default)]
pub struct Behind {
    mark: Option<(Lsn, Instant)>,
}

impl Behind {
    /// Sets a new mark when the old one was reached. PostgreSQL reported the end `end` at the time `told`. Returns the
    /// moment up to which everything is here, if it has advanced.
    fn follow(&mut self, here: Lsn, end: Lsn, told: Instant) -> Option<Instant> {
        if here >= end {
            self.mark = None;
            return Some(told);
        }
        match self.mark {
            Some((position, _)) if here < position => None,
            reached => {
                self.mark = Some((end, told));
                reached.map(|(_, at)| at)
            }
        }
    }

    fn seconds(self, now: Instant) -> f64 {
        self.mark.map_or(0.0, |(_, at)| now.saturating_duration_since(at).as_secs_f64())
    }
}

impl Progress {
    /// Bytes that PostgreSQL has and that are not durable here.
    pub fn lag_bytes(&self) -> u64 {
        self.wal_end.bytes_since(self.flushed)
    }
    /// How long ago PostgreSQL had WAL that is not durable here, in seconds; 0 when all of it is.
    pub fn lag_seconds(&self, now: Instant) -> f64 {
        self.not_flushed.seconds(now)
    }
    /// Bytes that PostgreSQL has and that have not arrived.
    pub fn receive_lag_bytes(&self) -> u64 {
        self.wal_end.bytes_since(self.received)
    }
    /// How long ago PostgreSQL had WAL that has not arrived, in seconds; 0 when all of it has.
    pub fn receive_lag_seconds(&self, now: Instant) -> f64 {
        self.not_received.seconds(now)
    }
    /// Whether everything that PostgreSQL has reported is durable here.
    pub fn is_caught_up(&self) -> bool {
        self.wal_end > Lsn::ZERO && self.lag_bytes() == 0
    }

    /// Records where PostgreSQL says its WAL ends.
    pub fn told(&mut self, wal_end: Lsn, now: Instant) {
        (self.wal_end, self.wal_end_told) = (wal_end, Some(now));
    }

    /// Begins a session. A day's WAL may be outstanding, so nothing counts as caught up until PostgreSQL reports its
    /// end.
    pub fn begin(&mut self, timeline: TimelineId, start: Lsn) {
        self.timeline = Some(timeline);
        (self.received, self.flushed) = (start, start);
        (self.wal_end, self.wal_end_told) = (Lsn::ZERO, None);
    }

    /// Updates the times. Without a known end of PostgreSQL's WAL nothing can be said.
    fn follow(&mut self) {
        let Some(told) = self.wal_end_told else { return };
        self.not_received.follow(self.received, self.wal_end, told);
        let reached = self.not_flushed.follow(self.flushed, self.wal_end, told);
        self.durable_as_of = reached.or(self.durable_as_of);
    }
}

impl ClusterState {
    /// A copy of the positions of the timeline that is followed.
    pub fn progress(&self) -> Progress {
        let lines = lock(&self.lines);
        lines.progress.get(&lines.current).copied().unwrap_or_default()
    }

    /// Whether a session of the timeline that is followed is live.
    pub fn connected(&self) -> bool {
        lock(&self.live).values().any(|live| !live.aside)
    }

    /// Whether a session of a PostgreSQL on this timeline is live.
    pub fn lives(&self, timeline: TimelineId) -> bool {
        lock(&self.live).values().any(|live| live.lives_on == timeline)
    }

    /// The timeline that PostgreSQL is on, according to the live session of this writer.
    pub(crate) fn lives_of(&self, writer_id: &str) -> Option<TimelineId> {
        let live = lock(&self.live);
        live.values().find(|live| live.writer_id == writer_id).map(|live| live.lives_on)
    }

    /// Changes the positions of the timeline that is followed, and updates the times that depend on them.
    pub fn update(&self, change: impl FnOnce(&mut Progress)) {
        let current = lock(&self.lines).current;
        self.update_line(current, change);
    }

    fn update_line(&self, line: Option<TimelineId>, change: impl FnOnce(&mut Progress)) {
        let mut lines = lock(&self.lines);
        let progress = lines.progress.entry(line).or_default();
        change(progress);
        progress.follow();
    }

    /// The sessions of older timelines that a claim would end and that are not undecided already.
    pub(crate) fn rivals(&self, claim: &Claim) -> Vec<Rival> {
        let rival = |live: &Live| Rival {
            id: live.id,
            who: live.who.clone(),
            lives_on: live.lives_on,
            questions: live.questions.clone(),
        };
        lock(&self.live).values().filter(|live| claim.displaces(live)).map(rival).collect()
    }

    /// The newest timeline of another writer that streams and is followed, or will be with its first byte; `None` when
    /// no such timeline is newer than the claim's.
    pub(crate) fn newer_live(&self, claim: &Claim) -> Option<TimelineId> {
        let live = lock(&self.live);
        live.values().filter(|live| claim.is_older_than(live)).map(|live| live.lives_on).max()
    }

    /// Applies a person's decision or a conflict: an undecided or retired timeline is not followed, and the session of
    /// a retired one ends.
    pub(crate) fn decided(&self, marks: &Timelines, followed: Option<TimelineId>) {
        for live in lock(&self.live).values_mut() {
            live.aside = marks.is_aside(live.lives_on);
            if marks.standing(live.lives_on) == Some(Standing::Retired) {
                live.cancel.cancel();
            }
        }
        let mut lines = lock(&self.lines);
        if lines.current.is_some_and(|current| marks.is_aside(current)) {
            lines.current = followed;
        }
    }
}

/// All clusters that this server has seen since it started.
#[derive(Default)]
pub struct Registry {
    clusters: Mutex<BTreeMap<ClusterName, Arc<ClusterState>>>,
    next_id: AtomicU64,
}

/// A client that wants to stream.
#[derive(Debug, Clone)]
pub struct Claim {
    /// A random value for each sidecar process.
    pub writer_id: String,
    /// Certificate name and address, for messages.
    pub who: String,
    /// The timeline that it streams.
    pub timeline: TimelineId,
    /// The timeline that its PostgreSQL is on: the same one, or a descendant.
    pub lives_on: TimelineId,
    /// Whether its timeline is undecided, so that it is received without being followed.
    pub aside: bool,
}

impl Claim {
    /// Whether this claim ends the session unless that proves that it writes: the session is older, not undecided, and
    /// of another writer.
    fn displaces(&self, live: &Live) -> bool {
        live.lives_on < self.lives_on && live.writer_id != self.writer_id && !live.aside
    }

    /// Whether the session is newer, not undecided, and of another writer.
    fn is_older_than(&self, live: &Live) -> bool {
        live.lives_on > self.lives_on && live.writer_id != self.writer_id && !live.aside
    }
}

/// The place of a live session; dropping it frees the place.
pub struct Place {
    state: Arc<ClusterState>,
    id: u64,
    timeline: TimelineId,
    /// The timeline that its PostgreSQL is on.
    pub lives_on: TimelineId,
    /// Cancelled when the session has to end in favour of another.
    pub fenced: CancellationToken,
}

impl Place {
    /// Changes the positions of its timeline.
    pub fn update(&self, change: impl FnOnce(&mut Progress)) {
        self.state.update_line(Some(self.timeline), change);
    }

    /// Begins the session. Unless its timeline is undecided or retired, its positions become the cluster's.
    pub fn begin(&self, start: Lsn) {
        let aside = {
            let live = lock(&self.state.live);
            live.get(&self.timeline).is_some_and(|live| live.id == self.id && live.aside)
        };
        let timeline = self.timeline;
        {
            let mut lines = lock(&self.state.lines);
            if !aside {
                // The bytes received so far and the time up to which all was durable belong to the cluster, not to one
                // timeline.
                let before = lines.progress.get(&lines.current).copied().unwrap_or_default();
                let own = lines.progress.entry(Some(timeline)).or_insert(before);
                own.received_bytes = own.received_bytes.max(before.received_bytes);
                own.durable_as_of = own.durable_as_of.max(before.durable_as_of);
                lines.current = Some(timeline);
            }
        }
        self.update(|p| p.begin(timeline, start));
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut live = lock(&self.state.live);
        if live.get(&self.timeline).is_some_and(|l| l.id == self.id) {
            live.remove(&self.timeline);
        }
        drop(live);
        self.state.released.notify_waiters();
    }
}

/// A place, and the questions to whoever holds it.
pub struct Claimed {
    pub place: Place,
    /// Questions that the session has to answer.
    pub(crate) questions: mpsc::Receiver<Question>,
}

impl Registry {
    /// The state of one cluster, created when it is first asked for.
    pub fn cluster(&self, name: &ClusterName) -> Arc<ClusterState> {
        lock(&self.clusters).entry(name.clone()).or_default().clone()
    }

    pub fn all(&self) -> Vec<(ClusterName, Arc<ClusterState>)> {
        lock(&self.clusters).iter().map(|(n, s)| (n.clone(), s.clone())).collect()
    }

    /// Ends all sessions that stream into a cluster. The clients are told, and may connect again.
    pub fn end(&self, name: &ClusterName) {
        lock(&self.cluster(name).live).values().for_each(|live| live.cancel.cancel());
    }

    /// Takes the place of a cluster's timeline: ends the sessions in `displaced`, which did not prove that they write,
    /// and those of the same writer, and waits for them. The caller has made sure that the claim would be admitted.
    /// Returns `None` when an older session has arrived that was not asked yet; it has to be asked first.
    ///
    /// # Errors
    /// `WRITER_CONFLICT` when another writer streams the timeline, in which case no session was ended, or when an
    /// earlier session does not end in time.
    pub async fn claim(
        &self,
        name: &ClusterName,
        claim: Claim,
        displaced: &[u64],
    ) -> Result<Option<Claimed>, Status> {
        let shared = self.cluster(name);
        let state = &shared;
        let deadline = tokio::time::Instant::now() + RELEASE_TIMEOUT;
        loop {
            // Registered before the lock is taken, so that a release in between is not missed.
            let released = state.released.notified();
            tokio::pin!(released);
            released.as_mut().enable();
            {
                let mut live = lock(&state.live);
                let gives_way =
                    |l: &Live| l.writer_id == claim.writer_id || displaced.contains(&l.id);
                if let Some(l) = live.get(&claim.timeline).filter(|l| !gives_way(l)) {
                    return Err(Code::WriterConflict.status(format!(
                        "open cluster {name}: {} is streaming timeline {:?} already",
                        l.who, claim.timeline
                    )));
                }
                if let Some(l) = live.values().find(|l| !claim.aside && claim.is_older_than(l)) {
                    // It arrived after the check of who else streams; the client's next attempt finds it.
                    return Err(Code::WriterConflict.status(format!(
                        "open cluster {name}: {} has just begun to stream the newer timeline {:?}",
                        l.who, l.lives_on
                    )));
                }
                let unasked = |l: &Live| !claim.aside && claim.displaces(l) && !gives_way(l);
                if live.values().any(unasked) {
                    return Ok(None);
                }
                let ending: Vec<&Live> = live.values().filter(|l| gives_way(l)).collect();
                if ending.is_empty() {
                    let id = self.next_id.fetch_add(1, Ordering::Relaxed);
                    let fenced = CancellationToken::new();
                    let (asking, questions) = mpsc::channel(1);
                    let Claim { writer_id, who, timeline, lives_on, aside } = claim;
                    let cancel = fenced.clone();
                    let entry =
                        Live { id, writer_id, who, lives_on, aside, cancel, questions: asking };
                    live.insert(timeline, entry);
                    let place = Place { state: shared.clone(), id, timeline, lives_on, fenced };
                    return Ok(Some(Claimed { place, questions }));
                }
                ending.iter().for_each(|live| live.cancel.cancel());
            }
            if tokio::time::timeout_at(deadline, released).await.is_err() {
                return Err(Code::WriterConflict.status(format!(
                    "open cluster {name}: the earlier session did not end within {} s",
                    RELEASE_TIMEOUT.as_secs()
                )));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tli(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    fn claim(writer: &str, timeline: u32) -> Claim {
        let (writer_id, who) = (writer.into(), format!("{writer} from test"));
        let timeline = tli(timeline);
        Claim { writer_id, who, timeline, lives_on: timeline, aside: false }
    }

    fn name() -> ClusterName {
        "pg".parse().unwrap()
    }

    async fn take(registry: &Registry, claim: Claim) -> Result<Claimed, Status> {
        Ok(registry.claim(&name(), claim, &[]).await?.unwrap())
    }

    #[tokio::test]
    async fn a_second_writer_is_refused_until_the_first_is_gone() {
        let registry = Registry::default();
        let first = take(&registry, claim("a", 1)).await.ok().unwrap();
        let refused = take(&registry, claim("b", 1)).await.err().unwrap();
        assert_eq!(Code::of(&refused), Code::WriterConflict);
        assert!(refused.message().contains("a from test"), "{refused}");
        assert!(!first.place.fenced.is_cancelled(), "nobody is ended for a claim that is refused");
        drop(first);
        assert!(take(&registry, claim("b", 1)).await.is_ok());
    }

    #[tokio::test]
    async fn the_same_writer_takes_over_once_its_earlier_session_let_go() {
        for timeline in [1, 2] {
            let registry = Registry::default();
            let first = take(&registry, claim("a", 1)).await.ok().unwrap().place;
            let fenced = first.fenced.clone();
            let (second, ()) = tokio::join!(take(&registry, claim("a", timeline)), async {
                fenced.cancelled().await;
                drop(first);
            });
            assert!(second.is_ok());
        }
    }

    /// Regression test: nothing is stored of a newer timeline before its first flush, so an older one was let in
    /// beside it and followed as well.
    #[tokio::test]
    async fn an_older_timeline_is_not_let_in_beside_a_newer_one_that_has_no_wal_yet() {
        let registry = Registry::default();
        let state = registry.cluster(&name());
        let newer = take(&registry, claim("b", 2)).await.ok().unwrap();
        assert_eq!(state.newer_live(&claim("a", 1)), Some(tli(2)));
        assert_eq!(state.newer_live(&claim("b", 1)), None, "its own");
        assert_eq!(state.newer_live(&claim("a", 3)), None);
        let refused = take(&registry, claim("a", 1)).await.err().unwrap();
        assert_eq!(Code::of(&refused), Code::WriterConflict);
        assert!(!newer.place.fenced.is_cancelled());
        let aside = Claim { aside: true, ..claim("a", 1) };
        assert!(take(&registry, aside).await.is_ok(), "undecided, as its PostgreSQL writes");
    }

    #[tokio::test]
    async fn a_newer_timeline_ends_only_those_that_it_was_allowed_to_end() {
        let registry = Registry::default();
        let state = registry.cluster(&name());
        let first = take(&registry, claim("a", 1)).await.ok().unwrap();
        let newer = claim("b", 2);
        let rivals = state.rivals(&newer);
        assert_eq!(rivals.iter().map(|rival| rival.lives_on).collect::<Vec<_>>(), [tli(1)]);
        // Both stay, because the first one proved that it writes.
        let second = take(&registry, Claim { aside: true, ..newer.clone() }).await.ok().unwrap();
        assert!(!first.place.fenced.is_cancelled());
        assert!(state.lives(tli(1)) && state.lives(tli(2)));
        drop(second);
        let unasked = registry.claim(&name(), newer.clone(), &[]).await.unwrap();
        assert!(unasked.is_none(), "one that was not asked is not ended");
        assert!(!first.place.fenced.is_cancelled());
        // The first one proved nothing, so it is ended and waited for.
        let fenced = first.place.fenced.clone();
        let displaced = [rivals[0].id];
        let cluster = name();
        let (third, ()) = tokio::join!(registry.claim(&cluster, newer, &displaced), async {
            fenced.cancelled().await;
            drop(first);
        });
        assert!(third.unwrap().is_some());
        assert!(state.rivals(&claim("c", 1)).is_empty(), "an older one ends nobody");
    }

    #[tokio::test(start_paused = true)]
    async fn a_session_that_does_not_answer_proves_nothing() {
        let registry = Registry::default();
        let state = registry.cluster(&name());
        let Claimed { place, mut questions } = take(&registry, claim("a", 1)).await.ok().unwrap();
        let rival = state.rivals(&claim("b", 2)).remove(0);
        let postgres =
            AlivePostgres { in_recovery: false, timeline: tli(1), position: Lsn::new(7) };
        let (answer, ()) = tokio::join!(rival.ask(), async {
            questions.recv().await.unwrap().send(postgres).unwrap();
        });
        assert_eq!(answer, Some(postgres));
        // The session dropped the question: its sidecar is old, or its PostgreSQL is gone.
        let (answer, ()) = tokio::join!(rival.ask(), async {
            drop(questions.recv().await.unwrap());
        });
        assert_eq!(answer, None);
        // The session does not answer at all.
        let began = tokio::time::Instant::now();
        assert_eq!(rival.ask().await, None);
        assert_eq!(began.elapsed(), PROOF_TIMEOUT);
        // The session is gone.
        drop((place, questions));
        assert_eq!(rival.ask().await, None);
    }

    #[tokio::test]
    async fn the_positions_of_a_cluster_are_those_of_the_followed_timeline() {
        let registry = Registry::default();
        let state = registry.cluster(&name());
        let one = take(&registry, claim("a", 1)).await.ok().unwrap().place;
        one.begin(Lsn::new(100));
        let aside = Claim { aside: true, ..claim("b", 2) };
        let two = take(&registry, aside).await.ok().unwrap().place;
        two.begin(Lsn::new(50));
        two.update(|p| p.flushed = Lsn::new(70));
        assert_eq!(
            (state.progress().timeline, state.progress().flushed),
            (Some(tli(1)), Lsn::new(100))
        );
        drop(one);
        assert!(!state.connected(), "nobody streams the timeline that is followed");
        // A person decides for the other timeline.
        let marks = Timelines::default();
        state.decided(&marks, Some(tli(2)));
        assert!(state.connected());
    }

    #[test]
    fn an_idle_cluster_has_no_lag() {
        let state = ClusterState::default();
        state.update(|p| p.told(Lsn::new(100), Instant::now()));
        let later = Instant::now() + Duration::from_secs(3600);
        assert!(state.progress().lag_seconds(later) > 3000.0);
        assert!(state.progress().receive_lag_seconds(later) > 3000.0);
        state.update(|p| p.received = Lsn::new(100));
        assert_eq!(state.progress().receive_lag_seconds(later), 0.0);
        state.update(|p| p.flushed = Lsn::new(100));
        assert_eq!((state.progress().lag_bytes(), state.progress().lag_seconds(later)), (0, 0.0));
        assert!(state.progress().is_caught_up());
    }

    /// A database that writes all the time is never equal to us, and is still not hours behind.
    #[test]
    fn a_busy_cluster_that_is_followed_closely_has_a_short_lag() {
        let (mut progress, begun) = (Progress::default(), Instant::now());
        for second in 1..=3600 {
            progress.flushed = progress.wal_end;
            progress.told(Lsn::new(second * 1000), begun + Duration::from_secs(second));
            progress.follow();
        }
        let now = begun + Duration::from_secs(3600);
        assert!(progress.lag_bytes() > 0 && progress.lag_seconds(now) <= 1.0, "{progress:?}");
        assert!(progress.durable_as_of.is_some_and(|at| now - at <= Duration::from_secs(1)));
        // A standstill does count as behind.
        progress.told(Lsn::new(1 << 30), now);
        progress.follow();
        progress.told(Lsn::new(2 << 30), now + Duration::from_secs(900));
        progress.follow();
        assert!(progress.lag_seconds(now + Duration::from_secs(900)) >= 900.0);
        assert!(progress.durable_as_of.is_some_and(|at| at <= now));
    }

    /// PostgreSQL goes on while an fsync stalls; nothing is claimed about what it wrote meanwhile.
    #[test]
    fn an_end_that_is_reached_late_says_nothing_of_the_time_in_between() {
        let (mut progress, told) = (Progress::default(), Instant::now());
        progress.told(Lsn::new(100), told);
        progress.received = Lsn::new(100);
        progress.follow();
        // The same holds whether the flush comes at once or an hour later.
        progress.flushed = Lsn::new(100);
        progress.follow();
        assert_eq!(progress.durable_as_of, Some(told));
        assert_eq!(progress.lag_seconds(told + Duration::from_secs(3600)), 0.0);
        let later = told + Duration::from_secs(60);
        progress.told(Lsn::new(100), later);
        progress.follow();
        assert_eq!(progress.durable_as_of, Some(later));
        // The end reported first was reached; a later one was not.
        progress.told(Lsn::new(300), later + Duration::from_secs(1));
        progress.follow();
        progress.told(Lsn::new(500), later + Duration::from_secs(31));
        progress.flushed = Lsn::new(400);
        progress.follow();
        assert_eq!(progress.durable_as_of, Some(later + Duration::from_secs(1)));
    }
}
