//! Messages inside the CopyBoth stream of physical replication.
//!
//! Source: <https://www.postgresql.org/docs/current/protocol-replication.html>, START_REPLICATION.
//! Times on the wire are microseconds since 2000-01-01 00:00 UTC.
//!
//! | message | bytes |
//! |---|---|
//! | XLogData `w` | start LSN u64, WAL end u64, time i64, WAL bytes |
//! | primary keepalive `k` | WAL end u64, time i64, reply requested u8 |
//! | standby status `r` | written u64, flushed u64, applied u64, time i64, reply requested u8 |

use crate::Lsn;
use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Microseconds from the Unix epoch to PostgreSQL's.
const PG_EPOCH_UNIX_MICROS: i64 = 946_684_800_000_000;

/// Converts PostgreSQL time to Unix time, both in microseconds.
pub const fn unix_micros_from_pg(pg: i64) -> i64 {
    pg.saturating_add(PG_EPOCH_UNIX_MICROS)
}

/// Converts Unix time to PostgreSQL time, both in microseconds.
pub const fn pg_micros_from_unix(unix: i64) -> i64 {
    unix.saturating_sub(PG_EPOCH_UNIX_MICROS)
}

/// A message with WAL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct XLogData {
    /// LSN of the first byte.
    pub start: Lsn,
    /// The server's current end of WAL.
    pub wal_end: Lsn,
    /// Unix microseconds on the server's clock.
    pub sent_unix_micros: i64,
    /// The WAL itself; current servers send at most 128 KiB.
    pub data: Bytes,
}

/// A keepalive message from the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrimaryKeepalive {
    /// The server's current end of WAL.
    pub wal_end: Lsn,
    /// Unix microseconds on the server's clock.
    pub sent_unix_micros: i64,
    /// The server wants a status update now; without one it closes the connection.
    pub reply_requested: bool,
}

/// A message that a server sends while it streams.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReplicationMessage {
    XLogData(XLogData),
    Keepalive(PrimaryKeepalive),
}

/// The position that we report to PostgreSQL. P1: `flushed` is never more than what the Klio server
/// has fsynced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatusUpdate {
    /// Received by the Klio server.
    pub written: Lsn,
    /// Durable on the Klio server.
    pub flushed: Lsn,
    /// Unix microseconds on our clock.
    pub sent_unix_micros: i64,
    /// Whether PostgreSQL should answer at once.
    pub reply_requested: bool,
}

/// A CopyData message of an unknown kind, or a malformed one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// The first byte is unknown, or there is none.
    #[error("expected replication message 'w' or 'k', found {found:?}")]
    Unknown {
        /// The first byte.
        found: Option<u8>,
    },
    /// The message is too short for its kind.
    #[error("expected at least {expected} bytes in replication message {kind:?}, found {found}")]
    Short {
        /// The message's first byte.
        kind: char,
        /// Length of the fixed part in bytes.
        expected: usize,
        /// The received length in bytes.
        found: usize,
    },
}

/// Decodes the payload of one CopyData message. The WAL bytes are shared, not copied.
///
/// # Errors
/// An unknown or shortened message.
pub fn decode_message(mut payload: Bytes) -> Result<ReplicationMessage, MessageError> {
    let kind = payload.first().copied();
    let short = |kind, expected, found| MessageError::Short { kind, expected, found };
    match kind {
        Some(b'w') => {
            if payload.len() < 25 {
                return Err(short('w', 25, payload.len()));
            }
            payload.advance(1);
            Ok(ReplicationMessage::XLogData(XLogData {
                start: Lsn::new(payload.get_u64()),
                wal_end: Lsn::new(payload.get_u64()),
                sent_unix_micros: unix_micros_from_pg(payload.get_i64()),
                data: payload,
            }))
        }
        Some(b'k') => {
            if payload.len() < 18 {
                return Err(short('k', 18, payload.len()));
            }
            payload.advance(1);
            Ok(ReplicationMessage::Keepalive(PrimaryKeepalive {
                wal_end: Lsn::new(payload.get_u64()),
                sent_unix_micros: unix_micros_from_pg(payload.get_i64()),
                reply_requested: payload.get_u8() != 0,
            }))
        }
        found => Err(MessageError::Unknown { found }),
    }
}

/// Encodes a standby status update as the payload of a CopyData message. The applied position stays
/// 0/0 ("unknown"), because Klio stores WAL and does not replay it.
pub fn encode_status(status: &StatusUpdate, out: &mut BytesMut) {
    out.put_u8(b'r');
    out.put_u64(status.written.as_u64());
    out.put_u64(status.flushed.as_u64());
    out.put_u64(0);
    out.put_i64(pg_micros_from_unix(status.sent_unix_micros));
    out.put_u8(status.reply_requested.into());
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_wal_data_without_copying_it() {
        let mut raw = BytesMut::new();
        raw.put_u8(b'w');
        raw.put_u64(0x0300_0000);
        raw.put_u64(0x0400_0000);
        raw.put_i64(0);
        raw.put_slice(b"wal");
        let ReplicationMessage::XLogData(data) = decode_message(raw.freeze()).unwrap() else {
            panic!("expected WAL data")
        };
        assert_eq!(data.start, Lsn::new(0x0300_0000));
        assert_eq!(data.wal_end, Lsn::new(0x0400_0000));
        assert_eq!(data.sent_unix_micros, PG_EPOCH_UNIX_MICROS);
        assert_eq!(&data.data[..], b"wal");
    }

    #[test]
    fn status_has_the_documented_34_bytes() {
        let mut out = BytesMut::new();
        let status = StatusUpdate {
            written: Lsn::new(7),
            flushed: Lsn::new(5),
            sent_unix_micros: PG_EPOCH_UNIX_MICROS + 9,
            reply_requested: true,
        };
        encode_status(&status, &mut out);
        assert_eq!(out.len(), 34);
        assert_eq!((out[0], out[8], out[16], out[24], out[32], out[33]), (b'r', 7, 5, 0, 9, 1));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>) {
            let _ = decode_message(Bytes::from(bytes));
        }

        #[test]
        fn every_truncation_of_a_keepalive_is_refused(cut in 0usize..18) {
            let mut raw = vec![b'k'];
            raw.extend([0; 17]);
            prop_assert!(decode_message(Bytes::from(raw[..cut].to_vec())).is_err());
        }
    }
}
