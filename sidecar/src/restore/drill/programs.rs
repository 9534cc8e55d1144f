//! Finds PostgreSQL's programs of the right major version, and the user who runs them.

use super::{copy::COPIED, trace};
use crate::{
    config::{Config, environment},
    error::{Error, Failure, local},
};
use std::{
    fs,
    os::unix::fs::lchown,
    path::{Path, PathBuf},
    process::Command,
};

/// User id and group id; `None` to stay the current user.
pub type RunAs = Option<(u32, u32)>;

/// Where PostgreSQL's programs are, and who runs them.
#[derive(Debug, Clone)]
pub struct Programs {
    bin_dir: PathBuf,
    run_as: RunAs,
}

/// If this process is root: the user who is to run PostgreSQL.
///
/// # Errors
/// No such user, or it is root.
pub fn run_as(name: &str) -> Result<RunAs, Error> {
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let ids = users.lines().find_map(|line| {
        let mut fields = line.split(':');
        let found = fields.next()? == name;
        let id = |field: Option<&str>| field?.parse().ok();
        let ids = (id(fields.nth(1))?, id(fields.next())?);
        found.then_some(ids)
    });
    match ids {
        Some((user, _)) if user != 0 => ids.map_or(Ok(None), |ids| Ok(Some(ids))),
        _ => Err(Error::new(
            Failure::Config,
            format!("run drill as root: PostgreSQL does not run as root, and drill.run_as {name:?} is not the name of another user"),
        )
        .hint("run klio drill as the user who runs PostgreSQL, or set drill.run_as")),
    }
}

impl Programs {
    /// Finds the first directory with a `postgres` of this major version.
    ///
    /// # Errors
    /// None was found; the message lists where it was searched for.
    pub fn find(config: &Config, major: u32, run_as: RunAs) -> Result<Self, Error> {
        let mut places = Vec::new();
        let configured = &config.drill.bin_dir;
        if configured.as_os_str().is_empty() {
            let ask = || Command::new("pg_config").arg("--bindir").output();
            let asked = trace::run("pg_config", ask);
            let asked = asked.ok().filter(|output| output.status.success());
            places.extend(asked.map(|o| String::from_utf8_lossy(&o.stdout).trim().into()));
            let path = environment("PATH").unwrap_or_default();
            places.extend(path.split(':').map(PathBuf::from));
            places.extend([
                format!("/usr/lib/postgresql/{major}/bin").into(),
                format!("/usr/pgsql-{major}/bin").into(),
                format!("/opt/homebrew/opt/postgresql@{major}/bin").into(),
                PathBuf::from("/usr/local/pgsql/bin"),
            ]);
        } else {
            places.push(configured.clone());
        }
        let found = places.iter().find(|place| major_of(&place.join("postgres")) == Some(major));
        let bin_dir = found.cloned().ok_or_else(|| {
            let looked: Vec<String> = places.iter().map(|p| p.display().to_string()).collect();
            let message = format!("find PostgreSQL {major}: found none in {}", looked.join(", "));
            Error::new(Failure::Config, message).hint(
                "install it on this machine, or set drill.bin_dir to the directory of its postgres",
            )
        })?;
        Ok(Self { bin_dir, run_as })
    }

    /// A program from the same directory as `postgres`, and so of exactly the same version.
    pub fn beside(&self, name: &str) -> Option<PathBuf> {
        Some(self.bin_dir.join(name)).filter(|program| program.is_file())
    }

    /// A program; if it is not beside `postgres`, one on PATH or of another version of PostgreSQL.
    pub fn path(&self, name: &str) -> Option<PathBuf> {
        if let Some(beside) = self.beside(name) {
            return Some(beside);
        }
        let path = environment("PATH").unwrap_or_default();
        let on_path = path.split(':').map(|directory| Path::new(directory).join(name));
        let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
        let mut others: Vec<PathBuf> =
            versions.map(|version| version.path().join("bin").join(name)).collect();
        others.sort();
        on_path.chain(others.into_iter().rev()).find(|path| path.is_file())
    }

    /// A command that runs as the drill's user (`run_as`). The environment variables that PostgreSQL's programs read are removed.
    pub fn command(&self, program: &Path) -> tokio::process::Command {
        let mut command = tokio::process::Command::new(program);
        for name in ["PGHOST", "PGPORT", "PGUSER", "PGDATABASE", "PGSERVICE", "PGOPTIONS", "PGDATA"]
        {
            command.env_remove(name);
        }
        if self.run_as.is_some() {
            // The copied configuration file has these settings; the variables would override them.
            for (section, name) in COPIED {
                let variable = format!("KLIO_{section}__{name}").to_uppercase();
                command.env_remove(variable);
            }
        }
        command.env("LC_ALL", "C").current_dir("/").kill_on_drop(true).process_group(0);
        command.envs(trace::traceparent().map(|context| (trace::TRACEPARENT, context)));
        if let Some((user, group)) = self.run_as {
            command.uid(user).gid(group);
        }
        command
    }

    /// Whether PostgreSQL is run by another user.
    pub const fn drops(&self) -> bool {
        self.run_as.is_some()
    }

    /// Makes the other user the owner of one path.
    ///
    /// # Errors
    /// An I/O error of the file system.
    pub fn give(&self, path: &Path) -> Result<(), Error> {
        let Some((user, group)) = self.run_as else { return Ok(()) };
        lchown(path, Some(user), Some(group))
            .map_err(|error| local("change the owner of", path, &error))
    }

    /// Makes the other user the owner of a path and everything below it.
    ///
    /// # Errors
    /// An I/O error of the file system.
    pub fn give_all(&self, path: &Path) -> Result<(), Error> {
        if self.run_as.is_none() {
            return Ok(());
        }
        self.give(path)?;
        let meta = fs::symlink_metadata(path).map_err(|error| local("look at", path, &error))?;
        if meta.is_dir() {
            let entries = fs::read_dir(path).map_err(|error| local("look into", path, &error))?;
            entries.flatten().try_for_each(|entry| self.give_all(&entry.path()))?;
        }
        Ok(())
    }
}

/// Reads the version from output such as `postgres (PostgreSQL) 15.13 (Debian 15.13-0+deb12u1)`.
fn major_of(postgres: &Path) -> Option<u32> {
    if !postgres.is_file() {
        return None;
    }
    let ask = || Command::new(postgres).arg("--version").output();
    let output = trace::run("postgres", ask).ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = text.split_whitespace().find(|w| w.starts_with(|c: char| c.is_ascii_digit()))?;
    let digits: String = version.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_user_s_program_is_not_told_of_files_it_cannot_read() {
        let with = |run_as| {
            let programs = Programs { bin_dir: PathBuf::new(), run_as };
            let command = programs.command(Path::new("postgres"));
            let removed = command.as_std().get_envs().filter(|(_, value)| value.is_none());
            removed.map(|(name, _)| name.to_string_lossy().into_owned()).collect::<Vec<_>>()
        };
        for name in ["KLIO_SERVER__KEY", "KLIO_TIER2__SERVICE_ACCOUNT_FILE"] {
            assert!(with(Some((1, 1))).iter().any(|removed| removed == name), "{name}");
            assert!(with(None).iter().all(|removed| removed != name), "{name}");
        }
    }
}
