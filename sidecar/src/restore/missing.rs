//! Fetches those chunks of a file that are missing: all of one pack with one request, however far apart they lie.
//!
//! A delta restore lacks single chunks. A request for each of them would take longer than to transfer the chunks, and
//! so would fetching the megabytes between them. The reader checks every chunk (RESTORE4). Memory is limited to the
//! bytes of one request, [`REQUEST_BYTES`], and one chunk.

use super::of_storage;
use crate::{error::Error, server_link::GrpcFiles};
use klio_proto::base::RANGES_MAX;
use klio_storage::{
    layout::BaseFile,
    repository::{ChunkId, Reader},
};
use std::ops::Range;

/// Limit of one request's bytes, unless a single chunk is larger.
const REQUEST_BYTES: u64 = 4 << 20;

/// A chunk's pack, its range of bytes there, and its number in the file.
type Wanted = (BaseFile, Range<u64>, usize);

/// The reader and, if there is a server, direct access to its files. A bucket is read through the reader, which
/// combines neighbouring reads.
#[derive(Debug)]
pub(super) struct Chunks {
    pub(super) reader: Reader,
    pub(super) server: Option<GrpcFiles>,
}

impl Chunks {
    /// Passes each of these chunks of a file to `put` once, in the order in which they lie in their packs.
    ///
    /// # Errors
    /// Chunks that cannot be read, and the errors of `put`.
    pub(super) fn fetch(
        &self,
        chunks: &[ChunkId],
        missing: &[usize],
        mut put: impl FnMut(usize, &[u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let failed = |error| of_storage(&error);
        let Some(server) = &self.server else {
            return missing.iter().try_for_each(|&number| {
                put(number, &self.reader.chunk(&chunks[number]).map_err(failed)?)
            });
        };
        let mut wanted = Vec::with_capacity(missing.len());
        for &number in missing {
            let at = self.reader.chunk_location(&chunks[number]).map_err(failed)?;
            wanted.push((at.pack, at.offset..at.offset + at.length, number));
        }
        wanted.sort_by_key(|(pack, range, number)| (*pack, range.start, *number));
        for request in requests(&wanted) {
            let Some((pack, _, _)) = request.first() else { continue };
            let ranges: Vec<_> = request.iter().map(|(_, range, _)| range.clone()).collect();
            let sealed = server.read_ranges(*pack, &ranges).map_err(failed)?;
            for ((_, _, number), sealed) in request.iter().zip(sealed) {
                put(*number, &self.reader.open_chunk(&chunks[*number], &sealed).map_err(failed)?)?;
            }
        }
        Ok(())
    }
}

/// Splits the wanted chunks into requests: each for one pack, limited in number of ranges and bytes.
fn requests(wanted: &[Wanted]) -> impl Iterator<Item = &[Wanted]> {
    let mut rest = wanted;
    std::iter::from_fn(move || {
        let (pack, _, _) = rest.first()?;
        let mut bytes = 0;
        let fits = rest.iter().take(RANGES_MAX).take_while(|(other, range, _)| {
            bytes += range.end - range.start;
            other == pack && bytes <= REQUEST_BYTES
        });
        let (now, later) = rest.split_at(fits.count().max(1));
        rest = later;
        Some(now)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use klio_storage::{layout::BaseKind, tier2::Sha256Sum};

    #[test]
    fn a_request_has_one_pack_and_is_bounded() {
        let pack = |name: u8| BaseFile { kind: BaseKind::Data, id: Sha256Sum::of(&[name]) };
        let mib = |pack, from: u64, to: u64| (pack, from << 20..to << 20, 0);
        let (a, b) = (pack(1), pack(2));
        // More than one request takes, exactly one request, a chunk that is too large for a shared request, and another pack.
        let wanted = [mib(a, 0, 3), mib(a, 4, 6), mib(a, 7, 9), mib(a, 9, 20), mib(b, 0, 1)];
        let sizes: Vec<_> = requests(&wanted).map(<[Wanted]>::len).collect();
        assert_eq!(sizes, [1, 2, 1, 1]);
        let many: Vec<_> = (0..2500).map(|n| (a, n * 2..n * 2 + 1, 0)).collect();
        let sizes: Vec<_> = requests(&many).map(<[Wanted]>::len).collect();
        assert_eq!(sizes, [RANGES_MAX, RANGES_MAX, 2500 - 2 * RANGES_MAX]);
        assert_eq!(requests(&[]).count(), 0);
    }
}
