//! WAL that was read and not sent yet. The caller limits its size.
//!
//! The pieces share memory with the read buffer; they are copied only when several are joined into one message.

use bytes::{Bytes, BytesMut};
use std::collections::VecDeque;

/// Contiguous WAL bytes, in order.
#[derive(Debug, Default)]
pub struct Batch {
    pieces: VecDeque<Bytes>,
    len: usize,
}

impl Batch {
    pub fn push(&mut self, piece: Bytes) {
        self.len += piece.len();
        if !piece.is_empty() {
            self.pieces.push_back(piece);
        }
    }

    pub const fn len(&self) -> usize {
        self.len
    }

    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Takes at most `limit` bytes from the front.
    pub fn take(&mut self, limit: usize) -> Bytes {
        let want = limit.min(self.len);
        self.len -= want;
        let Some(mut first) = self.pieces.pop_front() else { return Bytes::new() };
        if first.len() >= want {
            let taken = first.split_to(want);
            if !first.is_empty() {
                self.pieces.push_front(first);
            }
            return taken;
        }
        let mut joined = BytesMut::with_capacity(want);
        joined.extend_from_slice(&first);
        while joined.len() < want {
            let Some(mut piece) = self.pieces.pop_front() else { break };
            let part = piece.split_to(piece.len().min(want - joined.len()));
            joined.extend_from_slice(&part);
            if !piece.is_empty() {
                self.pieces.push_front(piece);
            }
        }
        joined.freeze()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_single_piece_is_not_copied() {
        let piece = Bytes::from(vec![7; 1000]);
        let mut batch = Batch::default();
        batch.push(piece.clone());
        assert_eq!(batch.take(4000).as_ptr(), piece.as_ptr());
        assert!(batch.is_empty());
    }

    proptest! {
        #[test]
        fn bytes_come_out_as_they_went_in(
            pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..50), 0..20),
            limits in prop::collection::vec(1usize..100, 1..20),
        ) {
            let mut batch = Batch::default();
            pieces.iter().for_each(|p| batch.push(Bytes::from(p.clone())));
            let all: Vec<u8> = pieces.concat();
            let mut out = Vec::new();
            for limit in limits.iter().cycle() {
                let taken = batch.take(*limit);
                prop_assert!(taken.len() <= *limit);
                if taken.is_empty() {
                    break;
                }
                out.extend_from_slice(&taken);
                prop_assert_eq!(batch.len(), all.len() - out.len());
            }
            prop_assert_eq!(out, all);
        }
    }
}
