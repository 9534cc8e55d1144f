//! Writes the bytes of an answer into a file and checks that they are the requested file.
//!
//! Runs on a blocking thread. A target is complete and checked before it is committed; without a commit it is
//! removed. P7: bytes that end early, cannot be decoded, or belong to another name, timeline, position or PostgreSQL
//! are an error here, because PostgreSQL would take them for the end of WAL.

use super::{
    fetch::{Expected, Received},
    shape::{Content, Shape},
};
use crate::error::{Error, Failure, local};
use bytes::{Buf, Bytes};
use klio_pg::{SEGMENT_HEADER_BYTES, SegmentHeader, TimelineHistory};
use klio_proto::Code;
use klio_storage::{crypt::Keys, layout::WalFile};
use std::{
    fs::{self, File, TryLockError},
    io::{self, Read, Seek, Write},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};
use tokio::sync::mpsc;

/// Bytes per write; a larger buffer was not faster.
const COPY_BYTES: usize = 128 << 10;

/// How to turn the received bytes into the file, and what to check.
#[derive(Debug)]
pub(super) struct Filling {
    pub file: WalFile,
    pub shape: Shape,
    pub keys: Option<Keys>,
    pub expected: Expected,
}

/// A file that is being written. Dropping it without a commit removes the file.
#[derive(Debug)]
pub struct Target {
    file: File,
    path: PathBuf,
    done: AtomicBool,
}

impl Target {
    /// Creates a new file in a directory that only our user can write to.
    ///
    /// # Errors
    /// A file-system error.
    pub fn create(path: PathBuf) -> Result<Self, Error> {
        let options = options().create_new(true).open(&path);
        let file = options.map_err(|error| local("create", &path, &error))?;
        Ok(Self { file, path, done: AtomicBool::new(false) })
    }

