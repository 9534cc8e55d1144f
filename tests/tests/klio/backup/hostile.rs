//! P13: a client with a valid certificate, the repository's key and any intent, against the real server. Whatever it sends, in
//! whatever order, every earlier backup restores byte for byte, the next one is whole, and nothing half is left.

use klio_pg::Lsn;
use klio_proto::{Code, v1::FileKind};
use klio_storage::{
    Error, Kind, Op,
    catalog::VerifyOutcome,
    disk::RealDisk,
    layout::{BaseFile, BaseKind},
    repository::{
        EntryKind, Files, Forge, ForgedPiece, LocalFiles, Repository, Secret, Silent, SnapshotId,
        SnapshotMeta, Source, SourceEntries, SourceEntry, StoredKind,
    },
    tier2::Sha256Sum,
};
use klio_tests::{
    base_client::{Base, record},
    client::{self, Stream},
    env, install_crypto,
    site::Site,
};
use rand::{Rng, RngCore, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    io::Cursor,
    path::{Path, PathBuf},
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};
use tokio::runtime::Handle;
use tonic::Status;

const START: Lsn = Lsn::new(16 << 20);
const STEPS: usize = 60;

/// A server, and the cluster's one certificate, which both the honest client and the hostile one have.
struct Setup {
    site: Site,
    base: Base,
    secret: Secret,
    forge: Forge,
    honest: Vec<(SnapshotId, BTreeMap<PathBuf, Vec<u8>>)>,
    _stream: Stream,
}

impl Setup {
    async fn new() -> Self {
        install_crypto();
        let mut site = Site::new().await;
        for (name, value) in [
            ("KLIO_MAINTENANCE__ENABLED", "false"),
            ("KLIO_MAINTENANCE__KEEP_MARKED_SECONDS", "0"),
            ("KLIO_VERIFY__AFTER_BACKUP", "false"),
            ("KLIO_RETENTION__TIER2__LAST", "999"),
            ("KLIO_BASE__CHUNK_SIZE", "8192"),
            ("KLIO_BASE__PACK_SIZE", "1048576"),
        ] {
            site.set(name, value);
        }
        site.start().await;
        let channel = client::connect(&site, &site.bundle()).await.expect("connect");
        let base = Base::new(&channel, "main");
        let secret = base.open().await.expect("a repository");
        let _stream = base.stream_wal(&channel, START, 65_536).await;
        let forge = Forge::new(&secret).expect("a secret");
        Self { site, base, secret, forge, honest: Vec::new(), _stream }
    }

    /// A backup as klio takes it: it builds on what the server says that it has.
    async fn back_up(&mut self) {
        let name = format!("h{}", self.honest.len());
        let lease = self.base.reserve_backup(&name).await;
        let files: Arc<dyn Files> = Arc::new(Remote(self.base.clone(), Handle::current()));
        let (secret, content, label) =
            (self.secret.clone(), content(self.honest.len()), name.clone());
        let source = Tree(content.clone());
        let made = tokio::task::spawn_blocking(move || {
            let mut repository = Repository::open(files, &secret).expect("open");
            repository.adopt().expect("adopt");
            let part = repository.snapshot(&source, None, Arc::new(Silent)).expect("archive");
            let meta = SnapshotMeta {
                cluster: "main".parse().expect("a name"),
                backup: label.parse().expect("a name"),
                began: SystemTime::now(),
            };
            repository.assemble(&[part], &meta).expect("assemble")
        });
        let id = made.await.expect("archived").id;
        let start = START.advance(8192);
        let record = record(&name, id.to_string(), start, start.advance(8192));
        self.base.commit(&record).await.expect("committed");
        drop(lease);
        self.honest.push((id, content));
    }

    fn directory(&self) -> PathBuf {
        self.site.tier1().join("main/base")
    }

