//! Reads what is stored in both tiers and proves it: repository files against their names, records and
//! secrets against their checksums, the structure by the repository's own check, WAL by `verify_wal.rs`.
//!
//! A copy that is proven bad, or missing where it must be, is written again from a copy in the other tier
//! that was proven good a moment before, and read once more: an exception to U4. What cannot be
//! read for other reasons (a bucket that does not answer) ends the run: it says nothing about the data.
//! Where the good copy has another form (encrypted or not), what it holds is written in the form of the bad one.

use super::{Ground, verify_wal};
use crate::maintenance::protocol::{Finding, Step, VerifyBackup, VerifyJob, VerifyResult};
use anyhow::Context;
use bytes::Bytes;
use klio_storage::{
    Error, Kind,
    catalog::{BackupRecord, Damage},
    disk::durable,
    layout::{BackupName, BaseFile, BaseKind, BaseObject},
    record,
    repository::{
        Files, Progress, Repository, Secret, SnapshotId, Tiered, decode_secret, secret_objects,
    },
    tier2::Sha256Sum,
    wal::Pinned,
};
use rand::seq::SliceRandom;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

/// A tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tier {
    One,
    Two,
}

impl Tier {
    const fn name(self) -> &'static str {
        match self {
            Tier::One => "tier1",
            Tier::Two => "tier2",
        }
    }
}

/// A copy of an object in a tier.
pub(super) enum Copy {
    Good(Bytes),
    /// Why it is bad.
    Bad(String),
    Missing,
}

/// Whether bytes are what they should be; the text says what is wrong.
pub(super) type Judge<'a> = &'a dyn Fn(&[u8]) -> Result<(), String>;

/// Makes a good copy of something else.
pub(super) type Instead<'a> = &'a mut dyn FnMut(&mut Checker<'_>) -> Result<Option<Bytes>, Error>;

/// What has been found so far.
pub(super) struct Checker<'a> {
    pub(super) ground: &'a Ground,
    pub(super) result: VerifyResult,
    pub(super) step: Step,
}

pub(super) fn run(ground: &Ground, job: &VerifyJob) -> anyhow::Result<VerifyResult> {
    let mut checker = Checker { ground, result: VerifyResult::default(), step: Step::default() };
    let names: Vec<BackupName> = job.backups.iter().map(|b| b.record.name.clone()).collect();
    checker.phase("read records and secrets");
    checker.records(&job.backups)?;
    checker.cluster_files(&names)?;
    if let Some(secret) = checker.ground.secret().context("read the repository's secret")? {
        checker.repository(job, &secret, &names)?;
    }
    verify_wal::run(&mut checker, job)?;
    Ok(checker.result)
}

