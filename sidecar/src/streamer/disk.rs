//! Free space of the file system that holds PostgreSQL's WAL, if this program can see it.
//!
//! Reported only for a data directory whose pg_control names the PostgreSQL that we are connected to: in another
//! container or on another machine the same path is a different disk. No value is better than a wrong one.

use klio_pg::ControlFile;
use std::path::Path;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Bytes that PostgreSQL, an unprivileged user, can still write.
    pub free: u64,
    /// Size of the file system in bytes.
    pub total: u64,
}

/// Space of the file system of `pg_wal`, which may be a symlink to another disk. Blocks. `None` when the data
/// directory belongs to another PostgreSQL or cannot be read from here.
pub fn space(data: &Path, system_identifier: u64) -> Option<Space> {
    let control = std::fs::read(data.join(ControlFile::PATH)).ok()?;
    let control = ControlFile::parse(&control).ok()?;
    if control.system_identifier != system_identifier {
        return None;
    }
    let stat = rustix::fs::statvfs(data.join("pg_wal")).ok()?;
    Some(Space { free: stat.f_bavail * stat.f_frsize, total: stat.f_blocks * stat.f_frsize })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_is_not_this_postgres_s_tells_nothing() {
        let scratch = tempfile::tempdir().unwrap();
        assert_eq!(space(scratch.path(), 1), None);
        std::fs::create_dir(scratch.path().join("global")).unwrap();
        std::fs::write(scratch.path().join(ControlFile::PATH), [0; 8192]).unwrap();
        assert_eq!(space(scratch.path(), 1), None);
    }
}
