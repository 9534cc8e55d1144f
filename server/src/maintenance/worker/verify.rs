//! Reads what is stored in both tiers and verifies it: repository files against their names, records and secrets
//! against their checksums, the structure by the repository's own check, and WAL by `verify_wal.rs`.
//!
//! A copy that is bad, or missing where it must exist, is written again from a copy in the other tier that was proven
//! good a moment before, and then read once more. This is an exception to OBJECT4. An error that says nothing about
//! the data, such as a bucket that does not answer, ends the run. If the good copy has another form (encrypted or
//! not), its content is written in the form of the bad one.
//!
//! A pack that is read is also opened: every blob in it is decrypted, decompressed and compared with its name, and
//! with the index, which a restore relies on (`PackProof`). A percentage continues where the last run ended
//! (`Coverage`).
//!
//! What an earlier verification found damaged is read first, whatever the percentage. Packs without a good copy in
//! either tier are then left out of the repository: a backup needs such a pack only if no other pack has its content.

use super::{Ground, files::Telling, verify_wal};
use crate::maintenance::protocol::{Finding, Step, VerifyBackup, VerifyJob, VerifyResult};
use anyhow::Context;
use bytes::Bytes;
use klio_storage::{
    Error, Kind,
    catalog::{BackupRecord, Damage, coverage::Advance, damage::pack_of},
    disk::durable,
    layout::{BackupName, BaseFile, BaseKind, BaseObject},
    record,
    repository::{
        Files, PackProof, Progress, Repository, Secret, SnapshotId, Tiered, Without, decode_secret,
        secret_objects,
    },
    tier2::Sha256Sum,
    wal::Pinned,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tier {
    One,
    Two,
}

impl Tier {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Tier::One => "tier1",
            Tier::Two => "tier2",
        }
    }
}

/// A copy of an object in one tier.
pub(super) enum Copy {
    Good(Bytes),
    /// The copy is bad, for this reason.
    Bad(String),
    Missing,
}

/// Checks whether bytes are what they should be; the error says what is wrong.
pub(super) type Judge<'a> = &'a dyn Fn(&Bytes) -> Result<(), String>;

