//! `klio-server backup`: decisions about a backup's record that only a person may make: another time, or removal.
//!
//! - The server has to be stopped, because whoever works on tier 1 has its lock.
//! - Both tiers get the same record, tier 2 first, and repeating the command is harmless. Only the time of the record
//!   changes, and the fact that a person changed it. Data is removed by retention only: the snapshot of a removed
//!   record stays for days (`orphans.rs`).

use super::key::open_store;
use crate::{config::Config, encryption::KeyProblem};
use anyhow::{Context, bail};
use klio_storage::{
    catalog::{BackupRecord, outcomes},
    disk::{Disk, RealDisk, durable},
    layout::{BackupName, ClusterName},
    record,
    tier2::Tier2,
};
use serde::Deserialize;
use serde_json::Value;
use std::path::{Path, PathBuf};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

/// The verbs of `backup`.
#[derive(Debug, clap::Subcommand)]
pub enum Verb {
    /// Set another commit time for a backup, after the server's clock was wrong. Stop the server first
    Redate(RedateArgs),
    /// Remove a backup's record from both tiers, so that the backup no longer exists. Stop the server first
    Remove(RemoveArgs),
}

/// The backup that a verb is about.
#[derive(Debug, clap::Args)]
pub struct Which {
    /// Configuration file of the server
    #[arg(short, long, env = "KLIO_CONFIG", default_value = "klio-server.toml")]
    pub config: PathBuf,
    /// Cluster of the backup
    #[arg(long)]
    pub cluster: ClusterName,
    /// Name of the backup, as klio list shows it
    pub name: BackupName,
    /// Print what would be done, and change nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// Arguments of `backup redate`.
#[derive(Debug, clap::Args)]
pub struct RedateArgs {
    #[command(flatten)]
    pub which: Which,
    /// Commit time to set, such as 2026-11-30T07:00:00Z; postgres: the time at which the backup ended by PostgreSQL's
    /// clock; server: the current value, which is right
    #[arg(long, value_name = "TIME")]
    pub to: At,
}

/// Arguments of `backup remove`.
#[derive(Debug, clap::Args)]
pub struct RemoveArgs {
    #[command(flatten)]
    pub which: Which,
}

/// A time, or where to take it from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum At {
    /// The record's stop time, by PostgreSQL's clock.
    Postgres,
    /// The record's commit time, by the server's clock: it is right as it is.
    Server,
    /// Unix seconds.
    Unix(f64),
}

impl std::str::FromStr for At {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "postgres" => return Ok(Self::Postgres),
            "server" => return Ok(Self::Server),
            _ => {}
        }
        OffsetDateTime::parse(text, &Rfc3339)
            .map(|at| Self::Unix(at.unix_timestamp() as f64))
            .map_err(|_| {
                format!("expected postgres, server, or a time such as 2026-11-30T07:00:00Z, found {text:?}")
            })
    }
}

impl At {
    fn of(self, record: &BackupRecord) -> f64 {
        match self {
            Self::Postgres => record.stopped_postgres_unix,
            Self::Server => record.committed_unix,
            Self::Unix(seconds) => seconds,
        }
    }
}

impl Verb {
    pub const fn which(&self) -> &Which {
        match self {
            Verb::Redate(args) => &args.which,
            Verb::Remove(args) => &args.which,
        }
    }
}

/// The record of a backup in both tiers.
struct Place {
    cluster: ClusterName,
    name: BackupName,
    path: PathBuf,
    root: PathBuf,
    tier2: Option<Tier2>,
    /// As JSON, so that fields of a later version are kept.
    near: Option<Value>,
    far: Option<Value>,
}

pub async fn run(verb: &Verb, now_unix: f64) -> anyhow::Result<()> {
    let which = verb.which();
    let config = Config::load(&which.config)?;
    let store = open_store(&config, &config.encryption.at_rest().map_err(KeyProblem::from)?)?;
    let place = Place::open(&config, store.root(), which).await?;
    let record = place.record()?;
    match verb {
        Verb::Redate(args) => {
            let at = args.to.of(&record);
            if !at.is_finite() || at > now_unix {
                bail!(
                    "redate {}: expected a time in the past, found {at:.0}; hint: check this machine's clock with date",
                    which.name
                );
            }
            println!("{}: committed {} -> {}", which.name, said(record.committed_unix), said(at));
            if which.dry_run {
                return dry();
            }
            place.redate(at, now_unix).await
        }
        Verb::Remove(_) => {
            println!(
                "{}: committed {}, snapshot {}: removing its record from {}",
                which.name,
                said(record.committed_unix),
                record.snapshot,
                place.tiers()
            );
            if which.dry_run {
                return dry();
            }
            place.remove().await
        }
    }
}

