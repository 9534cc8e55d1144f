//! Free space of the disk that holds PostgreSQL's WAL, where this program sees that disk.
//!
//! Only told of a data directory whose pg_control says that it is the PostgreSQL we are connected to: the same path in
//! another container, or on another machine, is another disk. Rather nothing than a lie.

use klio_pg::ControlFile;
use std::path::Path;

/// A file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Bytes that PostgreSQL can still write.
    pub free: u64,
    /// All of it.
    pub total: u64,
}

/// Of pg_wal, which may be a link to another disk. Blocking. `None` when it is not this PostgreSQL's, or not ours to see.
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
