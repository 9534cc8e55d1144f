//! A restore by `klio restore`, recovery by PostgreSQL through `klio wal-fetch`, and all checks of the result.

use crate::{
    postgres::{Postgres, Stop, install},
    programs,
    s3::S3,
    scratch::Scratch,
    site::Site,
    wait::eventually,
    workload::{self, Model, Oracle, Target, differences},
};
use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

/// Recovery of these small clusters takes seconds, on a busy machine more.
const RECOVERY: Duration = Duration::from_secs(120);

/// Where a restore reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// klio-server.
    Server,
    /// The bucket alone, with the key.
    Bucket,
    /// A copy of the bucket, with stock restic, age and zstd as docs/disaster.md says.
    Stock,
}

/// What a user has at hand who restores: a configuration and, for the bucket, the key. PostgreSQL's user can read all of it.
#[derive(Debug)]
pub struct Restorer {
    config: PathBuf,
    extra: Vec<String>,
}

/// A restored cluster.
#[derive(Debug)]
pub struct Restored {
    /// Recovered and promoted.
    pub pg: Postgres,
    checksums: bool,
    model: Option<Model>,
}

fn write(path: &Path, text: &str) {
    fs::write(path, text).expect("write a file of the restorer");
    install::give(path);
}

impl Restorer {
    /// Lays everything out below `scratch`.
    ///
    /// # Panics
    /// When the site has no bundle.
    #[must_use]
    pub fn new(site: &Site, s3: &S3, source: Source, scratch: &Scratch) -> Self {
        let dir = scratch.join("hands");
        fs::create_dir_all(&dir).expect("make a directory");
        install::give(&dir);
        let config = dir.join("klio.toml");
        match source {
            Source::Server | Source::Stock => Self::of_server(site, scratch),
            Source::Bucket => {
                let settings = s3.settings();
                write(
                    &config,
                    &format!(
                        "cluster = \"main\"\n[tier2]\nurl = \"s3://{}/klio\"\nendpoint = \"{}\"\nregion = \"{}\"\n\
                         access_key_id = \"{}\"\nsecret_access_key = \"{}\"\n",
                        settings.bucket,
                        s3.endpoint(),
                        crate::s3::REGION,
                        settings.access_key,
                        settings.secret_key
                    ),
                );
                let mut extra = vec!["--from".to_owned(), format!("s3://{}/klio", settings.bucket)];
                if let Some(identity) = site.identity() {
                    let copy = dir.join("identity.txt");
                    fs::copy(identity, &copy).expect("copy the identity");
                    install::give(&copy);
                    extra.extend(["--identity".to_owned(), copy.display().to_string()]);
                }
                Self { config, extra }
            }
        }
    }

    /// The same for a server without a bucket.
    ///
    /// # Panics
    /// When the site has no bundle.
    #[must_use]
    pub fn of_server(site: &Site, scratch: &Scratch) -> Self {
        let dir = scratch.join("hands");
        fs::create_dir_all(&dir).expect("make a directory");
        install::give(&dir);
        let bundle = site.bundle();
        let directory = bundle.parent().expect("a file lies in a directory");
        for entry in fs::read_dir(directory).expect("read the bundle").flatten() {
            let copy = dir.join(entry.file_name());
            fs::copy(entry.path(), &copy).expect("copy the bundle");
            install::give(&copy);
        }
        Self { config: dir.join("klio.toml"), extra: Vec::new() }
    }

    /// A `klio` command of PostgreSQL's user.
    #[must_use]
    pub fn command(&self, args: &[String]) -> std::process::Command {
        let mut command = install::command(&programs::klio());
        command.args(args).args(&self.extra).arg("-c").arg(&self.config);
        command
    }

    /// Restores everything there is into the directory of `pg`; its recovery promotes.
    #[must_use]
    pub fn latest(&self, pg: &Postgres, more: &[&str]) -> std::process::Command {
        let to = pg.data_dir().display().to_string();
        let args = ["restore", "--latest", "--target-action", "promote", "--to", &to];
        let args: Vec<String> = args.iter().chain(more).map(|arg| (*arg).to_owned()).collect();
        self.command(&args)
    }

    /// Of this history of the cluster, not of the current one.
    #[must_use]
    pub fn generation(mut self, number: u64) -> Self {
        self.extra.extend(["--generation".to_owned(), number.to_string()]);
        self
    }

    /// Restores (onto `delta`, if given) with these maps; nothing is started.
    ///
    /// # Panics
    /// When it fails.
    pub async fn files(&self, target: &Target, delta: Option<Restored>, maps: &[Map]) -> Postgres {
        let (pg, delta) = match delta {
            Some(mut old) => {
                old.pg.stop(Stop::Fast).await;
                (old.pg, true)
            }
            None => (Postgres::empty(install::DEBIAN_MAJOR), false),
        };
        let mut maps = maps.to_vec();
        loop {
            let mut args = vec!["restore".to_owned()];
            args.extend(delta.then(|| "--delta".to_owned()));
            args.extend(["--to".to_owned(), pg.data_dir().display().to_string()]);
            args.extend(["--target-action".to_owned(), "promote".to_owned()]);
            args.extend(target.args());
            for map in &maps {
                let _ = fs::remove_dir_all(&map.to);
                fs::create_dir_all(&map.to).expect("make another place for a tablespace");
                install::give(&map.to);
                let value = format!("{}={}", map.from, map.to.display());
                args.extend(["--tablespace-map".to_owned(), value]);
            }
            let outcome = programs::run(self.command(&args)).await;
            if outcome.code == Some(0) {
                return pg;
            }
            // Which tablespaces there are at the target is not known before; who maps one too many is told its name.
            let unknown = |map: &Map| {
                map.optional && outcome.stderr.contains(&format!("--tablespace-map {}:", map.from))
            };
            let before = maps.len();
            maps.retain(|map| !unknown(map));
            assert!(
                maps.len() < before && !pg.data_dir().exists(),
                "klio {args:?}\n{}{}",
                outcome.stdout,
                outcome.stderr
            );
        }
    }
}

