//! The format of a journal: one file header, then frames. Pure; numbers are little endian.
//!
//! File header, padded with zeros to 4096 bytes, so that no frame shares a block with it:
//!
//! | bytes | field |
//! |---|---|
//! | 0..8 | magic `KLIOJRNL` |
//! | 8..12 | format version: 3; 1 (plain) and 2 (encrypted) are read |
//! | 12..16 | timeline |
//! | 16..24 | system identifier |
//! | 24..32 | LSN of the segment's first byte |
//! | 32..36 | segment size |
//! | 36..40 | version 3: 1 encrypted, 0 plain; versions 1 and 2: 0 |
//! | 40..48 | journal id: random, new each time a file becomes a journal |
//! | 48..52 | CRC-32C of bytes 0..48, in every version, so that a damaged version can be told from a newer one |
//! | 52..56 | 0; this and the following fields in encrypted journals only |
//! | 56..64 | id of the cluster's data key (`cipher.rs`) |
//! | 64..80 | salt: random, new with the journal id |
//! | 80..96 | AES-256-GCM tag of bytes 0..80, under the journal's own key |
//!
//! Frames, one after the other from byte 4096 on:
//!
//! | bytes | field |
//! |---|---|
//! | 0..4 | magic `KWF3`, encrypted `KWE3` |
//! | 4 | codec: 0 raw, 1 one zstd frame with content size and content checksum, 2 a closing frame: no WAL |
//! | 5..8 | 0 |
//! | 8..16 | journal id |
//! | 16..24 | LSN of the first byte; of a closing frame, of the byte that comes next |
//! | 24..28 | raw length, 1 to 1 MiB; 0 in a closing frame |
//! | 28..32 | stored length, at most the raw length |
//! | 32..40 | flushed LSN: all WAL below it was synced before this frame was written |
//! | 40..44 | plain: CRC-32C of bytes 0..40 and the stored bytes, which follow at 44 |
//! | 40..56 | encrypted: AES-256-GCM tag of the stored bytes and, as associated data, of bytes 0..40; the nonce is where in the file the frame begins; the stored bytes follow at 56 |
//!
//! Frames of version 1 (`KWF1`) and 2 (`KWF2`, encrypted) have no flushed LSN and no closing ones: checksum or tag are at byte 32,
//! the stored bytes at 36 or 48.
//!
//! The flushed LSN tells rot from a torn tail. Write-back has no order, so a good frame behind a bad one proves nothing
//! by itself. But when it says that WAL at the bad frame's position was flushed, the medium lost acknowledged bytes. A
//! closing frame, written when a stream pauses, says so for the last batch.
//!
//! Files are recycled, so the bytes behind the last frame may be frames of an earlier use. None of them is accepted:
//! the journal id differs, and it is compared exactly; also, each frame must begin at the LSN where the one before it
//! ended. WAL is read only from where the previous frame ended; what the search behind a bad frame finds is only
//! evidence. A frame of one version is never accepted in a journal of another version.
//!
//! To read a journal by hand, cut the stored bytes out at the offsets in the table and decrypt those of encrypted
//! frames (docs/formats.md has a program for it). Raw ones are WAL; the others pass through `zstd -d`.

use super::types::Pinned;
use klio_pg::{Lsn, SegmentName, SegmentSize, TimelineId};

/// Where the first frame begins.
pub(crate) const FIRST_FRAME: u64 = 4096;
/// The longest header of a frame.
pub(crate) const FRAME_HEADER_MAX: usize = FIELDS_MAX + TAG;
/// Bytes of a plain frame's checksum.
const SUM: usize = 4;
/// Bytes of an AES-256-GCM tag.
pub(crate) const TAG: usize = 16;
/// Most bytes of WAL in one frame, before compression. It limits the memory of every reader.
pub(crate) const FRAME_RAW_MAX: usize = 1 << 20;
/// The bytes that checksum and tag cover: without a flushed LSN, and with it.
const FIELDS_FIRST: usize = 32;
const FIELDS_MAX: usize = 40;

const FILE_MAGIC: &[u8; 8] = b"KLIOJRNL";
/// The part of the file header that is the same in every version.
const COMMON_BYTES: usize = 52;
/// The bytes that the tag of an encrypted journal's header covers.
pub(crate) const SIGNED_BYTES: usize = 80;
const HEADER_BYTES: usize = SIGNED_BYTES + TAG;
const NEWEST: u32 = 3;

