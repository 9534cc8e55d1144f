//! Both tiers of a repository as one: files missing on tier 1 are read from tier 2.
//!
//! Writes go to tier 1 only; the consumer uploads them to tier 2 (P4). Removal removes from both, tier 2 first: a
//! file left on tier 1 is seen and removed again by the next run, but a file left only in the bucket would come
//! back through the listing.

use super::Files;
use crate::{
    Error, Kind,
    layout::{BaseFile, BaseKind},
};
use bytes::Bytes;
use std::{collections::BTreeMap, sync::Arc};

#[derive(Debug, Clone)]
pub struct Tiered {
    local: Arc<dyn Files>,
    bucket: Arc<dyn Files>,
}

impl Tiered {
    /// Combines tier 1 (`local`) and tier 2 (`bucket`).
    pub const fn new(local: Arc<dyn Files>, bucket: Arc<dyn Files>) -> Self {
        Self { local, bucket }
    }

    fn fall_through<T>(&self, read: impl Fn(&dyn Files) -> Result<T, Error>) -> Result<T, Error> {
        match read(self.local.as_ref()) {
            Err(error) if error.kind == Kind::NotFound => read(self.bucket.as_ref()),
            result => result,
        }
    }
}

#[deny(clippy::missing_trait_methods)]
impl Files for Tiered {
    fn place(&self) -> String {
        format!("{} and {}", self.local.place(), self.bucket.place())
    }

    fn list(&self, kind: BaseKind) -> Result<Vec<(BaseFile, u64)>, Error> {
        // If both tiers have a file, tier 1's size counts.
        let mut files: BTreeMap<_, _> = self.bucket.list(kind)?.into_iter().collect();
        files.extend(self.local.list(kind)?);
        Ok(files.into_iter().collect())
    }

    fn read(&self, file: BaseFile) -> Result<Bytes, Error> {
        self.fall_through(|files| files.read(file))
    }

    fn read_range(&self, file: BaseFile, offset: u64, length: u64) -> Result<Bytes, Error> {
        self.fall_through(|files| files.read_range(file, offset, length))
    }

    fn write(&self, file: BaseFile, parts: &[Bytes]) -> Result<(), Error> {
        self.local.write(file, parts)
    }

    fn remove(&self, file: BaseFile) -> Result<(), Error> {
        self.bucket.remove(file)?;
        self.local.remove(file)
    }
}