/// Makes a good copy from another source.
pub(super) type Instead<'a> = &'a mut dyn FnMut(&mut Checker<'_>) -> Result<Option<Bytes>, Error>;

/// The state of a verification, and what it has found so far.
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
    checker.cluster_files(job, &names)?;
    if let Some(secret) = checker.secret()? {
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

    /// Reads a copy and checks it.
    pub(super) fn copy(&mut self, tier: Tier, key: &str, judge: Judge<'_>) -> Result<Copy, Error> {
        self.ground.out.still();
        let read = match tier {
            Tier::One => {
                let path = self.ground.root.join(key);
                match std::fs::read(&path) {
                    Ok(bytes) => Ok(Bytes::from(bytes)),
                    Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Copy::Missing),
                    // If the disk cannot return the data, the copy counts as bad.
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

    /// Verifies an object in both tiers, and repairs one from the other. `expected` says in which tiers it must be.
    pub(super) fn prove(
        &mut self,
        key: &str,
        expected: [bool; 2],
        owners: &dyn Fn() -> Vec<BackupName>,
        judge: Judge<'_>,
    ) -> Result<(), Error> {
        self.prove_or(key, expected, owners, judge, &mut |_| Ok(None))
    }

    /// The same; if there is no good copy, `instead` may make one from another source.
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
                self.found(Finding { damage: damage(problem), backups: owners(), lost: true });
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
                    let damage = damage(problem);
                    let finding = Finding { damage, backups: owners(), lost: false };
                    self.result.repaired.push(finding);
                }
                Err(error) => {
                    let text = format!(
                        "{problem}; cannot repair it from the good copy in the other tier: {error}"
                    );
                    self.damaged(damage(text), owners());
                }
            }
        }
        Ok(())
    }

    pub(super) fn damaged(&mut self, damage: Damage, backups: Vec<BackupName>) {
        self.found(Finding { damage, backups, lost: false });
    }

    fn found(&mut self, finding: Finding) {
        let Damage { tier, key, problem } = &finding.damage;
        tracing::error!(key, tier, problem, "damaged object found");
        self.result.damaged.push(finding);
    }

    /// Writes a copy that was proven good over a bad one, durably, and reads it again.
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
                let directory = path.parent().unwrap_or(&self.ground.root);
                std::fs::create_dir_all(directory)
                    .map_err(|e| Error::io(klio_storage::Op::Create, directory, e))?;
                durable::overwrite(self.ground.disk.as_ref(), &path, good)?;
            }
        }
        match self.copy(tier, key, judge)? {
            Copy::Good(_) => Ok(()),
            Copy::Bad(problem) => {
                Err(Error::new(Kind::Corrupt, klio_storage::Op::Write, key, problem))
            }
            Copy::Missing => Err(Error::new(
                Kind::Io,
                klio_storage::Op::Write,
                key,
                "expected the repaired copy, found none",
            )),
        }
    }

    fn records(&mut self, backups: &[VerifyBackup]) -> Result<(), Error> {
        for backup in backups {
            let name = &backup.record.name;
            let key = name.record_key(&self.ground.cluster);
            let judge = |bytes: &Bytes| {
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

    /// Verifies `cluster.json` and the secret, in whichever form they exist. Both are in a tier before the first
    /// record is (BASE1, COPY1), so if a record exists and they do not, they are lost.
    fn cluster_files(&mut self, job: &VerifyJob, names: &[BackupName]) -> Result<(), Error> {
        let owners = || names.to_vec();
        let all = || job.backups.iter().chain(&job.others);
        let needed = [all().any(|b| b.tier1), all().any(|b| b.tier2)];
        let key = BaseObject::Cluster.key(&self.ground.cluster);
        let judge = |bytes: &Bytes| Pinned::decode(bytes, &key).map(drop).map_err(|e| e.detail);
        self.prove(&key, needed, &owners, &judge)?;
        let objects = secret_objects(&self.ground.at_rest);
        let keys = objects.each_ref().map(|object| object.key(&self.ground.cluster));
        let mut there = [[false; 2]; 2];
        for (key, there) in keys.iter().zip(&mut there) {
            for (tier, there) in [Tier::One, Tier::Two].into_iter().zip(there) {
                *there = !matches!(self.copy(tier, key, &|_| Ok(()))?, Copy::Missing);
            }
        }
        for (object, expected) in objects.into_iter().zip(forms_expected(there, needed)) {
            let key = object.key(&self.ground.cluster);
            let encrypted = matches!(object, BaseObject::Secret { encrypted: true });
            let at_rest = self.ground.at_rest.clone();
            let judge = |bytes: &Bytes| {
                let read = decode_secret(bytes, encrypted, &at_rest, &key);
                read.map(drop).map_err(|e| e.detail)
            };
            self.prove(&key, expected, &owners, &judge)?;
        }
        Ok(())
    }

    /// The secret of the repository; `None` if there is none, or if it was found damaged.
    fn secret(&self) -> anyhow::Result<Option<Secret>> {
        let keys = secret_objects(&self.ground.at_rest).map(|o| o.key(&self.ground.cluster));
        let told = self.result.damaged.iter().any(|finding| keys.contains(&finding.damage.key));
        match self.ground.secret() {
            Err(error) if told && matches!(error.kind, Kind::Corrupt | Kind::Denied) => Ok(None),
            other => other.context("read the repository's secret"),
        }
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
        let files: Arc<dyn Files> = Arc::new(Telling::new(files, &self.ground.out));
        self.phase("read the repository's small files");
        for kind in [BaseKind::Config, BaseKind::Key, BaseKind::Index, BaseKind::Snapshot] {
            for file in self.listed(kind)?.into_keys() {
                let owners = match kind {
                    BaseKind::Snapshot => of_snapshot(job, SnapshotId::new(file.id)),
                    _ => names.to_vec(),
                };
                // If some backups were requested, the snapshot of another backup is not part of their result.
                if !job.all && owners.is_empty() {
                    continue;
                }
                let judge = |bytes: &Bytes| match file.kind {
                    BaseKind::Config => opens(&files, secret, bytes),
                    _ => named(file, bytes),
                };
                let key = file.key(&self.ground.cluster);
                self.prove(&key, [false, false], &|| owners.clone(), &judge)?;
            }
        }
        let repository = match Repository::open(files.clone(), secret) {
            Ok(repository) => repository,
            Err(error) => {
                let key = BaseFile::CONFIG.key(&self.ground.cluster);
                let problem = format!("cannot open the repository: {error}");
                self.damaged(Damage { tier: "tier1".into(), key, problem }, names.to_vec());
                return Ok(());
            }
        };
        let needs = self.packs(job, &repository, &files)?;
        let repository = self.without_lost(&repository, &files);
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
            // If some backups were requested, damage that none of them needs is not part of their result.
            if !job.all && owners.is_empty() {
                continue;
            }
            let damage = Damage { tier: "both".into(), key, problem: problem.detail };
            self.damaged(damage, owners);
        }
        Ok(())
    }

    /// The files of a kind, with their size in each tier.
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

    /// The files that each of these backups needs. One whose structure cannot be read is reported by the check.
    fn needs<'b>(
        repository: &Repository,
        backups: impl Iterator<Item = &'b VerifyBackup>,
    ) -> Vec<Needs> {
        let of = |backup: &VerifyBackup| {
            let id: SnapshotId = backup.record.snapshot.parse().ok()?;
            let files = repository.packs_of(&[id]).ok()?;
            let (name, tier2) = (backup.record.name.clone(), backup.tier2);
            Some(Needs { name, tier2, files })
        };
        backups.filter_map(of).collect()
    }

    /// The packs that have no good copy in either tier.
    fn lost_packs(&self) -> BTreeSet<BaseFile> {
        let lost = self.result.damaged.iter().filter(|finding| finding.lost);
        lost.filter_map(|f| pack_of(&self.ground.cluster, &f.damage.key)).collect()
    }

    /// The repository without the packs that are known to be lost (ABSENT1).
    fn without_lost(&self, repository: &Repository, files: &Arc<dyn Files>) -> Repository {
        repository.with_files(Arc::new(Without::new(files.clone(), self.lost_packs())))
    }

    /// Reads the packs that were damaged before, and a percentage of the others. Returns what the backups need without
    /// the lost packs.
    fn packs(
        &mut self,
        job: &VerifyJob,
        repository: &Repository,
        files: &Arc<dyn Files>,
    ) -> Result<Vec<Needs>, Error> {
        let proof = repository.pack_proof()?;
        self.again(job, &proof)?;
        let needs = Self::needs(&self.without_lost(repository, files), job.backups.iter());
        self.share(job, &needs, &proof)?;
        if self.lost_packs().is_empty() {
            self.give_to_owners(&needs);
            return Ok(needs);
        }
        // Computed again without the packs that were found lost just now, and for all backups, because others may need
        // them as well.
        let all = job.backups.iter().chain(&job.others);
        let needs = Self::needs(&self.without_lost(repository, files), all);
        self.give_to_owners(&needs);
        Ok(needs)
    }

    /// Reads packs that an earlier verification found damaged. One that no longer exists is reported as missing by the
    /// check.
    fn again(&mut self, job: &VerifyJob, proof: &PackProof) -> Result<(), Error> {
        self.phase("read again what was found damaged");
        let cluster = &self.ground.cluster;
        let packs: Vec<BaseFile> =
            job.again.iter().filter_map(|key| pack_of(cluster, key)).collect();
        for file in &packs {
            let judge = |bytes: &Bytes| proof.check(*file, bytes);
            self.prove(&file.key(&self.ground.cluster), [false, false], &Vec::new, &judge)?;
        }
        let lost = self.lost_packs();
        let good = packs.into_iter().filter(|file| !lost.contains(file));
        self.result.disproved = good.map(|file| file.key(&self.ground.cluster)).collect();
        Ok(())
    }

    /// Sets for each finding in a pack which backups need it.
    fn give_to_owners(&mut self, needs: &[Needs]) {
        for finding in self.result.damaged.iter_mut().chain(&mut self.result.repaired) {
            let Some(file) = pack_of(&self.ground.cluster, &finding.damage.key) else { continue };
            finding.backups = owners(needs, file);
            if finding.lost && finding.backups.is_empty() {
                finding.damage.problem += "; no backup needs it";
            }
        }
    }

    fn share(&mut self, job: &VerifyJob, needs: &[Needs], proof: &PackProof) -> Result<(), Error> {
        let listed = self.listed(BaseKind::Data)?;
        let known = self.lost_packs();
        let archived = |file: &BaseFile| needs.iter().any(|n| n.tier2 && n.files.contains(file));
        let size = |(one, two): &(Option<u64>, Option<u64>)| one.or(*two).unwrap_or(0);
        // Packs that the listing alone shows to be wrong are always read.
        let odd = |file: &BaseFile, (one, two): &(Option<u64>, Option<u64>)| {
            one.zip(*two).is_some_and(|(one, two)| one != two) || two.is_none() && archived(file)
        };
        let mut chosen: BTreeMap<BaseFile, u64> = BTreeMap::new();
        chosen.extend(listed.iter().filter(|(f, s)| odd(f, s)).map(|(f, s)| (*f, size(s))));
        let all: Vec<(BaseFile, u64)> = listed.iter().map(|(f, s)| (*f, size(s))).collect();
        let mut advance = Advance::default();
        if job.read_percent >= 100.0 {
            let needed = |file: &BaseFile| needs.iter().any(|n| n.files.contains(file));
            chosen.extend(all.iter().filter(|(file, _)| job.all || needed(file)).copied());
            if job.all {
                advance = Advance { began: true, came_round: true, last_read: None };
            }
        } else {
            let (turn, passed) = next_share(&all, job.read_percent, job.read_after);
            chosen.extend(turn.iter().copied());
            advance = passed;
        }
        chosen.retain(|file, _| !known.contains(file));
        self.phase("read packs");
        self.step.total_bytes = chosen.values().sum();
        self.step.total_files = chosen.len() as u64;
        for (file, size) in chosen {
            let key = file.key(&self.ground.cluster);
            let judge = |bytes: &Bytes| proof.check(file, bytes);
            self.prove(&key, [false, archived(&file)], &Vec::new, &judge)?;
            self.done(size);
        }
        self.result.advance = advance;
        Ok(())
    }
}