impl Checker<'_> {
    pub(super) fn phase(&mut self, phase: &str) {
        self.step = Step { phase: phase.to_owned(), ..Step::default() };
        self.ground.out.progress(self.step.clone());
    }

    pub(super) fn done(&mut self, bytes: u64) {
        self.step.done_bytes += bytes;
        self.step.done_files += 1;
        self.ground.out.progress(self.step.clone());
    }

    /// Reads a copy and judges it.
    pub(super) fn copy(&mut self, tier: Tier, key: &str, judge: Judge<'_>) -> Result<Copy, Error> {
        let read = match tier {
            Tier::One => {
                let path = self.ground.root.join(key);
                match std::fs::read(&path) {
                    Ok(bytes) => Ok(Bytes::from(bytes)),
                    Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Copy::Missing),
                    // A disk that cannot give it back has lost it.
                    Err(e) => return Ok(Copy::Bad(format!("cannot be read: {e}"))),
                }
            }
            Tier::Two => {
                let Some(tier2) = &self.ground.tier2 else { return Ok(Copy::Missing) };
                self.ground.runtime.block_on(async { tier2.download(key).await?.whole().await })
            }
        };
        let bytes = match read {
            Ok(bytes) => bytes,
            Err(error) if error.kind == Kind::NotFound => return Ok(Copy::Missing),
            Err(error) if error.kind == Kind::Corrupt => return Ok(Copy::Bad(error.detail)),
            Err(error) => return Err(error),
        };
        self.result.files += 1;
        self.result.read_bytes += bytes.len() as u64;
        Ok(match judge(&bytes) {
            Ok(()) => Copy::Good(bytes),
            Err(problem) => Copy::Bad(problem),
        })
    }

    /// Proves an object in both tiers, and repairs one from the other. `expected` says where it must be.
    pub(super) fn prove(
        &mut self,
        key: &str,
        expected: [bool; 2],
        owners: &dyn Fn() -> Vec<BackupName>,
        judge: Judge<'_>,
    ) -> Result<(), Error> {
        self.prove_or(key, expected, owners, judge, &mut |_| Ok(None))
    }

    /// The same; when there is no good copy, `instead` may make one of something else.
    pub(super) fn prove_or(
        &mut self,
        key: &str,
        expected: [bool; 2],
        owners: &dyn Fn() -> Vec<BackupName>,
        judge: Judge<'_>,
        instead: Instead<'_>,
    ) -> Result<(), Error> {
        let tiers = [Tier::One, Tier::Two];
        let [one, two] = [self.copy(Tier::One, key, judge)?, self.copy(Tier::Two, key, judge)?];
        let copies = [one, two];
        let mut good = copies.iter().find_map(|copy| match copy {
            Copy::Good(bytes) => Some(bytes.clone()),
            _ => None,
        });
        let wrong = |(copy, expected): (&Copy, bool)| match copy {
            Copy::Good(_) => false,
            Copy::Bad(_) => true,
            Copy::Missing => expected,
        };
        if good.is_none() && copies.iter().zip(expected).any(wrong) {
            good = instead(self)?.filter(|bytes| judge(bytes).is_ok());
        }
        for ((tier, copy), expected) in tiers.into_iter().zip(&copies).zip(expected) {
            let problem = match copy {
                Copy::Good(_) => continue,
                Copy::Missing if !expected => continue,
                Copy::Missing => "missing".to_owned(),
                Copy::Bad(problem) => problem.clone(),
            };
            let damage = |problem: String| Damage {
                tier: tier.name().to_owned(),
                key: key.to_owned(),
                problem,
            };
            let Some(good) = &good else {
                self.damaged(damage(problem), owners());
                continue;
            };
            match self.repair(tier, key, good, judge) {
                Ok(()) => {
                    tracing::warn!(
                        key,
                        tier = tier.name(),
                        problem,
                        "repaired from the other tier"
                    );
                    let finding = Finding { damage: damage(problem), backups: owners() };
                    self.result.repaired.push(finding);
                }
                Err(error) => {
                    let text = format!(
                        "{problem}; writing the good copy of the other tier failed: {error}"
                    );
                    self.damaged(damage(text), owners());
                }
            }
        }
        Ok(())
    }

    pub(super) fn damaged(&mut self, damage: Damage, backups: Vec<BackupName>) {
        tracing::error!(key = damage.key, tier = damage.tier, problem = damage.problem, "damaged");
        self.result.damaged.push(Finding { damage, backups });
    }

    /// Writes a proven copy over a proven-bad one, durably, and reads it back.
    fn repair(
        &mut self,
        tier: Tier,
        key: &str,
        good: &Bytes,
        judge: Judge<'_>,
    ) -> Result<(), Error> {
        match (tier, &self.ground.tier2) {
            (Tier::Two, Some(tier2)) => {
                self.ground.runtime.block_on(tier2.replace(key, good.clone()))?;
            }
            (Tier::Two, None) => {}
            (Tier::One, _) => {
                let path = self.ground.root.join(key);
                let folder = path.parent().unwrap_or(&self.ground.root);
                std::fs::create_dir_all(folder)
                    .map_err(|e| Error::io(klio_storage::Op::Create, folder, e))?;
                durable::overwrite(self.ground.disk.as_ref(), &path, good)?;
            }
        }
        match self.copy(tier, key, judge)? {
            Copy::Good(_) => Ok(()),
            Copy::Bad(problem) => {
                Err(Error::new(Kind::Corrupt, klio_storage::Op::Write, key, problem))
            }
            Copy::Missing => {
                Err(Error::new(Kind::Io, klio_storage::Op::Write, key, "not there afterwards"))
            }
        }
    }

    fn records(&mut self, backups: &[VerifyBackup]) -> Result<(), Error> {
        for backup in backups {
            let name = &backup.record.name;
            let key = name.record_key(&self.ground.cluster);
            let judge = |bytes: &[u8]| {
                let read: BackupRecord = record::decode(bytes, &key).map_err(|e| e.detail)?;
                match read.name == *name {
                    true => Ok(()),
                    false => {
                        Err(format!("expected the record of {name}, found that of {}", read.name))
                    }
                }
            };
            self.prove(&key, [backup.tier1, backup.tier2], &|| vec![name.clone()], &judge)?;
        }
        Ok(())
    }

    /// `cluster.json` and the secret, in whichever form they are there.
    fn cluster_files(&mut self, names: &[BackupName]) -> Result<(), Error> {
        let owners = || names.to_vec();
        let key = BaseObject::Cluster.key(&self.ground.cluster);
        let judge = |bytes: &[u8]| Pinned::decode(bytes, &key).map(drop).map_err(|e| e.detail);
        self.prove(&key, [false, false], &owners, &judge)?;
        for object in secret_objects(&self.ground.at_rest) {
            let key = object.key(&self.ground.cluster);
            let encrypted = matches!(object, BaseObject::Secret { encrypted: true });
            let at_rest = self.ground.at_rest.clone();
            let judge = |bytes: &[u8]| {
                let read = decode_secret(bytes, encrypted, &at_rest, &key);
                read.map(drop).map_err(|e| e.detail)
            };
            self.prove(&key, [false, false], &owners, &judge)?;
        }
        Ok(())
    }

    fn repository(
        &mut self,
        job: &VerifyJob,
        secret: &Secret,
        names: &[BackupName],
    ) -> anyhow::Result<()> {
        let near: Arc<dyn Files> = self.ground.local.clone();
        let files: Arc<dyn Files> = match &self.ground.bucket {
            Some(bucket) => Arc::new(Tiered::new(near, bucket.clone())),
            None => near,
        };
        self.phase("read the repository's small files");
        for kind in [BaseKind::Config, BaseKind::Key, BaseKind::Index, BaseKind::Snapshot] {
            for file in self.listed(kind)?.into_keys() {
                let owners = match kind {
                    BaseKind::Snapshot => of_snapshot(job, SnapshotId::new(file.id)),
                    _ => names.to_vec(),
                };
                // Asked for some backups, another one's snapshot is not their damage.
                if !job.all && owners.is_empty() {
                    continue;
                }
                let judge = |bytes: &[u8]| match file.kind {
                    BaseKind::Config => opens(&files, secret, bytes),
                    _ => named(file, bytes),
                };
                let key = file.key(&self.ground.cluster);
                self.prove(&key, [false, false], &|| owners.clone(), &judge)?;
            }
        }
        let repository = match Repository::open(files, secret) {
            Ok(repository) => repository,
            Err(error) => {
                let key = BaseFile::CONFIG.key(&self.ground.cluster);
                let problem = format!("the repository cannot be opened: {error}");
                self.damaged(Damage { tier: "tier1".into(), key, problem }, names.to_vec());
                return Ok(());
            }
        };
        let needs = self.needs(&repository, job);
        self.packs(job, &needs)?;
        self.phase("check the repository's structure");
        let progress: Arc<dyn Progress> = Arc::new(klio_storage::repository::Silent);
        let problems = repository.check(0.0, &progress).context("check the repository")?;
        let known: BTreeSet<String> =
            self.result.damaged.iter().map(|finding| finding.damage.key.clone()).collect();
        for problem in problems {
            let key = problem.file.map_or_else(
                || format!("{}/base", self.ground.cluster),
                |file| file.key(&self.ground.cluster),
            );
            if problem.file.is_some() && known.contains(&key) {
                continue;
            }
            let owners = match (problem.snapshot, problem.file) {
                (Some(snapshot), _) => of_snapshot(job, snapshot),
                (None, Some(file)) if file.kind == BaseKind::Data => owners(&needs, file),
                _ => names.to_vec(),
            };
            // Asked for some backups, what none of them needs is not their damage.
            if !job.all && owners.is_empty() {
                continue;
            }
            let damage = Damage { tier: "both".into(), key, problem: problem.detail };
            self.damaged(damage, owners);
        }
        Ok(())
    }

    /// Files of a kind over both tiers, and in which they are.
    fn listed(&self, kind: BaseKind) -> Result<Listing, Error> {
        let mut all = Listing::new();
        for (file, size) in self.ground.local.list(kind)? {
            all.entry(file).or_default().0 = Some(size);
        }
        if let Some(bucket) = &self.ground.bucket {
            for (file, size) in bucket.list(kind)? {
                all.entry(file).or_default().1 = Some(size);
            }
        }
        Ok(all)
    }

    /// The files that each backup needs; one whose structure cannot be read is a finding of the check.
    fn needs(&self, repository: &Repository, job: &VerifyJob) -> Vec<Needs> {
        let of = |backup: &VerifyBackup| {
            let id: SnapshotId = backup.record.snapshot.parse().ok()?;
            let files = repository.packs_of(&[id]).ok()?;
            let (name, tier2) = (backup.record.name.clone(), backup.tier2);
            Some(Needs { name, tier2, files })
        };
        job.backups.iter().filter_map(of).collect()
    }

    fn packs(&mut self, job: &VerifyJob, needs: &[Needs]) -> Result<(), Error> {
        let listed = self.listed(BaseKind::Data)?;
        let needed = |file: &BaseFile| needs.iter().any(|n| n.files.contains(file));
        let archived = |file: &BaseFile| needs.iter().any(|n| n.tier2 && n.files.contains(file));
        // Whatever is proven by the listing alone to be wrong is read; of the rest, a share.
        let mut chosen: Vec<(BaseFile, u64)> = Vec::new();
        let mut rest = Vec::new();
        for (file, (one, two)) in &listed {
            let size = one.or(*two).unwrap_or(0);
            let differ = one.zip(*two).is_some_and(|(one, two)| one != two);
            let lost = two.is_none() && archived(file);
            if differ || lost {
                chosen.push((*file, size));
            } else if job.all || needed(file) {
                rest.push((*file, size));
            }
        }
        rest.shuffle(&mut rand::rng());
        let total: u64 = rest.iter().map(|(_, size)| size).sum();
        let mut left = total as f64 * job.read_percent.clamp(0.0, 100.0) / 100.0;
        for (file, size) in rest {
            if left <= 0.0 {
                break;
            }
            left -= size as f64;
            chosen.push((file, size));
        }
        self.phase("read packs");
        self.step.total_bytes = chosen.iter().map(|(_, size)| size).sum();
        self.step.total_files = chosen.len() as u64;
        for (file, size) in chosen {
            let key = file.key(&self.ground.cluster);
            let judge = |bytes: &[u8]| named(file, bytes);
            self.prove(&key, [false, archived(&file)], &|| owners(needs, file), &judge)?;
            self.done(size);
        }
        Ok(())
    }
}

