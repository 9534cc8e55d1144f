//! Turns a finished journal into a sealed file: one standard zstd file with exactly the segment's bytes, inside a
//! standard age file if encryption is on.
//!
//! - The journal is removed only after the sealed file, including its name, is durable. A crash at any point leaves at
//!   least one of them.
//! - Compressed frames are copied unchanged; runs of small raw ones are joined, up to 1 MiB, and compressed.
//! - The checksum or tag and the length of every frame are checked, and all frames together must make up the segment.
//! - The same journal yields the same plain bytes, so sealing again after a crash changes nothing (WAL2). The encrypted
//!   bytes differ, because every age file has a key of its own: compare the plain content.
//!
//! Memory: three buffers of at most about 1 MiB, whatever the segment size.

use super::{
    cluster::{Cluster, Unsealed, lock},
    frame::{Codec, FRAME_RAW_MAX},
    journal::Frames,
    kept::{self, Harm},
    scratch::Scratch,
    stored::Sink,
    types::Sealed,
};
use crate::{Error, Kind, Op, crash_point, layout::WalFile};
use klio_pg::SegmentName;
use std::{io::Write, path::Path, sync::Arc};

impl Cluster {
    /// Seals a finished journal, or returns the result again if it is sealed already.
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
        let written = Frames::open(self.disk(), &entry.path, &self.keys()).and_then(|frames| {
            self.write_stored(file, |sink, tmp| {
                self.shared.pool.with(|scratch| encode(frames, &entry, scratch, sink, tmp))
            })
        });
        let (size, sha256) = written.map_err(|error| self.found_rotten(&entry, error))?;
        // Held until the file is gone: otherwise somebody who no longer finds the journal in the map might create one
        // of the same name, and its file would be removed (P1).
        let file_goes = lock(&self.files);
        {
            let mut state = lock(&self.state);
            let line = state.lines.entry(segment.timeline()).or_default();
            line.extend_sealed(entry.start, entry.durable());
            line.journals.remove(&entry.start);
        }
        drop(one);
        // The journal is no longer in the map, so no new reader finds it; if a current reader still has it, the file is
        // not reused.
        self.recycle(&entry.path, Arc::strong_count(&entry) == 1);
        drop(file_goes);
        crash_point!("seal.recycled");
        Ok(Sealed { file, form: self.form(), size, sha256 })
    }

    /// Records the damage of a journal that was complete when written but is not on disk: PostgreSQL may still have its
    /// WAL.
    fn found_rotten(&self, entry: &Unsealed, error: Error) -> Error {
        if error.kind != Kind::Corrupt || !entry.is_full() {
            return error;
        }
        let good = Frames::open(self.disk(), &entry.path, &self.keys()).and_then(|mut frames| {
            frames.skip_to(entry.end)?;
            Ok(frames.position())
        });
        let from = good.unwrap_or(entry.start);
        if from == entry.end {
            // Every frame is intact; writing the sealed file itself failed.
            return error;
        }
        entry.set_harm(Some(Harm { from, to: entry.end }));
        error.hint(kept::ASKED)
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

    /// Size and checksum of a file that is sealed already.
    fn sealed_before(&self, file: WalFile) -> Result<Sealed, Error> {
        let stored = self.stored(file)?.ok_or_else(|| {
            let detail = "expected a journal or a sealed file, found none";
            Error::new(Kind::NotFound, Op::Seal, self.path_of(file).display(), detail)
        })?;
        let (size, sha256) = self.sum_stored(&stored)?;
        Ok(Sealed { file, form: stored.form, size, sha256 })
    }
}

/// The sealed file that is being written.
struct Target<'a> {
    sink: &'a mut Sink,
    path: &'a Path,
}

impl Target<'_> {
    fn put(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.sink.write_all(bytes).map_err(|e| Error::io(Op::Write, self.path, e))
    }
}

fn join(run: &mut Vec<u8>, scratch: &mut Scratch, target: &mut Target<'_>) -> Result<(), Error> {
    if run.is_empty() {
        return Ok(());
    }
    let no_memory =
        || Error::new(Kind::Transient, Op::Seal, target.path.display(), "no memory for zstd");
    let frame = scratch.zstd(run).ok_or_else(no_memory)?;
    target.put(frame)?;
    run.clear();
    Ok(())
}

fn encode(
    mut frames: Frames,
    entry: &Unsealed,
    scratch: &mut Scratch,
    sink: &mut Sink,
    path: &Path,
) -> Result<(), Error> {
    let mut target = Target { sink, path };
    let end = entry.durable();
    let mut run = Vec::new();
    while frames.position() < end {
        let Some(frame) = frames.next()? else { break };
        match frame.header.codec {
            Codec::Raw => {
                if run.len() + frame.stored.len() > FRAME_RAW_MAX {
                    join(&mut run, scratch, &mut target)?;
                }
                run.extend_from_slice(frame.stored);
            }
            // The iterator skips closing frames.
            Codec::Closing => {}
            Codec::Zstd => {
                join(&mut run, scratch, &mut target)?;
                check_length(frame.stored, frame.header.raw_len, &entry.path)?;
                target.put(frame.stored)?;
            }
        }
    }
    if frames.position() != end {
        return Err(frames.lost(end));
    }
    join(&mut run, scratch, &mut target)
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
