//! Who is streaming which cluster, and how far each is.
//!
//! - At most one live session a cluster (P8). The same writer may come back at once, and a newer
//!   timeline wins over an older one: the earlier session is cancelled and waited for.
//! - Positions only describe; the store decides. They outlive the session, for status and metrics.

use klio_pg::{Lsn, TimelineId};
use klio_proto::Code;
use klio_storage::layout::ClusterName;
use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tonic::Status;

/// How long a cancelled session may take to let go: it finishes at most one write and fsync.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(15);

/// Nothing panics while it holds one of these locks; if it did, the plain values stay usable.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Live {
    id: u64,
    writer_id: String,
    who: String,
    timeline: TimelineId,
    cancel: CancellationToken,
}

/// One cluster's live session and last known positions.
#[derive(Default)]
pub struct ClusterState {
    live: Mutex<Option<Live>>,
    released: Notify,
    progress: Mutex<Progress>,
}

/// Positions as the last session left them.
#[derive(Debug, Clone, Copy, Default)]
pub struct Progress {
    /// The timeline last streamed.
    pub timeline: Option<TimelineId>,
    /// Received and checked.
    pub received: Lsn,
    /// Durable.
    pub flushed: Lsn,
    /// PostgreSQL's end of WAL as last reported; 0/0 when unknown.
    pub wal_end: Lsn,
    /// When it was told: an fsync may stall for long after that, and PostgreSQL goes on meanwhile.
    wal_end_told: Option<Instant>,
    /// WAL that PostgreSQL has and that did not come yet.
    pub not_received: Behind,
    /// WAL that PostgreSQL has and that is not durable yet.
    pub not_flushed: Behind,
    /// All that PostgreSQL had at this moment is durable.
    pub durable_as_of: Option<Instant>,
    /// Raw WAL bytes received since the server started.
    pub received_bytes: u64,
}

/// How long something has been behind PostgreSQL.
///
/// A busy PostgreSQL is ahead at any moment, so the time since it was last equal says nothing: what counts is the age
/// of a position that PostgreSQL had and we still have not reached.
#[derive(Debug, Clone, Copy, Default)]
pub struct Behind {
    mark: Option<(Lsn, Instant)>,
}

impl Behind {
    /// Sets the mark anew when it was reached. PostgreSQL was at `end` when it was `told`. Gives the moment up to which
    /// all is here, if that is news.
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
    /// Bytes PostgreSQL has and the server does not hold durably.
    pub fn lag_bytes(&self) -> u64 {
        self.wal_end.bytes_since(self.flushed)
    }
    /// How long ago PostgreSQL had WAL that is not durable here; 0 when all is.
    pub fn lag_seconds(&self, now: Instant) -> f64 {
        self.not_flushed.seconds(now)
    }
    /// Bytes PostgreSQL has and the server has not received.
    pub fn receive_lag_bytes(&self) -> u64 {
        self.wal_end.bytes_since(self.received)
    }
    /// How long ago PostgreSQL had WAL that has not come; 0 when all has.
    pub fn receive_lag_seconds(&self, now: Instant) -> f64 {
        self.not_received.seconds(now)
    }
    /// PostgreSQL has nothing that is not durable here, as far as it has told.
    pub fn is_caught_up(&self) -> bool {
        self.wal_end > Lsn::ZERO && self.lag_bytes() == 0
    }

    /// PostgreSQL said where its WAL ends.
    pub fn told(&mut self, wal_end: Lsn, now: Instant) {
        (self.wal_end, self.wal_end_told) = (wal_end, Some(now));
    }

    /// A new session: with WAL of a day to come nothing is caught up until PostgreSQL tells.
    pub fn begin(&mut self, timeline: TimelineId, start: Lsn) {
        self.timeline = Some(timeline);
        (self.received, self.flushed) = (start, start);
        (self.wal_end, self.wal_end_told) = (Lsn::ZERO, None);
    }

    /// Nothing follows from an end of WAL that is not known.
    fn follow(&mut self) {
        let Some(told) = self.wal_end_told else { return };
        self.not_received.follow(self.received, self.wal_end, told);
        let reached = self.not_flushed.follow(self.flushed, self.wal_end, told);
        self.durable_as_of = reached.or(self.durable_as_of);
    }
}

impl ClusterState {
    /// A copy of the positions.
    pub fn progress(&self) -> Progress {
        *lock(&self.progress)
    }

    /// Whether a session is live.
    pub fn connected(&self) -> bool {
        lock(&self.live).is_some()
    }

    /// Changes the positions; keeps the times true to them.
    pub fn update(&self, change: impl FnOnce(&mut Progress)) {
        let mut progress = lock(&self.progress);
        change(&mut progress);
        progress.follow();
    }
}

/// All clusters this server has heard of since it started.
#[derive(Default)]
pub struct Registry {
    clusters: Mutex<BTreeMap<ClusterName, Arc<ClusterState>>>,
    next_id: AtomicU64,
}

/// Who wants to stream.
pub struct Claim {
    /// Random per sidecar process.
    pub writer_id: String,
    /// For messages: certificate name and address.
    pub who: String,
    /// The timeline it brings.
    pub timeline: TimelineId,
}

/// Keeps the place of a live session; dropping it gives the place back.
pub struct Place {
    state: Arc<ClusterState>,
    id: u64,
    /// Cancelled when a newer session takes over.
    pub fenced: CancellationToken,
}

