//! Streams a found WAL file to the caller in bounded pieces: the header first, then the bytes.

use crate::{errors, fetch::Located};
use bytes::Bytes;
use futures::{Stream, StreamExt};
use klio_proto::{
    Code,
    v1::{self, FetchKind},
};
use klio_storage::{
    Error, Kind, Op,
    crypt::{Keys, payload_error},
    layout::WalFile,
    tier2::Download,
    wal::{Found, OpenSegment, open_stored},
};
use std::{
    io::Read,
    path::{Path, PathBuf},
    pin::Pin,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::TaskTracker;
use tonic::Status;
use tracing::{Instrument, Span};

/// Bytes of one message, and how many messages may wait: 1 MiB in memory for each fetch.
const PIECE_BYTES: usize = 256 << 10;
const PIECES_MAX: usize = 4;

type Pieces = mpsc::Sender<Result<v1::FetchResponse, Status>>;
type Answers = Pin<Box<dyn Stream<Item = Result<v1::FetchResponse, Status>> + Send>>;

/// The answer to a fetch.
pub fn stream(found: Located, before_hole: bool, tasks: &TaskTracker) -> Answers {
    let (pieces, outbound) = mpsc::channel(PIECES_MAX);
    match found {
        Located::Tier1 { found, segment_size } => {
            Span::current().record("tier", "tier1");
            tasks.spawn(from_disk(found, segment_size, before_hole, pieces).in_current_span());
        }
        Located::Tier2 { file, download, keys, segment_size } => {
            Span::current().record("tier", "tier2");
            Span::current().record("bytes", download.size);
            let facts = (segment_size, before_hole);
            let sending = from_bucket(file, download, keys, facts, pieces);
            tasks.spawn(sending.in_current_span());
        }
    }
    ReceiverStream::new(outbound).boxed()
}

/// A history that is sent instead of the stored one.
pub fn history(content: &'static str) -> Answers {
    let header = v1::FetchHeader {
        kind: FetchKind::HistoryRaw.into(),
        plain_size: content.len() as u64,
        ..v1::FetchHeader::default()
    };
    let data = Bytes::from_static(content.as_bytes());
    futures::stream::iter([Ok(v1::FetchResponse { header: Some(header), data })]).boxed()
}

fn kind_of(file: WalFile) -> FetchKind {
    match file {
        WalFile::Segment(_) => FetchKind::SegmentZstd,
        WalFile::Partial(_) => FetchKind::PartialZstd,
        WalFile::History(_) => FetchKind::HistoryRaw,
    }
}

fn header_of(file: WalFile, segment_size: u32, before_hole: bool) -> v1::FetchHeader {
    let plain_size = match file {
        WalFile::Segment(_) => u64::from(segment_size),
        _ => 0,
    };
    let (kind, tier) = (kind_of(file).into(), "tier2".into());
    v1::FetchHeader { kind, plain_size, segment_size, tier, before_hole }
}

async fn from_bucket(
    file: WalFile,
    download: Download,
    keys: Option<Keys>,
    (segment_size, before_hole): (u32, bool),
    pieces: Pieces,
) {
    let header = header_of(file, segment_size, before_hole);
    let first = v1::FetchResponse { header: Some(header), data: Bytes::new() };
    if pieces.send(Ok(first)).await.is_err() {
        return;
    }
    let plain = match keys {
        None => Ok(download.boxed()),
        Some(keys) => keys.decrypt_stream(download, file.to_string()).await.map(StreamExt::boxed),
    };
    let mut plain = match plain {
        Ok(plain) => plain,
        Err(error) => return drop(pieces.send(Err(broken(&error))).await),
    };
    while let Some(piece) = plain.next().await {
        let piece = piece
            .map(|data| v1::FetchResponse { header: None, data })
            .map_err(|error| broken(&error));
        let failed = piece.is_err();
        if pieces.send(piece).await.is_err() || failed {
            return;
        }
    }
}

async fn from_disk(found: Found, segment_size: u32, before_hole: bool, pieces: Pieces) {
    let (kind, plain_size) = match &found {
        Found::Stored { file, plain_size, .. } => (kind_of(*file), *plain_size),
        Found::Open(open) => (FetchKind::PartialRaw, open.plain_size()),
    };
    Span::current().record("bytes", plain_size);
    let tier = "tier1".into();
    let kind = kind.into();
    let header = v1::FetchHeader { kind, plain_size, segment_size, tier, before_hole };
    let first = v1::FetchResponse { header: Some(header), data: Bytes::new() };
    if pieces.send(Ok(first)).await.is_err() {
        return;
    }
    let mut reader = match found {
        Found::Stored { path, keys, .. } => Reader::Stored { path, keys, file: None },
        // The durable bytes of a segment that is still being received.
        Found::Open(open) => Reader::Open(open),
    };
    // A thread is used for each piece, and only when the caller has room for it, so that callers which do not read
    // cannot block the threads that write WAL of others (P8).
    while let Ok(room) = pieces.reserve().await {
        let read = tokio::task::spawn_blocking(move || (reader.next(), reader)).await;
        match read {
            Ok((Ok(data), _)) if data.is_empty() => return,
            Ok((Ok(data), back)) => {
                reader = back;
                room.send(Ok(v1::FetchResponse { header: None, data }));
            }
            Ok((Err(error), _)) => return room.send(Err(broken(&error))),
            Err(error) => {
                return room.send(Err(Code::Internal.status(format!("read tier 1: {error}"))));
            }
        }
    }
}

/// The status of a transfer that has begun. A file that was found and then vanished is not "not found" (P7).
fn broken(error: &Error) -> Status {
    match error.kind {
        Kind::NotFound => {
            tracing::error!(%error, "a WAL file vanished while it was being read");
            Code::Unavailable.status("read WAL: the file vanished while it was being read")
        }
        _ => errors::status(error),
    }
}

/// The part of a file that is still to be sent.
enum Reader {
    Stored { path: PathBuf, keys: Option<Keys>, file: Option<Box<dyn Read + Send>> },
    Open(Box<OpenSegment>),
}

impl Reader {
    /// The next piece; empty at the end.
    fn next(&mut self) -> Result<Bytes, Error> {
        let mut piece = Vec::with_capacity(PIECE_BYTES);
        let limit = PIECE_BYTES as u64;
        match self {
            Reader::Stored { path, keys, file } => {
                let file = match file {
                    Some(file) => file,
                    None => file.insert(open_stored(path, keys.as_ref())?),
                };
                let read = file.take(limit).read_to_end(&mut piece);
                read.map_err(|error| payload_error(path.display(), &error))?;
            }
            Reader::Open(open) => {
                open.take(limit).read_to_end(&mut piece).map_err(|error| {
                    error.downcast().unwrap_or_else(|e| Error::io(Op::Read, Path::new("WAL"), e))
                })?;
            }
        }
        Ok(piece.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn stored(path: PathBuf) -> Located {
        let file = "000000010000000000000001".parse().unwrap();
        let encoding = klio_storage::wal::Encoding::Zstd;
        let found =
            Found::Stored { file, path, size: 0, plain_size: 1 << 20, encoding, keys: None };
        Located::Tier1 { found, segment_size: 1 << 20 }
    }

    /// P8: a caller that does not read blocks no thread.
    #[test]
    fn a_caller_that_does_not_read_holds_no_thread() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        std::fs::write(&path, vec![1; PIECE_BYTES * 20 + 5]).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(1)
            .build()
            .unwrap();
        runtime.block_on(async {
            let tasks = TaskTracker::new();
            let mut unread: Vec<_> =
                (0..3).map(|_| stream(stored(path.clone()), false, &tasks)).collect();
            for _ in 0..20 {
                let other = tokio::task::spawn_blocking(|| ());
                tokio::time::timeout(Duration::from_secs(10), other).await.unwrap().unwrap();
            }
            // When it does read, it receives everything.
            let mut count = 0;
            while let Some(piece) = unread[0].next().await {
                count += piece.unwrap().data.len();
            }
            assert_eq!(count, PIECE_BYTES * 20 + 5);
        });
    }

    #[tokio::test]
    async fn a_file_that_vanished_after_it_was_found_is_not_not_found() {
        let tasks = TaskTracker::new();
        let mut answer = stream(stored("/nonexistent/x".into()), false, &tasks);
        assert!(answer.next().await.unwrap().is_ok());
        let status = answer.next().await.unwrap().unwrap_err();
        assert_eq!(Code::of(&status), Code::Unavailable);
    }
}
