//! Which packs a snapshot needs, and whether it is complete.
//!
//! Each tree is read only once, however often the snapshot contains it: otherwise a few small trees that contain each
//! other many times would look like an endless directory (P13).

use super::{
    StoredKind,
    index::{BlobKind, Place},
    reader::{ChunkId, Reader},
    tree::TreeNode,
};
use crate::{Error, Kind, Op, tier2::Sha256Sum};
use std::collections::BTreeSet;

/// The needed packs, as positions in `Index::packs`.
///
/// # Errors
/// `Corrupt` when a tree cannot be read, a chunk is not in the index, or a file's size differs from that of its chunks.
pub(super) fn needed(reader: &Reader) -> Result<BTreeSet<u32>, Error> {
    let mut packs = BTreeSet::new();
    let mut seen: BTreeSet<Sha256Sum> = BTreeSet::from([*reader.root()]);
    let mut waiting = vec![*reader.root()];
    while let Some(tree) = waiting.pop() {
        packs.insert(reader.place(BlobKind::Tree, &tree)?.pack);
        for node in reader.tree(&tree)? {
            if let Some(below) = node.tree {
                if seen.insert(below) {
                    waiting.push(below);
                }
            } else if let StoredKind::File { size, chunks } = &node.kind {
                let found = bytes_of(reader, chunks, &mut packs)?;
                require_size(&node, *size, found)?;
            }
        }
    }
    Ok(packs)
}

fn bytes_of(reader: &Reader, chunks: &[ChunkId], packs: &mut BTreeSet<u32>) -> Result<u64, Error> {
    let mut found = 0_u64;
    for chunk in chunks {
        let place = reader.chunk_place(chunk)?;
        found = found.saturating_add(Place::plain(place));
        packs.insert(place.pack);
    }
    Ok(found)
}

fn require_size(node: &TreeNode, expected: u64, found: u64) -> Result<(), Error> {
    if found == expected {
        return Ok(());
    }
    let detail = format!("expected {expected} bytes, found chunks with {found}");
    Err(Error::new(Kind::Corrupt, Op::Read, format!("{:?}", node.name), detail))
}