    /// Every honest backup is what it was.
    async fn require_all(&self, after: &str) {
        let (directory, secret, honest) =
            (self.directory(), self.secret.clone(), self.honest.clone());
        let checked = tokio::task::spawn_blocking(move || {
            let files = Arc::new(LocalFiles::new(Arc::new(RealDisk), directory));
            let repository = Repository::open(files, &secret).expect("open");
            for (number, (id, expected)) in honest.iter().enumerate() {
                let found = restored(&repository, id).map_err(|e| format!("h{number}: {e}"))?;
                if found != *expected {
                    return Err(format!("h{number}: other bytes"));
                }
            }
            Ok(())
        });
        if let Err(why) = checked.await.expect("no panic") {
            panic!("after {after}: {why}\n{}", self.site.log());
        }
    }

    /// Twice: what the first marks the second removes.
    async fn maintain(&self) {
        for _ in 0..2 {
            let outcome = self.site.klio(None, &["retention", "apply", "--json"]).await;
            assert_eq!(
                outcome.code,
                Some(0),
                "{}{}\n{}",
                outcome.stdout,
                outcome.stderr,
                self.site.log()
            );
        }
    }

    async fn verify(&self) -> (i32, VerifyOutcome) {
        let args = ["verify", "--read-data", "all", "--json"];
        let outcome = self.site.klio(None, &args).await;
        let found = serde_json::from_str(&outcome.stdout).expect("an outcome");
        (outcome.code.expect("an exit status"), found)
    }

    async fn put(&self, kind: BaseKind, bytes: &[u8]) -> Result<bool, Status> {
        self.base.put(BaseFile { kind, id: Sha256Sum::of(bytes) }, bytes).await
    }

    async fn put_index(&self, index: &Value) -> Result<bool, Status> {
        let sealed = self.forge.seal(index.to_string().as_bytes()).expect("sealed");
        self.put(BaseKind::Index, &sealed).await
    }

    /// What the indexes say.
    async fn packs(&self) -> Vec<Value> {
        let mut packs = Vec::new();
        for (id, _) in self.base.list(FileKind::Index).await.expect("a list") {
            let file = BaseFile { kind: BaseKind::Index, id: id.parse().expect("an id") };
            let sealed = self.base.get(file, 0, 0).await.expect("an index");
            let index = self.forge.open(&sealed).expect("an index");
            packs.extend(index["packs"].as_array().expect("packs").clone());
        }
        packs
    }

    fn temporary(&self) -> Vec<PathBuf> {
        fn walk(directory: &Path, found: &mut Vec<PathBuf>) {
            for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
                match entry.path() {
                    path if path.is_dir() => walk(&path, found),
                    path if path.extension().is_some() => found.push(path),
                    _ => {}
                }
            }
        }
        let mut found = Vec::new();
        walk(&self.directory(), &mut found);
        found
    }
}

/// What a backup holds: most of it is the same in all.
fn content(number: usize) -> BTreeMap<PathBuf, Vec<u8>> {
    let noise = |seed: u64, bytes: usize| {
        let mut block = vec![0; bytes];
        StdRng::seed_from_u64(seed).fill_bytes(&mut block);
        block
    };
    let seed = number as u64;
    [
        ("data/base/1", noise(77, 400_000)),
        ("data/base/2", noise(1000 + seed, 60_000)),
        ("data/base/3", noise(2000 + seed / 3, 60_000)),
        ("data/label", format!("h{number}").into_bytes()),
    ]
    .map(|(path, bytes)| (path.into(), bytes))
    .into()
}

fn restored(repository: &Repository, id: &SnapshotId) -> Result<BTreeMap<PathBuf, Vec<u8>>, Error> {
    let reader = repository.reader(id)?;
    let mut found = BTreeMap::new();
    for entry in reader.entries()? {
        let entry = entry?;
        if let StoredKind::File { chunks, .. } = &entry.kind {
            let mut bytes = Vec::new();
            for chunk in chunks {
                bytes.extend_from_slice(&reader.chunk(chunk)?);
            }
            found.insert(entry.path, bytes);
        }
    }
    Ok(found)
}

struct Tree(BTreeMap<PathBuf, Vec<u8>>);

impl Source for Tree {
    fn listing_began(&self) -> SystemTime {
        UNIX_EPOCH
    }

