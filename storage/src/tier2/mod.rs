//! Tier 2: an object store, named by a URL.
//!
//! What a successful upload guarantees (P5):
//! OBJECT1  the object exists under its key with the size of the local file, checked after the upload;
//! OBJECT2  its bytes are the local file's: S3 compared them with our SHA-256 on arrival, or they were read again, or
//!          they have the same plaintext in another compression or encryption;
//! OBJECT3  an object is complete or absent: a failed upload leaves nothing under the key;
//! OBJECT4  an existing object is never overwritten: other plaintext under the same key is `Kind::Conflict`.
//! OBJECT6  as an exception, the partial segment at the end of a timeline may grow: an object that is proven to be the
//!          beginning of such a file is replaced by all of it, and read again.
//!
//! `upload_memory` limits the memory of all uploads together. Only `objects.rs` may replace or remove, apart from
//! OBJECT6. P7: `Kind::NotFound` is definitive; a missing bucket or an unmounted directory has another kind.

mod attempts;
mod compare;
mod config;
mod date;
mod dial;
mod fault;
mod fetch;
mod http;
mod lanes;
mod link;
mod list;
mod local;
mod measure;
mod objects;
mod open;
mod pace;
mod parts;
mod payload;
mod progress;
mod segments;
mod transfer;
mod unfinished;

#[cfg(test)]
pub(crate) mod tests;

pub use crate::sum::{Hasher, Sha256Sum, Sha256SumError};
pub use config::{Checksums, Encryption, Secret, Tier2Config};
pub use date::HeardDate;
pub use fetch::Download;
pub use list::StoredObject;
pub use local::{Source, Wrapping};
pub use objects::ListedObject;
pub use progress::{Moved, Progress};
pub use segments::WalAt;
pub use transfer::{Outcome, Uploaded};

use crate::{Error, Kind, Op};
use object_store::{Attribute, Attributes, ObjectStore, multipart::MultipartStore, path::Path};
use std::{path::PathBuf, sync::Arc};
use tokio::sync::Semaphore;

/// A cheap handle to the store; clones share its connections and its memory budget.
#[derive(Clone)]
pub struct Tier2 {
    store: Arc<dyn ObjectStore>,
    parts: Option<Arc<dyn MultipartStore>>,
    unfinished: unfinished::Unfinished,
    lanes: lanes::Lanes,
    url: Arc<str>,
    /// For `file://` only: it must exist, otherwise a missing file would mean nothing.
    directory: Option<PathBuf>,
    dates: date::Dates,
    replacing: http::Replacing,
    attributes: Attributes,
    budget: Arc<Semaphore>,
    budget_kib: u32,
    /// OBJECT2: uploads are read again, because the store compares nothing on arrival.
    verifies_by_reading: bool,
}

impl std::fmt::Debug for Tier2 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tier2").field("url", &self.url).finish_non_exhaustive()
    }
}

impl Tier2 {
    /// Opens the store without contacting it. A rustls provider must be installed first.
    ///
    /// # Errors
    /// `Kind::Invalid` with every problem of the configuration; `Io` or `Denied` for the CA file.
    pub fn open(config: &Tier2Config) -> Result<Self, Error> {
        let opened = open::open(config)?;
        let mut attributes = Attributes::new();
        if let Some(class) = &config.storage_class {
            attributes.insert(Attribute::StorageClass, class.clone().into());
        }
        let budget_kib =
            u32::try_from(config.upload_memory.bytes() / 1024).unwrap_or(u32::MAX >> 3);
        Ok(Self {
            store: opened.store,
            parts: opened.parts,
            unfinished: unfinished::Unfinished::default(),
            lanes: lanes::Lanes::new(config.request_timeout()),
            url: config.url.as_str().into(),
            directory: opened.directory,
            dates: opened.dates,
            replacing: opened.replacing,
            attributes,
            budget: Arc::new(Semaphore::new(budget_kib as usize)),
            budget_kib,
            verifies_by_reading: config.checksum == Checksums::None,
        })
    }

    /// The URL it was opened with; contains no secret.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The last time that the bucket reported; `None` for a directory.
    pub fn heard_date(&self) -> Option<HeardDate> {
        self.dates.last()
    }

    /// Checks bucket and credentials with a listing.
    ///
    /// # Errors
    /// The kind says what to do; the hint says where to look.
    pub async fn probe(&self) -> Result<(), Error> {
        self.require_directory(Op::List, "")?;
        self.store
            .list_with_delimiter(None)
            .await
            .map(|_| ())
            .map_err(|error| fault::classify(Op::List, &self.url, error))
    }

    fn place(&self, key: &str) -> String {
        format!("{}/{key}", self.url.trim_end_matches('/'))
    }

    fn path(&self, op: Op, key: &str) -> Result<Path, Error> {
        Path::parse(key).map_err(|error| Error::new(Kind::Invalid, op, self.place(key), error))
    }

    fn require_directory(&self, op: Op, key: &str) -> Result<(), Error> {
        match &self.directory {
            Some(directory) if !directory.is_dir() => Err(Error::new(
                Kind::Transient,
                op,
                self.place(key),
                "expected the directory of tier 2, found none",
            )
            .hint("check that the disk or share is mounted")),
            _ => Ok(()),
        }
    }
}
