//! What the tests of restores share: a site with a PostgreSQL that is streamed, and what a user does with it.

#![allow(dead_code, reason = "each test program takes a part of it")]

use klio_pg::Lsn;
use klio_tests::{
    install_crypto,
    postgres::{Builder, Postgres, install},
    process::Running,
    programs::{self, Outcome},
    proof::{Restorer, Source},
    s3::S3,
    scratch::Scratch,
    site::{PATIENCE, Site},
};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// The target cannot be reached.
pub const UNREACHABLE: Option<i32> = Some(30);
/// The directory is not fit.
pub const LOCAL: Option<i32> = Some(6);

pub struct Rig {
    pub site: Site,
    pub s3: S3,
    pub pg: Postgres,
    pub stream: Option<Running>,
    pub scratch: Scratch,
}

/// A moment of the original: how many rows it had.
#[derive(Debug, Clone)]
pub struct Moment {
    pub rows: u32,
    pub time: String,
    pub lsn: Lsn,
    pub xid: String,
}

impl Rig {
    pub async fn new(major: u32, tier2: bool) -> Self {
        let site = Site::new().await;
        Self::of(site, Self::builder(major).start().await, tier2).await
    }

    pub fn builder(major: u32) -> Builder {
        let builder = Postgres::builder().major(major).segment_mib(1).initdb("-k");
        builder.set("track_commit_timestamp", "on")
    }

    /// A PostgreSQL of the test's own making, running, that is streamed to a site that is not started yet.
    pub async fn of(mut site: Site, pg: Postgres, tier2: bool) -> Self {
        install_crypto();
        let s3 = S3::new();
        if tier2 {
            site.set_tier2(&s3);
        }
        site.start().await;
        let stream = site.stream(&pg);
        pg.wait_true("select count(*) = 1 from pg_stat_replication where state = 'streaming'")
            .await;
        pg.execute("create table t (id int, filler text)").await;
        let scratch = Scratch::new("restore");
        install::give(scratch.path());
        Self { site, s3, pg, stream: Some(stream), scratch }
    }

    pub async fn backup(&self, name: &str) {
        let outcome = self.site.klio(Some(&self.pg), &["backup", "--name", name]).await;
        assert_eq!(outcome.code, Some(0), "{}{}", outcome.stdout, outcome.stderr);
    }

    /// Adds a row and says when that was.
    pub async fn row(&self, rows: u32) -> Moment {
        let session = self.pg.session().await;
        let sql = format!("insert into t values ({rows}, repeat('x', 1000)) returning xmin");
        let xid = session.rows(&sql).await.expect("insert")[0][0].clone();
        let sql = format!("select pg_xact_commit_timestamp('{xid}'), pg_current_wal_insert_lsn()");
        let row = session.rows(&sql).await.expect("ask").swap_remove(0);
        Moment { rows, time: row[0].clone(), lsn: row[1].parse().expect("an LSN"), xid }
    }

    pub async fn flushed(&self) {
        let end = self.pg.flush_lsn().await;
        self.site.wait_flushed(end).await;
    }

    pub fn restorer(&self, source: Source) -> Restorer {
        Restorer::new(&self.site, &self.s3, source, &self.scratch)
    }

    pub fn dir(&self, name: &str) -> PathBuf {
        self.scratch.join(name)
    }

    pub async fn klio(&self, source: Source, args: &[&str]) -> Outcome {
        let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
        programs::run(self.restorer(source).command(&args)).await
    }

    /// A drill with this PostgreSQL's programs.
    pub async fn drill(&self, args: &[&str]) -> Outcome {
        let args: Vec<String> = ["drill"].iter().chain(args).map(|arg| (*arg).to_owned()).collect();
        let mut command = self.restorer(Source::Server).command(&args);
        command.env("KLIO_DRILL__BIN_DIR", install::bin_dir(self.pg.major()));
        programs::run(command).await
    }

    /// Restores only; what it said.
    pub async fn files(&self, source: Source, pg: &Postgres, args: &[&str]) -> Outcome {
        let to = pg.data_dir().display().to_string();
        let args = [&["restore", "--to", &to], args].concat();
        let outcome = self.klio(source, &args).await;
        assert_eq!(outcome.code, Some(0), "{args:?}: {}{}", outcome.stdout, outcome.stderr);
        outcome
    }

    /// Restores, recovers and promotes.
    pub async fn restored(&self, source: Source, args: &[&str]) -> Postgres {
        let mut pg = Postgres::empty(self.pg.major());
        let to = pg.data_dir().display().to_string();
        let mut all = vec!["restore", "--to", &to, "--target-action", "promote"];
        all.extend(args);
        let outcome = self.klio(source, &all).await;
        assert_eq!(outcome.code, Some(0), "{args:?}: {}{}", outcome.stdout, outcome.stderr);
        assert!(!pg.data_dir().join("klio-restore.unfinished").exists());
        recover(&mut pg).await;
        pg
    }

    /// Refused with this code and these words, and the directory is as it was.
    pub async fn refused(&self, args: &[&str], code: Option<i32>, words: &[&str]) {
        let to = self.dir("refused");
        let path = to.display().to_string();
        let mut all = vec!["restore", "--to", &path];
        all.extend(args);
        let outcome = self.klio(Source::Server, &all).await;
        assert_eq!(outcome.code, code, "{args:?}: {}{}", outcome.stdout, outcome.stderr);
        for word in words {
            assert!(outcome.stderr.contains(word), "{args:?}: no {word:?} in {}", outcome.stderr);
        }
        assert!(!to.exists(), "{args:?} touched the directory");
    }
}

pub async fn recover(pg: &mut Postgres) {
    pg.adopt();
    pg.start().await;
    pg.wait_true("select not pg_is_in_recovery()").await;
}

/// Starts it, which must end in recovery: its log.
pub async fn ends(pg: &mut Postgres) -> String {
    pg.adopt();
    pg.launch();
    let running = pg.running().expect("it was launched");
    let status = running.wait_exit(PATIENCE).await;
    let log = pg.log();
    assert!(!status.success(), "{log}");
    log
}

pub async fn rows(pg: &Postgres) -> u32 {
    pg.value("select coalesce(max(id), 0) from t").await.parse().expect("a number")
}

/// Files with their content and links, to see that nothing was touched.
pub fn state(directory: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut all = Vec::new();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() && !path.is_symlink() {
            all.extend(state(&path));
        }
        all.push((path.clone(), fs::read(&path).unwrap_or_default()));
    }
    all.sort();
    all
}
