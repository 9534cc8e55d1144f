//! Verifies what is stored, and stores the result for each backup.
//!
//! Damage that was found stays recorded until it is disproved. What an earlier verification found and could not repair
//! is read again, whatever the percentage, so a run that reads less either confirms it or finds it good. A finding
//! that also concerns another backup is recorded for that one, too.

use super::{
    Inner,
    child::Tell,
    protocol::{Archived, Finding, Step, VerifyBackup, VerifyJob, VerifyResult},
};
use crate::{base::ListedBackup, errors, rot};
use klio_pg::SegmentSize;
use klio_proto::Code;
use klio_storage::{
    Kind,
    catalog::{
        BackupRecord, Damage, Holdings, KnownDamage, VerifyOutcome,
        damage::pack_of,
        outcomes,
        recovery::{Hole, Path},
    },
    layout::{BackupName, BaseObject, ClusterName, WalFile},
    wal::LevelChange,
};
use std::collections::BTreeSet;
use tonic::Status;

/// What to verify.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// `None`: every backup.
    pub backup: Option<BackupName>,
    /// The percentage of packs that is read, 0 to 100.
    pub read_percent: f64,
    /// Whether to read the same percentage of the WAL after the backups.
    pub wal: bool,
}

impl Inner {
    /// Records stretches of `wal_level = minimal` in WAL that an earlier version received; they count as holes from
    /// now on.
    async fn learn_levels(
        &self,
        cluster: &ClusterName,
        found: Vec<LevelChange>,
    ) -> Result<(), Status> {
        if found.is_empty() {
            return Ok(());
        }
        let (store, name) = (self.base.wal().clone(), cluster.clone());
        let added = tokio::task::spawn_blocking(move || store.add_levels(&name, &found)).await;
        let added = added.map_err(|e| Code::Internal.status(format!("note WAL levels: {e}")))?;
        if added.map_err(|e| errors::status(&e))? {
            self.base.announce(cluster, BaseObject::WalLevels, 0);
        }
        Ok(())
    }

    /// Sets aside damaged WAL files of tier 1 that could not be repaired from a copy, so that they are requested
    /// again.
    async fn doubt_damaged(&self, cluster: &ClusterName, result: &VerifyResult) {
        let wal = format!("{}/", wal_key(cluster));
        let local = result.damaged.iter().map(|finding| &finding.damage);
        let files: BTreeSet<WalFile> = local
            .filter(|damage| damage.tier == "tier1")
            .filter_map(|damage| damage.key.strip_prefix(&wal).and_then(WalFile::parse_stored))
            .map(|(file, _)| file)
            .collect();
        for file in files {
            let (store, name) = (self.base.wal().clone(), cluster.clone());
            rot::put_aside(cluster, file, move || store.doubt(&name, file)).await;
        }
    }

