//! The histories of a cluster for people: which there are, and what a decision about one would do.
//!
//! A dry run and the decision report the same effects, which are computed from the same facts.

use crate::{access::auth::Identity, base::BaseStore, errors, registry::Registry};
use klio_pg::Lsn;
use klio_proto::{
    Code,
    v1::{self, decide_generation_request::Decision},
};
use klio_storage::{
    generations::{Generation, Generations, Refusal, State},
    layout::ClusterName,
};
use std::sync::Arc;
use tonic::Status;

/// Lists generations and carries out decisions about them.
#[derive(Clone)]
pub struct Histories {
    pub base: BaseStore,
    /// The live sessions.
    pub registry: Arc<Registry>,
}

impl Histories {
    /// All generations of a cluster.
    ///
    /// # Errors
    /// The errors of the tiers.
    pub async fn list(&self, cluster: &ClusterName) -> Result<Vec<v1::Generation>, Status> {
        let mut found = Vec::new();
        for generation in self.base.generations(cluster).await?.all() {
            found.push(self.view(cluster, &generation).await?);
        }
        Ok(found)
    }

    /// The same without sizes and backups, for which the bucket may have to be asked.
    ///
    /// # Errors
    /// The errors of the tiers.
    pub async fn outlines(&self, cluster: &ClusterName) -> Result<Vec<v1::Generation>, Status> {
        let all = self.base.generations(cluster).await?.all();
        Ok(all.iter().map(|generation| self.outline(cluster, generation)).collect())
    }

    /// A generation without its sizes and backups, which is cheap to compute.
    pub fn outline(&self, cluster: &ClusterName, generation: &Generation) -> v1::Generation {
        let place = Generations::place(cluster, generation.number);
        let positions = self.base.wal().positions(&place);
        // An undecided or retired timeline does not say how far the history reaches.
        let followed = self.base.wal().followed(&place);
        let newest = positions.iter().find(|p| Some(p.timeline) == followed);
        let newest = newest.or_else(|| positions.iter().max_by_key(|p| p.timeline));
        let pinned = self.base.wal().pinned(&place).map(|p| p.system_identifier);
        v1::Generation {
            number: generation.number,
            state: generation.state.word().into(),
            since_time: generation.since_unix,
            system_identifier: pinned
                .or(generation.system_identifier.parse().ok())
                .unwrap_or_default(),
            reason: generation.why().to_owned(),
            decided_by: generation.decided_by.clone(),
            decided_time: generation.decided_unix,
            timeline: newest.map_or(0, |p| p.timeline.get()),
            flushed_lsn: newest.map_or(0, |p| p.flushed.as_u64()),
            connected: self.registry.cluster(&place).connected(),
            ..v1::Generation::default()
        }
    }

    async fn view(
        &self,
        cluster: &ClusterName,
        generation: &Generation,
    ) -> Result<v1::Generation, Status> {
        let place = Generations::place(cluster, generation.number);
        let (wal, name) = (self.base.wal().clone(), place.clone());
        let files = tokio::task::spawn_blocking(move || match wal.pinned(&name) {
            Some(_) => wal.list(&name),
            None => Ok(Vec::new()),
        });
        let files = files.await.map_err(|e| Code::Internal.status(format!("list WAL: {e}")))?;
        let files = files.map_err(|e| errors::status(&e))?;
        let backups = self.base.backups(&place).await?.backups;
        Ok(v1::Generation {
            stored_bytes: files.iter().map(|file| file.size).sum(),
            backups: backups.len() as u64,
            newest_backup: backups.last().map(|b| b.record.name.to_string()).unwrap_or_default(),
            ..self.outline(cluster, generation)
        })
    }

    /// Decides, or with `dry_run` only says what the decision would do.
    ///
    /// # Errors
    /// `INVALID` for a decision that is not possible.
    pub async fn decide(
        &self,
        identity: &Identity,
        cluster: &ClusterName,
        asked: &v1::DecideGenerationRequest,
    ) -> Result<Vec<String>, Status> {
        let before = self.base.generations(cluster).await?;
        self.decide_after(&before, &identity.name, cluster, asked).await
    }

    /// The same for a person who knows the histories `before`: it does what was said about them, or nothing.
    async fn decide_after(
        &self,
        before: &Generations,
        person: &str,
        cluster: &ClusterName,
        asked: &v1::DecideGenerationRequest,
    ) -> Result<Vec<String>, Status> {
        let decision = Decision::try_from(asked.decision).unwrap_or_default();
        let (number, by, now) = (asked.number, person.to_owned(), self.base.now_unix());
        let change = move |all: &mut Generations| match decision {
            Decision::Follow => all.follow(number, &by, now),
            Decision::Retire => all.retire(number, &by, now),
            Decision::Unspecified => Err(Refusal::Unknown { known: "".into(), found: number }),
        };
        let former = before.current();
        let mut trial = before.clone();
        change(&mut trial).map_err(|refusal| {
            Code::Invalid.status(format!(
                "change generations of {}: {refusal}; hint: klio generation list shows them all",
                cluster.base()
            ))
        })?;
        let effects = self.effects(cluster, before, number, decision).await?;
        if asked.dry_run {
            return Ok(effects);
        }
        let change = move |all: &mut Generations| match all.current() {
            found if found != former => Err(Refusal::Moved { expected: former, found }),
            _ => change(all),
        };
        self.base.change_generations(cluster, change).await?;
        let ended = if decision == Decision::Follow { former } else { number };
        self.registry.end(&Generations::place(cluster, ended));
        tracing::warn!(cluster = %cluster.base(), number, ?decision, by = person, "a person decided about a generation");
        Ok(effects)
    }

