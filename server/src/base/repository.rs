//! Creates and opens a cluster's repository.
//!
//! BASE1, in this order: the PostgreSQL is pinned (P8); both tiers are asked for a secret; only if neither has one,
//! and neither has a config without a secret, a new secret is written durably; then the repository is created with it.
//! A crash between two steps is completed by the next call. If tier 1 lost the secret and tier 2 does not answer,
//! nothing is created, because a second repository would hide the first one (P10).

use super::{BaseStore, run, tier2_status};
use crate::errors;
use klio_proto::{Code, wal::System};
use klio_storage::{
    Error, Kind, Op,
    catalog::coverage::{self, Coverage},
    disk::{durable, read_small},
    layout::{BaseFile, BaseKind, BaseObject, ClusterName},
    repository::{
        Files, Repository, SECRET_LIMIT_BYTES, Secret, decode_secret, encode_secret, secret_objects,
    },
    tier2::Tier2,
};
use std::{io, sync::Arc};
use tonic::Status;

impl BaseStore {
    /// Returns the secret that opens a cluster's repository; creates the repository if a `system` is given and there
    /// is none.
    ///
    /// # Errors
    /// `WRONG_SYSTEM`; `NOT_FOUND` when there is no repository and no system is given; `UNAVAILABLE` when tier 2 has
    /// to be asked and does not answer.
    pub async fn open_repository(
        &self,
        cluster: &ClusterName,
        system: Option<System>,
    ) -> Result<Secret, Status> {
        let Some(system) = system else {
            return self.secret(cluster).await?.map(|(secret, _)| secret).ok_or_else(|| {
                Code::NotFound.status(format!("cluster {cluster} has no repository"))
            });
        };
        self.pin(cluster, system).await?;
        let part = self.cluster(cluster);
        let _one = part.opening.lock().await;
        let secret = match self.secret(cluster).await? {
            Some((secret, Held::Tier1)) => secret,
            Some((secret, Held::Tier2)) => {
                tracing::warn!(%cluster, "tier 1 has lost the repository's secret; restoring it from tier 2");
                self.keep(cluster, secret).await?
            }
            None => {
                self.refuse_orphan(cluster).await?;
                self.keep(cluster, Secret::generate()).await?
            }
        };
        self.make(cluster, &secret).await?;
        Ok(secret)
    }

    /// Opens the repository for the server's own work, over both tiers.
    ///
    /// # Errors
    /// `NOT_FOUND` when the cluster has none.
    pub async fn repository(&self, cluster: &ClusterName) -> Result<Repository, Status> {
        let secret = self.open_repository(cluster, None).await?;
        let files: Arc<dyn Files> = Arc::new(self.files(cluster));
        run(move || Repository::open(files, &secret)).await
    }

    /// The secret, from tier 1 or else tier 2, and the tier it was found in.
    async fn secret(&self, cluster: &ClusterName) -> Result<Option<(Secret, Held)>, Status> {
        let (this, name) = (self.clone(), cluster.clone());
        if let Some(secret) = run(move || this.secret_on_disk(&name)).await? {
            return Ok(Some((secret, Held::Tier1)));
        }
        let Some(tier2) = self.tier2() else { return Ok(None) };
        let found = self.secret_in_tier2(tier2, cluster).await;
        let found = found.map_err(|error| match error.kind {
            Kind::Corrupt | Kind::Denied if error.op != Op::Download => errors::status(&error),
            _ => tier2_status("open the repository", cluster, &error),
        })?;
        Ok(found.map(|secret| (secret, Held::Tier2)))
    }

    /// Reads the secret on tier 1. Blocking.
    fn secret_on_disk(&self, cluster: &ClusterName) -> Result<Option<Secret>, Error> {
        for object in secret_objects(self.at_rest()) {
            let path = self.path(cluster, &object);
            let bytes = match read_small(self.disk().as_ref(), &path, SECRET_LIMIT_BYTES) {
                Ok(bytes) => bytes,
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(Error::io(Op::Read, &path, e)),
            };
            let encrypted = matches!(object, BaseObject::Secret { encrypted: true });
            return decode_secret(&bytes, encrypted, self.at_rest(), path.display()).map(Some);
        }
        Ok(None)
    }

