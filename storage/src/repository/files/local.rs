//! Repository files on tier 1, below `<cluster>/base/`.
//!
//! REPO1: a file is written under a temporary name, fsynced, renamed, and its directory fsynced. REPO2: bytes that do
//! not have the SHA-256 in their name are refused. A file that already exists is read and compared, and replaced as a
//! whole if it is damaged.
//!
//! Several processes may write at the same time: they never share temporary names. Temporary files left by a crash are
//! removed by `sweep`, which must not run while anybody writes.

use super::Files;
use crate::{
    Error, Kind, Op,
    disk::{Disk, durable},
    layout::{BaseFile, BaseKind},
    tier2::Hasher,
};
use bytes::Bytes;
use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

/// Makes the temporary names of this process unique.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// The files of one repository on a disk.
#[derive(Debug)]
pub struct LocalFiles {
    disk: Arc<dyn Disk>,
    root: PathBuf,
    /// Directories whose names are known to be durable.
    directories: Mutex<BTreeSet<PathBuf>>,
}

impl LocalFiles {
    /// `root` is `<data directory>/<cluster>/base`; directories are created when a file needs them.
    pub fn new(disk: Arc<dyn Disk>, root: PathBuf) -> Self {
        Self { disk, root, directories: Mutex::new(BTreeSet::new()) }
    }

    /// The path of a file.
    pub fn path(&self, file: BaseFile) -> PathBuf {
        self.root.join(file.relative())
    }

    /// The path of a file whose directory exists durably, for callers that write the file piece by piece.
    ///
    /// # Errors
    /// An I/O error of the disk.
    pub fn place_for(&self, file: BaseFile) -> Result<PathBuf, Error> {
        let path = self.path(file);
        self.require_directory(path.parent().unwrap_or(&self.root))?;
        Ok(path)
    }

    /// Removes unfinished files that crashes left. Call it only while nobody writes.
    ///
    /// # Errors
    /// An I/O error of the disk.
    pub fn sweep(&self) -> Result<(), Error> {
        for directory in self.all_directories()? {
            for name in self.names(&directory)? {
                if name.ends_with(durable::TMP_SUFFIX) {
                    durable::remove_if_there(self.disk.as_ref(), &directory.join(name))?;
                }
            }
        }
        Ok(())
    }

    fn all_directories(&self) -> Result<Vec<PathBuf>, Error> {
        let mut directories = vec![self.root.clone()];
        for kind in BaseKind::ALL {
            directories.extend(self.directories_of(kind)?);
        }
        Ok(directories)
    }

    /// The directories with files of a kind.
    fn directories_of(&self, kind: BaseKind) -> Result<Vec<PathBuf>, Error> {
        let Some(name) = kind.directory() else { return Ok(vec![self.root.clone()]) };
        let directory = self.root.join(name);
        if kind != BaseKind::Data {
            return Ok(vec![directory]);
        }
        Ok(self.names(&directory)?.into_iter().map(|name| directory.join(name)).collect())
    }

    fn names(&self, directory: &Path) -> Result<Vec<String>, Error> {
        match self.disk.list(directory) {
            Ok(entries) => Ok(entries.into_iter().map(|entry| entry.name).collect()),
            Err(e)
                if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) =>
            {
                Ok(Vec::new())
            }
            Err(e) => Err(Error::io(Op::List, directory, e)),
        }
    }

    /// Creates the directory of a file, and its missing parents.
    fn require_directory(&self, directory: &Path) -> Result<(), Error> {
        let known = |directory: &Path| {
            self.directories.lock().unwrap_or_else(PoisonError::into_inner).contains(directory)
        };
        if known(directory) {
            return Ok(());
        }
        if let Some(above) = directory.parent()
            && directory.starts_with(&self.root)
        {
            self.require_directory(above)?;
        } else if self.disk.list(directory).is_ok() {
            // Above the repository: the cluster's directory was made durable by whoever created it.
            return Ok(());
        }
        durable::create_dir(self.disk.as_ref(), directory)?;
        self.directories
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(directory.to_owned());
        Ok(())
    }

    fn write_new(&self, path: &Path, parts: &[Bytes]) -> Result<(), Error> {
        let directory = path.parent().unwrap_or(&self.root);
        self.require_directory(directory)?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let unique = format!("{}.{}.{number}", path.display(), std::process::id());
        let tmp = durable::tmp_path(Path::new(&unique));
        let write = || {
            durable::remove_if_there(self.disk.as_ref(), &tmp)?;
            let file = self.disk.create_new(&tmp).map_err(|e| Error::io(Op::Create, &tmp, e))?;
            let mut at = 0;
            for part in parts {
                file.write_all_at(part, at).map_err(|e| Error::io(Op::Write, path, e))?;
                at += part.len() as u64;
            }
            file.sync_all().map_err(|e| Error::io(Op::Sync, path, e))
        };
        write().inspect_err(|_| {
            // The first error is the one to report; `sweep` removes the rest.
            let _ = self.disk.remove(&tmp);
        })?;
        durable::rename(self.disk.as_ref(), &tmp, path)
    }

    /// Whether the file exists with these bytes, durably; `None` when it does not exist.
    fn same(&self, path: &Path, parts: &[Bytes]) -> Result<Option<bool>, Error> {
        let file = match self.disk.open(path, false) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io(Op::Open, path, e)),
        };
        let fail = |e| Error::io(Op::Read, path, e);
        let length = parts.iter().map(Bytes::len).sum::<usize>() as u64;
        if file.size().map_err(fail)? != length {
            return Ok(Some(false));
        }
        let (mut at, mut block) = (0, vec![0; 1 << 16]);
        for piece in parts.iter().flat_map(|part| part.chunks(1 << 16)) {
            let found = &mut block[..piece.len()];
            let got = crate::disk::read_full(file.as_ref(), found, at).map_err(fail)?;
            if found[..got] != *piece {
                return Ok(Some(false));
            }
            at += got as u64;
        }
        // Its name may come from a process that crashed before it was durable.
        durable::sync_dir(self.disk.as_ref(), path.parent().unwrap_or(&self.root))?;
        Ok(Some(true))
    }

    fn fail(&self, kind: Kind, op: Op, file: BaseFile, detail: impl std::fmt::Display) -> Error {
        Error::new(kind, op, self.path(file).display(), detail)
    }
}

