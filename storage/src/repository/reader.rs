//! Reads a snapshot: its entries, and its chunks in any order from any thread.
//!
//! Only archived data is returned: a chunk's bytes have the SHA-256 in its name, or reading fails with `Corrupt`. It
//! caches nothing but the index; how much is read at once is decided by the `Files` below it (`Windowed`).

use super::{
    Repository, SnapshotId,
    index::{BlobKind, Index, Place},
    sealer::Sealer,
    tree::{self, TreeNode},
};
use crate::{
    Error, Kind, Op,
    layout::BaseFile,
    tier2::{Sha256Sum, Sha256SumError},
};
use bytes::Bytes;
use rustic_core::repofile::SnapshotFile;
use std::{
    cell::RefCell, collections::BTreeSet, fmt, path::PathBuf, str::FromStr, sync::Arc,
    time::SystemTime,
};

/// The id of a chunk: the SHA-256 of its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkId(pub(super) Sha256Sum);

impl ChunkId {
    /// The id of the chunk with this content.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256Sum::of(bytes))
    }

    pub const fn sum(&self) -> &Sha256Sum {
        &self.0
    }
}

impl fmt::Display for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for ChunkId {
    type Err = Sha256SumError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}

/// The location of an encrypted chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ChunkLocation {
    pub pack: BaseFile,
    /// Offset in the pack in bytes.
    pub offset: u64,
    /// Length in the pack in bytes.
    pub length: u64,
}

/// The kind of a snapshot's entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoredKind {
    /// A directory; its contents follow.
    Dir,
    /// A regular file.
    File {
        /// In bytes.
        size: u64,
        /// Its chunks in order. All but the last have the repository's chunk size.
        chunks: Vec<ChunkId>,
    },
    /// A symbolic link and its target.
    Symlink(PathBuf),
}

/// A directory, file or link of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Relative to the root of the snapshot, for example `data/base/1/1259`. It never points outside of it.
    pub path: PathBuf,
    pub kind: StoredKind,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time of the content.
    pub mtime: SystemTime,
}

/// An open snapshot; cheap to clone, and usable by any number of threads.
#[derive(Debug, Clone)]
pub struct Reader {
    repository: Repository,
    index: Arc<Index>,
    root: Sha256Sum,
}

impl Repository {
    /// Opens a snapshot.
    ///
    /// # Errors
    /// `NotFound` when there is no such snapshot; `Corrupt` when a file is damaged.
    pub fn reader(&self, snapshot: &SnapshotId) -> Result<Reader, Error> {
        let root = tree_of(&self.snapshot_file(*snapshot)?)?;
        Ok(Reader { repository: self.clone(), index: Arc::new(self.index()?), root })
    }

    pub(super) fn snapshot_file(&self, snapshot: SnapshotId) -> Result<SnapshotFile, Error> {
        let json = self.read_json(snapshot.file())?;
        serde_json::from_slice(&json)
            .map_err(|_| self.damaged(snapshot.file(), "expected restic's snapshot JSON"))
    }
}

pub(super) fn tree_of(snapshot: &SnapshotFile) -> Result<Sha256Sum, Error> {
    sum(&snapshot.tree.to_hex())
}

/// rustic's ids expose their bytes as text only.
pub(super) fn sum(hex: &str) -> Result<Sha256Sum, Error> {
    hex.parse().map_err(|e| Error::new(Kind::Corrupt, Op::Decode, "an id", e))
}

impl Reader {
    pub(super) fn new(repository: Repository, index: Arc<Index>, root: Sha256Sum) -> Self {
        Self { repository, index, root }
    }

    pub(super) const fn root(&self) -> &Sha256Sum {
        &self.root
    }

    pub(super) fn index(&self) -> &Index {
        &self.index
    }

    pub(super) fn chunk_place(&self, id: &ChunkId) -> Result<&Place, Error> {
        self.place(BlobKind::Data, &id.0)
    }

    /// Every entry, a directory before its contents. Trees are read on the way; iteration ends after an error.
    ///
    /// # Errors
    /// When the root tree cannot be read.
    pub fn entries(&self) -> Result<Entries, Error> {
        let mut entries = Entries {
            reader: self.clone(),
            path: PathBuf::new(),
            stack: Vec::new(),
            packs: BTreeSet::new(),
        };
        entries.open(&self.root)?;
        Ok(entries)
    }

    /// Reads a chunk.
    ///
    /// # Errors
    /// `Corrupt` when the repository does not have it or has other bytes; otherwise an error of the files.
    pub fn chunk(&self, id: &ChunkId) -> Result<Bytes, Error> {
        self.blob(BlobKind::Data, &id.0)
    }

    /// The location of a chunk, for callers that order or combine their reads.
    ///
    /// # Errors
    /// `Corrupt` when no index names it.
    pub fn chunk_location(&self, id: &ChunkId) -> Result<ChunkLocation, Error> {
        let place = self.place(BlobKind::Data, &id.0)?;
        let pack = self.index.pack(place).file();
        Ok(ChunkLocation { pack, offset: place.offset.into(), length: place.length.into() })
    }

    /// The plain length of a chunk in bytes.
    ///
    /// # Errors
    /// `Corrupt` when no index names it.
    pub fn chunk_length(&self, id: &ChunkId) -> Result<u64, Error> {
        Ok(self.chunk_place(id)?.plain())
    }

