//! Finished files on tier 1: plain or in an age file, written and read as streams.
//!
//! - A file may exist in both forms for a moment, or for good after a crash; both have the same content, and either is
//!   used.
//! - New files have the form that the settings ask for. The other form is removed once the new file is durable.
//! - A file is complete or absent: temporary file, fsync, rename, fsync of the directory.

use super::cluster::Cluster;
use crate::{
    Error, Kind, Op, crash_point,
    crypt::{Encrypted, payload_error},
    disk::{FileHandle, Stat, durable},
    layout::{Form, WalFile},
};
use sha2::{Digest, Sha256};
use std::{
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

const WRITE_BYTES: usize = 256 << 10;

/// A file that is being written; its bytes are hashed as they are stored.
pub(super) struct Output {
    file: FileHandle,
    buffer: Vec<u8>,
    written: u64,
    hash: Sha256,
}

impl Output {
    fn drain(&mut self) -> io::Result<()> {
        self.file.write_all_at(&self.buffer, self.written)?;
        self.written += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.hash.update(bytes);
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= WRITE_BYTES {
            self.drain()?;
        }
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        self.drain()
    }
}

/// Takes the plain bytes of a finished file and writes them in the chosen form.
pub(super) enum Sink {
    Plain(Output),
    Age(Box<Encrypted<Output>>),
}

impl Sink {
    fn finish(self) -> io::Result<Output> {
        match self {
            Sink::Plain(output) => Ok(output),
            Sink::Age(encrypted) => encrypted.finish(),
        }
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Sink::Plain(output) => output.write(bytes),
            Sink::Age(encrypted) => encrypted.write(bytes),
        }
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads a file from its beginning.
pub(super) struct DiskReader {
    pub(super) file: FileHandle,
    pub(super) at: u64,
}

impl Read for DiskReader {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read_at(out, self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

/// A finished file that exists.
pub(super) struct StoredAt {
    pub(super) path: PathBuf,
    pub(super) form: Form,
    pub(super) stat: Stat,
}

impl Cluster {
    /// The form of new files.
    pub(super) fn form(&self) -> Form {
        if self.shared.options.at_rest.is_on() { Form::Age } else { Form::Plain }
    }

    pub(super) fn path_in(&self, file: WalFile, form: Form) -> PathBuf {
        self.wal_directory().join(file.relative_in(form))
    }

    /// The path of a new file.
    pub(super) fn path_of(&self, file: WalFile) -> PathBuf {
        self.path_in(file, self.form())
    }

    /// Looks for a finished file in either form.
    pub(super) fn stored(&self, file: WalFile) -> Result<Option<StoredAt>, Error> {
        for form in [self.form(), self.form().other()] {
            let path = self.path_in(file, form);
            match self.disk().stat(&path) {
                Ok(stat) => return Ok(Some(StoredAt { path, form, stat })),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(Error::io(Op::Read, &path, e)),
            }
        }
        Ok(None)
    }

    /// The decrypted content of a finished file: zstd, or a history. Convert its errors with [`payload_error`].
    pub(super) fn open_plain(&self, path: &Path, form: Form) -> Result<Box<dyn Read>, Error> {
        let file = self.disk().open(path, false).map_err(|e| Error::io(Op::Read, path, e))?;
        let reader = DiskReader { file, at: 0 };
        match form {
            Form::Plain => Ok(Box::new(reader)),
            Form::Age => {
                let keys = self.shared.options.at_rest.need(path.display())?;
                Ok(Box::new(keys.decrypt(reader).map_err(|e| e.at(path.display()))?))
            }
        }
    }

    /// The whole content of a small file, at most `limit` bytes.
    pub(super) fn read_plain(&self, path: &Path, form: Form, limit: u64) -> Result<Vec<u8>, Error> {
        let mut content = Vec::new();
        let mut reader = self.open_plain(path, form)?.take(limit + 1);
        reader.read_to_end(&mut content).map_err(|e| payload_error(path.display(), &e))?;
        if content.len() as u64 > limit {
            let detail = format!("expected at most {limit} bytes, found more");
            return Err(Error::new(Kind::Corrupt, Op::Read, path.display(), detail));
        }
        Ok(content)
    }

    /// Writes a finished file, durably, and removes its other form. Returns its size and checksum as stored.
    pub(super) fn write_stored(
        &self,
        file: WalFile,
        fill: impl FnOnce(&mut Sink, &Path) -> Result<(), Error>,
    ) -> Result<(u64, [u8; 32]), Error> {
        let (disk, path) = (self.disk(), self.path_of(file));
        let tmp = durable::tmp_path(&path);
        durable::remove_if_there(disk, &tmp)?;
        let handle = disk.create_new(&tmp).map_err(|e| Error::io(Op::Create, &tmp, e))?;
        let write = || {
            let buffer = Vec::with_capacity(WRITE_BYTES);
            let output = Output { file: handle.clone(), buffer, written: 0, hash: Sha256::new() };
            let mut sink = match self.shared.options.at_rest.writing() {
                None => Sink::Plain(output),
                Some(keys) => Sink::Age(Box::new(keys.encrypt(output)?)),
            };
            fill(&mut sink, &tmp)?;
            let finish = || -> io::Result<Output> {
                let mut output = sink.finish()?;
                output.drain()?;
                Ok(output)
            };
            let output = finish().map_err(|e| Error::io(Op::Write, &tmp, e))?;
            output.file.sync_all().map_err(|e| Error::io(Op::Sync, &tmp, e))?;
            crash_point!("seal.written");
            durable::rename(disk, &tmp, &path)?;
            crash_point!("seal.renamed");
            Ok((output.written, output.hash.finalize().into()))
        };
        let done = write().inspect_err(|_: &Error| {
            // The first error is the one to report; recovery at the next start removes the rest.
            let _ = disk.remove(&tmp);
        })?;
        self.remove_other_form(file);
        Ok(done)
    }

    /// Removes the form that earlier settings left. It has the same content, so it does no harm if it stays.
    fn remove_other_form(&self, file: WalFile) {
        let other = self.path_in(file, self.form().other());
        if let Err(error) = durable::remove_if_there(self.disk(), &other) {
            tracing::warn!(%error, "cannot remove the other form of a finished file; it stays");
        }
    }

    /// Size and checksum of a file that is finished already.
    pub(super) fn sum_stored(&self, stored: &StoredAt) -> Result<(u64, [u8; 32]), Error> {
        let failed = |e| Error::io(Op::Read, &stored.path, e);
        let file = self.disk().open(&stored.path, false).map_err(failed)?;
        let mut reader = DiskReader { file, at: 0 };
        let mut hash = Sha256::new();
        let mut piece = vec![0; WRITE_BYTES];
        loop {
            let count = reader.read(&mut piece).map_err(failed)?;
            if count == 0 {
                return Ok((reader.at, hash.finalize().into()));
            }
            hash.update(&piece[..count]);
        }
    }
}
