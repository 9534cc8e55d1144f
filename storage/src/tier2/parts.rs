//! Multipart uploads: parts that the store has acknowledged are not sent again.
//!
//! A part that fails is sent again after a pause, while the others continue. If the attempt fails nevertheless, the
//! acknowledged parts are kept for the next one ([`unfinished`](super::unfinished)). That attempt compares each kept
//! part with the file once more, and the whole file with its checksum, before it asks the store to make an object of
//! them. An upload that is given up is aborted. A process that dies in the middle leaves parts behind, which S3 keeps
//! forever unless a lifecycle rule of the bucket removes them, but no object (OBJECT3).

use super::{
    Sha256Sum, Tier2,
    fault::{classify, passes, stood_still},
    lanes::Lane,
    local::Local,
    progress::Progress,
    transfer::Refused,
    unfinished::{Acknowledged, Begun, Underway},
};
use crate::{Error, Kind, Op, sum::Hasher};
use bytes::Bytes;
use object_store::{
    MultipartId, ObjectStoreExt, PutMultipartOptions,
    multipart::{MultipartStore, PartId},
    path::Path,
};
use std::{sync::Arc, time::Duration};
use tokio::{
    fs::File,
    io::AsyncReadExt,
    task::{JoinError, JoinSet},
    time::Instant,
};
use tracing::Instrument;

/// Larger files are sent in parts of this size. S3 requires at least 5 MiB per part, and `upload_memory` is based on
/// this size.
pub(super) const PART_BYTES: u64 = 8 << 20;
/// Parts of one file in flight: hides the round trip without letting one file take the whole budget.
const PARTS_IN_FLIGHT: usize = 2;
/// How often one part is sent again within an attempt.
const PART_RETRIES: u32 = 4;
const PART_PAUSE: Duration = Duration::from_millis(500);
/// The most unfinished uploads to keep per store: more than there are concurrent uploads.
const KEPT_MAX: usize = 64;
/// Read at a time when a part is only compared.
const BLOCK_BYTES: u64 = 128 << 10;

/// The result of sending a part.
type Sent = (usize, Sha256Sum, object_store::Result<PartId>);

/// Why a started upload did not produce an object.
enum Ended {
    /// The store no longer knows the upload.
    Forgotten(Error),
    Refused(Refused),
}

impl From<Error> for Ended {
    fn from(error: Error) -> Self {
        Ended::Refused(Refused::Failed(error))
    }
}

impl Tier2 {
    /// The same store, for a process that retries failed uploads and calls [`Tier2::abandon`] at its end: the parts
    /// that the store has of them are kept in between.
    #[must_use]
    pub fn keeping_parts(self) -> Self {
        self.unfinished.keep_up_to(KEPT_MAX);
        self
    }

    /// Discards the parts of unfinished uploads at the store. None are kept from now on.
    pub async fn abandon(&self) {
        self.unfinished.give_up_all();
        if let Some(store) = &self.parts {
            self.abort_given_up(store).await;
        }
    }

    pub(super) async fn put_parts(
        &self,
        key: &str,
        path: &Path,
        local: &Local,
    ) -> Result<(), Refused> {
        let Some(store) = &self.parts else { return self.put_in_pieces(key, path, local).await };
        let result = self.put_kept_or_anew(store, key, path, local).await;
        self.abort_given_up(store).await;
        result
    }

    async fn put_kept_or_anew(
        &self,
        store: &Arc<dyn MultipartStore>,
        key: &str,
        path: &Path,
        local: &Local,
    ) -> Result<(), Refused> {
        if let Some(begun) = self.unfinished.take(key, local.size, local.sha256) {
            tracing::debug!(key, parts = begun.parts.len(), "continuing an unfinished upload");
            match self.finish(store, key, begun, local).await {
                Ok(()) => return Ok(()),
                Err(Ended::Refused(refused)) => return Err(refused),
                Err(Ended::Forgotten(error)) => {
                    tracing::debug!(key, %error, "the store no longer knows an unfinished upload; starting over");
                }
            }
        }
        let begun = self.begin(store, key, path, local).await.map_err(Refused::Failed)?;
        match self.finish(store, key, begun, local).await {
            Ok(()) => Ok(()),
            Err(Ended::Refused(refused)) => Err(refused),
            Err(Ended::Forgotten(error)) => Err(Refused::Failed(error)),
        }
    }

    async fn begin(
        &self,
        store: &Arc<dyn MultipartStore>,
        key: &str,
        path: &Path,
        local: &Local,
    ) -> Result<Begun, Error> {
        let options = PutMultipartOptions {
            attributes: self.attributes.clone(),
            ..PutMultipartOptions::default()
        };
        let fail = |error| classify(Op::Upload, &self.place(key), error);
        let id = store.create_multipart_opts(path, options).await.map_err(fail)?;
        Ok(Begun::new(path.clone(), id, local.size, local.sha256))
    }

