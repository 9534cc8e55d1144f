//! Decodes a sealed file (already decrypted, if it was encrypted): a sequence of zstd frames, read piece by piece with
//! bounded memory.
//!
//! A truncated file, a change (found by content checksums) and more bytes than expected are errors, never a short
//! result (P7).

use crate::{Error, Kind, Op, crypt::payload_error};
use std::{fmt, io};
use zstd::zstd_safe::{DCtx, InBuffer, OutBuffer, get_error_name};

const PIECE_BYTES: usize = 128 << 10;

/// Takes a sealed file in pieces of any size and produces its plain bytes.
pub struct SealedDecoder {
    context: DCtx<'static>,
    out: Box<[u8]>,
    produced: u64,
    limit: u64,
    inside_frame: bool,
}

impl fmt::Debug for SealedDecoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SealedDecoder").field("produced", &self.produced).finish_non_exhaustive()
    }
}

fn corrupt(detail: impl fmt::Display) -> Error {
    Error::new(Kind::Corrupt, Op::Decode, "sealed WAL file", detail)
}

impl SealedDecoder {
    /// Creates a decoder that produces at most `limit` bytes, normally the segment size.
    ///
    /// # Errors
    /// `Transient` when there is not enough memory.
    pub fn new(limit: u64) -> Result<Self, Error> {
        let context = DCtx::try_create().ok_or_else(|| {
            Error::new(Kind::Transient, Op::Decode, "sealed WAL file", "no memory for zstd")
        })?;
        let out = vec![0; PIECE_BYTES].into_boxed_slice();
        Ok(Self { context, out, produced: 0, limit, inside_frame: false })
    }

    /// Decodes the next piece and passes the plain bytes to `sink`.
    ///
    /// # Errors
    /// `Corrupt`, or an error of `sink`.
    pub fn push(
        &mut self,
        piece: &[u8],
        sink: &mut dyn FnMut(&[u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut input = InBuffer::around(piece);
        loop {
            let before = input.pos();
            let mut output = OutBuffer::around(&mut self.out[..]);
            let hint = self
                .context
                .decompress_stream(&mut output, &mut input)
                .map_err(|code| corrupt(get_error_name(code)))?;
            let count = output.pos();
            if input.pos() > before || count > 0 {
                // Asked with no input left, zstd answers for the next frame, which has not begun.
                self.inside_frame = hint != 0;
            }
            self.produced += count as u64;
            if self.produced > self.limit {
                let (limit, found) = (self.limit, self.produced);
                return Err(corrupt(format!("expected at most {limit} bytes, found {found}")));
            }
            if count > 0 {
                sink(&self.out[..count])?;
            }
            if input.pos() == piece.len() && count < self.out.len() {
                return Ok(());
            }
        }
    }

    /// Ends the file and returns the number of its plain bytes.
    ///
    /// # Errors
    /// `Corrupt` when the file ends inside a frame. A file that is truncated between two frames can only be recognized
    /// by its length: the caller has to compare it.
    pub fn finish(self) -> Result<u64, Error> {
        if self.inside_frame {
            let found = self.produced;
            return Err(corrupt(format!("expected the end of a frame, found a cut after {found}")));
        }
        Ok(self.produced)
    }
}

/// Decodes everything from `reader` into `sink`, at most `limit` plain bytes, and returns their number.
///
/// # Errors
/// `Corrupt`, I/O errors, or an error of `sink`.
pub fn decode_reader(
    reader: &mut dyn io::Read,
    limit: u64,
    sink: &mut dyn FnMut(&[u8]) -> Result<(), Error>,
) -> Result<u64, Error> {
    let mut decoder = SealedDecoder::new(limit)?;
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        match reader.read(&mut piece) {
            Ok(0) => return decoder.finish(),
            Ok(count) => decoder.push(&piece[..count], sink)?,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(payload_error("sealed WAL file", &e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file(parts: &[Vec<u8>]) -> Vec<u8> {
        let mut context = zstd::bulk::Compressor::new(1).unwrap();
        context.set_parameter(zstd::zstd_safe::CParameter::ChecksumFlag(true)).unwrap();
        parts.iter().flat_map(|part| context.compress(part).unwrap()).collect()
    }

    fn decode(bytes: &[u8], step: usize, limit: u64) -> Result<Vec<u8>, Error> {
        let mut decoder = SealedDecoder::new(limit)?;
        let mut out = Vec::new();
        for piece in bytes.chunks(step) {
            decoder.push(piece, &mut |plain| {
                out.extend_from_slice(plain);
                Ok(())
            })?;
        }
        assert_eq!(decoder.finish()?, out.len() as u64);
        Ok(out)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn frames_decode_to_their_bytes_however_they_are_cut(
            sizes in prop::collection::vec(1usize..300_000, 1..4), step in 1usize..200_000
        ) {
            let parts: Vec<Vec<u8>> = sizes.iter().map(|n| vec![*n as u8; *n]).collect();
            let found = decode(&file(&parts), step.max(7), 1 << 30).unwrap();
            prop_assert_eq!(found, parts.concat());
        }

        #[test]
        fn a_cut_inside_a_frame_is_corrupt(size in 1000usize..50_000, cut in 1usize..8) {
            let bytes = file(&[(0..size).map(|n| ((n * n) >> 3) as u8).collect()]);
            let error = decode(&bytes[..bytes.len() - cut], 1000, 1 << 30).unwrap_err();
            prop_assert_eq!(error.kind, Kind::Corrupt);
        }

        #[test]
        fn a_bit_flip_never_gives_other_bytes(bit in 0usize..2000) {
            let plain: Vec<u8> = (0..20_000usize).map(|n| ((n * n) >> 3) as u8).collect();
            let mut bytes = file(std::slice::from_ref(&plain));
            let bit = bit % (bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            if let Ok(found) = decode(&bytes, 999, 1 << 30) {
                prop_assert_eq!(found, plain);
            }
        }
    }

    #[test]
    fn more_bytes_than_expected_are_corrupt() {
        let error = decode(&file(&[vec![0; 5000]]), 100, 4999).unwrap_err();
        assert!(error.to_string().contains("at most 4999"), "{error}");
    }
}
