//! Removes from a repository what no backup needs, and evicts from tier 1 what it need not keep.
//!
//! The order is: snapshots without a record, index entries for missing packs (ABSENT3), packs and indexes in two
//! phases (REPO4), then tier 1's copies.
//!
//! P13: if two packs hold the same chunks, both are opened before one of them may be removed, and one that opens
//! stays.
//! P5: a pack is evicted from tier 1 only after the one in tier 2 was read and has the SHA-256 of its name.

use super::{Ground, files::Both, orphans};
use crate::maintenance::protocol::{PruneJob, PruneResult, Step};
use anyhow::{Context, bail};
use klio_storage::{
    catalog::{BackupRecord, Damage, damage::pack_of},
    crash_point,
    layout::{BaseFile, BaseKind, BaseObject},
    record,
    repository::{Files, Repository, SnapshotId, Without},
    tier2::{Source, Wrapping},
};
use std::{collections::BTreeSet, sync::Arc, time::Duration};

pub(super) fn run(ground: &Ground, job: &PruneJob) -> anyhow::Result<PruneResult> {
    let mut result = PruneResult::default();
    let Some(secret) = ground.secret().context("read the repository's secret")? else {
        return Ok(result);
    };
    let files = Arc::new(Both::new(ground));
    let repository = Repository::open(files.clone(), &secret).context("open the repository")?;
    if job.prune {
        forget(ground, &repository, job, &mut result)?;
        crash_point!("prune.forgotten");
    }
    let mut damaged: BTreeSet<BaseFile> =
        job.damaged.iter().filter_map(|key| pack_of(&ground.cluster, key)).collect();
    // ABSENT1: a chunk that a damaged pack and another pack have is taken from the other one.
    let mut held = None;
    if job.prune {
        if let Some(why) = drop_absent(&repository, job)? {
            result.held_back.push(why);
            return Ok(result);
        }
        phase(ground, "open packs with duplicate content");
        let bad = repository.prove_duplicates().context("open packs with duplicate content")?;
        damaged.extend(bad.keys());
        result.bad = bad.into_iter().map(|(file, problem)| damage(ground, file, problem)).collect();
    }
    let knowing = repository.with_files(Arc::new(Without::new(files.clone(), damaged.clone())));
    if job.prune {
        held = drop_damaged(&knowing, &damaged)?;
    }
    if job.prune && held.is_none() {
        phase(ground, "look for packs that no backup needs");
        let keep = Duration::from_secs(job.keep_marked_seconds);
        let pruned = repository.prune(keep).context("prune the repository")?;
        crash_point!("prune.removed");
        result.packs_marked = pruned.packs_marked + pruned.packs_repacked;
        result.packs_removed = pruned.packs_removed;
    }
    let freed = files.freed();
    result.freed_tier1_bytes += freed.tier1;
    result.freed_tier2_bytes += freed.tier2;
    if let Some(near) = &job.near {
        evict(ground, &knowing, near, &damaged, &mut result)?;
    }
    result.held_back.extend(held);
    Ok(result)
}

/// Forgets the snapshots that no backup has.
fn forget(
    ground: &Ground,
    repository: &Repository,
    job: &PruneJob,
    result: &mut PruneResult,
) -> anyhow::Result<()> {
    phase(ground, "look for snapshots without a backup");
    let mut forget: BTreeSet<SnapshotId> = job.forget.iter().copied().collect();
    let recorded: BTreeSet<SnapshotId> = job.recorded.iter().copied().collect();
    let all = repository.snapshots().context("list snapshots")?;
    let known: BTreeSet<SnapshotId> = recorded.union(&forget).copied().collect();
    forget.extend(orphans::due(ground, &all, &known, job.now_unix, job.orphan_seconds)?);
    for (id, name) in orphans::asked_for(ground, &all, &forget)? {
        forget.remove(&id);
        result.held_back.push(format!(
            "snapshot {id} stays: the listing of backups left out the record of {name}, which exists; hint: check the bucket, whose listings are incomplete"
        ));
    }
    if let Some(needed) = job.recorded.iter().find(|id| forget.contains(id)) {
        bail!(
            "forget snapshot {needed}: expected a snapshot that no backup record names, found one that a backup needs"
        );
    }
    let committed = recorded_now(ground).context("read the records again")?;
    if let Some(needed) =
        committed.iter().find(|id| forget.contains(id) && !job.forget.contains(id))
    {
        bail!(
            "forget snapshot {needed}: expected a snapshot that no backup record names, found one that was just committed"
        );
    }
    let forget: Vec<SnapshotId> = forget.into_iter().collect();
    repository.forget(&forget).context("forget snapshots")
}

fn damage(ground: &Ground, file: BaseFile, problem: String) -> Damage {
    let key = file.key(&ground.cluster);
    tracing::error!(key, problem, "a pack with duplicate content is damaged");
    Damage { tier: "both".to_owned(), key, problem }
}

fn phase(ground: &Ground, text: &str) {
    ground.out.progress(Step { phase: text.to_owned(), ..Step::default() });
}

