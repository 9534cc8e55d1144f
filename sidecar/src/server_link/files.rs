//! A repository's files on the server: the `storage` trait [`Files`] over the service `Base`.
//!
//! Every call blocks its thread and runs on the given runtime, so it must not be made on a thread of that runtime.
//! Transient errors are retried ([`BaseLink`]); `write` may be repeated, because a file's name is the hash of its
//! content (REPO2). Memory: the file that the caller holds, and two messages in flight. After a stop every call fails
//! at once, so that an engine with a queue of files ends, too.

use super::{BaseLink, ServerLink, Traced};
use crate::error::{Error, Failure};
use bytes::{Bytes, BytesMut};
use klio_proto::{
    Code,
    base::PIECE_BYTES_MAX,
    v1::{self, base_client::BaseClient},
};
use klio_storage::{
    Error as StorageError, Kind, Op,
    layout::{BaseFile, BaseKind, ClusterName},
    repository::Files,
    tier2::Sha256Sum,
};
use std::{
    fmt,
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tracing::{Instrument, Span};

/// One cluster's repository files over gRPC. Cheap to clone.
#[derive(Clone)]
pub struct GrpcFiles {
    shared: Arc<Shared>,
}

struct Shared {
    base: BaseLink,
    cluster: ClusterName,
    runtime: Handle,
    /// Parent span for threads without one, which are the engine's, so that the trace reaches the server.
    span: Span,
    /// The last permanent error, with its text for the user.
    failure: Mutex<Option<Error>>,
}

impl fmt::Debug for GrpcFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GrpcFiles({})", self.place())
    }
}

impl GrpcFiles {
    /// Opens no connection yet. `runtime` must be driven by another thread than the callers' for as long as this is
    /// used. Cancelling `stop` ends all calls. A call belongs to its thread's span, or, if there is none, to the span
    /// in which this was created.
    pub fn new(
        link: ServerLink,
        cluster: ClusterName,
        runtime: Handle,
        stop: CancellationToken,
    ) -> Self {
        let base = BaseLink::new(link, stop);
        let (span, failure) = (Span::current(), Mutex::default());
        Self { shared: Arc::new(Shared { base, cluster, runtime, span, failure }) }
    }

    /// The last permanent error, with the code and the hint that a storage error lacks.
    pub fn failure(&self) -> Option<Error> {
        self.shared.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn call<T, F>(&self, op: Op, file: Option<BaseFile>, call: F) -> Result<T, StorageError>
    where
        F: AsyncFn(BaseClient<Traced>) -> Result<T, Status>,
    {
        let shared = &self.shared;
        let place = match file {
            Some(file) => format!("{}/{}", self.place(), file.relative()),
            None => self.place(),
        };
        let doing = format!("{op} {place}");
        let span = Some(Span::current()).filter(|span| !span.is_none());
        let span = span.unwrap_or_else(|| shared.span.clone());
        let work = shared.base.call(&doing, call).instrument(span);
        shared.runtime.block_on(work).map_err(|error| {
            let stored = StorageError::new(kind(error.failure), op, &place, &error.message);
            *shared.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            stored
        })
    }
}

/// Classifies an error by what a caller in `storage` does about it.
const fn kind(failure: Failure) -> Kind {
    match failure {
        Failure::Code(Code::NotFound) => Kind::NotFound,
        Failure::Code(Code::Corrupt) => Kind::Corrupt,
        Failure::Code(Code::Forbidden | Code::Unauthenticated) | Failure::Certificate => {
            Kind::Denied
        }
        Failure::Code(Code::DiskFull) => Kind::Full,
        Failure::Code(Code::Invalid) | Failure::Config => Kind::Invalid,
        Failure::Code(Code::WriterConflict) => Kind::Conflict,
        _ => Kind::Transient,
    }
}

const fn wire_kind(kind: BaseKind) -> v1::FileKind {
    match kind {
        BaseKind::Config => v1::FileKind::Config,
        BaseKind::Key => v1::FileKind::Key,
        BaseKind::Data => v1::FileKind::Data,
        BaseKind::Index => v1::FileKind::Index,
        BaseKind::Snapshot => v1::FileKind::Snapshot,
    }
}

fn wire_name(file: BaseFile) -> v1::FileName {
    let id = if file.kind == BaseKind::Config { String::new() } else { file.id.to_string() };
    v1::FileName { kind: wire_kind(file.kind).into(), id }
}

/// The messages of one file: first its name, then its bytes, which are not copied.
fn messages(cluster: String, file: BaseFile, parts: &[Bytes]) -> Vec<v1::PutFileRequest> {
    let size = parts.iter().map(|p| p.len() as u64).sum();
    let first =
        v1::PutFileRequest { cluster, name: Some(wire_name(file)), size, data: Vec::new().into() };
    let pieces = parts.iter().flat_map(|part| {
        (0..part.len())
            .step_by(PIECE_BYTES_MAX)
            .map(|from| part.slice(from..part.len().min(from + PIECE_BYTES_MAX)))
    });
    let rest = pieces.map(|data| v1::PutFileRequest { data, ..Default::default() });
    [first].into_iter().chain(rest).collect()
}

impl Files for GrpcFiles {
    fn place(&self) -> String {
        format!("{} of cluster {}", self.shared.base.address(), self.shared.cluster)
    }