/// Where a tablespace goes instead.
#[derive(Debug, Clone)]
pub struct Map {
    /// Its place or OID.
    pub from: String,
    /// Its new place, which is made anew.
    pub to: PathBuf,
    /// It may not be there at the target.
    pub optional: bool,
}

/// Waits until recovery has ended.
pub(super) async fn promoted(pg: &mut Postgres) {
    let conninfo = pg.conninfo();
    let log = pg.log();
    eventually("recovery to end", RECOVERY, || {
        let running = pg.running().is_some_and(crate::process::Running::is_running);
        assert!(running, "PostgreSQL ended in recovery:\n{log}");
        let conninfo = conninfo.clone();
        async move {
            let session = crate::postgres::Session::connect(&conninfo).await.ok()?;
            let rows = session.rows("select pg_is_in_recovery()").await.ok()?;
            (rows[0][0] == "f").then_some(())
        }
    })
    .await;
}

/// Compares with the oracle and runs PostgreSQL's own checks.
///
/// # Panics
/// On any difference.
pub async fn verify(restored: &mut Restored, oracle: &Oracle, target: &Target, what: &str) {
    let pg = &restored.pg;
    let redone = pg.redo_done().unwrap_or_else(|| panic!("{what}: no redo in\n{}", pg.log()));
    let expected = oracle.expect_at(target, redone);
    let expected = expected.unwrap_or_else(|problem| panic!("{what}: {problem}"));
    let found = workload::read(pg).await.unwrap_or_else(|problem| panic!("{what}: {problem}"));
    let differences = differences(&expected, &found);
    assert!(differences.is_empty(), "{what}, recovered to {redone}: {differences:#?}");
    amcheck(pg, what).await;
    restored.model = Some(expected);
}

async fn amcheck(pg: &Postgres, what: &str) {
    let check = pg.amcheck().await;
    assert_eq!(check.code, Some(0), "{what}: pg_amcheck: {}{}", check.stdout, check.stderr);
}

/// The primary itself holds what it wrote: nothing that was done beside it has touched it. Tables without WAL may be empty or not.
///
/// # Panics
/// On any difference.
pub async fn verify_primary(pg: &Postgres, oracle: &Oracle) {
    let found = workload::read(pg).await.unwrap_or_else(|problem| panic!("primary: {problem}"));
    let differences = differences(&oracle.at_end(), &found.recovered());
    assert!(differences.is_empty(), "the primary is harmed: {differences:#?}");
    amcheck(pg, "the primary").await;
}

impl Restored {
    /// Starts what was restored and waits until it is promoted.
    ///
    /// # Panics
    /// When PostgreSQL ends instead.
    pub async fn recover(mut pg: Postgres, checksums: bool) -> Self {
        pg.adopt();
        pg.start().await;
        promoted(&mut pg).await;
        Self { pg, checksums, model: None }
    }

    /// Stops it and checks every page, if the cluster has checksums.
    ///
    /// # Panics
    /// When a page is bad.
    pub async fn stop(&mut self) {
        self.pg.stop(Stop::Fast).await;
        if self.checksums {
            self.remove_links_that_replay_left();
            let check = self.pg.checksums().await;
            assert_eq!(check.code, Some(0), "pg_checksums: {}{}", check.stdout, check.stderr);
        }
    }

    /// A file of a relation whose drop was logged before the backup began may still have been there when it was copied. Replay
    /// then cannot remove its tablespace, says so, and leaves the link ("You can remove the directories manually if
    /// necessary"); pg_checksums does not take a link that leads nowhere.
    fn remove_links_that_replay_left(&self) {
        let log = self.pg.log();
        let links = fs::read_dir(self.pg.data_dir().join("pg_tblspc")).into_iter().flatten();
        for link in links.flatten() {
            let oid = link.file_name().to_string_lossy().into_owned();
            let told = format!("directories for tablespace {oid} could not be removed");
            let names = fs::read_dir(link.path()).map(Iterator::count);
            if names.unwrap_or(0) == 0 && log.contains(&told) {
                fs::remove_file(link.path()).expect("remove a link that replay left");
            }
        }
    }

    /// Gives the server away, with what it holds.
    ///
    /// # Panics
    /// When it was not verified.
    #[must_use]
    pub fn into_primary(self) -> (Postgres, Model) {
        (self.pg, self.model.expect("it was verified"))
    }
}