    async fn secret_in_tier2(
        &self,
        tier2: &Tier2,
        cluster: &ClusterName,
    ) -> Result<Option<Secret>, Error> {
        for object in secret_objects(self.at_rest()) {
            let key = object.key(cluster);
            let Some(bytes) = tier2.read_small(&key, SECRET_LIMIT_BYTES).await? else { continue };
            let encrypted = matches!(object, BaseObject::Secret { encrypted: true });
            return decode_secret(&bytes, encrypted, self.at_rest(), key).map(Some);
        }
        Ok(None)
    }

    /// A repository without its secret is a loss that a person has to look at; a new secret would not open it.
    async fn refuse_orphan(&self, cluster: &ClusterName) -> Result<(), Status> {
        let local = self.cluster(cluster).files.clone();
        let on_disk = run(move || Ok(!local.list(BaseKind::Config)?.is_empty())).await?;
        let in_bucket = match self.tier2() {
            Some(tier2) => {
                let size = tier2.size_of(&BaseFile::CONFIG.key(cluster)).await;
                size.map_err(|e| tier2_status("open the repository", cluster, &e))?.is_some()
            }
            None => false,
        };
        if !on_disk && !in_bucket {
            return Ok(());
        }
        let tier = if on_disk { "tier 1" } else { "tier 2" };
        tracing::error!(%cluster, tier, "a repository has lost its secret; restore repository.json[.age] from a copy");
        Err(Code::Corrupt
            .status(format!("the repository of {cluster} in {tier} has lost its secret")))
    }

    /// Writes a secret to tier 1, durably.
    async fn keep(&self, cluster: &ClusterName, secret: Secret) -> Result<Secret, Status> {
        let (this, name) = (self.clone(), cluster.clone());
        run(move || {
            let key = BaseObject::Secret { encrypted: this.at_rest().is_on() }.key(&name);
            let (object, bytes) = encode_secret(&secret, this.at_rest(), key)?;
            let path = this.path(&name, &object);
            durable::overwrite(this.disk().as_ref(), &path, &bytes)?;
            this.announce(&name, object, bytes.len() as u64);
            Ok(secret)
        })
        .await
    }

    /// Creates the repository on tier 1 if it is not there, from tier 2's if there is one.
    async fn make(&self, cluster: &ClusterName, secret: &Secret) -> Result<(), Status> {
        let files = self.files(cluster);
        let local = files.local().clone();
        if run(move || {
            Ok(!local.list(BaseKind::Config)?.is_empty() && !local.list(BaseKind::Key)?.is_empty())
        })
        .await?
        {
            return Ok(());
        }
        let (secret, settings, name) = (secret.clone(), self.0.parts.settings, cluster.clone());
        let base = self.clone();
        run(move || {
            // This server opens and checks every file that arrives, so of a repository that it creates every pack was opened once.
            let new = files.list(BaseKind::Config)?.is_empty();
            let known = Coverage { opened_from_the_start: true, ..Coverage::default() };
            if new {
                coverage::store(base.disk().as_ref(), base.root(), &name, &known)?;
            }
            // Tier 2's config and keys are those that the repository was created with.
            for kind in [BaseKind::Config, BaseKind::Key] {
                for (file, _) in files.list(kind)? {
                    files.write(file, &[files.read(file)?])?;
                }
            }
            Repository::create(Arc::new(files), &secret, &settings)?;
            tracing::info!(cluster = %name, "the repository is ready");
            Ok(())
        })
        .await
    }
}

/// The tier in which something was found.
enum Held {
    Tier1,
    Tier2,
}