    fn entries(&self) -> SourceEntries {
        let files: Vec<_> = self.0.clone().into_iter().collect();
        let entry = |(path, bytes): (PathBuf, Vec<u8>)| SourceEntry {
            path,
            kind: EntryKind::File {
                size: bytes.len() as u64,
                open: Box::new(move || Ok(Box::new(Cursor::new(bytes)) as _)),
            },
            mode: 0o600,
            uid: 0,
            gid: 0,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
        };
        Box::new(files.into_iter().map(move |file| Ok(entry(file))))
    }
}

/// The server's files as a sidecar has them.
struct Remote(Base, Handle);

impl std::fmt::Debug for Remote {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Remote")
    }
}

fn failed(op: Op, file: BaseFile, status: &Status) -> Error {
    let kind = match Code::of(status) {
        Code::NotFound => Kind::NotFound,
        Code::Corrupt => Kind::Corrupt,
        _ => Kind::Io,
    };
    Error::new(kind, op, file.relative(), status.message())
}

impl Files for Remote {
    fn place(&self) -> String {
        "the server".into()
    }

    fn list(&self, kind: BaseKind) -> Result<Vec<(BaseFile, u64)>, Error> {
        let wire = match kind {
            BaseKind::Config => FileKind::Config,
            BaseKind::Key => FileKind::Key,
            BaseKind::Data => FileKind::Data,
            BaseKind::Index => FileKind::Index,
            BaseKind::Snapshot => FileKind::Snapshot,
        };
        let listed = self.1.block_on(self.0.list(wire));
        let listed = listed.map_err(|status| failed(Op::List, BaseFile::CONFIG, &status))?;
        let file = |id: String| match kind {
            BaseKind::Config => BaseFile::CONFIG,
            _ => BaseFile { kind, id: id.parse().expect("an id") },
        };
        Ok(listed.into_iter().map(|(id, size)| (file(id), size)).collect())
    }

    fn read(&self, file: BaseFile) -> Result<bytes::Bytes, Error> {
        let read = self.1.block_on(self.0.get(file, 0, 0));
        read.map(Into::into).map_err(|status| failed(Op::Read, file, &status))
    }

    fn read_range(&self, file: BaseFile, offset: u64, length: u64) -> Result<bytes::Bytes, Error> {
        let read = self.1.block_on(self.0.get(file, offset, length));
        read.map(Into::into).map_err(|status| failed(Op::Read, file, &status))
    }

    fn write(&self, file: BaseFile, parts: &[bytes::Bytes]) -> Result<(), Error> {
        let stored = self.1.block_on(self.0.put(file, &parts.concat()));
        stored.map(drop).map_err(|status| failed(Op::Write, file, &status))
    }

    fn remove(&self, file: BaseFile) -> Result<(), Error> {
        Err(Error::new(Kind::Denied, Op::Remove, file.relative(), "a client does not remove"))
    }
}

/// What can be tried; those that a server takes do no harm.
const MOVES: [&str; 14] = [
    "garbage pack",
    "garbage pack and an index that names existing chunks in it",
    "pack whose list names existing chunks for other bytes",
    "good pack and an index that names existing chunks in it",
    "index that names existing packs with other offsets",
    "index that supersedes the others",
    "index that marks all packs for removal",
    "index of packs that nobody has",
    "second copy of existing chunks",
    "snapshot of an earlier tree",
    "snapshot of a tree that nobody has",
    "upload that ends half way",
    "replayed index",
    "config and keys",
];

/// Which of them a server may take: they say nothing that is not so.
const TRUE: [&str; 3] =
    ["second copy of existing chunks", "snapshot of an earlier tree", "replayed index"];

