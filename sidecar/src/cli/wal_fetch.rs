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
                    // The answer had begun: whatever broke it off, it is no "no such file" (P7).
                    let error = Error::from_status(&doing, &status);
                    broken = Some(match error.failure {
                        Failure::Code(Code::NotFound) => {
                            Error::new(Failure::Code(Code::Unavailable), error.message)
                        }
                        _ => error,
                    });
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
    /// Bytes that come, after decompression; `None` where the tier does not know before reading.
    plain: Option<u64>,
    full: Full,
}

/// The size of the finished file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Full {
    /// At most this, and as it came.
    UpTo(u64),
    /// Any size that PostgreSQL's segments can have, as it came.
    AnySegment,
    /// This; what is missing is zeros, which PostgreSQL reads as the end of WAL.
    Padded(u64),
}

/// A history file is some lines; the largest reasonable size.
const HISTORY_BYTES_MAX: u64 = 1 << 20;

impl Form {
    fn of(header: &FetchHeader) -> Result<Self, Error> {
        let wrong = |expected: String, found: String| {
            let message = format!("read answer: expected {expected}, found {found}");
            Error::new(Failure::Code(Code::Invalid), message)
        };
        let known = Some(header.plain_size).filter(|size| *size > 0);
        let segment = match header.segment_size {
            0 => None,
            size => Some(
                SegmentSize::new(size)
                    .map_err(|error| wrong("a segment size".into(), error.to_string()))?
                    .bytes(),
            ),
        };
        let padded = || match segment {
            Some(segment) if header.plain_size <= segment => Ok(Full::Padded(segment)),
            _ => Err(wrong(
                "a part of a segment of known size".into(),
                format!("{} bytes of {}", header.plain_size, header.segment_size),
            )),
        };
        let (compressed, plain, full) = match (header.kind(), segment) {
            (FetchKind::SegmentZstd, None) => (true, known, Full::AnySegment),
            (FetchKind::SegmentZstd, Some(segment)) if known.is_none_or(|size| size == segment) => {
                (true, Some(segment), Full::UpTo(segment))
            }
            (FetchKind::PartialZstd, _) => (true, known, padded()?),
            (FetchKind::PartialRaw, _) => (false, Some(header.plain_size), padded()?),
            (FetchKind::HistoryRaw, _) => (false, known, Full::UpTo(HISTORY_BYTES_MAX)),
            _ => return Err(wrong("a file this klio knows".into(), format!("{header:?}"))),
        };
        Ok(Self { compressed, plain, full })
    }

    /// The most that may come.
    fn limit(&self) -> u64 {
        match self.full {
            Full::UpTo(bytes) | Full::Padded(bytes) => bytes,
            Full::AnySegment => SEGMENT_BYTES_MAX,
        }
    }

    /// The size of the file when `came` bytes came; `None` when that cannot be all.
    fn full_size(&self, came: u64) -> Option<u64> {
        if self.plain.is_some_and(|plain| plain != came) || came > self.limit() {
            return None;
        }
        match self.full {
            Full::UpTo(_) => Some(came).filter(|came| *came > 0),
            Full::Padded(full) => Some(full),
            Full::AnySegment => {
                u32::try_from(came).ok().filter(|n| SegmentSize::new(*n).is_ok()).map(u64::from)
            }
        }
    }
}

/// The largest wal_segment_size.
const SEGMENT_BYTES_MAX: u64 = 1 << 30;

#[cfg(test)]
mod tests {
    use super::*;

    fn form(kind: FetchKind, plain_size: u64, segment_size: u32) -> Result<Form, Error> {
        Form::of(&FetchHeader { kind: kind.into(), plain_size, segment_size, tier: String::new() })
    }

    #[test]
    fn a_segment_has_its_exact_size() {
        let known = form(FetchKind::SegmentZstd, 1 << 24, 1 << 24).unwrap();
        assert_eq!(known.full_size(1 << 24), Some(1 << 24));
        assert_eq!(known.full_size((1 << 24) - 1), None);
        assert!(form(FetchKind::SegmentZstd, 5, 1 << 24).is_err());
        // From a bucket whose cluster the server does not know.
        let unknown = form(FetchKind::SegmentZstd, 0, 0).unwrap();
        assert_eq!(unknown.full_size(1 << 20), Some(1 << 20));
        assert_eq!(unknown.full_size((1 << 20) - 1), None);
        assert_eq!(unknown.full_size(0), None);
    }

    #[test]
    fn a_partial_segment_is_padded() {
        let raw = form(FetchKind::PartialRaw, 100, 1 << 20).unwrap();
        assert_eq!((raw.full_size(100), raw.full_size(99)), (Some(1 << 20), None));
        let stored = form(FetchKind::PartialZstd, 0, 1 << 20).unwrap();
        assert_eq!(stored.full_size(7), Some(1 << 20));
        assert_eq!(stored.full_size((1 << 20) + 1), None);
        assert!(form(FetchKind::PartialRaw, 2 << 20, 1 << 20).is_err());
        assert!(form(FetchKind::PartialRaw, 1, 0).is_err());
    }

    #[test]
    fn a_history_file_is_small_and_not_empty() {
        let history = form(FetchKind::HistoryRaw, 0, 0).unwrap();
        assert_eq!(history.full_size(50), Some(50));
        assert_eq!((history.full_size(0), history.full_size(2 << 20)), (None, None));
        assert!(form(FetchKind::Unspecified, 0, 0).is_err());
        assert!(form(FetchKind::SegmentZstd, 0, 3).is_err());
    }
}
