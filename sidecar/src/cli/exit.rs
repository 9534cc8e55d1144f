//! All exit statuses of `klio`. `klio help exit-codes` prints them.
//!
//! PostgreSQL takes a status of 1 to 125 from restore_command as "the archive has no such file" and then ends
//! recovery. So `wal-fetch` returns 1 only if the server said NOT_FOUND, and 200 for every other failure (P7). Wrong
//! usage is 2, except where the command line may be a restore_command, misspelt or not: that is 200, too. A standby
//! would stop for good at 200, so there both cases return 75, and PostgreSQL asks again by itself.

use super::{args::Cli, wal_fetch::Asker};
use crate::error::{Error, Failure};
use clap::CommandFactory;
use klio_proto::Code;
use klio_storage::layout::WalFile;
use std::ffi::OsString;

pub const OK: u8 = 0;
/// Wrong usage of a command that cannot be a restore_command.
pub const USAGE: u8 = 2;
/// The command did its work, and found and printed a problem.
pub const PROBLEM: u8 = 3;
/// A setting is wrong or missing.
pub const CONFIG: u8 = 4;
/// PostgreSQL cannot be reached, or refused the request.
pub const POSTGRES: u8 = 5;
/// A local file cannot be read or written.
pub const LOCAL: u8 = 6;
/// `backup` took the backup, but its verification failed or found damage.
pub const UNVERIFIED: u8 = 7;
/// `backup` took the backup, but the maintenance after it failed.
pub const UNMAINTAINED: u8 = 8;
/// `verify` found damage that could not be repaired.
pub const DAMAGED: u8 = 40;
/// `verify` found damage and repaired all of it from the other tier.
pub const REPAIRED: u8 = 41;
/// A signal ended the command before it was done.
pub const STOPPED: u8 = 9;
/// `restore`: the target cannot be reached; nothing was touched.
pub const UNREACHABLE: u8 = 30;
/// Wrong usage of what may be a restore_command, and every failure of `wal-fetch` except a definitive NOT_FOUND.
pub const STOP_RECOVERY: u8 = 200;
/// Used instead of [`STOP_RECOVERY`] for a standby: below 126 PostgreSQL goes on and asks again. EX_TEMPFAIL of sysexits.h.
pub const ASK_AGAIN: u8 = 75;

/// The status of a command that failed; `wal-fetch` has its own ([`of_wal_fetch`]).
pub const fn of(error: &Error) -> u8 {
    match error.failure {
        Failure::Code(code) => code.exit(),
        Failure::Link => Code::Unavailable.exit(),
        Failure::Certificate => Code::Unauthenticated.exit(),
        Failure::Postgres | Failure::PostgresRefused => POSTGRES,
        Failure::WalRemoved => Code::Gap.exit(),
        Failure::Config => CONFIG,
        Failure::Local => LOCAL,
        Failure::Stopped => STOPPED,
        Failure::Unreachable => UNREACHABLE,
    }
}

/// The status of a failed `wal-fetch` (P7).
pub(super) const fn of_wal_fetch(error: &Error, asker: Asker) -> u8 {
    match error.failure {
        Failure::Code(Code::NotFound) => Code::NotFound.exit(),
        _ => of_trouble(asker),
    }
}

/// The status for PostgreSQL when it is unknown whether the file exists.
pub(super) const fn of_trouble(asker: Asker) -> u8 {
    match asker {
        Asker::Once => STOP_RECOVERY,
        Asker::Standby | Asker::Content => ASK_AGAIN,
    }
}

/// The status of a command line that cannot be parsed.
pub(super) fn of_usage(arguments: &[OsString], asker: Asker) -> u8 {
    if may_be_restore_command(arguments) { of_trouble(asker) } else { USAGE }
}

/// Whether PostgreSQL may have run this command line, misspelt or not: a status below 126 would then end recovery (P7).
fn may_be_restore_command(arguments: &[OsString]) -> bool {
    let words = || arguments.iter().skip(1).filter_map(|word| word.to_str());
    let command = Cli::command();
    let another = |word: &str| word != "wal-fetch" && command.find_subcommand(word).is_some();
    let of_recovery = |word: &str| word == "wal-fetch" || word.parse::<WalFile>().is_ok();
    !words().any(another) || words().any(of_recovery)
}

