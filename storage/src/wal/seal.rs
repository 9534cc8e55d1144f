//! Turns a finished journal into a sealed file: one standard zstd file with exactly the segment's bytes.
//!
//! - The journal goes only after the sealed file, its name included, is durable. A crash anywhere leaves one of them.
//! - Compressed frames are copied as they are; runs of small raw ones are joined, up to 1 MiB, and compressed.
//! - Every frame's checksum and length is checked, and the sum must be the segment.
//! - The same journal gives the same bytes, so sealing again after a crash changes nothing (I2).
//!
//! Memory: three buffers of at most about 1 MiB, whatever the segment size.

use super::{
    cluster::{Cluster, Unsealed, lock},
    frame::{Codec, FRAME_RAW_MAX},
    journal::Frames,
    scratch::Scratch,
    types::Sealed,
};
use crate::{
    Error, Kind, Op,
    disk::{Disk, FileHandle, durable, read_full},
    layout::WalFile,
};
use klio_pg::SegmentName;
use sha2::{Digest, Sha256};
use std::{path::Path, sync::Arc};

const WRITE_BYTES: usize = 256 << 10;

/// A file being written from its beginning to its end, hashed on the way.
struct Output<'a> {
    file: FileHandle,
    path: &'a Path,
    buffer: Vec<u8>,
    written: u64,
    hash: Sha256,
}

impl Output<'_> {
    fn put(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.hash.update(bytes);
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= WRITE_BYTES { self.drain() } else { Ok(()) }
    }

    fn drain(&mut self) -> Result<(), Error> {
        self.file
            .write_all_at(&self.buffer, self.written)
            .map_err(|e| Error::io(Op::Write, self.path, e))?;
        self.written += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    fn finish(mut self) -> Result<(u64, [u8; 32]), Error> {
        self.drain()?;
        self.file.sync_all().map_err(|e| Error::io(Op::Sync, self.path, e))?;
        Ok((self.written, self.hash.finalize().into()))
    }
}

impl Cluster {
    /// Seals a finished journal, or says again what was sealed.
    pub(super) fn seal(&self, file: WalFile) -> Result<Sealed, Error> {
        let segment = match file {
            WalFile::History(_) => return self.sealed_before(file),
            WalFile::Segment(segment) | WalFile::Partial(segment) => segment,
        };
        let Some(entry) = lock(&self.state).journal(segment).filter(|j| !j.is_empty()) else {
            return self.sealed_before(file);
        };
        let outcome = self.seal_entry(file, segment, entry);
        self.note(&self.path_of(file), &outcome);
        outcome
    }

    fn seal_entry(
        &self,
        file: WalFile,
        segment: SegmentName,
        entry: Arc<Unsealed>,
    ) -> Result<Sealed, Error> {
        let one = lock(&entry.work);
        if !lock(&self.state).holds(&entry) {
            return self.sealed_before(file);
        }
        self.check_finished(file, &entry)?;
        let path = self.path_of(file);
        let (size, sha256) = self.write_sealed(&path, &entry)?;
        {
            let mut state = lock(&self.state);
            let line = state.lines.entry(segment.timeline()).or_default();
            line.extend_sealed(entry.start, entry.durable());
            line.journals.remove(&entry.start);
        }
        drop(one);
        // Out of the map nobody new finds it; who has it now keeps the file as it is.
        self.recycle(&entry.path, Arc::strong_count(&entry) == 1);
        Ok(Sealed { file, size, sha256 })
    }

    fn check_finished(&self, file: WalFile, entry: &Unsealed) -> Result<(), Error> {
        let good = match file {
            WalFile::Partial(_) => !entry.is_full() && lock(&self.state).has_ended(entry),
            _ => entry.is_full(),
        };
        if good {
            return Ok(());
        }
        let detail = format!(
            "expected a finished file, found its journal durable up to {}",
            entry.durable()
        );
        Err(Error::new(Kind::Invalid, Op::Seal, file, detail))
    }

    fn write_sealed(&self, path: &Path, entry: &Unsealed) -> Result<(u64, [u8; 32]), Error> {
        let disk = self.disk();
        let tmp = durable::tmp_path(path);
        durable::remove_if_there(disk, &tmp)?;
        let file = disk.create_new(&tmp).map_err(|e| Error::io(Op::Create, &tmp, e))?;
        let write = || {
            let output = Output {
                file,
                path: &tmp,
                buffer: Vec::with_capacity(WRITE_BYTES),
                written: 0,
                hash: Sha256::new(),
            };
            let done = self.shared.pool.with(|scratch| encode(disk, entry, scratch, output))?;
            durable::rename(disk, &tmp, path)?;
            Ok(done)
        };
        write().inspect_err(|_: &Error| {
            // The first error is the one to report; start removes what is left.
            let _ = disk.remove(&tmp);
        })
    }

    /// Size and checksum of a file that is sealed already.
    fn sealed_before(&self, file: WalFile) -> Result<Sealed, Error> {
        let path = self.path_of(file);
        let stored = self.disk().open(&path, false).map_err(|e| Error::io(Op::Seal, &path, e))?;
        let (mut hash, mut size) = (Sha256::new(), 0);
        let mut piece = vec![0; WRITE_BYTES];
        loop {
            let count = read_full(stored.as_ref(), &mut piece, size)
                .map_err(|e| Error::io(Op::Read, &path, e))?;
            if count == 0 {
                return Ok(Sealed { file, size, sha256: hash.finalize().into() });
            }
            hash.update(&piece[..count]);
            size += count as u64;
        }
    }
}

fn join(run: &mut Vec<u8>, scratch: &mut Scratch, output: &mut Output<'_>) -> Result<(), Error> {
    if run.is_empty() {
        return Ok(());
    }
    let no_memory =
        || Error::new(Kind::Transient, Op::Seal, output.path.display(), "no memory for zstd");
    let frame = scratch.zstd(run).ok_or_else(no_memory)?;
    output.put(frame)?;
    run.clear();
    Ok(())
}

fn encode(
    disk: &dyn Disk,
    entry: &Unsealed,
    scratch: &mut Scratch,
    mut output: Output<'_>,
) -> Result<(u64, [u8; 32]), Error> {
    let end = entry.durable();
    let mut frames = Frames::open(disk, &entry.path)?;
    let mut run = Vec::new();
    while frames.position() < end {
        let Some(frame) = frames.next()? else { break };
        match frame.header.codec {
            Codec::Raw => {
                if run.len() + frame.stored.len() > FRAME_RAW_MAX {
                    join(&mut run, scratch, &mut output)?;
                }
                run.extend_from_slice(frame.stored);
            }
            Codec::Zstd => {
                join(&mut run, scratch, &mut output)?;
                check_length(frame.stored, frame.header.raw_len, &entry.path)?;
                output.put(frame.stored)?;
            }
        }
    }
    if frames.position() != end {
        return Err(frames.lost(end));
    }
    join(&mut run, scratch, &mut output)?;
    output.finish()
}

fn check_length(stored: &[u8], expected: u32, path: &Path) -> Result<(), Error> {
    match zstd::zstd_safe::get_frame_content_size(stored) {
        Ok(Some(found)) if found == u64::from(expected) => Ok(()),
        other => {
            let detail = format!("expected a zstd frame of {expected} bytes, found {other:?}");
            Err(Error::new(Kind::Corrupt, Op::Seal, path.display(), detail))
        }
    }
}