impl Place {
    /// The cluster's shared state.
    pub fn state(&self) -> &ClusterState {
        &self.state
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut live = lock(&self.state.live);
        if live.as_ref().is_some_and(|l| l.id == self.id) {
            *live = None;
        }
        drop(live);
        self.state.released.notify_waiters();
    }
}

impl Registry {
    /// The state of one cluster, made when first asked for.
    pub fn cluster(&self, name: &ClusterName) -> Arc<ClusterState> {
        lock(&self.clusters).entry(name.clone()).or_default().clone()
    }

    /// All clusters heard of.
    pub fn all(&self) -> Vec<(ClusterName, Arc<ClusterState>)> {
        lock(&self.clusters).iter().map(|(n, s)| (n.clone(), s.clone())).collect()
    }

    /// Ends what streams into a cluster; it is told so, and may come again.
    pub fn end(&self, name: &ClusterName) {
        if let Some(live) = lock(&self.cluster(name).live).as_ref() {
            live.cancel.cancel();
        }
    }

    /// Takes the cluster's one place.
    ///
    /// # Errors
    /// `WRITER_CONFLICT` when another writer of the same or a newer timeline is live.
    pub async fn claim(&self, name: &ClusterName, claim: Claim) -> Result<Place, Status> {
        let shared = self.cluster(name);
        let state = &shared;
        let deadline = tokio::time::Instant::now() + RELEASE_TIMEOUT;
        loop {
            // Registered before the look, so that a release in between is not missed.
            let released = state.released.notified();
            tokio::pin!(released);
            released.as_mut().enable();
            {
                let mut live = lock(&state.live);
                match live.as_ref() {
                    None => {
                        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
                        let fenced = CancellationToken::new();
                        let Claim { writer_id, who, timeline } = claim;
                        *live = Some(Live { id, writer_id, who, timeline, cancel: fenced.clone() });
                        return Ok(Place { state: shared.clone(), id, fenced });
                    }
                    Some(l) if l.writer_id == claim.writer_id || claim.timeline > l.timeline => {
                        l.cancel.cancel();
                    }
                    Some(l) => {
                        return Err(Code::WriterConflict.status(format!(
                            "open cluster {name}: {} is streaming timeline {:?} already",
                            l.who, l.timeline
                        )));
                    }
                }
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

    fn claim(writer: &str, timeline: u32) -> Claim {
        let timeline = TimelineId::new(timeline).unwrap();
        Claim { writer_id: writer.into(), who: format!("{writer} from test"), timeline }
    }

    fn name() -> ClusterName {
        "pg".parse().unwrap()
    }

    #[tokio::test]
    async fn a_second_writer_is_refused_until_the_first_is_gone() {
        let registry = Registry::default();
        let first = registry.claim(&name(), claim("a", 1)).await.ok().unwrap();
        let refused = registry.claim(&name(), claim("b", 1)).await.err().unwrap();
        assert_eq!(Code::of(&refused), Code::WriterConflict);
        assert!(refused.message().contains("a from test"), "{refused}");
        drop(first);
        assert!(registry.claim(&name(), claim("b", 1)).await.is_ok());
    }

    #[tokio::test]
    async fn a_newer_timeline_and_the_same_writer_take_over_once_the_earlier_let_go() {
        for (writer, timeline) in [("b", 2), ("a", 1)] {
            let registry = Registry::default();
            let name = name();
            let first = registry.claim(&name, claim("a", 1)).await.ok().unwrap();
            let fenced = first.fenced.clone();
            let (second, ()) =
                tokio::join!(registry.claim(&name, claim(writer, timeline)), async {
                    fenced.cancelled().await;
                    drop(first);
                });
            assert!(second.is_ok());
        }
        let registry = Registry::default();
        let _newer = registry.claim(&name(), claim("a", 2)).await.ok().unwrap();
        assert!(registry.claim(&name(), claim("b", 1)).await.is_err());
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

    /// A database that always writes is never equal for a moment, and still not behind by hours.
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
        // And one that stands still is.
        progress.told(Lsn::new(1 << 30), now);
        progress.follow();
        progress.told(Lsn::new(2 << 30), now + Duration::from_secs(900));
        progress.follow();
        assert!(progress.lag_seconds(now + Duration::from_secs(900)) >= 900.0);
        assert!(progress.durable_as_of.is_some_and(|at| at <= now));
    }

    /// PostgreSQL goes on while an fsync stalls: what it did meanwhile is not claimed.
    #[test]
    fn an_end_that_is_reached_late_says_nothing_of_the_time_in_between() {
        let (mut progress, told) = (Progress::default(), Instant::now());
        progress.told(Lsn::new(100), told);
        progress.received = Lsn::new(100);
        progress.follow();
        // Flushed at once or an hour later.
        progress.flushed = Lsn::new(100);
        progress.follow();
        assert_eq!(progress.durable_as_of, Some(told));
        assert_eq!(progress.lag_seconds(told + Duration::from_secs(3600)), 0.0);
        let later = told + Duration::from_secs(60);
        progress.told(Lsn::new(100), later);
        progress.follow();
        assert_eq!(progress.durable_as_of, Some(later));
        // The end that was told first was reached; a later one was not.
        progress.told(Lsn::new(300), later + Duration::from_secs(1));
        progress.follow();
        progress.told(Lsn::new(500), later + Duration::from_secs(31));
        progress.flushed = Lsn::new(400);
        progress.follow();
        assert_eq!(progress.durable_as_of, Some(later + Duration::from_secs(1)));
    }
}
