//! WAL from the bucket itself, without a server.
//!
//! P7: a file is absent when a listing of its place says so and the cluster has WAL in this bucket at all. A
//! segment that is missing while a later one of its timeline is there is a hole: it may still come, as uploads
//! run side by side, and if it does not, recovery has to stop and not to end.

use super::{Answer, Shape, WalSource};
use crate::{
    bucket::{Bucket, of_storage},
    error::{Error, Failure},
};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use klio_proto::Code;
use klio_storage::{
    Kind,
    catalog::{ForStandbys, PASSED_OVER},
    crypt::AtRest,
    layout::{ClusterName, Form, WalFile},
};
use std::sync::atomic::{AtomicBool, Ordering};

/// Reads a bucket.
pub(super) struct FromBucket {
    bucket: Bucket,
    cluster: ClusterName,
    /// PostgreSQL asks, which may be a standby.
    for_postgresql: bool,
    /// What the last file was: most often the next is the same, which saves a request.
    encrypted: AtomicBool,
    /// The cluster has WAL here.
    known: AtomicBool,
}

impl FromBucket {
    pub fn new(bucket: Bucket, cluster: ClusterName, for_postgresql: bool) -> Self {
        // Whoever gives an identity has something to decrypt.
        let encrypted = AtomicBool::new(bucket.keys.is_some());
        Self { bucket, cluster, for_postgresql, encrypted, known: AtomicBool::new(false) }
    }

    fn likely(&self) -> Form {
        if self.encrypted.load(Ordering::Relaxed) { Form::Age } else { Form::Plain }
    }

    /// Begins to read one object; `None` when it is definitively not there.
    async fn open(&self, file: WalFile, form: Form) -> Result<Option<Answer>, Error> {
        let key = file.key_in(&self.cluster, form);
        let download = match self.bucket.tier2.download(&key).await {
            Ok(download) => download,
            Err(error) if error.kind == Kind::NotFound => return Ok(None),
            Err(error) => return Err(of_storage(&error)),
        };
        self.encrypted.store(form == Form::Age, Ordering::Relaxed);
        self.known.store(true, Ordering::Relaxed);
        let keys = match (form, &self.bucket.keys) {
            (Form::Plain, _) => None,
            (Form::Age, Some(keys)) => Some(keys.clone()),
            (Form::Age, None) => return Err(no_identity(&key)),
        };
        // The answer has begun: what is missing from now on is trouble, not absence (P7).
        let pieces = download.map_err(|error| match error.kind {
            Kind::NotFound => Error::of_storage(Failure::Code(Code::Unavailable), &error),
            _ => of_storage(&error),
        });
        Ok(Some(Answer { shape: Shape::stored(file), keys, pieces: pieces.boxed() }))
    }

    async fn in_either_form(&self, file: WalFile, first: Form) -> Result<Option<Answer>, Error> {
        if let Some(answer) = self.open(file, first).await? {
            return Ok(Some(answer));
        }
        self.open(file, first.other()).await
    }

    async fn segment(&self, file: WalFile, name: klio_pg::SegmentName) -> Result<Answer, Error> {
        if let Some(answer) = self.open(file, self.likely()).await? {
            return Ok(answer);
        }
        let tier2 = &self.bucket.tier2;
        let mut at = tier2.wal_at(&self.cluster, name).await.map_err(|e| of_storage(&e))?;
        // A whole segment before its partial one.
        at.held.sort_by_key(|(held, _)| matches!(held, WalFile::Partial(_)));
        for (held, form) in at.held {
            if let Some(mut answer) = self.open(held, form).await? {
                answer.shape.before_hole = at.later && matches!(held, WalFile::Partial(_));
                return Ok(answer);
            }
        }
        let why = match at.later {
            true => Some("later WAL of its timeline is".to_owned()),
            false => self.hole(name).await?,
        };
        if let Some(why) = why {
            self.known.store(true, Ordering::Relaxed);
            let message = format!("{file} is not in the bucket, but {why}");
            return Err(Error::new(Failure::Code(Code::Unavailable), message).hint(
                "it is being uploaded, or lost: klio list shows what is there, and what can be reached",
            ));
        }
        Err(self.absent(file).await?)
    }

