//! Parses an ordinary `wal-fetch` command line by hand, because PostgreSQL starts one program per segment and parsing
//! with clap takes longer.
//!
//! It understands only what is usual in a restore_command. Everything that is unknown, wrong or needs telemetry takes
//! the normal path, which also reports what is wrong.

use super::{is_postgresql_s, resident::Resident};
use crate::config::{Config, Needs, parse_duration, telemetry_wanted};
use klio_storage::layout::WalFile;
use std::{ffi::OsString, path::PathBuf, time::Duration};

/// The default of the normal path.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A call of `wal-fetch` by PostgreSQL.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub file: WalFile,
    pub path: PathBuf,
    pub timeout: Duration,
    config: Option<PathBuf>,
    flags: Vec<(&'static str, String)>,
}

impl Request {
    /// `None` if the call has to take the normal path.
    pub fn read(arguments: &[OsString]) -> Option<Self> {
        let words: Option<Vec<&str>> = arguments.iter().skip(1).map(|a| a.to_str()).collect();
        let mut words = words?.into_iter();
        let (mut config, mut timeout) = (None, TIMEOUT);
        // Listed below in the same order as in `Cli::flags`.
        let (mut cluster, mut server, mut from, mut identity) = (None, None, None, None);
        let mut plain = Vec::new();
        while let Some(word) = words.next() {
            if !word.starts_with('-') {
                plain.push(word);
                continue;
            }
            let (name, value) = match word.split_once('=') {
                Some((name, value)) => (name, value),
                None => (word, words.next()?),
            };
            match name {
                "-c" | "--config" => config = Some(PathBuf::from(value)),
                "--timeout" => timeout = parse_duration(value).ok()?,
                "--cluster" => cluster = Some(value.to_owned()),
                "--server" => server = Some(value.to_owned()),
                "--from" => from = Some(value.to_owned()),
                "--identity" => identity = Some(value.to_owned()),
                _ => return None,
            }
        }
        let ["wal-fetch", file, path] = plain[..] else { return None };
        let (file, path) = (file.parse().ok()?, PathBuf::from(path));
        if !is_postgresql_s(&path) {
            return None;
        }
        let flags = [
            ("cluster", cluster),
            ("server.address", server),
            ("restore.from", from),
            ("restore.identity", identity),
        ];
        let flags = flags.into_iter().filter_map(|(name, value)| Some((name, value?))).collect();
        Some(Self { file, path, timeout, config, flags })
    }

    /// The agent to ask; `None` if the call has to take the normal path.
    pub fn resident(&self) -> Option<Resident> {
        let config = Config::load(self.config.as_deref(), &self.flags).ok()?;
        // Tracing needs a span for each call.
        if telemetry_wanted(&config) {
            return None;
        }
        let needs = Needs { cluster: true, source: true, ..Needs::default() };
        config.validate(needs).ok()?;
        Resident::of(&config, self.config.as_deref(), &self.flags, &self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::super::args::Cli, *};
    use clap::Parser;

    fn words(text: &str) -> Vec<OsString> {
        text.split_whitespace().map(Into::into).collect()
    }

    /// The same command line must mean the same on both paths, or the agent would be taken for one with other settings.
    #[test]
    fn what_is_read_by_hand_is_what_clap_reads() {
        for line in [
            "klio wal-fetch 000000010000000000000001 pg_wal/RECOVERYXLOG",
            "klio -c k.toml wal-fetch 00000002.history pg_wal/RECOVERYHISTORY --timeout 5s",
            "klio wal-fetch --identity=id --from s3://b 000000010000000000000001 pg_wal/RECOVERYXLOG",
            "klio --server https://x --cluster c wal-fetch 000000010000000000000001 /d/RECOVERYXLOG --config=f",
        ] {
            let quick = Request::read(&words(line)).unwrap();
            let cli = Cli::try_parse_from(words(line)).unwrap();
            assert_eq!(quick.flags, cli.flags(), "{line}");
            assert_eq!(quick.config, cli.global.config, "{line}");
            let super::super::super::args::Command::WalFetch(args) = &cli.command else {
                panic!("{line}")
            };
            assert_eq!((quick.timeout, &quick.path), (args.timeout, &args.path));
            assert_eq!(quick.file.to_string(), args.name);
        }
    }

    #[test]
    fn whatever_is_unusual_goes_the_long_way() {
        for line in [
            "klio wal-fetch",
            "klio wal-fetch 000000010000000000000001",
            "klio wal-fetch nonsense pg_wal/RECOVERYXLOG",
            "klio wal-fetch 000000010000000000000001 /tmp/x",
            "klio wal-fetch 000000010000000000000001 pg_wal/RECOVERYXLOG extra",
            "klio wal-fetch 000000010000000000000001 pg_wal/RECOVERYXLOG --timeout soon",
            "klio wal-fetch 000000010000000000000001 pg_wal/RECOVERYXLOG --timeout",
            "klio wal-fetch 000000010000000000000001 pg_wal/RECOVERYXLOG --no-agent",
            "klio --debug wal-fetch 000000010000000000000001 pg_wal/RECOVERYXLOG",
            "klio stream",
        ] {
            assert_eq!(Request::read(&words(line)), None, "{line}");
        }
    }
}