    fn list(&self, kind: BaseKind) -> Result<Vec<(BaseFile, u64)>, StorageError> {
        let cluster = self.shared.cluster.to_string();
        self.call(Op::List, None, async |mut client| {
            let cluster = cluster.clone();
            let request = v1::ListFilesRequest { cluster, kind: wire_kind(kind).into() };
            let mut answer = client.list_files(request).await?.into_inner();
            let mut files = Vec::new();
            while let Some(message) = answer.message().await? {
                for listed in message.files {
                    files.push((listed_file(kind, &listed.id)?, listed.size));
                }
            }
            Ok(files)
        })
    }

    fn read(&self, file: BaseFile) -> Result<Bytes, StorageError> {
        self.call(Op::Read, Some(file), async |client| self.get(client, self.ask(file, 0, 0)).await)
    }

    fn read_range(&self, file: BaseFile, offset: u64, length: u64) -> Result<Bytes, StorageError> {
        if length == 0 {
            return Ok(Bytes::new());
        }
        self.call(Op::Read, Some(file), async |client| {
            let bytes = self.get(client, self.ask(file, offset, length)).await?;
            let found = bytes.len() as u64;
            if found == length {
                return Ok(bytes);
            }
            let message = format!("expected {length} bytes from offset {offset}, found {found}");
            Err(Code::Corrupt.status(message))
        })
    }

    fn write(&self, file: BaseFile, parts: &[Bytes]) -> Result<(), StorageError> {
        let messages = messages(self.shared.cluster.to_string(), file, parts);
        self.call(Op::Write, Some(file), async |mut client| {
            client.put_file(tokio_stream::iter(messages.clone())).await.map(drop)
        })
    }

    fn remove(&self, file: BaseFile) -> Result<(), StorageError> {
        let place = format!("{}/{}", self.place(), file.relative());
        let detail = "expected the server, which alone removes files, found a sidecar";
        Err(StorageError::new(Kind::Denied, Op::Remove, place, detail))
    }
}

impl GrpcFiles {
    /// Reads several ranges of a file, none of them empty, with one call; returns the bytes of each range.
    ///
    /// # Errors
    /// As for `read_range`.
    pub fn read_ranges(
        &self,
        file: BaseFile,
        ranges: &[Range<u64>],
    ) -> Result<Vec<Bytes>, StorageError> {
        self.call(Op::Read, Some(file), async |client| {
            let ask = |range: &Range<u64>| v1::ByteRange {
                offset: range.start,
                length: range.end - range.start,
            };
            let ranges_asked = ranges.iter().map(ask).collect();
            let request = v1::GetFileRequest { ranges: ranges_asked, ..self.ask(file, 0, 0) };
            let mut bytes = self.get(client, request).await?;
            let (found, expected) =
                (bytes.len() as u64, ranges.iter().map(|r| r.end - r.start).sum::<u64>());
            if found != expected {
                let count = ranges.len();
                let message = format!("expected {expected} bytes in {count} ranges, found {found}");
                return Err(Code::Corrupt.status(message));
            }
            Ok(ranges.iter().map(|r| bytes.split_to((r.end - r.start) as usize)).collect())
        })
    }

    fn ask(&self, file: BaseFile, offset: u64, length: u64) -> v1::GetFileRequest {
        let (cluster, name) = (self.shared.cluster.to_string(), Some(wire_name(file)));
        v1::GetFileRequest { cluster, name, offset, length, ranges: Vec::new() }
    }

    async fn get(
        &self,
        mut client: BaseClient<Traced>,
        request: v1::GetFileRequest,
    ) -> Result<Bytes, Status> {
        let expected = request.length + request.ranges.iter().map(|r| r.length).sum::<u64>();
        let mut answer = client.get_file(request).await?.into_inner();
        let mut all = BytesMut::new();
        while let Some(message) = answer.message().await? {
            let data = message.data;
            if all.is_empty() {
                // Limit the allocation, because the expected size comes from the caller's records. A pack is little
                // more than 32 MiB.
                all.reserve(usize::try_from(expected).unwrap_or(0).min(64 << 20).max(data.len()));
            }
            all.extend_from_slice(&data);
        }
        Ok(all.freeze())
    }
}

fn listed_file(kind: BaseKind, id: &str) -> Result<BaseFile, Status> {
    if kind == BaseKind::Config {
        return Ok(BaseFile::CONFIG);
    }
    let id: Sha256Sum = id.parse().map_err(|error| Code::Invalid.status(error))?;
    Ok(BaseFile { kind, id })
}

#[cfg(test)]
mod tests;
