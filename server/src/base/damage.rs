//! The record of what verification found damaged, for storing and listing files.
//!
//! A damaged pack without a good copy in either tier is left out of listings. Then the next backup sends its content
//! again, as if the pack were missing (ABSENT2 of the repository), and readers look elsewhere first. The file stays
//! where it is. The entry is removed when the pack was read and found good, or was sent again. If the record cannot be
//! read, nothing is removed or changed on its basis (P6), but listings continue without it.

use super::{BaseStore, lock, run};
use klio_storage::{
    Error,
    catalog::damage::{self, KnownDamage},
    layout::{BaseFile, ClusterName},
};
use std::collections::BTreeSet;
use tonic::Status;

impl BaseStore {
    /// The recorded damage. Blocking.
    ///
    /// # Errors
    /// `Corrupt`, or an I/O error of the disk.
    pub fn known_damage(&self, cluster: &ClusterName) -> Result<KnownDamage, Error> {
        damage::load(self.disk().as_ref(), self.root(), cluster)
    }

    /// Packs without a good copy in either tier. Empty, with an error in the log, when the record cannot be read.
    /// Blocking.
    pub(super) fn damaged_packs(&self, cluster: &ClusterName) -> BTreeSet<BaseFile> {
        let known = self.known_damage(cluster).unwrap_or_else(|error| {
            tracing::error!(%cluster, %error, "cannot read damaged.json; pruning is paused");
            KnownDamage::default()
        });
        known.pack_files(cluster)
    }

    /// Changes the record, durably.
    ///
    /// # Errors
    /// An error of reading or writing it; the record is then unchanged.
    pub async fn change_damage(
        &self,
        cluster: &ClusterName,
        change: impl FnOnce(&mut KnownDamage) + Send + 'static,
    ) -> Result<KnownDamage, Status> {
        let (this, cluster) = (self.clone(), cluster.clone());
        run(move || this.change_damage_now(&cluster, change)).await
    }

    /// The same, blocking.
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
