//! PostgreSQL's own programs, of Debian's version 15: pgbench, `pg_waldump`, `pg_receivewal`.
//!
//! pgbench speaks to every version; `pg_waldump` reads WAL of 15 only, and `pg_receivewal` streams from 15 only.

use super::{Postgres, expect_success, install};
use crate::{
    process::Running,
    programs::{self, Outcome},
};
use std::{
    path::{Path, PathBuf},
    process::Command,
};

impl Postgres {
    fn client(&self, name: &str) -> Command {
        let mut command = install::command(&install::client(name));
        command
            .env("PGHOST", self.socket_dir())
            .env("PGPORT", self.port.to_string())
            .env("PGUSER", "postgres")
            .env("PGDATABASE", "postgres");
        command
    }

    /// Runs pgbench to its end; its report is in the outcome's standard output.
    ///
    /// # Panics
    /// When it fails.
    pub async fn pgbench(&self, args: &[&str]) -> Outcome {
        let mut command = self.client("pgbench");
        command.args(args);
        expect_success("pgbench", programs::run(command).await)
    }

    /// Starts pgbench in the background: it may fail, when PostgreSQL is killed under it.
    #[must_use]
    pub fn start_pgbench(&self, args: &[&str]) -> Running {
        let mut command = self.client("pgbench");
        command.args(args);
        Running::spawn("pgbench", command, &self.scratch.join("pgbench.log"))
    }

    /// Checks every table and index of the database `postgres` with `pg_amcheck` (which needs the extension amcheck there).
    pub async fn amcheck(&self) -> Outcome {
        let mut command = self.client("pg_amcheck");
        command.args(["--heapallindexed", "--jobs=2", "--database=postgres"]);
        programs::run(command).await
    }

    /// Checks every page's checksum with `pg_checksums`; it must not run.
    pub async fn checksums(&self) -> Outcome {
        let mut command = install::command(&install::client("pg_checksums"));
        command.arg("--check").arg("-D").arg(self.data_dir());
        programs::run(command).await
    }

    /// Starts `pg_receivewal` into `dir`, which is given to the user who runs PostgreSQL.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn start_receivewal(&self, dir: &Path, args: &[&str]) -> Running {
        std::fs::create_dir_all(dir).expect("make the directory of pg_receivewal");
        install::give(dir);
        let mut command = self.client("pg_receivewal");
        command.arg("-D").arg(dir).args(args);
        Running::spawn("pg_receivewal", command, &self.scratch.join("receivewal.log"))
    }

    /// Full segments in `pg_wal` up to where PostgreSQL has finished, oldest first: what an archive must have byte for byte.
    ///
    /// # Panics
    /// When the directory cannot be read, or on a standby.
    pub async fn finished_segments(&self) -> Vec<PathBuf> {
        let current = self.segment_of(self.flush_lsn().await).await.to_string();
        let mut names: Vec<String> = std::fs::read_dir(self.pg_wal())
            .expect("read pg_wal")
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name.len() == 24 && *name < current)
            .collect();
        names.sort();
        names.into_iter().map(|name| self.pg_wal().join(name)).collect()
    }
}

/// Decodes WAL files of PostgreSQL 15 with `pg_waldump`; the outcome is returned as it is (status 1 at the end of valid WAL).
pub async fn pg_waldump(args: &[&str]) -> Outcome {
    let mut command = Command::new(install::client("pg_waldump"));
    command.args(args).current_dir("/").env("LC_ALL", "C");
    programs::run(command).await
}
