//! Uploads: complete or not at all, verified, never over another object.
//!
//! One PUT for up to 8 MiB, multipart above that (parts.rs).

use super::{
    Sha256Sum, Source, Tier2,
    fault::{classify, refuses_checksums, status},
    local::{Local, Wrapping},
};
use crate::{Error, Kind, Op};
use bytes::Bytes;
use object_store::{
    ObjectMeta, ObjectStoreExt, PutMode, PutOptions, PutPayload, UpdateVersion, path::Path,
};
use tokio::time::Instant;
use tracing::{Instrument, field::Empty};

/// How the object came to exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// This call wrote it.
    Stored,
    /// It already existed with the same content.
    AlreadyThere,
}

/// A proven object (OBJECT1, OBJECT2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Uploaded {
    /// Size of the object in bytes. Differs from the local file if an older object has the same plaintext in another
    /// compression or encryption.
    pub size: u64,
    /// Checksum of the local file.
    pub sha256: Sha256Sum,
    /// Whether this call wrote it.
    pub outcome: Outcome,
}

/// Why nothing was written.
pub(super) enum Refused {
    /// An object exists.
    Exists,
    /// The store does not support conditional writes.
    Unconditional,
    Failed(Error),
}

impl Tier2 {
    /// Uploads a finished file under `key`. Repeating it is harmless. Dropping the future stops it; the object is then
    /// absent or complete.
    ///
    /// # Errors
    /// `NotFound`: the local file does not exist. `Corrupt`: the local file is damaged. `Conflict`: other content
    /// exists under the key. `Denied`, `Invalid`: a person has to act. `Transient`, `Full`: try later.
    pub async fn upload(&self, source: &Source, key: &str) -> Result<Uploaded, Error> {
        let span = tracing::info_span!(
            "tier2.upload",
            otel.status_code = Empty,
            error.type = Empty,
            bytes = Empty,
            stored = Empty,
        );
        let result = self.upload_proven(source, key).instrument(span.clone()).await;
        match &result {
            Ok(uploaded) => {
                span.record("bytes", uploaded.size);
                span.record("stored", uploaded.outcome == Outcome::Stored);
            }
            Err(error) => {
                span.record("otel.status_code", "ERROR");
                span.record("error.type", error.kind.name());
            }
        }
        result
    }

    /// Proves P5 at this moment: reads the object again and compares it with the file. A missing object is uploaded
    /// first. Costs one download of the object.
    ///
    /// # Errors
    /// As [`Tier2::upload`].
    pub async fn prove(&self, source: &Source, key: &str) -> Result<Uploaded, Error> {
        let uploaded = self.upload(source, key).await?;
        match uploaded.outcome {
            // An existing object was already read and compared.
            Outcome::AlreadyThere => Ok(uploaded),
            Outcome::Stored => self.upload(source, key).await,
        }
    }

    async fn upload_proven(&self, source: &Source, key: &str) -> Result<Uploaded, Error> {
        let path = self.path(Op::Upload, key)?;
        self.require_directory(Op::Upload, key)?;
        let local = self.read_local(source).await?;
        let age = source.wrapping.age;
        // Checked first, because some stores accept a condition and ignore it (s3rver does).
        let (found, other) = tokio::join!(self.find(key, &path), self.find_other(&source.wrapping));
        if let Some(found) = found? {
            return self.compare(key, &path, &found, &local, age).await;
        }
        if let Some((key, path, found)) = other? {
            return self.compare(&key, &path, &found, &local, !age).await;
        }
        match self.put(key, &path, &local).await {
            Ok(()) => self.verify_uploaded(key, &path, &local).await,
            Err(Refused::Failed(error)) => Err(error),
            Err(Refused::Exists | Refused::Unconditional) => match self.find(key, &path).await? {
                // A retried PUT gets the same answer about its own first attempt.
                Some(found) => self.compare(key, &path, &found, &local, age).await,
                None => Err(Error::new(
                    Kind::Transient,
                    Op::Upload,
                    self.place(key),
                    "the store reported that it exists, then that it does not",
                )),
            },
        }
    }

    /// Looks for the same file in its other form.
    async fn find_other(
        &self,
        wrapping: &Wrapping,
    ) -> Result<Option<(String, Path, ObjectMeta)>, Error> {
        let Some(key) = &wrapping.other_key else { return Ok(None) };
        let path = self.path(Op::Upload, key)?;
        Ok(self.find(key, &path).await?.map(|found| (key.clone(), path, found)))
    }

