//! Checks what a client sent before it becomes part of a repository.
//!
//! A client has the repository's key, and may be hostile or broken (P13). So a file counts only when the server has
//! decrypted and checked it:
//!
//! ADMIT1  a pack contains what its own list says, every blob of it (`unpack.rs` of the repository);
//! ADMIT2  an index only adds, describes each pack as the pack's own list does, and names only packs that are stored;
//! ADMIT3  a snapshot is whole: its trees can be read, and every chunk is in an index;
//! ADMIT4  files are accepted only while the sender's reservation of a backup lives, so never during a prune.
//!
//! So whatever a client sends, a chunk's name leads to that chunk, in every pack that an index names for it. No later
//! backup builds on a missing chunk, and a prune that keeps one of two copies keeps a good one. Files stored by an
//! older server, which did not check (`Coverage`), are checked when an index names them, and by verification, which
//! reads all of them in turn.

use super::{BaseStore, run, tier2_status};
use crate::errors;
use bytes::Bytes;
use klio_proto::Code;
use klio_storage::{
    Error, Kind, Op,
    disk::{FileHandle, read_full},
    layout::{BaseFile, BaseKind, BaseObject, ClusterName},
    repository::{Claim, Files, INDEX_BYTES_MAX, Repository, SNAPSHOT_BYTES_MAX, SnapshotId},
};
use std::{collections::BTreeMap, sync::Arc};
use tokio::sync::OwnedSemaphorePermit;
use tonic::Status;

/// The most bytes that a file of a kind may have.
pub(super) const fn size_max(kind: BaseKind) -> u64 {
    match kind {
        BaseKind::Index => INDEX_BYTES_MAX,
        BaseKind::Snapshot => SNAPSHOT_BYTES_MAX,
        // Offsets in a pack have 32 bits.
        _ => u32::MAX as u64,
    }
}

/// A file that may become part of the repository.
pub(super) struct Candidate {
    pub(super) file: BaseFile,
    pub(super) size: u64,
    pub(super) handle: FileHandle,
}

impl Candidate {
    fn read(&self, offset: u64, length: u64) -> Result<Bytes, Error> {
        let fail = |e| Error::new(Kind::Io, Op::Read, self.file.relative(), e);
        let mut bytes = vec![0; length as usize];
        let got = read_full(self.handle.as_ref(), &mut bytes, offset).map_err(fail)?;
        if got < bytes.len() {
            let detail = format!("expected {length} bytes at {offset}, found {got}");
            return Err(Error::new(Kind::Io, Op::Read, self.file.relative(), detail));
        }
        Ok(bytes.into())
    }
}

/// The client is told what is wrong with its file; any other error is the server's.
fn judged(cluster: &ClusterName, file: BaseFile, error: &Error) -> Status {
    match error.kind {
        Kind::Corrupt | Kind::Denied => {
            tracing::warn!(%cluster, %error, "refused a client's file whose content is not what it claims");
            let code = if error.kind == Kind::Denied { Code::Forbidden } else { Code::Invalid };
            code.status(format!("store {} of {cluster}: {}", file.relative(), error.detail))
        }
        _ => errors::status(error),
    }
}

impl BaseStore {
    /// Checks a file by ADMIT1 to ADMIT3.
    ///
    /// # Errors
    /// `INVALID` for content that is not what it claims, `FORBIDDEN` for files that only the server writes,
    /// `UNAVAILABLE` when tier 2 has to be asked and does not answer.
    pub(super) async fn admit(
        &self,
        cluster: &ClusterName,
        candidate: Candidate,
    ) -> Result<(), Status> {
        let secret = self.open_repository(cluster, None).await?;
        let files: Arc<dyn Files> = Arc::new(self.files(cluster));
        let repository = run(move || Repository::open(files, &secret)).await?;
        match candidate.file.kind {
            BaseKind::Data => self.admit_pack(cluster, repository, candidate).await,
            BaseKind::Index => self.admit_index(cluster, repository, candidate).await,
            BaseKind::Snapshot => self.admit_snapshot(cluster, repository, candidate).await,
            BaseKind::Config | BaseKind::Key => {
                Err(Code::Forbidden.status("only the server writes a repository's config and keys"))
            }
        }
    }

    /// Waits for a turn. A few files are checked at a time, over all clusters, because each takes a processor and
    /// memory for a blob.
    async fn turn(&self) -> Result<OwnedSemaphorePermit, Status> {
        let turn = self.0.admitting.clone().acquire_owned().await;
        turn.map_err(|e| Code::Internal.status(e))
    }

