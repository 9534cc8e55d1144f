//! Gives repository files back: from tier 1, else from tier 2, in bounded pieces.
//!
//! S5: a tier that could not be asked makes the answer `UNAVAILABLE`, never "not found" (P7). A range of a
//! file in tier 2 is a range of its object: no more is read. A caller that does not read holds no thread.

use super::{BaseStore, tier2_status};
use crate::errors;
use bytes::Bytes;
use futures::{Stream, StreamExt};
use klio_proto::Code;
use klio_storage::{
    Error, Kind, Op,
    disk::FileHandle,
    layout::{BaseFile, ClusterName},
    tier2::Download,
};
use std::{io, path::PathBuf, pin::Pin};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::TaskTracker;
use tonic::Status;

/// Bytes of one message, and messages waiting.
const PIECE_BYTES: u64 = 512 << 10;
const PIECES_MAX: usize = 2;

/// Bytes of a file that were found.
pub enum FileBytes {
    /// On this server's disk.
    Tier1 {
        /// Open.
        handle: FileHandle,
        /// For messages in the log.
        path: PathBuf,
        /// The next byte.
        offset: u64,
        /// One past the last.
        end: u64,
    },
    /// In the bucket.
    Tier2(Download),
}

impl BaseStore {
    /// Finds a range of a file; to its end with `None`.
    ///
    /// # Errors
    /// `NOT_FOUND` is definitive; `CORRUPT` when the file ends before; `UNAVAILABLE`.
    pub async fn find_file(
        &self,
        cluster: &ClusterName,
        file: BaseFile,
        offset: u64,
        length: Option<u64>,
    ) -> Result<FileBytes, Status> {
        let path = self.cluster(cluster).files.path(file);
        let (disk, at) = (self.disk().clone(), path.clone());
        let opened = tokio::task::spawn_blocking(move || {
            let handle = match disk.open(&at, false) {
                Ok(handle) => handle,
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(e) => return Err(Error::io(Op::Open, &at, e)),
            };
            let size = handle.size().map_err(|e| Error::io(Op::Read, &at, e))?;
            let end = length.map_or(size.max(offset), |length| offset.saturating_add(length));
            if end > size {
                let detail = format!("expected bytes up to {end}, found a file of {size}");
                return Err(Error::new(Kind::Corrupt, Op::Read, at.display(), detail));
            }
            Ok(Some((handle, end)))
        });
        let opened = opened.await.map_err(|e| Code::Internal.status(format!("read: {e}")))?;
        let trouble = match opened {
            Ok(Some((handle, end))) => return Ok(FileBytes::Tier1 { handle, path, offset, end }),
            Ok(None) => None,
            // The other tier may have a good copy.
            Err(error) => Some(errors::status(&error)),
        };
        match (self.find_in_tier2(cluster, file, offset, length).await, trouble) {
            // Tier 1 has it and cannot give it: that is no absence, whatever tier 2 says (P7).
            (Err(absent), Some(trouble)) if Code::of(&absent) == Code::NotFound => Err(trouble),
            (answer, _) => answer,
        }
    }

    async fn find_in_tier2(
        &self,
        cluster: &ClusterName,
        file: BaseFile,
        offset: u64,
        length: Option<u64>,
    ) -> Result<FileBytes, Status> {
        let missing = || {
            Code::NotFound.status(format!("the repository of {cluster} has no {}", file.relative()))
        };
        let Some(tier2) = self.tier2() else { return Err(missing()) };
        let key = file.key(cluster);
        let found = match (offset, length) {
            (0, None) => tier2.download(&key).await,
            _ => tier2.download_range(&key, offset, length).await,
        };
        match found {
            Ok(download) => Ok(FileBytes::Tier2(download)),
            Err(error) if error.kind == Kind::NotFound => Err(missing()),
            Err(error) if error.kind == Kind::Corrupt => Err(errors::status(&error)),
            Err(error) => Err(tier2_status("read a repository file", cluster, &error)),
        }
    }
}

impl FileBytes {
    /// The bytes as messages of a stream.
    pub fn stream(
        self,
        tasks: &TaskTracker,
    ) -> Pin<Box<dyn Stream<Item = Result<Bytes, Status>> + Send>> {
        match self {
            FileBytes::Tier1 { handle, path, offset, end } => {
                let (pieces, outbound) = mpsc::channel(PIECES_MAX);
                tasks.spawn(from_disk(handle, path, offset, end, pieces));
                ReceiverStream::new(outbound).boxed()
            }
            FileBytes::Tier2(download) => {
                download.map(|piece| piece.map_err(|e| errors::status(&e))).flat_map(split).boxed()
            }
        }
    }
}

/// A store gives pieces of any size; a message has at most [`PIECE_BYTES`].
fn split(piece: Result<Bytes, Status>) -> impl Stream<Item = Result<Bytes, Status>> {
    let mut rest = piece.map_or_else(|e| vec![Err(e)], |bytes| vec![Ok(bytes)]);
    while let Some(Ok(last)) = rest.last_mut()
        && last.len() > PIECE_BYTES as usize
    {
        let tail = last.split_off(PIECE_BYTES as usize);
        rest.push(Ok(tail));
    }
    futures::stream::iter(rest)
}

/// A thread is taken for each piece and only when the caller has room for it (P8).
async fn from_disk(
    handle: FileHandle,
    path: PathBuf,
    mut offset: u64,
    end: u64,
    pieces: mpsc::Sender<Result<Bytes, Status>>,
) {
    while offset < end {
        let Ok(room) = pieces.reserve().await else { return };
        let (file, length, at) = (handle.clone(), (end - offset).min(PIECE_BYTES), offset);
        let read = tokio::task::spawn_blocking(move || {
            let mut piece = vec![0; length as usize];
            let mut done = 0;
            while done < piece.len() {
                match file.read_at(&mut piece[done..], at + done as u64)? {
                    0 => return Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
                    count => done += count,
                }
            }
            Ok(Bytes::from(piece))
        });
        match read.await {
            Ok(Ok(piece)) => {
                offset += length;
                room.send(Ok(piece));
            }
            Ok(Err(error)) => {
                let error = Error::io(Op::Read, &path, error);
                return room.send(Err(errors::status(&error)));
            }
            Err(error) => {
                return room.send(Err(Code::Internal.status(format!("read tier 1: {error}"))));
            }
        }
    }
}