    pub(super) async fn verify(
        &self,
        cluster: &ClusterName,
        request: &Request,
        tell: Tell<'_>,
    ) -> Result<VerifyOutcome, Status> {
        tell(Step { phase: "wait for other maintenance".into(), ..Step::default() });
        let _turn = self.turns.take(cluster).await;
        let (began, began_unix) = (tokio::time::Instant::now(), self.base.now_unix());
        let listed = self.base.backups(cluster).await?;
        let chosen = choose(cluster, &listed.backups, request)?;
        let known = self.known_damage(cluster).await?;
        let again = again(&chosen, &known);
        let holdings = self.holdings_now(cluster).await?;
        // A recorded hole stays recorded until a check over all backups no longer finds it.
        let had_holes = known.others.iter().any(|d| d.key == wal_key(cluster));
        let scope = if had_holes { &listed.backups } else { &chosen };
        let looks = request.wal || had_holes || again.iter().any(|key| is_wal(cluster, key));
        let lost = if looks { self.lost(cluster, scope, &holdings).await? } else { Vec::new() };
        let names: BTreeSet<&BackupName> = chosen.iter().map(|b| &b.record.name).collect();
        let others = listed.backups.iter().filter(|b| !names.contains(&b.record.name));
        let others: Vec<ListedBackup> = others.cloned().collect();
        let all = request.backup.is_none();
        let coverage = self.base.coverage(cluster).await?;
        let job = VerifyJob {
            read_after: coverage.last_read,
            ..self.job(cluster, &chosen, &others, again, request)
        };
        let result = self.read_back(cluster, job, tell).await?;
        self.learn_levels(cluster, result.levels.clone()).await?;
        self.doubt_damaged(cluster, &result).await;
        let coverage = coverage.after(&result.advance, began_unix);
        self.base.keep_coverage(cluster, coverage).await?;
        self.metrics.covered(cluster, &coverage);
        // Listed again, because a record that could not be read may be good by now.
        let problems = self.base.backups(cluster).await?.problems;
        let mut result = complete(cluster, result, &chosen, &holdings, &problems);
        result.damaged.extend(lost.into_iter().map(|hole| of_no_backup(cluster, &hole)));
        let seconds = began.elapsed().as_secs_f64();
        self.learn(cluster, &result, all).await?;
        for other in &others {
            self.tell_other(cluster, other, &result).await?;
        }
        // If some backups were requested, damage that none of them needs is not part of their result.
        let is_theirs = |finding: &Finding| {
            let is_pack = pack_of(cluster, &finding.damage.key).is_some();
            all || finding.backups.iter().any(|name| names.contains(name))
                || finding.backups.is_empty() && !is_pack
        };
        result.damaged.retain(is_theirs);
        // A percentage counts over all packs, so a repair is reported whoever needs the pack.
        result.repaired.retain(|finding| request.read_percent < 100.0 || is_theirs(finding));
        let outcome =
            |backups: Vec<BackupName>, damaged: Vec<Damage>, repaired: Vec<Damage>| VerifyOutcome {
                backups,
                ok: damaged.is_empty(),
                finished_unix: self.base.now_unix(),
                duration_seconds: seconds,
                read_percent: request.read_percent,
                all_read_since_unix: coverage.all_read_since_unix,
                read_bytes: result.read_bytes,
                files: result.files,
                damaged,
                repaired,
            };
        for backup in &chosen {
            let name = &backup.record.name;
            let own = |findings: &[Finding]| damage_of(findings, |f| f.backups.contains(name));
            let own = outcome(vec![name.clone()], own(&result.damaged), own(&result.repaired));
            self.keep_outcome(cluster, own).await?;
        }
        let all = |findings: &[Finding]| damage_of(findings, |_| true);
        let names = names.into_iter().cloned().collect();
        let outcome = outcome(names, all(&result.damaged), all(&result.repaired));
        self.metrics.verified(cluster, &outcome);
        for damage in &outcome.damaged {
            tracing::error!(%cluster, tier = damage.tier, key = damage.key, problem = damage.problem, "damaged object found");
        }
        for damage in &outcome.repaired {
            tracing::warn!(%cluster, tier = damage.tier, key = damage.key, problem = damage.problem, "damaged object repaired from the other tier");
        }
        Ok(outcome)
    }

    /// What both tiers hold by a new listing.
    pub(super) async fn holdings_now(&self, cluster: &ClusterName) -> Result<Holdings, Status> {
        self.base.forget_wal_listing(cluster);
        self.base.holdings(cluster).await
    }

    /// WAL after the backups that neither tier has. A file that is sealed between two listings may be in neither of
    /// them, so it counts only if it is missing twice.
    async fn lost(
        &self,
        cluster: &ClusterName,
        backups: &[ListedBackup],
        holdings: &Holdings,
    ) -> Result<Vec<Hole>, Status> {
        let records = || backups.iter().map(|backup| &backup.record);
        let mut lost = lost(holdings, records());
        if !lost.is_empty() {
            let again = self::lost(&self.holdings_now(cluster).await?, records());
            lost.retain(|hole| again.contains(hole));
        }
        Ok(lost)
    }