    /// Decrypts a chunk from the bytes at its location, for callers that read by themselves.
    ///
    /// # Errors
    /// As `chunk`.
    pub fn open_chunk(&self, id: &ChunkId, sealed: &[u8]) -> Result<Bytes, Error> {
        let place = self.place(BlobKind::Data, &id.0)?;
        let opened = self.open(&id.0, place, sealed);
        opened.or_else(|error| self.elsewhere(BlobKind::Data, &id.0, error))
    }

    pub(super) fn tree(&self, id: &Sha256Sum) -> Result<Vec<TreeNode>, Error> {
        let json = self.blob(BlobKind::Tree, id)?;
        tree::parse(&json).map_err(|detail| self.broken(id, &detail))
    }

    pub(super) fn place(&self, kind: BlobKind, id: &Sha256Sum) -> Result<&Place, Error> {
        self.index.find(kind, id).ok_or_else(|| self.broken(id, "no index names this piece"))
    }

    fn blob(&self, kind: BlobKind, id: &Sha256Sum) -> Result<Bytes, Error> {
        let read = self.read_at(id, self.place(kind, id)?);
        read.or_else(|error| self.elsewhere(kind, id, error))
    }

    fn read_at(&self, id: &Sha256Sum, place: &Place) -> Result<Bytes, Error> {
        let pack = self.index.pack(place).file();
        let (offset, length) = (place.offset.into(), place.length.into());
        let sealed = self.repository.files.read_range(pack, offset, length)?;
        self.open(id, place, &sealed)
    }

    /// ABSENT1: tries the other locations of a piece after the first one failed; a later backup may have stored it
    /// again.
    fn elsewhere(&self, kind: BlobKind, id: &Sha256Sum, first: Error) -> Result<Bytes, Error> {
        let is_lost = |error: &Error| matches!(error.kind, Kind::Corrupt | Kind::NotFound);
        if !is_lost(&first) {
            return Err(first);
        }
        for place in self.index.places(kind, *id).skip(1) {
            match self.read_at(id, place) {
                Err(error) if is_lost(&error) => {}
                other => return other,
            }
        }
        Err(first)
    }

    fn open(&self, id: &Sha256Sum, place: &Place, sealed: &[u8]) -> Result<Bytes, Error> {
        open_blob(&self.repository.key.sealer, id, place, sealed).map_err(|detail| {
            let file = self.index.pack(place).file();
            let detail = format!("piece {id} at offset {}: {detail}", place.offset);
            self.repository.damaged(file, detail)
        })
    }

    fn broken(&self, id: &Sha256Sum, detail: &str) -> Error {
        let place = format!("{}, piece {id}", self.repository.place());
        Error::new(Kind::Corrupt, Op::Read, place, detail)
    }
}

thread_local! {
    /// Reused, because there are many chunks and each is small.
    static ZSTD: RefCell<zstd::bulk::Decompressor<'static>> =
        RefCell::new(zstd::bulk::Decompressor::default());
}

/// Decrypts, decompresses and verifies one piece; the error says what is wrong with it.
pub(super) fn open_blob(
    sealer: &Sealer,
    id: &Sha256Sum,
    place: &Place,
    sealed: &[u8],
) -> Result<Bytes, &'static str> {
    let packed = sealer.open(sealed).ok_or("damaged: its authentication fails")?;
    let plain = match place.raw {
        0 => packed,
        raw => ZSTD
            .with_borrow_mut(|zstd| zstd.decompress(&packed, raw as usize))
            .map_err(|_| "damaged: it does not decompress")?,
    };
    if plain.len() as u64 != place.plain() {
        return Err("its length differs from the one in the index");
    }
    if Sha256Sum::of(&plain) != *id {
        return Err("its bytes do not have the SHA-256 in its name");
    }
    Ok(plain.into())
}

/// Iterates over the entries of a snapshot.
#[derive(Debug)]
pub struct Entries {
    reader: Reader,
    /// The path of the innermost open directory.
    path: PathBuf,
    stack: Vec<std::vec::IntoIter<TreeNode>>,
    /// The packs of the trees that were read so far.
    packs: BTreeSet<u32>,
}

impl Iterator for Entries {
    type Item = Result<Entry, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.stack.last_mut()?.next() {
                Some(node) => {
                    let result = self.enter(node);
                    if result.is_err() {
                        self.stack.clear();
                    }
                    return Some(result);
                }
                None => {
                    self.stack.pop();
                    self.path.pop();
                }
            }
        }
    }
}

impl Entries {
    /// The packs of the trees that were read so far, as positions in `Index::packs`.
    pub(super) fn tree_packs(&self) -> impl Iterator<Item = u32> {
        self.packs.iter().copied()
    }

    fn open(&mut self, tree: &Sha256Sum) -> Result<(), Error> {
        self.packs.insert(self.reader.place(BlobKind::Tree, tree)?.pack);
        self.stack.push(self.reader.tree(tree)?.into_iter());
        Ok(())
    }

    fn enter(&mut self, node: TreeNode) -> Result<Entry, Error> {
        let path = self.path.join(&node.name);
        if let Some(tree) = &node.tree {
            self.open(tree)?;
            self.path.push(&node.name);
        }
        let TreeNode { kind, mode, uid, gid, mtime, .. } = node;
        Ok(Entry { path, kind, mode, uid, gid, mtime })
    }
}
