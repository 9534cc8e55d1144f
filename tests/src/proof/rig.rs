//! The machines of a round: a primary, its sidecar, the server, the bucket.

use super::{
    Move, Plan, Report,
    copy::Copy,
    history,
    history::Kept,
    restore::{Map, Restored, Restorer, Source},
};
use crate::{
    postgres::{Postgres, Stop, install},
    process::Running,
    s3::S3,
    scratch::Scratch,
    site::{PATIENCE, Site},
    wait::{eventually, eventually_now},
    workload::{self, Model, Oracle, Target, Workload},
};
use klio_pg::Lsn;
use rand::{Rng, rngs::StdRng};
use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

/// How far restores can reach.
#[derive(Debug, Clone, Copy)]
pub struct Reach {
    /// Durable on the server.
    pub flushed: Lsn,
    /// In the bucket.
    pub archived: Lsn,
}

/// The machines of a round.
pub struct Rig {
    /// Server.
    pub site: Site,
    /// Bucket.
    pub s3: S3,
    /// Primary.
    pub pg: Postgres,
    /// `klio stream`, while it runs.
    pub stream: Option<Running>,
    scratch: Scratch,
    /// OID of a tablespace that is there from the beginning.
    movable: u32,
    synchronous: bool,
    checksums: bool,
    segment_mib: u32,
    plain: bool,
    included: bool,
    clocked: bool,
    /// The cluster's current history.
    generation: u64,
    /// A history that waits for a decision streams.
    pub undecided: Option<u64>,
    /// A drill ran beside the live primary.
    pub drilled: bool,
    copy: Option<Copy>,
    directories: AtomicU32,
}

/// How tablespaces of a restore are mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mapping {
    /// To where they were.
    None,
    /// The one that stays, by OID.
    Movable,
    /// Every place, those of tablespaces that are made after the backup too; what lies there is another's.
    All,
}

/// A leftover of somebody's earlier recovery, which an included file brings along: it must not end any of ours.
const LEFTOVERS: [&str; 4] = [
    "recovery_target_name = 'nowhere'\n",
    "recovery_target_time = '2001-01-01 00:00:00+00'\nrecovery_target_action = 'shutdown'\n",
    "recovery_target_xid = '3'\nrecovery_target_inclusive = off\n",
    "recovery_target = 'immediate'\nrecovery_target_timeline = '1'\n",
];

impl Rig {
    /// Everything started but the sidecar.
    pub async fn new(rng: &mut StdRng, plan: &Plan, _seed: u64) -> Self {
        let s3 = S3::new();
        let mut site = Site::new().await.tier2(&s3);
        // Encrypted is what users have; the other way must work too.
        let plain = rng.random_bool(0.2);
        if plain {
            site.set("KLIO_ENCRYPTION__OFF", "true");
        }
        let clocked = plan.moves.decide(rng, Move::Clock, 0.25);
        if clocked {
            site.own_clock();
        }
        // A round's backups are seconds apart, and the newer ones are to displace the older ones.
        if rng.random_bool(0.7) {
            site.set("KLIO_RETENTION__MINIMUM_AGE", "0");
        }
        site.start().await;
        let checksums = rng.random_bool(0.7);
        let segment_mib = if rng.random_bool(0.5) { 1 } else { 16 };
        let mut pg = Postgres::builder()
            .segment_mib(segment_mib)
            .set("max_prepared_transactions", "20")
            .set("wal_keep_size", "16GB")
            .set("max_wal_size", if rng.random_bool(0.5) { "64MB" } else { "1GB" })
            .set("log_checkpoints", "on");
        if checksums {
            pg = pg.initdb("--data-checksums");
        }
        let included = plan.moves.decide(rng, Move::Included, 0.25);
        if included {
            let leftover = LEFTOVERS[rng.random_range(0..LEFTOVERS.len())];
            pg = pg.set("include_if_exists", "leftover.conf").file("leftover.conf", leftover);
        }
        let pg = pg.start().await;
        let scratch = Scratch::new("proof");
        let synchronous = rng.random_bool(0.5);
        Self {
            site,
            s3,
            pg,
            stream: None,
            scratch,
            movable: 0,
            synchronous,
            checksums,
            segment_mib,
            plain,
            included,
            clocked,
            generation: 1,
            undecided: None,
            drilled: false,
            copy: None,
            directories: AtomicU32::new(0),
        }
    }

