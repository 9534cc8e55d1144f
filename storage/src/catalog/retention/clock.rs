//! Contradictions between the times in a backup record.
//!
//! A record has times of two clocks: the server's, which dates it, and PostgreSQL's, which says when the copy ended.
//! They come from two machines, and a commit may wait hours for WAL; but if they differ by more than a day, one of them
//! is wrong or jumped. Which one cannot be decided here, so a person decides: the record is given a time
//! (`redated_unix`), or is removed.

use super::{KnownBackup, rules};
use crate::catalog::BackupRecord;

/// The largest difference between two times that should be about equal.
pub const TIMES_DIFFER_SECONDS: f64 = 86_400.0;

const HINT: &str = "nothing is removed for good meanwhile; hint: run klio-server backup redate, with --to postgres if PostgreSQL's clock was right or --to server if the server's was; or klio-server backup remove";

/// The contradictions, one sentence each; `backups` in any order.
pub(super) fn doubts(backups: &[&KnownBackup]) -> Vec<String> {
    backups.iter().filter_map(|backup| two_clocks(&backup.record)).collect()
}

/// Whether a record's own times contradict each other.
pub(super) fn is_in_doubt(record: &BackupRecord) -> bool {
    two_clocks(record).is_some()
}

fn two_clocks(record: &BackupRecord) -> Option<String> {
    let (server, postgres) = (record.committed_unix, record.stopped_postgres_unix);
    // Another rule keeps a backup with an impossible time, and for an old record nobody may know the right one.
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
