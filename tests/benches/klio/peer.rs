//! pgBackRest, set up as docs/benchmarks.md says: process-max 2, zst level 3, a repository on the local disk, fast checkpoint.
//!
//! Its programs run as the user of PostgreSQL, because PostgreSQL itself runs `archive-push`.

use crate::measured::{self, Measured};
use klio_tests::{
    postgres::{Postgres, install},
    programs,
    scratch::Scratch,
};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

const STANZA: &str = "bench";

/// A repository and its configuration.
pub struct Peer {
    scratch: Scratch,
}

/// Where the program is; `make bench` installs it.
fn program() -> PathBuf {
    let program = PathBuf::from("/usr/bin/pgbackrest");
    assert!(program.is_file(), "find pgbackrest; hint: run `deploy/tools/install.sh --bench`");
    program
}

impl Peer {
    /// A new repository for this cluster, which archives to it from now on.
    pub async fn new(pg: &Postgres, more: &str) -> Self {
        let scratch = Scratch::new("pgbackrest");
        install::give(scratch.path());
        let at = |name: &str| {
            let path = scratch.join(name);
            fs::create_dir_all(&path).expect("make a directory");
            install::give(&path);
            path.display().to_string()
        };
        let text = format!(
            "[global]\nrepo1-path={}\nlog-path={}\nlock-path={}\nspool-path={}\nprocess-max=2\ncompress-type=zst\n\
             compress-level=3\nstart-fast=y\nlog-level-console=warn\nlog-level-file=off\nrepo1-retention-full=9\n{more}\n\
             [{STANZA}]\npg1-path={}\npg1-port={}\npg1-socket-path={}\npg1-user=postgres\n",
            at("repo"),
            at("log"),
            at("lock"),
            at("spool"),
            pg.data_dir().display(),
            pg.port(),
            pg.socket_dir().display(),
        );
        let config = scratch.join("pgbackrest.conf");
        fs::write(&config, text).expect("write pgbackrest.conf");
        install::give(&config);
        let peer = Self { scratch };
        let outcome = programs::run(peer.command(&["stanza-create"])).await;
        assert_eq!(outcome.code, Some(0), "stanza-create: {}{}", outcome.stdout, outcome.stderr);
        pg.set("archive_command", &format!("{} archive-push %p", peer.line())).await;
        peer
    }

    /// The command's beginning, for `archive_command` and `restore_command`.
    pub fn line(&self) -> String {
        let config = self.scratch.join("pgbackrest.conf");
        format!("{} --config={} --stanza={STANZA}", program().display(), config.display())
    }

    /// A command of PostgreSQL's user.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = install::command(&program());
        let config = self.scratch.join("pgbackrest.conf");
        command.arg(format!("--config={}", config.display())).arg(format!("--stanza={STANZA}"));
        command.args(args);
        command
    }

    /// A backup: `full` or `incr`.
    pub async fn backup(&self, kind: &str) -> Measured {
        let command = self.command(&[&format!("--type={kind}"), "backup"]);
        measured::run("pgbackrest backup", command, &self.scratch.join("out.log")).await
    }

    /// Restores the newest backup to a directory; with `delta` onto what is there.
    pub async fn restore(&self, to: &Path, delta: bool) -> Measured {
        let path = format!("--pg1-path={}", to.display());
        let mut args = vec![path.as_str(), "--type=immediate"];
        if delta {
            args.push("--delta");
        }
        args.push("restore");
        measured::run("pgbackrest restore", self.command(&args), &self.scratch.join("out.log"))
            .await
    }

    /// Bytes of its backups, without archived WAL.
    pub fn stored_bytes(&self) -> u64 {
        measured::stored_bytes(&self.scratch.join("repo/backup"))
    }
}
