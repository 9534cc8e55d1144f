//! Turns many small reads of packs into few large ones, for places where each call is expensive.
//!
//! A read fetches the whole window around it. Windows stay cached until the budget is used up; the least recently used
//! one is dropped first. If one thread is fetching a window, others wait for it. Memory is bounded by the budget plus
//! one window per thread. Only packs are windowed: they never change, while other files are read whole.

use super::Files;
use crate::{
    Error,
    layout::{BaseFile, BaseKind},
};
use bytes::{Bytes, BytesMut};
use klio_pg::ByteSize;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

type Name = (BaseFile, u64);
/// Filled by the first thread that needs it; later ones wait for its lock.
type Slot = Arc<Mutex<Option<Bytes>>>;

/// A cache of windows in front of other files.
#[derive(Debug)]
pub struct Windowed<F> {
    inner: F,
    window: u64,
    windows_max: usize,
    cache: Mutex<Cache>,
}

#[derive(Debug, Default)]
struct Cache {
    /// Each with the time of its last use.
    slots: HashMap<Name, (Slot, u64)>,
    clock: u64,
    /// Sizes of packs, because the last window of a file is shorter.
    sizes: HashMap<BaseFile, u64>,
}

impl<F: Files> Windowed<F> {
    /// Caches windows of `window` bytes of `inner`, as many as fit into `budget`, but at least one.
    pub fn new(inner: F, window: ByteSize, budget: ByteSize) -> Self {
        let window = window.bytes().max(1);
        let windows_max = usize::try_from(budget.bytes() / window).unwrap_or(usize::MAX).max(1);
        Self { inner, window, windows_max, cache: Mutex::default() }
    }

    pub const fn inner(&self) -> &F {
        &self.inner
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The size of a pack; the first call lists all of them.
    fn size(&self, file: BaseFile) -> Result<Option<u64>, Error> {
        if let Some(&size) = self.cache().sizes.get(&file) {
            return Ok(Some(size));
        }
        let listed = self.inner.list(BaseKind::Data)?;
        let mut cache = self.cache();
        cache.sizes.extend(listed);
        Ok(cache.sizes.get(&file).copied())
    }

    fn slot(&self, name: Name) -> Slot {
        let mut cache = self.cache();
        cache.clock += 1;
        let now = cache.clock;
        if let Some((slot, used)) = cache.slots.get_mut(&name) {
            *used = now;
            return Arc::clone(slot);
        }
        while cache.slots.len() >= self.windows_max {
            let oldest =
                cache.slots.iter().min_by_key(|(_, (_, used))| *used).map(|(name, _)| *name);
            oldest.and_then(|name| cache.slots.remove(&name));
        }
        let slot = Slot::default();
        cache.slots.insert(name, (Arc::clone(&slot), now));
        slot
    }

    fn window(&self, file: BaseFile, number: u64, size: u64) -> Result<Bytes, Error> {
        let slot = self.slot((file, number));
        let mut window = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bytes) = window.as_ref() {
            return Ok(bytes.clone());
        }
        let from = number * self.window;
        let bytes = self.inner.read_range(file, from, self.window.min(size - from))?;
        *window = Some(bytes.clone());
        Ok(bytes)
    }
}

#[deny(clippy::missing_trait_methods)]
impl<F: Files> Files for Windowed<F> {
    fn place(&self) -> String {
        self.inner.place()
    }

    fn list(&self, kind: BaseKind) -> Result<Vec<(BaseFile, u64)>, Error> {
        self.inner.list(kind)
    }

    fn read(&self, file: BaseFile) -> Result<Bytes, Error> {
        self.inner.read(file)
    }

    fn read_range(&self, file: BaseFile, offset: u64, length: u64) -> Result<Bytes, Error> {
        let size = if file.kind == BaseKind::Data { self.size(file)? } else { None };
        let end = offset.saturating_add(length);
        // If the range is invalid, the place itself gives the best error.
        let Some(size) = size.filter(|&size| end <= size && length > 0) else {
            return self.inner.read_range(file, offset, length);
        };
        let (first, last) = (offset / self.window, (end - 1) / self.window);
        let part = |number: u64, bytes: &Bytes| {
            let begin = number * self.window;
            let from = offset.saturating_sub(begin) as usize;
            let to = (end - begin).min(bytes.len() as u64) as usize;
            bytes.slice(from..to)
        };
        if first == last {
            return Ok(part(first, &self.window(file, first, size)?));
        }
        let mut joined = BytesMut::with_capacity(length as usize);
        for number in first..=last {
            joined.extend_from_slice(&part(number, &self.window(file, number, size)?));
        }
        Ok(joined.freeze())
    }

    fn write(&self, file: BaseFile, parts: &[Bytes]) -> Result<(), Error> {
        self.inner.write(file, parts)
    }

    fn remove(&self, file: BaseFile) -> Result<(), Error> {
        let mut cache = self.cache();
        cache.slots.retain(|(name, _), _| *name != file);
        cache.sizes.remove(&file);
        drop(cache);
        self.inner.remove(file)
    }
}
