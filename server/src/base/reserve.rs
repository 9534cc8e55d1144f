//! Reservations of a cluster's repository: for one backup at a time and any number of restores.
//!
//! A reservation lives as long as its [`Lease`], which lives as long as the client's stream, so no reservation can be
//! left behind. Maintenance takes [`Reservations::removal`] before it removes anything, and a new backup waits until
//! that ends, however long it takes. Otherwise the backup would write an index that names packs which are just being
//! removed. Only a backup that ran before and lost its reservation goes on during a removal. A restore does not hold
//! up maintenance: packs are marked long before they are removed (REPO4), and the restore's WAL is protected by
//! `readers`.

use super::{BaseStore, lock, tier2_status};
use crate::readers::Restoring;
use klio_proto::Code;
use klio_storage::layout::{BackupName, ClusterName};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::{Arc, Mutex},
    time::Duration,
};
use time::{OffsetDateTime, format_description::FormatItem, macros::format_description};
use tonic::Status;

/// The format of generated names. It sorts by time as text, and is valid in every file system and URL.
const NAME: &[FormatItem<'_>] = format_description!("[year][month][day]T[hour][minute][second]Z");

/// How often a backup that waits for maintenance checks again.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// A running backup that lost its reservation, for example because the server restarted, gives up after two minutes,
/// so it waits less than that. Maintenance at the same time does it no harm, because it named its packs before
/// maintenance began (REPO4).
const RESUMED_WAITS: Duration = Duration::from_secs(60);

/// Whether a backup that has waited this long goes on during a removal.
fn goes_beside(resumed: bool, asked_for: Duration) -> bool {
    resumed && asked_for >= RESUMED_WAITS
}

/// A client: its certificate's name and the address it connects from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// The certificate's common name.
    pub name: String,
    /// The address of the connection, without the port, because a client may have several.
    pub address: Option<IpAddr>,
}

impl std::fmt::Display for Caller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.address {
            Some(address) => write!(f, "{} from {address}", self.name),
            None => f.write_str(&self.name),
        }
    }
}

/// What runs on a cluster at the moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Running {
    pub backup: Option<BackupName>,
    /// The number of restores.
    pub restores: usize,
}

#[derive(Default)]
struct Work {
    backup: Option<(BackupName, Caller)>,
    restores: usize,
    removals: usize,
}

impl Work {
    const fn is_none(&self) -> bool {
        self.backup.is_none() && self.restores == 0 && self.removals == 0
    }
}

/// All reservations. Cheap to clone.
#[derive(Clone, Default)]
pub struct Reservations(Arc<Mutex<BTreeMap<ClusterName, Work>>>);

/// A reservation; dropping it ends it.
#[derive(Debug)]
pub struct Lease {
    reservations: Reservations,
    cluster: ClusterName,
    backup: Option<BackupName>,
    /// Of a restore: protects the WAL that it needs.
    restoring: Option<Restoring>,
}

/// Maintenance that removes something; dropping it ends it.
#[derive(Debug)]
pub struct Removal {
    reservations: Reservations,
    cluster: ClusterName,
}

impl Drop for Removal {
    fn drop(&mut self) {
        let mut clusters = lock(&self.reservations.0);
        let Some(work) = clusters.get_mut(&self.cluster) else { return };
        work.removals = work.removals.saturating_sub(1);
        if work.is_none() {
            clusters.remove(&self.cluster);
        }
    }
}

impl std::fmt::Debug for Reservations {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Reservations")
    }
}

impl Lease {
    /// The backup's name; `None` for a restore.
    pub const fn backup(&self) -> Option<&BackupName> {
        self.backup.as_ref()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut clusters = lock(&self.reservations.0);
        let Some(work) = clusters.get_mut(&self.cluster) else { return };
        match self.backup {
            Some(_) => work.backup = None,
            None => work.restores = work.restores.saturating_sub(1),
        }
        if work.is_none() {
            clusters.remove(&self.cluster);
        }
    }
}

impl Reservations {
    /// What runs on a cluster at the moment.
    pub fn running(&self, cluster: &ClusterName) -> Running {
        let clusters = lock(&self.0);
        clusters.get(cluster).map_or_else(Running::default, |work| Running {
            backup: work.backup.as_ref().map(|(name, _)| name.clone()),
            restores: work.restores,
        })
    }

