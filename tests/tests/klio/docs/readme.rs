//! "Backups and restores" in README.md works as it is written: every command of it is taken out of the page and run by the user who
//! runs PostgreSQL. Only places, ports and the moment are others.

use klio_tests::{
    install_crypto, ports,
    postgres::{Postgres, Session, install},
    programs::{self, Outcome},
    proof::{Restorer, Source},
    readme::commands,
    s3::S3,
    scratch::Scratch,
    site::{PATIENCE, Site},
    wait::eventually,
};
use std::{fs, path::PathBuf};

/// A user with the page before them.
struct Reader {
    site: Site,
    s3: S3,
    pg: Postgres,
    scratch: Scratch,
    port: u16,
    left: Vec<String>,
}

impl Reader {
    async fn new() -> Self {
        install_crypto();
        let s3 = S3::new();
        let mut site = Site::new().await.tier2(&s3);
        site.start().await;
        let scratch = Scratch::new("readme");
        install::give(scratch.path());
        let _ = Restorer::of_server(&site, &scratch);
        Self {
            site,
            s3,
            pg: Postgres::new().await,
            scratch,
            port: ports::free(),
            left: commands("### Backups and restores", &["klio ", "pg_ctl "]),
        }
    }

    fn restored(&self) -> PathBuf {
        self.scratch.join("restored")
    }

    /// The first command that is left and begins so, with `swaps` instead of what the page has.
    async fn run(&mut self, begin: &str, swaps: &[(&str, String)]) -> Outcome {
        let found = self.left.iter().position(|command| command.starts_with(begin));
        let found = found.unwrap_or_else(|| panic!("README.md has no {begin}: {:?}", self.left));
        let mut command = self.left.remove(found);
        let ours = [
            ("/var/tmp/restored", self.restored().display().to_string()),
            ("-p 5499", format!("-p {}", self.port)),
        ];
        for (documented, real) in swaps.iter().chain(&ours) {
            command = command.replace(documented, real);
        }
        let program = programs::klio();
        let path =
            [program.parent().expect("a directory"), &install::bin_dir(install::DEBIAN_MAJOR)]
                .map(|directory| directory.display().to_string())
                .join(":");
        let log = self.scratch.join("out");
        let mut shell = install::command("/bin/bash".as_ref());
        // Not a pipe: PostgreSQL would keep it open.
        shell.args(["-c", &format!("PATH={path}:$PATH; {command} >{} 2>&1", log.display())]);
        shell.env("KLIO_POSTGRES__DSN", self.pg.conninfo()).current_dir(self.scratch.join("hands"));
        let outcome = programs::run(shell).await;
        let told = fs::read_to_string(&log).unwrap_or_default();
        assert_eq!(outcome.code, Some(0), "{command}: {told}");
        Outcome { stdout: told, ..outcome }
    }

    /// Starts what was restored, as the page says, and ends it again with what a statement gives.
    async fn look(&mut self, pg_ctl: &str, sql: &str) -> String {
        self.left.insert(0, pg_ctl.to_owned());
        let _ended = Ended(self.restored());
        self.run("pg_ctl", &[]).await;
        let socket = self.pg.socket_dir().display();
        let conninfo = format!("host={socket} port={} user=postgres dbname=postgres", self.port);
        eventually("recovery to end", PATIENCE, || async {
            let session = Session::connect(&conninfo).await.ok()?;
            let rows = session.rows("select pg_is_in_recovery()").await.ok()?;
            (rows[0][0] == "f").then_some(())
        })
        .await;
        let session = Session::connect(&conninfo).await.expect("connect");
        session.rows(sql).await.expect("an answer").swap_remove(0).swap_remove(0)
    }
}

/// Ends the PostgreSQL of a directory and removes it, whatever happens.
struct Ended(PathBuf);

impl Drop for Ended {
    fn drop(&mut self) {
        let pg_ctl = install::bin_dir(install::DEBIAN_MAJOR).join("pg_ctl");
        let mut stop = install::command(&pg_ctl);
        let _ = stop.args(["-m", "immediate", "-w", "stop", "-D"]).arg(&self.0).output();
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn backups_and_restores_in_the_readme_work_as_written() {
    let mut reader = Reader::new().await;
    let stream = reader.site.stream(&reader.pg);
    reader.pg.execute("create table t as select generate_series(1, 1000) g").await;
    reader.site.wait_flushed(reader.pg.flush_lsn().await).await;
    let told = reader.run("klio backup", &[]).await.stdout;
    assert!(told.contains("verified") && told.contains("good"), "{told}");
    let told = reader.run("klio list backups", &[]).await.stdout;
    assert!(told.contains("recoverable"), "{told}");

    let moment = reader.pg.value("select clock_timestamp()").await;
    reader.pg.execute("delete from t").await;
    reader.site.wait_flushed(reader.pg.flush_lsn().await).await;
    let start = reader.left.iter().find(|command| command.starts_with("pg_ctl")).cloned();
    let start = start.expect("the page starts it");
    reader.left.retain(|command| *command != start);
    reader.run("klio restore", &[("2026-11-21 14:03:00+00", moment)]).await;
    assert_eq!(reader.look(&start, "select count(*) from t").await, "1000", "before the accident");

    reader.run("klio verify", &[]).await;
    let told = reader.run("klio drill", &[]).await.stdout;
    assert!(told.contains("pg_amcheck") || told.contains("good"), "{told}");

    // The server is gone, and its disk.
    let segment = reader.pg.segment_size().await;
    let switched = reader.pg.switch_wal().await.segment_start(segment);
    reader.pg.write_wal(1).await;
    reader.site.wait_archived(switched).await;
    reader.s3.wait_backup("main").await;
    let bucket = Restorer::new(&reader.site, &reader.s3, Source::Bucket, &reader.scratch);
    drop(bucket);
    drop(stream);
    reader.site.stop().await;
    fs::remove_dir_all(reader.site.tier1()).expect("the disk is lost");
    let hands = reader.scratch.join("hands");
    let url = format!("s3://{}/klio", reader.s3.settings().bucket);
    let swaps = [
        ("bucket.toml", hands.join("klio.toml").display().to_string()),
        ("s3://backups/klio", url),
    ];
    reader.run("klio restore", &swaps).await;
    assert_eq!(reader.look(&start, "select count(*) from t").await, "0", "after the accident");
    assert!(reader.left.is_empty(), "not run: {:?}", reader.left);
}
