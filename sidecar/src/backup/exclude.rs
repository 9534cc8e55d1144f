//! Decides what a base backup leaves out. Pure: names in, verdicts out.
//!
//! The rules are those of PostgreSQL's own base backup
//! (<https://www.postgresql.org/docs/current/protocol-replication.html#PROTOCOL-REPLICATION-BASE-BACKUP>,
//! <https://www.postgresql.org/docs/current/continuous-archiving.html#BACKUP-LOWLEVEL-BASE-BACKUP-DATA>; lists in
//! `src/backend/backup/basebackup.c`). In addition, `standby.signal` and `recovery.signal` are left out, because the
//! restore decides whether a restored cluster is a standby, and so are the files that Klio itself puts into the data
//! directory.

use klio_pg::{BackupLabel, Fork, RelationFile, TABLESPACE_MAP_FILE};
use std::collections::HashSet;

/// How a name in the data directory is treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Included, with its content.
    Take,
    /// The directory is included, its content is not.
    Hollow,
    /// pg_wal: empty except for the directories that PostgreSQL expects in it.
    Wal,
    /// pg_tblspc: each of its symlinks becomes `tablespaces/<oid>`.
    Tablespaces,
    /// Left out.
    Leave,
}

/// Directories whose content PostgreSQL creates again when it starts, or which belongs to this cluster only.
const HOLLOW: [&str; 7] = [
    "pg_dynshmem",
    "pg_notify",
    "pg_replslot",
    "pg_serial",
    "pg_snapshots",
    "pg_stat_tmp",
    "pg_subtrans",
];

/// Files of the running server or of another backup, and files that a restore writes itself.
const LEFT: [&str; 12] = [
    BackupLabel::FILE,
    TABLESPACE_MAP_FILE,
    "backup_manifest",
    "current_logfiles",
    "current_logfiles.tmp",
    "postgresql.auto.conf.tmp",
    "postmaster.opts",
    "postmaster.pid",
    "recovery.signal",
    "standby.signal",
    "tablespace_map.old",
    "backup_label.old",
];

/// Created by fsck at the top of a file system; only root can read it.
pub const LOST_AND_FOUND: &str = "lost+found";
/// The spool of the read-ahead agent.
const SPOOL: &str = ".klio";
/// Directories in pg_wal that PostgreSQL expects or creates.
pub const IN_WAL: [&str; 2] = ["archive_status", "summaries"];

/// Judges a name at the top of the data directory.
pub fn at_root(name: &str) -> Verdict {
    match name {
        "pg_wal" => Verdict::Wal,
        "pg_tblspc" => Verdict::Tablespaces,
        _ if HOLLOW.contains(&name) => Verdict::Hollow,
        _ if LEFT.contains(&name) || name.starts_with(SPOOL) => Verdict::Leave,
        _ => anywhere(name),
    }
}

/// Judges a name in any directory.
pub fn anywhere(name: &str) -> Verdict {
    // Caches of the system catalog; while being written, their names end with a process number.
    let gone = name.starts_with("pgsql_tmp")
        || name.starts_with("pg_internal.init")
        || name == LOST_AND_FOUND;
    if gone { Verdict::Leave } else { Verdict::Take }
}

/// The numbers of the unlogged relations in one database directory, which are those with an init fork.
pub fn unlogged<'a>(names: impl Iterator<Item = &'a str>) -> HashSet<u32> {
    names
        .filter_map(RelationFile::parse)
        .filter(|file| file.fork == Fork::Init && !file.temporary)
        .map(|file| file.number)
        .collect()
}

/// Judges a file of a relation.
pub fn relation(file: RelationFile, unlogged: &HashSet<u32>) -> Verdict {
    let emptied = unlogged.contains(&file.number) && file.fork != Fork::Init;
    if file.temporary || emptied { Verdict::Leave } else { Verdict::Take }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_manual_names_is_left_out() {
        for name in [
            "postmaster.pid",
            "backup_label",
            "pgsql_tmp123",
            "pg_internal.init.42",
            ".klio",
            "lost+found",
        ] {
            assert_eq!(at_root(name), Verdict::Leave, "{name}");
        }
        for name in ["pg_replslot", "pg_subtrans", "pg_stat_tmp"] {
            assert_eq!(at_root(name), Verdict::Hollow, "{name}");
        }
        for name in ["PG_VERSION", "base", "pg_xact", "pg_twophase", "pg_stat", "log", "pg_logical"]
        {
            assert_eq!(at_root(name), Verdict::Take, "{name}");
        }
        assert_eq!((at_root("pg_wal"), at_root("pg_tblspc")), (Verdict::Wal, Verdict::Tablespaces));
    }

    #[test]
    fn a_table_that_is_called_like_one_of_them_is_taken() {
        assert_eq!(anywhere("postmaster.pid"), Verdict::Take);
        assert_eq!(anywhere("pg_stat_tmp"), Verdict::Take);
    }

    #[test]
    fn of_an_unlogged_relation_only_its_init_forks_are_kept() {
        let names = ["16384", "16384_fsm", "16384_init", "16384.1", "16385", "t3_16386_init"];
        let unlogged = unlogged(names.into_iter());
        let kept: Vec<&str> = names
            .into_iter()
            .filter(|n| relation(RelationFile::parse(n).unwrap(), &unlogged) == Verdict::Take)
            .collect();
        assert_eq!(kept, ["16384_init", "16385"]);
    }
}