    /// The number of restores that run, of all generations of the cluster together (P13).
    pub fn restores_of(&self, cluster: &ClusterName) -> usize {
        let (clusters, base) = (lock(&self.0), cluster.base());
        let own = clusters.iter().filter(|(place, _)| place.base() == base);
        own.map(|(_, work)| work.restores).sum()
    }

    /// Reserves for maintenance, unless a backup runs.
    ///
    /// # Errors
    /// The name of the running backup.
    pub fn removal(&self, cluster: &ClusterName) -> Result<Removal, BackupName> {
        let mut clusters = lock(&self.0);
        let work = clusters.entry(cluster.clone()).or_default();
        if let Some((running, _)) = &work.backup {
            return Err(running.clone());
        }
        work.removals += 1;
        Ok(Removal { reservations: self.clone(), cluster: cluster.clone() })
    }

    /// Whether maintenance is removing something.
    fn is_removing(&self, cluster: &ClusterName) -> bool {
        lock(&self.0).get(cluster).is_some_and(|work| work.removals > 0)
    }

    /// Reserves for a restore.
    pub fn restore(&self, cluster: &ClusterName) -> Lease {
        lock(&self.0).entry(cluster.clone()).or_default().restores += 1;
        let (reservations, cluster) = (self.clone(), cluster.clone());
        Lease { reservations, cluster, backup: None, restoring: None }
    }

    /// Reserves `name` for a backup; `None` while maintenance removes something, unless `beside` says that the backup
    /// runs during that.
    ///
    /// # Errors
    /// `BUSY` while another backup of the cluster runs.
    pub fn backup(
        &self,
        cluster: &ClusterName,
        name: BackupName,
        caller: Caller,
        beside: bool,
    ) -> Result<Option<Lease>, Status> {
        let mut clusters = lock(&self.0);
        let work = clusters.entry(cluster.clone()).or_default();
        if let Some((running, who)) = &work.backup {
            return Err(Code::Busy.status(format!(
                "reserve a backup of {cluster}: {who} is taking backup {running}"
            )));
        }
        if work.removals > 0 && !beside {
            return Ok(None);
        }
        work.backup = Some((name.clone(), caller));
        let (reservations, cluster) = (self.clone(), cluster.clone());
        Ok(Some(Lease { reservations, cluster, backup: Some(name), restoring: None }))
    }

    /// Whether `caller` may send files because it has reserved a backup. Only the certificate's name is compared,
    /// because a client may connect from several addresses.
    ///
    /// # Errors
    /// `UNAVAILABLE` when there is no reservation: a client that lost it reserves again and goes on. `BUSY` when
    /// another client has it.
    pub fn may_put(&self, cluster: &ClusterName, caller: &Caller) -> Result<(), Status> {
        match lock(&self.0).get(cluster).and_then(|work| work.backup.as_ref()) {
            Some((_, who)) if who.name == caller.name => Ok(()),
            Some((reserved, who)) => Err(Code::Busy
                .status(format!("store a file of {cluster}: {who} is taking backup {reserved}"))),
            None => Err(Code::Unavailable.status(format!(
                "store a file of {cluster}: expected a reservation of a backup, found none"
            ))),
        }
    }

    /// Whether `caller` may commit a backup of that name because it has reserved it.
    ///
    /// # Errors
    /// `BUSY` when another client has reserved, `UNAVAILABLE` when nobody has.
    pub fn may_commit(
        &self,
        cluster: &ClusterName,
        name: &BackupName,
        caller: &Caller,
    ) -> Result<(), Status> {
        match lock(&self.0).get(cluster).and_then(|work| work.backup.as_ref()) {
            Some((reserved, who)) if reserved == name && who.name == caller.name => Ok(()),
            Some((reserved, who)) => Err(Code::Busy.status(format!(
                "commit backup {name} of {cluster}: {who} has reserved {reserved}"
            ))),
            None => Err(Code::Unavailable.status(format!(
                "commit backup {name} of {cluster}: expected a reservation of that name, found none"
            ))),
        }
    }
}

