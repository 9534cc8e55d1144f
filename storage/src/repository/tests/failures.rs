//! REPO3: anything that cannot be read makes the backup fail, and leaves nothing that a reader
//! would take for a backup.

use super::*;
use crate::repository::{Adopted, Progress};
use crate::{Kind, Op};
use std::sync::atomic::{AtomicUsize, Ordering};

fn fails(home: &Home, source: &Fake) -> Error {
    let error = home.repository.snapshot(source, None, Arc::new(Silent)).unwrap_err();
    assert!(home.files.list(BaseKind::Snapshot).unwrap().is_empty());
    error
}

/// rustic_core omits such a file, logs a warning and returns Ok.
#[test]
fn a_read_error_in_the_middle_of_a_file_fails_the_backup() {
    let home = home();
    let broken = Content::Broken(noise(1, 50_000), io::ErrorKind::TimedOut);
    let source = Fake::new().file("data/a", b"a").with("data/b", broken).file("data/c", b"c");
    let error = fails(&home, &source);
    assert_eq!((error.kind, error.op), (Kind::Io, Op::Read));
    assert_eq!(error.place, "data/b");
}

#[test]
fn a_file_that_may_not_be_opened_fails_the_backup() {
    let home = home();
    let closed = Content::Closed(io::ErrorKind::PermissionDenied);
    let error = fails(&home, &Fake::new().file("data/a", b"a").with("data/b", closed));
    assert_eq!((error.kind, error.op, error.place.as_str()), (Kind::Denied, Op::Open, "data/b"));
}

#[test]
fn a_file_that_vanished_is_left_out_and_counted() {
    let home = home();
    let vanished = Content::Closed(io::ErrorKind::NotFound);
    let source = Fake::new().file("data/a", b"a").with("data/b", vanished).file("data/c", b"c");
    let (part, summary) = back_up(&home.repository, &source, None, "one");
    assert_eq!((part.files, part.files_vanished, part.bytes), (2, 1, 2));
    let found = restored(&home.repository, &summary).unwrap();
    let names: Vec<_> = found.keys().map(|path| path.to_str().unwrap()).collect();
    assert_eq!(names, ["data", "data/a", "data/c"]);
}

/// As in PostgreSQL's own base backup (basebackup.c, sendFile).
#[test]
fn a_file_that_grew_is_cut_and_one_that_shrank_is_filled_with_zeros() {
    let home = home();
    let source = Fake::new()
        .with("data/grew", Content::Resized(20_000, noise(1, 30_000)))
        .with("data/shrank", Content::Resized(30_000, noise(2, 20_000)))
        .with("data/shrank-to-a-chunk", Content::Resized(30_000, noise(3, 8192)));
    let (part, summary) = back_up(&home.repository, &source, None, "one");
    assert!(restored(&home.repository, &summary).unwrap() == source.expected());
    assert_eq!((part.files_resized, part.bytes), (2, 80_000));
}

/// A listing in a given order, with an error in it.
struct Listed(Vec<Result<&'static str, Kind>>);

impl Source for Listed {
    fn listing_began(&self) -> SystemTime {
        began()
    }
    fn entries(&self) -> Box<dyn Iterator<Item = Result<SourceEntry, Error>> + Send> {
        let entry = |item| {
            let path: &str = match item {
                Ok(path) => path,
                Err(kind) => return Err(Error::new(kind, Op::List, "data", "made up")),
            };
            let kind = Content::File(b"x".to_vec()).kind(|| {});
            let (mtime, ctime) = (long_ago(), long_ago());
            Ok(SourceEntry { path: path.into(), kind, mode: 0o600, uid: 0, gid: 0, mtime, ctime })
        };
        Box::new(self.0.clone().into_iter().map(entry))
    }
}

#[test]
fn a_listing_that_fails_or_is_not_sorted_or_leaves_the_root_fails_the_backup() {
    let home = home();
    for (listed, kind) in [
        (vec![Ok("data/a"), Err(Kind::Denied), Ok("data/b")], Kind::Denied),
        (vec![Ok("data/b"), Ok("data/a")], Kind::Invalid),
        (vec![Ok("data/a/x"), Ok("data/b"), Ok("data/a/y")], Kind::Invalid),
        (vec![Ok("data/a"), Ok("data/a")], Kind::Invalid),
        (vec![Ok("/etc/passwd")], Kind::Invalid),
        (vec![Ok("data/../../x")], Kind::Invalid),
    ] {
        let text = format!("{listed:?}");
        let error = home.repository.snapshot(&Listed(listed), None, Arc::new(Silent)).unwrap_err();
        assert_eq!(error.kind, kind, "{text}: {error}");
    }
    assert!(home.files.list(BaseKind::Snapshot).unwrap().is_empty());
}

/// Fails all writes after the first few, with an error of its own kind.
#[derive(Debug)]
struct FullAfter {
    inner: Arc<LocalFiles>,
    writes_left: AtomicUsize,
}

impl Files for FullAfter {
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
        let left =
            self.writes_left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
        if left.is_err() {
            return Err(Error::new(Kind::Full, Op::Write, file.relative(), "no space left"));
        }
        self.inner.write(file, parts)
    }
    fn remove(&self, file: BaseFile) -> Result<(), Error> {
        self.inner.remove(file)
    }
}

