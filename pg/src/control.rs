//! `global/pg_control`: the fields that Klio needs.
//!
//! `ControlFileData` of PostgreSQL's `src/include/catalog/pg_control.h`, versions 15 to 18 (1300, 1800), on
//! machines that align to eight bytes, little-endian:
//!
//! | offset | what |
//! |---|---|
//! | 0 | system identifier, 64 bits |
//! | 8 | version of this format |
//! | 12 | catalog version |
//! | 16 | state of the cluster |
//! | 32 | LSN of the latest checkpoint |
//! | 48 | its timeline |
//! | 64 | the next transaction at that checkpoint, with its epoch, 64 bits |
//! | 180, 184, 188, 192, 196 | max_connections and similar settings: see [`ControlFile::needed`] |
//! | 208 | the double 1234567.0, which tells machines with another format apart |
//! | 216 | block size |
//! | 220 | blocks in a relation segment |
//! | 228 | WAL segment size |
//! | 252 | version of data checksums, 0 for none |
//! | 288 or 292 | CRC-32C of everything before it |
//!
//! The file is 8192 bytes long. PostgreSQL overwrites its first part in place, so a reader can see a partial write
//! while PostgreSQL runs, and has to read again.

use crate::{Lsn, SegmentSize, TimelineId};

/// The parsed pg_control.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlFile {
    /// Set by initdb, the same on every standby.
    pub system_identifier: u64,
    /// 1300 for PostgreSQL 13 to 17, 1800 for 18.
    pub format: u32,
    /// Part of the directory name in each tablespace: see [`ControlFile::tablespace_directory`].
    pub catalog_version: u32,
    /// LSN of the latest checkpoint record.
    pub checkpoint: Lsn,
    /// The timeline of that checkpoint.
    pub timeline: TimelineId,
    /// The next transaction at that checkpoint, with its epoch: as `pg_current_xact_id()` counts.
    pub next_xid: u64,
    /// Size of a data page in bytes.
    pub block_size: u32,
    /// Number of blocks in one file of a relation.
    pub relation_segment_blocks: u32,
    /// Size of a WAL segment.
    pub segment_size: SegmentSize,
    /// Whether pages have checksums.
    pub checksums: bool,
    /// The minimum values of settings for a recovery, by setting name: the values of the server that wrote the file.
    pub needed: [(&'static str, u32); 5],
}

/// The bytes are not a control file that can be parsed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// A partial write was seen, or the file is damaged: read it again.
    #[error(
        "read pg_control: expected a complete write, found {bytes} bytes with a wrong checksum"
    )]
    Torn {
        /// Number of bytes in the file.
        bytes: usize,
    },
    /// The file has another layout.
    #[error(
        "read pg_control: expected a file of PostgreSQL 15 to 18 on this kind of machine, found {found}"
    )]
    Unknown {
        /// A description.
        found: String,
    },
}

/// The range of offsets where the checksum may be: it follows fields that versions added.
const CRC_FROM: usize = 256;
const CRC_TO: usize = 512;

impl ControlFile {
    /// The file's path, relative to the data directory.
    pub const PATH: &'static str = "global/pg_control";

    /// Parses the file.
    ///
    /// # Errors
    /// `Torn` when no checksum matches; `Unknown` for a layout of another version or machine.
    pub fn parse(bytes: &[u8]) -> Result<Self, ControlError> {
        if !checksum_fits(bytes) {
            return Err(ControlError::Torn { bytes: bytes.len() });
        }
        let unknown = |found: String| ControlError::Unknown { found };
        let u32_at = |at: usize| {
            bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
        };
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        let float = f64::from_bits(u64_at(208));
        if float != 1_234_567.0 {
            return Err(unknown(format!("format {} with {float} at offset 208", u32_at(8))));
        }
        let block_size = u32_at(216);
        if !block_size.is_power_of_two() || !(1024..=32_768).contains(&block_size) {
            return Err(unknown(format!("a block size of {block_size}")));
        }
        let timeline = TimelineId::new(u32_at(48)).ok_or_else(|| unknown("timeline 0".into()))?;
        let segment_size = SegmentSize::new(u32_at(228)).map_err(|e| unknown(e.to_string()))?;
        Ok(Self {
            system_identifier: u64_at(0),
            format: u32_at(8),
            catalog_version: u32_at(12),
            checkpoint: Lsn::new(u64_at(32)),
            timeline,
            next_xid: u64_at(64),
            block_size,
            relation_segment_blocks: u32_at(220),
            segment_size,
            checksums: u32_at(252) != 0,
            needed: [
                ("max_connections", u32_at(180)),
                ("max_worker_processes", u32_at(184)),
                ("max_wal_senders", u32_at(188)),
                ("max_prepared_transactions", u32_at(192)),
                ("max_locks_per_transaction", u32_at(196)),
            ],
        })
    }

