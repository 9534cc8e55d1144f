//! WAL that has arrived and is not yet being written to disk.
//!
//! Memory is bounded: `accept` refuses what exceeds the window. A batch is at most [`BATCH_BYTES_MAX`] long, so that
//! acknowledgements stay frequent while a backlog drains.

use bytes::{Bytes, BytesMut};
use klio_pg::Lsn;
use klio_proto::Code;
use std::collections::VecDeque;
use tonic::Status;

/// A larger batch per fsync gains nothing measurable (docs/benchmarks.md) and delays the acknowledgement.
const BATCH_BYTES_MAX: u64 = 4 << 20;

/// The number of messages that wait separately. Each costs more memory than its bytes, and a client may send small
/// ones, so beyond this number a message is appended to the previous one. Messages are always read, even then, because
/// an answer that another stream waits for may come behind them (`proof.rs`).
const CHUNKS_MAX: usize = 4096;
/// Messages are joined up to this size only, so that each byte is copied a few times at most.
const JOINED_BYTES_MAX: usize = 1 << 20;
/// A W3C trace context has 55 bytes; a longer value is not one and is dropped.
const TRACEPARENT_BYTES_MAX: usize = 128;

/// The bytes of one message.
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
    /// An empty queue whose next byte must be the one at `start`.
    pub fn new(start: Lsn, window: u64) -> Self {
        Self { chunks: VecDeque::new(), end: start, bytes: 0, window }
    }

    /// One past the last byte that arrived.
    pub const fn end(&self) -> Lsn {
        self.end
    }

    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// Takes bytes that continue exactly where the last ones ended, and calls `accepted` with them before they are
    /// queued.
    ///
    /// # Errors
    /// `BAD_POSITION` for a jump back or ahead; `INVALID` for more than the window beyond `flushed`, or past the last
    /// LSN.
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

    /// Regression test: after this many small messages the server stopped reading, so that an answer behind them never
    /// arrived.
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
