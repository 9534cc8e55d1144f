//! Copies the configuration for the user who runs PostgreSQL, if this process is root and that user cannot read it.
//!
//! The copies are in the scratch directory, which only that user can enter, and are removed with it.

use super::{Invocation, Scratch, programs::Programs};
use crate::{
    config::Config,
    error::{Error, Failure, local},
};
use std::{
    fs,
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};
use toml::{Table, Value};

/// Settings that name a file, which is copied. The environment variables of these settings must be unset, because
/// they would override the copy.
pub(super) const COPIED: [(&str, &str); 6] = [
    ("server", "ca"),
    ("server", "cert"),
    ("server", "key"),
    ("restore", "identity"),
    ("tier2", "ca_file"),
    ("tier2", "service_account_file"),
];

/// The invocation for restore_command.
///
/// # Errors
/// Files that cannot be read or written.
pub fn readable(
    invocation: &Invocation,
    config: &Config,
    scratch: &Scratch,
    programs: &Programs,
) -> Result<Invocation, Error> {
    if !programs.drops() {
        return Ok(invocation.clone());
    }
    let hands = Hands { scratch, programs };
    let text = match &config.file {
        Some(file) => fs::read_to_string(file).map_err(|error| local("read", file, &error))?,
        None => String::new(),
    };
    let mut table: Table = text.parse().map_err(|error: toml::de::Error| {
        Error::new(Failure::Config, format!("read configuration: {}", error.message()))
    })?;
    // Settings from the environment or from options still reach `wal-fetch` that way; only the paths have to be replaced.
    let mut set = |section: &str, name: &str, path: &Path| -> Result<(), Error> {
        let copy = hands.copy(&format!("{section}-{name}"), path)?;
        let entry = table.entry(section).or_insert_with(|| Value::Table(Table::new()));
        if let Value::Table(section) = entry {
            section.insert(name.to_owned(), Value::String(copy.display().to_string()));
        }
        Ok(())
    };
    if config.restore.from.is_empty() && !config.server.unsafe_plaintext {
        set("server", "ca", &config.server.ca)?;
        set("server", "cert", &config.server.cert)?;
        set("server", "key", &config.server.key)?;
    }
    if !config.restore.identity.as_os_str().is_empty() {
        set("restore", "identity", &config.restore.identity)?;
    }
    let tier2 = config.tier2.as_ref();
    if let Some(file) = tier2.and_then(|tier2| tier2.ca_file.as_ref()) {
        set("tier2", "ca_file", file)?;
    }
    if let Some(file) = tier2.and_then(|tier2| tier2.service_account_file.as_ref()) {
        set("tier2", "service_account_file", file)?;
    }
    let file = hands.write("klio.toml", table.to_string().as_bytes())?;
    let mut arguments = vec!["--config".to_owned(), file.display().to_string()];
    let pairs = invocation.arguments.chunks(2);
    let others = pairs.filter(|pair| !matches!(pair[0].as_str(), "--config" | "--identity"));
    arguments.extend(others.flatten().cloned());
    Ok(Invocation { program: invocation.program.clone(), arguments })
}

struct Hands<'a> {
    scratch: &'a Scratch,
    programs: &'a Programs,
}

impl Hands<'_> {
    fn copy(&self, name: &str, from: &Path) -> Result<PathBuf, Error> {
        let content = fs::read(from).map_err(|error| local("read", from, &error))?;
        self.write(name, &content)
    }

    fn write(&self, name: &str, content: &[u8]) -> Result<PathBuf, Error> {
        let path = self.scratch.join(name);
        let file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        let written = file.and_then(|mut file| file.write_all(content));
        written.map_err(|error| local("write", &path, &error))?;
        self.programs.give(&path)?;
        Ok(path)
    }
}