    /// In words.
    #[must_use]
    pub fn describe(&self) -> String {
        format!(
            "{}{}, {} MiB segments{}{}{}",
            if self.synchronous { "synchronous" } else { "asynchronous" },
            if self.checksums { ", checksums" } else { "" },
            self.segment_mib,
            if self.plain { ", unencrypted" } else { "" },
            if self.included { ", an included recovery target" } else { "" },
            if self.clocked { ", a clock that jumps" } else { "" }
        )
    }

    /// Where tablespaces lie.
    #[must_use]
    pub fn places(&self) -> PathBuf {
        self.scratch.join("places")
    }

    /// Where a tablespace that stays may go.
    #[must_use]
    pub fn elsewhere(&self) -> PathBuf {
        self.scratch.join("elsewhere")
    }

    /// A directory that has not been used.
    #[must_use]
    pub fn kept_directory(&self) -> PathBuf {
        let number = self.directories.fetch_add(1, Ordering::Relaxed);
        self.scratch.join(format!("kept{number}"))
    }

    /// What restores need beside the rig.
    #[must_use]
    pub fn hands(&self) -> &Scratch {
        &self.scratch
    }

    /// Pages have checksums.
    #[must_use]
    pub fn checksums(&self) -> bool {
        self.checksums
    }

    /// The server's clock can be turned.
    #[must_use]
    pub fn clocked(&self) -> bool {
        self.clocked
    }

    /// Whether docs/disaster.md's way can be taken: it names the target in PostgreSQL's own settings, so whoever has a leftover
    /// of another target has to remove it by hand.
    #[must_use]
    pub fn stock(&self) -> bool {
        !self.included
    }

    /// The cluster's current history.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The directory of the current history in both tiers.
    #[must_use]
    pub fn directory(&self) -> String {
        if self.generation == 1 { "main".into() } else { format!("main@{}", self.generation) }
    }

    /// What the workload needs in the database.
    pub async fn setup(&mut self) -> Model {
        install::give(self.scratch.path());
        let model = workload::setup(&self.pg, &self.places()).await;
        self.movable = model.tablespaces.keys().copied().next().expect("a tablespace that stays");
        model
    }

    /// Starts `klio stream` and, if so decided, makes commits wait for it.
    pub async fn connect(&mut self) {
        self.stream = Some(self.site.stream(&self.pg));
        self.pg.wait_true("select count(*) = 1 from pg_stat_replication").await;
        if self.synchronous {
            self.pg.set("synchronous_standby_names", "klio").await;
            self.pg
                .wait_true("select count(*) = 1 from pg_stat_replication where sync_state = 'sync'")
                .await;
        }
    }

    /// Begins a workload.
    pub async fn load(&self, base: Model, seed: u64, generation: u32) -> Workload {
        Workload::start(&self.pg, base, &self.places(), seed, generation, self.synchronous).await
    }

    /// Ends it, either in order or with the primary's death, and with the sidecar gone.
    pub async fn end(&mut self, mut load: Workload, lost: bool) -> Oracle {
        let mut safe = Lsn::ZERO;
        if lost {
            self.pg.kill9();
            load.stop().await;
        } else {
            load.stop().await;
            let end = self.pg.flush_lsn().await;
            safe = end;
            self.site.wait_flushed(end).await;
            let segment = self.pg.segment_size().await;
            let switched = self.pg.switch_wal().await.segment_start(segment);
            self.pg.write_wal(1).await;
            self.site.wait_archived(switched).await;
            self.pg.stop(Stop::Fast).await;
        }
        self.stream = None;
        let mut oracle = load.finish(&self.pg).await;
        oracle.safe = safe;
        oracle
    }

