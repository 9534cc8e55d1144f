//! Builds valid and invalid packs, index files and snapshots, for tests of what a hostile client can do. Not used by
//! the programs.
//!
//! Whoever has a cluster's certificate has the key of its repository, and can build all of these.

use super::{Secret, sealer, sealer::Sealer};
use crate::{Error, tier2::Sha256Sum};

/// A piece to put into a pack.
#[derive(Debug, Clone)]
pub struct ForgedPiece {
    /// The id in the pack's list.
    pub id: Sha256Sum,
    /// Whether it is a tree; otherwise data.
    pub tree: bool,
    /// The content before compression.
    pub plain: Vec<u8>,
    /// The uncompressed length in the pack's list; `None`: stored without compression.
    pub says: Option<u32>,
}

impl ForgedPiece {
    /// A valid piece.
    pub fn good(plain: &[u8]) -> Self {
        let says = Some(plain.len() as u32);
        Self { id: Sha256Sum::of(plain), tree: false, plain: plain.to_vec(), says }
    }

    fn packed(&self) -> Vec<u8> {
        match self.says {
            Some(_) => zstd::bulk::compress(&self.plain, 1).unwrap_or_default(),
            None => self.plain.clone(),
        }
    }
}

/// Has the key of a repository.
#[derive(Debug)]
pub struct Forge(Sealer);

impl Forge {
    /// Uses the key of a repository.
    ///
    /// # Errors
    /// `Invalid` for a malformed secret.
    pub fn new(secret: &Secret) -> Result<Self, Error> {
        Ok(Self(Sealer::new(&sealer::master_key(secret)?)))
    }

    /// Encrypts any bytes, such as the JSON of an index or a snapshot.
    ///
    /// # Errors
    /// None are known.
    pub fn seal(&self, plain: &[u8]) -> Result<Vec<u8>, Error> {
        self.0.seal(plain)
    }

    /// The JSON of an index or a snapshot; `None` when it does not belong to this repository.
    pub fn open(&self, sealed: &[u8]) -> Option<serde_json::Value> {
        serde_json::from_slice(&self.0.open_file(sealed)?).ok()
    }

    /// Builds a pack with these pieces and their list, and the index entry for it.
    ///
    /// # Errors
    /// None are known.
    pub fn pack(&self, pieces: &[ForgedPiece]) -> Result<(Vec<u8>, serde_json::Value), Error> {
        let (mut pack, mut list, mut blobs) = (Vec::new(), Vec::new(), Vec::new());
        for piece in pieces {
            let sealed = self.0.seal(&piece.packed())?;
            list.push(u8::from(piece.tree) + if piece.says.is_some() { 2 } else { 0 });
            list.extend((sealed.len() as u32).to_le_bytes());
            list.extend(piece.says.map(u32::to_le_bytes).into_iter().flatten());
            list.extend(piece.id.bytes());
            let mut blob = serde_json::json!({
                "id": piece.id, "type": if piece.tree { "tree" } else { "data" },
                "offset": pack.len(), "length": sealed.len(),
            });
            if let Some(says) = piece.says {
                blob["uncompressed_length"] = says.into();
            }
            blobs.push(blob);
            pack.extend(sealed);
        }
        let list = self.0.seal(&list)?;
        let length = list.len() as u32;
        pack.extend(list);
        pack.extend(length.to_le_bytes());
        let entry = serde_json::json!({"id": Sha256Sum::of(&pack), "blobs": blobs});
        Ok((pack, entry))
    }

    /// Builds an index file with these entries.
    ///
    /// # Errors
    /// None are known.
    pub fn index(&self, packs: &[serde_json::Value]) -> Result<Vec<u8>, Error> {
        self.seal(serde_json::json!({"packs": packs}).to_string().as_bytes())
    }
}
