//! Finds out who runs `wal-fetch`, which decides how a failure is reported. The decision uses the raw arguments,
//! before they are parsed, because a misspelt restore_command is run by PostgreSQL too.
//!
//! A failure ends recovery with a status above 125 (P7), except on a standby. PostgreSQL in standby mode takes every
//! status below 126 for "not there", goes on to its primary and asks again. A status above 125 ends the server, which
//! then can neither be promoted nor started while the archive is away (RestoreArchivedFile() in
//! src/backend/access/transam/xlogarchive.c, WaitForWALToBecomeAvailable() in xlogrecovery.c).
//!
//! A promotion asks once more after it has removed standby.signal: for the history of the timeline that it comes from
//! (writeTimeLineHistory() in timeline.c). If it were stopped there, PostgreSQL would start again as a primary on the
//! old timeline. It does not need the archive for that if it has its own copy in pg_wal, which RestoreArchivedFile()
//! then uses, or if the timeline is the first, which has no history. In these cases it gets a quick answer too.

use super::{data_dir, is_postgresql_s};
use crate::{
    error::{Error, Failure},
    wal_source::is_standby,
};
use klio_proto::Code;
use klio_storage::layout::WalFile;
use std::{
    ffi::OsString,
    path::Path,
    time::{Duration, Instant},
};

/// A standby asks again every wal_retrieve_retry_interval (5 s), and a standby that is being promoted asks four or
/// five times before it accepts connections. So it gets its answer within that interval, including the time to end
/// this program.
const STANDBY_PATIENCE: Duration = Duration::from_secs(4);
/// How long a fetch that has begun may receive nothing: a slow link is not a failure.
pub(super) const STANDBY_QUIET_MAX: Duration = STANDBY_PATIENCE;
/// How long an agent may be silent on a standby. It reports every second that it is working; after a longer silence,
/// there has to be time left to fetch without it.
const STANDBY_SILENCE: Duration = Duration::from_secs(2);

/// Who waits for the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::cli) enum Asker {
    /// Recovery to a target, `pg_rewind`, or a person: nobody asks again automatically.
    Once,
    /// PostgreSQL as a standby.
    Standby,
    /// PostgreSQL that asks for a history file but can go on without it.
    Content,
}

/// How long a call may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::cli) struct Patience {
    pub asker: Asker,
    /// When the call has to be finished.
    pub deadline: Instant,
    /// A standby's fetch that makes progress may go on until then.
    pub longest: Instant,
}

impl Asker {
    pub fn of(arguments: &[OsString]) -> Self {
        let words = || arguments.iter().skip(1).map(Path::new);
        let mut own = words().filter(|word| is_postgresql_s(word)).peekable();
        let asked = own.peek().is_some() || words().any(|word| word == Path::new("wal-fetch"));
        if !asked || words().any(is_pg_rewind_s) {
            return Asker::Once;
        }
        // PostgreSQL runs the command in its data directory.
        let mut directories = own.clone().filter_map(data_dir).chain([Path::new(".")]);
        if directories.any(is_standby) {
            return Asker::Standby;
        }
        let files = || words().filter_map(|word| word.to_str()?.parse::<WalFile>().ok());
        let needless = |data: &Path, file: WalFile| match file {
            WalFile::History(timeline) => {
                timeline.get() == 1 || data.join("pg_wal").join(file.to_string()).is_file()
            }
            WalFile::Segment(_) | WalFile::Partial(_) => false,
        };
        let content = |data: &Path| files().any(|file| needless(data, file));
        match own.filter_map(data_dir).any(content) {
            true => Asker::Content,
            false => Asker::Once,
        }
    }

    /// Limits that start now; `within` is the time that a first attempt left over.
    pub fn patience(self, timeout: Duration, within: Option<Duration>) -> Patience {
        let now = Instant::now();
        let longest = now + timeout;
        let deadline = match self {
            Asker::Once => longest,
            Asker::Standby | Asker::Content => {
                longest.min(now + within.unwrap_or(STANDBY_PATIENCE))
            }
        };
        Patience { asker: self, deadline, longest }
    }

    /// How long an agent may be silent; `None` for the default of the agent's client.
    pub fn silence_max(self) -> Option<Duration> {
        (self != Asker::Once).then_some(STANDBY_SILENCE)
    }

