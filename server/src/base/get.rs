//! Reads repository files for clients: from tier 1, else from tier 2, in bounded pieces.
//!
//! BASE5: if a tier could not be asked, the answer is `UNAVAILABLE`, never "not found" (P7). A range of a file in tier
//! 2 is read as a range of its object, and no more. A caller that does not read blocks no thread. Several ranges are
//! answered in one response, because a delta restore needs small pieces that are far apart, and each request has its
//! cost.

use super::{BaseStore, tier2_status};
use crate::errors;
use bytes::Bytes;
use futures::{Stream, StreamExt, stream};
use klio_proto::{Code, base::Part};
use klio_storage::{
    Error, Kind, Op,
    disk::{FileHandle, read_full},
    layout::{BaseFile, ClusterName},
};
use std::{collections::VecDeque, io, iter, ops::Range, path::PathBuf, pin::Pin};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::TaskTracker;
use tonic::Status;

/// Bytes of one message, and the number of messages that may wait.
const PIECE_BYTES: u64 = 512 << 10;
const PIECES_MAX: usize = 2;
/// How many ranges of an object are requested at once.
const REQUESTS_MAX: usize = 8;

type Pieces = Pin<Box<dyn Stream<Item = Result<Bytes, Status>> + Send>>;

/// The bytes of a file that was found.
pub enum FileBytes {
    /// On this server's disk.
    Tier1 {
        /// The open file.
        handle: FileHandle,
        /// For messages in the log.
        path: PathBuf,
        /// The requested ranges, all of them within the file.
        ranges: Vec<Range<u64>>,
    },
    /// In the bucket.
    Tier2(Pieces),
}

impl BaseStore {
    /// Finds the requested part of a file.
    ///
    /// # Errors
    /// `NOT_FOUND` is definitive; `CORRUPT` when the file ends before the part does; `UNAVAILABLE`.
    pub async fn find_file(
        &self,
        cluster: &ClusterName,
        file: BaseFile,
        part: Part,
    ) -> Result<FileBytes, Status> {
        let path = self.cluster(cluster).files.path(file);
        let (disk, at, asked) = (self.disk().clone(), path.clone(), part.clone());
        let opened = tokio::task::spawn_blocking(move || {
            let handle = match disk.open(&at, false) {
                Ok(handle) => handle,
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(e) => return Err(Error::io(Op::Open, &at, e)),
            };
            let size = handle.size().map_err(|e| Error::io(Op::Read, &at, e))?;
            let ranges = match asked {
                Part::From(offset) => iter::once(offset..size.max(offset)).collect(),
                Part::Ranges(ranges) => ranges,
            };
            match ranges.iter().map(|range| range.end).max() {
                Some(end) if end > size => {
                    let detail = format!("expected bytes up to {end}, found a file of {size}");
                    Err(Error::new(Kind::Corrupt, Op::Read, at.display(), detail))
                }
                _ => Ok(Some((handle, ranges))),
            }
        });
        let opened = opened.await.map_err(|e| Code::Internal.status(format!("read: {e}")))?;
        let trouble = match opened {
            Ok(Some((handle, ranges))) => return Ok(FileBytes::Tier1 { handle, path, ranges }),
            Ok(None) => None,
            // The other tier may have a good copy.
            Err(error) => Some(errors::status(&error)),
        };
        match (self.find_in_tier2(cluster, file, part).await, trouble) {
            // Tier 1 has the file and cannot read it, so it is not absent, whatever tier 2 says (P7).
            (Err(absent), Some(trouble)) if Code::of(&absent) == Code::NotFound => Err(trouble),
            (found, _) => found.map(FileBytes::Tier2),
        }
    }

    async fn find_in_tier2(
        &self,
        cluster: &ClusterName,
        file: BaseFile,
        part: Part,
    ) -> Result<Pieces, Status> {
        let mut asked = match part {
            Part::From(offset) => vec![(offset, None)],
            Part::Ranges(ranges) => ranges
                .into_iter()
                .map(|range| (range.start, Some(range.end - range.start)))
                .collect(),
        }
        .into_iter();
        let Some(first) = asked.next() else { return Ok(stream::empty().boxed()) };
        // Asked before the response begins, because the answer says whether the file exists.
        let first = self.ask_tier2(cluster, file, first).await?;
        let (base, cluster) = (self.clone(), cluster.clone());
        let later = stream::iter(asked).map(move |part| {
            let (base, cluster) = (base.clone(), cluster.clone());
            async move {
                match base.ask_tier2(&cluster, file, part).await {
                    Ok(pieces) => pieces,
                    Err(status) => stream::iter([Err(status)]).boxed(),
                }
            }
        });
        Ok(first.chain(later.buffered(REQUESTS_MAX).flatten()).boxed())
    }