/// The frame format of a journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// Versions 1 and 2: can be read; to be continued, the journal is copied into the current format.
    First,
    /// Version 3: frames carry the flushed LSN.
    Current,
}

impl Format {
    const fn magic(self, encrypted: bool) -> &'static [u8; 4] {
        match (self, encrypted) {
            (Format::First, false) => b"KWF1",
            (Format::First, true) => b"KWF2",
            (Format::Current, false) => b"KWF3",
            (Format::Current, true) => b"KWE3",
        }
    }

    /// Length of the header fields that checksum or tag cover; the checksum or tag follows them.
    pub(crate) const fn fields(self) -> usize {
        match self {
            Format::First => FIELDS_FIRST,
            Format::Current => FIELDS_MAX,
        }
    }

    /// Length of a frame's header: the bytes before the stored ones.
    pub(crate) const fn header_bytes(self, encrypted: bool) -> usize {
        self.fields() + if encrypted { TAG } else { SUM }
    }

    fn of_frame(magic: &[u8]) -> Option<(Self, bool)> {
        let all =
            [Format::First, Format::Current].into_iter().flat_map(|f| [(f, false), (f, true)]);
        all.into_iter().find(|(format, encrypted)| magic == format.magic(*encrypted))
    }
}

/// The key information in the header of an encrypted journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct KeyInfo {
    /// Id of the data key.
    pub(crate) key_id: [u8; 8],
    /// Random; the journal's own key is derived from it and the data key.
    pub(crate) salt: [u8; 16],
}

/// The header of a journal: which segment it belongs to and how its frames are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct JournalHeader {
    pub(crate) format: Format,
    pub(crate) system_identifier: u64,
    pub(crate) timeline: TimelineId,
    pub(crate) segment_size: SegmentSize,
    /// LSN of the segment's first byte.
    pub(crate) start: Lsn,
    pub(crate) id: u64,
    /// For an encrypted journal.
    pub(crate) key: Option<KeyInfo>,
}

/// Why bytes are not a journal header.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HeaderError {
    #[error("expected a journal header, found other bytes")]
    Absent,
    #[error(
        "expected journal format version 1 to {NEWEST}, found {0}: it was written by a newer Klio"
    )]
    Newer(u32),
    #[error("expected the header's checksum {expected:08x}, found {found:08x}")]
    Checksum { expected: u32, found: u32 },
    #[error("expected a valid {0}, found an impossible one")]
    Field(&'static str),
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().rev().fold(0, |n, b| n << 8 | u32::from(*b))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().rev().fold(0, |n, b| n << 8 | u64::from(*b))
}

impl JournalHeader {
    /// The header of a plain journal without an id: `JournalKeys::begin` adds the id and, if journals are encrypted,
    /// the key.
    pub(crate) const fn new(pinned: &Pinned, timeline: TimelineId, start: Lsn) -> Self {
        let Pinned { system_identifier, segment_size, .. } = *pinned;
        let (format, id, key) = (Format::Current, 0, None);
        Self { format, system_identifier, timeline, segment_size, start, id, key }
    }

    pub(crate) fn segment(&self) -> SegmentName {
        SegmentName::containing(self.timeline, self.start, self.segment_size)
    }

    /// One past the segment's last byte.
    pub(crate) fn end(&self) -> Lsn {
        self.start.advance(self.segment_size.bytes())
    }

    /// Length of each frame's header.
    pub(crate) const fn frame_header(&self) -> usize {
        self.format.header_bytes(self.key.is_some())
    }

