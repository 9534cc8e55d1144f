//! `klio-server key`: shows which key opens what, creates a new identity, and encrypts existing files again for it.
//!
//! - The new identity is in the identity file, durably and before the old ones, before anything is encrypted for it.
//!   The old ones stay in the file, so after an interruption at any point everything is readable, and `key rewrap`
//!   continues.
//! - The server has to be stopped, because whoever works on tier 1 has its lock.
//! - An object of tier 2 is replaced only by one that was proven to have the same content, in one request, and is read
//!   afterwards. So at every moment there is an object that the identity file opens (P5). This is a second exception
//!   to OBJECT4, besides verification.

mod far;

use super::keygen;
use crate::{config::Config, encryption::KeyProblem};
use anyhow::{Context, bail};
use klio_storage::{
    catalog::archive_file,
    crash_point,
    crypt::{self, AtRest, IdentityText, Keys},
    disk::{Disk, Entry, RealDisk, durable},
    layout::{BaseObject, ClusterName, WalFile},
    tier2::Tier2,
    wal::{WalOptions, WalStore, check_keys, locked},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

/// More than an encrypted secret needs.
const SECRET_LIMIT_BYTES: u64 = 1 << 20;

/// The verbs of `key`.
#[derive(Debug, clap::Subcommand)]
pub enum Verb {
    /// List the recipients of the encrypted files, and whether the identity file opens them
    Show(ShowArgs),
    /// Add a new identity at the beginning of the identity file, and encrypt the small keys for it. Stop the server
    /// first
    Rotate(RewrapArgs),
    /// Encrypt the small keys again for the newest identity and the current recipients. Stop the server first
    Rewrap(RewrapArgs),
}

/// Arguments of `key show`.
#[derive(Debug, clap::Args)]
pub struct ShowArgs {
    /// Configuration file of the server
    #[arg(short, long, env = "KLIO_CONFIG", default_value = "klio-server.toml")]
    pub config: PathBuf,
    /// Check the bucket too, with one small request for each encrypted object
    #[arg(long)]
    pub tier2: bool,
    /// List every file that each recipient can decrypt, not only their number
    #[arg(long)]
    pub files: bool,
}

/// Arguments of `key rotate` and `key rewrap`.
#[derive(Debug, clap::Args)]
pub struct RewrapArgs {
    /// Configuration file of the server
    #[arg(short, long, env = "KLIO_CONFIG", default_value = "klio-server.toml")]
    pub config: PathBuf,
    /// Encrypt sealed WAL again too, in both tiers: all WAL in the bucket is read, written and read once more
    #[arg(long)]
    pub rewrap_wal: bool,
}

pub async fn run(verb: &Verb) -> anyhow::Result<()> {
    match verb {
        Verb::Show(args) => show(args).await,
        Verb::Rotate(args) => {
            rotate(&Config::load(&args.config)?)?;
            rewrap(args).await
        }
        Verb::Rewrap(args) => rewrap(args).await,
    }
}

fn tier1(config: &Config) -> PathBuf {
    config.data_dir.join("tier1")
}

/// Opens tier 1; its lock keeps a server from starting.
pub(super) fn open_store(config: &Config, at_rest: &AtRest) -> anyhow::Result<WalStore> {
    let (root, at_rest) = (tier1(config), at_rest.clone());
    fs::create_dir_all(&root).with_context(|| format!("create directory {}", root.display()))?;
    check_keys(&RealDisk, &root, &at_rest).map_err(KeyProblem::from)?;
    let options = WalOptions { at_rest, ..WalOptions::default() };
    WalStore::open(Arc::new(RealDisk), root, options).context("open tier 1: is the server stopped?")
}

/// Adds a new identity at the beginning of the identity file.
fn rotate(config: &Config) -> anyhow::Result<()> {
    let Some(path) = &config.encryption.identity_file else {
        bail!("expected encryption.identity_file, found none: there is nothing to rotate");
    };
    // Proves that the identity is the right one and that the server is stopped, before anything changes.
    drop(open_store(config, &config.at_rest().map_err(KeyProblem::from)?)?);
    let old = crypt::read_identity(path)?;
    let (new, recipient) = keygen::generate();
    replace_identity(path, &new.before(&old))
        .with_context(|| format!("write {}", path.display()))?;
    println!("{recipient}");
    println!(
        "the new identity is the first one in {}: keep a copy of this file in another place",
        path.display()
    );
    Ok(())
}

/// Replaces the file durably. It is whole at every moment and readable by its owner only.
fn replace_identity(path: &Path, text: &IdentityText) -> anyhow::Result<()> {
    // A symbolic link, as secrets are often mounted, stays a link.
    let path = fs::canonicalize(path)?;
    let tmp = durable::tmp_path(&path);
    match fs::remove_file(&tmp) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e.into()),
        _ => {}
    }
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&tmp)?;
    file.write_all(text.expose().as_bytes())?;
    file.sync_all()?;
    crash_point!("key.written");
    durable::rename(&RealDisk, &tmp, &path)?;
    crash_point!("key.replaced");
    Ok(())
}

