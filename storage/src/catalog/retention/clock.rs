//! What the records themselves say against their times.
//!
//! A record has two clocks: the server's, which dates it, and PostgreSQL's, which says when the copy ended. They are of two
//! machines, and a commit may wait hours for WAL; beyond a day one of them is wrong, or jumped. Which one nobody can know from
//! here, so a person decides: the record is given a time (`redated_unix`), or is removed.

use super::{KnownBackup, rules};
use crate::catalog::BackupRecord;

/// By how much times may differ that should be the same.
pub const TIMES_DIFFER_SECONDS: f64 = 86_400.0;

const HINT: &str = "nothing is removed for good meanwhile; hint: klio-server backup redate --to postgres when PostgreSQL's clock was right, --to server when the server's was; or klio-server backup remove";

/// In words; `backups` in any order.
pub(super) fn doubts(backups: &[&KnownBackup]) -> Vec<String> {
    backups.iter().filter_map(|backup| two_clocks(&backup.record)).collect()
}

/// Whether a record's own times contradict each other.
pub(super) fn is_in_doubt(record: &BackupRecord) -> bool {
    two_clocks(record).is_some()
}

fn two_clocks(record: &BackupRecord) -> Option<String> {
    let (server, postgres) = (record.committed_unix, record.stopped_postgres_unix);
    // An odd time is kept by another rule, and of an older record nobody may know better.
    if record.redated_unix.is_some() || !rules::has_time(record) {
        return None;
    }
    let apart = (server - postgres).abs();
    (apart.is_nan() || apart > TIMES_DIFFER_SECONDS).then(|| {
        format!(
            "backup {}: the server's clock said {server:.0} when it was committed, PostgreSQL's {postgres:.0} when it ended, {:.1} days apart; {HINT}",
            record.name,
            apart / 86_400.0
        )
    })
}
