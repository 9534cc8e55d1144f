//! The bytes of a journal: one file header, then frames. Pure; numbers are little endian.
//!
//! File header, in the first 4096 bytes (the rest of them is 0), so that no frame shares a block with it:
//!
//! | bytes | field |
//! |---|---|
//! | 0..8 | magic `KLIOJRNL` |
//! | 8..12 | format version: 1 plain, 2 encrypted |
//! | 12..16 | timeline |
//! | 16..24 | system identifier |
//! | 24..32 | LSN of the segment's first byte |
//! | 32..36 | segment size |
//! | 36..40 | 0 |
//! | 40..48 | journal id: random, new each time a file becomes a journal |
//! | 48..52 | CRC-32C of bytes 0..48 |
//! | 52..56 | 0; this and what follows in version 2 only |
//! | 56..64 | id of the cluster's data key (`cipher.rs`) |
//! | 64..80 | salt: random, new with the journal id |
//! | 80..96 | AES-256-GCM tag of bytes 0..80, under the journal's own key |
//!
//! Frame, one after the other from byte 4096 on, version 1:
//!
//! | bytes | field |
//! |---|---|
//! | 0..4 | magic `KWF1` |
//! | 4 | codec: 0 raw, 1 one zstd frame with content size and content checksum |
//! | 5..8 | 0 |
//! | 8..16 | journal id |
//! | 16..24 | LSN of the first byte |
//! | 24..28 | raw length, 1 to 1 MiB |
//! | 28..32 | stored length, at most the raw length |
//! | 32..36 | CRC-32C of bytes 0..32 and the stored bytes |
//! | 36.. | stored bytes |
//!
//! Version 2: magic `KWF2`, the same up to byte 32, then
//!
//! | bytes | field |
//! |---|---|
//! | 32..48 | AES-256-GCM tag of the stored bytes and, as associated data, of bytes 0..32 |
//! | 48.. | stored bytes, encrypted; the nonce is where in the file the frame begins |
//!
//! Files are recycled, so what follows the last frame may be frames of an earlier use. None of them passes: its
//! journal id differs, and it is compared exactly; besides, each frame must begin at the LSN where the one before
//! it ended, and it is looked for only where that one ended, never searched for. A frame of version 1 never passes in a
//! journal of version 2, nor the other way round.
//!
//! By hand: cut the stored bytes out at the offsets the table gives, decrypt those of version 2 (docs/formats.md has a
//! program for it); raw ones are WAL, the others pass through `zstd -d`.

use klio_pg::{Lsn, SegmentName, SegmentSize, TimelineId};

/// Where the first frame begins.
pub(crate) const FIRST_FRAME: u64 = 4096;
/// A plain frame's own bytes before the stored ones.
const PLAIN_HEADER: usize = 36;
/// The same of an encrypted one: the most of both.
pub(crate) const FRAME_HEADER_MAX: usize = 48;
/// The part of a frame's header that is the same in both, and that checksum and tag cover.
pub(crate) const FRAME_FIELDS: usize = 32;
/// Bytes of an AES-256-GCM tag.
pub(crate) const TAG: usize = 16;
/// The most WAL in one frame: bounds the memory of every reader.
pub(crate) const FRAME_RAW_MAX: usize = 1 << 20;

const FILE_MAGIC: &[u8; 8] = b"KLIOJRNL";
const PLAIN_MAGIC: &[u8; 4] = b"KWF1";
const SEALED_MAGIC: &[u8; 4] = b"KWF2";
const PLAIN: u32 = 1;
const ENCRYPTED: u32 = 2;
/// The part of both versions.
const COMMON_BYTES: usize = 52;
/// What the tag of an encrypted journal's header covers.
pub(crate) const SIGNED_BYTES: usize = 80;
const HEADER_BYTES: usize = SIGNED_BYTES + TAG;

/// What an encrypted journal says of its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct KeyInfo {
    /// Which data key.
    pub(crate) key_id: [u8; 8],
    /// Random: with the data key it makes the journal's own key.
    pub(crate) salt: [u8; 16],
}

/// What a journal is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct JournalHeader {
    pub(crate) system_identifier: u64,
    pub(crate) timeline: TimelineId,
    pub(crate) segment_size: SegmentSize,
    /// The segment's first byte.
    pub(crate) start: Lsn,
    pub(crate) id: u64,
    /// Of an encrypted one.
    pub(crate) key: Option<KeyInfo>,
}

/// Why bytes are not a journal header.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HeaderError {
    #[error("expected a journal header, found other bytes")]
    Absent,
    #[error("expected journal format version {PLAIN} or {ENCRYPTED}, found {0}")]
    Version(u32),
    #[error("expected the header's checksum {expected:08x}, found {found:08x}")]
    Checksum { expected: u32, found: u32 },
    #[error("expected a {0}, found none that can be")]
    Field(&'static str),
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().rev().fold(0, |n, b| n << 8 | u32::from(*b))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().rev().fold(0, |n, b| n << 8 | u64::from(*b))
}