    /// The complete first block. For an encrypted journal its tag is missing; it goes to the bytes from
    /// [`SIGNED_BYTES`] on.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut block = vec![0; FIRST_FRAME as usize];
        let version: u32 = match (self.format, self.key) {
            (Format::First, None) => 1,
            (Format::First, Some(_)) => 2,
            (Format::Current, _) => NEWEST,
        };
        block[0..8].copy_from_slice(FILE_MAGIC);
        block[8..12].copy_from_slice(&version.to_le_bytes());
        block[12..16].copy_from_slice(&self.timeline.get().to_le_bytes());
        block[16..24].copy_from_slice(&self.system_identifier.to_le_bytes());
        block[24..32].copy_from_slice(&self.start.as_u64().to_le_bytes());
        block[32..36].copy_from_slice(&self.segment_size.as_u32().to_le_bytes());
        let flagged = self.format == Format::Current && self.key.is_some();
        block[36..40].copy_from_slice(&u32::from(flagged).to_le_bytes());
        block[40..48].copy_from_slice(&self.id.to_le_bytes());
        let crc = crc32c::crc32c(&block[..48]);
        block[48..52].copy_from_slice(&crc.to_le_bytes());
        if let Some(KeyInfo { key_id, salt }) = &self.key {
            block[56..64].copy_from_slice(key_id);
            block[64..80].copy_from_slice(salt);
        }
        block
    }

    /// Parses the beginning of a file. Does not check the tag of an encrypted journal.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, HeaderError> {
        if bytes.len() < COMMON_BYTES || &bytes[0..8] != FILE_MAGIC {
            return Err(HeaderError::Absent);
        }
        let (expected, found) = (crc32c::crc32c(&bytes[..48]), u32_at(bytes, 48));
        if expected != found {
            return Err(HeaderError::Checksum { expected, found });
        }
        let (format, encrypted) = match (u32_at(bytes, 8), u32_at(bytes, 36)) {
            (1, _) => (Format::First, false),
            (2, _) => (Format::First, true),
            (NEWEST, flags @ (0 | 1)) => (Format::Current, flags == 1),
            (newer, _) if newer >= NEWEST => return Err(HeaderError::Newer(newer)),
            _ => return Err(HeaderError::Field("version")),
        };
        if encrypted && bytes.len() < HEADER_BYTES {
            return Err(HeaderError::Absent);
        }
        let key = encrypted.then(|| KeyInfo {
            key_id: std::array::from_fn(|n| bytes[56 + n]),
            salt: std::array::from_fn(|n| bytes[64 + n]),
        });
        let timeline = TimelineId::new(u32_at(bytes, 12)).ok_or(HeaderError::Field("timeline"))?;
        let segment_size =
            SegmentSize::new(u32_at(bytes, 32)).map_err(|_| HeaderError::Field("segment size"))?;
        let start = Lsn::new(u64_at(bytes, 24));
        if start.offset_in(segment_size) != 0 {
            return Err(HeaderError::Field("segment start"));
        }
        let (system_identifier, id) = (u64_at(bytes, 16), u64_at(bytes, 40));
        Ok(Self { format, system_identifier, timeline, segment_size, start, id, key })
    }
}

/// How a frame's bytes are encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Codec {
    Raw,
    Zstd,
    /// A closing frame: no bytes.
    Closing,
}

/// The parsed header of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FrameHeader {
    pub(crate) format: Format,
    pub(crate) encrypted: bool,
    pub(crate) codec: Codec,
    pub(crate) journal: u64,
    pub(crate) start: Lsn,
    pub(crate) raw_len: u32,
    pub(crate) stored_len: u32,
    /// All WAL below this was durable when the frame was written; zero in the first format, which lacks this field.
    pub(crate) flushed: Lsn,
}

impl FrameHeader {
    /// The closing frame which says that a journal's WAL up to `at` is durable.
    pub(crate) fn closing(journal: &JournalHeader, at: Lsn) -> Self {
        Self {
            format: journal.format,
            encrypted: journal.key.is_some(),
            codec: Codec::Closing,
            journal: journal.id,
            start: at,
            raw_len: 0,
            stored_len: 0,
            flushed: at,
        }
    }

    /// Writes the header fields; checksum or tag follow.
    pub(crate) fn put_fields(&self, frame: &mut [u8]) {
        frame[0..4].copy_from_slice(self.format.magic(self.encrypted));
        frame[4..8].copy_from_slice(&[self.codec as u8, 0, 0, 0]);
        frame[8..16].copy_from_slice(&self.journal.to_le_bytes());
        frame[16..24].copy_from_slice(&self.start.as_u64().to_le_bytes());
        frame[24..28].copy_from_slice(&self.raw_len.to_le_bytes());
        frame[28..32].copy_from_slice(&self.stored_len.to_le_bytes());
        if self.format == Format::Current {
            frame[32..40].copy_from_slice(&self.flushed.as_u64().to_le_bytes());
        }
    }

