//! The histories (generations) of a cluster on this server (P11): reads and writes `generations.json`, and resolves
//! names.
//!
//! - The record on tier 1 is authoritative. A server that has nothing of a cluster asks the bucket before it answers.
//!   One that has something asks it once after each start, because its disk may have been set back (`Known::learned`).
//!   No decision is made before the bucket answered, but a stream does not wait for it long (P4).
//! - A change is durable before it is visible, and only one is made at a time.
//! - What the bucket knows and tier 1 does not is taken over. If each knows something that the other lacks, both stay
//!   unchanged and a person is told.
//! - A record that cannot be read is an error, never "there is only one history".

use super::{
    BaseStore,
    learned::{APART_HINT, Learned},
    lock, run,
};
use klio_pg::{Lsn, TimelineId};
use klio_proto::Code;
use klio_storage::{
    Error, Kind, Op, crash_point,
    generations::{Generation, Generations, Refusal, Stranger, Unproven},
    layout::{BaseObject, ClusterName},
    record,
};
use std::{
    collections::BTreeMap,
    sync::Mutex,
    time::{Duration, Instant},
};
use tonic::Status;

/// A restore from a server that has only the bucket requests many files; the bucket is not asked for the histories
/// each time.
const ASKED_FOR: Duration = Duration::from_secs(10);
/// The records that were read, by the cluster's plain name.
#[derive(Default)]
pub(super) struct Known {
    read: Mutex<BTreeMap<ClusterName, Generations>>,
    /// The bucket's answers about clusters that are not on tier 1, and their times.
    asked: Mutex<BTreeMap<ClusterName, (Instant, Generations)>>,
    learned: Learned,
    /// Allows one change at a time.
    changing: tokio::sync::Mutex<()>,
}

impl BaseStore {
    /// The histories of a cluster, as far as this server knows without asking the bucket. Blocks the first time.
    pub fn generations_here(&self, cluster: &ClusterName) -> Result<Generations, Error> {
        let base = cluster.base();
        if let Some(known) = lock(&self.0.generations.read).get(&base) {
            return Ok(known.clone());
        }
        let path = self.path(&base, &BaseObject::Generations);
        let found: Option<Generations> = record::load(self.disk().as_ref(), &path)?;
        let known = found.is_some() || self.wal().pinned(&base).is_some();
        let found = found.unwrap_or_default();
        if known {
            lock(&self.0.generations.read).insert(base, found.clone());
        }
        Ok(found)
    }

    /// The histories of a cluster; if it is not on tier 1, according to the bucket.
    ///
    /// # Errors
    /// `UNAVAILABLE` when the bucket has to be asked and does not answer; `CORRUPT`.
    pub async fn generations(&self, cluster: &ClusterName) -> Result<Generations, Status> {
        // A bucket that does not answer, or contradicts tier 1, does not prevent streaming; the problem is logged.
        if let Err(error) = self.learn_generations(cluster, false).await {
            tracing::warn!(%cluster, %error, "cannot take over the bucket's record of the cluster's histories");
        }
        self.look(cluster).await
    }

    /// Joins the bucket's record, once after each start.
    ///
    /// # Errors
    /// `UNAVAILABLE` when the bucket does not answer; `CONFLICT` when neither record contains all of the other.
    async fn learn_generations(&self, cluster: &ClusterName, must: bool) -> Result<(), Status> {
        let base = cluster.base();
        // After a lost tier 1 there may be only a later generation here.
        if !self.wal().clusters().iter().any(|here| here.base() == base) {
            return Ok(());
        }
        let join = |theirs, _| self.join_generations(&base, theirs);
        let of = (&base, &BaseObject::Generations);
        let decode = |bytes: &[u8], key: &str| record::decode(bytes, key);
        self.learn(&self.0.generations.learned, of, must, decode, join).await
    }