    fn job(
        &self,
        cluster: &ClusterName,
        chosen: &[ListedBackup],
        others: &[ListedBackup],
        again: BTreeSet<String>,
        request: &Request,
    ) -> VerifyJob {
        let pinned = self.base.wal().pinned(cluster);
        let on_disk = |name: &BackupName| {
            let path = self.base.path(cluster, &BaseObject::Record(name.clone()));
            self.base.disk().stat(&path).is_ok()
        };
        let backup = |b: &ListedBackup| VerifyBackup {
            tier1: on_disk(&b.record.name),
            tier2: b.tier2,
            record: b.record.clone(),
        };
        VerifyJob {
            backups: chosen.iter().map(backup).collect(),
            others: others.iter().map(backup).collect(),
            again,
            all: request.backup.is_none(),
            read_percent: request.read_percent,
            read_after: None,
            wal: request.wal,
            archived: self.archived(cluster),
            segment_size: pinned.map_or(0, |p| p.segment_size.as_u32()),
            system_identifier: pinned.map_or(0, |p| p.system_identifier),
        }
    }

    /// The WAL that tier 2 must have: everything below the archived frontier, except what was removed and recorded
    /// gaps.
    fn archived(&self, cluster: &ClusterName) -> Vec<Archived> {
        let Some(archives) = &self.archives else { return Vec::new() };
        let (horizons, gaps) = (self.base.wal().horizons(cluster), self.base.wal().gaps(cluster));
        let mut owed = Vec::new();
        for frontier in archives.state(cluster).frontiers {
            let horizon = horizons.iter().find(|h| h.timeline == frontier.timeline);
            let mut from = horizon.map_or(frontier.start, |h| h.held_from.max(frontier.start));
            let own = gaps.iter().filter(|gap| gap.timeline == frontier.timeline);
            for gap in own {
                let to = gap.from.min(frontier.archived);
                owed.push(Archived { timeline: frontier.timeline, from, to });
                from = from.max(gap.to);
            }
            owed.push(Archived { timeline: frontier.timeline, from, to: frontier.archived });
        }
        owed
    }

    /// The recorded damage, whoever needs the files.
    pub(super) async fn known_damage(&self, cluster: &ClusterName) -> Result<KnownDamage, Status> {
        let (base, cluster) = (self.base.clone(), cluster.clone());
        let known = tokio::task::spawn_blocking(move || base.known_damage(&cluster));
        let known =
            known.await.map_err(|e| Code::Internal.status(format!("read known damage: {e}")))?;
        known.map_err(|error| match error.kind {
            Kind::Corrupt => {
                tracing::error!(%error, "cannot read damaged.json; pruning is paused");
                Code::Corrupt.status(format!(
                    "read damaged.json: expected a list of damaged files, found a file that is damaged itself; hint: {}",
                    error.hint.unwrap_or("run klio verify, which finds the damage again")
                ))
            }
            _ => errors::status(&error),
        })
    }

    /// Adds the damage that was found, and removes what was disproved. `all` says that every backup was verified.
    async fn learn(
        &self,
        cluster: &ClusterName,
        result: &VerifyResult,
        all: bool,
    ) -> Result<(), Status> {
        let (name, result) = (cluster.clone(), result.clone());
        let change = move |known: &mut KnownDamage| learn(&name, known, &result, all);
        let known = self.base.change_damage(cluster, change).await?;
        self.metrics.known(cluster, &known);
        Ok(())
    }

