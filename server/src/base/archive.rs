//! Which objects of base backups tier 2 is known to hold, for each cluster, in memory.
//!
//! LISTED1  an object is here only after it was proven: uploaded by us, or listed with the size of tier 1's;
//! LISTED2  an object proven while a comparison lists the bucket is not lost when the comparison's result is stored;
//! LISTED3  nothing is said about a cluster before its objects were listed once in this run: the answer is `None`,
//!     never "empty".
//!
//! A listing rebuilds the whole state (P4). Code that removes an object from tier 2 calls [`BaseArchives::removed`].

use super::lock;
use klio_storage::layout::{BackupName, BaseObject, ClusterName};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tokio::sync::OwnedMutexGuard;

/// The most problems listed for one cluster; more would not help anybody.
const PROBLEMS_SHOWN: usize = 10;

/// The key of the queue's problem among those of objects; no object has this name.
const QUEUE: &str = "queue";

/// A cheap handle on the state of all clusters.
#[derive(Clone, Default)]
pub struct BaseArchives(Arc<Mutex<BTreeMap<ClusterName, State>>>);

#[derive(Default)]
struct State {
    /// Proven objects and their sizes; `None` before the first listing.
    proven: Option<BTreeMap<BaseObject, u64>>,
    /// Objects proven since the running comparison began, or before the first one.
    since: BTreeMap<BaseObject, u64>,
    /// Objects removed since the running comparison began.
    gone: BTreeSet<BaseObject>,
    /// Objects on tier 1 that are not proven, and since when, in Unix seconds.
    pending: BTreeMap<BaseObject, f64>,
    /// Objects of changing content that were announced since their job began to read them.
    anew: BTreeSet<BaseObject>,
    /// Problems by object; the empty name stands for the cluster as a whole.
    problems: BTreeMap<String, String>,
    /// When the bucket was last listed.
    listed: Option<Instant>,
    /// When and why the bucket could not be listed.
    failed: Option<(Instant, String)>,
    /// Held by whoever compares: of two comparisons at once, each would discard what was proven during the other.
    comparing: Arc<tokio::sync::Mutex<()>>,
}

/// A cluster's state.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct BaseArchiveState {
    /// Objects on tier 1 that tier 2 does not have, as far as is known.
    pub unarchived_files: u64,
    /// Since when the oldest of them waits, in Unix seconds.
    pub oldest_unarchived_unix: Option<f64>,
    /// Why objects cannot be archived, as texts.
    pub problems: Vec<String>,
}

impl BaseArchives {
    fn with<T>(&self, cluster: &ClusterName, change: impl FnOnce(&mut State) -> T) -> T {
        let mut clusters = lock(&self.0);
        if let Some(state) = clusters.get_mut(cluster) {
            return change(state);
        }
        change(clusters.entry(cluster.clone()).or_default())
    }

    /// Records that an object is on tier 1 and may not be in tier 2.
    pub fn announce(&self, cluster: &ClusterName, object: BaseObject, now_unix: f64) {
        self.with(cluster, |state| {
            if !object.is_fixed() {
                state.anew.insert(object.clone());
            }
            if state.size(&object).is_none() || !object.is_fixed() {
                state.pending.entry(object).or_insert(now_unix);
            }
        });
    }

    /// Records that the object's job begins: it reads everything announced so far.
    pub fn begins(&self, cluster: &ClusterName, object: &BaseObject) {
        self.with(cluster, |state| state.anew.remove(object));
    }

    /// Whether an object was announced since its job began, so that the job may have read the content from before.
    pub fn is_anew(&self, cluster: &ClusterName, object: &BaseObject) -> bool {
        lock(&self.0).get(cluster).is_some_and(|state| state.anew.contains(object))
    }

    /// Records that archiving has stopped, and why; `None` when it continues.
    pub fn stands(&self, cluster: &ClusterName, why: Option<String>) {
        self.with(cluster, |state| match why {
            Some(why) => drop(state.problems.insert(QUEUE.into(), why)),
            None => drop(state.problems.remove(QUEUE)),
        });
    }

    /// Records that an object was proven. One that was announced again still waits.
    pub fn proven(&self, cluster: &ClusterName, object: BaseObject, size: u64) {
        self.with(cluster, |state| {
            if !state.anew.contains(&object) {
                state.pending.remove(&object);
            }
            state.problems.remove(&object.to_string());
            state.problems.remove("");
            state.gone.remove(&object);
            state.since.insert(object.clone(), size);
            if let Some(proven) = &mut state.proven {
                proven.insert(object, size);
            }
        });
    }

