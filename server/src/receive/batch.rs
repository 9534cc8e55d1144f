//! WAL that has arrived and is not yet on its way to the disk.
//!
//! Bounded: `accept` refuses what exceeds the window. A batch handed out is at most
//! [`BATCH_BYTES_MAX`], so that acknowledgements stay frequent while a backlog drains.

use bytes::{Bytes, BytesMut};
use klio_pg::Lsn;
use klio_proto::Code;
use std::collections::VecDeque;
use tonic::Status;

/// More per fsync gains nothing measurable (docs/benchmarks.md), and delays the acknowledgement.
const BATCH_BYTES_MAX: u64 = 4 << 20;

/// Messages that wait one by one: each costs more memory than its bytes, and a client may send them small. Behind that they
/// are joined: what comes is always read, as an answer may come behind it that another stream waits for (`proof.rs`).
const CHUNKS_MAX: usize = 4096;
/// Joined to one at most, so that joining copies each byte a few times only.
const JOINED_BYTES_MAX: usize = 1 << 20;
/// A W3C trace context has 55 bytes; what is longer is none, and is not kept.
const TRACEPARENT_BYTES_MAX: usize = 128;

/// One message's bytes.
pub struct Chunk {
    /// LSN of the first byte.
    pub start: Lsn,
    /// The WAL; never empty.
    pub data: Bytes,
    /// W3C trace context, when the chunk begins a segment.
    pub traceparent: String,
}

/// The queue between the network and the disk.
pub struct Pending {
    chunks: VecDeque<Chunk>,
    end: Lsn,
    bytes: u64,
    window: u64,
}

impl Pending {
    /// Nothing pending; the next byte must be the one at `start`.
    pub fn new(start: Lsn, window: u64) -> Self {
        Self { chunks: VecDeque::new(), end: start, bytes: 0, window }
    }

    /// One past the last byte that arrived.
    pub const fn end(&self) -> Lsn {
        self.end
    }

    /// How many bytes wait.
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// Takes bytes that continue exactly where the last ended; `accepted` hears of them first.
    ///
    /// # Errors
    /// A jump back or ahead, or more than the window beyond `flushed`.
    pub fn accept(
        &mut self,
        mut chunk: Chunk,
        flushed: Lsn,
        mut accepted: impl FnMut(&Chunk),
    ) -> Result<(), Status> {
        if chunk.start != self.end {
            return Err(Code::BadPosition.status(format!(
                "append WAL: expected the byte at {}, found {}",
                self.end, chunk.start
            )));
        }
        let length = chunk.data.len() as u64;
        let end = chunk.start.checked_add(length).ok_or_else(|| {
            Code::Invalid.status(format!("append WAL at {}: past the last LSN", chunk.start))
        })?;
        if end.bytes_since(flushed) > self.window {
            return Err(Code::Invalid.status(format!(
                "append WAL at {}: expected at most {} bytes beyond the acknowledged {flushed}, found {}",
                chunk.start,
                self.window,
                end.bytes_since(flushed)
            )));
        }
        if chunk.traceparent.len() > TRACEPARENT_BYTES_MAX {
            chunk.traceparent = String::new();
        }
        accepted(&chunk);
        self.end = end;
        self.bytes += length;
        self.keep(chunk);
        Ok(())
    }

    fn keep(&mut self, chunk: Chunk) {
        let many = self.chunks.len() >= CHUNKS_MAX;
        let short = |last: &&mut Chunk| last.data.len() + chunk.data.len() <= JOINED_BYTES_MAX;
        match self.chunks.back_mut().filter(|last| many && short(last)) {
            Some(last) => {
                let mut joined = BytesMut::from(std::mem::take(&mut last.data));
                joined.extend_from_slice(&chunk.data);
                last.data = joined.freeze();
            }
            None => self.chunks.push_back(chunk),
        }
    }

    /// The oldest bytes, for one write and one fsync.
    pub fn take_batch(&mut self) -> Vec<Chunk> {
        let mut batch = Vec::with_capacity(self.chunks.len().min(64));
        let mut taken = 0;
        while let Some(chunk) = self.chunks.front() {
            let length = chunk.data.len() as u64;
            if taken > 0 && taken + length > BATCH_BYTES_MAX {
                break;
            }
            taken += length;
            batch.extend(self.chunks.pop_front());
        }
        self.bytes -= taken;
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(start: u64, length: usize) -> Chunk {
        Chunk { start: Lsn::new(start), data: vec![0; length].into(), traceparent: String::new() }
    }

    #[test]
    fn an_lsn_that_jumps_back_or_ahead_is_refused() {
        let mut pending = Pending::new(Lsn::new(1000), 1 << 20);
        assert!(pending.accept(chunk(1000, 10), Lsn::new(1000), |_| ()).is_ok());
        for wrong in [0, 1000, 1009, 1011, u64::MAX] {
            let status = pending.accept(chunk(wrong, 1), Lsn::new(1000), |_| ()).unwrap_err();
            assert_eq!(Code::of(&status), Code::BadPosition, "{wrong}");
        }
        assert!(pending.accept(chunk(1010, 1), Lsn::new(1000), |_| ()).is_ok());
    }

    #[test]
    fn the_window_is_counted_in_bytes_from_the_acknowledged_position() {
        let mut pending = Pending::new(Lsn::new(0), 100);
        assert!(pending.accept(chunk(0, 100), Lsn::new(0), |_| ()).is_ok());
        assert_eq!(
            Code::of(&pending.accept(chunk(100, 1), Lsn::new(0), |_| ()).unwrap_err()),
            Code::Invalid
        );
        assert!(pending.accept(chunk(100, 1), Lsn::new(50), |_| ()).is_ok());
    }

    /// Nothing was read any more behind so many small messages, an answer that somebody waits for neither.
    #[test]
    fn more_messages_than_may_wait_are_joined_and_none_is_lost() {
        let mut pending = Pending::new(Lsn::new(0), u64::MAX);
        let count = 3 * CHUNKS_MAX as u64;
        for n in 0..count {
            let data = vec![n as u8; 1000].into();
            let chunk = Chunk { start: Lsn::new(n * 1000), data, traceparent: String::new() };
            pending.accept(chunk, Lsn::new(0), |_| ()).unwrap();
        }
        assert!(pending.chunks.len() < CHUNKS_MAX + 16, "{}", pending.chunks.len());
        assert_eq!(pending.bytes(), count * 1000);
        let mut at = 0;
        while !pending.is_empty() {
            for chunk in pending.take_batch() {
                assert_eq!(chunk.start, Lsn::new(at));
                for byte in chunk.data {
                    assert_eq!(byte, (at / 1000) as u8);
                    at += 1;
                }
            }
        }
        assert_eq!((at, pending.bytes()), (count * 1000, 0));
    }

    #[test]
    fn batches_come_out_in_order_and_bounded() {
        let mut pending = Pending::new(Lsn::new(0), u64::MAX);
        let each = 3 << 20;
        for n in 0..3 {
            pending.accept(chunk(n * each, each as usize), Lsn::new(0), |_| ()).unwrap();
        }
        for n in 0..3 {
            let batch = pending.take_batch();
            assert_eq!(batch.iter().map(|c| c.start.as_u64()).collect::<Vec<_>>(), [n * each]);
        }
        assert!(pending.is_empty() && pending.take_batch().is_empty());
    }
}
