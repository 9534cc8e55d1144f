//! Repository files without packs that are known to be damaged.
//!
//! Whoever lists does not see them, so their chunks are looked for elsewhere first, and sent again (ABSENT1, ABSENT2 of `absent.rs`).
//! Whoever asks for one by name gets it: most of what is in it may be good.

use super::Files;
use crate::{
    Error,
    layout::{BaseFile, BaseKind},
};
use bytes::Bytes;
use std::{collections::BTreeSet, sync::Arc};

/// Files, but some packs.
#[derive(Debug, Clone)]
pub struct Without {
    files: Arc<dyn Files>,
    packs: BTreeSet<BaseFile>,
}

impl Without {
    /// All but these.
    pub const fn new(files: Arc<dyn Files>, packs: BTreeSet<BaseFile>) -> Self {
        Self { files, packs }
    }
}

#[deny(clippy::missing_trait_methods)]
impl Files for Without {
    fn place(&self) -> String {
        self.files.place()
    }

    fn list(&self, kind: BaseKind) -> Result<Vec<(BaseFile, u64)>, Error> {
        let mut files = self.files.list(kind)?;
        files.retain(|(file, _)| !self.packs.contains(file));
        Ok(files)
    }

    fn read(&self, file: BaseFile) -> Result<Bytes, Error> {
        self.files.read(file)
    }

    fn read_range(&self, file: BaseFile, offset: u64, length: u64) -> Result<Bytes, Error> {
        self.files.read_range(file, offset, length)
    }

    fn write(&self, file: BaseFile, parts: &[Bytes]) -> Result<(), Error> {
        self.files.write(file, parts)
    }

    fn remove(&self, file: BaseFile) -> Result<(), Error> {
        self.files.remove(file)
    }
}