    /// Records damage for a backup that was not requested but needs the damaged file, because retention depends on
    /// these records.
    async fn tell_other(
        &self,
        cluster: &ClusterName,
        other: &ListedBackup,
        result: &VerifyResult,
    ) -> Result<(), Status> {
        let name = &other.record.name;
        let mut found = damage_of(&result.damaged, |f| f.lost && f.backups.contains(name));
        let kept = other.verified.as_ref();
        let known = |d: &Damage| {
            kept.is_some_and(|o| o.damaged.iter().any(|k| (&k.tier, &k.key) == (&d.tier, &d.key)))
        };
        found.retain(|damage| !known(damage));
        if found.is_empty() {
            return Ok(());
        }
        let mut outcome = kept.cloned().unwrap_or_else(|| VerifyOutcome {
            backups: vec![name.clone()],
            ok: false,
            finished_unix: self.base.now_unix(),
            duration_seconds: 0.0,
            read_percent: 0.0,
            all_read_since_unix: None,
            read_bytes: 0,
            files: 0,
            damaged: Vec::new(),
            repaired: Vec::new(),
        });
        tracing::error!(%cluster, backup = %name, files = found.len(), "damage found while verifying another backup affects this one, too");
        outcome.ok = false;
        outcome.damaged.extend(found);
        self.keep_outcome(cluster, outcome).await
    }

    async fn keep_outcome(
        &self,
        cluster: &ClusterName,
        outcome: VerifyOutcome,
    ) -> Result<(), Status> {
        self.metrics.kept(cluster, &outcome);
        let (base, cluster) = (self.base.clone(), cluster.clone());
        let kept = tokio::task::spawn_blocking(move || {
            outcomes::store_verified(base.disk().as_ref(), base.root(), &cluster, &outcome)
        });
        let kept =
            kept.await.map_err(|e| Code::Internal.status(format!("store the outcome: {e}")))?;
        kept.map_err(|e| errors::status(&e))
    }
}

fn choose(
    cluster: &ClusterName,
    backups: &[ListedBackup],
    request: &Request,
) -> Result<Vec<ListedBackup>, Status> {
    let Some(wanted) = &request.backup else { return Ok(backups.to_vec()) };
    let chosen: Vec<ListedBackup> =
        backups.iter().filter(|b| b.record.name == *wanted).cloned().collect();
    match chosen.is_empty() {
        true => Err(Code::NotFound.status(format!("cluster {cluster} has no backup {wanted}"))),
        false => Ok(chosen),
    }
}

/// The files that were found damaged before; they are read again whatever the percentage.
fn again(chosen: &[ListedBackup], known: &KnownDamage) -> BTreeSet<String> {
    let kept = chosen.iter().filter_map(|backup| backup.verified.as_ref());
    let kept = kept.flat_map(|outcome| &outcome.damaged);
    kept.chain(&known.packs).map(|damage| damage.key.clone()).collect()
}

fn damage_of(findings: &[Finding], which: impl Fn(&Finding) -> bool) -> Vec<Damage> {
    findings.iter().filter(|f| which(f)).map(|f| f.damage.clone()).collect()
}

/// The key of findings that name no single file.
fn wal_key(cluster: &ClusterName) -> String {
    format!("{cluster}/wal")
}

fn records_key(cluster: &ClusterName) -> String {
    format!("{cluster}/backups")
}

fn is_wal(cluster: &ClusterName, key: &str) -> bool {
    key.strip_prefix(&wal_key(cluster)).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Updates the recorded damage after a verification. Packs are identified by their keys: all that were damaged before
/// were read again, if the repository could be opened. Of the other findings, records and holes are checked each time,
/// small files only when all backups are verified.
fn learn(cluster: &ClusterName, known: &mut KnownDamage, result: &VerifyResult, all: bool) {
    known.packs.retain(|damage| !result.disproved.contains(&damage.key));
    let is_pack = |damage: &Damage| pack_of(cluster, &damage.key).is_some();
    let packs = damage_of(&result.damaged, |f| f.lost && is_pack(&f.damage));
    known.packs.retain(|old| packs.iter().all(|new| new.key != old.key));
    known.packs.extend(packs);
    let looked_at = [wal_key(cluster), records_key(cluster)];
    known.others.retain(|damage| !all && !looked_at.contains(&damage.key));
    let others = damage_of(&result.damaged, |f| f.backups.is_empty() && !is_pack(&f.damage));
    known.others.retain(|old| others.iter().all(|new| new.key != old.key));
    known.others.extend(others);
}

/// The WAL that is missing after these backups, on every timeline that they lead to, and that is not recorded as a gap
/// or as expired. WAL below the beginning of this tier 1 is included: a server that replaced a lost one has that part
/// in tier 2.
fn lost<'a>(
    holdings: &Holdings,
    backups: impl Iterator<Item = &'a BackupRecord> + Clone,
) -> Vec<Hole> {
    let Ok(size) = SegmentSize::new(holdings.segment_size) else { return Vec::new() };
    let mut all: Vec<Hole> = Vec::new();
    for line in &holdings.timelines {
        // A history that cannot be read is found when it is verified itself.
        let Ok(path) = Path::new(holdings, line.timeline, size) else { continue };
        // Missing WAL between a backup's start and its stop is reported for that backup.
        let Some(from) = backups.clone().filter(|b| path.serves(b)).map(|b| b.stop_lsn).min()
        else {
            continue;
        };
        all.extend(path.lost(from));
    }
    all.sort_by_key(|hole| (hole.timeline, hole.from, hole.to));
    all.dedup_by_key(|hole| (hole.timeline, hole.from, hole.to));
    all
}

