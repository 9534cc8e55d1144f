//! What every place for repository files guarantees: tier 1, the bucket, both together, and with windows.

use super::*;
use crate::{
    Kind,
    repository::{BucketFiles, Tiered, Windowed},
    tier2::{Sha256Sum, Tier2, Tier2Config},
};
use klio_pg::ByteSize;

fn named(kind: BaseKind, bytes: &[u8]) -> BaseFile {
    match kind {
        BaseKind::Config => BaseFile::CONFIG,
        _ => BaseFile { kind, id: Sha256Sum::of(bytes) },
    }
}

fn sorted(files: &dyn Files, kind: BaseKind) -> Vec<(BaseFile, u64)> {
    let mut listed = files.list(kind).unwrap();
    listed.sort();
    listed
}

/// The test suite; `files` must be empty.
fn keeps_its_promises(files: &dyn Files) {
    for kind in BaseKind::ALL {
        assert_eq!(files.list(kind).unwrap(), [], "an empty place is an empty list");
    }
    for kind in BaseKind::ALL {
        let bytes = noise(kind as u64, 70_000);
        let file = named(kind, &bytes);
        missing(files, file);
        let parts: Vec<_> = bytes.chunks(20_000).map(Bytes::copy_from_slice).collect();
        files.write(file, &parts).unwrap();
        files.write(file, &[bytes.clone().into()]).unwrap();
        assert_eq!(files.read(file).unwrap(), bytes);
        ranges(files, file, &bytes);
        assert_eq!(sorted(files, kind), [(file, 70_000)]);

        let other = noise(99, 70_000);
        let kind_of_refusal = files.write(file, &[other.into()]).unwrap_err().kind;
        let expected = if kind == BaseKind::Config { Kind::Conflict } else { Kind::Corrupt };
        assert_eq!(kind_of_refusal, expected, "{kind:?}");
        assert_eq!(files.read(file).unwrap(), bytes);

        files.remove(file).unwrap();
        files.remove(file).unwrap();
        missing(files, file);
    }
    many(files);
}

fn missing(files: &dyn Files, file: BaseFile) {
    assert_eq!(files.read(file).unwrap_err().kind, Kind::NotFound);
    assert_eq!(files.read_range(file, 0, 10).unwrap_err().kind, Kind::NotFound);
}

fn ranges(files: &dyn Files, file: BaseFile, bytes: &[u8]) {
    let end = bytes.len() as u64;
    for (offset, length) in
        [(0, end), (0, 1), (end - 1, 1), (9_000, 30_000), (16_384, 16_384), (5, 0)]
    {
        let found = files.read_range(file, offset, length).unwrap();
        assert_eq!(found, bytes[offset as usize..(offset + length) as usize], "{offset} {length}");
    }
    for (offset, length) in [(0, end + 1), (end, 1), (end + 5, 1), (end - 1, 2)] {
        let error = files.read_range(file, offset, length).unwrap_err();
        assert_eq!(error.kind, Kind::Corrupt, "{offset} {length}: {error}");
    }
}

fn many(files: &dyn Files) {
    let mut expected = Vec::new();
    for n in 0..20 {
        let bytes = noise(1000 + n, 100 + n as usize);
        let file = named(BaseKind::Data, &bytes);
        files.write(file, &[bytes.into()]).unwrap();
        expected.push((file, 100 + n));
    }
    expected.sort();
    assert_eq!(sorted(files, BaseKind::Data), expected);
    assert_eq!(files.list(BaseKind::Index).unwrap(), []);
}

fn local(directory: &Path) -> LocalFiles {
    LocalFiles::new(Arc::new(RealDisk), directory.join("base"))
}

fn directory_bucket(directory: &Path, runtime: &tokio::runtime::Runtime) -> BucketFiles {
    let config = Tier2Config::new(url::Url::from_file_path(directory).unwrap());
    let tier2 = Tier2::open(&config).unwrap();
    BucketFiles::new(tier2, "pg-1".parse().unwrap(), runtime.handle().clone())
}

#[test]
fn tier_1_keeps_its_promises() {
    let directory = tempfile::tempdir().unwrap();
    keeps_its_promises(&local(directory.path()));
}

#[test]
fn a_bucket_over_s3_keeps_its_promises() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let s3 = runtime.block_on(crate::tier2::tests::s3::S3::start());
    let tier2 = crate::tier2::tests::open(&s3);
    keeps_its_promises(&BucketFiles::new(tier2, "pg-1".parse().unwrap(), runtime.handle().clone()));
}

#[test]
fn a_bucket_that_is_a_directory_keeps_its_promises() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let directory = tempfile::tempdir().unwrap();
    keeps_its_promises(&directory_bucket(directory.path(), &runtime));
}

#[test]
fn both_tiers_together_keep_their_promises() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let directories = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let bucket = Arc::new(directory_bucket(directories[1].path(), &runtime));
    keeps_its_promises(&Tiered::new(Arc::new(local(directories[0].path())), bucket));
}