    /// Adds to an error what it means for the asker, because it is read in PostgreSQL's log.
    pub fn explain(self, file: &str, error: Error) -> Error {
        if self == Asker::Once || error.failure == Failure::Code(Code::NotFound) {
            return error;
        }
        if self == Asker::Content {
            return error.hint("PostgreSQL goes on with its own copy of the history file");
        }
        let missing = match file.parse() {
            Ok(WalFile::History(timeline)) => format!(
                "it is unknown whether the archive has timeline {}: if promoted now, this standby may take a number that \
                 is already in use",
                timeline.get()
            ),
            Ok(file) => format!(
                "if promoted now, this standby lacks the WAL that only the archive has, from {} on",
                file.to_string().split('.').next().unwrap_or_default()
            ),
            Err(_) => {
                "if promoted now, this standby lacks the WAL that only the archive has".to_owned()
            }
        };
        let hint = match error.hint.as_str() {
            "" => String::new(),
            hint => format!("{hint}; "),
        };
        error.hint(format!(
            "{hint}as this is a standby, PostgreSQL goes on and asks again by itself; {missing}"
        ))
    }
}

/// `pg_rewind` asks for segments by their own names (RestoreArchivedFile() in src/fe_utils/archive.c), also in the
/// data directory of a former standby. It gives up at the first failure, so it gets the long timeout.
fn is_pg_rewind_s(path: &Path) -> bool {
    let in_pg_wal = path.parent().is_some_and(|directory| directory.ends_with("pg_wal"));
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    in_pg_wal && name.parse::<WalFile>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<OsString> {
        text.split_whitespace().map(Into::into).collect()
    }

    /// P7 and its exception for a standby; if both signal files exist, PostgreSQL's own rule decides.
    #[test]
    fn only_a_data_directory_with_standby_signal_is_a_standby() {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path().display();
        let segment = "000000010000000000000001";
        let asks = [
            format!("klio wal-fetch {segment} {data}/pg_wal/RECOVERYXLOG"),
            format!("klio wal-fetch 00000002.history {data}/pg_wal/RECOVERYHISTORY --timeout 9s"),
            // Misspelt in two ways.
            format!("klio wal-fech {segment} {data}/pg_wal/RECOVERYXLOG"),
            format!("klio --sorce x wal-fetch nonsense {data}/pg_wal/RECOVERYXLOG"),
        ];
        let all = |expected| {
            for ask in &asks {
                assert_eq!(Asker::of(&words(ask)), expected, "{ask}");
            }
        };
        all(Asker::Once);
        std::fs::write(directory.path().join("recovery.signal"), "").unwrap();
        all(Asker::Once);
        std::fs::write(directory.path().join("standby.signal"), "").unwrap();
        all(Asker::Standby);
        for other in [
            format!("klio wal-fetch {segment} {data}/pg_wal/{segment}"),
            format!("klio wal-fetch {segment} /tmp/{segment}"),
            format!("klio list {data}"),
        ] {
            assert_eq!(Asker::of(&words(&other)), Asker::Once, "{other}");
        }
    }

    /// PostgreSQL 15 removes standby.signal before it asks for this; the end-to-end test of a promotion found it.
    #[test]
    fn a_promotion_is_not_stopped_for_a_history_that_it_does_not_need() {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path();
        std::fs::create_dir(data.join("pg_wal")).unwrap();
        let of = |file: &str, path: &str| {
            Asker::of(&words(&format!("klio wal-fetch {file} {}/pg_wal/{path}", data.display())))
        };
        assert_eq!(of("00000001.history", "RECOVERYHISTORY"), Asker::Content);
        assert_eq!(of("00000003.history", "RECOVERYHISTORY"), Asker::Once);
        assert_eq!(of("000000010000000000000001", "RECOVERYXLOG"), Asker::Once);
        std::fs::write(data.join("pg_wal/00000003.history"), "").unwrap();
        assert_eq!(of("00000003.history", "RECOVERYHISTORY"), Asker::Content);
        assert_eq!(of("00000004.history", "RECOVERYHISTORY"), Asker::Once);
    }

    #[test]
    fn a_standby_waits_less_long_than_it_waits_between_two_asks() {
        let (hour, now) = (Duration::from_secs(3600), Instant::now());
        let left = |patience: Patience| patience.deadline.duration_since(now);
        assert!(left(Asker::Standby.patience(hour, None)) < Duration::from_secs(5));
        assert!(left(Asker::Once.patience(hour, None)) >= hour);
        assert!(
            left(Asker::Standby.patience(Duration::from_secs(1), None)) < Duration::from_secs(2)
        );
    }

    #[test]
    fn the_log_says_what_a_promotion_now_may_lack() {
        let error = || Error::new(Failure::Link, "no answer").hint("is it running?");
        let explain = |asker: Asker, file: &str| asker.explain(file, error()).hint;
        let segment = explain(Asker::Standby, "000000020000000000000007");
        assert!(segment.starts_with("is it running?; "), "{segment}");
        assert!(segment.contains("from 000000020000000000000007 on"), "{segment}");
        let history = explain(Asker::Standby, "00000003.history");
        assert!(history.contains("timeline 3") && history.contains("already in use"), "{history}");
        assert_eq!(explain(Asker::Once, "00000003.history"), "is it running?");
    }
}