/// A finding that belongs to no backup: every backup can still be restored to its own end.
fn of_no_backup(cluster: &ClusterName, hole: &Hole) -> Finding {
    let key = wal_key(cluster);
    let damage = Damage { tier: "both".into(), key, problem: hole.to_string() };
    Finding { damage, backups: Vec::new(), lost: false }
}

/// Adds what only the server knows: records that cannot be read, and WAL that is missing.
fn complete(
    cluster: &ClusterName,
    mut result: VerifyResult,
    chosen: &[ListedBackup],
    holdings: &Holdings,
    problems: &[String],
) -> VerifyResult {
    for problem in problems {
        let damage =
            Damage { tier: "both".into(), key: records_key(cluster), problem: problem.clone() };
        result.damaged.push(Finding { damage, backups: Vec::new(), lost: false });
    }
    for backup in chosen {
        let record = &backup.record;
        let missing =
            holdings.first_missing(record.stop_timeline, record.start_lsn, record.stop_lsn);
        let problem = match missing {
            Ok(None) => continue,
            Ok(Some((timeline, run))) => {
                format!("WAL of timeline {timeline:?} from {} to {} is missing", run.start, run.end)
            }
            Err(error) => error.to_string(),
        };
        let damage = Damage { tier: "both".into(), key: wal_key(cluster), problem };
        let backups = vec![record.name.clone()];
        result.damaged.push(Finding { damage, backups, lost: false });
    }
    result
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use klio_pg::{Lsn, TimelineId};
    use klio_storage::{
        catalog::{KnownGap, Run, TimelineHoldings},
        testing::backup_record,
    };

    const SEGMENT: u64 = 1 << 20;

    fn lsn(segments: u64) -> Lsn {
        Lsn::new(segments * SEGMENT)
    }

    fn tli(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    fn finding(key: &str, backups: &[&str], lost: bool) -> Finding {
        let damage = Damage { tier: "tier1".into(), key: key.into(), problem: "bad".into() };
        Finding { damage, backups: backups.iter().map(|n| n.parse().unwrap()).collect(), lost }
    }

    #[test]
    fn a_damaged_pack_stays_known_until_it_is_read_and_good_though_no_backup_needs_it() {
        let cluster: ClusterName = "pg".parse().unwrap();
        let pack = format!("pg/base/data/ab/{}", "ab".repeat(32));
        let mut known = KnownDamage::default();
        let packs =
            |known: &KnownDamage| known.packs.iter().map(|d| d.key.clone()).collect::<Vec<_>>();
        let bad = |backups: &[&str]| VerifyResult {
            damaged: vec![finding(&pack, backups, true)],
            ..VerifyResult::default()
        };
        learn(&cluster, &mut known, &bad(&["a"]), true);
        learn(&cluster, &mut known, &bad(&[]), false);
        assert_eq!((packs(&known), known.others.len()), (vec![pack.clone()], 0));
        // The repository could not be opened, so nothing was read and nothing is disproved.
        learn(&cluster, &mut known, &VerifyResult::default(), true);
        assert_eq!(packs(&known), std::slice::from_ref(&pack));
        // The pack is good in the other tier and only could not be written here, so there is a good copy.
        let disproved = BTreeSet::from([pack.clone()]);
        let damaged = vec![finding(&pack, &["a"], false)];
        learn(
            &cluster,
            &mut known,
            &VerifyResult { disproved, damaged, ..VerifyResult::default() },
            true,
        );
        assert_eq!(known, KnownDamage::default());
    }

    #[test]
    fn what_is_no_single_backups_stays_known_until_it_is_looked_at_again() {
        let cluster: ClusterName = "pg".parse().unwrap();
        let mut known = KnownDamage::default();
        let snapshot = format!("pg/base/snapshots/{}", "ab".repeat(32));
        let keys = ["pg/wal", "pg/backups", snapshot.as_str()];
        let damaged = keys.iter().map(|key| finding(key, &[], false)).collect();
        learn(&cluster, &mut known, &VerifyResult { damaged, ..VerifyResult::default() }, true);
        assert_eq!(known.others.len(), 3);
        let keys =
            |known: &KnownDamage| known.others.iter().map(|d| d.key.clone()).collect::<Vec<_>>();
        learn(&cluster, &mut known, &VerifyResult::default(), false);
        assert_eq!(keys(&known), std::slice::from_ref(&snapshot));
        learn(&cluster, &mut known, &VerifyResult::default(), true);
        assert_eq!(known, KnownDamage::default());
    }

    /// A backup from one segment to another.
    pub fn backup(name: &str, start: u64, stop: u64) -> BackupRecord {
        backup_record(name.parse().unwrap(), tli(1), lsn(start), lsn(stop))
    }

    fn line(timeline: u32, history: Option<&str>, runs: &[(u64, u64)]) -> TimelineHoldings {
        TimelineHoldings {
            timeline: tli(timeline),
            history: history.map(str::to_owned),
            runs: runs.iter().map(|(from, to)| Run { start: lsn(*from), end: lsn(*to) }).collect(),
            caught_up: false,
        }
    }

    fn found(holdings: &Holdings, backups: &[BackupRecord]) -> Vec<(u32, Lsn, Lsn)> {
        let lost = lost(holdings, backups.iter());
        lost.into_iter().map(|hole| (hole.timeline.get(), hole.from, hole.to)).collect()
    }

    /// A new tier 1 may begin at segment 20; WAL that only tier 2 has counts like the rest.
    #[test]
    fn wal_that_both_tiers_lost_behind_a_backup_is_found_wherever_tier_1_begins() {
        let mut holdings = Holdings {
            segment_size: SEGMENT as u32,
            timelines: vec![line(1, None, &[(1, 8), (9, 12), (13, 30)])],
            ..Holdings::default()
        };
        let old = [backup("a", 2, 3), backup("b", 10, 11)];
        assert_eq!(found(&holdings, &old), [(1, lsn(8), lsn(9)), (1, lsn(12), lsn(13))]);
        // Nobody needs WAL from before the oldest backup.
        assert_eq!(found(&holdings, &old[1..]), [(1, lsn(12), lsn(13))]);
        assert_eq!(found(&holdings, &[]), []);
        // A recorded gap is not reported again.
        let gap = KnownGap { timeline: tli(1), from: lsn(8), to: lsn(9), reason: "x".into() };
        holdings.gaps.push(gap);
        assert_eq!(found(&holdings, &old), [(1, lsn(12), lsn(13))]);
        // It is reported once, although two timelines come from there.
        let history = |number: u32| format!("1\t{}\tx\n", lsn(20 + u64::from(number)));
        for number in [2, 3] {
            let runs = [(20 + u64::from(number), 40)];
            holdings.timelines.push(line(number, Some(&history(number)), &runs));
        }
        assert_eq!(found(&holdings, &old), [(1, lsn(12), lsn(13))]);
    }
}
