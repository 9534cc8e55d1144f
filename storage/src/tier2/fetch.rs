//! Downloads, and the only place that may report an object as missing.
//!
//! P7: `Kind::NotFound` needs two answers: a 404 for the object, and a successful listing of its directory
//! that does not contain it. With a missing bucket, a proxy's 404 or an unmounted directory, the second
//! one fails.

use super::{Tier2, fault::classify};
use crate::{Error, Kind, Op};
use bytes::Bytes;
use futures::{Stream, StreamExt, TryStreamExt, stream::BoxStream};
use object_store::{ObjectStoreExt, path::Path};
use std::{
    pin::Pin,
    task::{Context, Poll},
};

/// How often a listed object is requested before it counts as unreadable.
const APPEARS_TRIES: u32 = 3;

/// An object that is being read: its size, then its bytes. Fails if bytes are missing.
pub struct Download {
    /// Size of the object in bytes.
    pub size: u64,
    place: String,
    left: u64,
    chunks: BoxStream<'static, object_store::Result<Bytes>>,
}

impl std::fmt::Debug for Download {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Download").field("place", &self.place).field("size", &self.size).finish()
    }
}

impl Stream for Download {
    type Item = Result<Bytes, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match self.chunks.poll_next_unpin(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Some(Ok(chunk))) => {
                self.left = self.left.saturating_sub(chunk.len() as u64);
                Poll::Ready(Some(Ok(chunk)))
            }
            Poll::Ready(Some(Err(error))) => {
                self.left = 0;
                Poll::Ready(Some(Err(classify(Op::Download, &self.place, error))))
            }
            Poll::Ready(None) if self.left > 0 => {
                let detail = format!("ended {} bytes early, expected {}", self.left, self.size);
                self.left = 0;
                let error = Error::new(Kind::Transient, Op::Download, &self.place, detail);
                Poll::Ready(Some(Err(error)))
            }
            Poll::Ready(None) => Poll::Ready(None),
        }
    }
}

impl Tier2 {
    /// Begins to read an object.
    ///
    /// # Errors
    /// `NotFound` is definitive: the bucket and directory could be listed and do not contain it.
    pub async fn download(&self, key: &str) -> Result<Download, Error> {
        let path = self.path(Op::Download, key)?;
        self.require_directory(Op::Download, key)?;
        let mut tries = 0;
        loop {
            match self.store.get(&path).await {
                Ok(object) => return Ok(self.downloading(key, object)),
                Err(object_store::Error::NotFound { .. }) => {
                    // It may have been uploaded between the two answers.
                    let error = self.why_missing(key, &path).await;
                    tries += 1;
                    if error.kind != Kind::Transient || tries == APPEARS_TRIES {
                        return Err(error);
                    }
                }
                Err(error) => return Err(classify(Op::Download, &self.place(key), error)),
            }
        }
    }

    /// The size of an object in bytes, or `None` when it definitely does not exist.
    ///
    /// # Errors
    /// Everything but a definitive absence.
    pub async fn size_of(&self, key: &str) -> Result<Option<u64>, Error> {
        let path = self.path(Op::Read, key)?;
        self.require_directory(Op::Read, key)?;
        match self.store.head(&path).await {
            Ok(meta) => Ok(Some(meta.size)),
            Err(object_store::Error::NotFound { .. }) => {
                let error = self.why_missing(key, &path).await;
                if error.kind == Kind::NotFound { Ok(None) } else { Err(error) }
            }
            Err(error) => Err(classify(Op::Read, &self.place(key), error)),
        }
    }

    pub(super) fn downloading(&self, key: &str, object: object_store::GetResult) -> Download {
        Download {
            size: object.meta.size,
            place: self.place(key),
            left: object.range.end - object.range.start,
            chunks: object.into_stream(),
        }
    }

    pub(super) async fn why_missing(&self, key: &str, path: &Path) -> Error {
        let fail = |kind, detail| Error::new(kind, Op::Download, self.place(key), detail);
        if let Err(error) = self.require_directory(Op::Download, key) {
            return error;
        }
        let (directory, name) = key.rsplit_once('/').unwrap_or(("", key));
        // Begins just before the name, so that even in a directory of a million segments one page is
        // enough.
        let before = name.get(..name.len().saturating_sub(1)).unwrap_or_default();
        let offset = Path::from(format!("{directory}/{before}"));
        let directory = Path::from(directory);
        let mut listing = self.store.list_with_offset(Some(&directory), &offset);
        loop {
            match listing.try_next().await {
                Ok(Some(meta)) if meta.location == *path => {
                    return fail(Kind::Transient, "listed, but not readable yet");
                }
                Ok(Some(meta)) if meta.location < *path => {}
                Ok(_) => return fail(Kind::NotFound, "no such object"),
                Err(error) => return classify(Op::Download, &self.place(key), error),
            }
        }
    }
}