async fn rewrap(args: &RewrapArgs) -> anyhow::Result<()> {
    let config = Config::load(&args.config)?;
    let at_rest = config.at_rest().map_err(KeyProblem::from)?;
    let Some(keys) = at_rest.writing() else {
        bail!("expected encryption at rest to be on, found off = true");
    };
    let store = open_store(&config, &at_rest)?;
    let tier2 = config.tier2.as_ref().map(Tier2::open).transpose().context("open tier 2")?;
    let there = match &tier2 {
        Some(tier2) => tier2.clusters().await.context("list the clusters in tier 2")?,
        None => Vec::new(),
    };
    let here = store.clusters();
    let (ours, others) = shared(here.clone(), there);
    for cluster in ours {
        let is_here = here.contains(&cluster);
        if is_here && store.rewrap_key(&cluster)? {
            println!("{cluster}: wrapped the key of open segments again");
        }
        rewrap_secret(&store, &cluster, keys)?;
        if let Some(tier2) = &tier2 {
            rewrap_object(tier2, &cluster, keys).await?;
        }
        crash_point!("key.rewrapped");
        if args.rewrap_wal {
            if is_here {
                rewrap_wal(&store, &cluster)?;
            }
            crash_point!("key.wal");
            if let Some(tier2) = &tier2 {
                far::rewrap_wal(&store, tier2, &cluster, keys).await?;
            }
        }
    }
    for cluster in others {
        println!(
            "{cluster}: not touched, because only tier 2 has it and it may belong to another server: if it is of this server, let its PostgreSQL stream here once, then run klio-server key rewrap again"
        );
    }
    drop(store);
    let left = still_needed(&tier1(&config), &at_rest)?;
    if left.is_empty() {
        println!("nothing on tier 1 needs an older identity");
    }
    for (recipient, files) in left {
        println!(
            "{files} files on tier 1 still need the identity of {recipient}: keep that identity"
        );
    }
    match &tier2 {
        Some(tier2) if args.rewrap_wal => far::tell_still_needed(tier2, keys).await,
        Some(_) => {
            println!(
                "WAL in tier 2 still needs the identity it was encrypted for: keep that identity; hint: klio-server key show --tier2 counts such WAL, klio-server key rewrap --rewrap-wal encrypts it again"
            );
            Ok(())
        }
        None => Ok(()),
    }
}

/// The clusters and generations that are encrypted again: those of tier 1, and those in tier 2 that are generations of
/// the same clusters, because a lost tier 1 does not come back with them. Then those in tier 2 that are not.
fn shared(
    here: Vec<ClusterName>,
    there: Vec<ClusterName>,
) -> (BTreeSet<ClusterName>, BTreeSet<ClusterName>) {
    let bases: BTreeSet<ClusterName> = here.iter().map(ClusterName::base).collect();
    let (ours, others): (Vec<_>, _) =
        there.into_iter().partition(|cluster| bases.contains(&cluster.base()));
    (here.into_iter().chain(ours).collect(), others.into_iter().collect())
}