impl Setup {
    async fn attack(&self, what: &str, random: &mut StdRng) -> Result<bool, Status> {
        let packs = self.packs().await;
        let victim = packs.choose(random).expect("a pack").clone();
        let mut garbage = vec![0; random.random_range(1..60_000)];
        random.fill_bytes(&mut garbage);
        match what {
            "garbage pack" => self.put(BaseKind::Data, &garbage).await,
            "garbage pack and an index that names existing chunks in it" => {
                // As wire/poison.py does it.
                let taken = self.put(BaseKind::Data, &garbage).await;
                let claim = json!({"id": Sha256Sum::of(&garbage), "blobs": victim["blobs"]});
                let index = self.put_index(&json!({"packs": [claim]})).await;
                taken.and(index)
            }
            "pack whose list names existing chunks for other bytes" => {
                let id = victim["blobs"][0]["id"].as_str().expect("an id").parse().expect("an id");
                let tree = victim["blobs"][0]["type"] == "tree";
                let lie = ForgedPiece { id, tree, ..ForgedPiece::good(&garbage) };
                let (pack, entry) = self.forge.pack(&[lie]).expect("a pack");
                let taken = self.put(BaseKind::Data, &pack).await;
                let index = self.put_index(&json!({"packs": [entry]})).await;
                taken.and(index)
            }
            "good pack and an index that names existing chunks in it" => {
                let (pack, mut entry) =
                    self.forge.pack(&[ForgedPiece::good(&garbage)]).expect("a pack");
                self.put(BaseKind::Data, &pack).await.expect("a good pack is taken");
                entry["blobs"][0]["id"] = victim["blobs"][0]["id"].clone();
                self.put_index(&json!({"packs": [entry]})).await
            }
            "index that names existing packs with other offsets" => {
                let mut moved = victim.clone();
                let blob = &mut moved["blobs"][0];
                blob["offset"] = (blob["offset"].as_u64().expect("a number") + 1).into();
                self.put_index(&json!({"packs": [moved]})).await
            }
            "index that supersedes the others" => {
                let all = self.base.list(FileKind::Index).await.expect("a list");
                let ids: Vec<String> = all.into_iter().map(|(id, _)| id).collect();
                self.put_index(&json!({"packs": [victim], "supersedes": ids})).await
            }
            "index that marks all packs for removal" => {
                self.put_index(&json!({"packs": [], "packs_to_delete": packs})).await
            }
            "index of packs that nobody has" => {
                let claim = json!({"id": Sha256Sum::of(&garbage), "blobs": victim["blobs"]});
                self.put_index(&json!({"packs": [claim]})).await
            }
            "second copy of existing chunks" => {
                let bytes = content(0)[Path::new("data/base/1")].clone();
                let from = random.random_range(0..40) * 8192;
                let pieces: Vec<_> =
                    bytes[from..from + 65_536].chunks(8192).map(ForgedPiece::good).collect();
                let (pack, entry) = self.forge.pack(&pieces).expect("a pack");
                self.put(BaseKind::Data, &pack).await?;
                self.put_index(&json!({"packs": [entry]})).await
            }
            "snapshot of an earlier tree" | "snapshot of a tree that nobody has" => {
                let file = self.honest.choose(random).expect("a backup").0.file();
                let sealed = self.base.get(file, 0, 0).await.expect("a snapshot");
                let mut snapshot = self.forge.open(&sealed).expect("a snapshot");
                snapshot["time"] = "2001-01-01T00:00:00Z".into();
                if what.ends_with("nobody has") {
                    snapshot["tree"] = json!(Sha256Sum::of(&garbage));
                }
                let sealed = self.forge.seal(snapshot.to_string().as_bytes()).expect("sealed");
                self.put(BaseKind::Snapshot, &sealed).await
            }
            "upload that ends half way" => {
                let file = BaseFile { kind: BaseKind::Data, id: Sha256Sum::of(&garbage) };
                self.base.put_as(file, garbage.len() as u64 + 1, &garbage).await
            }
            "replayed index" => {
                let all = self.base.list(FileKind::Index).await.expect("a list");
                let id = all.choose(random).expect("an index").0.parse().expect("an id");
                let file = BaseFile { kind: BaseKind::Index, id };
                let bytes = self.base.get(file, 0, 0).await.expect("an index");
                self.base.put(file, &bytes).await
            }
            _ => {
                let config = self.base.get(BaseFile::CONFIG, 0, 0).await.expect("the config");
                let key = self.put(BaseKind::Key, &garbage).await;
                self.base.put(BaseFile::CONFIG, &config).await.and(key)
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_a_hostile_client_sends_every_backup_restores() {
    let mut setup = Setup::new().await;
    let mut random = StdRng::seed_from_u64(env::seed());
    setup.back_up().await;
    setup.back_up().await;
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    for step in 0..STEPS {
        // Each of them once, then as it comes.
        let any = MOVES.choose(&mut random).unwrap();
        let what = MOVES.get(step).unwrap_or(any);
        let lease = setup.base.reserve_backup(&format!("x{step}")).await;
        let result = setup.attack(what, &mut random).await;
        drop(lease);
        *seen.entry(what).or_default() += 1;
        match (&result, TRUE.contains(what)) {
            (Ok(_), true) => {}
            (Err(status), false) => {
                assert!(
                    matches!(Code::of(status), Code::Invalid | Code::Forbidden),
                    "{what}: {status:?}"
                );
            }
            _ => panic!("step {step}: {what}: {result:?}"),
        }
        if random.random_bool(0.2) {
            setup.maintain().await;
            setup.require_all(&format!("step {step}, {what}, and maintenance")).await;
        }
        if random.random_bool(0.2) {
            setup.back_up().await;
        }
    }
    assert_eq!(seen.len(), MOVES.len());
    setup.maintain().await;
    setup.back_up().await;
    setup.require_all("all of it").await;
    let (code, outcome) = setup.verify().await;
    assert_eq!((code, outcome.ok), (0, true), "{outcome:?}");
    assert_eq!(setup.temporary(), [] as [PathBuf; 0]);
    let problems = setup.base.backups().await.expect("a list").problems;
    assert_eq!(problems, [] as [String; 0]);
}

/// Without a reservation nothing is taken, whatever it is, and a reservation that ended is none.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_taken_outside_a_reservation() {
    let mut setup = Setup::new().await;
    setup.back_up().await;
    let mut random = StdRng::seed_from_u64(env::seed());
    for what in TRUE {
        let refused = setup.attack(what, &mut random).await.expect_err(what);
        assert_eq!(Code::of(&refused), Code::Unavailable, "{what}: {refused:?}");
    }
    setup.require_all("attacks outside a reservation").await;
}

/// Ten trees of which each holds the next one thirty times over are a directory of 30 to the 10th files.
#[tokio::test(flavor = "multi_thread")]
async fn a_directory_without_end_is_read_once() {
    let mut setup = Setup::new().await;
    setup.back_up().await;
    let (mut tree, mut pieces) = (json!({"nodes": []}).to_string(), Vec::new());
    for _ in 0..10 {
        let id = Sha256Sum::of(tree.as_bytes());
        pieces.push(ForgedPiece { tree: true, ..ForgedPiece::good(tree.as_bytes()) });
        let nodes: Vec<Value> = (0..30)
            .map(|n| json!({"name": format!("{n:02}"), "type": "dir", "subtree": id}))
            .collect();
        tree = json!({"nodes": nodes}).to_string();
    }
    pieces.push(ForgedPiece { tree: true, ..ForgedPiece::good(tree.as_bytes()) });
    let (pack, entry) = setup.forge.pack(&pieces).expect("a pack");
    let _lease = setup.base.reserve_backup("x").await;
    setup.put(BaseKind::Data, &pack).await.expect("true, as far as it goes");
    setup.put_index(&json!({"packs": [entry]})).await.expect("true");
    let sealed = setup.base.get(setup.honest[0].0.file(), 0, 0).await.expect("a snapshot");
    let mut snapshot = setup.forge.open(&sealed).expect("a snapshot");
    snapshot["tree"] = json!(Sha256Sum::of(tree.as_bytes()));
    let sealed = setup.forge.seal(snapshot.to_string().as_bytes()).expect("sealed");
    setup.put(BaseKind::Snapshot, &sealed).await.expect("whole");
    drop(_lease);
    setup.maintain().await;
    setup.require_all("a directory without end").await;
}
