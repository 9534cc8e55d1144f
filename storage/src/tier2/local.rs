//! The file to upload, read and checked before anything is sent.
//!
//! A damaged tier-1 file never becomes an object: its sum is the job's, or it decodes to the end.

use super::{Sha256Sum, Tier2, digest::Hasher, parts::PART_BYTES};
use crate::{Error, Kind, Op, crypt::AtRest};
use bytes::Bytes;
use std::{
    fs::File,
    io::{self, Read},
    path::PathBuf,
    sync::Arc,
};
use tokio::sync::OwnedSemaphorePermit;

/// What to upload.
#[derive(Debug, Clone)]
pub struct Source {
    /// A finished file: nobody writes to it any more.
    pub path: PathBuf,
    /// Its sum when it was sealed, where known; then the file is not decoded to check it.
    pub sha256: Option<Sha256Sum>,
    /// Whether it is a zstd stream, when it is decrypted.
    pub zstd: bool,
    /// Size of what the zstd stream holds, where known.
    pub plaintext_bytes: Option<u64>,
    /// The unfinished end of a timeline: an object with the beginning of the same gives way to it (OBJECT6).
    pub grows: bool,
    /// How it is encrypted.
    pub wrapping: Wrapping,
}

/// How a file to upload is encrypted, and where the same may lie that is not encrypted so.
#[derive(Debug, Clone, Default)]
pub struct Wrapping {
    /// The file is an age file.
    pub age: bool,
    /// The key of the other form, where there is one: what lies there is the same file of other settings.
    pub other_key: Option<String>,
    /// What opens both.
    pub at_rest: AtRest,
}

impl Wrapping {
    /// What `from` holds, when its encryption is taken off.
    pub(super) fn unwrap(
        &self,
        from: impl Read + 'static,
        age: bool,
        place: &str,
    ) -> Result<Box<dyn Read>, Error> {
        if !age {
            return Ok(Box::new(from));
        }
        let keys = self.at_rest.need(place)?;
        Ok(Box::new(keys.decrypt(from).map_err(|e| e.at(place))?))
    }
}

/// A file that passed its check.
pub(super) struct Local {
    pub(super) source: Source,
    pub(super) size: u64,
    pub(super) sha256: Sha256Sum,
    /// The whole file, when it is small enough for one request, with its share of the budget.
    pub(super) held: Option<(Bytes, OwnedSemaphorePermit)>,
}

impl Tier2 {
    /// Reads and checks `source`; holds it in memory when it fits one request.
    pub(super) async fn read_local(&self, source: &Source) -> Result<Local, Error> {
        let fail = |error| Error::io(Op::Read, &source.path, error);
        let metadata = tokio::fs::metadata(&source.path).await.map_err(fail)?;
        let small = metadata.len() <= PART_BYTES;
        let permit = if small { Some(self.take_budget(metadata.len()).await?) } else { None };
        let task = source.clone();
        let (size, sha256, bytes) = blocking(move || check(&task, small)).await?;
        Ok(Local { source: source.clone(), size, sha256, held: bytes.zip(permit) })
    }

    /// A share of the memory budget; waits for its turn (the semaphore is fair).
    pub(super) async fn take_budget(&self, bytes: u64) -> Result<OwnedSemaphorePermit, Error> {
        let kib = u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX).clamp(1, self.budget_kib);
        Arc::clone(&self.budget).acquire_many_owned(kib).await.map_err(|_| {
            Error::new(Kind::Transient, Op::Upload, &self.url, "the upload budget is closed")
        })
    }
}

/// Runs file work where it may block.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => {
            Err(Error::new(Kind::Io, Op::Read, "a tier-1 file", format!("task failed: {error}")))
        }
    }
}