    async fn look(&self, cluster: &ClusterName) -> Result<Generations, Status> {
        let (this, name) = (self.clone(), cluster.base());
        let here = run(move || this.generations_here(&name)).await?;
        if here != Generations::default() || self.wal().pinned(&cluster.base()).is_some() {
            return Ok(here);
        }
        let Some(tier2) = self.tier2() else { return Ok(here) };
        let fresh = |asked: &&(Instant, Generations)| asked.0.elapsed() < ASKED_FOR;
        if let Some((_, known)) = lock(&self.0.generations.asked).get(&cluster.base()).filter(fresh)
        {
            return Ok(known.clone());
        }
        let key = BaseObject::Generations.key(&cluster.base());
        let question = async {
            let bytes = tier2.read_small(&key, record::LIMIT_BYTES).await?;
            bytes.map(|bytes| record::decode::<Generations>(&bytes, &key)).transpose()
        };
        let found = self.ask(cluster, tier2, question).await?.unwrap_or_default();
        let mut asked = lock(&self.0.generations.asked);
        // Clients may ask for any name, so old answers are removed.
        asked.retain(|_, (at, _)| at.elapsed() < ASKED_FOR);
        asked.insert(cluster.base(), (Instant::now(), found.clone()));
        Ok(found)
    }

    /// Whether this history is closed to new streams, as far as this server knows without asking the bucket.
    ///
    /// # Errors
    /// An I/O error of the disk, or a record that cannot be read.
    pub fn takes_no_more(&self, place: &ClusterName) -> Result<bool, Error> {
        let all = self.generations_here(place)?;
        let found = all.get(place.generation());
        Ok(found.is_some_and(|generation| !generation.state.is_open()))
    }

    /// Resolves a name: `<name>@<number>` is itself, a plain name is the current generation.
    ///
    /// # Errors
    /// `INVALID` for a number that does not exist; the errors of [`BaseStore::generations`].
    pub async fn resolve(&self, named: ClusterName) -> Result<ClusterName, Status> {
        placed(&self.generations(&named).await?, &named)
    }

    /// The same, as far as this server knows without asking the bucket.
    pub fn resolve_here(&self, named: &ClusterName) -> Result<ClusterName, Status> {
        placed(&self.generations_here(named).map_err(|e| crate::errors::status(&e))?, named)
    }

    /// Takes over the bucket's record at first contact, so that a new tier 1 knows all histories.
    ///
    /// # Errors
    /// The errors of [`BaseStore::generations`], or an I/O error of the disk.
    pub(super) async fn adopt_generations(&self, cluster: &ClusterName) -> Result<(), Status> {
        if self.wal().pinned(cluster).is_some() {
            return Ok(());
        }
        let found = self.look(cluster).await?;
        let joined = self.join_generations(cluster, found).await;
        joined.map_err(|error| crate::errors::status(&error))
    }

    /// Makes the generations known here that only the bucket has, because tier 1 was lost and nobody streams to them, so
    /// that retention, verification and quotas cover them. One that the bucket cannot show is left out, and logged.
    ///
    /// # Errors
    /// An I/O error of the disk, or a record on it that cannot be read.
    pub async fn regain_generations(&self, cluster: &ClusterName) -> Result<(), Status> {
        let (this, base) = (self.clone(), cluster.base());
        let all = run(move || this.generations_here(&base)).await?.all();
        for generation in all.into_iter().filter(|generation| generation.taken) {
            let place = Generations::place(cluster, generation.number);
            if self.wal().pinned(&place).is_some() {
                continue;
            }
            let pinned = match self.pinned_in_tier2(&place).await {
                Ok(Some(pinned)) => pinned,
                // Without its identity the bucket has nothing of it: it has just begun.
                Ok(None) => continue,
                Err(error) => {
                    tracing::warn!(cluster = %place, error = error.message(), "cannot read from tier 2 whose generation this is; it is not maintained");
                    continue;
                }
            };
            tracing::info!(cluster = %place, "only tier 2 has this generation; it is maintained from here again");
            let store = self.wal().clone();
            run(move || store.pin(&place, pinned)).await?;
        }
        Ok(())
    }

