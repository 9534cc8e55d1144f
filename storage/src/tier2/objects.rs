//! Objects of any kind by their key: listings, ranges, small ones as a whole, removal.
//!
//! [`Tier2::replace`] and [`Tier2::remove`] are the only calls that take something away. Both are for
//! the server alone: `replace` for the few small objects whose content may change (a re-wrapped secret,
//! the version in `cluster.json`), `remove` for retention, behind P5 and P6.
//! P7: an absence is told only where bucket and directory could be listed, as in `fetch.rs`.

use super::{Download, Tier2, fault::classify};
use crate::{Error, Kind, Op};
use bytes::{Bytes, BytesMut};
use futures::TryStreamExt;
use object_store::{GetOptions, GetRange, ObjectStoreExt, PutMode, PutOptions, path::Path};

/// An object of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedObject {
    /// Its key, as in tier 1.
    pub key: String,
    /// Bytes.
    pub size: u64,
    /// Unix time in seconds at which the store says it was written.
    pub modified_unix: u64,
}

impl Tier2 {
    /// Every object below `prefix` (a directory's key without the last slash), in no promised order.
    ///
    /// # Errors
    /// As the store fails; a missing bucket is an error, an empty one is not.
    pub async fn list_prefix(&self, prefix: &str) -> Result<Vec<ListedObject>, Error> {
        let path = self.path(Op::List, prefix)?;
        self.require_directory(Op::List, prefix)?;
        let fail = |error| classify(Op::List, &self.place(prefix), error);
        let objects = self.store.list(Some(&path)).map_err(fail);
        let listed = objects.map_ok(|meta| ListedObject {
            key: meta.location.to_string(),
            size: meta.size,
            modified_unix: u64::try_from(meta.last_modified.timestamp()).unwrap_or(0),
        });
        listed.try_collect().await
    }

    /// Begins to read `length` bytes from `offset` on; to the end with `None`. Asks the store for no more
    /// than that.
    ///
    /// # Errors
    /// `NotFound` is definitive; `Corrupt` when the object ends before.
    pub async fn download_range(
        &self,
        key: &str,
        offset: u64,
        length: Option<u64>,
    ) -> Result<Download, Error> {
        let path = self.path(Op::Download, key)?;
        self.require_directory(Op::Download, key)?;
        let range = match length {
            Some(length) => GetRange::Bounded(offset..offset.saturating_add(length)),
            None => GetRange::Offset(offset),
        };
        let options = GetOptions { range: Some(range), ..GetOptions::default() };
        match self.store.get_opts(&path, options).await {
            Ok(object) => {
                let found = object.range.end - object.range.start;
                if let Some(expected) = length.filter(|length| *length != found) {
                    let detail = format!("expected {expected} bytes at {offset}, found {found}");
                    return Err(Error::new(Kind::Corrupt, Op::Download, self.place(key), detail));
                }
                Ok(self.downloading(key, object))
            }
            Err(object_store::Error::NotFound { .. }) => Err(self.why_missing(key, &path).await),
            Err(error) => match self.size_of(key).await {
                // 416, which each store words in another way.
                Ok(Some(size)) if offset >= size => {
                    let detail = format!("expected more than {offset} bytes, found {size}");
                    Err(Error::new(Kind::Corrupt, Op::Download, self.place(key), detail))
                }
                _ => Err(classify(Op::Download, &self.place(key), error)),
            },
        }
    }

    /// A whole object of at most `limit` bytes; `None` when it definitively does not exist.
    ///
    /// # Errors
    /// `Invalid` when it is larger; as the store fails.
    pub async fn read_small(&self, key: &str, limit: u64) -> Result<Option<Bytes>, Error> {
        let mut download = match self.download(key).await {
            Ok(download) => download,
            Err(error) if error.kind == Kind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        if download.size > limit {
            let detail = format!("expected at most {limit} bytes, found {}", download.size);
            return Err(Error::new(Kind::Invalid, Op::Download, self.place(key), detail));
        }
        let mut content = BytesMut::with_capacity(download.size as usize);
        while let Some(chunk) = download.try_next().await? {
            content.extend_from_slice(&chunk);
        }
        Ok(Some(content.freeze()))
    }

    /// Puts a small object over whatever is there.
    ///
    /// # Errors
    /// As the store fails; then the old or the new one is there, whole.
    pub async fn replace(&self, key: &str, content: Bytes) -> Result<(), Error> {
        let path = self.path(Op::Upload, key)?;
        self.require_directory(Op::Upload, key)?;
        let options = PutOptions {
            mode: PutMode::Overwrite,
            attributes: self.attributes.clone(),
            ..PutOptions::default()
        };
        let put = self.store.put_opts(&path, content.into(), options).await;
        put.map(|_| ()).map_err(|error| classify(Op::Upload, &self.place(key), error))
    }

    /// Removes an object; one that is not there is no error.
    ///
    /// # Errors
    /// As the store fails; `Denied` where the credentials do not allow it.
    pub async fn remove(&self, key: &str) -> Result<(), Error> {
        let path: Path = self.path(Op::Remove, key)?;
        self.require_directory(Op::Remove, key)?;
        match self.store.delete(&path).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(classify(Op::Remove, &self.place(key), error)),
        }
    }
}
