//! Puts a fetched file in its place: temporary file, exact size, fsync, rename, fsync of the folder.
//!
//! Runs on a blocking thread. Whatever fails, the temporary file goes away and PATH is as it was.

use super::Form;
use crate::error::{Error, Failure};
use bytes::{Buf, Bytes};
use klio_proto::Code;
use std::{
    fs::File,
    io::{self, Read, Write},
    path::{Path, PathBuf},
};
use tokio::sync::mpsc;

/// Writes what comes through `queue` to `path`.
pub(super) fn write(path: &Path, form: Form, queue: mpsc::Receiver<Bytes>) -> Result<(), Error> {
    let temporary = Temporary::create(path)?;
    fill(&temporary, form, Pieces { queue, current: Bytes::new(), whole: false })?;
    temporary.commit(path)
}

fn fill(target: &Temporary, form: Form, mut pieces: Pieces) -> Result<(), Error> {
    let mut file = &target.file;
    // One byte more than expected, to notice that there is more.
    let limit = form.limit().saturating_add(1);
    let copied = if form.compressed {
        let decoder = zstd::stream::read::Decoder::with_buffer(&mut pieces);
        decoder.and_then(|decoder| io::copy(&mut decoder.take(limit), &mut file))
    } else {
        io::copy(&mut (&mut pieces).take(limit), &mut file)
    };
    let copied = copied.map_err(|error| match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::PermissionDenied => target.failed(&error),
        // A stream that was cut off looks the same as a damaged one; the next attempt tells.
        _ => Error::new(Failure::Code(Code::Unavailable), format!("decode: {error}")),
    })?;
    let Some(full) = form.full_size(copied).filter(|_| pieces.is_whole()) else {
        let message = format!("check size: expected {form:?}, found {copied} bytes");
        return Err(Error::new(Failure::Code(Code::Unavailable), message));
    };
    target.file.set_len(full).map_err(|error| target.failed(&error))
}

/// The file beside PATH; removed when it does not become PATH.
struct Temporary {
    file: File,
    path: PathBuf,
    committed: bool,
}

impl Temporary {
    fn create(path: &Path) -> Result<Self, Error> {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".klio-part");
        let path = path.with_file_name(name);
        let file = File::create(&path).map_err(|error| local("create", &path, &error))?;
        Ok(Self { file, path, committed: false })
    }

    fn commit(mut self, path: &Path) -> Result<(), Error> {
        self.file.flush().map_err(|error| self.failed(&error))?;
        self.file.sync_all().map_err(|error| self.failed(&error))?;
        std::fs::rename(&self.path, path).map_err(|error| local("rename to", path, &error))?;
        self.committed = true;
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let synced = File::open(folder).and_then(|folder| folder.sync_all());
        synced.map_err(|error| local("sync folder", folder, &error))
    }

    fn failed(&self, error: &io::Error) -> Error {
        local("write", &self.path, error)
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.committed {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn local(doing: &str, path: &Path, error: &io::Error) -> Error {
    Error::new(Failure::Local, format!("{doing} {}: {error}", path.display()))
}

/// The queue as something to read. Ends with an error unless the empty piece came, so that a lost
/// connection never looks like the end (P7).
struct Pieces {
    queue: mpsc::Receiver<Bytes>,
    current: Bytes,
    whole: bool,
}

impl Pieces {
    /// Whether everything was read and nothing is left over.
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
mod tests {
    use super::{super::Full, *};

    const PLAIN: usize = 300_000;

    fn form(compressed: bool) -> Form {
        Form { compressed, plain: Some(PLAIN as u64), full: Full::Padded(1 << 20) }
    }

    /// Runs a write of `bytes`, cut into pieces; `whole` says whether the end marker comes.
    fn put(bytes: &[u8], form: Form, whole: bool) -> (Result<(), Error>, Option<Vec<u8>>, usize) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("RECOVERYXLOG");
        let (sender, queue) = mpsc::channel(10_000);
        for piece in bytes.chunks(1000) {
            sender.try_send(Bytes::copy_from_slice(piece)).unwrap();
        }
        if whole {
            sender.try_send(Bytes::new()).unwrap();
        }
        drop(sender);
        let result = write(&path, form, queue);
        let files = std::fs::read_dir(folder.path()).unwrap().count();
        (result, std::fs::read(&path).ok(), files)
    }

    fn plain() -> Vec<u8> {
        (0..PLAIN).map(|n| (n * 31 % 251) as u8 + 1).collect()
    }

    /// Two frames one after the other, each with a checksum, as the server stores segments.
    fn compressed() -> Vec<u8> {
        let plain = plain();
        let frame = |part: &[u8]| {
            let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
            encoder.include_checksum(true).unwrap();
            encoder.write_all(part).unwrap();
            encoder.finish().unwrap()
        };
        [frame(&plain[..PLAIN / 2]), frame(&plain[PLAIN / 2..])].concat()
    }

    #[test]
    fn a_segment_is_decoded_and_padded_to_its_full_size() {
        for (bytes, compress) in [(compressed(), true), (plain(), false)] {
            let (result, content, files) = put(&bytes, form(compress), true);
            assert_eq!(result, Ok(()));
            let content = content.unwrap();
            assert_eq!(content.len(), 1 << 20);
            assert!(content[..PLAIN] == plain() && content[PLAIN..].iter().all(|b| *b == 0));
            assert_eq!(files, 1);
        }
    }

    /// P7: a file that came half must not be there, not even under its temporary name.
    #[test]
    fn whatever_is_cut_off_leaves_nothing_behind() {
        let (all, raw) = (compressed(), plain());
        for cut in [0, 1, all.len() / 2, all.len() - 1] {
            for whole in [true, false] {
                let (result, content, files) = put(&all[..cut], form(true), whole);
                assert!(result.is_err(), "cut at {cut}, end marker {whole}");
                assert_eq!((content, files), (None, 0));
            }
        }
        assert!(put(&all, form(true), false).0.is_err(), "the end marker is missing");
        assert!(put(&raw[..PLAIN - 1], form(false), true).0.is_err());
    }

    #[test]
    fn too_much_and_damaged_bytes_are_refused() {
        let mut longer = compressed();
        longer.extend(compressed());
        assert!(put(&longer, form(true), true).0.is_err());
        let mut damaged = compressed();
        let middle = damaged.len() / 2;
        damaged[middle] ^= 0x10;
        let (result, content, files) = put(&damaged, form(true), true);
        assert!(result.is_err());
        assert_eq!((content, files), (None, 0));
    }

    #[test]
    fn an_existing_file_survives_a_failed_fetch() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        std::fs::write(&path, "old").unwrap();
        let (sender, queue) = mpsc::channel::<Bytes>(1);
        drop(sender);
        assert!(write(&path, form(true), queue).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
    }
}