    /// The name of this PostgreSQL's directory in a tablespace, for example `PG_15_202209061`.
    pub fn tablespace_directory(&self, major: u32) -> String {
        format!("PG_{major}_{}", self.catalog_version)
    }
}

fn checksum_fits(bytes: &[u8]) -> bool {
    (CRC_FROM..=CRC_TO).step_by(4).any(|at| {
        bytes
            .get(at..at + 4)
            .is_some_and(|stored| stored == crc32c::crc32c(&bytes[..at]).to_le_bytes())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file(crc_at: usize) -> Vec<u8> {
        let mut bytes = vec![0; 8192];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &7_000_000_000_000_000_001_u64.to_le_bytes());
        put(8, &1300_u32.to_le_bytes());
        put(12, &202_209_061_u32.to_le_bytes());
        put(32, &0x0150_0000_u64.to_le_bytes());
        put(48, &3_u32.to_le_bytes());
        put(208, &1_234_567.0_f64.to_le_bytes());
        put(216, &8192_u32.to_le_bytes());
        put(220, &131_072_u32.to_le_bytes());
        put(228, &(16_u32 << 20).to_le_bytes());
        put(252, &1_u32.to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..crc_at]);
        bytes[crc_at..crc_at + 4].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// From `initdb -k` of PostgreSQL 15.
    #[test]
    fn a_real_one_is_read() {
        let control = ControlFile::parse(include_bytes!("../testdata/pg_control_15.bin")).unwrap();
        assert_eq!((control.format, control.block_size), (1300, 8192));
        // The transactions of the bootstrap come before it.
        assert!((700..800).contains(&control.next_xid), "{}", control.next_xid);
        assert_eq!((control.timeline.get(), control.segment_size.bytes()), (1, 16 << 20));
        assert_eq!((control.relation_segment_blocks, control.checksums), (131_072, true));
        assert_eq!(control.tablespace_directory(15), "PG_15_202209061");
        let numbers = |control: &ControlFile| control.needed.map(|(_, number)| number);
        assert_eq!(numbers(&control), [100, 8, 10, 0, 64]);
        let control = ControlFile::parse(include_bytes!("../testdata/pg_control_18.bin")).unwrap();
        assert_eq!((control.format, control.block_size, control.checksums), (1800, 8192, true));
        assert_eq!(numbers(&control), [100, 8, 10, 0, 64]);
    }

    #[test]
    fn both_layouts_are_read() {
        for crc_at in [288, 292] {
            let control = ControlFile::parse(&file(crc_at)).unwrap();
            assert_eq!(control.system_identifier, 7_000_000_000_000_000_001);
            assert_eq!((control.timeline.get(), control.block_size), (3, 8192));
            assert!(control.checksums);
            assert_eq!(control.tablespace_directory(15), "PG_15_202209061");
        }
    }

    #[test]
    fn half_a_write_is_told_from_another_version() {
        let mut torn = file(288);
        torn[40] ^= 1;
        assert!(matches!(ControlFile::parse(&torn), Err(ControlError::Torn { .. })));
        assert!(matches!(ControlFile::parse(b""), Err(ControlError::Torn { bytes: 0 })));
        let mut other = vec![0; 8192];
        let crc = crc32c::crc32c(&other[..288]);
        other[288..292].copy_from_slice(&crc.to_le_bytes());
        assert!(matches!(ControlFile::parse(&other), Err(ControlError::Unknown { .. })));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = ControlFile::parse(&bytes);
        }
    }
}