    async fn effects(
        &self,
        cluster: &ClusterName,
        all: &Generations,
        number: u32,
        decision: Decision,
    ) -> Result<Vec<String>, Status> {
        let (base, former) = (cluster.base(), all.current());
        let mut said = Vec::new();
        for generation in all.all() {
            if ![number, former].contains(&generation.number) {
                continue;
            }
            said.push(sentence(&self.view(cluster, &generation).await?));
        }
        let of = |n: u32| all.get(n).map(|g| self.outline(cluster, &g));
        let streams = |n: u32| of(n).is_some_and(|g| g.connected);
        let end = |n: u32| match streams(n) {
            true => {
                format!("the stream into generation {n} ends now, and later streams are refused")
            }
            false => format!("nothing streams into generation {n} now; later streams are refused"),
        };
        if decision == Decision::Retire {
            said.push(end(number));
            said.push(format!(
                "its WAL and backups stay restorable with --generation {number} until retention expires them"
            ));
            return Ok(said);
        }
        said.push(format!(
            "the name {base} means generation {number} from now on, no longer generation {former}"
        ));
        said.push(end(former));
        said.push(format!(
            "generation {former} stays restorable with --generation {former} until retention expires it"
        ));
        if all.get(number).is_some_and(|g| g.state == State::Refused) {
            said.push(format!(
                "generation {number} has no WAL yet: its PostgreSQL is received from its next connection on"
            ));
        }
        Ok(said)
    }
}

fn sentence(generation: &v1::Generation) -> String {
    let backups = match generation.backups {
        0 => "no base backup: take one with klio backup".to_owned(),
        1 => format!("1 base backup, {}", generation.newest_backup),
        n => format!("{n} base backups, the newest {}", generation.newest_backup),
    };
    let (number, state) = (generation.number, &generation.state);
    match generation.timeline {
        0 => format!("generation {number} ({state}) has no WAL on this server, and {backups}"),
        timeline => format!(
            "generation {number} ({state}) reaches {} on timeline {timeline}, with {} bytes of WAL on tier 1, and has {backups}",
            Lsn::new(generation.flushed_lsn),
            generation.stored_bytes
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{base::stranger, consumer::tests::base_store, queue::tests::TestQueue};

    /// Regression test: two people decided at once, and the stream into the generation that the first of them had made
    /// the current one went on, although the second decision closed it.
    #[tokio::test(flavor = "multi_thread")]
    async fn of_two_people_who_decide_at_once_the_second_is_told_to_look_again() {
        let (root, directory) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let queue = TestQueue::start(directory.path()).await;
        let base = base_store(root.path(), &queue, None);
        let cluster: ClusterName = "main".parse().unwrap();
        for reason in ["a clone", "set back"] {
            base.begin_generation(&cluster, stranger(reason, 7), true).await.unwrap();
        }
        let registry = Arc::new(Registry::default());
        let histories = Histories { base: base.clone(), registry };
        let seen = base.generations(&cluster).await.unwrap();
        let follow = |number| v1::DecideGenerationRequest {
            cluster: "main".into(),
            number,
            decision: Decision::Follow.into(),
            dry_run: false,
        };
        histories.decide_after(&seen, "ann", &cluster, &follow(2)).await.unwrap();
        let late = histories.decide_after(&seen, "bob", &cluster, &follow(3)).await.unwrap_err();
        assert_eq!(Code::of(&late), Code::Invalid);
        assert!(late.message().contains("somebody else has just decided"), "{late}");
        let now = base.generations(&cluster).await.unwrap();
        assert_eq!(now.current(), 2);
        let said = histories.decide_after(&now, "bob", &cluster, &follow(3)).await.unwrap();
        assert!(said.iter().any(|line| line.contains("no longer generation 2")), "{said:?}");
        // What a stream is told that the decision ended.
        let closed = base.check_open_here(&Generations::place(&cluster, 2)).unwrap_err();
        assert_eq!(Code::of(&closed), Code::Diverged);
        assert!(closed.message().contains("generation 2 is older, decided by bob"), "{closed}");
        assert!(base.check_open_here(&Generations::place(&cluster, 3)).is_ok());
        queue.stop().await;
    }
}