#[test]
fn a_write_that_fails_ends_the_backup_early_with_its_own_kind_and_the_next_run_uses_what_was_sent()
{
    let home = home();
    let mut source = Fake::new();
    for n in 0..80 {
        source = source.file(&format!("data/{n:03}"), &noise(n, 256 << 10));
    }
    for writes in [0, 1, 4] {
        let files =
            FullAfter { inner: Arc::clone(&home.files), writes_left: AtomicUsize::new(writes) };
        let repository = home.repository.with_files(Arc::new(files));
        let error = repository.snapshot(&source, None, Arc::new(Silent)).unwrap_err();
        assert_eq!(error.kind, Kind::Full, "{error}");
        assert!(source.opened().len() < 64, "it went on reading after write {writes}");
        assert!(home.files.list(BaseKind::Snapshot).unwrap().is_empty());
    }
    let (part, summary) = back_up(&home.repository, &source, None, "one");
    assert_eq!(part.files, 80);
    assert!(restored(&home.repository, &summary).unwrap() == source.expected());
}

/// Stores every pack but no index file, like a backup that was killed.
#[derive(Debug)]
struct KilledBeforeIndex(Arc<LocalFiles>);

impl Files for KilledBeforeIndex {
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
        self.0.read_range(file, offset, length)
    }
    fn write(&self, file: BaseFile, parts: &[Bytes]) -> Result<(), Error> {
        if file.kind == BaseKind::Index {
            return Err(Error::new(Kind::Transient, Op::Write, file.relative(), "killed"));
        }
        self.0.write(file, parts)
    }
    fn remove(&self, file: BaseFile) -> Result<(), Error> {
        self.0.remove(file)
    }
}

#[test]
fn what_a_killed_backup_sent_is_adopted_and_not_sent_again() {
    let mut home = home();
    let mut source = Fake::new();
    for n in 0..40 {
        source = source.file(&format!("data/{n:03}"), &noise(n, 1 << 20));
    }
    let killed = home.repository.with_files(Arc::new(KilledBeforeIndex(Arc::clone(&home.files))));
    killed.snapshot(&source, None, Arc::new(Silent)).unwrap_err();
    assert!(home.files.list(BaseKind::Index).unwrap().is_empty());
    let Adopted { packs, bytes, absent } = home.repository.adopt().unwrap();
    assert_eq!(absent, 0);
    assert!(packs >= 1 && bytes >= 30 << 20, "{packs} packs with {bytes} bytes");
    assert_eq!(home.repository.adopt().unwrap(), Adopted::default(), "once is enough");
    let (part, summary) = back_up(&home.repository, &source, None, "one");
    assert_eq!(part.files_unchanged, 0);
    assert!(part.stored_bytes < 12 << 20, "{} bytes were sent again", part.stored_bytes);
    assert!(restored(&home.repository, &summary).unwrap() == source.expected());
    let silent: Arc<dyn Progress> = Arc::new(Silent);
    assert_eq!(home.repository.check(100.0, &silent).unwrap(), []);
}

#[test]
fn the_same_file_in_two_parts_is_refused() {
    let home = home();
    let part = |bytes: &[u8]| {
        let source = Fake::new().file("data/global/pg_control", bytes);
        home.repository.snapshot(&source, None, Arc::new(Silent)).unwrap()
    };
    let error = home.repository.assemble(&[part(b"1"), part(b"2")], &meta("one")).unwrap_err();
    assert_eq!(error.kind, Kind::Invalid);
    assert!(home.files.list(BaseKind::Snapshot).unwrap().is_empty());
}
