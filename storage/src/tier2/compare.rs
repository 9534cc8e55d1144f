//! Decides whether an object that already exists is the one we would have written.
//!
//! The same bytes count as done, and so do other bytes with the same plaintext (a segment that was sealed twice, or
//! that was uploaded before encryption was switched on). Every age file has a key of its own, so of encrypted files
//! only the plaintext can be compared. An object with the beginning of a growing file is replaced by all of it
//! (OBJECT6): this is the partial segment at the end of a timeline whose PostgreSQL came back. Anything else is a
//! conflict, and the object is left alone (OBJECT4).

use super::{
    Sha256Sum, Source, Tier2,
    fault::classify,
    local::{Local, beginning_sum, blocking, decode, plaintext_sum},
    transfer::{Outcome, Uploaded},
};
use crate::{Error, Kind, Op, sum::Hasher};
use bytes::Bytes;
use futures::{Stream, StreamExt};
use object_store::{ObjectMeta, ObjectStoreExt, path::Path};
use std::io::{self, Read};
use tokio::sync::mpsc;

impl Tier2 {
    /// Compares the content of an existing object under our key; `age` says whether the object is encrypted.
    pub(super) async fn compare(
        &self,
        key: &str,
        path: &Path,
        found: &ObjectMeta,
        local: &Local,
        age: bool,
    ) -> Result<Uploaded, Error> {
        let same =
            Uploaded { size: found.size, sha256: local.sha256, outcome: Outcome::AlreadyThere };
        if found.size == local.size && self.object_sum(key, path).await? == local.sha256 {
            return Ok(same);
        }
        let conflict = |detail: String| {
            Error::new(Kind::Conflict, Op::Upload, self.place(key), detail)
                .hint("check whether two clusters share this prefix and compare both files; nothing was changed")
        };
        if !local.source.zstd && !local.source.wrapping.age && !age {
            return Err(conflict("an object with other content already exists".into()));
        }
        let source = local.source.clone();
        let ours = blocking(move || plaintext_sum(&source, None)).await?;
        match self.object_plaintext_sum(key, path, &local.source, age).await {
            Ok((theirs, _)) if theirs == ours => Ok(same),
            Ok((theirs, bytes)) if self.is_beginning(local, age, theirs, bytes).await? => {
                self.extend(key, path, found, local).await
            }
            Ok(_) => Err(conflict("an object with other plaintext already exists".into())),
            Err(error) if error.kind == Kind::Corrupt => {
                Err(conflict(format!("an object that cannot be decoded already exists: {error}")))
            }
            Err(error) => Err(error),
        }
    }

    /// Whether an object has only the beginning of a growing file. An object in the other form is not replaced: with
    /// two objects of one file nobody could tell which is the longer.
    async fn is_beginning(
        &self,
        local: &Local,
        age: bool,
        theirs: Sha256Sum,
        bytes: u64,
    ) -> Result<bool, Error> {
        if !local.source.grows || age != local.source.wrapping.age {
            return Ok(false);
        }
        let source = local.source.clone();
        Ok(blocking(move || beginning_sum(&source, bytes)).await? == Some(theirs))
    }

    pub(super) async fn object_sum(&self, key: &str, path: &Path) -> Result<Sha256Sum, Error> {
        let mut chunks = self.object_stream(key, path).await?;
        let mut hasher = Hasher::default();
        while let Some(chunk) = chunks.next().await {
            hasher.update(&chunk.map_err(|e| classify(Op::Download, &self.place(key), e))?);
        }
        Ok(hasher.finish())
    }

    async fn object_stream(
        &self,
        key: &str,
        path: &Path,
    ) -> Result<impl Stream<Item = object_store::Result<Bytes>> + Unpin + use<>, Error> {
        let fail = |e| classify(Op::Download, &self.place(key), e);
        Ok(self.store.get(path).await.map_err(fail)?.into_stream())
    }

    /// The checksum and length of an object's plaintext. `Corrupt` when the stored bytes cannot be decoded; other
    /// errors come from the store or a missing key.
    async fn object_plaintext_sum(
        &self,
        key: &str,
        path: &Path,
        source: &Source,
        age: bool,
    ) -> Result<(Sha256Sum, u64), Error> {
        let mut chunks = self.object_stream(key, path).await?;
        // Two chunks in flight: decoding waits for the network, never the other way round.
        let (sender, receiver) = mpsc::channel(2);
        let feed = async move {
            while let Some(chunk) = chunks.next().await {
                if sender.send(chunk?).await.is_err() {
                    break; // the decoder gave up: it has its own error
                }
            }
            Ok::<_, object_store::Error>(())
        };
        let (source, place) = (source.clone(), self.place(key));
        let decoded = blocking(move || {
            let hasher = decode(ChunkReader::new(receiver), &source, age, &place)?;
            let bytes = hasher.bytes();
            Ok((hasher.finish(), bytes))
        });
        let (fed, decoded) = tokio::join!(feed, decoded);
        fed.map_err(|error| classify(Op::Download, &self.place(key), error))?;
        decoded
    }
}

/// Presents the chunks of a channel as a blocking reader.
pub(super) struct ChunkReader {
    receiver: mpsc::Receiver<Bytes>,
    chunk: Bytes,
}

impl ChunkReader {
    pub(super) fn new(receiver: mpsc::Receiver<Bytes>) -> Self {
        Self { receiver, chunk: Bytes::new() }
    }
}

impl Read for ChunkReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.chunk.is_empty() {
            match self.receiver.blocking_recv() {
                Some(chunk) => self.chunk = chunk,
                None => return Ok(0),
            }
        }
        let count = buffer.len().min(self.chunk.len());
        buffer[..count].copy_from_slice(&self.chunk.split_to(count));
        Ok(count)
    }
}
