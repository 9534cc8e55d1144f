//! A directory in place of a bucket: which files it returns, and above all when a file counts as absent (P7).

use super::*;
use crate::wal_source::{
    Expected, Fetch, Target,
    testing::{FakeSource, SYSTEM, compress, segment},
};
use klio_storage::{
    crypt::Keys,
    tier2::{Tier2, Tier2Config},
};
use std::{io::Write, path::PathBuf, sync::Arc};

struct Archive {
    directory: tempfile::TempDir,
    wal: FakeSource,
    keys: Keys,
}

impl Archive {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(directory.path().join("pg/wal/00000001")).unwrap();
        let (identity, _) = Keys::generate();
        let keys = Keys::from_text(&identity, &[]).unwrap();
        Self { directory, wal: FakeSource::new(0..1), keys }
    }

    fn path(&self, key: &str) -> PathBuf {
        self.directory.path().join(key)
    }

    /// Stores a file with that many plain bytes.
    fn store(&self, file: WalFile, form: Form, bytes: usize) {
        let (WalFile::Segment(name) | WalFile::Partial(name)) = file else { panic!("{file}") };
        let mut stored = compress(&self.wal.plain(name)[..bytes]);
        if form == Form::Age {
            let mut writer = self.keys.encrypt(Vec::new()).unwrap();
            writer.write_all(&stored).unwrap();
            stored = writer.finish().unwrap();
        }
        std::fs::write(self.path(&file.key_in(&"pg".parse().unwrap(), form)), stored).unwrap();
    }

    fn source(&self, cluster: &str, keys: Option<Keys>) -> FromBucket {
        let url = format!("file://{}", self.directory.path().display());
        let tier2 = Tier2::open(&Tier2Config::new(url)).unwrap();
        FromBucket::new(Bucket { tier2, keys }, cluster.parse().unwrap(), false)
    }

    /// Fetches a file of timeline 1.
    async fn fetch(&self, source: FromBucket, number: u32) -> Result<Vec<u8>, Error> {
        let path = self.path("out");
        let target = Arc::new(Target::create(path.clone()).unwrap());
        let fetch = Fetch {
            source: Arc::new(source),
            file: WalFile::Segment(segment(1, number)),
            expected: Expected { system_identifier: Some(SYSTEM), has_target: false },
        };
        fetch.once(&target, false).await.map(|_| std::fs::read(path).unwrap())
    }
}

#[tokio::test]
async fn both_forms_and_a_partial_segment_are_read() {
    let archive = Archive::new();
    let whole = 1 << 20;
    archive.store(WalFile::Segment(segment(1, 1)), Form::Plain, whole);
    archive.store(WalFile::Segment(segment(1, 2)), Form::Age, whole);
    archive.store(WalFile::Partial(segment(1, 3)), Form::Age, 100_000);
    for (number, bytes) in [(1, whole), (2, whole), (3, 100_000)] {
        let source = archive.source("pg", Some(archive.keys.clone()));
        let found = archive.fetch(source, number).await.unwrap();
        assert_eq!(found.len(), whole);
        assert!(found[..bytes] == archive.wal.plain(segment(1, number))[..bytes], "{number}");
        assert!(found[bytes..].iter().all(|byte| *byte == 0));
    }
}

/// Padded to a whole segment it would look like the end of WAL.
#[tokio::test]
async fn a_partial_segment_before_a_hole_is_for_those_who_know_their_end() {
    let archive = Archive::new();
    archive.store(WalFile::Partial(segment(1, 3)), Form::Plain, 100_000);
    assert!(archive.fetch(archive.source("pg", None), 3).await.is_ok(), "it is the end");
    archive.store(WalFile::Segment(segment(1, 5)), Form::Plain, 1 << 20);
    let error = archive.fetch(archive.source("pg", None), 3).await.unwrap_err();
    assert_eq!(error.failure, Failure::Code(Code::Gap), "{error}");
    let expected = Expected { system_identifier: Some(SYSTEM), has_target: true };
    let target = Arc::new(Target::create(archive.path("with a target")).unwrap());
    let source = Arc::new(archive.source("pg", None));
    let fetch = Fetch { source, file: WalFile::Segment(segment(1, 3)), expected };
    assert!(fetch.once(&target, false).await.is_ok());
}

#[tokio::test]
async fn only_the_end_of_the_archive_is_not_found() {
    let archive = Archive::new();
    for number in [1, 3] {
        archive.store(WalFile::Segment(segment(1, number)), Form::Plain, 1 << 20);
    }
    let failure = async |cluster: &str, number| {
        archive.fetch(archive.source(cluster, None), number).await.unwrap_err().failure
    };
    assert_eq!(failure("pg", 4).await, Failure::Code(Code::NotFound));
    assert_eq!(failure("pg", 2).await, Failure::Code(Code::Unavailable), "a hole");
    assert_eq!(failure("gp", 4).await, Failure::Config, "nothing of that cluster is there");
    std::fs::rename(archive.path("pg"), archive.path("moved")).unwrap();
    assert_ne!(failure("pg", 4).await, Failure::Code(Code::NotFound), "nothing is left");
}

#[tokio::test]
async fn without_the_right_identity_nothing_encrypted_is_read() {
    let archive = Archive::new();
    archive.store(WalFile::Segment(segment(1, 1)), Form::Age, 1 << 20);
    let none = archive.fetch(archive.source("pg", None), 1).await.unwrap_err();
    assert_eq!(none.failure, Failure::Config);
    assert!(none.hint.contains("--identity"), "{none}");
    let (other, _) = Keys::generate();
    let other = Keys::from_text(&other, &[]).unwrap();
    let wrong = archive.fetch(archive.source("pg", Some(other)), 1).await.unwrap_err();
    assert_eq!(wrong.failure, Failure::Code(Code::Forbidden), "{wrong}");
}

/// A file that was stored under another name is not replayed.
#[tokio::test]
async fn a_segment_under_another_name_is_refused() {
    let archive = Archive::new();
    archive.store(WalFile::Segment(segment(1, 1)), Form::Plain, 1 << 20);
    let cluster: ClusterName = "pg".parse().unwrap();
    let key = |number| archive.path(&WalFile::Segment(segment(1, number)).key(&cluster));
    std::fs::rename(key(1), key(2)).unwrap();
    let error = archive.fetch(archive.source("pg", None), 2).await.unwrap_err();
    assert_eq!(error.failure, Failure::Code(Code::Corrupt), "{error}");
}
