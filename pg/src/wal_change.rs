//! The main data of records that change the minimum settings of a server, or where its files are.
//!
//! Sources: `xl_parameter_change` in `src/include/access/xlog_internal.h`, `WalLevel` in `access/xlog.h`,
//! `commands/tablespace.h`; the same in PostgreSQL 15 to 18. Little endian.
//!
//! | record | bytes | field |
//! |---|---|---|
//! | XLOG_PARAMETER_CHANGE | 0, 4, 8, 12, 16 | max_connections, max_worker_processes, max_wal_senders, max_prepared_transactions, max_locks_per_transaction |
//! | | 20 | wal_level: 0 minimal, 1 replica, 2 logical |
//! | | 24, 25 | wal_log_hints, track_commit_timestamp |
//! | XLOG_TBLSPC_CREATE | 0..4 | OID |
//! | | 4.. | location, terminated by a zero byte; empty for one inside the data directory |
//! | XLOG_TBLSPC_DROP | 0..4 | OID |

use crate::number::number;

/// How much information is written to WAL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum WalLevel {
    /// Bulk loads are omitted: recovery cannot pass such WAL.
    Minimal,
    /// Enough for archiving and standbys.
    Replica,
    /// Enough for logical decoding as well.
    Logical,
}

/// The content of XLOG_PARAMETER_CHANGE: the settings of the server that wrote the WAL from here on.
///
/// PostgreSQL writes the record at a start when one of the settings has changed, so every change is in the WAL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalParameters {
    pub max_connections: u32,
    pub max_worker_processes: u32,
    pub max_wal_senders: u32,
    pub max_prepared_transactions: u32,
    pub max_locks_per_transaction: u32,
    pub wal_level: WalLevel,
    pub wal_log_hints: bool,
    pub track_commit_timestamp: bool,
}

/// Parses the main data; `None` if it is malformed.
pub(crate) fn parameters(main: &[u8]) -> Option<WalParameters> {
    let field = |at: usize| main.get(at..at + 4).map(|bytes| number(bytes) as u32);
    let wal_level = match field(20)? {
        0 => WalLevel::Minimal,
        1 => WalLevel::Replica,
        2 => WalLevel::Logical,
        _ => return None,
    };
    Some(WalParameters {
        max_connections: field(0)?,
        max_worker_processes: field(4)?,
        max_wal_senders: field(8)?,
        max_prepared_transactions: field(12)?,
        max_locks_per_transaction: field(16)?,
        wal_level,
        wal_log_hints: *main.get(24)? != 0,
        track_commit_timestamp: *main.get(25)? != 0,
    })
}

/// OID and location of a created tablespace.
pub(crate) fn tablespace_created(main: &[u8]) -> Option<(u32, Vec<u8>)> {
    let path = main.get(4..)?;
    let path = &path[..path.iter().position(|byte| *byte == 0)?];
    Some((number(&main[..4]) as u32, path.to_vec()))
}

/// OID of a dropped tablespace.
pub(crate) fn tablespace_dropped(main: &[u8]) -> Option<u32> {
    main.get(..4).map(|bytes| number(bytes) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cut_off_or_unknown_data_is_no_record() {
        let mut data = [0; 28];
        assert_eq!(parameters(&data).map(|p| p.wal_level), Some(WalLevel::Minimal));
        for length in 0..26 {
            assert_eq!(parameters(&data[..length]), None);
        }
        data[20] = 3;
        assert_eq!(parameters(&data), None);
        assert_eq!(tablespace_created(b"\x01\x40\0\0/a\0"), Some((16385, b"/a".to_vec())));
        assert_eq!(tablespace_created(b"\x01\x40\0\0\0"), Some((16385, Vec::new())));
        assert_eq!(tablespace_created(b"\x01\x40\0\0/a"), None);
        assert_eq!(tablespace_created(b"\x01\x40"), None);
        assert_eq!(tablespace_dropped(b"\x01\x40\0\0"), Some(16385));
        assert_eq!(tablespace_dropped(b"\x01\x40\0"), None);
    }
}