    /// Joins the bucket's record to tier 1's, which is new or was set back.
    ///
    /// # Errors
    /// `Conflict` when neither record contains all of the other; then nothing is changed. An I/O error of the disk.
    pub async fn join_generations(
        &self,
        cluster: &ClusterName,
        theirs: Generations,
    ) -> Result<(), Error> {
        let _one = self.0.generations.changing.lock().await;
        let (this, base) = (self.clone(), cluster.base());
        let joined = tokio::task::spawn_blocking(move || {
            let ours = this.generations_here(&base)?;
            let path = this.path(&base, &BaseObject::Generations);
            let joined = ours.joined(&theirs).map_err(|apart| {
                Error::new(Kind::Conflict, Op::Read, path.display(), apart).hint(APART_HINT)
            })?;
            if joined == ours {
                return Ok(());
            }
            let version = joined.version;
            this.keep_generations(base.clone(), joined)?;
            tracing::warn!(cluster = %base, version, "took over the cluster's histories that only tier 2 had on record");
            this.announce(&base, BaseObject::Generations, 0);
            Ok(())
        });
        joined.await.map_err(|e| Error::new(Kind::Io, Op::Write, cluster, e))?
    }

    /// Stores the record durably, and then in memory. Blocking.
    fn keep_generations(&self, base: ClusterName, all: Generations) -> Result<(), Error> {
        // Only the clusters that the store knows are uploaded, and after a lost tier 1 nothing may stream into this one.
        self.wal().add(&base)?;
        let path = self.path(&base, &BaseObject::Generations);
        record::store(self.disk().as_ref(), &path, &all)?;
        crash_point!("generation.decided");
        lock(&self.0.generations.read).insert(base, all);
        Ok(())
    }

    /// The same as `resolve`, for a caller that adds to the history.
    ///
    /// # Errors
    /// `DIVERGED` for a generation that is closed.
    pub async fn resolve_open(&self, named: ClusterName) -> Result<ClusterName, Status> {
        let place = self.resolve(named).await?;
        let all = self.generations(&place).await?;
        match closed(&all, &place) {
            Some(refusal) => Err(refusal),
            None => Ok(place),
        }
    }

    /// Refuses a history that is closed to new streams, as far as this server knows without asking the bucket.
    ///
    /// # Errors
    /// `DIVERGED` for a generation that is closed; an I/O error of the disk, or a record that cannot be read.
    pub fn check_open_here(&self, place: &ClusterName) -> Result<(), Status> {
        let all = self.generations_here(place).map_err(|e| crate::errors::status(&e))?;
        closed(&all, place).map_or(Ok(()), Err)
    }

    /// Begins a generation for a history that is not the cluster's.
    ///
    /// # Errors
    /// `DIVERGED` when it is not received, by configuration or by a person's decision; `INVALID` when there are too
    /// many.
    pub async fn begin_generation(
        &self,
        cluster: &ClusterName,
        stranger: Stranger,
        taken: bool,
    ) -> Result<u32, Status> {
        let (now, found) = (self.now_unix(), stranger.reason.clone());
        let made =
            self.change_generations(cluster, move |all| all.begin(stranger, now, taken)).await?;
        let base = cluster.base();
        let Generation { number, state, reason, .. } = &made;
        if state.is_open() {
            tracing::error!(cluster = %base, generation = number, reason, "another history of the cluster is received as undecided; a person has to decide");
            return Ok(*number);
        }
        Err(Code::Diverged.status(format!(
            "open cluster {base}: another history, which is {} as generation {number}{}: {reason}{}",
            state.word(),
            decided(&made),
            found_now(reason, &found)
        )))
    }

    /// The first WAL of a generation comes from a PostgreSQL that is separate for this reason: people decide about that
    /// one, and not about the one for which the generation was begun.
    ///
    /// # Errors
    /// An I/O error of the disk.
    pub async fn note_stream(&self, cluster: &ClusterName, reason: String) -> Result<(), Status> {
        let (number, found) = (cluster.generation(), reason.clone());
        // This is not a decision, so it does not wait for the bucket.
        let new = self.change_here(cluster, move |all| Ok(all.streams(number, &found)));
        if new.await? {
            tracing::error!(cluster = %cluster.base(), generation = number, reason, "the undecided generation had no WAL yet; another PostgreSQL than the one for which it was begun streams into it");
        }
        Ok(())
    }

