//! The file to upload, read and verified before anything is sent.
//!
//! A damaged tier-1 file never becomes an object: either its checksum is the one in the job, or it decodes to the
//! end.

use super::{Hasher, Sha256Sum, Tier2, parts::PART_BYTES};
use crate::{Error, Kind, Op, crypt::AtRest};
use bytes::Bytes;
use std::{
    fs::File,
    io::{self, Read},
    path::PathBuf,
    sync::Arc,
};
use tokio::sync::OwnedSemaphorePermit;

/// A file to upload.
#[derive(Debug, Clone)]
pub struct Source {
    /// A finished file that nobody writes to any more.
    pub path: PathBuf,
    /// Its checksum when it was sealed, if known; then the file need not be decoded for verification.
    pub sha256: Option<Sha256Sum>,
    /// Whether it is a zstd stream, once decrypted.
    pub zstd: bool,
    /// The uncompressed size of the zstd stream in bytes, if known.
    pub plaintext_bytes: Option<u64>,
    /// Whether it is the partial segment at the end of a timeline: it replaces an object that has its beginning
    /// (OBJECT6).
    pub grows: bool,
    pub wrapping: Wrapping,
}

/// How a file to upload is encrypted, and where the same file may be stored in the other form.
#[derive(Debug, Clone, Default)]
pub struct Wrapping {
    /// Whether the file is an age file.
    pub age: bool,
    /// The key of the other form, if there is one: an object there is the same file from earlier settings.
    pub other_key: Option<String>,
    /// The keys that decrypt both.
    pub at_rest: AtRest,
}

impl Wrapping {
    /// The decrypted content of `from`.
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

/// A file that was verified.
pub(super) struct Local {
    pub(super) source: Source,
    pub(super) size: u64,
    pub(super) sha256: Sha256Sum,
    /// The whole file with its share of the memory budget, if it is small enough for one request.
    pub(super) held: Option<(Bytes, OwnedSemaphorePermit)>,
}

impl Tier2 {
    /// Reads and verifies `source`; keeps it in memory if it fits one request.
    pub(super) async fn read_local(&self, source: &Source) -> Result<Local, Error> {
        let fail = |error| Error::io(Op::Read, &source.path, error);
        let metadata = tokio::fs::metadata(&source.path).await.map_err(fail)?;
        let small = metadata.len() <= PART_BYTES;
        let permit = if small { Some(self.take_budget(metadata.len()).await?) } else { None };
        let task = source.clone();
        let (size, sha256, bytes) = blocking(move || check(&task, small)).await?;
        Ok(Local { source: source.clone(), size, sha256, held: bytes.zip(permit) })
    }

    /// Takes a share of the memory budget, waiting if necessary (the semaphore is fair).
    pub(super) async fn take_budget(&self, bytes: u64) -> Result<OwnedSemaphorePermit, Error> {
        let kib = u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX).clamp(1, self.budget_kib);
        Arc::clone(&self.budget).acquire_many_owned(kib).await.map_err(|_| {
            Error::new(Kind::Transient, Op::Upload, &self.url, "the upload budget is closed")
        })
    }
}

/// Runs file work on a thread that may block.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => {
            Err(Error::new(Kind::Io, Op::Read, "tier-1 file", format!("task failed: {error}")))
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
        // A file that has grown beyond the limit since its size was read must not exceed the budget.
        kept = kept.filter(|k| (k.len() + count) as u64 <= PART_BYTES);
        if let Some(kept) = &mut kept {
            kept.extend_from_slice(&block[..count]);
        }
    }
    let (size, sha256) = (hasher.bytes(), hasher.finish());
    if size == 0 {
        return Err(Error::new(Kind::Corrupt, Op::Read, source.path.display(), "found 0 bytes"));
    }
    // A file that cannot be decoded and whose checksum is known: a repository file, which is named by it.
    let decodes = source.zstd || source.wrapping.age;
    if let Some(expected) = source.sha256.filter(|expected| !decodes && *expected != sha256) {
        let detail = format!("expected the SHA-256 {expected}, found {sha256}");
        return Err(Error::new(Kind::Corrupt, Op::Read, source.path.display(), detail));
    }
    // A different checksum is not damage yet: a file that was sealed again after a crash may be compressed or
    // encrypted differently.
    if decodes && source.sha256 != Some(sha256) {
        plaintext_sum(source, source.plaintext_bytes)?;
    }
    Ok((size, sha256, kept.map(Bytes::from)))
}

/// Decodes a file to its end and returns the checksum of its content.
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

/// The checksum of the first `bytes` bytes of a file's content, if the content is longer.
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
        let detail = format!("expected a complete file, found: {error}");
        Error::new(Kind::Corrupt, Op::Decode, place, detail)
    };
    let plain = source.wrapping.unwrap(reader, age, place)?;
    if !source.zstd {
        return Ok(plain);
    }
    Ok(Box::new(zstd::stream::read::Decoder::new(plain).map_err(corrupt)?))
}

/// Decodes `reader` to its end and returns the checksum; `age` says whether it is encrypted.
pub(super) fn decode(
    reader: impl Read + 'static,
    source: &Source,
    age: bool,
    place: &str,
) -> Result<Hasher, Error> {
    let corrupt = |error: io::Error| {
        let detail = format!("expected a complete file, found: {error}");
        Error::new(Kind::Corrupt, Op::Decode, place, detail)
    };
    let mut hasher = Hasher::default();
    let mut plain = plain_reader(reader, source, age, place)?;
    io::copy(&mut plain, &mut hasher).map_err(corrupt)?;
    Ok(hasher)
}
