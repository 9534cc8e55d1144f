//! Receives one repository file: pieces to a temporary file, fsync, rename, fsync of the directory, answer.
//!
//! REPO1: the file is whole or absent, and durable when the answer is sent. REPO2: its bytes have the SHA-256 of its
//! name, or nothing is stored. BASE2: only the server writes config and keys, and an existing file stays unchanged,
//! except that a file of the wrong size, or one that verification found damaged, is replaced by bytes that have the
//! name's sum. P13: a file is checked before it is renamed (`admit.rs`), and accepted only while its sender's
//! reservation lives.
//!
//! Memory: one piece of 1 MiB for each of at most four files of a cluster. A thread is used for each piece, so a
//! client that does not send blocks none (P8).

use super::{
    BaseStore, Caller,
    admit::{Candidate, size_max},
    run,
};
use crate::errors;
use bytes::Bytes;
use klio_proto::Code;
use klio_storage::{
    Error, Op,
    catalog::KnownDamage,
    crash_point,
    disk::{Disk, FileHandle, durable},
    layout::{BaseFile, BaseKind, BaseObject, ClusterName},
    tier2::Hasher,
};
use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};
use tokio::sync::OwnedSemaphorePermit;
use tonic::Status;

/// Bytes that are written and hashed at once.
const PIECE_BYTES: usize = 1 << 20;
/// Distinguishes the temporary names of this process; the letter distinguishes them from those of `LocalFiles`.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// A file that is being received. Dropping it leaves nothing behind.
pub struct Incoming {
    base: BaseStore,
    cluster: ClusterName,
    file: BaseFile,
    caller: Caller,
    size: u64,
    received: u64,
    waiting: Vec<Bytes>,
    waiting_bytes: usize,
    /// Whether the existing file is known to be damaged.
    damaged: bool,
    /// `None` while a thread has it.
    writing: Option<Writing>,
    _turn: OwnedSemaphorePermit,
}

/// What one writing thread passes to the next.
struct Writing {
    hasher: Hasher,
    /// `None` when the file exists already, so that the bytes are only hashed.
    to: Option<Temporary>,
}

/// A temporary file; dropping it removes it.
struct Temporary {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    /// The final path.
    target: PathBuf,
    handle: FileHandle,
    renamed: bool,
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.renamed {
            // If this fails, the file is removed at the next start.
            let _ = self.disk.remove(&self.path);
        }
    }
}

fn refuse(
    code: Code,
    cluster: &ClusterName,
    file: BaseFile,
    detail: impl std::fmt::Display,
) -> Status {
    code.status(format!("store {} of {cluster}: {detail}", file.relative()))
}

impl BaseStore {
    /// Begins to receive a file of `size` bytes; waits for its turn.
    ///
    /// # Errors
    /// `FORBIDDEN` for files that only the server writes, `INVALID` before the repository was opened or for a size
    /// above the limit, `DISK_FULL`, `UNAVAILABLE` when the caller has no reservation of a backup.
    pub async fn begin_put(
        &self,
        cluster: &ClusterName,
        file: BaseFile,
        size: u64,
        caller: &Caller,
    ) -> Result<Incoming, Status> {
        if matches!(file.kind, BaseKind::Config | BaseKind::Key) {
            let detail = "only the server writes a repository's config and keys";
            return Err(refuse(Code::Forbidden, cluster, file, detail));
        }
        let most = size_max(file.kind);
        if size > most {
            let detail = format!("expected at most {most} bytes, found {size}");
            return Err(refuse(Code::Invalid, cluster, file, detail));
        }
        self.reservations().may_put(cluster, caller)?;
        let part = self.cluster(cluster);
        let turn = part.puts.clone().acquire_owned().await;
        let turn = turn.map_err(|e| Code::Internal.status(e))?;
        let (this, disk, files) = (self.clone(), self.disk().clone(), part.files.clone());
        let name = cluster.clone();
        let writing = tokio::task::spawn_blocking(move || {
            let config = files.path(BaseFile::CONFIG);
            match disk.stat(&config) {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    let detail = "expected a repository that was opened first, found none";
                    return Err(refuse(Code::Invalid, &name, file, detail));
                }
                Err(e) => return Err(errors::status(&Error::io(Op::Read, &config, e))),
            }
            let damaged = file.kind == BaseKind::Data && this.damaged_packs(&name).contains(&file);
            let begun = Temporary::create(disk, &files, file, (!damaged).then_some(size));
            begun
                .map(|to| (Writing { hasher: Hasher::default(), to }, damaged))
                .map_err(|e| errors::status(&e))
        });
        let writing = writing.await.map_err(|e| Code::Internal.status(format!("store: {e}")))?;
        let (writing, damaged) = writing?;
        Ok(Incoming {
            base: self.clone(),
            cluster: cluster.clone(),
            file,
            caller: caller.clone(),
            size,
            received: 0,
            waiting: Vec::new(),
            waiting_bytes: 0,
            damaged,
            writing: Some(writing),
            _turn: turn,
        })
    }
}

