//! Where every chunk and tree is: the index files of the repository as one sorted table.
//!
//! Packs that maintenance has marked for removal are included, after the unmarked ones: until they are removed (REPO4)
//! they are as good as any, and a snapshot that was saved beside a maintenance run may still need them. Packs that are
//! named but missing, or that have the wrong size at the place where they are looked for first, come last
//! (`absent.rs`).
//!
//! Takes about 48 bytes of memory per chunk.

use super::{Repository, read_checked};
use crate::{
    Error, Kind, Op,
    layout::{BaseFile, BaseKind},
    sum::Sha256Sum,
};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Maintenance replaces index files, so a reader that listed the old ones has to retry.
const TRIES: usize = 5;

/// An index file as restic documents it; `packs_to_delete` is rustic's addition.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct IndexJson {
    pub(super) packs: Vec<PackJson>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) packs_to_delete: Vec<PackJson>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct PackJson {
    pub(super) id: Sha256Sum,
    pub(super) blobs: Vec<BlobJson>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct BlobJson {
    pub(super) id: Sha256Sum,
    #[serde(rename = "type")]
    pub(super) blob: BlobKind,
    pub(super) offset: u32,
    pub(super) length: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) uncompressed_length: Option<u32>,
}

/// The type of a piece in a pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum BlobKind {
    Data,
    Tree,
}

/// The location of a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    /// Position in `Index::packs`.
    pub(super) pack: u32,
    pub(super) offset: u32,
    /// Length in the pack, encrypted.
    pub(super) length: u32,
    /// Length of the blob before compression, in bytes; 0 if the blob is stored uncompressed.
    pub(super) raw: u32,
}

impl Place {
    /// The plain length of the piece.
    pub(super) fn plain(&self) -> u64 {
        match self.raw {
            0 => u64::from(self.length).saturating_sub(32),
            raw => u64::from(raw),
        }
    }
}

#[derive(Debug)]
pub(super) struct Pack {
    pub(super) id: Sha256Sum,
    /// The index file that names it.
    pub(super) index: Sha256Sum,
    /// Whether it is marked for removal.
    pub(super) marked: bool,
    /// The size of the file, computed from the lengths in its index entry.
    pub(super) size: u64,
    /// The pack is in neither tier, or has the wrong size on tier 1; in the latter case the other tier may have it, and
    /// a verification repairs it. Or it is known to be damaged and was left out of the listing.
    pub(super) absent: bool,
}

impl Pack {
    pub(super) fn file(&self) -> BaseFile {
        BaseFile { kind: BaseKind::Data, id: self.id }
    }
}

#[derive(Debug, Default)]
pub(super) struct Index {
    pub(super) packs: Vec<Pack>,
    /// Sorted by kind and id, missing packs last, unmarked before marked.
    blobs: Vec<(BlobKind, Sha256Sum, Place)>,
    /// The index entries of marked packs, needed to unmark them.
    marked: BTreeMap<u32, PackJson>,
}

/// restic's pack header: 37 bytes per piece, 41 for a compressed one, then nonce, tag and length.
fn pack_size(pack: &PackJson) -> u64 {
    let entry = |blob: &BlobJson| if blob.uncompressed_length.is_some() { 41 } else { 37 };
    pack.blobs.iter().map(|blob| u64::from(blob.length) + entry(blob)).sum::<u64>()
        + EMPTY_PACK_BYTES
}

/// The size of a pack without pieces.
const EMPTY_PACK_BYTES: u64 = 36;

/// Only the pack ids in an index file.
#[derive(Debug, Deserialize)]
pub(super) struct IndexIds {
    packs: Vec<PackId>,
    #[serde(default)]
    packs_to_delete: Vec<PackId>,
}

#[derive(Debug, Deserialize)]
struct PackId {
    id: Sha256Sum,
}

impl IndexIds {
    pub(super) fn all(&self) -> impl Iterator<Item = Sha256Sum> {
        self.packs.iter().chain(&self.packs_to_delete).map(|pack| pack.id)
    }
}

impl Index {
    pub(super) fn find(&self, kind: BlobKind, id: &Sha256Sum) -> Option<&Place> {
        self.places(kind, *id).next()
    }

    /// Every location of a piece, the best first.
    pub(super) fn places(&self, kind: BlobKind, id: Sha256Sum) -> impl Iterator<Item = &Place> {
        let at = self.blobs.partition_point(|(k, i, _)| (k, i) < (&kind, &id));
        let found = self.blobs[at..].iter().take_while(move |(k, i, _)| (*k, i) == (kind, &id));
        found.map(|(_, _, place)| place)
    }

    pub(super) fn pack(&self, place: &Place) -> &Pack {
        &self.packs[place.pack as usize]
    }

    /// For every piece that is in two or more packs: the packs that will stay. A marked pack will be removed, and is
    /// needed again only if those that stay are bad.
    pub(super) fn sharing(&self) -> BTreeSet<Sha256Sum> {
        let mut found = BTreeSet::new();
        for same in self.blobs.chunk_by(|a, b| (a.0, a.1) == (b.0, b.1)) {
            let packs: BTreeSet<Sha256Sum> =
                same.iter().map(|(_, _, place)| self.pack(place).id).collect();
            if packs.len() > 1 {
                let stays = same.iter().map(|(_, _, place)| self.pack(place)).filter(|p| !p.marked);
                found.extend(stays.map(|pack| pack.id));
            }
        }
        found
    }

    /// The packs, and every piece sorted by pack and offset, without additional memory.
    pub(super) fn into_by_pack(self) -> (Vec<Pack>, Vec<(BlobKind, Sha256Sum, Place)>) {
        let mut blobs = self.blobs;
        blobs.sort_unstable_by_key(|(_, _, place)| (place.pack, place.offset));
        (self.packs, blobs)
    }