impl JournalHeader {
    /// The name of the segment.
    pub(crate) fn segment(&self) -> SegmentName {
        SegmentName::containing(self.timeline, self.start, self.segment_size)
    }

    /// One past the segment's last byte.
    pub(crate) fn end(&self) -> Lsn {
        self.start.advance(self.segment_size.bytes())
    }

    /// Bytes of each frame before the stored ones.
    pub(crate) const fn frame_header(&self) -> usize {
        if self.key.is_some() { FRAME_HEADER_MAX } else { PLAIN_HEADER }
    }

    /// The whole first block; of an encrypted journal without its tag, which goes to [`SIGNED_BYTES`] and on.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut block = vec![0; FIRST_FRAME as usize];
        let version = if self.key.is_some() { ENCRYPTED } else { PLAIN };
        block[0..8].copy_from_slice(FILE_MAGIC);
        block[8..12].copy_from_slice(&version.to_le_bytes());
        block[12..16].copy_from_slice(&self.timeline.get().to_le_bytes());
        block[16..24].copy_from_slice(&self.system_identifier.to_le_bytes());
        block[24..32].copy_from_slice(&self.start.as_u64().to_le_bytes());
        block[32..36].copy_from_slice(&self.segment_size.as_u32().to_le_bytes());
        block[40..48].copy_from_slice(&self.id.to_le_bytes());
        let crc = crc32c::crc32c(&block[..48]);
        block[48..52].copy_from_slice(&crc.to_le_bytes());
        if let Some(KeyInfo { key_id, salt }) = &self.key {
            block[56..64].copy_from_slice(key_id);
            block[64..80].copy_from_slice(salt);
        }
        block
    }

    /// Reads the beginning of a file. The tag of an encrypted one is not looked at.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, HeaderError> {
        if bytes.len() < COMMON_BYTES || &bytes[0..8] != FILE_MAGIC {
            return Err(HeaderError::Absent);
        }
        let key = match u32_at(bytes, 8) {
            PLAIN => None,
            ENCRYPTED if bytes.len() < HEADER_BYTES => return Err(HeaderError::Absent),
            ENCRYPTED => Some(KeyInfo {
                key_id: std::array::from_fn(|n| bytes[56 + n]),
                salt: std::array::from_fn(|n| bytes[64 + n]),
            }),
            other => return Err(HeaderError::Version(other)),
        };
        let (expected, found) = (crc32c::crc32c(&bytes[..48]), u32_at(bytes, 48));
        if expected != found {
            return Err(HeaderError::Checksum { expected, found });
        }
        let timeline = TimelineId::new(u32_at(bytes, 12)).ok_or(HeaderError::Field("timeline"))?;
        let segment_size =
            SegmentSize::new(u32_at(bytes, 32)).map_err(|_| HeaderError::Field("segment size"))?;
        let start = Lsn::new(u64_at(bytes, 24));
        if start.offset_in(segment_size) != 0 {
            return Err(HeaderError::Field("segment start"));
        }
        let (system_identifier, id) = (u64_at(bytes, 16), u64_at(bytes, 40));
        Ok(Self { system_identifier, timeline, segment_size, start, id, key })
    }
}

/// How a frame's bytes are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Codec {
    Raw,
    Zstd,
}

/// What a frame says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FrameHeader {
    pub(crate) encrypted: bool,
    pub(crate) codec: Codec,
    pub(crate) journal: u64,
    pub(crate) start: Lsn,
    pub(crate) raw_len: u32,
    pub(crate) stored_len: u32,
}

impl FrameHeader {
    /// The first part of the header; checksum or tag come behind it.
    pub(crate) fn fields(&self) -> [u8; FRAME_FIELDS] {
        let mut out = [0; FRAME_FIELDS];
        out[0..4].copy_from_slice(if self.encrypted { SEALED_MAGIC } else { PLAIN_MAGIC });
        out[4] = u8::from(self.codec == Codec::Zstd);
        out[8..16].copy_from_slice(&self.journal.to_le_bytes());
        out[16..24].copy_from_slice(&self.start.as_u64().to_le_bytes());
        out[24..28].copy_from_slice(&self.raw_len.to_le_bytes());
        out[28..32].copy_from_slice(&self.stored_len.to_le_bytes());
        out
    }

