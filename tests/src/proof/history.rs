//! A cluster's other histories: a state that is kept and put back later, and what a person decides then (P11).
//!
//! What must stay true: a state is kept only as a crash leaves it, so that what it holds once it is started again is what
//! the oracle knows: every committed record, and tables without WAL empty.

use super::{
    Rig,
    restore::{Restored, Restorer, Source},
};
use crate::{
    postgres::{Postgres, Stop, install},
    process::Running,
    programs,
    site::{PATIENCE, Site},
    wait::eventually,
    workload::{Model, Oracle},
};
use klio_pg::Lsn;
use rand::{Rng, rngs::StdRng};
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// A kept state of the primary and of its tablespaces.
#[derive(Debug)]
pub struct Kept {
    directory: PathBuf,
    /// What it holds.
    pub base: Model,
}

/// A history that goes on no more, and what can be restored from it for ever.
#[derive(Debug)]
pub struct Older {
    /// Its number.
    pub generation: u64,
    /// What it held.
    pub oracle: Oracle,
    /// Behind its first backup.
    pub first: Lsn,
    /// As far as it can be restored.
    pub end: Lsn,
}

/// What a person decides about a new history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// The cluster's name follows it.
    Follow,
    /// It is refused for good.
    Retire,
}

fn copy_tree(from: &Path, to: &Path) {
    let status = Command::new("cp").arg("-a").arg(from).arg(to).status().expect("run cp");
    assert!(status.success(), "copy {} to {}", from.display(), to.display());
}

/// The directories that make up a state, with the names that they are kept under.
fn parts(pg: &Postgres, rig: &Rig) -> [(&'static str, PathBuf); 3] {
    [("data", pg.data_dir()), ("places", rig.places()), ("elsewhere", rig.elsewhere())]
}

/// Keeps the directories of a PostgreSQL that does not run.
fn keep(pg: &Postgres, rig: &Rig, directory: &Path) {
    let _ = fs::remove_dir_all(directory);
    fs::create_dir_all(directory).expect("make the directory of a kept state");
    for (name, part) in parts(pg, rig) {
        if part.exists() {
            copy_tree(&part, &directory.join(name));
        }
    }
}

/// Puts them back.
fn put_back(pg: &mut Postgres, rig: &Rig, directory: &Path) {
    pg.destroy_data();
    for (name, part) in parts(pg, rig) {
        let _ = fs::remove_dir_all(&part);
        if directory.join(name).exists() {
            copy_tree(&directory.join(name), &part);
        }
    }
}

impl Kept {
    /// Of the running primary, which crashes for it and goes on. It must have written nothing since it came to hold `base`.
    pub async fn of_primary(rig: &mut Rig, base: &Model) -> Self {
        let directory = rig.kept_directory();
        rig.pg.stop(Stop::Immediate).await;
        keep(&rig.pg, rig, &directory);
        rig.pg.start().await;
        Self { directory, base: base.clone() }
    }

    /// Of a restored directory that was never started: a twin recovers from it to the same end and is promoted to the same
    /// number as the one that comes after it, because nobody has heard of that number yet.
    pub async fn of_twin(rig: &Rig, mut pg: Postgres) -> (Postgres, PathBuf) {
        let (bare, directory) = (rig.kept_directory(), rig.kept_directory());
        keep(&pg, rig, &bare);
        pg.adopt();
        pg.start().await;
        super::restore::promoted(&mut pg).await;
        pg.stop(Stop::Immediate).await;
        keep(&pg, rig, &directory);
        put_back(&mut pg, rig, &bare);
        (pg, directory)
    }

    /// A twin that was kept, which holds the same as the one that was verified.
    pub fn twin(directory: PathBuf, base: Model) -> Self {
        Self { directory, base }
    }

    /// The primary is this state again, and runs; what it was meanwhile is lost.
    pub async fn put_back(self, rig: &mut Rig) -> Model {
        let mut pg = std::mem::replace(&mut rig.pg, Postgres::empty(install::DEBIAN_MAJOR));
        put_back(&mut pg, rig, &self.directory);
        rig.pg = pg;
        rig.pg.start().await;
        self.base
    }
}

async fn generations(site: &Site) -> Vec<(u64, String)> {
    let outcome = site.klio(None, &["generation", "list", "--json"]).await;
    let value: Value = serde_json::from_str(&outcome.stdout).unwrap_or_default();
    let list = value["generations"].as_array().cloned().unwrap_or_default();
    let state =
        |one: &Value| Some((one["generation"].as_u64()?, one["state"].as_str()?.to_owned()));
    list.iter().filter_map(state).collect()
}

/// The one history that waits for a decision. A put-back state must always be found, and found once.
pub async fn undecided(site: &Site) -> u64 {
    eventually("one undecided generation", PATIENCE, || async {
        let found = generations(site).await;
        let open: Vec<u64> = found.iter().filter(|g| g.1 == "undecided").map(|g| g.0).collect();
        match open[..] {
            [one] => Ok(one),
            _ => Err(found),
        }
    })
    .await
}

/// Ordinary life makes no other history: nothing waits for a decision.
///
/// # Panics
/// When something does.
pub async fn require_decided(site: &Site) {
    let found = generations(site).await;
    assert!(found.iter().all(|g| g.1 != "undecided" && g.1 != "refused"), "{found:?}");
}

/// An operator decides.
pub async fn decide(site: &Site, generation: u64, decision: Decision) {
    let bundle = site.operator("ops").await;
    let verb = if decision == Decision::Follow { "follow" } else { "retire" };
    let number = generation.to_string();
    let args = ["generation", verb, number.as_str()];
    let mut command = site.klio_command_of(&bundle, None, &args);
    command.env("KLIO_CLUSTER", "main");
    let outcome = programs::run(command).await;
    assert_eq!(outcome.code, Some(0), "{args:?}: {}{}", outcome.stdout, outcome.stderr);
}

/// What was retired is told so by its exit status, and nothing else is.
pub async fn require_refused(stream: &mut Running) {
    let status = stream.wait_exit(PATIENCE).await;
    assert_eq!(status.code(), Some(25), "a retired history streams on:\n{}", stream.log());
}

impl Older {
    /// It is what it was, whatever came after it.
    pub async fn require(&self, rig: &mut Rig, rng: &mut StdRng) -> Option<String> {
        let targets = super::targets(&self.oracle, self.first, self.end, true, rng);
        let (target, _) = targets.get(rng.random_range(0..targets.len().max(1)))?.clone();
        let source = if rng.random_bool(0.5) { Source::Server } else { Source::Bucket };
        let what = format!("{target:?} {source:?} generation {}", self.generation);
        let what = what.replace("Target::", "");
        eprintln!("  restore {what}");
        rig.clear_places();
        let restorer = Restorer::new(&rig.site, &rig.s3, source, rig.hands());
        let restorer = restorer.generation(self.generation);
        let pg = restorer.files(&target, None, &[]).await;
        let mut restored = Restored::recover(pg, rig.checksums()).await;
        super::verify(&mut restored, &self.oracle, &target, &what).await;
        restored.stop().await;
        Some(what)
    }
}