impl Temporary {
    /// `None` when a file of this name and size exists. Without a size, an existing file is replaced.
    fn create(
        disk: Arc<dyn Disk>,
        files: &klio_storage::repository::LocalFiles,
        file: BaseFile,
        size: Option<u64>,
    ) -> Result<Option<Self>, Error> {
        let target = files.place_for(file)?;
        match disk.stat(&target) {
            Ok(stat) if Some(stat.size) == size => {
                // A process may have crashed after it created the name and before the name was durable.
                durable::sync_dir(disk.as_ref(), target.parent().unwrap_or(Path::new("/")))?;
                return Ok(None);
            }
            Ok(stat) => {
                tracing::warn!(path = %target.display(), expected = size, found = stat.size, "a damaged file is received again");
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(Error::io(Op::Read, &target, e)),
        }
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let unique = format!("{}.{}.p{number}", target.display(), std::process::id());
        let path = durable::tmp_path(Path::new(&unique));
        durable::remove_if_there(disk.as_ref(), &path)?;
        let handle = disk.create_new(&path).map_err(|e| Error::io(Op::Create, &path, e))?;
        Ok(Some(Self { disk, path, target, handle, renamed: false }))
    }

    fn finish(mut self) -> Result<(), Error> {
        self.handle.sync_all().map_err(|e| Error::io(Op::Sync, &self.path, e))?;
        crash_point!("file.written");
        // After a failed rename the old name is removed, whether or not it still exists.
        durable::rename(self.disk.as_ref(), &self.path, &self.target)?;
        crash_point!("file.renamed");
        self.renamed = true;
        Ok(())
    }
}

impl Writing {
    fn write(&mut self, pieces: &[Bytes]) -> Result<(), Error> {
        for piece in pieces {
            if let Some(to) = &self.to {
                let write = to.handle.write_all_at(piece, self.hasher.bytes());
                write.map_err(|e| Error::io(Op::Write, &to.path, e))?;
            }
            self.hasher.update(piece);
        }
        Ok(())
    }
}

impl Incoming {
    /// Whether a file of this name and size exists already, so that the bytes are only compared.
    pub fn is_there(&self) -> bool {
        self.writing.as_ref().is_some_and(|writing| writing.to.is_none())
    }

    /// Takes the next bytes.
    ///
    /// # Errors
    /// `INVALID` for more bytes than announced; `DISK_FULL` or `STORAGE_FAILED`.
    pub async fn add(&mut self, data: Bytes) -> Result<(), Status> {
        self.received += data.len() as u64;
        if self.received > self.size {
            let detail = format!("expected {} bytes, found more", self.size);
            return Err(refuse(Code::Invalid, &self.cluster, self.file, detail));
        }
        self.waiting_bytes += data.len();
        self.waiting.push(data);
        if self.waiting_bytes < PIECE_BYTES {
            return Ok(());
        }
        self.write().await
    }

    async fn write(&mut self) -> Result<(), Status> {
        self.waiting_bytes = 0;
        let pieces = std::mem::take(&mut self.waiting);
        let mut writing = self.take()?;
        let (writing, written) = tokio::task::spawn_blocking(move || {
            let written = writing.write(&pieces);
            (writing, written)
        })
        .await
        .map_err(|e| Code::Internal.status(format!("store: {e}")))?;
        self.writing = Some(writing);
        written.map_err(|e| errors::status(&e))
    }

    fn take(&mut self) -> Result<Writing, Status> {
        self.writing.take().ok_or_else(|| Code::Internal.status("store: an earlier piece was lost"))
    }

    /// Makes it a file of the repository, durably, and queues it for upload. Returns true when it existed already.
    ///
    /// # Errors
    /// `INVALID` when it is shorter than announced or does not have the SHA-256 of its name; the errors of `admit`.
    pub async fn finish(mut self) -> Result<bool, Status> {
        if self.received != self.size {
            let detail = format!("expected {} bytes, found {}", self.size, self.received);
            return Err(refuse(Code::Invalid, &self.cluster, self.file, detail));
        }
        self.write().await?;
        let Writing { hasher, to } = self.take()?;
        let found = hasher.finish();
        if found != self.file.id {
            let detail = format!("expected bytes with the SHA-256 of the name, found {found}");
            return Err(refuse(Code::Invalid, &self.cluster, self.file, detail));
        }
        let existed = to.is_none();
        if let Some(to) = to {
            let (file, size, handle) = (self.file, self.size, to.handle.clone());
            self.base.admit(&self.cluster, Candidate { file, size, handle }).await?;
            // ADMIT4: the reservation may have ended while the bytes arrived.
            self.base.reservations().may_put(&self.cluster, &self.caller)?;
            run(move || to.finish()).await?;
        }
        let object = BaseObject::File(self.file);
        if self.damaged {
            let key = object.key(&self.cluster);
            let forget = move |known: &mut KnownDamage| known.packs.retain(|d| d.key != key);
            self.base.change_damage(&self.cluster, forget).await?;
        }
        if !existed || self.base.archives().size(&self.cluster, &object) != Some(self.size) {
            self.base.announce(&self.cluster, object, self.size);
        }
        Ok(existed)
    }
}
