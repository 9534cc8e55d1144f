//! Verifies packs against the index: the packs that a verification reads, and those of which a prune has duplicates.
//!
//! A pack is good when its bytes match its name, every piece in its own list decrypts and matches its name
//! (`unpack.rs`), and every index agrees with the pack's own list. Then every chunk taken from it is the right one.

use super::{
    Repository,
    index::{BlobJson, BlobKind, Index, Place},
};
use crate::{
    Error, Kind,
    layout::{BaseFile, BaseKind},
    sum::Sha256Sum,
};
use bytes::Bytes;
use std::collections::BTreeMap;

/// What the index files say about each pack. Takes about 50 bytes of memory per piece, like an index.
#[derive(Debug)]
pub struct PackProof {
    repository: Repository,
    /// For each pack its positions in `Index::packs`: one for each index file that names it.
    numbers: BTreeMap<Sha256Sum, Vec<u32>>,
    /// Sorted by these positions and by offset.
    pieces: Vec<(BlobKind, Sha256Sum, Place)>,
}

impl Repository {
    /// Reads every index file that can be read; the others are reported by `check`.
    ///
    /// # Errors
    /// An error of the files.
    pub fn pack_proof(&self) -> Result<PackProof, Error> {
        Ok(self.proof(self.readable_index()?))
    }

    fn readable_index(&self) -> Result<Index, Error> {
        let mut index = Index::default();
        for (file, _) in self.files.list(BaseKind::Index)? {
            match self.add_index_file(&mut index, file) {
                Err(error) if matches!(error.kind, Kind::Corrupt | Kind::NotFound) => {}
                other => other?,
            }
        }
        Ok(index)
    }

    fn proof(&self, index: Index) -> PackProof {
        let (packs, pieces) = index.into_by_pack();
        let mut numbers: BTreeMap<Sha256Sum, Vec<u32>> = BTreeMap::new();
        for (number, pack) in packs.iter().enumerate() {
            numbers.entry(pack.id).or_default().push(number as u32);
        }
        PackProof { repository: self.clone(), numbers, pieces }
    }

    /// Verifies every pack that contains a piece which another pack contains, too, and returns the bad ones: before a
    /// prune keeps one of several copies, that one must be known to be good (P13).
    ///
    /// # Errors
    /// An error of the files.
    pub fn prove_duplicates(&self) -> Result<BTreeMap<BaseFile, String>, Error> {
        let there: BTreeMap<BaseFile, u64> = self.files.list(BaseKind::Data)?.into_iter().collect();
        let mut index = self.readable_index()?;
        index.sort(&there);
        let sharing = index.sharing();
        let proof = self.proof(index);
        let mut bad = BTreeMap::new();
        let files = sharing.into_iter().map(|id| BaseFile { kind: BaseKind::Data, id });
        for file in files.filter(|file| there.contains_key(file)) {
            let checked = match self.files.read(file) {
                Ok(bytes) => proof.check(file, &bytes),
                // Removed since it was listed.
                Err(error) if error.kind == Kind::NotFound => continue,
                Err(error) if error.kind == Kind::Corrupt => Err(error.detail),
                Err(error) => return Err(error),
            };
            if let Err(problem) = checked {
                bad.insert(file, problem);
            }
        }
        Ok(bad)
    }
}

impl PackProof {
    /// Whether these are the bytes of the pack, with everything in it that its own list and the index say.
    ///
    /// # Errors
    /// A description of the problem.
    pub fn check(&self, file: BaseFile, bytes: &Bytes) -> Result<(), String> {
        let found = Sha256Sum::of(bytes);
        if found != file.id {
            let size = bytes.len();
            return Err(format!("expected the SHA-256 of its name, found {found} of {size} bytes"));
        }
        let size = bytes.len() as u64;
        let read = |offset: u64, length: u64| {
            let end = offset.checked_add(length).filter(|end| *end <= size);
            let end = end.ok_or_else(|| {
                self.repository.damaged(file, "shorter than its list of blobs says")
            })?;
            Ok(bytes.slice(offset as usize..end as usize))
        };
        let list = self.repository.open_listed(file, size, &read).map_err(|e| e.detail)?;
        let is_there = |claim: &BlobJson| {
            let at = list.binary_search_by_key(&claim.offset, |piece| piece.offset);
            at.is_ok_and(|at| list[at] == *claim)
        };
        match self.claims_of(file.id).find(|claim| !is_there(claim)) {
            None => Ok(()),
            Some(claim) => Err(format!(
                "the index says that it has piece {} at offset {}, but it does not",
                claim.id, claim.offset
            )),
        }
    }

    fn claims_of(&self, pack: Sha256Sum) -> impl Iterator<Item = BlobJson> {
        let numbers = self.numbers.get(&pack).into_iter().flatten();
        numbers.flat_map(|number| {
            let from = self.pieces.partition_point(|(_, _, place)| place.pack < *number);
            let own = self.pieces[from..].iter().take_while(|(_, _, place)| place.pack == *number);
            own.map(|(blob, id, place)| {
                let (blob, id, offset, length) = (*blob, *id, place.offset, place.length);
                let uncompressed_length = (place.raw > 0).then_some(place.raw);
                BlobJson { id, blob, offset, length, uncompressed_length }
            })
        })
    }
}