    /// Records that an object was removed from tier 2.
    pub fn removed(&self, cluster: &ClusterName, object: &BaseObject) {
        self.with(cluster, |state| {
            state.pending.remove(object);
            state.problems.remove(&object.to_string());
            state.since.remove(object);
            state.gone.insert(object.clone());
            if let Some(proven) = &mut state.proven {
                proven.remove(object);
            }
        });
    }

    /// Records that an object is no longer on tier 1, so that nothing waits.
    pub fn moot(&self, cluster: &ClusterName, object: &BaseObject) {
        self.with(cluster, |state| {
            state.pending.remove(object);
            state.problems.remove(&object.to_string());
        });
    }

    /// The proven size of an object; `None` when it is not known to be in tier 2.
    pub fn size(&self, cluster: &ClusterName, object: &BaseObject) -> Option<u64> {
        lock(&self.0).get(cluster)?.size(object)
    }

    /// All proven objects; `None` before the first listing (LISTED3).
    pub fn objects(&self, cluster: &ClusterName) -> Option<BTreeMap<BaseObject, u64>> {
        lock(&self.0).get(cluster)?.proven.clone()
    }

    pub fn bytes(&self, cluster: &ClusterName) -> u64 {
        let clusters = lock(&self.0);
        let proven = clusters.get(cluster).and_then(|state| state.proven.as_ref());
        proven.map_or(0, |proven| proven.values().sum())
    }

    /// All proven objects, if they were listed less than `age` ago. Used for clusters that another server writes.
    pub fn objects_younger(
        &self,
        cluster: &ClusterName,
        age: Duration,
    ) -> Option<BTreeMap<BaseObject, u64>> {
        let clusters = lock(&self.0);
        let state = clusters.get(cluster)?;
        state.listed.filter(|at| at.elapsed() < age)?;
        state.proven.clone()
    }

    /// The backups whose records are proven; `None` before the first listing.
    pub fn records(&self, cluster: &ClusterName) -> Option<BTreeSet<BackupName>> {
        let clusters = lock(&self.0);
        let proven = clusters.get(cluster)?.proven.as_ref()?;
        let name = |object: &BaseObject| match object {
            BaseObject::Record(name) => Some(name.clone()),
            _ => None,
        };
        Some(proven.keys().filter_map(name).collect())
    }

    /// Called before the bucket is listed (LISTED2); waits for its turn. Hold the guard until [`Self::compared`].
    pub async fn begin_comparing(&self, cluster: &ClusterName) -> OwnedMutexGuard<()> {
        let turn = self.with(cluster, |state| state.comparing.clone()).lock_owned().await;
        self.with(cluster, |state| {
            state.since.clear();
            state.gone.clear();
        });
        turn
    }

    /// Stores the result of a comparison. Returns what is missing in tier 2: objects of tier 1 that are not there or
    /// have another size, in the order in which they should be uploaded.
    pub fn compared(
        &self,
        cluster: &ClusterName,
        held: &[(BaseObject, u64)],
        stored: &[(BaseObject, u64)],
        now_unix: f64,
    ) -> Vec<(BaseObject, u64)> {
        let local: BTreeMap<&BaseObject, u64> = held.iter().map(|(o, size)| (o, *size)).collect();
        self.with(cluster, |state| {
            let mut proven: BTreeMap<BaseObject, u64> = stored
                .iter()
                .filter(|(object, size)| {
                    let other = local.get(object).is_some_and(|held| held != size);
                    !(state.gone.contains(object) || other && object.is_fixed())
                })
                .cloned()
                .collect();
            proven.extend(std::mem::take(&mut state.since));
            let missing: Vec<(BaseObject, u64)> =
                held.iter().filter(|(object, _)| !proven.contains_key(object)).cloned().collect();
            state.pending.retain(|object, _| {
                let settled = proven.contains_key(object) && object.is_fixed();
                local.contains_key(object) && !settled
            });
            for (object, _) in &missing {
                state.pending.entry(object.clone()).or_insert(now_unix);
            }
            let pending = &state.pending;
            state.problems.retain(|name, _| {
                name.is_empty() || pending.keys().any(|object| object.to_string() == *name)
            });
            state.proven = Some(proven);
            state.failed = None;
            state.listed = Some(Instant::now());
            missing
        })
    }

    /// Records that the bucket could not be listed.
    pub fn failed(&self, cluster: &ClusterName, problem: String) {
        self.with(cluster, |state| state.failed = Some((Instant::now(), problem)));
    }