    async fn ask_tier2(
        &self,
        cluster: &ClusterName,
        file: BaseFile,
        (offset, length): (u64, Option<u64>),
    ) -> Result<Pieces, Status> {
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
            Ok(download) => {
                let pieces = download.map(|piece| piece.map_err(|e| errors::status(&e)));
                Ok(pieces.flat_map(split).boxed())
            }
            Err(error) if error.kind == Kind::NotFound => Err(missing()),
            Err(error) if error.kind == Kind::Corrupt => Err(errors::status(&error)),
            Err(error) => Err(tier2_status("read a repository file", cluster, &error)),
        }
    }
}

impl FileBytes {
    /// The bytes as the messages of a response.
    pub fn stream(self, tasks: &TaskTracker) -> Pieces {
        match self {
            FileBytes::Tier1 { handle, path, ranges } => {
                let (pieces, outbound) = mpsc::channel(PIECES_MAX);
                tasks.spawn(from_disk(handle, path, ranges, pieces));
                ReceiverStream::new(outbound).boxed()
            }
            FileBytes::Tier2(pieces) => pieces,
        }
    }
}

/// An object store may deliver pieces of any size; a message has at most [`PIECE_BYTES`].
fn split(piece: Result<Bytes, Status>) -> impl Stream<Item = Result<Bytes, Status>> {
    let mut rest = piece.map_or_else(|e| vec![Err(e)], |bytes| vec![Ok(bytes)]);
    while let Some(Ok(last)) = rest.last_mut()
        && last.len() > PIECE_BYTES as usize
    {
        let tail = last.split_off(PIECE_BYTES as usize);
        rest.push(Ok(tail));
    }
    stream::iter(rest)
}

/// A thread is used for each piece, and only when the caller has room for it (P8).
async fn from_disk(
    handle: FileHandle,
    path: PathBuf,
    ranges: Vec<Range<u64>>,
    pieces: mpsc::Sender<Result<Bytes, Status>>,
) {
    let mut rest = VecDeque::from(ranges);
    while !rest.is_empty() {
        let Ok(room) = pieces.reserve().await else { return };
        let (file, now) = (handle.clone(), take(&mut rest, PIECE_BYTES));
        let read = tokio::task::spawn_blocking(move || {
            let length: u64 = now.iter().map(|range| range.end - range.start).sum();
            let mut piece = vec![0; length as usize];
            let mut free = piece.as_mut_slice();
            for range in now {
                let (part, behind) = free.split_at_mut((range.end - range.start) as usize);
                if read_full(file.as_ref(), part, range.start)? < part.len() {
                    return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
                }
                free = behind;
            }
            Ok(Bytes::from(piece))
        });
        match read.await {
            Ok(Ok(piece)) => room.send(Ok(piece)),
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

/// Takes ranges from the front whose sizes add up to `bytes`, or all of them if there are fewer bytes.
fn take(rest: &mut VecDeque<Range<u64>>, mut bytes: u64) -> Vec<Range<u64>> {
    let mut taken = Vec::new();
    while bytes > 0
        && let Some(first) = rest.front_mut()
    {
        let end = first.end.min(first.start.saturating_add(bytes));
        bytes -= end - first.start;
        taken.push(first.start..end);
        first.start = end;
        if first.is_empty() {
            rest.pop_front();
        }
    }
    taken
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_takes_what_fits_and_leaves_the_rest_in_order() {
        let mut rest = VecDeque::from(vec![10..14, 3..4, 100..120]);
        assert_eq!(take(&mut rest, 7), [10..14, 3..4, 100..102]);
        assert_eq!(take(&mut rest, 7).first(), Some(&(102..109)));
        assert_eq!(take(&mut rest, 70).first(), Some(&(109..120)));
        assert!(rest.is_empty() && take(&mut rest, 7).is_empty());
        // A file without bytes.
        let mut rest: VecDeque<_> = iter::once(0..0).collect();
        assert!(take(&mut rest, 7).iter().all(Range::is_empty) && rest.is_empty());
    }
}