#[test]
fn windows_keep_the_promises_of_what_is_below() {
    for (window, budget) in [(4096, 8192), (16_384, 1 << 20), (1 << 20, 1)] {
        let directory = tempfile::tempdir().unwrap();
        let (window, budget) = (ByteSize::new(window), ByteSize::new(budget));
        keeps_its_promises(&Windowed::new(local(directory.path()), window, budget));
    }
}

#[test]
fn what_tier_1_lost_is_read_from_the_bucket_and_removed_from_both() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let directories = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let near = Arc::new(local(directories[0].path()));
    let far = Arc::new(directory_bucket(directories[1].path(), &runtime));
    let tiered = Tiered::new(near.clone(), far.clone());
    let [only_near, only_far, both] = [1, 2, 3].map(|seed| noise(seed, 5000));
    let name = |bytes: &[u8]| named(BaseKind::Data, bytes);
    near.write(name(&only_near), &[only_near.clone().into()]).unwrap();
    far.write(name(&only_far), &[only_far.clone().into()]).unwrap();
    for files in [near.as_ref() as &dyn Files, far.as_ref()] {
        files.write(name(&both), &[both.clone().into()]).unwrap();
    }
    assert_eq!(tiered.list(BaseKind::Data).unwrap().len(), 3);
    for bytes in [&only_near, &only_far, &both] {
        assert_eq!(tiered.read(name(bytes)).unwrap(), bytes);
        assert_eq!(tiered.read_range(name(bytes), 10, 100).unwrap(), bytes[10..110]);
        tiered.remove(name(bytes)).unwrap();
    }
    assert_eq!(near.list(BaseKind::Data).unwrap(), []);
    assert_eq!(far.list(BaseKind::Data).unwrap(), []);
}

#[test]
fn a_damaged_file_of_tier_1_is_replaced_when_the_right_bytes_come_again() {
    let directory = tempfile::tempdir().unwrap();
    let files = local(directory.path());
    let bytes = noise(1, 100_000);
    let file = named(BaseKind::Data, &bytes);
    files.write(file, &[bytes.clone().into()]).unwrap();
    let mut bad = bytes.clone();
    bad[70_000] ^= 1;
    std::fs::write(files.path(file), bad).unwrap();
    files.write(file, &[bytes.clone().into()]).unwrap();
    assert_eq!(files.read(file).unwrap(), bytes);
}

/// Counts the reads that reach the inner files.
#[derive(Debug)]
struct Counted(LocalFiles, Mutex<Vec<u64>>);

impl Files for Counted {
    fn place(&self) -> String {
        self.0.place()
    }
    fn list(&self, kind: BaseKind) -> Result<Vec<(BaseFile, u64)>, Error> {
        self.0.list(kind)
    }
    fn read(&self, file: BaseFile) -> Result<Bytes, Error> {
        self.0.read(file)
    }
    fn read_range(&self, file: BaseFile, offset: u64, length: u64) -> Result<Bytes, Error> {
        self.1.lock().unwrap().push(length);
        self.0.read_range(file, offset, length)
    }
    fn write(&self, file: BaseFile, parts: &[Bytes]) -> Result<(), Error> {
        self.0.write(file, parts)
    }
    fn remove(&self, file: BaseFile) -> Result<(), Error> {
        self.0.remove(file)
    }
}

#[test]
fn many_small_reads_become_few_large_ones_also_from_many_threads() {
    let directory = tempfile::tempdir().unwrap();
    let bytes = noise(1, 1_000_000);
    let file = named(BaseKind::Data, &bytes);
    let below = local(directory.path());
    below.write(file, &[bytes.clone().into()]).unwrap();
    let counted = Counted(below, Mutex::default());
    let files = Windowed::new(counted, ByteSize::kib(256), ByteSize::mib(1));
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let (files, bytes) = (&files, &bytes);
            scope.spawn(move || {
                for at in (thread * 1000..990_000).step_by(4000) {
                    let found = files.read_range(file, at, 5000).unwrap();
                    assert_eq!(found, bytes[at as usize..at as usize + 5000]);
                }
            });
        }
    });
    let reads = files.inner().1.lock().unwrap().clone();
    assert_eq!(reads.len(), 4, "{reads:?}");
    assert_eq!(reads.iter().sum::<u64>(), 1_000_000);
}

#[test]
fn windows_beyond_the_budget_are_dropped_oldest_first() {
    let directory = tempfile::tempdir().unwrap();
    let bytes = noise(1, 40_960);
    let file = named(BaseKind::Data, &bytes);
    let below = local(directory.path());
    below.write(file, &[bytes.into()]).unwrap();
    let files = Windowed::new(Counted(below, Mutex::default()), ByteSize::kib(4), ByteSize::kib(8));
    let read = |window: u64| drop(files.read_range(file, window * 4096, 10).unwrap());
    for window in [0, 1, 0, 2, 0, 1] {
        read(window);
    }
    // Window 2 displaced 1, because 0 was used after it; then 1 was read again.
    assert_eq!(files.inner().1.lock().unwrap().len(), 4);
}
