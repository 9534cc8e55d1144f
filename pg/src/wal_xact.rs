//! The main data of transaction records, as far as a recovery target needs it.
//!
//! Source: `src/include/access/xact.h` and `ParseCommitRecord` in `rmgrdesc/xactdesc.c`. The time (8
//! bytes) is followed, if bit 0x80 of xl_info is set, by a word of flags and then, in this order:
//!
//! | flag | what | bytes |
//! |---|---|---|
//! | 0x01 | database and tablespace | 8 |
//! | 0x02 | count, subtransactions | 4 + 4 each |
//! | 0x04 | count, dropped relations | 4 + 12 each |
//! | 0x100 | count, dropped statistics | 4 + 12 each; 16 each since 18 |
//! | 0x08 | count, cache invalidations (commits only) | 4 + 16 each |
//! | 0x10 | the id a transaction was prepared with | 4 |

use crate::number::number;

const OPERATION: u8 = 0x70;
const COMMIT: u8 = 0x00;
const ABORT: u8 = 0x20;
const COMMIT_PREPARED: u8 = 0x30;
const ABORT_PREPARED: u8 = 0x40;
const HAS_INFO: u8 = 0x80;

/// Enough for thousands of subtransactions; data behind this limit is ignored, never misread.
const KEPT_BYTES_MAX: usize = 64 << 10;

/// The beginning of the data that follows a record's header.
#[derive(Debug, Default)]
pub(crate) struct Kept(Vec<u8>);

impl Kept {
    /// Stores as much as there is room for.
    pub(crate) fn push(&mut self, data: &[u8]) {
        let room = KEPT_BYTES_MAX.saturating_sub(self.0.len());
        self.0.extend_from_slice(&data[..data.len().min(room)]);
    }

    /// The main data of a record without block references. It follows the headers of the replication
    /// origin (253), the top-level transaction (252), and its own length (255: one byte, 254: four).
    pub(crate) fn main_data(&self) -> Option<&[u8]> {
        let mut at = 0;
        loop {
            at += match self.0.get(at)? {
                253 => 3,
                252 => 5,
                255 => return self.0.get(at + 2..),
                254 => return self.0.get(at + 5..),
                _ => return None,
            };
        }
    }
}

/// How a transaction ended.
pub(crate) struct Ending {
    pub(crate) committed: bool,
    pub(crate) prepared_xid: Option<u32>,
}

/// Whether the record is `COMMIT PREPARED` or `ROLLBACK PREPARED`.
pub(crate) const fn is_of_prepared(info: u8) -> bool {
    matches!(info & OPERATION, COMMIT_PREPARED | ABORT_PREPARED)
}

/// How a transaction ended; `None` for records that end no transaction.
pub(crate) fn ending(info: u8, main: &[u8], postgres_major: u32) -> Option<Ending> {
    let operation = info & OPERATION;
    let committed = matches!(operation, COMMIT | COMMIT_PREPARED);
    if !committed && !matches!(operation, ABORT | ABORT_PREPARED) {
        return None;
    }
    let prepared = is_of_prepared(operation) && info & HAS_INFO != 0;
    let prepared_xid = prepared.then(|| prepared_xid(main, committed, postgres_major)).flatten();
    Some(Ending { committed, prepared_xid })
}

fn prepared_xid(main: &[u8], committed: bool, postgres_major: u32) -> Option<u32> {
    let word = |at: usize| main.get(at..at.checked_add(4)?).map(number);
    let flags = word(8)?;
    let mut at = 12;
    if flags & 0x01 != 0 {
        at += 8;
    }
    let statistics = if postgres_major >= 18 { 16 } else { 12 };
    let lists = [(0x02, 4), (0x04, 12), (0x100, statistics), (0x08, 16)];
    for (flag, bytes) in lists {
        if flags & flag != 0 && (committed || flag != 0x08) {
            let count = usize::try_from(word(at)?).ok()?;
            at = at.checked_add(4)?.checked_add(count.checked_mul(bytes)?)?;
        }
    }
    if flags & 0x10 == 0 {
        return None;
    }
    u32::try_from(word(at)?).ok()
}