fn rewrap_secret(store: &WalStore, cluster: &ClusterName, keys: &Keys) -> anyhow::Result<()> {
    let path = store.root().join(BaseObject::Secret { encrypted: true }.key(cluster));
    let wrapped = match fs::read(&path) {
        Ok(wrapped) => wrapped,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e).with_context(|| format!("read {}", path.display())),
    };
    let secret = keys.unwrap(&wrapped).map_err(|e| e.at(path.display()))?;
    durable::overwrite(&RealDisk, &path, &keys.wrap(&secret)?)?;
    println!("{cluster}: wrapped the key of base backups again on tier 1");
    Ok(())
}

async fn rewrap_object(tier2: &Tier2, cluster: &ClusterName, keys: &Keys) -> anyhow::Result<()> {
    let key = BaseObject::Secret { encrypted: true }.key(cluster);
    let Some(wrapped) = tier2.read_small(&key, SECRET_LIMIT_BYTES).await? else { return Ok(()) };
    let secret = keys.unwrap(&wrapped).map_err(|e| e.at(&key))?;
    tier2.replace(&key, keys.wrap(&secret)?.into()).await?;
    println!("{cluster}: wrapped the key of base backups again in tier 2");
    Ok(())
}

fn rewrap_wal(store: &WalStore, cluster: &ClusterName) -> anyhow::Result<()> {
    let held = store.list(cluster)?;
    // What is archived was proven to be these files, so their new sizes must not make them count as unproven.
    let path = archive_file::path(store.root(), cluster);
    if let Some(mut archive) = archive_file::read(&path)? {
        for stored in held.iter().filter(|stored| archive.has(stored.file)).collect::<Vec<_>>() {
            archive.keep_size(stored.file, stored.size);
        }
        archive_file::write(&path, &archive)?;
    }
    let mut written = 0;
    let files: Vec<WalFile> = held.iter().map(|stored| stored.file).collect();
    for file in files {
        written += u64::from(store.rewrap(cluster, file)?);
    }
    println!("{cluster}: wrote {written} WAL files again on tier 1");
    Ok(())
}

/// The number of files that the newest identity does not open, by recipient.
fn still_needed(root: &Path, at_rest: &AtRest) -> anyhow::Result<BTreeMap<String, usize>> {
    let newest = at_rest.reading().and_then(|keys| keys.own().into_iter().next());
    let mut left = BTreeMap::new();
    for cluster in clusters(root)? {
        for file in locked(&RealDisk, root, &cluster)? {
            if newest.as_ref().is_some_and(|newest| !file.recipients.contains(newest)) {
                *left.entry(name(&file.recipients)).or_default() += 1;
            }
        }
    }
    Ok(left)
}

fn name(recipients: &[String]) -> String {
    if recipients.is_empty() { "an unnamed recipient".into() } else { recipients.join(" and ") }
}

fn clusters(root: &Path) -> anyhow::Result<Vec<ClusterName>> {
    let entries = match RealDisk.list(root) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("list {}", root.display()))?,
    };
    let name = |entry: &Entry| ClusterName::parse_generation(&entry.name).ok();
    Ok(entries.iter().filter(|entry| entry.is_dir).filter_map(name).collect())
}

