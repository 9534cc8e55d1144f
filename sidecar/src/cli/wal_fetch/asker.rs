//! Who runs `wal-fetch`, and so what trouble has to look like. Decided from the arguments as they are, before any of
//! them is understood: a misspelt restore_command asks as well.
//!
//! P7: trouble ends recovery with a status above 125, except on a standby. PostgreSQL in standby mode takes every status
//! below 126 for "not there", goes on to its primary and asks again; one above ends the server, which then can neither be
//! promoted nor started while the archive is away (RestoreArchivedFile() in src/backend/access/transam/xlogarchive.c,
//! WaitForWALToBecomeAvailable() in xlogrecovery.c).
//!
//! A promotion asks once more when standby.signal has gone already: for the history of the timeline it comes from
//! (writeTimeLineHistory() in timeline.c). Stopped there, PostgreSQL would start again as a primary on the old timeline.
//! It needs no archive for that where its own copy lies in pg_wal, to which RestoreArchivedFile() falls back, or where the
//! timeline is the first, which has no history: then it gets a short answer too.

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

/// A standby asks again every wal_retrieve_retry_interval (5 s), and one that is being promoted asks four or five times
/// before it serves: it gets its answer within that interval, the way out included.
const STANDBY_PATIENCE: Duration = Duration::from_secs(4);
/// How long nothing may come in a fetch that has begun: a slow link is no trouble.
pub(super) const STANDBY_QUIET_MAX: Duration = STANDBY_PATIENCE;
/// An agent says every second that it is at work. On a standby there has to be time left to fetch without it.
const STANDBY_SILENCE: Duration = Duration::from_secs(2);

/// Who waits for the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::cli) enum Asker {
    /// Recovery to an end, `pg_rewind`, or a person: nobody asks again by itself.
    Once,
    /// PostgreSQL as a standby.
    Standby,
    /// PostgreSQL that asks for a history which it does not need from anybody.
    Content,
}

/// How long a call may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::cli) struct Patience {
    pub asker: Asker,
    /// When it has to have ended.
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

    /// From now on; `within` is what a first try left of it.
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

    /// How long an agent may say nothing; `None`: as long as the agent's client finds right.
    pub fn silence_max(self) -> Option<Duration> {
        (self != Asker::Once).then_some(STANDBY_SILENCE)
    }

    /// What a failed call says besides its reason: PostgreSQL's log is where it is read.
    pub fn explain(self, file: &str, error: Error) -> Error {
        if self == Asker::Once || error.failure == Failure::Code(Code::NotFound) {
            return error;
        }
        if self == Asker::Content {
            return error.hint("PostgreSQL goes on with the history that it has itself");
        }
        let missing = match file.parse() {
            Ok(WalFile::History(timeline)) => format!(
                "whether the archive has timeline {} is not known: promoted now, this standby may take a number that is \
                 already taken",
                timeline.get()
            ),
            Ok(file) => format!(
                "promoted now, this standby lacks what only the archive has, from {} on",
                file.to_string().split('.').next().unwrap_or_default()
            ),
            Err(_) => "promoted now, this standby lacks what only the archive has".to_owned(),
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

/// `pg_rewind` asks for segments by their own names (RestoreArchivedFile() in src/fe_utils/archive.c), also in the data
/// directory of what was a standby. It gives up at the first failure, so it gets the long patience.
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

    /// P7 and its exception; PostgreSQL's own rule where both files are there.
    #[test]
    fn only_a_data_directory_with_standby_signal_is_a_standby() {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path().display();
        let segment = "000000010000000000000001";
        let asks = [
            format!("klio wal-fetch {segment} {data}/pg_wal/RECOVERYXLOG"),
            format!("klio wal-fetch 00000002.history {data}/pg_wal/RECOVERYHISTORY --timeout 9s"),
            // Misspelt, in two ways.
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

    /// PostgreSQL 15 removes standby.signal before it asks this; found by the end-to-end test of a promotion.
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
        assert!(history.contains("timeline 3") && history.contains("already taken"), "{history}");
        assert_eq!(explain(Asker::Once, "00000003.history"), "is it running?");
    }
}