    async fn admit_pack(
        &self,
        cluster: &ClusterName,
        repository: Repository,
        candidate: Candidate,
    ) -> Result<(), Status> {
        let file = candidate.file;
        let _turn = self.turn().await?;
        let open = move || {
            let read = |offset, length| candidate.read(offset, length);
            Ok(repository.open_pack(file, candidate.size, &read))
        };
        run(open).await?.map(drop).map_err(|error| judged(cluster, file, &error))
    }

    async fn admit_index(
        &self,
        cluster: &ClusterName,
        repository: Repository,
        candidate: Candidate,
    ) -> Result<(), Status> {
        let (file, reader) = (candidate.file, repository.clone());
        let read = move || {
            let sealed = candidate.read(0, candidate.size)?;
            Ok(reader.read_claims(file, &sealed))
        };
        let claims = run(read).await?.map_err(|error| judged(cluster, file, &error))?;
        let sizes = self.sizes_of(cluster, file, &claims).await?;
        let opened = self.coverage(cluster).await?.all_opened();
        let files = self.files(cluster);
        let _turn = if opened { None } else { Some(self.turn().await?) };
        let check = move || {
            for claim in claims {
                let pack = claim.pack();
                let size = sizes.get(&pack).copied().unwrap_or_default();
                let read = |offset, length| files.read_range(pack, offset, length);
                let checked = repository.check_claim(claim, size, &read).and_then(|()| {
                    if opened { Ok(0) } else { repository.open_pack(pack, size, &read) }
                });
                if let Err(error) = checked {
                    return Ok(Err(error));
                }
            }
            Ok(Ok(()))
        };
        run(check).await?.map_err(|error| judged(cluster, file, &error))
    }

    /// The sizes of the packs that an index names; fails unless all of them are stored.
    async fn sizes_of(
        &self,
        cluster: &ClusterName,
        index: BaseFile,
        claims: &[Claim],
    ) -> Result<BTreeMap<BaseFile, u64>, Status> {
        let local = self.cluster(cluster).files.clone();
        let (disk, packs) =
            (self.disk().clone(), claims.iter().map(Claim::pack).collect::<Vec<_>>());
        let (mut sizes, elsewhere) = run(move || {
            let (mut here, mut elsewhere) = (BTreeMap::new(), Vec::new());
            for pack in packs {
                let path = local.path(pack);
                match disk.stat(&path) {
                    Ok(stat) => drop(here.insert(pack, stat.size)),
                    Err(e) if e.kind() == std::io::ErrorKind::NotFound => elsewhere.push(pack),
                    Err(e) => return Err(Error::io(Op::Read, &path, e)),
                }
            }
            Ok((here, elsewhere))
        })
        .await?;
        if elsewhere.is_empty() {
            return Ok(sizes);
        }
        let far = self.list_tier2(cluster).await;
        let far = far.map_err(|error| tier2_status("store an index", cluster, &error))?;
        for pack in elsewhere {
            let Some(size) = far.get(&BaseObject::File(pack)) else {
                return Err(Code::Invalid.status(format!(
                    "store {} of {cluster}: expected an index of packs that are held, found {}, which is not",
                    index.relative(),
                    pack.relative()
                )));
            };
            sizes.insert(pack, *size);
        }
        Ok(sizes)
    }

    async fn admit_snapshot(
        &self,
        cluster: &ClusterName,
        repository: Repository,
        candidate: Candidate,
    ) -> Result<(), Status> {
        let file = candidate.file;
        let read = move || {
            let sealed = candidate.read(0, candidate.size)?;
            Ok(repository.check_snapshot_file(file, &sealed).map(|()| sealed))
        };
        let sealed = run(read).await?.map_err(|error| judged(cluster, file, &error))?;
        // Trees stay in memory while they are read.
        let _turn = self.turn().await?;
        let whole = self.needs_of_new(cluster, SnapshotId::new(file.id), sealed).await;
        whole.map(drop).map_err(|error| match Code::of(&error) {
            Code::NotFound | Code::Corrupt => {
                tracing::warn!(%cluster, error = error.message(), "refused a client's snapshot that is not whole");
                Code::Invalid.status(format!(
                    "store {} of {cluster}: the snapshot is not whole: {}",
                    file.relative(),
                    error.message()
                ))
            }
            _ => error,
        })
    }
}
