//! Repository files without packs that are known to be damaged.
//!
//! A listing does not show these packs, so their chunks are looked for elsewhere first, and sent again (ABSENT1,
//! ABSENT2 of `absent.rs`). A pack that is requested by name is still returned, because most of its contents may be
//! good.

use super::Files;
use crate::{
    Error,
    layout::{BaseFile, BaseKind},
};
use bytes::Bytes;
use std::{collections::BTreeSet, sync::Arc};

/// Other files without some packs.
#[derive(Debug, Clone)]
pub struct Without {
    files: Arc<dyn Files>,
    packs: BTreeSet<BaseFile>,
}

impl Without {
    /// All of `files` except `packs`.
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