impl Files for LocalFiles {
    fn place(&self) -> String {
        self.root.display().to_string()
    }

    fn list(&self, kind: BaseKind) -> Result<Vec<(BaseFile, u64)>, Error> {
        let mut found = Vec::new();
        for directory in self.directories_of(kind)? {
            for name in self.names(&directory)? {
                let path = directory.join(&name);
                let relative = path.strip_prefix(&self.root).ok().and_then(Path::to_str);
                let Some(file) = relative.and_then(BaseFile::parse_relative) else { continue };
                if file.kind != kind {
                    continue;
                }
                match self.disk.stat(&path) {
                    Ok(stat) => found.push((file, stat.size)),
                    // Removed since it was listed.
                    Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                    Err(e) => return Err(Error::io(Op::List, &path, e)),
                }
            }
        }
        Ok(found)
    }

    fn read(&self, file: BaseFile) -> Result<Bytes, Error> {
        let path = self.path(file);
        let size = self.disk.stat(&path).map_err(|e| Error::io(Op::Read, &path, e))?.size;
        self.read_range(file, 0, size)
    }

    fn read_range(&self, file: BaseFile, offset: u64, length: u64) -> Result<Bytes, Error> {
        let path = self.path(file);
        let fail = |e| Error::io(Op::Read, &path, e);
        let open = self.disk.open(&path, false).map_err(fail)?;
        let size = open.size().map_err(fail)?;
        if offset.checked_add(length).is_none_or(|end| end > size) {
            let detail =
                format!("expected {length} bytes at {offset}, found a file of {size} bytes");
            return Err(self.fail(Kind::Corrupt, Op::Read, file, detail));
        }
        let mut bytes = vec![0; length as usize];
        let got = crate::disk::read_full(open.as_ref(), &mut bytes, offset).map_err(fail)?;
        if got < bytes.len() {
            let detail = format!("expected {length} bytes at {offset}, found {got}");
            return Err(self.fail(Kind::Corrupt, Op::Read, file, detail));
        }
        Ok(bytes.into())
    }

    fn write(&self, file: BaseFile, parts: &[Bytes]) -> Result<(), Error> {
        require_name(&self.place(), file, parts)?;
        let path = self.path(file);
        match self.same(&path, parts)? {
            Some(true) => Ok(()),
            Some(false) if file.kind == BaseKind::Config => Err(self.fail(
                Kind::Conflict,
                Op::Create,
                file,
                "expected no config, found another one",
            )),
            Some(false) => {
                tracing::warn!(path = %path.display(), "replacing a damaged file by the right bytes");
                self.write_new(&path, parts)
            }
            None => self.write_new(&path, parts),
        }
    }

    fn remove(&self, file: BaseFile) -> Result<(), Error> {
        let path = self.path(file);
        match self.disk.remove(&path) {
            Ok(()) => durable::sync_dir(self.disk.as_ref(), path.parent().unwrap_or(&self.root)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(Error::io(Op::Remove, &path, e)),
        }
    }
}

/// REPO2 for a file that is about to be stored.
pub(super) fn require_name(place: &str, file: BaseFile, parts: &[Bytes]) -> Result<(), Error> {
    if file.kind == BaseKind::Config {
        return Ok(());
    }
    let mut hasher = Hasher::default();
    parts.iter().for_each(|part| hasher.update(part));
    let found = hasher.finish();
    if found == file.id {
        return Ok(());
    }
    let detail = format!("expected bytes with the SHA-256 of the name, found {found}");
    Err(Error::new(Kind::Corrupt, Op::Write, format!("{place}/{}", file.relative()), detail))
}
