//! Both tiers of a repository, for work that removes files.
//!
//! What is written is in both tiers before the call returns, so that an index is never removed before the one that
//! replaces it can be read in either tier, whatever crashes in between. Files are removed from tier 2 first, because
//! read-only credentials are refused there before anything is removed. The server is told of each removal.

use super::Ground;
use crate::maintenance::protocol::Line;
use bytes::Bytes;
use klio_storage::{
    Error, Kind,
    layout::{BaseFile, BaseKind, BaseObject},
    repository::{BucketFiles, Files, LocalFiles},
};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Files that report to the server when they are read, because a verification may do nothing but read for hours.
#[derive(Debug)]
pub(super) struct Telling {
    files: Arc<dyn Files>,
    out: super::Output,
}

impl Telling {
    pub(super) fn new(files: Arc<dyn Files>, out: &super::Output) -> Self {
        Self { files, out: out.clone() }
    }
}

#[deny(clippy::missing_trait_methods)]
impl Files for Telling {
    fn place(&self) -> String {
        self.files.place()
    }

    fn list(&self, kind: BaseKind) -> Result<Vec<(BaseFile, u64)>, Error> {
        self.out.still();
        self.files.list(kind)
    }

    fn read(&self, file: BaseFile) -> Result<Bytes, Error> {
        self.out.still();
        self.files.read(file)
    }

    fn read_range(&self, file: BaseFile, offset: u64, length: u64) -> Result<Bytes, Error> {
        self.out.still();
        self.files.read_range(file, offset, length)
    }

    fn write(&self, file: BaseFile, parts: &[Bytes]) -> Result<(), Error> {
        self.files.write(file, parts)
    }

    fn remove(&self, file: BaseFile) -> Result<(), Error> {
        self.files.remove(file)
    }
}

/// Bytes that were freed in each tier.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Freed {
    pub(super) tier1: u64,
    pub(super) tier2: u64,
}

/// The files in both tiers.
#[derive(Debug)]
pub(super) struct Both {
    local: Arc<LocalFiles>,
    bucket: Option<Arc<BucketFiles>>,
    out: super::Output,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    tier1: BTreeMap<BaseFile, u64>,
    tier2: BTreeMap<BaseFile, u64>,
    freed: Freed,
}

impl Both {
    pub(super) fn new(ground: &Ground) -> Self {
        let (local, bucket, out) =
            (ground.local.clone(), ground.bucket.clone(), ground.out.clone());
        Self { local, bucket, out, state: Mutex::default() }
    }

    pub(super) fn freed(&self) -> Freed {
        self.state().freed
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fall_through<T>(&self, read: impl Fn(&dyn Files) -> Result<T, Error>) -> Result<T, Error> {
        self.out.still();
        match (read(self.local.as_ref()), &self.bucket) {
            (Err(error), Some(bucket)) if error.kind == Kind::NotFound => read(bucket.as_ref()),
            (result, _) => result,
        }
    }
}

#[deny(clippy::missing_trait_methods)]
impl Files for Both {
    fn place(&self) -> String {
        self.local.place()
    }

    fn list(&self, kind: BaseKind) -> Result<Vec<(BaseFile, u64)>, Error> {
        let far = match &self.bucket {
            Some(bucket) => bucket.list(kind)?,
            None => Vec::new(),
        };
        let near = self.local.list(kind)?;
        let mut state = self.state();
        state.tier1.extend(near.iter().copied());
        state.tier2.extend(far.iter().copied());
        let mut all: BTreeMap<BaseFile, u64> = far.into_iter().collect();
        all.extend(near);
        Ok(all.into_iter().collect())
    }

    fn read(&self, file: BaseFile) -> Result<Bytes, Error> {
        self.fall_through(|files| files.read(file))
    }

    fn read_range(&self, file: BaseFile, offset: u64, length: u64) -> Result<Bytes, Error> {
        self.fall_through(|files| files.read_range(file, offset, length))
    }

    fn write(&self, file: BaseFile, parts: &[Bytes]) -> Result<(), Error> {
        self.local.write(file, parts)?;
        let size = parts.iter().map(|part| part.len() as u64).sum();
        if let Some(bucket) = &self.bucket {
            bucket.write(file, parts)?;
            let object = BaseObject::File(file).relative();
            self.out.say(&Line::Written { object, size });
        }
        Ok(())
    }

    fn remove(&self, file: BaseFile) -> Result<(), Error> {
        if let Some(bucket) = &self.bucket {
            bucket.remove(file)?;
            self.out.say(&Line::Removed { object: BaseObject::File(file).relative() });
        }
        self.local.remove(file)?;
        let mut state = self.state();
        let (near, far) = (state.tier1.remove(&file), state.tier2.remove(&file));
        state.freed.tier1 += near.unwrap_or(0);
        state.freed.tier2 += far.unwrap_or(0);
        Ok(())
    }
}
