//! Verifies a pack against itself: its list, and every piece in it.
//!
//! UNPACK1  a verified pack contains exactly the pieces of its own list, one after the other, and each has the SHA-256
//!          in its id. So even somebody with the repository's key cannot make a pack that claims contents it does not
//!          have (P13);
//! UNPACK2  an index entry is accepted only if it matches the pack's own list;
//! UNPACK3  memory is bounded by one encrypted piece, whatever uncompressed size it claims: it is decompressed straight
//!          into the hash.
//!
//! The format of a pack is described in `adopt.rs`.

use super::{
    Repository,
    adopt::{self, SEAL_BYTES},
    index::{BlobJson, BlobKind, IndexJson},
    sealer::Sealer,
};
use crate::{
    Error, Kind, Op,
    layout::{BaseFile, BaseKind},
    tier2::{Hasher, Sha256Sum},
};
use bytes::Bytes;
use rustic_core::repofile::SnapshotFile;
use std::{collections::BTreeSet, io::Read};

/// Largest plain size of a chunk that `Settings` allow.
const DATA_BYTES_MAX: u32 = 8 << 20;
/// Largest plain size of a tree: what its length field can represent, a directory of some four terabytes of files in
/// chunks of the default size.
const TREE_BYTES_MAX: u32 = u32::MAX - SEAL_BYTES as u32;
/// Largest size of a pack's list: 1.5 million pieces, in a pack of at most 4 GiB.
const LIST_BYTES_MAX: u64 = 64 << 20;
/// Largest encrypted size of an index file. rustic's have 50,000 pieces, which is some 10 MiB without compression.
pub const INDEX_BYTES_MAX: u64 = 64 << 20;
/// Largest encrypted size of a snapshot file.
pub const SNAPSHOT_BYTES_MAX: u64 = 1 << 20;
/// The largest encrypted size of a piece that zstd could not make smaller, with some reserve.
const fn sealed_max(plain: u32) -> u64 {
    plain as u64 + plain as u64 / 64 + 1024
}

/// Reads `length` bytes at an offset of a file.
pub type ReadPart<'a> = &'a dyn Fn(u64, u64) -> Result<Bytes, Error>;

/// What an index file from a client claims about one pack.
#[derive(Debug)]
pub struct Claim {
    pack: BaseFile,
    blobs: Vec<BlobJson>,
}

impl Claim {
    pub const fn pack(&self) -> BaseFile {
        self.pack
    }
}

impl Repository {
    /// UNPACK1: verifies a pack of `size` bytes and returns the number of its pieces.
    ///
    /// # Errors
    /// `Corrupt` with the problem; otherwise an error of `read`.
    pub fn open_pack(&self, file: BaseFile, size: u64, read: ReadPart<'_>) -> Result<u64, Error> {
        self.open_listed(file, size, read).map(|list| list.len() as u64)
    }

    /// UNPACK1: verifies a pack and returns its pieces, sorted by offset.
    pub(super) fn open_listed(
        &self,
        file: BaseFile,
        size: u64,
        read: ReadPart<'_>,
    ) -> Result<Vec<BlobJson>, Error> {
        let list = self.pack_list(file, size, read)?;
        for blob in &list {
            let bad = |detail: &str| {
                let detail = format!("piece {} at offset {}: {detail}", blob.id, blob.offset);
                self.damaged(file, detail)
            };
            check_sizes(blob).map_err(|detail| bad(&detail))?;
            let sealed = read(blob.offset.into(), blob.length.into())?;
            open_piece(&self.key.sealer, blob, &sealed).map_err(bad)?;
        }
        Ok(list)
    }

    /// The list of pieces in a pack, unverified.
    fn pack_list(
        &self,
        file: BaseFile,
        size: u64,
        read: ReadPart<'_>,
    ) -> Result<Vec<BlobJson>, Error> {
        let list = adopt::list_of(&self.key.sealer, size, LIST_BYTES_MAX, read)?;
        list.ok_or_else(|| {
            self.damaged(file, "its own list of pieces cannot be decrypted, or does not match it")
        })
    }