    /// The dead primary is started once more and holds what it wrote; then it is dead again.
    pub async fn check_primary(&mut self, oracle: &Oracle) {
        self.pg.set_in_file("synchronous_standby_names", "");
        self.pg.start().await;
        super::restore::verify_primary(&self.pg, oracle).await;
        self.pg.stop(Stop::Fast).await;
    }

    /// A state that was kept is the primary now, and streams: another history, which waits for a decision. Commits of it are
    /// acknowledged meanwhile.
    pub async fn set_back(&mut self, kept: Kept) -> Model {
        let base = kept.put_back(self).await;
        self.connect().await;
        self.pg.write_wal(1).await;
        self.undecided = Some(history::undecided(&self.site).await);
        base
    }

    /// A person decides; what was retired streams no more, and its primary is given up.
    pub async fn decide(&mut self, decision: history::Decision) {
        let Some(number) = self.undecided.take() else { return };
        history::decide(&self.site, number, decision).await;
        if decision == history::Decision::Follow {
            self.generation = number;
            return;
        }
        if let Some(mut stream) = self.stream.take() {
            history::require_refused(&mut stream).await;
        }
        self.pg.kill9();
    }

    /// Waits until everything that PostgreSQL has written is acknowledged.
    pub async fn acknowledged(&self) {
        let end = self.pg.flush_lsn().await;
        let sql = format!(
            "select coalesce(bool_or(flush_lsn >= '{end}'), false) from pg_stat_replication"
        );
        self.pg.wait_true(&sql).await;
    }

    /// Waits until every backup that was finished is in the bucket.
    pub async fn backups_archived(&self) {
        let records = |root: &Path, cluster: &str| -> BTreeSet<OsString> {
            let directory = std::fs::read_dir(root.join(cluster).join("backups"));
            let names = directory.into_iter().flatten().flatten().map(|entry| entry.file_name());
            names.filter(|name| name.to_string_lossy().ends_with(".json")).collect()
        };
        let bucket = self.s3.bucket_dir().join("klio");
        let undecided = self.undecided.map(|number| format!("main@{number}"));
        for cluster in [Some(self.directory()), undecided].into_iter().flatten() {
            eventually_now("records of all backups in the bucket", PATIENCE, || {
                records(&self.site.tier1(), &cluster).is_subset(&records(&bucket, &cluster))
            })
            .await;
        }
    }

    /// How far can be restored to, asked while the server is there and once the bucket has every finished backup:
    /// WAL may well be there before the backup that it continues.
    pub async fn reach(&self) -> Reach {
        self.backups_archived().await;
        let ask = async || {
            let status = self.site.status().await?;
            let lsn = |field: &str| status[field].as_str()?.parse().ok();
            Some(Reach { flushed: lsn("flushed_lsn")?, archived: lsn("archived_lsn")? })
        };
        eventually("klio status", PATIENCE, ask).await
    }

    /// Empties the places of tablespaces.
    pub fn clear_places(&self) {
        workload::make_places(&self.places());
        // A cluster that was restored there and went on has its tablespace there.
        let _ = std::fs::remove_dir_all(self.elsewhere());
        std::fs::create_dir(self.elsewhere()).expect("make the other place");
        install::give(&self.elsewhere());
    }

    /// Every file below the places of tablespaces, with its content.
    #[must_use]
    pub fn state_of_places(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut files = BTreeMap::new();
        let mut directories = vec![self.places(), self.elsewhere()];
        while let Some(directory) = directories.pop() {
            for entry in std::fs::read_dir(&directory).into_iter().flatten().flatten() {
                let path = entry.path();
                if path.is_dir() {
                    directories.push(path);
                } else {
                    let content = std::fs::read(&path).expect("read a file of a tablespace");
                    files.insert(path, content);
                }
            }
        }
        files
    }