fn check(source: &Source, keep: bool) -> Result<(u64, Sha256Sum, Option<Bytes>), Error> {
    let fail = |error| Error::io(Op::Read, &source.path, error);
    let mut file = File::open(&source.path).map_err(fail)?;
    let mut hasher = Hasher::default();
    let mut kept = keep.then(Vec::new);
    let mut block = vec![0; 128 * 1024];
    loop {
        let count = file.read(&mut block).map_err(fail)?;
        if count == 0 {
            break;
        }
        hasher.update(&block[..count]);
        // A file that grew past the limit since it was measured must not grow past the budget.
        kept = kept.filter(|k| (k.len() + count) as u64 <= PART_BYTES);
        if let Some(kept) = &mut kept {
            kept.extend_from_slice(&block[..count]);
        }
    }
    let (size, sha256) = (hasher.bytes(), hasher.finish());
    if size == 0 {
        return Err(Error::new(Kind::Corrupt, Op::Read, source.path.display(), "found 0 bytes"));
    }
    // What no decoder can check, and of which the sum is known: a repository file, named by it.
    let decodes = source.zstd || source.wrapping.age;
    if let Some(expected) = source.sha256.filter(|expected| !decodes && *expected != sha256) {
        let detail = format!("expected the SHA-256 {expected}, found {sha256}");
        return Err(Error::new(Kind::Corrupt, Op::Read, source.path.display(), detail));
    }
    // A sum that differs is not damage yet: sealed again after a crash it is compressed or encrypted differently.
    if decodes && source.sha256 != Some(sha256) {
        plaintext_sum(source, source.plaintext_bytes)?;
    }
    Ok((size, sha256, kept.map(Bytes::from)))
}

/// Decodes a file to its end and gives the sum of what it holds.
pub(super) fn plaintext_sum(source: &Source, expected: Option<u64>) -> Result<Sha256Sum, Error> {
    let path = &source.path;
    let file = File::open(path).map_err(|error| Error::io(Op::Read, path, error))?;
    let place = path.display().to_string();
    let hasher = decode(file, source, source.wrapping.age, &place)?;
    match expected {
        Some(bytes) if bytes != hasher.bytes() => {
            let detail = format!("expected {bytes} bytes inside, found {}", hasher.bytes());
            Err(Error::new(Kind::Corrupt, Op::Decode, place, detail))
        }
        _ => Ok(hasher.finish()),
    }
}

/// The sum of the first so many bytes of what a file holds, if it has more than those.
pub(super) fn beginning_sum(source: &Source, bytes: u64) -> Result<Option<Sha256Sum>, Error> {
    let path = &source.path;
    let file = File::open(path).map_err(|error| Error::io(Op::Read, path, error))?;
    let mut hasher = Hasher::default();
    let mut plain = plain_reader(file, source, source.wrapping.age, &path.display().to_string())?;
    let corrupt = |error: io::Error| Error::new(Kind::Corrupt, Op::Decode, path.display(), error);
    let read = io::copy(&mut plain.by_ref().take(bytes), &mut hasher).map_err(corrupt)?;
    let goes_on = plain.read(&mut [0]).map_err(corrupt)? > 0;
    Ok((read == bytes && goes_on).then(|| hasher.finish()))
}

fn plain_reader(
    reader: impl Read + 'static,
    source: &Source,
    age: bool,
    place: &str,
) -> Result<Box<dyn Read>, Error> {
    let corrupt = |error: io::Error| {
        let detail = format!("no whole file: {error}");
        Error::new(Kind::Corrupt, Op::Decode, place, detail)
    };
    let plain = source.wrapping.unwrap(reader, age, place)?;
    if !source.zstd {
        return Ok(plain);
    }
    Ok(Box::new(zstd::stream::read::Decoder::new(plain).map_err(corrupt)?))
}

/// Decodes to the end of `reader`, keeping nothing but the sum; `age`: it is encrypted.
pub(super) fn decode(
    reader: impl Read + 'static,
    source: &Source,
    age: bool,
    place: &str,
) -> Result<Hasher, Error> {
    let corrupt = |error: io::Error| {
        let detail = format!("no whole file: {error}");
        Error::new(Kind::Corrupt, Op::Decode, place, detail)
    };
    let mut hasher = Hasher::default();
    let mut plain = plain_reader(reader, source, age, place)?;
    io::copy(&mut plain, &mut hasher).map_err(corrupt)?;
    Ok(hasher)
}