    /// What a standby sees of a file: it would follow a history that it must not see.
    async fn seen(&self, file: WalFile) -> Result<ForStandbys, Error> {
        let WalFile::History(timeline) = file else { return Ok(ForStandbys::AsItIs) };
        if !self.for_postgresql || !super::a_standby_asks() {
            return Ok(ForStandbys::AsItIs);
        }
        let marks = self.bucket.timelines(&self.cluster).await?;
        if !marks.is_aside(timeline) {
            return Ok(ForStandbys::AsItIs);
        }
        let tier2 = &self.bucket.tier2;
        let held = tier2.timelines(&self.cluster).await.map_err(|e| of_storage(&e))?;
        let Some(followed) = marks.followed(held) else { return Ok(ForStandbys::Hidden) };
        let path = self.bucket.history(&self.cluster, followed).await?;
        Ok(marks.for_standbys(timeline, path.as_ref()))
    }

    /// Why a segment that is not there must have been there, of which a later timeline tells.
    async fn hole(&self, name: klio_pg::SegmentName) -> Result<Option<String>, Error> {
        let (tier2, cluster) = (&self.bucket.tier2, &self.cluster);
        let size = tier2.segment_size_of(cluster).await.map_err(|e| of_storage(&e))?;
        let at_rest = self.bucket.keys.clone().map_or(AtRest::Off, AtRest::On);
        let hole = tier2.hole_at(cluster, name, size, &at_rest).await;
        hole.map_err(|error| match error.kind {
            // Of a history that went meanwhile: never this segment's (P7).
            Kind::NotFound => Error::of_storage(Failure::Code(Code::Unavailable), &error),
            _ => of_storage(&error),
        })
    }

    /// The error for a file that is not there.
    async fn absent(&self, file: WalFile) -> Result<Error, Error> {
        if !self.known.load(Ordering::Relaxed) {
            let tier2 = &self.bucket.tier2;
            if !tier2.has_wal(&self.cluster).await.map_err(|e| of_storage(&e))? {
                // A wrong name or prefix must not look like the end of an archive (P7).
                let place = tier2.url();
                let message = format!("no WAL of a cluster {} is in {place}", self.cluster);
                return Ok(Error::new(Failure::Config, message)
                    .hint("are --cluster and --from as klio-server has them?"));
            }
            self.known.store(true, Ordering::Relaxed);
        }
        let message = format!("the bucket has no {file} of cluster {}", self.cluster);
        Ok(Error::new(Failure::Code(Code::NotFound), message))
    }
}

#[tonic::async_trait]
impl WalSource for FromBucket {
    async fn ask(&self, file: WalFile, other_copy: bool) -> Result<Answer, Error> {
        match self.seen(file).await? {
            ForStandbys::AsItIs => {}
            ForStandbys::PassedOver => {
                let pieces = stream::iter([Ok(Bytes::from_static(PASSED_OVER.as_bytes()))]).boxed();
                return Ok(Answer { shape: Shape::stored(file), keys: None, pieces });
            }
            ForStandbys::Hidden => return Err(self.absent(file).await?),
        }
        let first = if other_copy { self.likely().other() } else { self.likely() };
        match file {
            WalFile::Segment(name) if !other_copy => self.segment(file, name).await,
            _ => match self.in_either_form(file, first).await? {
                Some(answer) => Ok(answer),
                None if other_copy => {
                    Err(Error::new(Failure::Code(Code::Unavailable), format!("{file} is gone")))
                }
                None => Err(self.absent(file).await?),
            },
        }
    }
}

fn no_identity(key: &str) -> Error {
    Error::new(Failure::Config, format!("read {key}: it is encrypted, and no identity was given"))
        .hint("name the age identity file with --identity, KLIO_RESTORE__IDENTITY or restore.identity")
}

#[cfg(test)]
mod tests;
