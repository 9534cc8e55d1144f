//! The machines of a round: a primary, its sidecar, the server, the bucket.

use super::{
    Plan,
    restore::{Restored, Restorer, Source},
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
    collections::BTreeSet,
    ffi::OsString,
    path::{Path, PathBuf},
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
}

impl Rig {
    /// Everything started but the sidecar.
    pub async fn new(rng: &mut StdRng, _plan: &Plan, _seed: u64) -> Self {
        let s3 = S3::new();
        let mut site = Site::new().await.tier2(&s3);
        // Encrypted is what users have; the other way must work too.
        let plain = rng.random_bool(0.2);
        if plain {
            site.set("KLIO_ENCRYPTION__OFF", "true");
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
        }
    }

    /// In words.
    #[must_use]
    pub fn describe(&self) -> String {
        format!(
            "{}{}, {} MiB segments{}",
            if self.synchronous { "synchronous" } else { "asynchronous" },
            if self.checksums { ", checksums" } else { "" },
            self.segment_mib,
            if self.plain { ", unencrypted" } else { "" }
        )
    }

    /// Where tablespaces lie.
    #[must_use]
    pub fn places(&self) -> PathBuf {
        self.scratch.join("places")
    }

    /// The sidecar, and what the workload needs in the database.
    pub async fn setup(&mut self) -> Model {
        install::give(self.scratch.path());
        let model = workload::setup(&self.pg, &self.places()).await;
        self.movable = model.tablespaces.keys().copied().next().expect("a tablespace that stays");
        self.connect().await;
        model
    }

    /// Starts `klio stream` and, if so decided, makes commits wait for it.
    async fn connect(&mut self) {
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

    /// How far can be restored to, asked while the server is there and once the bucket has every finished backup:
    /// WAL may well be there before the backup that it continues.
    pub async fn reach(&self) -> Reach {
        let records = |root: PathBuf| -> BTreeSet<OsString> {
            let folder = std::fs::read_dir(root.join("main/backups"));
            let names = folder.into_iter().flatten().flatten().map(|entry| entry.file_name());
            names.filter(|name| name.to_string_lossy().ends_with(".json")).collect()
        };
        let bucket = self.s3.bucket_dir().join("klio");
        eventually_now("records of all backups in the bucket", PATIENCE, || {
            records(self.site.tier1()).is_subset(&records(bucket.clone()))
        })
        .await;
        let ask = async || {
            let status = self.site.status().await?;
            let lsn = |field: &str| status[field].as_str()?.parse().ok();
            Some(Reach { flushed: lsn("flushed_lsn")?, archived: lsn("archived_lsn")? })
        };
        eventually("klio status", PATIENCE, ask).await
    }

    /// Restores and starts; the primary must not run, because tablespaces go where they were.
    pub async fn restore(
        &mut self,
        target: &Target,
        position: Lsn,
        source: Source,
        delta: Option<Restored>,
        rng: &mut StdRng,
    ) -> Restored {
        assert!(self.pg.running().is_none(), "the primary still runs");
        let places = self.places();
        let elsewhere = self.scratch.join("elsewhere");
        if delta.is_none() {
            workload::make_places(&places);
            // A cluster that was restored there and went on has its tablespace there.
            let _ = std::fs::remove_dir_all(&elsewhere);
            std::fs::create_dir(&elsewhere).expect("make the other place");
            install::give(&elsewhere);
        }
        if let Some(old) = &delta {
            clear_places_without_link(&places, &old.pg.data_dir().join("pg_tblspc"));
        }
        if source == Source::Stock {
            let pg =
                super::stock::restore(&self.site, &self.s3, target, position, &self.scratch).await;
            return Restored::recover(pg, self.checksums).await;
        }
        let restorer = Restorer::new(&self.site, &self.s3, source, &self.scratch);
        // By OID: it may lie elsewhere already.
        let map = rng.random_bool(0.3).then_some((self.movable, elsewhere.as_path()));
        restorer.restore(target, delta, map, self.checksums).await
    }

    /// A restored cluster becomes the primary.
    pub async fn go_on(&mut self, restored: Restored) -> Model {
        let (pg, model) = restored.into_primary();
        self.pg = pg;
        self.connect().await;
        model
    }
}

/// `--delta` takes a place that the directory has no link to only when it is empty: what an earlier restore left
/// there goes by hand.
fn clear_places_without_link(places: &Path, links: &Path) {
    let entries = |folder: &Path| std::fs::read_dir(folder).expect("look into a folder").flatten();
    let linked: Vec<PathBuf> =
        entries(links).filter_map(|link| std::fs::read_link(link.path()).ok()).collect();
    for place in entries(places).map(|entry| entry.path()).filter(|p| !linked.contains(p)) {
        std::fs::remove_dir_all(&place).expect("clear a place");
        std::fs::create_dir(&place).expect("make the place again");
        install::give(&place);
    }
}
