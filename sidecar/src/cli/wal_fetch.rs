//! `klio wal-fetch %f "%p"`: what restore_command runs.
//!
//! P7: only the server's own NOT_FOUND is "no such file"; everything else is tried again until the
//! timeout and then stops recovery. PATH appears complete, fsynced and of the exact size, or not at all.

use super::{args::WalFetchArgs, exit};
use crate::{
    config::Config,
    error::{Error, Failure},
    server_link::ServerLink,
    streamer::Backoff,
};
use bytes::Bytes;
use klio_pg::SegmentSize;
use klio_proto::{
    Code,
    v1::{FetchHeader, FetchKind, FetchRequest},
};
use klio_storage::layout::WalFile;
use rand::{SeedableRng, rngs::StdRng};
use std::{path::Path, time::Duration};
use tokio::{sync::mpsc, time::Instant};

mod place;

/// Pieces between the connection and the disk; the server sends up to 1 MiB each.
const PIECES_IN_FLIGHT: usize = 4;

/// Runs it.
pub(super) async fn run(config: &Config, args: &WalFetchArgs) -> Result<u8, Error> {
    let file: WalFile = args.name.parse().map_err(|error| {
        Error::new(Failure::Config, format!("read file name: {error}"))
            .hint("restore_command = 'klio wal-fetch %f \"%p\"'")
    })?;
    let fetch = Fetch {
        link: ServerLink::new(&config.server)?,
        cluster: config.cluster()?.to_string(),
        file,
        path: &args.path,
    };
    fetch.until(Instant::now() + args.timeout).await?;
    Ok(exit::OK)
}

struct Fetch<'a> {
    link: ServerLink,
    cluster: String,
    file: WalFile,
    path: &'a Path,
}

impl Fetch<'_> {
    /// Tries until it works, is refused for good, or the time is up.
    async fn until(&self, deadline: Instant) -> Result<(), Error> {
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(5));
        let mut rng = StdRng::from_os_rng();
        loop {
            let attempt = tokio::time::timeout_at(deadline, self.once()).await;
            let error = match attempt {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(error)) => error,
                Err(_) => {
                    let message = format!("fetch {}: not done within --timeout", self.file);
                    return Err(Error::new(Failure::Code(Code::Unavailable), message));
                }
            };
            let pause = backoff.pause(&mut rng);
            if !worth_retrying(&error) || Instant::now() + pause >= deadline {
                return Err(error);
            }
            tracing::warn!(hint = error.hint, "{}; trying again", error.message);
            tokio::time::sleep(pause).await;
        }
    }

    async fn once(&self) -> Result<(), Error> {
        let doing = format!("fetch {}", self.file);
        let connection = self.link.connect().await?;
        let request = FetchRequest { cluster: self.cluster.clone(), name: self.file.to_string() };
        let answer = connection.wal().fetch(request).await;
        let mut answer = answer.map_err(|status| Error::from_status(&doing, &status))?.into_inner();
        let first = answer.message().await.map_err(|status| Error::from_status(&doing, &status))?;
        let Some((header, data)) = first.and_then(|m| m.header.map(|h| (h, m.data))) else {
            return Err(Error::new(
                Failure::Code(Code::Unavailable),
                format!("{doing}: no answer"),
            ));
        };
        let form = Form::of(&header).map_err(|error| error.during(&doing))?;
        let (pieces, queue) = mpsc::channel::<Bytes>(PIECES_IN_FLIGHT);
        let path = self.path.to_owned();
        let writer = tokio::task::spawn_blocking(move || place::write(&path, form, queue));
        let mut next = Some(data);
        let mut broken = None;
        while let Some(data) = next {
            // A writer that gave up says why itself.
            if !data.is_empty() && pieces.send(data).await.is_err() {
                break;
            }
            next = match answer.message().await {
                Ok(message) => message.map(|m| m.data),
                Err(status) => {
                    broken = Some(Error::from_status(&doing, &status));
                    None
                }
            };
        }
        if broken.is_none() {
            // An empty piece means that all has come; a queue that just ends does not.
            let _ = pieces.send(Bytes::new()).await;
        }
        drop(pieces);
        let written = writer
            .await
            .unwrap_or_else(|error| Err(Error::new(Failure::Local, format!("write: {error}"))));
        match broken {
            Some(error) => Err(error),
            None => written.map_err(|error| error.during(&doing)),
        }
    }
}

/// All but a definitive answer. `Local` is not: the disk of the data directory is the caller's to mend.
fn worth_retrying(error: &Error) -> bool {
    match error.failure {
        Failure::Code(Code::Corrupt) => false,
        Failure::Local => false,
        failure => failure.retryable(),
    }
}

/// How the bytes come and how large the file has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Form {
    compressed: bool,
    /// Bytes that come, after decompression.
    plain: u64,
    /// Bytes of the file; the rest is zeros, which PostgreSQL reads as the end of WAL.
    full: u64,
}

/// A history file is some lines; the largest reasonable size.
const HISTORY_BYTES_MAX: u64 = 1 << 20;

impl Form {
    fn of(header: &FetchHeader) -> Result<Self, Error> {
        let wrong = |expected: String, found: String| {
            let message = format!("read answer: expected {expected}, found {found}");
            Error::new(Failure::Code(Code::Invalid), message)
        };
        let plain = header.plain_size;
        let compressed = match header.kind() {
            FetchKind::SegmentZstd | FetchKind::PartialZstd => true,
            FetchKind::PartialRaw => false,
            FetchKind::HistoryRaw if plain <= HISTORY_BYTES_MAX => {
                return Ok(Self { compressed: false, plain, full: plain });
            }
            FetchKind::HistoryRaw | FetchKind::Unspecified => {
                return Err(wrong("a kind this klio knows".into(), format!("{header:?}")));
            }
        };
        let segment = SegmentSize::new(header.segment_size)
            .map_err(|error| wrong("a segment size".into(), error.to_string()))?
            .bytes();
        let whole = header.kind() == FetchKind::SegmentZstd;
        if plain > segment || (whole && plain != segment) {
            return Err(wrong(format!("{segment} bytes"), format!("{plain} bytes")));
        }
        Ok(Self { compressed, plain, full: segment })
    }
}