/// The packs whose turn it is, in the order of their names: those after the last one read, until their sizes reach the
/// percentage of all bytes. A run ends at the last pack, so that what it has verified is one contiguous range.
fn next_share(
    all: &[(BaseFile, u64)],
    percent: f64,
    after: Option<Sha256Sum>,
) -> (&[(BaseFile, u64)], Advance) {
    let total: u64 = all.iter().map(|(_, size)| size).sum();
    let wanted = total as f64 * percent.clamp(0.0, 100.0) / 100.0;
    if wanted <= 0.0 {
        return (&[], Advance::default());
    }
    let from = after.map_or(0, |last| all.partition_point(|(file, _)| file.id <= last));
    // The packs after the last one read no longer exist, so the pass is complete and the next one begins.
    let from = if from == all.len() { 0 } else { from };
    let mut count = 0;
    let mut bytes = 0.0;
    while from + count < all.len() && bytes < wanted {
        bytes += all[from + count].1 as f64;
        count += 1;
    }
    let turn = &all[from..from + count];
    let advance = Advance {
        began: from == 0,
        came_round: from + count == all.len(),
        last_read: turn.last().map(|(file, _)| file.id),
    };
    (turn, advance)
}

/// Decides which form of the secret each tier must have. The argument says which exist, as `[form][tier]`. A tier that needs the
/// secret must have it in one form; if it has neither, the form that the other tier has is expected, so that it can be copied
/// from there.
fn forms_expected(there: [[bool; 2]; 2], needed: [bool; 2]) -> [[bool; 2]; 2] {
    let mut expected = [[false; 2]; 2];
    for tier in [0, 1] {
        if needed[tier] && !there[0][tier] && !there[1][tier] {
            let form = usize::from(!there[0][1 - tier] && there[1][1 - tier]);
            expected[form][tier] = true;
        }
    }
    expected
}