    /// Why the bucket could not be listed, if that was less than `age` ago.
    pub fn failed_lately(&self, cluster: &ClusterName, age: Duration) -> Option<String> {
        let clusters = lock(&self.0);
        let (at, problem) = clusters.get(cluster)?.failed.as_ref()?;
        (at.elapsed() < age).then(|| problem.clone())
    }

    /// Records a problem of an object, or of the cluster as a whole.
    pub fn problem(&self, cluster: &ClusterName, object: Option<&BaseObject>, text: String) {
        let name = object.map(ToString::to_string).unwrap_or_default();
        self.with(cluster, |state| state.problems.insert(name, text));
    }

    /// Clears the problem of the cluster as a whole.
    pub fn no_problem(&self, cluster: &ClusterName) {
        self.with(cluster, |state| state.problems.remove(""));
    }

    pub fn state(&self, cluster: &ClusterName) -> BaseArchiveState {
        let clusters = lock(&self.0);
        let Some(state) = clusters.get(cluster) else { return BaseArchiveState::default() };
        let mut problems: Vec<String> =
            state.problems.values().take(PROBLEMS_SHOWN).cloned().collect();
        if state.problems.len() > PROBLEMS_SHOWN {
            problems.push(format!("and {} more", state.problems.len() - PROBLEMS_SHOWN));
        }
        let oldest = state.pending.values().copied().min_by(f64::total_cmp);
        BaseArchiveState {
            unarchived_files: state.pending.len() as u64,
            oldest_unarchived_unix: oldest,
            problems,
        }
    }
}

impl State {
    fn size(&self, object: &BaseObject) -> Option<u64> {
        let known = self.proven.as_ref().and_then(|proven| proven.get(object));
        known.or_else(|| self.since.get(object)).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(text: &str) -> BaseObject {
        BaseObject::parse_relative(text).unwrap()
    }

    fn cluster() -> ClusterName {
        "pg".parse().unwrap()
    }

    #[test]
    fn nothing_is_known_before_the_bucket_was_listed() {
        let archives = BaseArchives::default();
        archives.proven(&cluster(), object("base/config"), 7);
        assert_eq!(archives.objects(&cluster()), None);
        assert_eq!(archives.records(&cluster()), None);
        assert_eq!(archives.size(&cluster(), &object("base/config")), Some(7));
        archives.compared(&cluster(), &[], &[(object("backups/a.json"), 3)], 1.0);
        assert!(archives.records(&cluster()).unwrap().contains(&"a".parse().unwrap()));
    }

    #[test]
    fn what_is_announced_while_its_job_is_under_way_still_waits_after_it() {
        let archives = BaseArchives::default();
        let (levels, fixed) = (object("wal_levels.json"), object("backups/a.json"));
        let waits = || archives.state(&cluster()).unarchived_files;
        for object in [&levels, &fixed] {
            archives.announce(&cluster(), object.clone(), 1.0);
            archives.begins(&cluster(), object);
        }
        archives.announce(&cluster(), levels.clone(), 2.0);
        for object in [&levels, &fixed] {
            archives.proven(&cluster(), object.clone(), 7);
        }
        assert_eq!(waits(), 1);
        assert!(archives.is_anew(&cluster(), &levels) && !archives.is_anew(&cluster(), &fixed));
        archives.begins(&cluster(), &levels);
        archives.proven(&cluster(), levels.clone(), 8);
        assert!(waits() == 0 && !archives.is_anew(&cluster(), &levels));
    }

    #[tokio::test]
    async fn what_is_proven_or_removed_while_listing_survives_the_listing() {
        let archives = BaseArchives::default();
        let (config, old, new) =
            (object("base/config"), object("backups/old.json"), object("backups/new.json"));
        let _turn = archives.begin_comparing(&cluster()).await;
        archives.proven(&cluster(), new.clone(), 5);
        archives.removed(&cluster(), &old);
        let held = [(config.clone(), 3), (new.clone(), 5)];
        let missing = archives.compared(&cluster(), &held, &[(old.clone(), 4)], 9.0);
        assert_eq!(missing, [(config.clone(), 3)]);
        assert_eq!(archives.size(&cluster(), &new), Some(5));
        assert_eq!(archives.size(&cluster(), &old), None);
        assert_eq!(archives.state(&cluster()).unarchived_files, 1);
        assert_eq!(archives.state(&cluster()).oldest_unarchived_unix, Some(9.0));
    }

    /// An object of another size is not proven to be ours.
    #[test]
    fn an_object_of_another_size_is_missing() {
        let archives = BaseArchives::default();
        let config = object("base/config");
        let missing =
            archives.compared(&cluster(), &[(config.clone(), 3)], &[(config.clone(), 4)], 1.0);
        assert_eq!(missing, [(config, 3)]);
    }
}