    async fn finish(
        &self,
        store: &Arc<dyn MultipartStore>,
        key: &str,
        begun: Begun,
        local: &Local,
    ) -> Result<(), Ended> {
        let mut underway = Underway::new(self.unfinished.clone(), key, begun);
        let sent = self.send_missing(store, key, &mut underway.begun, local).await;
        let result = match sent {
            Ok(()) => self.complete(store, key, &underway.begun).await,
            Err(ended) => Err(ended),
        };
        match &result {
            Ok(()) | Err(Ended::Forgotten(_)) => underway.ended(),
            // Dropping it keeps the parts for the next attempt.
            Err(Ended::Refused(Refused::Failed(error)))
                if matches!(error.kind, Kind::Transient | Kind::Full | Kind::Denied) => {}
            Err(_) => underway.give_up(),
        }
        result
    }

    async fn complete(
        &self,
        store: &Arc<dyn MultipartStore>,
        key: &str,
        begun: &Begun,
    ) -> Result<(), Ended> {
        use object_store::Error as E;
        const EXISTS: Ended = Ended::Refused(Refused::Exists);
        // Completing overwrites, so look once more: sending the parts may have taken minutes.
        let there = self.find(key, &begun.path).await?;
        if !self.replacing.gives_way(key, there.as_ref()) {
            return Err(EXISTS);
        }
        let parts = begun.parts.values().map(|part| part.id.clone()).collect();
        // If the store supports it, it completes the upload only if there is still no object (http.rs).
        match store.complete_multipart(&begun.path, &begun.id, parts).await {
            Ok(_) => Ok(()),
            Err(E::AlreadyExists { .. } | E::Precondition { .. }) => Err(EXISTS),
            // An earlier request may have succeeded although its answer was lost.
            Err(error @ E::NotFound { .. }) => match self.find(key, &begun.path).await? {
                Some(_) => Err(EXISTS),
                None => Err(Ended::Forgotten(classify(Op::Upload, &self.place(key), error))),
            },
            Err(error) => Err(classify(Op::Upload, &self.place(key), error).into()),
        }
    }

    /// Sends the parts that the store has not acknowledged; returns only when nothing is in flight.
    async fn send_missing(
        &self,
        store: &Arc<dyn MultipartStore>,
        key: &str,
        begun: &mut Begun,
        local: &Local,
    ) -> Result<(), Ended> {
        let mut sending = JoinSet::new();
        let mut result = self.start_missing(store, key, begun, local, &mut sending).await;
        // If one part fails, the parts that the others have sent so far are still useful.
        while let Some(done) = sending.join_next().await {
            result = result.and(self.part_done(key, begun, done));
        }
        result
    }

    async fn start_missing(
        &self,
        store: &Arc<dyn MultipartStore>,
        key: &str,
        begun: &mut Begun,
        local: &Local,
        sending: &mut JoinSet<Sent>,
    ) -> Result<(), Ended> {
        let mut file = Parts::open(local).await?;
        for (index, length) in lengths(local.size) {
            if let Some(kept) = begun.parts.get(&index).map(|part| part.sha256) {
                if file.pass(length).await? != kept {
                    begun.parts.remove(&index);
                    return Err(changed(local).into());
                }
                continue;
            }
            while sending.len() >= self.lanes.width().min(PARTS_IN_FLIGHT) {
                let Some(done) = sending.join_next().await else { break };
                self.part_done(key, begun, done)?;
            }
            let Some(lane) = self.lanes.take().await else { return Err(changed(local).into()) };
            // Waiting here cannot deadlock: whoever holds a share of the budget needs no further lane, and will return
            // it.
            let permit = self.take_budget(length).await?;
            let bytes = file.read(length).await?;
            let (store, path, id) = (Arc::clone(store), begun.path.clone(), begun.id.clone());
            let task = async move {
                let _permit = permit;
                let sum = Sha256Sum::of(&bytes);
                (index, sum, send(store.as_ref(), &path, &id, index, bytes, lane).await)
            };
            sending.spawn(Progress::carried(task.in_current_span()));
        }
        match file.sum() == local.sha256 {
            true => Ok(()),
            false => Err(changed(local).into()),
        }
    }

    fn part_done(
        &self,
        key: &str,
        begun: &mut Begun,
        done: Result<Sent, JoinError>,
    ) -> Result<(), Ended> {
        match done {
            Ok((index, sha256, Ok(id))) => {
                begun.parts.insert(index, Acknowledged { id, sha256 });
                Ok(())
            }
            Ok((_, _, Err(error @ object_store::Error::NotFound { .. }))) => {
                Err(Ended::Forgotten(classify(Op::Upload, &self.place(key), error)))
            }
            Ok((_, _, Err(error))) => Err(classify(Op::Upload, &self.place(key), error).into()),
            Err(error) => Err(Error::new(Kind::Io, Op::Upload, self.place(key), error).into()),
        }
    }