async fn show(args: &ShowArgs) -> anyhow::Result<()> {
    let config = Config::load(&args.config)?;
    let at_rest = config.at_rest().map_err(KeyProblem::from)?;
    let own = at_rest.reading().map(Keys::own).unwrap_or_default();
    let encrypts = at_rest.writing().map(Keys::recipients).unwrap_or_default();
    println!(
        "new files are {}",
        if encrypts.is_empty() {
            "NOT ENCRYPTED".into()
        } else {
            format!("for {}", encrypts.join(" and "))
        }
    );
    for (n, recipient) in own.iter().enumerate() {
        println!(
            "the identity file opens files for {recipient}{}",
            if n == 0 { " (newest)" } else { "" }
        );
    }
    let mut found: Vec<(String, String, Vec<String>)> = Vec::new();
    let root = tier1(&config);
    for cluster in clusters(&root)? {
        for file in locked(&RealDisk, &root, &cluster)? {
            found.push(("tier 1".into(), file.path.display().to_string(), file.recipients));
        }
    }
    if let (true, Some(tier2)) = (args.tier2, &config.tier2) {
        let locked = far::locked(&Tier2::open(tier2)?).await?;
        found.extend(locked.into_iter().map(|(key, to)| ("tier 2".into(), key, to)));
    }
    print_table(&found, &own, args.files);
    Ok(())
}

fn print_table(found: &[(String, String, Vec<String>)], own: &[String], files: bool) {
    let opens = |recipients: &[String]| recipients.iter().any(|r| own.contains(r));
    let verdict = |recipients: &[String]| match opens(recipients) {
        true => "opened by the identity file",
        false => "NOT opened by the identity file",
    };
    if files {
        for (tier, path, recipients) in found {
            println!("{tier} {path}: for {}, {}", name(recipients), verdict(recipients));
        }
        return;
    }
    let mut groups: BTreeMap<(&str, &[String]), (usize, &str)> = BTreeMap::new();
    for (tier, path, recipients) in found {
        groups.entry((tier, recipients)).or_insert((0, path)).0 += 1;
    }
    for ((tier, recipients), (count, example)) in groups {
        println!(
            "{tier}: {count} files for {}, {}, such as {example}",
            name(recipients),
            verdict(recipients)
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_rotated_identity_file_has_the_new_one_first_and_is_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("identity");
        let (old, first) = keygen::generate();
        fs::write(&path, old.expose()).unwrap();
        let (new, second) = keygen::generate();
        replace_identity(&path, &new.before(&old)).unwrap();
        let keys = Keys::load(&path, &[]).unwrap();
        assert_eq!(keys.own(), [second.clone(), first]);
        assert_eq!(keys.recipients(), [second]);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    /// Regression test: a generation that only tier 2 has was left out, in silence.
    #[test]
    fn generations_that_only_tier_2_has_are_encrypted_again_and_other_clusters_are_told() {
        let named = |names: &[&str]| -> Vec<ClusterName> {
            names.iter().map(|name| ClusterName::parse_generation(name).unwrap()).collect()
        };
        let (ours, others) =
            shared(named(&["main@2", "near"]), named(&["main", "main@2", "main@3", "foreign"]));
        let text = |names: BTreeSet<ClusterName>| names.into_iter().map(String::from).collect();
        let ours: Vec<String> = text(ours);
        assert_eq!(ours, ["main", "main@2", "main@3", "near"]);
        let others: Vec<String> = text(others);
        assert_eq!(others, ["foreign"]);
    }

    /// Regression test: only generation 1 was looked at, so an identity that the current generation needs was said to
    /// be needed no longer.
    #[test]
    fn an_identity_that_a_later_generation_needs_is_still_needed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("identity");
        let (old, first) = keygen::generate();
        fs::write(&path, old.expose()).unwrap();
        let wrapped = Keys::load(&path, &[]).unwrap().wrap(b"secret").unwrap();
        let (new, _) = keygen::generate();
        replace_identity(&path, &new.before(&old)).unwrap();
        let root = dir.path().join("tier1");
        for place in ["main", "main@2", "not a cluster"] {
            fs::create_dir_all(root.join(place)).unwrap();
        }
        fs::write(root.join("main@2/repository.json.age"), wrapped).unwrap();
        let mut places = clusters(&root).unwrap();
        places.sort();
        assert_eq!(places.iter().map(ClusterName::as_str).collect::<Vec<_>>(), ["main", "main@2"]);
        let at_rest = AtRest::On(Keys::load(&path, &[]).unwrap());
        assert_eq!(still_needed(&root, &at_rest).unwrap(), BTreeMap::from([(first, 1)]));
    }
}