    /// Creates a temporary file beside `path` that no other process writes: each process locks its own, and a file
    /// that a killed process left is used again.
    ///
    /// # Errors
    /// A file-system error.
    pub fn beside(path: &Path) -> Result<Self, Error> {
        for number in 0..64 {
            let mut name = path.file_name().unwrap_or_default().to_owned();
            name.push(".klio-part");
            if number > 0 {
                name.push(number.to_string());
            }
            let place = path.with_file_name(name);
            let fail = |error| local("create", &place, &error);
            let file = options().create(true).truncate(false).open(&place).map_err(fail)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => continue,
                Err(TryLockError::Error(error)) => return Err(local("lock", &place, &error)),
            }
            // Another process may have renamed the file after we opened and before we locked it.
            let same = fs::metadata(&place)
                .and_then(|there| Ok((there, file.metadata()?)))
                .is_ok_and(|(there, ours)| there.ino() == ours.ino() && there.dev() == ours.dev());
            if same {
                return Ok(Self { file, path: place, done: AtomicBool::new(false) });
            }
        }
        let error = io::Error::other("every temporary name is being written by another process");
        Err(local("create a file beside", path, &error))
    }

    /// Renames the file to `path`; with `durable`, after fsync of the file and followed by fsync of its directory.
    ///
    /// # Errors
    /// A file-system error. The temporary file is removed when this is dropped.
    pub fn commit(&self, path: &Path, durable: bool) -> Result<(), Error> {
        if durable {
            self.file.sync_all().map_err(|error| self.failed(&error))?;
        }
        fs::rename(&self.path, path).map_err(|error| local("rename to", path, &error))?;
        self.done.store(true, Ordering::Relaxed);
        if durable {
            let directory = path.parent().filter(|p| !p.as_os_str().is_empty());
            let directory = directory.unwrap_or(Path::new("."));
            let synced = File::open(directory).and_then(|directory| directory.sync_all());
            synced.map_err(|error| local("sync directory", directory, &error))?;
        }
        Ok(())
    }

    fn failed(&self, error: &io::Error) -> Error {
        local("write", &self.path, error)
    }

    /// The first bytes of the file; `None` when it is shorter than a segment's header.
    fn header(&self, size: u64) -> Result<Option<[u8; SEGMENT_HEADER_BYTES]>, Error> {
        let mut bytes = [0; SEGMENT_HEADER_BYTES];
        if size < SEGMENT_HEADER_BYTES as u64 {
            return Ok(None);
        }
        let read = self.file.read_exact_at(&mut bytes, 0);
        read.map(|()| Some(bytes)).map_err(|error| local("read", &self.path, &error))
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if !self.done.load(Ordering::Relaxed) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Mode 0666 less the umask, as for PostgreSQL's own files: PostgreSQL runs restore_command with the umask of its
/// data directory.
fn options() -> fs::OpenOptions {
    let mut options = File::options();
    options.read(true).write(true);
    options
}

fn corrupt(message: impl std::fmt::Display) -> Error {
    Error::new(Failure::Code(Code::Corrupt), message)
}

/// Writes the pieces from `queue` into `target`, and checks the result.
pub(super) fn fill(
    target: &Target,
    filling: &Filling,
    queue: mpsc::Receiver<Bytes>,
) -> Result<Received, Error> {
    let mut file = &target.file;
    file.set_len(0).and_then(|()| file.rewind()).map_err(|error| target.failed(&error))?;
    let mut pieces = Pieces { queue, current: Bytes::new(), whole: false };
    let came = copy(target, filling, &mut pieces)?;
    let header = match (filling.shape.content, target.header(came)?) {
        (Content::History, _) | (_, None) => None,
        (_, Some(bytes)) => Some(check_header(filling, &bytes)?),
    };
    let full = filling.shape.full_size(came, header.as_ref());
    let Some(full) = full.filter(|_| pieces.is_whole()) else {
        let shape = filling.shape;
        return Err(corrupt(format!("check size: expected {shape:?}, found {came} bytes")));
    };
    if let WalFile::History(timeline) = filling.file {
        let mut content = vec![0; usize::try_from(came).unwrap_or(0)];
        let read = target.file.read_exact_at(&mut content, 0);
        read.map_err(|error| local("read", &target.path, &error))?;
        TimelineHistory::parse(timeline, &content).map_err(corrupt)?;
    }
    if full != came {
        target.file.set_len(full).map_err(|error| target.failed(&error))?;
    }
    let is_final = filling.shape.is_final();
    Ok(Received { size: full, is_final, segment: header.map(|header| header.segment_size) })
}

fn check_header(filling: &Filling, bytes: &[u8; 40]) -> Result<SegmentHeader, Error> {
    let header = SegmentHeader::parse(bytes).map_err(corrupt)?;
    if let WalFile::Segment(name) | WalFile::Partial(name) = filling.file {
        header.belongs_to(name).map_err(corrupt)?;
    }
    let expected = filling.expected.system_identifier;
    match expected.filter(|expected| *expected != header.system_identifier) {
        None => Ok(header),
        Some(expected) => {
            let found = header.system_identifier;
            let message = format!(
                "check system identifier: expected {expected} as in the data directory, found {found} in the WAL"
            );
            Err(Error::new(Failure::Code(Code::WrongSystem), message)
                .hint("this WAL belongs to another PostgreSQL; check --cluster"))
        }
    }
}

/// Decrypts and decompresses into the target; returns how many plain bytes were written.
fn copy(target: &Target, filling: &Filling, pieces: &mut Pieces) -> Result<u64, Error> {
    // One byte more than expected, so that surplus bytes are noticed.
    let limit = filling.shape.limit().saturating_add(1);
    match &filling.keys {
        None => copy_plain(target, filling.shape.compressed, &mut *pieces, limit),
        Some(keys) => {
            let plain = keys.decrypt(&mut *pieces).map_err(|e| crate::bucket::of_storage(&e))?;
            let plain = io::BufReader::with_capacity(COPY_BYTES, plain);
            copy_plain(target, filling.shape.compressed, plain, limit)
        }
    }
}

fn copy_plain(
    target: &Target,
    compressed: bool,
    from: impl io::BufRead,
    limit: u64,
) -> Result<u64, Error> {
    if !compressed {
        return pour(target, from.take(limit));
    }
    let decoder = zstd::stream::read::Decoder::with_buffer(from).map_err(corrupt)?;
    pour(target, decoder.take(limit))
}

fn pour(target: &Target, mut from: impl Read) -> Result<u64, Error> {
    let mut buffer = vec![0; COPY_BYTES];
    let mut came = 0;
    loop {
        let bytes = fill_buffer(&mut from, &mut buffer)
            .map_err(|error| corrupt(format!("decode: {error}")))?;
        if bytes == 0 {
            return Ok(came);
        }
        (&target.file).write_all(&buffer[..bytes]).map_err(|error| target.failed(&error))?;
        came += bytes as u64;
    }
}

/// Reads until the buffer is full or the input ends, to make as few writes as possible.
fn fill_buffer(from: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match from.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(bytes) => filled += bytes,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Reads from the queue. Ends with an error unless the empty piece has come, so that a lost connection never looks
/// like the end of the file (P7).
struct Pieces {
    queue: mpsc::Receiver<Bytes>,
    current: Bytes,
    whole: bool,
}

impl Pieces {
    /// Whether all pieces were read and nothing is left over.
    fn is_whole(&mut self) -> bool {
        matches!(io::BufRead::fill_buf(self), Ok(rest) if rest.is_empty())
    }
}

impl io::BufRead for Pieces {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.current.is_empty() && !self.whole {
            match self.queue.blocking_recv() {
                Some(piece) => {
                    self.whole = piece.is_empty();
                    self.current = piece;
                }
                None => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
        Ok(&self.current)
    }
    fn consume(&mut self, bytes: usize) {
        self.current.advance(bytes);
    }
}

impl Read for Pieces {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let available = io::BufRead::fill_buf(self)?;
        let bytes = available.len().min(out.len());
        out[..bytes].copy_from_slice(&available[..bytes]);
        io::BufRead::consume(self, bytes);
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests;