/// Files, and their sizes in tier 1 and tier 2.
type Listing = BTreeMap<BaseFile, (Option<u64>, Option<u64>)>;

/// What a backup needs of the repository.
struct Needs {
    name: BackupName,
    tier2: bool,
    files: BTreeSet<BaseFile>,
}

/// The backups of a snapshot: one, as a rule.
fn of_snapshot(job: &VerifyJob, snapshot: SnapshotId) -> Vec<BackupName> {
    let own = |b: &&VerifyBackup| b.record.snapshot.parse() == Ok(snapshot);
    job.backups.iter().filter(own).map(|b| b.record.name.clone()).collect()
}

fn owners(needs: &[Needs], file: BaseFile) -> Vec<BackupName> {
    needs.iter().filter(|n| n.files.contains(&file)).map(|n| n.name.clone()).collect()
}

/// R2: a file's name is the SHA-256 of its bytes.
fn named(file: BaseFile, bytes: &[u8]) -> Result<(), String> {
    let found = Sha256Sum::of(bytes);
    match found == file.id {
        true => Ok(()),
        false => {
            Err(format!("expected the SHA-256 of its name, found {found} of {} bytes", bytes.len()))
        }
    }
}

/// The config's name says nothing: the repository's key must open it.
fn opens(files: &Arc<dyn Files>, secret: &Secret, bytes: &[u8]) -> Result<(), String> {
    let only = Arc::new(OnlyConfig { files: files.clone(), config: Bytes::copy_from_slice(bytes) });
    Repository::open(only, secret).map(drop).map_err(|error| error.detail)
}

/// A repository with these bytes as its config.
#[derive(Debug)]
struct OnlyConfig {
    files: Arc<dyn Files>,
    config: Bytes,
}

#[deny(clippy::missing_trait_methods)]
impl Files for OnlyConfig {
    fn place(&self) -> String {
        self.files.place()
    }
    fn list(&self, kind: BaseKind) -> Result<Vec<(BaseFile, u64)>, Error> {
        self.files.list(kind)
    }
    fn read(&self, file: BaseFile) -> Result<Bytes, Error> {
        match file.kind {
            BaseKind::Config => Ok(self.config.clone()),
            _ => self.files.read(file),
        }
    }
    fn read_range(&self, file: BaseFile, offset: u64, length: u64) -> Result<Bytes, Error> {
        self.files.read_range(file, offset, length)
    }
    fn write(&self, file: BaseFile, _: &[Bytes]) -> Result<(), Error> {
        Err(Error::new(Kind::Denied, klio_storage::Op::Write, file.relative(), "reading only"))
    }
    fn remove(&self, file: BaseFile) -> Result<(), Error> {
        Err(Error::new(Kind::Denied, klio_storage::Op::Remove, file.relative(), "reading only"))
    }
}