/// Files, with their sizes in tier 1 and tier 2.
type Listing = BTreeMap<BaseFile, (Option<u64>, Option<u64>)>;

/// What a backup needs of the repository.
struct Needs {
    name: BackupName,
    tier2: bool,
    files: BTreeSet<BaseFile>,
}

/// The backups of a snapshot; usually one.
fn of_snapshot(job: &VerifyJob, snapshot: SnapshotId) -> Vec<BackupName> {
    let own = |b: &&VerifyBackup| b.record.snapshot.parse() == Ok(snapshot);
    job.backups.iter().filter(own).map(|b| b.record.name.clone()).collect()
}

fn owners(needs: &[Needs], file: BaseFile) -> Vec<BackupName> {
    needs.iter().filter(|n| n.files.contains(&file)).map(|n| n.name.clone()).collect()
}

/// REPO2: a file's name is the SHA-256 of its bytes.
fn named(file: BaseFile, bytes: &[u8]) -> Result<(), String> {
    let found = Sha256Sum::of(bytes);
    match found == file.id {
        true => Ok(()),
        false => {
            Err(format!("expected the SHA-256 of its name, found {found} of {} bytes", bytes.len()))
        }
    }
}

/// The config's name is no checksum, so the config is checked by opening the repository with its secret.
fn opens(files: &Arc<dyn Files>, secret: &Secret, bytes: &[u8]) -> Result<(), String> {
    let only = Arc::new(OnlyConfig { files: files.clone(), config: Bytes::copy_from_slice(bytes) });
    Repository::open(only, secret).map(drop).map_err(|error| error.detail)
}