impl BaseStore {
    /// Reserves for a backup, under the name `wanted` or one made from the clock. Waits while maintenance removes
    /// something, but not for ever when the backup is `resumed`, which means that it runs already.
    ///
    /// # Errors
    /// `BUSY` while another backup runs; `INVALID` for a name that is taken.
    pub async fn reserve_backup(
        &self,
        cluster: &ClusterName,
        wanted: Option<&str>,
        resumed: bool,
        caller: Caller,
    ) -> Result<Lease, Status> {
        let asked = tokio::time::Instant::now();
        loop {
            let beside = goes_beside(resumed, asked.elapsed());
            if beside || !self.reservations().is_removing(cluster) {
                let name = self.free_name(cluster, wanted).await?;
                // Maintenance may have begun in the meantime.
                if let Some(lease) =
                    self.reservations().backup(cluster, name, caller.clone(), beside)?
                {
                    return Ok(lease);
                }
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Reserves for a restore, of this backup if one is named, so that no WAL it may need is expired.
    pub async fn reserve_restore(&self, cluster: &ClusterName, backup: Option<&str>) -> Lease {
        let mut lease = self.reservations().restore(cluster);
        // Taken before the backup is looked up: until its start is known, all WAL stays.
        let restoring = self.readers().restore(cluster);
        if let Some(name) = backup.and_then(|name| name.parse::<BackupName>().ok()) {
            match self.backup(cluster, &name).await {
                Ok(record) => restoring.needs_from(record.start_lsn),
                Err(error) => {
                    tracing::warn!(%cluster, backup = %name, error = error.message(), "cannot look up the backup of a restore; no WAL is removed meanwhile");
                }
            }
        }
        lease.restoring = Some(restoring);
        lease
    }

    async fn free_name(
        &self,
        cluster: &ClusterName,
        wanted: Option<&str>,
    ) -> Result<BackupName, Status> {
        let taken = self.names(cluster).await?;
        let Some(text) = wanted else {
            return free_name(self.now_unix(), &taken)
                .ok_or_else(|| Code::Internal.status("reserve: the clock gives no name"));
        };
        let name: BackupName =
            text.parse().map_err(|e| Code::Invalid.status(format!("reserve: {e}")))?;
        if taken.contains(&name) {
            return Err(Code::Invalid
                .status(format!("reserve: cluster {cluster} has a backup {name} already")));
        }
        Ok(name)
    }

    /// The names that are taken in either tier. If the bucket was never listed and does not answer, only those of tier
    /// 1 are known: a backup does not wait for the bucket (P4), and a record there is never overwritten anyway.
    async fn names(&self, cluster: &ClusterName) -> Result<BTreeSet<BackupName>, Status> {
        let (this, name) = (self.clone(), cluster.clone());
        let held = super::run(move || this.records_on_disk(&name)).await?;
        let mut names: BTreeSet<BackupName> = held.into_iter().map(|(name, _)| name).collect();
        match self.list_tier2(cluster).await {
            Ok(_) => names.extend(self.archives().records(cluster).unwrap_or_default()),
            Err(error) => drop(tier2_status("list backups", cluster, &error)),
        }
        Ok(names)
    }
}

/// The first name for this second that is not taken.
fn free_name(now_unix: f64, taken: &BTreeSet<BackupName>) -> Option<BackupName> {
    let now = OffsetDateTime::from_unix_timestamp(now_unix as i64).ok()?;
    let base = now.format(NAME).ok()?;
    let numbered = (2..=taken.len() + 2).map(|number| format!("{base}-{number}"));
    let names = std::iter::once(base.clone()).chain(numbered).filter_map(|name| name.parse().ok());
    names.into_iter().find(|name| !taken.contains(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller(name: &str) -> Caller {
        Caller { name: name.into(), address: None }
    }

    fn cluster() -> ClusterName {
        "pg".parse().unwrap()
    }

    #[test]
    fn names_come_from_the_clock_and_are_unique() {
        let mut taken = BTreeSet::new();
        let now = 1_795_238_280.9;
        for expected in ["20261121T051800Z", "20261121T051800Z-2", "20261121T051800Z-3"] {
            let name = free_name(now, &taken).unwrap();
            assert_eq!(name.as_str(), expected);
            taken.insert(name);
        }
        assert_eq!(free_name(f64::MAX, &taken), None);
    }

    #[test]
    fn one_backup_at_a_time_and_any_number_of_restores() {
        let all = Reservations::default();
        let first = all.backup(&cluster(), "a".parse().unwrap(), caller("x"), false).unwrap();
        let refused = all.backup(&cluster(), "b".parse().unwrap(), caller("y"), false).unwrap_err();
        assert_eq!(Code::of(&refused), Code::Busy);
        assert!(refused.message().contains("x is taking backup a"), "{refused}");
        assert!(
            all.backup(&"other".parse().unwrap(), "b".parse().unwrap(), caller("y"), false).is_ok()
        );
        let restores = [all.restore(&cluster()), all.restore(&cluster())];
        assert_eq!(all.running(&cluster()), Running { backup: "a".parse().ok(), restores: 2 });
        let [second, stranger] =
            ["pg@2", "pg2"].map(|name| all.restore(&ClusterName::parse_generation(name).unwrap()));
        for place in [cluster(), cluster().with_generation(2), cluster().with_generation(3)] {
            assert_eq!(all.restores_of(&place), 3, "{place}: all generations share one quota");
        }
        drop((first, restores, second, stranger));
        assert_eq!(all.running(&cluster()), Running::default());
        assert!(all.backup(&cluster(), "b".parse().unwrap(), caller("y"), false).is_ok());
    }

    #[test]
    fn maintenance_removes_only_while_no_backup_runs() {
        let all = Reservations::default();
        let backup = all.backup(&cluster(), "a".parse().unwrap(), caller("x"), false).unwrap();
        assert_eq!(all.removal(&cluster()).unwrap_err().as_str(), "a");
        drop(backup);
        let removal = all.removal(&cluster()).unwrap();
        drop(all.restore(&cluster()));
        let again = |beside| all.backup(&cluster(), "b".parse().unwrap(), caller("y"), beside);
        assert!(again(false).unwrap().is_none());
        assert!(again(true).unwrap().is_some());
        assert!(all.is_removing(&cluster()) && !all.is_removing(&"other".parse().unwrap()));
        drop(removal);
        assert!(!all.is_removing(&cluster()));
    }

    #[test]
    fn only_a_backup_that_ran_before_goes_on_beside_maintenance() {
        let day = Duration::from_secs(86_400);
        assert!(!goes_beside(false, day), "a name of the user's is no sign of a backup that runs");
        assert!(goes_beside(true, RESUMED_WAITS) && !goes_beside(true, RESUMED_WAITS / 2));
    }

    #[test]
    fn files_and_records_come_only_from_who_reserved() {
        let all = Reservations::default();
        let (name, free) = ("a".parse().unwrap(), "free".parse().unwrap());
        let code = |result: Result<(), Status>| result.map_err(|status| Code::of(&status));
        assert_eq!(code(all.may_put(&cluster(), &caller("x"))), Err(Code::Unavailable));
        assert_eq!(code(all.may_commit(&cluster(), &name, &caller("x"))), Err(Code::Unavailable));
        let restore = all.restore(&cluster());
        assert_eq!(code(all.may_put(&cluster(), &caller("x"))), Err(Code::Unavailable));
        let lease = all.backup(&cluster(), "a".parse().unwrap(), caller("x"), false).unwrap();
        let elsewhere = Caller { name: "x".into(), address: "127.0.0.9".parse().ok() };
        for who in [caller("x"), elsewhere] {
            assert_eq!(code(all.may_put(&cluster(), &who)), Ok(()));
            assert_eq!(code(all.may_commit(&cluster(), &name, &who)), Ok(()));
            assert_eq!(code(all.may_commit(&cluster(), &free, &who)), Err(Code::Busy));
        }
        assert_eq!(code(all.may_put(&cluster(), &caller("y"))), Err(Code::Busy));
        assert_eq!(code(all.may_commit(&cluster(), &name, &caller("y"))), Err(Code::Busy));
        assert!(all.may_put(&"other".parse().unwrap(), &caller("x")).is_err());
        drop((lease, restore));
        assert_eq!(code(all.may_put(&cluster(), &caller("x"))), Err(Code::Unavailable));
    }
}