    /// Reads a header; `None` for anything that cannot be one. Checksum and tag are not looked at yet.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        if bytes.len() < PLAIN_HEADER || bytes[5..8] != [0; 3] {
            return None;
        }
        let encrypted = match &bytes[0..4] {
            magic if magic == PLAIN_MAGIC => false,
            magic if magic == SEALED_MAGIC => true,
            _ => return None,
        };
        let codec = match bytes[4] {
            0 => Codec::Raw,
            1 => Codec::Zstd,
            _ => return None,
        };
        let (raw_len, stored_len) = (u32_at(bytes, 24), u32_at(bytes, 28));
        let lengths = (1..=FRAME_RAW_MAX as u32).contains(&raw_len)
            && (1..=raw_len).contains(&stored_len)
            && (codec == Codec::Zstd || stored_len == raw_len);
        lengths.then(|| Self {
            encrypted,
            codec,
            journal: u64_at(bytes, 8),
            start: Lsn::new(u64_at(bytes, 16)),
            raw_len,
            stored_len,
        })
    }

    /// Bytes before the stored ones.
    pub(crate) const fn header_bytes(&self) -> usize {
        if self.encrypted { FRAME_HEADER_MAX } else { PLAIN_HEADER }
    }

    /// One past the last byte.
    pub(crate) fn end(&self) -> Lsn {
        self.start.advance(self.raw_len.into())
    }

    /// Bytes in the file, header included.
    pub(crate) fn file_bytes(&self) -> u64 {
        self.header_bytes() as u64 + u64::from(self.stored_len)
    }
}

/// Puts the header of a plain frame before its stored bytes, which are in their place in `frame` already.
pub(crate) fn finish_plain(header: &FrameHeader, frame: &mut [u8]) {
    frame[..FRAME_FIELDS].copy_from_slice(&header.fields());
    let crc = plain_sum(frame);
    frame[FRAME_FIELDS..PLAIN_HEADER].copy_from_slice(&crc.to_le_bytes());
}

/// Whether a plain frame is as it was written.
pub(crate) fn is_intact(frame: &[u8]) -> bool {
    frame.len() > PLAIN_HEADER && plain_sum(frame) == u32_at(frame, FRAME_FIELDS)
}

fn plain_sum(frame: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&frame[..FRAME_FIELDS]), &frame[PLAIN_HEADER..])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(id: u64, start: u64) -> JournalHeader {
        let segment_size = SegmentSize::new(1 << 20).unwrap();
        JournalHeader {
            system_identifier: 7,
            timeline: TimelineId::new(3).unwrap(),
            segment_size,
            start: Lsn::new(start).segment_start(segment_size),
            id,
            key: None,
        }
    }

    fn frame(id: u64, start: u64, payload: &[u8]) -> Vec<u8> {
        let len = payload.len() as u32;
        let header = FrameHeader {
            encrypted: false,
            codec: Codec::Raw,
            journal: id,
            start: Lsn::new(start),
            raw_len: len,
            stored_len: len,
        };
        let mut out = vec![0; PLAIN_HEADER];
        out.extend(payload);
        finish_plain(&header, &mut out);
        out
    }

    fn read(bytes: &[u8]) -> Option<FrameHeader> {
        let header = FrameHeader::decode(bytes).filter(|header| !header.encrypted)?;
        let whole = bytes.get(..header.file_bytes() as usize)?;
        is_intact(whole).then_some(header)
    }

    #[test]
    fn an_unknown_version_is_named() {
        let mut block = header(1, 0).encode();
        block[8] = 3;
        assert_eq!(JournalHeader::decode(&block), Err(HeaderError::Version(3)));
    }

    #[test]
    fn an_unknown_codec_is_not_a_frame() {
        let mut bytes = frame(1, 2, b"abc");
        bytes[4] = 2;
        assert_eq!(read(&bytes), None);
    }

    proptest! {
        #[test]
        fn a_journal_header_round_trips(id: u64, start in 0u64..1 << 60, key: Option<([u8; 8], [u8; 16])>) {
            let key = key.map(|(key_id, salt)| KeyInfo { key_id, salt });
            let written = JournalHeader { key, ..header(id, start) };
            prop_assert_eq!(JournalHeader::decode(&written.encode()), Ok(written));
        }

        #[test]
        fn a_bit_flip_in_a_journal_header_is_found(id: u64, bit in 0usize..COMMON_BYTES * 8) {
            let mut block = header(id, 5 << 20).encode();
            block[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(JournalHeader::decode(&block).is_err());
        }

        #[test]
        fn a_frame_round_trips(id: u64, start: u64, payload in prop::collection::vec(any::<u8>(), 1..500)) {
            let found = read(&frame(id, start, &payload)).unwrap();
            prop_assert_eq!((found.journal, found.start), (id, Lsn::new(start)));
            prop_assert_eq!(found.raw_len as usize, payload.len());
        }

        #[test]
        fn a_truncated_frame_is_none(payload in prop::collection::vec(any::<u8>(), 1..300), cut in 0.0f64..1.0) {
            let bytes = frame(1, 2, &payload);
            let keep = (bytes.len() as f64 * cut) as usize;
            prop_assert_eq!(read(&bytes[..keep]), None);
        }

        #[test]
        fn a_bit_flip_in_a_frame_is_found(payload in prop::collection::vec(any::<u8>(), 1..300), at: prop::sample::Index) {
            let mut bytes = frame(1, 2, &payload);
            let bit = at.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(read(&bytes), None);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>) {
            let _ = read(&bytes);
            let _ = JournalHeader::decode(&bytes);
        }
    }
}
