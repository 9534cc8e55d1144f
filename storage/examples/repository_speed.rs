//! Measures how fast a directory becomes a snapshot, and how fast the snapshot is read again:
//! `repository_speed DIRECTORY REPOSITORY [raw | pack=MIB | slow=MB_PER_SECOND | write-only]...`.
//!
//! The repository is created if it does not exist, so a second run makes a second backup. `raw` prints what reading,
//! SHA-256 and zstd of the same chunks cost without a repository. `slow` makes writes slow, as over a network: use it
//! to measure the peak memory (`/usr/bin/time -v`).

use bytes::Bytes;
use klio_pg::ByteSize;
use klio_storage::{
    Error,
    disk::RealDisk,
    layout::{BaseFile, BaseKind},
    repository::{
        EntryKind, Files, LocalFiles, Repository, Secret, Settings, Silent, SnapshotMeta, Source,
        SourceEntry, StoredKind,
    },
    tier2::Sha256Sum,
};
use std::{
    error::Error as StdError,
    fs::File,
    io::Read,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

type Outcome<T> = Result<T, Box<dyn StdError + Send + Sync>>;

struct Directory(PathBuf);

impl Source for Directory {
    fn listing_began(&self) -> SystemTime {
        SystemTime::now()
    }

    fn entries(&self) -> Box<dyn Iterator<Item = Result<SourceEntry, Error>> + Send> {
        let mut found = Vec::new();
        walk(&self.0, Path::new(""), &mut found).expect("the directory can be read");
        found.sort_by(|a, b| a.path.cmp(&b.path));
        Box::new(found.into_iter().map(Ok))
    }
}

fn walk(root: &Path, below: &Path, found: &mut Vec<SourceEntry>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(root.join(below))? {
        let path = below.join(entry?.file_name());
        let full = root.join(&path);
        let m = full.symlink_metadata()?;
        let ctime = UNIX_EPOCH + Duration::new(m.ctime() as u64, m.ctime_nsec() as u32);
        let dir = m.is_dir();
        let kind = if dir {
            EntryKind::Dir
        } else if m.is_symlink() {
            EntryKind::Symlink(std::fs::read_link(&full)?)
        } else {
            let open = move || Ok(Box::new(File::open(full)?) as Box<dyn Read + Send>);
            EntryKind::File { size: m.len(), open: Box::new(open) }
        };
        let (mode, uid, gid, mtime) = (m.mode() & 0o7777, m.uid(), m.gid(), m.modified()?);
        found.push(SourceEntry { path: path.clone(), kind, mode, uid, gid, mtime, ctime });
        if dir {
            walk(root, &path, found)?;
        }
    }
    Ok(())
}

fn secret(repository: &Path) -> Outcome<Secret> {
    let file = repository.join("secret.json");
    if !file.exists() {
        std::fs::create_dir_all(repository)?;
        std::fs::write(&file, serde_json::to_vec(&Secret::generate())?)?;
    }
    Ok(serde_json::from_slice(&std::fs::read(&file)?)?)
}

fn main() -> Outcome<()> {
    let arguments: Vec<_> = std::env::args().collect();
    let [_, directory, home, rest @ ..] = arguments.as_slice() else {
        return Err("usage: repository_speed DIRECTORY REPOSITORY [raw]".into());
    };
    let source = Directory(directory.into());
    let option = |name: &str| rest.iter().find_map(|text| text.strip_prefix(name));
    if option("raw").is_some() {
        return raw(&source);
    }
    let home = Path::new(home);
    let inner = LocalFiles::new(Arc::new(RealDisk), home.join("base"));
    let bytes_per_second = option("slow=").map(str::parse::<f64>).transpose()?.map(|mb| mb * 1e6);
    let files = Arc::new(Slow { inner, bytes_per_second });
    let mut settings = Settings::default();
    if let Some(size) = option("pack=") {
        settings.pack_size = ByteSize::mib(size.parse()?);
    }
    let repository = Repository::create(files, &secret(home)?, &settings)?;
    let start = Instant::now();
    let parent = repository.snapshots()?.last().map(|s| s.id);
    let part = repository.snapshot(&source, parent.as_ref(), Arc::new(Silent))?;
    let archived = start.elapsed();
    let cluster = "speed".parse()?;
    let meta = SnapshotMeta { cluster, backup: "speed".parse()?, began: SystemTime::now() };
    let summary = repository.assemble(&[part], &meta)?;
    println!(
        "archive {:.2} s, assemble {:.2} s: {} files, {} MB, {} MB added, {} MB stored",
        archived.as_secs_f64(),
        (start.elapsed() - archived).as_secs_f64(),
        summary.files,
        summary.bytes / 1_000_000,
        summary.added_bytes / 1_000_000,
        summary.stored_bytes / 1_000_000
    );
    if option("write-only").is_some() {
        return Ok(());
    }
    let reader = repository.reader(&summary.id)?;
    let start = Instant::now();
    let mut chunks = Vec::new();
    for entry in reader.entries()? {
        if let StoredKind::File { chunks: ids, .. } = entry?.kind {
            chunks.extend(ids);
        }
    }
    let (next, bytes) = (AtomicUsize::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(id) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let chunk = reader.chunk(id).expect("the repository is sound");
                    bytes.fetch_add(chunk.len() as u64, Ordering::Relaxed);
                }
            });
        }
    });
    let seconds = start.elapsed().as_secs_f64();
    let megabytes = bytes.into_inner() / 1_000_000;
    println!("read back {megabytes} MB in {seconds:.2} s with 2 threads");
    Ok(())
}

/// Local files at the speed of a network.
#[derive(Debug)]
struct Slow {
    inner: LocalFiles,
    bytes_per_second: Option<f64>,
}

impl Files for Slow {
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
        self.inner.read_range(file, offset, length)
    }
    fn write(&self, file: BaseFile, parts: &[Bytes]) -> Result<(), Error> {
        if let Some(speed) = self.bytes_per_second {
            let bytes: usize = parts.iter().map(Bytes::len).sum();
            std::thread::sleep(Duration::from_secs_f64(bytes as f64 / speed));
        }
        self.inner.write(file, parts)
    }
    fn remove(&self, file: BaseFile) -> Result<(), Error> {
        self.inner.remove(file)
    }
}

fn raw(source: &Directory) -> Outcome<()> {
    let (mut reading, mut hashing, mut packing) = (Duration::ZERO, Duration::ZERO, Duration::ZERO);
    let mut zstd = zstd::bulk::Compressor::new(1)?;
    let mut block = vec![0; 128 << 10];
    for entry in source.entries() {
        let EntryKind::File { open, .. } = entry?.kind else { continue };
        let mut file = open()?;
        loop {
            let start = Instant::now();
            let mut got = 0;
            while got < block.len() {
                match file.read(&mut block[got..])? {
                    0 => break,
                    n => got += n,
                }
            }
            reading += start.elapsed();
            if got == 0 {
                break;
            }
            let start = Instant::now();
            std::hint::black_box(Sha256Sum::of(&block[..got]));
            hashing += start.elapsed();
            let start = Instant::now();
            std::hint::black_box(zstd.compress(&block[..got])?);
            packing += start.elapsed();
        }
    }
    println!("one thread: read {reading:.2?}, sha256 {hashing:.2?}, zstd {packing:.2?}");
    Ok(())
}
