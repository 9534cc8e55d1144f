//! Compression contexts and their output buffers, shared by all writers of a store.
//!
//! A writer borrows a context only while it appends, so a thousand idle clusters need none, and a busy one finds a
//! context ready and allocates nothing. Data that compression does not make smaller is stored raw.

use super::{
    cipher::{self, Cipher},
    frame::{Codec, FRAME_RAW_MAX, FrameHeader, JournalHeader},
};
use klio_pg::Lsn;
use std::sync::{Mutex, PoisonError};
use zstd::zstd_safe::{CCtx, CParameter};

/// Smaller batches are written uncompressed: a commit waits for them, and the fsync takes far longer than writing the
/// bytes.
pub(crate) const COMPRESS_FROM: usize = 16 << 10;
/// On WAL, zstd at this level has a better ratio than lz4 and is faster (measured).
const LEVEL: i32 = 1;

pub(crate) struct Scratch {
    context: Option<CCtx<'static>>,
    out: Vec<u8>,
}

impl Scratch {
    const fn new() -> Self {
        Self { context: None, out: Vec::new() }
    }

    fn room(&mut self, bytes: usize) {
        if self.out.len() < bytes {
            self.out = vec![0; bytes];
        }
    }

    /// Writes `raw` as one standard zstd frame with content size and checksum into the buffer at `at`, if it fits in
    /// `limit` bytes.
    fn compress(&mut self, raw: &[u8], at: usize, limit: usize) -> Option<usize> {
        let Self { context, out } = self;
        let context = match context {
            Some(context) => context,
            None => {
                let mut fresh = CCtx::try_create()?;
                fresh.set_parameter(CParameter::CompressionLevel(LEVEL)).ok()?;
                fresh.set_parameter(CParameter::ChecksumFlag(true)).ok()?;
                context.insert(fresh)
            }
        };
        // The only possible error is that the output does not fit, and the next call starts afresh.
        context.compress2(&mut out[at..at + limit], raw).ok()
    }

    /// A complete journal frame of at most [`FRAME_RAW_MAX`] bytes of WAL, to be written at `offset` when everything up
    /// to `flushed` is durable. It is encrypted in place if there is a cipher.
    pub(super) fn frame(
        &mut self,
        journal: &JournalHeader,
        cipher: Option<&Cipher>,
        offset: u64,
        (start, flushed): (Lsn, Lsn),
        raw: &[u8],
    ) -> &[u8] {
        debug_assert!(!raw.is_empty() && raw.len() <= FRAME_RAW_MAX);
        let room = journal.frame_header();
        self.room(room + raw.len());
        let small =
            if raw.len() < COMPRESS_FROM { None } else { self.compress(raw, room, raw.len() - 1) };
        let (codec, len) = match small {
            Some(len) => (Codec::Zstd, len),
            None => {
                self.out[room..room + raw.len()].copy_from_slice(raw);
                (Codec::Raw, raw.len())
            }
        };
        let header = FrameHeader {
            format: journal.format,
            encrypted: cipher.is_some(),
            codec,
            journal: journal.id,
            start,
            raw_len: raw.len() as u32,
            stored_len: len as u32,
            flushed,
        };
        let frame = &mut self.out[..room + len];
        cipher::finish(&header, frame, offset, cipher);
        frame
    }

    /// One zstd frame of at most [`FRAME_RAW_MAX`] bytes, even if it is larger than the input. `None` only when there
    /// is no memory for a context.
    pub(crate) fn zstd(&mut self, raw: &[u8]) -> Option<&[u8]> {
        let limit = zstd::zstd_safe::compress_bound(raw.len());
        self.room(limit);
        let len = self.compress(raw, 0, limit)?;
        Some(&self.out[..len])
    }
}

/// The idle contexts: at most as many as threads have worked at the same time, and no more than `keep`.
pub(crate) struct ScratchPool {
    idle: Mutex<Vec<Scratch>>,
    keep: usize,
}

impl ScratchPool {
    pub(crate) const fn new(keep: usize) -> Self {
        Self { idle: Mutex::new(Vec::new()), keep }
    }

    /// Lends a context to `work`.
    pub(crate) fn with<T>(&self, work: impl FnOnce(&mut Scratch) -> T) -> T {
        let lent = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut scratch = lent.unwrap_or_else(Scratch::new);
        let result = work(&mut scratch);
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < self.keep {
            idle.push(scratch);
        }
        result
    }
}

impl std::fmt::Debug for ScratchPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ScratchPool").field("keep", &self.keep).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::frame;

    fn read(bytes: &[u8]) -> (FrameHeader, Vec<u8>) {
        let header = FrameHeader::decode(bytes).unwrap();
        let stored = &bytes[header.header_bytes()..];
        assert!(frame::is_intact(header.format, bytes));
        let raw = match header.codec {
            Codec::Raw => stored.to_vec(),
            Codec::Zstd => zstd::bulk::decompress(stored, FRAME_RAW_MAX).unwrap(),
            Codec::Closing => panic!("expected WAL, found a closing frame"),
        };
        (header, raw)
    }

    #[test]
    fn large_batches_are_compressed_and_small_or_random_ones_are_not() {
        let pool = ScratchPool::new(1);
        let journal = JournalHeader {
            format: frame::Format::Current,
            system_identifier: 1,
            timeline: klio_pg::TimelineId::new(1).unwrap(),
            segment_size: klio_pg::SegmentSize::new(1 << 20).unwrap(),
            start: Lsn::new(0),
            id: 9,
            key: None,
        };
        let noise: Vec<u8> = (0..40_000u64)
            .map(|n| {
                (n.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ (n * n) << 7).wrapping_mul(n | 1) as u8
                    ^ (n.wrapping_mul(0xD134_2543_DE82_EF95) >> 56) as u8
            })
            .collect();
        let noise = zstd::bulk::compress(&noise, 19).unwrap();
        for (raw, codec) in [
            (vec![5; COMPRESS_FROM], Codec::Zstd),
            (vec![5; FRAME_RAW_MAX], Codec::Zstd),
            (vec![5; COMPRESS_FROM - 1], Codec::Raw),
            (vec![5], Codec::Raw),
            (noise[..noise.len().min(30_000)].to_vec(), Codec::Raw),
        ] {
            pool.with(|scratch| {
                let (header, back) =
                    read(scratch.frame(&journal, None, 4096, (Lsn::new(4), Lsn::ZERO), &raw));
                assert_eq!((header.codec, header.journal, header.start), (codec, 9, Lsn::new(4)));
                assert_eq!(back, raw);
            });
        }
    }

    #[test]
    fn a_context_is_given_back_and_the_pool_has_a_bound() {
        let pool = ScratchPool::new(1);
        pool.with(|_| pool.with(|_| ()));
        assert_eq!(pool.idle.lock().unwrap().len(), 1);
    }
}