/// Corrects an index that names packs which are missing in both tiers, or not whole on tier 1. If a snapshot without a
/// record needs them, returns why the index was not corrected; that snapshot is removed when it is old enough.
fn drop_absent(repository: &Repository, job: &PruneJob) -> anyhow::Result<Option<String>> {
    let found = repository.drop_absent().context("look for missing packs that an index names")?;
    let count = found.absent;
    if let Some(id) = found.torn.iter().find(|id| job.recorded.contains(id)) {
        bail!(
            "prune the repository: expected every pack that the index names, found {count} not whole on tier 1, or in neither tier, and snapshot {id} needs them; hint: klio verify repairs them when the other tier has them, and names the backups; klio backup sends again what PostgreSQL still has"
        );
    }
    if let Some(id) = found.torn.first() {
        return Ok(Some(format!(
            "{count} packs are damaged and still referenced by the unfinished backup with snapshot {id}: not pruning until that expires, three days after it was first found without a record"
        )));
    }
    if count > 0 {
        tracing::warn!(
            count,
            "removed missing or incomplete packs from the index; no backup needs them"
        );
    }
    Ok(None)
}

/// Removes packs that are known to be damaged from the index, if every snapshot is whole without them. If one is not,
/// all packs stay and the reason is returned: of a chunk with two copies the prune would keep either one, which may be
/// the damaged one.
fn drop_damaged(
    knowing: &Repository,
    damaged: &BTreeSet<BaseFile>,
) -> anyhow::Result<Option<String>> {
    if damaged.is_empty() {
        return Ok(None);
    }
    let found = knowing.drop_absent().context("look for damaged packs that an index names")?;
    let (count, torn) = (found.absent, found.torn.len());
    if torn == 0 {
        if count > 0 {
            tracing::warn!(count, "removed damaged packs from the index; no backup needs them");
        }
        return Ok(None);
    }
    Ok(Some(format!(
        "{count} packs are damaged, with a good copy in no tier, and {torn} backups need them: no pack is removed until they are whole again or have expired; hint: klio verify names them; klio backup --full-read stores again what PostgreSQL still has"
    )))
}

/// The snapshots of every record on tier 1 at this moment. P6: a record that cannot be read stops the work.
fn recorded_now(ground: &Ground) -> anyhow::Result<BTreeSet<SnapshotId>> {
    let directory = ground.root.join(ground.cluster.as_str()).join("backups");
    let entries = match std::fs::read_dir(&directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
        Err(error) => return Err(error).with_context(|| format!("list {}", directory.display())),
    };
    let mut found = BTreeSet::new();
    for entry in entries {
        let path = entry.with_context(|| format!("list {}", directory.display()))?.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            let record: Option<BackupRecord> = record::load(ground.disk.as_ref(), &path)?;
            if let Some(record) = record {
                found.insert(record.snapshot.parse().context("read a snapshot's id")?);
            }
        }
    }
    Ok(found)
}

fn evict(
    ground: &Ground,
    repository: &Repository,
    near: &[SnapshotId],
    damaged: &BTreeSet<BaseFile>,
    result: &mut PruneResult,
) -> anyhow::Result<()> {
    let Some(tier2) = &ground.tier2 else { return Ok(()) };
    let needed = repository.packs_of(near).context("find what tier 1 keeps")?;
    let held = ground.local.list(BaseKind::Data).context("list tier 1")?;
    // A damaged pack cannot be proven; it stays on tier 1 for its good chunks.
    let goes = |file: &BaseFile| !needed.contains(file) && !damaged.contains(file);
    let going: Vec<(BaseFile, u64)> = held.into_iter().filter(|(file, _)| goes(file)).collect();
    let total_bytes = going.iter().map(|(_, size)| size).sum();
    let mut done_bytes = 0;
    for (number, (file, size)) in going.iter().enumerate() {
        ground.out.progress(Step {
            phase: "prove packs in tier 2 and evict tier 1's copies".into(),
            done_bytes,
            total_bytes,
            done_files: number as u64,
            total_files: going.len() as u64,
        });
        done_bytes += size;
        let object = BaseObject::File(*file);
        let source = Source {
            path: ground.local.path(*file),
            sha256: Some(file.id),
            zstd: false,
            plaintext_bytes: None,
            grows: false,
            wrapping: Wrapping::default(),
        };
        // P5, at this moment: reads tier 2's object and compares it, or uploads it if it is not there.
        let proven = ground.runtime.block_on(tier2.prove(&source, &object.key(&ground.cluster)));
        match proven {
            Ok(uploaded) if uploaded.size == *size && uploaded.sha256 == file.id => {
                crash_point!("evict.proven");
                ground.local.remove(*file).context("remove from tier 1")?;
                crash_point!("evict.removed");
                result.packs_evicted += 1;
                result.freed_tier1_bytes += size;
            }
            Ok(_) => result
                .held_back
                .push(format!("{object} stays on tier 1: tier 2 holds other content")),
            Err(error) => result.held_back.push(format!("{object} stays on tier 1: {error}")),
        }
        if result.held_back.len() > 20 {
            result.held_back.push("and more; tier 1 keeps the rest for now".into());
            return Ok(());
        }
    }
    result.evicted = true;
    Ok(())
}