    /// Records a place where nothing proved that new WAL continues the old WAL. It is logged once.
    ///
    /// # Errors
    /// An I/O error of the disk.
    pub async fn note_unproven(
        &self,
        cluster: &ClusterName,
        timeline: TimelineId,
        at: Lsn,
        reason: String,
        now_unix: f64,
    ) -> Result<(), Status> {
        let generation = cluster.generation();
        let found = Unproven {
            generation,
            timeline,
            at,
            reason: reason.clone(),
            recorded_unix: now_unix,
            unknown: record::Unknown::default(),
        };
        // This is not a decision, so it does not wait for the bucket: when records are joined, all such places are
        // kept.
        let new = self.change_here(cluster, move |all| Ok(all.note_unproven(found)));
        if new.await? {
            tracing::warn!(%cluster, timeline = timeline.get(), %at, reason, "continuity is not proven: new WAL begins here");
        }
        Ok(())
    }

    /// Changes the record of a cluster's histories, durably.
    ///
    /// # Errors
    /// `INVALID` with the reason of the refusal; an I/O error of the disk.
    pub async fn change_generations<T: Send + 'static>(
        &self,
        cluster: &ClusterName,
        change: impl FnOnce(&mut Generations) -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, Status> {
        self.learn_generations(cluster, true).await?;
        self.change_here(cluster, change).await
    }

    async fn change_here<T: Send + 'static>(
        &self,
        cluster: &ClusterName,
        change: impl FnOnce(&mut Generations) -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, Status> {
        let _one = self.0.generations.changing.lock().await;
        let before = self.look(cluster).await?;
        let mut after = before.clone();
        let made = change(&mut after).map_err(|refusal| {
            Code::Invalid.status(format!("change generations of {}: {refusal}", cluster.base()))
        })?;
        if after == before {
            return Ok(made);
        }
        after.version = before.version + 1;
        let (this, name) = (self.clone(), cluster.base());
        run(move || this.keep_generations(name, after)).await?;
        self.announce(&cluster.base(), BaseObject::Generations, 0);
        Ok(made)
    }
}

fn placed(all: &Generations, named: &ClusterName) -> Result<ClusterName, Status> {
    all.resolve(named).map_err(|refusal| {
        Code::Invalid.status(format!(
            "read request for cluster {}: {refusal}; hint: klio generation list shows what each of them is",
            named.base()
        ))
    })
}

/// What was found now, as the rest of a sentence. A refused history that writes on differs at more places, and one that
/// cannot be told apart has the number of another, until a person decides.
fn found_now(recorded: &str, found: &str) -> String {
    if recorded == found { String::new() } else { format!("; found now: {found}") }
}

/// The refusal of a stream into a closed generation; `None` if it is open.
fn closed(all: &Generations, place: &ClusterName) -> Option<Status> {
    let found = all.get(place.generation())?;
    let refused = !found.state.is_open();
    refused.then(|| {
        Code::Diverged.status(format!(
            "open cluster {}: generation {} is {}{}",
            place.base(),
            found.number,
            found.state.word(),
            decided(&found)
        ))
    })
}

/// Who decided about a generation and when, as the rest of a sentence; empty when nobody has decided.
pub(crate) fn decided(generation: &Generation) -> String {
    if generation.decided_by.is_empty() {
        return String::new();
    }
    let at = generation.decided_unix as i64;
    let at = time::OffsetDateTime::from_unix_timestamp(at)
        .ok()
        .and_then(|at| at.format(&time::format_description::well_known::Rfc3339).ok());
    let at = at.map(|at| format!(" at {at}")).unwrap_or_default();
    format!(", decided by {}{at}", generation.decided_by)
}

/// A PostgreSQL with another history.
#[cfg(test)]
pub(crate) fn stranger(reason: &str, system_identifier: u64) -> Stranger {
    Stranger { reason: reason.into(), system_identifier, ..Stranger::default() }
}