    fn maps(&self, mapping: Mapping) -> Vec<Map> {
        let (from, to) = (self.movable.to_string(), self.elsewhere());
        // By OID: it may lie elsewhere already.
        let movable = Map { from, to, optional: false };
        match mapping {
            Mapping::None => Vec::new(),
            Mapping::Movable => vec![movable],
            Mapping::All => self.maps_to("apart"),
        }
    }

    /// Every place of a tablespace goes below a directory of this name instead.
    pub fn maps_to(&self, name: &str) -> Vec<Map> {
        let apart = self.scratch.join(name);
        let places = workload::places(&self.places());
        let places = places.into_iter().chain([self.elsewhere()]).filter_map(|from| {
            let to = apart.join(from.file_name()?);
            Some(Map { from: from.display().to_string(), to, optional: true })
        });
        places.collect()
    }

    /// A copy of the cluster streams by mistake, or, where one does, writes on. Not while another history of the cluster streams.
    pub(super) async fn copy_streams(&mut self) {
        match &self.copy {
            Some(copy) => copy.write().await,
            None if self.undecided.is_none() => self.copy = Some(Copy::make(self).await),
            None => {}
        }
    }

    /// It ends, if there is one.
    pub(super) async fn end_copy(&mut self, rng: &mut StdRng, report: &mut Report) {
        if let Some(copy) = self.copy.take() {
            report.faults.push(format!("copy-{}", copy.end(self, rng).await));
        }
    }

    /// Restores and starts; the primary must not run, because tablespaces go where they were, unless all are mapped. With `twin`,
    /// another one that was promoted from the same restored files is kept.
    pub async fn restore(
        &mut self,
        target: &Target,
        position: Lsn,
        source: Source,
        delta: Option<Restored>,
        mapping: Mapping,
        twin: bool,
    ) -> (Restored, Option<PathBuf>) {
        assert!(self.pg.running().is_none(), "the primary still runs");
        if delta.is_none() && mapping != Mapping::All {
            self.clear_places();
        }
        let links = delta.as_ref().map(|old| old.pg.data_dir().join("pg_tblspc"));
        if let Some(links) = links {
            clear_places_without_link(&self.places(), &links);
        }
        if source == Source::Stock {
            let directory = self.directory();
            let scratch = &self.scratch;
            let pg =
                super::stock::restore(&self.site, &self.s3, &directory, target, position, scratch)
                    .await;
            return (Restored::recover(pg, self.checksums).await, None);
        }
        let restorer = Restorer::new(&self.site, &self.s3, source, &self.scratch);
        let restorer =
            if source == Source::Bucket { restorer.generation(self.generation) } else { restorer };
        let mut pg = restorer.files(target, delta, &self.maps(mapping)).await;
        let mut kept = None;
        if twin {
            let (ours, theirs) = Kept::of_twin(self, pg).await;
            pg = ours;
            kept = Some(theirs);
        }
        (Restored::recover(pg, self.checksums).await, kept)
    }

    /// A restored cluster becomes the primary.
    pub async fn go_on(&mut self, restored: Restored) -> Model {
        let (pg, model) = restored.into_primary();
        self.pg = pg;
        model
    }
}

/// `--delta` takes a place that the directory has no link to only when it is empty: what an earlier restore left
/// there goes by hand.
fn clear_places_without_link(places: &Path, links: &Path) {
    let entries =
        |directory: &Path| std::fs::read_dir(directory).expect("look into a directory").flatten();
    let linked: Vec<PathBuf> =
        entries(links).filter_map(|link| std::fs::read_link(link.path()).ok()).collect();
    for place in entries(places).map(|entry| entry.path()).filter(|p| !linked.contains(p)) {
        std::fs::remove_dir_all(&place).expect("clear a place");
        std::fs::create_dir(&place).expect("make the place again");
        install::give(&place);
    }
}
