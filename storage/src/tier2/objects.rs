//! Objects of any kind by their key: listings, ranges, whole small objects, removal.
//!
//! Only [`Tier2::replace`] and [`Tier2::remove`] destroy data, and only the server calls them: `replace`
//! for the few small objects whose content may change (a re-wrapped secret, the version in
//! `cluster.json`), and `remove` for retention, after P5 and P6. P7: an object is reported as missing
//! only if the bucket and directory could be listed, as in `fetch.rs`.

use super::{Download, Tier2, fault::classify};
use crate::{Error, Kind, Op};
use bytes::{Bytes, BytesMut};
use futures::TryStreamExt;
use object_store::{GetOptions, GetRange, ObjectStoreExt, PutMode, PutOptions, path::Path};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedObject {
    /// The key, the same as in tier 1.
    pub key: String,
    /// Size in bytes.
    pub size: u64,
    /// When it was written according to the store, Unix seconds.
    pub modified_unix: u64,
}

impl Tier2 {
    /// Every object below `prefix` (the key of a directory without a trailing slash), in no particular
    /// order.
    ///
    /// # Errors
    /// An error of the store; a missing bucket is an error, an empty one is not.
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

    /// Begins to read `length` bytes from `offset` on, or to the end with `None`. Requests no more than
    /// that from the store.
    ///
    /// # Errors
    /// `NotFound` is definitive; `Corrupt` when the object ends earlier.
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
                // Status 416, for which every store has its own text.
                Ok(Some(size)) if offset >= size => {
                    let detail = format!("expected more than {offset} bytes, found {size}");
                    Err(Error::new(Kind::Corrupt, Op::Download, self.place(key), detail))
                }
                _ => Err(classify(Op::Download, &self.place(key), error)),
            },
        }
    }

    /// Reads a whole object of at most `limit` bytes; `None` when it definitely does not exist.
    ///
    /// # Errors
    /// `Invalid` when it is larger; otherwise an error of the store.
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

    /// Writes a small object, replacing an existing one.
    ///
    /// # Errors
    /// An error of the store; then the old or the new object is there, complete.
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

    /// Removes an object; a missing one is not an error.
    ///
    /// # Errors
    /// An error of the store; `Denied` if the credentials do not allow it.
    pub async fn remove(&self, key: &str) -> Result<(), Error> {
        let path: Path = self.path(Op::Remove, key)?;
        self.require_directory(Op::Remove, key)?;
        match self.store.delete(&path).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(classify(Op::Remove, &self.place(key), error)),
        }
    }
}