    /// Tells the store to discard uploads that nobody will finish.
    async fn abort_given_up(&self, store: &Arc<dyn MultipartStore>) {
        let mut reachable = true;
        for (path, id) in self.unfinished.given_up() {
            if !reachable {
                self.unfinished.again(path, id);
                continue;
            }
            let Err(error) = store.abort_multipart(&path, &id).await else { continue };
            tracing::debug!(%error, key = %path, "cannot abort an abandoned upload");
            if passes(&error) {
                reachable = false;
                self.unfinished.again(path, id);
            }
        }
    }

    /// A local directory has no slow network, so nothing of an interrupted copy is kept.
    async fn put_in_pieces(&self, key: &str, path: &Path, local: &Local) -> Result<(), Refused> {
        let fail = |error| Refused::Failed(classify(Op::Upload, &self.place(key), error));
        let mut upload = self.store.put_multipart(path).await.map_err(fail)?;
        let sent: Result<(), Refused> = async {
            let mut file = Parts::open(local).await.map_err(Refused::Failed)?;
            for (_, length) in lengths(local.size) {
                let _permit = self.take_budget(length).await.map_err(Refused::Failed)?;
                let bytes = file.read(length).await.map_err(Refused::Failed)?;
                upload.put_part(bytes.into()).await.map_err(fail)?;
                if let Some(progress) = Progress::current() {
                    progress.add(length, std::time::Instant::now());
                }
            }
            if file.sum() != local.sha256 {
                return Err(Refused::Failed(changed(local)));
            }
            // Completing overwrites.
            let there = self.find(key, path).await.map_err(Refused::Failed)?;
            match self.replacing.gives_way(key, there.as_ref()) {
                false => Err(Refused::Exists),
                true => upload.complete().await.map(drop).map_err(fail),
            }
        }
        .await;
        if sent.is_err()
            && let Err(error) = upload.abort().await
        {
            tracing::debug!(%error, key, "cannot remove an unfinished copy of a file");
        }
        sent
    }
}

/// Sends one part, and retries after a pause if that may help. A link without progress ends the attempt; the next one
/// comes later.
async fn send(
    store: &dyn MultipartStore,
    path: &Path,
    id: &MultipartId,
    index: usize,
    bytes: Bytes,
    lane: Lane,
) -> object_store::Result<PartId> {
    let mut retries = 0;
    loop {
        let begun = Instant::now();
        let error = match store.put_part(path, id, index, bytes.clone().into()).await {
            Ok(part) => {
                lane.arrived(begun.elapsed());
                return Ok(part);
            }
            Err(error) => error,
        };
        if !passes(&error) {
            return Err(error);
        }
        lane.lost();
        if retries == PART_RETRIES || stood_still(&error) {
            return Err(error);
        }
        tracing::debug!(%error, key = %path, part = index + 1, "sending a part failed; trying again");
        let pause = PART_PAUSE.saturating_mul(1 << retries);
        tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..=1.0))).await;
        retries += 1;
    }
}

fn changed(local: &Local) -> Error {
    let detail = "expected an unchanged file, found that it changed during the upload";
    Error::new(Kind::Transient, Op::Read, local.source.path.display(), detail)
}

/// Index and length of each part.
fn lengths(size: u64) -> impl Iterator<Item = (usize, u64)> {
    let begins = (0..size).step_by(PART_BYTES as usize);
    begins.map(move |begin| PART_BYTES.min(size - begin)).enumerate()
}

/// Reads a file once, from beginning to end, in parts to upload, and hashes it.
struct Parts<'a> {
    file: File,
    of: &'a Local,
    hasher: Hasher,
}

impl<'a> Parts<'a> {
    async fn open(of: &'a Local) -> Result<Self, Error> {
        let file = File::open(&of.source.path).await;
        let file = file.map_err(|error| Error::io(Op::Read, &of.source.path, error))?;
        Ok(Self { file, of, hasher: Hasher::default() })
    }

    async fn read(&mut self, length: u64) -> Result<Bytes, Error> {
        let mut bytes = vec![0; length as usize];
        let read = self.file.read_exact(&mut bytes).await;
        read.map_err(|error| Error::io(Op::Read, &self.of.source.path, error))?;
        self.hasher.update(&bytes);
        Ok(bytes.into())
    }

    /// Hashes the next `length` bytes without keeping them in memory.
    async fn pass(&mut self, length: u64) -> Result<Sha256Sum, Error> {
        let (mut left, mut hasher) = (length, Hasher::default());
        while left > 0 {
            let block = self.read(left.min(BLOCK_BYTES)).await?;
            hasher.update(&block);
            left -= block.len() as u64;
        }
        Ok(hasher.finish())
    }

    fn sum(self) -> Sha256Sum {
        self.hasher.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_of_one_size_but_the_last_one() {
        let lengths = |size| lengths(size).collect::<Vec<_>>();
        assert_eq!(lengths(PART_BYTES * 2), [(0, PART_BYTES), (1, PART_BYTES)]);
        assert_eq!(lengths(PART_BYTES + 1), [(0, PART_BYTES), (1, 1)]);
        assert_eq!(lengths(5), [(0, 5)]);
        assert_eq!(lengths(0), []);
    }
}
