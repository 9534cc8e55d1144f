//! WAL directly from the bucket, without a server.
//!
//! P7: a file is absent if a listing of its place does not contain it and the cluster has any WAL in this bucket. A
//! segment that is missing although a later one of its timeline exists is a hole. It may still arrive, because
//! uploads run in parallel; if it does not, recovery must stop with an error instead of ending.

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

pub(super) struct FromBucket {
    bucket: Bucket,
    cluster: ClusterName,
    /// Whether PostgreSQL asks, which may be a standby.
    for_postgresql: bool,
    /// Whether the last file was encrypted. The next one most likely is the same, which saves a request.
    encrypted: AtomicBool,
    /// Whether the cluster is known to have WAL in this bucket.
    known: AtomicBool,
}

impl FromBucket {
    pub fn new(bucket: Bucket, cluster: ClusterName, for_postgresql: bool) -> Self {
        // A user who gives an identity has something to decrypt.
        let encrypted = AtomicBool::new(bucket.keys.is_some());
        Self { bucket, cluster, for_postgresql, encrypted, known: AtomicBool::new(false) }
    }

    fn likely(&self) -> Form {
        if self.encrypted.load(Ordering::Relaxed) { Form::Age } else { Form::Plain }
    }

    /// Begins to read one object; `None` if it definitively does not exist.
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
        // The answer has begun, so an object that is missing from now on is an error, not an absent file (P7).
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
        // A whole segment before the partial one.
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
                "the file is still being uploaded, or lost; klio list shows which WAL exists and what can be reached",
            ));
        }
        Err(self.absent(file).await?)
    }

    /// What a standby is shown of a file: it would follow a history that is not meant for it.
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

    /// If a later timeline shows that a missing segment must have existed, the reason.
    async fn hole(&self, name: klio_pg::SegmentName) -> Result<Option<String>, Error> {
        let (tier2, cluster) = (&self.bucket.tier2, &self.cluster);
        let size = tier2.segment_size_of(cluster).await.map_err(|e| of_storage(&e))?;
        let at_rest = self.bucket.keys.clone().map_or(AtRest::Off, AtRest::On);
        let hole = tier2.hole_at(cluster, name, size, &at_rest).await;
        hole.map_err(|error| match error.kind {
            // The missing object is a history file that was removed meanwhile, not this segment (P7).
            Kind::NotFound => Error::of_storage(Failure::Code(Code::Unavailable), &error),
            _ => of_storage(&error),
        })
    }

    /// The error for a file that does not exist.
    async fn absent(&self, file: WalFile) -> Result<Error, Error> {
        if !self.known.load(Ordering::Relaxed) {
            let tier2 = &self.bucket.tier2;
            if !tier2.has_wal(&self.cluster).await.map_err(|e| of_storage(&e))? {
                // A wrong name or prefix must not look like the end of the archive (P7).
                let place = tier2.url();
                let message = format!("no WAL of a cluster {} is in {place}", self.cluster);
                return Ok(Error::new(Failure::Config, message)
                    .hint("check that --cluster and --from match klio-server's settings"));
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
    Error::new(
        Failure::Config,
        format!("read {key}: expected an identity to decrypt it, found none"),
    )
    .hint("name the age identity file with --identity, KLIO_RESTORE__IDENTITY or restore.identity")
}

#[cfg(test)]
mod tests;