    /// Every piece, sorted by pack and offset.
    pub(super) fn by_pack(&self) -> Vec<(BlobKind, Sha256Sum, Place)> {
        let mut blobs = self.blobs.clone();
        blobs.sort_unstable_by_key(|(_, _, place)| (place.pack, place.offset));
        blobs
    }

    pub(super) fn marked_pack(&self, pack: u32) -> Option<&PackJson> {
        self.marked.get(&pack)
    }

    fn add(&mut self, file: Sha256Sum, pack: PackJson, marked: bool) {
        let number = self.packs.len() as u32;
        for blob in &pack.blobs {
            let raw = blob.uncompressed_length.unwrap_or(0);
            let place = Place { pack: number, offset: blob.offset, length: blob.length, raw };
            self.blobs.push((blob.blob, blob.id, place));
        }
        let (id, size) = (pack.id, pack_size(&pack));
        self.packs.push(Pack { id, index: file, marked, size, absent: false });
        if marked {
            self.marked.insert(number, pack);
        }
    }

    /// Sorts, with existing packs before missing ones (ABSENT1).
    pub(super) fn sort(&mut self, there: &BTreeMap<BaseFile, u64>) {
        for pack in &mut self.packs {
            // A pack that was marked without a list of its contents has no size to compare.
            let whole = |size: &u64| *size == pack.size || pack.size == EMPTY_PACK_BYTES;
            pack.absent = !there.get(&pack.file()).is_some_and(whole);
        }
        let packs = &self.packs;
        self.blobs.sort_unstable_by_key(|(kind, id, place)| {
            let pack = &packs[place.pack as usize];
            (*kind, *id, pack.absent, pack.marked, place.pack)
        });
    }

    /// The packs that are named but missing or of the wrong size.
    pub(super) fn absent(&self) -> BTreeSet<Sha256Sum> {
        self.packs.iter().filter(|pack| pack.absent).map(|pack| pack.id).collect()
    }
}

impl Repository {
    /// Reads every index file.
    pub(super) fn index(&self) -> Result<Index, Error> {
        retried(|| {
            let mut index = Index::default();
            for (file, _) in self.files.list(BaseKind::Index)? {
                self.add_index_file(&mut index, file)?;
            }
            // Listed after the index was read: every pack existed before the index named it.
            index.sort(&self.files.list(BaseKind::Data)?.into_iter().collect());
            Ok(index)
        })
    }

    pub(super) fn add_index_file(&self, index: &mut Index, file: BaseFile) -> Result<(), Error> {
        let json = self.read_json(file)?;
        let content: IndexJson = serde_json::from_slice(&json)
            .map_err(|_| self.damaged(file, "expected restic's index JSON"))?;
        content.packs.into_iter().for_each(|pack| index.add(file.id, pack, false));
        // Packs that no index named are marked without their contents; nothing can be looked up in them.
        let marked = content.packs_to_delete.into_iter();
        marked.for_each(|pack| index.add(file.id, pack, true));
        Ok(())
    }

    /// The JSON of an index or a snapshot, verified and decrypted.
    pub(super) fn read_json(&self, file: BaseFile) -> Result<Vec<u8>, Error> {
        let sealed = read_checked(self.files.as_ref(), file)?;
        let json = self.key.sealer.open_file(&sealed);
        json.ok_or_else(|| self.damaged(file, "the repository's key does not decrypt it"))
    }

    pub(super) fn damaged(&self, file: BaseFile, detail: impl std::fmt::Display) -> Error {
        Error::new(Kind::Corrupt, Op::Read, format!("{}/{}", self.place(), file.relative()), detail)
    }

    /// Encrypts an index file and stores it.
    pub(super) fn write_index(&self, content: &IndexJson) -> Result<BaseFile, Error> {
        let json = serde_json::to_vec(content)
            .map_err(|e| Error::new(Kind::Invalid, Op::Write, "an index file", e))?;
        let sealed = self.key.sealer.seal(&json)?;
        let file = BaseFile { kind: BaseKind::Index, id: Sha256Sum::of(&sealed) };
        self.files.write(file, &[sealed.into()])?;
        Ok(file)
    }
}

/// Retries while a listed file is missing: maintenance writes new index files before it removes the old ones.
pub(super) fn retried<T>(mut work: impl FnMut() -> Result<T, Error>) -> Result<T, Error> {
    let mut tries = 1;
    loop {
        match work() {
            Err(error) if error.kind == Kind::NotFound && tries < TRIES => tries += 1,
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_packs_that_hold_the_same_those_that_are_to_stay_are_opened() {
        let sum = |n: u8| Sha256Sum::of(&[n]);
        let piece = |id: &u8| BlobJson {
            id: sum(*id),
            blob: BlobKind::Data,
            offset: 0,
            length: 100,
            uncompressed_length: None,
        };
        let mut index = Index::default();
        let packs: [(u8, &[u8], bool); 7] = [
            (1, &[10], false),
            (2, &[11], false),
            (3, &[11, 12], true),
            (4, &[13], false),
            (5, &[13], false),
            (6, &[14], true),
            (7, &[14], true),
        ];
        for (id, pieces, marked) in packs {
            let blobs = pieces.iter().map(piece).collect();
            index.add(sum(0), PackJson { id: sum(id), blobs }, marked);
        }
        index.sort(&BTreeMap::new());
        assert_eq!(index.sharing(), BTreeSet::from([2, 4, 5].map(sum)));
    }
}