fn dry() -> anyhow::Result<()> {
    println!("nothing was changed: --dry-run");
    Ok(())
}

fn said(unix: f64) -> String {
    let at = OffsetDateTime::from_unix_timestamp(unix as i64).ok();
    at.and_then(|at| at.format(&Rfc3339).ok()).unwrap_or_else(|| format!("{unix}"))
}

impl Place {
    async fn open(config: &Config, root: &Path, which: &Which) -> anyhow::Result<Self> {
        let tier2 = config.tier2.as_ref().map(Tier2::open).transpose().context("open tier 2")?;
        let key = which.name.record_key(&which.cluster);
        let path = root.join(&key);
        let near = record::load(&RealDisk, &path)?;
        let far = match &tier2 {
            Some(tier2) => match tier2.read_small(&key, record::LIMIT_BYTES).await? {
                Some(bytes) => Some(record::decode(&bytes, &key)?),
                None => None,
            },
            None => None,
        };
        let (cluster, name) = (which.cluster.clone(), which.name.clone());
        Ok(Self { cluster, name, path, root: root.to_owned(), tier2, near, far })
    }

    fn record(&self) -> anyhow::Result<BackupRecord> {
        let found = self.near.as_ref().or(self.far.as_ref());
        let found = found.with_context(|| {
            format!(
                "cluster {} has no backup {} in either tier; hint: klio list",
                self.cluster, self.name
            )
        })?;
        BackupRecord::deserialize(found).context("read the record")
    }

    const fn tiers(&self) -> &'static str {
        match (self.near.is_some(), self.far.is_some()) {
            (true, true) => "both tiers",
            (_, false) => "tier 1",
            (false, true) => "tier 2",
        }
    }

    async fn write(&self) -> anyhow::Result<()> {
        let key = self.name.record_key(&self.cluster);
        if let (Some(tier2), Some(far)) = (&self.tier2, &self.far) {
            let bytes = record::encode(far, &key)?;
            tier2.replace(&key, bytes.into()).await.context("write the record in tier 2")?;
        }
        if let Some(near) = &self.near {
            let bytes = record::encode(near, self.path.display())?;
            durable::overwrite(&RealDisk, &self.path, &bytes)
                .context("write the record on tier 1")?;
        }
        Ok(())
    }

    async fn redate(mut self, at_unix: f64, now_unix: f64) -> anyhow::Result<()> {
        for body in [&mut self.far, &mut self.near].into_iter().flatten() {
            body["committed_unix"] = at_unix.into();
            body["redated_unix"] = now_unix.into();
        }
        self.write().await
    }

    async fn remove(&self) -> anyhow::Result<()> {
        let key = self.name.record_key(&self.cluster);
        if let Some(tier2) = &self.tier2 {
            tier2.remove(&key).await.context("remove the record from tier 2")?;
        }
        durable::remove_if_there(&RealDisk, &self.path).context("remove the record from tier 1")?;
        if let Some(directory) =
            self.path.parent().filter(|directory| RealDisk.list(directory).is_ok())
        {
            durable::sync_dir(&RealDisk, directory)?;
        }
        outcomes::remove(&RealDisk, &self.root, &self.cluster, &self.name)?;
        println!(
            "its data stays for three days after the next maintenance run, which finds it without a record"
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_postgresqls_or_is_said_with_its_zone() {
        assert_eq!("postgres".parse(), Ok(At::Postgres));
        assert_eq!("server".parse(), Ok(At::Server));
        assert_eq!("2026-11-30T07:00:00Z".parse(), Ok(At::Unix(1_796_022_000.0)));
        assert_eq!("2026-11-30T09:00:00+02:00".parse(), Ok(At::Unix(1_796_022_000.0)));
        for bad in ["2026-11-30 07:00:00", "2026-11-30T07:00:00", "yesterday", ""] {
            assert!(bad.parse::<At>().is_err(), "{bad}");
        }
    }
}
