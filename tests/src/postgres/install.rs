//! Where each PostgreSQL major version is installed, and how its programs are run.
//!
//! PostgreSQL refuses to run as root: when the tests are root, its programs run as the user `postgres`.

use crate::env;
use std::{
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
};

/// Version of Debian 12, and of every client program used (pgbench, `pg_waldump`, `pg_receivewal`).
pub const DEBIAN_MAJOR: u32 = 15;

/// The majors every test of all versions runs over.
pub const MAJORS: [u32; 4] = [15, 16, 17, 18];

fn debian_bin(major: u32) -> PathBuf {
    PathBuf::from(format!("/usr/lib/postgresql/{major}/bin"))
}

/// The directory with `postgres` and `initdb` of this major version.
///
/// # Panics
/// When it is not installed.
#[must_use]
pub fn bin_dir(major: u32) -> PathBuf {
    let ours = env::repository().join(format!(".tools/pg/{major}/bin"));
    // The real path: .tools/pg may be a link to a place that `postgres` can reach.
    let ours = fs::canonicalize(&ours).unwrap_or(ours);
    [ours, debian_bin(major)]
        .into_iter()
        .find(|dir| dir.join("postgres").is_file())
        .unwrap_or_else(|| panic!("find PostgreSQL {major}: not installed; hint: run `make tools`"))
}

/// A client program of Debian's PostgreSQL 15.
///
/// # Panics
/// When it is not installed.
#[must_use]
pub fn client(name: &str) -> PathBuf {
    let program = debian_bin(DEBIAN_MAJOR).join(name);
    assert!(program.is_file(), "find {}: hint: run `make tools`", program.display());
    program
}

/// User and group to run PostgreSQL as; `None` when the tests are not root.
///
/// # Panics
/// When the tests are root and there is no user `postgres`.
#[must_use]
pub fn other_user() -> Option<(u32, u32)> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let users = fs::read_to_string("/etc/passwd").expect("read /etc/passwd");
    let line = users.lines().find_map(|l| l.strip_prefix("postgres:"));
    let line = line.expect(
        "a user `postgres`, because PostgreSQL does not run as root; hint: run `make tools`",
    );
    let mut ids = line.split(':').skip(1).map(|id| id.parse().expect("a number in /etc/passwd"));
    ids.next().zip(ids.next())
}

/// A command that runs as the user who may run PostgreSQL, with a clean environment.
#[must_use]
pub fn command(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.env_clear().env("PATH", "/usr/bin:/bin").env("LC_ALL", "C").env("TZ", "UTC");
    command.current_dir("/");
    if let Some((user, group)) = other_user() {
        command.uid(user).gid(group);
    }
    command
}

/// Gives a file or directory to the user who runs PostgreSQL.
///
/// # Panics
/// When it cannot be given.
pub fn give(path: &Path) {
    if let Some((user, group)) = other_user() {
        std::os::unix::fs::chown(path, Some(user), Some(group))
            .unwrap_or_else(|e| panic!("give {} to postgres: {e}", path.display()));
    }
}
