//! The repository: archived content is restored unchanged, unreadable content makes a backup fail, damage is
//! found.

mod absent;
mod conformance;
mod crash;
mod damage;
mod failures;
mod maintenance;
mod parent;
mod prove;
mod restic;
mod round_trip;
mod unpack;

use super::{
    Entry, EntryKind, Files, LocalFiles, Open, Part, Repository, Secret, Settings, Silent,
    SnapshotMeta, SnapshotSummary, Source, SourceEntry, StoredKind,
};
use crate::{
    Error,
    disk::RealDisk,
    layout::{BaseFile, BaseKind},
};
use bytes::Bytes;
use std::{
    collections::BTreeMap,
    io::{self, Cursor, Read},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// When the listings of these tests begin.
pub(super) fn began() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

/// Long before that, with nanoseconds.
pub(super) fn long_ago() -> SystemTime {
    UNIX_EPOCH + Duration::new(1_600_000_000, 123_456_789)
}

/// How a simulated file behaves.
#[derive(Debug, Clone)]
pub(super) enum Content {
    Dir,
    Link(&'static str),
    File(Vec<u8>),
    /// Listed with a size that differs from the actual one.
    Resized(u64, Vec<u8>),
    /// Cannot be opened.
    Closed(io::ErrorKind),
    /// Fails after these bytes.
    Broken(Vec<u8>, io::ErrorKind),
}

impl Content {
    fn kind(&self, opened: impl FnOnce() + Send + 'static) -> EntryKind {
        let (size, open): (usize, Open) = match self.clone() {
            Self::Dir => return EntryKind::Dir,
            Self::Link(target) => return EntryKind::Symlink(target.into()),
            Self::File(bytes) => (bytes.len(), reading(bytes, None)),
            Self::Resized(listed, bytes) => (listed as usize, reading(bytes, None)),
            Self::Closed(kind) => (4711, Box::new(move || Err(kind.into()))),
            Self::Broken(bytes, kind) => (bytes.len() + 1, reading(bytes, Some(kind))),
        };
        let open = move || {
            opened();
            open()
        };
        EntryKind::File { size: size as u64, open: Box::new(open) }
    }
}

fn reading(bytes: Vec<u8>, fails: Option<io::ErrorKind>) -> Open {
    Box::new(move || {
        let start = Cursor::new(bytes);
        Ok(match fails {
            Some(kind) => Box::new(start.chain(Failing(kind))) as Box<dyn Read + Send>,
            None => Box::new(start),
        })
    })
}

struct Failing(io::ErrorKind);

impl Read for Failing {
    fn read(&mut self, _buf: &mut [u8]) -> io::Result<usize> {
        Err(self.0.into())
    }
}

/// A simulated tree; records which of its files were opened.
#[derive(Debug, Clone)]
pub(super) struct Fake {
    pub(super) began: SystemTime,
    pub(super) entries: BTreeMap<PathBuf, (Content, SystemTime)>,
    opened: Arc<Mutex<Vec<PathBuf>>>,
}

impl Fake {
    pub(super) fn new() -> Self {
        Self { began: began(), entries: BTreeMap::new(), opened: Arc::default() }
    }

    /// Adds an entry that was last changed long ago, and its parent directories.
    pub(super) fn with(self, path: &str, content: Content) -> Self {
        self.changed(path, content, long_ago())
    }

    pub(super) fn file(self, path: &str, bytes: &[u8]) -> Self {
        self.with(path, Content::File(bytes.to_vec()))
    }

    pub(super) fn changed(mut self, path: &str, content: Content, when: SystemTime) -> Self {
        for above in Path::new(path).ancestors().skip(1).filter(|a| !a.as_os_str().is_empty()) {
            self.entries.entry(above.to_owned()).or_insert((Content::Dir, long_ago()));
        }
        self.entries.insert(path.into(), (content, when));
        self
    }

    /// The files that were opened since the last call.
    pub(super) fn opened(&self) -> Vec<PathBuf> {
        let mut opened = std::mem::take(&mut *self.opened.lock().unwrap());
        opened.sort();
        opened
    }

    /// Path, kind and bytes of everything, as a restore would have them.
    pub(super) fn expected(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let bytes = |content: &Content| match content {
            Content::Dir => b"dir".to_vec(),
            Content::Link(target) => target.as_bytes().to_vec(),
            Content::File(bytes) => bytes.clone(),
            Content::Resized(size, bytes) => {
                let mut bytes = bytes.clone();
                bytes.resize(*size as usize, 0);
                bytes
            }
            other => panic!("{other:?} cannot be restored"),
        };
        self.entries.iter().map(|(path, (content, _))| (path.clone(), bytes(content))).collect()
    }
}

impl Source for Fake {
    fn listing_began(&self) -> SystemTime {
        self.began
    }

    fn entries(&self) -> Box<dyn Iterator<Item = Result<SourceEntry, Error>> + Send> {
        let opened = Arc::clone(&self.opened);
        let entries = self.entries.clone().into_iter().map(move |(path, (content, when))| {
            let (name, opened) = (path.clone(), Arc::clone(&opened));
            let kind = content.kind(move || opened.lock().unwrap().push(name));
            Ok(SourceEntry { path, kind, mode: 0o640, uid: 7, gid: 8, mtime: when, ctime: when })
        });
        Box::new(entries)
    }
}

/// A repository in a directory of its own.
#[derive(Debug)]
pub(super) struct Home {
    pub(super) directory: tempfile::TempDir,
    pub(super) files: Arc<LocalFiles>,
    pub(super) secret: Secret,
    pub(super) repository: Repository,
}

/// Small chunks, so that a small amount of data has many.
pub(super) fn settings() -> Settings {
    Settings {
        chunk_size: klio_pg::ByteSize::kib(8),
        pack_size: klio_pg::ByteSize::mib(1),
        ..Settings::default()
    }
}

/// An empty repository, copied from one that is created once: restic's key file costs half a second and 128
/// MiB.
pub(super) fn home() -> Home {
    static EMPTY: OnceLock<(Secret, Vec<(BaseFile, Bytes)>)> = OnceLock::new();
    let directory = tempfile::tempdir().unwrap();
    let files = Arc::new(LocalFiles::new(Arc::new(RealDisk), directory.path().join("base")));
    let (secret, content) = EMPTY.get_or_init(|| {
        let secret = Secret::generate();
        let place = Arc::clone(&files) as Arc<dyn Files>;
        Repository::create(place, &secret, &settings()).unwrap();
        let made = BaseKind::ALL.into_iter().flat_map(|kind| files.list(kind).unwrap());
        (secret, made.map(|(file, _)| (file, files.read(file).unwrap())).collect())
    });
    for (file, bytes) in content {
        files.write(*file, std::slice::from_ref(bytes)).unwrap();
    }
    let repository = Repository::open(Arc::clone(&files) as Arc<dyn Files>, secret).unwrap();
    Home { directory, files, secret: secret.clone(), repository }
}

pub(super) fn meta(name: &str) -> SnapshotMeta {
    SnapshotMeta { cluster: "pg-1".parse().unwrap(), backup: name.parse().unwrap(), began: began() }
}

/// Makes a backup with one part.
pub(super) fn back_up(
    repository: &Repository,
    source: &Fake,
    parent: Option<&SnapshotSummary>,
    name: &str,
) -> (Part, SnapshotSummary) {
    let parent = parent.map(|p| p.id);
    let part = repository.snapshot(source, parent.as_ref(), Arc::new(Silent)).unwrap();
    let summary = repository.assemble(std::slice::from_ref(&part), &meta(name)).unwrap();
    (part, summary)
}

/// Everything in a snapshot, in the form of `Fake::expected`.
pub(super) fn restored(
    repository: &Repository,
    snapshot: &SnapshotSummary,
) -> Result<BTreeMap<PathBuf, Vec<u8>>, Error> {
    let reader = repository.reader(&snapshot.id)?;
    let bytes = |entry: &Entry| match &entry.kind {
        StoredKind::Dir => Ok(b"dir".to_vec()),
        StoredKind::Symlink(target) => Ok(target.as_os_str().as_encoded_bytes().to_vec()),
        StoredKind::File { chunks, .. } => {
            let mut bytes = Vec::new();
            for chunk in chunks {
                bytes.extend_from_slice(&reader.chunk(chunk)?);
            }
            Ok(bytes)
        }
    };
    reader.entries()?.map(|entry| entry.and_then(|e| Ok((e.path.clone(), bytes(&e)?)))).collect()
}

/// Bytes that do not compress, the same for the same seed.
pub(super) fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    use rand::{RngCore, SeedableRng};
    let mut block = vec![0; bytes];
    rand::rngs::StdRng::seed_from_u64(seed).fill_bytes(&mut block);
    block
}
