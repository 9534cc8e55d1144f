//! The agent that belongs to a call of `wal-fetch`, and how to start it with the same settings.

use super::{Patience, data_dir, is_postgresql_s};
use crate::{
    agent::{
        client::{self, Errand, Outcome},
        signalled, spool_for,
    },
    config::Config,
};
use klio_storage::layout::WalFile;
use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

/// Settings that may come from options, and these options.
const FLAGS: [(&str, &str); 5] = [
    ("cluster", "--cluster"),
    ("generation", "--generation"),
    ("server.address", "--server"),
    ("restore.from", "--from"),
    ("restore.identity", "--identity"),
];

/// An agent, running or not.
#[derive(Debug)]
pub(super) struct Resident {
    spool: PathBuf,
    fingerprint: String,
    arguments: Vec<OsString>,
    data_dir: Option<PathBuf>,
}

impl Resident {
    /// `None` if no agent is to be used: it is disabled, or PostgreSQL is not the caller.
    pub fn of(
        config: &Config,
        file: Option<&Path>,
        flags: &[(&'static str, String)],
        path: &Path,
    ) -> Option<Self> {
        let restore = &config.restore;
        if restore.read_ahead.bytes() == 0 || !is_postgresql_s(path) {
            return None;
        }
        let spool = spool_for(path, &restore.spool_dir);
        let fingerprint = config.fingerprint(flags);
        let mut arguments: Vec<OsString> = vec!["wal-agent".into()];
        let mut add = |name: &str, value: OsString| arguments.extend([name.into(), value]);
        add("--spool", spool.clone().into());
        add("--fingerprint", fingerprint.clone().into());
        if let Some(data_dir) = data_dir(path) {
            add("--data-dir", data_dir.into());
        }
        if let Some(file) = file {
            add("--config", file.into());
        }
        for (setting, value) in flags {
            if let Some((_, flag)) = FLAGS.iter().find(|(name, _)| name == setting) {
                add(flag, value.into());
            }
        }
        Some(Self { spool, fingerprint, arguments, data_dir: data_dir(path).map(Path::to_owned) })
    }

    /// Asks the agent, and starts it if it does not run.
    pub fn ask(&self, file: WalFile, path: &Path, patience: &Patience) -> Outcome {
        let Self { spool, fingerprint, arguments, data_dir } = self;
        let (deadline, silence_max) = (patience.deadline, patience.asker.silence_max());
        let silence_max = silence_max.unwrap_or(client::SILENCE_MAX);
        let errand = Errand { spool, fingerprint, file, path, deadline, silence_max };
        client::ask(&errand, || {
            // PostgreSQL asks for a history file after it has ended recovery. Nobody needs an agent for that, and
            // there is nothing to report.
            if data_dir.as_deref().is_some_and(|data_dir| !signalled(data_dir)) {
                return Err(std::io::Error::other(""));
            }
            client::start(spool, arguments)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{super::super::args::Cli, *};
    use clap::Parser;

    /// An agent that was started without one of them would give another history's WAL (P11), or WAL from another place.
    #[test]
    fn every_option_that_says_where_wal_comes_from_reaches_the_agent() {
        let line = "klio --cluster c --generation 2 --server https://x wal-fetch --from s3://b --identity i \
                    000000010000000000000001 pg_wal/RECOVERYXLOG";
        let flags = Cli::try_parse_from(line.split_whitespace()).unwrap().flags();
        assert_eq!(flags.len(), FLAGS.len());
        let config = Config::load(None, &flags).unwrap();
        let path = Path::new("pg_wal/RECOVERYXLOG");
        let resident = Resident::of(&config, None, &flags, path).unwrap();
        for (setting, value) in &flags {
            let (_, flag) = FLAGS.iter().find(|(name, _)| name == setting).unwrap();
            let at = resident.arguments.iter().position(|word| word == flag).unwrap();
            assert_eq!(resident.arguments[at + 1], value.as_str(), "{flag}");
        }
    }
}
