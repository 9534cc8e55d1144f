//! What verification knows to be damaged, for whoever stores and lists.
//!
//! A pack that is known to be damaged, with a good copy in no tier, is left out of listings: then the next backup sends again
//! what is in it, as with one that is missing (ABSENT2 of the repository), and readers look elsewhere first. It stays where it is. It
//! is known no longer when it was read and found good, or when somebody sent it again. What cannot be read stops whoever would
//! remove or change something by it (P6); a listing goes on without.

use super::{BaseStore, lock, run};
use klio_storage::{
    Error,
    catalog::damage::{self, KnownDamage},
    layout::{BaseFile, ClusterName},
};
use std::collections::BTreeSet;
use tonic::Status;

impl BaseStore {
    /// What is known. Blocking.
    ///
    /// # Errors
    /// `Corrupt`, or as the disk fails.
    pub fn known_damage(&self, cluster: &ClusterName) -> Result<KnownDamage, Error> {
        damage::load(self.disk().as_ref(), self.root(), cluster)
    }

    /// Packs with a good copy in no tier; none where that cannot be read, which is told. Blocking.
    pub(super) fn damaged_packs(&self, cluster: &ClusterName) -> BTreeSet<BaseFile> {
        let known = self.known_damage(cluster).unwrap_or_else(|error| {
            tracing::error!(%cluster, %error, "cannot read damaged.json; pruning is paused");
            KnownDamage::default()
        });
        known.pack_files(cluster)
    }

    /// Changes what is known, durably.
    ///
    /// # Errors
    /// As reading or writing it fails; then it is as it was.
    pub async fn change_damage(
        &self,
        cluster: &ClusterName,
        change: impl FnOnce(&mut KnownDamage) + Send + 'static,
    ) -> Result<KnownDamage, Status> {
        let (this, cluster) = (self.clone(), cluster.clone());
        run(move || this.change_damage_now(&cluster, change)).await
    }

    /// The same; blocking.
    pub(super) fn change_damage_now(
        &self,
        cluster: &ClusterName,
        change: impl FnOnce(&mut KnownDamage),
    ) -> Result<KnownDamage, Error> {
        let _one = lock(&self.0.damage);
        let mut known = self.known_damage(cluster)?;
        change(&mut known);
        damage::store(self.disk().as_ref(), self.root(), cluster, &known)?;
        Ok(known)
    }
}
