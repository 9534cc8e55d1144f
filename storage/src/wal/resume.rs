//! Continues behind a sealed partial segment: its timeline seemed to be over, and then its PostgreSQL came back.
//!
//! - The new journal begins with exactly the bytes of the sealed file, synced before any byte is added (P2).
//! - The sealed file stays until a longer one replaces it, when the timeline is over again. It stays for good if the
//!   segment becomes full. A crash in between leaves either a journal with fewer bytes, which is removed at start as
//!   redundant, or one with at least as many, which is used.
//!
//! Memory: one frame, whatever the segment size.

use super::{
    cluster::{Cluster, Unsealed, lock},
    decode,
    frame::FRAME_RAW_MAX,
    journal::Journal,
    types::Pinned,
};
use crate::{Error, Kind, Op, disk::durable, layout::WalFile};
use klio_pg::{Lsn, SegmentName};
use std::sync::Arc;

impl Cluster {
    /// The journal of a segment whose sealed partial file ends at `end`; `None` if there is no such file.
    pub(super) fn resume_partial(
        &self,
        segment: SegmentName,
        end: Lsn,
        pinned: &Pinned,
    ) -> Result<Option<(Journal, Arc<Unsealed>)>, Error> {
        let Some(stored) = self.stored(WalFile::Partial(segment))? else { return Ok(None) };
        let start = end.segment_start(pinned.segment_size);
        let limit = pinned.segment_size.bytes();
        let mut reader = self.open_plain(&stored.path, stored.form)?;
        let ahead = self.shared.options.preallocate;
        let created = {
            // The sealed journal had the same name, and its file may be about to be removed.
            let _one = lock(&self.files);
            self.create_journal(segment.timeline(), start, ahead)?
        };
        let mut filling = Filling::new(created, start);
        let path = filling.journal.path.clone();
        let decoded =
            decode::decode_reader(&mut reader, limit, &mut |piece| filling.take(self, piece));
        let filled = decoded
            .map_err(|e| if e.op == Op::Decode { e.at(stored.path.display()) } else { e })
            .and_then(|_| filling.finish(self, end));
        let journal = match filled {
            Ok(journal) => journal,
            Err(error) => {
                // The first error is the one to report; recovery at the next start removes the rest.
                let _ = durable::remove_if_there(self.disk(), &path);
                if error.kind == Kind::Corrupt {
                    // Set it aside, so that PostgreSQL is asked for the segment again from its beginning.
                    self.doubt(WalFile::Partial(segment))?;
                }
                return Err(error);
            }
        };
        let entry = Arc::new(Unsealed::new(&journal.header, path, end, true));
        entry.set_used(journal.offset);
        let mut state = lock(&self.state);
        let line = state.lines.entry(segment.timeline()).or_default();
        line.journals.insert(start, Arc::clone(&entry));
        Ok(Some((journal, entry)))
    }
}

/// A journal that is being filled.
#[derive(Debug)]
pub(super) struct Filling {
    journal: Journal,
    at: Lsn,
    waiting: Vec<u8>,
}

impl Filling {
    /// Starts at `at`, the beginning of the journal.
    pub(super) fn new(journal: Journal, at: Lsn) -> Self {
        Self { journal, at, waiting: Vec::new() }
    }

    /// Appends the next bytes.
    pub(super) fn take(&mut self, cluster: &Cluster, piece: &[u8]) -> Result<(), Error> {
        for part in piece.chunks(FRAME_RAW_MAX) {
            if self.waiting.len() + part.len() > FRAME_RAW_MAX {
                self.write(cluster)?;
            }
            self.waiting.extend_from_slice(part);
        }
        Ok(())
    }

    fn write(&mut self, cluster: &Cluster) -> Result<(), Error> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let Self { journal, at, waiting } = self;
        cluster.shared.pool.with(|scratch| {
            let Journal { header, cipher, offset, .. } = &*journal;
            let frame =
                scratch.frame(header, cipher.as_deref(), *offset, (*at, header.start), waiting);
            let written = journal.file.write_all_at(frame, journal.offset);
            journal.offset += frame.len() as u64;
            written.map_err(|e| Error::io(Op::Write, &journal.path, e))
        })?;
        journal.allocated = journal.allocated.max(journal.offset);
        *at = at.advance(waiting.len() as u64);
        waiting.clear();
        Ok(())
    }

    /// Syncs the journal and checks that it has all bytes up to `end`.
    pub(super) fn finish(mut self, cluster: &Cluster, end: Lsn) -> Result<Journal, Error> {
        let path = self.journal.path.clone();
        self.write(cluster)?;
        if self.at != end {
            let detail = format!("expected WAL up to {end}, found it up to {}", self.at);
            return Err(Error::new(Kind::Corrupt, Op::Read, path.display(), detail));
        }
        self.journal.file.sync_all().map_err(|e| Error::io(Op::Sync, &path, e))?;
        Ok(self.journal)
    }
}
