//! The histories of a cluster for people: which there are, and what a decision about one would do.
//!
//! A dry run and the decision report the same effects, which are computed from the same facts.

use super::auth::Identity;
use crate::{base::BaseStore, errors, receive::Registry};
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
            reason: generation.reason.clone(),
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
        let decision = Decision::try_from(asked.decision).unwrap_or_default();
        let (number, by, now) = (asked.number, identity.name.clone(), self.base.now_unix());
        let change = move |all: &mut Generations| match decision {
            Decision::Follow => all.follow(number, &by, now),
            Decision::Retire => all.retire(number, &by, now),
            Decision::Unspecified => Err(Refusal::Unknown { known: "".into(), found: number }),
        };
        let before = self.base.generations(cluster).await?;
        let former = before.current();
        let mut trial = before.clone();
        change(&mut trial).map_err(|refusal| {
            Code::Invalid.status(format!(
                "change generations of {}: {refusal}; hint: klio generation list shows them all",
                cluster.base()
            ))
        })?;
        let effects = self.effects(cluster, &before, number, decision).await?;
        if asked.dry_run {
            return Ok(effects);
        }
        self.base.change_generations(cluster, change).await?;
        let ended = if decision == Decision::Follow { former } else { number };
        self.registry.end(&Generations::place(cluster, ended));
        tracing::warn!(cluster = %cluster.base(), number, ?decision, by = identity.name, "a person decided about a generation");
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