/// A repository that has these bytes as its config.
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

#[cfg(test)]
mod tests {
    use super::*;

    /// This must hold for any percentage, and whatever packs appear and disappear between two runs.
    #[test]
    fn every_pack_is_read_in_turn() {
        let pack = |n: u32| {
            let id = Sha256Sum::of(&n.to_le_bytes());
            (BaseFile { kind: BaseKind::Data, id }, 10 + u64::from(n % 7))
        };
        let mut all: Vec<_> = (0..100).map(pack).collect();
        all.sort();
        for percent in [0.1, 7.0, 10.0, 33.0, 99.0] {
            let (mut read, mut after, mut runs) = (BTreeSet::new(), None, 0);
            loop {
                let (turn, advance) = next_share(&all, percent, after);
                assert_eq!(advance.began, runs == 0);
                assert!(!turn.is_empty());
                read.extend(turn.iter().copied());
                (after, runs) = (advance.last_read, runs + 1);
                if advance.came_round {
                    break;
                }
            }
            assert_eq!(read.len(), 100);
            assert!(runs <= (100.0 / percent).ceil() as usize, "{runs} runs of {percent} %");
        }
        // The pack that was read last was removed, and so were all after it.
        let last = all[60].0.id;
        let fewer: Vec<_> = all[..60].to_vec();
        assert!(next_share(&fewer, 10.0, Some(last)).1.began);
        assert_eq!(next_share(&all, 0.0, Some(last)), (&[][..], Advance::default()));
        assert_eq!(next_share(&[], 10.0, None), (&[][..], Advance::default()));
        assert_eq!(next_share(&all, 10.0, Some(last)).0[0], all[61]);
    }

    #[test]
    fn a_tier_with_records_must_have_the_secret_in_one_of_its_forms() {
        let both = [true, true];
        let [none, one, two] = [[false, false], [true, false], [false, true]];
        assert_eq!(forms_expected([none, none], [false, false]), [none, none]);
        assert_eq!(forms_expected([none, none], both), [both, none]);
        assert_eq!(forms_expected([none, none], one), [one, none]);
        // Each tier may have its own form, from different times.
        assert_eq!(forms_expected([one, two], both), [none, none]);
        // What the other tier has can be written again.
        assert_eq!(forms_expected([none, one], both), [none, two]);
        assert_eq!(forms_expected([two, none], both), [one, none]);
        assert_eq!(forms_expected([two, none], two), [none, none]);
    }
}