    /// Parses a header; `None` for bytes that cannot be one. Checksum and tag are not checked here.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let (format, encrypted) = Format::of_frame(bytes.get(0..4)?)?;
        if bytes.len() < format.header_bytes(encrypted) || bytes[5..8] != [0; 3] {
            return None;
        }
        let codec = match (bytes[4], format) {
            (0, _) => Codec::Raw,
            (1, _) => Codec::Zstd,
            (2, Format::Current) => Codec::Closing,
            _ => return None,
        };
        let (raw_len, stored_len) = (u32_at(bytes, 24), u32_at(bytes, 28));
        let lengths = match codec {
            Codec::Closing => (raw_len, stored_len) == (0, 0),
            _ => {
                (1..=FRAME_RAW_MAX as u32).contains(&raw_len)
                    && (1..=raw_len).contains(&stored_len)
                    && (codec == Codec::Zstd || stored_len == raw_len)
            }
        };
        let flushed = match format {
            Format::First => Lsn::ZERO,
            Format::Current => Lsn::new(u64_at(bytes, 32)),
        };
        lengths.then(|| Self {
            format,
            encrypted,
            codec,
            journal: u64_at(bytes, 8),
            start: Lsn::new(u64_at(bytes, 16)),
            raw_len,
            stored_len,
            flushed,
        })
    }

    /// Length of the header: the bytes before the stored ones.
    pub(crate) const fn header_bytes(&self) -> usize {
        self.format.header_bytes(self.encrypted)
    }

    /// One past the last byte of WAL.
    pub(crate) fn end(&self) -> Lsn {
        self.start.advance(self.raw_len.into())
    }

    /// Length of the frame in the file, header included.
    pub(crate) fn file_bytes(&self) -> u64 {
        self.header_bytes() as u64 + u64::from(self.stored_len)
    }
}

/// Writes the header of a plain frame before its stored bytes, which are already in place in `frame`.
pub(crate) fn finish_plain(header: &FrameHeader, frame: &mut [u8]) {
    header.put_fields(frame);
    let fields = header.format.fields();
    let crc = plain_sum(fields, frame);
    frame[fields..fields + SUM].copy_from_slice(&crc.to_le_bytes());
}

/// Whether a plain frame is unmodified.
pub(crate) fn is_intact(format: Format, frame: &[u8]) -> bool {
    let fields = format.fields();
    frame.len() >= fields + SUM && plain_sum(fields, frame) == u32_at(frame, fields)
}

fn plain_sum(fields: usize, frame: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&frame[..fields]), &frame[fields + SUM..])
}

