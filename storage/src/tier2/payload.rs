//! Objects that are uploaded from memory: repository files, which are no longer than a pack.
//!
//! As for files, an existing object is never overwritten (OBJECT4), and an uploaded object is checked afterwards
//! (OBJECT1).

use super::{Download, Hasher, Sha256Sum, Tier2, transfer::Refused};
use crate::{Error, Kind, Op};
use bytes::{Bytes, BytesMut};
use futures::TryStreamExt;
use object_store::{PutMode, PutPayload};

impl Tier2 {
    /// Stores an object whose content is `parts` in order. If the same bytes are already there, that is not an error.
    ///
    /// # Errors
    /// `Conflict` for other bytes under the key; `Transient`, `Full`: try later; `Denied`, `Invalid`: a person has to
    /// act.
    pub async fn put_bytes(&self, key: &str, parts: &[Bytes]) -> Result<(), Error> {
        let path = self.path(Op::Upload, key)?;
        self.require_directory(Op::Upload, key)?;
        let payload: PutPayload = parts.iter().cloned().collect();
        let size = payload.content_length() as u64;
        let _share = self.take_budget(size).await?;
        if self.find(key, &path).await?.is_some() {
            return self.require_same(key, &payload).await;
        }
        let mut put = self.put_payload(key, &path, payload.clone(), PutMode::Create).await;
        if matches!(put, Err(Refused::Unconditional)) {
            // As for files: nothing was there, and a cluster has only one server.
            put = self.put_payload(key, &path, payload.clone(), PutMode::Overwrite).await;
        }
        match put {
            Ok(()) => {}
            Err(Refused::Failed(error)) => return Err(error),
            Err(Refused::Exists | Refused::Unconditional) => {
                return self.require_same(key, &payload).await;
            }
        }
        match self.find(key, &path).await?.map(|meta| meta.size) {
            Some(found) if found == size => Ok(()),
            found => {
                let detail = format!("expected {size} bytes after the upload, found {found:?}");
                Err(Error::new(Kind::Transient, Op::Upload, self.place(key), detail))
            }
        }
    }

    async fn require_same(&self, key: &str, payload: &PutPayload) -> Result<(), Error> {
        let mut hasher = Hasher::default();
        payload.iter().for_each(|part| hasher.update(part));
        let found = self.download(key).await?.whole().await?;
        if Sha256Sum::of(&found) == hasher.finish() {
            return Ok(());
        }
        Err(Error::new(
            Kind::Conflict,
            Op::Upload,
            self.place(key),
            "expected no object, found one with other bytes",
        ))
    }
}

impl Download {
    /// Reads all of it into memory.
    ///
    /// # Errors
    /// An error of the store.
    pub async fn whole(mut self) -> Result<Bytes, Error> {
        let Some(first) = self.try_next().await? else { return Ok(Bytes::new()) };
        let Some(second) = self.try_next().await? else { return Ok(first) };
        let mut all = BytesMut::from(first);
        all.extend_from_slice(&second);
        while let Some(part) = self.try_next().await? {
            all.extend_from_slice(&part);
        }
        Ok(all.freeze())
    }
}
