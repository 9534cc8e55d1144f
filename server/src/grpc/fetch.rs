//! Streams a found WAL file to the caller in bounded pieces: the header first, then the bytes.

use crate::{errors, fetch::Located};
use bytes::Bytes;
use futures::{Stream, StreamExt};
use klio_proto::v1::{self, FetchKind};
use klio_storage::{
    Error, Op,
    layout::WalFile,
    wal::{Found, OpenSegment},
};
use std::{io::Read, path::Path, pin::Pin};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::TaskTracker;
use tonic::Status;

/// Bytes of one message, and messages waiting: 1 MiB in flight for each fetch.
const PIECE_BYTES: usize = 256 << 10;
const PIECES_MAX: usize = 4;

type Pieces = mpsc::Sender<Result<v1::FetchResponse, Status>>;
type Answers = Pin<Box<dyn Stream<Item = Result<v1::FetchResponse, Status>> + Send>>;

/// The answer to a fetch.
pub fn stream(found: Located, tasks: &TaskTracker) -> Answers {
    let (pieces, outbound) = mpsc::channel(PIECES_MAX);
    match found {
        Located::Tier1 { found, segment_size } => {
            tasks.spawn_blocking(move || from_disk(found, segment_size, &pieces));
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

fn from_disk(found: Found, segment_size: u32, pieces: &Pieces) {
    let (kind, plain_size) = match &found {
        Found::Stored { file, plain_size, .. } => (kind_of(*file), *plain_size),
        Found::Open(open) => (FetchKind::PartialRaw, open.plain_size()),
    };
    let tier = "tier1".into();
    let header = v1::FetchHeader { kind: kind.into(), plain_size, segment_size, tier };
    let first = v1::FetchResponse { header: Some(header), data: Bytes::new() };
    if pieces.blocking_send(Ok(first)).is_err() {
        return;
    }
    let sent = match found {
        Found::Stored { path, .. } => send_file(&path, pieces),
        Found::Open(open) => send_open(open, pieces),
    };
    if let Err(error) = sent {
        drop(pieces.blocking_send(Err(errors::status(&error))));
    }
}

/// The durable bytes of a segment that is still being received.
fn send_open(mut open: OpenSegment, pieces: &Pieces) -> Result<(), Error> {
    while let Some(chunk) = open.next_chunk()? {
        for piece in chunk.chunks(PIECE_BYTES) {
            let response = v1::FetchResponse { header: None, data: Bytes::copy_from_slice(piece) };
            if pieces.blocking_send(Ok(response)).is_err() {
                return Ok(()); // The caller hung up.
            }
        }
    }
    Ok(())
}

fn send_file(path: &Path, pieces: &Pieces) -> Result<(), Error> {
    let fail = |error| Error::io(Op::Read, path, error);
    let mut file = std::fs::File::open(path).map_err(fail)?;
    loop {
        let mut piece = Vec::with_capacity(PIECE_BYTES);
        let length = (&mut file).take(PIECE_BYTES as u64).read_to_end(&mut piece).map_err(fail)?;
        if length == 0 {
            return Ok(());
        }
        let response = v1::FetchResponse { header: None, data: piece.into() };
        if pieces.blocking_send(Ok(response)).is_err() {
            return Ok(());
        }
    }
}
