//! A raw client of the base-backup service: for saying what no honest sidecar would say.
//!
//! Backups are made for real: by the repository's own code, in a scratch directory, and then put file by file.

use crate::{
    client::{SYSTEM, Stream, open, wal},
    site::PATIENCE,
    wait::eventually,
};
use klio_pg::{Lsn, SegmentSize, TimelineId};
use klio_proto::{
    Code,
    v1::{self, FileKind, base_client::BaseClient, reserve_request::Purpose},
};
use klio_storage::{
    Error,
    catalog::{BackupRecord, Holdings, PagesRecord},
    disk::RealDisk,
    layout::{BaseFile, BaseKind, ClusterName},
    repository::{
        EntryKind, Files, Forge, ForgedPiece, LocalFiles, Repository, Secret, Silent, SnapshotMeta,
        Source, SourceEntry,
    },
    tier2::Sha256Sum,
};
use std::{
    io::Cursor,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tonic::{Status, Streaming, transport::Channel};

/// Bytes of a message of a file.
const PIECE: usize = 1 << 20;

/// The service, for one cluster.
#[derive(Clone)]
pub struct Base {
    /// To call what has no method here.
    pub client: BaseClient<Channel>,
    /// Which cluster is named.
    pub cluster: String,
}

/// The segment size of [`Base::begin_wal`].
///
/// # Panics
/// Never: 1 MiB is one.
#[must_use]
pub fn segment_size() -> SegmentSize {
    SegmentSize::new(1 << 20).expect("1 MiB")
}

/// A file's name on the wire.
#[must_use]
pub fn name_of(file: BaseFile) -> v1::FileName {
    let kind = match file.kind {
        BaseKind::Config => FileKind::Config,
        BaseKind::Key => FileKind::Key,
        BaseKind::Data => FileKind::Data,
        BaseKind::Index => FileKind::Index,
        BaseKind::Snapshot => FileKind::Snapshot,
    };
    let id = if file.kind == BaseKind::Config { String::new() } else { file.id.to_string() };
    v1::FileName { kind: kind.into(), id }
}

/// A data file with these bytes.
#[must_use]
pub fn pack(bytes: &[u8]) -> BaseFile {
    BaseFile { kind: BaseKind::Data, id: Sha256Sum::of(bytes) }
}

/// A pack with these bytes as its only piece, as a server takes it.
///
/// # Panics
/// When the secret is none.
#[must_use]
pub fn real_pack(secret: &Secret, bytes: &[u8]) -> (BaseFile, Vec<u8>) {
    let forge = Forge::new(secret).expect("a secret");
    let piece = ForgedPiece { says: None, ..ForgedPiece::good(bytes) };
    let (sealed, _) = forge.pack(&[piece]).expect("a pack");
    (pack(&sealed), sealed)
}

/// What is asked at first contact.
#[must_use]
pub fn open_request(cluster: &str, system: u64) -> v1::OpenRepositoryRequest {
    v1::OpenRepositoryRequest {
        cluster: cluster.into(),
        system_identifier: system,
        segment_size: segment_size().as_u32(),
        postgres_version: 150_018,
        unproven: false,
    }
}

impl Base {
    /// On this connection.
    #[must_use]
    pub fn new(channel: &Channel, cluster: &str) -> Self {
        Self { client: BaseClient::new(channel.clone()), cluster: cluster.into() }
    }

    /// Opens the repository as the PostgreSQL of [`wal`].
    ///
    /// # Errors
    /// The server's refusal.
    ///
    /// # Panics
    /// When the secret is none.
    pub async fn open(&self) -> Result<Secret, Status> {
        self.open_as(SYSTEM).await
    }

    /// The same as another system; 0 only opens.
    ///
    /// # Errors
    /// The server's refusal.
    ///
    /// # Panics
    /// When the secret is none.
    pub async fn open_as(&self, system: u64) -> Result<Secret, Status> {
        let request = open_request(&self.cluster, system);
        let answer = self.client.clone().open_repository(request).await?.into_inner();
        Ok(serde_json::from_slice(&answer.secret).expect("a secret"))
    }

    /// Puts a file under a name that may be a lie; true when it was there.
    ///
    /// # Errors
    /// The server's refusal.
    pub async fn put(&self, file: BaseFile, bytes: &[u8]) -> Result<bool, Status> {
        self.put_as(file, bytes.len() as u64, bytes).await
    }

    /// The same with a size that may be a lie.
    ///
    /// # Errors
    /// The server's refusal.
    pub async fn put_as(&self, file: BaseFile, size: u64, bytes: &[u8]) -> Result<bool, Status> {
        let mut messages = vec![v1::PutFileRequest {
            cluster: self.cluster.clone(),
            name: Some(name_of(file)),
            size,
            data: bytes::Bytes::new(),
        }];
        messages.extend(bytes.chunks(PIECE).map(|piece| v1::PutFileRequest {
            data: bytes::Bytes::copy_from_slice(piece),
            ..v1::PutFileRequest::default()
        }));
        let answer = self.client.clone().put_file(tokio_stream::iter(messages)).await?;
        Ok(answer.into_inner().existed)
    }

    /// A range of a file; all of it with 0, 0.
    ///
    /// # Errors
    /// The server's refusal.
    ///
    /// # Panics
    /// When a message is larger than promised.
    pub async fn get(&self, file: BaseFile, offset: u64, length: u64) -> Result<Vec<u8>, Status> {
        let name = Some(name_of(file));
        let asked = v1::GetFileRequest { name, offset, length, ..v1::GetFileRequest::default() };
        self.get_part(asked).await
    }

    /// Several ranges of a file, one after the other.
    ///
    /// # Errors
    /// The server's refusal.
    ///
    /// # Panics
    /// When a message is larger than promised.
    pub async fn get_ranges(
        &self,
        file: BaseFile,
        ranges: &[(u64, u64)],
    ) -> Result<Vec<u8>, Status> {
        let range = |&(offset, length): &(u64, u64)| v1::ByteRange { offset, length };
        let (name, ranges) = (Some(name_of(file)), ranges.iter().map(range).collect());
        self.get_part(v1::GetFileRequest { name, ranges, ..v1::GetFileRequest::default() }).await
    }

    async fn get_part(&self, asked: v1::GetFileRequest) -> Result<Vec<u8>, Status> {
        let request = v1::GetFileRequest { cluster: self.cluster.clone(), ..asked };
        let mut stream = self.client.clone().get_file(request).await?.into_inner();
        let mut bytes = Vec::new();
        while let Some(message) = stream.message().await? {
            assert!(message.data.len() <= PIECE, "a message of {} bytes", message.data.len());
            bytes.extend(message.data);
        }
        Ok(bytes)
    }

    /// All files of a kind.
    ///
    /// # Errors
    /// The server's refusal.
    pub async fn list(&self, kind: FileKind) -> Result<Vec<(String, u64)>, Status> {
        let request = v1::ListFilesRequest { cluster: self.cluster.clone(), kind: kind.into() };
        let mut stream = self.client.clone().list_files(request).await?.into_inner();
        let mut files = Vec::new();
        while let Some(message) = stream.message().await? {
            files.extend(message.files.into_iter().map(|f| (f.id, f.size)));
        }
        Ok(files)
    }

    /// Reserves; gives the name and the stream that keeps it.
    ///
    /// # Errors
    /// The server's refusal.
    ///
    /// # Panics
    /// When the server says nothing.
    pub async fn reserve(
        &self,
        purpose: Purpose,
        name: &str,
    ) -> Result<(String, Streaming<v1::ReserveResponse>), Status> {
        let request = v1::ReserveRequest {
            cluster: self.cluster.clone(),
            purpose: purpose.into(),
            backup_name: name.into(),
            resumed: false,
        };
        let mut stream = self.client.clone().reserve(request).await?.into_inner();
        let first = stream.message().await?.expect("a reservation");
        Ok((first.backup_name, stream))
    }

    /// Reserves a backup as soon as an earlier reservation has ended.
    ///
    /// # Panics
    /// When the server refuses.
    pub async fn reserve_backup(&self, name: &str) -> Streaming<v1::ReserveResponse> {
        let reserved = eventually("a reservation", PATIENCE, || async {
            match self.reserve(Purpose::Backup, name).await {
                Ok((_, lease)) => Ok(Ok(lease)),
                Err(status) if Code::of(&status) == Code::Busy => Err(status),
                Err(status) => Ok(Err(status)),
            }
        });
        reserved.await.expect("reserved")
    }

    /// Reserves the record's name and commits it.
    ///
    /// # Panics
    /// When the server refuses.
    pub async fn commit_reserved(&self, record: &BackupRecord) {
        let _lease = self.reserve_backup(record.name.as_str()).await;
        self.commit(record).await.expect("committed");
    }

    /// Commits a record.
    ///
    /// # Errors
    /// The server's refusal.
    ///
    /// # Panics
    /// Never: a record is JSON.
    pub async fn commit(&self, record: &BackupRecord) -> Result<(), Status> {
        let record = serde_json::to_vec(record).expect("JSON").into();
        let request = v1::CommitBackupRequest {
            cluster: self.cluster.clone(),
            record,
            writer_id: String::new(),
        };
        self.client.clone().commit_backup(request).await.map(drop)
    }

    /// The backups.
    ///
    /// # Errors
    /// The server's refusal.
    pub async fn backups(&self) -> Result<v1::ListBackupsResponse, Status> {
        let request = v1::ListBackupsRequest { cluster: self.cluster.clone() };
        Ok(self.client.clone().list_backups(request).await?.into_inner())
    }

    /// One backup's entry, and its record.
    ///
    /// # Panics
    /// When there is none, or the list fails.
    pub async fn entry(&self, name: &str) -> (v1::BackupEntry, BackupRecord) {
        let all = self.backups().await.expect("a list").backups;
        let read = |e: v1::BackupEntry| {
            let record: BackupRecord = serde_json::from_slice(&e.record).expect("a record");
            (e, record)
        };
        all.into_iter().map(read).find(|(_, r)| r.name.as_str() == name).expect("the backup")
    }

    /// What WAL is held.
    ///
    /// # Errors
    /// The server's refusal.
    ///
    /// # Panics
    /// When the answer is no JSON.
    pub async fn holdings(&self) -> Result<Holdings, Status> {
        let request = v1::HoldingsRequest { cluster: self.cluster.clone() };
        let answer = self.client.clone().holdings(request).await?.into_inner();
        Ok(serde_json::from_slice(&answer.holdings).expect("holdings"))
    }

    /// Streams `bytes` of WAL from `start` on and waits until they are durable.
    ///
    /// # Panics
    /// When the server refuses.
    pub async fn stream_wal(&self, channel: &Channel, start: Lsn, bytes: usize) -> Stream {
        let first = open(&self.cluster, segment_size(), start);
        let mut stream = Stream::open(channel, first).await.expect("open a stream");
        for (index, piece) in wal(start, bytes, segment_size(), 1).chunks(PIECE).enumerate() {
            stream.append(start.advance((index * PIECE) as u64), piece.to_vec()).await;
        }
        stream.flushed(start.advance(bytes as u64)).await.expect("acknowledged");
        stream
    }
}

/// A backup that was made in a scratch directory, file by file.
pub struct Made {
    /// Its record, good for a commit.
    pub record: BackupRecord,
    /// Its files with their bytes: packs, index, snapshot. Without config and keys, which the server has.
    pub files: Vec<(BaseFile, Vec<u8>)>,
}

impl Made {
    /// Those of one kind.
    #[must_use]
    pub fn of(&self, kind: BaseKind) -> Vec<(BaseFile, Vec<u8>)> {
        self.files.iter().filter(|(file, _)| file.kind == kind).cloned().collect()
    }

    /// Reserves its name and puts all of it; the reservation lives as long as what this gives.
    ///
    /// # Panics
    /// When the server refuses.
    pub async fn put(&self, base: &Base) -> Streaming<v1::ReserveResponse> {
        let lease = base.reserve_backup(self.record.name.as_str()).await;
        for (file, bytes) in &self.files {
            base.put(*file, bytes).await.expect("stored");
        }
        lease
    }

    /// Puts all of it and commits it.
    ///
    /// # Panics
    /// When the server refuses.
    pub async fn commit(&self, base: &Base) {
        let _lease = self.put(base).await;
        base.commit(&self.record).await.expect("committed");
    }
}

/// Makes a backup of a few made-up files, `name` among their content, into the server's repository.
///
/// # Panics
/// When the repository refuses.
pub async fn make(base: &Base, directory: &Path, name: &str, start: Lsn, stop: Lsn) -> Made {
    let secret = base.open().await.expect("a repository");
    let files = LocalFiles::new(Arc::new(RealDisk), directory.to_owned());
    std::fs::create_dir_all(directory).expect("a directory");
    let mut known = Vec::new();
    for kind in [FileKind::Config, FileKind::Key] {
        for (id, _) in base.list(kind).await.expect("a list") {
            let file = match kind {
                FileKind::Config => BaseFile::CONFIG,
                _ => BaseFile { kind: BaseKind::Key, id: id.parse().expect("an id") },
            };
            let bytes = base.get(file, 0, 0).await.expect("a file");
            files.write(file, &[bytes.into()]).expect("written");
            known.push(file);
        }
    }
    let cluster: ClusterName = base.cluster.parse().expect("a name");
    let backup = name.to_owned();
    let made = tokio::task::spawn_blocking(move || archive(files, &secret, cluster, &backup));
    let (snapshot, files) = made.await.expect("archived");
    let record = record(name, snapshot, start, stop);
    Made { record, files: files.into_iter().filter(|(file, _)| !known.contains(file)).collect() }
}

fn archive(
    files: LocalFiles,
    secret: &Secret,
    cluster: ClusterName,
    name: &str,
) -> (String, Vec<(BaseFile, Vec<u8>)>) {
    let files: Arc<dyn Files> = Arc::new(files);
    let repository = Repository::open(files.clone(), secret).expect("open");
    let source = Tree { text: format!("of backup {name}") };
    let part = repository.snapshot(&source, None, Arc::new(Silent)).expect("archive");
    let meta = SnapshotMeta {
        cluster,
        backup: name.parse().expect("a name"),
        began: UNIX_EPOCH + Duration::from_secs(1_800_000_000),
    };
    let summary = repository.assemble(&[part], &meta).expect("assemble");
    let mut all = Vec::new();
    for kind in [BaseKind::Data, BaseKind::Index, BaseKind::Snapshot] {
        for (file, _) in files.list(kind).expect("list") {
            all.push((file, files.read(file).expect("read").to_vec()));
        }
    }
    (summary.id.to_string(), all)
}

/// A good record of a backup on timeline 1.
///
/// # Panics
/// When `name` is none.
#[must_use]
pub fn record(name: &str, snapshot: String, start: Lsn, stop: Lsn) -> BackupRecord {
    let timeline = TimelineId::new(1).expect("a timeline");
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs_f64();
    BackupRecord {
        name: name.parse().expect("a name"),
        system_identifier: SYSTEM.to_string(),
        postgres_version: 150_018,
        segment_size: segment_size().as_u32(),
        start_timeline: timeline,
        start_lsn: start,
        stop_timeline: timeline,
        stop_lsn: stop,
        started_postgres_unix: now - 3.25,
        stopped_postgres_unix: now,
        begun_unix: now - 3.5,
        committed_unix: 0.0,
        duration_seconds: 3.5,
        from_standby: false,
        snapshot,
        backup_label: "START WAL LOCATION: 0/1000028\n".into(),
        tablespace_map: String::new(),
        tablespaces: Vec::new(),
        size_bytes: 300_000,
        files: 3,
        directories: 2,
        added_bytes: 300_000,
        stored_bytes: 1_000,
        pages: PagesRecord::default(),
        label: None,
        keep: false,
        redated_unix: None,
        klio_version: "test".into(),
        unknown: Default::default(),
    }
}

struct Tree {
    text: String,
}

impl Source for Tree {
    fn listing_began(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(1_800_000_000)
    }

    fn entries(&self) -> Box<dyn Iterator<Item = Result<SourceEntry, Error>> + Send> {
        let entry = |path: &str, kind| SourceEntry {
            path: PathBuf::from(path),
            kind,
            mode: 0o700,
            uid: 0,
            gid: 0,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
        };
        let file = |path: &str, bytes: Vec<u8>| {
            let size = bytes.len() as u64;
            let open = Box::new(move || Ok(Box::new(Cursor::new(bytes)) as _));
            entry(path, EntryKind::File { size, open })
        };
        let mut noise = Vec::with_capacity(300_000);
        for number in 0_u64..9_375 {
            noise.extend_from_slice(
                Sha256Sum::of(format!("{}{number}", self.text).as_bytes()).bytes(),
            );
        }
        let entries = vec![
            entry("data", EntryKind::Dir),
            file("data/PG_VERSION", b"15\n".to_vec()),
            file("data/backup_label", self.text.clone().into_bytes()),
            entry("data/base", EntryKind::Dir),
            file("data/base/1", noise),
        ];
        Box::new(entries.into_iter().map(Ok))
    }
}