    /// Parses an index file that a client wrote. It may only name existing packs: marking packs for removal and
    /// superseding other index files is reserved to the server (P13).
    ///
    /// # Errors
    /// `Corrupt` when it is not an index of this repository; `Denied` for statements that a client may not make.
    pub fn read_claims(&self, file: BaseFile, sealed: &[u8]) -> Result<Vec<Claim>, Error> {
        let json = self.key.sealer.open_file(sealed);
        let json =
            json.ok_or_else(|| self.damaged(file, "the repository's key does not decrypt it"))?;
        let more: More = serde_json::from_slice(&json)
            .map_err(|_| self.damaged(file, "expected restic's index JSON"))?;
        let denied = |detail: &str| {
            let place = format!("{}/{}", self.place(), file.relative());
            Err(Error::new(Kind::Denied, Op::Write, place, detail))
        };
        if more.supersedes.is_some_and(|ids| !ids.is_empty()) {
            return denied(
                "expected an index that only adds packs, found one that supersedes others",
            );
        }
        let index: IndexJson = serde_json::from_slice(&json)
            .map_err(|_| self.damaged(file, "expected restic's index JSON"))?;
        if !index.packs_to_delete.is_empty() {
            return denied(
                "expected an index that only adds packs, found one that marks packs for removal",
            );
        }
        if index.packs.is_empty() {
            return denied("expected an index that names a pack, found none in it");
        }
        let named: BTreeSet<Sha256Sum> = index.packs.iter().map(|pack| pack.id).collect();
        if named.len() != index.packs.len() {
            return denied("expected an index that names each pack once");
        }
        let claim = |pack: super::index::PackJson| Claim {
            pack: BaseFile { kind: BaseKind::Data, id: pack.id },
            blobs: pack.blobs,
        };
        Ok(index.packs.into_iter().map(claim).collect())
    }

    /// UNPACK2: compares a claim with the pack's own list.
    ///
    /// # Errors
    /// `Corrupt` when they differ; otherwise an error of `read`.
    pub fn check_claim(&self, claim: Claim, size: u64, read: ReadPart<'_>) -> Result<(), Error> {
        let file = claim.pack;
        let list = self.pack_list(file, size, read)?;
        let mut claimed = claim.blobs;
        claimed.sort_unstable_by_key(|blob| blob.offset);
        if claimed == list {
            return Ok(());
        }
        let detail = format!(
            "expected the {} pieces of the pack's own list, found {} others in the index",
            list.len(),
            claimed.len()
        );
        Err(self.damaged(file, detail))
    }

    /// Whether these bytes are a snapshot of this repository.
    ///
    /// # Errors
    /// `Corrupt` when they are not.
    pub fn check_snapshot_file(&self, file: BaseFile, sealed: &[u8]) -> Result<(), Error> {
        let json = self.key.sealer.open_file(sealed);
        let json =
            json.ok_or_else(|| self.damaged(file, "the repository's key does not decrypt it"))?;
        serde_json::from_slice::<SnapshotFile>(&json)
            .map(drop)
            .map_err(|_| self.damaged(file, "expected restic's snapshot JSON"))
    }
}

/// A field of restic that rustic does not use.
#[derive(serde::Deserialize)]
struct More {
    #[serde(default)]
    supersedes: Option<Vec<serde_json::Value>>,
}

fn check_sizes(blob: &BlobJson) -> Result<(), String> {
    let max = match blob.blob {
        BlobKind::Data => DATA_BYTES_MAX,
        BlobKind::Tree => TREE_BYTES_MAX,
    };
    let plain = blob.uncompressed_length.unwrap_or(blob.length);
    if plain > max.saturating_add(SEAL_BYTES as u32) {
        return Err(format!("expected at most {max} bytes, found {plain}"));
    }
    if u64::from(blob.length) > sealed_max(plain) {
        return Err(format!(
            "expected fewer than {} encrypted bytes for {plain} plain ones",
            blob.length
        ));
    }
    if blob.uncompressed_length == Some(0) {
        return Err("expected the length of a compressed piece, found 0".to_owned());
    }
    Ok(())
}

/// UNPACK3: decrypts and decompresses a piece into the hash, and compares it with its id.
fn open_piece(sealer: &Sealer, blob: &BlobJson, sealed: &[u8]) -> Result<(), &'static str> {
    let packed = sealer.open(sealed).ok_or("its authentication fails")?;
    let found = match blob.uncompressed_length {
        None => Sha256Sum::of(&packed),
        Some(plain) => decompressed_sum(&packed, plain.into())?,
    };
    match found == blob.id {
        true => Ok(()),
        false => Err("its bytes do not have the SHA-256 in its name"),
    }
}

fn decompressed_sum(packed: &[u8], expected: u64) -> Result<Sha256Sum, &'static str> {
    const BROKEN: &str = "it does not decompress";
    // Readers decompress exactly one frame into a buffer of this size.
    let decoder = zstd::Decoder::with_buffer(packed).map_err(|_| BROKEN)?;
    let mut decoder = decoder.single_frame().take(expected + 1);
    let (mut hasher, mut plain, mut block) = (Hasher::default(), 0, [0; 1 << 15]);
    loop {
        match decoder.read(&mut block).map_err(|_| BROKEN)? {
            0 => break,
            count => {
                plain += count as u64;
                hasher.update(&block[..count]);
            }
        }
    }
    if plain != expected {
        return Err("its length differs from the one in its pack's list");
    }
    if !decoder.into_inner().finish().is_empty() {
        return Err("something follows its compressed bytes");
    }
    Ok(hasher.finish())
}