/// The table as text.
pub fn table() -> String {
    rows().iter().map(|(status, text)| format!("{status:>5}  {text}\n")).collect()
}

/// Every status and its meaning, in ascending order.
pub(super) fn rows() -> Vec<(u8, String)> {
    let own = [
        (OK, "done"),
        (USAGE, "wrong usage, unless the command may be a restore_command (200)"),
        (
            PROBLEM,
            "check, status, list, verify, drill or retention: found a problem and printed it; backup: taken, but some pages have wrong checksums",
        ),
        (CONFIG, "a setting is wrong or missing"),
        (POSTGRES, "PostgreSQL cannot be reached, or refused the request"),
        (LOCAL, "a local file cannot be read or written"),
        (UNVERIFIED, "backup: taken, but its verification failed or found damage"),
        (UNMAINTAINED, "backup: taken, but the maintenance after it failed"),
        (
            UNREACHABLE,
            "restore, drill: no backup leads to the target, or only a damaged one; nothing was written",
        ),
        (DAMAGED, "verify: found damage that could not be repaired"),
        (REPAIRED, "verify: found damage and repaired all of it from the other tier"),
        (STOPPED, "interrupted by a signal"),
        (
            ASK_AGAIN,
            "wal-fetch on a standby: any failure except NOT_FOUND, also wrong usage (PostgreSQL asks again by itself)",
        ),
        (
            STOP_RECOVERY,
            "wal-fetch: any failure except NOT_FOUND; also wrong usage that may be a misspelt restore_command, which has no known command or the name of a WAL file. PostgreSQL takes every status up to 125 for the end of the archive, and stops at a higher one",
        ),
    ];
    let mut rows: Vec<(u8, String)> =
        own.iter().map(|(status, text)| (*status, (*text).to_owned())).collect();
    for code in Code::ALL {
        rows.push((code.exit(), format!("{}: {}", code.name(), code.meaning().trim())));
    }
    rows.sort();
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    /// P7: `wal-fetch` returns 1 only for NOT_FOUND.
    #[test]
    fn wal_fetch_answers_one_only_for_not_found() {
        for failure in Failure::all() {
            let status = |asker| of_wal_fetch(&Error::new(failure, "x"), asker);
            let absent = failure == Failure::Code(Code::NotFound);
            for asker in [Asker::Once, Asker::Standby, Asker::Content] {
                assert_eq!(status(asker) == 1, absent, "{failure:?}");
            }
            assert!(absent || status(Asker::Once) > 125, "{failure:?}");
            assert!(status(Asker::Standby) < 126, "{failure:?}");
            assert!(status(Asker::Content) < 126, "{failure:?}");
        }
    }

    #[test]
    fn wrong_usage_is_two_where_no_restore_command_could_be_meant() {
        let status = |line: &str| {
            let words: Vec<OsString> = line.split(' ').map(OsString::from).collect();
            of_usage(&words, Asker::Once)
        };
        for line in ["klio list --nonsense", "klio -c x backup extra", "klio restore"] {
            assert_eq!(status(line), USAGE, "{line}");
        }
        for line in [
            "klio",
            "klio wal-ftech x y",
            "klio wal-fetch",
            "klio list 000000010000000000000001 pg_wal/RECOVERYXLOG",
            "klio restore 00000002.history x",
        ] {
            assert_eq!(status(line), STOP_RECOVERY, "{line}");
        }
    }

    #[test]
    fn own_statuses_do_not_collide_with_codes() {
        for own in [
            USAGE,
            PROBLEM,
            CONFIG,
            POSTGRES,
            LOCAL,
            UNVERIFIED,
            UNMAINTAINED,
            STOPPED,
            UNREACHABLE,
            DAMAGED,
            REPAIRED,
            STOP_RECOVERY,
            ASK_AGAIN,
        ] {
            assert!(Code::ALL.iter().all(|code| code.exit() != own), "{own}");
        }
    }
}
