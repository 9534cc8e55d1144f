//! Streams a found WAL file to the caller in bounded pieces: the header first, then the bytes.

use crate::{errors, fetch::Located};
use bytes::Bytes;
use futures::{Stream, StreamExt};
use klio_proto::{
    Code,
    v1::{self, FetchKind},
};
use klio_storage::{layout::WalFile, wal::Found};
use std::{io::Read, pin::Pin};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::TaskTracker;
use tonic::Status;

/// Bytes of one message, and messages waiting: 1 MiB in flight for each fetch.
const PIECE_BYTES: usize = 256 << 10;
const PIECES_MAX: usize = 4;

type Answers = Pin<Box<dyn Stream<Item = Result<v1::FetchResponse, Status>> + Send>>;

/// The answer to a fetch.
pub fn stream(found: Located, tasks: &TaskTracker) -> Answers {
    let (pieces, outbound) = mpsc::channel(PIECES_MAX);
    match found {
        Located::Tier1(found) => {
            tasks.spawn_blocking(move || from_disk(found, &pieces));
        }
        Located::Tier2 { file, download, segment_size } => {
            tasks.spawn(async move {
                let header = header_of(file, segment_size);
                let first = v1::FetchResponse { header: Some(header), data: Bytes::new() };
                if pieces.send(Ok(first)).await.is_err() {
                    return;
                }
                let mut download = download;
                while let Some(piece) = download.next().await {
                    let piece = piece
                        .map(|data| v1::FetchResponse { header: None, data })
                        .map_err(|error| errors::status(&error));
                    let failed = piece.is_err();
                    if pieces.send(piece).await.is_err() || failed {
                        return;
                    }
                }
            });
        }
    }
    ReceiverStream::new(outbound).boxed()
}

fn kind_of(file: WalFile) -> FetchKind {
    match file {
        WalFile::Segment(_) => FetchKind::SegmentZstd,
        WalFile::Partial(_) => FetchKind::PartialZstd,
        WalFile::History(_) => FetchKind::HistoryRaw,
    }
}

fn header_of(file: WalFile, segment_size: u32) -> v1::FetchHeader {
    let plain_size = match file {
        WalFile::Segment(_) => u64::from(segment_size),
        _ => 0,
    };
    v1::FetchHeader { kind: kind_of(file).into(), plain_size, segment_size, tier: "tier2".into() }
}

fn from_disk(found: Found, pieces: &mpsc::Sender<Result<v1::FetchResponse, Status>>) {
    let kind = match &found {
        Found::Stored { file, .. } => kind_of(*file),
        Found::Open { .. } => FetchKind::PartialRaw,
    };
    let (plain_size, segment_size) = (found.plain_size(), found.segment_size());
    let header = v1::FetchHeader {
        kind: kind.into(),
        plain_size,
        segment_size: segment_size.as_u32(),
        tier: "tier1".into(),
    };
    let first = v1::FetchResponse { header: Some(header), data: Bytes::new() };
    if pieces.blocking_send(Ok(first)).is_err() {
        return;
    }
    let mut reader = match found.into_reader() {
        Ok(reader) => reader,
        Err(error) => return drop(pieces.blocking_send(Err(errors::status(&error)))),
    };
    loop {
        let mut piece = vec![0; PIECE_BYTES];
        match fill(&mut reader, &mut piece) {
            Ok(0) => return,
            Ok(length) => {
                piece.truncate(length);
                let response = v1::FetchResponse { header: None, data: piece.into() };
                if pieces.blocking_send(Ok(response)).is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::error!(%error, "read WAL for a fetch");
                let status = Code::StorageFailed.status("the file could not be read to its end");
                return drop(pieces.blocking_send(Err(status)));
            }
        }
    }
}

fn fill(reader: &mut impl Read, piece: &mut [u8]) -> std::io::Result<usize> {
    let mut length = 0;
    while length < piece.len() {
        match reader.read(&mut piece[length..]) {
            Ok(0) => break,
            Ok(n) => length += n,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(length)
}