/// Whether these bytes look like a frame of the given journal, however damaged: two of magic, journal id and start LSN
/// must match. `start` is where the frame would have to begin.
pub(crate) fn resembles(bytes: &[u8], journal: u64, start: Lsn) -> bool {
    if bytes.len() < FIELDS_FIRST {
        return false;
    }
    let signs = [
        Format::of_frame(&bytes[..4]).is_some(),
        u64_at(bytes, 8) == journal,
        u64_at(bytes, 16) == start.as_u64(),
    ];
    signs.into_iter().filter(|sign| *sign).count() >= 2
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(id: u64, start: u64) -> JournalHeader {
        let segment_size = SegmentSize::new(1 << 20).unwrap();
        JournalHeader {
            format: Format::Current,
            system_identifier: 7,
            timeline: TimelineId::new(3).unwrap(),
            segment_size,
            start: Lsn::new(start).segment_start(segment_size),
            id,
            key: None,
        }
    }

    fn frame_of(format: Format, id: u64, start: u64, payload: &[u8]) -> Vec<u8> {
        let len = payload.len() as u32;
        let header = FrameHeader {
            format,
            encrypted: false,
            codec: if len == 0 { Codec::Closing } else { Codec::Raw },
            journal: id,
            start: Lsn::new(start),
            raw_len: len,
            stored_len: len,
            flushed: if format == Format::First { Lsn::ZERO } else { Lsn::new(start / 2) },
        };
        let mut out = vec![0; format.header_bytes(false)];
        out.extend(payload);
        finish_plain(&header, &mut out);
        assert!(FrameHeader::decode(&out).is_none_or(|found| found == header));
        out
    }

    fn frame(id: u64, start: u64, payload: &[u8]) -> Vec<u8> {
        frame_of(Format::Current, id, start, payload)
    }

    fn read(bytes: &[u8]) -> Option<FrameHeader> {
        let header = FrameHeader::decode(bytes).filter(|header| !header.encrypted)?;
        let whole = bytes.get(..header.file_bytes() as usize)?;
        is_intact(header.format, whole).then_some(header)
    }

    #[test]
    fn a_newer_version_is_told_from_a_damaged_one() {
        let mut block = header(1, 0).encode();
        block[8] = 4;
        assert!(matches!(JournalHeader::decode(&block), Err(HeaderError::Checksum { .. })));
        let crc = crc32c::crc32c(&block[..48]);
        block[48..52].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(JournalHeader::decode(&block), Err(HeaderError::Newer(4)));
    }

    /// Byte for byte what the first builds wrote.
    #[test]
    fn headers_and_frames_of_the_first_versions_are_read() {
        let old = JournalHeader { format: Format::First, ..header(9, 5 << 20) };
        let block = old.encode();
        assert_eq!((block[8], &block[36..40]), (1, &[0; 4][..]));
        assert_eq!(JournalHeader::decode(&block), Ok(old));
        let key = Some(KeyInfo { key_id: [1; 8], salt: [2; 16] });
        let old = JournalHeader { key, ..old };
        let block = old.encode();
        assert_eq!((block[8], &block[36..40]), (2, &[0; 4][..]));
        assert_eq!(JournalHeader::decode(&block), Ok(old));
        let bytes = frame_of(Format::First, 7, 100, b"abc");
        assert_eq!((&bytes[..4], bytes.len()), (&b"KWF1"[..], 36 + 3));
        assert_eq!(crc32c::crc32c(&[&bytes[..32], b"abc"].concat()), u32_at(&bytes, 32));
        assert_eq!(read(&bytes).unwrap().flushed, Lsn::ZERO);
        assert_eq!(read(&frame_of(Format::First, 7, 100, b"")), None, "no closing ones then");
    }

    #[test]
    fn an_unknown_codec_is_not_a_frame() {
        let mut bytes = frame(1, 2, b"abc");
        bytes[4] = 3;
        assert_eq!(read(&bytes), None);
    }

    proptest! {
        #[test]
        fn a_journal_header_round_trips(id: u64, start in 0u64..1 << 60, key: Option<([u8; 8], [u8; 16])>, first: bool) {
            let key = key.map(|(key_id, salt)| KeyInfo { key_id, salt });
            let format = if first { Format::First } else { Format::Current };
            let written = JournalHeader { key, format, ..header(id, start) };
            prop_assert_eq!(JournalHeader::decode(&written.encode()), Ok(written));
        }

        #[test]
        fn a_bit_flip_in_a_journal_header_is_found(id: u64, bit in 0usize..COMMON_BYTES * 8) {
            let mut block = header(id, 5 << 20).encode();
            block[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(JournalHeader::decode(&block).is_err());
        }

        #[test]
        fn a_frame_round_trips(id: u64, start: u64, payload in prop::collection::vec(any::<u8>(), 0..500)) {
            let found = read(&frame(id, start, &payload)).unwrap();
            prop_assert_eq!((found.journal, found.start), (id, Lsn::new(start)));
            prop_assert_eq!(found.flushed, Lsn::new(start / 2));
            prop_assert_eq!(found.codec == Codec::Closing, payload.is_empty());
            prop_assert_eq!(found.raw_len as usize, payload.len());
        }

        #[test]
        fn a_truncated_frame_is_none(payload in prop::collection::vec(any::<u8>(), 0..300), cut in 0.0f64..1.0) {
            let bytes = frame(1, 2, &payload);
            let keep = (bytes.len() as f64 * cut) as usize;
            prop_assert_eq!(read(&bytes[..keep]), None);
        }

        #[test]
        fn a_bit_flip_in_a_frame_is_found(payload in prop::collection::vec(any::<u8>(), 0..300), at: prop::sample::Index) {
            let mut bytes = frame(1, 2, &payload);
            let bit = at.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(read(&bytes), None);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>) {
            let _ = (read(&bytes), resembles(&bytes, 1, Lsn::ZERO));
            let _ = JournalHeader::decode(&bytes);
        }
    }
}