    /// The object's metadata, or `None` on a 404. That is enough to decide whether to write, but not to report an
    /// object as missing (P7): `download` does that.
    pub(super) async fn find(&self, key: &str, path: &Path) -> Result<Option<ObjectMeta>, Error> {
        match self.store.head(path).await {
            Ok(meta) => Ok(Some(meta)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => {
                let told = classify(Op::Upload, &self.place(key), error);
                // The answer to a HEAD has no body with a reason, but the answer to a listing has.
                if told.kind == Kind::Denied
                    && let Err(why) = self.probe().await
                    && why.kind != Kind::Denied
                {
                    return Err(why);
                }
                Err(told)
            }
        }
    }

    /// OBJECT1: checks the uploaded object, and reads it if the store compared nothing (OBJECT2).
    async fn verify_uploaded(
        &self,
        key: &str,
        path: &Path,
        local: &Local,
    ) -> Result<Uploaded, Error> {
        let meta = self.find(key, path).await?;
        let found = meta.as_ref().map(|meta| meta.size);
        if let Some(meta) = meta.filter(|meta| self.verifies_by_reading && meta.size == local.size)
        {
            let age = local.source.wrapping.age;
            let read = self.compare(key, path, &meta, local, age).await?;
            return Ok(Uploaded { outcome: Outcome::Stored, ..read });
        }
        if found == Some(local.size) {
            let (size, sha256) = (local.size, local.sha256);
            return Ok(Uploaded { size, sha256, outcome: Outcome::Stored });
        }
        let detail = match found {
            Some(size) => format!("expected {} bytes after the upload, found {size}", local.size),
            None => "expected the uploaded object, found none".to_owned(),
        };
        Err(Error::new(Kind::Transient, Op::Upload, self.place(key), detail))
    }

    /// OBJECT6: replaces the object `found`, which is the beginning of the file, unless it has changed since. Readers
    /// see either object, complete. The result is read again, like any existing object.
    pub(super) async fn extend(
        &self,
        key: &str,
        path: &Path,
        found: &ObjectMeta,
        local: &Local,
    ) -> Result<Uploaded, Error> {
        let put = match &local.held {
            Some((bytes, _permit)) => {
                let version =
                    UpdateVersion { e_tag: found.e_tag.clone(), version: found.version.clone() };
                match self.put_once(key, path, bytes, PutMode::Update(version)).await {
                    Err(Refused::Unconditional) => {
                        self.put_once(key, path, bytes, PutMode::Overwrite).await
                    }
                    done => done,
                }
            }
            None => {
                let _replacing = self.replacing.begin(key, found);
                self.put_parts(key, path, local).await
            }
        };
        let changed =
            |detail: &str| Err(Error::new(Kind::Transient, Op::Upload, self.place(key), detail));
        match put {
            Ok(()) => {}
            Err(Refused::Failed(error)) => return Err(error),
            Err(_) => {
                return changed("the object changed while it was being replaced by a longer one");
            }
        }
        tracing::info!(key, bytes = local.size, "replaced a partial segment by a longer one");
        let back = self.find(key, path).await?.filter(|back| back.size == local.size);
        if back.is_none() || self.object_sum(key, path).await? != local.sha256 {
            return changed("expected the bytes that were just written, found others");
        }
        Ok(Uploaded { size: local.size, sha256: local.sha256, outcome: Outcome::Stored })
    }

    async fn put(&self, key: &str, path: &Path, local: &Local) -> Result<(), Refused> {
        let Some((bytes, _permit)) = &local.held else {
            return self.put_parts(key, path, local).await;
        };
        match self.put_once(key, path, bytes, PutMode::Create).await {
            // `find` said that there is no object, and a cluster has only one server: with such a store no better
            // guarantee is possible.
            Err(Refused::Unconditional) => {
                self.put_once(key, path, bytes, PutMode::Overwrite).await
            }
            result => result,
        }
    }

    async fn put_once(
        &self,
        key: &str,
        path: &Path,
        bytes: &Bytes,
        mode: PutMode,
    ) -> Result<(), Refused> {
        self.put_payload(key, path, bytes.clone().into(), mode).await
    }

    pub(super) async fn put_payload(
        &self,
        key: &str,
        path: &Path,
        payload: PutPayload,
        mode: PutMode,
    ) -> Result<(), Refused> {
        use object_store::Error as E;
        let options =
            PutOptions { mode, attributes: self.attributes.clone(), ..PutOptions::default() };
        let begun = Instant::now();
        let put = self.store.put_opts(path, payload, options).await;
        self.lanes.went(begun.elapsed());
        match put {
            Ok(_) => Ok(()),
            Err(E::AlreadyExists { .. } | E::Precondition { .. }) => Err(Refused::Exists),
            // This refusal is about the checksum header, not about the condition.
            Err(error) if refuses_checksums(&error) => {
                Err(Refused::Failed(classify(Op::Upload, &self.place(key), error)))
            }
            Err(E::NotImplemented { .. }) => Err(Refused::Unconditional),
            Err(error) if status(&error.to_string()) == Some(501) => Err(Refused::Unconditional),
            Err(error) => Err(Refused::Failed(classify(Op::Upload, &self.place(key), error))),
        }
    }
}
