//! A prepared transaction: what `PREPARE TRANSACTION` writes to WAL, and a checkpoint writes to a file in
//! `pg_twophase`.
//!
//! Source: `xl_xact_prepare` in `src/include/access/xact.h` (TwoPhaseFileHeader in `twophase.c`); the same in PostgreSQL 15 to 18.
//! Little endian.
//!
//! | bytes | field |
//! |---|---|
//! | 0 | magic, 0x57F94534 |
//! | 8 | the transaction's id |
//! | 54 | length of its name, including the terminating zero |
//! | 72 | its name |

use crate::number::number;

const MAGIC: u64 = 0x57F9_4534;
/// GIDSIZE in PostgreSQL.
const NAME_MAX: usize = 200;

/// A prepared transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prepared {
    /// The top-level transaction id.
    pub xid: u32,
    /// The name for `COMMIT PREPARED`.
    pub name: String,
}

impl Prepared {
    /// Parses the state data; `None` if the bytes are not those of a prepared transaction.
    pub fn parse(state: &[u8]) -> Option<Self> {
        let field = |at: usize, bytes: usize| state.get(at..at + bytes).map(number);
        if field(0, 4)? != MAGIC {
            return None;
        }
        let length = usize::try_from(field(54, 2)?).ok().filter(|n| (1..=NAME_MAX).contains(n))?;
        let name = state.get(72..72 + length - 1)?;
        let xid = u32::try_from(field(8, 4)?).ok()?;
        Some(Self { xid, name: String::from_utf8_lossy(name).into_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_read_and_what_is_cut_off_or_another_is_none() {
        let mut state = vec![0; 72];
        state[..4].copy_from_slice(&[0x34, 0x45, 0xF9, 0x57]);
        state[8..12].copy_from_slice(&700_u32.to_le_bytes());
        state[54..56].copy_from_slice(&4_u16.to_le_bytes());
        state.extend(b"p 1\0more");
        let expected = Prepared { xid: 700, name: "p 1".to_owned() };
        assert_eq!(Prepared::parse(&state), Some(expected));
        assert!((0..75).all(|length| Prepared::parse(&state[..length]).is_none()));
        state[54..56].copy_from_slice(&900_u16.to_le_bytes());
        assert_eq!(Prepared::parse(&state), None);
        state[0] = 0;
        assert_eq!(Prepared::parse(&state), None);
    }
}
