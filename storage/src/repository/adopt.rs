//! Names packs that no index file names, because the backup that sent them was killed.
//!
//! An engine that stops half way has written packs whose index file would have followed later. Every pack ends with an
//! encrypted list of its contents (<https://restic.readthedocs.io/en/stable/100_references.html#pack-format>), from
//! which the index is rebuilt here:
//!
//! | bytes | what |
//! |---|---|
//! | .. | pieces |
//! | n-4-h..n-4 | the list, encrypted: for each piece its type (0 data, 1 tree; 2 and 3 the same, compressed), encrypted length, length before compression if compressed, SHA-256 |
//! | n-4..n | h, little-endian |
//!
//! Call it when no other backup of the repository is running: otherwise that backup's packs would be named twice, which
//! is harmless but wasted work. A pack whose list cannot be decrypted is left to `check`.

use super::{
    ReadPart, Repository,
    index::{BlobJson, BlobKind, IndexJson, PackJson},
    sealer::Sealer,
};
use crate::{
    Error,
    layout::{BaseFile, BaseKind},
    sum::Sha256Sum,
};
use std::collections::BTreeSet;

/// Read first: enough for the list of a pack with 1500 pieces.
const TAIL_BYTES: u64 = 64 << 10;
/// Length of nonce and tag.
pub(super) const SEAL_BYTES: usize = 32;
/// Number of pieces in one index file, as in rustic.
const PIECES: usize = 50_000;

/// The result of `adopt`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Adopted {
    /// Number of packs that are named now.
    pub packs: u64,
    /// Their size in bytes.
    pub bytes: u64,
    /// Number of packs that an index names but that do not exist: their contents are sent again.
    pub absent: u64,
}

impl Repository {
    /// Names every pack that no index file names, and ignores packs from now on that are named but do not exist
    /// (ABSENT2).
    ///
    /// # Errors
    /// When files cannot be listed, read or written.
    pub fn adopt(&mut self) -> Result<Adopted, Error> {
        let index = self.index()?;
        let named: BTreeSet<Sha256Sum> = index.packs.iter().map(|pack| pack.id).collect();
        let gone = index.absent();
        drop(index);
        let absent = gone.len() as u64;
        self.hide(gone);
        let mut content = IndexJson::default();
        let (mut packs, mut bytes, mut pieces) = (0, 0, 0);
        for (file, size) in self.files.list(BaseKind::Data)? {
            if named.contains(&file.id) {
                continue;
            }
            let Some(blobs) = self.pieces_of(file, size)? else {
                tracing::warn!(pack = %file.id, "ignoring a pack that no index names and whose own list cannot be decrypted");
                continue;
            };
            (packs, bytes, pieces) = (packs + 1, bytes + size, pieces + blobs.len());
            content.packs.push(PackJson { id: file.id, blobs });
            if pieces >= PIECES {
                self.write_index(&std::mem::take(&mut content))?;
                pieces = 0;
            }
        }
        if !content.packs.is_empty() {
            self.write_index(&content)?;
        }
        Ok(Adopted { packs, bytes, absent })
    }

    /// The contents of a pack according to its own list.
    fn pieces_of(&self, file: BaseFile, size: u64) -> Result<Option<Vec<BlobJson>>, Error> {
        let read = |offset, length| self.files.read_range(file, offset, length);
        list_of(&self.key.sealer, size, u64::MAX, &read)
    }
}

/// The list of a pack of `size` bytes; `None` when it cannot be decrypted or is longer than `list_max` bytes.
pub(super) fn list_of(
    sealer: &Sealer,
    size: u64,
    list_max: u64,
    read: ReadPart<'_>,
) -> Result<Option<Vec<BlobJson>>, Error> {
    let last = |bytes: u64| read(size - bytes, bytes);
    let mut tail = last(size.min(TAIL_BYTES))?;
    let Some(length) = tail.last_chunk().map(|b| u64::from(u32::from_le_bytes(*b))) else {
        return Ok(None);
    };
    let Some(whole) = length.checked_add(4).filter(|whole| *whole <= size.min(list_max)) else {
        return Ok(None);
    };
    if whole > tail.len() as u64 {
        tail = last(whole)?;
    }
    let from = tail.len() - whole as usize;
    let list = sealer.open(&tail[from..tail.len() - 4]);
    Ok(list.and_then(|list| parse(&list, size - whole)))
}

/// Parses the list of a pack whose pieces take `end` bytes.
fn parse(mut list: &[u8], end: u64) -> Option<Vec<BlobJson>> {
    let mut blobs = Vec::new();
    let mut offset = 0_u32;
    while let Some((&kind, rest)) = list.split_first() {
        let (length, rest) = number(rest)?;
        let (uncompressed_length, rest) = match kind {
            2 | 3 => {
                let (raw, rest) = number(rest)?;
                (Some(raw), rest)
            }
            0 | 1 => (None, rest),
            _ => return None,
        };
        let (id, rest) = rest.split_first_chunk::<32>()?;
        let blob = if kind % 2 == 0 { BlobKind::Data } else { BlobKind::Tree };
        if (length as usize) < SEAL_BYTES {
            return None;
        }
        let id = Sha256Sum::new(*id);
        blobs.push(BlobJson { id, blob, offset, length, uncompressed_length });
        offset = offset.checked_add(length)?;
        list = rest;
    }
    (u64::from(offset) == end && !blobs.is_empty()).then_some(blobs)
}

fn number(bytes: &[u8]) -> Option<(u32, &[u8])> {
    let (number, rest) = bytes.split_first_chunk::<4>()?;
    Some((u32::from_le_bytes(*number), rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_list_that_does_not_fit_its_pack_is_none() {
        let entry = |kind: u8, length: u32| {
            let mut entry = vec![kind];
            entry.extend(length.to_le_bytes());
            if kind > 1 {
                entry.extend(7_u32.to_le_bytes());
            }
            entry.extend([5; 32]);
            entry
        };
        let list = [entry(0, 100), entry(3, 50)].concat();
        let blobs = parse(&list, 150).unwrap();
        assert_eq!((blobs.len(), blobs[1].offset), (2, 100));
        assert!(parse(&list, 151).is_none());
        assert!(parse(&list[..list.len() - 1], 150).is_none());
        assert!(parse(&entry(9, 100), 100).is_none());
        assert!(parse(&entry(0, 31), 31).is_none());
        assert!(parse(&[], 0).is_none());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(list: Vec<u8>, end: u64) {
            let _ = parse(&list, end);
        }
    }
}
