//! `klio-server backup`: decisions about a backup's record that only a person may make: another time, or removal.
//!
//! - The server has to be stopped, because whoever works on tier 1 has its lock.
//! - The cluster's name alone means its current generation, by the records of both tiers, as everywhere else. While
//!   they cannot be read or contradict each other, the generation has to be named.
//! - Both tiers get the same record, tier 2 first, and repeating the command is harmless. Only the time of the record
//!   changes, and the fact that a person changed it. Data is removed by retention only: the snapshot of a removed
//!   record stays for days (`orphans.rs`).

use super::key::open_store;
use crate::{config::Config, encryption::KeyProblem};
use anyhow::{Context, bail};
use klio_storage::{
    catalog::{BackupRecord, outcomes},
    disk::{Disk, RealDisk, durable},
    generations::Generations,
    layout::{BackupName, BaseObject, ClusterName},
    record,
    tier2::Tier2,
};
use serde::{Deserialize, de::DeserializeOwned};
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
    /// Cluster of the backup: NAME is its current generation, NAME@N its generation N
    #[arg(long, value_name = "NAME[@N]", value_parser = ClusterName::parse_generation)]
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
    /// The directory of its generation.
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
    let tier2 = config.tier2.as_ref().map(Tier2::open).transpose().context("open tier 2")?;
    let place = Place::open(tier2, store.root(), which).await?;
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
            println!("{}: committed {} -> {}", place.said(), said(record.committed_unix), said(at));
            if which.dry_run {
                return dry();
            }
            place.redate(at, now_unix).await
        }
        Verb::Remove(_) => {
            println!(
                "{}: committed {}, snapshot {}: removing its record from {}",
                place.said(),
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
    async fn open(tier2: Option<Tier2>, root: &Path, which: &Which) -> anyhow::Result<Self> {
        let cluster = resolve(tier2.as_ref(), root, &which.cluster).await?;
        let name = which.name.clone();
        let key = name.record_key(&cluster);
        let path = root.join(&key);
        let near = record::load(&RealDisk, &path)?;
        let far = far(tier2.as_ref(), &key).await?;
        Ok(Self { cluster, name, path, root: root.to_owned(), tier2, near, far })
    }

    /// The backup with its generation, because several may have one of this name.
    fn said(&self) -> String {
        let (name, base, number) = (&self.name, self.cluster.base(), self.cluster.generation());
        format!("backup {name} of cluster {base}, generation {number}")
    }

    fn record(&self) -> anyhow::Result<BackupRecord> {
        let found = self.near.as_ref().or(self.far.as_ref());
        let found = found.with_context(|| {
            let (base, number) = (self.cluster.base(), self.cluster.generation());
            format!(
                "generation {number} of cluster {base} has no backup {} in either tier; hint: klio list --generation {number}; another generation is named with --cluster {base}@N",
                self.name
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

/// The directory of the generation that was named. A number is taken as it is, because a backup has to be found there.
async fn resolve(
    tier2: Option<&Tier2>,
    root: &Path,
    named: &ClusterName,
) -> anyhow::Result<ClusterName> {
    if let Some(number) = named.number() {
        return Ok(Generations::place(named, number));
    }
    let all = histories(tier2, root, named).await.with_context(|| {
        format!("find the current generation of {named}; hint: name one with --cluster {named}@N")
    })?;
    Ok(all.resolve(named)?)
}

/// The histories of a cluster, as far as either tier knows them.
async fn histories(
    tier2: Option<&Tier2>,
    root: &Path,
    cluster: &ClusterName,
) -> anyhow::Result<Generations> {
    let key = BaseObject::Generations.key(cluster);
    let near: Option<Generations> = record::load(&RealDisk, &root.join(&key))?;
    let far: Option<Generations> = far(tier2, &key).await?;
    Ok(near.unwrap_or_default().joined(&far.unwrap_or_default())?)
}

/// A record of tier 2; `None` if it is not there, or if there is no tier 2.
async fn far<T: DeserializeOwned>(tier2: Option<&Tier2>, key: &str) -> anyhow::Result<Option<T>> {
    let Some(tier2) = tier2 else { return Ok(None) };
    let bytes = tier2.read_small(key, record::LIMIT_BYTES).await?;
    Ok(bytes.map(|bytes| record::decode(&bytes, key)).transpose()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::stranger;
    use clap::Parser;
    use klio_storage::tier2::Tier2Config;
    use serde_json::json;
    use std::fs;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        which: Which,
    }

    fn which(cluster: &str) -> Which {
        Line::try_parse_from(["backup", "--cluster", cluster, "weekly"]).unwrap().which
    }

    /// A folder as tier 2, and both tiers with a backup `weekly` in each of two generations.
    fn two_generations(root: &Path) -> Tier2 {
        for (tier, place) in [("near", "main"), ("near", "main@2"), ("far", "main@2")] {
            fs::create_dir_all(root.join(tier).join(place).join("backups")).unwrap();
            let path = root.join(tier).join(place).join("backups/weekly.json");
            record::store(&RealDisk, &path, &json!({ "of": place })).unwrap();
        }
        Tier2::open(&Tier2Config::new(format!("file://{}", root.join("far").display()))).unwrap()
    }

    /// Regression test: the name was taken for its first generation's, whatever was followed, and no other one could
    /// be named.
    #[tokio::test]
    async fn the_name_alone_is_the_current_generation_and_each_one_can_be_named() {
        let dir = tempfile::tempdir().unwrap();
        let (tier2, near) = (two_generations(dir.path()), dir.path().join("near"));
        let open = async |cluster: &str| {
            let place = Place::open(Some(tier2.clone()), &near, &which(cluster)).await;
            place.map(|place| (place.near.clone().unwrap()["of"].clone(), place.said()))
        };
        let first = (json!("main"), "backup weekly of cluster main, generation 1".to_owned());
        let second = (json!("main@2"), "backup weekly of cluster main, generation 2".to_owned());
        assert_eq!(open("main").await.unwrap(), first);
        let mut all = Generations::default();
        all.begin(stranger("set back", 7), 1.0, true).unwrap();
        // Tier 1 was lost after the decision: only the bucket knows it.
        let before = Generations { version: 1, ..all.clone() };
        all.follow(2, "ops", 2.0).unwrap();
        let (key, after) = ("main/generations.json", Generations { version: 2, ..all });
        fs::create_dir_all(dir.path().join("far/main")).unwrap();
        record::store(&RealDisk, &near.join(key), &before).unwrap();
        record::store(&RealDisk, &dir.path().join("far").join(key), &after).unwrap();
        for (cluster, expected) in [("main", &second), ("main@1", &first), ("main@2", &second)] {
            assert_eq!(open(cluster).await.unwrap(), *expected, "{cluster}");
        }
        let place = Place::open(Some(tier2.clone()), &near, &which("main@3")).await.unwrap();
        let none = place.record().unwrap_err().to_string();
        assert!(none.contains("generation 3 of cluster main has no backup weekly"), "{none}");
        fs::write(near.join(key), "{").unwrap();
        let unread = format!("{:#}", open("main").await.unwrap_err());
        assert!(unread.contains("--cluster main@N"), "{unread}");
        assert_eq!(open("main@2").await.unwrap(), second);
    }

    /// The record of the generation that was named is removed, in both tiers, and no other.
    #[tokio::test]
    async fn a_removed_record_is_that_of_the_named_generation() {
        let dir = tempfile::tempdir().unwrap();
        let (tier2, near) = (two_generations(dir.path()), dir.path().join("near"));
        let place = Place::open(Some(tier2), &near, &which("main@2")).await.unwrap();
        place.remove().await.unwrap();
        let there = |path: &str| dir.path().join(path).join("backups/weekly.json").exists();
        assert_eq!(["near/main", "near/main@2", "far/main@2"].map(there), [true, false, false]);
    }

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
