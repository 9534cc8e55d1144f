//! Presents our `Files` to rustic as a backend, for one operation.
//!
//! If the operation asks for it, snapshots that rustic saves by itself are withheld: archiving makes trees, and
//! only `assemble` makes a snapshot of them (REPO3). The first failure is recorded, because rustic keeps reading
//! the whole source after a failed write.

use super::{Files, Progress, absent::Hidden, sealer::Sealer};
use crate::{
    Error, Kind, Op,
    layout::{BaseFile, BaseKind},
    sum::Sha256Sum,
};
use bytes::Bytes;
use rustic_core::{
    BytesList, ErrorKind, FileType, Id, ReadBackend, RusticError, RusticResult, WriteBackend,
    repofile::ConfigFile,
};
use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};

/// What to do with a snapshot that rustic saves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Snapshots {
    Save,
    Withhold,
}

/// The effects of one operation, shared by its threads.
#[derive(Debug, Default)]
pub(super) struct Trace {
    failed: AtomicBool,
    first: Mutex<Option<Error>>,
    saved: Mutex<Vec<BaseFile>>,
}

impl Trace {
    /// Records the first failure and makes the rest of the operation stop.
    pub(super) fn fail(&self, error: Error) {
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert(error);
        self.failed.store(true, Ordering::Release);
    }

    pub(super) fn failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    pub(super) fn take_error(&self) -> Option<Error> {
        self.first.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Snapshot files written so far.
    pub(super) fn saved(&self) -> Vec<BaseFile> {
        self.saved.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

pub(super) struct Backend {
    pub(super) files: Arc<dyn Files>,
    pub(super) snapshots: Snapshots,
    pub(super) progress: Option<Arc<dyn Progress>>,
    pub(super) trace: Arc<Trace>,
    /// Packs to hide from the index that rustic reads.
    pub(super) hidden: Option<Arc<Hidden>>,
    /// A compression level to insert into the config that rustic reads, and the key for that.
    pub(super) level: Option<(i32, Sealer)>,
}

/// The config with another compression level. rustic reads the level only from the config, and rewriting the file
/// for it would mean one more file that changes.
fn with_level(sealed: &[u8], level: i32, sealer: &Sealer) -> Result<Bytes, Error> {
    let bad = || Error::new(Kind::Corrupt, Op::Open, "config", "expected restic's config JSON");
    let json = sealer.open_file(sealed).ok_or_else(bad)?;
    let mut config: ConfigFile = serde_json::from_slice(&json).map_err(|_| bad())?;
    config.compression = Some(level);
    let json = serde_json::to_vec(&config).map_err(|_| bad())?;
    sealer.seal(&json).map(Bytes::from)
}

fn kind(tpe: FileType) -> BaseKind {
    match tpe {
        FileType::Config => BaseKind::Config,
        FileType::Index => BaseKind::Index,
        FileType::Key => BaseKind::Key,
        FileType::Snapshot => BaseKind::Snapshot,
        FileType::Pack => BaseKind::Data,
    }
}

/// Converts rustic's id to ours. rustic exposes its bytes as text only.
pub(super) fn sum(id: Id) -> RusticResult<Sha256Sum> {
    id.to_hex().as_str().parse().map_err(|e| wrap("read an id", e))
}

/// Converts our checksum to rustic's id.
pub(super) fn id(sum: Sha256Sum) -> Id {
    Id::new(*sum.bytes())
}

fn file(tpe: FileType, id: &Id) -> RusticResult<BaseFile> {
    if tpe == FileType::Config {
        return Ok(BaseFile::CONFIG);
    }
    Ok(BaseFile { kind: kind(tpe), id: sum(*id)? })
}

fn wrap(what: &str, error: impl std::error::Error + Send + Sync + 'static) -> Box<RusticError> {
    RusticError::with_source(ErrorKind::Backend, what.to_owned(), error)
}

impl ReadBackend for Backend {
    fn location(&self) -> String {
        self.files.place()
    }

    fn list_with_size(&self, tpe: FileType) -> RusticResult<Vec<(Id, u32)>> {
        let files = self.files.list(kind(tpe)).map_err(|e| wrap("list files", e))?;
        // A pack is far below 4 GiB; a larger file is an error and fails its size check.
        Ok(files
            .into_iter()
            .map(|(f, n)| (id(f.id), u32::try_from(n).unwrap_or(u32::MAX)))
            .collect())
    }

    fn read_full(&self, tpe: FileType, id: &Id) -> RusticResult<Bytes> {
        let file = file(tpe, id)?;
        let bytes =
            super::read_checked(self.files.as_ref(), file).map_err(|e| wrap("read a file", e))?;
        match (tpe, &self.hidden, &self.level) {
            (FileType::Index, Some(hidden), _) => Ok(hidden.filter(bytes)),
            (FileType::Config, _, Some((level, sealer))) => {
                with_level(&bytes, *level, sealer).map_err(|e| wrap("read the config", e))
            }
            _ => Ok(bytes),
        }
    }

    fn read_partial(
        &self,
        tpe: FileType,
        id: &Id,
        _cacheable: bool,
        offset: u32,
        length: u32,
    ) -> RusticResult<Bytes> {
        let file = file(tpe, id)?;
        let range = self.files.read_range(file, u64::from(offset), u64::from(length));
        range.map_err(|e| wrap("read a part of a file", e))
    }

    fn warmup_path(&self, tpe: FileType, id: &Id) -> String {
        file(tpe, id).map(BaseFile::relative).unwrap_or_default()
    }
}

impl WriteBackend for Backend {
    fn write_bytes(
        &self,
        tpe: FileType,
        id: &Id,
        _cacheable: bool,
        content: BytesList,
    ) -> RusticResult<()> {
        if tpe == FileType::Snapshot && self.snapshots == Snapshots::Withhold {
            return Ok(());
        }
        let file = file(tpe, id)?;
        let bytes = content.size() as u64;
        if let Err(error) = self.files.write(file, content.slice()) {
            let copy = Error::new(error.kind, error.op, &error.place, &error.detail);
            self.trace.fail(copy);
            return Err(wrap("write a file", error));
        }
        match (tpe, &self.progress) {
            (FileType::Pack, Some(progress)) => progress.stored(bytes),
            (FileType::Snapshot, _) => {
                self.trace.saved.lock().unwrap_or_else(PoisonError::into_inner).push(file);
            }
            _ => {}
        }
        Ok(())
    }

    fn remove(&self, tpe: FileType, id: &Id, _cacheable: bool) -> RusticResult<()> {
        self.files.remove(file(tpe, id)?).map_err(|e| wrap("remove a file", e))
    }
}
